"""Copy synthesis: recordings after the stages that every answer passes, before a speech decoder has said a word.

What a recogniser loses between two stages is what the later one costs; no training of the decoder brings it back.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from vocalnet.audio import ANSWER_RATE_HZ, mel_24k
from vocalnet.errors import CheckpointError, DataError
from vocalnet.evaluation.answer import Answer
from vocalnet.evaluation.items import Item
from vocalnet.model import VocalNet, model_folder
from vocalnet.parts import load_part
from vocalnet.speech_tokenizer import SpeechTokenizer, TokenizerConfig

Stage = Literal["recording", "vocoder", "tokens"]
STAGES: tuple[Stage, ...] = ("recording", "vocoder", "tokens")
"""As recorded; its mel through the vocoder; its speech tokens through flow and vocoder."""


class CopyAnswerer:
    """Items' own recordings, as one stage leaves them."""

    def __init__(self, model: VocalNet, tokenizer: SpeechTokenizer, stage: Stage) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stage = stage

    @torch.inference_mode()
    def answer(self, item: Item, question: np.ndarray | None) -> Answer:
        """See `Answerer.answer`.

        Raises:
            DataError: the item has no recording.
            AudioError: the recording is too long or too short for the tokenizer.
        """
        if item.answer is None:
            raise DataError(f"{item.id} has no recording; give a folder of speech with its texts")
        wave = item.answer.read(ANSWER_RATE_HZ)
        if self.stage == "recording":
            return Answer(wave, item.reference)
        samples = torch.from_numpy(wave)
        if self.stage == "vocoder":
            return Answer(self._speak(mel_24k(samples)[None]), item.reference)
        tokens = self.tokenizer.encode_wave(samples, self.model.encoder)
        return Answer(self._speak(self.model.flow.mel(tokens[None])), item.reference)

    def _speak(self, mel: torch.Tensor) -> np.ndarray:
        """Mel (1, T, bins) → waveform (N,)."""
        return self.model.vocoder(mel)[0].float().clamp(-1, 1).cpu().numpy()


def load_tokenizer(source: str) -> SpeechTokenizer:
    """The speech tokenizer of mini or a model folder.

    Raises:
        CheckpointError: it has none.
    """
    folder = model_folder(source) / "speech_tokenizer"
    if not folder.is_dir():
        raise CheckpointError(
            f"no speech_tokenizer in {folder.parent}; copies need the one that the model was taught by"
        )
    return load_part(SpeechTokenizer, TokenizerConfig, folder)
