"""Attention over a cache by attention.h, and whole layers by kernels.c."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, addressof, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vocalnet.native.build import Connected, kernel
from vocalnet.native.linear import LinearStruct, NativeLinear, check, check_input

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


class NativeAttention(Connected):
    """Rotary positions, the new rows of the cache, and attention to what is visible, for one sequence."""

    ADDRESSES = ("_kernel",)

    def __init__(self, config: LayerConfig, dtype: torch.dtype) -> None:
        """`dtype` is that of activations and rotations."""
        self.config = config
        self.dtype = dtype
        self._connect()

    def _connect(self) -> None:
        self._kernel = kernel("vocalnet_attend", POINTER(AttentionStruct), c_void_p, c_void_p, c_int32)

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
        rows, total = x.shape[1], config.heads + config.key_heads
        kind = 0 if mask is None else _MASKS.get(mask.dtype, -1)
        known = (
            x.shape == (1, rows, config.width)
            and x.dtype == cos.dtype == sin.dtype == self.dtype
            and not (x.requires_grad and torch.is_grad_enabled())
            and cos.shape in ((rows, 1, config.size), (rows, total, config.size))
            and cos.shape == sin.shape
            and cos.stride() == sin.stride()
            and cos.stride(2) == 1
            and pair.shape == (1, 2 * config.key_heads, cache.capacity, config.size)
            and pair.dtype in _FLOATS
            and pair.is_contiguous()
            and places.shape == (rows,)
            and places.dtype == torch.int64
            and places.is_contiguous()
            and (mask is None or (mask.shape == (rows, visible[1] - visible[0]) and mask.stride(1) == 1 and kind > 0))
            and all(part.is_cpu for part in (x, cos, sin, pair, places))
            and (mask is None or mask.is_cpu)
        )
        if not known:
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
        """qkv (1, T, (heads + 2·key heads)·size), not yet rotated → (1, heads, T, size) in float32."""
        config = self.config
        check_input(qkv, (config.heads + 2 * config.key_heads) * config.size)
        qkv = qkv.float().contiguous()
        seen = torch.empty(1, told.rows, config.heads, config.size, dtype=torch.float32, device="cpu")
        check(self._kernel(told, qkv.data_ptr(), seen.data_ptr(), torch.get_num_threads()))
        return seen.transpose(1, 2)


class NativeLayer(Connected):
    """A whole Llama layer, or several, as one call."""

    ADDRESSES = "struct", "_stack", "_kernel"

    def __init__(
        self, config: LayerConfig, qkv: NativeLinear, output: NativeLinear, gate_up: NativeLinear, down: NativeLinear
    ) -> None:
        """The parts of `vocalnet.layers.PackedProjections`; `gate_up` is paired."""
        self.config = config
        self.parts = qkv, output, gate_up, down
        self._connect()

    def _connect(self) -> None:
        self.struct = LayerStruct(self.config.width, self.config.ffn, *(part.struct for part in self.parts))
        self._stack: tuple[tuple[NativeLayer, ...], Array[Any]] = (), self._addresses(())
        pointers = c_void_p, c_void_p, c_int32, POINTER(AttentionStruct), c_void_p, c_void_p, c_int32
        self._kernel = kernel("vocalnet_layers", *pointers)

    def _addresses(self, after: tuple[NativeLayer, ...]) -> Array[Any]:
        """Of this layer and those after it."""
        if any(layer.config != self.config for layer in after):
            raise ValueError("layers that run as one call must have one shape")
        return (c_void_p * (1 + len(after)))(*(addressof(layer.struct) for layer in (self, *after)))

    def __call__(
        self, x: Tensor, told: AttentionStruct, caches: Sequence[KVCache], after: tuple[NativeLayer, ...] = ()
    ) -> Tensor:
        """(1, T, width) → the same; the caches get the new rows.

        Args:
            x: input of this layer.
            told: of the step.
            caches: of this layer and of those after, of one shape and dtype.
            after: layers of the same shape that follow.

        Raises:
            ValueError: layers or caches of different shapes.
        """
        pair = caches[0].pair
        if len(caches) != 1 + len(after) or any(
            cache.pair.shape != pair.shape or cache.pair.dtype != pair.dtype or not cache.pair.is_contiguous()
            for cache in caches
        ):
            raise ValueError("layers that run as one call need a cache each, all of one shape and dtype")
        stack = self._stack
        if stack[0] != after:
            self._stack = stack = after, self._addresses(after)
        x = x.contiguous()
        y = torch.empty_like(x)
        pairs = (c_void_p * len(caches))(*(cache.pair.data_ptr() for cache in caches))
        threads = torch.get_num_threads()
        check(self._kernel(stack[1], pairs, len(caches), told, x.data_ptr(), y.data_ptr(), threads))
        return y
