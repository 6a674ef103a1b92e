"""The flow's velocity estimator: CosyVoice2's causal one-level U-Net of ResNet and transformer blocks.

Rows are time-major (B, T, C) throughout. Parameter names and arithmetic are upstream's (`flow.decoder.estimator.*`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.vocoder.chunks import CausalConv1d, KeyValueRing, Ring, Span, attend


@dataclass(frozen=True)
class EstimatorConfig:
    """Sizes of the estimator; the defaults are CosyVoice2's."""

    width: int = 256
    heads: int = 8
    head_width: int = 64
    transformer_blocks: int = 4  # per stage
    mid_stages: int = 12
    activation: Literal["mish", "silu"] = "mish"  # of the ResNet blocks; SiLU trains faster on CPUs


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of the flow time t (B,) in [0, 1]."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angle = 1000.0 * t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeMLP(nn.Module):
    """Sinusoidal features of the flow time → its embedding."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class CausalBlock(nn.Module):
    """Causal convolution, LayerNorm, activation. The list keeps upstream's indices (1 is a transposition there)."""

    def __init__(self, inputs: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.activation = F.silu if activation == "silu" else F.mish
        self.block = nn.ModuleList([CausalConv1d(inputs, outputs, 3), nn.Identity(), nn.LayerNorm(outputs)])

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        return self.activation(self.block[2](self.block[0](x, past)))

    def new_past(self, batch: int) -> Tensor:
        """Zeros for the start of a stream."""
        return self.block[0].new_past(batch)  # type: ignore[operator]


class ResNetBlock(nn.Module):
    """Two causal blocks with the time embedding added in between, and a linear shortcut."""

    def __init__(self, inputs: int, outputs: int, time_width: int, activation: str) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, outputs))
        self.block1 = CausalBlock(inputs, outputs, activation)
        self.block2 = CausalBlock(outputs, outputs, activation)
        self.res_conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor, pasts: list[Tensor] | None) -> Tensor:
        """x (B, T, inputs), time (B, time width), `pasts` of the two convolutions → (B, T, outputs)."""
        first, second = (None, None) if pasts is None else pasts
        hidden = self.block1(x, first) + self.mlp(time)[:, None]
        return self.block2(hidden, second) + F.linear(x, self.res_conv.weight[..., 0], self.res_conv.bias)


class Attention(nn.Module):
    """Multi-head self-attention without positions; the causal convolutions around it carry the order."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_k = nn.Linear(width, heads * head_width, bias=False)
        self.to_v = nn.Linear(width, heads * head_width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_width, width)])

    def forward(self, x: Tensor, span: Span, cache: KeyValueRing | None) -> Tensor:
        batch, rows, _ = x.shape
        query, key, value = (
            linear(x).view(batch, rows, self.heads, self.head_width).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )  # (B, H, T, d)
        if cache is not None:
            key, value = cache.extend(span, key, value)
        return self.to_out[0](attend(query, key, value, span.visible).transpose(1, 2).flatten(2))


class GeluLinear(nn.Module):
    """Linear layer and GELU, under upstream's name `proj`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """The list keeps upstream's indices (1 is a dropout there)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: EstimatorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn1 = Attention(config.width, config.heads, config.head_width)
        self.norm3 = nn.LayerNorm(config.width)
        self.ff = FeedForward(config.width)

    def forward(self, x: Tensor, span: Span, cache: KeyValueRing | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), span, cache)
        return x + self.ff(self.norm3(x))


@dataclass
class StageState:
    """One stage's stream: past rows of its convolutions (two, three with a closing one) and its attention rings."""

    pasts: list[Tensor]
    rings: list[KeyValueRing]


@dataclass
class EstimatorState:
    """A stream through the estimator at one flow time."""

    stages: list[StageState]
    final_past: Tensor


class Estimator(nn.Module):
    """Velocity (B, T, out) of a noisy mel, given everything it is conditioned on, at flow time t.

    Args:
        inputs: channels of the concatenated input: noisy mel, encoder output, and whatever else there is.
        outputs: mel bins.
    """

    def __init__(self, config: EstimatorConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        width, time_width = config.width, 4 * config.width
        self.time_mlp = TimeMLP(inputs, time_width)

        def stage(channels: int, closing: bool) -> nn.ModuleList:
            transformers = nn.ModuleList([TransformerBlock(config) for _ in range(config.transformer_blocks)])
            parts: list[nn.Module] = [ResNetBlock(channels, width, time_width, config.activation), transformers]
            return nn.ModuleList([*parts, CausalConv1d(width, width, 3)] if closing else parts)

        self.down_blocks = nn.ModuleList([stage(inputs, closing=True)])
        self.mid_blocks = nn.ModuleList([stage(width, closing=False) for _ in range(config.mid_stages)])
        self.up_blocks = nn.ModuleList([stage(2 * width, closing=True)])
        self.final_block = CausalBlock(width, width, config.activation)
        self.final_proj = nn.Conv1d(width, outputs, 1)

    def _stages(self) -> list[Any]:
        """Every stage as upstream nests it: ResNet block, transformer blocks and, first and last, a convolution."""
        return [*self.down_blocks, *self.mid_blocks, *self.up_blocks]

    def init_state(self, batch: int, ring: Ring) -> EstimatorState:
        """Caches of a new stream, for one flow time."""
        like, config = self.final_proj.weight, self.config
        states = []
        for resnet, transformers, *closing in self._stages():
            pasts = [convolution.new_past(batch) for convolution in (resnet.block1, resnet.block2, *closing)]
            rings = [KeyValueRing.allocate(batch, config.heads, ring, config.head_width, like) for _ in transformers]
            states.append(StageState(pasts, rings))
        return EstimatorState(states, self.final_block.new_past(batch))

    def embed_time(self, t: Tensor) -> Tensor:
        """Flow time (B,) → embedding (B, 4 · width); the same for every chunk of a stream."""
        return self.time_mlp(time_features(t, self.inputs).to(self.final_proj.weight.dtype))

    def forward(self, x: Tensor, time: Tensor, span: Span, state: EstimatorState | None = None) -> Tensor:
        """x (B, T, inputs), time (B, 4 · width) from `embed_time` → velocity (B, T, outputs)."""
        states = [None] * len(self._stages()) if state is None else state.stages
        skip: Tensor | None = None
        for index, (stage, memory) in enumerate(zip(self._stages(), states, strict=True)):
            if index == len(states) - 1 and skip is not None:
                x = torch.cat([x, skip], dim=-1)
            x = self._transform(stage, x, time, span, memory)
            if index == 0:
                skip = x
            if len(stage) > 2:
                x = stage[2](x, None if memory is None else memory.pasts[2])
        x = self.final_block(x, None if state is None else state.final_past)
        return F.linear(x, self.final_proj.weight[..., 0], self.final_proj.bias)

    @staticmethod
    def _transform(stage: Any, x: Tensor, time: Tensor, span: Span, memory: StageState | None) -> Tensor:
        x = stage[0](x, time, None if memory is None else memory.pasts[:2])
        for index, block in enumerate(stage[1]):
            x = block(x, span, None if memory is None else memory.rings[index])
        return x
