"""Source-filter vocoder: mel → 24 kHz waveform through one inverse STFT per 12.5 ms frame, streaming.

A causal ConvNeXt reads the mel (resampled to the synthesis frame rate) and predicts, per frame k and bin,

    S_k = exp(lh) e^{i π tanh θ} · STFT(pulses(F0))_k + exp(lr) e^{i φ}

that is, a filtered band-limited pulse train (harmonic branch) plus a free spectrum with its own phase. The parameters
are those of the harmonic-plus-noise synthesiser that speaks the training data (hibari, Apache-2.0), so the network is
trained by regression to them and needs no discriminator. F0 comes from a small network of its own.

Timing: mel frame i is centred at sample 480 i + 240, synthesis frame k at sample 300 k. The trunk looks `lookahead`
synthesis frames ahead; the F0 network two fewer, because a source STFT frame reaches two F0 frames into the future:
both outputs arrive together.

The pulses' phase adds up F0 over the whole stream, so rounding errors of F0 would add up as well and make chunked and
offline synthesis drift apart (and bfloat16 be out of tune): when synthesising, F0 is computed in float64.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError
from vocalnet.vocoder.convnext import Trunk

VOICED_HZ = 40.0  # F0 below this means unvoiced
HIGHEST_HARMONIC_HZ = 11000.0
FADE = 0.01  # of a harmonic number, in which the next harmonic fades in
LOG_MAGNITUDE_CEILING = 7.0
LOG_F0_MEAN, LOG_F0_SCALE = 5.3, 0.5  # natural log of Hz; the F0 head predicts the normalised value
MEL_MEAN, MEL_SCALE = -5.0, 3.0
WINDOW_HOPS = 4  # the window spans four hops: overlap-add needs only block-wise shifts


@dataclass(frozen=True)
class SourceFilterConfig:
    """Sizes of the vocoder; rates in Hz, hops and windows in samples, lookahead in synthesis frames."""

    mel_bins: int = 80
    sample_rate: int = 24000
    mel_hop: int = 480
    hop: int = 300
    width: int = 256
    blocks: int = 6
    hidden: int = 768
    f0_width: int = 96
    f0_blocks: int = 3
    f0_hidden: int = 192
    kernel: int = 7
    lookahead: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.lookahead < self.kernel:
            raise ConfigError(f"lookahead is {self.lookahead} frames; allowed: 2 to kernel - 1 = {self.kernel - 1}")
        if self.mel_hop < self.hop or self.hop % 2:
            raise ConfigError(f"hop is {self.hop}; allowed: an even number not above mel_hop = {self.mel_hop}")

    @property
    def window(self) -> int:
        """STFT window and FFT size in samples."""
        return WINDOW_HOPS * self.hop

    @property
    def bins(self) -> int:
        """Bins of the one-sided spectrum."""
        return self.window // 2 + 1


# ------------------------------------------------------------------ signal processing (no learned parts)


def synthesis_window(window: int) -> Tensor:
    """Periodic Hann window, float32."""
    return torch.hann_window(window, periodic=True, dtype=torch.float32)


def interpolate_f0(f0_hz: Tensor, hop: int) -> Tensor:
    """Linear interpolation of frame values to samples, frame k filling samples [hop·k, hop·(k+1)).

    Args:
        f0_hz: (B, T + 2), the T frames with one neighbour on either side.

    Returns:
        (B, T·hop); as `interpolate(mode="linear", align_corners=False)`.
    """
    half = hop // 2
    offset = (torch.arange(hop, device=f0_hz.device, dtype=f0_hz.dtype) + 0.5) / hop - 0.5
    weight = offset % 1.0
    previous, current, following = (f0_hz[:, i : f0_hz.shape[1] - 2 + i, None] for i in range(3))
    first = previous * (1 - weight[:half]) + current * weight[:half]
    second = current * (1 - weight[half:]) + following * weight[half:]
    return torch.cat([first, second], dim=2).flatten(1)


def pulse_train(f0_hz: Tensor, cycles: Tensor, hop: int, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Band-limited pulses: every harmonic below 11 kHz with unit amplitude, in closed form.

    Σ_{h=1..H} cos(h t) = sin((H + ½) t) / (2 sin(t / 2)) − ½; unvoiced samples are zero. The next harmonic fades in
    over the last hundredth of the way to its turn: if it came at once, an F0 near that edge would turn rounding errors
    into a difference between streams and whole utterances (seen: 2e-3).

    Args:
        f0_hz: (B, T + 2) F0 per frame (0 = unvoiced) with one neighbour on either side.
        cycles: (B,) float64, the phase reached so far, in cycles.

    Returns:
        Pulses (B, T·hop) float32 and the phase at their end.
    """
    frequency = interpolate_f0(f0_hz.double(), hop)
    voiced = frequency > VOICED_HZ
    frequency = frequency.clamp(min=VOICED_HZ)
    phase = cycles[:, None] + frequency.cumsum(1) / sample_rate
    if phase.shape[1]:
        cycles = phase[:, -1] % 1.0
    angle = (phase % 1.0) * (2 * math.pi)
    harmonics = HIGHEST_HARMONIC_HZ / frequency
    whole = torch.floor(harmonics)
    order = whole + 0.5
    denominator = 2 * torch.sin(angle * 0.5)
    singular = denominator.abs() <= 2e-3  # the limit at t → 0 is H + ½
    ratio = torch.sin(order * angle) / torch.where(singular, torch.ones_like(denominator), denominator)
    pulses = torch.where(singular, order, ratio) - 0.5
    coming = ((harmonics - whole - 1) / FADE + 1).clamp(min=0)
    pulses = pulses + coming * torch.cos((whole + 1) * angle)
    return (pulses * voiced).float(), cycles


def frame_spectra(padded: Tensor, window: Tensor, hop: int) -> Tensor:
    """STFT frames of an already padded signal (B, N) → (B, frames, bins) complex64.

    The window is scaled so that a unit cosine reaches a magnitude of one.
    """
    size = window.numel()
    return torch.fft.rfft(padded.unfold(1, size, hop) * (window / (size / WINDOW_HOPS)), dim=2)


def overlap_add(spectra: Tensor, window: Tensor, hop: int) -> tuple[Tensor, Tensor]:
    """Inverse FFT, window and overlap-add.

    Args:
        spectra: (B, T, bins) complex.

    Returns:
        Sums (B, T + 3, hop), block j being the samples [hop·j, hop·(j+1)) from the first frame's start, and the sums of
        the squared window (T + 3, hop) to divide them by.
    """
    batch, frames, _ = spectra.shape
    blocks = torch.fft.irfft(spectra, window.numel(), dim=2) * window
    blocks = blocks.view(batch, frames, WINDOW_HOPS, hop)
    squared = (window * window).view(WINDOW_HOPS, hop)
    signal = blocks.new_zeros(batch, frames + WINDOW_HOPS - 1, hop)
    weight = squared.new_zeros(frames + WINDOW_HOPS - 1, hop)
    for k in range(WINDOW_HOPS):
        signal[:, k : k + frames] += blocks[:, :, k]
        weight[k : k + frames] += squared[k]
    return signal, weight


def inverse_stft(spectra: Tensor, window: Tensor, hop: int) -> Tensor:
    """Offline inverse STFT, frames centred at hop·k: (B, T, bins) → (B, T·hop), as `torch.istft(center=True)`."""
    signal, weight = overlap_add(spectra, window, hop)
    skip = WINDOW_HOPS // 2
    last = skip + spectra.shape[1]
    return (signal[:, skip:last] / weight[skip:last].clamp(min=1e-8)).flatten(1)


def resample_mel(mel: Tensor, first: int, count: int, start: int, config: SourceFilterConfig) -> Tensor:
    """Linear interpolation from mel frames to synthesis frames first … first + count − 1.

    Args:
        mel: (B, T, bins), mel frames start … start + T − 1; positions outside are clamped to them.
    """
    samples = config.hop * torch.arange(first, first + count, device=mel.device) - config.mel_hop // 2
    low = samples // config.mel_hop  # whole numbers: the weights do not depend on where a chunk starts
    weight = ((samples - low * config.mel_hop).float() / config.mel_hop)[:, None].to(mel.dtype)
    low, high = ((index - start).clamp(0, mel.shape[1] - 1) for index in (low, low + 1))
    return mel[:, low] * (1 - weight) + mel[:, high] * weight


# ------------------------------------------------------------------ network


@dataclass
class SynthesisParameters:
    """What the trunk predicts per frame and bin, each (B, T, bins) float32."""

    free_magnitude: Tensor  # lr: log magnitude of the free branch
    free_phase: Tensor  # φ in radians
    harmonic_magnitude: Tensor  # lh: log gain on the pulse train
    harmonic_phase: Tensor  # θ, before π·tanh

    def spectra(self, source: Tensor) -> Tensor:
        """The spectrum of each frame, complex64, given the source's STFT (B, T, bins)."""
        gain = self.harmonic_magnitude.clamp(max=LOG_MAGNITUDE_CEILING).exp()
        free = self.free_magnitude.clamp(max=LOG_MAGNITUDE_CEILING).exp()
        harmonic = source * torch.polar(gain, math.pi * torch.tanh(self.harmonic_phase))
        return harmonic + torch.polar(free, self.free_phase)


@dataclass
class SourceFilterState:
    """What a stream carries between chunks; every tensor's size is bounded whatever the stream's length."""

    mel: Tensor  # (B, ≤ 3, bins): mel frames that coming synthesis frames interpolate
    mel_start: int  # index of mel's first frame
    mel_frames: int  # mel frames received
    resampled: int  # synthesis frames interpolated so far
    trunk: list[Tensor]
    f0_trunk: list[Tensor]
    f0_hz: Tensor  # (B, ≤ 2) float64: the frames round the next pulses; empty before the first
    cycles: Tensor  # (B,) float64: phase of the pulse train
    pulses: Tensor  # (B, ≤ window): pulses that coming source frames reach back to
    signal: Tensor  # (B, 3, hop): overlap not yet complete
    weight: Tensor  # (3, hop): its squared-window sums
    blocks: int  # hop-sized blocks finished, the two before sample 0 included
    samples: int  # samples returned


class SourceFilterVocoder(nn.Module):
    """Mel (B, T, 80) at 50 Hz → waveform (B, 480 T) at 24 kHz; see the module's docstring."""

    window: Tensor

    def __init__(self, config: SourceFilterConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.trunk = Trunk(c.mel_bins, c.width, c.blocks, c.hidden, c.kernel, c.lookahead)
        self.head = nn.Linear(c.width, 4 * c.bins)
        self.f0_trunk = Trunk(c.mel_bins, c.f0_width, c.f0_blocks, c.f0_hidden, c.kernel, c.lookahead - 2)
        self.f0_head = nn.Linear(c.f0_width, 2)
        self.register_buffer("window", synthesis_window(c.window), persistent=False)
        self._precise: tuple[list[tuple[int, int]], Trunk, nn.Linear] | None = None
        with torch.no_grad():  # start quiet: both magnitudes near exp(-2)
            self.head.weight *= 0.5
            self.head.bias[: c.bins] = -2
            self.head.bias[2 * c.bins : 3 * c.bins] = -2

    @property
    def delay_samples(self) -> int:
        """Waveform samples withheld behind the last complete synthesis frame until more mel or the end arrives."""
        return (self.config.lookahead + WINDOW_HOPS // 2) * self.config.hop

    def _normalise(self, mel: Tensor) -> Tensor:
        return (mel - MEL_MEAN) / MEL_SCALE

    def _split_head(self, hidden: Tensor) -> SynthesisParameters:
        return SynthesisParameters(*self.head(hidden).float().chunk(4, dim=-1))

    def predict_f0(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Resampled mel (B, T, 80) → natural log F0 and voicing logit, each (B, T) float32."""
        return self._f0(self.f0_trunk(self._normalise(mel)))

    def predict_parameters(self, mel: Tensor) -> SynthesisParameters:
        """Resampled mel (B, T, 80) → synthesis parameters."""
        return self._split_head(self.trunk(self._normalise(mel)))

    def _f0(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_f0, voiced = self.f0_head(hidden).float().unbind(-1)
        return log_f0 * LOG_F0_SCALE + LOG_F0_MEAN, voiced

    def _precise_f0(self) -> tuple[Trunk, nn.Linear]:
        """The F0 network in float64, copied again whenever its weights have changed."""
        weights = [*self.f0_trunk.parameters(), *self.f0_head.parameters()]
        version = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
        if self._precise is None or self._precise[0] != version:
            self._precise = (version, copy.deepcopy(self.f0_trunk).double(), copy.deepcopy(self.f0_head).double())
        return self._precise[1:]

    def _f0_step(self, frames: Tensor, state: SourceFilterState, final: bool) -> Tensor:
        """Normalised frames (B, n, 80) → F0 in Hz (B, m) float64, 0 where unvoiced."""
        trunk, head = self._precise_f0()
        hidden, state.f0_trunk = trunk.step(frames.double(), state.f0_trunk, final)
        log_f0, voiced = head(hidden).unbind(-1)
        return torch.where(voiced > 0, (log_f0 * LOG_F0_SCALE + LOG_F0_MEAN).exp(), 0.0)

    def synthesis_frames(self, mel_frames: int) -> int:
        """Synthesis frames that cover `mel_frames` mel frames."""
        return -(-mel_frames * self.config.mel_hop // self.config.hop)

    def resample(self, mel: Tensor) -> Tensor:
        """A whole utterance's mel (B, T, 80) at the synthesis frame rate."""
        return resample_mel(mel, 0, self.synthesis_frames(mel.shape[1]), 0, self.config)

    def init_state(self, batch: int = 1) -> SourceFilterState:
        """The state before the first mel frame."""
        c, device, dtype = self.config, self.head.weight.device, self.head.weight.dtype
        overlap = WINDOW_HOPS - 1

        def empty(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return SourceFilterState(
            mel=torch.zeros(batch, 0, c.mel_bins, device=device, dtype=dtype),
            mel_start=0,
            mel_frames=0,
            resampled=0,
            trunk=self.trunk.init_state(batch, device, dtype),
            f0_trunk=self.f0_trunk.init_state(batch, device, torch.float64),
            f0_hz=torch.zeros(batch, 0, device=device, dtype=torch.float64),
            cycles=torch.zeros(batch, device=device, dtype=torch.float64),
            pulses=empty(batch, c.window // 2),
            signal=empty(batch, overlap, c.hop),
            weight=empty(overlap, c.hop),
            blocks=0,
            samples=0,
        )

    @torch.inference_mode()
    def forward(self, mel: Tensor) -> Tensor:
        """A whole utterance: (B, T, 80) log-mel → (B, 480 T) waveform."""
        return self.step(mel, self.init_state(mel.shape[0]), final=True)[0]

    @torch.inference_mode()
    def step(self, mel: Tensor, state: SourceFilterState, final: bool = False) -> tuple[Tensor, SourceFilterState]:
        """The next mel frames (B, n ≥ 0, 80) → the samples (B, N) that they complete.

        N is 0 while the lookahead fills; `final` returns everything up to sample 480 · (mel frames).
        """
        frames = self._normalise(self._resample_step(mel.to(state.mel.dtype), state, final))
        hidden, state.trunk = self.trunk.step(frames, state.trunk, final)
        source = self._source_step(self._f0_step(frames, state, final), state, final)
        spectra = self._split_head(hidden).spectra(source[:, : hidden.shape[1]])
        return self._overlap_step(spectra, state, final), state

    def _resample_step(self, mel: Tensor, state: SourceFilterState, final: bool) -> Tensor:
        """Mel frames in, synthesis-rate frames out; keeps the few mel frames still needed."""
        c = self.config
        buffer = torch.cat([state.mel, mel], dim=1)
        state.mel_frames += mel.shape[1]
        centre = c.mel_hop * (state.mel_frames - 1) + c.mel_hop // 2  # of the newest mel frame, in samples
        end = self.synthesis_frames(state.mel_frames) if final else centre // c.hop + 1
        count = max(0, end - state.resampled) if state.mel_frames else 0
        frames = resample_mel(buffer, state.resampled, count, state.mel_start, c) if count else buffer[:, :0]
        state.resampled += count
        needed = max(0, (c.hop * state.resampled - c.mel_hop // 2) // c.mel_hop)
        drop = min(max(0, needed - state.mel_start), max(0, buffer.shape[1] - 1))
        state.mel, state.mel_start = buffer[:, drop:], state.mel_start + drop
        return frames

    def _source_step(self, f0_hz: Tensor, state: SourceFilterState, final: bool) -> Tensor:
        """New F0 frames (B, n) → source STFT frames (B, m, bins), two frames behind until `final`."""
        c = self.config
        if not state.f0_hz.shape[1]:
            f0_hz = torch.cat([f0_hz[:, :1], f0_hz], dim=1)  # the first frame is its own left neighbour
        f0_hz = torch.cat([state.f0_hz, f0_hz], dim=1)
        if final:
            f0_hz = torch.cat([f0_hz, f0_hz[:, -1:]], dim=1)
        pulses = state.pulses
        if f0_hz.shape[1] > 2:
            new, state.cycles = pulse_train(f0_hz, state.cycles, c.hop, c.sample_rate)
            pulses = torch.cat([pulses, new], dim=1)
        state.f0_hz = f0_hz[:, -2:]
        if final:
            pulses = F.pad(pulses, (0, c.window // 2))
        count = max(0, (pulses.shape[1] - c.window) // c.hop + 1)
        state.pulses = pulses[:, count * c.hop :]
        if not count:
            return torch.zeros(pulses.shape[0], 0, c.bins, device=pulses.device, dtype=torch.complex64)
        return frame_spectra(pulses, self.window.float(), c.hop)

    def _overlap_step(self, spectra: Tensor, state: SourceFilterState, final: bool) -> Tensor:
        """Spectra (B, n, bins) → finished samples (B, N); the incomplete overlap stays in the state."""
        c, frames, overlap = self.config, spectra.shape[1], WINDOW_HOPS - 1
        if frames:
            signal, weight = overlap_add(spectra, self.window.float(), c.hop)
            signal[:, :overlap] += state.signal
            weight[:overlap] += state.weight
        else:
            signal, weight = state.signal, state.weight
        done = frames + (WINDOW_HOPS // 2 if final and state.blocks + frames else 0)
        first = max(0, WINDOW_HOPS // 2 - state.blocks)  # blocks before sample 0 are dropped
        wave = (signal[:, first:done] / weight[first:done].clamp(min=1e-8)).flatten(1)
        state.signal, state.weight = signal[:, frames:], weight[frames:]
        state.blocks += done
        if final:
            wave = wave[:, : max(0, c.mel_hop * state.mel_frames - state.samples)]
        state.samples += wave.shape[1]
        return wave
