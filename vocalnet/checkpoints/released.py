"""The checkpoints that VocalNet's authors released (VocalNet-1B, -8B and -Qwen25-7B), as they published them.

One Hugging Face folder holds everything but the vocoder: `model.*` (the LLM), `model.speech_encoder.*` (Whisper's
encoder), `model.speech_projector.*` (the adapter), `lm_head`, and `speech_generator.*` (the speech decoder).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.backbone import is_lean, layer_config, load_config
from vocalnet.checkpoints.settings import Settings
from vocalnet.checkpoints.tensors import FolderWeights, Selected, Shape, Weights, check_fit, empty, fit, shapes_of
from vocalnet.encoder import EncoderConfig, SpeechEncoder
from vocalnet.errors import CheckpointError, ConfigError
from vocalnet.layers import LlamaLayer
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig

ENCODER, ADAPTER, DECODER = "model.speech_encoder.", "model.speech_projector.", "speech_generator."
ADAPTER_WIDTH = 2048  # the original's code has this number fixed
WHISPER_HEAD = 64  # all of Whisper's sizes have heads this wide
_SPECIAL_TOKENS = ("bos", "sos", "eos", "padding")  # they follow the units, in this order
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # older libraries saved what is computed from the sizes

SYSTEM = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
    "provides, and assist the user with a variety of tasks using natural language and speech."
)
TEMPLATE_DATE = "26 Jul 2024"  # what Llama 3's chat template wrote as today's date when the models were trained


@dataclass(frozen=True)
class Family:
    """What differs between the models by the LLM they extend.

    Attributes:
        system: the system prompt that they were trained with.
        text_end: the token whose embedding ends the speech decoder's text; "": the one that closes a turn.
    """

    system: str
    text_end: str = ""


FAMILIES = {
    "llama": Family(SYSTEM),
    "qwen2": Family(f"You are Qwen, created by Alibaba Cloud. {SYSTEM}", "<|endoftext|>"),
}


def is_released(folder: Path) -> bool:
    """Whether a folder's config.json is one of theirs (or meant to be)."""
    file = folder / "config.json"
    try:
        settings = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        return False
    own = ("speech_generator_type", "unit_vocab_size", "speech_encoder_type")
    return isinstance(settings, dict) and (
        str(settings.get("model_type", "")).startswith("omni_speech") or any(key in settings for key in own)
    )


def speech_decoder_config(settings: Settings) -> SpeechDecoderConfig:
    """Sizes and schedule of a released speech decoder, in compatibility mode.

    `decoder_hidden_size` is not read: the original takes the LLM's width whatever it says.

    Raises:
        ConfigError: a key is missing, the head is of another kind, or special tokens lie elsewhere than in the
            released models.
    """
    settings.require(
        "llm_hidden_size",
        "decoder_num_heads",
        "decoder_ffn_dim",
        "decoder_num_layers",
        "encoder_num_layers",
        "unit_vocab_size",
        "mtp_num",
    )
    kind = settings.mapping.get("speech_generator_type", "ar_mtp")
    if kind != "ar_mtp":
        raise ConfigError(
            f"{settings.where}.speech_generator_type is {kind!r}; no such head is known, allowed: 'ar_mtp'"
        )
    units, width = settings.integer("unit_vocab_size"), settings.integer("llm_hidden_size")
    settings.expect("special_tokens", len(_SPECIAL_TOKENS))
    for place, name in enumerate(_SPECIAL_TOKENS):
        settings.expect(f"speech_{name}_token_id", units + place)
    return SpeechDecoderConfig(
        llm_hidden_size=width,
        width=width,
        heads=settings.integer("decoder_num_heads"),
        ffn=settings.integer("decoder_ffn_dim"),
        units=units,
        layers=settings.integer("decoder_num_layers"),
        projector_layers=settings.integer("encoder_num_layers"),
        mtp_modules=settings.integer("mtp_num"),
        text_chunk=settings.integer("txt_token_num", 5),
        speech_chunk=settings.integer("speech_token_num", 15),
        compatible=True,
    )


def adapter_config(settings: Settings, llm_width: int) -> AdapterConfig:
    """The adapter: frames concatenated, two linear layers with ReLU between, nothing normalised.

    Raises:
        ConfigError: another kind of adapter.
    """
    settings.expect("speech_projector_type", "linear")
    settings.expect("speech_encoder_type", "whisper")
    return AdapterConfig(
        encoder_width=settings.integer("speech_encoder_hidden_size"),
        stack=settings.integer("speech_encoder_ds_rate"),
        hidden=ADAPTER_WIDTH,
        width=llm_width,
        mode="frames",
        activation="relu",
        input_norm=False,
        output_norm=False,
        dropout=0.0,
        partial=False,
    )


def encoder_config(weights: Weights, width: int) -> EncoderConfig:
    """Sizes of Whisper's encoder by its weights (config.json does not tell them); large-v3's where these lack."""
    names = weights.names()

    def size(name: str, axis: int, default: int) -> int:
        return weights.shape(ENCODER + name)[axis] if ENCODER + name in names else default

    layers = {int(match[1]) for name in names if (match := re.match(re.escape(ENCODER) + r"layers\.(\d+)\.", name))}
    return EncoderConfig(
        mel_bins=size("conv1.weight", 1, 128),
        width=width,
        layers=max(layers, default=31) + 1,
        heads=max(1, width // WHISPER_HEAD),
        ffn=size("layers.0.fc1.weight", 0, 4 * width),
        max_frames=size("embed_positions.weight", 0, 1500),
        full_window=True,
    )


def llm_shapes(config: Any) -> dict[str, Shape]:
    """Names and shapes of a Llama or Qwen2 type LLM's weights."""
    qwen = config.model_type == "qwen2"  # its queries, keys and values have biases that the config does not mention
    attention = bool(getattr(config, "attention_bias", False))
    layer = layer_config(config, attention or qwen, attention, bool(getattr(config, "mlp_bias", False)))
    one = shapes_of(empty(lambda: LlamaLayer(layer)))
    shapes = {f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in one.items()}
    table = (config.vocab_size, config.hidden_size)
    shapes |= {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": table}


class Released:
    """A released checkpoint, opened and checked; weights are read when a part is asked for.

    Attributes:
        folder: where it lies.
        llm: transformers' configuration of the LLM.
        family: prompt and end token.
        encoder, adapter, decoder: our configurations of the other parts.
        weights: all weights, under the published names.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a folder and compares every name and shape with what its config.json asks for.

        Raises:
            CheckpointError: files or weights are missing, unexpected or of another shape; all are named.
            ConfigError: config.json lacks keys, or asks for what the released models do not have.
        """
        self.folder = folder
        file = folder / "config.json"
        try:
            settings = Settings(json.loads(file.read_text()), str(file))
        except ValueError as error:
            raise CheckpointError(f"{file} is not valid JSON ({error}); restore the file") from error
        settings.require("hidden_size", "num_hidden_layers", "vocab_size", "speech_encoder_ds_rate")
        settings.require("speech_encoder_hidden_size")
        self.decoder = speech_decoder_config(settings)
        self.llm: Any = load_config(folder)
        if not is_lean(self.llm) or self.llm.model_type not in FAMILIES:
            raise CheckpointError(f"{folder}: the LLM is a {self.llm.model_type}; released: {', '.join(FAMILIES)}")
        self.family = FAMILIES[self.llm.model_type]
        if self.llm.hidden_size != self.decoder.llm_hidden_size:
            raise ConfigError(
                f"{file}: llm_hidden_size is {self.decoder.llm_hidden_size}, hidden_size {self.llm.hidden_size}; "
                "they must be equal"
            )
        self.adapter = adapter_config(settings, self.llm.hidden_size)
        self.weights: Weights = Selected(FolderWeights(folder), self._wanted)
        self.encoder = encoder_config(self.weights, self.adapter.encoder_width)
        check_fit(self.weights, self.shapes(), f"{folder} does not fit its config.json")

    def _wanted(self, name: str) -> bool:
        tied = self.llm.tie_word_embeddings and name == "lm_head.weight"  # some files keep a copy
        return not tied and not _COMPUTED.search(name)

    def shapes(self) -> dict[str, Shape]:
        """Every weight's name and shape, as config.json asks for them."""
        return expected_shapes(self.llm, self.encoder, self.adapter, self.decoder)

    def load_encoder(self, dtype: torch.dtype = torch.float32) -> SpeechEncoder:
        """Whisper's encoder."""
        return fit(empty(lambda: SpeechEncoder(self.encoder)), self.weights, str(self.folder), ENCODER, dtype)

    def load_adapter(self) -> SpeechAdapter:
        """The adapter, float32."""
        return fit(empty(lambda: SpeechAdapter(self.adapter)), self.weights, str(self.folder), ADAPTER)

    def load_decoder(self, dtype: torch.dtype | None = None) -> SpeechDecoder:
        """The speech decoder, by default in the file's own type."""
        return fit(empty(lambda: SpeechDecoder(self.decoder)), self.weights, str(self.folder), DECODER, dtype)


def expected_shapes(
    llm: Any, encoder: EncoderConfig, adapter: AdapterConfig, decoder: SpeechDecoderConfig
) -> dict[str, Shape]:
    """Names and shapes of all weights of a checkpoint with parts of these sizes."""
    return (
        llm_shapes(llm)
        | shapes_of(empty(lambda: SpeechEncoder(encoder)), ENCODER)
        | shapes_of(empty(lambda: SpeechAdapter(adapter)), ADAPTER)
        | shapes_of(empty(lambda: SpeechDecoder(decoder)), DECODER)
    )
