"""Products with int8 and bf16 weights by product.h."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vocalnet.errors import ConfigError
from vocalnet.native.build import library
from vocalnet.norm import RMSNorm, fold_norm

PANEL = 64
"""Outputs that are computed side by side, as in product.h."""

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


def fits(inputs: int, block: int = 0) -> bool:
    """Whether the kernels take products of that many inputs, spread in blocks of that size."""
    return inputs % 4 == 0 and block in BLOCKS


class NativeLinear:
    """x Wᵀ + b with int8 or bf16 weights, outside autograd; x is normalised and spread first as asked for.

    int8: a scale per output and one per row of the input. bf16: the input is rounded to bf16, sums are float32. A row's
    result does not depend on what other rows there are.
    """

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
        weight = weight.detach().float()
        self.shape = tuple(weight.shape)
        self.dtype = dtype
        floor = -1.0
        if norm is not None:
            weight, size = fold_norm(weight, norm)
            floor = float(size)
        int8 = precision == "int8"
        self.weight_bytes = weight.numel() * (1 if int8 else 2) + 4 * len(weight) * (int8 + (bias is not None))
        rows = torch.arange(len(weight))
        if paired:
            gates, ups = (F.pad(half, (0, -len(half) % (PANEL // 2)), value=-1) for half in rows.chunk(2))
            rows = torch.cat((gates.view(-1, PANEL // 2), ups.view(-1, PANEL // 2)), 1).flatten()
        rows = F.pad(rows, (0, -len(rows) % PANEL), value=-1)  # the row of each output; -1: of zeros
        self.order = (rows >= 0).nonzero()[:, 0][rows[rows >= 0].argsort()] if paired else None
        self.outputs = len(rows) if paired else len(weight)
        weight = torch.where(rows[:, None] < 0, 0, weight[rows])
        self.bias = None if bias is None else torch.where(rows < 0, 0, bias.detach().float()[rows])
        self.scale = self.sums = None
        if int8:
            self.scale = weight.abs().amax(1).clamp_min(1e-8) / 127
            weight = (weight / self.scale[:, None]).round()
            self.sums = weight.sum(1).int()
            weight = weight.to(torch.int8)
        else:
            weight = weight.bfloat16()
        side_by_side = 4 if int8 else 2
        panels = weight.view(-1, PANEL, self.shape[1] // side_by_side, side_by_side)
        self.weight = panels.transpose(1, 2).contiguous()  # (panels, in / n, PANEL, n)
        pointers = [None if part is None else part.data_ptr() for part in (self.scale, self.sums, self.bias)]
        sizes = 8 if int8 else 16, self.shape[1], self.outputs
        self.struct = LinearStruct(*sizes, self.weight.data_ptr(), *pointers, floor, block)
        self._bare = LinearStruct(*sizes, self.weight.data_ptr(), *pointers, -1.0, 0)
        kernels = library()
        assert kernels is not None
        self._kernel = kernels.vocalnet_linear
        self._kernel.argtypes = [POINTER(LinearStruct), c_void_p, c_int32, c_int32, c_void_p, c_int32]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        y = self._run(self.struct, x)
        return (y if self.order is None else y.index_select(-1, self.order)).to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b alone, in float32, paired outputs as they lie."""
        return self._run(self._bare, x)

    def _run(self, struct: LinearStruct, x: Tensor) -> Tensor:
        x = (x if x.dtype == torch.bfloat16 else x.float()).contiguous()
        y = torch.empty(*x.shape[:-1], self.outputs)
        rows, half = x.numel() // self.shape[1], x.dtype == torch.bfloat16
        check(self._kernel(struct, x.data_ptr(), half, rows, y.data_ptr(), torch.get_num_threads()))
        return y
