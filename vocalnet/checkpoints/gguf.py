"""GGUF → a plain Hugging Face folder (bf16 safetensors, config, tokenizer with its chat template).

Tensors are mapped from the file and dequantised one at a time, so that memory stays near the size of the result.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vocalnet.errors import CheckpointError

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FAMILIES = ("llama", "qwen2")


def weight_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None for those that transformers computes (rotary factors).

    Raises:
        CheckpointError: a tensor that a Llama or Qwen2 model does not have.
    """
    if name in _GLOBAL:
        return _GLOBAL[name]
    if name.startswith("rope_freqs"):
        return None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _LAYER:
        raise CheckpointError(f"the GGUF file holds {name}; only Llama and Qwen2 type models are converted")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def restore_halves(weight: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of query and key rows: rotary pairs (2i, 2i+1) become halves (i, i + D/2)."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tensors(reader: Any, config: Any, architecture: str) -> dict[str, Tensor]:
    """All weights in bf16 under their Hugging Face names."""
    from gguf.quants import dequantize

    result: dict[str, Tensor] = {}
    for entry in reader.tensors:
        name = weight_name(entry.name)
        if name is None:
            continue
        values = np.array(dequantize(entry.data, entry.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values)
        if architecture == "llama" and "q_proj" in name:
            weight = restore_halves(weight, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            weight = restore_halves(weight, config.num_key_value_heads)
        result[name] = weight.to(torch.bfloat16).contiguous()
    return result


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes `folder` from a GGUF file.

    Raises:
        CheckpointError: the file is broken or of another architecture.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer

    try:
        reader: Any = GGUFReader(str(file))
        architecture = str(reader.get_field("general.architecture").contents())
    except (ValueError, IndexError, AttributeError, OSError) as error:
        raise CheckpointError(f"{file.name} is not a GGUF file: {' '.join(str(error).split())[:120]}") from error
    if architecture not in _FAMILIES:
        raise CheckpointError(f"{file.name} is a {architecture} model; allowed: {', '.join(_FAMILIES)}")
    config: Any = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    tensors = _tensors(reader, config, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.dtype = "bfloat16"
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    config.architectures = ["LlamaForCausalLM" if architecture == "llama" else "Qwen2ForCausalLM"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(str(folder))
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
