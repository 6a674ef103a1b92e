"""The shipped mini model: it hears a question, answers it, and says the answer so that it is understood."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vocalnet.audio import QUESTION_RATE_HZ, read_audio
from vocalnet.decoding import generate_chunk
from vocalnet.evaluation.accept import is_right
from vocalnet.evaluation.answer import ask
from vocalnet.evaluation.seams import clicks, tail_db
from vocalnet.model import MINI, VocalNet
from vocalnet.parts import read_json
from vocalnet.sampling import SamplingConfig

ROOT = Path(__file__).parent.parent
QUESTIONS = {"question.wav": ["paris"], "question-2.wav": ["eight"]}


@pytest.fixture(scope="module")
def mini():
    return VocalNet.load("mini")


@pytest.fixture(scope="module")
def answers(mini):
    torch.set_num_threads(2)
    found = {}
    for name in QUESTIONS:
        samples = read_audio(ROOT / "examples" / name, QUESTION_RATE_HZ)
        found[name] = ask(mini, samples, mini.config.generation)
    return found


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_right_and_understood(answers, name):
    from vocalnet.evaluation.speech import transcribe

    wave, summary = answers[name]
    assert is_right(summary.text, QUESTIONS[name]), summary.text
    heard = transcribe([wave])[0]
    assert is_right(heard, QUESTIONS[name]), heard


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_sound_is_clean(answers, name):
    wave, _ = answers[name]
    loud = np.sqrt(np.mean(wave**2))
    assert 0.01 < loud < 0.3
    assert tail_db(wave) < -26, "noise in the last 40 ms"


def test_chunk_edges_have_no_clicks(mini):
    """At the edges of chunks the waveform is as smooth as within them (second difference)."""
    session = mini.session()
    session.push_audio(read_audio(ROOT / "examples" / "question.wav", QUESTION_RATE_HZ), QUESTION_RATE_HZ)
    chunks = [piece.samples for piece in session.respond() if hasattr(piece, "samples")]
    edges = np.cumsum([len(chunk) for chunk in chunks])[:-1]
    assert len(edges) >= 2
    assert clicks(np.concatenate(chunks), edges) == 0


def test_streamed_sound_equals_offline(mini):
    session = mini.session()
    session.push_audio(read_audio(ROOT / "examples" / "question.wav", QUESTION_RATE_HZ), QUESTION_RATE_HZ)
    wave = np.concatenate([piece.samples for piece in session.respond() if hasattr(piece, "samples")])
    mel = mini.flow.mel(torch.tensor([session.speech_tokens]), streaming=True)
    offline = mini.vocoder(mel)[0].clamp(-1, 1).numpy()
    np.testing.assert_allclose(wave, offline, atol=1e-4)


def test_it_answers_without_kernels(tmp_path):
    """On PyTorch's operators alone, as on a machine without AVX-512 or a C compiler."""
    command = [sys.executable, "-m", "vocalnet.cli", "chat", "--json", "--out", str(tmp_path)]
    command += [str(ROOT / "examples" / name) for name in QUESTIONS]
    environment = {**os.environ, "VOCALNET_NATIVE": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    said = [json.loads(line) for line in result.stdout.splitlines()]
    for one, words in zip(said, QUESTIONS.values(), strict=True):
        assert is_right(one["text"], words), one["text"]
        assert one["audio_s"] > 1


def test_text_in_pieces_of_any_size_gives_the_same_tokens(mini):
    """Every row is computed alike in whatever company: int8 by the kernels, fp32 without them."""
    decoder, backbone = mini.speech_decoder, mini.backbone
    ids = mini.prompt.answer_ids("The capital of France is Paris, and a spider has eight legs.")
    hidden = backbone.prefill(backbone.embed(ids), backbone.init_state(len(ids)))[0]
    rows = mini.text_rows(hidden, ids)
    spoken = []
    for size in (1, 3, 5, len(ids)):
        state = decoder.init_state(len(ids) + 1, 400, 0)
        tokens: list[int] = []
        for first in range(0, len(ids), size):
            decoder.add_text(rows[first : first + size], state, last=first + size >= len(ids))
            while new := generate_chunk(decoder, state, SamplingConfig(), 15):
                tokens += new
        spoken.append(tokens)
    assert len(spoken[0]) > 60
    assert all(tokens == spoken[0] for tokens in spoken)


def test_the_card_says_where_the_weights_come_from():
    card = read_json(MINI / "card.json")
    assert {"data", "recipe", "commit", "seed", "scores", "licences"} <= set(card)
    assert 0 < card["scores"]["right_spoken"] <= 1
    size = sum(file.stat().st_size for file in MINI.rglob("*") if file.is_file())
    assert size <= 100e6


def test_the_readme_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    source = code.group(1)
    assert len(source.strip().splitlines()) <= 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "README.md", "exec"), {})
    assert len(read_audio(tmp_path / "answer.wav", 24_000)) > 24_000
