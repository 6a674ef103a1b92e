"""The speech decoder: streaming = training masks, growing prefixes, bounded state (parity: test_reference.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vocalnet.decoding import generate_chunk
from vocalnet.errors import ConfigError
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig

GREEDY = SamplingConfig()
TINY = SpeechDecoderConfig(
    llm_hidden_size=24,
    width=32,
    heads=4,
    ffn=48,
    units=40,
    layers=2,
    projector_layers=1,
    mtp_modules=3,
    text_input="hidden+embedding",
    speech_position_scale=0.2,
    scaled_heads=2,
)


def make(config=TINY, seed=0):
    """A decoder with weights large enough that its greedy choices vary."""
    torch.manual_seed(seed)
    decoder = SpeechDecoder(config)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval()


def text(rows=23, config=TINY, seed=1):
    return torch.randn(rows, config.input_size, generator=torch.Generator().manual_seed(seed))


def teacher_forced(decoder, rows, tokens, streaming=True):
    """Logits (heads, S + 1, vocabulary) of the training pass."""
    with torch.no_grad():
        result = decoder.training_pass([rows], [torch.tensor(tokens)], torch.tensor([streaming]))
    return torch.stack(result.logits)


def test_batching_changes_nothing():
    decoder = make()
    samples = [(text(9, seed=5), list(range(20))), (text(17, seed=6), list(range(35, 2, -1)))]
    masks = torch.tensor([True, False])
    with torch.no_grad():
        both = decoder.training_pass([t for t, _ in samples], [torch.tensor(y) for _, y in samples], masks)
    parts = [teacher_forced(decoder, t, y, bool(mask)) for (t, y), mask in zip(samples, masks, strict=True)]
    torch.testing.assert_close(torch.stack(both.logits), torch.cat(parts, 1), atol=1e-4, rtol=0)
    assert both.targets[0].tolist() == [*samples[0][1], decoder.config.eos, *samples[1][1], decoder.config.eos]
    assert both.targets[2][:21].tolist() == [*range(2, 20), decoder.config.eos, -100, -100]


def run(decoder, rows, piece, chunk, modules=None, mode="accept-all", limit=60, sampling=GREEDY, last=True):
    """Tokens of an answer whose text comes `piece` rows at a time and whose speech is asked for `chunk` at a time."""
    state = decoder.init_state(64, 128, modules)
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = []
    for start in range(0, len(rows), piece):
        decoder.add_text(rows[start : start + piece], state, last=last and start + piece >= len(rows))
        while len(tokens) < limit and (new := generate_chunk(decoder, state, sampling, chunk, mode, generator)):
            tokens += new
    return tokens[:limit]


@pytest.mark.parametrize("mode", ["accept-all", "verified"])
@pytest.mark.parametrize("modules", [0, 1, 3])
def test_tokens_do_not_depend_on_the_cut(mode, modules):
    decoder, rows = make(), text()
    whole = run(decoder, rows, 99, 99, modules, mode)
    assert len(whole) > 30
    for piece, chunk in [(5, 15), (1, 7), (4, 1), (11, 40)]:
        assert run(decoder, rows, piece, chunk, modules, mode) == whole


def test_growing_text_keeps_the_past():
    decoder = make()
    rows = text(30)
    longer, shorter = run(decoder, rows, 5, 15), run(decoder, rows[:12], 5, 15, last=False)
    assert len(shorter) >= 15
    assert longer[: len(shorter)] == shorter


def test_first_chunk_needs_one_text_chunk():
    decoder, rows = make(), text()
    state = decoder.init_state(64, 128)
    decoder.add_text(rows[:3], state)  # with BOS: 4 positions
    assert generate_chunk(decoder, state, GREEDY, 15) == []
    decoder.add_text(rows[3:4], state)
    assert 12 <= len(generate_chunk(decoder, state, GREEDY, 15)) <= 15


def test_packed_layers_keep_the_numbers():
    plain, packed, rows = make(), make(), text()
    packed.prepare_inference("fp32")
    assert run(packed, rows, 5, 15) == run(plain, rows, 5, 15)
    half = make()
    half.prepare_inference("bf16")
    assert len(run(half, rows, 5, 15)) > 10


def test_full_caches_end_the_answer():
    decoder, rows = make(), text()
    decoder.output_proj.bias.data[decoder.config.eos] = -100.0
    state = decoder.init_state(64, 20, 0)
    decoder.add_text(rows, state, last=True)
    assert len(generate_chunk(decoder, state, GREEDY, 99)) == 20
    assert state.finished


def test_errors_say_what_to_do():
    decoder, rows = make(), text()
    with pytest.raises(ConfigError, match="has 3"):
        decoder.init_state(modules=4)
    with pytest.raises(ConfigError, match="max_text 20"):
        decoder.add_text(rows, decoder.init_state(20, 20))
    state = decoder.init_state()
    decoder.add_text(rows, state, last=True)
    with pytest.raises(ConfigError, match="complete"):
        decoder.add_text(rows, state)
    with pytest.raises(ConfigError, match="one piece"):
        decoder.add_text(rows, decoder.init_state(streaming=False))
    with pytest.raises(ConfigError, match="compatible needs"):
        replace(TINY, compatible=True)
    with pytest.raises(ConfigError, match=r"did you mean 'sequential'.*allowed: sequential"):
        replace(TINY, mtp_head="sequentail")


def test_loss_weights_and_modules():
    decoder = make()
    batch = [text(9)], [torch.arange(20)], torch.tensor([True])
    loss, metrics = decoder.training_loss(*batch, decay=0.5)
    expected = sum(0.5**k * metrics[f"ce{k}"].item() for k in range(4))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    _, fewer = decoder.training_loss(*batch, modules=1)
    assert set(fewer) == {"ce0", "ce1"}
    loss.backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
