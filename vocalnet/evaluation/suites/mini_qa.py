"""The project's own held-out spoken questions, in phrasings and voices that training never heard.

mini-qa asks each in a fresh conversation; mini-dialogue asks what only makes sense after something else ("And of
Spain?"). Published form: WebDataset shards `valid-*.tar` or `dialogue-*.tar` as data preparation writes them; a sample
is NAME.flac and NAME.json with text, answer, accept, category, voice and history.
"""

from __future__ import annotations

import json
from pathlib import Path

from vocalnet.errors import DataError
from vocalnet.evaluation.items import Item, tar_samples

QUESTIONS = "valid-*.tar"
DIALOGUES = "dialogue-*.tar"


def recognises(folder: Path, pattern: str = QUESTIONS) -> bool:
    """Whether the folder looks like this suite."""
    return any(folder.glob(pattern))


def read(folder: Path, pattern: str = QUESTIONS) -> list[Item]:
    """The questions in the shards' order.

    Raises:
        DataError: there are none, or a sample lacks its sound or its description.
    """
    items = [item for archive in sorted(folder.glob(pattern)) for item in _read_shard(archive)]
    if not items:
        raise DataError(f"no {pattern} with questions in {folder}; run the questions step of data preparation")
    return items


def _read_shard(archive: Path) -> list[Item]:
    items = []
    for key, files in tar_samples(archive).items():
        if not {"flac", "json"} <= files.keys():
            raise DataError(f"{archive}: sample {key} lacks its .flac or .json; fetch or make the archive anew")
        about = json.loads(files["json"].content())
        items.append(
            Item(
                id=key,
                kind="match",
                question=about["text"],
                clip=files["flac"],
                accept=tuple(about["accept"]),
                reference=about.get("answer", ""),
                category=about["category"],
                voice=about["voice"],
                history=tuple((question, answer) for question, answer in about.get("history", ())),
            )
        )
    return items
