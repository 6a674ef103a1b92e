"""LoRA adapters in peft's folder format, merged into weights as these are loaded (Hu et al., 2021)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vocalnet.errors import CheckpointError

_PREFIX = "base_model.model."


class LoraAdapter:
    """Low-rank updates by weight name: W ← W + s·B·A.

    Folder: `adapter_config.json` (`lora_alpha`, `r`, `use_rslora`) and `adapter_model.safetensors`.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the folder.

        Raises:
            CheckpointError: a file is missing, or the adapter is of a kind that does not merge by B·A.
        """
        folder = Path(folder)
        weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        for path in (weights, settings):
            if not path.is_file():
                raise CheckpointError(
                    f"no {path.name} in {folder}; a LoRA folder is what peft's save_pretrained writes"
                )
        self.folder = folder
        self.config: dict[str, Any] = json.loads(settings.read_text())
        if self.config.get("use_dora") or self.config.get("peft_type", "LORA") != "LORA":
            raise CheckpointError(
                f"{folder} holds a {self.config.get('peft_type')} / DoRA adapter; only LoRA merges here"
            )
        self._factors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(weights).items()}
        strange = [name for name in self._factors if ".lora_A." not in name and ".lora_B." not in name]
        if strange:
            raise CheckpointError(f"{weights} holds {strange[0]}; only lora_A and lora_B weights can be merged")
        self._used: set[str] = set()

    @property
    def targets(self) -> set[str]:
        """Names of the modules that the adapter changes, such as model.layers.0.self_attn.q_proj."""
        return {name.partition(".lora_")[0] for name in self._factors}

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight called `name` (…q_proj.weight, (out, in)) with its update, in its dtype; untouched if it has none.

        Raises:
            CheckpointError: the update's shape is not the weight's.
        """
        module = name.removesuffix(".weight")
        if module not in self.targets:
            return weight
        a, b = (self._factors[f"{module}.lora_{letter}.weight"].float() for letter in "AB")
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(
                f"LoRA for {module} is {b.shape[0]} x {a.shape[1]}, the weight {tuple(weight.shape)}; "
                f"{self.folder} belongs to another model"
            )
        self._used.add(module)
        return (weight.float() + self._scale(module, a.shape[0]) * (b @ a).to(weight.device)).to(weight.dtype)

    def check_all_used(self) -> None:
        """Raises CheckpointError if a module of the adapter was never merged: it belongs to another model."""
        left = sorted(self.targets - self._used)
        if left:
            raise CheckpointError(
                f"the model has no {left[0]}, which {self.folder} adapts; it belongs to another model"
            )

    def _scale(self, module: str, rank: int) -> float:
        """α / r, or α / √r for rank-stabilised LoRA; patterns override per module."""
        alphas: dict[str, float] = self.config.get("alpha_pattern") or {}
        alpha = next((value for key, value in alphas.items() if module.endswith(key)), self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def save_lora(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], alpha: float, base_model: str = "") -> None:
    """Writes {module name: (A (r, in), B (out, r))} as a peft LoRA folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": next(iter(factors.values()))[0].shape[0],
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


__all__ = ["LoraAdapter", "save_lora"]
