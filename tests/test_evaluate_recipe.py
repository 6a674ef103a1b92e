"""recipes/evaluate.py: every K and decoding mode, or every stage of copy synthesis; resumed, one table."""

import json

import numpy as np
import pytest
import soundfile
import torch

from recipes import evaluate as recipe
from tests.tiny_model import tiny_model
from vocalnet.audio import mel_24k
from vocalnet.evaluation import speech as measures
from vocalnet.model import VocalNet
from vocalnet.speech_tokenizer import SpeechTokenizer, TokenizerConfig


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    model = tiny_model(max_text_tokens=6)
    monkeypatch.setattr(VocalNet, "load", classmethod(lambda cls, source="mini", precision=None: model))
    monkeypatch.setattr(measures, "transcribe", lambda waves, **_: ["w1 w2" for _ in waves])


def run(tmp_path, *more):
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3\nw4 w5\tw1 w2\n\n")
    return recipe.main(
        ["tts", "--texts", str(texts), "--out", str(tmp_path / "out"), "--measures", "transcript,seams", *more]
    )


def test_every_setting_is_a_row_and_verified_drafts_change_nothing(tmp_path):
    assert run(tmp_path) == 0
    table = json.loads((tmp_path / "out/tts.json").read_text())
    assert [(row["mtp"], row["decoding"]) for row in table["rows"]] == [
        (0, "accept-all"), (1, "accept-all"), (1, "verified"), (2, "accept-all"), (2, "verified"),
    ]  # fmt: skip
    rows = {row["folder"]: row["scores"] for row in table["rows"]}
    assert rows["k0-accept-all"]["tokens_per_step"]["value"] <= 1
    assert rows["k2-accept-all"]["tokens_per_step"]["value"] > 2
    plain, verified = (tmp_path / "out" / name / "audio" for name in ("k0-accept-all", "k2-verified"))
    assert all((verified / file.name).read_bytes() == file.read_bytes() for file in plain.iterdir())
    for row, scores in enumerate(rows.values()):
        wanted = f'data-key="{row}.rtf">{recipe.shown(scores, "rtf")}<'
        assert wanted in (tmp_path / "out/tts.html").read_text()


def test_it_goes_on_where_it_stopped(tmp_path):
    run(tmp_path, "--mtp", "0")
    before = (tmp_path / "out/k0-accept-all/results.jsonl").read_bytes()
    run(tmp_path, "--mtp", "0", "1", "--decoding", "accept-all")
    assert (tmp_path / "out/k0-accept-all/results.jsonl").read_bytes() == before
    assert len(json.loads((tmp_path / "out/tts.json").read_text())["rows"]) == 2


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, samples in (("a", 9600), ("b", 12000)):
        soundfile.write(folder / f"{name}.wav", 0.1 * generator.standard_normal(samples), 24_000)
        (folder / f"{name}.txt").write_text("w1 w2")
    return folder


def copy(tmp_path, folder, *more):
    return recipe.main(["copy", "--speech", str(folder), "--out", str(tmp_path / "out"), *more])


def test_copies_pass_one_stage_after_the_other(tmp_path, recordings, monkeypatch):
    sizes = TokenizerConfig(levels=(4, 5, 3), whisper_width=32, width=16, hidden=16, token_blocks=1, frame_blocks=1)
    tokenizer = SpeechTokenizer(sizes).eval()
    monkeypatch.setattr(recipe, "load_tokenizer", lambda source: tokenizer)
    assert copy(tmp_path, recordings, "--measures", "transcript") == 0
    table = json.loads((tmp_path / "out/copy.json").read_text())
    assert [row["title"] for row in table["rows"]] == ["recording", "vocoder", "tokens"]
    assert all(row["scores"]["word_error_rate"]["value"] == 0 for row in table["rows"])
    waves = {
        row["folder"]: soundfile.read(tmp_path / "out" / row["folder"] / "audio/a.flac")[0] for row in table["rows"]
    }
    original, _ = soundfile.read(recordings / "a.wav")
    assert np.abs(waves["recording"] - original).max() < 1e-3
    model = VocalNet.load("mini")
    samples = torch.from_numpy(original).float()
    tokens = tokenizer.encode_wave(samples, model.encoder)
    expected = {"vocoder": mel_24k(samples)[None], "tokens": model.flow.mel(tokens[None])}
    with torch.inference_mode():
        for stage, mel in expected.items():
            np.testing.assert_allclose(waves[stage], model.vocoder(mel)[0].clamp(-1, 1).numpy(), atol=1e-3)
    assert "recording/report.html" in (tmp_path / "out/copy.html").read_text()


def test_copies_need_speech_and_a_tokenizer(tmp_path, recordings, capsys):
    assert recipe.main(["copy"]) == 2
    assert copy(tmp_path, tmp_path / "nothing") == 2
    (tmp_path / "model").mkdir()
    assert copy(tmp_path, recordings, "--model", str(tmp_path / "model")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all("--speech FOLDER" in error for error in errors[:2])
    assert "no speech_tokenizer in" in errors[2]


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    assert run(tmp_path, "--mtp", "9") == 2
    assert recipe.main(["tts", "--texts", str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "K = 9 is not possible: tiny has 2 MTP modules; give 0 to 2" in errors[0]
    assert "no file" in errors[-1]


def test_the_default_texts_are_the_answers_of_mini_qa():
    items = recipe.read_texts(None, 3)
    assert len(items) == 3
    assert all(item.question and item.reference for item in items)
