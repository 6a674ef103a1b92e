"""What the speech decoder reads of a token: its views in order, and the letters."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_model import tiny_model, tokenizer
from vocalnet.text_rows import FLAGS, HEAD, MARK, SPELLING_SIZE, SYMBOLS, TAIL, Spelling, TextRows, features


def letters_of(row):
    """The letters that a row of features shows, from the beginning and from the end; '.' for no letter."""
    places = row[FLAGS:].view(HEAD + TAIL, len(SYMBOLS) + 1)
    shown = ["." if not place.any() else (SYMBOLS + "?")[int(place.argmax())] for place in places]
    return "".join(shown[:HEAD]), "".join(shown[HEAD:])[::-1]


def row_of(text, starts_word=True):
    row = torch.zeros(SPELLING_SIZE)
    row[features(text, starts_word)] = 1
    return row


@pytest.mark.parametrize(
    ("text", "head", "tail", "flags"),
    [
        (" wool", "wool........", "wool", [1, 0, 0]),
        (" Harare", "harare......", "rare", [1, 1, 0]),
        (" NASA", "nasa........", "nasa", [1, 1, 1]),
        (" E", "e...........", "...e", [1, 1, 0]),
        (" Bogotá", "bogota......", "gota", [1, 1, 0]),
        ("'t", "'t..........", "..'t", [0, 0, 0]),
        (" internationalization", "internationa", "tion", [1, 0, 0]),
        (" a-1", "a?1.........", ".a?1", [1, 0, 0]),
        ("", "............", "....", [0, 0, 0]),
    ],
)
def test_letters(text, head, tail, flags):
    row = row_of(text, text.startswith(" "))
    assert letters_of(row) == (head, tail)
    assert row[:FLAGS].tolist() == flags


def test_words_that_look_alike_have_rows_that_are_alike():
    near = (row_of(" stamps") - row_of(" stumps")).abs().sum()
    far = (row_of(" stamps") - row_of(" violin")).abs().sum()
    assert near == 4  # one letter, seen from both ends
    assert far > 15


def test_special_tokens_have_no_letters():
    words = tokenizer()
    spelling = Spelling(words)
    rows = spelling([words.eos_token_id, words.convert_tokens_to_ids("w12")])
    assert rows.shape == (2, SPELLING_SIZE)
    assert not rows[0].any()
    assert letters_of(rows[1]) == ("w12.........", ".w12")
    assert set(rows.unique().tolist()) == {0.0, MARK}
    assert spelling([]).shape == (0, SPELLING_SIZE)


def test_rows_hold_the_views_asked_for():
    words = tokenizer()
    table = torch.randn(len(words), 8)
    hidden, ids = torch.randn(3, 8), [5, 6, 7]
    assert TextRows(["hidden"], table.__getitem__, words)(hidden, ids).equal(hidden)
    rows = TextRows(["hidden", "embedding", "spelling"], table.__getitem__, words)
    made = rows(hidden, ids)
    assert made[:, :16].equal(torch.cat((hidden, table[ids]), 1))
    assert made[:, 16:].equal(Spelling(words)(ids))
    assert rows.end(7)[0, :16].equal(table[7].repeat(2))


def test_the_decoder_hears_the_letters():
    model = tiny_model()
    decoder, ids = model.speech_decoder, [5, 6, 7]
    rows = model.text_rows(torch.randn(3, 48), ids)
    other = rows.clone()
    other[:, 96:] = model.text_rows.spelling([8, 9, 10])
    with torch.inference_mode():
        one, two = (decoder.project_batch(x[None]) for x in (rows, other))
    assert (one[0, 0] - two[0, 0]).abs().max() == 0  # BOS
    assert (one[0, 1:] - two[0, 1:]).abs().amax(-1).min() > 1e-3
