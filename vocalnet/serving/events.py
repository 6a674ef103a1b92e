"""Client events of the Realtime protocol, checked; names and fields as in OpenAI's generally available form.

A field that would change the answer and cannot be honoured (tools, input of its own, a playback speed) is refused with
an error. A field that is only a wish (model, voice, noise reduction, tracing, instructions, truncation and such) is
accepted, and `session.updated` shows what is in force.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vocalnet.decoding import DecodingMode
from vocalnet.errors import VocalNetError

EAGERNESS_MS = {"high": 350, "medium": 650, "auto": 650, "low": 1200}
"""semantic_vad without a semantic model: the silence that ends a turn, by eagerness."""


class ProtocolError(VocalNetError):
    """A client event that cannot be honoured; the conversation goes on.

    Attributes:
        code, param: as in the protocol's `error` event.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


# ---- the session's configuration ----


class PcmFormat(_Strict):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class G711Format(_Strict):
    type: Literal["audio/pcmu", "audio/pcma"]


AudioFormat = Annotated[PcmFormat | G711Format, Field(discriminator="type")]


class ServerVad(_Strict):
    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5000)
    silence_duration_ms: int = Field(default=500, ge=100, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class SemanticVad(_Strict):
    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True


TurnDetection = Annotated[ServerVad | SemanticVad, Field(discriminator="type")]


class Transcription(_Lenient):
    """Read by the adapter's CTC head, whatever model is asked for."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None


class InputConfig(_Strict):
    format: AudioFormat = PcmFormat()
    transcription: Transcription | None = None
    noise_reduction: Any = None
    turn_detection: TurnDetection | None = ServerVad()


class OutputConfig(_Strict):
    format: AudioFormat = PcmFormat()
    voice: Any = None
    speed: Annotated[float, Field(ge=1, le=1)] = 1.0


class AudioConfig(_Strict):
    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()


Modalities = Annotated[list[Literal["audio", "text"]], Field(min_length=1, max_length=1)]
TokenLimit = Annotated[int, Field(ge=1, le=4096)] | Literal["inf"]
NoTools = Annotated[list[Any], Field(max_length=0)]


class Extension(_Strict):
    """Beyond the protocol: how answers are spoken, and whether `vocalnet.*` events are wanted."""

    mtp: int | None = None
    decoding: DecodingMode | None = None
    events: bool = False


class SessionConfig(_Strict):
    type: Literal["realtime"] = "realtime"
    object: Literal["realtime.session"] = "realtime.session"
    id: str = ""
    model: Any = None
    output_modalities: Modalities = ["audio"]
    instructions: str | None = ""
    audio: AudioConfig = AudioConfig()
    max_output_tokens: TokenLimit = "inf"
    tools: NoTools = []
    tool_choice: Any = "auto"
    parallel_tool_calls: Any = None
    tracing: Any = None
    truncation: Any = "auto"
    prompt: None = None
    reasoning: Any = None
    include: Any = None
    expires_at: Any = None
    vocalnet: Extension = Extension()


# ---- client events ----


class _Event(_Lenient):
    event_id: str | None = Field(default=None, max_length=512)


class SessionUpdate(_Event):
    type: Literal["session.update"]
    session: dict[str, Any]


class AppendAudio(_Event):
    type: Literal["input_audio_buffer.append"]
    audio: str


class CommitAudio(_Event):
    type: Literal["input_audio_buffer.commit"]


class ClearAudio(_Event):
    type: Literal["input_audio_buffer.clear"]


class Part(_Lenient):
    type: Literal["input_text", "input_audio", "output_text", "text", "output_audio"]
    text: str | None = None
    audio: str | None = None
    transcript: str | None = None


class NewItem(_Lenient):
    type: Literal["message"]
    role: Literal["user", "assistant", "system"]
    content: list[Part] = Field(min_length=1, max_length=16)
    id: str | None = Field(default=None, min_length=1, max_length=64)


class CreateItem(_Event):
    type: Literal["conversation.item.create"]
    item: NewItem
    previous_item_id: str | None = None


class RetrieveItem(_Event):
    type: Literal["conversation.item.retrieve"]
    item_id: str


class DeleteItem(_Event):
    type: Literal["conversation.item.delete"]
    item_id: str


class TruncateItem(_Event):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: Literal[0]
    audio_end_ms: int = Field(ge=0)


class _ResponseOutput(_Strict):
    format: AudioFormat | None = None
    voice: Any = None


class _ResponseAudio(_Strict):
    output: _ResponseOutput | None = None


class ResponseConfig(_Strict):
    audio: _ResponseAudio | None = None
    conversation: Literal["auto"] | None = "auto"
    input: None = None
    instructions: str | None = None
    max_output_tokens: TokenLimit | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    output_modalities: Modalities | None = None
    parallel_tool_calls: Any = None
    prompt: None = None
    reasoning: Any = None
    tool_choice: Any = None
    tools: NoTools | None = None


class CreateResponse(_Event):
    type: Literal["response.create"]
    response: ResponseConfig | None = None


class CancelResponse(_Event):
    type: Literal["response.cancel"]
    response_id: str | None = None


ClientEvent = Annotated[
    SessionUpdate
    | AppendAudio
    | CommitAudio
    | ClearAudio
    | CreateItem
    | RetrieveItem
    | DeleteItem
    | TruncateItem
    | CreateResponse
    | CancelResponse,
    Field(discriminator="type"),
]
_CLIENT_EVENT: TypeAdapter[ClientEvent] = TypeAdapter(ClientEvent)


def parse_event(raw: Any) -> ClientEvent:
    """A client event from decoded JSON.

    Raises:
        ProtocolError: not an object, an unknown type, or bad fields.
    """
    if not isinstance(raw, dict):
        raise ProtocolError(f"an event is a JSON object; got {type(raw).__name__}", "invalid_event")
    try:
        return _CLIENT_EVENT.validate_python(raw)
    except ValidationError as error:
        raise _explain(error, raw) from error


def updated(config: SessionConfig, patch: dict[str, Any]) -> SessionConfig:
    """The configuration with a client's changes: what it leaves out, or open with `null`, stays.

    Raises:
        ProtocolError: unknown fields or values that are not allowed.
    """
    fixed = ("id", "object", "expires_at", "model")
    wanted = {key: value for key, value in _without_nulls(patch).items() if key not in fixed}
    merged = _merge(config.model_dump(), wanted)
    try:
        new = SessionConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, patch, "session") from error
    new.instructions, new.tracing, new.reasoning, new.include = "", None, None, None
    new.truncation, new.tool_choice, new.parallel_tool_calls = "auto", "auto", None
    new.audio.input.noise_reduction, new.audio.output.voice = None, config.audio.output.voice
    return new


def _without_nulls(patch: dict[str, Any]) -> dict[str, Any]:
    """What a client leaves open with `null` is as good as left out; only switches are off by it."""
    switches = ("turn_detection", "transcription")
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in patch.items()
        if value is not None or key in switches
    }


def _merge(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`patch` over `base`; objects with a type of their own are replaced, not mixed."""
    merged = dict(base)
    for key, value in patch.items():
        old = base.get(key)
        mix = isinstance(value, dict) and isinstance(old, dict) and key in ("audio", "input", "output", "vocalnet")
        merged[key] = _merge(old, value) if mix else value  # type: ignore[arg-type]
    return merged


def _explain(error: ValidationError, raw: dict[str, Any], root: str = "") -> ProtocolError:
    """The first of pydantic's complaints, in the protocol's terms."""
    first = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in first["loc"]]
    if not root and first["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        names = names[1:]  # the event's type, by which pydantic chose
    param = ".".join([*([root] if root else []), *names]) or "type"
    if first["type"] == "union_tag_invalid" and not names:
        return ProtocolError(f"unknown event type '{str(raw.get('type'))[:80]}'", "unknown_event", "type")
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    code = codes.get(first["type"], "invalid_value")
    return ProtocolError(f"{param}: {first['msg']}", code, param)
