"""What the speech decoder reads of a token: its views in order, and its phonemes."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_model import pronunciations, tiny_model, tokenizer
from vocalnet.errors import ConfigError
from vocalnet.text_rows import (
    MARK,
    PHONEMES,
    PLACES,
    PRONUNCIATION_SIZE,
    STRESSES,
    TABLE_WIDTH,
    TAIL,
    TextRows,
    decode,
    encode,
    features,
)

KINDS = len(PHONEMES) + len(STRESSES)


def row_of(text, starts_word=True):
    return features(torch.tensor([encode(text, starts_word)], dtype=torch.uint8))[0]


def phonemes_of(row):
    """The phonemes that a row of features shows, from the beginning and from the end; '_' for none."""
    shown = []
    for place in row[1:].view(PLACES + TAIL, KINDS):
        phoneme, stress = place[: len(PHONEMES)], place[len(PHONEMES) :]
        mark = STRESSES[int(stress.argmax())] if stress.any() else ""
        shown.append(mark + PHONEMES[int(phoneme.argmax())] if phoneme.any() else "_")
    return "".join(shown[:PLACES]), "".join(shown[PLACES:])


@pytest.mark.parametrize(
    ("said", "head", "back"),
    [
        ("wˈʊl", "wˈʊl_________", "lˈʊw_"),
        ("həɹˈɑɹi", "həɹˈɑɹi______", "iɹˈɑɹ"),
        ("dˌɛmənstɹˈAʃən", "dˌɛmənstɹˈAʃən", "nəʃˈA"),
        ("ˌɪntəɹnˌæʃənəlˈIz", "ˌɪntəɹnˌæʃənəl", "lənə"),
        (".", ".___________", ".___"),
        ("", "____________", "____"),
    ],
)
def test_phonemes_are_shown_from_both_ends(said, head, back):
    row = row_of(said)
    assert phonemes_of(row) == (head, back)
    assert set(row.unique().tolist()) <= {0.0, MARK}
    assert row[0] == MARK
    assert row_of(said, False)[0] == 0


def test_a_row_of_the_table_is_read_back():
    for text, starts_word in (("kˈæpəTᵊl", True), ("ˌɑn", False), ("", False), ("n,", True)):
        row = encode(text, starts_word)
        assert len(row) == TABLE_WIDTH
        assert max(row) < 256
        assert decode(torch.tensor(row, dtype=torch.uint8)) == " " * starts_word + text
    assert decode(torch.tensor(encode("a★b", False))) == "ab"
    assert len(PHONEMES) < 64, "a code holds phoneme and stress in a byte"
    assert len(set(PHONEMES)) == len(PHONEMES)


def test_words_that_sound_alike_have_rows_that_are_alike():
    near = (row_of("stˈæmps") != row_of("stˈʌmps")).sum()
    far = (row_of("stˈæmps") != row_of("vˌIəlˈɪn")).sum()
    assert near == 4  # one phoneme, seen from both ends
    assert far > 12


def test_rows_hold_the_views_asked_for():
    embeddings, table = torch.randn(40, 8), pronunciations(40)
    hidden, ids = torch.randn(3, 8), [5, 6, 7]
    empty = table[:0]
    assert TextRows(["hidden"], embeddings.__getitem__, empty)(hidden, ids).equal(hidden)
    rows = TextRows(["hidden", "embedding", "pronunciation"], embeddings.__getitem__, table)
    made = rows(hidden, ids)
    assert made[:, :16].equal(torch.cat((hidden, embeddings[ids]), 1))
    assert made[:, 16:].equal(features(table[ids]))
    assert rows(hidden[:0], []).shape == (0, 16 + PRONUNCIATION_SIZE)
    assert rows.end(7)[0, :16].equal(embeddings[7].repeat(2))
    with pytest.raises(ConfigError, match="table has none"):
        TextRows(["hidden", "pronunciation"], embeddings.__getitem__, empty)


def test_the_decoder_hears_the_phonemes():
    model = tiny_model()
    decoder, ids = model.speech_decoder, [5, 6, 7]
    assert len(decoder.pronunciations) == len(tokenizer())
    rows = model.text_rows(torch.randn(3, 48), ids)
    other = rows.clone()
    other[:, 96:] = features(decoder.pronunciations[[8, 9, 10]])
    with torch.inference_mode():
        one, two = (decoder.project_batch(x[None]) for x in (rows, other))
    assert (one[0, 0] - two[0, 0]).abs().max() == 0  # BOS
    assert (one[0, 1:] - two[0, 1:]).abs().amax(-1).min() > 1e-3
