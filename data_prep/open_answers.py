"""The base LLM's own answers to open prompts, where they pass the checks: targets that ask it to learn nothing new.

One line a prompt in ``texts/open_answers.jsonl``, refused ones with the reason, so that a killed run goes on where it
stopped; the step ``texts`` takes in what was kept.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from data_prep.common import LLM, Size, atomic_write
from data_prep.turns import Turn, turn_id, words
from vocalnet.errors import DataError
from vocalnet.evaluation.accept import number_words

PROMPTS = Path(__file__).parent / "open_prompts.yaml"
FILE = "open_answers.jsonl"
SYSTEM = "You are a friendly voice assistant. Answer in one short and simple sentence."
MOST_TOKENS = 48
FEWEST_WORDS = 4
MOST_WORDS = 14
REFUSED = re.compile(
    r"\b(AI|language model|assistant|as an|sorry|cannot|can't|here (is|are)|the following)\b", re.IGNORECASE
)
SPOKEN = re.compile(r"[A-Z][A-Za-z ,'-]*[.?!]")
Ask = Callable[[str], tuple[str, bool]]  # question → text, and whether it came to an end


def prompts(file: Path = PROMPTS) -> list[str]:
    """All open prompts, the templates of a group by turns."""
    found = []
    for group in yaml.safe_load(file.read_text()):
        for topic in group["topics"].split("; "):
            found += [template.format(topic.strip()) for template in group["templates"]]
    return list(dict.fromkeys(found))


def checked(question: str, text: str, ended: bool) -> tuple[str | None, str]:
    """The part of an answer that can be spoken as it stands, or None and the reason why there is none.

    The first sentence, if it is short, whole, about the question, without repetition, and has nothing but words once
    numbers are written out. A text cut off at the token limit still has a first sentence.
    """
    text = re.sub(r"\d{1,9}", lambda match: number_words(int(match.group())), text.strip().replace("’", "'"))
    first = re.match(r"[^.?!\n:;]+[.?!](?=\s|$)", text)
    if first is None:
        return None, "no whole sentence" if ended else "does not end"
    answer = first.group()
    said = words(answer)
    if not FEWEST_WORDS <= len(said) <= MOST_WORDS:
        return None, f"{len(said)} words"
    if not SPOKEN.fullmatch(answer):
        return None, "not speakable"
    if REFUSED.search(answer):
        return None, "refuses or announces"
    long = [word[:5] for word in said if len(word) > 4]
    if len(set(long)) < len(long) or any(a == b for a, b in itertools.pairwise(said)):
        return None, "repeats itself"
    if not _stems(answer) & (_stems(question) - _template_stems()):
        return None, "about something else"
    return answer, ""


def _stems(text: str) -> set[str]:
    return {word[:4] for word in words(text) if len(word) > 2}


@functools.cache
def _template_stems() -> set[str]:
    """What says nothing about a prompt's topic."""
    groups = yaml.safe_load(PROMPTS.read_text())
    return {stem for group in groups for template in group["templates"] for stem in _stems(template)} | {"the"}


def asker(folder: Path | None = None) -> Ask:
    """Greedy answers of the LLM in `folder`; default: the base model in the cache."""
    from vocalnet.backbone import Backbone
    from vocalnet.checkpoints import base_model
    from vocalnet.prompt import ChatPrompt

    llm = folder or base_model(LLM)
    backbone, prompt = Backbone(llm, "int8"), ChatPrompt.from_pretrained(llm, SYSTEM)

    def ask(question: str) -> tuple[str, bool]:
        ids = prompt.text_ids(question)
        state = backbone.init_state(len(ids) + MOST_TOKENS)
        logits = backbone.logits(backbone.prefill(backbone.embed(ids), state)[:, -1])
        said: list[int] = []
        while len(said) < MOST_TOKENS:
            token = int(logits.argmax())
            if token in prompt.stop_ids:
                return prompt.decode(said), True
            said.append(token)
            _, logits = backbone.step(token, state)
        return prompt.decode(said), False

    return ask


def _rows(file: Path) -> list[dict[str, Any]]:
    """What earlier runs wrote; a line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def make_open_answers(data: Path, size: Size, llm: Path | None = None, ask: Ask | None = None) -> dict[str, int]:
    """Ask what was not asked yet; returns the counts.

    Raises:
        DataError: the file cannot be written.
    """
    from tqdm import tqdm

    file = data / "texts" / FILE
    wanted = prompts()[: size.open_prompts]
    done = {row["question"]: row for row in _rows(file)}
    rows = [done[question] for question in wanted if question in done]
    atomic_write(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    missing = [question for question in wanted if question not in done]
    if missing:
        ask = ask or asker(llm)
    try:
        with file.open("a") as out:
            for question in tqdm(missing, desc="open prompts", unit="prompt"):
                assert ask is not None
                text, ended = ask(question)
                answer, reason = checked(question, text, ended)
                rows.append({"question": question, "answer": answer, "reason": reason, "text": text})
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
    except OSError as error:
        raise DataError(f"cannot write {file} ({error.strerror}); make room or choose another --data folder") from None
    return {"prompts": len(rows), "kept": sum(1 for row in rows if row["answer"])}


def open_turns(data: Path, taken: set[str]) -> Iterator[Turn]:
    """Training questions from the kept answers; questions in `taken` (lower case) have an answer in the tables."""
    for row in _rows(data / "texts" / FILE):
        if row["answer"] and row["question"].lower() not in taken:
            key = " ".join(words(row["answer"]))
            yield Turn(turn_id(row["question"]), "train", "open", row["question"], row["answer"], [key], row["answer"])
