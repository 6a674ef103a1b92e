"""VocalNet: a streaming speech LLM. You ask aloud, it answers aloud while the answer is still being made."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocalnet.model import GenerationConfig, VocalNet
    from vocalnet.sampling import SamplingConfig
    from vocalnet.session import AudioChunk, Session, Summary, TextChunk

_HOMES = {
    "VocalNet": "vocalnet.model",
    "GenerationConfig": "vocalnet.model",
    "SamplingConfig": "vocalnet.sampling",
    "Session": "vocalnet.session",
    "TextChunk": "vocalnet.session",
    "AudioChunk": "vocalnet.session",
    "Summary": "vocalnet.session",
}

__all__ = ["AudioChunk", "GenerationConfig", "SamplingConfig", "Session", "Summary", "TextChunk", "VocalNet"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that `vocalnet --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vocalnet' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
