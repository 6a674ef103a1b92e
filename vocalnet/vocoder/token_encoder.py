"""Speech tokens (25 Hz) → frame-rate conditioning (50 Hz), offline or in chunks.

`TokenEncoder` is CosyVoice2's up-sampling conformer; its parameter names and arithmetic are upstream's
(`flow.encoder.*`), so that the released weights load. `ConvTokenEncoder` is a causal ConvNeXt with the same interface
and the structure of the speech tokenizer's train-time decoder, whose weights it can start from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError
from vocalnet.vocoder.chunks import CausalConv1d, KeyValueRing, Ring, Span
from vocalnet.vocoder.convnext import ConvNeXtBlock, Trunk


@dataclass(frozen=True)
class TokenEncoderConfig:
    """Sizes of the token encoder; the defaults are CosyVoice2's. `convnext` ignores heads, scale_input and dropout."""

    kind: Literal["conformer", "convnext"] = "conformer"
    width: int = 512
    heads: int = 8
    ffn: int = 2048
    blocks: int = 6
    up_blocks: int = 4
    lookahead: int = 3  # tokens
    conv_kernel: int = 0  # rows of the depthwise convolution in each block; 0: none, as in CosyVoice2 (conformer only)
    scale_input: bool = True  # multiply the embedded rows by √width, as upstream does
    dropout: float = 0.0


def position_features(first: int, rows: int, width: int, like: Tensor) -> Tensor:
    """sin and cos of each position at width / 2 frequencies, (rows, width): first all sines, then all cosines."""
    frequency = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    angle = torch.arange(first, first + rows, device=like.device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


class RelativeAttention(nn.Module):
    """Multi-head attention with relative sinusoidal positions (Transformer-XL, arXiv:1901.02860, section 3.3).

    The position term of the score is (q_i + v)·W·pe(i − j) with pe of sines and cosines of i − j. The addition theorems
    turn it into a product of something that depends on i alone with the features of j alone: no table of distances, no
    shifting, and keys may lie in a ring in any order.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, self.head_width))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, self.head_width))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.head_width).transpose(1, 2)  # (B, H, T, d)

    def forward(
        self, x: Tensor, query_features: Tensor, key_features: Tensor, span: Span, cache: KeyValueRing | None
    ) -> Tensor:
        """x (B, T, width); features of the queries' and keys' positions (T or keys, width) → (B, T, width)."""
        query, key, value = (self._heads(linear(x)) for linear in (self.linear_q, self.linear_k, self.linear_v))
        if cache is not None:
            key, value = cache.extend(span, key, value)
        # Upstream interleaves pe: even inputs of linear_pos take the sine of the distance, odd ones the cosine.
        weight = self.linear_pos.weight.view(self.heads, self.head_width, -1, 2)
        biased = query + self.pos_bias_v[:, None]
        on_sine, on_cosine = biased @ weight[..., 0], biased @ weight[..., 1]  # (B, H, T, width / 2)
        sine, cosine = query_features.chunk(2, dim=-1)
        turned = torch.cat([on_cosine * sine - on_sine * cosine, on_sine * sine + on_cosine * cosine], dim=-1)
        scores = (query + self.pos_bias_u[:, None]) @ key.transpose(-2, -1) + turned @ key_features.transpose(-2, -1)
        scores = scores.float() / math.sqrt(self.head_width)
        if span.visible is not None:
            scores = scores.masked_fill(~span.visible, -torch.inf)
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value  # (B, H, T, d)
        return self.linear_out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class ConvModule(nn.Module):
    """The conformer's convolution (arXiv:2005.08100), causal and with LayerNorm in place of batch normalisation."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise_conv = CausalConv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        """x (B, T, width), `past` (B, kernel - 1, width) → (B, T, width)."""
        gated = F.glu(F.linear(x, self.pointwise_conv1.weight[..., 0], self.pointwise_conv1.bias), dim=-1)
        mixed = F.silu(self.norm(self.depthwise_conv(gated, past)))
        return F.linear(mixed, self.pointwise_conv2.weight[..., 0], self.pointwise_conv2.bias)


@dataclass
class BlockState:
    """One conformer block's stream: attention ring and, with a convolution, its past rows."""

    attention: KeyValueRing
    past: Tensor | None


class ConformerBlock(nn.Module):
    """Pre-norm attention, optional causal convolution, feed-forward (upstream's ConformerEncoderLayer, not macaron)."""

    def __init__(self, config: TokenEncoderConfig) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(config.width, config.heads)
        self.feed_forward = FeedForward(config.width, config.ffn)
        self.norm_ff = nn.LayerNorm(config.width, eps=1e-12)
        self.norm_mha = nn.LayerNorm(config.width, eps=1e-12)
        self.conv_module = ConvModule(config.width, config.conv_kernel) if config.conv_kernel else None
        if self.conv_module is not None:
            self.norm_conv = nn.LayerNorm(config.width, eps=1e-12)
            self.norm_final = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch: int, ring: Ring) -> BlockState:
        """Caches of a new stream."""
        attention = self.self_attn
        like = self.norm_mha.weight
        past = None if self.conv_module is None else self.conv_module.depthwise_conv.new_past(batch)
        return BlockState(KeyValueRing.allocate(batch, attention.heads, ring, attention.head_width, like), past)

    def forward(
        self, x: Tensor, query_features: Tensor, key_features: Tensor, span: Span, state: BlockState | None
    ) -> Tensor:
        cache = None if state is None else state.attention
        attended = self.self_attn(self.norm_mha(x), query_features, key_features, span, cache)
        x = x + self.dropout(attended)
        if self.conv_module is not None:
            x = x + self.dropout(self.conv_module(self.norm_conv(x), None if state is None else state.past))
        x = x + self.dropout(self.feed_forward(self.norm_ff(x)))
        return x if self.conv_module is None else self.norm_final(x)


class InputLayer(nn.Module):
    """Linear and LayerNorm, scaled by √width where the configuration says so (upstream: `embed`, `up_embed`)."""

    def __init__(self, config: TokenEncoderConfig) -> None:
        super().__init__()
        self.out = nn.Sequential(
            nn.Linear(config.width, config.width), nn.LayerNorm(config.width), nn.Dropout(config.dropout)
        )
        self.scale = math.sqrt(config.width) if config.scale_input else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class LookaheadLayer(nn.Module):
    """Residual pair of convolutions; the first sees `lookahead` rows to the right, the second two to the left."""

    def __init__(self, width: int, lookahead: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, lookahead + 1)
        self.conv2 = CausalConv1d(width, width, 3)

    def forward(self, x: Tensor, ahead: Tensor, past: Tensor | None) -> Tensor:
        """x (B, T, width) and the rows after it (B, lookahead, width), zeros past the end → (B, T, width)."""
        seen = self.conv1(torch.cat([x, ahead], dim=1).transpose(1, 2)).transpose(1, 2)
        return x + self.conv2(F.leaky_relu(seen), past)


class Upsampling(nn.Module):
    """Every row `ratio` times, then a causal convolution."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = CausalConv1d(width, width, 2 * ratio + 1)

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        return self.conv(x.repeat_interleave(self.ratio, dim=1), past)


@dataclass
class TokenEncoderState:
    """A stream: past rows of the convolutions, rings of the blocks, and the features of the rings' positions."""

    lookahead_past: Tensor
    up_past: Tensor
    blocks: list[BlockState]
    up_blocks: list[BlockState]
    features: Tensor  # (ring capacity, width), token rate
    up_features: Tensor  # (ring capacity, width), frame rate


class TokenEncoder(nn.Module):
    """Token embeddings (B, T, width) → (B, ratio · T, width); `ratio` is frames per token."""

    def __init__(self, config: TokenEncoderConfig, ratio: int = 2) -> None:
        super().__init__()
        self.config = config
        self.embed = InputLayer(config)
        self.pre_lookahead_layer = LookaheadLayer(config.width, config.lookahead)
        self.encoders = nn.ModuleList([ConformerBlock(config) for _ in range(config.blocks)])
        self.up_layer = Upsampling(config.width, ratio)
        self.up_embed = InputLayer(config)
        self.up_encoders = nn.ModuleList([ConformerBlock(config) for _ in range(config.up_blocks)])
        self.after_norm = nn.LayerNorm(config.width)

    def init_state(self, batch: int, token_ring: Ring, frame_ring: Ring) -> TokenEncoderState:
        """Caches of a new stream; the rings count rows at the token rate and at the frame rate."""
        like, width = self.after_norm.weight, self.config.width
        return TokenEncoderState(
            self.pre_lookahead_layer.conv2.new_past(batch),
            self.up_layer.conv.new_past(batch),
            [block.init_state(batch, token_ring) for block in self.encoders],  # type: ignore[operator]
            [block.init_state(batch, frame_ring) for block in self.up_encoders],  # type: ignore[operator]
            like.new_zeros(token_ring.capacity, width),
            like.new_zeros(frame_ring.capacity, width),
        )

    def forward(
        self,
        embedded: Tensor,
        ahead: Tensor,
        token_span: Span,
        frame_span: Span,
        lengths: Tensor | None = None,
        state: TokenEncoderState | None = None,
    ) -> Tensor:
        """Encodes whole utterances (no state) or the next chunk of a stream.

        Args:
            embedded: (B, T, width) token embeddings.
            ahead: (B, ≤ lookahead, width) embeddings of the tokens that follow; fewer, or none, at the end.
            token_span, frame_span: what the rows see, at the token rate and at the frame rate.
            lengths: (B,) tokens of each utterance, where a batch is padded.
        """
        x = self.embed(torch.cat([embedded, ahead], dim=1))
        if lengths is not None:  # what follows an utterance's end counts as zero, padded or not
            x = x * (torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None])[..., None]
        rows = embedded.shape[1]
        x = F.pad(x, (0, 0, 0, self.config.lookahead - ahead.shape[1]))
        x = self.pre_lookahead_layer(x[:, :rows], x[:, rows:], None if state is None else state.lookahead_past)
        states, ring = (None, None) if state is None else (state.blocks, state.features)
        x = self._run(self.encoders, x, token_span, states, ring)
        x = self.up_embed(self.up_layer(x, None if state is None else state.up_past))
        states, ring = (None, None) if state is None else (state.up_blocks, state.up_features)
        return self.after_norm(self._run(self.up_encoders, x, frame_span, states, ring))

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, span: Span, states: list[BlockState] | None, ring: Tensor | None
    ) -> Tensor:
        features = position_features(span.first, span.rows, self.config.width, x)
        key_features = features
        if ring is not None:
            ring[span.slot : span.slot + span.rows] = features
            key_features = ring[: span.filled]
        for index, block in enumerate(blocks):
            x = block(x, features, key_features, span, None if states is None else states[index])
        return x


@dataclass
class ConvTokenEncoderState:
    """A stream: past rows of every convolution."""

    past: Tensor  # (B, kernel - 1 - lookahead, width), before the first convolution
    contexts: list[Tensor]  # token rate
    up_contexts: list[Tensor]  # frame rate


class ConvTokenEncoder(nn.Module):
    """Token embeddings (B, T, width) → (B, ratio · T, width) by causal ConvNeXt blocks.

    Only the first convolution looks ahead, so that a frame depends on its own token, the `lookahead` next ones and
    earlier ones; chunks do not matter here.
    """

    def __init__(self, config: TokenEncoderConfig, ratio: int = 2) -> None:
        super().__init__()
        self.config, self.ratio = config, ratio
        width, kernel = config.width, config.conv_kernel
        if kernel <= config.lookahead:
            raise ConfigError(
                f"encoder conv_kernel is {kernel}; a convnext needs more than its lookahead {config.lookahead}"
            )
        self.trunk = Trunk(width, width, config.blocks, config.ffn, kernel, config.lookahead)
        self.upsample = nn.Linear(width, ratio * width)
        self.blocks = nn.ModuleList([ConvNeXtBlock(width, config.ffn, kernel) for _ in range(config.up_blocks)])
        self.norm = nn.LayerNorm(width)

    def init_state(self, batch: int, token_ring: Ring, frame_ring: Ring) -> ConvTokenEncoderState:
        """Zeros for a new stream; the rings do not matter here."""
        like, reach = self.norm.weight, self.config.conv_kernel - 1
        contexts = [like.new_zeros(batch, reach, self.config.width) for _ in range(self.config.blocks)]
        up_contexts = [like.new_zeros(batch, reach, self.config.width) for _ in range(self.config.up_blocks)]
        return ConvTokenEncoderState(
            like.new_zeros(batch, self.trunk.input.past, self.config.width), contexts, up_contexts
        )

    def forward(
        self,
        embedded: Tensor,
        ahead: Tensor,
        token_span: Span,
        frame_span: Span,
        lengths: Tensor | None = None,
        state: ConvTokenEncoderState | None = None,
    ) -> Tensor:
        """As `TokenEncoder.forward`; the spans do not matter here."""
        rows = embedded.shape[1]
        x = torch.cat([embedded, ahead], dim=1)
        if lengths is not None:  # what follows an utterance's end counts as zero, padded or not
            x = x * (torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None])[..., None]
        past = x.new_zeros(len(x), self.trunk.input.past, x.shape[2]) if state is None else state.past
        x = torch.cat([past, x], dim=1)
        if state is not None:
            state.past = x[:, rows : rows + past.shape[1]]
        x = F.pad(x, (0, 0, 0, self.config.lookahead - ahead.shape[1]))
        x = self.trunk.input_norm(self.trunk.input.conv(x.transpose(1, 2)).transpose(1, 2))  # (B, rows, width)
        x = self.trunk.norm(self._run(self.trunk.blocks, x, None if state is None else state.contexts))
        x = self.upsample(x).unflatten(2, (self.ratio, -1)).flatten(1, 2)
        return self.norm(self._run(self.blocks, x, None if state is None else state.up_contexts))

    @staticmethod
    def _run(blocks: nn.ModuleList, x: Tensor, contexts: list[Tensor] | None) -> Tensor:
        for index, block in enumerate(blocks):
            if contexts is None:
                x = block(x)
            else:
                x, contexts[index] = block.step(x, contexts[index])  # type: ignore[operator]
        return x
