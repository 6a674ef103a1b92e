"""From speech tokens to sound: flow matching (tokens → mel) and two vocoders (mel → waveform)."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Vocoder(Protocol):
    """What a vocoder offers: mel (B, T, 80) at 50 Hz → waveform (B, N) at 24 kHz, at once or as a stream."""

    def __call__(self, mel: Tensor) -> Tensor:
        """A whole utterance."""
        ...

    def init_state(self) -> Any:
        """The state of a new stream."""
        ...

    def step(self, mel: Tensor, state: Any, final: bool = False) -> tuple[Tensor, Any]:
        """The samples that the next frames complete; with `final`, all that are left."""
        ...
