"""The server as a client meets it: the official SDK talks, and every event is checked against the SDK's models."""

import asyncio
import base64

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server needs the extra 'serve'")
pytest.importorskip("openai", reason="the SDK is the client")

from tests.realtime import RATE, serving, talking
from tests.test_session import speech
from tests.tiny_model import tiny_model
from vocalnet.audio import read_audio
from vocalnet.model import VocalNet
from vocalnet.serving.formats import FORMATS, encode
from vocalnet.serving.outbox import Outbox
from vocalnet.serving.vad import SileroVad, make_vad

VAD = {"type": "server_vad", "silence_duration_ms": 300}
MS = RATE // 1000


def quiet(seconds):
    return np.zeros(int(seconds * RATE), np.float32)


def voice(seconds=0.6, seed=0):
    """Sound that loudness takes for speech, and the silence that ends the turn."""
    return np.concatenate([speech(seconds, seed, RATE), quiet(0.5)])


@pytest.fixture(scope="module")
def address():
    with serving(tiny_model(max_text_tokens=9), max_sessions=3) as (address, _):
        yield address


@pytest.fixture(scope="module")
def long_winded():
    """Answers long enough to be interrupted."""
    with serving(tiny_model(max_text_tokens=96)) as (address, service):
        yield address, service


def test_three_turns_without_turn_detection(address):
    async def conversation():
        async with talking(address) as client:
            await client.configure(output_modalities=["audio"])
            sounds, before = [], 0
            for turn in range(3):
                response = await client.ask(speech(0.6, turn, RATE))
                assert response.status == "incomplete", "the tiny model talks to its limit"
                assert response.status_details.reason == "max_output_tokens"
                answer = response.output[0]
                assert answer.content[0].transcript
                usage = response.usage
                assert usage.total_tokens == usage.input_tokens + usage.output_tokens
                assert usage.output_token_details.text_tokens == 9
                assert usage.output_token_details.audio_tokens > 0
                assert usage.input_token_details.audio_tokens > 0
                if turn:
                    assert usage.input_token_details.cached_tokens == before + 9, "earlier turns are in the cache"
                before = usage.input_tokens
                sounds.append(client.sound(response.id))
                assert len(sounds[-1]) == 960 * usage.output_token_details.audio_tokens
            deltas = [t for t in client.types() if t.endswith("delta")]
            first = deltas.index("response.output_audio.delta")
            assert "response.output_audio_transcript.delta" in deltas[first:], "text and sound are interleaved"

    asyncio.run(conversation())


def test_three_turns_with_server_vad(address):
    async def conversation():
        async with talking(address) as client:
            await client.configure(VAD)
            for turn in range(3):
                await client.say(voice(0.7, turn))
                done = await client.until("response.done")
                assert done.response.output[0].content[0].transcript
            types = client.types()
            for kind in ("speech_started", "speech_stopped", "committed"):
                assert types.count(f"input_audio_buffer.{kind}") == 3
            starts = [e.audio_start_ms for e in client.events if e.type.endswith("speech_started")]
            ends = [e.audio_end_ms for e in client.events if e.type.endswith("speech_stopped")]
            for turn in range(3):  # 0.7 s of speech from 1.2·turn s on, then silence
                assert max(0, 1200 * turn - 340) <= starts[turn] <= 1200 * turn, "with padding"
                assert ends[turn] == pytest.approx(1200 * turn + 1000, abs=80)

    asyncio.run(conversation())


def test_silero_finds_the_turn_in_a_recording():
    if not isinstance(make_vad(), SileroVad):
        pytest.skip("silero-vad is not installed")

    async def conversation(address):
        async with talking(address) as client:
            await client.configure({"type": "semantic_vad", "eagerness": "high"})
            await client.say(np.concatenate([read_audio("examples/question.wav", RATE), quiet(0.5)]))
            await client.until("response.done")
            assert client.types().count("input_audio_buffer.committed") == 1

    with serving(tiny_model(max_text_tokens=6), vad=make_vad) as (address, _):
        asyncio.run(conversation(address))


def test_speech_interrupts_and_the_history_keeps_what_was_heard(long_winded):
    address, service = long_winded

    async def conversation():
        async with talking(address) as client:
            await client.configure(VAD)
            await client.say(voice(0.7))
            await client.until("response.output_audio.delta")
            await client.say(speech(0.7, 1, RATE))
            await client.until("input_audio_buffer.speech_started")
            done = await client.until("response.done")
            place = client.types().index("input_audio_buffer.speech_started", 5)
            assert not [t for t in client.types()[place:] if t.endswith("delta")], "stopped at once"
            assert done.response.status == "cancelled"
            assert done.response.status_details.reason == "turn_detected"
            conversation = next(iter(service.connections))._conversation
            cut_short = conversation._response
            pieces = cut_short.pieces
            answer = done.response.output[0]
            assert answer.status == "incomplete"
            await client.sdk.conversation.item.truncate(item_id=answer.id, content_index=0, audio_end_ms=300)
            cut = await client.until("conversation.item.truncated")
            assert cut.audio_end_ms == 300
            await client.say(quiet(0.6))
            second = (await client.until("response.created")).response.id
            await client.until("response.output_audio.delta")
            await client.sdk.conversation.item.retrieve(item_id=answer.id)
            kept = (await client.until("conversation.item.retrieved")).item.content[0]
            assert done.response.output[0].content[0].transcript.startswith(kept.transcript)
            assert len(kept.transcript) < len(answer.content[0].transcript)
            assert len(base64.b64decode(kept.audio)) == 2 * 300 * MS
            await client.sdk.response.cancel()
            assert (await client.until("response.done")).response.id == second
            assert not [e for e in client.events[place:] if e.type.endswith("delta") and e.item_id == answer.id]
            assert cut_short.pieces <= pieces + 1, "the model makes no more than what it had in hand"
            first, _ = conversation._session.turns
            assert len(first.answer_ids) == 1, "300 ms hold one word"

    asyncio.run(conversation())


def test_what_waits_for_a_slow_reader_is_taken_back():
    """Sound that was made but has not left when speech is detected must not leave after it."""

    async def conversation():
        outbox = Outbox(10_000)
        for response in ("old", "cut"):
            outbox.put_now({"type": "response.output_audio.delta", "delta": b"x" * 6_000}, response=response)
        outbox.put_now({"type": "input_audio_buffer.speech_started"})
        outbox.drop_deltas("cut")
        assert [len((await outbox.get()).get("delta", "")) for _ in range(len(outbox))] == [6_000, 0]
        await asyncio.wait_for(outbox.room(), 1)

    asyncio.run(conversation())


def test_an_acknowledgement_does_not_interrupt(long_winded):
    async def conversation():
        async with talking(long_winded[0]) as client:
            await client.configure(VAD)
            await client.say(voice(0.7))
            await client.until("response.output_audio.delta")
            await client.say(voice(0.3, 1))
            await client.sdk.conversation.item.retrieve(item_id="none")  # answered after what was said
            await client.until("error", allow_errors=True)
            assert client.types().count("input_audio_buffer.speech_started") == 1
            assert "response.done" not in client.types()
            await client.sdk.response.cancel()
            await client.until("response.done")

    asyncio.run(conversation())


def test_cancel_then_the_conversation_goes_on(long_winded):
    async def conversation():
        async with talking(long_winded[0]) as client:
            await client.configure()
            await client.say(speech(0.6, 0, RATE))
            await client.sdk.input_audio_buffer.commit()
            await client.sdk.response.create()
            await client.until("response.output_audio.delta")
            await client.sdk.response.create(event_id="again")
            error = (await client.until("error")).error
            assert (error.code, error.event_id) == ("conversation_already_has_active_response", "again")
            await client.sdk.response.cancel()
            done = await client.until("response.done")
            assert done.response.status == "cancelled"
            assert done.response.status_details.reason == "client_cancelled"
            await client.sdk.response.cancel()
            assert (await client.until("error")).error.code == "response_cancel_not_active"
            await client.say(speech(0.6, 1, RATE))
            await client.sdk.input_audio_buffer.commit()
            await client.sdk.response.create(response={"max_output_tokens": 5})
            assert (await client.until("response.done")).response.usage.output_token_details.text_tokens == 5

    asyncio.run(conversation())


def test_written_questions_and_text_answers(address):
    async def conversation():
        async with talking(address) as client:
            await client.configure(output_modalities=["text"])
            for text in ("w3 w4", "w5"):
                content = [{"type": "input_text", "text": text}]
                await client.sdk.conversation.item.create(item={"type": "message", "role": "user", "content": content})
                item = (await client.until("conversation.item.done")).item
                assert item.content[0].text == text
                await client.sdk.response.create(response={"metadata": {"mine": "yes"}})
                response = (await client.until("response.done")).response
                assert response.metadata == {"mine": "yes"}
                assert response.output[0].content[0].text
                assert response.usage.output_token_details.audio_tokens == 0
            assert not [t for t in client.types() if "audio" in t]
            await client.sdk.response.create(response={"output_modalities": ["audio"]})
            failed = (await client.until("response.done")).response
            assert failed.status == "failed", "there is no new question"
            assert failed.status_details.error.code == "no_question"

    asyncio.run(conversation())


def test_items_are_inserted_deleted_and_retrieved(address):
    async def conversation():
        def message(role, text):
            kind = "output_text" if role == "assistant" else "input_text"
            return {"type": "message", "role": role, "id": f"{role}-{text}", "content": [{"type": kind, "text": text}]}

        async with talking(address) as client:
            await client.configure(output_modalities=["text"])
            create = client.sdk.conversation.item.create
            for role, text, after in [("user", "w1", None), ("user", "w3", None), ("assistant", "w2", "user-w1")]:
                await create(item=message(role, text), **({"previous_item_id": after} if after else {}))
                added = await client.until("conversation.item.added")
            assert added.previous_item_id == "user-w1"
            await client.sdk.response.create()
            used = (await client.until("response.done")).response.usage.input_tokens
            await client.sdk.conversation.item.delete(item_id="assistant-w2")
            assert (await client.until("conversation.item.deleted")).item_id == "assistant-w2"
            await create(item=message("user", "w9"))
            await client.sdk.response.create(response={"max_output_tokens": 1})
            more = (await client.until("response.done")).response.usage.input_tokens
            assert more > used
            for wrong, code in [
                (client.sdk.conversation.item.delete(item_id="assistant-w2"), "item_delete_invalid_item_id"),
                (client.sdk.conversation.item.retrieve(item_id="x"), "item_retrieve_invalid_item_id"),
                (create(item=message("user", "w9")), "item_create_duplicate_id"),
                (create(item=message("user", "w8"), previous_item_id="x"), "item_create_invalid_item_id"),
                (client.sdk.conversation.item.truncate(item_id="user-w9", content_index=0, audio_end_ms=1),
                 "item_truncate_invalid_item_id"),
            ]:  # fmt: skip
                await wrong
                assert (await client.until("error")).error.code == code

    asyncio.run(conversation())


@pytest.mark.parametrize("kind", ["audio/pcmu", "audio/pcma"])
def test_telephone_audio_both_ways(address, kind):
    async def conversation():
        async with talking(address) as client:
            form = {"format": {"type": kind}}
            await client.configure(audio={"input": form, "output": form})
            samples = speech(0.8, 0, 8000)
            for start in range(0, 6400, 800):
                data = encode(samples[start : start + 800], FORMATS[kind])
                assert len(data) == 800
                await client.sdk.input_audio_buffer.append(audio=base64.b64encode(data).decode())
            await client.sdk.input_audio_buffer.commit()
            await client.sdk.response.create()
            response = (await client.until("response.done")).response
            assert response.audio.output.format.type == kind
            deltas = [e.delta for e in client.events if e.type == "response.output_audio.delta"]
            sound = b"".join(base64.b64decode(delta) for delta in deltas)
            assert len(sound) == pytest.approx(320 * response.usage.output_token_details.audio_tokens, abs=8)

    asyncio.run(conversation())


def test_configuration_is_merged_echoed_and_refused(address):
    async def conversation():
        async with talking(address) as client:
            created = client.events[0].session
            assert created.audio.input.turn_detection.type == "server_vad"
            session = (await client.configure({"type": "semantic_vad", "eagerness": "low"})).session
            assert session.audio.input.turn_detection.eagerness == "low"
            assert session.audio.output.format.type == "audio/pcm", "what an update leaves out stays"
            nulls = {"output": {"speed": None, "voice": None}, "input": {"noise_reduction": None, "format": None}}
            vad = {"type": "server_vad", "silence_duration_ms": 300, "idle_timeout_ms": None, "threshold": None}
            session = (await client.configure(vad, audio=nulls, max_output_tokens=None)).session
            assert (session.audio.output.speed, session.max_output_tokens) == (1.0, "inf"), "null leaves it open"
            assert session.audio.input.turn_detection.threshold == 0.5
            wishes = {"instructions": "Rhyme.", "truncation": "disabled", "tool_choice": "none", "tracing": "auto"}
            session = (await client.configure(**wishes)).session
            assert (session.instructions, session.truncation, session.tool_choice, session.tracing) == (
                "", "auto", "auto", None,
            ), "what is in force"  # fmt: skip
            refused = [
                ({"modalities": ["text"]}, "unknown_parameter", "session.modalities"),
                ({"output_modalities": ["text", "audio"]}, "invalid_value", "session.output_modalities"),
                ({"tools": [{"type": "function", "name": "f"}]}, "invalid_value", "session.tools"),
                ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}, "invalid_value", None),
                ({"audio": {"output": {"speed": 1.5}}}, "invalid_value", "session.audio.output.speed"),
            ]
            for patch, code, param in refused:
                await client.sdk.send({"type": "session.update", "session": {"type": "realtime", **patch}})
                error = (await client.until("error")).error
                assert error.code == code
                assert param is None or error.param == param
            await client.configure()
            await client.sdk.input_audio_buffer.commit()
            assert (await client.until("error")).error.code == "input_audio_buffer_commit_empty"
            await client.say(speech(0.5, 0, RATE))
            await client.sdk.input_audio_buffer.clear()
            await client.until("input_audio_buffer.cleared")
            await client.sdk.input_audio_buffer.commit()
            assert (await client.until("error")).error.code == "input_audio_buffer_commit_empty"

    asyncio.run(conversation())


def test_mini_hears_transcribes_and_answers():
    async def conversation(address):
        async with talking(address) as client:
            detection = {"type": "server_vad", "silence_duration_ms": 400}
            await client.configure(detection, audio={"input": {"transcription": {"model": "whisper-1"}}})
            await client.say(np.concatenate([read_audio("examples/question.wav", RATE), quiet(0.6)]))
            done = await client.until("response.done")
            assert done.response.status == "completed"
            assert "paris" in done.response.output[0].content[0].transcript.lower()
            heard = [e.transcript for e in client.events if e.type.endswith("transcription.completed")]
            assert "capital of france" in heard[0].lower()
            sound = client.sound(done.response.id)
            assert len(sound) > RATE // 2
            assert np.abs(sound).max() > 1000

    with serving(VocalNet.load("mini"), vad=make_vad) as (address, _):
        asyncio.run(conversation(address))
