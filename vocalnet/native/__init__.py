"""Llama layers, products and attention for a few rows at a time, in C for CPUs with AVX-512 VNNI.

A step of the speech decoder or the LLM takes a few rows through many small operations; as operators of PyTorch these
cost more time than reading the weights. Here a layer is one call. The arithmetic is that of `vocalnet.layers`; where
the kernels are not to be had, PyTorch's operators do it all.
"""

from vocalnet.native.build import library
from vocalnet.native.layer import NativeAttention, NativeLayer
from vocalnet.native.linear import NativeLinear

__all__ = ["NativeAttention", "NativeLayer", "NativeLinear", "available"]


def available() -> bool:
    """Whether the kernels run here; the first call compiles them."""
    return library() is not None
