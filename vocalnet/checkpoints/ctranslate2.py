"""Whisper in CTranslate2's format → a plain Hugging Face folder, values kept bit for bit.

`model.bin`: version, specification name, revision, then per variable its name, shape, dtype and bytes, and last
the aliases. All integers are little-endian, strings zero-terminated with a 16-bit length.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vocalnet.errors import CheckpointError

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_HEAD_SIZE = 64
_MULTILINGUAL_VOCABULARY = 51865


@dataclass
class _Reader:
    """A cursor over a mapped file."""

    data: np.ndarray
    offset: int = 0

    def integer(self, code: str) -> int:
        """One little-endian integer of struct's type `code`."""
        size = struct.calcsize(code)
        value = struct.unpack("<" + code, self.data[self.offset : self.offset + size].tobytes())[0]
        self.offset += size
        return int(value)

    def text(self) -> str:
        """One string."""
        length = self.integer("H")
        raw = self.data[self.offset : self.offset + length].tobytes()
        self.offset += length
        return raw.rstrip(b"\0").decode()

    def array(self) -> np.ndarray:
        """One variable: rank, shape, dtype, size in bytes, content (a view of the file)."""
        shape = [self.integer("I") for _ in range(self.integer("B"))]
        dtype = np.dtype(_DTYPES[self.integer("B")])
        size = self.integer("I")
        content = self.data[self.offset : self.offset + size].view(dtype).reshape(shape)
        self.offset += size
        return content


def read_model(file: Path) -> dict[str, np.ndarray]:
    """Variables of a `model.bin` by name, as views of the mapped file.

    Raises:
        CheckpointError: the file is cut short or no CTranslate2 model.
    """
    try:
        reader = _Reader(np.memmap(file, np.uint8, "r"))
        version = reader.integer("I")
        reader.text()  # specification
        reader.integer("I")  # its revision
        variables: dict[str, np.ndarray] = {}
        for _ in range(reader.integer("I")):
            name = reader.text()
            variables[name] = reader.array()
        for _ in range(reader.integer("I") if version >= 3 else 0):
            alias = reader.text()
            variables[alias] = variables[reader.text()]
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file.name} is cut short or not a CTranslate2 model ({error})") from error
    return variables


class _Mapping:
    """Collects weights under transformers' names."""

    def __init__(self, variables: dict[str, np.ndarray]) -> None:
        self.variables = variables
        self.weights: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A variable as float16; int8 ones are scaled back per row."""
        if name not in self.variables:
            raise CheckpointError(f"the Whisper model lacks {name}")
        values = self.variables[name]
        if values.dtype == np.int8:
            values = values.astype(np.float32) / self.variables[f"{name}_scale"].reshape(-1, 1)
        return torch.from_numpy(values.astype(np.float16))

    def norm(self, target: str, source: str) -> None:
        """A layer norm."""
        self.weights[f"{target}.weight"] = self.tensor(f"{source}/gamma")
        self.weights[f"{target}.bias"] = self.tensor(f"{source}/beta")

    def linear(self, target: str, source: str) -> None:
        """A linear layer or convolution."""
        self.weights[f"{target}.weight"] = self.tensor(f"{source}/weight")
        self.weights[f"{target}.bias"] = self.tensor(f"{source}/bias")

    def attention(self, target: str, source: str, cross: bool) -> None:
        """Attention whose q, k and v (or k and v, across) are stored as one; Whisper's k has no bias."""
        packed = [("linear_0", ["q_proj", "k_proj", "v_proj"])]
        if cross:
            packed = [("linear_0", ["q_proj"]), ("linear_1", ["k_proj", "v_proj"])]
        for stored, names in packed:
            weights = self.tensor(f"{source}/{stored}/weight").chunk(len(names))
            biases = self.tensor(f"{source}/{stored}/bias").chunk(len(names))
            for name, weight, bias in zip(names, weights, biases, strict=True):
                self.weights[f"{target}.{name}.weight"] = weight.contiguous()
                if name != "k_proj":
                    self.weights[f"{target}.{name}.bias"] = bias.contiguous()
        self.linear(f"{target}.out_proj", f"{source}/linear_{len(packed)}")

    def layer(self, side: str, index: int) -> None:
        """One encoder or decoder layer."""
        source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
        self.attention(f"{target}.self_attn", f"{source}/self_attention", cross=False)
        self.norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        if side == "decoder":
            self.attention(f"{target}.encoder_attn", f"{source}/attention", cross=True)
            self.norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
        for name, stored in (("fc1", "linear_0"), ("fc2", "linear_1")):
            self.linear(f"{target}.{name}", f"{source}/ffn/{stored}")
        self.norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")


def _layer_count(variables: dict[str, np.ndarray], side: str) -> int:
    """Number of layers on one side."""
    prefix = f"{side}/layer_"
    found = {name.removeprefix(prefix).split("/")[0] for name in variables if name.startswith(prefix)}
    return sum(index.isdigit() for index in found)


def whisper_weights(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """All weights in float16 under the names of WhisperForConditionalGeneration."""
    mapping = _Mapping(variables)
    for name in ("conv1", "conv2"):
        mapping.linear(f"model.encoder.{name}", f"encoder/{name}")
    mapping.weights["model.decoder.embed_tokens.weight"] = mapping.tensor("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        positions = mapping.tensor(f"{side}/position_encodings/encodings")
        mapping.weights[f"model.{side}.embed_positions.weight"] = positions
        mapping.norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(_layer_count(variables, side)):
            mapping.layer(side, index)
    return mapping.weights


def _special_ids(tokenizer_file: Path) -> dict[str, int]:
    """Ids of the added tokens by content."""
    return {token["content"]: token["id"] for token in json.loads(tokenizer_file.read_text())["added_tokens"]}


def _config(weights: dict[str, Tensor], variables: dict[str, np.ndarray], ids: dict[str, int]) -> Any:
    """The model's sizes, read from its weights."""
    from transformers import WhisperConfig

    width, mels = weights["model.encoder.conv1.weight"].shape[:2]
    end = ids["<|endoftext|>"]
    return WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=_layer_count(variables, "encoder"),
        decoder_layers=_layer_count(variables, "decoder"),
        encoder_attention_heads=width // _HEAD_SIZE,
        decoder_attention_heads=width // _HEAD_SIZE,
        encoder_ffn_dim=weights["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=weights["model.decoder.layers.0.fc1.weight"].shape[0],
        vocab_size=weights["model.decoder.embed_tokens.weight"].shape[0],
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
    )


def _generation(config: Any, settings: dict[str, Any], ids: dict[str, int]) -> Any:
    """transformers' generation settings from CTranslate2's."""
    from transformers import GenerationConfig

    multilingual = config.vocab_size >= _MULTILINGUAL_VOCABULARY
    extra: dict[str, Any] = {}
    if multilingual:
        languages = set(settings["lang_ids"])
        extra["lang_to_id"] = {name: value for name, value in ids.items() if value in languages}
        extra["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return GenerationConfig(
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=multilingual,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        **extra,
    )


def convert_whisper(source: Path, folder: Path) -> None:
    """Writes `folder` from a CTranslate2 Whisper folder (model.bin, config.json, tokenizer.json).

    Raises:
        CheckpointError: a file is missing or broken.
    """
    from transformers import WhisperFeatureExtractor, WhisperTokenizer

    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise CheckpointError(f"no {name} in {source}; expected a CTranslate2 Whisper folder")
    variables = read_model(source / "model.bin")
    weights = whisper_weights(variables)
    ids = _special_ids(source / "tokenizer.json")
    config = _config(weights, variables, ids)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    _generation(config, json.loads((source / "config.json").read_text()), ids).save_pretrained(str(folder))
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(str(folder))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    tokenizer: Any = WhisperTokenizer(tokenizer_file=str(source / "tokenizer.json"), **special)
    tokenizer.save_pretrained(str(folder))
