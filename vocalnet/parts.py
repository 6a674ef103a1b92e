"""One part of a model on disk: a folder with `config.json` (a dataclass) and `model.safetensors` (a state dict)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from vocalnet.checkpoints.tensors import FolderWeights, empty, fit
from vocalnet.config import from_dict, to_dict
from vocalnet.errors import CheckpointError
from vocalnet.files import replacing, write_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

M = TypeVar("M", bound=nn.Module)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    if not file.is_file():
        raise CheckpointError(f"no {file.name} in {file.parent}; give a model folder, or make one with `vocalnet pack`")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}; expected a JSON object")
    return content


def save_part(module: nn.Module, config: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes config and weights, each atomically; floating weights as `dtype` where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous().cpu()
        for name, value in module.state_dict().items()
    }
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(state, temporary)
    write_json(folder / CONFIG_FILE, to_dict(config))


def load_part(
    module_class: type[M], config_class: type[Any], folder: Path, dtype: torch.dtype | None = torch.float32
) -> M:
    """The module of a part folder, in evaluation mode, frozen; floating weights as `dtype`, None: as the file has them.

    Raises:
        CheckpointError: a file is missing or broken, or the weights do not fit the configuration (all names are told).
        ConfigError: the configuration has an unknown or missing key.
    """
    config = from_dict(config_class, read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"no {WEIGHTS_FILE} in {folder}; the model folder is incomplete")
    module = empty(lambda: module_class(config))
    return fit(module, FolderWeights(folder), f"{file} does not fit its {CONFIG_FILE}", dtype=dtype)
