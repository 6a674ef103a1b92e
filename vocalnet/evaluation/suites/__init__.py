"""The suites: where their data is published, and how a folder of it is read."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vocalnet.errors import ConfigError, DataError
from vocalnet.evaluation.items import Item
from vocalnet.evaluation.suites import (
    mini_qa,
    openaudiobench,
    seed_tts,
    speech_folder,
    urobench,
    vocalbench,
    voicebench,
)
from vocalnet.evaluation.suites.tables import missing_sound

DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True)
class Suite:
    """A set of questions that is read from a folder.

    Attributes:
        name: on the command line.
        title: in reports.
        read: folder in the published form → items.
        recognises: whether a folder looks like this suite.
        repository: dataset of the hub that holds it; "" where there is none.
        source: where else it is published.
        archive: file of the repository that is to be unpacked.
    """

    name: str
    title: str
    read: Callable[[Path], list[Item]]
    recognises: Callable[[Path], bool]
    repository: str = ""
    archive: str = ""
    source: str = ""

    @property
    def sample(self) -> Path:
        """What comes with the package, in the published form: our own suites whole, a few items for the public ones."""
        return DATA / self.name


MINI_QA = Suite("mini-qa", "mini-qa: held-out spoken questions", mini_qa.read, mini_qa.recognises)
MINI_DIALOGUE = Suite(
    "mini-dialogue",
    "mini-dialogue: held-out questions that follow others",
    partial(mini_qa.read, pattern=mini_qa.DIALOGUES),
    partial(mini_qa.recognises, pattern=mini_qa.DIALOGUES),
)
SEED_TTS_LINK = "the link in the README of BytedanceSpeech/seed-tts-eval"
SPEECH = Suite("speech", "Speech in a folder", speech_folder.read, speech_folder.recognises)
OWN = (MINI_QA, MINI_DIALOGUE)
"""Suites whose data come with the package, whole."""
PUBLIC = (
    Suite(
        "openaudiobench",
        "OpenAudioBench",
        openaudiobench.read,
        openaudiobench.recognises,
        "baichuan-inc/OpenAudioBench",
    ),
    Suite("voicebench", "VoiceBench", voicebench.read, voicebench.recognises, "hlt-lab/voicebench"),
    Suite("vocalbench", "VocalBench", vocalbench.read, vocalbench.recognises, "VocalNet/VocalBench"),
    Suite("uro-bench", "URO-Bench", urobench.read, urobench.recognises, "Honggao/URO-Bench", "URO-Bench-data.zip"),
    Suite("seed-tts-eval", "Seed-TTS-eval", seed_tts.read, seed_tts.recognises, source=SEED_TTS_LINK),
)
SUITES = {suite.name: suite for suite in (*OWN, *PUBLIC)}


def find_suite(name: str) -> tuple[Suite, Path | None]:
    """The suite of that name; or, for a folder, the suite that it looks like, and the folder.

    Raises:
        ConfigError: there is none.
        DataError: a folder with nothing that could be evaluated.
    """
    if name in SUITES:
        return SUITES[name], None
    folder = Path(name)
    if not folder.is_dir():
        near = difflib.get_close_matches(name, SUITES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(SUITES)}, or a folder"
        raise ConfigError(f"no suite and no folder '{name}'; {hint}")
    for suite in (*SUITES.values(), SPEECH):
        if suite.recognises(folder):
            return suite, folder
    raise DataError(f"{folder} is no suite in its published form and holds no sound; give one of {', '.join(SUITES)}")


def read_items(
    suite: Suite,
    folder: Path,
    limit: int | None = None,
    subsets: Sequence[str] = (),
    partial: bool = False,
    with_sound: bool = True,
) -> list[Item]:
    """The suite's items from a folder in the published form.

    Args:
        limit: only so many of each subset.
        subsets: only these.
        partial: leave out items whose sound is missing, instead of refusing the folder.
        with_sound: the questions' sound is needed.

    Raises:
        DataError: no such folder, not the published form, an unknown subset, or missing sound.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give the folder with {suite.title} as --data")
    items = suite.read(folder)
    there = dict.fromkeys(item.subset for item in items)
    for subset in subsets:
        if subset not in there:
            raise DataError(f"{folder} has no subset '{subset}'; there are {', '.join(there)}")
    if subsets:
        items = [item for item in items if item.subset in subsets]
    if with_sound:
        items = _with_sound(items, folder, partial)
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.subset] += 1
        if limit is None or seen[item.subset] <= limit:
            kept.append(item)
    return kept


def _with_sound(items: list[Item], folder: Path, partial: bool) -> list[Item]:
    """The items whose sound is there."""
    gone = set(missing_sound(items))
    if not gone:
        return items
    whole = [item for item in items if not any(True for _ in missing_sound([item]))]
    if not partial or not whole:
        raise DataError(
            f"{folder} is incomplete: {len(gone)} sounds of {len(items)} items are missing or empty (the first: "
            f"{min(gone)}); fetch them, or evaluate the rest with --partial"
        )
    return whole
