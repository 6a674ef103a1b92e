"""A server on loopback with the tiny model, and what every server event must satisfy."""

import asyncio
import base64
import re
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import get_args

import numpy as np
from openai import AsyncOpenAI
from openai.types.realtime.realtime_server_event import RealtimeServerEvent
from pydantic import BaseModel

from vocalnet.serving.app import Service
from vocalnet.serving.run import make_server
from vocalnet.serving.settings import ServeSettings
from vocalnet.serving.vad import EnergyVad

RATE = 24_000
WAIT_S = 60
EVENT_TYPES = {
    get_args(model.model_fields["type"].annotation)[0]: model for model in get_args(get_args(RealtimeServerEvent)[0])
}
BESIDE_THE_SDK = {
    "id",
    "object",
    "expires_at",
    "vocalnet",
}  # in `session`, though the SDK's model leaves them out

# One response's events, and those of its item in the conversation. LiveKit's client writes down the order in which it
# gets and needs them, up to the parts' end; of an item's two `done` events neither the SDK's documentation nor a client
# that we read says which comes first. What stands in the outer parentheses is missing where nothing was said.
SPOKEN = r"(output_audio(_transcript)?\.delta )*output_audio\.done output_audio_transcript\.done "
WRITTEN = r"(output_text\.delta )*output_text\.done "
ADDED = r"output_item\.added conversation\.item\.added content_part\.added "
DONE = r"content_part\.done conversation\.item\.done output_item\.done "
RESPONSE_ORDER = re.compile(rf"created ({ADDED}({SPOKEN}|{WRITTEN}){DONE})?done ")


@contextmanager
def serving(model, **settings):
    """A server in a thread; yields (address, service)."""
    vad = settings.pop("vad", EnergyVad)
    service = Service(model, ServeSettings(port=0, **settings), vad)
    server = make_server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server hangs"


def no_unknown_fields(value, where=""):
    """Fails where a server event has a field that the SDK's model does not know."""
    if isinstance(value, BaseModel):
        extra = set(value.model_extra or {})
        if where.endswith(".session"):
            extra -= BESIDE_THE_SDK
        assert not extra, f"{where} has unknown fields {extra}"
        for name in value.model_fields_set & set(type(value).model_fields):
            no_unknown_fields(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            no_unknown_fields(item, f"{where}[{index}]")


class Client:
    """A conversation held by the official SDK; keeps and checks every server event."""

    def __init__(self, connection):
        self.sdk = connection
        self.events = []

    async def next(self):
        """The next event, validated against the SDK's own model of its type."""
        raw = await asyncio.wait_for(self.sdk.recv_bytes(), WAIT_S)
        event = self.sdk.parse_event(raw)
        model = EVENT_TYPES[event.type]
        no_unknown_fields(model.model_validate_json(raw), event.type)
        self.events.append(event)
        return event

    async def until(self, kind, allow_errors=False):
        """Reads to the next event of that type, which it returns."""
        while True:
            event = await self.next()
            if event.type == kind:
                return event
            assert allow_errors or event.type != "error", event

    async def say(self, samples, piece_s=0.1):
        """Appends (n,) float32 at 24 kHz."""
        for start in range(0, len(samples), int(piece_s * RATE)):
            pcm = (samples[start : start + int(piece_s * RATE)] * 32767).astype("<i2").tobytes()
            await self.sdk.input_audio_buffer.append(audio=base64.b64encode(pcm).decode())

    async def configure(self, turns=None, **session):
        """session.update; `turns`: the turn detection."""
        audio = session.pop("audio", {})
        audio = {**audio, "input": {**audio.get("input", {}), "turn_detection": turns}}
        await self.sdk.session.update(session={"type": "realtime", "audio": audio, **session})
        return await self.until("session.updated")

    async def ask(self, samples):
        """A question without turn detection; returns the response at its end."""
        await self.say(samples)
        await self.sdk.input_audio_buffer.commit()
        await self.sdk.response.create()
        return (await self.until("response.done")).response

    def types(self):
        return [event.type for event in self.events]

    def sound(self, response_id):
        """(n,) int16 of one response."""
        deltas = [e.delta for e in self.events if e.type == "response.output_audio.delta"
                  and e.response_id == response_id]  # fmt: skip
        return np.frombuffer(b"".join(base64.b64decode(delta) for delta in deltas), "<i2")

    def check_order(self):
        """Every response, item and utterance in the documented order."""
        assert self.types()[0] == "session.created"
        ids = [event.response.id for event in self.events if event.type == "response.created"]
        starts = [event for event in self.events if event.type == "response.output_item.added"]
        answers = {event.item.id: event.response_id for event in starts}
        for response_id in ids:
            types = [event.type for event in self.events if response_of(event, answers) == response_id]
            line = "".join(kind.removeprefix("response.") + " " for kind in types)
            assert RESPONSE_ORDER.fullmatch(line), line
        added = [event.item.id for event in self.events if event.type == "conversation.item.added"]
        done = [event.item.id for event in self.events if event.type == "conversation.item.done"]
        assert len(set(added)) == len(added)
        assert set(done) <= set(added)
        types = self.types()
        for place in (index for index, kind in enumerate(types) if kind == "input_audio_buffer.committed"):
            assert types[place + 1 : place + 3] == ["conversation.item.added", "conversation.item.done"]
        heard = [
            (event.type.rpartition(".")[2], event.item_id) for event in self.events
            if event.type.startswith("input_audio_buffer.") and "item_id" in type(event).model_fields
        ]  # fmt: skip
        for item in {item for _, item in heard}:
            steps = [kind for kind, other in heard if other == item]
            whole = ["speech_started", "speech_stopped", "committed"]  # the client may commit in between, or clear
            assert steps in (whole, whole[::2], whole[:1], whole[2:])
        assert len({event.event_id for event in self.events}) == len(self.events)


def response_of(event, answers):
    """The response that an event belongs to, or None; `answers`: the response of every answer's item."""
    if event.type in ("conversation.item.added", "conversation.item.done"):
        return answers.get(event.item.id)
    return event.response.id if hasattr(event, "response") else getattr(event, "response_id", None)


@asynccontextmanager
async def talking(address, **options):
    """A checked conversation through `client.realtime.connect`."""
    client = AsyncOpenAI(
        api_key=options.pop("key", "none"), base_url=f"http://{address}/v1", websocket_base_url=f"ws://{address}/v1"
    )
    async with client.realtime.connect(model="mini", **options) as connection:
        talk = Client(connection)
        await talk.until("session.created")
        yield talk
    talk.check_order()
