"""HiFT, CosyVoice2's vocoder: mel frames → waveform through a harmonic source and an inverse STFT (arXiv:2309.09493).

Parameter names and arithmetic are upstream's. Its convolutions look both ways, so in a stream every layer holds back
what its right context does not cover yet; whole utterances run through the same code in one piece. Streams therefore
equal the offline waveform, at the price of twenty frames of latency; nothing is computed twice and nothing is faded.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from vocalnet.errors import VocalNetError
from vocalnet.parts import load_part, save_part

_NOISE_BLOCK_FRAMES = 16


@dataclass(frozen=True)
class HiFTConfig:
    """Sizes of HiFT; the defaults are CosyVoice2-0.5B's."""

    mel_bins: int = 80
    width: int = 512
    harmonics: int = 8  # above the fundamental
    rate_hz: int = 24000
    source_amplitude: float = 0.1
    source_noise: float = 0.003
    voiced_threshold_hz: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernels: tuple[int, ...] = (16, 11, 7)
    fft: int = 16
    fft_hop: int = 4
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    source_kernels: tuple[int, ...] = (7, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    slope: float = 0.1
    audio_limit: float = 0.99
    f0_width: int = 512
    noise_seed: int = 0

    @property
    def hop(self) -> int:
        """Samples of a mel frame."""
        return math.prod(self.upsample_rates) * self.fft_hop


@dataclass
class Fifo:
    """Samples (B, C, ·) of a signal that arrived and are still needed; None before the signal starts."""

    data: Tensor | None = None

    def push(self, x: Tensor) -> None:
        """Appends the newest samples."""
        self.data = x if self.data is None else torch.cat([self.data, x], dim=-1)

    def take(self, count: int) -> Tensor:
        """Removes and returns the oldest `count` samples."""
        assert self.data is not None
        taken, self.data = self.data[..., :count], self.data[..., count:]
        return taken

    def __len__(self) -> int:
        return 0 if self.data is None else self.data.shape[-1]


def convolve(conv: nn.Conv1d, x: Tensor, fifo: Fifo, final: bool) -> Tensor:
    """The outputs of a zero-padded (strided, dilated) convolution that the new samples x (B, C, n) complete."""
    padding = int(conv.padding[0])
    if fifo.data is None:
        fifo.push(x.new_zeros(*x.shape[:2], padding))
    fifo.push(F.pad(x, (0, padding)) if final else x)
    assert fifo.data is not None
    if len(fifo) <= (conv.kernel_size[0] - 1) * conv.dilation[0]:
        return x.new_zeros(x.shape[0], conv.out_channels, 0)
    out = F.conv1d(fifo.data, conv.weight, conv.bias, conv.stride, 0, conv.dilation)
    fifo.take(out.shape[-1] * conv.stride[0])
    return out


def convolve_transposed(conv: nn.ConvTranspose1d, x: Tensor, fifo: Fifo, final: bool) -> Tensor:
    """The outputs of a cropped transposed convolution that the new samples x (B, C, n) complete; `fifo`: overlaps."""
    stride, crop = conv.stride[0], int(conv.padding[0])
    overlap = conv.kernel_size[0] - stride
    first = fifo.data is None
    if first and not x.shape[-1]:
        return x.new_zeros(x.shape[0], conv.out_channels, 0)
    held = x.new_zeros(x.shape[0], conv.out_channels, overlap) if fifo.data is None else fifo.data
    out = held
    if x.shape[-1]:
        fresh = F.conv_transpose1d(x, conv.weight, None, stride)  # (B, C out, n · stride + overlap)
        out = fresh + F.pad(held, (0, fresh.shape[-1] - overlap))
    done = out.shape[-1] - overlap
    fifo.data = out[..., done:]
    if final:  # the last `crop` samples fall away, as do the first
        out, done = out[..., : out.shape[-1] - crop], out.shape[-1] - crop
    out = out[..., crop if first else 0 : done]
    return out if conv.bias is None else out + conv.bias[:, None]


class Snake(nn.Module):
    """x + sin²(αx) / α, one α per channel (arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + (alpha * x).sin().square() / (alpha + 1e-9)


@dataclass
class ResBlockState:
    """Past samples of each convolution, and of each shortcut."""

    convs1: list[Fifo]
    convs2: list[Fifo]
    shortcuts: list[Fifo]


def _same(channels: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2))


class ResBlock(nn.Module):
    """HiFi-GAN's residual block with Snake activations."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList([_same(channels, kernel, dilation) for dilation in dilations])
        self.convs2 = nn.ModuleList([_same(channels, kernel) for _ in dilations])
        self.activations1 = nn.ModuleList([Snake(channels) for _ in dilations])
        self.activations2 = nn.ModuleList([Snake(channels) for _ in dilations])

    def init_state(self) -> ResBlockState:
        """The state of a new stream."""
        count = len(self.convs1)
        return ResBlockState(*([Fifo() for _ in range(count)] for _ in range(3)))

    def forward(self, x: Tensor, state: ResBlockState, final: bool) -> Tensor:
        for index, shortcut in enumerate(state.shortcuts):
            shortcut.push(x)
            inner = self.activations1[index](x)
            inner = convolve(self.convs1[index], inner, state.convs1[index], final)  # type: ignore[arg-type]
            inner = self.activations2[index](inner)
            inner = convolve(self.convs2[index], inner, state.convs2[index], final)  # type: ignore[arg-type]
            x = inner + shortcut.take(inner.shape[-1])
        return x


class F0Predictor(nn.Module):
    """Mel → fundamental frequency in Hz, five convolutions and a linear layer (upstream: ConvRNNF0Predictor)."""

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(5):
            inputs = config.mel_bins if index == 0 else config.f0_width
            layers += [weight_norm(nn.Conv1d(inputs, config.f0_width, 3, padding=1)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.f0_width, 1)

    def init_state(self) -> list[Fifo]:
        """The state of a new stream: past samples of each convolution."""
        return [Fifo() for _ in range(len(self.condnet) // 2)]

    def forward(self, mel: Tensor, state: list[Fifo], final: bool) -> Tensor:
        """mel (B, bins, n) → F0 (B, frames known)."""
        for index, fifo in enumerate(state):
            mel = F.elu(convolve(self.condnet[2 * index], mel, fifo, final))  # type: ignore[arg-type]
        return self.classifier(mel.transpose(1, 2))[..., 0].abs()


@dataclass
class SourceState:
    """The harmonic source between chunks: the newest frame, not fully used yet, and the phase at its centre."""

    f0: Tensor | None = None  # (B,)
    cycles: Tensor | None = None  # (B,) float64: phase of the fundamental at the newest frame's centre, in turns
    frames: int = 0


class HarmonicSource(nn.Module):
    """Sines at F0 and its multiples plus noise, merged into one channel (neural source-filter, arXiv:1904.12088).

    The phase is linear between frame centres and constant before the first and after the last, which is what upstream
    computes by interpolation. The noise of a sample depends on its absolute position only.
    """

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        self.l_linear = nn.Linear(config.harmonics + 1, 1)

    def _noise(self, first_frame: int, frames: int, like: Tensor) -> Tensor:
        """Gaussian noise (frames · hop, harmonics + 1)."""
        shape = (_NOISE_BLOCK_FRAMES * self.config.hop, self.config.harmonics + 1)
        blocks = []
        for index in range(first_frame // _NOISE_BLOCK_FRAMES, (first_frame + frames - 1) // _NOISE_BLOCK_FRAMES + 1):
            generator = torch.Generator().manual_seed(self.config.noise_seed * 1_000_003 + index)
            blocks.append(torch.randn(shape, generator=generator))
        offset = first_frame % _NOISE_BLOCK_FRAMES * self.config.hop
        return torch.cat(blocks)[offset : offset + frames * self.config.hop].to(like)

    @torch.no_grad()
    def _excitation(self, f0: Tensor, state: SourceState, final: bool) -> Tensor:
        """F0 (B, n) → sines and noise (B, samples, harmonics + 1) up to the newest frame's centre, or to the end."""
        config, hop = self.config, self.config.hop
        batch, count = f0.shape
        if state.f0 is not None:
            f0 = torch.cat([state.f0[:, None], f0], dim=1)
        if not f0.shape[1]:
            return f0.new_zeros(batch, 0, config.harmonics + 1)
        turns = f0.double() / config.rate_hz  # per sample
        start = hop * turns[:, :1] if state.cycles is None else state.cycles[:, None]
        cycles = (start + hop * F.pad(turns[:, 1:], (1, 0)).cumsum(dim=1)) % 1.0  # (B, frames), at frame centres
        # Samples between neighbouring centres; half a frame of constant phase at either end of the signal.
        place = torch.arange(hop, device=f0.device).double() + 0.5
        between = (cycles[:, :-1, None] + turns[:, 1:, None] * place).flatten(1)
        voiced = (f0 > config.voiced_threshold_hz).repeat_interleave(hop, dim=1)
        phase, half = between, hop // 2
        first_frame, skipped = state.frames - (state.f0 is not None), half
        if state.f0 is None:
            phase, skipped = torch.cat([cycles[:, :1].expand(-1, half), phase], dim=1), 0
        if final:
            phase = torch.cat([phase, cycles[:, -1:].expand(-1, hop - half)], dim=1)
        noise = self._noise(first_frame, f0.shape[1], f0)[skipped : skipped + phase.shape[1]]
        voiced = voiced[:, skipped : skipped + phase.shape[1], None]
        state.f0, state.cycles, state.frames = f0[:, -1], cycles[:, -1], state.frames + count
        multiples = torch.arange(1, config.harmonics + 2, device=f0.device)
        sines = (2 * math.pi * (phase[..., None] * multiples % 1.0)).sin().to(f0.dtype) * config.source_amplitude
        quiet = torch.tensor(config.source_amplitude / 3, device=f0.device, dtype=f0.dtype)
        return sines * voiced + torch.where(voiced, config.source_noise, quiet) * noise

    def forward(self, f0: Tensor, state: SourceState, final: bool) -> Tensor:
        """F0 (B, n) in Hz → source (B, 1, samples known)."""
        return torch.tanh(self.l_linear(self._excitation(f0, state, final))).transpose(1, 2)


@dataclass
class StageState:
    """One upsampling stage: overlaps, past samples of the source's convolutions, and signals waiting for each other."""

    up: Fifo
    source_down: Fifo
    source_block: ResBlockState
    blocks: list[ResBlockState]
    trunk: Fifo = field(default_factory=Fifo)
    source: Fifo = field(default_factory=Fifo)
    branches: list[Fifo] = field(default_factory=list)


@dataclass
class HiFTState:
    """A stream through HiFT."""

    f0: list[Fifo]
    source: SourceState
    pre: Fifo
    stages: list[StageState]
    post: Fifo
    analysis: Fifo = field(default_factory=Fifo)  # source samples not yet in all their STFT frames
    reflected: bool = False  # whether the source's start has been mirrored
    padding: Fifo = field(default_factory=Fifo)  # the last stage's first sample, until its mirror image is known
    padded: bool = False
    synthesis: Tensor | None = (
        None  # (2, B, fft / hop − 1, hop): the inverse STFT's overlapping signal and its envelope
    )
    emitted: int = 0  # samples, those cropped at the start included
    finished: bool = False


class HiFT(nn.Module):
    """Mel frames (B, T, bins) at 50 Hz → waveform (B, T · 480) at 24 kHz."""

    window: Tensor

    def __init__(self, config: HiFTConfig) -> None:
        super().__init__()
        self.config = config
        width, bands = config.width, config.fft + 2
        self.f0_predictor = F0Predictor(config)
        self.m_source = HarmonicSource(config)
        self.conv_pre = weight_norm(nn.Conv1d(config.mel_bins, width, 7, padding=3))
        self.ups, self.source_downs = nn.ModuleList(), nn.ModuleList()
        self.source_resblocks, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for index, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernels, strict=True)):
            inputs, outputs = width >> index, width >> (index + 1)
            self.ups.append(
                weight_norm(nn.ConvTranspose1d(inputs, outputs, kernel, rate, padding=(kernel - rate) // 2))
            )
            down = math.prod(config.upsample_rates[index + 1 :])
            kernel = 1 if down == 1 else 2 * down
            self.source_downs.append(nn.Conv1d(bands, outputs, kernel, down, padding=down // 2))
            self.source_resblocks.append(ResBlock(outputs, config.source_kernels[index], config.dilations))
            self.resblocks.extend(ResBlock(outputs, size, config.dilations) for size in config.resblock_kernels)
        self.conv_post = weight_norm(nn.Conv1d(width >> len(config.upsample_rates), bands, 7, padding=3))
        self.register_buffer("window", torch.hann_window(config.fft), persistent=False)

    @classmethod
    def from_folder(cls, folder: Path) -> HiFT:
        """The vocoder of a folder that `save` wrote, in evaluation mode with weight normalisation folded."""
        hift = load_part(cls, HiFTConfig, folder)
        hift.fold_weight_norm()
        return hift

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors; before `fold_weight_norm`, which changes the names."""
        save_part(self, self.config, folder)

    def fold_weight_norm(self) -> None:
        """Replaces normalised weights by plain ones, for inference."""
        for module in self.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")

    def init_state(self) -> HiFTState:
        """The state of a new stream."""
        kernels = len(self.config.resblock_kernels)
        stages = []
        for index in range(len(self.ups)):
            blocks = self.resblocks[index * kernels : (index + 1) * kernels]
            source_block: ResBlock = self.source_resblocks[index]  # type: ignore[assignment]
            states = [block.init_state() for block in blocks]  # type: ignore[operator]
            branches = [Fifo() for _ in states]
            stages.append(StageState(Fifo(), Fifo(), source_block.init_state(), states, branches=branches))
        return HiFTState(self.f0_predictor.init_state(), SourceState(), Fifo(), stages, Fifo())

    def step(self, mel: Tensor, state: HiFTState, final: bool = False) -> tuple[Tensor, HiFTState]:
        """Takes the next mel frames (B, n ≥ 0, bins) and returns the waveform samples (B, N) that are now certain.

        Raises:
            VocalNetError: the stream has ended.
        """
        if state.finished:
            raise VocalNetError("this HiFT stream has ended; begin a new one with init_state")
        frames = mel.transpose(1, 2)
        f0 = self.f0_predictor(frames, state.f0, final)
        source = self.m_source(f0, state.source, final)
        return self._decode(frames, source, state, final), state

    def forward(self, mel: Tensor) -> Tensor:
        """Mel frames (B, T ≥ 1, bins) → waveform (B, T · 480)."""
        return self.step(mel, self.init_state(), final=True)[0]

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Mel frames (B, T, bins) and their source (B, 1, T · 480) → waveform (B, T · 480)."""
        return self._decode(mel.transpose(1, 2), source, self.init_state(), final=True)

    def _decode(self, x: Tensor, source: Tensor, state: HiFTState, final: bool) -> Tensor:
        spectrum = self._analyse(source[:, 0], state, final)  # (B, fft + 2, STFT frames)
        x = convolve(self.conv_pre, x, state.pre, final)
        kernels = len(self.config.resblock_kernels)
        for index, stage in enumerate(state.stages):
            x = F.leaky_relu(x, self.config.slope)
            x = convolve_transposed(self.ups[index], x, stage.up, final)  # type: ignore[arg-type]
            if index == len(state.stages) - 1:
                x = self._reflect_start(x, state)
            shaped = convolve(self.source_downs[index], spectrum, stage.source_down, final)  # type: ignore[arg-type]
            stage.source.push(self.source_resblocks[index](shaped, stage.source_block, final))
            stage.trunk.push(x)
            ready = min(len(stage.trunk), len(stage.source))
            x = stage.trunk.take(ready) + stage.source.take(ready)
            blocks = self.resblocks[index * kernels : (index + 1) * kernels]
            for block, memory, branch in zip(blocks, stage.blocks, stage.branches, strict=True):
                branch.push(block(x, memory, final))
            ready = min(len(branch) for branch in stage.branches)
            x = functools.reduce(torch.add, [branch.take(ready) for branch in stage.branches]) / kernels
        x = convolve(self.conv_post, F.leaky_relu(x), state.post, final)
        state.finished = final
        return self._synthesise(x, state, final).clamp(-self.config.audio_limit, self.config.audio_limit)

    @staticmethod
    def _reflect_start(x: Tensor, state: HiFTState) -> Tensor:
        """Puts sample 1 before sample 0 at the very start, so that samples line up with the STFT's centred frames."""
        if state.padded:
            return x
        state.padding.push(x)
        if len(state.padding) < 2:
            return x[..., :0]
        state.padded = True
        x = state.padding.take(len(state.padding))
        return torch.cat([x[..., 1:2], x], dim=-1)

    def _analyse(self, source: Tensor, state: HiFTState, final: bool) -> Tensor:
        """Source samples (B, n) → real and imaginary STFT (B, fft + 2, frames known), mirrored at both ends."""
        fft, fifo, half = self.config.fft, state.analysis, self.config.fft // 2
        fifo.push(source)
        if not state.reflected:
            if len(fifo) <= half:
                return source.new_zeros(len(source), fft + 2, 0)
            assert fifo.data is not None
            fifo.data = torch.cat([fifo.data[:, 1 : half + 1].flip(-1), fifo.data], dim=-1)
            state.reflected = True
        assert fifo.data is not None
        if final:
            fifo.push(fifo.data[:, -half - 1 : -1].flip(-1))
        frames = fifo.data.unfold(-1, fft, self.config.fft_hop) if len(fifo) >= fft else None  # (B, frames, fft)
        if frames is None:
            return source.new_zeros(len(source), fft + 2, 0)
        spectrum = torch.fft.rfft((frames * self.window).float()).transpose(1, 2)
        fifo.take(frames.shape[1] * self.config.fft_hop)
        return torch.cat([spectrum.real, spectrum.imag], dim=1).to(source.dtype)

    def _synthesise(self, x: Tensor, state: HiFTState, final: bool) -> Tensor:
        """Log magnitude and phase (B, fft + 2, frames) → waveform (B, samples known), by overlap and add."""
        fft, hop = self.config.fft, self.config.fft_hop
        bins, shared = fft // 2 + 1, fft // hop - 1  # blocks of `hop` samples that a frame shares with the next
        magnitude = x[:, :bins].float().exp().clamp(max=100.0)
        phase = x[:, bins:].float().sin()
        frames = magnitude.new_zeros(len(x), 0, fft)
        if x.shape[-1]:
            frames = torch.fft.irfft(torch.polar(magnitude, phase).transpose(1, 2), n=fft) * self.window
        both = torch.stack([frames, (self.window**2).expand_as(frames)])  # (2, B, frames, fft)
        pieces = both.unflatten(-1, (shared + 1, hop)).unbind(dim=-2)
        blocks = functools.reduce(
            torch.add, [F.pad(piece, (0, 0, place, shared - place)) for place, piece in enumerate(pieces)]
        )  # (2, B, frames + shared, hop)
        if state.synthesis is not None:
            blocks = blocks + F.pad(state.synthesis, (0, 0, 0, blocks.shape[2] - shared))
        state.synthesis = blocks[:, :, blocks.shape[2] - shared :]
        signal, envelope = (blocks if final else blocks[:, :, : blocks.shape[2] - shared]).flatten(2)
        drop = max(0, fft // 2 - state.emitted)  # the half frame before the first sample
        state.emitted += signal.shape[1]
        keep = slice(drop, max(drop, signal.shape[1] - fft // 2) if final else None)
        return signal[:, keep] / envelope[:, keep]
