"""`vocalnet chat`: questions from files or the microphone, answers to files or the loudspeaker while they are made."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ, WavWriter, check_question, read_audio
from vocalnet.devices import Loudspeaker, Microphone, has_loudspeaker
from vocalnet.errors import ConfigError, VocalNetError
from vocalnet.session import AudioChunk, Session, Summary, TextChunk


class Sink(Protocol):
    """Where an answer's sound goes."""

    def write(self, samples: np.ndarray) -> None:
        """Takes (N,) float32 samples at 24 kHz."""
        ...


@dataclass(frozen=True)
class Output:
    """Where answers go.

    Attributes:
        paths: a file per question; None plays them.
        json_lines: print one JSON object a question instead of text.
    """

    paths: list[Path] | None
    json_lines: bool


def choose_output(inputs: list[Path], out: Path | None, json_lines: bool) -> Output:
    """Files where `out` says so or nothing can play; otherwise the loudspeaker.

    Raises:
        ConfigError: several questions for one output file, or a question that would be overwritten.
    """
    if out is None:
        if has_loudspeaker():
            return Output(None, json_lines)
        out = Path("answer.wav") if len(inputs) == 1 else Path()
    if len(inputs) == 1 and not out.is_dir():
        paths = [out]
    elif out.suffix:
        raise ConfigError(f"{len(inputs)} questions cannot share the output {out}; give a folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        numbers = [f"-{i + 1}" if len({p.stem for p in inputs}) < len(inputs) else "" for i in range(len(inputs))]
        paths = [out / f"{p.stem}{n}.answer.wav" for p, n in zip(inputs, numbers, strict=True)]
    clash = {p.resolve() for p in paths} & {p.resolve() for p in inputs}
    if clash:
        raise ConfigError(f"the answer would overwrite the question {clash.pop()}; give another --out")
    return Output(paths, json_lines)


def _sink(path: Path | None) -> AbstractContextManager[Any]:
    return Loudspeaker() if path is None else WavWriter(path, ANSWER_RATE_HZ)


def answer_into(session: Session, sink: Sink, echo: TextIO | None) -> Summary:
    """Runs one answer: sound into the sink, text to `echo` as it comes."""
    summary: Summary | None = None
    for piece in session.respond():
        if isinstance(piece, TextChunk) and echo:
            echo.write(piece.text)
            echo.flush()
        elif isinstance(piece, AudioChunk):
            sink.write(piece.samples)
        elif isinstance(piece, Summary):
            summary = piece
    assert summary is not None  # respond ends with a summary unless interrupted
    return summary


def report(name: str, path: Path | None, summary: Summary, json_lines: bool) -> None:
    """Prints what the command line promises for one question."""
    values = asdict(summary)
    record = {"input": name, "text": values.pop("text"), "audio": None if path is None else str(path), **values}
    if json_lines:
        print(json.dumps({key: record[key] for key in ("input", "text", "audio", *values)}), flush=True)
        return
    place = f" → {path}" if path else ""
    print(f"\n  first audio {summary.first_audio_ms:.0f} ms, {summary.audio_s:.1f} s of speech{place}", flush=True)


def chat_files(session: Session, inputs: list[Path], output: Output) -> int:
    """Answers each file in turn, as one conversation; a bad file is reported and skipped.

    Returns:
        The number of files that could not be answered.
    """
    failures = 0
    for index, question in enumerate(inputs):
        path = output.paths[index] if output.paths else None
        echo = None if output.json_lines else sys.stdout
        try:
            samples = check_question(read_audio(question, QUESTION_RATE_HZ), QUESTION_RATE_HZ)
            session.push_audio(samples, QUESTION_RATE_HZ, work_ahead=False)
            with _sink(path) as sink:
                summary = answer_into(session, sink, echo)
        except VocalNetError as error:
            failures += 1
            print(f"error: {question}: {error}", file=sys.stderr, flush=True)
            continue
        report(str(question), path, summary, output.json_lines)
    return failures


def chat_microphone(session: Session, output: Output) -> None:
    """Hands-free: a pause ends the question, Ctrl-C the conversation."""
    turn = 0
    with Microphone() as microphone:
        while True:
            turn += 1
            print("speak …", file=sys.stderr, flush=True)
            for block in _question_blocks(session, microphone):
                session.push_audio(block, microphone.rate_hz)
            path = output.paths[0].with_stem(f"{output.paths[0].stem}-{turn}") if output.paths else None
            with _sink(path) as sink:
                summary = answer_into(session, sink, None if output.json_lines else sys.stdout)
            report("microphone", path, summary, output.json_lines)


def _question_blocks(session: Session, microphone: Microphone) -> Iterator[np.ndarray]:
    """Blocks until the speaker has paused."""
    while not session.paused:
        yield microphone.read()
