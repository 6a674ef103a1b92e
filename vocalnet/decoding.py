"""Choosing speech tokens: how the drafts of the multi-token prediction become an answer.

*accept-all* (VocalNet): every step takes one token from the decoder and all drafts of its head, unchecked.
*verified*: the drafts of one step are checked by the next, which feeds them anyway (Leviathan et al., 2023), so that
tokens follow the decoder's own law exactly; with greedy sampling they equal plain next-token decoding.
*relaxed*: also lets pass what verification would refuse but hardly anyone would hear: a draft that the decoder finds
nearly as likely as its favourite, or that lies beside an accepted choice in the speech tokenizer's grid.

Tokens are drawn on the device; the host reads them once a step, to see the end of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from vocalnet.errors import ConfigError
from vocalnet.sampling import SamplingConfig, draw, penalise, probabilities

if TYPE_CHECKING:
    from vocalnet.speech_decoder import SpeechDecoder, SpeechState
    from vocalnet.speech_decoder_config import SpeechDecoderConfig

DecodingMode = Literal["accept-all", "verified", "relaxed"]


@dataclass(frozen=True)
class DecodingConfig:
    """How drafts are used.

    Attributes:
        mode: see the module.
        confidence: adaptive K: of a step's drafts, those from the first on that its head finds less likely than this
            go unused; 0 uses all.
        ratio: relaxed: a draft passes if its probability is at least this share of the likeliest token's; 1 is never
            more lenient than greedy verification.
        levels: relaxed: the speech tokenizer's FSQ levels, the first digit of a token fastest; empty where the grid is
            not to be used.
        distance: relaxed: a draft passes if its digits differ from the token drawn by at most this much in sum.
    """

    mode: DecodingMode = "accept-all"
    confidence: float = 0.0
    ratio: float = 0.3
    levels: tuple[int, ...] = ()
    distance: int = 1

    def __post_init__(self) -> None:
        if self.mode not in get_args(DecodingMode):
            raise ConfigError(f"decoding is {self.mode!r}; allowed: {', '.join(get_args(DecodingMode))}")
        for name in ("confidence", "ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"decoding {name} is {getattr(self, name)}; allowed: 0 to 1")
        if self.distance < 0:
            raise ConfigError(f"decoding distance is {self.distance}; allowed: 0 or more")

    @property
    def keeps_drafts(self) -> bool:
        """All drafts of a step become tokens."""
        return self.mode == "accept-all" and not self.confidence


@torch.no_grad()
def generate_chunk(
    decoder: SpeechDecoder,
    state: SpeechState,
    sampling: SamplingConfig,
    max_tokens: int,
    decoding: DecodingConfig | DecodingMode = "accept-all",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Up to `max_tokens` further speech tokens; fewer when the text given so far does not allow more, or at the end.

    Steps are whole and wait for all the text that they may see, so tokens do not depend on how text and chunks are cut;
    what a step makes beyond `max_tokens` is handed out next time. EOS is never handed out.

    In compatibility mode, accept-all, chunks are the original's: until the text is complete they end in mid-step, at
    `max_tokens` or at EOS (`_Step.original`), and EOS is handed out, then as at the very end.

    Raises:
        ConfigError: unknown mode, or a mode that checks drafts with a head that makes none.
    """
    config = decoding if isinstance(decoding, DecodingConfig) else DecodingConfig(decoding)
    check_decoding(config, decoder)
    step = _Step(decoder, state, sampling, config, generator)
    advance: Callable[[], bool]
    if config.mode != "accept-all":
        advance = step.verified
    elif decoder.config.compatible and config.keeps_drafts:
        end = None if state.text_complete else state.handed_out + max_tokens
        advance = partial(step.original, end)
    else:
        advance = step.accept_all
    while len(state.generated) - state.handed_out < max_tokens and not state.ended:
        if not advance():
            break
    tokens = state.generated[state.handed_out : state.handed_out + max_tokens]
    state.handed_out += len(tokens)
    return tokens


def check_decoding(config: DecodingConfig, decoder: SpeechDecoder) -> None:
    """Raises ConfigError for what the decoder's head cannot do."""
    if decoder.mtp_layers.group > 1 and not config.keeps_drafts:
        raise ConfigError(
            f"decoding is '{config.mode}' with confidence {config.confidence}; the tokens of a group head come "
            "together, allowed: accept-all with confidence 0"
        )


@dataclass
class _Step:
    """One step of the decoder, in either mode."""

    decoder: SpeechDecoder
    state: SpeechState
    sampling: SamplingConfig
    config: DecodingConfig
    generator: torch.Generator | None

    def accept_all(self) -> bool:
        """Feeds the newest tokens, takes one from the decoder and the drafts of its head; False if text is missing."""
        decoder, state = self.decoder, self.state
        rows = state.newest.shape[1] // decoder.mtp_layers.group
        if self._room(rows) < rows:
            return False
        hidden = decoder.feed(state.newest, state)
        chosen = _Chosen(self, keep_laws=self.config.confidence > 0)
        fed = state.newest
        token = chosen(decoder.head(hidden[:, -1]))
        decoder.draft(hidden, torch.cat((fed, token[:, None]), 1), state, chosen, revisit=not self.config.keeps_drafts)
        state.speech_rows += rows
        tokens = torch.stack(chosen.tokens, 1)  # (1, K + 1)
        if self.config.confidence:
            sure = chosen.sure(self.config.confidence)  # (1, K + 1): the decoder's own token is always sure
            read = torch.cat((tokens, sure.sum(1, keepdim=True)), 1)[0].tolist()
            tokens = tokens[:, : read.pop()]
            self._keep(tokens, read[: tokens.shape[1]])
        else:
            self._keep(tokens, tokens[0].tolist())
        state.newest = tokens
        return True

    def original(self, end: int | None) -> bool:
        """`accept_all` as the original has it; False if the chunk is over.

        It stops in mid-step at EOS, or once there are `end` tokens in all: modules that have not run yet do not, so
        that their caches stay behind, and the next chunk feeds the newest K + 1 tokens, whether fed before or not.
        """
        decoder, state = self.decoder, self.state
        config, fed = decoder.config, state.newest
        rows = fed.shape[1]
        if self._room(rows) < rows:
            return False
        hidden = decoder.feed(fed, state)
        chosen = _Chosen(self, keep_laws=False)

        def enough() -> bool:
            made = len(state.generated) + len(chosen.tokens)
            return int(chosen.tokens[-1]) == config.eos or (end is not None and made >= end)

        token = chosen(decoder.head(hidden[:, -1]))
        decoder.draft(hidden, torch.cat((fed, token[:, None]), 1), state, chosen, enough=enough)
        first, over = not state.generated, enough()
        state.speech_rows += rows
        tokens = torch.stack(chosen.tokens, 1)
        self._keep(tokens, tokens[0].tolist())
        if over:
            state.ended = state.text_complete and state.generated[-1] == config.eos
            newest = [config.sos, *state.generated][-1 - state.modules :]
            state.newest = torch.tensor([newest], device=fed.device)
        else:
            state.newest = tokens if first else torch.cat((fed, tokens), 1)[:, -rows:]
        return not over

    def verified(self) -> bool:
        """Feeds a certain token and its drafts, keeps what passes and one token more; False if text is missing."""
        decoder, state = self.decoder, self.state
        size = min(state.newest.shape[1], self._room(1))
        if size < 1:
            return False
        fed = state.newest[:, :size]
        hidden = decoder.feed(fed, state)
        passed, token = self._verify(decoder.head(hidden), fed[:, 1:])
        count, *read = torch.cat((passed[:, None], fed[:, 1:], token[:, None]), 1)[0].tolist()
        kept = [*read[:count], read[-1]]
        certain = torch.cat((fed[:, 1 : count + 1], token[:, None]), 1)
        self._keep(certain, kept)
        state.drafts_checked += size - 1
        state.drafts_passed += count
        state.newest, state.draft_laws = token[:, None], None
        if state.modules and not state.ended:
            chosen = _Chosen(self, keep_laws=self.sampling.temperature > 0 or self.config.confidence > 0)
            decoder.draft(
                hidden[:, : count + 1], torch.cat((fed[:, : count + 1], token[:, None]), 1), state, chosen, revisit=True
            )
            self._offer(chosen)
        state.speech_rows += count + 1
        return True

    def _offer(self, chosen: _Chosen) -> None:
        """Puts the drafts that are sure enough behind the newest token."""
        state, drafts = self.state, chosen.tokens
        if self.config.confidence and drafts:
            drafts = drafts[: int(chosen.sure(self.config.confidence, drafts_only=True).sum())]
        if drafts:
            state.newest = torch.cat((state.newest, torch.stack(drafts, 1)), 1)
            state.draft_laws = torch.stack(chosen.laws[: len(drafts)], 1) if chosen.laws else None

    def _keep(self, tokens: Tensor, values: list[int]) -> None:
        """Adds new tokens (1, n), read as `values`, up to EOS, which ends the answer."""
        state, config = self.state, self.decoder.config
        if config.eos in values and not config.compatible:
            values = values[: values.index(config.eos)]
            state.ended = True
        state.generated += values
        if self.sampling.repetition_penalty != 1:
            state.recent = torch.cat((self._recent(), tokens), 1)[:, -max(1, self.sampling.penalty_window) :]

    def _recent(self) -> Tensor:
        """The newest certain tokens (1, window); -1 before the first."""
        state, window = self.state, max(1, self.sampling.penalty_window)
        missing = window - state.recent.shape[1]
        recent = state.recent.to(state.newest.device)
        return torch.nn.functional.pad(recent, (missing, 0), value=-1) if missing > 0 else recent[:, -window:]

    def _room(self, rows: int) -> int:
        """How many rows may be fed now; ends the answer when the caches are full."""
        state = self.state
        if state.speech_rows + rows > state.max_speech:
            state.ended = True
            return 0
        return self.decoder.speech_room(state) + 1 - state.speech_rows

    def scores(self, logits: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """`allowed_scores` of the next n tokens (1, n, vocabulary), which come after `tokens`.

        EOS stays where all of a complete text is visible: whether it may end then does not depend on when text arrived.
        """
        decoder, state, rows = self.decoder, self.state, logits.shape[1]
        first = len(state.generated) + (len(tokens) if rows == 1 else 0)
        may_end = [
            state.text_complete and decoder.visible_texts(state, first + i) >= state.text_rows for i in range(rows)
        ]
        recent = state.recent if self.sampling.repetition_penalty == 1 else self._recent()
        return allowed_scores(logits, decoder.config, may_end, recent, tokens, self.sampling)

    def _verify(self, logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts pass (1,), and the certain token after them (1,).

        Draft d passes with probability min(1, p(d) / q(d)); the first refused one is replaced by a draw from
        max(p - q, 0), normalised. If all pass, the token comes from the last law. Relaxed, more drafts pass.

        Args:
            logits: (1, n + 1, vocabulary), the decoder's at the certain token and the drafts.
            drafts: (1, n).
        """
        scores = self.scores(logits, list(drafts.unbind(1)))
        return verify(scores, drafts, self.state.draft_laws, self.sampling, self.config, self.generator)


class _Chosen:
    """Chooses tokens one after the other, each knowing those before; what `SpeechDecoder.draft` asks."""

    def __init__(self, step: _Step, keep_laws: bool) -> None:
        self.step = step
        self.keep_laws = keep_laws
        self.tokens: list[Tensor] = []
        self.laws: list[Tensor] = []
        """What each was drawn from, (1, vocabulary)."""
        self.likely: list[Tensor] = []
        """Its head's probability of each token, (1,)."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (1, vocabulary) → the token (1,)."""
        step = self.step
        scores = step.scores(logits[:, None], self.tokens)[:, 0]
        token, law = choose(scores, step.sampling, step.generator)
        if law is not None:
            self.laws.append(law)
        if step.config.confidence:
            self.likely.append(torch.softmax(scores, -1).gather(1, token[:, None])[:, 0])
        self.tokens.append(token)
        return token

    def sure(self, least: float, drafts_only: bool = False) -> Tensor:
        """(1, n) bool, True up to the first draft whose probability is below `least`."""
        likely = torch.stack(self.likely, 1) >= least
        if not drafts_only:
            likely[:, 0] = True
        return likely.cumprod(1).bool()


@cache  # captured graphs keep their addresses
def _forbidden(config: SpeechDecoderConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (vocabulary,) to add to logits: -inf for special tokens but EOS; the same and EOS."""
    with torch.inference_mode(False):  # they outlive whoever asks first
        no_end = torch.zeros(config.vocabulary, device=device)
        no_end[config.units :] = float("-inf")
        open_end = no_end.clone()
        open_end[config.eos] = 0
    return open_end, no_end


def allowed_scores(
    logits: Tensor,
    config: SpeechDecoderConfig,
    may_end: Tensor | Sequence[bool],
    recent: Tensor,
    tokens: Sequence[Tensor],
    sampling: SamplingConfig,
) -> Tensor:
    """Logits (B, n, vocabulary) of the next n tokens: specials forbidden, repetitions penalised. Writes into them.

    Args:
        may_end: which of them may be EOS, (n,) on the host or a tensor that broadcasts to (B, n); special tokens are
            free to a decoder in compatibility mode.
        recent: (B, window), the newest certain tokens; -1 before the first.
        tokens: n - 1 further tokens (B,) each at least, row i comes after tokens[:i]; for one row, all of them.
    """
    logits = logits.float()
    if not config.compatible:
        open_end, no_end = _forbidden(config, logits.device)
        if isinstance(may_end, Tensor):
            logits.add_(torch.where(may_end[..., None], open_end, no_end))
        else:
            for i, allowed in enumerate(may_end):
                logits[:, i].add_(open_end if allowed else no_end)
    window, rows = sampling.penalty_window, logits.shape[1]
    if sampling.repetition_penalty == 1 or not window:
        return logits
    history = torch.cat((recent, *(token[:, None] for token in tokens)), 1)
    history = history[:, -(window + rows - 1) :].unfold(1, window, 1)
    return penalise(logits.flatten(0, 1), history.flatten(0, 1), sampling, config.compatible).view(logits.shape)


def choose(
    scores: Tensor, sampling: SamplingConfig, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, vocabulary) → tokens (B,), and the distribution that they were drawn from; None when greedy."""
    if sampling.temperature == 0:
        return scores.argmax(-1), None
    law = probabilities(scores, sampling)
    return draw(law, generator), law


def verify(
    scores: Tensor,
    drafts: Tensor,
    draft_laws: Tensor | None,
    sampling: SamplingConfig,
    config: DecodingConfig | None = None,
    generator: torch.Generator | None = None,
    offered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule of verified and relaxed decoding, on the device: drafts passed (B,) and the certain token after (B,).

    Args:
        scores: (B, n + 1, vocabulary), the decoder's penalised logits for each draft and for the token after all.
        drafts: (B, n).
        draft_laws: (B, n, vocabulary) that the drafts were drawn from; None when greedy.
        config: relaxed if its mode says so.
        offered: (B,) how many of the drafts count; default all.
    """
    batch, count = drafts.shape
    offered = drafts.new_full((batch,), count) if offered is None else offered
    relaxed = config is not None and config.mode == "relaxed"
    if sampling.temperature == 0:
        tokens = refused = scores.argmax(-1)  # (B, n + 1)
        passes = tokens[:, :-1] == drafts
    else:
        laws = probabilities(scores.flatten(0, 1), sampling).view(scores.shape)
        tokens = draw(laws.flatten(0, 1), generator).view(batch, count + 1)
        passes, refused = torch.ones_like(drafts, dtype=torch.bool), tokens
        if count:
            assert draft_laws is not None
            draft_laws = draft_laws[:, :count]
            p, q = (law.gather(2, drafts[..., None])[..., 0] for law in (laws[:, :-1], draft_laws))
            passes = torch.rand(p.shape, generator=generator, device=p.device) * q < p
            rest = (laws[:, :-1] - draft_laws).clamp_min_(0)
            # Where p = q nothing is refused but by rounding; then any law will do.
            rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, laws[:, :-1])
            refused = torch.cat((draw(rest.flatten(0, 1), generator).view(batch, count), tokens[:, -1:]), 1)
    if relaxed and count:
        assert config is not None
        passes = passes | _near(scores[:, :-1], refused[:, :-1], drafts, config)
    passes = passes & (torch.arange(count, device=drafts.device) < offered[:, None])
    passed = passes.long().cumprod(1).sum(1)[:, None]  # (B, 1)
    token = torch.where(passed < offered[:, None], refused.gather(1, passed), tokens.gather(1, passed))
    return passed[:, 0], token[:, 0]


def _near(scores: Tensor, tokens: Tensor, drafts: Tensor, config: DecodingConfig) -> Tensor:
    """(B, n) bool: drafts that relaxed decoding takes in place of `tokens`; the grid has no special tokens."""
    own = scores.gather(2, drafts[..., None])[..., 0]
    near = own >= scores.amax(-1) + torch.log(own.new_tensor(config.ratio))
    if config.levels:
        size = 1
        for level in config.levels:
            size *= level
        apart = torch.zeros_like(drafts)
        base = 1
        for level in config.levels:
            apart += (drafts // base % level - tokens // base % level).abs()
            base *= level
        near |= (apart <= config.distance) & (drafts < size) & (tokens < size)
    return near & torch.isfinite(own)
