"""The load bench: its accounts of latency and gaps, and a small run against the tiny model."""

import asyncio

import pytest
import soundfile

pytest.importorskip("starlette", reason="the server needs the extra 'serve'")
pytest.importorskip("openai", reason="its client helps here")

from tests.realtime import serving
from tests.test_session import RATE, speech
from tests.tiny_model import tiny_model
from vocalnet.bench.server import (
    Interruption,
    Interruptions,
    Level,
    LoadConfig,
    Turn,
    _account,
    format_load,
    measure,
    measure_interruptions,
    plot_load,
)
from vocalnet.errors import ConfigError


def test_gaps_are_counted_as_a_player_meets_them():
    steady = _account([(10.0, 0.5), (10.2, 0.5), (10.9, 0.5)], ended=9.5, done=11.0)
    assert steady == Turn(first_audio_s=0.5, late_s=0.0, total_s=1.5, audio_s=1.5)
    late = _account([(10.0, 0.5), (10.7, 0.5), (11.3, 0.5), (11.6, 0.5)], ended=9.5, done=12.0)
    assert late.late_s == pytest.approx(0.3), "0.2 s before the second chunk, 0.1 s more before the third"


def test_a_level_reports_percentiles_and_when_real_time_breaks():
    level = Level(2, [Turn(0.3 + 0.1 * i, 0.1, 0.0, 1.0, 2.0) for i in range(5)])
    row = level.row()
    assert (row["first_audio_ms_median"], row["first_audio_ms_p95"]) == (400.0, 580.0)
    assert (row["rtf_median"], row["vad_wait_ms_median"]) == (0.5, 100.0)
    assert not level.broken
    level.turns[0].late_s = 0.04
    assert level.broken
    assert Level(9, refused=9).broken
    with pytest.raises(ConfigError):
        LoadConfig("mini", ())


def test_sessions_at_once_and_one_too_many(tmp_path):
    soundfile.write(tmp_path / "q.wav", speech(0.4), RATE)
    config = LoadConfig("tiny", (tmp_path / "q.wav",), turns=2)
    with serving(tiny_model(max_text_tokens=5), max_sessions=2) as (address, _):
        url = f"ws://{address}/v1/realtime"
        level = asyncio.run(measure(url, config, 3))
        detected = asyncio.run(measure(url, LoadConfig("tiny", config.questions, turns=1), 1, detect_turns=True))
    assert (len(level.turns), level.refused, level.failed) == (4, 1, 0)
    assert all(0 < turn.first_audio_s < turn.total_s for turn in level.turns)
    assert detected.turns[0].vad_wait_s >= 0.45, "the silence that server_vad waits for"
    report = {"levels": [level.row()], "server_vad": detected.row(), "interruptions": Interruptions(2).row()}
    assert len(format_load(report).splitlines()) == 6
    plot_load(report, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_interruptions_are_timed_from_their_detection(tmp_path):
    row = Interruptions(2, [Interruption(0.6, 0.002, -0.1), Interruption(0.7, 0.004, 0.003)], too_late=1).row()
    assert (row["interruptions"], row["too_late"], row["sound_after"]) == (2, 1, 1)
    assert (row["detected_ms_median"], row["cancelled_ms_median"], row["last_audio_ms_median"]) == (650, 3, -48.5)
    soundfile.write(tmp_path / "q.wav", speech(0.8), RATE)
    config = LoadConfig("tiny", (tmp_path / "q.wav",), turns=1, max_sessions=2)
    with serving(tiny_model(max_text_tokens=96)) as (address, _):
        cut = asyncio.run(measure_interruptions(f"ws://{address}/v1/realtime", config))
    assert (len(cut.cut), cut.too_late, cut.failed) == (2, 0, 0)
    assert all(one.detected_s >= 0.5 for one in cut.cut), "what is shorter is an acknowledgement"
    assert all(one.cancelled_s >= 0 >= one.last_audio_s for one in cut.cut)
