"""`vocalnet info`: what a model folder holds and what this machine offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vocalnet.bench import machine
from vocalnet.devices import has_loudspeaker, has_microphone
from vocalnet.model import model_folder
from vocalnet.parts import CONFIG_FILE, read_json


def parameter_count(file: Path) -> int:
    """Number of values in a safetensors file, read from its header alone."""
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        shapes = [weights.get_slice(name).get_shape() for name in names]
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def describe(source: str) -> str:
    """A readable summary.

    Raises:
        CheckpointError: no such model, or a broken folder.
    """
    folder = model_folder(source)
    config = read_json(folder / CONFIG_FILE)
    lines = [f"model      {config.get('name', folder.name)}", f"llm        {config.get('llm')}"]
    lines.append(f"encoder    {config.get('encoder')}")
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in part.glob("*.safetensors"):
            size = f"{file.stat().st_size / 1e6:6.1f} MB"
            lines.append(f"{part.name:<16} {parameter_count(file) / 1e6:6.2f} M parameters {size}")
    card: dict[str, Any] = read_json(folder / "card.json") if (folder / "card.json").is_file() else {}
    for key in ("data", "seed", "commit", "scores"):
        if key in card:
            lines.append(f"{key:<10} {json.dumps(card[key])}")
    here = machine()
    sound = f"microphone {'yes' if has_microphone() else 'no'}, loudspeaker {'yes' if has_loudspeaker() else 'no'}"
    kernels = "kernels in C" if here["kernels"] else "no kernels in C (they need AVX-512 VNNI and a C compiler)"
    lines.append(f"machine    {here['cpu']}, {here['cores']} cores, {kernels}, GPU {here['gpu'] or 'none'}, {sound}")
    return "\n".join(lines)
