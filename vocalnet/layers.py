"""Llama layers for the text backbone and the speech decoder: rotary positions, cache, attention.

A layer has two lives. While training it is plain PyTorch with Hugging Face's parameter names. `LlamaLayer.pack` then
turns it into an inference layer: q, k and v become one product, gate and up another, in fp32, bf16 or int8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError
from vocalnet.linears import PackedLinear, Precision, compute_dtype, hadamard, pack_module, spread, spread_block
from vocalnet.native import NativeAttention, NativeLayer, NativeLinear, available
from vocalnet.native.layer import AttentionStruct
from vocalnet.norm import RMSNorm


@dataclass(frozen=True)
class LayerConfig:
    """Shape of one Llama layer. `kv_heads` and `head_dim` default to `heads` and `width // heads`."""

    width: int
    heads: int
    ffn: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ConfigError(f"heads is {self.heads}, kv_heads {self.key_heads}; heads must be a multiple of kv_heads")
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads; set head_dim")

    @property
    def key_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def size(self) -> int:
        """Size of one head."""
        return self.head_dim or self.width // self.heads


class Rotation(NamedTuple):
    """Cosines and signed sines of rotary positions, (..., T, 1, head_dim): they broadcast over heads."""

    cos: Tensor
    sin: Tensor

    def rows(self, first: int, last: int) -> Rotation:
        """The positions first ≤ t < last of a precomputed table."""
        return Rotation(self.cos[..., first:last, :, :], self.sin[..., first:last, :, :])

    def at(self, positions: Tensor) -> Rotation:
        """The given positions (T,) of a precomputed table (rows, …), which the host need not know."""
        return Rotation(self.cos.index_select(0, positions), self.sin.index_select(0, positions))


class Rotary(nn.Module):
    """Rotary position embedding in Llama's half-split layout (Su et al., 2021).

    Positions may be fractional: scaling them is how two streams are made to run at one pace.
    """

    inverse_frequency: Tensor

    def __init__(
        self, head_dim: int, base: float = 10000.0, inverse_frequency: Tensor | None = None, gain: float = 1.0
    ) -> None:
        """`inverse_frequency` (head_dim / 2,) and `gain` carry the scaled variants (Llama 3, YaRN)."""
        super().__init__()
        if inverse_frequency is None:
            inverse_frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("inverse_frequency", inverse_frequency.float(), persistent=False)
        self.gain = gain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Follows the module to a device, never to another dtype: bf16 frequencies would turn late rows astray."""
        exact = self.inverse_frequency
        super()._apply(fn, recurse)
        self.inverse_frequency = exact.to(self.inverse_frequency.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """positions (..., T), integer or float → Rotation of (..., T, 1, head_dim) in `dtype`."""
        angles = positions.float().unsqueeze(-1) * self.inverse_frequency.float()  # (..., T, D/2)
        cos, sin = angles.cos() * self.gain, angles.sin() * self.gain
        table = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return Rotation(*(part.unsqueeze(-2).to(dtype) for part in table))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns (..., T, heads, head_dim) by its positions.

    The sign sits in `rotation.sin`, so that swapping halves is a plain roll.
    """
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, -1), rotation.sin)


def rotate_(x: Tensor, rotation: Rotation) -> Tensor:
    """`rotate` in place, for inference."""
    rolled = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(rotation.cos).addcmul_(rolled, rotation.sin)


@dataclass
class KVCache:
    """Keys and values of one layer, allocated once; `length` rows of it are in use.

    Keys are stored rotated, so rows may lie in any order. Rewinding is `truncate`; nothing is moved.
    """

    pair: Tensor  # (B, 2 · key heads, capacity, head_dim): keys, then values
    length: int = 0

    @classmethod
    def allocate(
        cls,
        batch: int,
        config: LayerConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache of `capacity` rows."""
        return cls(torch.empty(batch, 2 * config.key_heads, capacity, config.size, dtype=dtype, device=device))

    @property
    def capacity(self) -> int:
        """How many rows fit."""
        return self.pair.shape[2]

    def write(self, pair: Tensor, row: int | Tensor) -> None:
        """Stores keys and values (B, 2 · key heads, T, head_dim) at rows row … row + T - 1, leaving `length` alone.

        Args:
            row: the first row, or all rows on the device, which the host need not know: (T,), or (B, T) one by one.

        Raises:
            ConfigError: the rows lie outside the capacity.
        """
        pair = pair.to(self.pair.dtype)
        if isinstance(row, Tensor):
            if row.ndim == 1:
                self.pair.index_copy_(2, row, pair)
            else:
                self.pair.scatter_(2, row[:, None, :, None].expand_as(pair), pair)
            return
        self.check(row, pair.shape[2])
        self.pair.narrow(2, row, pair.shape[2]).copy_(pair)

    def check(self, row: int, count: int) -> None:
        """Refuses rows row … row + count - 1 outside the capacity."""
        end = row + count
        if row < 0 or end > self.capacity:
            raise ConfigError(f"cache rows {row} to {end} do not fit its capacity of {self.capacity}; allocate more")

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values at first ≤ row < last."""
        keys, values = self.pair.narrow(2, first, last - first).chunk(2, 1)
        return keys, values

    def truncate(self, length: int) -> None:
        """Forgets all rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"cannot truncate a cache of {self.length} rows to {length}; allowed: 0 to {self.length}")
        self.length = length


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped key heads.

    Args:
        q: (B, H, T, D); k, v: (B, KV, S, D) with H a multiple of KV.
        mask: bool, True = visible, or floats to add, broadcastable to (B, H, T, S); None: all visible.
        causal: row t sees columns ≤ t (needs S = T, and no mask).

    Returns:
        (B, H, T, D).
    """
    batch, heads, length, size = q.shape
    key_heads = k.shape[1]
    on_cpu = q.device.type == "cpu"
    if mask is not None and mask.is_floating_point() and heads == key_heads and on_cpu and torch.is_grad_enabled():
        # With its backward this takes half the time of the fused kernel on short sequences.
        scores = torch.matmul(q * size**-0.5, k.transpose(-1, -2)) + mask.to(q.dtype)
        return torch.matmul(torch.softmax(scores, -1, dtype=q.dtype), v)
    if length == 1 and q.dtype == torch.bfloat16 and on_cpu:
        # The kernel takes three times as long for one row as for two.
        return attend(q.expand(-1, -1, 2, -1), k, v, mask)[:, :, :1]
    if heads == key_heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and length > 1)
    if mask is None and (length == 1 or not causal):
        # Query heads that share a key head become rows of one query: nothing is repeated.
        grouped = q.reshape(batch, key_heads, -1, size)
        return F.scaled_dot_product_attention(grouped, k, v).view(batch, heads, length, size)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def causal_mask(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """(rows, columns) bool for the last `rows` of `columns` positions: each sees itself and everything before."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)


class Attention(nn.Module):
    """The four projections of self-attention under Llama's names."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        queries, keys = config.heads * config.size, config.key_heads * config.size
        self.q_proj = nn.Linear(config.width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.width, bias=config.output_bias)


class MLP(nn.Module):
    """The three projections of the gated feed-forward block under Llama's names."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.mlp_bias)


@dataclass
class PackedProjections:
    """What `LlamaLayer.pack` leaves of the seven projections; `qkv` and `gate_up` begin with their norms."""

    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    attention: NativeAttention | None = None
    """Takes the place of PyTorch's attention in `step`, where it can."""
    whole: NativeLayer | None = None
    """Takes the place of all of `step`, where it can."""

    def join(self, config: LayerConfig, dtype: torch.dtype) -> None:
        """Sets up the kernels, where there are any for such a layer."""
        if not NativeAttention.fits(config) or not available():
            return
        self.attention = NativeAttention(config, dtype)
        parts = [part for part in (self.qkv, self.output, self.gate_up, self.down) if isinstance(part, NativeLinear)]
        if len(parts) == 4:
            self.whole = NativeLayer(config, *parts)


_ROWS = torch.arange(1 << 16)
"""Row numbers, to take parts of."""


def _spread_reading(norm: RMSNorm, linears: list[nn.Linear], matrix: Tensor) -> None:
    """Rewrites a norm and the linears after it for a spread stream. The gain moves into the weights."""
    gain = norm.weight.detach().float()
    for linear in linears:
        linear.weight = nn.Parameter(spread(linear.weight.detach().float() * gain, matrix), requires_grad=False)
    norm.weight = nn.Parameter(torch.ones_like(gain), requires_grad=False)


def _spread_writing(linear: nn.Linear, matrix: Tensor) -> None:
    """Rewrites a linear so that its output is spread."""
    columns = linear.weight.detach().float().T
    linear.weight = nn.Parameter(spread(columns, matrix).T.contiguous(), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(spread(linear.bias.detach().float(), matrix), requires_grad=False)


class LlamaLayer(nn.Module):
    """Pre-norm self-attention and gated feed-forward, with grouped key heads and optional biases.

    `forward` is offline with any mask; `step` continues from a cache. Both give the same numbers, but for the rounding
    of what was packed to int8 or bf16.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)
        self.packed: PackedProjections | None = None

    def pack(self, precision: Precision, spread_stream: bool = False) -> None:
        """Turns this into an inference layer and frees the original projections. There is no way back.

        Feed it activations of `compute_dtype(precision)`.

        Args:
            precision: of the weights.
            spread_stream: the layer is to run on `spread` activations, input and output alike (for int8).
        """
        if self.packed is not None:
            return
        attention, mlp = self.self_attn, self.mlp
        if spread_stream:
            matrix = hadamard(spread_block(self.config.width)).to(attention.o_proj.weight.device)
            for norm, reading in (
                (self.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (self.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                _spread_reading(norm, reading, matrix)
            for writing in (attention.o_proj, mlp.down_proj):
                _spread_writing(writing, matrix)
        self.packed = PackedProjections(
            pack_module([attention.q_proj, attention.k_proj, attention.v_proj], precision, self.input_layernorm),
            pack_module([attention.o_proj], precision),
            pack_module([mlp.gate_proj, mlp.up_proj], precision, self.post_attention_layernorm, paired=True),
            pack_module([mlp.down_proj], precision, spread_input=True),
        )
        if attention.o_proj.weight.device.type == "cpu":
            self.packed.join(self.config, compute_dtype(precision))
        del self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm

    def cache_dtype(self, batch: int, dtype: torch.dtype) -> torch.dtype:
        """What the cache of so many sequences should hold, where activations are of `dtype`.

        The kernels read bf16 as exactly as the int8 products before and after need it, and half as many bytes.
        """
        whole = self.packed is not None and self.packed.whole is not None
        return torch.bfloat16 if whole and batch == 1 else dtype

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Offline: all positions at once.

        Args:
            x: (B, T, width).
            rotation: for positions (T,) or (B, T).
            mask: bool, True = visible, broadcastable to (B, heads, T, T).
            causal: the usual causal mask, instead of `mask`; with neither, everything is visible.

        Returns:
            (B, T, width).
        """
        q, pair = self._project(x, rotation)
        k, v = pair.chunk(2, 1)
        return self._finish(x, attend(q, k, v, mask, causal))

    def step(
        self,
        x: Tensor,
        rotation: Rotation,
        cache: KVCache,
        row: int | Tensor | None = None,
        visible: tuple[int, int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Continues from `cache`, by default appending to it causally.

        Args:
            x: (B, T, width), the new positions.
            rotation: for positions (T,) or (B, T).
            cache: gets the new keys and values.
            row: cache row of the first new position, or a tensor of all their rows (then give `visible`); given,
                `cache.length` is left to the caller, else rows are appended and counted.
            visible: (first, last) rows to attend to; by default all up to the newest.
            mask: bool, True = visible, broadcastable to (B, heads, T, last - first); by default causal when
                appending, and everything when `row` or `visible` is given.

        Returns:
            (B, T, width).

        Raises:
            ConfigError: rows outside the cache's capacity.
        """
        length, start = x.shape[1], cache.length
        told = self._told(x, rotation, cache, row, visible, mask)
        if told is not None:
            y = self._native_step(x, told, cache)
            cache.length = start + length if row is None else start
            return y
        place, (first, last), appending = _where(cache, length, row, visible, mask)
        q, pair = self._project(x, rotation)
        cache.write(pair, place)
        cache.length = start + length if row is None else start
        if appending and length > 1 and start > 0:
            mask = causal_mask(length, last, x.device)
        keys, values = cache.rows(first, last)
        attended = attend(q.to(keys.dtype), keys, values, mask, appending and start == 0)
        return self._finish(x, attended.to(x.dtype))

    def _told(
        self,
        x: Tensor,
        rotation: Rotation,
        cache: KVCache,
        row: int | Tensor | None,
        visible: tuple[int, int] | None,
        mask: Tensor | None,
    ) -> AttentionStruct | None:
        """What the kernels need to know of a `step`; None if it is not for them."""
        if self.packed is None or self.packed.attention is None:
            return None
        length = x.shape[1]
        place, seen, appending = _where(cache, length, row, visible, mask)
        if not isinstance(place, Tensor):
            cache.check(place, length)
            place = _ROWS.narrow(0, place, length) if place + length <= len(_ROWS) else place + _ROWS[:length]
        return self.packed.attention.told(x, rotation, cache, place, seen, mask, appending)

    def _native_step(self, x: Tensor, told: AttentionStruct, cache: KVCache) -> Tensor:
        """`step` by the kernels, all of it or the attention between two products."""
        packed = self.packed
        assert packed is not None
        assert packed.attention is not None
        if packed.whole is not None:
            return packed.whole(x, told, [cache])
        return self._finish(x, packed.attention(packed.qkv(x), told).to(x.dtype))

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """(B, T, width) → rotated q (B, H, T, D), and rotated k followed by v (B, 2·KV, T, D)."""
        heads, key_heads, size = self.config.heads, self.config.key_heads, self.config.size
        shape = (*x.shape[:2], heads + 2 * key_heads, size)
        if self.packed is not None:
            qkv = self.packed.qkv(x).view(shape)
            rotate_(qkv.narrow(2, 0, heads + key_heads), rotation)
        else:
            attention, x = self.self_attn, self.input_layernorm(x)
            turned = torch.cat((attention.q_proj(x), attention.k_proj(x)), -1).view(*shape[:2], -1, size)
            values = attention.v_proj(x).view(*shape[:2], -1, size)
            qkv = torch.cat((rotate(turned, rotation), values), 2)
        qkv = qkv.transpose(1, 2)
        return qkv.narrow(1, 0, heads), qkv.narrow(1, heads, 2 * key_heads)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward, and both residual sums; attended is (B, H, T, D)."""
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, H·D)
        if self.packed is not None:
            x = x + self.packed.output(attended)
            gate, up = self.packed.gate_up(x).chunk(2, -1)
            return self.packed.down(F.silu(gate) * up).add_(x)
        x = x + self.self_attn.o_proj(attended)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


def _where(
    cache: KVCache, length: int, row: int | Tensor | None, visible: tuple[int, int] | None, mask: Tensor | None
) -> tuple[int | Tensor, tuple[int, int], bool]:
    """What `step` makes of its arguments: where new rows go, the (first, last) visible ones, whether it appends."""
    place = cache.length if row is None else row
    return place, visible or (0, int(place) + length), mask is None and row is None and visible is None


def step_all(
    layers: Sequence[LlamaLayer],
    x: Tensor,
    rotation: Rotation,
    caches: Sequence[KVCache],
    row: int | Tensor | None = None,
    visible: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`LlamaLayer.step` through layers that follow each other, as one call where that can be.

    Args:
        layers: of one shape.
        x: (B, T, width), input of the first.
        rotation, row, visible, mask: as in `LlamaLayer.step`, for all.
        caches: one a layer, alike and equally long.

    Returns:
        (B, T, width).

    Raises:
        ConfigError: rows outside a cache's capacity.
    """
    wholes = tuple(
        layer.packed.whole for layer in layers if layer.packed is not None and layer.packed.whole is not None
    )
    if len(wholes) == len(layers) > 1:
        told = layers[0]._told(x, rotation, caches[0], row, visible, mask)
        if told is not None:
            length = caches[0].length + x.shape[1]
            x = wholes[0](x, told, caches, wholes[1:])
            for cache in caches if row is None else ():
                cache.length = length
            return x
    for layer, cache in zip(layers, caches, strict=True):
        x = layer.step(x, rotation, cache, row, visible, mask)
    return x
