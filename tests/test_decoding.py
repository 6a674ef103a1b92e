"""Decoding: verified drafts follow the decoder's own law, special tokens stay out, the last token ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.test_speech_decoder import GREEDY, TINY, make, run, text
from vocalnet.decoding import DecodingConfig, generate_chunk, verify
from vocalnet.errors import ConfigError
from vocalnet.layers import attend
from vocalnet.sampling import SamplingConfig, probabilities


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_verified_is_next_token_decoding(modules, penalty):
    decoder, rows = make(), text()
    sampling = SamplingConfig(repetition_penalty=penalty)
    plain = run(decoder, rows, 5, 15, 0, "accept-all", sampling=sampling)
    assert run(decoder, rows, 5, 15, modules, "verified", sampling=sampling) == plain


def test_good_drafts_save_steps():
    """With modules that copy the decoder's next prediction, drafts pass and steps carry several tokens."""
    decoder, rows = make(), text()
    decoder.output_proj.weight.data.zero_()
    decoder.output_proj.bias.data[7] = 5.0  # the decoder always says 7, and so do its modules
    for module in decoder.mtp_layers:
        module.output_proj.load_state_dict(decoder.output_proj.state_dict())
    state = decoder.init_state(64, 128)
    decoder.add_text(rows, state, last=True)
    assert generate_chunk(decoder, state, GREEDY, 60, "verified") == [7] * 60
    assert state.steps <= 60 // 4 + 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_verification_keeps_the_law(temperature, top_p):
    """χ² of 20,000 draws from the verification rule against the decoder's law, over a toy vocabulary."""
    generator = torch.Generator().manual_seed(0)
    draws, sampling = 20_000, SamplingConfig(temperature=temperature, top_p=top_p)
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.1, 0.6]]).log()
    p = probabilities(scores, sampling)
    q = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    drafts = torch.multinomial(q, draws, replacement=True, generator=generator)[:, None]
    passed, tokens = verify(scores.expand(draws, -1, -1), drafts, q.expand(draws, 1, -1), sampling, generator=generator)
    first = torch.where(passed == 1, drafts[:, 0], tokens)
    assert chi2(torch.bincount(first, minlength=5), p[0]) < 18.5  # 4 degrees of freedom, 0.1 %
    assert chi2(torch.bincount(tokens[passed == 1], minlength=5), p[1]) < 18.5


def test_relaxed_lets_pass_what_lies_near():
    scores = torch.full((1, 2, 44), -20.0)
    scores[0, :, 9], scores[0, :, 10], scores[0, :, 30] = 2.0, 1.5, -1.0  # 9 = (1, 1) in a grid of 8 × 5

    def passes(draft, **changes):
        config = DecodingConfig(mode="relaxed", **{"ratio": 1.0, **changes})
        return int(verify(scores, torch.tensor([[draft]]), None, GREEDY, config)[0])

    assert passes(9)
    assert not passes(10)
    assert passes(10, ratio=0.6)  # exp(-0.5) = 0.61
    assert not passes(10, ratio=0.62)
    assert passes(17, levels=(8, 5))  # (1, 2)
    assert not passes(18, levels=(8, 5))  # (2, 2): two apart
    assert passes(18, levels=(8, 5), distance=2)
    assert not passes(42, levels=(8, 5), distance=99), "a special token is nobody's neighbour"
    assert not passes(8 + 7, levels=(8, 5), distance=5), "digits, not numbers, are compared"


def test_confidence_shortens_steps_and_only_those():
    decoder, rows = make(), text()
    counts = {}
    for confidence in (0.0, 0.2, 1.0):
        state = decoder.init_state(64, 128)
        decoder.add_text(rows, state, last=True)
        counts[confidence] = len(generate_chunk(decoder, state, GREEDY, 48, DecodingConfig(confidence=confidence)))
        counts[confidence] /= state.steps
    assert counts[0.0] > counts[0.2] > counts[1.0] >= 1
    assert run(decoder, rows, 5, 15, 3, DecodingConfig(confidence=1.0)) == run(decoder, rows, 5, 15, 0)


def chi2(counts, law):
    """Pearson's statistic of counts against a law; what cannot happen must not."""
    assert counts[law == 0].sum() == 0
    expected = law * counts.sum()
    return ((counts - expected) ** 2 / expected)[law > 0].sum()


def test_sampled_streams_share_their_law():
    """The first tokens of many verified and plain answers have the same frequencies."""
    decoder, rows = make(replace(TINY, units=4, mtp_modules=2)), text(4)
    sampling = SamplingConfig(temperature=1.0)
    counts = {}
    for mode in ("accept-all", "verified"):
        generator = torch.Generator().manual_seed(1)
        table = torch.zeros(4, 4)
        for _ in range(100):
            state = decoder.init_state(8, 16, 0 if mode == "accept-all" else 2)
            decoder.add_text(rows, state, last=False)
            first, second = generate_chunk(decoder, state, sampling, 2, mode, generator)
            table[first, second] += 1
        counts[mode] = table.flatten()
    total = counts["accept-all"] + counts["verified"]
    kept = total > 8
    chi2 = ((counts["accept-all"] - counts["verified"]) ** 2 / total.clamp(min=1))[kept].sum()
    assert chi2 < kept.sum() + 4 * (2 * kept.sum()) ** 0.5


@pytest.mark.parametrize("mode", ["accept-all", "verified"])
def test_special_tokens_never_come_out(mode):
    decoder, rows = make(), text()
    decoder.output_proj.bias.data[[decoder.config.bos, decoder.config.sos, decoder.config.eos + 1]] = 100.0
    for module in decoder.mtp_layers:
        module.output_proj.bias.data[decoder.config.units :] = 100.0
    tokens = run(decoder, rows, 5, 15, 3, mode)
    assert all(token < decoder.config.units for token in tokens)


@pytest.mark.parametrize("mode", ["accept-all", "verified"])
def test_eos_ends_only_after_all_text(mode):
    decoder, rows = make(), text(13)
    for head in (decoder, *decoder.mtp_layers):
        head.output_proj.bias.data[decoder.config.eos] = 100.0  # wants to end at once
    state = decoder.init_state(64, 128)
    decoder.add_text(rows[:10], state)
    middle = generate_chunk(decoder, state, GREEDY, 99, mode)
    assert len(middle) >= 20
    assert not state.finished
    decoder.add_text(rows[10:], state, last=True)
    rest = generate_chunk(decoder, state, GREEDY, 99, mode)
    assert state.finished
    # 14 rows with BOS are visible from speech row 31 on: token 31 may be the end.
    assert len(middle) + len(rest) == 31
    assert generate_chunk(decoder, state, GREEDY, 99, mode) == []


def test_seed_reproduces():
    decoder, rows = make(), text()
    sampling = SamplingConfig(temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    for mode in ("accept-all", "verified"):
        first = run(decoder, rows, 5, 15, mode=mode, sampling=sampling)
        assert first == run(decoder, rows, 5, 15, mode=mode, sampling=sampling)


def test_unknown_mode():
    decoder = make()
    with pytest.raises(ConfigError, match="accept-all, verified, relaxed"):
        generate_chunk(decoder, decoder.init_state(), GREEDY, 5, "guess")  # type: ignore[arg-type]


COMPATIBLE = replace(TINY, text_input="hidden", width=24, llm_hidden_size=24, compatible=True, speech_position_scale=1)


class Stack:
    """Layers over caches that only ever grow, text before speech; new speech sees all of both."""

    def __init__(self, decoder, layers):
        self.layers, self.rotary = layers, decoder.rotary
        self.held = [{"text": [], "speech": []} for _ in layers]
        self.rows = {"text": 0, "speech": 0}

    def __call__(self, x, kind):
        known = self.rows["text"] + (self.rows["speech"] if kind == "speech" else 0)
        rotation = self.rotary(torch.arange(known, known + x.shape[1]))
        for layer, held in zip(self.layers, self.held, strict=True):
            q, pair = layer._project(x, rotation)
            held[kind].append(pair.chunk(2, 1))
            pairs = held["text"] + (held["speech"] if kind == "speech" else [])
            keys, values = (torch.cat(parts, 2) for parts in zip(*pairs, strict=True))
            mask = torch.ones(x.shape[1], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - x.shape[1])
            x = layer._finish(x, attend(q, keys, values, mask))
        self.rows[kind] += x.shape[1]
        return x


def as_the_original(decoder, pieces, modules, size):
    """Chunks of the original's loop, written out: broken off at `size` tokens or at EOS, wherever a step may be."""
    config = decoder.config
    projector, main = Stack(decoder, decoder.encode_layers), Stack(decoder, decoder.decode_layers)
    heads = [Stack(decoder, [decoder.mtp_layers[k].decoder_layer]) for k in range(modules)]
    said, chunks = [], []
    for i, piece in enumerate(pieces):
        x = projector(piece[None], "text")
        if i == 0:
            x = torch.cat((decoder.embedding(torch.tensor([[config.bos]])), x), 1)
        states = main(x, "text")
        for head in heads:
            head(states, "text")
        newest, chunk = [config.sos, *said][-1 - modules :], []
        while not chunk or (chunk[-1] != config.eos and len(chunk) < size):
            x = main(decoder.embedding(torch.tensor([newest])), "speech")
            chunk.append(int(decoder.head(x[:, -1]).argmax()))
            for k, head in enumerate(heads):
                if chunk[-1] == config.eos or len(chunk) >= size:
                    break
                x = head(x, "speech")
                chunk.append(int(decoder.mtp_layers[k].logits(x[:, -1]).argmax()))
            newest = (newest + chunk[-1 - modules :])[-max(len(newest), 1 + modules if not said else 0) :]
        said += chunk
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("modules", [0, 1, 2, 3])
def test_compatible_chunks_break_where_the_original_breaks(modules):
    """At 15 tokens though K + 1 = 2 or 4 does not divide it, and at EOS before the text's end."""
    decoder, ends = make(COMPATIBLE, seed=4), 0
    decoder.output_proj.bias.data[decoder.config.eos] = 1.0
    for seed in range(4):
        pieces = text(20, COMPATIBLE, seed).split(5)
        with torch.no_grad():
            expected = as_the_original(decoder, pieces, modules, 15)
        state = decoder.init_state(32, 256, modules)
        for piece, chunk in zip(pieces, expected, strict=True):
            decoder.add_text(piece, state)
            assert generate_chunk(decoder, state, GREEDY, 15) == chunk
        ends += sum(decoder.config.eos in chunk for chunk in expected)
        assert not state.ended
    assert 0 < ends < 16
