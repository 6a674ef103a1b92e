"""SpeechAdapter: encoder frames (50 Hz) → positions at the LLM's width (10 Hz), with a CTC head.

    frames (B, T, 512) → k concatenated (B, T/k, 512·k) → [LayerNorm] → [± context] → Linear → GELU → Linear
    → [RMS norm · gain]

Two ways to feed the LLM:
- "frames": every position, VocalNet's form (10 rows a second, keeps prosody);
- "collapsed": the CTC head reads the positions as LLM tokens; blanks are dropped, repeats merged, and each token
  becomes the expected embedding Σ p(token) · E(token): as short as the written question, on the LLM's own manifold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vocalnet.errors import ConfigError, DataError

BLANK = 0  # CTC class 0; class i + 1 is vocabulary[i]


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes and form; the defaults are mini's. A released VocalNet has relu, no norms, mode frames, no vocabulary."""

    encoder_width: int = 512
    stack: int = 5
    context: int = 0  # positions on either side that a position also sees
    hidden: int = 1024
    width: int = 576  # of the LLM
    mode: Literal["frames", "collapsed"] = "collapsed"
    activation: Literal["gelu", "relu"] = "gelu"
    input_norm: bool = True
    output_norm: bool = True
    gain: float = 0.136  # initial RMS of the output: that of SmolLM2's embeddings
    dropout: float = 0.1
    partial: bool = True  # whether fewer than `stack` frames at the end make a position
    vocabulary: int = 0  # how many LLM tokens the CTC head knows; 0: no CTC head


class SpeechAdapter(nn.Module):
    """Maps encoder frames to the LLM's input space.

    The CTC head scores positions by scaled cosine against the LLM's embedding table and one learned blank, so it adds
    nothing but that blank, a scale and a bias. The table itself is not saved with the adapter: call `attach`.
    """

    vocabulary: Tensor  # (V,) LLM token ids, ascending
    table: Tensor  # (V, width) their embeddings

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        if config.mode == "collapsed" and not config.vocabulary:
            raise ConfigError("adapter.mode is 'collapsed' with vocabulary 0; set vocabulary, or use mode 'frames'")
        self.config = config
        stacked = config.encoder_width * config.stack
        self.norm = nn.LayerNorm(stacked) if config.input_norm else nn.Identity()
        self.linear1 = nn.Linear(stacked * (1 + 2 * config.context), config.hidden)
        self.linear2 = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)
        if config.output_norm:
            self.gain = nn.Parameter(torch.full((config.width,), config.gain))
        if config.vocabulary:
            self.blank = nn.Parameter(torch.randn(config.width) * 0.1)
            self.ctc_scale = nn.Parameter(torch.tensor(1.5))
            self.blank_bias = nn.Parameter(torch.zeros(()))
            self.register_buffer("vocabulary", torch.zeros(config.vocabulary, dtype=torch.long))
            self.register_buffer("table", torch.zeros(config.vocabulary, config.width), persistent=False)

    def set_vocabulary(self, token_ids: Sequence[int]) -> None:
        """Chooses the LLM tokens that the CTC head knows (before `attach`).

        Raises:
            ConfigError: their number is not `config.vocabulary`.
        """
        ids = sorted(set(token_ids))
        if len(ids) != self.config.vocabulary:
            raise ConfigError(f"{len(ids)} distinct token ids; adapter.vocabulary is {self.config.vocabulary}")
        self.vocabulary.copy_(torch.tensor(ids))

    def with_vocabulary(self, token_ids: Sequence[int]) -> SpeechAdapter:
        """The same adapter with a CTC head that knows other LLM tokens; its weights do not depend on them."""
        ids = sorted(set(token_ids))
        other = SpeechAdapter(replace(self.config, vocabulary=len(ids)))
        other.load_state_dict(self.state_dict() | {"vocabulary": torch.tensor(ids)})
        return other

    def attach(self, embeddings: Tensor) -> None:
        """Takes the vocabulary's rows of the LLM's input embedding table (all tokens, width)."""
        if embeddings.shape[-1] != self.config.width:
            raise ConfigError(
                f"the LLM's embeddings have width {embeddings.shape[-1]}; adapter.width is {self.config.width}"
            )
        if self.config.vocabulary:
            self.table.copy_(embeddings[self.vocabulary.to(embeddings.device)].detach())

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encoder frames (B, T, encoder_width), lengths (B,) in frames → positions (B, ⌈T/k⌉, width), lengths (B,)."""
        batch, length, _ = frames.shape
        if lengths is None:
            lengths = torch.full((batch,), length, device=frames.device)
        else:  # what lies beyond a sample's end must not enter its last position
            frames = frames * (torch.arange(length, device=frames.device) < lengths[:, None])[..., None]
        k = self.config.stack
        if not self.config.partial:
            lengths, length = lengths - lengths % k, length - length % k
            frames = frames[:, :length]
        stacked = F.pad(frames, (0, 0, 0, -length % k)).reshape(batch, -(-length // k), -1)  # (B, T/k, 512·k)
        hidden = self.linear1(self._with_context(self.norm(stacked.to(self.linear1.weight.dtype)), lengths))
        hidden = F.gelu(hidden) if self.config.activation == "gelu" else F.relu(hidden)
        out = self.linear2(self.dropout(hidden))
        if self.config.output_norm:
            out = F.rms_norm(out.float(), (out.shape[-1],), eps=1e-6).to(out.dtype) * self.gain
        return out, (lengths + k - 1) // k

    def _with_context(self, stacked: Tensor, lengths: Tensor) -> Tensor:
        """(B, P, S) → (B, P, S·(1 + 2·context)): each position between its neighbours, zeros beyond the ends."""
        context, count = self.config.context, stacked.shape[1]
        if not context:
            return stacked
        ends = (lengths + self.config.stack - 1) // self.config.stack
        valid = torch.arange(count, device=stacked.device) < ends[:, None]
        padded = F.pad(stacked * valid[..., None], (0, 0, context, context))
        return torch.cat([padded[:, i : i + count] for i in range(1 + 2 * context)], dim=-1)

    def embeddings(self, frames: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """What stands at the prompt's `<speech>`: one (n, width) per sample; n may be 0 if no word was recognised."""
        return self.rows(*self(frames, lengths))

    def rows(self, hidden: Tensor, lengths: Tensor) -> list[Tensor]:
        """As `embeddings`, of `forward`'s output."""
        if self.config.mode == "collapsed":
            return self.collapse(hidden, lengths)
        return [hidden[i, :n] for i, n in enumerate(lengths.tolist())]

    def ctc_logits(self, hidden: Tensor) -> Tensor:
        """(…, T, width) → (…, T, 1 + V) float32; class 0 is the blank."""
        with torch.autocast(hidden.device.type, enabled=False):  # logits reach ±50: bf16 would round them to 0.25
            direction = F.normalize(hidden.float(), dim=-1)
            # Apart from the table, which is frozen: its gradient would cost as much as the whole forward pass.
            blank = direction @ F.normalize(self.blank.float(), dim=0)
            words = direction @ F.normalize(self.table.float(), dim=-1).T
            cosine = torch.cat([blank[..., None], words], dim=-1)
            logits = cosine * (self.ctc_scale.float().abs() * self.config.width**0.5)
            return logits + F.pad(self.blank_bias.float()[None], (0, self.config.vocabulary))

    def ctc_loss(self, hidden: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        """Connectionist temporal classification (Graves et al. 2006), per target token, averaged.

        Args:
            hidden: (B, T, width) from `forward`.
            lengths: (B,) valid positions.
            targets: per sample, the LLM token ids of the question.

        Raises:
            DataError: a token outside the vocabulary.
        """
        classes = torch.cat([self.classes_of(ids) for ids in targets])
        counts = torch.tensor([len(ids) for ids in targets], device=hidden.device)
        log_probabilities = self.ctc_logits(hidden).log_softmax(-1).transpose(0, 1)  # (T, B, 1 + V)
        return F.ctc_loss(log_probabilities, classes, lengths, counts, blank=BLANK, zero_infinity=True)

    def classes_of(self, token_ids: Sequence[int]) -> Tensor:
        """LLM token ids → CTC classes (n,).

        Raises:
            DataError: a token outside the vocabulary.
        """
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self.vocabulary.device)
        index = torch.searchsorted(self.vocabulary, ids).clamp(max=len(self.vocabulary) - 1)
        unknown = ids[self.vocabulary[index] != ids]
        if len(unknown):
            raise DataError(f"LLM tokens {sorted(set(unknown.tolist()))} are not in the adapter's CTC vocabulary")
        return index + 1

    def collapse(self, hidden: Tensor, lengths: Tensor) -> list[Tensor]:
        """Positions (B, T, width) → per sample (n, width): expected embeddings of the n tokens that CTC reads there."""
        logits = self.ctc_logits(hidden)
        token, first = _greedy_runs(logits, lengths)  # (B, T) each
        spoken = token != BLANK
        run = first.flatten().cumsum(0).view_as(first)[spoken] - 1  # (M,) which run each spoken position is in
        expected = logits[spoken][:, 1:].softmax(-1) @ self.table.float()  # (M, width)
        runs = int(first.sum())
        size = torch.bincount(run, minlength=runs)[:, None]
        merged = expected.new_zeros(runs, expected.shape[-1]).index_add(0, run, expected) / size
        return list(merged.to(hidden.dtype).split(first.sum(1).tolist()))

    def transcribe(self, hidden: Tensor, lengths: Tensor) -> list[list[int]]:
        """Greedy CTC reading of (B, T, width): per sample, LLM token ids."""
        token, first = _greedy_runs(self.ctc_logits(hidden), lengths)
        return [self.vocabulary[t[f] - 1].tolist() for t, f in zip(token, first, strict=True)]


def _greedy_runs(logits: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Best class of each position (B, T), blank beyond the length, and where a run of one token starts (B, T) bool."""
    valid = torch.arange(logits.shape[1], device=logits.device) < lengths[:, None]
    token = torch.where(valid, logits.argmax(-1), BLANK)
    before = F.pad(token[:, :-1], (1, 0), value=BLANK)
    return token, (token != BLANK) & (token != before)
