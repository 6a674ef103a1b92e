"""Inference products x Wᵀ + b in fp32, bf16, float16 and int8, with the norm before them folded in.

`pack_linear` and its kin prepare a product once; it is then called like a function, outside autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError
from vocalnet.native import NativeLinear, available
from vocalnet.native.linear import fits
from vocalnet.norm import RMSNorm, fold_norm, row_size

Precision = Literal["int8", "bf16", "fp32"]
WantedPrecision = Literal["auto", "int8", "bf16", "fp32"]


def _operator(packet: Any) -> Any:
    """An operator as fast to call as it gets: its packet looks at every argument in Python first."""
    return getattr(packet, "_op", packet)


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
    token, where the kernels of `vocalnet.native` do not run.
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


PackedLinear = DenseLinear | HalfLinear | Int8Linear | NativeLinear


class PackedModule(nn.Module):
    """A packed product in the place of an nn.Linear."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return self.linear(x)


def replace_linears(module: nn.Module, pack: Callable[[nn.Linear], PackedLinear]) -> None:
    """Puts packed products in the places of all linears within a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedModule(pack(child)))


def int8_available() -> bool:
    """Whether this build of PyTorch has FBGEMM's int8 kernels (x86 processors)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of activations under a precision: int8 weights work between float32 ones (caches: `cache_dtype`)."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    precision: Precision,
    norm: RMSNorm | None = None,
    spread_input: bool = False,
    paired: bool = False,
) -> PackedLinear:
    """Prepares one inference product norm(x) Wᵀ + b from weight (out, in) and bias (out,).

    `spread_input` makes int8 more exact at the cost of one small product; other precisions have no need of it.
    `paired`: the outputs are gates, then as many ups, which a kernel for whole layers reads side by side.

    Raises:
        ConfigError: unknown precision, or int8 on a device or build without its kernels.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(get_args(Precision))}")
    if precision == "int8" and (weight.device.type != "cpu" or not int8_available()):
        raise ConfigError(f"int8 needs an x86 CPU, not {weight.device.type}; choose bf16 or fp32")
    block = spread_block(weight.shape[1]) if spread_input and precision == "int8" else 0
    if precision != "fp32" and weight.device.type == "cpu" and fits(weight.shape[1], block) and available():
        if block:
            weight = spread(weight.detach().float(), hadamard(block))
        return NativeLinear(weight, bias, precision, norm, block, paired, compute_dtype(precision))
    if precision != "int8":
        return DenseLinear(weight, bias, compute_dtype(precision), norm)
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
    linears: list[nn.Linear],
    precision: Precision,
    norm: RMSNorm | None = None,
    spread_input: bool = False,
    paired: bool = False,
) -> PackedLinear:
    """`pack_linear` of stacked linears. With a norm the product takes what is to be normalised first."""
    return pack_linear(*stack_linears(linears), precision, norm, spread_input, paired)


def pack_output(linear: nn.Linear, precision: Precision, norm: RMSNorm | None = None) -> PackedLinear:
    """`pack_module` of a projection to the vocabulary, which mostly reads one row at a time; logits may be float32."""
    if precision == "bf16" and linear.weight.device.type == "cpu":
        if fits(linear.in_features) and available():
            return NativeLinear(linear.weight, linear.bias, precision, norm)
        if int8_available():
            return HalfLinear(linear.weight, linear.bias, norm)
    return pack_module([linear], precision, norm)
