"""What every data step shares: sizes, atomic files, shards with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vocalnet.errors import DataError


@dataclass(frozen=True)
class Size:
    """How much data to make. Utterance counts are per source of voices."""

    facts_per_group: int | None
    valid_questions: int
    sentences: int
    kokoro: int
    hibari: int
    flite: int
    valid_kokoro: int
    per_shard: int


SIZES = {
    "tiny": Size(2, 30, 20, 0, 12, 12, 0, 10),
    "small": Size(None, 1000, 3200, 900, 3000, 2500, 160, 250),
    "full": Size(None, 3000, 8000, 6000, 12000, 9000, 400, 500),
}


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Shard:
    """One finished tar: its name, content hash, and what it holds."""

    name: str
    sha256: str
    samples: int
    seconds: float


Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}


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
    """A step's output: numbered shards, each recorded in a side file as soon as it is whole, and one manifest."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> Shard | None:
        """The shard's record if it is finished, whole and made with this configuration."""
        record, tar = self.folder / f".{name}.json", self.folder / name
        if not (record.exists() and tar.exists()):
            return None
        saved = json.loads(record.read_text())
        if saved.pop("config") != self.config:
            return None
        shard = Shard(**saved)
        return shard if hashlib.sha256(tar.read_bytes()).hexdigest() == shard.sha256 else None

    def write(self, name: str, samples: list[Sample], seconds: float) -> Shard:
        """Write one shard and its record, each atomically."""
        content = tar_bytes(samples)
        shard = Shard(name, hashlib.sha256(content).hexdigest(), len(samples), round(seconds, 3))
        atomic_write(self.folder / name, content)
        atomic_write(self.folder / f".{name}.json", json.dumps({**asdict(shard), "config": self.config}).encode())
        return shard

    def finish(self, shards: list[Shard]) -> dict[str, Any]:
        """Write the manifest, drop shards of earlier configurations, return the totals."""
        names = {shard.name for shard in shards}
        for stale in self.folder.glob("*.tar"):
            if stale.name not in names:
                stale.unlink()
        manifest = {
            "config": self.config,
            "samples": sum(shard.samples for shard in shards),
            "hours": round(sum(shard.seconds for shard in shards) / 3600, 4),
            "shards": [asdict(shard) for shard in shards],
        }
        atomic_write(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        return manifest


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
        if hashlib.sha256(tar.read_bytes()).hexdigest() != shard["sha256"]:
            raise DataError(f"shard {tar} differs from its manifest: delete it and run its step again")
    return manifest
