"""Session: one spoken conversation.

    push_audio … push_audio → respond: text and waveform chunks → push_audio …          interrupt at any time

The LLM's cache holds the conversation: prompt, each question's rows, each answer's tokens. A question is encoded and
prefilled at the speaker's first pause, before anybody knows whether the turn is over; if the speaker goes on, the
cache is rewound by setting its length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from vocalnet.audio import ANSWER_RATE_HZ
from vocalnet.decoding import DecodingMode
from vocalnet.errors import AudioError, ConfigError, VocalNetError
from vocalnet.listener import Listener
from vocalnet.sampling import sample
from vocalnet.speaker import Speaker, Timings

if TYPE_CHECKING:
    from vocalnet.model import GenerationConfig, VocalNet

QUESTION_ROWS = 320  # the most that 30 s can become
UNFINISHED = "\ufffd"  # what a tokenizer shows for part of a character


@dataclass(frozen=True)
class TextChunk:
    """New text of the answer; the chunks joined are the answer."""

    text: str


@dataclass(frozen=True)
class AudioChunk:
    """New sound of the answer, (N,) float32 at `rate_hz`; the chunks joined are the waveform."""

    samples: np.ndarray
    rate_hz: int = ANSWER_RATE_HZ


@dataclass(frozen=True)
class Summary:
    """Comes last.

    Attributes:
        text: the whole answer.
        audio_s: duration of the answer.
        first_audio_ms: from the call of `respond` to the first waveform chunk.
        total_ms: from the call of `respond` to the end.
        rtf: seconds of work per second of audio.
        speech_tokens: 25 per second.
        tokens_per_step: speech tokens per step of the speech decoder.
        stages_ms: work per stage, that done before the turn ended included.
    """

    text: str
    audio_s: float
    first_audio_ms: float
    total_ms: float
    rtf: float
    speech_tokens: int
    tokens_per_step: float
    stages_ms: dict[str, float]


@dataclass
class Question:
    """A closed piece of a question: something said, or something written.

    Attributes:
        rows: (1, n, D) what stands at the prompt's `<speech>`.
        transcript: what was written, or what the adapter's CTC head read; None where there is no such head.
        timings: the work of reading it.
    """

    rows: Tensor
    transcript: str | None = None
    timings: Timings = field(default_factory=Timings)


@dataclass(eq=False)
class Turn:
    """One exchange as the history keeps it: what was asked and what was heard of the answer.

    Attributes:
        question: (1, n, D) rows at the prompt's `<speech>`.
        answer_ids: text tokens of the answer.
        spoken_ms: duration of the answer's audio so far.
        finished: the answer came to its end, so that its audio says all of its text.
        asked_at, answer_at: where question and answer begin in the conversation's cache.
    """

    question: Tensor
    answer_ids: list[int] = field(default_factory=list)
    spoken_ms: float = 0.0
    finished: bool = False
    asked_at: int = 0
    answer_at: int = 0


@dataclass
class _Heard:
    """The encoder's and adapter's reading of the audio up to a point."""

    end: int  # Listener.end of the audio it stands for
    question: Question
    hidden: Tensor  # (1, T, D) the adapter's positions, from which CTC reads


@dataclass
class _Prepared:
    """A question that the LLM has read."""

    pieces: int  # closed pieces of the question that it covers
    end: int  # Listener.end of the audio it covers beyond them
    start: int  # length of the conversation before it
    hidden: Tensor  # (1, D) after the prompt's last token
    speaker: Speaker
    timings: Timings
    turn: Turn


class Session:
    """A conversation with one speaker; not safe to use from several threads at once.

    Attributes:
        turns: the history, oldest first; call `reread` after editing it.
        question: closed pieces of the question that `respond` will answer.
    """

    def __init__(self, model: VocalNet, seed: int = 0, generation: GenerationConfig | None = None) -> None:
        self.model = model
        self.generation = generation or model.config.generation
        self.turns: list[Turn] = []
        self.question: list[Question] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._prefix = model.prompt.prefix_ids()
        self._suffix = model.prompt.suffix_ids()
        self._between = model.prompt.next_turn_ids()
        capacity = len(self._prefix) + self.generation.history_tokens + QUESTION_ROWS + len(self._suffix)
        self._state = model.backbone.init_state(capacity + len(self._between) + self.generation.max_text_tokens + 1)
        model.backbone.prefill(model.backbone.embed(self._prefix), self._state)
        self._listener = self._new_listener()
        self._heard: _Heard | None = None
        self._prepared: _Prepared | None = None
        self._answering: _Answer | None = None
        self._newest: Turn | None = None  # whose answer can be interrupted
        self._stale = False  # the cache holds more of an earlier answer than the history
        self._last_speaker: Speaker | None = None

    # ---- listening ----

    def _new_listener(self) -> Listener:
        config = self.model.encoder.config
        return Listener(config.mel_bins, config.full_window)

    def push_audio(self, samples: np.ndarray, rate_hz: int, work_ahead: bool = True) -> None:
        """Adds (n,) samples of the speaker's voice, any n; works ahead when the speaker pauses.

        An answer that is being made goes on; there is no working ahead meanwhile.

        Args:
            samples: (n,) mono, full scale at 1.
            rate_hz: the same for all pieces of a turn.
            work_ahead: False for a recording given at once: there is no pause to use, so that the time from the end of
                the question to the first sound counts all the work.

        Raises:
            AudioError: bad samples, a rate that changes within the turn, or a question over 30 s (what was said is
                dropped).
        """
        try:
            self._listener.push(samples, rate_hz)
        except AudioError:
            self.clear_audio()
            raise
        if self._prepared and self._prepared.end and self._prepared.end != self._listener.end:
            self._drop_prepared()
        if work_ahead and self._listener.paused and self._prepared is None and self._answering is None:
            self._prepare(live=True)

    @property
    def speech_tokens(self) -> list[int]:
        """Speech tokens of the newest answer so far."""
        return self._last_speaker.tokens if self._last_speaker else []

    @property
    def stages_ms(self) -> dict[str, float]:
        """Work per stage of the newest answer so far, in milliseconds."""
        return self._last_speaker.timings.milliseconds() if self._last_speaker else {}

    def configure(self, mtp: int | None = None, decoding: str | None = None) -> None:
        """Changes how the next answers are spoken; None leaves a setting as it is.

        Raises:
            ConfigError: more MTP modules than the model has, or an unknown decoding.
        """
        modules = self.model.speech_decoder.config.mtp_modules
        if mtp is not None and not 0 <= mtp <= modules:
            raise ConfigError(f"mtp is {mtp}; this model has {modules} MTP modules: give 0 to {modules}")
        if decoding is not None and decoding not in get_args(DecodingMode):
            raise ConfigError(f"decoding is '{decoding}'; allowed: {', '.join(get_args(DecodingMode))}")
        changes: dict[str, Any] = {"mtp": mtp, "decoding": decoding}
        self._drop_prepared()
        self.generation = replace(
            self.generation, **{key: value for key, value in changes.items() if value is not None}
        )

    @property
    def paused(self) -> bool:
        """The speaker has said something and is quiet now: a moment to respond."""
        return self._listener.paused

    @property
    def length(self) -> int:
        """Positions of the LLM's cache in use: the conversation so far, and what is read of a question ahead."""
        return self._state.length

    def clear_audio(self) -> None:
        """Forgets what was said since the last `commit_audio` or answer."""
        self._drop_prepared()
        self._heard = None
        self._listener = self._new_listener()

    def commit_audio(self, transcribe: bool = False) -> Question:
        """Closes what was said: it becomes a piece of the question, to which more can be added before the answer.

        Args:
            transcribe: also read it as text, where the adapter has a CTC head.

        Raises:
            AudioError: nothing was said, or it is too short, too long, silent, or has no recognisable word. What was
                said is dropped; pieces and history stay as they were.
        """
        try:
            self._listener.finish()
            heard = self._hear(transcribe)
            if heard.question.rows.shape[1] == 0:
                raise AudioError("no word was recognised in the question; speak closer to the microphone")
            self._check_room(heard.question)
        except VocalNetError:
            self.clear_audio()
            raise
        if self._prepared and (self._prepared.pieces, self._prepared.end) == (len(self.question), heard.end):
            self._prepared.pieces, self._prepared.end = len(self.question) + 1, 0
        else:
            self._drop_prepared()
        self.question.append(heard.question)
        self._heard = None
        self._listener = self._new_listener()
        return heard.question

    def push_text(self, text: str) -> Question:
        """Adds a written piece to the question.

        Raises:
            AudioError: an empty text, or a question that becomes too long.
        """
        ids = self.model.prompt.ids(text.strip())
        if not ids:
            raise AudioError("the written question is empty; write at least one word")
        piece = Question(self.model.backbone.embed(ids), text)
        self._check_room(piece)
        self.question.append(piece)
        return piece

    def _check_room(self, piece: Question) -> None:
        rows = piece.rows.shape[1] + sum(other.rows.shape[1] for other in self.question)
        if rows > QUESTION_ROWS:
            raise AudioError(f"the question has {rows} positions; allowed: {QUESTION_ROWS}; shorten it")

    # ---- answering ----

    def respond(
        self, speak: bool = True, max_text_tokens: int | None = None
    ) -> Iterator[TextChunk | AudioChunk | Summary]:
        """Ends the speaker's turn and answers: text and audio chunks as they are made, then a summary.

        The question is what was closed by `commit_audio` or written by `push_text`; without such a piece, it is what
        was said since the last answer.

        Args:
            speak: False answers in text only.
            max_text_tokens: a limit under the one in `generation`.

        Raises:
            AudioError: there is no question, or it is too short, too long, silent, or has no recognisable word. The
                history stays as it was.
        """
        start = time.perf_counter()
        self._stop_answer()
        if not self.question:
            self.commit_audio()
        if self._prepared and (self._prepared.pieces, self._prepared.end) != (len(self.question), 0):
            self._drop_prepared()
        prepared = self._prepared or self._prepare(live=False)
        assert prepared is not None  # None is for live audio alone
        self._prepared, self.question = None, []
        self._last_speaker, self._newest = prepared.speaker, prepared.turn
        prepared.turn.asked_at, prepared.turn.answer_at = prepared.start, self._state.length
        self.turns.append(prepared.turn)
        limit = min(max_text_tokens or self.generation.max_text_tokens, self.generation.max_text_tokens)
        self._answering = _Answer(self, prepared, start, speak, limit)
        return self._answering.run()

    def interrupt(self, played_ms: float) -> str:
        """Stops the newest answer and cuts it, in history too, to what was heard; also after its end.

        Args:
            played_ms: how much of the answer's audio the listener has heard.

        Returns:
            The text that stays in the history.

        Raises:
            VocalNetError: there is no answer to interrupt.
        """
        if self._newest is None:
            raise VocalNetError("there is no answer to interrupt; call respond first")
        return self.cut(self._newest, played_ms)

    def cut(self, turn: Turn, played_ms: float) -> str:
        """Cuts the answer of any turn to what `played_ms` of its audio can have said; one being made is stopped.

        Returns:
            The text that stays in the history.
        """
        if turn is self._newest:
            self._stop_answer()
            self._newest = None
        decode = self.model.prompt.decode
        ids, whole = turn.answer_ids, decode(turn.answer_ids)
        heard = heard_tokens(len(ids), turn.spoken_ms, played_ms, turn.finished)
        while 0 < heard < len(ids) and whole[len(decode(ids[:heard])) :][:1].isalnum():
            heard -= 1  # the next token would continue a word that was not heard whole
        if heard < len(ids):
            del ids[heard:]
            turn.spoken_ms = min(max(0.0, played_ms), turn.spoken_ms)
            if self.turns and turn is self.turns[-1]:
                self._drop_prepared()
                self.model.backbone.truncate(self._state, turn.answer_at + heard)
            elif turn in self.turns and self._answering:
                self._stale = True  # the answer being made goes on from what it has read
            elif turn in self.turns:
                self.reread()
        return decode(ids)

    def reread(self) -> None:
        """Reads the history anew, after `turns` or `question` was edited; an answer being made is stopped."""
        self._stop_answer()
        self._drop_prepared()
        self._read_history()

    # ---- reading a question ----

    @torch.inference_mode()
    def _hear(self, transcribe: bool = False) -> _Heard:
        """Encodes the audio so far, once for each end of it."""
        if self._heard is None or self._heard.end != self._listener.end:
            model, timings, since = self.model, Timings(), time.perf_counter()
            frames = model.encoder.question_frames(self._listener.features(), self._listener.end)
            since = timings.add("encoder", since)
            hidden, lengths = model.adapter(frames)
            rows = model.adapter.rows(hidden, lengths)[0][None]  # (1, n, D)
            timings.add("adapter", since)
            question = Question(rows.to(model.backbone.dtype), timings=timings)
            self._heard = _Heard(self._listener.end, question, hidden)
        if transcribe and self._heard.question.transcript is None and self.model.adapter.config.vocabulary:
            hidden = self._heard.hidden
            ids = self.model.adapter.transcribe(hidden, torch.tensor([hidden.shape[1]], device=hidden.device))[0]
            self._heard.question.transcript = self.model.prompt.decode(ids).strip()
        return self._heard

    def _prepare(self, live: bool) -> _Prepared | None:
        """Prefills the question so far, with the audio not yet closed if `live`; None where that holds no word."""
        model, pieces, end = self.model, list(self.question), 0
        if live:
            heard = self._hear()
            pieces.append(heard.question)
            end = heard.end
            if heard.question.rows.shape[1] == 0 or sum(piece.rows.shape[1] for piece in pieces) > QUESTION_ROWS:
                return None
        timings = Timings()
        for piece in pieces:
            timings.include(piece.timings)
        since = time.perf_counter()
        with torch.inference_mode():
            turn = Turn(torch.cat([piece.rows for piece in pieces], dim=1))
            start = self._make_room()
            hidden = model.backbone.prefill(self._opening(turn, first=start == len(self._prefix)), self._state)[:, -1]
        timings.add("prefill", since)
        speaker = Speaker(model, self.generation, self._generator, timings)
        self._prepared = _Prepared(len(self.question), end, start, hidden, speaker, timings, turn)
        return self._prepared

    def _opening(self, turn: Turn, first: bool) -> Tensor:
        """Embeddings from the end of the previous turn to where the answer begins, (1, T, D)."""
        embed = self.model.backbone.embed
        parts = [turn.question, embed(self._suffix)]
        return torch.cat(parts if first else [embed(self._between), *parts], dim=1)

    def _make_room(self) -> int:
        """Drops the oldest turns until the history fits its budget; returns the conversation's length."""
        if self._stale or self._state.length > len(self._prefix) + self.generation.history_tokens:
            self._read_history()
        return self._state.length

    @torch.inference_mode()
    def _read_history(self) -> None:
        """Fills the cache with the newest turns that fit the budget; the others are dropped."""
        self.model.backbone.truncate(self._state, len(self._prefix))
        keep: list[Turn] = []
        size = 0
        for old in reversed(self.turns):
            size += self._opening(old, first=False).shape[1] + len(old.answer_ids)
            if size > self.generation.history_tokens:
                break
            keep.insert(0, old)
        self.turns, self._stale = keep, False
        for index, old in enumerate(keep):
            answer = self.model.backbone.embed(old.answer_ids) if old.answer_ids else old.question[:, :0]
            old.asked_at = self._state.length
            self.model.backbone.prefill(torch.cat([self._opening(old, index == 0), answer], dim=1), self._state)
            old.answer_at = self._state.length - len(old.answer_ids)

    def _drop_prepared(self) -> None:
        if self._prepared:
            self.model.backbone.truncate(self._state, self._prepared.start)
            self._prepared = None

    def _stop_answer(self) -> None:
        """An answer that nobody goes on reading stays in the history as far as its text was made."""
        if self._answering:
            self._answering.stopped = True
            self._answering = None


ORIGINAL_PART_TOKENS = 50
"""Text tokens after which the original's speech decoder begins anew at the next end of a sentence."""
SENTENCE_ENDS = (".", "!", "?")


class _Answer:
    """One answer being made, in at most `limit` text tokens."""

    def __init__(self, session: Session, prepared: _Prepared, start: float, speak: bool, limit: int) -> None:
        self.session = session
        self.prepared = prepared
        self.start = start
        self.speak = speak
        self.limit = limit
        self.stopped = False
        self.complete = False  # the text has ended by itself, or at the limit
        self.predicting = prepared.hidden  # the state (1, D) that predicts the next token
        self.stopped_text = False  # the stop token was drawn
        self.restarts = False  # the newest text ends a part of the answer (released checkpoints)
        self.part_start = 0  # where the current part began, in text tokens
        self.shown = ""
        self.first_audio_ms = 0.0

    @property
    def ids(self) -> list[int]:
        return self.prepared.turn.answer_ids

    def run(self) -> Iterator[TextChunk | AudioChunk | Summary]:
        """The answer's chunks, until its end or `stopped`."""
        try:
            yield from self._chunks()
            if not self.stopped:
                self.prepared.turn.finished = True
                yield self._summary()
        finally:  # reached as well when the caller drops the iterator
            if self.session._answering is self:
                self.session._answering = None

    def _chunks(self) -> Iterator[TextChunk | AudioChunk]:
        hidden = self.prepared.hidden
        logits = self.session.model.backbone.logits(hidden)
        config = self.session.model.speech_decoder.config
        wanted = config.text_chunk - (not config.compatible)  # BOS is the first chunk's fifth row
        extend = self._extend_text_originally if config.compatible else self._extend_text
        while not self.complete and not self.stopped:
            logits, rows = extend(logits, wanted)
            wanted = config.text_chunk
            new = self._new_text()
            if new:
                yield TextChunk(new)
            if self.speak and not self.stopped:
                yield from self._sound(rows)

    def _sound(self, rows: Tensor) -> Iterator[AudioChunk]:
        """All sound that the text so far allows."""
        speaker, turn = self.prepared.speaker, self.prepared.turn
        speaker.add_text(rows, self.complete, self.restarts)
        for samples in speaker.speak():
            if not self.first_audio_ms:
                self.first_audio_ms = 1000 * (time.perf_counter() - self.start)
            turn.spoken_ms = 1000 * speaker.samples / ANSWER_RATE_HZ
            yield AudioChunk(samples)
            if self.stopped:
                return

    @torch.inference_mode()
    def _extend_text(self, logits: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Up to `wanted` tokens: the next logits and the speech decoder's rows (T, input_size) for the new text."""
        model, session, since = self.session.model, self.session, time.perf_counter()
        backbone, rows = model.backbone, []
        for _ in range(wanted):
            token = self._next_token(logits)
            if token in model.prompt.stop_ids:
                self.complete = True
                break
            hidden, logits = backbone.step(token, session._state)
            self.ids.append(token)
            rows.append(model.text_rows(hidden, [token]))
            if len(self.ids) >= self.limit:
                self.complete = True
                break
        if self.complete:
            rows.append(model.text_rows.end(model.text_end_id))
        self.prepared.timings.add("text", since)
        width = model.speech_decoder.config.input_size
        return logits, torch.cat(rows) if rows else torch.zeros(0, width)

    def _next_token(self, logits: Tensor) -> int:
        session, history = self.session, torch.tensor([self.ids], dtype=torch.long)
        return int(sample(logits, session.generation.text, session._generator, history))

    @torch.inference_mode()
    def _extend_text_originally(self, logits: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """`_extend_text` for released checkpoints: a token's row is the state that predicted it, not the one after it.

        The stop token has such a row, too, and the end's embedding follows it, unless that row would begin a chunk
        (then both are left out) or completes one (then the embedding is). At the first end of a sentence after 50
        tokens the text so far is spoken to its end, and the speech decoder begins anew with what follows. So does the
        original; where the whole answer ends there, it also adds two fixed speech tokens, which are left out here.
        """
        model, since = self.session.model, time.perf_counter()
        end, stopped = model.backbone.embed([model.text_end_id])[0], self.stopped_text
        rows: list[Tensor] = []
        begin, self.restarts = len(self.ids), False
        while not stopped and not self.restarts and len(rows) < wanted:
            full = len(self.ids) >= self.limit
            token = model.text_end_id if full else self._next_token(logits)
            rows.append(end if full else self.predicting)
            stopped = full or token in model.prompt.stop_ids
            if not stopped:
                self.predicting, logits = model.backbone.step(token, self.session._state)
                self.ids.append(token)
            if len(self.ids) + stopped - self.part_start >= ORIGINAL_PART_TOKENS:
                self.restarts = model.prompt.decode(self.ids[begin:]).endswith(SENTENCE_ENDS)
        self.complete = self.stopped_text or (stopped and (self.restarts or len(rows) < wanted))
        self.stopped_text = stopped
        if self.restarts:
            self.part_start, self.restarts = len(self.ids), not self.complete
            rows.append(end)
        elif self.complete and rows:
            rows = [*rows, end] if len(rows) > 1 else [end][len(self.ids) > 0 :]
        self.prepared.timings.add("text", since)
        return logits, torch.cat(rows).float() if rows else torch.zeros(0, end.shape[1])

    def _new_text(self) -> str:
        """What has become readable; a character whose tokens are incomplete waits."""
        text = self.session.model.prompt.decode(self.ids)
        if text.endswith(UNFINISHED) and not self.complete:
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def _summary(self) -> Summary:
        speaker, total_s = self.prepared.speaker, time.perf_counter() - self.start
        audio_s = speaker.samples / ANSWER_RATE_HZ
        return Summary(
            text=self.shown,
            audio_s=round(audio_s, 3),
            first_audio_ms=round(self.first_audio_ms, 1),
            total_ms=round(1000 * total_s, 1),
            rtf=round(total_s / audio_s, 3) if audio_s else 0.0,
            speech_tokens=len(speaker.tokens),
            tokens_per_step=round(len(speaker.tokens) / max(1, speaker.steps), 2),
            stages_ms=self.prepared.timings.milliseconds(),
        )


MS_PER_TEXT_TOKEN = 260.0
"""Speaking pace, for answers interrupted before their length is known: mini's answers, mean over the training set."""


def heard_tokens(text_tokens: int, spoken_ms: float, played_ms: float, finished: bool) -> int:
    """How many text tokens `played_ms` of audio have said: in proportion if the audio is complete, else by pace."""
    played_ms = min(max(0.0, played_ms), spoken_ms)
    pace = spoken_ms / max(1, text_tokens) if finished else MS_PER_TEXT_TOKEN
    return min(text_tokens, int(played_ms / pace)) if pace else 0
