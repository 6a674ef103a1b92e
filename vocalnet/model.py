"""VocalNet: the parts of one model composed, loaded from a folder and packed into one.

A model folder holds `config.json` and one sub-folder a part: adapter, lora (optional), speech_decoder, flow, vocoder,
speech_tokenizer (optional: only training needs it). The LLM and the Whisper encoder are base models, shared between
model folders and fetched once (`vocalnet.checkpoints`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.backbone import Backbone
from vocalnet.config import from_dict, to_dict
from vocalnet.decoding import DecodingConfig, DecodingMode
from vocalnet.encoder import EncoderConfig, SpeechEncoder
from vocalnet.errors import CheckpointError
from vocalnet.linears import Precision, WantedPrecision, compute_dtype
from vocalnet.parts import CONFIG_FILE, load_part, read_json
from vocalnet.prompt import ChatPrompt
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.text_rows import TextRows
from vocalnet.vocoder import Vocoder
from vocalnet.vocoder.flow import Flow, FlowConfig, FlowPrompt
from vocalnet.vocoder.hift import HiFT, HiFTConfig
from vocalnet.vocoder.source_filter import SourceFilterConfig, SourceFilterVocoder

if TYPE_CHECKING:
    from vocalnet.session import Session

MINI = Path(__file__).parent / "weights" / "mini"

VOCODERS: dict[str, tuple[type[Any], type[Any]]] = {
    "source_filter": (SourceFilterVocoder, SourceFilterConfig),
    "hift": (HiFT, HiFTConfig),
}


@dataclass(frozen=True)
class GenerationConfig:
    """How a model answers unless told otherwise; each model folder states its own.

    Attributes:
        text: sampling of text tokens.
        speech: sampling of speech tokens.
        mtp: how many MTP modules to use (0: one token a step).
        decoding: see `vocalnet.decoding`.
        drafts: what else decides on drafts: confidence, and what "relaxed" lets pass; its mode gives way to `decoding`.
        max_text_tokens: an answer's limit.
        max_speech_tokens_per_text_token: speech is cut where it runs on past this many tokens for each text token.
        first_speech_tokens: speech tokens of the first chunk; later ones have the decoder's own chunk size.
        history_tokens: positions of earlier turns that a conversation keeps; 0: every question stands alone.
        precision: of the LLM's weights; int8 comes with bf16 in the encoder, where there are kernels for it.
        decoder_precision: of the speech decoder's weights; "auto": see `SpeechDecoder.best_precision`.
    """

    text: SamplingConfig = field(default_factory=SamplingConfig)
    speech: SamplingConfig = field(default_factory=SamplingConfig)
    mtp: int = 0
    decoding: DecodingMode = "accept-all"
    drafts: DecodingConfig = field(default_factory=DecodingConfig)
    max_text_tokens: int = 96
    max_speech_tokens_per_text_token: int = 16
    first_speech_tokens: int = 15
    history_tokens: int = 512
    precision: Precision = "int8"
    decoder_precision: WantedPrecision = "auto"


@dataclass(frozen=True)
class VocalNetConfig:
    """Top level of a model folder's config.json.

    Attributes:
        name: for people.
        llm: a base model's name, or a sub-folder.
        encoder: likewise.
        vocoder: the kind of the part `vocoder`.
        system: the system prompt.
        template: variables for the chat template.
        text_end: the token whose embedding ends the speech decoder's text; "": the one that closes a turn.
        generation: how it answers.
    """

    name: str
    llm: str
    encoder: str
    vocoder: Literal["source_filter", "hift"] = "source_filter"
    system: str = ""
    template: dict[str, str] = field(default_factory=dict)
    text_end: str = ""
    generation: GenerationConfig = field(default_factory=GenerationConfig)


class VocalNet:
    """A loaded model: encoder → adapter → backbone → speech decoder → flow → vocoder.

    ```
    model = VocalNet.load("mini")
    session = model.session(seed=0)
    session.push_audio(samples, 16_000)
    for piece in session.respond(): ...
    ```
    Weights are shared by all sessions and never change; everything that a conversation changes is in its `Session`.
    """

    def __init__(
        self,
        config: VocalNetConfig,
        encoder: SpeechEncoder,
        adapter: SpeechAdapter,
        backbone: Backbone,
        prompt: ChatPrompt,
        speech_decoder: SpeechDecoder,
        flow: Flow,
        vocoder: Vocoder,
        voice: FlowPrompt | None = None,
    ) -> None:
        """Raises CheckpointError where the flow speaks in a given voice and none is given, or the other way round."""
        if (voice is None) != (not flow.config.speaker_width):
            raise CheckpointError(
                f"{config.name} speaks in a given voice; give one (a .safetensors or .npz file with tokens, mel and "
                "speaker, or a recording)"
                if voice is None
                else f"{config.name} has a voice of its own and takes no other"
            )
        self.config = config
        self.encoder = encoder
        self.adapter = adapter
        self.backbone = backbone
        self.prompt = prompt
        self.speech_decoder = speech_decoder
        self.flow = flow
        self.vocoder = vocoder
        self.voice = voice
        pronounced = len(speech_decoder.pronunciations)
        if pronounced not in (0, len(prompt.tokenizer)):
            raise CheckpointError(
                f"{config.name}'s speech decoder knows how {pronounced} tokens are pronounced, its LLM has "
                f"{len(prompt.tokenizer)}; give the LLM that it learned from"
            )
        self.text_rows = TextRows(
            speech_decoder.config.text_views, lambda ids: backbone.embed(ids)[0], speech_decoder.pronunciations
        )
        self.text_end_id = prompt.token_id(config.text_end) if config.text_end else prompt.end_id

    @classmethod
    def load(
        cls,
        source: str | Path = "mini",
        precision: Precision | None = None,
        vocoder: str | Path | None = None,
        voice: str | Path | None = None,
    ) -> VocalNet:
        """Loads `mini`, a model folder, or a checkpoint that VocalNet's authors released.

        Args:
            source: "mini", a folder, or a hub id (owner/name).
            precision: of the LLM; default: the folder's own choice. Of a released checkpoint: of all its parts, bf16.
            vocoder: for a released checkpoint, the folder or hub id of CosyVoice2-0.5B; default: a folder of that name
                in or beside the checkpoint's.
            voice: for a model that speaks in a given voice; see `vocalnet.checkpoints.voice.load_voice`.

        Raises:
            CheckpointError: no such model, missing or broken files, weights that do not fit (all are named).
            ConfigError: a configuration has unknown or lacks keys.
            DownloadError: a base model is not here and cannot be fetched.
        """
        from vocalnet.checkpoints.released import is_released

        folder = model_folder(source)
        if is_released(folder):
            from vocalnet.checkpoints.convert import load_released

            return load_released(folder, precision, vocoder, voice)
        if vocoder is not None:
            raise CheckpointError(f"{folder} is a model folder with a vocoder of its own; leave out {vocoder}")
        return cls._load_folder(folder, precision, voice)

    @classmethod
    def _load_folder(cls, folder: Path, precision: Precision | None, voice: str | Path | None) -> VocalNet:
        """A model folder of ours."""
        config = from_dict(VocalNetConfig, read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        generation = config.generation
        llm = _base(folder, config.llm)
        lora = folder / "lora"
        precision = precision or generation.precision
        backbone = Backbone(llm, precision, lora if lora.is_dir() else None)
        adapter = load_part(SpeechAdapter, AdapterConfig, folder / "adapter")
        adapter.attach(backbone.embedding_table)
        decoder = load_part(SpeechDecoder, SpeechDecoderConfig, folder / "speech_decoder", dtype=None)
        decoder.prepare_inference(generation.decoder_precision)
        flow = load_part(Flow, FlowConfig, folder / "flow")
        vocoder_class, vocoder_config = VOCODERS[config.vocoder]
        vocoder = load_part(vocoder_class, vocoder_config, folder / "vocoder")
        if isinstance(vocoder, HiFT):
            vocoder.fold_weight_norm()
        encoder = _load_encoder(folder, config.encoder, compute_dtype(precision))
        encoder.prepare_inference(precision)
        return cls(
            config=config,
            encoder=encoder,
            adapter=adapter,
            backbone=backbone,
            prompt=ChatPrompt.from_pretrained(llm, config.system, config.template),
            speech_decoder=decoder,
            flow=flow,
            vocoder=vocoder,
            voice=_load_voice(folder, voice, flow.config),
        )

    def session(self, seed: int = 0, generation: GenerationConfig | None = None) -> Session:
        """A new conversation; `seed` fixes text, tokens and waveform on one machine."""
        from vocalnet.session import Session  # session builds on model; only this convenience looks back

        return Session(self, seed, generation)


def _base(folder: Path, name: str) -> Path:
    """The folder of an LLM or encoder: inside the model folder, or a base model shared by several."""
    from vocalnet.checkpoints import base_model

    return folder / name if name and (folder / name / CONFIG_FILE).is_file() else base_model(name)


def _load_encoder(folder: Path, name: str, dtype: torch.dtype) -> SpeechEncoder:
    """A part of the model folder, as `dtype`; or a base model's encoder, float32."""
    own = _base(folder, name)
    return (
        load_part(SpeechEncoder, EncoderConfig, own, dtype) if own == folder / name else SpeechEncoder.from_whisper(own)
    )


def _load_voice(folder: Path, voice: str | Path | None, config: FlowConfig) -> FlowPrompt | None:
    """The voice that is given, or the one in the model folder."""
    from vocalnet.checkpoints.voice import VOICE_FILE, load_voice

    file = folder / VOICE_FILE if voice is None else Path(voice)
    return load_voice(file, None, config) if voice is not None or file.is_file() else None


def model_folder(source: str | Path) -> Path:
    """The folder of a model's name, path or hub id.

    Raises:
        CheckpointError: there is none.
        DownloadError: the hub cannot be reached.
    """
    from vocalnet.checkpoints.fetch import hub_id, resolve

    if str(source) == "mini":
        if not (MINI / CONFIG_FILE).is_file():
            raise CheckpointError("this installation has no mini weights; train them with recipes/reproduce.sh")
        return MINI
    if not Path(source).is_dir() and not hub_id(source):
        raise CheckpointError(f"no model '{source}'; give 'mini', a model folder, or a hub id (owner/name)")
    return resolve(source)


def pack(
    folder: Path, config: VocalNetConfig, parts: dict[str, Path], card: dict[str, Any], dtype: torch.dtype
) -> None:
    """Gathers trained parts into a model folder, weights as `dtype`.

    Args:
        folder: written anew; an earlier one is replaced only when the new one is complete.
        config: the model's top-level configuration.
        parts: part name → exported folder (adapter, lora, speech_decoder, flow, vocoder, speech_tokenizer).
        card: data, recipe, commit, seed and scores of the model.

    Raises:
        CheckpointError: a part is missing or broken.
    """
    from safetensors.torch import load_file, save_file

    for name in ("adapter", "speech_decoder", "flow", "vocoder"):
        if name not in parts:
            raise CheckpointError(f"no part '{name}' to pack; train it first (see recipes/reproduce.sh)")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, source in parts.items():
        target = temporary / name
        target.mkdir(parents=True)
        weights = sorted(source.glob("*.safetensors"))
        if len(weights) != 1:
            raise CheckpointError(f"{source} holds {len(weights)} safetensors files; expected one exported part")
        state = {k: v.to(dtype) if v.dtype == torch.float32 else v for k, v in load_file(weights[0]).items()}
        save_file(state, target / weights[0].name)
        for settings in ("config.json", "adapter_config.json"):
            if (source / settings).is_file():
                shutil.copyfile(source / settings, target / settings)
    (temporary / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=2) + "\n")
    (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
