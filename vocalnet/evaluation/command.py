"""`vocalnet eval`: reads the items, runs them, writes the report, prints the scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from vocalnet.errors import ConfigError
from vocalnet.evaluation.compare import compare, comparison_page, read_report
from vocalnet.evaluation.degrade import STANDARD, under
from vocalnet.evaluation.executors import executor
from vocalnet.evaluation.items import Item
from vocalnet.evaluation.report import LABELS, label_of, page, write
from vocalnet.evaluation.run import PAGE, evaluate
from vocalnet.evaluation.speech import unavailable
from vocalnet.evaluation.suites import OWN, Suite, find_suite, read_items
from vocalnet.evaluation.suites.hub import fetch_suite
from vocalnet.evaluation.worker import DEFAULT_MEASURES, Measure, Settings
from vocalnet.files import write_json, write_text


@dataclass(frozen=True)
class Options:
    """What to evaluate and where, beside what the results depend on (`Settings`).

    Attributes:
        what: a suite's name, or a folder in a suite's published form, or a folder of speech.
        data: folder of the suite's data.
        sample: take the few items that come with the package.
        subsets, limit, partial: see `read_items`.
        conditions: under which the questions are asked again; see `degrade.py`.
        out: folder of the run.
        jobs, ray: where to work; see `executors.py`.
        fresh: begin anew.
        notes: for the reader of the report.
    """

    what: str
    data: Path | None = None
    sample: bool = False
    subsets: tuple[str, ...] = ()
    limit: int | None = None
    partial: bool = False
    conditions: tuple[str, ...] = ()
    out: Path | None = None
    jobs: int = 1
    ray: bool = False
    fresh: bool = False
    notes: tuple[str, ...] = ()


def parts_of(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def chosen_measures(text: str) -> tuple[tuple[Measure, ...], tuple[str, ...]]:
    """Measures from "default", "all" or a comma-separated list; and why some of "all" are left out.

    Raises:
        ConfigError: an unknown measure, or one that was asked for and cannot be had here.
    """
    if text == "all":
        reasons = {measure: unavailable(measure) for measure in get_args(Measure)}
        return tuple(m for m, reason in reasons.items() if not reason), tuple(filter(None, reasons.values()))
    measures: Any = DEFAULT_MEASURES if text == "default" else parts_of(text)
    for measure in measures:
        if reason := unavailable(measure):
            raise ConfigError(reason)
    return measures, ()


def chosen_conditions(text: str) -> tuple[str, ...]:
    """Conditions from "standard" or a comma-separated list."""
    return STANDARD if text == "standard" else parts_of(text)


def items_of(options: Options, settings: Settings) -> tuple[Suite, list[Item]]:
    """The suite and its items, degraded ones included.

    Raises:
        VocalNetError: see `find_suite`, `fetch_suite`, `read_items`.
    """
    suite, folder = find_suite(options.what)
    if options.sample or (suite in OWN and not options.data and not folder):
        folder = suite.sample
    folder = options.data or folder or fetch_suite(suite)
    spoken = bool(settings.model) or bool(options.conditions)
    items = read_items(suite, folder, options.limit, options.subsets, options.partial, spoken)
    return suite, under(items, options.conditions)


def run_eval(options: Options, settings: Settings) -> dict[str, Any]:
    """One evaluation, to its report.

    Raises:
        VocalNetError: see `items_of`, `evaluate` and `load_worker`.
    """
    suite, items = items_of(options, settings)
    if all(item.answer is not None for item in items):  # speech that is there needs no model
        settings = replace(settings, model="", answers="")
    source = Path(settings.model or settings.answers or options.what).name
    out = options.out or Path("evaluations") / f"{suite.name}-{source}"
    notes = [*options.notes]
    if options.jobs > 1:
        notes.append(f"{options.jobs} jobs shared the machine: timings are longer than alone")
    if options.sample:
        notes.append("a sample of our own in the published form, not the published data")
    work = executor(options.jobs, options.ray)
    report = evaluate(suite.name, items, settings, out, work, options.fresh, notes=notes)
    write_text(out / PAGE, page(report, out, items, f"{suite.title} · {source}"))
    show(report, out)
    return report


def run_compare(first: Path, second: Path, out: Path | None) -> dict[str, Any]:
    """Prints the comparison of two runs; writes comparison.json and comparison.html into `out` if given.

    Raises:
        DataError: see `read_report` and `compare`.
    """
    reports = read_report(first), read_report(second)
    result = compare(*reports)
    table = Table("", "A", "B", "B − A", "95 %", "items", box=None)
    for key, entry in result["differences"].items():
        label, kind = LABELS.get(key, (key.replace("_", " "), "score"))
        a, b, difference, low, high = (write(entry[part], kind) for part in ("a", "b", "difference", "low", "high"))
        table.add_row(
            label, a, b, difference + ("  *" if entry["certain"] else ""), f"{low} to {high}", str(entry["n"])
        )
    console = Console()
    console.print(table)
    console.print("* the interval excludes no difference", highlight=False)
    by_id = [{record["id"]: record for record in report["results"]} for report in reports]
    for title, key in (("right in A only", "lost"), ("right in B only", "won")):
        console.print(f"{title}: {len(result[key])}", highlight=False)
        for name in result[key]:
            a, b = (records[name] for records in by_id)
            line = f"  {a['question']} | A: {a['transcript'] or a['text']} | B: {b['transcript'] or b['text']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if out:
        write_json(out / "comparison.json", result)
        write_text(out / "comparison.html", comparison_page(result, *reports, [str(first), str(second)]))
    return result


def show(report: dict[str, Any], out: Path) -> None:
    """Prints the scores."""
    table = Table("", "mean or median", "95 %", "items", box=None)
    for key, entry in report["scores"].items():
        if isinstance(entry, dict):
            label, kind = label_of(key, entry)
            timing = "median" in entry
            spread = (
                f"p95 {write(entry['p95'], kind)}"
                if timing
                else f"{write(entry['low'], kind)} to {write(entry['high'], kind)}"
            )
            table.add_row(label, write(entry["median" if timing else "value"], kind), spread, f"{entry['n']:.0f}")
    console = Console()
    console.print(table)
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if report["judge"]:
        console.print(f"judge: {report['judge']}", highlight=False, soft_wrap=True)
    console.print(f"report: {out / PAGE}", highlight=False, soft_wrap=True)
