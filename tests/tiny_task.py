"""A task that trains in milliseconds, for the engine's tests: fit a random linear map, with dropout for randomness."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class TinyTaskConfig:
    learning_rate: float = 0.01
    batches: int = 7
    sleep_seconds: float = 0.0
    infinite_from: int = 10**9  # loss is infinite from this step on


class TinyTask:
    def __init__(self, config: TinyTaskConfig, data_dir: Path, seed: int):
        self.config, self.seed = config, seed
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))
        self.model[0].bias.requires_grad_(False)
        self.target = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

    def parameter_groups(self) -> list[dict]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.config.learning_rate}]

    def batches(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        for _ in range(self.config.batches):
            yield {"x": torch.randn(16, 8, generator=generator)}

    def loss(self, batch, step):
        time.sleep(self.config.sleep_seconds)
        error = (self.model(batch["x"]) - batch["x"] @ self.target).square().mean()
        if step >= self.config.infinite_from:
            error = error * float("inf")
        return error, {"samples": 16, "error": error.detach()}

    def validate(self) -> dict[str, float]:
        x = torch.randn(64, 8)  # from the global generator on purpose: the engine must keep training's state apart
        return {"error": float((self.model(x) - x @ self.target).square().mean())}

    def export(self, folder: Path) -> None:
        save_file(self.model.state_dict(), folder / "model.safetensors")
