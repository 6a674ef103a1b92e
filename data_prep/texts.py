"""Texts: fact tables × phrasings → questions with short spoken answers, and plain sentences for speech coverage.

The tables under ``facts/`` hold what is true; each category lists its training and its validation phrasings, which
never overlap. Everything is deterministic in the seed, and everything is speakable: no digits, no symbols.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data_prep.carriers import carried
from data_prep.common import Size, atomic_write
from data_prep.dialogues import introductions, make_dialogues
from data_prep.generated import GENERATORS, word_letters
from data_prep.open_answers import open_turns
from data_prep.turns import Fact, Fields, Turn, sentence, turn_id, words
from vocalnet.errors import DataError
from vocalnet.evaluation.accept import number_words
from vocalnet.shards import text_id

YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster
FACTS = Path(__file__).parent / "facts"
SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,'-]*(?:[.?!] [A-Za-z][A-Za-z ,'-]*)*[.?!]")
CARRIED = 6  # longer phrasings of each fact, made by `carried`
CARRIED_ITEM = 3
DIGITS = {number_words(n): str(n) for n in range(1000)}


# ---------------------------------------------------------------- reading the tables


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in re.split(r"[;\n]", text) if entry.strip()]


def _rows(group: dict[str, Any]) -> list[list[str]]:
    """The rows of a table, one string a field; alternatives for transcripts still joined by ``|``."""
    generate = group.get("generate")
    if generate:
        generators = {**GENERATORS, **word_letters(_entries(group.get("facts", "")))}
        return [list(row) for row in generators[generate]()]
    rows = [[cell.strip() for cell in entry.split(" = ")] for entry in _entries(group["facts"])]
    if group.get("symmetric"):
        known = {row[0]: row for row in rows}
        for row in list(rows):  # a word that is the opposite of several: of the first
            if row[1] not in known:
                known[row[1]] = [row[1], row[0]]
                rows.append(known[row[1]])
    return rows


def _accepted(group: dict[str, Any], row: Fields, alternatives: list[dict[str, str]]) -> list[str]:
    """Lower-case key strings; articles dropped, numbers also as digits."""
    keys = []
    for fields in [row, *alternatives]:
        key = group["accept"].format(**{"key": fields[group["fields"][-1]], **fields}).lower()
        key = re.sub(r"^(the|a|an) ", "", key)
        keys += [key, DIGITS[key]] if key in DIGITS else [key]
    return list(dict.fromkeys(keys))


def _table_facts(group: dict[str, Any]) -> Iterator[Fact]:
    names, category = group["fields"], group["category"]
    longer = carried(group["train"], group["valid"])
    for row in _rows(group):
        if len(row) != len(names):
            raise DataError(f"facts table {category!r}: {' = '.join(row)!r} has {len(row)} fields, not {len(names)}")
        cells = [cell.split("|") for cell in row]
        fields = dict(zip(names, (cell[0] for cell in cells), strict=True))
        others = [{**fields, names[-1]: other} for other in cells[-1][1:]]
        chosen = random.Random(f"{category} {row}").sample(longer, min(CARRIED, len(longer)))
        yield Fact(
            category=category,
            train=list(dict.fromkeys(sentence(t, fields) for t in [*group["train"], *chosen])),
            valid=[sentence(t, fields) for t in group["valid"]],
            answer=sentence(group["answer"], fields),
            accept=_accepted(group, fields, others),
            sentences=[sentence(t, fields) for t in group.get("sentences", [])],
            fields=fields,
            first=names[0],
        )


def _item_facts(group: dict[str, Any]) -> Iterator[Fact]:
    for item in group["items"]:
        longer = carried(item["train"], item["valid"])
        chosen = random.Random(item["train"][0]).sample(longer, min(CARRIED_ITEM, len(longer)))
        yield Fact(group["category"], [*item["train"], *chosen], item["valid"], item["answer"], item["accept"])


def _groups(folder: Path) -> list[dict[str, Any]]:
    """All groups of the tables in ``folder``; the facts of one that ``extends`` a category are added to that one's."""
    groups = [group for path in sorted(folder.glob("*.yaml")) for group in yaml.load(path.read_text(), YAML)]
    whole = {group["category"]: group for group in groups if "category" in group}
    unknown = [group["extends"] for group in groups if group.get("extends", group.get("category")) not in whole]
    if unknown:
        raise DataError(f"a facts table extends {unknown[0]!r}, which no table in {folder} defines")
    result = list(whole.values())
    for group in groups:
        if "extends" in group and ("generate" in group or "generate" in whole[group["extends"]]):
            result.append({k: v for k, v in whole[group["extends"]].items() if k != "facts"} | group)
        elif "extends" in group:
            part = "items" if "items" in group else "facts"
            base = whole[group["extends"]]
            base[part] = base[part] + (group[part] if part == "items" else "\n" + group[part])
    return result


def table_keys(folder: Path, skip: set[str]) -> dict[str, set[str]]:
    """First fields, lower case, of each category's rows in the files of ``folder`` whose names are not in ``skip``."""
    keys: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.yaml")):
        for group in yaml.load(path.read_text(), YAML) if path.name not in skip else []:
            rows = [] if "items" in group else _rows(group)
            keys.setdefault(group.get("category") or group["extends"], set()).update(row[0].lower() for row in rows)
    return keys


def load_facts(folder: Path = FACTS, per_category: int | None = None) -> list[Fact]:
    """All facts of the tables in ``folder``, or the first ``per_category`` of each category."""
    facts: list[Fact] = []
    taken: Counter[str] = Counter()
    for group in _groups(folder):
        found = list(_item_facts(group) if "items" in group else _table_facts(group))
        if per_category is not None:
            found = found[: max(0, per_category - taken[group["category"]])]
        taken[group["category"]] += len(found)
        facts += found
    if not facts:
        raise DataError(f"no facts tables (*.yaml) in {folder}")
    _check(facts)
    return facts


def _check(facts: list[Fact]) -> None:
    """Refuse ambiguous questions, shared phrasings and unspeakable text."""
    answers: dict[str, str] = {}
    for fact in facts:
        for question in [*fact.train, *fact.valid]:
            if answers.setdefault(question.lower(), fact.answer) != fact.answer:
                raise DataError(f"{question!r} has two answers: {answers[question.lower()]!r} and {fact.answer!r}")
        if not any(f" {' '.join(words(key))} " in f" {' '.join(words(fact.answer))} " for key in fact.accept):
            raise DataError(f"the answer {fact.answer!r} holds none of its accepted strings {fact.accept}")
        for text in [*fact.train, *fact.valid, *fact.sentences, fact.answer]:
            if not SPEAKABLE.fullmatch(text):
                raise DataError(f"not speakable as it stands: {text!r}")
    trained = {question.lower() for fact in facts for question in fact.train}
    shared = [question for fact in facts for question in fact.valid if question.lower() in trained]
    if shared:
        raise DataError(f"validation question {shared[0]!r} is also a training question")


# ---------------------------------------------------------------- the step


def _turns(facts: list[Fact], split: str, phrasings: int | None = None) -> list[Turn]:
    turns: dict[str, Turn] = {}
    for fact in facts:
        for question in fact.train[:phrasings] if split == "train" else fact.valid:
            turn = Turn(turn_id(question), split, fact.category, question, fact.answer, fact.accept, fact.answer)
            turns.setdefault(turn.id, turn)
    return list(turns.values())


def _balanced(turns: list[Turn], count: int, rng: random.Random) -> list[Turn]:
    """Up to ``count`` turns, round-robin over the categories, so that every prefix is balanced too."""
    by_category: dict[str, list[Turn]] = {}
    for turn in turns:
        by_category.setdefault(turn.category, []).append(turn)
    for queue in by_category.values():
        rng.shuffle(queue)
    chosen: list[Turn] = []
    while by_category and len(chosen) < count:
        for category in sorted(by_category):
            chosen.append(by_category[category].pop())
        by_category = {category: queue for category, queue in by_category.items() if queue}
    return chosen[:count]


def chatterbot_sentences() -> list[str]:
    """Clean short sentences of the chatterbot-corpus package (BSD), if it is installed."""
    try:
        import chatterbot_corpus
    except ImportError:
        return []
    found = set()
    for path in sorted(Path(chatterbot_corpus.__file__).parent.glob("data/english/*.yml")):
        for conversation in yaml.load(path.read_text(encoding="utf8"), YAML).get("conversations", []):
            for line in conversation:
                for text in re.split(r"(?<=[.!?])\s+", str(line).replace("\n", " ")):
                    text = text.strip()
                    text = text[:1].upper() + text[1:] + ("" if text[-1:] in ".?!" else ".")
                    if 4 <= len(words(text)) <= 14 and SPEAKABLE.fullmatch(text):
                        found.add(text)
    return sorted(found)


def crossed(facts: list[Fact], rng: random.Random) -> list[str]:
    """Answers with the last field of another fact of their category: words in new company, true or not.

    A decoder that has only ever said what is true learns its sentences by heart.
    """
    by_category: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.fields:
            by_category.setdefault(fact.category, []).append(fact)
    found = set()
    for group in by_category.values():
        last = list(group[0].fields)[-1]
        for fact, other in zip(group, rng.sample(group, len(group)), strict=True):
            mine, others = fact.fields[last], other.fields.get(last)
            text, count = re.subn(rf"\b{re.escape(mine)}\b", others or mine, fact.answer)
            if others and count:
                found.add(sentence(text, {}))
    return sorted(found)


def coverage_sentences(facts: list[Fact], questions: list[str], count: int, rng: random.Random) -> list[str]:
    """Up to ``count`` distinct sentences beside the answers, which the speech decoder learns to say as well.

    At most a quarter each of plain talk, of answers with fields crossed, and of questions; the rest are carriers round
    the answers' words, taken greedily by their rarest word, so that every answer word is heard in several contexts.
    """
    answers = {fact.answer for fact in facts}
    shares = []
    for pool in (chatterbot_sentences(), crossed(facts, rng), sorted(set(questions))):
        plain = [text for text in pool if text not in answers and SPEAKABLE.fullmatch(text)]
        rng.shuffle(plain)
        shares += plain[: count // 4]
    carriers = sorted({s for fact in facts for s in fact.sentences} - answers)
    rng.shuffle(carriers)
    heard: dict[str, int] = {}
    scored = []
    for text in carriers:
        scored.append((min(heard.get(w, 0) for w in words(text)), text))
        for word in words(text):
            heard[word] = heard.get(word, 0) + 1
    scored.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys([*shares, *(text for _, text in scored)]))[:count]


def _jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_texts(data: Path, size: Size, seed: int = 0) -> dict[str, int]:
    """Write ``texts/{train,valid,sentences}.jsonl`` under ``data``, questions with a history last; returns the counts.

    What the step ``open_answers`` has kept in ``texts/`` is among the training questions.

    Raises:
        DataError: a facts table is malformed, ambiguous or not speakable.
    """
    rng = random.Random(seed)
    facts = load_facts(per_category=size.facts_per_category)
    train = _turns(facts, "train", size.phrasings) + list(introductions(False, size.facts_per_category))
    pool = _turns(facts, "valid") + list(introductions(True, size.facts_per_category))
    train += open_turns(data, {turn.question.lower() for turn in [*train, *pool]})
    valid = _balanced(pool, size.valid_questions, rng)
    sentences = coverage_sentences(facts, [turn.question for turn in train], size.sentences, rng)
    dialogues = make_dialogues(facts, size.dialogues, False, random.Random(f"{seed} dialogues"))
    held_out = make_dialogues(facts, size.valid_dialogues, True, random.Random(f"{seed} held out"))
    folder = data / "texts"
    atomic_write(folder / "train.jsonl", _jsonl(asdict(turn) for turn in [*train, *dialogues]))
    atomic_write(folder / "valid.jsonl", _jsonl(asdict(turn) for turn in [*valid, *held_out]))
    atomic_write(folder / "sentences.jsonl", _jsonl({"id": text_id(s), "text": s} for s in sentences))
    answers = {turn.answer for turn in [*train, *pool, *dialogues, *held_out]}
    return {
        "facts": len(facts),
        "categories": len({fact.category for fact in facts}),
        "train questions": len(train),
        "with a history": len(dialogues),
        "valid questions": len(valid),
        "valid with a history": len(held_out),
        "distinct answers": len(answers),
        "sentences": len(sentences),
        "question words": len({w for turn in train for w in words(turn.question)}),
        "answer words": len({w for answer in answers for w in words(answer)}),
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file.

    Raises:
        DataError: the file is missing or a line is not JSON.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run `python -m data_prep texts` first") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged ({error}): run the step that writes it again") from None
