"""Multi-token prediction: heads that predict the tokens after the next one from the speech decoder's hidden states.

One interface, `MTPHead`, for training and streaming alike: whoever drives it supplies `run`, which applies one Llama
layer to rows of hidden states at a depth, and `ahead`, the embeddings of later tokens, under the mask of a training
batch or with the caches of a stream. Row s of the speech predicts token s by the decoder itself; the head adds up to
`depth` *drafts*, tokens s + 1 … s + depth, so that K drafts make K + 1 tokens a step, whatever the kind:

    sequential       draft k: one layer over the states of draft k - 1, a head of its own (VocalNet)
    group            the decoder itself runs on groups of K + 1 tokens; one head for each token of the next group
    parallel-linear  draft k: one linear head over the decoder's state
    deepseek         draft k: a layer over [states of draft k - 1, embedding of draft k - 1]; the decoder's own output
    recursive        the same with one set of weights for all k (FastMTP)
    leap             heads for tokens s + 2, s + 4, …; the previous row's fill the gaps (L-MTP)
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vocalnet.errors import ConfigError
from vocalnet.layers import LayerConfig, LlamaLayer
from vocalnet.linears import PackedLinear, Precision, pack_module, pack_output
from vocalnet.norm import RMSNorm

RunLayer = Callable[[LlamaLayer, Tensor, int], Tensor]
"""(layer, hidden (B, rows, width), depth) → hidden (B, rows, width): attention sees what depth `depth` may see."""

Ahead = Callable[[int], Tensor]
"""depth k → (B, rows, width): at speech row s the embedding of token s + k - 1, which the depth before predicts there;
zeros at text rows, which no token follows."""

LEAP_STRIDE = 2
"""Distance between the tokens that the heads of `LeapMTP` predict (s in L-MTP)."""


class MTPHead(nn.Module, ABC):
    """Predicts the `depth` tokens after the decoder's own.

    A *predictor* is what trains: one distribution at every row. A *draft* is one token of a step. They are one to one
    but for `leap`, whose predictors serve two drafts each.

    Attributes:
        depth: number of drafts.
        group: tokens that one speech row of the decoder stands for.
        look_back: earlier rows whose states a step reads.
        conditioned: drafts depend on the drafts before them, through `ahead`.
    """

    depth: int
    group = 1
    look_back = 0
    conditioned = False

    def reset(self) -> None:
        """Sets the weights that should not begin at random."""

    @torch.no_grad()
    def start_from(self, layer: LlamaLayer, norm: RMSNorm, output: nn.Linear) -> None:
        """Begins from the trained decoder's last layer, final norm and output projection instead of random weights."""
        state = {f"decoder_layer.{name}": value for name, value in layer.state_dict().items()}
        state |= {f"norm_final.{name}": value for name, value in norm.state_dict().items()}
        state |= {f"output_proj.{name}": value for name, value in output.state_dict().items()}
        for name, value in self.state_dict().items():
            start = next((state[known] for known in state if name.endswith(known)), None)
            if start is not None:
                value.copy_(start)
        self.reset()

    def predictors(self, drafts: int) -> int:
        """How many predictors that many drafts need."""
        return drafts

    def offset(self, predictor: int) -> int:
        """How many tokens beyond the decoder's own predictor 1, 2, … looks."""
        return predictor

    def source(self, draft: int) -> tuple[int, int]:
        """The predictor of draft 1, 2, …, and how many rows before the newest it is read."""
        return draft, 0

    def merge(self, embedded: Tensor) -> Tensor:
        """Embedded tokens (B, n, width) → the decoder's input rows (B, n / group, width)."""
        return embedded

    @abstractmethod
    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """Yields the states of predictors 1 … `count` over all rows, each when it is asked for.

        Args:
            hidden: (B, rows, width), the decoder's states before its final norm, over text and speech rows alike.
            run: applies a layer under the right mask.
            ahead: embeddings of later tokens; in a stream, that of a draft is there once the draft is made.
            count: how many predictors.
        """

    @abstractmethod
    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """(..., width) states as yielded by `hidden_states` → (..., vocabulary); `output` is the decoder's own."""

    def layer_configs(self, drafts: int) -> list[LayerConfig]:
        """The layers that need a cache for that many drafts, by depth."""
        return []

    @abstractmethod
    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """Turns all weights into inference form."""


class Head(nn.Module):
    """Final norm and output projection to the vocabulary."""

    def __init__(self, config: LayerConfig, vocabulary: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(config.width, config.eps)
        self.output_proj = nn.Linear(config.width, vocabulary)
        self.packed: PackedLinear | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) before the norm → (..., vocabulary)."""
        return self.output_proj(self.norm_final(hidden)) if self.packed is None else self.packed(hidden)

    def pack(self, precision: Precision) -> None:
        """Inference form of the head."""
        self.packed = pack_output(self.output_proj, precision, self.norm_final)


class SequentialModule(Head):
    """One depth of the sequential kind: a Llama layer and a head of its own."""

    def __init__(self, config: LayerConfig, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.decoder_layer = LlamaLayer(config)

    def pack(self, precision: Precision) -> None:
        """Inference form of layer and head."""
        super().pack(precision)
        self.decoder_layer.pack(precision)


class SequentialMTP(nn.ModuleList, MTPHead):
    """VocalNet's kind: depth k runs one layer over the states of depth k - 1. No token embedding enters.

    The tokens of one step are therefore independent given the prefix. Parameter names are those of the released
    checkpoints (`mtp_layers.0.decoder_layer…`).
    """

    def __init__(self, config: LayerConfig, vocabulary: int, depth: int) -> None:
        super().__init__([SequentialModule(config, vocabulary) for _ in range(depth)])
        self.depth = depth
        self.config = config

    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """See `MTPHead.hidden_states`."""
        for depth in range(1, count + 1):
            hidden = run(self._module(depth).decoder_layer, hidden, depth)
            yield hidden

    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """See `MTPHead.logits`."""
        return self._module(predictor).logits(hidden)

    def layer_configs(self, drafts: int) -> list[LayerConfig]:
        """See `MTPHead.layer_configs`."""
        return [self.config] * drafts

    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """See `MTPHead.pack`."""
        for depth in range(1, self.depth + 1):
            self._module(depth).pack(precision)

    def _module(self, depth: int) -> SequentialModule:
        return cast(SequentialModule, self[depth - 1])


class ParallelLinearMTP(nn.ModuleList, MTPHead):
    """Independent linear heads over the decoder's state: logits_k = W_k · norm_k(h⁰)."""

    def __init__(self, config: LayerConfig, vocabulary: int, depth: int) -> None:
        super().__init__([Head(config, vocabulary) for _ in range(depth)])
        self.depth = depth

    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """See `MTPHead.hidden_states`."""
        for _ in range(count):
            yield hidden

    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """See `MTPHead.logits`."""
        return cast(Head, self[predictor - 1]).logits(hidden)

    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """See `MTPHead.pack`."""
        for index in range(self.depth):
            cast(Head, self[index]).pack(precision)


class GroupMTP(ParallelLinearMTP):
    """The decoder runs on groups of g = depth + 1 tokens: embedded, concatenated, Linear(g·width → width).

    One row then predicts the g tokens of the next group, the first by the decoder's own head. The sequence is g times
    shorter, and there is no law of single tokens to verify drafts with.
    """

    def __init__(self, config: LayerConfig, vocabulary: int, depth: int) -> None:
        super().__init__(config, vocabulary, depth)
        self.group = depth + 1
        self.merge_proj = nn.Linear(self.group * config.width, config.width)
        self.packed_merge: PackedLinear | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """The newest token of a group passes as it is at first: to a trained decoder, known ground."""
        width = self.merge_proj.out_features
        self.merge_proj.weight.zero_()
        self.merge_proj.weight[:, -width:] = torch.eye(width)
        self.merge_proj.bias.zero_()

    def merge(self, embedded: Tensor) -> Tensor:
        """See `MTPHead.merge`."""
        rows = embedded.unflatten(1, (-1, self.group)).flatten(2)  # (B, n / g, g · width)
        return self.merge_proj(rows) if self.packed_merge is None else self.packed_merge(rows)

    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """See `MTPHead.pack`."""
        super().pack(precision, output)
        self.packed_merge = pack_module([self.merge_proj], precision)


class ConditionedModule(nn.Module):
    """DeepSeek's block: M · [norm(h); norm(E(token))], one Llama layer, a norm; embedding and output are shared."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.norm_hidden = RMSNorm(config.width, config.eps)
        self.norm_embedding = RMSNorm(config.width, config.eps)
        self.combine = nn.Linear(2 * config.width, config.width)
        self.decoder_layer = LlamaLayer(config)
        self.norm_final = RMSNorm(config.width, config.eps)
        self.packed_combine: PackedLinear | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """The state passes as it is at first; the token's share is left at random."""
        width = self.combine.out_features
        self.combine.weight[:, :width] = torch.eye(width)
        self.combine.bias.zero_()

    def combined(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Two (B, rows, width) → the layer's input (B, rows, width)."""
        both = torch.cat((self.norm_hidden(hidden), self.norm_embedding(embedded.to(hidden.dtype))), -1)
        return self.combine(both) if self.packed_combine is None else self.packed_combine(both)

    def pack(self, precision: Precision) -> None:
        """Inference form of combination and layer."""
        self.packed_combine = pack_module([self.combine], precision)
        self.decoder_layer.pack(precision)


class DeepSeekMTP(nn.ModuleList, MTPHead):
    """DeepSeek-V3's kind (2024): depth k also reads the token that depth k - 1 stands for, its own draft in a stream.

    The states handed from depth to depth are before `norm_final`; embedding and output projection are the decoder's.
    """

    conditioned = True

    def __init__(self, config: LayerConfig, vocabulary: int, depth: int) -> None:
        super().__init__([ConditionedModule(config) for _ in range(self._sets(depth))])
        self.depth = depth
        self.config = config
        self.packed_output: PackedLinear | None = None

    def _sets(self, depth: int) -> int:
        """How many sets of weights there are."""
        return depth

    def reset(self) -> None:
        """See `MTPHead.reset`."""
        for module in self:
            cast(ConditionedModule, module).reset()

    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """See `MTPHead.hidden_states`."""
        for depth in range(1, count + 1):
            module = self._module(depth)
            hidden = run(module.decoder_layer, module.combined(hidden, ahead(depth)), depth)
            yield hidden

    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """See `MTPHead.logits`."""
        hidden = self._module(predictor).norm_final(hidden)
        return output(hidden) if self.packed_output is None else self.packed_output(hidden)

    def layer_configs(self, drafts: int) -> list[LayerConfig]:
        """See `MTPHead.layer_configs`: shared weights too need a cache at each depth."""
        return [self.config] * drafts

    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """See `MTPHead.pack`."""
        for module in self:
            cast(ConditionedModule, module).pack(precision)
        self.packed_output = pack_output(output, precision)

    def _module(self, depth: int) -> ConditionedModule:
        return cast(ConditionedModule, self[depth - 1])


class RecursiveMTP(DeepSeekMTP):
    """FastMTP (2025): one block applied again and again, its normed output fed on."""

    def _sets(self, depth: int) -> int:
        return min(depth, 1)

    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """See `MTPHead.hidden_states`."""
        for depth in range(1, count + 1):
            module = self._module(depth)
            hidden = module.norm_final(run(module.decoder_layer, module.combined(hidden, ahead(depth)), depth))
            yield hidden

    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """See `MTPHead.logits`; the states are normed already."""
        return output(hidden) if self.packed_output is None else self.packed_output(hidden)

    def _module(self, depth: int) -> ConditionedModule:
        return cast(ConditionedModule, self[0])


class LeapModule(Head):
    """x + SiLU(W x) over the normed state x, and a head of its own. W begins at zero."""

    def __init__(self, config: LayerConfig, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.residual = nn.Linear(config.width, config.width)
        self.packed_residual: PackedLinear | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) before the norm → (..., vocabulary)."""
        x = self.norm_final(hidden)
        if self.packed is None or self.packed_residual is None:
            return self.output_proj(x + F.silu(self.residual(x)))
        return self.packed(x + F.silu(self.packed_residual(x)))

    def pack(self, precision: Precision) -> None:
        """Inference form of block and head."""
        self.packed_residual = pack_module([self.residual], precision)
        self.packed = pack_output(self.output_proj, precision)


class LeapMTP(nn.ModuleList, MTPHead):
    """L-MTP (2025): head i predicts token s + 2·i at row s. Of a step's drafts, the even come from the newest row's
    heads and the odd from the row before (look-back decoding), so that ⌈K / 2⌉ heads make K drafts.
    """

    look_back = LEAP_STRIDE - 1

    def __init__(self, config: LayerConfig, vocabulary: int, depth: int) -> None:
        super().__init__([LeapModule(config, vocabulary) for _ in range(self.predictors(depth))])
        self.depth = depth

    @torch.no_grad()
    def reset(self) -> None:
        """See `MTPHead.reset`: each head begins as its output projection alone."""
        for module in self:
            residual = cast(LeapModule, module).residual
            residual.weight.zero_()
            residual.bias.zero_()

    def predictors(self, drafts: int) -> int:
        """See `MTPHead.predictors`."""
        return -(-drafts // LEAP_STRIDE)

    def offset(self, predictor: int) -> int:
        """See `MTPHead.offset`."""
        return LEAP_STRIDE * predictor

    def source(self, draft: int) -> tuple[int, int]:
        """See `MTPHead.source`: the head that looks furthest is at the newest row that reaches the draft exactly."""
        predictor = self.predictors(draft)
        return predictor, self.offset(predictor) - draft

    def hidden_states(self, hidden: Tensor, run: RunLayer, ahead: Ahead, count: int) -> Iterator[Tensor]:
        """See `MTPHead.hidden_states`."""
        for _ in range(count):
            yield hidden

    def logits(self, hidden: Tensor, predictor: int, output: nn.Linear) -> Tensor:
        """See `MTPHead.logits`."""
        return cast(LeapModule, self[predictor - 1]).logits(hidden)

    def pack(self, precision: Precision, output: nn.Linear) -> None:
        """See `MTPHead.pack`."""
        for module in self:
            cast(LeapModule, module).pack(precision)


MTP_HEADS: Mapping[str, Callable[[LayerConfig, int, int], MTPHead]] = {
    "sequential": SequentialMTP,
    "group": GroupMTP,
    "parallel-linear": ParallelLinearMTP,
    "deepseek": DeepSeekMTP,
    "recursive": RecursiveMTP,
    "leap": LeapMTP,
}
"""The kinds of head by name, as in `SpeechDecoderConfig.mtp_head`: (layer, vocabulary, depth) → head."""


def make_head(kind: str, config: LayerConfig, vocabulary: int, depth: int) -> MTPHead:
    """A head with random weights.

    Raises:
        ConfigError: unknown kind.
    """
    check_kind(kind)
    head = MTP_HEADS[kind](config, vocabulary, depth)
    head.reset()
    return head


def check_kind(kind: str) -> None:
    """Raises ConfigError if `kind` is not a key of `MTP_HEADS`."""
    if kind not in MTP_HEADS:
        near = difflib.get_close_matches(str(kind), MTP_HEADS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"mtp_head is {kind!r}; {hint}allowed: {', '.join(MTP_HEADS)}")
