"""Evaluation: questions read as data preparation wrote them, scores that follow from the results."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from tests.test_session import speech
from tests.tiny_model import tiny_model
from vocalnet.errors import DataError, VocalNetError
from vocalnet.evaluation import spoken_qa
from vocalnet.evaluation.speech import word_error_rate
from vocalnet.evaluation.spoken_qa import Result, by, evaluate, interval, read_questions, scores


def shard(folder, count=3, rate=16_000):
    with tarfile.open(folder / "valid-00000.tar", "w") as tar:
        for index in range(count):
            sound = io.BytesIO()
            soundfile.write(sound, speech(0.4, index), rate, format="FLAC")
            about = {"text": f"Question {index}?", "accept": ["w1"], "category": f"c{index % 2}", "voice": "v"}
            for suffix, content in (("flac", sound.getvalue()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"q{index}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def result(right, text="a b", transcript="a b", category="c"):
    return Result("id", "q", category, "v", text, transcript, right, right, 4.0, 1.0, 300.0, 0.3)


def test_questions_are_read_in_order_and_limited(tmp_path):
    shard(tmp_path)
    questions = read_questions(tmp_path, limit=2)
    assert [q.id for q in questions] == ["q0", "q1"]
    assert questions[0].accept == ("w1",)
    assert len(questions[0].samples) == 6400


def test_missing_or_foreign_questions_are_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"no valid-\*\.tar"):
        read_questions(tmp_path)
    shard(tmp_path, rate=8000)
    with pytest.raises(DataError, match="8000 Hz"):
        read_questions(tmp_path)


def test_scores_follow_from_the_results():
    results = [result(True), result(True), result(False, transcript="a c"), result(False, text="", transcript="")]
    total = scores(results)
    assert total["questions"] == 4
    assert total["right_spoken"] == 0.5
    assert total["word_error_rate"] == pytest.approx(1 / 6, abs=1e-4)
    assert total["distillmos"] == 4.0
    low, high = total["right_spoken_95"]
    assert 0 <= low < 0.5 < high <= 1
    assert by(results, "voice") == {"v": (4, 0.5)}


def test_the_interval_narrows_with_more_questions():
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 500)
    assert many[1] - many[0] < few[1] - few[0]
    assert interval([1.0] * 8) == (1.0, 1.0)


def test_word_error_rate_is_normalised_and_refuses_nothing_to_compare():
    assert word_error_rate(["It is twelve."], ["it's 12"]) == 0
    assert word_error_rate(["red green blue black"], ["red green blue"]) == 0.25
    with pytest.raises(VocalNetError, match="no word"):
        word_error_rate([""], ["x"])
    with pytest.raises(VocalNetError, match="as many"):
        word_error_rate(["a"], [])


def test_every_question_is_answered_and_kept(tmp_path, monkeypatch):
    shard(tmp_path)
    monkeypatch.setattr(spoken_qa, "transcribe", lambda waves: ["w1" for _ in waves])
    model = tiny_model()
    (tmp_path / "audio").mkdir()
    results = list(
        evaluate(model, read_questions(tmp_path), model.config.generation, tmp_path / "audio", with_mos=False)
    )
    assert [r.right for r in results] == [True] * 3
    assert sorted(p.name for p in (tmp_path / "audio").iterdir()) == ["q0.wav", "q1.wav", "q2.wav"]
    assert all(np.isfinite(r.rtf) and r.audio_s > 0 for r in results)
