"""A stand-in for the server that says recorded sound at chosen times: what the network and a busy machine can do."""

import asyncio
import base64
import itertools
import json
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

RATE = 24_000


@dataclass
class Script:
    """What every answer is: (samples, seconds to wait before sending them) in turn.

    `received` collects the client's events, `audio` the microphone's samples. `speech` says when, in seconds of the
    microphone's sound, the speaker starts, stops, starts … to speak.
    """

    pieces: list = field(default_factory=list)
    received: list = field(default_factory=list)
    audio: list = field(default_factory=list)
    speech: list = field(default_factory=list)
    refuse: str = ""
    vanish: bool = False

    def types(self):
        return [event["type"] for event in self.received]


class Conversation:
    def __init__(self, socket, script):
        self.socket = socket
        self.script = script
        self.count = 0
        self.answer = None
        self.heard = 0
        self.turns = iter(zip(script.speech, itertools.cycle(["started", "stopped"]), strict=False))
        self.turn = next(self.turns, None)

    async def send(self, kind, **fields):
        self.count += 1
        await self.socket.send_text(json.dumps({"type": kind, "event_id": f"event_{self.count}", **fields}))

    async def run(self):
        await self.send("session.created", session={"type": "realtime"})
        while True:
            event = json.loads(await self.socket.receive_text())
            if event["type"] == "input_audio_buffer.append":
                self.script.audio.append(np.frombuffer(base64.b64decode(event["audio"]), np.int16))
                await self.detect_turn(len(self.script.audio[-1]))
                if len(self.script.received) and self.script.received[-1]["type"] == event["type"]:
                    continue
            self.script.received.append(event)
            await self.handle(event)

    async def detect_turn(self, samples):
        self.heard += samples / RATE
        if self.turn is None or self.heard < self.turn[0]:
            return
        kind = self.turn[1]
        self.turn = next(self.turns, None)
        await self.send(f"input_audio_buffer.speech_{kind}", item_id="spoken", audio_start_ms=0)
        if kind == "started" and self.answer:
            self.answer.cancel()
        elif kind == "stopped":
            await self.commit()
            self.answer = asyncio.ensure_future(self.respond())

    async def commit(self):
        self.count += 1
        item = f"item_{self.count}"
        added = {"id": item, "type": "message", "role": "user", "content": [{"type": "input_audio"}]}
        await self.send("conversation.item.added", item=added)
        await self.send(
            "conversation.item.input_audio_transcription.completed", item_id=item, content_index=0,
            transcript="what city is the capital of france",
        )  # fmt: skip

    async def handle(self, event):
        if event["type"] == "input_audio_buffer.commit":
            await self.commit()
        elif event["type"] == "conversation.item.create":
            await self.send("conversation.item.added", item={"id": f"item_{self.count}", **event["item"]})
        elif event["type"] == "response.create":
            if self.script.vanish:
                await self.socket.close(1011)
                raise WebSocketDisconnect(1011)
            self.answer = asyncio.ensure_future(self.respond())
        elif event["type"] == "response.cancel" and self.answer:
            self.answer.cancel()
        elif event["type"] == "conversation.item.truncate":
            place = {key: event[key] for key in ("item_id", "content_index", "audio_end_ms")}
            await self.send("conversation.item.truncated", **place)
        elif event["type"] == "conversation.item.retrieve":
            content = [{"type": "output_audio", "transcript": "word 0", "audio": ""}]
            await self.send("conversation.item.retrieved", item={"id": event["item_id"], "content": content})

    async def respond(self):
        self.count += 1
        ids = {"response_id": f"resp_{self.count}", "item_id": f"answer_{self.count}"}
        place = {**ids, "output_index": 0, "content_index": 0}
        await self.send("response.created", response={"id": ids["response_id"], "status": "in_progress"})
        item = {"id": ids["item_id"], "type": "message", "role": "assistant"}
        await self.send("response.output_item.added", response_id=ids["response_id"], output_index=0, item=item)
        stages = {"encoder": 60.0, "adapter": 4.0, "prefill": 30.0, "text": 55.0, "speech": 50.0, "flow": 25.0,
                  "vocoder": 12.0}  # fmt: skip
        latency = {"response_id": ids["response_id"], "first_audio_ms": 240.0, "vad_wait_ms": None, "stages_ms": stages}
        status = "cancelled"
        try:
            for index, (samples, wait) in enumerate(self.script.pieces):
                await asyncio.sleep(wait)
                await self.send("response.output_audio_transcript.delta", **place, delta=f"word {index} ")
                pcm = np.round(32767 * samples).astype("<i2").tobytes()
                await self.send("response.output_audio.delta", **place, delta=base64.b64encode(pcm).decode())
                if index == 0:
                    await self.send("vocalnet.response.latency", **latency, final=False)
            status = "completed"
        finally:
            await self.send("response.output_audio.done", **place)
            await self.send("response.done", response={"id": ids["response_id"], "status": status})


def application(script):
    app = FastAPI()

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket):
        await socket.accept(subprotocol="realtime" if "realtime" in socket.scope["subprotocols"] else None)
        if script.refuse:
            await socket.send_text(json.dumps({"type": "error", "error": {"message": script.refuse}}))
            await socket.close(1013)
            return
        with suppress(WebSocketDisconnect):
            await Conversation(socket, script).run()

    return app


@contextmanager
def serving(app):
    """Runs an ASGI application on a free loopback port; yields "127.0.0.1:PORT"."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        threading.Event().wait(0.02)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
