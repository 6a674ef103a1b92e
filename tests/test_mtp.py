"""Every kind of multi-token prediction: streaming = training, growing prefixes, decoding modes, learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.test_speech_decoder import GREEDY, TINY, make, run, teacher_forced, text
from vocalnet.decoding import DecodingConfig
from vocalnet.errors import ConfigError
from vocalnet.linears import int8_available
from vocalnet.mtp import MTP_HEADS
from vocalnet.sampling import SamplingConfig

KINDS = list(MTP_HEADS)
DRAFTING = [kind for kind in KINDS if kind != "group"]


def head(kind, depth=3, **changes):
    """A decoder with a head of a kind; its start is overwritten, so that every weight counts."""
    return make(replace(TINY, mtp_head=kind, mtp_modules=depth, **changes))


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_equals_training_mask(kind, streaming, refuse):
    """Rows fed through the caches, text in pieces, give the logits of the training pass for every draft.

    With `refuse`, drafts are wrong until the truth is fed, as when verification refuses them.
    """
    decoder, rows = head(kind), text()
    group = decoder.mtp_layers.group
    tokens = torch.randint(40, (60,), generator=torch.Generator().manual_seed(3))
    offline = teacher_forced(decoder, rows, tokens.tolist(), streaming)  # (predictors + 1, rows, vocabulary)
    state = decoder.init_state(32, 64, streaming=streaming)
    given = 0
    if not streaming:
        decoder.add_text(rows, state, last=True)
        given = len(rows)
    fed = torch.cat((torch.full((group,), decoder.config.sos), tokens))[None]
    checked = 0
    with torch.no_grad():
        for start in range(0, fed.shape[1] - 8, 4):
            part = fed[:, start : start + 4]
            count = part.shape[1] // group
            while state.speech_rows + count - 1 > decoder.speech_room(state):
                decoder.add_text(rows[given : given + 3], state, last=given + 3 >= len(rows))
                given += 3
            hidden = decoder.feed(part, state)
            newest = state.speech_rows + count - 1
            torch.testing.assert_close(decoder.head(hidden[0, -1]), offline[0, newest], atol=1e-4, rtol=0)
            drafts: list[int] = []

            def choose(logits, start=start, newest=newest, drafts=drafts):
                predictor, back = decoder.mtp_layers.source(len(drafts) + 1)
                if not (refuse and drafts and decoder.mtp_layers.conditioned):  # a wrong draft leads elsewhere
                    torch.testing.assert_close(logits[0], offline[predictor, newest - back], atol=1e-4, rtol=0)
                drafts.append(0)
                truth = fed[:, start + 4 + len(drafts) : start + 5 + len(drafts)][:, 0]
                return (truth + 1) % 40 if refuse else truth

            decoder.draft(hidden, fed[:, start : start + 5], state, choose, revisit=refuse)
            checked += len(drafts)
            state.speech_rows += count
    assert checked >= 3 * 13
    assert given < len(rows) + 3


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_the_cut(kind):
    decoder, rows = head(kind), text()
    whole = run(decoder, rows, 99, 99)
    assert len(whole) > 20
    for piece, chunk in [(5, 15), (1, 7)]:
        assert run(decoder, rows, piece, chunk) == whole
    shorter = run(decoder, rows[:14], 5, 15, last=False)
    assert len(shorter) >= 15
    assert whole[: len(shorter)] == shorter


@pytest.mark.parametrize("kind", DRAFTING)
def test_greedy_verified_is_next_token_decoding(kind):
    decoder, rows = head(kind), text()
    sampling = SamplingConfig(repetition_penalty=1.3)
    plain = run(decoder, rows, 5, 15, 0, sampling=sampling)
    for count in (1, 3):
        assert run(decoder, rows, 5, 15, count, "verified", sampling=sampling) == plain
    adaptive = DecodingConfig("verified", confidence=0.5)
    assert run(decoder, rows, 5, 15, 3, adaptive, sampling=sampling) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_packed_heads_keep_the_numbers(kind):
    plain, packed, rows = head(kind), head(kind), text()
    packed.prepare_inference("fp32")
    assert run(packed, rows, 5, 15) == run(plain, rows, 5, 15)
    for precision in ("bf16", "int8") if int8_available() else ("bf16",):
        half = head(kind)
        half.prepare_inference(precision)
        assert len(run(half, rows, 5, 15)) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind):
    decoder = head(kind)
    loss, metrics = decoder.training_loss(
        [text(9), text(12)], [torch.arange(20), torch.arange(9)], torch.tensor([True, False])
    )
    loss.backward()
    assert [name for name, parameter in decoder.named_parameters() if parameter.grad is None] == []
    assert len(metrics) == 1 + decoder.mtp_layers.predictors(3)


def test_group_says_what_it_can_do():
    decoder = head("group")
    with pytest.raises(ConfigError, match="groups of 4, allowed: 3"):
        decoder.init_state(modules=1)
    with pytest.raises(ConfigError, match="come together, allowed: accept-all"):
        run(decoder, text(), 5, 15, mode="verified")
    with pytest.raises(ConfigError, match="have 'sequential'"):
        replace(
            TINY, mtp_head="leap", compatible=True, text_input="hidden", llm_hidden_size=32, speech_position_scale=1.0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_carry_several_tokens(kind):
    decoder, rows = head(kind), text()
    decoder.output_proj.bias.data[decoder.config.eos] = -100.0
    for module in decoder.mtp_layers:
        if hasattr(module, "output_proj"):
            module.output_proj.bias.data[decoder.config.eos] = -100.0
    from vocalnet.decoding import generate_chunk

    state = decoder.init_state(64, 128)
    decoder.add_text(rows, state, last=True)
    assert len(generate_chunk(decoder, state, GREEDY, 60)) == 60
    assert state.steps <= 60 // 4 + 2
