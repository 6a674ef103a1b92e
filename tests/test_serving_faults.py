"""What clients do wrong, and what can go wrong: others keep talking, nothing hangs, memory returns."""

import asyncio
import base64
import json
import signal
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server needs the extra 'serve'")
pytest.importorskip("openai", reason="the SDK is the client")

from starlette.requests import HTTPConnection
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.realtime import RATE, serving, talking
from tests.test_session import speech
from tests.tiny_model import tiny_model
from vocalnet.errors import ConfigError
from vocalnet.serving.app import Connection, Service, _origin_allowed
from vocalnet.serving.settings import ServeSettings

LIMIT = 2
NEWCOMERS = 200


@pytest.fixture(scope="module")
def served():
    with serving(tiny_model(max_text_tokens=48), max_sessions=LIMIT, max_message_bytes=2**18) as (address, service):
        yield address, service


def get(address, path):
    """Status and body of a GET."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def closed(socket):
    """How the server closes; reads what comes before."""
    try:
        while True:
            await asyncio.wait_for(socket.recv(), 30)
    except ConnectionClosed as error:
        return error.rcvd


async def until_empty(service):
    """Until no connection is left."""
    for _ in range(3000):
        if not service.connections:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("a connection is left over")


async def written(client, text="w3", **options):
    """A written question, answered in text."""
    content = [{"type": "input_text", "text": text}]
    await client.sdk.conversation.item.create(item={"type": "message", "role": "user", "content": content})
    await client.sdk.response.create(response={"output_modalities": ["text"], **options})
    return (await client.until("response.done", allow_errors=True)).response


def test_a_client_that_vanishes_in_an_answer_disturbs_nobody(served):
    address, service = served

    async def conversation():
        async with talking(address) as client:
            await client.configure()
            async with connect(f"ws://{address}/v1/realtime") as other:
                content = [{"type": "input_text", "text": "w3"}]
                item = {"type": "message", "role": "user", "content": content}
                await other.send(json.dumps({"type": "conversation.item.create", "item": item}))
                await other.send(json.dumps({"type": "response.create"}))
                while json.loads(await other.recv())["type"] != "response.output_audio.delta":
                    pass
                other.transport.abort()
            assert (await client.ask(speech(0.5, 0, RATE))).output[0].content[0].transcript
        await until_empty(service)
        assert service.scheduler.waiting == 0

    asyncio.run(conversation())


BAD_MESSAGES = [
    ("{", "invalid_json"),
    ("[" * 50_000, "invalid_json"),
    ("7", "invalid_event"),
    ("{}", "invalid_value"),
    ('{"type": "response.dream"}', "unknown_event"),
    ('{"type": "input_audio_buffer.append"}', "missing_required_parameter"),
    ('{"type": "input_audio_buffer.append", "audio": "ä"}', "invalid_value"),
    ('{"type": "input_audio_buffer.append", "audio": "AAA"}', "invalid_value"),
    ('{"type": "session.update", "session": {"vocalnet": {"mtp": 99}}}', "invalid_value"),
    (b"\x00\x01", "invalid_message"),
]


def test_bad_messages_are_errors_and_the_conversation_goes_on(served):
    async def conversation():
        async with talking(served[0]) as client:
            for message, code in BAD_MESSAGES:
                await client.sdk._connection.send(message)
                error = (await client.until("error")).error
                assert error.code == code, message[:80]
                assert "\n" not in error.message
            assert (await written(client)).output[0].content[0].text

    asyncio.run(conversation())


@pytest.mark.parametrize(
    ("message", "times", "as_text", "code"),
    [(b"x", 2**19, True, 1009), (b"\xff\xfe", 1, True, 1007), (b"x", 2**19, False, 1009), (b"x", 10**8, True, 1009)],
)
def test_messages_that_end_the_connection(served, message, times, as_text, code):
    async def conversation():
        async with connect(f"ws://{served[0]}/v1/realtime") as socket:
            await socket.recv()
            with suppress(ConnectionClosed):  # before the client has sent all of it
                await socket.send(message * times, text=as_text)
            assert (await closed(socket)).code == code
        await until_empty(served[1])

    asyncio.run(conversation())


def test_newcomers_beyond_the_limit_are_refused_at_once(served):
    address, service = served

    outcomes, known = [], asyncio.Event()

    async def newcomer():
        async with connect(f"ws://{address}/v1/realtime", open_timeout=60) as socket:
            first = json.loads(await asyncio.wait_for(socket.recv(), 60))
            outcomes.append(first["type"])
            if len(outcomes) == NEWCOMERS:
                known.set()
            if first["type"] == "session.created":
                await asyncio.wait_for(known.wait(), 60)
            else:
                assert first["error"]["code"] == "server_busy"
                assert (await closed(socket)).code == 1013

    async def conversation():
        await until_empty(service)
        await asyncio.gather(*(newcomer() for _ in range(NEWCOMERS)))
        assert outcomes.count("session.created") == LIMIT
        assert outcomes.count("error") == NEWCOMERS - LIMIT
        await until_empty(service)
        async with talking(address) as client:
            assert (await written(client)).output

    asyncio.run(conversation())
    assert 'vocalnet_refused_total{reason="full"}' in get(address, "/metrics")[1]


def test_a_flood_is_answered_at_the_pace_of_its_reader(served):
    address, service = served
    count = 3000

    async def conversation():
        async with talking(address) as client, connect(f"ws://{address}/v1/realtime") as socket:
            for _ in range(count):
                await socket.send('{"type": "input_audio_buffer.clear"}')
            assert (await written(client)).output, "the other session is served meanwhile"
            cleared = 0
            while cleared < count:
                cleared += json.loads(await asyncio.wait_for(socket.recv(), 30))["type"] == "input_audio_buffer.cleared"
        await until_empty(service)

    asyncio.run(conversation())


class DeafSocket:
    """A client that asks and never reads."""

    def __init__(self, messages):
        self.messages = [{"type": "websocket.receive", "text": json.dumps(m)} for m in messages]
        self.closed = None

    async def receive(self):
        if self.messages:
            return self.messages.pop(0)
        return await asyncio.Event().wait()

    async def send_text(self, text):
        await asyncio.Event().wait()

    async def close(self, code, reason):
        self.closed = (code, reason)


def test_a_reader_that_never_reads_stops_its_answer_and_is_let_go():
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "w3"}]}
    socket = DeafSocket([{"type": "conversation.item.create", "item": item}, {"type": "response.create"}])
    made = []

    async def conversation():
        settings = ServeSettings(max_unsent_bytes=40_000, send_timeout_s=3.0)
        service = Service(tiny_model(max_text_tokens=96), settings)
        connection = Connection(service, socket)
        await connection.run()
        made.append(connection._conversation)
        service.close()

    asyncio.run(conversation())
    assert socket.closed == (1008, "the client reads too slowly")
    response = made[0]._response
    assert 0 < response.sent_s < 5, "about 40 kB of sound, of more than a minute"


def test_a_model_that_raises_fails_the_response_alone(served, monkeypatch):
    address, service = served
    real, calls = service.model.flow.step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("numbers went wrong")
        return real(*arguments)

    async def conversation():
        async with talking(address) as client:
            await client.configure()
            monkeypatch.setattr(service.model.flow, "step", step)
            failed = await client.ask(speech(0.5, 0, RATE))
            assert failed.status == "failed"
            assert failed.status_details.error.type == "server_error"
            assert "numbers" not in failed.status_details.error.message, "inner workings are for the log"
            assert (await client.ask(speech(0.5, 1, RATE))).status == "incomplete"

    asyncio.run(conversation())


def test_sigterm_lets_answers_end_and_nobody_in():
    async def conversation(address, server):
        async with talking(address) as client, connect(f"ws://{address}/v1/realtime") as idle:
            await idle.recv()
            await client.configure()
            await client.say(speech(0.5, 0, RATE))
            await client.sdk.input_audio_buffer.commit()
            await client.sdk.response.create()
            await client.until("response.output_audio.delta")
            server.handle_exit(signal.SIGTERM, None)
            assert (await closed(idle)).code == 1001
            assert get(address, "/ready")[0] == 503
            async with connect(f"ws://{address}/v1/realtime") as late:
                assert json.loads(await late.recv())["error"]["message"] == "the server is shutting down"
            done = await client.until("response.done")
            assert done.response.status == "incomplete", "to the tiny model's limit: the whole answer"
            assert len(client.sound(done.response.id)) == 960 * done.response.usage.output_token_details.audio_tokens
            assert (await closed(client.sdk._connection)).code == 1001

    from vocalnet.serving import run

    servers = []
    original = run.GracefulServer.__init__

    def remember(self, *arguments):
        servers.append(self)
        original(self, *arguments)

    run.GracefulServer.__init__ = remember
    try:
        with serving(tiny_model(max_text_tokens=24)) as (address, _):
            asyncio.run(conversation(address, servers[0]))
    finally:
        run.GracefulServer.__init__ = original


def test_silent_and_endless_connections_are_ended():
    async def idle(address):
        async with connect(f"ws://{address}/v1/realtime") as socket:
            end = await closed(socket)
        assert end.code == 1008
        assert end.reason.startswith("idle_timeout")

    async def busy(address):
        async with connect(f"ws://{address}/v1/realtime") as socket:
            with suppress(ConnectionClosed):
                while True:
                    await socket.send('{"type": "input_audio_buffer.clear"}')
                    await asyncio.sleep(0.05)
            end = await closed(socket)
        assert end.code == 1008
        assert end.reason.startswith("max_session")

    for client, limits in ((idle, {"idle_timeout_s": 0.4}), (busy, {"idle_timeout_s": 10, "max_session_s": 0.6})):
        with serving(tiny_model(), **limits) as (address, _):
            asyncio.run(client(address))


def test_keys_and_origins():
    async def attempt(address, **options):
        async with connect(f"ws://{address}/v1/realtime", **options) as socket:
            return json.loads(await socket.recv())["type"]

    async def status(address, **options):
        with pytest.raises(InvalidStatus) as refused:
            await attempt(address, **options)
        return refused.value.response.status_code

    async def conversation(address):
        key = {"Authorization": "Bearer geheimö".encode().decode("latin-1")}
        assert await attempt(address, additional_headers={"Authorization": "Bearer secret"}) == "session.created"
        browser = ["realtime", "openai-insecure-api-key.secret"]
        assert await attempt(address, subprotocols=browser) == "session.created"
        assert await status(address) == 401
        assert await status(address, additional_headers=key) == 401
        assert await status(address, subprotocols=["realtime", "openai-insecure-api-key.secre"]) == 401
        with_key = {"additional_headers": {"Authorization": "Bearer secret"}}
        assert await attempt(address, origin=f"http://{address}", **with_key) == "session.created"
        assert await attempt(address, origin="https://ours.example", **with_key) == "session.created"
        assert await status(address, origin="https://evil.example", **with_key) == 403

    with serving(tiny_model(), api_key="secret", origins=("https://ours.example",)) as (address, _):
        asyncio.run(conversation(address))
    with pytest.raises(ConfigError, match="without a key"):
        ServeSettings(host="0.0.0.0").check_exposure()
    ServeSettings(host="0.0.0.0", api_key="x").check_exposure()
    with pytest.raises(ConfigError, match="max_sessions is 0"):
        ServeSettings(max_sessions=0)


def test_a_hostile_name_that_is_pointed_here_is_not_our_origin():
    """DNS rebinding: page and host have the same name, but it is not this machine's."""
    headers = [(b"origin", b"http://evil.example:8000"), (b"host", b"evil.example:8000")]
    request = HTTPConnection({"type": "http", "headers": headers})
    assert not _origin_allowed(request, ServeSettings())
    assert _origin_allowed(request, ServeSettings(host="0.0.0.0")), "there, names are ours to give"


def test_health_readiness_and_metrics(served):
    address, _ = served
    assert json.loads(get(address, "/health")[1]) == {"status": "ok", "model": "tiny"}
    assert get(address, "/ready")[0] == 200
    page = get(address, "/metrics")[1]
    for name in ("first_audio_seconds_bucket", "real_time_factor_bucket", "underruns_total", "sessions 0.0", "queue"):
        assert f"vocalnet_{name}" in page


def test_plain_mode(served):
    async def conversation(address):
        async with connect(f"ws://{address}/v1/stream?rate=16000&turns=none") as socket:
            assert json.loads(await socket.recv())["type"] == "ready"
            samples = (speech(0.6) * 32767).astype("<i2").tobytes()
            for start in range(0, len(samples), 333):  # samples may be split between messages
                await socket.send(samples[start : start + 333])
            await socket.send('{"type": "commit"}')
            text, sound = "", b""
            while True:
                message = await asyncio.wait_for(socket.recv(), 60)
                if isinstance(message, bytes):
                    sound += message
                    continue
                said = json.loads(message)
                text += said.get("text", "")
                if said["type"] == "done":
                    break
            assert said == {"type": "done", "status": "incomplete", "reason": "max_output_tokens"}
            assert text
            assert len(sound) % 1920 == 0
            await socket.send('{"type": "heard", "ms": 100}')
            await socket.send('{"type": "dance"}')
            assert json.loads(await socket.recv())["code"] == "unknown_event"
            await socket.send('{"type": "text", "text": "w4"}')
            while not isinstance(await asyncio.wait_for(socket.recv(), 60), bytes):
                pass
            await socket.send('{"type": "cancel"}')
            while True:
                message = await asyncio.wait_for(socket.recv(), 60)
                if isinstance(message, str) and json.loads(message)["type"] == "done":
                    break
            assert json.loads(message)["reason"] == "client_cancelled"
        for query in ("rate=nan", "rate=100", "turns=maybe"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"ws://{address}/v1/stream?{query}")
            assert refused.value.response.status_code == 400

    asyncio.run(conversation(served[0]))


def test_two_hundred_turns_leave_no_memory_behind(served):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    async def conversation():
        async with talking(served[0]) as client:
            await client.configure(max_output_tokens=2)
            for turn in range(240):
                if turn == 40:
                    before = resident()
                spoken = turn % 8 == 0
                answer = await (client.ask(speech(0.3, turn, RATE)) if spoken else written(client, f"w{turn % 40}"))
                assert answer.status == "incomplete", "after two tokens"
                client.events = client.events[:1]
            assert resident() < 1.05 * before
            assert len(next(iter(served[1].connections))._conversation._items) <= 200

    if not Path("/proc/self/statm").is_file():
        pytest.skip("reads Linux's memory accounts")
    asyncio.run(conversation())


def test_a_question_of_silence_or_noise_is_told(served):
    async def conversation():
        async with talking(served[0]) as client:
            await client.configure(audio={"input": {"transcription": {"model": "whisper-1"}}})
            failed = await client.ask(np.zeros(RATE // 2, np.float32))
            assert failed.status == "failed"
            assert "silent" in failed.status_details.error.message
            await client.say(np.concatenate([speech(0.5, 0, RATE)] * 64), piece_s=2.0)
            assert "30 s" in (await client.until("error")).error.message
            assert (await client.ask(speech(0.5, 1, RATE))).output
            failed = [e for e in client.events if e.type.endswith("transcription.failed")]
            assert failed[-1].error.code == "transcription_unavailable", "the tiny model has no CTC head"

    asyncio.run(conversation())


def test_base64_of_half_a_sample_waits_for_the_rest(served):
    async def conversation():
        async with talking(served[0]) as client:
            await client.configure()
            data = (speech(0.5, 0, RATE) * 32767).astype("<i2").tobytes()
            for start in range(0, len(data), 777):
                await client.sdk.input_audio_buffer.append(audio=base64.b64encode(data[start : start + 777]).decode())
            await client.sdk.input_audio_buffer.commit()
            item = await client.until("conversation.item.done")
            await client.sdk.conversation.item.retrieve(item_id=item.item.id)
            audio = (await client.until("conversation.item.retrieved")).item.content[0].audio
            assert len(base64.b64decode(audio)) == pytest.approx(len(data), rel=0.02)

    asyncio.run(conversation())
