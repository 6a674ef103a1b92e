"""Trains the source-filter vocoder by regression to the synthesiser's own parameters: no discriminator.

Data: `<data>/vocoder_targets`, made by `prepare_targets` from sentences (one in a hundred times real time): per 12.5 ms
frame the synthesiser's harmonic magnitude and phase, free magnitude and phase, and F0, with its pulses and waveform.
Fine-tuning reads mels predicted by the flow as well: `<data>/predicted_mels/*.tar` with `{id}.npy` (T, 80).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.audio import ANSWER_RATE_HZ, mel_24k, mel_filters
from vocalnet.errors import DataError
from vocalnet.files import write_json
from vocalnet.parts import load_part, save_part
from vocalnet.shards import read_arrays, text_id
from vocalnet.vocoder.source_filter import (
    VOICED_HZ,
    SourceFilterConfig,
    SourceFilterVocoder,
    SynthesisParameters,
    frame_spectra,
    inverse_stft,
    pulse_train,
)

PARAMETERS = ("harmonic_magnitude", "harmonic_phase", "free_magnitude", "free_phase")
HARMONIC_FLOOR, FREE_FLOOR, WEIGHT_CEILING = -6.0, -7.0, 4.0  # log magnitudes: below is inaudible
STFT_SIZES = (2048, 1024, 512, 240)
TARGETS_FORMAT = 1
MelKind = Literal["true", "predicted", "both"]
MEL_TOLERANCE = 3  # frames by which a predicted mel may miss its sentence's length: tokens cover whole 40 ms


# ------------------------------------------------------------------ data


def at_mel_frames(values: np.ndarray, frames: int, hop: int, mel_hop: int) -> np.ndarray:
    """(F,) per synthesis frame, frame k centred on sample hop · k → (frames,) per mel frame, the nearest of each.

    Mel frame i is centred on sample mel_hop · i + mel_hop / 2.
    """
    centres = mel_hop * np.arange(frames) + mel_hop // 2
    return values[np.rint(centres / hop).astype(int).clip(0, len(values) - 1)]


def _synthesise(tts: Any, sentences: list[str], hop: int) -> dict[str, np.ndarray]:
    """Runs the synthesiser on phoneme strings, keeping what it predicts: arrays over the synthesis frames."""
    from hibari import dsp

    pieces = []
    for number, phonemes in enumerate(sentences):
        ids, speed = np.asarray([tts.ids(phonemes)], np.int64), np.asarray([1.0], np.float32)
        lh, theta, ln, lr, phi, f0 = (x[0] for x in tts.sess.run(None, {"ids": ids, "speed": speed}))
        wave = dsp.synth(lh, theta, ln, lr, phi, f0, np.random.default_rng(number))
        neighbours = torch.from_numpy(np.pad(f0, 1, mode="edge"))[None]
        pulses, _ = pulse_train(neighbours, torch.zeros(1, dtype=torch.float64), hop, ANSWER_RATE_HZ)
        pieces.append(
            {
                "parameters": np.stack([lh.T, theta.T, lr.T, phi.T], axis=1).astype(np.float16),  # (T, 4, bins)
                "f0": f0.astype(np.float32),
                "wave": wave.astype(np.float32),
                "pulses": pulses[0].numpy(),
            }
        )
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]} if pieces else {}


def prepare_targets(
    texts: list[str],
    folder: Path,
    minutes: float,
    valid: int = 15,
    phonemize: Callable[[str], list[str]] | None = None,
) -> None:
    """Synthesises sentences until `minutes` of speech are stored; of every eight the first is held out, `valid` in all.

    Writes raw arrays (frames along the first axis) and, last, index.json. Needs the package hibari-tts. `phonemize`
    must be what made the answers' speech (by default hibari's own), so that predicted mels fit frame by frame.
    """
    from hibari import Hibari

    tts, hop = Hibari(threads=1), SourceFilterConfig().hop
    index: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    names, frames = ("parameters", "f0", "wave", "pulses"), 0
    files = {name: (folder / f"{name}.bin.part").open("wb") for name in names}
    for text in texts:
        arrays = _synthesise(tts, (phonemize or tts.phonemize)(text), hop)
        if not arrays:
            continue
        for name in names:
            files[name].write(arrays[name].tobytes())
        count = len(arrays["f0"])
        split = "valid" if len(index) % 8 == 0 and len(index) < 8 * valid else "train"
        index.append({"id": text_id(text), "text": text, "first": frames, "frames": count, "split": split})
        frames += count
        if frames * hop / ANSWER_RATE_HZ > 60 * minutes:
            break
    for name, file in files.items():
        file.close()
        (folder / f"{name}.bin.part").replace(folder / f"{name}.bin")
    content = {"format": TARGETS_FORMAT, "frames": frames, "sentences": index}
    write_json(folder / "index.json", content, indent=0)


@dataclass(frozen=True)
class Sentence:
    """One stored sentence: its place in the arrays and its mels (T50, 80)."""

    id: str
    text: str
    first: int  # synthesis frame
    frames: int
    split: str


class VocoderTargets:
    """The arrays that `prepare_targets` wrote, memory-mapped.

    Raises:
        DataError: the folder is missing or incomplete.
    """

    def __init__(self, folder: Path, config: SourceFilterConfig) -> None:
        path = folder / "index.json"
        if not path.is_file():
            raise DataError(f"no vocoder targets in {folder}; run data_prep's vocoder_targets step first")
        content = json.loads(path.read_text())
        if content.get("format") != TARGETS_FORMAT:
            raise DataError(f"{path} has format {content.get('format')}; expected {TARGETS_FORMAT}: make it again")
        self.sentences = [Sentence(**entry) for entry in content["sentences"]]
        self.hop, total = config.hop, content["frames"]
        shape = (total, len(PARAMETERS), config.bins)
        self.parameters = np.memmap(folder / "parameters.bin", np.float16, "r", shape=shape)
        self.f0 = np.memmap(folder / "f0.bin", np.float32, "r", shape=(total,))
        self.wave = np.memmap(folder / "wave.bin", np.float32, "r", shape=(total, config.hop))
        self.pulses = np.memmap(folder / "pulses.bin", np.float32, "r", shape=(total, config.hop))

    def waveform(self, sentence: Sentence) -> Tensor:
        """(N,) at 24 kHz."""
        return torch.from_numpy(self.wave[sentence.first : sentence.first + sentence.frames].flatten())

    def mel(self, sentence: Sentence, mel_hop: int) -> Tensor:
        """The true mel (T50, 80); a last partial frame is filled up with silence."""
        wave = self.waveform(sentence)
        return mel_24k(F.pad(wave, (0, -len(wave) % mel_hop)))

    def mels(self, sentence: Sentence, kind: MelKind, predicted: dict[str, Tensor], mel_hop: int) -> list[Tensor]:
        """The mels to learn from: the true one, the predicted one, or both, each cut or filled up to the sentence."""
        need = -(-sentence.frames * self.hop // mel_hop)
        mels = [] if kind == "predicted" else [self.mel(sentence, mel_hop)]
        if kind != "true" and sentence.id in predicted:
            mel = predicted[sentence.id]
            if abs(len(mel) - sentence.frames * self.hop / mel_hop) <= MEL_TOLERANCE:
                mels.append(mel)
        return [torch.cat([mel, mel[-1:].expand(max(0, need - len(mel)), -1)])[:need] for mel in mels]

    def mel_f0(self, sentence: Sentence, mel_hop: int) -> Tensor:
        """F0 in Hz (T50,) of the mel frames, 0 where unvoiced."""
        f0 = self.f0[sentence.first : sentence.first + sentence.frames]
        return torch.from_numpy(at_mel_frames(f0, -(-sentence.frames * self.hop // mel_hop), self.hop, mel_hop))

    def crop(self, sentence: Sentence, start: int, frames: int) -> dict[str, Tensor]:
        """Targets of `frames` frames from frame `start` of a sentence.

        "source" holds the pulses from two hops before to two hops after the crop (zeros outside the sentence).
        """
        first = sentence.first + start
        part = slice(first, first + frames)
        low = max(sentence.first, first - 2)
        high = min(sentence.first + sentence.frames, first + frames + 2)
        source = np.zeros((frames + 4, self.hop), np.float32)
        source[low - first + 2 : high - first + 2] = self.pulses[low:high]
        return {
            "parameters": torch.from_numpy(self.parameters[part].astype(np.float32)),
            "f0": torch.from_numpy(self.f0[part].copy()),
            "wave": torch.from_numpy(self.wave[part].flatten()),
            "source": torch.from_numpy(source.flatten()),
        }


def read_predicted_mels(folder: Path) -> dict[str, Tensor]:
    """All mels (T50, 80) in a folder's tar shards, by sentence id.

    Raises:
        DataError: no shard there.
    """
    shards = read_arrays(folder, "*.tar", "npy")
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in shards}


# ------------------------------------------------------------------ losses


def _magnitude(wave: Tensor, size: int) -> Tensor:
    spectrum = torch.stft(wave, size, size // 4, size, torch.hann_window(size, device=wave.device), return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()


def spectral_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-resolution STFT loss (spectral convergence + L1 of log magnitudes) and log-mel L1 of waveforms (B, N)."""
    total = predicted.new_zeros(())
    mel_loss = total
    for size in STFT_SIZES:
        a, b = _magnitude(predicted, size), _magnitude(target, size)
        convergence = (a - b).norm() / b.norm().clamp(min=1e-3)
        total = total + (convergence + F.l1_loss((a + 1e-3).log(), (b + 1e-3).log())) / len(STFT_SIZES)
        if size == 1024:
            filters = mel_filters(ANSWER_RATE_HZ, size, 80, ANSWER_RATE_HZ / 2).to(a)
            mel_loss = F.l1_loss((filters @ a + 1e-4).log(), (filters @ b + 1e-4).log())
    return total, mel_loss


def parameter_losses(predicted: SynthesisParameters, target: Tensor, voiced: Tensor) -> dict[str, Tensor]:
    """Regression to the synthesiser's parameters.

    Args:
        target: (B, T, 4, bins) in the order of `PARAMETERS`.
        voiced: (B, T) of 0 and 1; the harmonic branch counts only there.
    """
    harmonic, theta, free, phi = target.unbind(2)
    on = voiced[..., None]
    harmonic_l1 = (predicted.harmonic_magnitude.clamp(min=HARMONIC_FLOOR) - harmonic.clamp(HARMONIC_FLOOR, 7)).abs()
    free_l1 = (predicted.free_magnitude.clamp(min=FREE_FLOOR) - free.clamp(FREE_FLOOR, 7)).abs()
    harmonic_weight = (harmonic.clamp(HARMONIC_FLOOR, WEIGHT_CEILING) - HARMONIC_FLOOR) * on
    free_weight = free.clamp(HARMONIC_FLOOR, WEIGHT_CEILING) - HARMONIC_FLOOR
    turn = math.pi * (torch.tanh(predicted.harmonic_phase) - torch.tanh(theta))
    return {
        "lh": (harmonic_l1 * on).mean(),
        "lr": free_l1.mean(),
        "theta": (harmonic_weight * (1 - turn.cos())).sum() / harmonic_weight.sum().clamp(min=1),
        "phi": (free_weight * (1 - (predicted.free_phase - phi).cos())).sum() / free_weight.sum().clamp(min=1),
    }


def f0_loss(log_f0: Tensor, voicing: Tensor, target_hz: Tensor) -> Tensor:
    """5 · L1 of log F0 on voiced frames + binary cross entropy of voicing; all (B, T)."""
    voiced = (target_hz > VOICED_HZ).float()
    error = (log_f0 - target_hz.clamp(min=VOICED_HZ).log()).abs()
    pitch = (voiced * error).sum() / voiced.sum().clamp(min=1)
    return 5 * pitch + F.binary_cross_entropy_with_logits(voicing, voiced)


# ------------------------------------------------------------------ task


@dataclass(frozen=True)
class VocoderTaskConfig:
    """The vocoder's training; `mels` chooses what it learns from, `start` a folder of weights to go on from."""

    model: SourceFilterConfig = field(default_factory=SourceFilterConfig)
    mels: MelKind = "true"
    start: Path | None = None
    lr: float = 1.2e-3
    batch: int = 12
    crop_frames: int = 80
    steps_per_epoch: int = 200


class CropTask(ABC):
    """What training either vocoder shares: mels of the stored sentences, random crops, how a validation is reported."""

    config: Any
    seed: int
    model: nn.Module
    targets: VocoderTargets
    inputs: dict[str, list[tuple[Sentence, Tensor]]]

    def _read(self, data_dir: Path, layout: SourceFilterConfig, mel_hop: int) -> None:
        """Fills `targets` and `inputs`; `layout` is that of the stored arrays.

        Raises:
            DataError: no training sentence is long enough.
        """
        kind = self.config.mels
        self.targets = VocoderTargets(data_dir / "vocoder_targets", layout)
        predicted = read_predicted_mels(data_dir / "predicted_mels") if kind != "true" else {}
        self.inputs = {"train": [], "valid": []}
        for sentence in self.targets.sentences:
            for mel in self.targets.mels(sentence, kind, predicted, mel_hop):
                mel = self._at_input_rate(mel)
                if self._starts(sentence, mel) > 0:
                    self.inputs[sentence.split].append((sentence, mel))
        if not self.inputs["train"]:
            raise DataError(f"no training sentence with {kind} mels under {data_dir}; make more vocoder targets")

    def _at_input_rate(self, mel: Tensor) -> Tensor:
        """A mel (T50, 80) as the network reads it."""
        return mel

    @abstractmethod
    def _starts(self, sentence: Sentence, mel: Tensor) -> int:
        """At how many frames a crop may start."""

    @abstractmethod
    def _crop(self, sentence: Sentence, mel: Tensor, start: int) -> dict[str, Tensor]:
        """`crop_frames` frames of a sentence from frame `start`: the mel and what the loss compares with."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group; betas as usual for vocoders."""
        return [{"params": list(self.model.parameters()), "lr": self.config.lr, "betas": (0.8, 0.99)}]

    def batches(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Random crops, sentences drawn in proportion to their length."""
        rng = np.random.default_rng([self.seed, epoch])
        inputs = self.inputs["train"]
        weights = np.array([sentence.frames for sentence, _ in inputs], float)
        for _ in range(self.config.steps_per_epoch):
            samples = []
            for choice in rng.choice(len(inputs), self.config.batch, p=weights / weights.sum()):
                sentence, mel = inputs[choice]
                samples.append(self._crop(sentence, mel, int(rng.integers(0, self._starts(sentence, mel)))))
            yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def mean_metrics(metrics: dict[str, list[Tensor]]) -> dict[str, float]:
    """The mean of each metric over the sentences."""
    return {key: float(torch.stack([v.cpu() for v in values]).mean()) for key, values in metrics.items()}


class VocoderTask(CropTask):
    """See the module's docstring; implements `vocalnet.training.task.Task`."""

    def __init__(self, config: VocoderTaskConfig, data_dir: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.config, self.seed = config, seed
        self.model: SourceFilterVocoder = SourceFilterVocoder(config.model)
        if config.start is not None:
            start = load_part(SourceFilterVocoder, SourceFilterConfig, config.start)
            self.model.load_state_dict(start.state_dict())
        self._read(data_dir, config.model, config.model.mel_hop)

    def _at_input_rate(self, mel: Tensor) -> Tensor:
        """See `CropTask`: at the synthesis frame rate, (T80, 80)."""
        return self.model.resample(mel[None])[0]

    def _starts(self, sentence: Sentence, mel: Tensor) -> int:
        """See `CropTask`."""
        return min(sentence.frames, len(mel)) - self.config.crop_frames + 1

    def _crop(self, sentence: Sentence, mel: Tensor, start: int) -> dict[str, Tensor]:
        """See `CropTask`."""
        frames = self.config.crop_frames
        return self.targets.crop(sentence, start, frames) | {"mel": mel[start : start + frames]}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Waveform losses with the true F0, F0 losses, and regression to the parameters."""
        c = self.config.model
        voiced = (batch["f0"] > VOICED_HZ).float()
        pitch = f0_loss(*self.model.predict_f0(batch["mel"]), batch["f0"])
        parameters = self.model.predict_parameters(batch["mel"])
        window = self.model.window
        with torch.autocast(batch["mel"].device.type, enabled=False):
            source = frame_spectra(batch["source"], window, c.hop)[:, : voiced.shape[1]]
            wave = inverse_stft(parameters.spectra(source), window, c.hop)
            edge = 3 * c.hop  # reached by windows that the crop cuts
            spectral, mel = spectral_loss(wave[:, edge:-edge], batch["wave"][:, edge:-edge])
            parts = parameter_losses(parameters, batch["parameters"], voiced)
            total = spectral + mel + pitch + 0.5 * (parts["lh"] + parts["lr"]) + parts["theta"] + parts["phi"]
        metrics: dict[str, float | Tensor] = {"stft": spectral, "mel": mel, "f0": pitch, **parts}
        return total, {key: value.detach() for key, value in metrics.items()} | {"samples": len(voiced)}  # type: ignore[union-attr]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Free-running log-mel L1, F0 error in semitones and rate of voicing errors on the held-out sentences."""
        mel_error, semitones, flips = [], [], []
        device = self.model.window.device
        for sentence, mel in self.inputs["valid"]:
            f0 = torch.from_numpy(self.targets.f0[sentence.first : sentence.first + sentence.frames].copy()).to(device)
            log_f0, voicing = (x[0, : len(f0)] for x in self.model.predict_f0(mel[None].to(device)))
            voiced = f0 > VOICED_HZ
            semitones.append((log_f0 - f0.clamp(min=VOICED_HZ).log())[voiced].abs().mean() * 12 / math.log(2))
            flips.append(((voicing > 0) != voiced).float().mean())
            true_mel = self.targets.mel(sentence, self.config.model.mel_hop)
            wave = self.model(true_mel[None].to(device)).cpu()
            mel_error.append((mel_24k(wave)[0] - true_mel).abs().mean())
        return mean_metrics({"mel_l1": mel_error, "f0_semitones": semitones, "voicing_error": flips})

    def export(self, folder: Path) -> None:
        """Writes model.safetensors and config.json."""
        save_part(self.model, self.config.model, folder)
