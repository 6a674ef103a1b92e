"""Whether a transcript holds one of the accepted answers, as whole words after normalisation."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_UNIT_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TEN_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = _UNIT_NAMES.split()
_TENS = _TEN_NAMES.split()


def number_words(number: int) -> str:
    """0 ≤ number < 1,000,000,000 in English words, without 'and': 1969 → 'one thousand nine hundred sixty nine'."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10 - 2] + (f" {_UNITS[rest]}" if rest else "")
    for size, name in ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{number_words(number // size)} {name}" + (f" {number_words(rest)}" if rest else "")
    raise AssertionError("unreachable: every number is under 20, under 100 or at least 100")


def normalise(text: str) -> str:
    """Lower case, no punctuation, digits as words, single spaces; the 'and' inside numbers is dropped.

    "It's 1,024!" → "its one thousand twenty four"
    """
    text = text.lower().replace("’", "'").replace("'", "").replace("-", " ")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"\d{1,9}", lambda match: f" {number_words(int(match.group()))} ", text)
    words = re.sub(r"[^a-z\s]", " ", _plain_letters(text)).split()
    return re.sub(r"\b(hundred|thousand|million) and\b", r"\1", " ".join(words))


def _plain_letters(text: str) -> str:
    """Accents removed, so that 'Bogotá' and a recogniser's 'Bogota' agree."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def is_right(transcript: str, accept: Iterable[str]) -> bool:
    """True if any string of `accept` occurs in the transcript as whole words, both normalised."""
    heard = f" {normalise(transcript)} "
    return any(f" {wanted} " in heard for answer in accept if (wanted := normalise(answer)))
