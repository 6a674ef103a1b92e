"""Choosing speech tokens: how the drafts of the multi-token prediction become an answer.

*accept-all* (VocalNet): every step takes one token from the decoder and one from each module, unchecked.
*verified*: the drafts of one step are checked by the next, which feeds them anyway (Leviathan et al., 2023), so that
tokens follow the decoder's own law exactly; with greedy sampling they equal plain next-token decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from vocalnet.errors import ConfigError
from vocalnet.sampling import SamplingConfig, probabilities

if TYPE_CHECKING:
    from vocalnet.speech_decoder import SpeechDecoder, SpeechState

DecodingMode = Literal["accept-all", "verified"]


@torch.no_grad()
def generate_chunk(
    decoder: SpeechDecoder,
    state: SpeechState,
    sampling: SamplingConfig,
    max_tokens: int,
    mode: DecodingMode = "accept-all",
    generator: torch.Generator | None = None,
) -> list[int]:
    """Up to `max_tokens` further speech tokens; fewer when the text given so far does not allow more, or at the end.

    Steps are whole and wait for all the text that they may see, so tokens do not depend on how text and chunks are cut;
    what a step makes beyond `max_tokens` is handed out next time. EOS is never handed out.

    Raises:
        ConfigError: unknown mode.
    """
    if mode not in get_args(DecodingMode):
        raise ConfigError(f"decoding is {mode!r}; allowed: {', '.join(get_args(DecodingMode))}")
    step = _accept_all_step if mode == "accept-all" else _verified_step
    while len(state.generated) - state.handed_out < max_tokens and not state.ended:
        if not step(decoder, state, sampling, generator):
            break
    tokens = state.generated[state.handed_out : state.handed_out + max_tokens]
    state.handed_out += len(tokens)
    return tokens


def _keep(decoder: SpeechDecoder, state: SpeechState, tokens: list[int]) -> None:
    """Adds new tokens up to EOS, which ends the answer."""
    eos = decoder.config.eos
    if eos in tokens and not decoder.config.compatible:
        tokens = tokens[: tokens.index(eos)]
        state.ended = True
    state.generated += tokens


def _mask_specials(decoder: SpeechDecoder, state: SpeechState, logits: Tensor, first: int) -> Tensor:
    """Forbids special tokens in logits (n, vocabulary) of tokens first … first + n - 1.

    EOS stays where all of a complete text is visible: whether it may end then does not depend on when text arrived.
    """
    if decoder.config.compatible:
        return logits
    config = decoder.config
    logits[:, config.units :] = torch.where(
        torch.arange(config.vocabulary - config.units, device=logits.device) == config.eos - config.units,
        logits[:, config.units :],
        float("-inf"),
    )
    for i in range(len(logits)):
        if not state.text_complete or decoder.visible_texts(state, first + i) < state.text_rows:
            logits[i, config.eos] = float("-inf")
    return logits


def _laws(
    decoder: SpeechDecoder, state: SpeechState, logits: Tensor, sampling: SamplingConfig, drafts: list[int]
) -> Tensor:
    """What each row of logits (n, vocabulary) draws from; row i comes after drafts[:i]."""
    first = len(state.generated)
    logits = _mask_specials(decoder, state, logits.float(), first)
    if sampling.repetition_penalty == 1 or not sampling.penalty_window:
        return probabilities(logits, sampling)
    window = sampling.penalty_window
    rows = []
    for i in range(len(logits)):
        history = (state.generated[-window:] + drafts[:i])[-window:]
        ids = torch.tensor([history], dtype=torch.long, device=logits.device)
        rows.append(probabilities(logits[i : i + 1], sampling, ids))
    return torch.cat(rows)


def _draw(laws: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> list[int]:
    """One token per row of laws (n, vocabulary)."""
    if sampling.temperature == 0:
        return laws.argmax(-1).tolist()
    return torch.multinomial(laws, 1, generator=generator).squeeze(1).tolist()


def _room(decoder: SpeechDecoder, state: SpeechState) -> int:
    """How many rows may be fed now; ends the answer when the caches are full."""
    if state.speech_rows + len(state.newest) > state.max_speech:
        state.ended = True
        return 0
    return decoder.speech_room(state) + 1 - state.speech_rows


def _accept_all_step(
    decoder: SpeechDecoder, state: SpeechState, sampling: SamplingConfig, generator: torch.Generator | None
) -> bool:
    """Feeds the newest tokens and takes one from the decoder and one from each module; False if text is missing."""
    if _room(decoder, state) < len(state.newest):
        return False
    hidden = decoder.feed(state.newest, state)
    logits = torch.cat([decoder.head(hidden[0, -1:]), *decoder.module_logits(hidden, state)])  # (K + 1, V)
    state.speech_rows += len(state.newest)
    if sampling.repetition_penalty == 1:
        tokens = _draw(_laws(decoder, state, logits, sampling, []), sampling, generator)
    else:
        tokens = []
        for i in range(len(logits)):  # each token is penalised for those before it, of this step too
            rows = logits[: i + 1] if i == len(tokens) else logits
            law = _laws(decoder, state, rows.clone(), sampling, tokens)[-1:]
            tokens += _draw(law, sampling, generator)
    state.newest = tokens
    _keep(decoder, state, tokens)
    return True


def _verified_step(
    decoder: SpeechDecoder, state: SpeechState, sampling: SamplingConfig, generator: torch.Generator | None
) -> bool:
    """Feeds a certain token and its drafts, keeps what passes and one token more; False if text is missing."""
    size = min(len(state.newest), _room(decoder, state))
    if size < 1:
        return False
    drafts = state.newest[1:size]
    hidden = decoder.feed(state.newest[:size], state)
    laws = _laws(decoder, state, decoder.head(hidden[0]), sampling, drafts)
    passed, token = _verify(laws, drafts, state.draft_laws, sampling, generator)
    module_logits = decoder.module_logits(hidden[:, : passed + 1], state)
    state.speech_rows += passed + 1
    _keep(decoder, state, [*drafts[:passed], token])
    state.newest, state.draft_laws = [token], None
    if module_logits and not state.ended:
        state.draft_laws = _laws(decoder, state, torch.cat(module_logits), sampling, [])
        state.newest += _draw(state.draft_laws, sampling, generator)
    return True


def _verify(
    laws: Tensor,
    drafts: list[int],
    draft_laws: Tensor | None,
    sampling: SamplingConfig,
    generator: torch.Generator | None,
) -> tuple[int, int]:
    """How many drafts pass, and the certain token after them.

    Draft d passes with probability min(1, p(d) / q(d)); the first refused one is replaced by a draw from
    max(p - q, 0), normalised. If all pass, the token comes from the last law.
    """
    for i, draft in enumerate(drafts):
        assert draft_laws is not None
        if sampling.temperature == 0:
            best = int(laws[i].argmax())
            if best != draft:
                return i, best
            continue
        p, q = float(laws[i, draft]), float(draft_laws[i, draft])
        if float(torch.rand((), generator=generator, device=laws.device)) * q < p:
            continue
        rest = (laws[i] - draft_laws[i]).clamp_min(0)
        return i, int(torch.multinomial(rest / rest.sum(), 1, generator=generator))
    return len(drafts), _draw(laws[len(drafts) :][:1], sampling, generator)[0]
