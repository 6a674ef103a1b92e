"""What every data step shares: sizes, atomic files, shards with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vocalnet.checkpoints.fetch import sha256_of
from vocalnet.errors import DataError
from vocalnet.files import replacing

LLM = "smollm2-135m-instruct"
"""The base model whose answers and tokens the data are for."""


@dataclass(frozen=True)
class Size:
    """How much data to make.

    Attributes:
        facts_per_category: None for all.
        phrasings: training questions of a fact, the plain ones first; None for all.
        open_prompts: prompts that the base LLM answers itself; None for all.
        dialogues: training questions that come after others.
        valid_questions: written ones.
        valid_dialogues: written ones that come after others.
        sentences: spoken beside the answers.
        kokoro, hibari, flite: questions recorded with that source of voices.
        valid_kokoro: validation questions recorded with Kokoro's held-out voices.
        spoken_dialogues: validation questions that come after others, recorded likewise.
        per_shard: samples.
        vocoder_minutes: of the synthesiser's own spectra.
    """

    facts_per_category: int | None
    phrasings: int | None
    open_prompts: int | None
    dialogues: int
    valid_questions: int
    valid_dialogues: int
    sentences: int
    kokoro: int
    hibari: int
    flite: int
    valid_kokoro: int
    spoken_dialogues: int
    per_shard: int
    vocoder_minutes: float


SIZES = {
    "tiny": Size(2, 6, 2, 24, 60, 8, 40, 0, 24, 12, 0, 0, 40, 0.1),
    "small": Size(None, 12, None, 12000, 1000, 300, 18000, 900, 26000, 3400, 160, 80, 250, 40.0),
    "full": Size(None, None, None, 25000, 3000, 600, 36000, 6000, 40000, 9000, 400, 100, 500, 120.0),
}


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent or whole.

    Raises:
        DataError: the disk is full or the folder not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); make room or choose another --data folder") from None


@dataclass(frozen=True)
class Shard:
    """One finished tar: its name, content hash, and what it holds."""

    name: str
    sha256: str
    made_from: str
    samples: int
    seconds: float


Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}
Made = tuple[list[Sample], float]  # a shard's samples and their seconds of audio
Plan = dict[str, Any]  # shard name → what it is made from (plain JSON)


def tar_bytes(samples: list[Sample]) -> bytes:
    """A webdataset tar; the same samples give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_tar(path: Path) -> Iterator[Sample]:
    """Samples of one shard, in order.

    Raises:
        DataError: the file is missing or not a whole tar.
    """
    try:
        with tarfile.open(path) as tar:
            key, files = "", {}  # type: str, dict[str, bytes]
            for member in tar:
                stem, extension = member.name.split(".", 1)
                if stem != key and files:
                    yield key, files
                    files = {}
                key = stem
                handle = tar.extractfile(member)
                files[extension] = handle.read() if handle else b""
            if files:
                yield key, files
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing: run its step again") from None
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {path} is damaged ({error}): delete it and run its step again") from None


class ShardFolder:
    """A step's output: shards, each with a record beside it as soon as it is whole, and one manifest.

    A record holds the hash of the work the shard was made from, so that changed input makes the shard anew.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder = folder
        self.settings = settings
        folder.mkdir(parents=True, exist_ok=True)

    def _made_from(self, work: Any) -> str:
        return hashlib.sha256(json.dumps([self.settings, work], sort_keys=True).encode()).hexdigest()[:16]

    def done(self, name: str, work: Any) -> Shard | None:
        """The shard's record if it is finished, whole and made from this work."""
        record, tar = self.folder / f".{name}.json", self.folder / name
        if not (record.exists() and tar.exists()):
            return None
        shard = Shard(**json.loads(record.read_text()))
        whole = shard.made_from == self._made_from(work) and sha256_of(tar) == shard.sha256
        return shard if whole else None

    def write(self, name: str, work: Any, samples: list[Sample], seconds: float) -> Shard:
        """Write one shard and its record, each atomically."""
        content = tar_bytes(samples)
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(name, digest, self._made_from(work), len(samples), round(seconds, 3))
        atomic_write(self.folder / name, content)
        atomic_write(self.folder / f".{name}.json", json.dumps(asdict(shard)).encode())
        return shard

    def finish(self, shards: list[Shard]) -> dict[str, Any]:
        """Write the manifest, drop shards that an earlier plan left, return the totals."""
        names = {shard.name for shard in shards}
        for record in self.folder.glob(".*.tar.json"):
            name = record.name[1:].removesuffix(".json")
            if name not in names:
                (self.folder / name).unlink(missing_ok=True)
                record.unlink()
        manifest = {
            "samples": sum(shard.samples for shard in shards),
            "hours": round(sum(shard.seconds for shard in shards) / 3600, 4),
            "settings": self.settings,
            "shards": [asdict(shard) for shard in shards],
        }
        atomic_write(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        return manifest


def run_plan(folder: ShardFolder, plan: Plan, make: Callable[[Any], Made], jobs: int) -> list[Shard]:
    """Make every shard of `plan` that is not already whole; a kill loses at most the shards being made."""
    shards: dict[str, Shard] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns) as bar:
        task = bar.add_task(f"{folder.folder.name} shards", total=len(plan))
        for name, work in plan.items():
            shard = folder.done(name, work)
            if shard:
                shards[name] = shard
                bar.advance(task)
        missing = [name for name in plan if name not in shards]
        for name, (samples, seconds) in zip(missing, _results(make, [plan[n] for n in missing], jobs), strict=True):
            shards[name] = folder.write(name, plan[name], samples, seconds)
            bar.advance(task)
    return [shards[name] for name in plan]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the processes already fill the cores


def _results(make: Callable[[Any], Made], work: list[Any], jobs: int) -> Iterator[Made]:
    if jobs <= 1 or len(work) <= 1:
        yield from map(make, work)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(make, work)


def check_manifest(folder: Path) -> dict[str, Any]:
    """Compare every shard with the manifest; returns the manifest.

    Raises:
        DataError: no manifest, or a shard is missing or differs from what was written.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise DataError(f"{folder} has no manifest.json: its step has not finished; run it again")
    manifest: dict[str, Any] = json.loads(path.read_text())
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        if not tar.exists():
            raise DataError(f"shard {tar} is missing: run its step again")
        if sha256_of(tar) != shard["sha256"]:
            raise DataError(f"shard {tar} differs from its manifest: delete it and run its step again")
    return manifest
