"""The speech decoder: hidden states of the answer's text in, 25 Hz speech tokens out.

Rows of one sequence, as the layers see them:

    BOS  text 1 … text T | SOS  token 0 … token S-1

Text rows come from the LLM through the projector layers; text and speech count positions separately. `training_pass`
runs whole batches under the masks of `vocalnet.mask`; `init_state`, `add_text` and the functions in
`vocalnet.decoding` run the same arithmetic as a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LayerConfig, LlamaLayer, Rotary, Rotation, rotate, step_all
from vocalnet.linears import (
    PackedLinear,
    Precision,
    WantedPrecision,
    compute_dtype,
    int8_available,
    pack_output,
    spread_block,
)
from vocalnet.mask import last_speech_row, training_mask, visible_text, visible_text_count
from vocalnet.mtp import make_head
from vocalnet.native import NativeAttention, available
from vocalnet.native.linear import fits
from vocalnet.norm import RMSNorm
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.text_rows import TABLE_WIDTH

IGNORE = -100
"""Target of rows without one, as in `torch.nn.functional.cross_entropy`."""


def layers_of(modules: nn.ModuleList) -> list[LlamaLayer]:
    """The same layers, under their own type."""
    return [cast(LlamaLayer, module) for module in modules]


class TextInput(nn.Module):
    """Brings the LLM's rows to the decoder's width.

    Its two views of each token are normalised apart, since an input embedding (RMS about 0.1) would drown beside a
    hidden state (RMS about 1): the hidden state knows the context, the embedding the word. Phonemes come as they are.
    """

    def __init__(self, config: SpeechDecoderConfig) -> None:
        super().__init__()
        self.sizes = [size for view, size in config.view_sizes if view != "pronunciation"]
        self.norms = nn.ModuleList(RMSNorm(size, config.eps) for size in self.sizes)
        self.proj = nn.Linear(config.input_size, config.width)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, T, input_size) → (B, T, width)."""
        *views, rest = rows.split([*self.sizes, rows.shape[-1] - sum(self.sizes)], -1)
        normed = [norm(view) for norm, view in zip(self.norms, views, strict=True)]
        return self.proj(torch.cat([*normed, rest], -1))


@dataclass
class TrainingPass:
    """What one offline pass leaves: everything the losses need, at the rows that have a target."""

    hidden: Tensor
    """(N, width): decoder states before the final norm, at all speech rows of all samples (SOS … last token; with a
    group head, one row a group)."""
    logits: list[Tensor | None]
    """Decoder (None if not asked for) and predictors of the MTP head, each (N, vocabulary)."""
    targets: list[Tensor]
    """Each (N,): the token that each of them is to predict, IGNORE past the end."""
    attention: Tensor | None = None
    """(N, heads, text rows, padded): log attention over the text alone, of the layer and heads asked for."""


@dataclass
class SpeechState:
    """One answer being spoken.

    Every layer has one cache of `max_text + max_speech` rows: text grows to the left of row `max_text` and speech to
    the right, so that what is visible is always one view, and nothing moves when either grows.

    Several answers may share a state in lockstep: text and speech rows of all are then the same in number.
    """

    max_text: int
    max_speech: int
    modules: int
    streaming: bool
    projector: list[KVCache]
    decoder: list[KVCache]
    heads: list[KVCache]
    text_rotation: Rotation
    speech_rotation: Rotation
    text_rows: int = 0
    text_complete: bool = False
    speech_rows: int = 0
    """Rows in the caches that hold, SOS first; a row is a token, or a group of them."""
    newest: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))
    """(B, n) tokens to feed next: the newest certain ones, then unverified drafts."""
    draft_laws: Tensor | None = None
    """(1, drafts, vocabulary): the distributions that the drafts in `newest` were drawn from."""
    recent: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))
    """(B, window): the newest certain tokens, for the repetition penalty; -1 before the first."""
    tail: Tensor | None = None
    """(B, rows, width): decoder states of the newest rows, for heads that read or run earlier rows again."""
    tail_tokens: Tensor | None = None
    """(B, rows): what was fed at those rows."""
    pending: Tensor | None = None
    """(B, T, width) newest text rows, projected: the next speech rows take them along, and each weight is read once."""
    pending_states: Tensor | None = None
    """(B, T, width) what the decoder made of those rows, newest first: the MTP head's layers are still to see it."""
    behind: dict[int, int] = field(default_factory=dict)
    """Compatibility mode: how many speech rows fewer than the decoder the module at a depth holds."""
    counters: Tensor | None = None
    """(2,) text and speech rows on the device. With them every step has fixed shapes and addresses, so that it can be
    captured once and replayed: it attends to whole caches under a mask made from the counters."""
    generated: list[int] = field(default_factory=list)
    """All speech tokens so far, handed out or not."""
    handed_out: int = 0
    steps: int = 0
    """How many times the decoder ran."""
    drafts_checked: int = 0
    drafts_passed: int = 0
    ended: bool = False
    """EOS was drawn, or the caches are full."""

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return self.ended and self.handed_out == len(self.generated)


class SpeechDecoder(nn.Module):
    """Projector, decoder layers, output head and multi-token prediction."""

    def __init__(self, config: SpeechDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.text_input != "hidden" or config.width != config.llm_hidden_size:
            self.text_input: nn.Module = TextInput(config)
        else:
            self.text_input = nn.Identity()
        table = torch.zeros(config.pronounced, TABLE_WIDTH, dtype=torch.uint8)
        self.pronunciations: Tensor
        self.register_buffer("pronunciations", table, persistent=bool(config.pronounced))
        self.encode_layers = nn.ModuleList(LlamaLayer(config.layer) for _ in range(config.projector_layers))
        self.decode_layers = nn.ModuleList(LlamaLayer(config.layer) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.output_proj = nn.Linear(config.width, config.vocabulary)
        self.mtp_layers = make_head(config.mtp_head, config.layer, config.vocabulary, config.mtp_modules)
        self.rotary = Rotary(config.layer.size, config.rotary_base)
        self.packed_output: PackedLinear | None = None
        self.dtype = torch.float32
        self._tables: dict[tuple[int, int, torch.dtype], tuple[Rotation, Rotation]] = {}
        self._biases: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def head(self, hidden: Tensor) -> Tensor:
        """(..., width) before the final norm → (..., vocabulary)."""
        return self.output_proj(self.norm(hidden)) if self.packed_output is None else self.packed_output(hidden)

    def text_rotation(self, positions: Tensor) -> Rotation:
        """(T,) text positions, BOS = 0 → Rotation."""
        return self.rotary(positions)

    def speech_rotation(self, positions: Tensor) -> Rotation:
        """(T,) speech rows, SOS = 0 (compatible: positions in the common counter) → Rotation, per head if scaled."""
        config = self.config
        scale = positions.new_ones(config.heads, 1, dtype=torch.float32)
        scale[: config.heads if config.scaled_heads is None else config.scaled_heads] = config.speech_position_scale
        cos, sin = self.rotary(positions * scale)  # (H, T, 1, D)
        # Queries and keys are rotated side by side, hence twice the heads.
        return Rotation(*(part.squeeze(2).transpose(0, 1).repeat(1, 2, 1) for part in (cos, sin)))

    # ---- training ----

    def training_pass(
        self,
        text: Sequence[Tensor],
        tokens: Sequence[Tensor],
        streaming: Tensor,
        modules: int | None = None,
        inputs: Sequence[Tensor] | None = None,
        attention: tuple[int, int] | None = None,
        decoder_logits: bool = True,
    ) -> TrainingPass:
        """Runs a batch offline, with teacher forcing.

        Args:
            text: per sample (T_i, input_size) rows, the end token's last.
            tokens: per sample (S_i,) speech tokens, without EOS.
            streaming: (B,) bool, the mask of each sample.
            modules: how many of the MTP modules to run; default all.
            inputs: per sample (S_i,) what is fed in place of `tokens`, which stay the targets.
            attention: (layer, number of heads) whose attention to the text to return.
            decoder_logits: False spares the decoder's own, which a frozen decoder's modules do not need.
        """
        config = self.config
        chunks = (config.text_chunk, config.speech_chunk)
        head = self.mtp_layers
        group = head.group
        count = head.predictors(config.mtp_modules if modules is None else modules)
        device = self.embedding.weight.device
        text_lengths = torch.tensor([len(rows) + 1 for rows in text], device=device)
        speech_lengths = torch.tensor([len(row) // group + 1 for row in tokens], device=device)
        embedded = self._embed_batch(inputs or tokens)
        speech_in = head.merge(embedded)
        text_in = self.project_batch(pad_sequence(list(text), True))
        text_size, speech_size = text_in.shape[1], speech_in.shape[1]
        x = torch.cat((text_in, speech_in), 1)  # (B, L, width)
        rotation = self._batch_rotation(text_size, speech_size)
        masks = [
            self._bias(training_mask(text_lengths, text_size, speech_size, streaming, *chunks, depth, group))
            for depth in range(1 + len(head.layer_configs(count)))
        ]

        def run(layer: LlamaLayer, hidden: Tensor, depth: int) -> Tensor:
            return layer(hidden, rotation, masks[depth])

        def ahead(depth: int) -> Tensor:
            return F.pad(embedded[:, depth:], (0, 0, text_size, depth))

        watched = None
        for index, layer in enumerate(layers_of(self.decode_layers)):
            if attention is not None and index == attention[0]:
                watched = self._text_attention(layer, x, rotation, masks[0], text_size, attention[1])
            x = run(layer, x, 0)
        rows = torch.arange(speech_size, device=device)[None] < speech_lengths[:, None]  # (B, Ts)
        hidden = x[:, text_size:][rows]
        logits = [self.head(hidden) if decoder_logits else None]
        for predictor, state in enumerate(head.hidden_states(x, run, ahead, count), start=1):
            logits.append(head.logits(state[:, text_size:][rows], predictor, self.output_proj))
        offsets = [0, *(head.offset(predictor) for predictor in range(1, count + 1))]
        full = [F.pad(F.pad(row, (0, 1), value=config.eos), (0, offsets[-1]), value=IGNORE) for row in tokens]
        targets = [
            torch.cat([row[k : k + len(spoken) + 1 : group] for row, spoken in zip(full, tokens, strict=True)])
            for k in offsets
        ]
        return TrainingPass(hidden, logits, targets, None if watched is None else watched[rows])

    def training_loss(
        self,
        text: Sequence[Tensor],
        tokens: Sequence[Tensor],
        streaming: Tensor,
        decay: float = 0.8,
        modules: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """CE₀ + Σ decayᵏ·CE_k, each averaged over its targets. Arguments as in `training_pass`.

        Returns:
            The loss and detached metrics `ce0`, `ce1`, ….
        """
        return token_losses(self.training_pass(text, tokens, streaming, modules), decay)

    def project_batch(self, text: Tensor) -> Tensor:
        """(B, T, input_size), padded behind → (B, 1 + T, width): BOS, then the projected rows. Causal in all masks."""
        x = self.text_input(text)
        rotation = self.text_rotation(torch.arange(text.shape[1], device=text.device))
        rotation = Rotation(*(part.to(self.dtype) for part in rotation))
        for layer in layers_of(self.encode_layers):
            x = layer(x, rotation, causal=True)
        bos = self.embedding(torch.full((len(text), 1), self.config.bos, device=text.device))
        return torch.cat((bos.to(x.dtype), x), 1)

    # ---- streaming ----

    def best_precision(self, wanted: WantedPrecision) -> Precision:
        """What is asked for; "auto": the fastest here that computes every row for itself, whatever the others are.

        Then tokens depend neither on the pieces in which text arrives nor on how many tokens a step has (but for the
        rounding of sums in the text's input). It is int8 by the kernels of `vocalnet.native`, or else fp32.
        """
        config = self.config
        if wanted != "auto":
            return wanted
        fitting = (
            NativeAttention.fits(config.layer) and fits(config.width) and fits(config.ffn, spread_block(config.ffn))
        )
        on_cpu = self.embedding.weight.device.type == "cpu"
        return "int8" if on_cpu and fitting and int8_available() and available() else "fp32"

    def prepare_inference(self, precision: WantedPrecision = "fp32") -> None:
        """Fuses and converts the weights for generation. There is no way back to training."""
        precision = self.best_precision(precision)
        for layer in layers_of(self.encode_layers) + layers_of(self.decode_layers):
            layer.pack(precision)
        self.mtp_layers.pack(precision, self.output_proj)
        self.packed_output = pack_output(self.output_proj, precision, self.norm)
        self.dtype = compute_dtype(precision)
        self.to(self.dtype).requires_grad_(False).eval()

    def init_state(
        self,
        max_text: int = 512,
        max_speech: int = 4096,
        modules: int | None = None,
        streaming: bool = True,
        batch: int = 1,
        fixed: bool = False,
    ) -> SpeechState:
        """An empty state, with all memory allocated.

        Args:
            max_text: most text rows, BOS and end token included.
            max_speech: most speech rows; speech ends there at the latest.
            modules: how many drafts of the MTP head to use, 0 … mtp_modules; default all. A group head makes as many
                as it was trained for.
            streaming: False for the non-streaming mask: all text first, then all speech.
            batch: answers that advance in lockstep; see `vocalnet.batch`.
            fixed: keep counters on the device; see `SpeechState.counters`.

        Raises:
            ConfigError: modules out of range, or fixed shapes where positions depend on how text arrives.
        """
        config = self.config
        count = self.check_modules(modules)
        if fixed and config.compatible:
            raise ConfigError("fixed shapes need a decoder whose text and speech count apart, not a compatible one")
        device = self.embedding.weight.device
        dtype = layers_of(self.decode_layers)[0].cache_dtype(batch, self.dtype)

        def caches(layers: Sequence[LayerConfig], capacity: int) -> list[KVCache]:
            found = [KVCache.allocate(batch, layer, capacity, dtype, device) for layer in layers]
            for cache in found if fixed else []:
                cache.pair.zero_()  # rows not yet written take part, with weight zero
            return found

        common = max_text + max_speech
        return SpeechState(
            max_text,
            max_speech,
            count,
            streaming,
            caches([config.layer] * config.projector_layers, max_text),
            caches([config.layer] * config.layers, common),
            caches(self.mtp_layers.layer_configs(count), common),
            *self._rotations(max_text, max_speech),
            newest=torch.full((batch, self.mtp_layers.group), config.sos, device=device),
            counters=torch.zeros(2, dtype=torch.long, device=device) if fixed else None,
        )

    def check_modules(self, modules: int | None) -> int:
        """The number of drafts to use, all by default.

        Raises:
            ConfigError: the head cannot make that many.
        """
        most, group = self.config.mtp_modules, self.mtp_layers.group
        count = most if modules is None else modules
        if not 0 <= count <= most:
            raise ConfigError(f"modules is {count}; this decoder has {most}, allowed: 0 to that")
        if group > 1 and count != most:
            raise ConfigError(f"modules is {count}; this decoder speaks groups of {group}, allowed: {most}")
        return count

    def _rotations(self, max_text: int, max_speech: int) -> tuple[Rotation, Rotation]:
        """Tables of text and speech positions, made once for each size."""
        key = (max_text, max_speech, self.dtype)
        if key not in self._tables:
            device = self.embedding.weight.device
            rows = torch.arange(max_speech + (max_text if self.config.compatible else 0), device=device)
            speech = rows * self.mtp_layers.group
            tables = self.text_rotation(torch.arange(max_text, device=device)), self.speech_rotation(speech)
            text, speech_table = (Rotation(*(part.to(self.dtype).contiguous() for part in table)) for table in tables)
            self._tables[key] = text, speech_table
        return self._tables[key]

    @torch.no_grad()
    def add_text(self, rows: Tensor, state: SpeechState, last: bool = False) -> None:
        """Gives more of the answer's text.

        Args:
            rows: (T, input_size), any T ≥ 0, see `vocalnet.text_rows`; (B, T, input_size) for several answers.
            last: no text follows; the end token's row is the last one here (released checkpoints and ours need it).

        Raises:
            ConfigError: text after the last, more rows than `max_text`, or a second part without streaming.
        """
        config = self.config
        if state.text_complete:
            raise ConfigError("the text is complete (last=True was given); start a new state for another answer")
        if not state.streaming and not last:
            raise ConfigError("without streaming the text comes in one piece; give all of it with last=True")
        state.text_complete = last
        if config.compatible:
            state.recent = state.recent[:, :0]  # the reference's penalty looks back to the newest text only
        x = self.text_input(rows.to(self.dtype) if rows.ndim == 3 else rows.to(self.dtype)[None])
        size = x.shape[1]
        first = max(state.text_rows - 1, 0)  # BOS does not go through the projector
        if state.text_rows + size + (state.text_rows == 0) > state.max_text:
            raise ConfigError(f"{state.text_rows + size} text rows do not fit max_text {state.max_text}; allow more")
        if size == 0:
            return
        x = self._project(x, first, state)
        if state.text_rows == 0:
            bos = torch.full((x.shape[0], 1), config.bos, device=x.device)
            x = torch.cat((self.embedding(bos), x), 1)
        if config.compatible or state.counters is not None:
            self._cache_text(x, state)
            return
        state.pending = x if state.pending is None else torch.cat((state.pending, x), 1)
        state.text_rows += x.shape[1]

    def _project(self, x: Tensor, first: int, state: SpeechState) -> Tensor:
        """Runs text rows (B, T, width), counted from `first`, through the projector layers."""
        size = x.shape[1]
        if state.counters is None:
            rotation = state.text_rotation.rows(first, first + size)
            placing: tuple[Any, ...] = ()
        else:
            rows = state.counters[0] + (first - state.text_rows) + torch.arange(size, device=x.device)
            rotation = state.text_rotation.at(rows)
            columns = torch.arange(state.max_text, device=x.device)
            placing = (rows, (0, state.max_text), columns <= rows[:, None])
        return step_all(layers_of(self.encode_layers), x, rotation, state.projector, *placing)

    def _place_text(self, state: SpeechState, size: int) -> tuple[Rotation, tuple[Any, ...]]:
        """Rotation of the next `size` text rows, newest first, and where they go and what they see (`step`'s terms)."""
        first, start = state.text_rows, state.max_text - state.text_rows - size
        device = self.embedding.weight.device
        causal = state.streaming or self.config.compatible
        if state.counters is None:
            rotation = Rotation(*(part.flip(-3) for part in state.text_rotation.rows(first, first + size)))
            mask = torch.ones(size, first + size, dtype=torch.bool, device=device).triu() if causal else None
            return rotation, (start, (start, state.max_text), mask)
        rows = state.counters[0] + torch.arange(size - 1, -1, -1, device=device)
        texts = torch.arange(state.max_text - 1, -1, -1, device=device)  # the text row of each column
        mask = texts <= (rows[:, None] if causal else rows[:1])
        return state.text_rotation.at(rows), (state.max_text - 1 - rows, (0, state.max_text), mask)

    def _cache_text(self, x: Tensor, state: SpeechState) -> None:
        """Runs text rows (B, T, width) through decoder and modules for their keys and values."""
        size = x.shape[1]
        x = x.flip(1)  # the caches hold text from right to left
        rotation, rows = self._place_text(state, size)

        def run(layer: LlamaLayer, hidden: Tensor, depth: int) -> Tensor:
            if self.config.compatible:
                hidden = x  # the reference prefills every module with the decoder's states (training chains them)
            return layer.step(hidden, rotation, state.heads[depth - 1], *rows)

        x = step_all(layers_of(self.decode_layers), x, rotation, state.decoder, *rows)
        head = self.mtp_layers
        for _ in head.hidden_states(x, run, lambda depth: torch.zeros_like(x), head.predictors(state.modules)):
            pass
        state.text_rows += size
        if state.counters is not None:
            state.counters[0] += size

    def speech_room(self, state: SpeechState) -> int:
        """The last speech row that may be fed: its own text and that of its modules is all there."""
        full = state.max_speech - 1
        if state.text_complete:
            return full
        if not state.streaming or state.text_rows == 0:
            return -1
        if self.config.compatible:
            return full
        chunks = (self.config.text_chunk, self.config.speech_chunk)
        last = last_speech_row(state.text_rows, *chunks) - state.modules
        return min(full, last // self.mtp_layers.group)

    def feed(self, tokens: Tensor, state: SpeechState) -> Tensor:
        """Runs speech rows through the decoder, after the `speech_rows` that hold; the count is left to the caller.

        Args:
            tokens: (B, n), whole groups where the head groups them.

        Returns:
            (B, rows, width) before the final norm, for `head` and `draft`.
        """
        x = self.mtp_layers.merge(self.embedding(tokens))
        size, texts = x.shape[1], 0
        if state.pending is not None:
            texts = state.pending.shape[1]
            x = torch.cat((state.pending.flip(1), x), 1)
        rotation, row = self._place(state, state.speech_rows, size, texts)
        visible, mask = self._seen(state, state.speech_rows, size, 0, texts)
        x = step_all(layers_of(self.decode_layers), x, rotation, state.decoder, row, visible, mask)
        state.steps += 1
        if not texts:
            return x
        state.pending = None
        if state.heads:
            before = state.pending_states  # text of a step that made no drafts
            state.pending_states = x[:, :texts] if before is None else torch.cat((x[:, :texts], before), 1)
        return x[:, texts:]

    def draft(
        self,
        hidden: Tensor,
        tokens: Tensor,
        state: SpeechState,
        choose: Callable[[Tensor], Tensor],
        revisit: bool = False,
        enough: Callable[[], bool] | None = None,
    ) -> None:
        """Runs the MTP head over rows just fed, before they are counted, and has every draft chosen in turn.

        Args:
            hidden: (B, rows, width) from `feed`: those rows that hold.
            tokens: (B, n + 1) what was fed there, and the certain token after it.
            choose: logits of a draft (B, vocabulary) → the draft (B,).
            revisit: drafts may be refused: run rows whose input was a draft again, now that the truth is known.
            enough: compatibility mode: whether to leave the other modules out, whose caches then stay `behind`.
        """
        head, old = self.mtp_layers, 0
        history = head.look_back + (state.modules - 1 if revisit and head.conditioned else 0)
        if history > 0 and state.tail is not None and state.tail_tokens is not None:
            old = state.tail.shape[1]
            hidden, tokens = torch.cat((state.tail, hidden), 1), torch.cat((state.tail_tokens, tokens), 1)
        size = hidden.shape[1]
        if history > 0:
            state.tail, state.tail_tokens = hidden[:, -history:], tokens[:, :size][:, -history:]
        start, texts = state.speech_rows - old, 0
        if state.pending_states is not None:
            texts = state.pending_states.shape[1]
            hidden = torch.cat((state.pending_states, hidden), 1)
            state.pending_states = None
        rotation, row = self._place(state, start, size, texts)

        def run(layer: LlamaLayer, x: Tensor, depth: int) -> Tensor:
            first = start - state.behind.get(depth, 0)
            placed = (rotation, row) if first == start else self._place(state, first, size, texts)
            visible, mask = self._seen(state, first, size, depth, texts)
            return layer.step(x, placed[0], state.heads[depth - 1], placed[1], visible, mask)

        def ahead(depth: int) -> Tensor:
            return F.pad(self.embedding(tokens[:, depth : depth + size]), (0, 0, texts, 0))

        states = head.hidden_states(hidden, run, ahead, head.predictors(state.modules))
        reached, x = 0, hidden
        for draft in range(1, state.modules + 1):
            predictor, back = head.source(draft)
            if back >= size:
                return  # the first row has none before it
            if enough is not None and enough():
                for depth in range(draft, state.modules + 1):
                    state.behind[depth] = state.behind.get(depth, 0) + size
                return
            if predictor > reached:
                reached, x = predictor, next(states)
            chosen = choose(head.logits(x[:, texts + size - 1 - back], predictor, self.output_proj))
            tokens = torch.cat((tokens, chosen[:, None]), 1)

    def _rows(self, counters: Tensor, state: SpeechState, first: int, size: int) -> Tensor:
        """Speech rows first … first + size - 1 (size,) on the device, by its own counter."""
        return counters[1] + (first - state.speech_rows) + torch.arange(size, device=counters.device)

    def _place_speech(self, state: SpeechState, first: int, size: int) -> tuple[Rotation, int | Tensor]:
        """Rotation and cache rows of `size` speech rows from `first` on."""
        if state.counters is not None:
            rows = self._rows(state.counters, state, first, size)
            return state.speech_rotation.at(rows), state.max_text + rows
        position = first + (state.text_rows if self.config.compatible else 0)
        return state.speech_rotation.rows(position, position + size), state.max_text + first

    def _place(self, state: SpeechState, first: int, size: int, texts: int) -> tuple[Rotation, int | Tensor]:
        """`_place_speech` with the newest `texts` text rows, newest first, before the speech rows."""
        rotation, row = self._place_speech(state, first, size)
        if not texts:
            return rotation, row
        newest = Rotation(
            *(part.flip(-3) for part in state.text_rotation.rows(state.text_rows - texts, state.text_rows))
        )
        both = Rotation(*(torch.cat((a.expand(-1, b.shape[1], -1), b)) for a, b in zip(newest, rotation, strict=True)))
        device, start = self.embedding.weight.device, state.max_text - state.text_rows
        speech = torch.arange(size, device=device) + row
        return both, torch.cat((torch.arange(start, start + texts, device=device), speech))

    def _seen(
        self, state: SpeechState, row: int, size: int, depth: int, texts: int
    ) -> tuple[tuple[int, int], Tensor | None]:
        """`_visible` with the newest `texts` text rows before the speech rows; they see text up to themselves."""
        (first, last), mask = self._visible(state, row, size, depth)
        if not texts:
            return (first, last), mask
        start = state.max_text - state.text_rows
        both = torch.full(
            (texts + size, last - start), float("-inf"), dtype=self.dtype, device=self.embedding.weight.device
        )
        both[texts:, first - start :] = 0 if mask is None else mask
        text = both[:texts, : state.text_rows]
        _ = text.tril_(-1) if state.streaming else text.zero_()  # newest first, so later columns are earlier text
        return (start, last), both

    def visible_texts(self, state: SpeechState, row: int) -> int:
        """How many text rows are visible where token `row` is predicted."""
        if not state.streaming or self.config.compatible:
            return state.text_rows
        return min(state.text_rows, visible_text_count(row, self.config.text_chunk, self.config.speech_chunk))

    def _visible(self, state: SpeechState, row: int, size: int, depth: int) -> tuple[tuple[int, int], Tensor | None]:
        """Cache rows (first, last) that `size` speech rows from `row` on may see at a depth, and the mask over them."""
        if state.counters is not None:
            return self._visible_fixed(state.counters, state, row, size, depth)
        group = self.mtp_layers.group
        counts = [self.visible_texts(state, (row + i + 1) * group - 1 + depth) for i in range(size)]
        first, last = state.max_text - counts[-1], state.max_text + row + size
        if size == 1:
            return (first, last), None
        mask = self._causal_bias(size, state.max_text + state.max_speech)[:, first - last :]
        if counts[0] < counts[-1]:
            mask = mask.clone()
            for i, count in enumerate(counts):
                mask[i, : counts[-1] - count] = float("-inf")
        return (first, last), mask

    def _visible_fixed(
        self, counters: Tensor, state: SpeechState, row: int, size: int, depth: int
    ) -> tuple[tuple[int, int], Tensor]:
        """`_visible` over whole caches, by the device's counters; the mask is bool."""
        config, group = self.config, self.mtp_layers.group
        rows = self._rows(counters, state, row, size)[:, None]  # (size, 1)
        columns = torch.arange(state.max_text + state.max_speech, device=counters.device)
        texts = state.max_text - 1 - columns
        seen = texts < counters[0]
        if state.streaming:
            last = (rows + 1) * group - 1 + depth
            seen = seen & visible_text(texts, last, config.text_chunk, config.speech_chunk)
        mask = torch.where(texts >= 0, seen, columns - state.max_text <= rows)
        return (0, state.max_text + state.max_speech), mask

    def _causal_bias(self, size: int, capacity: int) -> Tensor:
        """(size, capacity) to add to scores: of the newest `size` columns each row sees those up to its own."""
        key = (size, capacity, self.dtype)
        if key not in self._biases:
            bias = torch.full((size, capacity), float("-inf"), dtype=self.dtype, device=self.embedding.weight.device)
            self._biases[key] = bias.triu_(capacity - size + 1)
        return self._biases[key]

    # ---- parts ----

    def _embed_batch(self, tokens: Sequence[Tensor]) -> Tensor:
        """Per sample (S_i,) → (B, S, width): the input rows, SOS first; whole groups, of what fills them."""
        config, group = self.config, self.mtp_layers.group
        rows = [F.pad(row[: len(row) // group * group], (group, 0), value=config.sos) for row in tokens]
        return self.embedding(pad_sequence(rows, True, config.units + 3))

    def _text_attention(
        self, layer: LlamaLayer, x: Tensor, rotation: Rotation, bias: Tensor, text_size: int, heads: int
    ) -> Tensor:
        """(B, Ts, heads, Tt) log attention of speech rows over visible text, as if there were no speech to see."""
        size = layer.config.size
        x = layer.input_layernorm(x)
        # The first heads of queries and keys; rotation may differ by head.
        turn = Rotation(*(part[:, :heads] for part in rotation))
        weight = torch.cat(
            (layer.self_attn.q_proj.weight[: heads * size], layer.self_attn.k_proj.weight[: heads * size])
        )
        q, k = F.linear(x, weight).view(*x.shape[:2], 2 * heads, size).chunk(2, 2)
        q, k = rotate(q, turn)[:, text_size:], rotate(k, turn)[:, :text_size]
        scores = torch.einsum("bshd,bthd->bsht", q, k).float() * size**-0.5
        return (scores + bias[:, 0, text_size:, None, :text_size].float()).log_softmax(-1)

    def _bias(self, mask: Tensor) -> Tensor:
        """(B, L, L) bool → (B, 1, L, L) floats to add to the scores, in the dtype of the attention."""
        dtype = self.embedding.weight.dtype
        if torch.is_autocast_enabled(mask.device.type):
            dtype = torch.get_autocast_dtype(mask.device.type)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))[:, None]

    def _batch_rotation(self, text_size: int, speech_size: int) -> Rotation:
        """Positions of the padded layout [text | speech], as Rotation of (L, 2·heads, head_dim)."""
        device = self.embedding.weight.device
        text = self.text_rotation(torch.arange(text_size, device=device))
        # The reference counts on from the padded text.
        start = text_size if self.config.compatible else 0
        positions = start + self.mtp_layers.group * torch.arange(speech_size, device=device)
        speech = self.speech_rotation(positions)
        return Rotation(*(torch.cat((a.expand(-1, b.shape[1], -1), b)) for a, b in zip(text, speech, strict=True)))


def token_losses(
    result: TrainingPass, decay: float, accuracy: bool = False, normalised: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of cross entropies, with CE and if asked top-1 accuracy per predictor as metrics.

    Predictor k weighs decayᵏ; `normalised` makes the weights of all but the decoder's own sum to 1 (FastMTP).
    """
    shares = sum(decay**k for k in range(1, len(result.logits))) if normalised else 1.0
    total = result.hidden.new_zeros((), dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    for k, (logits, targets) in enumerate(zip(result.logits, result.targets, strict=True)):
        if logits is None:
            continue
        loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE)
        total = total + (decay**k / shares if k else 1.0) * loss
        metrics[f"ce{k}"] = loss.detach()
        if accuracy:
            metrics[f"accuracy{k}"] = (logits.argmax(-1) == targets).sum() / (targets != IGNORE).sum()
    return total, metrics
