"""Released checkpoints as models: loaded as they are, or converted once into a model folder of ours."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vocalnet.backbone import Backbone
from vocalnet.checkpoints.cosyvoice import FLOW_FILE, HIFT_FILE, load_flow, load_hift
from vocalnet.checkpoints.fetch import COSYVOICE, hub_id, resolve, resolve_vocoder
from vocalnet.checkpoints.released import ADAPTER, DECODER, ENCODER, TEMPLATE_DATE, Released, is_released
from vocalnet.checkpoints.tensors import INDEX_FILE, Weights
from vocalnet.checkpoints.voice import VOICE_FILE, load_voice, save_voice
from vocalnet.config import to_dict
from vocalnet.errors import CheckpointError
from vocalnet.linears import Precision, compute_dtype
from vocalnet.model import GenerationConfig, VocalNet, VocalNetConfig
from vocalnet.parts import CONFIG_FILE, WEIGHTS_FILE
from vocalnet.prompt import ChatPrompt
from vocalnet.sampling import SamplingConfig

SHARD_BYTES = 2 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these makes a tokenizer."""
SMALL_FILES = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
CHAT_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")


def model_config(released: Released, precision: Precision = "bf16") -> VocalNetConfig:
    """How a released model answers: the settings of the authors' streaming script."""
    decoder = released.decoder
    return VocalNetConfig(
        name=released.folder.name,
        llm="llm",
        encoder="encoder",
        vocoder="hift",
        system=released.family.system,
        template={"date_string": TEMPLATE_DATE},
        text_end=released.family.text_end,
        generation=GenerationConfig(
            text=SamplingConfig(temperature=0.1, top_p=0.1),
            speech=SamplingConfig(repetition_penalty=2.0, penalty_window=6),
            mtp=min(2, decoder.mtp_modules),
            max_text_tokens=256,
            first_speech_tokens=decoder.speech_chunk,
            history_tokens=0,  # trained on single questions
            precision=precision,
            decoder_precision=precision,
        ),
    )


def load_released(
    folder: Path, precision: Precision | None = None, vocoder: str | Path | None = None, voice: str | Path | None = None
) -> VocalNet:
    """A released checkpoint as a model, straight from its files. Arguments as in `VocalNet.load`."""
    released = Released(folder)
    vocoder_folder = find_vocoder(folder, vocoder)
    config = model_config(released, precision or "bf16")
    generation = config.generation
    flow, hift = load_flow(vocoder_folder), load_hift(vocoder_folder)
    hift.fold_weight_norm()
    spoken = None if voice is None else load_voice(Path(voice), vocoder_folder, flow.config)
    decoder = released.load_decoder(compute_dtype(generation.precision))
    decoder.prepare_inference(generation.precision)
    encoder = released.load_encoder(compute_dtype(generation.precision))
    encoder.prepare_inference(generation.precision)
    return VocalNet(
        config=config,
        encoder=encoder,
        adapter=released.load_adapter(),
        backbone=Backbone(folder, generation.precision),
        prompt=ChatPrompt.from_pretrained(folder, config.system, config.template, released.llm),
        speech_decoder=decoder,
        flow=flow,
        vocoder=hift,
        voice=spoken,
    )


def find_vocoder(source: str | Path, vocoder: str | Path | None) -> Path:
    """The folder with CosyVoice2's flow.pt and hift.pt: the one given, or one in or beside the checkpoint's.

    Raises:
        CheckpointError: there is none.
        DownloadError: a hub id whose files cannot be fetched.
    """
    if vocoder is not None:
        return resolve_vocoder(vocoder)
    if hub_id(source):
        return resolve_vocoder(COSYVOICE)
    folder = Path(source)
    name = COSYVOICE.partition("/")[2]
    for place in (folder, folder / name, folder.resolve().parent / name):
        if (place / FLOW_FILE).is_file() and (place / HIFT_FILE).is_file():
            return place
    raise CheckpointError(f"no {FLOW_FILE} and {HIFT_FILE} for {folder}; give the folder of {name} as vocoder")


def convert(
    source: str | Path, out: Path, vocoder: str | Path | None = None, voice: str | Path | None = None
) -> VocalNetConfig:
    """Writes a model folder from a released checkpoint; weights keep their type and pass through memory one by one.

    Args:
        source: its folder or hub id.
        out: the model folder; an earlier one is replaced only when the new one is complete.
        vocoder: folder or hub id of CosyVoice2-0.5B; default: see `find_vocoder`.
        voice: see `vocalnet.checkpoints.voice.load_voice`; it can also be given when the model is loaded.

    Raises:
        CheckpointError: files or weights are missing, unexpected, of another shape, or hold code.
        ConfigError: a configuration lacks keys, or asks for what the released models do not have.
        DownloadError: a hub id whose files cannot be fetched.
    """
    folder = resolve(source)
    if not is_released(folder):
        raise CheckpointError(f"{folder} is no released VocalNet checkpoint; its config.json has no speech generator")
    released = Released(folder)
    vocoder_folder = find_vocoder(source, vocoder)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        flow, hift = load_flow(vocoder_folder), load_hift(vocoder_folder)
        if voice is not None:
            save_voice(load_voice(Path(voice), vocoder_folder, flow.config), temporary / VOICE_FILE)
        flow.save(temporary / "flow")
        hift.save(temporary / "vocoder")
        parts = (("encoder", ENCODER, released.encoder), ("adapter", ADAPTER, released.adapter))
        for name, prefix, settings in (*parts, ("speech_decoder", DECODER, released.decoder)):
            _say(f"writing {name} …")
            _write_part(released.weights, prefix, settings, temporary / name)
        _say("writing llm …")
        _write_llm(released, temporary / "llm")
        config = model_config(released)
        (temporary / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def _write_part(weights: Weights, prefix: str, settings: Any, folder: Path) -> None:
    """One part's weights under its own names. They are mapped, so that none of them has to be in memory."""
    folder.mkdir()
    state = {name.removeprefix(prefix): weights.get(name) for name in weights.names() if name.startswith(prefix)}
    save_file(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(to_dict(settings), indent=2) + "\n")


def _write_llm(released: Released, folder: Path) -> None:
    """The LLM as a Hugging Face folder of its own family."""
    source = released.folder
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{source} has none of {', '.join(TOKENIZER_FILES)}; copy the tokenizer's files there")
    folder.mkdir()
    shards = list(_shards(released))
    homes: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        homes.update(dict.fromkeys(shard, file))
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    released.llm.architectures = ["Qwen2ForCausalLM" if released.llm.model_type == "qwen2" else "LlamaForCausalLM"]
    released.llm.save_pretrained(str(folder))
    for name in (*SMALL_FILES, *CHAT_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _shards(released: Released) -> Iterator[dict[str, Tensor]]:
    """The LLM's weights in groups of at most `SHARD_BYTES`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name in sorted(released.weights.names()):
        if name.startswith((ENCODER, ADAPTER, DECODER)):
            continue
        weight = released.weights.get(name)
        if shard and size + weight.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = weight
        size += weight.nbytes
    yield shard


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
