"""One conversation over the Realtime protocol: client events in, server events out, the model behind a lane.

Everything here runs on the event loop. `handle` is called with one client event after the other; answers run as tasks
beside it, so that speech can interrupt them at any time.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from vocalnet.audio import ANSWER_RATE_HZ, QUESTION_RATE_HZ
from vocalnet.errors import AudioError, VocalNetError
from vocalnet.serving.events import (
    EAGERNESS_MS,
    AppendAudio,
    CancelResponse,
    ClearAudio,
    ClientEvent,
    CommitAudio,
    CreateItem,
    CreateResponse,
    DeleteItem,
    ProtocolError,
    ResponseConfig,
    RetrieveItem,
    SemanticVad,
    SessionConfig,
    SessionUpdate,
    Transcription,
    TruncateItem,
    updated,
)
from vocalnet.serving.formats import FORMATS, PCM, Decoder, Encoder, WireFormat, encode
from vocalnet.serving.items import Item, Items
from vocalnet.serving.metrics import Metrics
from vocalnet.serving.outbox import Event, Outbox
from vocalnet.serving.response import Made, Response
from vocalnet.serving.scheduler import Lane
from vocalnet.serving.vad import ONSET_MS, Started, Stopped, TurnDetector, TurnSettings, Vad, Voice
from vocalnet.session import AudioChunk, Session, Summary, TextChunk

log = logging.getLogger(__name__)

BLOCK = QUESTION_RATE_HZ // 10
"""Samples in which the model is given sound: always the same cuts, so that a replay computes the same."""
SLICE = QUESTION_RATE_HZ
"""Samples that voice activity detection takes at once: long messages let other sessions in between."""
MIN_COMMIT_MS = 100
MAX_UTTERANCE_BYTES = 60 * QUESTION_RATE_HZ * PCM.width
"""What is kept, to be retrieved, of a microphone that stays open without a commit."""


class Tap:
    """What may look on and steer: a recorder, or a replay. This one does nothing.

    The conversation calls `reached` wherever it goes on after waiting for something whose time nobody can foretell; the
    order of these calls, of the client's messages and of what `audible` returned determines all that it does.
    """

    async def reached(self, point: str) -> None:
        """Returns when the conversation may go on from this point."""

    def audible(self, value: bool) -> bool:
        """Whether the client is playing an answer, which only the clock can tell."""
        return value

    def emitted(self, event: Event) -> None:
        """A server event was put in order."""

    def heard(self, samples: np.ndarray) -> None:
        """The microphone, (n,) float32 at 16 kHz."""

    def said(self, samples: np.ndarray) -> None:
        """An answer's sound, (n,) float32 at 24 kHz."""


@dataclass(frozen=True)
class Surroundings:
    """What a conversation needs of its server.

    Attributes:
        lane: to the model.
        ears: where voice activity detection runs.
        make_vad: a fresh detector.
        clock: seconds; only differences count.
        tap: a recorder or a replay.
    """

    lane: Lane
    ears: Executor
    make_vad: Callable[[], Vad]
    metrics: Metrics
    acknowledgement_ms: int = 500
    clock: Callable[[], float] = time.monotonic
    tap: Tap = field(default_factory=Tap)


class Conversation:
    """The protocol's state for one connection.

    Attributes:
        outbox: server events, in order.
        config: the session's configuration in force.
    """

    def __init__(self, session: Session, session_id: str, around: Surroundings, outbox: Outbox) -> None:
        self.id = session_id
        self.outbox = outbox
        self.config = SessionConfig(id=session_id, model=session.model.config.name)
        self.config.audio.output.voice = session.model.config.name
        self._session = session
        self._around = around
        self._items = Items()
        self._count = 0
        self._tap = around.tap
        self._decoder = Decoder(PCM)
        self._detector: TurnDetector | None = None
        self._slices = 0  # judged by the detector
        self._failures = self._changes = self._cuts = 0
        self._received = 0  # samples at 16 kHz since the session began
        self._blocks: deque[np.ndarray] = deque()  # of this utterance, for the model; it takes them from its thread
        self._partial = np.zeros(0, np.float32)
        self._taking: asyncio.Future[None] | None = None
        self._utterance = Item("", "user", spoken=True)  # being spoken
        self._response: Response | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._playing_until = 0.0
        self._listen_anew()

    # ---- life ----

    def begin(self) -> None:
        """Greets the client."""
        self._emit("session.created", session=self._session_event())

    def plain(self, detect_turns: bool) -> None:
        """The plain mode's configuration: questions as text too, turns detected or not."""
        self.config.audio.input.transcription = Transcription()
        if not detect_turns:
            self.config.audio.input.turn_detection = None
            self._listen_anew()

    async def close(self) -> None:
        """Stops everything; nothing more is emitted."""
        self._around.lane.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def newest_answer(self) -> str:
        """The item of the answer that began last, or nothing."""
        return self._response.item.id if self._response and self._response.opened else ""

    @property
    def answering(self) -> bool:
        """A response is in progress, or about to begin."""
        return bool(self._tasks)

    async def wait_answered(self) -> None:
        """Until no response is in progress."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # ---- client events ----

    async def handle(self, event: ClientEvent) -> None:
        """Does what a client event asks; what cannot be done becomes an `error` event."""
        try:
            match event:
                case AppendAudio():
                    await self.append(self._decoder.push(_from_base64(event.audio)))
                case CommitAudio():
                    self._commit_by_client()
                case ClearAudio():
                    self._clear()
                case SessionUpdate():
                    await self._update_session(event)
                case CreateItem():
                    self._create_item(event)
                case RetrieveItem():
                    item = self._items.get(event.item_id, "retrieve")
                    self._emit("conversation.item.retrieved", item=item.event(self._format("input")))
                case DeleteItem():
                    self._delete_item(event)
                case TruncateItem():
                    await self._truncate(event)
                case CreateResponse():
                    self.create_response(event.response or ResponseConfig())
                case CancelResponse():
                    self._cancel(event)
        except ProtocolError as error:
            self.report(error, event.event_id)

    def report(self, error: ProtocolError, event_id: str | None = None) -> None:
        """Tells the client what it did wrong."""
        self._around.metrics.errors.labels(error.code).inc()
        details = {"type": "invalid_request_error", "code": error.code, "message": str(error), "param": error.param}
        self._emit("error", error={**details, "event_id": event_id})

    async def _update_session(self, event: SessionUpdate) -> None:
        new = updated(self.config, event.session)
        wanted = event.session.get("vocalnet")
        if isinstance(wanted, dict) and ({"mtp", "decoding"} & wanted.keys()):
            await self._configure(new)
        old, self.config = self.config, new
        if new.audio.input.format != old.audio.input.format:
            self._decoder = Decoder(self._format("input"))
        if new.audio.input.turn_detection != old.audio.input.turn_detection:
            self._listen_anew()
        self._emit("session.updated", session=self._session_event())

    async def _configure(self, new: SessionConfig) -> None:
        """Changes how the next answers are spoken."""
        change = partial(self._session.configure, new.vocalnet.mtp, new.vocalnet.decoding)
        refused = await asyncio.gather(self._around.lane.post(change), return_exceptions=True)
        self._changes += 1
        await self._tap.reached(f"configured {self._changes}")
        if isinstance(refused[0], VocalNetError):
            raise ProtocolError(str(refused[0]), param="session.vocalnet") from refused[0]

    def _session_event(self) -> Event:
        return self.config.model_dump(exclude={"vocalnet"} if not self.config.vocalnet.events else None)

    def _format(self, direction: str) -> WireFormat:
        return FORMATS[getattr(self.config.audio, direction).format.type]

    # ---- listening ----

    def _listen_anew(self) -> None:
        """Starts the turn detection that the configuration asks for; an utterance that has begun is dropped."""
        self._drop_utterance()
        turns = self.config.audio.input.turn_detection
        if turns is None:
            self._detector = None
            return
        if isinstance(turns, SemanticVad):
            settings = TurnSettings(silence_duration_ms=EAGERNESS_MS[turns.eagerness])
        else:
            settings = TurnSettings(turns.threshold, turns.prefix_padding_ms, turns.silence_duration_ms)
        self._detector = TurnDetector(self._around.make_vad(), settings, self._received)

    async def append(self, samples: np.ndarray) -> None:
        """More of the microphone, (n,) float32 at 16 kHz."""
        self._received += len(samples)
        self._tap.heard(samples)
        if self._detector is None:
            self._listen(samples)
            return
        for start in range(0, len(samples), SLICE):
            detector = self._detector
            onset_ms = self._around.acknowledgement_ms if self._audible() else ONSET_MS
            loop = asyncio.get_running_loop()
            piece = samples[start : start + SLICE]
            signals = await loop.run_in_executor(self._around.ears, detector.push, piece, onset_ms)
            self._slices += 1
            await self._tap.reached(f"heard {self._slices}")
            for signal in signals:
                self._on_signal(signal)

    def _audible(self) -> bool:
        """The client is, as far as the server can know, playing an answer."""
        active = self._response is not None and self._response.active
        return self._tap.audible(active or self._around.clock() < self._playing_until)

    def _on_signal(self, signal: Started | Voice | Stopped) -> None:
        turns = self.config.audio.input.turn_detection
        if isinstance(signal, Voice):
            self._listen(signal.samples)
        elif isinstance(signal, Started):
            self._emit("input_audio_buffer.speech_started", audio_start_ms=signal.at_ms, item_id=self._utterance.id)
            if turns and turns.interrupt_response and self._response:
                self._finish(self._response, "cancelled", "turn_detected")
        else:
            self._emit("input_audio_buffer.speech_stopped", audio_end_ms=signal.at_ms, item_id=self._utterance.id)
            item, reading = self._commit()
            if turns and turns.create_response:
                silence_ms = EAGERNESS_MS[turns.eagerness] if isinstance(turns, SemanticVad) else None
                silence_ms = silence_ms or turns.silence_duration_ms  # type: ignore[union-attr]
                self._start(self._answer_speech(item, reading, float(silence_ms)))

    def _listen(self, samples: np.ndarray) -> None:
        """Hands sound to the model in blocks, without waiting for it."""
        utterance = self._utterance
        utterance.sound += encode(samples, PCM)
        del utterance.sound[:-MAX_UTTERANCE_BYTES]
        utterance.sound_ms += 1000 * len(samples) / QUESTION_RATE_HZ
        stream = np.concatenate([self._partial, samples])
        whole = len(stream) // BLOCK * BLOCK
        self._partial = stream[whole:]
        self._blocks.extend(stream[:whole].reshape(-1, BLOCK))
        self._take_blocks()

    def _take_blocks(self) -> None:
        if self._blocks and (self._taking is None or self._taking.done()):
            self._taking = self._around.lane.post(partial(self._push_blocks, self._blocks))
            self._taking.add_done_callback(partial(self._taken, self._blocks))

    def _push_blocks(self, blocks: deque[np.ndarray], work_ahead: bool = True) -> None:
        """On the model's thread: everything that has been said so far."""
        while blocks:
            self._session.push_audio(blocks.popleft(), QUESTION_RATE_HZ, work_ahead)

    def _taken(self, blocks: deque[np.ndarray], done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._take_blocks()
        else:
            self._start(self._stop_listening(blocks, error))

    async def _stop_listening(self, blocks: deque[np.ndarray], error: BaseException) -> None:
        """The model could not take what was said."""
        self._failures += 1
        await self._tap.reached(f"deaf {self._failures}")
        if blocks is self._blocks:
            self._drop_utterance()
        if isinstance(error, VocalNetError):
            self.report(ProtocolError(str(error), "input_audio_invalid"))
        else:
            log.error("listening failed", exc_info=error, extra={"fields": {"session": self.id}})
            self._emit("error", error=_server_error())

    def _drop_utterance(self) -> None:
        """Begins an utterance; the one before is dropped unless it was committed."""
        if self._utterance.sound_ms:
            _quietly(self._around.lane.post(self._session.clear_audio))
        self._new_utterance()

    def _new_utterance(self) -> None:
        self._blocks = deque()
        self._partial = np.zeros(0, np.float32)
        self._utterance = Item(self._new_id("item"), "user", spoken=True)

    def _clear(self) -> None:
        self._drop_utterance()
        self._decoder.flush()
        if self._detector:
            self._detector.reset()
        self._emit("input_audio_buffer.cleared")

    def _commit_by_client(self) -> None:
        if self._detector is None:
            self._listen(self._decoder.flush())
        if self._utterance.sound_ms < MIN_COMMIT_MS:
            raise ProtocolError(
                f"the input audio buffer holds {self._utterance.sound_ms:.0f} ms; {MIN_COMMIT_MS} ms are needed",
                "input_audio_buffer_commit_empty",
            )
        if self._detector:
            self._detector.reset()
        self._commit()

    def _commit(self) -> tuple[Item, asyncio.Future[None]]:
        """The utterance becomes an item, and a piece of the question once the model has read it."""
        item, blocks = self._utterance, self._blocks
        blocks.append(self._partial)
        self._new_utterance()
        transcribe = self.config.audio.input.transcription is not None

        def read() -> None:
            try:
                self._push_blocks(blocks, work_ahead=False)
                item.question = self._session.commit_audio(transcribe)
                item.text = item.question.transcript
            except VocalNetError as error:
                item.error = error

        before = self._items.add(item)
        self._emit("input_audio_buffer.committed", item_id=item.id, previous_item_id=before)
        self._emit("conversation.item.added", item=item.event(), previous_item_id=before)
        self._emit("conversation.item.done", item=item.event(), previous_item_id=before)
        self._make_room()
        reading = self._around.lane.post(read)
        _quietly(reading)
        if transcribe:
            self._start(self._transcribe(item, reading))
        return item, reading

    async def _transcribe(self, item: Item, reading: asyncio.Future[None]) -> None:
        await asyncio.shield(reading)
        await self._tap.reached(f"transcript {item.id}")
        kind = "conversation.item.input_audio_transcription."
        place = {"item_id": item.id, "content_index": 0}
        text = "" if item.error else item.text
        if text is None:
            message = "this model has no CTC head that could read the question as text"
            error = {"type": "invalid_request_error", "code": "transcription_unavailable", "message": message}
            self._emit(kind + "failed", **place, error=error)
            return
        if text:
            self._emit(kind + "delta", **place, delta=text)
        usage = {"type": "duration", "seconds": round(item.sound_ms / 1000, 3)}
        self._emit(kind + "completed", **place, transcript=text, usage=usage)

    # ---- items ----

    def _create_item(self, event: CreateItem) -> None:
        given = event.item
        text = "".join(part.text or part.transcript or "" for part in given.content)
        if given.role == "user" and any(part.audio for part in given.content):
            raise ProtocolError("a spoken item comes through input_audio_buffer.append", "unsupported_content", "item")
        if not text.strip():
            raise ProtocolError("the item has no text", "invalid_value", "item.content")
        item = Item(given.id or self._new_id("item"), given.role, spoken=False, text=text)
        before = self._items.add(item, event.previous_item_id)
        self._emit("conversation.item.added", item=item.event(), previous_item_id=before)
        self._emit("conversation.item.done", item=item.event(), previous_item_id=before)
        if given.role == "user":
            _quietly(self._around.lane.post(partial(self._read_text, item)))

    def _read_text(self, item: Item) -> None:
        """On the model's thread."""
        try:
            item.question = self._session.push_text(item.text or "")
        except VocalNetError as error:
            item.error = error

    def _delete_item(self, event: DeleteItem) -> None:
        item = self._items.get(event.item_id, "delete")
        if self._response and self._response.active and self._response.item is item:
            self._finish(self._response, "cancelled", "client_cancelled")
        self._items.remove(item)
        self._emit("conversation.item.deleted", item_id=item.id)

    async def _truncate(self, event: TruncateItem) -> None:
        item = self._items.get(event.item_id, "truncate")
        if item.role != "assistant" or not item.spoken:
            raise ProtocolError("only a spoken answer can be truncated", "item_truncate_invalid_item_id", "item_id")
        if event.audio_end_ms > math.ceil(item.sound_ms):  # clients round a part of a millisecond up
            raise ProtocolError(
                f"audio_end_ms is {event.audio_end_ms}; the item's audio lasts {item.sound_ms:.0f} ms",
                param="audio_end_ms",
            )
        if self._response and self._response.active and self._response.item is item:
            self._finish(self._response, "cancelled", "client_cancelled")
        self._playing_until = 0.0
        item.sound_ms = min(item.sound_ms, float(event.audio_end_ms))
        del item.sound[2 * (event.audio_end_ms * ANSWER_RATE_HZ // 1000) :]

        def cut() -> None:
            if item.turn:
                item.text = self._session.cut(item.turn, event.audio_end_ms)

        cutting = self._around.lane.post(cut)
        _quietly(cutting)
        await asyncio.wait([cutting])  # whoever retrieves the item from here on gets what was heard
        self._cuts += 1
        await self._tap.reached(f"cut {self._cuts}")
        place = {"item_id": item.id, "content_index": 0}
        self._emit("conversation.item.truncated", **place, audio_end_ms=event.audio_end_ms)

    def _make_room(self) -> None:
        for item in self._items.overflow():
            self._emit("conversation.item.deleted", item_id=item.id)

    # ---- answering ----

    def create_response(self, config: ResponseConfig, vad_wait_ms: float | None = None) -> None:
        """Begins an answer to what was committed.

        Raises:
            ProtocolError: one is already in progress.
        """
        if self._response and self._response.active:
            raise ProtocolError(
                f"response {self._response.id} is in progress; wait for response.done or cancel it",
                "conversation_already_has_active_response",
            )
        modality = (config.output_modalities or self.config.output_modalities)[0]
        given = config.audio and config.audio.output and config.audio.output.format
        limit = config.max_output_tokens or self.config.max_output_tokens
        response = Response(
            self._new_id("resp"),
            Item(self._new_id("item"), "assistant", spoken=modality == "audio", text="", status="in_progress"),
            config,
            modality,
            FORMATS[given.type] if given else self._format("output"),
            None if limit == "inf" else int(limit),
            self._around.clock(),
            vad_wait_ms,
        )
        self._response = response
        self._start(self._answer(response))

    async def _answer_speech(self, item: Item, reading: asyncio.Future[None], vad_wait_ms: float) -> None:
        """Answers what turn detection committed, if there were words in it."""
        await asyncio.shield(reading)
        await self._tap.reached(f"read {item.id}")
        if isinstance(item.error, AudioError):
            log.info("no answer", extra={"fields": {"session": self.id, "reason": str(item.error)}})
        elif not (self._response and self._response.active) and not (self._detector and self._detector.speaking):
            self.create_response(ResponseConfig(), vad_wait_ms)

    async def _answer(self, response: Response) -> None:
        await self._tap.reached(f"begin {response.id}")
        self._emit("response.created", response=self._event_of(response))
        encoder = Encoder(response.form)
        more = partial(self._more, response)
        try:
            async with aclosing(self._around.lane.stream(partial(self._make_answer, response), more)) as pieces:
                async for piece in pieces:
                    response.pieces += 1
                    await self._tap.reached(f"made {response.id} {response.pieces}")
                    if response.active:
                        await self._send_piece(response, piece, encoder)
            if response.active:
                raise RuntimeError("the answer stopped by itself")
        except VocalNetError as error:
            await self._tap.reached(f"failed {response.id}")
            response.error = {"type": "invalid_request_error", "code": "no_question", "message": str(error)}
            self._finish(response, "failed")
        except Exception:
            await self._tap.reached(f"broken {response.id}")
            log.exception("answer failed", extra={"fields": {"session": self.id, "response": response.id}})
            response.error = {key: _server_error()[key] for key in ("type", "code", "message")}
            self._finish(response, "failed")

    async def _more(self, response: Response) -> bool:
        """Whether the model should make another piece now."""
        await self.outbox.room()
        await self._tap.reached(f"make {response.id} {response.pieces + 1}")
        return response.active

    def _make_answer(self, response: Response) -> Iterator[Any]:
        """On the model's thread."""
        session = self._session
        if self._items.edited:
            self._items.edited = False
            self._items.give_history(session)
        asked = [item for item in list(self._items) if item.role == "user" and not item.answered]
        if not session.question:
            failed = [item.error for item in asked if item.error]
            raise failed[-1] if failed else AudioError("there is no question; commit audio or create a user item first")
        spoken = sum(item.question.rows.shape[1] for item in asked if item.question and item.spoken)
        pieces = session.respond(speak=response.modality == "audio", max_text_tokens=response.max_tokens)
        turn = session.turns[-1]
        response.item.turn = turn
        for item in asked:
            item.turn, item.answered = turn, True
        self._items.forget(session)
        response.usage = {
            "input_tokens": turn.answer_at, "cached_tokens": turn.asked_at, "audio_tokens": spoken,
        }  # fmt: skip
        return self._measured(response, pieces)

    def _measured(self, response: Response, pieces: Iterator[Any]) -> Iterator[Made]:
        """On the model's thread: the pieces, with what the session had done when each was ready."""
        session, turn = self._session, self._session.turns[-1]
        for piece in pieces:
            speech_tokens = len(session.speech_tokens) if response.modality == "audio" else 0
            yield Made(piece, len(turn.answer_ids), speech_tokens, session.stages_ms)

    async def _send_piece(self, response: Response, made: Made, encoder: Encoder) -> None:
        piece, response.made = made.piece, made
        if isinstance(piece, Summary):
            response.summary = piece
            last = encoder.push(np.zeros(0, np.float32), last=True)
            if last and response.modality == "audio":
                self._emit_delta(response, "response.output_audio.delta", last)
            cut = made.text_tokens >= (response.max_tokens or self._session.generation.max_text_tokens)
            self._finish(response, "incomplete" if cut else "completed", "max_output_tokens" if cut else None)
            return
        if not response.opened:
            self._open(response)
        if isinstance(piece, TextChunk):
            response.item.text = (response.item.text or "") + piece.text
            kind = "audio_transcript" if response.modality == "audio" else "text"
            self._emit_delta(response, f"response.output_{kind}.delta", piece.text)
            if response.modality == "text":
                self._around.lane.due = time.monotonic()
        else:
            self._count_sound(response, piece)
            self._tap.said(piece.samples)
            self._emit_delta(response, "response.output_audio.delta", encoder.push(piece.samples))
            if response.first_audio_at is not None and response.sent_s == 0:
                self._emit_latency(response, final=False)
            response.sent_s += len(piece.samples) / ANSWER_RATE_HZ

    def _count_sound(self, response: Response, piece: AudioChunk) -> None:
        """Keeps account of what the client has, and of whether its player must have run dry."""
        now, metrics = self._around.clock(), self._around.metrics
        if response.first_audio_at is None:
            response.first_audio_at = now
            metrics.first_audio.observe(now - response.asked_at)
        elif now > response.first_audio_at + response.sent_s:
            response.late += 1
            metrics.underruns.inc()
        seconds = len(piece.samples) / ANSWER_RATE_HZ
        response.item.sound += encode(piece.samples, PCM)
        response.item.sound_ms += 1000 * seconds
        self._playing_until = response.first_audio_at + response.sent_s + seconds
        self._around.lane.due = time.monotonic() + self._playing_until - now

    def _open(self, response: Response) -> None:
        response.opened = True
        item, place = response.item, response.place
        before = self._items.append_answer(item)
        part = {"type": "audio", "transcript": ""} if response.modality == "audio" else {"type": "text", "text": ""}
        in_response = {"response_id": response.id, "output_index": 0}
        self._emit("response.output_item.added", **in_response, item=item.event())
        self._emit("conversation.item.added", item=item.event(), previous_item_id=before)
        self._emit("response.content_part.added", **place, part=part)

    def _finish(self, response: Response, status: str, reason: str | None = None) -> None:
        """Ends a response, once: the `done` events, whatever the reason. Deltas that have not left are taken back."""
        if not response.active:
            return
        response.status, response.reason = status, reason
        if status in ("cancelled", "failed"):
            self.outbox.drop_deltas(response.id)
            self._playing_until = 0.0
        item, place = response.item, response.place
        item.status = "completed" if status == "completed" else "incomplete"
        if response.opened:
            text = item.text or ""
            if response.modality == "audio":
                self._emit("response.output_audio.done", **place)
                self._emit("response.output_audio_transcript.done", **place, transcript=text)
                part = {"type": "audio", "transcript": text}
            else:
                self._emit("response.output_text.done", **place, text=text)
                part = {"type": "text", "text": text}
            self._emit("response.content_part.done", **place, part=part)
            self._emit("conversation.item.done", item=item.event(), previous_item_id=self._before(item))
            self._emit("response.output_item.done", response_id=response.id, output_index=0, item=item.event())
        if response.summary:
            self._emit_latency(response, final=True)
        self._emit("response.done", response=self._event_of(response))
        self._make_room()
        self._note(response)

    def _before(self, item: Item) -> str | None:
        ids = [other.id for other in self._items]
        place = ids.index(item.id) if item.id in ids else 0
        return ids[place - 1] if place else None

    def _note(self, response: Response) -> None:
        """Metrics and log of a response that has ended."""
        metrics, summary = self._around.metrics, response.summary
        metrics.responses.labels(response.status).inc()
        fields: dict[str, Any] = {"session": self.id, "response": response.id, "status": response.status}
        if response.first_audio_ms is not None:
            fields["first_audio_ms"] = response.first_audio_ms
        if summary:
            if summary.audio_s:
                metrics.real_time_factor.observe(summary.rtf)
            fields |= {"audio_s": summary.audio_s, "rtf": summary.rtf, "late_chunks": response.late}
        log.info("response", extra={"fields": fields})

    def _cancel(self, event: CancelResponse) -> None:
        response = self._response
        if not (response and response.active) or event.response_id not in (None, response.id):
            raise ProtocolError(
                "Cancellation failed: there is no response to cancel",  # LiveKit's client looks for these words
                "response_cancel_not_active",
            )
        self._finish(response, "cancelled", "client_cancelled")

    # ---- emitting ----

    def _event_of(self, response: Response) -> Event:
        return response.event(f"conv_{self.id.removeprefix('sess_')}", self.config.audio.output.voice)

    def _emit_latency(self, response: Response, final: bool) -> None:
        """For clients that asked for it (an event beyond the protocol)."""
        if self.config.vocalnet.events:
            self._emit("vocalnet.response.latency", **response.latency(final))

    def _emit_delta(self, response: Response, kind: str, delta: str | bytes) -> None:
        if delta:
            self._put(kind, {**response.place, "delta": delta}, response.id)

    def _emit(self, kind: str, **fields: Any) -> None:
        self._put(kind, fields)

    def _put(self, kind: str, fields: Event, response: str = "") -> None:
        event = {"type": kind, "event_id": self._new_id("event"), **fields}
        self._tap.emitted(event)
        self.outbox.put_now(event, response=response)

    def _new_id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self.id.removeprefix('sess_')}_{self._count}"

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _quietly(work: asyncio.Future[Any]) -> None:
    """Nobody waits for this work; an unexpected error is logged."""

    def look(done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and done.exception():
            log.error("work for a session failed", exc_info=done.exception())

    work.add_done_callback(look)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"audio is not base64: {error}", param="audio") from error


def _server_error() -> dict[str, Any]:
    message = "the server failed; the conversation can go on"
    return {"type": "server_error", "code": "internal_error", "message": message, "param": None, "event_id": None}
