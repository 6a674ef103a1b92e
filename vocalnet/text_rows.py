"""What the speech decoder reads of each token of an answer: hidden state, input embedding, and how it is spelled.

Neither the LLM's hidden states nor its embeddings say how a rare word is pronounced. Its letters do, as every speech
synthesiser that reads text shows; with them, words that were seldom heard borrow from others that look alike.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SYMBOLS = string.ascii_lowercase + string.digits + "'"
"""Letters that are told apart; all others share one more."""
HEAD, TAIL = 12, 4
"""How many letters of a token are seen, counted from its beginning and from its end."""
FLAGS = 3
"""A token begins a word, begins with a capital, is all capitals."""
SPELLING_SIZE = FLAGS + (HEAD + TAIL) * (len(SYMBOLS) + 1)
MARK = 4.0
"""Value of a feature that is set; some ten of them are, beside hundreds of dense ones."""
WORD_STARTS = ("Ġ", "▁", " ")
"""How vocabularies write a token's leading space: byte-level BPE, SentencePiece, plain."""


class Spelling:
    """Spellings of a tokenizer's tokens as features, made when they are first asked for."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a Hugging Face tokenizer."""
        self.tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._known: dict[int, list[int]] = {}

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """Token ids → features (T, SPELLING_SIZE), 0 or `MARK`; special tokens have none."""
        rows = torch.zeros(len(ids), SPELLING_SIZE)
        for row, token in zip(rows, ids, strict=True):
            if token not in self._known:
                self._known[token] = [] if token in self._special else self._features(token)
            row[self._known[token]] = MARK
        return rows

    def _features(self, token: int) -> list[int]:
        """Indices of the features that a token has."""
        raw = self.tokenizer.convert_ids_to_tokens(token) or ""
        return features(self.tokenizer.decode([token]), raw.startswith(WORD_STARTS))


def features(text: str, starts_word: bool) -> list[int]:
    """Indices of the features of a token's text: flags, then letters from its beginning and from its end."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text.strip()) if not unicodedata.combining(c))
    flags = (starts_word, letters[:1].isupper(), len(letters) > 1 and letters.isupper())
    codes = [SYMBOLS.index(c) if c in SYMBOLS else len(SYMBOLS) for c in letters.lower()]
    seen = [*enumerate(codes[:HEAD]), *((HEAD + place, code) for place, code in enumerate(codes[: -TAIL - 1 : -1]))]
    return [i for i, flag in enumerate(flags) if flag] + [
        FLAGS + place * (len(SYMBOLS) + 1) + code for place, code in seen
    ]


class TextRows:
    """Makes the speech decoder's text rows of an LLM's tokens."""

    def __init__(self, views: Sequence[str], embed: Callable[[list[int]], Tensor], tokenizer: Any) -> None:
        """
        Args:
            views: what a row holds, in order: "hidden", "embedding", "spelling".
            embed: token ids → the LLM's input embeddings (T, D).
            tokenizer: the LLM's.
        """
        self.views = views
        self.embed = embed
        self.spelling = Spelling(tokenizer)

    def __call__(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """Hidden states (T, D) after the LLM read each token, and the tokens → (T, input_size) float32."""
        rows = [hidden.float()]
        if "embedding" in self.views:
            rows.append(self.embed(list(ids)).to(hidden.device).float())
        if "spelling" in self.views:
            rows.append(self.spelling(ids).to(hidden.device))
        return torch.cat(rows, -1)

    def end(self, token: int) -> Tensor:
        """(1, input_size): the row of the token that closes a text. It has no hidden state; its embedding stands in."""
        return self(self.embed([token]), [token])
