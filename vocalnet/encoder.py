"""SpeechEncoder: Whisper's encoder (Radford et al. 2022) on audio of its own length, not padded to 30 s.

mel (B, 80, T) at 100 Hz → frames (B, T // 2, 512) at 50 Hz.
Parameter names follow Hugging Face's `model.encoder`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from vocalnet.audio import WHISPER_HOP, question_features
from vocalnet.errors import AudioError, CheckpointError
from vocalnet.linears import Precision, replace_linears
from vocalnet.native import NativeLinear, available
from vocalnet.native.linear import fits


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of Whisper's encoder; the defaults are whisper-base."""

    mel_bins: int = 80
    width: int = 512
    layers: int = 6
    heads: int = 8
    ffn: int = 2048
    max_frames: int = 1500  # 30 s at 50 Hz
    full_window: bool = False  # questions are padded to 30 s and keep their level, as in the released VocalNet models


class EncoderAttention(nn.Module):
    """Bidirectional self-attention; Whisper's keys have no bias."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) → (B, T, D)
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) → (B, T, D)
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class SpeechEncoder(nn.Module):
    """Whisper's encoder; frozen in every training stage."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mel_bins, config.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_frames, config.width)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, bins, T) log-mel, T ≤ 3000 and even → (B, T // 2, width).

        Raises:
            AudioError: T is over 3000 frames (30 s).
        """
        if mel.shape[-1] > 2 * self.config.max_frames:
            raise AudioError(f"{mel.shape[-1]} mel frames; at most {2 * self.config.max_frames} fit (30 s); split it")
        x = F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T // 2, D)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)

    def prepare_inference(self, precision: Precision) -> None:
        """Beside an int8 LLM, turns the layers' products to bf16 between float32 activations, where kernels run.

        Frames then differ by about 1 % (relative norm). There is no way back.
        """
        weight, fitting = self.layer_norm.weight, fits(self.config.width) and fits(self.config.ffn)
        if precision == "int8" and weight.is_cpu and weight.dtype == torch.float32 and fitting and available():
            replace_linears(self.layers, lambda linear: NativeLinear(linear.weight, linear.bias, "bf16"))

    def question_frames(self, features: Tensor, samples: int) -> Tensor:
        """Features (bins, T) of a question → (1, frames, width).

        With `full_window`, only the frames of the question's `samples` (at 16 kHz), not of the padding after it.
        """
        frames = self(features[None])
        if not self.config.full_window:
            return frames
        mel_frames = round(samples / WHISPER_HOP + 0.5)  # the original's count
        return frames[:, : (mel_frames + 1) // 2]

    @torch.inference_mode()
    def encode_question(self, wave: Tensor) -> Tensor:
        """(N,) samples at 16 kHz → (T, width) at 50 Hz, with the silence that follows every question."""
        return self(question_features(wave, self.config.mel_bins)[None])[0]

    @classmethod
    def from_whisper(cls, folder: Path, dtype: torch.dtype = torch.float32) -> SpeechEncoder:
        """Loads the encoder of a Whisper folder (config.json, model.safetensors).

        Raises:
            CheckpointError: a file is missing, or the weights do not fit the configuration.
        """
        config_file, weights_file = folder / "config.json", folder / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise CheckpointError(f"{folder} has no {file.name}; give a Whisper folder with both files")
        encoder = cls(_config_of(json.loads(config_file.read_text()), config_file)).to(dtype)
        prefix = "model.encoder."
        with safe_open(weights_file, "pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118
            state = {name.removeprefix(prefix): weights.get_tensor(name) for name in names}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{weights_file} does not fit its config.json: {error}".replace("\n", " ")) from error
        return encoder.eval().requires_grad_(False)


def _config_of(whisper: dict[str, Any], file: Path) -> EncoderConfig:
    """Translates Hugging Face's Whisper configuration."""
    names = {
        "mel_bins": "num_mel_bins",
        "width": "d_model",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "ffn": "encoder_ffn_dim",
        "max_frames": "max_source_positions",
    }
    missing = [theirs for theirs in names.values() if theirs not in whisper]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; give the config.json of a Whisper model")
    return EncoderConfig(**{ours: whisper[theirs] for ours, theirs in names.items()})
