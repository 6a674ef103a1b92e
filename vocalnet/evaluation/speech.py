"""Objective measures of speech: transcription by Whisper, word error rate, and the predicted opinion score DistillMOS.

Everything heavy is imported and loaded on first use; `pip install vocalnet[eval]` brings what is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor, nn

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ
from vocalnet.checkpoints import base_model
from vocalnet.errors import VocalNetError


def _resampled(waves: Sequence[np.ndarray | Tensor], rate_hz: int) -> list[np.ndarray]:
    """Waveforms as float32 arrays at 16 kHz."""
    arrays = [w.detach().cpu().numpy() if isinstance(w, Tensor) else w for w in waves]
    return [soxr.resample(np.asarray(a, np.float32).reshape(-1), rate_hz, QUESTION_RATE_HZ) for a in arrays]


@functools.lru_cache(maxsize=2)
def _whisper(folder: Path) -> tuple[Any, Any]:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return WhisperProcessor.from_pretrained(folder), model


@torch.inference_mode()
def transcribe(
    waves: Sequence[np.ndarray | Tensor], rate_hz: int = ANSWER_RATE_HZ, folder: Path | None = None, batch: int = 4
) -> list[str]:
    """English transcripts by greedy decoding.

    Args:
        waves: each (N,), at most 30 s.
        folder: a Whisper folder; the package's Whisper base by default.
    """
    processor, model = _whisper(folder or base_model("whisper-base"))
    audio = _resampled(waves, rate_hz)
    texts: list[str] = []
    for first in range(0, len(audio), batch):
        features = processor.feature_extractor(
            audio[first : first + batch], sampling_rate=QUESTION_RATE_HZ, return_tensors="pt"
        ).input_features
        tokens = model.generate(features.to(model.dtype), language="en", task="transcribe", max_new_tokens=200)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word errors ÷ reference words over all pairs, after Whisper's English text normalisation; 0.05 is 5 %.

    Raises:
        VocalNetError: different numbers of texts, or references without a word.
    """
    import jiwer
    from whisper_normalizer.english import EnglishTextNormalizer

    if len(references) != len(hypotheses):
        raise VocalNetError(f"{len(references)} references and {len(hypotheses)} hypotheses; give as many of each")
    normalise = EnglishTextNormalizer()
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(r, h) for r, h in pairs if r]
    if not pairs:
        raise VocalNetError("the references hold no word; a word error rate needs at least one")
    return float(jiwer.wer([r for r, _ in pairs], [h for _, h in pairs]))


@contextlib.contextmanager
def _torchaudio_stand_in() -> Iterator[None]:
    """DistillMOS imports torchaudio, to read files only: where it is missing, an empty module serves meanwhile."""
    names = ("torchaudio", "torchaudio.transforms")
    if names[0] in sys.modules or importlib.util.find_spec(names[0]) is not None:
        yield
        return
    module, transforms = (types.ModuleType(name) for name in names)
    module.transforms = transforms  # type: ignore[attr-defined]
    transforms.MFCC = transforms.Resample = nn.Identity  # type: ignore[attr-defined]
    sys.modules.update(zip(names, (module, transforms), strict=True))
    try:
        yield
    finally:  # other packages look for torchaudio and must not find the stand-in
        for name in names:
            del sys.modules[name]


@functools.lru_cache(maxsize=1)
def _distillmos() -> nn.Module:
    with _torchaudio_stand_in():
        package = importlib.import_module("distillmos")
    return package.ConvTransformerSQAModel().eval()


@torch.inference_mode()
def distillmos(waves: Sequence[np.ndarray | Tensor], rate_hz: int = ANSWER_RATE_HZ) -> list[float]:
    """The predicted mean opinion score (1 … 5) of each waveform (N,)."""
    model = _distillmos()
    return [float(model(torch.from_numpy(audio)[None])) for audio in _resampled(waves, rate_hz)]
