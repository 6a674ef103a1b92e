"""What a person sees of a run: a progress bar or plain lines, TensorBoard scalars and a table of results."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


class Reporter:
    """Progress display plus scalars in `folder`/tensorboard and `folder`/log.jsonl. Silent unless `enabled`."""

    def __init__(self, folder: Path, line_every_seconds: float, enabled: bool = True, first_step: int = 0) -> None:
        self._console = Console()
        self._enabled = enabled
        self._line_every_seconds = line_every_seconds
        self._last_line = -float("inf")
        self._writer: Any = None
        self._bar: Progress | None = None
        if not enabled:
            return
        self._log_file = folder / "log.jsonl"
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)  # type: ignore[no-untyped-call]
        except ImportError:
            self.note(f"tensorboard is not installed: scalars go to {self._log_file} only")

    def start(self, title: str) -> None:
        """Opens the progress bar (in a terminal)."""
        if not self._enabled or not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.1f} %"))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"))
        self._bar = Progress(*columns, *times, console=self._console)
        self._bar.add_task(title, total=1.0, numbers="")
        self._bar.start()

    def update(self, fraction: float, step: int, metrics: Mapping[str, float]) -> None:
        """Shows and records the averaged metrics at `step`; `fraction` of the run is done."""
        if not self._enabled:
            return
        self.scalars("train", step, metrics)
        numbers = f"step {step}  {_format(metrics)}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=fraction, numbers=numbers)
        elif time.monotonic() - self._last_line >= self._line_every_seconds or fraction >= 1:
            self._last_line = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')}  {100 * fraction:5.1f} %  {numbers}", flush=True)

    def scalars(self, group: str, step: int, metrics: Mapping[str, float]) -> None:
        """Records scalars without showing them."""
        if not self._enabled:
            return
        for name, value in metrics.items():
            if self._writer is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)
        with self._log_file.open("a") as file:
            file.write(json.dumps({"step": step, "group": group, **metrics}) + "\n")

    def note(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, metrics: Mapping[str, float]) -> None:
        """Prints metrics as a two-column table."""
        if not self._enabled or not metrics:
            return
        table = Table("metric", "value", title=title)
        for name, value in metrics.items():
            table.add_row(name, f"{value:.4g}")
        self._console.print(table)

    def close(self) -> None:
        """Ends the bar and flushes the scalars."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
