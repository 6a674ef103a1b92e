"""Audio in and out, the two mels, and features of audio that arrives piece by piece."""

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from vocalnet.audio import (
    MAX_QUESTION_S,
    QUESTION_RATE_HZ,
    StreamingFeatures,
    WavWriter,
    check_question,
    log_mel_whisper,
    mel_24k,
    mel_filters,
    question_features,
    read_audio,
    write_audio,
)
from vocalnet.errors import AudioError


def tone(seconds, rate=16_000, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(8000, 1, "wav"), (48000, 2, "flac"), (44100, 1, "ogg")])
def test_any_file_becomes_mono_at_the_wanted_rate(tmp_path, rate, channels, suffix):
    path = tmp_path / f"q.{suffix}"
    soundfile.write(path, np.stack([tone(1.0, rate)] * channels, axis=1), rate)
    wave = read_audio(path, 16_000)
    assert wave.dtype == np.float32
    assert wave.shape == (16_000,)
    reference = tone(1.0)
    assert np.corrcoef(wave[2000:-2000], reference[2000:-2000])[0, 1] > 0.999


def test_written_audio_reads_back(tmp_path):
    wave = tone(0.5, 24_000)
    write_audio(tmp_path / "a.wav", wave, 24_000)
    assert np.abs(read_audio(tmp_path / "a.wav", 24_000) - wave).max() < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_a_failed_write_leaves_no_file(tmp_path):
    def fail():
        with WavWriter(tmp_path / "a.wav", 24_000) as writer:
            writer.write(tone(0.1))
            writer.write(np.array([np.nan], np.float32))

    with pytest.raises(AudioError, match="NaN"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "message"), [("no/folder/a.wav", "create it first"), ("a.doc", "allowed: .wav")])
def test_impossible_destinations_are_refused(tmp_path, name, message):
    with pytest.raises(AudioError, match=message):
        WavWriter(tmp_path / name, 24_000)


def test_unusable_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 16_000, subtype="FLOAT")
    cases = {"missing.wav": "no audio file", "text.wav": "cannot be read", "empty.wav": "no samples", "nan.wav": "NaN"}
    for name, message in cases.items():
        with pytest.raises(AudioError, match=message) as error:
            read_audio(tmp_path / name, 16_000)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (tone(0.05), "0.05 s long; allowed: 0.1 to 30 s; record more"),
        (tone(30.1), "split it"),
        (np.zeros(16_000, np.float32), "silent"),
        (np.zeros((2, 16_000), np.float32), "mono"),
        (np.full(16_000, np.inf, np.float32), "infinite"),
    ],
)
def test_what_cannot_be_a_question_is_refused(samples, message):
    with pytest.raises(AudioError, match=message):
        check_question(samples, 16_000)


def test_quiet_and_short_questions_are_allowed():
    assert len(check_question(0.01 * tone(0.1), 16_000)) == 1600


@pytest.mark.parametrize("bins", [80, 128])
def test_whisper_mel_is_whispers(bins):
    wave = torch.randn(2, 20_000) * torch.linspace(0.01, 1, 20_000)
    extractor = WhisperFeatureExtractor(feature_size=bins)
    for own, row in zip(log_mel_whisper(wave, bins), wave, strict=True):
        theirs = extractor(row.numpy(), sampling_rate=16_000, return_tensors="np", padding="do_not_pad")
        assert np.abs(own.numpy() - theirs["input_features"][0]).max() < 1e-4


def test_vocoder_mel_is_cosyvoices():
    wave = tone(1.0, 24_000) + 0.01 * torch.randn(24_000).numpy()
    filters = mel_filter_bank(961, 80, 0.0, 8000.0, 24_000, norm="slaney", mel_scale="slaney").T
    assert np.abs(filters - mel_filters(24_000, 1920, 80, 8000.0).numpy()).max() < 1e-7
    padded = np.pad(wave, 720, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1920) / 1920)
    frames = np.stack([padded[480 * i : 480 * i + 1920] * window for i in range(50)])
    theirs = np.log(np.maximum(np.abs(np.fft.rfft(frames)) @ filters.T, 1e-5))
    own = mel_24k(torch.from_numpy(wave))
    assert own.shape == (50, 80)
    assert np.abs(own.numpy() - theirs).max() < 1e-2  # the floor under the square root shows in the emptiest bands
    assert torch.allclose(mel_24k(torch.from_numpy(wave).repeat(2, 1))[1], own)


@settings(max_examples=15, deadline=None)
@given(st.integers(201, 40_000), st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.integers(0, 99))
def test_features_of_pieces_equal_features_of_the_whole(samples, pieces, seed):
    wave = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    streaming, start, index = StreamingFeatures(), 0, 0
    while start < samples:
        step = pieces[index % len(pieces)]
        streaming.push(wave[start : start + step])
        start, index = start + step, index + 1
    assert torch.allclose(streaming.finish(), question_features(wave), atol=1e-4)


def test_a_longer_question_leaves_earlier_frames_unchanged():
    wave = torch.from_numpy(tone(2.0))
    short, long = StreamingFeatures(), StreamingFeatures()
    short.push(wave[:16_000])
    long.push(wave)
    assert short.frames > 95
    assert torch.equal(short._log10[:, : short.frames], long._log10[:, : short.frames])


def test_question_features_are_whispers_on_levelled_audio_with_silence():
    wave = torch.from_numpy(tone(1.03))
    features = question_features(wave)
    assert features.shape == (80, 170)  # 1.03 + 0.6 s, up to a tenth of a second
    reference = log_mel_whisper(torch.nn.functional.pad(wave, (0, 170 * 160 - len(wave))))
    assert torch.allclose(features - features.max(), reference - reference.max(), atol=1e-5)
    assert torch.allclose(question_features(0.1 * wave), features, atol=1e-3)  # loudness carries no meaning


def test_thirty_seconds_fit_and_more_is_refused():
    longest = round(MAX_QUESTION_S * QUESTION_RATE_HZ)
    assert question_features(torch.randn(longest)).shape == (80, 3000)
    with pytest.raises(AudioError, match="split it"):
        question_features(torch.randn(longest + 1))
