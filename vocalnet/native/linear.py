"""Products with int8 and bf16 weights by product.h."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vocalnet.errors import ConfigError
from vocalnet.native.build import Connected, kernel
from vocalnet.norm import RMSNorm, fold_norm

PANEL = 64
"""Outputs that are computed side by side, as in product.h."""

SLICE = 64 * PANEL
"""Outputs that are packed at a time."""

BLOCKS = (0, 16, 32, 64)
"""Sizes of Hadamard transforms that it knows."""


class LinearStruct(Structure):
    """`Linear` of product.h."""

    _fields_ = [
        ("bits", c_int32),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("floor", c_float),
        ("block", c_int32),
    ]


def check(result: int) -> None:
    """Turns what a kernel returned into an error, unless all went well.

    Raises:
        MemoryError: there was none left.
        ConfigError: rows outside the cache.
    """
    if result == 1:
        raise MemoryError("no memory left for a step; close other programs or choose a smaller model")
    if result:
        raise ConfigError("rows lie outside the cache's capacity; allocate more")


def check_input(x: Tensor, width: int) -> None:
    """Refuses what a kernel would misread.

    Raises:
        RuntimeError: x is not (..., width), not in the CPU's memory, or wants a gradient.
    """
    if x.shape[-1] != width:
        raise RuntimeError(f"the input is {tuple(x.shape)}; expected (..., {width})")
    if x.device.type != "cpu":
        raise RuntimeError(f"the input is on {x.device.type}, but the weights were packed for the CPU; move it there")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("packed layers have no gradients; use torch.no_grad()")


def fits(inputs: int, block: int = 0) -> bool:
    """Whether the kernels take products of that many inputs, spread in blocks of that size."""
    return inputs % 4 == 0 and block in BLOCKS


class NativeLinear(Connected):
    """x Wᵀ + b with int8 or bf16 weights, outside autograd; x is normalised and spread first as asked for.

    int8: a scale per output and one per row of the input. bf16: the input is rounded to bf16, sums are float32. A row's
    result does not depend on what other rows there are.
    """

    ADDRESSES = "struct", "_bare", "_kernel"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        precision: Literal["int8", "bf16"],
        norm: RMSNorm | None = None,
        block: int = 0,
        paired: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Packs weight (out, in) and bias (out,).

        Args:
            precision: of the weights.
            norm: what comes before the product.
            block: of the Hadamard transform that spreads the input; 0: none. The weight is spread already.
            paired: the outputs are two halves, gates and ups, which are to lie side by side for `NativeLayer`.
            dtype: of the result.
        """
        outputs, inputs = self.shape = tuple(weight.shape)
        self.dtype = dtype
        self.block = block
        int8 = precision == "int8"
        self.bits = 8 if int8 else 16
        self.weight_bytes = weight.numel() * self.bits // 8 + 4 * outputs * (int8 + (bias is not None))
        rows = torch.arange(outputs)
        if paired:
            gates, ups = (F.pad(half, (0, -len(half) % (PANEL // 2)), value=-1) for half in rows.chunk(2))
            rows = torch.cat((gates.view(-1, PANEL // 2), ups.view(-1, PANEL // 2)), 1).flatten()
        rows = F.pad(rows, (0, -len(rows) % PANEL), value=-1)  # the row of each output; -1: zeros
        self.order = (rows >= 0).nonzero()[:, 0][rows[rows >= 0].argsort()] if paired else None
        self.outputs = len(rows) if paired else outputs
        self.bias = None if bias is None else torch.where(rows < 0, 0, bias.detach().float()[rows])
        self.scale = torch.ones(len(rows)) if int8 else None
        self.sums = torch.zeros(len(rows), dtype=torch.int32) if int8 else None
        self.floor = -1.0
        pair = 4 if int8 else 2
        kind = torch.int8 if int8 else torch.bfloat16
        self.weight = torch.empty(len(rows) // PANEL, inputs // pair, PANEL, pair, dtype=kind)
        for first in range(0, len(rows), SLICE):  # so that no second copy of a large matrix is made
            part = rows[first : first + SLICE]
            values = torch.where(part[:, None] < 0, 0, weight.detach()[part].float())
            if norm is not None:
                values, size = fold_norm(values, norm)
                self.floor = float(size)
            if self.scale is not None and self.sums is not None:
                scale = values.abs().amax(1).clamp_min(1e-8) / 127
                values = (values / scale[:, None]).round()
                self.scale[first : first + SLICE] = scale
                self.sums[first : first + SLICE] = values.sum(1).int()
            panels = values.to(kind).view(-1, PANEL, inputs // pair, pair).transpose(1, 2)
            self.weight[first // PANEL : first // PANEL + len(panels)] = panels
        self._connect()

    def _connect(self) -> None:
        pointers = [
            None if part is None else part.data_ptr() for part in (self.weight, self.scale, self.sums, self.bias)
        ]
        sizes = self.bits, self.shape[1], self.outputs
        self.struct = LinearStruct(*sizes, *pointers, self.floor, self.block)
        self._bare = LinearStruct(*sizes, *pointers, -1.0, 0)
        self._kernel = kernel("vocalnet_linear", POINTER(LinearStruct), c_void_p, c_int32, c_int32, c_void_p, c_int32)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        y = self._run(self.struct, x)
        return (y if self.order is None else y.index_select(-1, self.order)).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b alone, in float32, paired outputs as they lie."""
        return self._run(self._bare, x)

    def _run(self, struct: LinearStruct, x: Tensor) -> Tensor:
        check_input(x, self.shape[1])
        x = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs, dtype=torch.float32, device="cpu")
        rows, half = x.numel() // self.shape[1], x.dtype == torch.bfloat16
        check(self._kernel(struct, x.data_ptr(), half, rows, y.data_ptr(), torch.get_num_threads()))
        return y
