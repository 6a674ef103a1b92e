"""Chunked computation shared by the flow's parts: which row sees which, causal convolutions, caches of a stream.

Time is cut into chunks of fixed size. A row sees its whole chunk and a number of chunks to the left (CosyVoice2,
arXiv:2412.10117, section 2.3), so a chunk can be computed as soon as its last row is known, and never changes:

              key   0 1 | 2 3 | 4 5 | 6 7
    query 0, 1      x x   . .   . .   . .
    query 2, 3      x x   x x   . .   . .
    query 4, 5      x x   x x   x x   . .      left_chunks = 2
    query 6, 7      . .   x x   x x   x x
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import VocalNetError


def chunk_visible(rows: int, chunk: int, left_chunks: int | None, device: torch.device | None = None) -> Tensor:
    """Whether query row i sees key row j, (rows, rows) bool. `left_chunks` None: all chunks to the left."""
    index = torch.arange(rows, device=device) // chunk
    behind = index[:, None] - index[None, :]
    return (behind >= 0) & (behind <= (rows if left_chunks is None else left_chunks))


@dataclass(frozen=True)
class Span:
    """The rows being computed: their place in time, what they see, and where a stream's ring keeps them.

    Offline: `visible` is a mask (B or 1, 1, rows, rows), or None when everything is seen. Streaming: the rows are one
    chunk, written at `slot` of each layer's ring, and attend to its first `filled` rows (`visible` hides stale ones).
    """

    first: int
    rows: int
    visible: Tensor | None = None
    slot: int = 0
    filled: int = 0


def offline_span(rows: int, chunk: int | None, left_chunks: int | None, lengths: Tensor | None, like: Tensor) -> Span:
    """The span of whole utterances: chunked when `chunk` is given, with rows past each of `lengths` (B,) hidden."""
    visible = None
    if chunk is not None and rows > chunk:
        visible = chunk_visible(rows, chunk, left_chunks, like.device)[None, None]
    if lengths is not None and int(lengths.min()) < rows:
        row = torch.arange(rows, device=like.device)
        valid = row[None, :] < lengths.to(like.device)[:, None]  # (B, rows)
        # A row always sees itself, so that rows of padding do not produce NaN.
        keys = valid[:, None, None, :] | torch.eye(rows, dtype=torch.bool, device=like.device)
        visible = keys if visible is None else visible & keys
    return Span(0, rows, visible)


class Ring:
    """Bookkeeping of a stream's ring buffer of chunks: one for all layers that run at the same rate.

    Args:
        chunk: rows of a chunk.
        chunks: chunks kept, the newest included.
        wraps: whether the oldest chunk may be overwritten (bounded left context); otherwise a full ring is an error.
    """

    def __init__(self, chunk: int, chunks: int, wraps: bool) -> None:
        self.chunk, self.chunks, self.wraps = chunk, chunks, wraps
        self.position = 0

    @property
    def capacity(self) -> int:
        """Rows kept."""
        return self.chunk * self.chunks

    def advance(self, rows: int, device: torch.device) -> Span:
        """The span of the next chunk. Only the last chunk of a stream may have fewer than `chunk` rows.

        Raises:
            VocalNetError: the ring is full and may not wrap, or a chunk follows a partial one.
        """
        first = self.position
        index, offset = divmod(first, self.chunk)
        if offset or rows > self.chunk:
            raise VocalNetError(f"{rows} rows after {first} do not start a chunk of {self.chunk}; begin a new stream")
        if index >= self.chunks and not self.wraps:
            raise VocalNetError(f"the stream is full at {self.capacity} rows; call init_state with a larger max_tokens")
        slot = (index % self.chunks) * self.chunk
        filled = min(first + rows, self.capacity) if index < self.chunks else self.capacity
        visible = None
        if slot + rows < filled and rows < self.chunk:  # a partial chunk over an old one: hide what is left of that
            place = torch.arange(filled, device=device)
            visible = ((place < slot + rows) | (place >= slot + self.chunk))[None, None, None]
        self.position += rows
        return Span(first, rows, visible, slot, filled)


@dataclass
class KeyValueRing:
    """One attention layer's cache in a stream: keys and values (B, heads, capacity, head width), written in place."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, batch: int, heads: int, ring: Ring, head_width: int, like: Tensor) -> KeyValueRing:
        """Zeros for a new stream, of the type and on the device of `like`."""
        shape = (batch, heads, ring.capacity, head_width)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def extend(self, span: Span, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the span's rows and returns views of all rows that it may attend to."""
        self.keys[:, :, span.slot : span.slot + span.rows] = keys
        self.values[:, :, span.slot : span.slot + span.rows] = values
        return self.keys[:, :, : span.filled], self.values[:, :, : span.filled]


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Scaled dot-product attention, (B, H, T, d) over (B, H, K, d); `visible` (…, T, K) or None for everything."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
    # Plain products are several times faster here than torch's fused CPU kernel: rows are few, heads are narrow.
    scores = (query @ keys.transpose(-2, -1)).float() / math.sqrt(query.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1).to(values.dtype) @ values


class CausalConv1d(nn.Conv1d):
    """Convolution over rows (B, T, C) that sees the current row and kernel - 1 earlier ones (zeros before the start).

    In a stream, `past` (B, kernel - 1, C in) holds those earlier rows; it is updated in place.
    """

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        reach = self.kernel_size[0] - 1
        if past is None:
            return super().forward(F.pad(x, (0, 0, reach, 0)).transpose(1, 2)).transpose(1, 2)  # (B, T, C out)
        padded = torch.cat([past, x], dim=1)
        past.copy_(padded[:, padded.shape[1] - reach :])
        windows = padded.unfold(1, reach + 1, 1)  # (B, T, C in, kernel)
        if self.groups > 1:  # depthwise
            mixed = (windows * self.weight[:, 0]).sum(dim=-1)
            return mixed if self.bias is None else mixed + self.bias
        return F.linear(windows.flatten(2), self.weight.flatten(1), self.bias)  # for few rows faster than a convolution

    def new_past(self, batch: int) -> Tensor:
        """Zeros for the start of a stream."""
        return self.weight.new_zeros(batch, self.kernel_size[0] - 1, self.in_channels)
