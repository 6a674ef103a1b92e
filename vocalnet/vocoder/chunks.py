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


def visible_rows(query: Tensor, keys: Tensor, chunk: int, left_chunks: int | None) -> Tensor:
    """Whether row `query[i]` sees row `keys[j]`, (queries, keys) bool; rows are positions in time, -1 an empty place.

    `left_chunks` None: all chunks to the left.
    """
    behind = query[:, None] // chunk - keys[None, :] // chunk
    seen = (behind >= 0) & (keys >= 0)
    return seen if left_chunks is None else seen & (behind <= left_chunks)


@dataclass(frozen=True)
class Span:
    """The rows being computed: their place in time, what they see, and where a stream's ring keeps them.

    Offline: `visible` is a mask (B or 1, 1, rows, rows), or None when everything is seen. Streaming: the rows are
    whole chunks (the stream's last may be shorter), written at `slot` of each layer's ring; they see its first `filled`
    rows as far as `visible` allows.
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
        row = torch.arange(rows, device=like.device)
        visible = visible_rows(row, row, chunk, left_chunks)[None, None]
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
        chunks: chunks kept. Enough for every row's context and the chunks of one call, or for the whole stream.
        left_chunks: chunks to the left that a row sees; None: all, and then a full ring is an error.
    """

    def __init__(self, chunk: int, chunks: int, left_chunks: int | None, device: torch.device) -> None:
        self.chunk, self.chunks, self.left_chunks = chunk, chunks, left_chunks
        self.position = 0
        self._rows = torch.full((self.capacity,), -1, device=device)  # which row of the stream is in each place

    @property
    def capacity(self) -> int:
        """Rows kept."""
        return self.chunk * self.chunks

    @property
    def room(self) -> int:
        """Chunks that one call may add, at least 1."""
        index = self.position // self.chunk
        if self.left_chunks is None:
            return max(1, self.chunks - index)
        return min(self.chunks - index % self.chunks, self.chunks - self.left_chunks)

    def advance(self, rows: int) -> Span:
        """The span of the next rows: whole chunks, at most `room` of them; the stream's last may be partial.

        Raises:
            VocalNetError: the ring is full and may not wrap, or rows follow a partial chunk.
        """
        first = self.position
        if first % self.chunk:
            raise VocalNetError(f"{rows} rows after {first} do not start a chunk of {self.chunk}; begin a new stream")
        slot = first if self.left_chunks is None else first % self.capacity
        if slot + rows > self.capacity:
            raise VocalNetError(f"the stream is full at {self.capacity} rows; call init_state with a larger max_tokens")
        new = torch.arange(first, first + rows, device=self._rows.device)
        self._rows[slot : slot + -(-rows // self.chunk) * self.chunk] = -1
        self._rows[slot : slot + rows] = new
        filled = min(first + rows, self.capacity)
        visible = visible_rows(new, self._rows[:filled], self.chunk, self.left_chunks)[None, None]
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
