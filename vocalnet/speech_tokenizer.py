"""Speech tokenizer: speech → 25 Hz tokens by finite scalar quantisation of Whisper features and mel.

    Whisper features (50 Hz) ┐                                     ┌→ mel (50 Hz)
    24 kHz mel (50 Hz)       ┴→ encoder → FSQ → tokens → decoder ──┼→ phoneme of each frame, F0, Whisper features
                                                                   └  (the last three only shape the tokens)

The encoder sees two tokens to either side, so that a token describes its own 40 ms. The decoder serves training and
copy synthesis; in the finished system the flow takes its place, with the same lookahead.
FSQ: Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made simple"; Whisper features as in CosyVoice's tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.audio import ANSWER_RATE_HZ, MEL_BINS, QUESTION_RATE_HZ, log_mel_whisper, mel_24k
from vocalnet.encoder import SpeechEncoder
from vocalnet.errors import AudioError, ConfigError
from vocalnet.vocoder.convnext import ConvNeXtBlock, Trunk

FRAMES_PER_TOKEN = 2  # 50 Hz features, 25 Hz tokens
TOKEN_SAMPLES = ANSWER_RATE_HZ // 25
LOG_F0_MEAN, LOG_F0_SCALE = 5.3, 0.25  # natural log of Hz


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; `levels` per quantised dimension, their product is the number of tokens."""

    levels: tuple[int, ...] = (8, 8, 8, 5)
    whisper_width: int = 512
    mel_bins: int = MEL_BINS
    phonemes: int = 178
    width: int = 256
    hidden: int = 512
    encoder_blocks: int = 2
    encoder_kernel: int = 3
    token_blocks: int = 3
    frame_blocks: int = 3
    kernel: int = 7
    lookahead: int = 3  # tokens that the decoder waits for

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"levels is {self.levels}; allowed: two or more levels in each dimension")

    @property
    def tokens(self) -> int:
        """Size of the token vocabulary."""
        return math.prod(self.levels)


class FiniteScalarQuantizer(nn.Module):
    """Bounds each dimension by tanh and rounds it to one of its levels; the gradient passes straight through."""

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    @property
    def _half(self) -> Tensor:
        return (self.levels - 1) / 2

    def bound(self, x: Tensor) -> Tensor:
        """(…, D) unbounded → (…, D) in level units, centred on zero: −(L − 1)/2 … (L − 1)/2."""
        return torch.tanh(x.float()) * self._half

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) unbounded → codes (…, D) in −1 … 1, on the levels; straight-through gradient of the bounded value."""
        bounded = self.bound(x)
        rounded = torch.round(bounded + self._half) - self._half  # levels at half-integers when their number is even
        return (bounded + (rounded - bounded).detach()) / self._half

    def to_tokens(self, codes: Tensor) -> Tensor:
        """Codes (…, D) → token ids (…), int64."""
        digits = torch.round((codes + 1) * self._half).long()
        return (digits * self.strides).sum(-1)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """Token ids (…) → codes (…, D) in −1 … 1."""
        digits = tokens[..., None] // self.strides % self.levels
        return digits / self._half - 1


class LocalStack(nn.Module):
    """Linear, ConvNeXt blocks that see `reach` steps to either side in all, Linear: (B, T, in) → (B, T, out)."""

    def __init__(self, channels_in: int, width: int, hidden: int, blocks: int, kernel: int, channels_out: int) -> None:
        super().__init__()
        self.input = nn.Linear(channels_in, width)
        self.depthwise = nn.ModuleList(
            [nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width) for _ in range(blocks)]
        )
        self.mix = nn.ModuleList(
            [
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
                for _ in range(blocks)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, channels_out)
        self.reach = blocks * (kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) → (B, T, out)."""
        x = self.input(x)
        for depthwise, mix in zip(self.depthwise, self.mix, strict=True):
            x = x + mix(depthwise(x.transpose(1, 2)).transpose(1, 2))
        return self.output(self.norm(x))


class TokenDecoder(nn.Module):
    """Codes (B, T, D) → normalised mel (B, 2 T, 80): causal ConvNeXt with `lookahead` tokens of future."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        c = config
        self.embed = nn.Sequential(nn.Linear(len(c.levels), c.width), nn.GELU())
        self.trunk = Trunk(c.width, c.width, c.token_blocks, c.hidden, c.kernel, c.lookahead)
        self.upsample = nn.Linear(c.width, FRAMES_PER_TOKEN * c.width)
        self.blocks = nn.ModuleList([ConvNeXtBlock(c.width, c.hidden, c.kernel) for _ in range(c.frame_blocks)])
        self.norm = nn.LayerNorm(c.width)
        self.output = nn.Linear(c.width, c.mel_bins)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, T, D) → (B, 2 T, 80)."""
        x = self.upsample(self.trunk(self.embed(codes)))
        x = x.unflatten(2, (FRAMES_PER_TOKEN, -1)).flatten(1, 2)  # (B, 2 T, width)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


@dataclass
class TokenizerOutput:
    """What training compares; T tokens, 2 T frames."""

    codes: Tensor  # (B, T, D) quantised, −1 … 1
    bounded: Tensor  # (B, T, D) before rounding, −1 … 1
    mel: Tensor  # (B, 2 T, 80) normalised
    phonemes: Tensor  # (B, 2 T, phonemes) logits
    pitch: Tensor  # (B, 2 T, 2): normalised log F0, voicing logit
    whisper: Tensor  # (B, T, 512) normalised, mean of the token's two frames


class SpeechTokenizer(nn.Module):
    """Encoder, quantiser and train-time decoder; the statistics that normalise the features are buffers."""

    whisper_mean: Tensor
    whisper_std: Tensor
    mel_mean: Tensor
    mel_std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = c = config
        dimensions = len(c.levels)
        channels = c.whisper_width + FRAMES_PER_TOKEN * c.mel_bins
        self.encoder = LocalStack(channels, c.width, c.hidden, c.encoder_blocks, c.encoder_kernel, dimensions)
        self.quantizer = FiniteScalarQuantizer(c.levels)
        self.decoder = TokenDecoder(c)
        small = c.width // 2
        self.phoneme_head = LocalStack(dimensions, small, c.width, 2, 3, FRAMES_PER_TOKEN * c.phonemes)
        self.pitch_head = LocalStack(dimensions, small, c.width, 2, 3, FRAMES_PER_TOKEN * 2)
        self.whisper_head = LocalStack(dimensions, c.width, c.hidden, 2, 3, c.whisper_width)
        for name, size in (("whisper", c.whisper_width), ("mel", c.mel_bins)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise(self, whisper: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2 T, 512) and (B, 2 T, 80) → Whisper features per token (B, T, 512) and mel (B, 2 T, 80)."""
        pairs = whisper.float().unflatten(1, (-1, FRAMES_PER_TOKEN)).mean(2)
        return (pairs - self.whisper_mean) / self.whisper_std, (mel.float() - self.mel_mean) / self.mel_std

    def _encode(self, whisper: Tensor, mel: Tensor) -> Tensor:
        frames = mel.unflatten(1, (-1, FRAMES_PER_TOKEN)).flatten(2)  # (B, T, 160)
        return self.encoder(torch.cat([whisper, frames], dim=2))

    def forward(self, whisper: Tensor, mel: Tensor) -> TokenizerOutput:
        """Normalised features (B, T, 512) and (B, 2 T, 80) → everything the losses need."""
        latent = self._encode(whisper, mel)
        codes = self.quantizer(latent)
        half = (self.quantizer.levels - 1) / 2
        return TokenizerOutput(
            codes=codes,
            bounded=self.quantizer.bound(latent) / half,
            mel=self.decoder(codes),
            phonemes=self.phoneme_head(codes).unflatten(2, (FRAMES_PER_TOKEN, -1)).flatten(1, 2),
            pitch=self.pitch_head(codes).unflatten(2, (FRAMES_PER_TOKEN, -1)).flatten(1, 2),
            whisper=self.whisper_head(codes),
        )

    @torch.inference_mode()
    def encode(self, whisper: Tensor, mel: Tensor) -> Tensor:
        """Features of one utterance → tokens.

        Args:
            whisper: (2 T, 512) Whisper encoder features, 50 Hz.
            mel: (2 T, 80) from `audio.mel_24k`; an odd last frame of either, or excess of one over the other, is cut.

        Returns:
            (T,) int64.

        Raises:
            AudioError: fewer than two frames.
        """
        frames = min(len(whisper), len(mel)) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
        if not frames:
            raise AudioError(f"the speech has {min(len(whisper), len(mel))} frames; a token needs {FRAMES_PER_TOKEN}")
        features = self.normalise(whisper[None, :frames], mel[None, :frames])
        return self.quantizer.to_tokens(self.quantizer(self._encode(*features)))[0]

    @torch.inference_mode()
    def encode_wave(self, wave: Tensor, encoder: SpeechEncoder) -> Tensor:
        """24 kHz speech (N,) → tokens (N // 960,) int64; `encoder` is the frozen Whisper encoder."""
        return self.encode(whisper_features(wave, encoder), mel_24k(wave))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (T,) → log-mel (2 T, 80): copy synthesis with the train-time decoder."""
        codes = self.quantizer.to_codes(tokens)[None].to(self.mel_mean.dtype)
        return self.decoder(codes)[0].float() * self.mel_std + self.mel_mean


def whisper_features(wave: Tensor, encoder: SpeechEncoder) -> Tensor:
    """24 kHz speech (N,), at most 30 s → Whisper encoder features (frames, 512) at 50 Hz, without padding.

    Raises:
        AudioError: longer than Whisper's window.
    """
    resampled = soxr.resample(wave.float().cpu().numpy(), ANSWER_RATE_HZ, QUESTION_RATE_HZ)
    if len(resampled) > 30 * QUESTION_RATE_HZ:
        raise AudioError(f"the speech is {len(resampled) / QUESTION_RATE_HZ:.1f} s long; allowed: up to 30 s")
    step = 2 * QUESTION_RATE_HZ // 100  # one encoder frame
    padded = F.pad(torch.from_numpy(resampled), (0, -len(resampled) % step))
    weight = next(encoder.parameters())
    mel = log_mel_whisper(padded.to(weight.device)).to(weight.dtype)
    return encoder(mel[None])[0].float()
