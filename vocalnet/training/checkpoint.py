"""Checkpoints for resuming: trainable weights, optimiser, random generators and position, one atomic file each."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vocalnet.errors import CheckpointError
from vocalnet.files import replacing

KEPT = 2
"""Checkpoints kept on disk: the newest, and one before it in case the disk loses the newest."""


@dataclass
class Position:
    """Where training stands, always between two optimiser steps."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch_index: int = 0  # batches of this epoch already used
    seconds: float = 0.0  # time spent in training steps, over all runs


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, as types that `torch.load` accepts as data."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.array(keys, np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated_random(seed: int) -> Iterator[None]:
    """Runs a block with freshly seeded generators and restores them afterwards, so that the block leaves no trace."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train and the persistent buffers, by name (frozen weights come from their own files)."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def load_trainable_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `trainable_state`.

    Raises:
        CheckpointError: the model trains other parameters, or with other shapes, than the checkpoint holds.
    """
    expected = trainable_state(model)
    different = sorted(
        (set(expected) ^ set(state))
        | {name for name in set(expected) & set(state) if expected[name].shape != state[name].shape}
    )
    if different:
        raise CheckpointError(
            f"the checkpoint and the model differ in {len(different)} tensors, first '{different[0]}'; "
            "the code or the data changed since: train into another output folder"
        )
    model.load_state_dict(state, strict=False)


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, content: dict[str, Any]) -> Path:
    """Writes `content` as the checkpoint of `step` (temporary name, flush to disk, rename), drops all but the last two.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full.
    """
    path = folder / f"step-{step:09d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise CheckpointError(f"cannot write {path}: {error}; make room, then run again to resume") from error
    for old in checkpoint_files(folder)[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint as data only, onto the CPU.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); delete it to use the one before") from error
    assert isinstance(content, dict)
    return content
