"""How every token of the LLM's vocabulary is pronounced: the table that `vocalnet.text_rows` reads.

A token that is a word has the word's phonemes. A piece of a word has those that its letters stand for, most often: the
letters of the synthesiser's lexicon and of all sentences spoken are aligned with their phonemes (every letter stands
for none, one or two; which, hard expectation maximisation finds, as in joint-sequence models, Bisani and Ney 2008).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from data_prep.common import LLM, atomic_write, read_tar
from data_prep.voices import HibariVoice, hibari_lexicon
from vocalnet.checkpoints import base_model
from vocalnet.errors import DataError
from vocalnet.prompt import ChatPrompt
from vocalnet.text_rows import PHONEMES, STRESSES, TABLE_WIDTH, encode
from vocalnet.training.answer_states import PRONUNCIATIONS

Units = tuple[str, ...]  # phonemes, each with its stress mark

VERSION = 2  # of what is done here: a table that another version made is made anew
MADE_FROM = "made_from"  # in the file's metadata
MOST_PHONEMES = 2  # that one letter stands for, as the x of "box"
LEARNED_FROM = 20_000  # words
ROUNDS = 4
LEXICON_WEIGHT = 0.01  # of a word of the lexicon against one that was spoken
WHOLE_WEIGHT = 10.0  # of a token that is a whole word against the same token as a part of a longer one
UNSEEN = 12.0  # cost of what a letter never stood for
SILENT: dict[Units, float] = {(): 0.0}
FAR = 0.25  # a letter and a phoneme further apart, as shares of their word, begin as strangers
PAUSES = ",.?!"
WORD_STARTS = ("Ġ", "▁", " ")  # how vocabularies write a token's leading space: byte-level BPE, SentencePiece, plain

Spoken = list[tuple[str, list[str]]]  # sentences, each with the phonemes of its words


def split_units(pronunciation: str) -> Units:
    """ "pˈɛɹɪs" → p, ˈɛ, ɹ, ɪ, s; symbols outside the alphabet and pauses are left out."""
    found, stress = list[str](), ""
    for symbol in pronunciation:
        if symbol in STRESSES:
            stress = symbol
        elif symbol in PHONEMES and symbol not in PAUSES:
            found.append(stress + symbol)
            stress = ""
    return tuple(found)


def plain(text: str) -> str:
    """Lower case without accents; as many letters as before, so that places stay."""
    return "".join(unicodedata.normalize("NFKD", letter)[0] for letter in text).lower()


class Aligner:
    """Costs (negative log probabilities) of what each letter stands for, and the cheapest way through a word."""

    def __init__(self, words: Sequence[tuple[str, Units]], seed: int = 0) -> None:
        """Learns from pairs of a word's letters and its phonemes."""
        chosen = random.Random(seed).sample(words, min(len(words), LEARNED_FROM))
        self.costs = self._first_guess(chosen)
        for _ in range(ROUNDS):
            counts: dict[str, Counter[Units]] = defaultdict(Counter)
            for word, units in chosen:
                for letter, span in zip(plain(word), self(word, units) or (), strict=False):
                    counts[letter][_bare(units[slice(*span)])] += 1
            self.costs = {letter: _costs(found) for letter, found in counts.items()}

    def __call__(self, word: str, units: Units) -> list[tuple[int, int]] | None:
        """Per letter the span of `units` that it stands for; None if the letters are too few."""
        letters = plain(word)
        if len(units) > MOST_PHONEMES * len(letters):
            return None
        bare = _bare(units)
        best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # per letter: units used → (cost, used before)
        for letter in letters:
            # A sign stands for nothing; else it would take the last phonemes from a letter that may be silent.
            costs, here = self.costs.get(letter, {} if letter.isalnum() else SILENT), dict[int, tuple[float, int]]()
            for used, (cost, _) in best[-1].items():
                for size in range(min(MOST_PHONEMES, len(units) - used) + 1):
                    total = cost + costs.get(bare[used : used + size], UNSEEN)
                    if used + size not in here or total < here[used + size][0]:
                        here[used + size] = (total, used)
            best.append(here)
        spans, end = list[tuple[int, int]](), len(units)
        for here in reversed(best[1:]):
            start = here[end][1]
            spans.append((start, end))
            end = start
        return spans[::-1]

    @staticmethod
    def _first_guess(words: Iterable[tuple[str, Units]]) -> dict[str, dict[Units, float]]:
        """From letters and phonemes that lie at about the same place of their words."""
        counts: dict[str, Counter[Units]] = defaultdict(Counter)
        for word, units in words:
            for i, letter in enumerate(plain(word)):
                for j, unit in enumerate(_bare(units)):
                    if abs((i + 0.5) / len(word) - (j + 0.5) / len(units)) < FAR:
                        counts[letter][unit,] += 1
        costs = {letter: _costs(found) for letter, found in counts.items()}
        return {letter: {(): 2.0, **found} for letter, found in costs.items()}


@cache
def _bare(units: Units) -> Units:
    """Without stress."""
    return tuple(unit.lstrip(STRESSES) for unit in units)


def _costs(counts: Counter[Units]) -> dict[Units, float]:
    total = sum(counts.values())
    return {units: -math.log(count / total) for units, count in counts.items()}


def spoken_words(data: Path) -> Spoken:
    """The training sentences, each with the phonemes of its words; those where their numbers differ are left out.

    Raises:
        DataError: nothing has been spoken yet.
    """
    shards = sorted((data / "answers").glob("train-*.tar"))
    if not shards:
        raise DataError(f"no answers in {data}: run `python -m data_prep answers --data {data}` first")
    found = []
    for shard in shards:
        for _, files in read_tar(shard):
            about = json.loads(files["json"])
            words = about["phonemes"].split()
            if len(words) == len(about["text"].split()):
                found.append((about["text"], words))
    return found


class TokenCounts:
    """What the tokens of words stand for, counted over words in their contexts."""

    def __init__(self, tokenizer: Any, aligner: Aligner) -> None:
        self.tokenizer = tokenizer
        self.aligner = cache(aligner.__call__)
        self.found: dict[int, Counter[str]] = defaultdict(Counter)

    def add(self, texts: Sequence[str], pronunciations: Sequence[Sequence[str]], weight: float) -> None:
        """Texts with the pronunciation of each of their words."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        for text, said, ids, spans in zip(
            texts, pronunciations, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            places = re.finditer(r"\S+", text)
            words = [(place.start(), place.group(), units) for place, units in zip(places, said, strict=True)]
            for token, (start, end) in zip(ids, spans, strict=True):
                start += len(text[start:end]) - len(text[start:end].lstrip())
                piece = next((word for word in words if word[0] <= start < end <= word[0] + len(word[1])), None)
                if piece is not None and start < end:
                    self._count(token, piece[1], split_units(piece[2]), start - piece[0], end - piece[0], weight)

    def _count(self, token: int, word: str, units: Units, start: int, end: int, weight: float) -> None:
        """One token, the letters `start` to `end` of a word."""
        if not any(letter.isalnum() for letter in word[start:end]):
            return
        spans = self.aligner(word, units)
        if spans is not None:
            weight *= 1 if any(letter.isalnum() for letter in word[:start] + word[end:]) else WHOLE_WEIGHT
            self.found[token]["".join(units[spans[start][0] : spans[end - 1][1]])] += weight  # type: ignore[assignment]

    def most_common(self, token: int) -> str | None:
        """Its usual pronunciation; None if it was never met."""
        return self.found[token].most_common(1)[0][0] if token in self.found else None


def table_of(tokenizer: Any, counts: TokenCounts, phonemize: Callable[[str], str]) -> torch.Tensor:
    """(V, TABLE_WIDTH) uint8. Tokens that were never met are read as words; special tokens have no pronunciation."""
    special = set(tokenizer.all_special_ids)
    rows = []
    for token in range(len(tokenizer)):
        text = "" if token in special else tokenizer.decode([token])
        known = counts.most_common(token)
        if known is None:
            known = phonemize(text.strip()) if text.strip().isascii() and text.strip().isalnum() else ""
        known += "".join(mark for mark in text if mark in PAUSES)
        raw = tokenizer.convert_ids_to_tokens(token) or ""
        rows.append(encode(known, raw.startswith(WORD_STARTS)))
    return torch.tensor(rows, dtype=torch.uint8)


def make_pronunciations(data: Path, llm: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Writes `PRONUNCIATIONS` for the vocabulary of an LLM's folder; returns how many tokens have phonemes.

    One that was made from the same answers and vocabulary stays as it is.

    Raises:
        DataError: nothing has been spoken yet.
        CheckpointError: the folder has no tokenizer that can be read.
    """
    tokenizer, file = ChatPrompt.from_pretrained(llm or base_model(LLM)).tokenizer, data / PRONUNCIATIONS
    spoken, lexicon = spoken_words(data), hibari_lexicon()
    source = [VERSION, PHONEMES, STRESSES, TABLE_WIDTH, spoken, lexicon, sorted(tokenizer.get_vocab().items()), seed]
    made_from = hashlib.sha256(json.dumps(source).encode()).hexdigest()
    if _made_from(file) != made_from:
        table = _learned(spoken, lexicon, tokenizer, seed)
        atomic_write(file, save({"table": table}, {MADE_FROM: made_from}))
    table = load_file(file)["table"]
    return {"tokens": len(table), "pronounced": int((table[:, 1] > 0).sum())}


def _made_from(file: Path) -> str | None:
    """The hash in a table's file; None if there is no whole one."""
    try:
        with safe_open(file, "pt") as tensors:
            return (tensors.metadata() or {}).get(MADE_FROM)
    except (FileNotFoundError, SafetensorError):
        return None


def _learned(spoken: Spoken, lexicon: dict[str, str], tokenizer: Any, seed: int) -> torch.Tensor:
    """The table, from sentences with the phonemes of their words, and a lexicon."""
    hibari = HibariVoice()
    known = {word: split_units(said) for word, said in lexicon.items() if word.isalpha() and len(word) > 1}
    counts = TokenCounts(tokenizer, Aligner(sorted(known.items()), seed))
    counts.add([text for text, _ in spoken], [said for _, said in spoken], 1.0)
    for write in (str, str.capitalize):
        for space in ("", " "):
            words = [space + write(word) for word in known]
            counts.add(words, [[lexicon[word]] for word in known], LEXICON_WEIGHT)
    return table_of(tokenizer, counts, lambda text: " ".join(hibari.phonemize(text)))
