"""Compares ways of multi-token prediction: python recipes/ablate.py recipes/ablate.yaml [key=value ...]

Trains each head of the recipe from one trained decoder, for the same time; then every cell (head, way of decoding, K)
speaks the same held-out sentences: tokens per step and per second, word error rate (Whisper) and DistillMOS of the
sound, share of drafts accepted. Writes ablation.json, ablation.md and ablation.png into `output`. Interrupted, it goes
on where it stopped: a head that has its result.json is not trained again, a finished cell not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from vocalnet.bench import machine
from vocalnet.checkpoints.fetch import sha256_of
from vocalnet.config import from_dict, load_yaml, with_overrides
from vocalnet.decoding import DecodingConfig, generate_chunk
from vocalnet.errors import ConfigError, VocalNetError
from vocalnet.evaluation.statistics import mean, ratio
from vocalnet.files import write_json, write_text
from vocalnet.model import VOCODERS, VocalNetConfig, model_folder
from vocalnet.parts import CONFIG_FILE, WEIGHTS_FILE, load_part, read_json
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.training.answer_states import AnswerStates
from vocalnet.training.engine import Engine, TrainerConfig, load_recipe
from vocalnet.training.provenance import git_commit
from vocalnet.training.speak_config import SpeakTaskConfig
from vocalnet.training.spoken import Spoken, answer_pairs, first_pairs, load_spoken
from vocalnet.vocoder.flow import Flow, FlowConfig

JUDGED = "judged.jsonl"


@dataclass(frozen=True)
class Ablation:
    """The recipe; see ablate.yaml."""

    speak: Path
    data: Path
    output: Path
    trainer: TrainerConfig
    options: dict[str, Any]
    heads: dict[str, dict[str, Any]]
    decoding: dict[str, DecodingConfig]
    model: str = "mini"
    sentences: int = 16
    split: Literal["train", "valid"] = "valid"
    drafts: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    repeats: int = 2
    seed: int = 0


@dataclass
class Cell:
    """One measurement: a head's drafts used in one way."""

    head: str
    decoding: str
    drafts: int
    weights: str  # first digits of the decoder's SHA-256
    sentences: int
    split: str = "valid"
    tokens_per_step: float = 0.0
    tokens_per_s: float = 0.0
    acceptance: float | None = None  # share of the checked drafts that passed
    word_error_rate: float = 0.0
    word_error_rate_95: tuple[float, float] = (0.0, 0.0)
    distillmos: float = 0.0
    distillmos_95: tuple[float, float] = (0.0, 0.0)
    length_ratio: float = 0.0  # tokens spoken ÷ tokens of the recordings

    @property
    def key(self) -> tuple[str | int, ...]:
        """What tells cells apart."""
        return self.head, self.decoding, self.drafts, self.weights, self.sentences, self.split


def flatten(mapping: dict[str, Any], prefix: str) -> list[str]:
    """A nested mapping as `key.sub=value` overrides."""
    result: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            result += flatten(value, f"{prefix}{key}.")
        elif value is not None:
            result.append(f"{prefix}{key}={json.dumps(value, default=str)}")
    return result


def head_recipe(recipe: Ablation, name: str) -> tuple[Any, SpeakTaskConfig]:
    """The training recipe of one head and its options."""
    settings = {
        "data": recipe.data,
        "output": recipe.output / "heads" / name,
        "seed": recipe.seed,
        "trainer": asdict(recipe.trainer),
        "options": recipe.options,
    }
    overrides = flatten(settings, "") + flatten(recipe.heads[name], "options.")
    return load_recipe(recipe.speak, overrides)


def train_heads(recipe: Ablation) -> bool:
    """Trains what is not trained yet; False when a signal stopped it."""
    chosen = {name: head_recipe(recipe, name) for name in recipe.heads}  # a mistake shows before hours of training
    for name, (training, options) in chosen.items():
        if (training.output / "result.json").is_file():
            print(f"{name}: trained already", flush=True)
            continue
        print(f"{name}: training", flush=True)
        if not Engine(training, options).run():
            return False
    return True


class Judge:
    """Speaks tokens and lets Whisper and DistillMOS judge; what was judged once is kept on disk."""

    def __init__(self, recipe: Ablation) -> None:
        folder = model_folder(recipe.model)
        config = from_dict(VocalNetConfig, read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        self.flow = load_part(Flow, FlowConfig, folder / "flow")
        vocoder, vocoder_config = VOCODERS[config.vocoder]
        self.vocoder = load_part(vocoder, vocoder_config, folder / "vocoder")
        self.file = recipe.output / JUDGED
        # Two parts speak: with others in their place, earlier judgements are void.
        self.voice = [sha256_of(folder / part / WEIGHTS_FILE)[:16] for part in ("flow", "vocoder")]
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.known: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in map(json.loads, lines)}

    @torch.inference_mode()
    def __call__(self, item: Spoken, tokens: Sequence[int]) -> dict[str, Any]:
        """`errors`, `words` and `distillmos` of a sentence spoken as `tokens`."""
        from vocalnet.evaluation.speech import distillmos, error_counts, transcribe

        content = json.dumps([item.text, list(tokens), *self.voice])
        key = hashlib.sha256(content.encode()).hexdigest()[:20]
        if key not in self.known:
            heard, opinion = "", 1.0  # silence: the worst score
            if tokens:
                mel = self.flow.mel(torch.tensor([list(tokens)]), streaming=True)
                wave = self.vocoder(mel)[0].clamp(-1, 1)
                heard, opinion = transcribe([wave])[0], distillmos([wave])[0]
            counts = error_counts(item.text, heard)
            entry = {
                "key": key,
                "text": item.text,
                "heard": heard,
                "errors": counts.word_errors,
                "words": counts.words,
                "distillmos": round(opinion, 3),
            }
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.known[key] = entry
        return self.known[key]


def speak(
    decoder: SpeechDecoder, text: Tensor, drafts: int, decoding: DecodingConfig, limit: int
) -> tuple[list[int], Any, float]:
    """Greedy streaming as in a conversation: tokens, the state at the end, and seconds."""
    config = decoder.config
    state = decoder.init_state(len(text) + 1, limit + 16, drafts)
    tokens: list[int] = []
    since = time.perf_counter()
    first = config.text_chunk - 1  # BOS is one row of the first chunk
    for start in [0, *range(first, len(text), config.text_chunk)]:
        size = first if start == 0 else config.text_chunk
        decoder.add_text(text[start : start + size], state, last=start + size >= len(text))
        while new := generate_chunk(
            decoder, state, SamplingConfig(), min(config.speech_chunk, limit - len(tokens)), decoding
        ):
            tokens += new
        if state.text_complete:
            break
    return tokens, state, time.perf_counter() - since


def cells(recipe: Ablation, head: str, config: SpeechDecoderConfig, weights: str) -> Iterator[Cell]:
    """The cells of a head, empty. K = 0 is the decoder alone, however it is decoded."""
    for name, decoding in recipe.decoding.items():
        for drafts in recipe.drafts:
            if drafts > config.mtp_modules or (drafts == 0 and name != next(iter(recipe.decoding))):
                continue
            if config.mtp_head == "group" and (drafts != config.mtp_modules or decoding.mode != "accept-all"):
                continue
            yield Cell(head, name, drafts, weights, recipe.sentences, recipe.split)


def measure(
    cell: Cell, recipe: Ablation, decoder: SpeechDecoder, items: Sequence[Spoken], rows: Sequence[Tensor], judge: Judge
) -> None:
    """Fills a cell."""
    decoding = recipe.decoding[cell.decoding]
    seconds = 0.0
    steps = made = checked = passed = 0
    verdicts = []
    for item, text in zip(items, rows, strict=True):
        limit = 2 * len(item.tokens) + 25
        runs = [speak(decoder, text, cell.drafts, decoding, limit) for _ in range(recipe.repeats)]
        tokens, state, _ = runs[0]
        seconds += min(run[2] for run in runs)
        made, steps = made + len(tokens), steps + state.steps
        checked, passed = checked + state.drafts_checked, passed + state.drafts_passed
        verdicts.append(judge(item, tokens))
    errors = ratio([v["errors"] for v in verdicts], [v["words"] for v in verdicts])
    opinion = mean([v["distillmos"] for v in verdicts])
    cell.tokens_per_step = round(made / max(1, steps), 3)
    cell.tokens_per_s = round(made / seconds, 1)
    cell.acceptance = round(passed / checked, 4) if checked else None
    cell.word_error_rate, cell.word_error_rate_95 = (
        round(errors.value, 4),
        (round(errors.low, 4), round(errors.high, 4)),
    )
    cell.distillmos, cell.distillmos_95 = round(opinion.value, 3), (round(opinion.low, 3), round(opinion.high, 3))
    cell.length_ratio = round(made / sum(len(item.tokens) for item in items), 3)


def evaluate_heads(recipe: Ablation) -> list[Cell]:
    """Measures all cells that are not in ablation.json yet; it is rewritten after each."""
    file = recipe.output / "ablation.json"
    known = {cell.key: cell for cell in read_cells(file)}
    judge, done = Judge(recipe), []
    items: list[Spoken] = []
    for name in recipe.heads:
        training, options = head_recipe(recipe, name)
        if not items:
            everything = load_spoken(recipe.data, recipe.split, options)
            states = AnswerStates(recipe.data, options, answer_pairs(everything))
            first = first_pairs(everything)
            items = everything[: recipe.sentences]
        decoder = load_part(SpeechDecoder, SpeechDecoderConfig, training.output)
        planned = list(cells(recipe, name, decoder.config, sha256_of(training.output / WEIGHTS_FILE)[:16]))
        rows = [states.rows(first[i]) for i in range(len(items))]
        decoder.prepare_inference()
        for cell in tqdm(planned, desc=name, unit="cell"):
            if cell.key not in known:
                measure(cell, recipe, decoder, items, rows, judge)
                known[cell.key] = cell
            done.append(known[cell.key])
            write_results(recipe, done)
    return done


def read_cells(file: Path) -> list[Cell]:
    """The cells of an earlier run."""
    if not file.is_file():
        return []
    return [from_dict(Cell, entry, str(file)) for entry in json.loads(file.read_text())["cells"]]


def write_results(recipe: Ablation, done: Sequence[Cell]) -> None:
    """ablation.json, atomically: cells, and how each head was trained."""
    training = {}
    for name in recipe.heads:
        result = json.loads((recipe.output / "heads" / name / "result.json").read_text())
        kept = ("seed", "steps", "training_minutes", "trainable_parameters", "validation", "commit", "machine")
        training[name] = {key: result[key] for key in kept}
    record = {
        "machine": machine(),
        "commit": git_commit(),
        "seed": recipe.seed,
        "sentences": recipe.sentences,
        "split": recipe.split,
        "training": training,
        "cells": [asdict(cell) for cell in done],
    }
    write_json(recipe.output / "ablation.json", record)


def table(done: Sequence[Cell]) -> str:
    """The cells as a Markdown table."""
    lines = [
        "| head | decoding | K | tokens/step | tokens/s | accepted | WER % (95 %) | DistillMOS (95 %) | length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in done:
        low, high = (100 * edge for edge in cell.word_error_rate_95)
        accepted = "" if cell.acceptance is None else f"{100 * cell.acceptance:.0f} %"
        lines.append(
            f"| {cell.head} | {cell.decoding} | {cell.drafts} | {cell.tokens_per_step:.2f} | {cell.tokens_per_s:.0f} "
            f"| {accepted} | {100 * cell.word_error_rate:.1f} ({low:.0f}–{high:.0f}) "
            f"| {cell.distillmos:.2f} ({cell.distillmos_95[0]:.2f}–{cell.distillmos_95[1]:.2f}) "
            f"| {cell.length_ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(done: Sequence[Cell], file: Path) -> None:
    """Speed against quality: one line a head, one marker a K; verified decoding dashed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ConfigError(f"the plot needs {error.name}; install it: pip install 'vocalnet[eval]'") from error
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    heads = list(dict.fromkeys(cell.head for cell in done))
    for axis, name, label in zip(
        axes, ("word_error_rate", "distillmos"), ("word error rate, %", "DistillMOS"), strict=True
    ):
        for index, head in enumerate(heads):
            for decoding in dict.fromkeys(cell.decoding for cell in done):
                line = [cell for cell in done if cell.head == head and (cell.decoding == decoding or not cell.drafts)]
                if not any(cell.decoding == decoding for cell in line):
                    continue
                scale = 100 if name == "word_error_rate" else 1
                x, y = [cell.tokens_per_s for cell in line], [scale * getattr(cell, name) for cell in line]
                first = decoding == done[0].decoding
                axis.plot(x, y, "-o" if first else "--x", color=f"C{index}", label=head if first else None, alpha=0.8)
                for cell, a, b in zip(line, x, y, strict=True):
                    axis.annotate(str(cell.drafts), (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set_xlabel("speech tokens per second")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle("Heads of multi-token prediction; numbers are K, crosses verified decoding")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def ablate(path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Runs the recipe; the finished cells. `heads.NAME=null` leaves a head out.

    Raises:
        VocalNetError: the recipe, the data or a decoder cannot be used.
        KeyboardInterrupt: a signal stopped a training; run again to go on.
    """
    settings = with_overrides(load_yaml(path), list(overrides))
    settings["heads"] = {name: head for name, head in settings.get("heads", {}).items() if head is not None}
    recipe = from_dict(Ablation, settings, str(path))
    if not train_heads(recipe):
        raise KeyboardInterrupt
    done = evaluate_heads(recipe)
    write_text(recipe.output / "ablation.md", table(done))
    plot(done, recipe.output / "ablation.png")
    return done


def main() -> int:
    """The command line: 0, 2 for an error the user can act on, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args()
    try:
        done = ablate(parsed.recipe, parsed.overrides)
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to go on", file=sys.stderr)
        return 130
    print(table(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
