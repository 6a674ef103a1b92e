"""Many answers at once: each is what it would be alone, in batches of whole texts and in lockstep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.test_speech_decoder import GREEDY, TINY, make, text
from vocalnet.batch import Lockstep, generate_batch
from vocalnet.decoding import DecodingConfig, generate_chunk
from vocalnet.errors import ConfigError
from vocalnet.mtp import MTP_HEADS
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder

TEXTS = [text(23), text(7, seed=2), text(14, seed=3), text(3, seed=4)]
LIMITS = [40, 30, 17, 40]
RELAXED = DecodingConfig("relaxed", ratio=0.3, levels=(8, 5))
WAYS = [DecodingConfig(), DecodingConfig(confidence=0.3), DecodingConfig("verified"), replace(RELAXED, confidence=0.2)]


def alone(decoder, rows, limit, sampling, decoding, streaming=True):
    state = decoder.init_state(32, 96, streaming=streaming)
    decoder.add_text(rows, state, last=True)
    return generate_chunk(decoder, state, sampling, limit, decoding)


@pytest.mark.parametrize("kind", list(MTP_HEADS))
def test_rows_equal_single_runs(kind):
    decoder, sampling = make(replace(TINY, mtp_head=kind)), SamplingConfig(repetition_penalty=1.4)
    for decoding in WAYS if kind != "group" else WAYS[:1]:
        expected = [alone(decoder, rows, limit, sampling, decoding) for rows, limit in zip(TEXTS, LIMITS, strict=True)]
        assert generate_batch(decoder, TEXTS, sampling, LIMITS, decoding) == expected
        assert len({len(row) for row in expected}) > 1


def test_without_streaming():
    decoder = make()
    expected = [alone(decoder, rows, 40, SamplingConfig(), DecodingConfig(), streaming=False) for rows in TEXTS]
    assert generate_batch(decoder, TEXTS, max_tokens=40, streaming=False) == expected


@pytest.mark.parametrize(("temperature", "penalty"), [(0.7, 1.0), (1.3, 1.5)])
@pytest.mark.parametrize("kind", ["sequential", "deepseek", "leap"])
def test_verified_streams_follow_the_decoders_law(kind, temperature, penalty):
    """χ² of the first three tokens of 2,000 verified answers against 2,000 of the decoder alone."""
    decoder = make(replace(TINY, units=3, mtp_head=kind, mtp_modules=2))
    sampling = SamplingConfig(temperature=temperature, repetition_penalty=penalty, penalty_window=2)
    tables = []
    for modules, mode in ((0, "accept-all"), (2, "verified")):
        generator = torch.Generator().manual_seed(modules)
        rows = generate_batch(decoder, [text(12)] * 2000, sampling, 3, mode, modules, generator=generator)
        codes = torch.tensor(rows) @ torch.tensor([9, 3, 1])
        tables.append(torch.bincount(codes, minlength=27).float())
    plain, verified = tables
    kept = plain + verified > 8
    statistic = ((plain - verified) ** 2 / (plain + verified))[kept].sum()
    freedom = int(kept.sum()) - 1
    assert freedom >= 5
    assert statistic < freedom + 3.1 * (2 * freedom) ** 0.5 + 4


def test_special_tokens_stay_out_and_limits_hold():
    decoder = make()
    decoder.output_proj.bias.data[[decoder.config.bos, decoder.config.sos, decoder.config.eos + 1]] = 100.0
    for rows, limit in zip(generate_batch(decoder, TEXTS, max_tokens=LIMITS), LIMITS, strict=True):
        assert len(rows) <= limit
        assert all(token < decoder.config.units for token in rows)
    assert generate_batch(decoder, TEXTS[:2], max_tokens=[0, 5])[0] == []


def test_errors():
    decoder = make()
    with pytest.raises(ConfigError, match="at least one text"):
        generate_batch(decoder, [])
    with pytest.raises(ConfigError, match="a limit for each"):
        generate_batch(decoder, TEXTS, max_tokens=[1, 2])
    with pytest.raises(ConfigError, match="has 3"):
        generate_batch(decoder, TEXTS, modules=9)


# ---- in lockstep ----

PIECES = ((0, 5), (5, 10), (10, 15), (15, 20), (20, 23))


def streamed(decoder, rows, modules, sampling):
    """Tokens of one answer, its text in pieces."""
    state = decoder.init_state(32, 80, modules)
    tokens = []
    for first, last in PIECES:
        decoder.add_text(rows[first:last], state, last == len(rows))
        tokens += generate_chunk(decoder, state, sampling, 15)
    return tokens + generate_chunk(decoder, state, sampling, 30)


def together(decoder, rows, modules, sampling, **options):
    """Tokens of each answer of rows (B, T, input_size)."""
    stream = Lockstep(decoder, len(rows), modules, 32, 80, sampling, **options)
    tokens: list[list[int]] = [[] for _ in rows]
    for first, last in PIECES:
        stream.add_text(rows[:, first:last], last == rows.shape[1])
        for said, new in zip(tokens, stream.generate(15), strict=True):
            said += new
    for said, new in zip(tokens, stream.generate(30), strict=True):
        said += new
    return tokens


def talkative(kind: str = "sequential") -> SpeechDecoder:
    """A decoder that ends some answers early."""
    decoder = make(replace(TINY, mtp_head=kind))
    decoder.output_proj.bias.data[decoder.config.eos] = 7.0
    return decoder


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", MTP_HEADS)
def test_each_in_lockstep_says_what_it_says_streamed(kind, fixed):
    decoder = talkative(kind)
    rows = torch.stack([text(seed=seed) for seed in range(3)])
    expected = [streamed(decoder, row, 3, GREEDY) for row in rows]
    assert together(decoder, rows, 3, GREEDY, fixed=fixed) == expected


def test_lockstep_rows_end_apart():
    decoder = talkative()
    rows = torch.stack([text(seed=seed) for seed in range(6)])
    lengths = {len(tokens) for tokens in together(decoder, rows, 3, GREEDY)}
    assert len(lengths) > 1


@pytest.mark.parametrize("modules", [0, 2])
def test_lockstep_with_penalty_and_fixed_shapes(modules):
    decoder = talkative()
    rows = torch.stack([text(seed=seed) for seed in range(2)])
    sampling = SamplingConfig(repetition_penalty=2.0)
    expected = [streamed(decoder, row, modules, sampling) for row in rows]
    assert together(decoder, rows, modules, sampling, fixed=True) == expected


def test_lockstep_obeys_its_seed():
    decoder, rows = talkative(), torch.stack([text(seed=seed) for seed in range(2)])
    first, again = (
        together(decoder, rows, 2, SamplingConfig(temperature=1.0), generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert first == again
    assert first[0] != first[1]


def test_bad_lockstep():
    decoder = make()
    with pytest.raises(ConfigError, match="batch is 0"):
        Lockstep(decoder, 0)
    with pytest.raises(ConfigError, match="on cuda only"):
        Lockstep(decoder, capture=True)
    with pytest.raises(ConfigError, match="not a compatible one"):
        Lockstep(SpeechDecoder(replace(TINY, text_input="hidden", width=24, compatible=True, speech_position_scale=1)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MTP_HEADS)
def test_captured_steps_say_the_same(kind):
    decoder = talkative(kind).to("cuda")
    rows = torch.stack([text(seed=seed) for seed in range(3)]).to("cuda")
    expected = together(decoder, rows, 3, GREEDY, fixed=True)
    assert together(decoder, rows, 3, GREEDY, capture=True) == expected
