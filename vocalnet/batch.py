"""Many answers at once: speech tokens of several complete texts, each row at its own pace.

Rows of a batch accept different numbers of drafts and end at different times, so every row has its own place in the
caches, held on the device. One step feeds the same number of tokens to all rows; what a row does not keep is
overwritten by its next step, and hidden until then by the causal mask. The host reads each step once.

    cache columns     text 0 … T - 1 | speech 0 … S - 1 | scratch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vocalnet.decoding import DecodingConfig, DecodingMode, check_decoding, verify
from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LlamaLayer, Rotation
from vocalnet.mask import training_mask, visible_text
from vocalnet.sampling import SamplingConfig, draw, penalise, probabilities
from vocalnet.speech_decoder import SpeechDecoder, layers_of


@torch.no_grad()
def generate_batch(
    decoder: SpeechDecoder,
    texts: Sequence[Tensor],
    sampling: SamplingConfig | None = None,
    max_tokens: int | Sequence[int] = 1024,
    decoding: DecodingConfig | DecodingMode = "accept-all",
    modules: int | None = None,
    streaming: bool = True,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The speech tokens of each text, up to EOS or its limit; greedy, the same as one by one with `generate_chunk`.

    Args:
        texts: each (T_i, input_size), the end token's row last.
        max_tokens: one limit for all, or one each.
        modules: drafts a step; default all.
        streaming: the mask, as in `SpeechDecoder.init_state`.

    Raises:
        ConfigError: no text, limits of another number, or settings that the decoder cannot follow.
    """
    limits = [max_tokens] * len(texts) if isinstance(max_tokens, int) else list(max_tokens)
    if not texts or len(limits) != len(texts):
        raise ConfigError(f"{len(texts)} texts and {len(limits)} limits; give at least one text, and a limit for each")
    config = decoding if isinstance(decoding, DecodingConfig) else DecodingConfig(decoding)
    check_decoding(config, decoder)
    if decoder.config.compatible:
        raise ConfigError("a decoder in compatibility mode speaks one answer at a time; use generate_chunk")
    batch = _Batch(decoder, texts, max(limits), decoder.check_modules(modules), streaming)
    speaker = _Speaker(batch, sampling or SamplingConfig(), config, generator)
    answers: list[list[int]] = [[] for _ in texts]
    alive = [limit > 0 for limit in limits]
    while any(alive):
        for row, new in enumerate(speaker.step(torch.tensor(alive, device=batch.starts.device))):
            if not alive[row]:
                continue
            ended = decoder.config.eos in new
            answers[row] += new[: new.index(decoder.config.eos)] if ended else new
            alive[row] = not ended and len(answers[row]) < limits[row]
    return [answer[:limit] for answer, limit in zip(answers, limits, strict=True)]


class _Batch:
    """The caches, with the texts in them, and the arithmetic of speech rows."""

    def __init__(
        self, decoder: SpeechDecoder, texts: Sequence[Tensor], max_tokens: int, modules: int, streaming: bool
    ) -> None:
        config, head = decoder.config, decoder.mtp_layers
        self.decoder = decoder
        self.modules = modules
        self.streaming = streaming
        device = decoder.embedding.weight.device
        self.text_lengths = torch.tensor([len(text) + 1 for text in texts], device=device)
        self.text_size = max(len(text) for text in texts) + 1
        self.starts = torch.zeros(len(texts), dtype=torch.long, device=device)  # first free speech row of each answer
        self.longest = 0  # the greatest of them, known to the host
        self.capacity = max_tokens + 2 * (modules + 1)
        columns = self.text_size + self.capacity + 1

        def caches(count: int) -> list[KVCache]:
            # Columns that one answer has not written yet are read, masked, with another's: hence zeros.
            form = (len(texts), config.layer, columns, decoder.cache_dtype, device, True)
            return [KVCache.allocate(*form) for _ in range(count)]

        self.caches = caches(config.layers)
        self.head_caches = caches(len(head.layer_configs(modules)))
        positions = head.group * torch.arange(self.capacity, device=device)
        self.rotation = Rotation(*(part.to(decoder.dtype) for part in decoder.speech_rotation(positions)))
        self._read([text.to(decoder.dtype) for text in texts])

    def _read(self, texts: Sequence[Tensor]) -> None:
        """Fills the text columns of all caches."""
        decoder, size = self.decoder, self.text_size
        x = decoder.project_batch(pad_sequence(list(texts), True))
        rotation = Rotation(*(part.to(x.dtype) for part in decoder.text_rotation(torch.arange(size, device=x.device))))
        coins = torch.full((len(texts),), self.streaming, device=x.device)
        mask = training_mask(self.text_lengths, size, 0, coins, 1, 1)[:, None]  # (B, 1, T, T)

        def run(layer: LlamaLayer, hidden: Tensor, depth: int) -> Tensor:
            return layer.step(hidden, rotation, self.head_caches[depth - 1], 0, (0, size), mask)

        for layer, cache in zip(layers_of(decoder.decode_layers), self.caches, strict=True):
            x = layer.step(x, rotation, cache, 0, (0, size), mask)
        head = decoder.mtp_layers
        for _ in head.hidden_states(x, run, lambda depth: torch.zeros_like(x), head.predictors(self.modules)):
            pass

    def run(self, layer: LlamaLayer, x: Tensor, cache: KVCache, rows: Tensor, depth: int) -> Tensor:
        """One layer over speech rows `rows` (B, n) of states (B, n, width); rows below 0 go to the scratch column."""
        scratch = self.text_size + self.capacity
        columns = torch.where(rows < 0, scratch, rows + self.text_size)
        safe = rows.clamp(min=0)
        rotation = Rotation(self.rotation.cos[safe], self.rotation.sin[safe])
        last = min(self.text_size + self.longest + x.shape[1], scratch)
        return layer.step(x, rotation, cache, columns, (0, last), self._mask(safe, last, depth))

    def _mask(self, rows: Tensor, last: int, depth: int) -> Tensor:
        """(B, 1, n, last) bool: what speech rows (B, n) see of the first `last` columns at a depth."""
        config, group = self.decoder.config, self.decoder.mtp_layers.group
        text = torch.arange(self.text_size, device=rows.device)
        seen = (text < self.text_lengths[:, None])[:, None]  # (B, 1, T)
        if self.streaming:
            row = ((rows + 1) * group - 1 + depth)[..., None]
            seen = seen & visible_text(text, row, config.text_chunk, config.speech_chunk)
        speech = torch.arange(last - self.text_size, device=rows.device) <= rows[..., None]
        return torch.cat((seen.expand(-1, rows.shape[1], -1), speech), 2)[:, None]

    def feed(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n) at the free rows → states (B, rows, width)."""
        decoder = self.decoder
        x = decoder.mtp_layers.merge(decoder.embedding(tokens))
        rows = self.starts[:, None] + torch.arange(x.shape[1], device=x.device)
        for layer, cache in zip(layers_of(decoder.decode_layers), self.caches, strict=True):
            x = self.run(layer, x, cache, rows, 0)
        return x

    def may_end(self, tokens: Tensor) -> Tensor:
        """(B, n) bool: whether all text is visible where tokens number `tokens` (B, n) are predicted."""
        if not self.streaming:
            return torch.ones_like(tokens, dtype=torch.bool)
        config = self.decoder.config
        return visible_text(self.text_lengths[:, None] - 1, tokens, config.text_chunk, config.speech_chunk)


@dataclass
class _Tail:
    """The newest rows of each answer, which some heads read or run again."""

    hidden: Tensor  # (B, h, width)
    tokens: Tensor  # (B, h) what was fed there


class _Speaker:
    """Steps a batch: feeds, checks, drafts."""

    def __init__(
        self, batch: _Batch, sampling: SamplingConfig, config: DecodingConfig, generator: torch.Generator | None
    ) -> None:
        decoder, head = batch.decoder, batch.decoder.mtp_layers
        self.batch, self.sampling, self.config, self.generator = batch, sampling, config, generator
        size, device = len(batch.starts), batch.starts.device
        self.newest = torch.full((size, head.group), decoder.config.sos, device=device)
        self.offered = torch.zeros(size, dtype=torch.long, device=device)  # how many of newest[:, 1:] count
        self.made = torch.zeros(size, dtype=torch.long, device=device)  # certain tokens so far
        self.laws: Tensor | None = None  # (B, K, V) that the drafts were drawn from
        self.recent = torch.full((size, max(1, sampling.penalty_window)), -1, device=device)
        self.history = head.look_back + (0 if config.keeps_drafts or not head.conditioned else batch.modules - 1)
        hidden = torch.zeros(size, self.history, decoder.config.width, device=device, dtype=decoder.dtype)
        self.tail = _Tail(hidden, torch.full((size, self.history), decoder.config.sos, device=device))
        self.first = True

    def step(self, alive: Tensor) -> list[list[int]]:
        """One step of all answers; the new certain tokens of each. Rows that are not `alive` (B,) stand still."""
        batch, group = self.batch, self.batch.decoder.mtp_layers.group
        fed = self.newest
        hidden = batch.feed(fed)
        if self.config.mode == "accept-all":
            hold = self.offered + 1 if group == 1 else torch.ones_like(self.offered)
            logits = batch.decoder.head(pick(hidden, hold - 1))
            token = self._choose(logits, [])[0]
            drafts, sure = self._draft(hidden, fed, hold, token)
            new, count = torch.cat((token[:, None], drafts), 1), 1 + sure
        else:
            scores = self._scores(batch.decoder.head(hidden), list(fed[:, 1:].unbind(1)))
            passed, token = verify(
                scores, fed[:, 1:], self.laws, self.sampling, self.config, self.generator, self.offered
            )
            hold = passed + 1
            new = torch.cat((fed[:, 1:], token[:, None]), 1)
            new.scatter_(1, passed[:, None], token[:, None])
            count = hold
            self._remember(new, count)
            drafts, sure = self._draft(hidden, fed, hold, token)
        if self.config.mode == "accept-all":
            self._remember(new, count)
        batch.starts += hold * alive
        self.newest, self.offered, self.first = torch.cat((token[:, None], drafts), 1), sure, False
        read = torch.cat((new, count[:, None], batch.starts[:, None]), 1).tolist()
        batch.longest = max(row[-1] for row in read)
        return [row[: row[-2]] for row in read]

    def _remember(self, new: Tensor, count: Tensor) -> None:
        """Counts the first `count` (B,) of new tokens (B, n) as certain."""
        self.made = self.made + count
        both = torch.cat((self.recent, new), 1)
        self.recent = both.gather(1, count[:, None] + torch.arange(self.recent.shape[1], device=both.device))

    def _draft(self, hidden: Tensor, fed: Tensor, hold: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts (B, K) after the certain `token` (B,), and how many of them are sure enough (B,).

        Args:
            hidden: (B, n, width) of the rows just fed, the first `hold` (B,) of which stand.
            fed: (B, n) tokens.
        """
        batch, head = self.batch, self.batch.decoder.mtp_layers
        old, count = self.history, batch.modules
        rows = torch.cat((self.tail.hidden, hidden), 1)
        size = rows.shape[1]
        places = batch.starts[:, None] - old + torch.arange(size, device=hidden.device)
        tokens = F.pad(torch.cat((self.tail.tokens, fed), 1), (0, count + 1))
        tokens.scatter_(1, (old + hold)[:, None], token[:, None])
        if old:
            kept = hold[:, None] + torch.arange(old, device=hold.device)
            self.tail = _Tail(rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[2])), tokens.gather(1, kept))

        def run(layer: LlamaLayer, x: Tensor, depth: int) -> Tensor:
            return batch.run(layer, x, batch.head_caches[depth - 1], places, depth)

        def ahead(depth: int) -> Tensor:
            return batch.decoder.embedding(tokens[:, depth : depth + size])

        states = head.hidden_states(rows, run, ahead, head.predictors(count))
        chosen: list[Tensor] = [] if self.config.mode != "accept-all" else [token]
        kept_laws, likely, drafts, reached, x = [], [], list[Tensor](), 0, rows
        for draft in range(1, count + 1):
            predictor, back = head.source(draft)
            if self.first and back:
                break  # the first row has none before it
            if predictor > reached:
                reached, x = predictor, next(states)
            at = pick(x, old + hold - 1 - back)
            picked, law, chance = self._choose(head.logits(at, predictor, batch.decoder.output_proj), chosen)
            chosen.append(picked)
            drafts.append(picked)
            likely.append(chance)
            kept_laws += [law] if law is not None else []
            tokens.scatter_(1, (old + hold + draft)[:, None], picked[:, None])
        self.laws = torch.stack(kept_laws, 1) if kept_laws else None
        if not drafts:
            return token.new_empty(len(token), 0), torch.zeros_like(token)
        sure = torch.full_like(token, len(drafts))
        if self.config.confidence:
            sure = (torch.stack(likely, 1) >= self.config.confidence).long().cumprod(1).sum(1)
        return torch.stack(drafts, 1), sure

    def _choose(self, logits: Tensor, before: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits (B, V) → token (B,), what it was drawn from (None: greedy), and its probability to its head (B,)."""
        scores = self._scores(logits[:, None], before)[:, 0]
        law = None if self.sampling.temperature == 0 else probabilities(scores, self.sampling)
        token = scores.argmax(-1) if law is None else draw(law, self.generator)
        chance = scores.softmax(-1).gather(1, token[:, None])[:, 0] if self.config.confidence else scores[:, 0]
        return token, law, chance

    def _scores(self, logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """As `_Step.scores` in `vocalnet.decoding`, with each row's own history."""
        config, sampling, logits = self.batch.decoder.config, self.sampling, logits.float()
        rows = logits.shape[1]
        first = self.made + (len(tokens) if rows == 1 else 0)
        numbers = first[:, None] + torch.arange(rows, device=first.device)
        logits[..., config.units : config.eos] = float("-inf")
        logits[..., config.eos + 1 :] = float("-inf")
        logits[..., config.eos].masked_fill_(~self.batch.may_end(numbers), float("-inf"))
        if sampling.repetition_penalty == 1 or not sampling.penalty_window:
            return logits
        history = torch.cat((self.recent, *(token[:, None] for token in tokens)), 1)
        history = history[:, -(sampling.penalty_window + rows - 1) :].unfold(1, sampling.penalty_window, 1)
        return penalise(logits.flatten(0, 1), history.flatten(0, 1), sampling).view(logits.shape)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Row `rows[b]` of each sample of (B, n, width) → (B, width)."""
    return x[torch.arange(len(x), device=x.device), rows]
