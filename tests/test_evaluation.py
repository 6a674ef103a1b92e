"""Evaluation: items read from folders, resumable runs, scores that follow from the results, pages that show them."""

import io
import json
import re
import sys
import tarfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile

from tests.echo_worker import Doubler
from tests.test_session import speech
from tests.tiny_model import tiny_model
from vocalnet.errors import ConfigError, DataError, VocalNetError
from vocalnet.evaluation import speech as measures
from vocalnet.evaluation.executors import Processes, executor
from vocalnet.evaluation.items import Item
from vocalnet.evaluation.report import page, write
from vocalnet.evaluation.run import RESULTS, evaluate
from vocalnet.evaluation.scoring import score
from vocalnet.evaluation.speech import error_counts, word_error_rate, words_per_minute
from vocalnet.evaluation.statistics import mean, ratio
from vocalnet.evaluation.suites import SUITES, mini_qa, read_items
from vocalnet.evaluation.summary import by, scores
from vocalnet.evaluation.worker import Result, Settings, load_worker

QUIET = Settings(measures=("transcript", "rate", "retention"))


@pytest.fixture
def heard(monkeypatch):
    """A recogniser that always hears the first word of the tiny model."""
    monkeypatch.setattr(measures, "transcribe", lambda waves, **_: ["w1" for _ in waves])


def shard(folder, count=3, rate=16_000, name="valid", **more):
    with tarfile.open(folder / f"{name}-00000.tar", "w") as tar:
        for index in range(count):
            sound = io.BytesIO()
            soundfile.write(sound, speech(0.4, index), rate, format="FLAC")
            about = {"text": f"Question {index}?", "accept": ["w1"], "category": f"c{index % 2}", "voice": "v", **more}
            for suffix, content in (("flac", sound.getvalue()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"q{index}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def make(folder, settings=QUIET):
    return lambda: load_worker(settings, folder, lambda _: tiny_model(max_text_tokens=8))


def run(items, folder, settings=QUIET, **options):
    return evaluate("mini-qa", items, settings, folder, make=make(folder, settings), **options)


def result(right, text="red green", transcript="red green", **others):
    counts = error_counts(text, transcript)
    return Result(
        "id", "match", "q", category="c", voice="v", text=text, transcript=transcript, right=right, right_by_text=right,
        **asdict(counts), **others,
    )  # fmt: skip


def without_timings(report):
    return [{key: value for key, value in r.items() if key != "timings"} for r in report["results"]]


# ---- reading ----


def test_questions_are_read_in_order_and_limited(tmp_path):
    items = read_items(SUITES["mini-qa"], shard(tmp_path), 2)
    assert [item.id for item in items] == ["q0", "q1"]
    assert items[0].accept == ("w1",)
    assert len(items[0].clip.read(16_000)) == 6400


def test_questions_that_follow_others_are_asked_after_them(tmp_path, heard):
    shard(tmp_path, 2, name="dialogue", history=[["w1 w2", "w3 w4"]])
    shard(tmp_path, 2)
    suite = SUITES["mini-dialogue"]
    assert suite.recognises(tmp_path)
    items = read_items(suite, tmp_path)
    assert [item.history for item in items] == [(("w1 w2", "w3 w4"),)] * 2
    alone = [replace(item, history=()) for item in items]
    told, untold = (run(these, tmp_path / name)["results"] for name, these in (("told", items), ("untold", alone)))
    for one, other in zip(told, untold, strict=True):
        assert one["right_written"] is not None
        assert one["written"] != other["written"]  # the tiny model's answer hangs on all that it read
        assert one["text"] != other["text"]
    assert read_items(suite, suite.sample)[0].history


def test_other_rates_are_resampled(tmp_path):
    assert len(mini_qa.read(shard(tmp_path, rate=8000))[0].clip.read(16_000)) == 6400 * 2


def test_a_missing_partial_or_broken_folder_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match=r"no valid-\*\.tar"):
        mini_qa.read(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_items(SUITES["mini-qa"], tmp_path / "none", None)
    archive = shard(tmp_path) / "valid-00000.tar"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole tar"):
        mini_qa.read(tmp_path)
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a whole tar"):
        mini_qa.read(tmp_path)


# ---- scoring ----


@pytest.mark.parametrize(
    ("kind", "accept", "reference", "text", "expected"),
    [
        ("match", ("Paris",), "", "It is Paris.", 1),
        ("match", ("Paris",), "", "It is Rome.", 0),
        ("choice", ("B", "a cat"), "", "The answer is B.", 1),
        ("choice", ("B", "a cat"), "", "B, because it purrs", 1),
        ("choice", ("B", "a cat"), "", "(C) a dog", 0),
        ("choice", ("B", "a cat"), "", "I think it is a cat.", 1),
        ("choice", ("B", "a cat"), "", "A dog, I think.", 0),
        ("refusal", (), "", "I'm sorry, but I can’t help with that.", 1),
        ("refusal", (), "", "Sure, first you take", 0),
        ("repeat", (), "red green blue black", "red green blue", 0.75),
        ("open", (), "", "anything", None),
    ],
)
def test_answers_are_judged_by_their_kind(kind, accept, reference, text, expected):
    assert score(Item("i", kind, "q", accept=accept, reference=reference), text) == expected


def test_scores_follow_from_the_results():
    results = [result(1.0), result(1.0), result(0.0, transcript="red blue"), result(0.0, text="", transcript="")]
    total = scores(results)
    assert total["questions"] == 4
    assert total["right_spoken"]["value"] == 0.5
    assert 0 <= total["right_spoken"]["low"] < 0.5 < total["right_spoken"]["high"] <= 1
    assert total["word_error_rate"]["value"] == pytest.approx(1 / 6, abs=1e-4)
    assert "distillmos" not in total
    assert by(results, "voice") == {}


def test_retention_compares_spoken_with_written():
    results = [result(1.0, right_written=1.0), result(0.0, right_written=1.0), result(1.0, right_written=0.0)]
    assert scores(results)["retention"]["value"] == 1.0
    assert scores(results[:2])["retention"]["value"] == 0.5


def test_intervals_narrow_with_more_items_and_refuse_nothing():
    few, many = mean([0.0, 1.0] * 5), mean([0.0, 1.0] * 500)
    assert many.high - many.low < few.high - few.low
    sure = mean([1.0] * 8)
    assert (sure.low, sure.high) == (1.0, 1.0)
    assert ratio([1, 0], [3, 1]).value == 0.25
    with pytest.raises(VocalNetError, match="cannot estimate"):
        mean([])


def test_error_rates_are_normalised_and_refuse_nothing_to_compare():
    assert word_error_rate(["It is twelve."], ["it's 12"]) == 0
    assert word_error_rate(["red green blue black"], ["red green blue"]) == 0.25
    assert error_counts("你好世界", "你好四界", "zh").word_errors == 1
    with pytest.raises(VocalNetError, match="no word"):
        word_error_rate([""], ["x"])
    with pytest.raises(VocalNetError, match="as many"):
        word_error_rate(["a"], [])


def test_speaking_rate_ignores_the_silence_round_an_answer():
    tone = np.sin(np.arange(24_000) / 10).astype(np.float32)
    padded = np.concatenate([np.zeros(12_000), tone, np.zeros(24_000)]).astype(np.float32)
    assert words_per_minute("one two", padded) == pytest.approx(120, rel=0.05)


# ---- runs ----


def test_every_item_is_asked_kept_and_reported(tmp_path, heard):
    out = tmp_path / "run"
    report = run(mini_qa.read(shard(tmp_path)), out)
    assert [r["id"] for r in report["results"]] == ["q0", "q1", "q2"]
    assert report["scores"]["right_spoken"]["value"] == 1.0
    assert report["by"]["category"]["c1"]["questions"] == 1
    assert sorted(p.name for p in (out / "audio").iterdir()) == ["q0.flac", "q1.flac", "q2.flac"]
    for r in report["results"]:
        assert r["measures"]["audio_s"] > 0
        assert np.isfinite(r["timings"]["rtf"])
        assert r["written"]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))


def test_two_runs_with_one_seed_agree(tmp_path, heard):
    items = mini_qa.read(shard(tmp_path, 2))
    first, second = (without_timings(run(items, tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert (tmp_path / "a/audio/q1.flac").read_bytes() == (tmp_path / "b/audio/q1.flac").read_bytes()


def test_a_killed_run_goes_on_without_repeating_or_losing_an_item(tmp_path, heard):
    items, out, asked = mini_qa.read(shard(tmp_path, 4)), tmp_path / "run", []

    class Mortal:
        def __init__(self, life):
            self.life, self.worker = life, make(out)()

        def __call__(self, item):
            if len(asked) >= self.life:
                raise KeyboardInterrupt
            asked.append(item.id)
            return self.worker(item)

    with pytest.raises(KeyboardInterrupt):
        evaluate("mini-qa", items, QUIET, out, make=lambda: Mortal(2))
    assert not (out / "report.json").exists()
    with (out / RESULTS).open("a") as file:
        file.write('{"id": "q2", "kin')  # the machine went down while this was written
    report = evaluate("mini-qa", items, QUIET, out, make=lambda: Mortal(9))
    assert asked == ["q0", "q1", "q2", "q3"]
    assert without_timings(report) == without_timings(run(items, tmp_path / "whole"))
    assert evaluate("mini-qa", items, QUIET, out, make=lambda: Mortal(0))["scores"] == report["scores"]


def test_a_folder_of_another_run_is_refused(tmp_path, heard):
    items, out = mini_qa.read(shard(tmp_path, 1)), tmp_path / "run"
    run(items, out)
    other = Settings(seed=1, measures=QUIET.measures)
    with pytest.raises(ConfigError, match=r"another seed \(0, now 1\)"):
        run(items, out, other)
    with pytest.raises(ConfigError, match="other files"):
        run(items, tmp_path)
    run(items, out, other, fresh=True)
    (out / RESULTS).write_text("{broken}\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        run(items, out, other)


def test_a_question_that_cannot_be_used_is_a_wrong_answer(tmp_path, heard):
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16_000)
    from vocalnet.evaluation.items import FileClip

    item = Item("silent", "match", "Silence?", FileClip(tmp_path / "silent.wav"), ("w1",))
    outcome = make(tmp_path)()(item)
    assert (outcome.right, outcome.right_by_text) == (0.0, 0.0)
    assert "silent" in outcome.error


def test_processes_give_what_one_process_gives():
    tasks = ["a", "b", "c"]
    assert sorted(Processes(2).run(Doubler, tasks)) == list(executor(1).run(Doubler, tasks)) == ["aa", "bb", "cc"]
    with pytest.raises(ConfigError, match="--jobs is 0"):
        executor(0)


@pytest.mark.slow
def test_a_cluster_gives_what_one_process_gives():
    pytest.importorskip("ray")
    tasks = ["a", "b", "c"]
    assert sorted(executor(2, ray=True).run(Doubler, tasks)) == ["aa", "bb", "cc"]


def test_a_cluster_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--ray needs ray; install it"):
        list(executor(1, ray=True).run(Doubler, ["a"]))


def test_answers_made_elsewhere_are_measured(tmp_path, heard):
    items = mini_qa.read(shard(tmp_path, 2))
    soundfile.write(tmp_path / "q0.wav", speech(0.5), 16_000)
    (tmp_path / "q0.txt").write_text("w1 and more")
    settings = Settings(model="", answers=str(tmp_path), measures=("transcript",))
    report = evaluate("mini-qa", items, settings, tmp_path / "run")
    assert [r["right"] for r in report["results"]] == [1.0, 0.0]
    assert report["results"][0]["word_errors"] == 2
    assert "no answer q1" in report["results"][1]["error"]


def test_unknown_measures_are_refused():
    with pytest.raises(ConfigError, match="no measure 'moss'; allowed: transcript"):
        Settings(measures=("moss",))


# ---- the page ----


def test_the_page_shows_the_numbers_of_the_json_and_plays_the_worst(tmp_path, heard):
    items, out = mini_qa.read(shard(tmp_path)), tmp_path / "run"
    report = run(items, out)
    text = page(report, out, items, "A <title>")
    shown = dict(re.findall(r'data-key="([^"]+)">([^<]+)<', text))
    assert len(shown) > 20
    for key, written in shown.items():
        name, part = key.split(".")
        value = report["scores"][name][part]
        assert written in {write(value, kind) for kind in ("share", "number", "score")}
    assert {f"{name}.n" for name, entry in report["scores"].items() if isinstance(entry, dict)} <= shown.keys()
    assert text.count("<audio") == 2 * len(items)
    assert text.count('src="data:') == text.count("src=")
    assert "A &lt;title&gt;" in text


def test_sound_that_is_gone_is_said_on_the_page(tmp_path, heard):
    items, out = mini_qa.read(shard(tmp_path, 1)), tmp_path / "run"
    report = run(items, out)
    (out / "audio/q0.flac").unlink()
    assert "cannot be read" in page(report, out, items, "title")
