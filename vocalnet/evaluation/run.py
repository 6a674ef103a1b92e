"""A resumable evaluation: every finished item is a line of results.jsonl; the report appears when all are there.

OUT/run.json        suite, settings, items: what the results belong to
OUT/results.jsonl   one line an item, appended when it is finished
OUT/audio/          the answers
OUT/report.json     scores and results, OUT/report.html the same to look at and listen to
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import track

from vocalnet.errors import ConfigError, DataError
from vocalnet.evaluation.executors import Executor, Serial
from vocalnet.evaluation.items import Item
from vocalnet.evaluation.summary import summarise
from vocalnet.evaluation.worker import Result, Settings, Worker, load_worker
from vocalnet.files import write_json

LINE_EVERY_S = 30.0
RUN, RESULTS, REPORT, PAGE = "run.json", "results.jsonl", "report.json", "report.html"


def _fingerprint(items: Sequence[Item]) -> str:
    """What is asked, in short: ids, questions and accepted answers."""
    asked = [[item.id, item.kind, item.question, item.reference, item.condition, *item.accept] for item in items]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


class RunFolder:
    """The folder of one evaluation, which holds what is finished of it."""

    def __init__(self, folder: Path, suite: str, settings: Settings, items: Sequence[Item], fresh: bool) -> None:
        """Opens a run, or goes on with the one that is there.

        Raises:
            ConfigError: the folder holds a run of something else, or files that are no run.
        """
        self.folder = folder
        about = {"suite": suite, "settings": json.loads(json.dumps(asdict(settings))), "items": _fingerprint(items)}
        if fresh:
            self._remove()
        if (folder / RUN).is_file():
            self._check(json.loads((folder / RUN).read_text()), about)
        elif folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds other files; give an empty or a new folder as --out")
        (folder / "audio").mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, about)

    def _remove(self) -> None:
        for name in (RUN, RESULTS, REPORT, PAGE):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "audio", ignore_errors=True)

    def _check(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        old, new = ({"suite": r["suite"], "items": r["items"], **r["settings"]} for r in (there, wanted))
        for key, value in new.items():
            if old.get(key) != value:
                raise ConfigError(
                    f"{self.folder} holds a run with another {key} ({old.get(key)!r}, now {value!r}); "
                    "give another --out, or --fresh to begin anew"
                )

    def finished(self) -> dict[str, Result]:
        """Results so far, by id; a line that was cut off by a kill is dropped from the file.

        Raises:
            DataError: a line in the middle is damaged.
        """
        path = self.folder / RESULTS
        if not path.is_file():
            return {}
        whole, _, cut = path.read_bytes().rpartition(b"\n")
        if cut:
            os.truncate(path, len(whole) + 1 if whole else 0)
        results = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result = Result.from_json(json.loads(line))
            except (ValueError, ConfigError) as error:
                raise DataError(f"{path}, line {number} is damaged ({error}); begin anew with --fresh") from error
            results[result.id] = result
        return results

    def append(self, file: IO[str], result: Result) -> None:
        """Keeps one result; it survives a kill of this process, and of the machine."""
        file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _shown(outcomes: Iterable[Result], done: int, total: int) -> Iterator[Result]:
    """Progress on stderr while results come: a bar in a terminal, else a line every half minute."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(outcomes, "evaluating", total=total, completed=done, console=console, disable=total == done)
        return
    start = last = time.monotonic()
    for number, result in enumerate(outcomes, done + 1):
        yield result
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and number < total:
            left_s = (now - start) / (number - done) * (total - number)
            console.print(f"{number} of {total} items, about {left_s / 60:.0f} min left", highlight=False)
            last = now


def evaluate(
    suite: str,
    items: Sequence[Item],
    settings: Settings,
    out: Path,
    executor: Executor | None = None,
    fresh: bool = False,
    make: Callable[[], Worker] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs what is missing of an evaluation and writes its report.

    Args:
        suite: its name.
        items: all of them, in the suite's order.
        out: folder of the run; one that was interrupted goes on.
        executor: where to work; this process by default.
        fresh: begin anew.
        make: makes the worker of a process.
        notes: what a reader of the report should know.

    Returns:
        The report, as in report.json.

    Raises:
        ConfigError: the folder belongs to another run.
        DataError: two items share an id.
    """
    if len({item.id for item in items}) < len(items):
        raise DataError(f"two items of {suite} share an id; the folder is inconsistent, fetch it anew")
    run = RunFolder(out, suite, settings, items, fresh)
    results = run.finished()
    missing = [item for item in items if item.id not in results]
    outcomes = (executor or Serial()).run(make or partial(load_worker, settings, out), missing)
    with (out / RESULTS).open("a") as file:
        for result in _shown(outcomes, len(results), len(items)):
            run.append(file, result)
            results[result.id] = result
    report = summarise(suite, settings, [results[item.id] for item in items])
    report["notes"] = list(notes)
    write_json(out / REPORT, report)
    return report
