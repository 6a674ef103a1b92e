"""One answer on its way to a client: what has been made of it, and how it looks in the protocol's events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vocalnet.serving.events import ResponseConfig
from vocalnet.serving.formats import FORMATS, PCM, WireFormat
from vocalnet.serving.items import Item
from vocalnet.serving.outbox import Event
from vocalnet.session import AudioChunk, Summary, TextChunk


@dataclass(frozen=True)
class Made:
    """A piece of an answer, and what had been done when it was ready.

    Attributes:
        text_tokens, speech_tokens: of the answer.
        stages_ms: work per stage.
    """

    piece: TextChunk | AudioChunk | Summary
    text_tokens: int
    speech_tokens: int
    stages_ms: dict[str, float]


@dataclass
class Response:
    """An answer on its way.

    Attributes:
        asked_at: when the question ended, on the conversation's clock.
        pieces: how many pieces the model has made.
        sent_s: sound sent to the client.
        made: the newest piece.
        late: pieces that came after the client's player must have run dry.
    """

    id: str
    item: Item
    config: ResponseConfig
    modality: str
    form: WireFormat
    max_tokens: int | None
    asked_at: float
    vad_wait_ms: float | None
    opened: bool = False
    status: str = "in_progress"
    reason: str | None = None
    error: dict[str, Any] | None = None
    pieces: int = 0
    first_audio_at: float | None = None
    sent_s: float = 0.0
    usage: dict[str, Any] | None = None
    summary: Summary | None = None
    made: Made | None = None
    late: int = 0

    @property
    def active(self) -> bool:
        """Nothing has ended it yet."""
        return self.status == "in_progress"

    @property
    def first_audio_ms(self) -> float | None:
        """From the question's end to the first sound, as far as there is any."""
        return None if self.first_audio_at is None else round(1000 * (self.first_audio_at - self.asked_at), 1)

    @property
    def place(self) -> Event:
        """Where in the conversation its content is."""
        return {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}

    def event(self, conversation_id: str, voice: str) -> Event:
        """The protocol's response object."""
        done = not self.active
        details = {"type": self.status, "reason": self.reason, "error": self.error} if done else None
        form = next(name for name, form in FORMATS.items() if form is self.form)
        rate = {"rate": PCM.rate_hz} if self.form is PCM else {}
        return {
            "id": self.id, "object": "realtime.response", "status": self.status, "status_details": details,
            "output": [self.item.event()] if done and self.opened else [],
            "conversation_id": conversation_id, "output_modalities": [self.modality],
            "max_output_tokens": self.max_tokens or "inf",
            "audio": {"output": {"format": {"type": form, **rate}, "voice": voice}},
            "metadata": self.config.metadata, "usage": self._usage() if done else None,
        }  # fmt: skip

    def latency(self, final: bool) -> Event:
        """What the stages took, so far or in all."""
        fields: Event = {
            "response_id": self.id, "final": final, "vad_wait_ms": self.vad_wait_ms,
            "first_audio_ms": self.first_audio_ms, "stages_ms": self.made.stages_ms if self.made else {},
        }  # fmt: skip
        if self.summary:
            made = self.summary
            fields |= {"total_ms": made.total_ms, "rtf": made.rtf, "audio_s": made.audio_s}
            fields["tokens_per_step"] = made.tokens_per_step
        return fields

    def _usage(self) -> Event:
        """Zeros where nothing was read or made: clients read the numbers of every response."""
        used = self.usage or {"input_tokens": 0, "cached_tokens": 0, "audio_tokens": 0}
        read, cached, audio_in = used["input_tokens"], used["cached_tokens"], used["audio_tokens"]
        text, audio = (self.made.text_tokens, self.made.speech_tokens) if self.made else (0, 0)
        return {
            "total_tokens": read + text + audio, "input_tokens": read, "output_tokens": text + audio,
            "input_token_details": {
                "cached_tokens": cached, "text_tokens": read - audio_in, "audio_tokens": audio_in, "image_tokens": 0,
            },
            "output_token_details": {"text_tokens": text, "audio_tokens": audio},
        }  # fmt: skip
