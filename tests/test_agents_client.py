"""A second client of the Realtime protocol, unmodified: a voice agent of the openai-agents SDK against our server."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server needs the extra 'serve'")
pytest.importorskip("openai", reason="shared helpers use the SDK")
agents = pytest.importorskip("agents.realtime", reason="the client is the package openai-agents")

from tests.realtime import RATE, serving  # noqa: E402
from tests.test_session import speech  # noqa: E402
from tests.tiny_model import tiny_model  # noqa: E402

WAIT_S = 60
MESSAGE = RATE // 10
VAD = {"type": "server_vad", "silence_duration_ms": 300, "interrupt_response": True}


class Agent:
    """A session of the SDK; keeps its own events and history, and the server's events as the SDK passes them on."""

    def __init__(self, session, tracker):
        self.session = session
        self.tracker = tracker
        self.events = []
        self.history = []
        self.raw = []
        self._stream = aiter(session)

    async def next(self):
        event = await asyncio.wait_for(anext(self._stream), WAIT_S)
        assert event.type != "error", event.error
        self.events.append(event)
        if event.type == "history_added":
            self.history = [*self.history, event.item]
        elif event.type == "history_updated":
            self.history = event.history
        elif event.type == "raw_model_event":
            assert event.data.type not in ("error", "exception"), event.data
            if event.data.type == "raw_server_event":
                self.raw.append(event.data.data)
        return event

    async def until(self, kind):
        """The next event of the SDK of that type."""
        while (event := await self.next()).type != kind:
            pass
        return event

    async def until_raw(self, kind):
        """The next event of the server of that type, once the SDK has acted on it."""
        seen = len(self.raw)
        while not any(event["type"] == kind for event in self.raw[seen:]):
            await self.next()
        return self.raw[-1]

    async def say(self, samples):
        for start in range(0, len(samples), MESSAGE):
            await self.session.send_audio((samples[start : start + MESSAGE] * 32767).astype("<i2").tobytes())

    async def hear(self, milliseconds):
        """Plays so much of the answer; the item that it belongs to."""
        received = 0
        while received < milliseconds:
            audio = await self.until("audio")
            received += len(audio.audio.data) / 2 / RATE * 1000
        self.tracker.on_play_ms(audio.item_id, audio.content_index, milliseconds)
        return audio.item_id

    def types(self):
        return [event["type"] for event in self.raw]

    def spoken(self):
        """(role, what was said) of every item in the history."""
        parts = [(item.role, part) for item in self.history for part in item.content]
        return [(role, getattr(part, "transcript", None) or getattr(part, "text", None)) for role, part in parts]


@asynccontextmanager
async def talking(address, **settings):
    tracker = agents.RealtimePlaybackTracker()
    config = {
        "url": f"ws://{address}/v1/realtime?model=mini",
        "headers": {"Authorization": "Bearer none"},
        "playback_tracker": tracker,
        "initial_model_settings": {"turn_detection": VAD, **settings},
    }
    runner = agents.RealtimeRunner(agents.RealtimeAgent(name="test", instructions="Answer in one word."))
    async with await runner.run(model_config=config) as session:
        yield Agent(session, tracker)


def pause(seconds=0.5):
    return np.zeros(int(seconds * RATE), np.float32)


@pytest.fixture(scope="module")
def address():
    with serving(tiny_model(max_text_tokens=96)) as (address, _):
        yield address


def test_a_spoken_and_a_written_turn(address):
    async def conversation():
        async with talking(address, max_output_tokens=9) as agent:
            await agent.say(np.concatenate([speech(0.7, 0, RATE), pause()]))
            await agent.until("audio_end")
            await agent.until("agent_end")
            await agent.session.send_message("w3 w4")
            await agent.until("audio_end")
            await agent.until("agent_end")
            usage = [e.data for e in agent.events if e.type == "raw_model_event" and e.data.type == "usage"]
            assert [one.output_tokens_details.text_tokens for one in usage] == [9, 9]
            answers = ["", ""]
            items = list(dict.fromkeys(e["item_id"] for e in agent.raw if e["type"] == "response.output_audio.delta"))
            for event in agent.raw:
                if event["type"] == "response.output_audio_transcript.delta":
                    answers[items.index(event["item_id"])] += event["delta"]
            assert agent.spoken() == [
                ("user", None), ("assistant", answers[0]), ("user", "w3 w4"), ("assistant", answers[1]),
            ], "the tiny model cannot write down what it hears"  # fmt: skip
            assert [item.item_id for item in agent.history[1::2]] == items

    asyncio.run(conversation())


def test_an_answer_in_text(address):
    async def conversation():
        async with talking(address, output_modalities=["text"], max_output_tokens=9) as agent:
            await agent.session.send_message("w7")
            await agent.until("agent_end")
            assert agent.spoken()[0] == ("user", "w7")
            assert len(agent.spoken()[1][1].split()) == 9
            assert not [kind for kind in agent.types() if "audio" in kind]

    asyncio.run(conversation())


def test_speech_interrupts_and_the_history_says_what_was_heard(address):
    async def conversation():
        async with talking(address) as agent:
            await agent.say(np.concatenate([speech(0.7, 0, RATE), pause()]))
            item = await agent.hear(300)
            await agent.say(speech(0.8, 1, RATE))
            await agent.until("audio_interrupted")
            done = await agent.until_raw("response.done")
            assert done["response"]["status_details"]["reason"] == "turn_detected"
            await agent.until_raw("conversation.item.truncated")
            await agent.until_raw("conversation.item.retrieved")
            await agent.until("history_updated")
            heard = agent.spoken()[1][1]
            streamed = done["response"]["output"][0]["content"][0]["transcript"]
            assert len(heard.split()) == 1, "300 ms hold one word"
            assert streamed.startswith(heard)
            await agent.say(pause())
            second = await agent.hear(100)
            assert second != item
            started = max(i for i, kind in enumerate(agent.types()) if kind.endswith("speech_started"))
            assert not [e for e in agent.raw[started:] if e.get("item_id") == item and e["type"].endswith("delta")]
            assert agent.spoken()[1][1] == heard
            await agent.session.interrupt()
            done = await agent.until_raw("response.done")
            assert done["response"]["status"] == "cancelled"
            await agent.until_raw("conversation.item.truncated")

    asyncio.run(conversation())


def test_tools_are_refused_by_name(address):
    async def conversation():
        async with talking(address) as agent:
            await agent.until_raw("session.updated")
            tool = {"type": "function", "name": "f", "description": "", "parameters": {"type": "object"}}
            message = {"type": "session.update", "other_data": {"session": {"type": "realtime", "tools": [tool]}}}
            await agent.session.model.send_event(agents.RealtimeModelSendRawMessage(message=message))
            with pytest.raises(AssertionError, match=r"session\.tools"):
                await agent.until("history_added")

    asyncio.run(conversation())
