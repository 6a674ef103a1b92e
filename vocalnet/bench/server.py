"""`vocalnet bench server`: conversations at once, from this process to a server in another, until real time breaks.

Every client speaks in real time, commits, waits for the answer, and plays it in real time before its next question, as
a person would. First audio runs from the last sample of the question leaving here to the first sound arriving here.
At the end clients speak over their answers, and the time is taken until these have stopped.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vocalnet.audio import ANSWER_RATE_HZ, read_audio
from vocalnet.bench.report import machine
from vocalnet.errors import ConfigError, VocalNetError

PIECE_S = 0.1  # a microphone's message
START_S = 120.0  # for a server to load its model
ANSWER_S = 120.0  # for an answer
BROKEN = 0.05
"""Real time is broken where more than this part of the answers had a gap."""
SILENCE_MS = 500  # server_vad's
INTERRUPTERS = 4
"""Sessions that interrupt at once, or as many as the server takes: alone, an answer is often whole too soon."""
QUIET = 0.02  # of full scale: what precedes the first word of a question and follows the last


@dataclass(frozen=True)
class LoadConfig:
    """What to measure.

    Attributes:
        model: of the server.
        questions: sound files, asked in rotation.
        sessions: levels of load, ascending.
        turns: questions a session asks at each level.
        max_sessions: the server's limit; levels beyond it show refusals.
    """

    model: str
    questions: tuple[Path, ...]
    sessions: tuple[int, ...] = (1, 2, 4, 8)
    turns: int = 4
    max_sessions: int = 8

    def __post_init__(self) -> None:
        if not self.sessions or min(self.sessions) < 1 or self.turns < 1 or not self.questions:
            raise ConfigError("give at least one question, one turn, and levels of one session or more")


@dataclass
class Turn:
    """One answer, as its client saw it.

    Attributes:
        first_audio_s: from the end of the question.
        vad_wait_s: of that, until turn detection said that the question was over; 0 without turn detection.
        late_s: by how much the player waited for sound, at worst.
        total_s: from the end of the question to the end of the answer.
        audio_s: duration of the answer.
    """

    first_audio_s: float = 0.0
    vad_wait_s: float = 0.0
    late_s: float = 0.0
    total_s: float = 0.0
    audio_s: float = 0.0


@dataclass
class Interruption:
    """Speech over an answer that was being made, as its client saw it.

    Attributes:
        detected_s: from the speech's first sample leaving here to `speech_started` arriving here.
        cancelled_s: from then to the response's end.
        last_audio_s: from then to the answer's last sound; negative where all of it came before.
    """

    detected_s: float
    cancelled_s: float
    last_audio_s: float


@dataclass
class Interruptions:
    """All of them.

    Attributes:
        too_late: answers that were whole before the speech was detected; they count for nothing else.
    """

    sessions: int
    cut: list[Interruption] = field(default_factory=list)
    too_late: int = 0
    failed: int = 0

    def row(self) -> dict[str, Any]:
        """As reported: medians and 95th percentiles, in milliseconds; None where nothing was cut."""
        row: dict[str, Any] = {"sessions": self.sessions, "interruptions": len(self.cut)}
        row |= {"too_late": self.too_late, "failed": self.failed}
        for name in ("detected", "cancelled", "last_audio"):
            times = [1000 * getattr(one, f"{name}_s") for one in self.cut]
            row[f"{name}_ms_median"] = round(statistics.median(times), 1) if times else None
            row[f"{name}_ms_p95"] = round(float(np.percentile(times, 95)), 1) if times else None
        row["sound_after"] = sum(one.last_audio_s > 0 for one in self.cut)
        return row


@dataclass
class Level:
    """All sessions at one level of load."""

    sessions: int
    turns: list[Turn] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    @property
    def gaps(self) -> int:
        """Answers whose player ran dry."""
        return sum(turn.late_s > 0 for turn in self.turns)

    @property
    def broken(self) -> bool:
        return not self.turns or self.gaps > BROKEN * len(self.turns)

    def row(self) -> dict[str, Any]:
        """As reported: medians and 95th percentiles, in milliseconds."""
        first = [1000 * (turn.first_audio_s - turn.vad_wait_s) for turn in self.turns] or [float("nan")]
        return {
            "sessions": self.sessions,
            "answers": len(self.turns),
            "refused": self.refused,
            "failed": self.failed,
            "first_audio_ms_median": round(statistics.median(first), 1),
            "first_audio_ms_p95": round(float(np.percentile(first, 95)), 1),
            "vad_wait_ms_median": round(1000 * statistics.median([t.vad_wait_s for t in self.turns] or [0.0]), 1),
            "rtf_median": round(statistics.median([t.total_s / t.audio_s for t in self.turns] or [float("nan")]), 3),
            "underruns": self.gaps,
            "late_ms_worst": round(1000 * max([turn.late_s for turn in self.turns] or [0.0]), 1),
        }


class RefusedError(VocalNetError):
    """The server is full."""


class Caller:
    """One session: speaks, listens, plays."""

    def __init__(self, socket: Any, detect_turns: bool) -> None:
        self._socket = socket
        self._detect = detect_turns

    async def begin(self) -> None:
        """Raises RefusedError where the server is full."""
        first = await self._read()
        if first["type"] == "error":
            raise RefusedError(first["error"]["message"])
        turns = {"type": "server_vad", "silence_duration_ms": SILENCE_MS} if self._detect else None
        await self._say("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": turns}}})

    async def ask(self, samples: np.ndarray) -> Turn:
        """Speaks (n,) float32 at 24 kHz, hears the answer out, and plays it to its end."""
        hearing = asyncio.create_task(self._hear())
        try:
            ended = await self._speak(samples)
            if self._detect:
                await self._keep_open(hearing)
            else:
                await self._say("input_audio_buffer.commit")
                await self._say("response.create")
            chunks, stopped, done = await hearing
        finally:
            hearing.cancel()
        turn = _account(chunks, ended, done)
        turn.vad_wait_s = max(0.0, stopped - ended) if self._detect else 0.0
        await asyncio.sleep(max(0.0, chunks[0][0] + turn.audio_s - time.monotonic()))
        return turn

    async def interrupt(self, question: np.ndarray, speech: np.ndarray) -> Interruption | None:
        """Asks, and speaks over the answer as soon as it is begun; None where that came too late to cut it."""
        begun = asyncio.Event()

        async def hear() -> list[tuple[float, dict[str, Any]]]:
            events: list[tuple[float, dict[str, Any]]] = []
            while not events or events[-1][1]["type"] != "response.done":
                event = await self._read()
                if event["type"] == "error":
                    raise VocalNetError(event["error"]["message"])
                if event["type"] == "response.created":
                    begun.set()
                events.append((time.monotonic(), event))
            return events

        hearing = asyncio.create_task(hear())
        try:
            await self._speak(question)
            await self._keep_open(hearing, begun.is_set)
            spoke = time.monotonic()
            await self._speak(speech)
            await self._keep_open(hearing)
            events = await hearing
        finally:
            hearing.cancel()
        ended, last = events[-1]
        if (last["response"]["status_details"] or {}).get("reason") != "turn_detected":
            return None
        started = max(at for at, event in events if event["type"] == "input_audio_buffer.speech_started")
        sound = [at for at, event in events if event["type"] == "response.output_audio.delta"]
        return Interruption(started - spoke, ended - started, max(sound, default=spoke) - started)

    async def _keep_open(self, hearing: asyncio.Task[Any], long_enough: Callable[[], bool] = lambda: False) -> None:
        """The microphone's silence, until what is waited for has been heard."""
        while not (hearing.done() or long_enough()):
            await self._send_sound(np.zeros(int(PIECE_S * ANSWER_RATE_HZ), np.float32))
            await asyncio.wait([hearing], timeout=PIECE_S)

    async def _speak(self, samples: np.ndarray) -> float:
        """At the pace of speech; returns when the last sample left."""
        step, start = int(PIECE_S * ANSWER_RATE_HZ), time.monotonic()
        for position in range(0, len(samples), step):
            piece = samples[position : position + step]
            await asyncio.sleep(max(0.0, start + (position + len(piece)) / ANSWER_RATE_HZ - time.monotonic()))
            await self._send_sound(piece)
        return time.monotonic()

    async def _send_sound(self, samples: np.ndarray) -> None:
        pcm = (samples * 32767).astype("<i2").tobytes()
        await self._say("input_audio_buffer.append", audio=base64.b64encode(pcm).decode())

    async def _hear(self) -> tuple[list[tuple[float, float]], float, float]:
        """Arrival and duration of each chunk, when the turn was over, and when the answer was done."""
        chunks: list[tuple[float, float]] = []
        stopped = 0.0
        while True:
            event = await self._read()
            now = time.monotonic()
            if event["type"] == "response.output_audio.delta":
                chunks.append((now, len(base64.b64decode(event["delta"])) / 2 / ANSWER_RATE_HZ))
            elif event["type"] == "input_audio_buffer.speech_stopped":
                stopped = now
            elif event["type"] == "error":
                raise VocalNetError(event["error"]["message"])
            elif event["type"] == "response.done":
                if not chunks:
                    raise VocalNetError(f"no sound: {event['response']['status_details']}")
                return chunks, stopped, now

    async def _read(self) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(await asyncio.wait_for(self._socket.recv(), ANSWER_S))
        return event

    async def _say(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **fields}))


def _account(chunks: list[tuple[float, float]], ended: float, done: float) -> Turn:
    """What a player that starts with the first chunk and never stops would have met."""
    first, played, late = chunks[0][0], 0.0, 0.0
    for arrival, seconds in chunks:
        late = max(late, arrival - first - played)  # behind a playback without gaps
        played += seconds
    return Turn(first - ended, 0.0, late, done - ended, played)


def _speech(path: Path) -> np.ndarray:
    """A question at 24 kHz from its first loud sample to its last: times count from the end of speech, not of a file.

    Raises:
        AudioError: the file cannot be read.
    """
    samples = read_audio(path, ANSWER_RATE_HZ)
    loud = np.flatnonzero(np.abs(samples) > QUIET)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


async def measure(url: str, config: LoadConfig, sessions: int, detect_turns: bool = False) -> Level:
    """One level of load: all sessions begin within one question's time."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    level = Level(sessions)
    sounds = [_speech(path) for path in config.questions]

    async def session(number: int) -> None:
        try:
            async with connect(url, max_size=None) as socket:
                caller = Caller(socket, detect_turns)
                await caller.begin()
                await asyncio.sleep(len(sounds[0]) / ANSWER_RATE_HZ * number / sessions)
                for turn in range(config.turns):
                    level.turns.append(await caller.ask(sounds[(number + turn) % len(sounds)]))
        except RefusedError:
            level.refused += 1
        except (VocalNetError, WebSocketException, OSError, asyncio.TimeoutError):
            level.failed += 1

    await asyncio.gather(*(session(number) for number in range(sessions)))
    await _until_empty(url)
    return level


async def measure_interruptions(url: str, config: LoadConfig) -> Interruptions:
    """Several sessions at once, each of which interrupts as many answers as there are turns."""
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    result = Interruptions(min(INTERRUPTERS, config.max_sessions))
    sounds = [_speech(path) for path in config.questions]

    async def session(number: int) -> None:
        for turn in range(config.turns):
            question, other = (sounds[(number + turn + i) % len(sounds)] for i in range(2))
            try:
                async with connect(url, max_size=None) as socket:
                    caller = Caller(socket, detect_turns=True)
                    await caller.begin()
                    cut = await caller.interrupt(question, other)
            except (VocalNetError, WebSocketException, OSError, asyncio.TimeoutError):
                result.failed += 1
                continue
            if cut:
                result.cut.append(cut)
            else:
                result.too_late += 1

    await asyncio.gather(*(session(number) for number in range(result.sessions)))
    await _until_empty(url)
    return result


async def _until_empty(url: str) -> None:
    """Until the server has noticed that all have left, so that the next level finds its places free."""
    address = url.replace("ws://", "http://").removesuffix("/v1/realtime") + "/metrics"

    def metrics() -> str:
        with urllib.request.urlopen(address, timeout=ANSWER_S) as page:
            return str(page.read().decode())

    while "\nvocalnet_sessions 0.0" not in await asyncio.to_thread(metrics):
        await asyncio.sleep(0.1)


@asynccontextmanager
async def server_process(config: LoadConfig) -> AsyncIterator[str]:
    """`vocalnet serve` in a process of its own; yields its WebSocket's address.

    Raises:
        VocalNetError: it does not start, or ends too early.
    """
    command = [sys.executable, "-m", "vocalnet.cli", "serve", "--port", "0", "--model", config.model]
    command += ["--max-sessions", str(config.max_sessions)]
    environment = {key: value for key, value in os.environ.items() if key != "VOCALNET_API_KEY"}
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env=environment, limit=2**20)
    assert process.stderr is not None
    said: list[str] = []

    async def address() -> str:
        assert process.stderr is not None
        async for line in process.stderr:
            said.append(line.decode(errors="replace").strip())
            if '"listening"' in said[-1]:
                return str(json.loads(said[-1])["address"])
        raise VocalNetError(f"the server does not start: {said[-1] if said else 'it says nothing'}")

    async def drain(stream: asyncio.StreamReader) -> None:
        async for line in stream:
            said[:] = [*said[-9:], line.decode(errors="replace").strip()]

    try:
        url = await asyncio.wait_for(address(), START_S)
        reading = asyncio.create_task(drain(process.stderr))
        try:
            yield url
        except OSError as error:
            if process.returncode is not None:
                raise VocalNetError(f"the server ended with {process.returncode}: {' '.join(said)[-600:]}") from error
            raise
        reading.cancel()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def run_load(config: LoadConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All levels, until one breaks real time; then one session with turn detection; then interruptions."""
    async with server_process(config) as url:
        await measure(url, LoadConfig(config.model, config.questions, turns=1), 1)  # warms up
        rows = []
        for sessions in config.sessions:
            say(f"{sessions} sessions …")
            level = await measure(url, config, sessions)
            rows.append(level.row())
            if level.broken:
                say("real time is broken")
                break
        say("one session with turn detection …")
        detected = await measure(url, config, 1, detect_turns=True)
        say("interruptions …")
        cut = await measure_interruptions(url, config)
    settings = {"turns": config.turns, "max_sessions": config.max_sessions, "model": config.model}
    parts = {"levels": rows, "server_vad": detected.row(), "interruptions": cut.row()}
    return {"machine": machine(), "settings": settings, **parts}


def run_server_bench(config: LoadConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """As `run_load`, from the command line."""
    return asyncio.run(run_load(config, say))


def format_load(report: dict[str, Any]) -> str:
    """The levels as a table, and the interruptions as another."""
    names = {
        "sessions": "sessions", "answers": "answers", "refused": "refused", "failed": "failed",
        "first_audio_ms_median": "first audio ms", "first_audio_ms_p95": "p95", "vad_wait_ms_median": "VAD wait ms",
        "rtf_median": "RTF", "underruns": "with gaps", "late_ms_worst": "worst gap ms",
    }  # fmt: skip
    cut = {
        "sessions": "sessions", "interruptions": "answers cut", "too_late": "too late", "failed": "failed",
        "detected_ms_median": "speech detected after ms", "detected_ms_p95": "p95",
        "cancelled_ms_median": "then cancelled after ms", "cancelled_ms_p95": "p95",
        "last_audio_ms_median": "last sound after ms", "last_audio_ms_p95": "p95", "sound_after": "with sound after",
    }  # fmt: skip
    levels = _table(names, [*report["levels"], report["server_vad"]])
    return f"{levels}\n\n{_table(cut, [report['interruptions']])}"


def _table(names: dict[str, str], reported: list[dict[str, Any]]) -> str:
    """Columns as named."""
    rows = [list(names.values()), *([str(row[key]) for key in names] for row in reported)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def plot_load(report: dict[str, Any], path: Path) -> None:
    """First audio and real-time factor over the number of sessions, as a picture.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("a plot needs matplotlib; pip install matplotlib, or give --out a .json alone") from error
    rows = report["levels"]
    sessions = [row["sessions"] for row in rows]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    latency, factor = figure.subplots(1, 2)
    latency.plot(sessions, [row["first_audio_ms_median"] for row in rows], "o-", label="median")
    latency.plot(sessions, [row["first_audio_ms_p95"] for row in rows], "o--", label="95th percentile")
    latency.set(xlabel="sessions", ylabel="first audio, ms", ylim=(0, None))
    latency.legend()
    factor.plot(sessions, [row["rtf_median"] for row in rows], "o-")
    factor.axhline(1, color="grey", linewidth=1)
    factor.set(xlabel="sessions", ylabel="real-time factor", ylim=(0, None))
    figure.savefig(path)
