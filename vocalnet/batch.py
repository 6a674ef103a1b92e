"""Many answers at once: every step reads each weight once for all of them.

`generate_batch` speaks complete texts, each row at its own pace. Rows accept different numbers of drafts and end at
different times, so every row has its own place in the caches, held on the device. One step feeds the same number of
tokens to all rows; what a row does not keep is overwritten by its next step, and hidden until then by the causal mask.
The host reads each step once.

    cache columns     text 0 … T - 1 | speech 0 … S - 1 | scratch

`Lockstep` streams texts that grow together, at one pace for all rows.

Both say greedily what each answer would say alone (`vocalnet.decoding.generate_chunk`), and choose tokens as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vocalnet.decoding import DecodingConfig, DecodingMode, allowed_scores, check_decoding, choose, verify
from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LlamaLayer, Rotation
from vocalnet.mask import training_mask, visible_text, visible_text_count
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder, layers_of

Graph = Callable[[], None]
"""Replays a captured step."""


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
    """The speech tokens of each text, up to EOS or its limit; greedy and in fp32, those of `generate_chunk` one by one.

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
            new = [KVCache.allocate(len(texts), config.layer, columns, decoder.dtype, device) for _ in range(count)]
            for cache in new:
                cache.pair.zero_()  # columns that one answer has not written yet are read, masked, with another's
            return new

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
        token, law = choose(scores, self.sampling, self.generator)
        chance = scores.softmax(-1).gather(1, token[:, None])[:, 0] if self.config.confidence else scores[:, 0]
        return token, law, chance

    def _scores(self, logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """`allowed_scores` of each row's next tokens (B, n, vocabulary), which come after `tokens`."""
        rows = logits.shape[1]
        first = self.made + (len(tokens) if rows == 1 else 0)
        may_end = self.batch.may_end(first[:, None] + torch.arange(rows, device=first.device))
        return allowed_scores(logits, self.batch.decoder.config, may_end, self.recent, tokens, self.sampling)


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Row `rows[b]` of each sample of (B, n, width) → (B, width)."""
    return x[torch.arange(len(x), device=x.device), rows]


class Lockstep:
    """Answers streamed side by side: all get equally many text rows at a time and take all drafts of every step
    (accept-all), so that one state and one count of rows serve them all; each stops at its own end.

    Tokens stay on the device, EOS and what follows it included: the host reads them once a chunk. On a CUDA device the
    steps can be captured as graphs: each shape of step runs once as it is, is captured the second time, and is replayed
    from then on. Kernels then follow each other without waiting for the host.
    """

    def __init__(
        self,
        decoder: SpeechDecoder,
        batch: int = 1,
        modules: int | None = None,
        max_text: int = 512,
        max_speech: int = 4096,
        sampling: SamplingConfig | None = None,
        generator: torch.Generator | None = None,
        fixed: bool = False,
        capture: bool = False,
    ) -> None:
        """
        Args:
            modules, max_text, max_speech: as in `SpeechDecoder.init_state`.
            fixed: steps of fixed shapes (`SpeechState.counters`); on a CPU slower, for it attends to whole caches.
            capture: replay steps as CUDA graphs; implies `fixed`.

        Raises:
            ConfigError: no answers, capture without CUDA, or a decoder in compatibility mode.
        """
        self.device = decoder.embedding.weight.device
        if batch < 1:
            raise ConfigError(f"batch is {batch}; allowed: 1 or more answers")
        if capture and self.device.type != "cuda":
            raise ConfigError(f"graphs can be captured on cuda only, not {self.device.type}; leave capture off")
        if decoder.config.compatible:
            raise ConfigError("answers in lockstep need a decoder of our own form, not a compatible one")
        self.decoder = decoder
        self.sampling = sampling or SamplingConfig()
        self.generator = generator
        self.capture = capture
        self.state = decoder.init_state(max_text, max_speech, modules, True, batch, fixed or capture)
        window = max(1, self.sampling.penalty_window)
        self.state.recent = torch.full((batch, window), -1, dtype=torch.long, device=self.device)
        step = (self.state.modules + 1) * 2
        self.tokens = torch.empty(batch, max_speech * decoder.mtp_layers.group + step, dtype=torch.long).to(self.device)
        self.made = 0
        self.handed_out = 0
        self.ended = [False] * batch
        self._graphs: dict[tuple[object, ...], Graph | None] = {}
        self._text_inputs: dict[tuple[int, ...], Tensor] = {}
        self._text_complete = torch.zeros((), dtype=torch.bool, device=self.device)
        self._made = torch.zeros((), dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def add_text(self, rows: Tensor, last: bool = False) -> None:
        """Gives every answer more of its text: rows (B, T, input_size). See `SpeechDecoder.add_text`."""
        state = self.state
        if last:
            self._text_complete.fill_(True)
        if not self.capture or state.text_rows == 0 or state.text_complete or last or not rows.shape[1]:
            self.decoder.add_text(rows, state, last)
            return
        if state.text_rows + rows.shape[1] > state.max_text:
            raise ConfigError(f"{state.text_rows + rows.shape[1]} text rows do not fit max_text {state.max_text}")
        held = self._text_inputs.setdefault(tuple(rows.shape), torch.empty_like(rows, device=self.device))
        held.copy_(rows)
        before = state.text_rows
        self._replay(("text", *rows.shape), lambda: self.decoder.add_text(held, state))
        state.text_rows = before + rows.shape[1]

    @torch.inference_mode()
    def generate(self, max_tokens: int) -> list[list[int]]:
        """Up to `max_tokens` further tokens of each answer, without EOS; fewer if text is missing or it has ended.

        One answer's tokens do not depend on the others, and equal those of `generate_chunk` when greedy and in fp32.
        """
        state, group = self.state, self.decoder.mtp_layers.group
        while self.made - self.handed_out < max_tokens and not all(self.ended):
            rows = state.newest.shape[1] // group
            if state.speech_rows + rows > state.max_speech:
                break
            if self.decoder.speech_room(state) + 1 - state.speech_rows < rows:
                break
            self._step(rows)
        read = min(self.made, self.handed_out + max_tokens)
        found = self.tokens[:, self.handed_out : read].tolist()  # the one time that the host waits
        self.handed_out = read
        return [self._until_end(index, values) for index, values in enumerate(found)]

    def _until_end(self, index: int, values: list[int]) -> list[int]:
        """An answer's new tokens up to its EOS."""
        if self.ended[index]:
            return []
        eos = self.decoder.config.eos
        if eos in values:
            self.ended[index] = True
            values = values[: values.index(eos)]
        return values

    def _step(self, rows: int) -> None:
        """One step: draws tokens after the newest, adds them to `tokens`, and counts rows on host and device."""
        state = self.state
        made, speech_rows, steps = self.made, state.speech_rows, state.steps
        if not self.capture:
            self._run_step()
        else:
            tail = None if state.tail is None else state.tail.shape
            self._replay(("speech", state.newest.shape, tail), self._run_step)
        self.made = made + state.newest.shape[1]
        state.speech_rows, state.steps = speech_rows + rows, steps + 1

    def _run_step(self) -> None:
        """What a step does on the device."""
        decoder, state = self.decoder, self.state
        fed = state.newest
        hidden = decoder.feed(fed, state)
        chosen: list[Tensor] = []

        def take(logits: Tensor) -> Tensor:
            chosen.append(self._choose(logits, chosen))
            return chosen[-1]

        token = take(decoder.head(hidden[:, -1]))
        decoder.draft(hidden, torch.cat((fed, token[:, None]), 1), state, take)
        tokens = torch.stack(chosen, 1)  # (B, K + 1)
        self.tokens.index_copy_(1, self._made + torch.arange(tokens.shape[1], device=self.device), tokens)
        self._made += tokens.shape[1]
        if self.sampling.repetition_penalty != 1:
            state.recent = torch.cat((state.recent, tokens), 1)[:, -state.recent.shape[1] :]
        state.newest = tokens
        if state.counters is not None:
            state.counters[1] += hidden.shape[1]

    def _choose(self, logits: Tensor, chosen: list[Tensor]) -> Tensor:
        """Logits (B, vocabulary) of the token after `chosen` → the token (B,)."""
        config, state, sampling = self.decoder.config, self.state, self.sampling
        scores = allowed_scores(logits[:, None], config, self._may_end(len(chosen)), state.recent, chosen, sampling)
        return choose(scores[:, 0], sampling, self.generator)[0]

    def _may_end(self, offset: int) -> Tensor:
        """Whether the next token but `offset` may be the last: it sees all of a complete text. (), on the device."""
        config, state = self.decoder.config, self.state
        if state.counters is None:
            seen = visible_text_count(self.made + offset, config.text_chunk, config.speech_chunk)
            return self._text_complete & (seen >= state.text_rows)
        chunks = torch.div((self._made + offset - 1).clamp(min=0), config.speech_chunk, rounding_mode="floor")
        return self._text_complete & (config.text_chunk * (1 + chunks) >= state.counters[0])

    def _replay(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        """Runs a step of this shape as it is the first time, captures it the second, and replays it from then on."""
        if key not in self._graphs:
            self._graphs[key] = None
            stream = torch.cuda.Stream()  # libraries allocate their workspaces apart from the default stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            return
        graph = self._graphs[key]
        if graph is None:
            self._graphs[key] = graph = self._captured(run)
        graph()

    def _captured(self, run: Callable[[], None]) -> Graph:
        """A graph of `run` that leaves what the state carries from step to step where it found it."""
        state = self.state
        carried = {name: getattr(state, name) for name in ("newest", "recent", "tail", "tail_tokens")}
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            run()
            for name, held in carried.items():
                new = getattr(state, name)
                if held is not None and new is not held:
                    held.copy_(new)
                    setattr(state, name, held)

        def replay() -> None:
            for name, held in carried.items():
                current = getattr(state, name)
                if held is not None and current is not held:  # a step of another shape came between
                    held.copy_(current)
                    setattr(state, name, held)
            graph.replay()

        return replay
