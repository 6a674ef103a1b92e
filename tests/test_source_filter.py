"""The source-filter vocoder: its signal processing against references, streaming against offline, edges and errors."""

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vocalnet.audio import mel_24k
from vocalnet.errors import ConfigError, DataError
from vocalnet.training.hift import HiFTTask, HiFTTaskConfig
from vocalnet.training.vocoder import VocoderTask, VocoderTaskConfig, prepare_targets
from vocalnet.vocoder.hift import HiFT, HiFTConfig
from vocalnet.vocoder.source_filter import (
    FADE,
    HIGHEST_HARMONIC_HZ,
    SourceFilterConfig,
    SourceFilterVocoder,
    SynthesisParameters,
    frame_spectra,
    interpolate_f0,
    inverse_stft,
    pulse_train,
    resample_mel,
    synthesis_window,
)

HOP, RATE = 300, 24000
SMALL = SourceFilterConfig(width=32, blocks=2, hidden=48, f0_width=16, f0_blocks=1, f0_hidden=24)


def make_vocoder() -> SourceFilterVocoder:
    """Random weights that give a clearly audible signal, part voiced and part unvoiced."""
    torch.manual_seed(0)
    vocoder = SourceFilterVocoder(SMALL).eval()
    with torch.no_grad():
        vocoder.head.weight *= 4
    return vocoder


def contour() -> torch.Tensor:
    """An F0 curve with a glide, an unvoiced gap and voiced ends, (1, 200)."""
    frames = np.arange(200)
    f0 = 180 + 40 * np.sin(frames / 9)
    f0[50:70] = 0
    return torch.from_numpy(f0.astype(np.float32))[None]


def with_neighbours(f0: torch.Tensor) -> torch.Tensor:
    return torch.cat([f0[:, :1], f0, f0[:, -1:]], dim=1)


def test_pulses_are_the_sum_of_all_harmonics_below_the_limit() -> None:
    f0 = torch.full((1, 10), 200.0)
    pulses, _ = pulse_train(with_neighbours(f0), torch.zeros(1, dtype=torch.float64), HOP, RATE)
    time = torch.arange(1, 10 * HOP + 1, dtype=torch.float64) / RATE
    expected = sum(torch.cos(2 * math.pi * 200 * h * time) for h in range(1, 56))
    assert torch.allclose(pulses[0].double(), expected, atol=2e-2)


def test_pulses_are_silent_where_unvoiced_and_carry_their_phase() -> None:
    f0 = contour()
    start = torch.zeros(1, dtype=torch.float64)
    whole, end = pulse_train(with_neighbours(f0), start, HOP, RATE)
    assert whole[0, 51 * HOP : 69 * HOP].abs().max() == 0
    padded = with_neighbours(f0)
    first, cycles = pulse_train(padded[:, :82], start, HOP, RATE)
    second, cycles = pulse_train(padded[:, 80:], cycles, HOP, RATE)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=2e-2)
    assert torch.allclose(cycles, end, atol=1e-9)


def test_inverse_stft_matches_torch() -> None:
    torch.manual_seed(0)
    window = synthesis_window(4 * HOP)
    spectra = torch.randn(2, 20, 601, dtype=torch.complex64)
    spectra[:, :, 0] = spectra[:, :, 0].real.to(torch.complex64)
    spectra[:, :, -1] = spectra[:, :, -1].real.to(torch.complex64)
    expected = torch.istft(spectra.transpose(1, 2), 4 * HOP, HOP, window=window, center=True, length=20 * HOP)
    assert torch.allclose(inverse_stft(spectra, window, HOP), expected, atol=1e-5)


def test_rounding_errors_of_f0_stay_small_where_a_harmonic_comes_in() -> None:
    """F0 rests where the 50th harmonic reaches the edge: a few ten-millionths more or less must not be heard."""
    edge = HIGHEST_HARMONIC_HZ / 50
    start = torch.zeros(1, dtype=torch.float64)
    found = []
    for factor in (1 - 3e-8, 1 + 3e-8):
        f0 = torch.full((1, 12), edge * factor, dtype=torch.float64)
        found.append(pulse_train(f0, start, HOP, RATE)[0])
    assert (found[0] - found[1]).abs().max() < 0.05
    assert found[0].abs().max() > 20


def test_signal_processing_equals_hibaris() -> None:
    dsp = pytest.importorskip("hibari.dsp", reason="hibari-tts is not installed (pip install hibari-tts)")
    f0, window = contour(), synthesis_window(4 * HOP)
    pulses, _ = pulse_train(with_neighbours(f0), torch.zeros(1, dtype=torch.float64), HOP, RATE)
    theirs = dsp.pulses(f0[0].numpy())
    close = np.isclose(pulses[0].numpy(), theirs, atol=0.1)  # both evaluate sin(54 t) of a float32 phase
    harmonics = HIGHEST_HARMONIC_HZ / interpolate_f0(with_neighbours(f0).double(), HOP)[0].clamp(min=1).numpy()
    steady = harmonics % 1 < 1 - FADE  # else the next harmonic fades in, which theirs does not
    assert steady.mean() > 0.97
    assert close[steady].mean() > 0.999
    assert np.abs(pulses[0].numpy() - theirs).max() < 0.02 * np.abs(theirs).max()
    spectra = frame_spectra(F.pad(pulses, (600, 600)), window, HOP)[:, :200]
    inner = np.abs(spectra[0].numpy().T - dsp.stft(theirs, 200))[:, 3:-3]
    assert inner.max() < 2e-2
    ours = inverse_stft(spectra, window, HOP)[0].numpy()
    assert np.abs(ours - dsp.ola(np.ascontiguousarray(spectra[0].numpy().T))).max() < 1e-5


def test_resampling_keeps_a_straight_line_straight() -> None:
    mel = (torch.arange(40.0) * 480 + 240)[None, :, None].expand(1, 40, 80)  # the value is the centre's sample index
    frames = resample_mel(mel, 0, 64, 0, SourceFilterConfig())[0, :, 0]
    expected = (torch.arange(64.0) * 300).clamp(240, 39 * 480 + 240)
    assert torch.allclose(frames, expected, atol=1e-1)


def test_offline_length_is_480_samples_a_frame() -> None:
    vocoder = make_vocoder()
    for frames in (1, 2, 5, 33):
        wave = vocoder(torch.randn(2, frames, 80) - 5)
        assert wave.shape == (2, 480 * frames)
        assert torch.isfinite(wave).all()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 21), min_size=1, max_size=12), st.booleans())
def test_any_chunks_give_the_offline_waveform(chunks: list[int], close_with_data: bool) -> None:
    vocoder = make_vocoder()
    torch.manual_seed(sum(chunks))
    mel = torch.randn(1, sum(chunks), 80) * 2 - 5
    state, pieces, first = vocoder.init_state(), [], 0
    for number, size in enumerate(chunks):
        last = close_with_data and number == len(chunks) - 1
        wave, state = vocoder.step(mel[:, first : first + size], state, final=last)
        pieces.append(wave)
        first += size
    if not close_with_data:
        pieces.append(vocoder.step(mel[:, :0], state, final=True)[0])
    streamed = torch.cat(pieces, dim=1)
    assert streamed.shape == (1, 480 * mel.shape[1])
    if mel.shape[1]:
        offline = vocoder(mel)
        assert offline.abs().max() > 0.01
        assert torch.allclose(streamed, offline, atol=1e-4)


def test_later_mel_never_changes_samples_already_returned() -> None:
    vocoder = make_vocoder()
    torch.manual_seed(3)
    mel = torch.randn(1, 40, 80) * 2 - 5
    other = mel.clone()
    other[:, 25:] = 0
    a, _ = vocoder.step(mel[:, :25], vocoder.init_state())
    b, _ = vocoder.step(other, vocoder.init_state())
    assert a.shape[1] > 0
    assert torch.allclose(a, b[:, : a.shape[1]], atol=1e-4)


def test_withheld_samples_and_state_stay_bounded() -> None:
    vocoder = make_vocoder()
    state, returned, sizes = vocoder.init_state(), 0, set()
    for chunk in range(1, 60):
        wave, state = vocoder.step(torch.randn(1, 5, 80) - 5, state)
        returned += wave.shape[1]
        assert 480 * 5 * chunk - returned <= vocoder.delay_samples + 2 * HOP
        tensors = [state.mel, state.f0_hz, state.pulses, state.signal, state.weight, *state.trunk, *state.f0_trunk]
        sizes.add(sum(t.numel() for t in tensors) // 1000)
    assert len(sizes) <= 3


def test_no_click_where_chunks_meet() -> None:
    vocoder = make_vocoder()
    torch.manual_seed(4)
    mel = torch.randn(1, 60, 80) - 5
    state, pieces = vocoder.init_state(), []
    for first in range(0, 60, 6):
        wave, state = vocoder.step(mel[:, first : first + 6], state, final=first == 54)
        pieces.append(wave)
    slope = torch.cat(pieces, dim=1)[0].diff().abs()
    edges = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0)[:-1] - 1
    assert slope[edges].max() <= slope.quantile(0.999)


def test_bfloat16_runs_and_stays_close() -> None:
    vocoder = make_vocoder()
    mel = torch.randn(1, 20, 80) - 5
    exact = vocoder(mel)
    rough = vocoder.to(torch.bfloat16)(mel.bfloat16())
    assert rough.dtype == torch.float32
    assert rough.shape == exact.shape
    assert torch.isfinite(rough).all()


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="lookahead is 9"):
        SourceFilterConfig(lookahead=9)
    with pytest.raises(ConfigError, match="hop is 301"):
        SourceFilterConfig(hop=301)


def write_predicted_mels(folder: Path, mels: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for name, mel in mels.items():
            buffer = io.BytesIO()
            np.save(buffer, mel.numpy().astype(np.float16))
            entry = tarfile.TarInfo(f"{name}.npy")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)


TEXTS = ["Good morning to you.", "The sea is calm today.", "Two and two are four."]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with targets of three sentences."""
    pytest.importorskip("hibari", reason="hibari-tts is not installed (pip install hibari-tts)")
    folder = tmp_path_factory.mktemp("data")
    prepare_targets(TEXTS, folder / "vocoder_targets", minutes=1, valid=1)
    return folder


def test_task_learns_from_the_synthesiser_and_from_predicted_mels(data: Path, tmp_path: Path) -> None:
    options = {"batch": 2, "crop_frames": 24, "steps_per_epoch": 2}
    task = VocoderTask(VocoderTaskConfig(model=SMALL, **options), data, seed=0)
    assert [sentence.text for sentence, _ in task.inputs["valid"]] == TEXTS[:1]
    orders = [[batch["mel"].sum().item() for batch in task.batches(3)] for _ in range(2)]
    assert orders[0] == orders[1]
    batch = next(iter(task.batches(0)))
    optimizer = torch.optim.Adam(task.parameter_groups())
    losses = []
    for step in range(8):
        loss, _ = task.loss(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    task.model.eval()
    assert set(task.validate()) == {"mel_l1", "f0_semitones", "voicing_error"}
    task.export(tmp_path)

    sentence = task.inputs["train"][0][0]
    write_predicted_mels(data / "predicted_mels", {sentence.id: task.targets.mel(sentence, 480) + 0.1})
    tuned = VocoderTask(VocoderTaskConfig(model=SMALL, mels="both", start=tmp_path, **options), data, seed=0)
    assert len(tuned.inputs["train"]) == 3  # two true mels, one predicted
    assert torch.equal(tuned.model.head.weight, task.model.head.weight)


def test_hift_learns_from_the_same_targets(data: Path, tmp_path: Path) -> None:
    config = HiFTConfig(width=32, f0_width=16)
    options = {"batch": 2, "crop_frames": 16, "steps_per_epoch": 2}
    task = HiFTTask(HiFTTaskConfig(model=config, **options), data, seed=0)
    sentence, mel = task.inputs["train"][0]
    f0 = task.targets.mel_f0(sentence, 480)
    assert len(f0) == len(mel)
    loud = mel.exp().mean(1)
    assert loud[f0 > 40].mean() > 2 * loud[f0 <= 40].mean()  # voiced frames are the loud ones
    batch = next(iter(task.batches(0)))
    assert (mel_24k(batch["wave"])[:, 4:-4] - batch["mel"][:, 4:-4]).abs().mean() < 0.05
    optimizer = torch.optim.Adam(task.parameter_groups())
    losses = []
    for step in range(6):
        loss, _ = task.loss(batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    task.model.eval()
    assert set(task.validate()) == {"mel_l1", "f0_semitones", "voicing_error"}
    task.export(tmp_path)
    again = HiFTTask(HiFTTaskConfig(model=config, start=tmp_path, **options), data, seed=1)
    assert torch.equal(again.model.m_source.l_linear.weight, task.model.m_source.l_linear.weight)
    assert HiFT.from_folder(tmp_path)(mel[None]).shape == (1, 480 * len(mel))


def test_crops_of_targets_line_up_with_the_waveform(data: Path) -> None:
    """The stored parameters, pulses and waveform of a crop belong together: synthesis from them gives the waveform."""
    task = VocoderTask(VocoderTaskConfig(model=SMALL, crop_frames=24), data, seed=0)
    sentence = task.inputs["train"][0][0]
    crop = task.targets.crop(sentence, 20, 60)
    harmonic, theta, free, phi = crop["parameters"].unbind(1)
    window = synthesis_window(4 * HOP)
    source = frame_spectra(crop["source"][None], window, HOP)[:, :60]
    wave = inverse_stft(
        SynthesisParameters(*(x[None] for x in (free, phi, harmonic, theta))).spectra(source), window, HOP
    )
    inner = slice(900, -900)
    error = (wave[0, inner] - crop["wave"][inner]).square().mean()
    assert error < 0.02 * crop["wave"][inner].square().mean()  # what is left is the synthesiser's noise branch


def test_missing_targets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocoder_targets"):
        VocoderTask(VocoderTaskConfig(model=SMALL), tmp_path, seed=0)
