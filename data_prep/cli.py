"""Prepare training data: facts → texts → speech → features → tokens. Every step resumes where it stopped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.common import SIZES, check_manifest
from vocalnet.errors import DataError, VocalNetError

BEFORE_TRAINING = (
    "open_answers",
    "texts",
    "answers",
    "questions",
    "pronunciations",
    "vocoder_targets",
    "answer_features",
    "question_features",
)
AFTER_A_STAGE = ("answer_tokens", "predicted_mels")
EXAMPLE = """steps:
  open_answers       the base LLM's own answers to open prompts, where they pass the checks
  texts              facts × phrasings -> questions with answers, sentences
  answers            every answer and sentence spoken in one voice, phonemes per frame
  questions          questions spoken in many voices, rooms and noises
  pronunciations     phonemes of every token of the LLM's vocabulary, learned from a lexicon and the answers
  vocoder_targets    the synthesiser's own spectra, for the vocoder
  answer_features    Whisper features, mel, pitch, phonemes of the answers
  question_features  Whisper features of the questions
  answer_tokens      needs --tokenizer, a trained speech tokenizer
  predicted_mels     needs --flow, a trained flow
  check              compare all shards with their manifests
  all                the first eight, in order

example: python -m data_prep all --data data --size small"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="data_prep", description=__doc__, epilog=EXAMPLE, formatter_class=raw)
    steps = [*BEFORE_TRAINING, *AFTER_A_STAGE, "check", "all"]
    parser.add_argument("step", metavar="STEP", choices=steps, help="one of the steps below")
    parser.add_argument("--data", type=Path, default=Path("data"), help="output folder (default: ./data)")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="tiny: a test; small: mini; full: more")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--sources", default="kokoro,hibari,flite", help="voices that speak the questions (default: all)"
    )
    parser.add_argument("--kokoro", type=Path, help="folder with Kokoro (default: DATA/kokoro, fetched if absent)")
    parser.add_argument("--whisper", type=Path, help="folder of Whisper (default: the base model in the cache)")
    parser.add_argument(
        "--llm", type=Path, help="folder of the LLM whose answers and tokens they are (default: SmolLM2 in the cache)"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the trained speech tokenizer")
    parser.add_argument("--flow", type=Path, help="folder of the trained flow")
    return parser


def _given(folder: Path | None, step: str, option: str) -> Path:
    if folder is None:
        raise DataError(f"{step} needs {option} FOLDER: the trained part, as its recipe exports it")
    return folder


def _steps(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    # Imported here so that `--help` is instant.
    from data_prep import features, open_answers, pronunciations, speech, texts

    size, data = SIZES[args.size], args.data
    sources = tuple(args.sources.split(","))
    for source in sources:
        if source not in speech.SOURCES:
            raise DataError(f"unknown source {source!r}; allowed: {', '.join(speech.SOURCES)}")
    return {
        "open_answers": lambda: open_answers.make_open_answers(data, size, args.llm),
        "texts": lambda: texts.make_texts(data, size, args.seed),
        "answers": lambda: speech.make_answers(data, size, args.seed, args.jobs),
        "questions": lambda: speech.make_questions(data, size, args.seed, args.jobs, sources, args.kokoro),
        "pronunciations": lambda: pronunciations.make_pronunciations(data, args.llm, args.seed),
        "vocoder_targets": lambda: speech.make_vocoder_targets(data, size, args.seed),
        "answer_features": lambda: features.make_answer_features(data, args.whisper, args.jobs),
        "question_features": lambda: features.make_question_features(data, args.whisper, args.jobs),
        "answer_tokens": lambda: features.make_answer_tokens(
            data, _given(args.tokenizer, "answer_tokens", "--tokenizer"), args.jobs
        ),
        "predicted_mels": lambda: features.make_predicted_mels(data, _given(args.flow, "predicted_mels", "--flow")),
        "check": lambda: check_data(data),
    }


def check_data(data: Path) -> dict[str, Any]:
    """Verify every finished step's shards against its manifest; returns samples per step.

    Raises:
        DataError: nothing is prepared, or a shard is missing or damaged.
    """
    folders = sorted(path.parent for path in data.glob("*/manifest.json"))
    if not folders:
        raise DataError(f"nothing is prepared in {data}: run `python -m data_prep all --data {data}`")
    return {folder.name: check_manifest(folder)["samples"] for folder in folders}


def prepare(args: argparse.Namespace) -> None:
    """Run the chosen steps and print what each made."""
    steps = _steps(args)
    for name in BEFORE_TRAINING if args.step == "all" else [args.step]:
        start = time.perf_counter()
        made = {key: value for key, value in steps[name]().items() if key not in ("shards", "settings")}
        summary = ", ".join(f"{value} {key}" for key, value in made.items())
        print(f"{name}: {summary} ({time.perf_counter() - start:.0f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; an error is one line and exit status 2."""
    try:
        prepare(_parser().parse_args(arguments))
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
