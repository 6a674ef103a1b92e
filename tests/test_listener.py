"""Listening: the question's features depend on the audio alone, and nothing grows without bound."""

import numpy as np
import pytest
import torch

from tests.test_session import RATE, speech
from vocalnet.errors import AudioError
from vocalnet.listener import LEAD_FRAMES, PAUSE_MS, Listener


def listen(samples, size=None, rate=RATE):
    listener = Listener(80)
    size = size or len(samples)
    for first in range(0, len(samples), size):
        listener.push(samples[first : first + size], rate)
    return listener


def silence(seconds):
    return np.zeros(int(seconds * RATE), np.float32)


@pytest.mark.parametrize("size", [1600, 777, 50_000])
def test_any_cut_gives_the_same_features(size):
    samples = np.concatenate([silence(0.4), speech(0.7), silence(0.5), speech(0.4, 1), silence(0.2)])
    whole, pieces = listen(samples), listen(samples, size)
    whole.finish()
    pieces.finish()
    assert whole.end == pieces.end
    torch.testing.assert_close(whole.features(), pieces.features(), atol=1e-5, rtol=0)


def test_a_pause_is_noticed_and_further_silence_changes_nothing():
    listener = listen(np.concatenate([speech(0.5), silence(PAUSE_MS / 1000)]))
    assert listener.paused
    end, features = listener.end, listener.features()
    listener.push(silence(2), RATE)
    assert listener.end == end
    assert torch.equal(listener.features(), features)
    listener.push(speech(0.3), RATE)
    assert not listener.paused
    assert listener.end > end + 2 * RATE, "what was held back belongs to the question again"


def test_long_silence_before_the_question_is_dropped():
    listener = listen(np.concatenate([silence(60), speech(1)]), 16_000)
    listener.finish()
    assert listener.end == RATE + LEAD_FRAMES * RATE // 50


def test_an_open_microphone_stays_bounded():
    listener = listen(np.concatenate([speech(0.5), silence(1)]))
    end = listener.end
    for _ in range(40):
        listener.push(silence(2), RATE)
    assert listener.end == end
    assert sum(map(len, listener._held)) <= 30 * RATE


def test_thirty_seconds_are_allowed_and_more_are_not():
    listen(speech(30)).finish()
    with pytest.raises(AudioError, match="over 30 s"):
        listen(speech(30.5))


def test_quiet_speech_is_heard():
    listener = listen(np.concatenate([0.02 * speech(0.5), silence(0.5)]))
    assert listener.paused
    listener.finish()
