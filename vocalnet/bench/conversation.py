"""`vocalnet bench`: what a conversation costs on this machine. Ratios and medians of one run; timings are noisy."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ, check_question, read_audio
from vocalnet.bench.report import machine, peak_memory_gb
from vocalnet.errors import AudioError
from vocalnet.model import VocalNet
from vocalnet.session import AudioChunk, Summary
from vocalnet.speaker import Speaker

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
LONG_CHUNKS = 44  # so that the 40th chunk has neighbours on both sides
LONG_RUNS = 5
LONG_TEXT = (
    "The capital of France is Paris and the capital of Italy is Rome. There are seven days in a week and twelve months "
    "in a year. A spider has eight legs and a horse has four legs. Water turns into ice when it gets very cold. "
)


def run_bench(source: str, questions: list[Path], repeats: int) -> dict[str, Any]:
    """Runs all measurements.

    Raises:
        AudioError: no question was given and there is no example.
    """
    questions = questions or sorted(EXAMPLES.glob("*.wav"))
    if not questions:
        raise AudioError("no questions to ask; give sound files with --questions")
    since = time.perf_counter()
    model = VocalNet.load(source)
    loading_s = time.perf_counter() - since
    report: dict[str, Any] = {"machine": machine(), "model": model.config.name, "load_s": round(loading_s, 2)}
    report["latency"] = latency(model, questions, repeats)
    report["text_tokens_per_s"] = round(text_speed(model), 1)
    report["long_answer"] = long_answer(model)
    report["peak_memory_gb"] = round(peak_memory_gb(), 2)
    return report


def latency(model: VocalNet, questions: list[Path], repeats: int) -> dict[str, Any]:
    """Each question asked `repeats` times in a fresh conversation, the whole question given at once.

    First audio runs from the end of the question to the first waveform chunk in hand. A player that starts at the first
    chunk must never wait: `late_ms` is the worst delay of a later chunk behind its playing time.
    """
    summaries: list[Summary] = []
    late_ms = 0.0
    for index in range(repeats + 1):  # the first round warms up
        for question in questions:
            samples = check_question(read_audio(question, QUESTION_RATE_HZ), QUESTION_RATE_HZ)
            session = model.session(seed=index)
            session.push_audio(samples, QUESTION_RATE_HZ, work_ahead=False)
            summary, late = _ask(session)
            if index:
                summaries.append(summary)
                late_ms = max(late_ms, late)
    first = [summary.first_audio_ms for summary in summaries]
    stages = summaries[0].stages_ms
    return {
        "answers": len(summaries),
        "first_audio_ms_median": round(statistics.median(first), 1),
        "first_audio_ms_p95": round(float(np.percentile(first, 95)), 1),
        "rtf_median": round(statistics.median(summary.rtf for summary in summaries), 3),
        "late_ms_worst": round(late_ms, 1),
        "stages_ms_median": {
            stage: round(statistics.median(summary.stages_ms[stage] for summary in summaries), 1) for stage in stages
        },
        "audio_s_median": round(statistics.median(summary.audio_s for summary in summaries), 2),
        "tokens_per_step_median": statistics.median(summary.tokens_per_step for summary in summaries),
    }


def _ask(session: Any) -> tuple[Summary, float]:
    """One answer's summary, and how late (ms) a chunk came behind a player that started with the first."""
    first, played_s, late_s = 0.0, 0.0, 0.0
    for piece in session.respond():
        if isinstance(piece, AudioChunk):
            now = time.perf_counter()
            first = first or now
            late_s = max(late_s, now - first - played_s)
            played_s += len(piece.samples) / ANSWER_RATE_HZ
        elif isinstance(piece, Summary):
            return piece, 1000 * late_s
    raise AssertionError("respond ends with a summary")


@torch.inference_mode()
def text_speed(model: VocalNet, tokens: int = 96) -> float:
    """Text tokens per second of the backbone alone, greedy, from a short prompt; median of three."""
    speeds = []
    for _ in range(3):
        state = model.backbone.init_state(tokens + 64)
        hidden = model.backbone.prefill(model.backbone.embed(model.prompt.text_ids("Tell me a story.")), state)
        token = int(model.backbone.logits(hidden[:, -1]).argmax())
        since = time.perf_counter()
        for _ in range(tokens):
            _, logits = model.backbone.step(token, state)
            token = int(logits.argmax())
        speeds.append(tokens / (time.perf_counter() - since))
    return statistics.median(speeds)


@torch.inference_mode()
def long_answer(model: VocalNet) -> dict[str, Any]:
    """Cost of each chunk (5 text tokens, 15 speech tokens, their sound) over one long given text; medians over runs."""
    chunk = model.speech_decoder.config.text_chunk
    ids = model.prompt.answer_ids(LONG_TEXT * 10)[: LONG_CHUNKS * chunk]
    generation = replace(model.config.generation, max_text_tokens=len(ids))
    runs = [_chunk_costs(model, generation, ids) for _ in range(LONG_RUNS)]
    costs = np.median(np.array([run[: LONG_CHUNKS - 1] for run in runs]), axis=0)
    return {
        "chunks": len(costs),
        "chunk_2_ms": round(float(costs[1]), 1),
        "chunk_40_ms": round(float(costs[39]), 1),
        "chunk_40_over_2": round(float(costs[38:41].mean() / costs[1:4].mean()), 3),
        "audio_per_chunk_ms": 1000 * model.speech_decoder.config.speech_chunk / 25,
    }


def _chunk_costs(model: VocalNet, generation: Any, ids: list[int]) -> list[float]:
    """Milliseconds of each chunk of one long answer."""
    backbone, decoder = model.backbone, model.speech_decoder
    state = backbone.init_state(len(ids) + 64)
    backbone.prefill(backbone.embed(model.prompt.text_ids("Tell me a story.")), state)
    speaker = Speaker(model, generation, torch.Generator().manual_seed(0))
    costs, position = [], 0
    while position < len(ids):
        since = time.perf_counter()
        size = decoder.config.text_chunk - (position == 0)
        rows = []
        for token in ids[position : position + size]:
            hidden, _ = backbone.step(token, state)
            rows.append(model.text_rows(hidden, [token]))
        position += size
        speaker.add_text(torch.cat(rows), last=False)
        for _ in speaker.speak():
            pass
        costs.append(1000 * (time.perf_counter() - since))
    return costs
