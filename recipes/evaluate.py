"""Measures the speaking half of a model alone.

    python recipes/evaluate.py tts [--model mini] [--out evaluations/tts]
    python recipes/evaluate.py copy --speech FOLDER [--model mini] [--out evaluations/copy]

tts: texts go through the LLM for their hidden states and are then spoken, once for every number of MTP modules K and
every decoding mode: word error rate, predicted opinion score and speed of each. By default the texts are the answers
to mini-qa's questions; --texts takes a file with one sentence a line ("question TAB answer" to say it as that answer).
Every setting is a run of its own in OUT, so that an interrupted script goes on, and any two can be compared with
`vocalnet eval compare`.
copy: recordings in the voice that the model learned from, with their texts (NAME.wav beside NAME.txt, or
metadata.jsonl), as they are, through the vocoder, and through speech tokens, flow and vocoder. What is lost here no
speech decoder brings back.
The table is in OUT/tts.json and OUT/tts.html, or copy.json and copy.html.
"""

from __future__ import annotations

import argparse
import html
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vocalnet.bench import machine
from vocalnet.errors import DataError, VocalNetError
from vocalnet.evaluation.command import chosen_measures
from vocalnet.evaluation.copies import STAGES, CopyAnswerer, load_tokenizer
from vocalnet.evaluation.items import Item
from vocalnet.evaluation.report import LABELS, STYLE, page, write
from vocalnet.evaluation.run import PAGE, evaluate
from vocalnet.evaluation.suites import MINI_QA, speech_folder
from vocalnet.evaluation.suites.tables import safe_id
from vocalnet.evaluation.worker import Settings, Worker, load_worker
from vocalnet.files import write_json, write_text
from vocalnet.model import VocalNet

ROWS = (
    "word_error_rate",
    "character_error_rate",
    "distillmos",
    "audio_s",
    "tokens_per_step",
    "speech_tokens_per_s",
    "rtf",
    "first_audio_ms",
    "clicks",
    "offline_difference",
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["tts", "copy"])
    parser.add_argument("--model", default="mini", help="mini, or a model folder")
    parser.add_argument("--texts", type=Path, help="file with one sentence, or question TAB answer, a line")
    parser.add_argument("--speech", type=Path, help="folder of recordings with their texts, for copy")
    parser.add_argument("--limit", type=int, default=50, help="how many texts or recordings")
    parser.add_argument("--mtp", type=int, nargs="+", help="values of K (default: 0 to the model's own number)")
    parser.add_argument("--decoding", nargs="+", choices=["accept-all", "verified"], default=["accept-all", "verified"])
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measures", default="transcript,distillmos,seams,rate")
    parser.add_argument("--out", type=Path, help="default: evaluations/tts or evaluations/copy")
    args = parser.parse_args(given)
    args.out = args.out or Path("evaluations") / args.what
    return args


def read_texts(path: Path | None, limit: int) -> list[Item]:
    """What is to be said.

    Raises:
        DataError: no such file, or nothing in it.
    """
    if path is None:
        asked = {item.reference: item.question for item in MINI_QA.read(MINI_QA.sample) if item.reference}
        pairs = [(question, text) for text, question in asked.items()]
    else:
        if not path.is_file():
            raise DataError(f"no file {path} of texts; give one with a sentence a line as --texts")
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        pairs = [(question, text) for question, _, text in (line.rpartition("\t") for line in lines)]
    if not pairs:
        raise DataError(f"{path} holds no text; write one sentence a line")
    return [
        Item(safe_id(f"{number:04d}", text[:24]), "speak", question, reference=text)
        for number, (question, text) in enumerate(pairs[:limit])
    ]


def plan(model: VocalNet, wanted: list[int] | None, modes: list[str]) -> list[tuple[int, str]]:
    """The settings that the model allows; with no drafts (K = 0) the modes are the same, and only one is run."""
    most = model.speech_decoder.config.mtp_modules
    values = list(range(most + 1)) if wanted is None else wanted
    if too_many := [k for k in values if not 0 <= k <= most]:
        raise DataError(
            f"K = {too_many[0]} is not possible: {model.config.name} has {most} MTP modules; give 0 to {most}"
        )
    return [(k, mode) for k in values for mode in (modes if k else modes[:1])]


def speak(args: argparse.Namespace, items: list[Item], model: VocalNet, k: int, mode: Any) -> dict[str, Any]:
    """All texts at one setting; the row of the table."""
    measures, _ = chosen_measures(args.measures)
    settings = Settings(args.model, seed=args.seed, mtp=k, decoding=mode, measures=measures)
    name = f"k{k}-{mode}"
    out = args.out / name
    report = evaluate(
        "tts", items, settings, out, fresh=args.fresh, make=lambda: load_worker(settings, out, lambda _: model)
    )
    write_text(out / PAGE, page(report, out, items, f"K = {k}, {mode}"))
    return {"title": f"K = {k}\n{mode}", "mtp": k, "decoding": mode, "folder": name, "scores": report["scores"]}


def copy(args: argparse.Namespace, items: list[Item], answerer: CopyAnswerer) -> dict[str, Any]:
    """All recordings after one stage; the row of the table."""
    measures, _ = chosen_measures(args.measures)
    settings, stage = Settings(args.model, seed=args.seed, measures=measures), answerer.stage
    out = args.out / stage
    report = evaluate(
        f"copy, {stage}", items, settings, out, fresh=args.fresh, make=lambda: Worker(settings, answerer, out)
    )
    write_text(out / PAGE, page(report, out, items, f"copies: {stage}"))
    return {"title": stage, "folder": stage, "scores": report["scores"]}


def read_speech(folder: Path | None, limit: int) -> list[Item]:
    """The recordings to copy.

    Raises:
        DataError: no folder, or none with a text.
    """
    if folder is None or not folder.is_dir():
        raise DataError("copy needs --speech FOLDER: recordings with their texts (NAME.wav beside NAME.txt)")
    return speech_folder.read(folder)[:limit]


def run(args: argparse.Namespace) -> tuple[int, list[dict[str, Any]]]:
    """How many texts there are, and the table's rows."""
    if args.what == "copy":
        items = read_speech(args.speech, args.limit)
        tokenizer, model = load_tokenizer(args.model), VocalNet.load(args.model)
        return len(items), [copy(args, items, CopyAnswerer(model, tokenizer, stage)) for stage in STAGES]
    items, model = read_texts(args.texts, args.limit), VocalNet.load(args.model)
    return len(items), [speak(args, items, model, k, mode) for k, mode in plan(model, args.mtp, args.decoding)]


def known(rows: list[dict[str, Any]]) -> list[str]:
    """The scores that any of the runs has."""
    return [key for key in ROWS if any(key in row["scores"] for row in rows)]


def table_page(rows: list[dict[str, Any]], title: str) -> str:
    """The table as a self-contained page."""
    titles = ["<br>".join(html.escape(row["title"]).splitlines()) for row in rows]
    links = [f'<a href="{row["folder"]}/{PAGE}">{title}</a>' for row, title in zip(rows, titles, strict=True)]
    body = []
    for key in known(rows):
        cells = [f'<td class=n data-key="{i}.{key}">{shown(row["scores"], key)}</td>' for i, row in enumerate(rows)]
        body.append(f"<tr><td>{html.escape(LABELS[key][0])}</td>{''.join(cells)}</tr>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}body{{max-width:none}}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<table><tr><th></th>{''.join(f'<th class=n>{link}</th>' for link in links)}</tr>"
        f"{''.join(body)}</table></body></html>"
    )


def shown(scores: dict[str, Any], key: str) -> str:
    """A cell: the mean with its interval, or the median."""
    entry = scores.get(key)
    if entry is None:
        return "–"
    kind = LABELS[key][1]
    if "median" in entry:
        return write(entry["median"], kind)
    return f"{write(entry['value'], kind)} ({write(entry['low'], kind)} to {write(entry['high'], kind)})"


def main(given: list[str] | None = None) -> int:
    """Runs all settings; 2 on bad input."""
    args = arguments(given)
    try:
        count, rows = run(args)
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = {"model": args.model, "texts": count, "machine": machine(), "rows": rows}
    write_json(args.out / f"{args.what}.json", about)
    title = f"{'Speech' if args.what == 'tts' else 'Copies'} of {args.model}: {count} texts"
    write_text(args.out / f"{args.what}.html", table_page(rows, title))
    table = Table("", *(row["title"] for row in rows), box=None)
    for key in known(rows):
        table.add_row(LABELS[key][0], *(shown(row["scores"], key).partition(" (")[0] for row in rows))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
