"""The streaming mask: the predicate against its definition spelled out, and the batch mask against the predicate."""

from __future__ import annotations

import itertools

import pytest
import torch

from vocalnet.mask import last_speech_row, training_mask, visible_text, visible_text_count


def visible_by_chunks(text: int, row: int, text_chunk: int, speech_chunk: int) -> bool:
    """The schedule in words: SOS and the first chunk's tokens see one chunk of text, each further chunk one more."""
    chunk = 0
    end = speech_chunk  # the last row of this chunk: SOS is row 0
    while row > end:
        chunk, end = chunk + 1, end + speech_chunk
    return text < text_chunk * (chunk + 1)


@pytest.mark.parametrize(("text_chunk", "speech_chunk"), [(5, 15), (1, 1), (3, 7), (10, 4)])
def test_predicate_is_the_schedule(text_chunk, speech_chunk):
    text, rows = torch.arange(40), torch.arange(70)
    table = visible_text(text[None], rows[:, None], text_chunk, speech_chunk)
    for t, row in itertools.product(range(40), range(70)):
        assert table[row, t] == visible_by_chunks(t, row, text_chunk, speech_chunk)
    counts = [visible_text_count(row, text_chunk, speech_chunk) for row in range(70)]
    assert [min(count, 40) for count in counts] == table.sum(1).tolist()


@pytest.mark.parametrize(("text_chunk", "speech_chunk"), [(5, 15), (1, 1), (3, 7)])
def test_last_speech_row_inverts_the_count(text_chunk, speech_chunk):
    for texts in range(60):
        last = last_speech_row(texts, text_chunk, speech_chunk)
        assert last < 0 or visible_text_count(last, text_chunk, speech_chunk) <= texts
        assert visible_text_count(last + 1, text_chunk, speech_chunk) > texts


def test_batch_mask():
    lengths, streaming = torch.tensor([9, 6]), torch.tensor([True, False])
    mask = training_mask(lengths, 9, 20, streaming, 5, 15)
    assert mask.shape == (2, 29, 29)
    assert mask[0, :9, :9].equal(torch.ones(9, 9, dtype=torch.bool).tril())  # streaming: text causal
    assert mask[1, :9, :9].equal((torch.arange(9) < 6).expand(9, 9))  # otherwise bidirectional, without padding
    assert not mask[:, :9, 9:].any()  # text never sees speech
    assert mask[0, 9 + 15, :9].sum() == 5
    assert mask[0, 9 + 16, :9].sum() == 9
    assert mask[1, 9, :9].sum() == 6
    assert mask[:, 9:, 9:].equal(torch.ones(20, 20, dtype=torch.bool).tril().expand(2, -1, -1))
    assert mask.any(-1).all()  # no row is empty


def test_module_looks_ahead():
    lengths, streaming = torch.tensor([20]), torch.tensor([True])
    plain = training_mask(lengths, 20, 40, streaming, 5, 15)
    ahead = training_mask(lengths, 20, 40, streaming, 5, 15, ahead=3)
    assert ahead[0, 20:57, :20].equal(plain[0, 23:, :20])
