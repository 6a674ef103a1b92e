"""Getting answers to measure: a model asked aloud, asked in writing, or told what to say; or speech made elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ
from vocalnet.errors import AudioError
from vocalnet.evaluation.items import FileClip, Item
from vocalnet.model import GenerationConfig, VocalNet
from vocalnet.session import AudioChunk, Session, Summary, Turn
from vocalnet.speaker import Speaker, Timings

PLAIN_PROMPT = "Tell me something."
"""What a sentence to be said is taken to answer where nothing was asked: one of the prompts of training."""
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        wave: (N,) float32 at 24 kHz.
        text: what the model meant to say.
        edges: samples at which a streamed chunk begins, the first excepted.
        speech_tokens: from which the sound was made; none for speech made elsewhere.
        timings: first_audio_ms, total_ms, rtf, text_tokens_per_s, speech_tokens_per_s as far as they are known.
        tokens_per_step: speech tokens per step of the decoder; 0 where unknown.
    """

    wave: np.ndarray
    text: str
    edges: tuple[int, ...] = ()
    speech_tokens: tuple[int, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    tokens_per_step: float = 0.0


class Answerer(Protocol):
    """Whatever is being evaluated."""

    def answer(self, item: Item, question: np.ndarray | None) -> Answer:
        """The answer to a spoken question (N,) at 16 kHz, or the item's text said where there is none.

        Raises:
            AudioError: no answer, because the question cannot be used.
        """
        ...


def ask(
    model: VocalNet, samples: np.ndarray, generation: GenerationConfig, seed: int = 0
) -> tuple[np.ndarray, Summary]:
    """One question (N,) at 16 kHz in a fresh conversation: the answer's waveform (N,) at 24 kHz and its summary."""
    chunks, summary = _ask(model.session(seed, generation), samples)
    return _joined(chunks), summary


def _ask(session: Session, samples: np.ndarray) -> tuple[list[np.ndarray], Summary]:
    """The next question of a conversation: the answer's chunks and its summary."""
    session.push_audio(samples, QUESTION_RATE_HZ, work_ahead=False)
    pieces = list(session.respond())
    summary = pieces[-1]
    assert isinstance(summary, Summary)
    return [piece.samples for piece in pieces if isinstance(piece, AudioChunk)], summary


def _joined(chunks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(chunks) if chunks else np.zeros(0, np.float32)


def _edges(chunks: list[np.ndarray]) -> tuple[int, ...]:
    return tuple(int(edge) for edge in np.cumsum([len(chunk) for chunk in chunks])[:-1])


def _per_second(count: int, milliseconds: float) -> float:
    return round(1000 * count / milliseconds, 1) if milliseconds else 0.0


class ModelAnswerer:
    """A VocalNet; every item is a fresh conversation with the same seed, so that their order does not matter."""

    def __init__(self, model: VocalNet, generation: GenerationConfig, seed: int = 0) -> None:
        self.model = model
        self.generation = generation
        self.seed = seed

    def answer(self, item: Item, question: np.ndarray | None) -> Answer:
        """See `Answerer.answer`."""
        return self._say(item) if question is None else self._respond(question, item)

    def _respond(self, question: np.ndarray, item: Item) -> Answer:
        session = self.model.session(self.seed, self.generation)
        self._remember(session, item.history)
        for clip in item.earlier:
            _ask(session, clip.read())
        chunks, summary = _ask(session, question)
        stages = summary.stages_ms
        timings = {
            "first_audio_ms": summary.first_audio_ms,
            "total_ms": summary.total_ms,
            "rtf": summary.rtf,
            "text_tokens_per_s": _per_second(len(session.turns[-1].answer_ids), stages.get("text", 0.0)),
            "speech_tokens_per_s": _per_second(summary.speech_tokens, stages.get("speech", 0.0)),
        }
        tokens = tuple(session.speech_tokens)
        return Answer(_joined(chunks), summary.text, _edges(chunks), tokens, timings, summary.tokens_per_step)

    @torch.inference_mode()
    def _say(self, item: Item) -> Answer:
        """`item.reference` spoken as the answer to `item.question`: text → hidden states → speech."""
        model, start = self.model, time.perf_counter()
        prompt = model.prompt.text_ids(item.question or PLAIN_PROMPT)
        ids = model.prompt.answer_ids(item.reference)[:-1]
        state = model.backbone.init_state(len(prompt) + len(ids))
        embed = model.backbone.embed
        hidden = model.backbone.prefill(embed([*prompt, *ids]), state)[0, len(prompt) :]  # (T, D)
        rows = torch.cat((model.text_rows(hidden, ids), model.text_rows.end(model.prompt.end_id)))
        timings, generator = Timings(), torch.Generator().manual_seed(self.seed)
        speaker = Speaker(model, self._allowing(len(ids)), generator, timings)
        speaker.add_text(rows, last=True)
        chunks, first_ms = [], 0.0
        for chunk in speaker.speak():
            first_ms = first_ms or 1000 * (time.perf_counter() - start)
            chunks.append(chunk)
        total_s, wave = time.perf_counter() - start, _joined(chunks)
        speech_ms = timings.milliseconds().get("speech", 0.0)
        known = {
            "first_audio_ms": round(first_ms, 1),
            "total_ms": round(1000 * total_s, 1),
            "rtf": round(total_s * ANSWER_RATE_HZ / max(1, len(wave)), 3),
            "speech_tokens_per_s": _per_second(len(speaker.tokens), speech_ms),
        }
        pace = round(len(speaker.tokens) / max(1, speaker.steps), 2)
        return Answer(wave, item.reference, _edges(chunks), tuple(speaker.tokens), known, pace)

    def _allowing(self, tokens: int) -> GenerationConfig:
        """The generation settings with room for a given text."""
        return replace(self.generation, max_text_tokens=max(tokens, self.generation.max_text_tokens))

    def _remember(self, session: Session, history: Sequence[tuple[str, str]]) -> None:
        """Lets a fresh session know what was asked and answered before."""
        if not history:
            return
        prompt, embed = self.model.prompt, self.model.backbone.embed
        session.turns = [Turn(embed(prompt.ids(q)), prompt.answer_ids(a)[:-1]) for q, a in history]
        session.reread()

    def write(self, question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The answer to a written question: the same LLM and sampling, no ear, no voice."""
        session = self.model.session(self.seed, self.generation)
        self._remember(session, history)
        session.push_text(question)
        summary = list(session.respond(speak=False))[-1]
        assert isinstance(summary, Summary)
        return summary.text

    @torch.inference_mode()
    def offline(self, tokens: Sequence[int]) -> np.ndarray:
        """The waveform (N,) of speech tokens made in one go, which streaming must equal."""
        mel = self.model.flow.mel(torch.tensor([list(tokens)]), streaming=True)
        return self.model.vocoder(mel)[0].float().clamp(-1, 1).cpu().numpy()


class FolderAnswerer:
    """Speech made elsewhere: each item's own recording, or ITEM.wav (or .flac, .ogg, .mp3) in a folder.

    ITEM.txt beside it, if there is one, is the text that was meant.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def answer(self, item: Item, question: np.ndarray | None) -> Answer:
        """See `Answerer.answer`."""
        if item.answer is not None:
            return Answer(item.answer.read(ANSWER_RATE_HZ), item.reference)
        assert self.folder is not None, "items without speech need a folder of answers"
        stem = self.folder / item.id
        for suffix in SOUND_SUFFIXES:
            file = stem.with_name(stem.name + suffix)
            if file.is_file():
                text = stem.with_name(stem.name + ".txt")
                said = text.read_text().strip() if text.is_file() else ""
                return Answer(FileClip(file).read(ANSWER_RATE_HZ), said)
        raise AudioError(f"no answer {item.id} (.wav, .flac, .ogg or .mp3) in {self.folder}")
