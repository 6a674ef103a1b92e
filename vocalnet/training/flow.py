"""Training of the flow: speech tokens → mel frames, and the mels it predicts for the vocoder's fine-tuning.

python recipes/train.py recipes/flow.yaml
python -m vocalnet.training.flow runs/flow data        # writes data/predicted_mels/
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from vocalnet.errors import ConfigError, DataError
from vocalnet.files import replacing
from vocalnet.parts import load_part
from vocalnet.shards import read_arrays
from vocalnet.speech_tokenizer import SpeechTokenizer, TokenizerConfig
from vocalnet.vocoder.flow import Flow, FlowConfig


@dataclass(frozen=True)
class FlowTaskConfig:
    """Options of the flow's training."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    batch_tokens: int = 1000  # padding included
    max_utterance_tokens: int = 125  # longer utterances give random crops of this length
    streaming_share: float = 1.0  # share of batches under the chunked masks; the rest sees whole utterances
    corrupt_share: float = 0.04  # tokens replaced by random ones, so that the decoder's mistakes are not new
    validation_utterances: int = 32
    encoder_lr: float | None = None  # of the token encoder; None: as lr
    train: Literal["all", "encoder"] = "all"  # encoder: its own L1 alone, in less than half the time
    initial: Path | None = None  # folder of a trained flow to start from; with `tokenizer`, its estimator alone
    tokenizer: Path | None = None  # folder of the speech tokenizer: a convnext encoder starts from its decoder

    def __post_init__(self) -> None:
        if self.train == "encoder" and self.initial is None:
            raise ConfigError("train is 'encoder' but initial is not set: give the folder of a trained flow")


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence."""

    id: str
    tokens: Tensor  # (T,) int64
    mel: Tensor  # (frames per token · T, bins) float16


def load_tokens(data: Path, split: str) -> dict[str, Tensor]:
    """Speech tokens (T,) of every sentence of a split, from `answer_tokens`."""
    shards = read_arrays(data / "answer_tokens", f"{split}-*.tar", "npy")
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in shards}


def load_utterances(data: Path, split: str, frames_per_token: int) -> list[Utterance]:
    """Every sentence of a split that has tokens and mel, both cut to the shorter of the two.

    Raises:
        DataError: archives are missing, or no sentence has both.
    """
    tokens = load_tokens(data, split)
    utterances = []
    for name, arrays in read_arrays(data / "answer_features", f"{split}-*.tar", "npz"):
        if name not in tokens:
            continue
        mel = torch.from_numpy(arrays["mel"].astype(np.float16))
        rows = min(len(tokens[name]), len(mel) // frames_per_token)
        if rows:
            utterances.append(Utterance(name, tokens[name][:rows], mel[: rows * frames_per_token]))
    if not utterances:
        raise DataError(f"no {split} sentence in {data} has both answer_tokens and answer_features; prepare both anew")
    return utterances


def _collate(utterances: list[Utterance]) -> dict[str, Tensor]:
    """Padded `tokens` (B, T), `mel` (B, frames per token · T, bins) float32, and `lengths` (B,) in tokens."""
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "tokens": padded([utterance.tokens for utterance in utterances], batch_first=True),
        "mel": padded([utterance.mel.float() for utterance in utterances], batch_first=True),
        "lengths": torch.tensor([len(utterance.tokens) for utterance in utterances]),
    }


def start_from_tokenizer(flow: Flow, folder: Path) -> None:
    """Copies the train-time decoder of a speech tokenizer, and its mel statistics, into the flow's encoder.

    Raises:
        ConfigError: the flow's encoder has another structure.
    """
    tokenizer = load_part(SpeechTokenizer, TokenizerConfig, folder)
    places = {"embed": "input_embedding", "output": "encoder_proj"}
    state = {"mel_mean": tokenizer.mel_mean, "mel_std": tokenizer.mel_std}
    for name, tensor in tokenizer.decoder.state_dict().items():
        part, _, rest = name.partition(".")
        state[f"{places.get(part, f'encoder.{part}')}.{rest}"] = tensor
    own = flow.state_dict()
    wrong = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"the decoder in {folder} does not fit options.flow ({', '.join(wrong[:3])}, …); it needs normalise_mel, "
            f"token_levels {list(tokenizer.config.levels)} and an encoder of kind convnext with the tokenizer's sizes"
        )
    flow.load_state_dict(state, strict=False)


class FlowTask:
    """Flow matching on sentences of one voice, tokens and mels read from the prepared data into memory."""

    def __init__(self, config: FlowTaskConfig, data_dir: Path, seed: int) -> None:
        ratio = config.flow.frames_per_token
        self.config, self.seed = config, seed
        self.train = load_utterances(data_dir, "train", ratio)
        self.valid = load_utterances(data_dir, "valid", ratio)[: config.validation_utterances]
        largest = max(int(utterance.tokens.max()) for utterance in [*self.train, *self.valid])
        if largest >= config.flow.tokens:
            raise ConfigError(f"the data hold token {largest}, but options.flow.tokens is {config.flow.tokens}")
        torch.manual_seed(seed)
        self.model = (
            Flow(config.flow) if config.initial is None else Flow.from_folder(config.initial).requires_grad_(True)
        )
        if self.model.config != config.flow:
            raise ConfigError(f"the flow in {config.initial} and options.flow differ in configuration; make them equal")
        if config.tokenizer is not None:
            start_from_tokenizer(self.model, config.tokenizer)
        elif config.flow.normalise_mel and config.initial is None:
            frames = torch.cat([utterance.mel for utterance in self.train[:2000]]).float()
            self.model.mel_mean.copy_(frames.mean(dim=0))
            self.model.mel_std.copy_(frames.std(dim=0).clamp(min=1e-3))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Token encoder and estimator, each with its decayed matrices and its undecayed rest."""
        config = self.config
        encoder_lr = config.lr if config.encoder_lr is None else config.encoder_lr
        groups = []
        parts = [("encoder", encoder_lr), ("estimator", config.lr)][: 1 if config.train == "encoder" else 2]
        for part, lr in parts:
            for kind, decay in (("matrices", config.weight_decay), ("rest", 0.0)):
                parameters = [
                    parameter
                    for name, parameter in self.model.named_parameters()
                    if name.startswith(("encoder", "input_embedding")) == (part == "encoder")
                    and (parameter.ndim >= 2 and not name.startswith("input_embedding")) == (kind == "matrices")
                ]
                group = {"params": parameters, "lr": lr, "betas": config.betas, "weight_decay": decay}
                groups.append({**group, "name": f"{part} {kind}"})
        return [group for group in groups if group["params"]]

    def _crop(self, utterance: Utterance, generator: torch.Generator) -> Utterance:
        """At most `max_utterance_tokens` tokens, from a random place."""
        spare = len(utterance.tokens) - self.config.max_utterance_tokens
        if spare <= 0:
            return utterance
        first = int(torch.randint(spare + 1, (), generator=generator))
        last, ratio = first + self.config.max_utterance_tokens, self.config.flow.frames_per_token
        return Utterance(utterance.id, utterance.tokens[first:last], utterance.mel[first * ratio : last * ratio])

    def _corrupt(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        replaced = torch.rand(tokens.shape, generator=generator) < self.config.corrupt_share
        random = torch.randint(self.config.flow.tokens, tokens.shape, generator=generator)
        return torch.where(replaced, random, tokens)

    def batches(self, epoch: int) -> Iterable[dict[str, Tensor]]:
        """Batches of sentences of similar length, at most `batch_tokens` tokens each, in random order."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        chosen = [self._crop(utterance, generator) for utterance in self.train]
        jitter = torch.rand(len(chosen), generator=generator) * 5  # so that the groups differ from epoch to epoch
        order = sorted(range(len(chosen)), key=lambda i: len(chosen[i].tokens) + float(jitter[i]))
        groups: list[list[int]] = [[]]
        for index in order:
            longest = max(len(chosen[i].tokens) for i in [*groups[-1], index])
            if groups[-1] and longest * (len(groups[-1]) + 1) > self.config.batch_tokens:
                groups.append([])
            groups[-1].append(index)
        for group in torch.randperm(len(groups), generator=generator).tolist():
            batch = _collate([chosen[index] for index in groups[group]])
            batch["tokens"] = self._corrupt(batch["tokens"], generator)
            yield batch

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Flow matching loss (not for an encoder alone) plus the weighted prior; metrics `flow` and `prior`."""
        streaming = bool(torch.rand(()) < self.config.streaming_share)
        loss_of = self.model.prior_loss if self.config.train == "encoder" else self.model.cfm_loss
        loss, metrics = loss_of(batch["tokens"], batch["mel"], batch["lengths"], streaming=streaming)
        return loss, dict(metrics)

    def validate(self) -> dict[str, float]:
        """L1 of natural-log mels (sampled frames, and the encoder's estimate) under chunked masks, and the losses."""
        sums = torch.zeros(5)
        device, ratio = self.model.encoder_proj.weight.device, self.config.flow.frames_per_token
        for first in range(0, len(self.valid), 8):
            batch = {key: value.to(device) for key, value in _collate(self.valid[first : first + 8]).items()}
            tokens, mel, lengths = batch["tokens"], batch["mel"], batch["lengths"]
            frames = torch.arange(mel.shape[1], device=device)[None] < lengths[:, None] * ratio
            _, losses = self.model.cfm_loss(tokens, mel, lengths)
            both = self.model.mel(tokens, lengths=lengths), self.model.estimate(tokens, lengths)
            for place, predicted in enumerate(both):
                sums[place] += (predicted.float() - mel).abs().mean(dim=-1)[frames].sum().cpu()
            count = frames.sum().cpu()
            sums[2:] += torch.stack([losses["flow"].cpu() * count, losses["prior"].cpu() * count, count])
        values = (sums[:4] / sums[4]).tolist()
        return dict(zip(("mel_l1", "estimate_l1", "flow", "prior"), values, strict=True))

    def export(self, folder: Path) -> None:
        """Writes model.safetensors and config.json."""
        self.model.save(folder)


@torch.no_grad()
def write_predicted_mels(
    flow: Flow, data: Path, split: str = "train", names: Collection[str] | None = None, batch_tokens: int = 1000
) -> Path:
    """Writes `predicted_mels/{split}-00000.tar` under `data`: `{id}.npy` (frames, bins) float16 for every sentence.

    `names` restricts it to those ids.
    The frames are those that a stream would give. The file appears under its name only when it is complete.
    """
    tokens = {
        name: row for name, row in load_tokens(data, split).items() if len(row) and (names is None or name in names)
    }
    folder = data / "predicted_mels"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{split}-00000.tar"
    groups: list[list[str]] = [[]]
    for name in sorted(tokens, key=lambda name: len(tokens[name])):
        if groups[-1] and len(tokens[name]) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(name)
    device = flow.encoder_proj.weight.device
    with replacing(target) as temporary, tarfile.open(temporary, "w") as tar:
        for group in track([group for group in groups if group], description=f"predicted mels, {split}"):
            rows = [tokens[name] for name in group]
            lengths = torch.tensor([len(row) for row in rows], device=device)
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            mels = flow.mel(padded, lengths=lengths).cpu()
            for name, row, mel in zip(group, rows, mels, strict=True):
                content = io.BytesIO()
                np.save(content, mel[: len(row) * flow.config.frames_per_token].numpy().astype(np.float16))
                member = tarfile.TarInfo(f"{name}.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    return target


def main() -> None:
    """Command line of `write_predicted_mels`."""
    parser = argparse.ArgumentParser(description="Write the mels that a trained flow predicts from the data's tokens.")
    parser.add_argument("flow", type=Path, help="folder with model.safetensors and config.json")
    parser.add_argument("data", type=Path, help="data folder with answer_tokens")
    parser.add_argument("--splits", nargs="+", default=["train", "valid"])
    parser.add_argument("--vocoder-targets", action="store_true", help="only sentences in the data's vocoder_targets")
    arguments = parser.parse_args()
    flow = Flow.from_folder(arguments.flow)
    names = None
    if arguments.vocoder_targets:
        index = json.loads((arguments.data / "vocoder_targets" / "index.json").read_text())
        names = {sentence["id"] for sentence in index["sentences"]}
    for split in arguments.splits:
        print(write_predicted_mels(flow, arguments.data, split, names))


if __name__ == "__main__":
    main()
