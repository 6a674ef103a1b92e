"""Llama layers for the text backbone and the speech decoder: norm, rotary positions, cache, attention, precision.

A layer has two lives. While training it is plain PyTorch with Hugging Face's parameter names. `LlamaLayer.pack` then
turns it into an inference layer: q, k and v become one product, gate and up another, in fp32, bf16 or int8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError

Precision = Literal["int8", "bf16", "fp32"]


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


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in float32 as Llama does (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → the same shape and dtype."""
        if x.dtype == torch.float32 and self.weight.dtype == torch.float32:
            if x.is_cuda or torch.is_grad_enabled():
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            return x * root_mean_square(x, self.eps).reciprocal() * self.weight
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def root_mean_square(x: Tensor, eps: float) -> Tensor:
    """√(mean x² + eps) over the last dimension of (..., n) → (..., 1). √(a² + b²) spares a square, a sum and a root."""
    count = x.shape[-1]
    scaled = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * count**-0.5
    return torch.hypot(scaled, scaled.new_tensor(eps**0.5))


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
        if isinstance(row, Tensor):
            if row.ndim == 1:
                self.pair.index_copy_(2, row, pair)
            else:
                self.pair.scatter_(2, row[:, None, :, None].expand_as(pair), pair)
            return
        end = row + pair.shape[2]
        if row < 0 or end > self.capacity:
            raise ConfigError(f"cache rows {row} to {end} do not fit its capacity of {self.capacity}; allocate more")
        self.pair.narrow(2, row, pair.shape[2]).copy_(pair)

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


def _operator(packet: Any) -> Any:
    """An operator as fast to call as it gets: its packet looks at every argument in Python first."""
    return getattr(packet, "_op", packet)


def fold_norm(weight: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Moves all of an RMS norm but its division into the weight (out, in) of the product that follows.

    RMSNorm(x) = gain · √n · x / √(‖x‖² + n·ε).

    Returns:
        The float32 weight with gain · √n in it, and the scalar √(n·ε): divide by the hypotenuse of it and ‖x‖.
    """
    width = weight.shape[1]
    folded = weight.detach().float() * (norm.weight.detach().float() * width**0.5)
    return folded, torch.tensor((width * norm.eps) ** 0.5)


def row_size(x: Tensor, floor: Tensor) -> Tensor:
    """√(‖x‖² + floor²) over the last dimension, kept: (..., n) → (..., 1)."""
    return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)


EXPECTED_ROWS = 5
"""Rows for which oneDNN lays out weights: a step with K = 4 drafts. Other numbers of rows run from the same layout."""


def _onednn_layout(weight: Tensor) -> Tensor | None:
    """The weight (out, in) in oneDNN's own layout; None where it has none for it, or where there is no oneDNN.

    From this layout a product of a few rows reads memory about as fast as that of one; the plain product takes twice
    as long at five rows (measured on AVX-512).
    """
    library = torch.ops.mkldnn
    if weight.device.type != "cpu" or not int8_available() or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16 and not library._is_mkldnn_bf16_supported():
        return None
    try:
        return library._reorder_linear_weight(weight, EXPECTED_ROWS)
    except (AttributeError, RuntimeError):  # a build of PyTorch without these operators
        return None


class DenseLinear:
    """x Wᵀ + b in one floating-point dtype, outside autograd; x is normalised first if a norm is given."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, norm: RMSNorm | None = None) -> None:
        self.floor: Tensor | None = None
        self.norm: RMSNorm | None = None
        if norm is not None and weight.device.type == "cpu":
            weight, floor = fold_norm(weight, norm)
            self.floor = floor.to(dtype)
        elif norm is not None:
            self.norm = norm.to(dtype).requires_grad_(False)
        self.weight = weight.detach().to(dtype).contiguous()
        self.shape = tuple(self.weight.shape)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.weight_bytes = sum(part.nbytes for part in (self.weight, self.bias) if part is not None)
        laid_out = _onednn_layout(self.weight)
        self.product: Callable[[Tensor], Tensor] = self._plain
        if laid_out is not None:
            self.weight = laid_out
            self.product = self._onednn

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) in the layer's dtype."""
        if self.floor is not None:
            x = x / row_size(x, self.floor)
        elif self.norm is not None:
            x = self.norm(x)
        return self.product(x)

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _onednn(self, x: Tensor) -> Tensor:
        return _linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _saturates() -> bool:
    """Whether int8 products may saturate here: without VNNI, pairs of them are added in 16 bits."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is None or not supported()


def spread_block(width: int) -> int:
    """How many neighbouring channels `spread` mixes: the largest power of two that divides `width`, at most 64."""
    return min(width & -width, 64)


def hadamard(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two: symmetric, so that it is its own inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * size**-0.5


def spread(x: Tensor, matrix: Tensor) -> Tensor:
    """Mixes blocks of channels of (..., width) by a Hadamard matrix (block, block). Twice is once too often: it undoes.

    A rotation leaves products and norms as they are if both sides take part, but spreads a channel that is always
    large over its block, so that 8 bits suffice for activations (Ashkboos et al., QuaRot, 2024).
    """
    return x.reshape(-1, matrix.shape[0]).mm(matrix).view(x.shape)


_linear_dynamic = _operator(torch.ops.quantized.linear_dynamic)
_linear_pointwise = _operator(getattr(torch.ops.mkldnn, "_linear_pointwise", None))


STEP_ROWS = 2 * EXPECTED_ROWS
"""Up to so many rows are one step's, normed ones alike enough to share a scale: saves five small operations a product
(on mini's decoder, 5 rows a step, the KL divergence from fp32 goes from 0.0023 to 0.0026)."""


class Int8Linear:
    """x Wᵀ + b with int8 weights (a scale per output channel) and 8-bit activations (a scale per row).

    Runs on FBGEMM's packed kernels, CPU only: measured 6 times faster than fp32 for one row on AVX-512 VNNI, and
    faster than the weight-only kernels, which widen the weights in registers. Input and output are float32.
    A preceding RMS norm costs next to nothing: its gain goes into the weights, its division onto the output.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None = None, spread_input: bool = False
    ) -> None:
        """With `spread_input` the input is spread before it is rounded; the result stays the same but for rounding.

        A product with a norm expects a stream that is spread already, or is not, just as its weight is.
        """
        weight = weight.detach().float()
        self.floor: Tensor | None = None
        if norm is not None:
            weight, self.floor = fold_norm(weight, norm)
        self.mixer = hadamard(spread_block(weight.shape[1])) if spread_input else None
        if self.mixer is not None:
            weight = spread(weight, self.mixer)
        scale = weight.abs().amax(1).clamp_min(1e-8).double() / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # a deprecation notice: torch is pinned below the release that removes it
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.bias = None if bias is None else bias.detach().float()
        self.weight_bytes = weight.numel() + 4 * (len(scale) + (0 if bias is None else len(scale)))
        self.reduce_range = _saturates()  # activations then keep to 7 bits

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) float32 → (..., out) float32."""
        if self.mixer is not None:
            x = spread(x, self.mixer)
        rows = x.numel() // x.shape[-1]
        size = None if self.floor is None else row_size(x, self.floor)
        if rows == 1:
            y = self.product(x) if size is None else self.product(x).div_(size)
        elif size is not None and rows <= STEP_ROWS:
            y = self.product(x / size)
        else:
            # The kernel takes one scale for all rows, and a first token's outliers would crush the others.
            peak = x.abs().amax(-1, keepdim=True).clamp_min_(1e-8)
            y = self.product(x / peak).mul_(peak if size is None else peak.div_(size))
        return y if self.bias is None else y.add_(self.bias)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, rounding x to 8 bits between its least and its greatest value."""
        return _linear_dynamic(x, self.packed, self.reduce_range)


_linear_half = _operator(torch.ops.quantized.linear_dynamic_fp16)


class HalfLinear:
    """x Wᵀ + b with float16 weights between float32 activations, on the CPU: FBGEMM's kernel, outside autograd.

    Weights keep three bits more than in bf16 and are read as fast. One row takes 0.6 of the time of oneDNN's bf16
    product, five take about as long, ten longer (measured on AVX-512): it is for output heads, which see one row a
    token.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None = None) -> None:
        weight = weight.detach().float()
        self.floor: Tensor | None = None
        if norm is not None:
            weight, self.floor = fold_norm(weight, norm)
        self.shape = tuple(weight.shape)
        bias = None if bias is None else bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self.weight_bytes = 2 * weight.numel() + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out) float32."""
        x = x.float()
        return self.product(x if self.floor is None else x / row_size(x, self.floor))

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b without the norm."""
        return _linear_half(x.float(), self.packed)


PackedLinear = DenseLinear | HalfLinear | Int8Linear


def int8_available() -> bool:
    """Whether this build of PyTorch has FBGEMM's int8 kernels (x86 processors)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of activations and caches under a precision (int8 weights work between float32 activations)."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    precision: Precision,
    norm: RMSNorm | None = None,
    spread_input: bool = False,
) -> PackedLinear:
    """Prepares one inference product norm(x) Wᵀ + b from weight (out, in) and bias (out,).

    `spread_input` makes int8 more exact at the cost of one small product; other precisions have no need of it.

    Raises:
        ConfigError: unknown precision, or int8 on a device or build without its kernels.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(get_args(Precision))}")
    if precision != "int8":
        return DenseLinear(weight, bias, compute_dtype(precision), norm)
    if weight.device.type != "cpu" or not int8_available():
        raise ConfigError(f"int8 needs an x86 CPU, not {weight.device.type}; choose bf16 or fp32")
    return Int8Linear(weight, bias, norm, spread_input)


def stack_linears(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linears that share an input, as one: outputs follow each other in the last dimension."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in linears
    ]
    return weight, torch.cat(biases)


def pack_module(
    linears: list[nn.Linear], precision: Precision, norm: RMSNorm | None = None, spread_input: bool = False
) -> PackedLinear:
    """`pack_linear` of stacked linears. With a norm the product takes what is to be normalised first."""
    return pack_linear(*stack_linears(linears), precision, norm, spread_input)


def pack_output(linear: nn.Linear, precision: Precision, norm: RMSNorm | None = None) -> PackedLinear:
    """`pack_module` of a projection to the vocabulary, which mostly reads one row at a time; logits may be float32."""
    if precision == "bf16" and linear.weight.device.type == "cpu" and int8_available():
        return HalfLinear(linear.weight, linear.bias, norm)
    return pack_module([linear], precision, norm)


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

    `forward` is offline with any mask; `step` continues from a cache. Both give the same numbers.
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
            pack_module([mlp.gate_proj, mlp.up_proj], precision, self.post_attention_layernorm),
            pack_module([mlp.down_proj], precision, spread_input=True),
        )
        del self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm

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
        """
        q, pair = self._project(x, rotation)
        length, start = x.shape[1], cache.length
        cache.write(pair, start if row is None else row)
        if row is None:
            cache.length = start + length
        elif visible is None:
            visible = (0, int(row) + length)
        first, last = visible or (0, start + length)
        appending = mask is None and row is None and visible is None
        if appending and length > 1 and start > 0:
            mask = causal_mask(length, last, x.device)
        return self._finish(x, attend(q, *cache.rows(first, last), mask, appending and start == 0))

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
