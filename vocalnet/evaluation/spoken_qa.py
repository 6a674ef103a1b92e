"""Spoken question answering, measured as a listener would: the answer's sound is transcribed and judged."""

from __future__ import annotations

import io
import json
import random
import statistics
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ, write_audio
from vocalnet.errors import AudioError, DataError
from vocalnet.evaluation.accept import is_right
from vocalnet.evaluation.speech import distillmos, transcribe, word_error_rate
from vocalnet.model import GenerationConfig, VocalNet
from vocalnet.session import AudioChunk, Summary

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class SpokenQuestion:
    """One test item; `samples` (N,) at 16 kHz."""

    id: str
    samples: np.ndarray
    text: str
    accept: tuple[str, ...]
    category: str
    voice: str


@dataclass(frozen=True)
class Result:
    """What became of one question."""

    id: str
    question: str
    category: str
    voice: str
    text: str
    transcript: str
    right_by_text: bool
    right: bool
    distillmos: float
    audio_s: float
    first_audio_ms: float
    rtf: float


def read_questions(folder: Path, split: str = "valid", limit: int | None = None) -> list[SpokenQuestion]:
    """Spoken questions from the shards that data preparation made, in their order.

    Raises:
        DataError: there are none.
    """
    questions = []
    for archive in sorted(folder.glob(f"{split}-*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                content = tar.extractfile(member)
                if content is not None:
                    parts.setdefault(key, {})[suffix] = content.read()
        for key, part in parts.items():
            about = json.loads(part["json"])
            samples, rate = soundfile.read(io.BytesIO(part["flac"]), dtype="float32")
            if rate != QUESTION_RATE_HZ:
                raise DataError(f"{archive}: {key} has {rate} Hz, expected {QUESTION_RATE_HZ}; prepare the data anew")
            questions.append(
                SpokenQuestion(key, samples, about["text"], tuple(about["accept"]), about["category"], about["voice"])
            )
    if not questions:
        raise DataError(f"no {split}-*.tar with questions in {folder}; run the questions step of data preparation")
    return questions[:limit]


def ask(
    model: VocalNet, samples: np.ndarray, generation: GenerationConfig, seed: int = 0
) -> tuple[np.ndarray, Summary]:
    """One question in a fresh conversation: waveform (N,) at 24 kHz and summary."""
    session = model.session(seed, generation)
    session.push_audio(samples, QUESTION_RATE_HZ, work_ahead=False)
    pieces = list(session.respond())
    chunks = [piece.samples for piece in pieces if isinstance(piece, AudioChunk)]
    summary = pieces[-1]
    assert isinstance(summary, Summary)
    return np.concatenate(chunks) if chunks else np.zeros(0, np.float32), summary


def evaluate(
    model: VocalNet,
    questions: Sequence[SpokenQuestion],
    generation: GenerationConfig,
    audio_folder: Path | None = None,
    with_mos: bool = True,
) -> Iterator[Result]:
    """Asks every question alone; answers' sound is kept in `audio_folder` if given."""
    for question in questions:
        try:
            wave, summary = ask(model, question.samples, generation)
        except AudioError:  # no word was recognised: a wrong answer
            yield Result(
                question.id, question.text, question.category, question.voice, "", "", False, False, 1.0, 0.0, 0.0, 0.0
            )
            continue
        if audio_folder is not None:
            write_audio(audio_folder / f"{question.id}.wav", wave, ANSWER_RATE_HZ)
        heard = transcribe([wave])[0]
        yield Result(
            id=question.id,
            question=question.text,
            category=question.category,
            voice=question.voice,
            text=summary.text,
            transcript=heard,
            right_by_text=is_right(summary.text, question.accept),
            right=is_right(heard, question.accept),
            distillmos=round(distillmos([wave])[0], 3) if with_mos and len(wave) else 0.0,
            audio_s=summary.audio_s,
            first_audio_ms=summary.first_audio_ms,
            rtf=summary.rtf,
        )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    generator = random.Random(seed)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(BOOTSTRAP_DRAWS))
    return means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS)]


def scores(results: Sequence[Result]) -> dict[str, Any]:
    """Totals over all questions, with 95 % intervals where they are means of the questions."""
    right = [float(result.right) for result in results]
    spoken = [result for result in results if result.text]
    low, high = interval(right)
    mos = [result.distillmos for result in spoken]
    mos_low, mos_high = interval(mos)
    by_text = statistics.fmean(result.right_by_text for result in results)
    return {
        "questions": len(results),
        "right_spoken": round(statistics.fmean(right), 4),
        "right_spoken_95": [round(low, 3), round(high, 3)],
        "right_by_text": round(by_text, 4),
        "word_error_rate": round(word_error_rate([r.text for r in spoken], [r.transcript for r in spoken]), 4),
        "distillmos": round(statistics.fmean(mos), 3),
        "distillmos_95": [round(mos_low, 2), round(mos_high, 2)],
        "first_audio_ms_median": statistics.median(result.first_audio_ms for result in spoken),
        "rtf_median": statistics.median(result.rtf for result in spoken),
    }


def by(results: Sequence[Result], key: str) -> dict[str, tuple[int, float]]:
    """Number of questions and share right, per voice or category."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(str(asdict(result)[key]), []).append(result)
    return {name: (len(group), statistics.fmean(r.right for r in group)) for name, group in sorted(groups.items())}
