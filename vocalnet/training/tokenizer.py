"""Trains the speech tokenizer on features of the answers' speech.

Data: `<data>/answer_features/{train,valid}-*.tar` with `{id}.npz`: whisper (2 T, 512), mel (2 T, 80), log_f0 and voiced
(2 T,), phoneme (2 T,): the synthesiser's own alignment, one vocabulary id per frame.

Beside reconstruction, a predictor reads the phonemes alone and the encoder is drawn towards what it predicts: what the
text does not determine (which side of a rounding edge a frame falls on) would be noise to the speech decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.config import to_dict
from vocalnet.parts import load_part, save_part
from vocalnet.shards import read_arrays
from vocalnet.speech_tokenizer import (
    FRAMES_PER_TOKEN,
    LOG_F0_MEAN,
    LOG_F0_SCALE,
    LocalStack,
    SpeechTokenizer,
    TokenizerConfig,
    TokenizerOutput,
)

STRESS_MARKS = (156, 157)  # ˈ ˌ in the synthesiser's vocabulary: their frames belong to the next phoneme
LENGTH_MARK = 158  # ː: its frames belong to the phoneme before


# ------------------------------------------------------------------ data


@dataclass
class Utterance:
    """Features of one sentence; T tokens, 2 T frames."""

    id: str
    whisper: Tensor  # (T, 512) float16, mean of the token's two frames
    mel: Tensor  # (2 T, 80) float16
    pitch: Tensor  # (2 T, 2): normalised log F0, voiced (0 or 1)
    phonemes: Tensor  # (2 T,) int64

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return len(self.whisper)


def merge_marks(phonemes: np.ndarray) -> np.ndarray:
    """Gives frames of stress marks the id of the phoneme after, of length marks that before: (T,) → (T,) int64."""
    merged = phonemes.astype(np.int64).copy()
    for i in range(len(merged) - 2, -1, -1):
        if merged[i] in STRESS_MARKS:
            merged[i] = merged[i + 1]
    for i in range(1, len(merged)):
        if merged[i] == LENGTH_MARK:
            merged[i] = merged[i - 1]
    return merged


def _utterance(name: str, arrays: dict[str, np.ndarray]) -> Utterance:
    frames = len(arrays["mel"]) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
    whisper = arrays["whisper"][:frames].astype(np.float32)
    pitch = np.stack([(arrays["log_f0"] - LOG_F0_MEAN) / LOG_F0_SCALE, arrays["voiced"]], axis=1)
    return Utterance(
        id=name,
        whisper=torch.from_numpy(whisper.reshape(-1, FRAMES_PER_TOKEN, whisper.shape[1]).mean(1)).half(),
        mel=torch.from_numpy(arrays["mel"][:frames].astype(np.float16)),
        pitch=torch.from_numpy(pitch[:frames].astype(np.float32)),
        phonemes=torch.from_numpy(merge_marks(arrays["phoneme"][:frames])),
    )


def read_utterances(folder: Path, split: str) -> list[Utterance]:
    """All utterances of a split, in the shards' order.

    Raises:
        DataError: no shard of that split.
    """
    shards = read_arrays(folder, f"{split}-*.tar", "npz", "answer_features")
    return [_utterance(name, dict(arrays)) for name, arrays in shards]


def feature_statistics(utterances: list[Utterance]) -> dict[str, Tensor]:
    """Mean and standard deviation per channel of Whisper features and mel, by the tokenizer's buffer names."""
    statistics = {}
    for name in ("whisper", "mel"):
        total, square, count = torch.zeros(1), torch.zeros(1), 0
        for utterance in utterances:
            x = getattr(utterance, name).float()
            total, square, count = total + x.sum(0), square + x.square().sum(0), count + len(x)
        mean = total / count
        statistics[f"{name}_mean"] = mean
        statistics[f"{name}_std"] = (square / count - mean.square()).clamp(min=0).sqrt() + 1e-3
    return statistics


Batch = dict[str, Tensor]
"""Zero-padded crops: whisper (B, T, 512) and mel (B, 2 T, 80) as stored, pitch (B, 2 T, 2), phonemes (B, 2 T) with −100
in the padding, lengths (B,) in tokens."""


def pad_batch(crops: list[tuple[Utterance, int, int]]) -> Batch:
    """Crops (utterance, first token, tokens) → one padded batch."""
    longest = max(tokens for _, _, tokens in crops)

    def stack(name: str, per_token: int, fill: float) -> Tensor:
        rows = []
        for utterance, first, tokens in crops:
            x = getattr(utterance, name)[first * per_token : (first + tokens) * per_token]
            x = x if x.dtype == torch.int64 else x.float()
            rows.append(F.pad(x, (0, 0) * (x.dim() - 1) + (0, (longest - tokens) * per_token), value=fill))
        return torch.stack(rows)

    return {
        "whisper": stack("whisper", 1, 0.0),
        "mel": stack("mel", FRAMES_PER_TOKEN, 0.0),
        "pitch": stack("pitch", FRAMES_PER_TOKEN, 0.0),
        "phonemes": stack("phonemes", FRAMES_PER_TOKEN, -100),
        "lengths": torch.tensor([tokens for _, _, tokens in crops]),
    }


# ------------------------------------------------------------------ task


class PhonemePredictor(nn.Module):
    """Phonemes of the frames (B, 2 T) → the codes they suggest (B, T, D), in −1 … 1; used in training alone."""

    def __init__(self, config: TokenizerConfig, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.phonemes, 32)
        self.stack = LocalStack(FRAMES_PER_TOKEN * 32, width, 2 * width, 3, 7, len(config.levels))

    def forward(self, phonemes: Tensor) -> Tensor:
        """(B, 2 T) → (B, T, D)."""
        frames = self.embedding(phonemes.clamp(min=0)).unflatten(1, (-1, FRAMES_PER_TOKEN)).flatten(2)
        return torch.tanh(self.stack(frames))


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses beside the mel's L1."""

    phonemes: float = 0.3
    whisper: float = 0.25
    pitch: float = 0.3
    predictable: float = 0.1
    commitment: float = 0.05


@dataclass(frozen=True)
class TokenizerTaskConfig:
    """The tokenizer's training; `start` is a folder of weights to go on from."""

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    start: Path | None = None
    settle_steps: int = 0  # at first the predictor follows the encoder alone: for a `start`, whose predictor is new
    lr: float = 2e-3
    batch: int = 8
    crop_tokens: int = 120


class TokenizerTask:
    """See the module's docstring; implements `vocalnet.training.task.Task`."""

    def __init__(self, config: TokenizerTaskConfig, data_dir: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.seed = config, seed
        tokenizer = SpeechTokenizer(config.model)
        self.train = read_utterances(data_dir / "answer_features", "train")
        self.valid = read_utterances(data_dir / "answer_features", "valid")
        if config.start is not None:
            tokenizer.load_state_dict(load_part(SpeechTokenizer, TokenizerConfig, config.start).state_dict())
        else:
            tokenizer.load_state_dict(feature_statistics(self.train), strict=False)
        self.model = nn.ModuleDict({"tokenizer": tokenizer, "predictor": PhonemePredictor(config.model)})

    @property
    def tokenizer(self) -> SpeechTokenizer:
        """The model that `export` writes."""
        return self.model["tokenizer"]  # type: ignore[return-value]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": list(self.model.parameters()), "lr": self.config.lr, "betas": (0.9, 0.98)}]

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Utterances of similar length together; those over `crop_tokens` are cropped at random."""
        rng = np.random.default_rng([self.seed, epoch])
        limit, size = self.config.crop_tokens, self.config.batch
        noisy = np.array([min(u.tokens, limit) for u in self.train]) + rng.uniform(0, 8, len(self.train))
        order = np.argsort(noisy)
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        for group in rng.permutation(len(groups)):
            crops = []
            for index in groups[group]:
                utterance = self.train[index]
                tokens = min(utterance.tokens, limit)
                crops.append((utterance, int(rng.integers(0, utterance.tokens - tokens + 1)), tokens))
            yield pad_batch(crops)

    def _forward(self, batch: Batch) -> tuple[TokenizerOutput, Tensor, Tensor, Tensor]:
        """Outputs, normalised Whisper features and mel, and the mask of tokens (B, T, 1)."""
        whisper = (batch["whisper"] - self.tokenizer.whisper_mean) / self.tokenizer.whisper_std
        mel = (batch["mel"] - self.tokenizer.mel_mean) / self.tokenizer.mel_std
        steps = torch.arange(whisper.shape[1], device=whisper.device)
        mask = (steps[None] < batch["lengths"][:, None]).float()[..., None]
        frame_mask = mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        whisper, mel = whisper * mask, mel * frame_mask  # zeros outside, as the convolutions pad
        return self.tokenizer(whisper, mel), whisper, mel, mask

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Mel L1 plus the weighted others; metrics carry each part."""
        output, whisper, mel, mask = self._forward(batch)
        frame_mask = mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        suggested = self.model["predictor"](batch["phonemes"]).float()
        drawn = output.bounded.detach() if step < self.config.settle_steps else output.bounded
        parts = {
            "mel": masked_mean((output.mel.float() - mel).abs(), frame_mask),
            "phonemes": F.cross_entropy(output.phonemes.float().transpose(1, 2), batch["phonemes"]),
            "whisper": masked_mean((output.whisper.float() - whisper).square(), mask),
            "pitch": pitch_loss(output.pitch.float(), batch["pitch"], frame_mask[..., 0]),
            "predictable": masked_mean((drawn - suggested).square(), mask),
            "commitment": masked_mean((output.bounded - output.codes.detach()).square(), mask),
        }
        weights = to_dict(self.config.weights)
        total = parts["mel"] + sum(weight * parts[name] for name, weight in weights.items())
        metrics: dict[str, float | Tensor] = {name: value.detach() for name, value in parts.items()}
        return total, metrics | {"samples": float(len(mask))}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Reconstruction of the held-out utterances, and how many codes they use."""
        mel_l1, hits, frames, semitones, tokens = 0.0, 0.0, 0, [], []
        device = self.tokenizer.mel_mean.device
        for utterance in self.valid:
            batch = {name: x.to(device) for name, x in pad_batch([(utterance, 0, utterance.tokens)]).items()}
            output, _, mel, _ = self._forward(batch)
            mel_l1 += (output.mel - mel).abs().mean().item() / len(self.valid)
            hits += (output.phonemes.argmax(-1) == batch["phonemes"]).sum().item()
            frames += batch["phonemes"].numel()
            voiced = batch["pitch"][..., 1] > 0
            error = (output.pitch[..., 0] - batch["pitch"][..., 0])[voiced].abs() * LOG_F0_SCALE * 12 / math.log(2)
            semitones.append(error.mean().item())
            tokens.append(self.tokenizer.quantizer.to_tokens(output.codes).flatten())
        counts = torch.bincount(torch.cat(tokens), minlength=self.config.model.tokens).float()
        share = counts[counts > 0] / counts.sum()
        return {
            "mel_l1": mel_l1,
            "phoneme_accuracy": hits / frames,
            "f0_semitones": float(np.mean(semitones)),
            "codes_used": float(len(share)),
            "code_entropy_bits": float(-(share * share.log2()).sum()),
        }

    def export(self, folder: Path) -> None:
        """Writes the tokenizer's model.safetensors and config.json."""
        save_part(self.tokenizer, self.config.model, folder)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, C) over the positions where mask (B, T, 1) is 1."""
    return (error * mask).sum() / (mask.sum() * error.shape[-1]).clamp(min=1)


def pitch_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 of log F0 on voiced frames + cross entropy of voicing: (B, T, 2), (B, T, 2), (B, T)."""
    voiced = target[..., 1] * mask
    pitch = (voiced * (predicted[..., 0] - target[..., 0]).abs()).sum() / voiced.sum().clamp(min=1)
    flips = F.binary_cross_entropy_with_logits(predicted[..., 1], target[..., 1], reduction="none")
    return pitch + (flips * mask).sum() / mask.sum().clamp(min=1)
