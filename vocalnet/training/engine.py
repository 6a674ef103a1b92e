"""The training engine: one loop for every task, from a strict YAML recipe, with exact resume.

    python recipes/train.py recipes/speak.yaml trainer.max_minutes=30
    vocalnet train recipes/speak.yaml trainer.max_minutes=30

A recipe says `task`, `data`, `output`, `seed`, `trainer` (this module's `TrainerConfig`) and `options` (the task's own
configuration). Interrupted training goes on when the same command runs again; scheduled by steps it ends with the same
weights, bit for bit, as training that was never interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from vocalnet.config import from_dict, load_yaml, to_dict, with_overrides
from vocalnet.errors import CheckpointError, ConfigError, DataError, VocalNetError
from vocalnet.files import write_json
from vocalnet.training.checkpoint import (
    Position,
    checkpoint_files,
    isolated_random,
    load_checkpoint,
    load_trainable_state,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
    trainable_state,
)
from vocalnet.training.progress import Reporter
from vocalnet.training.provenance import git_commit, machine
from vocalnet.training.task import Batch, Task, task_classes

MAX_BAD_STEPS = 20
"""Consecutive steps with a gradient that is not finite (each is skipped) before training gives up."""


@dataclass(frozen=True)
class TrainerConfig:
    """How long and how to train; learning rates are in the task's options. Ends at `max_steps` or `max_minutes`,
    whichever comes first; minutes count training steps only, not validation, and add up over interrupted runs."""

    max_steps: int | None = None
    max_minutes: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up, over the whole of the run
    warmup_steps: int = 100
    min_lr_ratio: float = 0.0  # where the cosine ends, relative to the peak
    gradient_accumulation: int = 1
    clip: float = 1.0  # gradient norm; 0 does not clip
    precision: Literal["bf16", "fp32"] = "bf16"  # autocast; weights and optimiser are float32
    validate_every_minutes: float | None = None  # None: only at the end
    checkpoint_every_minutes: float = 5.0
    threads: int | None = None  # CPU threads; None: torch's choice
    log_every: int = 20  # steps
    line_every_seconds: float = 15.0  # between progress lines when the output is not a terminal

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ConfigError("trainer has neither max_steps nor max_minutes; give one")
        for name in ("max_steps", "max_minutes", "gradient_accumulation", "log_every", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"trainer.{name} is {value}; must be above 0")


@dataclass(frozen=True)
class Recipe:
    """A training run: which task, on what data, into which folder."""

    task: str
    data: Path
    output: Path
    trainer: TrainerConfig
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Any]:
    """The recipe in a YAML file with `key.sub=value` overrides, and the task's options as its dataclass.

    Raises:
        ConfigError: unknown keys, wrong types, unknown task, or a missing file.
    """
    recipe = from_dict(Recipe, with_overrides(load_yaml(path), list(overrides)), where=str(path))
    config_class, _ = task_classes(recipe.task)
    return recipe, from_dict(config_class, recipe.options, where="options")


def fraction_done(config: TrainerConfig, position: Position) -> float:
    """How much of the run is behind, 0 to 1, by steps or by training time, whichever is further."""
    by_steps = position.step / config.max_steps if config.max_steps else 0.0
    by_time = position.seconds / (60 * config.max_minutes) if config.max_minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def learning_rate_factor(config: TrainerConfig, position: Position) -> float:
    """Factor on the peak rates for the next step: linear warm-up, then constant or half a cosine."""
    warmup = min(1.0, (position.step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    if config.schedule == "constant":
        return warmup
    cosine = 0.5 * (1 + math.cos(math.pi * fraction_done(config, position)))
    return warmup * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`: looks into dataclasses, dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: to_device(getattr(batch, f.name), device) for f in fields(batch)})
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class _LossModule(nn.Module):
    """The task's loss as a module's forward, the form that distributed wrappers and autocast hooks expect."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        return self._task.loss(batch, step)


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag read between two steps; the second acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)

    def __enter__(self) -> _StopRequest:
        with contextlib.suppress(ValueError):  # signals can be set in the main thread only
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._previous[kind] = signal.signal(kind, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()


class _Averages:
    """Means of the metrics over the steps since the last log line."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._start = time.perf_counter()

    def add(self, metrics: dict[str, float | Tensor]) -> None:
        for name, value in metrics.items():
            number = torch.as_tensor(value).detach().float()
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, steps: int) -> dict[str, float]:
        """The means, the speed over `steps`, and a fresh start."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        sums = {name: float(total) for name, total in self._sums.items()}
        means = {name: total / self._counts[name] for name, total in sums.items() if name != "samples"}
        means["steps/s"] = steps / elapsed
        if "samples" in sums:
            means["samples/s"] = sums["samples"] / elapsed
        self._reset()
        return means


class Engine:
    """Trains one task into `recipe.output`."""

    def __init__(self, recipe: Recipe, options: Any) -> None:
        self.recipe = recipe
        self.config = recipe.trainer
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        precision = "bf16" if self.config.precision == "bf16" else "no"
        AcceleratorState._reset_state()  # a second engine in one process may have another precision
        cpu = not torch.accelerator.is_available()  # said outright, so that torchrun on CPUs joins its processes too
        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=handlers)  # type: ignore[list-item]
        self.is_main = self.accelerator.is_main_process
        recipe.output.mkdir(parents=True, exist_ok=True)
        self.checkpoints = recipe.output / "checkpoints"
        seed_everything(recipe.seed)
        _, task_class = task_classes(recipe.task)
        self.task: Task = task_class(options, recipe.data, recipe.seed)
        self.options = to_dict(options)
        groups = self.task.parameter_groups()
        self.peak_rates = [float(group["lr"]) for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, fused=True)
        self.module, self.optimizer = self.accelerator.prepare(_LossModule(self.task), optimizer)
        # After construction, so that training's random numbers do not depend on how the model was built.
        seed_everything(recipe.seed + 1 + self.accelerator.process_index)
        self.position = Position()
        self.validations: list[dict[str, float]] = []
        self.bad_steps = 0
        self._resume()
        enabled = self.is_main
        self.reporter = Reporter(recipe.output, self.config.line_every_seconds, enabled, self.position.step)

    # Checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued; durations and folders may change."""
        return {"task": self.recipe.task, "seed": self.recipe.seed, "options": self.options}

    def _resume(self) -> None:
        files = checkpoint_files(self.checkpoints)
        if not files:
            return
        content = load_checkpoint(files[-1])
        saved, ours = content["identity"], self._identity()
        changed = [key for key in ("task", "seed") if saved[key] != ours[key]]
        before, now = saved["options"], ours["options"]
        missing = before.keys() ^ now.keys()
        changed += sorted(
            f"options.{name}" for name in missing | {n for n in before.keys() & now if before[n] != now[n]}
        )
        if changed:
            raise ConfigError(
                f"{files[-1]} was trained with another {', '.join(changed)}; "
                f"give another output=FOLDER, or delete {self.checkpoints} to start again"
            )
        load_trainable_state(self.task.model, content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        states = content["random"]
        if len(states) != self.accelerator.num_processes:
            count = self.accelerator.num_processes
            raise CheckpointError(f"{files[-1]} comes from {len(states)} processes, not {count}; start as many")
        set_random_state(states[self.accelerator.process_index])
        self.position = Position(**content["position"])
        self.validations = content["validations"]

    def save(self) -> None:
        """Writes a checkpoint of the present position."""
        states = gather_object([random_state()])
        if self.is_main:
            content = {
                "identity": self._identity(),
                "model": trainable_state(self.task.model),
                "optimizer": self.optimizer.state_dict(),
                "random": states,
                "position": dict(vars(self.position)),
                "validations": self.validations,
            }
            save_checkpoint(self.checkpoints, self.position.step, content)
        self.accelerator.wait_for_everyone()

    # The loop

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, epoch after epoch from the present position; each process gets its own share."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        while True:
            batches = iter(self.task.batches(self.position.epoch))
            skipped = sum(1 for _ in islice(batches, self.position.batch_index * world))
            used = 0
            while len(group := list(islice(batches, world))) == world:  # an incomplete last round is dropped
                used += 1
                self.position.batch_index += 1
                yield to_device(group[rank], self.accelerator.device)
            if not skipped and not used:
                raise DataError(f"task '{self.recipe.task}' finds no training batch in {self.recipe.data}")
            self.position.epoch += 1
            self.position.batch_index = 0

    def _step(self, batches: Iterator[Batch]) -> dict[str, float | Tensor]:
        """One optimiser step over `gradient_accumulation` batches; the mean loss and the last batch's metrics."""
        factor = learning_rate_factor(self.config, self.position)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        parts = self.config.gradient_accumulation
        total = torch.zeros((), device=self.accelerator.device)
        metrics: dict[str, float | Tensor] = {}
        samples = 0.0
        for part in range(parts):
            batch = next(batches)
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                loss, metrics = self.module(batch, self.position.step)
                self.accelerator.backward(loss / parts)
            total += loss.detach() / parts
            samples += float(metrics.pop("samples", 0.0))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        assert norm is not None
        if torch.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self._count_bad_step()
        self.optimizer.zero_grad(set_to_none=True)
        result: dict[str, float | Tensor] = {"loss": total, **metrics, "lr": self.peak_rates[0] * factor}
        result["gradient_norm"] = norm
        if samples:
            result["samples"] = samples * self.accelerator.num_processes
        return result

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise VocalNetError(
                f"the gradient is not finite since step {self.position.step - MAX_BAD_STEPS + 1}; "
                "lower the learning rate, clip harder or use precision=fp32, and resume from the last checkpoint"
            )

    def _agree(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """The main process's clock and stop request, in every process, so that all take the same decisions."""
        if self.accelerator.num_processes == 1:
            return seconds, stop
        shared = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=self.accelerator.device)
        seconds_stop = broadcast(shared).tolist()
        return seconds_stop[0], bool(seconds_stop[1])

    def train(self) -> bool:
        """Trains to the end; False when a signal stopped it (a checkpoint is saved either way)."""
        config, position = self.config, self.position
        batches, averages = self._batches(), _Averages()
        next_save = position.seconds + 60 * config.checkpoint_every_minutes
        every = 60 * config.validate_every_minutes if config.validate_every_minutes else math.inf
        next_validation = position.seconds + every
        self.task.model.train()
        self.reporter.start(self.recipe.task)
        start_step, since_log, stopped = position.step, 0, False
        with _StopRequest() as stop:
            while fraction_done(config, position) < 1 and not stopped:
                start = time.perf_counter()
                averages.add(self._step(batches))
                elapsed = time.perf_counter() - start
                position.seconds, stopped = self._agree(position.seconds + elapsed, stop.requested)
                position.step += 1
                since_log += 1
                if position.step % config.log_every == 0 or fraction_done(config, position) >= 1:
                    self.reporter.update(fraction_done(config, position), position.step, averages.take(since_log))
                    since_log = 0
                if position.seconds >= next_save:
                    self.save()
                    next_save = position.seconds + 60 * config.checkpoint_every_minutes
                if position.seconds >= next_validation and fraction_done(config, position) < 1:
                    self.reporter.note(f"validation at step {position.step}: {_one_line(self.validate())}")
                    next_validation = position.seconds + every
        if position.step > start_step:
            self.save()
        return not stopped

    def validate(self) -> dict[str, float]:
        """Validation metrics (main process), recorded; training's random numbers are left untouched."""
        metrics: dict[str, float] = {}
        if self.is_main:
            self.task.model.eval()
            with torch.no_grad(), isolated_random(self.recipe.seed), self.accelerator.autocast():
                metrics = {name: float(value) for name, value in self.task.validate().items()}
            self.task.model.train()
            self.validations.append({"step": self.position.step, **metrics})
            self.reporter.scalars("valid", self.position.step, metrics)
        self.accelerator.wait_for_everyone()
        return metrics

    def run(self) -> bool:
        """Trains, validates, exports and writes result.json; False when stopped before the end."""
        try:
            if self.position.step:
                self.reporter.note(f"resuming at step {self.position.step} ({self.position.seconds / 60:.1f} min)")
            complete = self.train()
        finally:
            self.reporter.close()
        if complete:
            metrics = self.validate()
            if self.is_main:
                self.task.model.eval()
                self.task.export(self.recipe.output)
                self._write_result(metrics)
                minutes = self.position.seconds / 60
                self.reporter.note(f"{self.recipe.output}: {self.position.step} steps in {minutes:.1f} minutes")
                self.reporter.table("validation", metrics)
        return complete

    def _write_result(self, metrics: dict[str, float]) -> None:
        result = {
            "task": self.recipe.task,
            "validation": metrics,
            "validations": self.validations,
            "steps": self.position.step,
            "epochs": self.position.epoch,
            "training_minutes": round(self.position.seconds / 60, 2),
            "seed": self.recipe.seed,
            "config": {**to_dict(self.recipe), "options": self.options},
            "trainable_parameters": sum(parameter.numel() for parameter in self.parameters),
            "commit": git_commit(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(str(self.accelerator.device), self.accelerator.num_processes),
        }
        write_json(self.recipe.output / "result.json", result)


def _one_line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def train(path: Path, overrides: Sequence[str] = ()) -> bool:
    """Runs the recipe in `path`; False when a signal stopped it before the end.

    Raises:
        VocalNetError: the recipe, the data or a checkpoint cannot be used.
    """
    recipe, options = load_recipe(path, overrides)
    return Engine(recipe, options).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for an error the user can act on, 130 when interrupted."""
    example = "example: vocalnet train recipes/speak.yaml data=data output=runs/speak trainer.max_minutes=30"
    parser = argparse.ArgumentParser(
        description="Trains one stage from a recipe; resumes where it stopped.", epilog=example
    )
    parser.add_argument("recipe", type=Path, help="a YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as seed=1")
    parsed = parser.parse_args(arguments)
    try:
        complete = train(parsed.recipe, parsed.overrides)
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        complete = False
    if not complete:
        command = " ".join(["vocalnet train", str(parsed.recipe), *parsed.overrides])
        print(f"stopped; run the same command to resume from the last checkpoint: {command}", file=sys.stderr)
        return 130
    return 0
