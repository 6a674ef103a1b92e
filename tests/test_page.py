"""The voice-chat page in a real Chromium whose microphone is a sound file."""

import base64
import io
import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import soundfile
import soxr

from tests.tiny_model import tiny_model
from vocalnet.audio import read_audio
from vocalnet.decoding import DecodingMode
from vocalnet.model import VocalNet

pytest.importorskip("gradio", reason="the page needs the extra 'demo'")
playwright = pytest.importorskip("playwright.sync_api", reason="page tests need the package playwright")

from PIL import Image  # noqa: E402
from starlette.staticfiles import StaticFiles  # noqa: E402

from tests.scripted_server import RATE, Script, application, serving  # noqa: E402
from vocalnet.demo.page import PageSettings, mount_page  # noqa: E402
from vocalnet.demo.run import page_address  # noqa: E402
from vocalnet.serving.app import Service  # noqa: E402
from vocalnet.serving.app import application as application_of  # noqa: E402
from vocalnet.serving.settings import ServeSettings  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; apt-get install chromium")

QUIET = os.environ.get("VOCALNET_QUIET")  # set it where nothing else runs: then times are asserted, too
LONGEST_GAP_MS = 20
WAIT_MS = 60_000

# Everything that reaches the loudspeaker, from its first sound to its last, recorded beside the page's own code.
TAP = """
(() => {
  const worklet = `registerProcessor("tap", class extends AudioWorkletProcessor {
    constructor() {
      super();
      this.block = new Float32Array(2432); // 19 quanta: 0.1 s
      this.filled = 0;
    }
    process([[samples]]) {
      if (samples) this.block.set(samples, this.filled);
      else this.block.fill(0, this.filled, this.filled + 128);
      this.filled = (this.filled + 128) % this.block.length;
      if (!this.filled) this.port.postMessage(this.block);
      return true;
    }
  })`;
  let chunks = [];
  const sounds = (block) => block.some((sample) => sample !== 0);
  window.tap = {
    take: (block) => (chunks.length || sounds(block)) && chunks.push(block),
    clear: () => (chunks = []),
    samples: () => { // base64 of float32
      while (chunks.length && !sounds(chunks.at(-1))) chunks.pop();
      const bytes = new Uint8Array(Float32Array.from(chunks.flatMap((block) => [...block])).buffer);
      let text = "";
      for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
      return btoa(text);
    },
  };
  const connect = AudioNode.prototype.connect;
  AudioNode.prototype.connect = function (target, ...rest) {
    if (target instanceof AudioDestinationNode) {
      const module = URL.createObjectURL(new Blob([worklet], { type: "text/javascript" }));
      this.context.audioWorklet.addModule(module).then(() => {
        const node = new AudioWorkletNode(this.context, "tap", { numberOfOutputs: 0 });
        node.port.onmessage = ({ data }) => window.tap.take(data);
        connect.call(this, node);
        window.tap.ready = true;
      });
    }
    return connect.call(this, target, ...rest);
  };
})();
"""


def recording(seconds, seed=0):
    """Sound without silence, so that every gap shows: (N,) float32."""
    generator = np.random.default_rng(seed)
    samples = generator.normal(size=int(seconds * RATE)).cumsum()
    samples = samples - soxr.resample(soxr.resample(samples, RATE, 100), 100, RATE)[: len(samples)]
    return (0.3 * samples / np.abs(samples).max()).astype(np.float32)


def pieces(samples, sizes_and_waits):
    """Cuts `samples` as [(seconds, wait)] says; the last piece takes the rest."""
    cut, start = [], 0
    for index, (seconds, wait) in enumerate(sizes_and_waits):
        end = len(samples) if index == len(sizes_and_waits) - 1 else start + int(seconds * RATE)
        cut.append((samples[start:end], wait))
        start = end
    return cut


@pytest.fixture(scope="module")
def microphone_file(tmp_path_factory):
    """0.4 s of silence, the question, 3 s of silence; Chromium repeats it."""
    question = read_audio("examples/question.wav", 48_000)
    path = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    soundfile.write(path, np.concatenate([np.zeros(19_200), question, np.zeros(144_000)]), 48_000, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def browser(microphone_file):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone_file}",
                "--autoplay-policy=no-user-gesture-required",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def script():
    return Script()


@pytest.fixture(scope="module")
def scripted(script):
    app = application(script)
    app.mount("/examples", StaticFiles(directory="examples"))
    mount_page(app, PageSettings("scripted", max_mtp=4, mtp=0, decoding="accept-all"))
    with serving(app) as address:
        yield f"http://{address}/"


@pytest.fixture
def page(browser, scripted, script):
    script.__dict__.update(vars(Script()))
    with opened(browser, scripted) as page:
        yield page


@pytest.fixture(scope="module")
def one_page(browser, scripted):
    with opened(browser, scripted) as page:
        yield page


@pytest.fixture
def shared(one_page, script):
    """A page that other tests have used, with a new conversation: loading one takes seconds."""
    script.__dict__.update(vars(Script()))
    one_page.evaluate("vocalnet.restart()")
    one_page.wait_for_timeout(300)  # the tap's last block may be on its way
    one_page.evaluate("window.tap.clear()")
    script.received.clear()
    return one_page


class opened:  # noqa: N801 (used like a function)
    """A page of `url`; the test fails if a script of it does."""

    def __init__(self, browser, url, width=1280, height=900):
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.url = url

    def __enter__(self):
        page = self.context.new_page()
        page.set_default_timeout(WAIT_MS)
        self.errors = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.add_init_script(TAP)
        page.goto(self.url)
        wait_until(page, "window.vocalnet")
        page.evaluate("vocalnet.player.open()")
        wait_until(page, "window.tap.ready")
        return page

    def __exit__(self, *exception):
        self.context.close()
        assert not self.errors


@pytest.fixture(scope="module")
def modules(browser, scripted):
    """A bare page of the same origin, to call the page's modules."""
    page = browser.new_page()
    page.goto(f"{scripted}page-files/mel.js")
    yield page
    page.close()


def wait_until(page, expression):
    """Looks ten times a second; Playwright's default, every frame, would keep a busy machine drawing."""
    page.wait_for_function(expression, polling=100)


def type_question(page, text="Who are you?"):
    page.get_by_label("Or type a question").fill(text)
    page.keyboard.press("Enter")


def wait_for_answer(page, number=1):
    """The page's own measurements of an answer that has been played to its end."""
    wait_until(page, f"window.vocalnet.answers[{number - 1}]?.finished")
    measure = "({loudest, gapsMs, playedMs, soundAfterMs}) => ({loudest, gapsMs, playedMs, soundAfterMs})"
    return page.evaluate(f"({measure})(window.vocalnet.answers[{number - 1}])")


def heard_at_the_loudspeaker(page):
    """All samples that were played so far, silence at both ends removed."""
    time.sleep(0.3)  # the tap reports every 0.1 s
    samples = np.frombuffer(base64.b64decode(page.evaluate("window.tap.samples()")), np.float32)
    sound = np.flatnonzero(samples)
    return samples[sound[0] : sound[-1] + 1]


def test_uneven_chunks_are_played_without_a_gap(page, script):
    sound = recording(5)
    script.pieces = pieces(sound, [(1.5, 0.2), (0.05, 0.5), (2, 0.1), (0.4, 1), (1, 0.5)])
    for attempt in (1, 2, 3):  # a machine that stands still for a second makes a gap of its own
        page.evaluate("window.tap.clear()")
        type_question(page)
        measured = wait_for_answer(page, attempt)
        assert measured["playedMs"] == pytest.approx(5000)
        assert measured["loudest"] > 0.01
        if max(measured["gapsMs"], default=0) <= LONGEST_GAP_MS:
            break
    else:
        pytest.fail(f"gaps in every attempt: {measured}")
    played = heard_at_the_loudspeaker(page)
    inserted = sum(measured["gapsMs"]) * RATE / 1000
    assert len(played) == pytest.approx(len(sound) + inserted, abs=2)  # noise may begin or end with a zero
    if not inserted:
        assert np.correlate(played, sound).max() == pytest.approx(np.sum(sound**2), rel=1e-3)


def test_after_a_gap_the_next_answer_waits_just_long_enough(page, script):
    script.pieces = pieces(recording(2), [(0.4, 0), (0.8, 0.8), (1, 0.1)])
    type_question(page)
    first = wait_for_answer(page)
    assert max(first["gapsMs"]) > 200
    type_question(page)
    second = wait_for_answer(page, 2)
    assert second["soundAfterMs"] >= 800, "the first piece alone did not suffice last time"
    if QUIET:
        assert second["gapsMs"] == []
        assert page.locator("#vn-numbers").inner_text().endswith("gaps: none")


def test_hold_to_talk(shared, script, microphone_file, tmp_path):
    sound = recording(1.2)
    script.pieces = pieces(sound, [(0.6, 0.1), (1, 0.1)])
    button = shared.locator("#vn-hold")
    button.focus()
    shared.keyboard.down(" ")
    wait_until(shared, "document.querySelector('#vn-status').dataset.state === 'listening'")
    time.sleep(3)
    shared.keyboard.up(" ")
    wait_for_answer(shared)
    assert "what city is the capital of france" in shared.locator(".vn-user").inner_text()
    assert shared.locator(".vn-answer").inner_text().startswith("word 0 word 1")
    asked = [kind for kind in script.types() if kind != "session.update"]
    assert asked == [
        "input_audio_buffer.clear",
        "input_audio_buffer.append",
        "input_audio_buffer.commit",
        "response.create",
    ]
    heard = np.concatenate(script.audio) / 32768
    assert len(heard) > 0.5 * RATE
    assert np.sqrt(np.mean(heard**2)) > 0.01, "the microphone's sound did not arrive"
    with shared.expect_download() as download:
        shared.get_by_text("Download WAV").click()
    download.value.save_as(tmp_path / "answer.wav")
    saved, rate = soundfile.read(tmp_path / "answer.wav", dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(saved, sound, atol=1e-4)


def test_a_short_press_is_explained(shared, script):
    shared.evaluate("async () => { await vocalnet.holdStart(); vocalnet.holdEnd(); }")
    assert "Hold the button" in shared.get_by_role("alert").inner_text()
    assert "response.create" not in script.types()


@pytest.mark.parametrize("how", ["button", "key", "new question"])
def test_stop_ends_the_sound_and_tells_the_server_what_was_heard(shared, script, how):
    script.pieces = pieces(recording(6), [(3, 0), (1, 0.2), (2, 5)])
    type_question(shared)
    wait_until(shared, "window.vocalnet.answers[0]?.loudest > 0")
    time.sleep(1)
    if how == "button":
        shared.get_by_role("button", name="Stop").click()
    elif how == "key":
        shared.keyboard.press("Escape")
    else:
        type_question(shared)
    wait_until(shared, "document.querySelector('.vn-answer').innerText.includes('stopped after')")
    shared.wait_for_timeout(300)
    truncate = next(event for event in script.received if event["type"] == "conversation.item.truncate")
    assert truncate["item_id"].startswith("answer_")
    assert 100 < truncate["audio_end_ms"] < 6000
    assert "response.cancel" in script.types()
    first = shared.locator(".vn-answer > span").first
    assert first.inner_text().startswith("word 0 word 1"), "what was said stays to be read"
    assert first.locator("s").inner_text().strip().startswith("word 1"), "what was not heard is struck out"
    if how != "new question":
        played = heard_at_the_loudspeaker(shared)
        assert len(played) == pytest.approx(truncate["audio_end_ms"] * RATE / 1000, abs=256)


def test_speaking_over_an_answer_stops_it(shared, script):
    script.pieces = pieces(recording(6), [(3, 0), (1, 0.2), (2, 0.2)])
    script.speech = [0.4, 1.2, 3]
    shared.get_by_role("button", name="Hands-free").click()
    wait_until(shared, "document.querySelector('.vn-answer')?.innerText.includes('stopped after')")
    assert "what city is the capital of france" in shared.locator(".vn-user").inner_text()
    assert shared.locator("#vn-status").get_attribute("data-state") == "listening"
    played = heard_at_the_loudspeaker(shared)
    (truncate,) = (event for event in script.received if event["type"] == "conversation.item.truncate")
    assert 100 < truncate["audio_end_ms"] < 6000
    assert len(played) == pytest.approx(truncate["audio_end_ms"] * RATE / 1000, abs=256)
    shared.get_by_role("button", name="Hands-free").click()
    turned_off = script.received[-1]
    assert turned_off["session"]["audio"]["input"]["turn_detection"] is None


def test_the_javascript_example(browser, scripted, script):
    script.__dict__.update(vars(Script(pieces(recording(6), [(3, 0), (1, 0.2), (2, 0.2)]), speech=[0.4, 1.2, 3])))
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(TAP)
    page.goto(f"{scripted}examples/realtime.html#{scripted.replace('http', 'ws')}v1/realtime")
    page.get_by_role("button", name="Start").click()
    page.get_by_text("You: what city is the capital of france").wait_for()
    page.get_by_text("VocalNet: word 0").wait_for()
    page.get_by_text("Listening …").wait_for()
    page.wait_for_timeout(300)
    (truncate,) = (event for event in script.received if event["type"] == "conversation.item.truncate")
    assert 100 < truncate["audio_end_ms"] < 6000
    assert len(heard_at_the_loudspeaker(page)) == pytest.approx(truncate["audio_end_ms"] * RATE / 1000, abs=256)
    context.close()


def test_settings_reach_the_server(shared, script):
    script.pieces = [(recording(0.3), 0)]
    type_question(shared)
    wait_for_answer(shared)
    decodings = shared.get_by_role("radio").evaluate_all("(radios) => radios.map((radio) => radio.value)")
    assert decodings == list(get_args(DecodingMode))
    shared.get_by_label("relaxed").check()
    shared.get_by_label("number input for K: MTP modules").fill("3")
    shared.keyboard.press("Tab")
    shared.wait_for_timeout(500)
    assert script.received[-1]["session"]["vocalnet"] == {"mtp": 3, "decoding": "relaxed"}


def test_a_new_conversation_starts_empty(shared, script):
    script.pieces = [(recording(0.3), 0)]
    for number in (1, 2):
        type_question(shared, f"question {number}")
        wait_for_answer(shared, number)
    assert shared.locator(".vn-user").all_inner_texts() == ["question 1", "question 2"]
    shared.get_by_role("button", name="New conversation").click()
    wait_until(shared, "document.querySelectorAll('.vn-user, .vn-answer').length === 0")
    type_question(shared, "question 3")
    wait_for_answer(shared, 1)


def test_a_missing_microphone_is_one_clear_line(page):
    lines = {"NotFoundError": "No microphone was found", "NotAllowedError": "refused the microphone"}
    for error, line in lines.items():
        fail = f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('x', '{error}'); }}"
        page.evaluate(f"() => {{ {fail} }}")
        page.get_by_role("button", name="Hands-free").click()
        page.get_by_text(line).wait_for()
        assert page.get_by_role("button", name="Hands-free").get_attribute("aria-pressed") == "false"


def test_a_full_or_lost_server_is_one_clear_line(shared, script):
    script.refuse = "8 of 8 conversations are taken; try again later"
    type_question(shared)
    shared.get_by_text(script.refuse).wait_for()
    script.refuse, script.vanish = "", True
    type_question(shared)
    shared.get_by_text("The connection to the server was lost").wait_for()
    script.vanish, script.pieces = False, [(recording(0.3), 0)]
    type_question(shared, "are you back?")
    shared.get_by_text("word 0").wait_for()
    assert shared.get_by_role("alert").count() == 0


def test_the_page_fits_a_phone(browser, scripted):
    with opened(browser, scripted, 390, 844) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("Hold to talk", "Hands-free", "Stop"):
            box = page.get_by_role("button", name=name).bounding_box()
            assert box["height"] >= 44
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
            assert box["y"] + box["height"] <= 844, "must be in reach without scrolling"


def test_the_mel_is_the_vocoders(modules):
    import torch

    from vocalnet.audio import mel_24k

    sound = recording(1)
    expected = mel_24k(torch.from_numpy(sound)).numpy().T
    pcm = json.dumps(np.round(32768 * sound).astype(int).tolist())
    code = f"""async () => {{
      const {{ Mel }} = await import("/page-files/mel.js");
      const mel = new Mel();
      mel.update(Int16Array.from({pcm}), true);
      return mel.columns.map((column) => [...column]);
    }}"""
    shown = np.array(modules.evaluate(code)).T
    frames = slice(3, min(shown.shape[1], expected.shape[1]) - 3)  # the edges are padded otherwise
    assert np.corrcoef(shown[:, frames].ravel(), expected[:, frames].ravel())[0, 1] > 0.98
    assert abs((shown[:, frames] - expected[:, frames]).mean()) < 0.3


@pytest.mark.parametrize("device_rate", [24_000, 44_100, 48_000])
def test_the_microphone_is_resampled_cleanly(modules, device_rate):
    code = """async (rate) => {
      const context = new OfflineAudioContext(1, rate, rate);
      await context.audioWorklet.addModule("/page-files/recorder.js");
      const node = new AudioWorkletNode(context, "vocalnet-recorder");
      const blocks = [];
      node.port.onmessage = ({ data }) => blocks.push(...data.samples);
      for (const frequency of rate > 24000 ? [1000, 16000] : [1000]) {
        const tone = new OscillatorNode(context, { frequency });
        const gain = new GainNode(context, { gain: 0.4 });
        tone.connect(gain).connect(node);
        tone.start();
      }
      node.connect(context.destination);
      await context.startRendering();
      await new Promise((done) => setTimeout(done, 200));
      return blocks;
    }"""
    samples = np.array(modules.evaluate(code, device_rate))[4800:19_200] / 32768
    assert len(samples) == 14_400
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)))) / len(samples) * 4
    tone = round(1000 * len(samples) / RATE)
    assert spectrum[tone] == pytest.approx(0.4, rel=0.02)
    spectrum[tone - 3 : tone + 4] = 0
    assert spectrum.max() < 0.4e-3, "an alias above -60 dB"  # 16 kHz would fold to 8 kHz


# ---- the page on the real server ----


@contextmanager
def real_page(browser, model, server_key=None, page_key=None):
    service = Service(model, ServeSettings(api_key=server_key))
    app = application_of(service)
    mount_page(app, PageSettings.of(model))
    with serving(app) as address, opened(browser, page_address(address, page_key)) as page:
        yield page


def test_the_key_is_in_the_pages_address(browser):
    model = tiny_model(max_text_tokens=6)
    with real_page(browser, model, "S3cret", "S3cret") as page:
        type_question(page, "w1")
        wait_for_answer(page)
    with real_page(browser, model, "S3cret", "wrong") as page:
        type_question(page, "w1")
        page.get_by_text("The server refused the connection").wait_for()


def test_the_server_answers_in_the_page(browser):
    with real_page(browser, tiny_model(max_text_tokens=10)) as page:
        button = page.locator("#vn-hold")
        button.dispatch_event("pointerdown", {"pointerId": 1})
        wait_until(page, "document.querySelector('#vn-status').dataset.state === 'listening'")
        time.sleep(2)
        button.dispatch_event("pointerup")
        first = wait_for_answer(page)
        assert first["gapsMs"] == [] or not QUIET
        assert page.locator(".vn-answer span").first.inner_text().startswith("w")
        stages = page.locator("#vn-latency .vn-bar").get_attribute("aria-label")
        for stage in ("encoder", "adapter", "prefill", "text", "speech", "flow", "vocoder"):
            assert f"{stage} " in stages
        assert "real-time factor" in page.locator("#vn-numbers").inner_text()
        page.get_by_label("number input for K: MTP modules").fill("2")
        type_question(page, "w1 w2 w3")
        wait_for_answer(page, 2)
        steps = page.evaluate("window.vocalnet.answers.map((answer) => answer.total.tokens_per_step)")
        assert steps[0] <= 1 < steps[1]
        assert page.get_by_role("alert").count() == 0


def test_the_server_is_interrupted_by_speech(browser):
    """The fake microphone asks again and again, also while an answer sounds."""
    with real_page(browser, tiny_model(max_text_tokens=40)) as page:
        page.get_by_role("button", name="Hands-free").click()
        wait_until(page, "document.querySelectorAll('.vn-user').length === 2")
        first = page.locator(".vn-answer").first
        assert "stopped after" in first.inner_text()
        page.locator(".vn-answer s.vn-unheard").first.wait_for()
        assert page.get_by_role("alert").count() == 0


def test_mini_answers_in_the_page(browser):
    """Prints what it measures (pytest -s). With VOCALNET_SCREENSHOTS=FOLDER it leaves pictures of the page there."""
    with real_page(browser, VocalNet.load("mini")) as page:
        page.get_by_role("button", name="Hands-free").click()
        wait_until(page, "document.querySelector('.vn-user')")
        page.evaluate("vocalnet.setHandsFree(false)")  # or the microphone's second round would interrupt
        spoken = wait_for_answer(page)
        type_question(page, "Who wrote Hamlet?")
        written = wait_for_answer(page, 2)
        print(f"\nby voice: {spoken}\nin writing: {written}")
        if "VOCALNET_SCREENSHOTS" in os.environ:
            photograph(page, Path(os.environ["VOCALNET_SCREENSHOTS"]))
        assert "capital of france" in page.locator(".vn-user").first.inner_text().lower()
        answers = page.locator(".vn-answer").all_inner_texts()
        assert "paris" in answers[0].lower()
        assert "shakespeare" in answers[1].lower()
        for measured in (spoken, written):
            assert measured["loudest"] > 0.01
            assert max(measured["gapsMs"], default=0) <= LONGEST_GAP_MS or not QUIET


def photograph(page, folder):
    """Desktop and phone, small."""
    for name, size in {"page": (1280, 860), "phone": (390, 844)}.items():
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.wait_for_timeout(500)
        picture = Image.open(io.BytesIO(page.screenshot(full_page=name == "phone")))
        picture.save(folder / f"{name}.webp", quality=85)
