"""The text backbone: any Hugging Face causal LM as prefill and step over a preallocated cache, hidden states out.

Llama and Qwen2 type decoders run in our own loop, straight from their safetensors: fused products, a cache that is
never copied, int8, bf16 or fp32. Every other family runs through transformers behind the same interface.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.checkpoints.tensors import FolderWeights, Shape, StateWeights, Weights
from vocalnet.errors import CheckpointError, ConfigError
from vocalnet.layers import KVCache, LayerConfig, LlamaLayer, Rotary, Rotation, step_all
from vocalnet.linears import (
    PackedLinear,
    Precision,
    compute_dtype,
    hadamard,
    pack_linear,
    replace_linears,
    spread,
    spread_block,
)
from vocalnet.lora import LoraAdapter
from vocalnet.norm import RMSNorm

# Families whose layers are exactly LlamaLayer; the rotary kinds have frequencies that do not depend on length.
_LEAN_FAMILIES = ("llama", "qwen2", "mistral")
_LEAN_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass
class BackboneState:
    """One conversation's cache: `length` of at most `capacity` positions are filled."""

    capacity: int
    length: int = 0
    caches: list[KVCache] = field(default_factory=list)
    foreign: Any = None  # transformers' own cache, for families outside the lean loop


def load_config(folder: Path) -> Any:
    """The transformers config of a folder. Types that extend Llama or Qwen2 (released VocalNet checkpoints) are read
    as these.

    Raises:
        CheckpointError: no config.json, or an architecture unknown to the installed transformers.
    """
    from transformers import AutoConfig, LlamaConfig, Qwen2Config

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no config.json in {folder}; expected a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (ValueError, KeyError) as error:
        settings = json.loads(path.read_text())
        kind = f"{settings.get('model_type')} {settings.get('architectures')}".lower()
        for family, config in (("qwen", Qwen2Config), ("llama", LlamaConfig)):
            if family in kind and "num_hidden_layers" in settings:
                own = {*config().to_dict(), "rope_theta", "rope_scaling"} - {"model_type"}
                return config(**{key: value for key, value in settings.items() if key in own})
        raise CheckpointError(f"{folder}: transformers does not know '{settings.get('model_type')}'") from error


def is_lean(config: Any) -> bool:
    """Whether a model's layers are plain Llama layers, so that our own loop computes the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    windowed = bool(getattr(config, "use_sliding_window", False)) or (
        config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
    )
    return (
        config.model_type in _LEAN_FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _LEAN_ROTARY
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not windowed
    )


class Decoder(Protocol):
    """What `Backbone` needs of an implementation."""

    def init_state(self, capacity: int, batch: int) -> BackboneState:
        """An empty cache."""
        ...

    def forward(self, x: Tensor, state: BackboneState) -> Tensor:
        """(B, T, D) embeddings → (B, T, D) hidden states after the final norm; the cache is extended."""
        ...

    def truncate(self, state: BackboneState, length: int) -> None:
        """Forgets positions from `length` on."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)."""
        ...


_BIASED = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def layer_config(config: Any, qkv_bias: bool, output_bias: bool, mlp_bias: bool) -> LayerConfig:
    """The layers of a transformers config; which of them have biases shows in the weights."""
    heads = config.num_attention_heads
    return LayerConfig(
        width=config.hidden_size,
        heads=heads,
        ffn=config.intermediate_size,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        eps=config.rms_norm_eps,
    )


class LeanDecoder:
    """Packed Llama layers over preallocated caches."""

    def __init__(self, config: Any, weights: Weights, precision: Precision, lora: LoraAdapter | None) -> None:
        self.dtype = compute_dtype(precision)
        # Between the layers int8 works on spread activations: no channel is then too large for 8 bits.
        self.mixer = hadamard(spread_block(config.hidden_size)) if precision == "int8" else None
        biased = (f"model.layers.0.{name}.bias" in weights.names() for name in _BIASED)
        layer = layer_config(config, *biased)
        self.layer_config = layer
        self.layers = [
            _load_layer(layer, weights, f"model.layers.{index}.", precision, lora)
            for index in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps).requires_grad_(False)
        self.norm.weight = nn.Parameter(weights.get("model.norm.weight").to(self.dtype), requires_grad=False)
        # Some files keep a copy of the tied matrix; transformers does not read it either.
        tied = bool(getattr(config, "tie_word_embeddings", False)) or "lm_head.weight" not in weights.names()
        head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        head = weights.get(head_name)
        self.head: PackedLinear = pack_linear(
            lora.merge(head_name, head) if lora else head, None, precision, spread_input=True
        )
        self.device = head.device
        self.rotary = _rotary(config)
        self._table: Rotation | None = None

    def init_state(self, capacity: int, batch: int) -> BackboneState:
        """Caches for `capacity` positions."""
        if self._table is None or self._table.cos.shape[0] < capacity:
            self._table = Rotation(*(part.to(self.device) for part in self.rotary(torch.arange(capacity), self.dtype)))
        caches = [
            KVCache.allocate(batch, self.layer_config, capacity, layer.cache_dtype(batch, self.dtype), self.device)
            for layer in self.layers
        ]
        return BackboneState(capacity, 0, caches)

    def forward(self, x: Tensor, state: BackboneState) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        assert self._table is not None
        rotation = self._table.rows(state.length, state.length + x.shape[1])
        x = x.to(self.dtype)
        if self.mixer is not None:
            x = spread(x, self.mixer)
        x = step_all(self.layers, x, rotation, state.caches)
        if self.mixer is not None:
            x = spread(x, self.mixer)
        state.length += x.shape[1]
        return self.norm(x)

    def truncate(self, state: BackboneState, length: int) -> None:
        """Sets lengths; nothing moves."""
        for cache in state.caches:
            cache.truncate(length)
        state.length = length

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)."""
        return self.head(hidden.to(self.dtype))


def _load_layer(
    config: LayerConfig, weights: Weights, prefix: str, precision: Precision, lora: LoraAdapter | None
) -> LlamaLayer:
    """One layer from named weights, LoRA merged, packed. Only this layer exists unpacked meanwhile."""
    with torch.device("meta"):
        layer = LlamaLayer(config)
    state: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        weight = weights.get(prefix + name)
        if weight.shape != parameter.shape:
            raise CheckpointError(
                f"{prefix}{name} has shape {tuple(weight.shape)}, its config says {tuple(parameter.shape)}"
            )
        state[name] = lora.merge(prefix + name, weight) if lora else weight
    layer.load_state_dict(state, assign=True)
    layer.pack(precision, spread_stream=precision == "int8")
    return layer.eval()


def _rotary(config: Any) -> Rotary:
    """Rotary frequencies with whatever scaling the config asks for, as transformers computes them."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Rotary(size, rope.get("rope_theta", 10000.0))
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # half a second, so only where needed

    reference = LlamaRotaryEmbedding(config)
    size = 2 * reference.inv_freq.shape[0]
    return Rotary(size, inverse_frequency=reference.inv_freq, gain=float(reference.attention_scaling))


class ForeignDecoder:
    """Any causal LM through transformers' own forward and cache."""

    def __init__(self, model: Any, precision: Precision, lora: LoraAdapter | None) -> None:
        self.dtype = compute_dtype(precision)
        for name, module in model.named_modules():
            if lora and isinstance(module, nn.Linear):
                module.weight.data = lora.merge(f"{name}.weight", module.weight.data)
        model = model.to(self.dtype).eval().requires_grad_(False)
        self.output: Any = model.get_output_embeddings()
        if precision == "int8":
            self.output = pack_linear(self.output.weight, self.output.bias, precision)
            replace_linears(model.get_decoder(), lambda linear: pack_linear(linear.weight, linear.bias, precision))
        self.body = model.get_decoder()

    def init_state(self, capacity: int, batch: int) -> BackboneState:
        """transformers' cache grows by itself; `capacity` is a limit."""
        from transformers import DynamicCache

        return BackboneState(capacity, foreign=DynamicCache(config=self.body.config))

    def forward(self, x: Tensor, state: BackboneState) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        result = self.body(inputs_embeds=x.to(self.dtype), past_key_values=state.foreign, use_cache=True)
        state.length += x.shape[1]
        return result.last_hidden_state

    def truncate(self, state: BackboneState, length: int) -> None:
        """Crops transformers' cache."""
        if length < state.length:
            state.foreign.crop(length - state.length)  # negative: how many to remove
        state.length = length

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V)."""
        return self.output(hidden.to(self.dtype))


class Backbone:
    """A causal LM that reads embeddings and gives hidden states and logits.

    ```
    state = backbone.init_state(512)
    hidden = backbone.prefill(backbone.embed(ids), state)         # (1, T, D)
    token = int(backbone.logits(hidden[:, -1]).argmax())
    hidden, logits = backbone.step(token, state)                  # (1, D), (1, V)
    ```
    Hidden states are those after the final norm, which transformers calls hidden_states[-1].
    """

    def __init__(
        self,
        source: Path | str | nn.Module,
        precision: Precision = "int8",
        lora: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Loads a model.

        Args:
            source: a Hugging Face folder, or a causal LM in memory (its weights are shared where precision allows).
            precision: int8 (CPU only; float32 activations), bf16 or fp32.
            lora: a peft LoRA folder, merged before anything is quantised.
            device: where bf16 and fp32 weights go.

        Raises:
            CheckpointError: files are missing or do not fit each other.
            ConfigError: the precision does not run here.
        """
        adapter = LoraAdapter(lora) if lora is not None else None
        in_memory = isinstance(source, nn.Module)
        config: Any = source.config if in_memory else load_config(Path(source))  # type: ignore[union-attr, arg-type]
        self.config = config
        self.precision = precision
        self.dtype = compute_dtype(precision)
        self.decoder: Decoder
        if is_lean(config):
            weights: Weights = (
                FolderWeights(Path(source)) if not isinstance(source, nn.Module) else StateWeights(source.state_dict())
            )
            if torch.device(device).type != "cpu":
                weights = _OnDevice(weights, device)
            self.embedding_table = weights.get("model.embed_tokens.weight")  # (V, D), in the file's dtype
            self.decoder = LeanDecoder(config, weights, precision, adapter)
        else:
            model: Any = source if in_memory else _load_model(Path(source))  # type: ignore[arg-type]
            self.decoder = ForeignDecoder(model.to(device), precision, adapter)
            self.embedding_table = model.get_input_embeddings().weight.detach()
        if adapter is not None:
            adapter.check_all_used()

    @property
    def width(self) -> int:
        """Size of embeddings and hidden states."""
        return self.embedding_table.shape[1]

    def init_state(self, max_tokens: int, batch: int = 1) -> BackboneState:
        """An empty cache for at most `max_tokens` positions.

        Raises:
            ConfigError: more positions than the model was made for.
        """
        limit = self.config.max_position_embeddings
        if not 0 < max_tokens <= limit:
            raise ConfigError(f"max_tokens is {max_tokens}; this model allows 1 to {limit}")
        return self.decoder.init_state(max_tokens, batch)

    def embed(self, ids: Tensor | list[int]) -> Tensor:
        """Token ids (T,) or (B, T) → input embeddings (B, T, D)."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.embedding_table.device)
        return F.embedding(ids.view(-1, ids.shape[-1]), self.embedding_table).to(self.dtype)

    @torch.inference_mode()
    def prefill(self, embeddings: Tensor, state: BackboneState) -> Tensor:
        """Appends (B, T, D) embeddings to the conversation → hidden states (B, T, D).

        Raises:
            ConfigError: the conversation would exceed the state's capacity.
        """
        needed = state.length + embeddings.shape[1]
        if needed > state.capacity:
            raise ConfigError(
                f"the conversation needs {needed} positions, its cache has {state.capacity}; "
                "raise max_tokens or forget old turns"
            )
        return self.decoder.forward(embeddings, state)

    @torch.inference_mode()
    def step(self, token: int, state: BackboneState) -> tuple[Tensor, Tensor]:
        """Reads one token → its hidden state (1, D) and the logits (1, V) of the next."""
        hidden = self.prefill(self.embed([token]), state)[:, -1]
        return hidden, self.decoder.logits(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, D) → logits (…, V)."""
        return self.decoder.logits(hidden)

    def truncate(self, state: BackboneState, length: int) -> None:
        """Rewinds the conversation to its first `length` positions, after an interruption for example."""
        if not 0 <= length <= state.length:
            raise ConfigError(f"cannot truncate to {length}; the conversation has {state.length} positions")
        self.decoder.truncate(state, length)


class _OnDevice:
    """Weights moved to a device as they are read."""

    def __init__(self, weights: Weights, device: str | torch.device) -> None:
        self._weights, self._device = weights, device

    def names(self) -> set[str]:
        """All names."""
        return self._weights.names()

    def get(self, name: str) -> Tensor:
        """One tensor on the device."""
        return self._weights.get(name).to(self._device)

    def shape(self, name: str) -> Shape:
        """Of one tensor."""
        return self._weights.shape(name)


def _load_model(folder: Path) -> Any:
    """A causal LM by transformers, in its file's dtype."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {folder}: {' '.join(str(error).split())[:200]}") from error
