"""Spoken sentences of the prepared data: speech tokens, where their words lie, and what they answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vocalnet.errors import DataError
from vocalnet.shards import read_arrays, text_id
from vocalnet.speech_decoder import IGNORE
from vocalnet.training.speak_config import SpeakTaskConfig


@dataclass(frozen=True)
class Asked:
    """A question, after earlier exchanges if there are any."""

    question: str
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) of each, oldest first


@dataclass(frozen=True)
class Pair:
    """An answer with what led to it."""

    asked: Asked
    answer: str

    def key(self) -> list[Any]:
        """What identifies it in a hash."""
        pair = [self.asked.question, self.answer]
        return [*pair, self.asked.history] if self.asked.history else pair


@dataclass(frozen=True)
class Spoken:
    """A sentence with its speech tokens, and the questions that it answers."""

    name: str
    text: str
    tokens: Tensor  # (S,) int64
    phonemes: Tensor  # (S,) int64, IGNORE where unknown
    words: Tensor  # (S,) int64: index of the word being said, their number in the closing silence, IGNORE where unknown
    questions: tuple[Asked, ...]


def load_spoken(data_dir: Path, split: str, config: SpeakTaskConfig) -> list[Spoken]:
    """All spoken sentences of a split that have speech tokens, in the order of their names.

    Raises:
        DataError: a folder is missing, no sentence has tokens, or tokens lie outside the decoder's units.
    """
    tokens = dict(read_arrays(data_dir / "answer_tokens", f"{split}-*.tar", "npy"))
    phonemes = {}
    if config.phoneme_weight:
        features = read_arrays(data_dir / "answer_features", f"{split}-*.tar", "npz")
        phonemes = {name: arrays["phoneme"] for name, arrays in features}
    said: dict[str, tuple[str, list[Asked]]] = {}
    for line in (data_dir / "texts" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        said.setdefault(text_id(row["spoken"]), (row["answer"], []))[1].append(_asked(row))
    sentences = data_dir / "texts" / "sentences.jsonl"
    if sentences.is_file():  # which split one is in, its tokens tell
        for line in sentences.read_text().splitlines():
            text = json.loads(line)["text"]
            said.setdefault(text_id(text), (text, [Asked(prompt) for prompt in config.sentence_prompts]))
    result = []
    for name in sorted(said.keys() & tokens.keys()):
        text, questions = said[name]
        ids = torch.from_numpy(tokens[name].astype(np.int64))
        if len(ids) and int(ids.max()) >= config.decoder.units:
            raise DataError(f"{name} has token {int(ids.max())}; the decoder's units are {config.decoder.units}")
        chosen = random.Random(name).sample(questions, min(len(questions), config.questions_per_answer))
        frames = phonemes.get(name)
        words = None if frames is None else spoken_words(frames, len(text.split()), config.word_boundary)
        size = len(ids)
        result.append(Spoken(name, text, ids, _at_token_rate(frames, size), _at_token_rate(words, size), tuple(chosen)))
    if not result:
        raise DataError(f"no sentence of the {split} texts has tokens in {data_dir / 'answer_tokens'}")
    return result


def paired_tokens(old_data: Path, items: Sequence[Spoken], units: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Older and present tokens of the sentences that both have, cut to one length; at 25 Hz they run side by side.

    Raises:
        DataError: none has both, or an older token lies outside the decoder's units.
    """
    known, found = {item.name: item.tokens for item in items}, False
    for name, tokens in read_arrays(old_data / "answer_tokens", "train-*.tar", "npy"):
        if name in known:
            size, found = min(len(tokens), len(known[name])), True
            if size and int(tokens.max()) >= units:
                raise DataError(f"{name} in {old_data} has token {int(tokens.max())}; the decoder's units are {units}")
            yield torch.from_numpy(tokens[:size].astype(np.int64)), known[name][:size]
    if not found:
        raise DataError(f"{old_data} and the data share no spoken sentence; init_tokens needs those of init_decoder")


def answer_pairs(items: Sequence[Spoken]) -> list[Pair]:
    """Every question with its answer, sentence after sentence."""
    return [Pair(question, item.text) for item in items for question in item.questions]


def first_pairs(items: Sequence[Spoken]) -> list[int]:
    """Index of each sentence's first pair in `answer_pairs`."""
    counts = [len(item.questions) for item in items]
    return [sum(counts[:i]) for i in range(len(counts))] if len(counts) < 2 else [0, *np.cumsum(counts)[:-1].tolist()]


def _asked(row: dict[str, Any]) -> Asked:
    """The question of a row of `texts/*.jsonl`."""
    return Asked(row["question"], tuple((question, answer) for question, answer in row.get("history", ())))


def spoken_words(phonemes: np.ndarray, count: int, boundary: int) -> np.ndarray | None:
    """Frame-level phonemes (T,), 0 for silence → index of the word in each frame (T,), `count` in the closing silence.

    None if there are not `count` words between boundaries, as with numbers written in digits.
    """
    said = np.flatnonzero(phonemes)
    if not len(said):
        return None
    starts = np.diff((phonemes == boundary).astype(np.int64), prepend=0) == 1
    words = np.cumsum(starts)  # a boundary counts with the word that it opens
    if words[said[-1]] != count - 1:
        return None
    words[said[-1] + 1 :] = count
    return words


def text_words(text: str, ends: Sequence[int]) -> list[int]:
    """Index of the word that each token belongs to, from where in the text the tokens end."""
    return [max(0, len(text[:end].split()) - 1) for end in ends]


def _at_token_rate(values: np.ndarray | None, size: int) -> Tensor:
    """(T,) labels at 50 Hz → (size,) at 25 Hz, IGNORE where there is none."""
    row = torch.full((size,), IGNORE, dtype=torch.long)
    if values is not None:
        known = torch.from_numpy(values.astype(np.int64))[::2][:size]
        row[: len(known)] = known
    return row
