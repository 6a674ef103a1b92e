"""The speaking half of a conversation: rows of answer text in, waveform chunks out, every stage a stream.

text rows → speech decoder (speech tokens, 25 Hz) → flow (mel, 50 Hz) → vocoder (waveform, 24 kHz)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vocalnet.decoding import generate_chunk

if TYPE_CHECKING:
    from vocalnet.model import GenerationConfig, VocalNet

SPARE_SPEECH_TOKENS = 50  # beyond what the text's length allows: the silence round an answer


@dataclass
class Timings:
    """Seconds spent per stage of one answer."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, since: float) -> float:
        """Charges the time since `since` (perf_counter) to a stage and returns now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now

    def include(self, other: Timings) -> None:
        """Adds another's seconds."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def milliseconds(self) -> dict[str, float]:
        """Rounded, in the order in which stages first ran."""
        return {stage: round(1000 * seconds, 1) for stage, seconds in self.seconds.items()}


class Speaker:
    """Speaks one answer as its text arrives.

    ```
    speaker.add_text(rows, last=False)
    for samples in speaker.speak(): ...   # all that this text allows
    ```

    Attributes:
        tokens: speech tokens so far.
        samples: waveform samples so far, at 24 kHz.
        steps: decoder steps so far.
        finished: the answer has been spoken to its end.
        timings: work per stage so far.
    """

    def __init__(
        self, model: VocalNet, generation: GenerationConfig, generator: torch.Generator, timings: Timings | None = None
    ) -> None:
        self._model = model
        self._generation = generation
        self._generator = generator
        self._decoding = replace(generation.drafts, mode=generation.decoding)
        self.timings = timings or Timings()
        self._per_text_token = generation.max_speech_tokens_per_text_token
        # BOS and the end token; released checkpoints may have a row for the stop token as well.
        max_text = generation.max_text_tokens + 2 + model.speech_decoder.config.compatible
        self._limit = max_text * self._per_text_token + SPARE_SPEECH_TOKENS
        self._sizes = (max_text, self._limit + 16, generation.mtp)
        self._decoder = model.speech_decoder.init_state(*self._sizes)
        self._steps_before = 0
        self._restarts = False
        spoken = 0 if model.voice is None else model.voice.tokens.shape[1]
        self._flow = model.flow.init_state(self._limit + spoken, prompt=model.voice)
        self._vocoder = model.vocoder.init_state()
        self._text_rows = 0
        self.tokens: list[int] = []
        self.samples = 0
        self.finished = False

    @property
    def steps(self) -> int:
        return self._steps_before + self._decoder.steps

    def add_text(self, rows: Tensor, last: bool, restart: bool = False) -> None:
        """More of the answer's text, (T, input_size) rows; the end token's row comes last, with `last` or `restart`.

        Args:
            restart: for released checkpoints: only a part of the answer ends here. Once it is spoken, the speech
                decoder begins anew with the text that follows; flow and vocoder go on.
        """
        if self.finished:
            return  # at its limit
        since = time.perf_counter()
        self._restarts = restart
        self._model.speech_decoder.add_text(rows, self._decoder, last or restart)
        self._text_rows += rows.shape[0]
        if last:
            self._limit = min(self._limit, self._text_rows * self._per_text_token + SPARE_SPEECH_TOKENS)
        self.timings.add("speech", since)

    def speak(self) -> Iterator[np.ndarray]:
        """Waveform chunks (N,) float32 for all speech that the text so far allows, to the end if it is complete."""
        while not self.finished:
            since = time.perf_counter()
            size = (
                self._generation.first_speech_tokens
                if not self.tokens
                else self._model.speech_decoder.config.speech_chunk
            )
            new = generate_chunk(
                self._model.speech_decoder,
                self._decoder,
                self._generation.speech,
                min(size, self._limit - len(self.tokens)) if self._decoder.text_rows else 0,
                self._decoding,
                self._generator,
            )
            units, ended = self._units(new)
            self.tokens += units
            self.timings.add("speech", since)
            part_ended = self._restarts and (ended or self._decoder.finished)
            self.finished = len(self.tokens) >= self._limit or ((ended or self._decoder.finished) and not part_ended)
            if not new and not self.finished and not part_ended:
                return  # waiting for text
            samples = self._synthesise(units)
            if len(samples):
                self.samples += len(samples)
                yield samples
            if part_ended and not self.finished:
                self._steps_before, self._restarts = self.steps, False
                self._decoder = self._model.speech_decoder.init_state(*self._sizes)
                return
            if self._model.speech_decoder.config.compatible and not self._decoder.text_complete:
                return  # the original speaks one chunk for each chunk of text

    def _units(self, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens that the flow knows, up to EOS once the text is complete, and whether that came.

        Only released checkpoints emit others: any special token, and EOS before the text's end.
        """
        config = self._model.speech_decoder.config
        if not self._decoder.text_rows:  # nothing followed the newest restart
            return [], self._decoder.text_complete
        ended = self._decoder.text_complete and config.eos in tokens
        if ended:
            tokens = tokens[: tokens.index(config.eos)]
        return [token for token in tokens if token < config.units], ended

    def _synthesise(self, tokens: list[int]) -> np.ndarray:
        """Samples that these tokens complete; with the last ones, everything."""
        since = time.perf_counter()
        mel, self._flow = self._model.flow.step(torch.tensor([tokens], dtype=torch.long), self._flow, self.finished)
        since = self.timings.add("flow", since)
        wave, self._vocoder = self._model.vocoder.step(mel, self._vocoder, self.finished)
        self.timings.add("vocoder", since)
        return wave[0].float().clamp(-1, 1).cpu().numpy()
