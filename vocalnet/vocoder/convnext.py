"""Causal ConvNeXt over frames (B, T, C), offline and streaming: trunk of the vocoder and of the speech tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv(nn.Module):
    """1-D convolution over (B, T, C) that sees `lookahead` frames ahead; zeros stand outside the signal."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, lookahead: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels_out, kernel, groups=groups)
        self.lookahead = lookahead
        self.past = kernel - 1 - lookahead

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C')."""
        return self.conv(F.pad(x.transpose(1, 2), (self.past, self.lookahead))).transpose(1, 2)

    def step(self, x: Tensor, state: Tensor, final: bool) -> tuple[Tensor, Tensor]:
        """New frames → the outputs they complete, `lookahead` frames late; `final` releases the rest."""
        if final:
            x = F.pad(x, (0, 0, 0, self.lookahead))
        x = torch.cat([state, x], dim=1)
        reach = self.past + self.lookahead
        if x.shape[1] <= reach:
            return x.new_zeros(x.shape[0], 0, self.conv.out_channels), x
        return self.conv(x.transpose(1, 2)).transpose(1, 2), x[:, x.shape[1] - reach :]


class ConvNeXtBlock(nn.Module):
    """Causal ConvNeXt block: depthwise convolution, LayerNorm, two linear layers, scaled residual."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = CausalConv(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def _mix(self, x: Tensor, filtered: Tensor) -> Tensor:
        return x + self.scale * self.reduce(F.gelu(self.expand(self.norm(filtered))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)."""
        return self._mix(x, self.depthwise(x))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for the next frames of a stream."""
        filtered, state = self.depthwise.step(x, state, final=False)
        return self._mix(x, filtered), state


class Trunk(nn.Module):
    """Input convolution with lookahead, causal ConvNeXt blocks, final LayerNorm."""

    def __init__(self, channels: int, width: int, blocks: int, hidden: int, kernel: int, lookahead: int) -> None:
        super().__init__()
        self.input = CausalConv(channels, width, kernel, lookahead)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([ConvNeXtBlock(width, hidden, kernel) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)

    def _convolutions(self) -> list[CausalConv]:
        depthwise = [block.depthwise for block in self.blocks if isinstance(block, ConvNeXtBlock)]
        return [self.input, *depthwise]

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """One context per convolution."""
        states = []
        for convolution in self._convolutions():
            channels = convolution.conv.in_channels
            states.append(torch.zeros(batch, convolution.past, channels, device=device, dtype=dtype))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, channels) → (B, T, width)."""
        x = self.input_norm(self.input(x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def step(self, x: Tensor, state: list[Tensor], final: bool) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, for the next frames of a stream; outputs come `lookahead` frames late."""
        x, first = self.input.step(x, state[0], final)
        if not x.shape[1]:
            return x, [first, *state[1:]]
        x = self.input_norm(x)
        contexts = [first]
        for block, context in zip(self.blocks, state[1:], strict=True):
            x, context = block.step(x, context)  # type: ignore[operator]
            contexts.append(context)
        return self.norm(x), contexts
