"""The command line: help with examples, JSON, and bad input as one line with status 2."""

import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from tests.test_session import RATE, speech
from tests.tiny_model import tiny_model
from vocalnet import cli
from vocalnet.decoding import DecodingMode
from vocalnet.model import VocalNet


@pytest.fixture
def tiny(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(VocalNet, "load", classmethod(lambda cls, source="mini", precision=None: model))
    return model


def run(monkeypatch, capsys, *arguments):
    """Runs main as the shell would; returns status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["vocalnet", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


def question(folder, name="question.wav", samples=None):
    soundfile.write(folder / name, speech() if samples is None else samples, RATE)
    return folder / name


COMMANDS = ["chat", "train", "prepare", "pack", "bench", "eval", "talk", "demo", "serve", "replay", "info"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: vocalnet {command}" in " ".join(result.output.split())


def test_every_decoding_can_be_chosen():
    optional, _ = get_args(cli.DecodingOption)
    assert get_args(optional)[0] == DecodingMode


def test_chat_writes_the_answer_and_prints_one_object_a_question(tiny, tmp_path, monkeypatch, capsys):
    files = [question(tmp_path, "a.wav"), question(tmp_path, "b.wav", speech(0.7, 1))]
    status, out, _ = run(monkeypatch, capsys, "chat", *files, "--out", tmp_path / "answers", "--json")
    assert status == 0
    records = [json.loads(line) for line in out.splitlines()]
    keys = [
        "input",
        "text",
        "audio",
        "audio_s",
        "first_audio_ms",
        "total_ms",
        "rtf",
        "speech_tokens",
        "tokens_per_step",
        "stages_ms",
    ]
    assert [list(record) for record in records] == [keys, keys]
    for record, file in zip(records, files, strict=True):
        assert record["input"] == str(file)
        samples, rate = soundfile.read(record["audio"])
        assert rate == 24_000
        assert abs(len(samples) / rate - record["audio_s"]) < 0.01
        assert np.abs(samples).max() > 0


def test_chat_reads_stereo_and_other_rates(tiny, tmp_path, monkeypatch, capsys):
    stereo = np.stack([speech(rate=8000), speech(rate=8000)], axis=1)
    soundfile.write(tmp_path / "phone.wav", stereo, 8000)
    status, out, _ = run(monkeypatch, capsys, "chat", tmp_path / "phone.wav", "--out", tmp_path / "x.wav", "--json")
    assert status == 0
    assert json.loads(out)["audio_s"] > 0


def test_a_bad_file_among_good_ones_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    good, silent = question(tmp_path, "good.wav"), question(tmp_path, "silent.wav", np.zeros(RATE, np.float32))
    last = question(tmp_path, "last.wav")
    status, out, err = run(monkeypatch, capsys, "chat", good, silent, last, "--out", tmp_path / "answers", "--json")
    assert status == 2
    assert len(out.splitlines()) == 2
    assert err.startswith(f"error: {silent}: the question is silent")
    made = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert made == ["good.answer.wav", "last.answer.wav"], "no empty or temporary file"


BAD = {
    "missing": (lambda f: f / "none.wav", "no audio file"),
    "text": (lambda f: (f / "t.wav").write_text("not audio") and f / "t.wav", "cannot be read as audio"),
    "empty": (lambda f: question(f, samples=np.zeros(0, np.float32)), "holds no samples"),
    "short": (lambda f: question(f, samples=speech(0.05)), "0.05 s long"),
    "long": (lambda f: question(f, samples=speech(31)), "31.00 s long"),
    "silent": (lambda f: question(f, samples=np.zeros(RATE, np.float32)), "silent"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_questions_are_one_line(tiny, tmp_path, monkeypatch, capsys, kind):
    make, message = BAD[kind]
    status, out, err = run(monkeypatch, capsys, "chat", make(tmp_path), "--out", tmp_path / "answer.wav")
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "answer.wav").exists()


def test_bad_settings_are_one_line(tiny, tmp_path, monkeypatch, capsys):
    file = question(tmp_path)
    cases = [
        (["chat", file, "--mtp", "9", "--out", tmp_path / "x.wav"], "modules is 9"),
        (["chat", file, file, "--out", tmp_path / "x.wav"], "cannot share the output"),
        (["chat", file, "--out", file], "overwrite the question"),
        (["chat", file, "--out", tmp_path / "no" / "x.wav"], "no folder"),
        (["info", "--model", tmp_path / "no"], "no model"),
        (["train", tmp_path / "no.yaml"], "no.yaml"),
    ]
    for arguments, message in cases:
        status, _, err = run(monkeypatch, capsys, *arguments)
        assert status == 2, arguments
        assert message in err
        assert "Traceback" not in err


def test_a_full_disk_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    def full(self, samples):
        raise OSError(28, "No space left on device", "answer.wav")

    monkeypatch.setattr("vocalnet.audio.WavWriter.write", full)
    status, _, err = run(monkeypatch, capsys, "chat", question(tmp_path), "--out", tmp_path / "answer.wav")
    assert status == 2
    assert "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["question.wav"]


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "vocalnet.cli", "--help"], capture_output=True, text=True, check=True)
    assert "chat" in done.stdout
