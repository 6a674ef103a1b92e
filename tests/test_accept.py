"""Answers are found as whole words, however numbers and names are written."""

import pytest

from vocalnet.evaluation.accept import is_right, normalise, number_words


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (105, "one hundred five"),
        (1969, "one thousand nine hundred sixty nine"),
    ],
)
def test_numbers_in_words(number, text):
    assert number_words(number) == text


def test_normalisation():
    assert normalise("It’s 1,024 — in Bogotá!") == "its one thousand twenty four in bogota"
    assert normalise("one hundred and five") == normalise("105")


@pytest.mark.parametrize(
    ("transcript", "accept", "right"),
    [
        ("The answer is 12.", ["twelve"], True),
        ("twenty-four hours", ["24"], True),
        ("A Parisian street", ["Paris"], False),
        ("It is the Seine.", ["the Sen", "the Seine"], True),
        ("", ["yes"], False),
        ("anything", ["?!"], False),  # nothing is left of this answer after normalisation
    ],
)
def test_whole_words_count(transcript, accept, right):
    assert is_right(transcript, accept) is right
