"""Attention over a cache by attention.h, and whole layers by kernels.c."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, addressof, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vocalnet.native.build import library
from vocalnet.native.linear import LinearStruct, NativeLinear, check

if TYPE_CHECKING:
    from vocalnet.layers import KVCache, LayerConfig, Rotation


class LayerStruct(Structure):
    """`Layer` of kernels.c."""

    _fields_ = [
        ("width", c_int32),
        ("ffn", c_int32),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
    ]


class AttentionStruct(Structure):
    """`Attention` of attention.h, and in `held` the tensors that it points to."""

    held: tuple[Any, ...]

    _fields_ = [
        ("rows", c_int32),
        ("heads", c_int32),
        ("key_heads", c_int32),
        ("size", c_int32),
        ("half", c_int32),
        ("half_cache", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("turn_row", c_int64),
        ("turn_head", c_int64),
        ("cache", c_void_p),
        ("capacity", c_int32),
        ("places", c_void_p),
        ("first", c_int32),
        ("last", c_int32),
        ("causal", c_int32),
        ("mask_kind", c_int32),
        ("mask", c_void_p),
        ("mask_row", c_int64),
    ]


_MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}
_FLOATS = (torch.float32, torch.bfloat16)


class NativeAttention:
    """Rotary positions, the new rows of the cache, and attention to what is visible, for one sequence."""

    def __init__(self, config: LayerConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of activations and rotations."""
        self.config = config
        self.dtype = dtype
        kernels = library()
        assert kernels is not None
        self._kernel = kernels.vocalnet_attend
        self._kernel.argtypes = [POINTER(AttentionStruct), c_void_p, c_void_p, c_int32]

    @staticmethod
    def fits(config: LayerConfig) -> bool:
        """Whether the kernel knows heads of that size."""
        return config.size % 32 == 0

    def told(
        self,
        x: Tensor,
        rotation: Rotation,
        cache: KVCache,
        places: Tensor,
        visible: tuple[int, int],
        mask: Tensor | None,
        causal: bool,
    ) -> AttentionStruct | None:
        """What the kernel needs to know of a step; None if it is of a form that the kernel does not know.

        Args:
            x: (1, T, …), the new rows.
            rotation: (T, 1 or heads + key heads, size).
            cache: of one sequence.
            places: (T,) cache rows of the new rows.
            visible: (first, last) rows of the cache.
            mask: (T, last - first), bool or floats to add; None: everything visible is seen.
            causal: without a mask: the newest row sees all, the one before it all but the last, ….
        """
        config, (cos, sin), pair = self.config, rotation, cache.pair
        rows = x.shape[1]
        if x.shape[0] != 1 or x.dtype != self.dtype or pair.dtype not in _FLOATS or places.shape != (rows,):
            return None
        if cos.shape[0] != rows or cos.ndim != 3 or cos.dtype != x.dtype or cos.stride() != sin.stride():
            return None
        kind = 0
        if mask is not None:
            kind = _MASKS.get(mask.dtype, 0)
            if not kind or mask.shape != (rows, visible[1] - visible[0]) or mask.stride(1) != 1:
                return None
        told = AttentionStruct(
            rows,
            config.heads,
            config.key_heads,
            config.size,
            x.dtype == torch.bfloat16,
            pair.dtype == torch.bfloat16,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.stride(0),
            cos.stride(1) if cos.shape[1] > 1 else 0,
            pair.data_ptr(),
            cache.capacity,
            places.data_ptr(),
            *visible,
            causal,
            kind,
            None if mask is None else mask.data_ptr(),
            0 if mask is None else mask.stride(0),
        )
        told.held = rotation, pair, places, mask
        return told

    def __call__(self, qkv: Tensor, told: AttentionStruct) -> Tensor:
        """qkv (1, T, (heads + 2·key heads)·size) in float32, not yet rotated → (1, T, heads·size)."""
        seen = torch.empty(1, told.rows, self.config.heads * self.config.size)
        check(self._kernel(told, qkv.data_ptr(), seen.data_ptr(), torch.get_num_threads()))
        return seen


class NativeLayer:
    """A whole Llama layer, or several, as one call."""

    def __init__(
        self, config: LayerConfig, qkv: NativeLinear, output: NativeLinear, gate_up: NativeLinear, down: NativeLinear
    ) -> None:
        """The parts of `vocalnet.layers.PackedProjections`; `gate_up` is paired."""
        self.parts = qkv, output, gate_up, down  # the struct holds addresses only
        self.struct = LayerStruct(config.width, config.ffn, *(part.struct for part in self.parts))
        self._stack: tuple[tuple[NativeLayer, ...], Array[Any]] = (), (c_void_p * 0)()
        kernels = library()
        assert kernels is not None
        self._kernel = kernels.vocalnet_layers
        self._kernel.argtypes = [
            c_void_p,
            c_void_p,
            c_int32,
            POINTER(AttentionStruct),
            c_void_p,
            c_void_p,
            c_int32,
        ]

    def __call__(
        self, x: Tensor, told: AttentionStruct, caches: Sequence[KVCache], after: tuple[NativeLayer, ...] = ()
    ) -> Tensor:
        """(1, T, width) → the same; the caches get the new rows.

        Args:
            x: input of this layer.
            told: of the step; all caches have the same capacity.
            caches: of this layer and of those after.
            after: layers of the same shape that follow.
        """
        x = x.contiguous()
        y = torch.empty_like(x)
        if self._stack[0] != after or not self._stack[1]:
            self._stack = after, (c_void_p * (1 + len(after)))(*(addressof(one.struct) for one in (self, *after)))
        pairs = (c_void_p * len(caches))(*(cache.pair.data_ptr() for cache in caches))
        check(
            self._kernel(self._stack[1], pairs, len(caches), told, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        )
        return y
