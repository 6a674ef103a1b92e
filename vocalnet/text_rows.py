"""What the speech decoder reads of each token of an answer: hidden state, input embedding, and how it is pronounced.

Neither the LLM's hidden states nor its embeddings say how a rare word is pronounced, and a decoder that has only those
learns the sound of every word by heart. Phonemes tell it, as they tell every speech synthesiser; with them, words that
were seldom or never heard are spoken like the others. They come from a table with one row for each token of the
vocabulary, made once (`data_prep/pronunciations.py`), so that a stream never waits for the end of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vocalnet.errors import ConfigError

PHONEMES = "AIOQWYTabdefhijklmnopstuvwxzæðŋɐɑɒɔəɚɛɜɡɪɹɾʃʊʌʒʔʤʧθᵊᵻ,.?!"
"""Symbols of a pronunciation, in misaki's American alphabet (A = eɪ, I = aɪ, O = oʊ, W = aʊ, Y = ɔɪ), and pauses."""
STRESSES = "ˌˈ"
"""Secondary and primary; written before a phoneme."""
PLACES = 12
"""Most phonemes of a token."""
TABLE_WIDTH = 1 + PLACES
"""Columns of a table: whether the token begins a word, then codes of its phonemes, 0 where there is none."""
TAIL = 4
"""How many phonemes are also seen counted from the last one."""
PRONUNCIATION_SIZE = 1 + (PLACES + TAIL) * (len(PHONEMES) + len(STRESSES))
MARK = 4.0
"""Value of a feature that is set; some ten of them are, beside hundreds of dense ones."""
_STRESS = 64  # a code is 1 + index in PHONEMES + 64 · stress


def encode(pronunciation: str, starts_word: bool) -> list[int]:
    """A token's phonemes → its row of the table, TABLE_WIDTH codes; symbols outside the alphabet are left out."""
    codes, stress = list[int](), 0
    for symbol in pronunciation:
        if symbol in STRESSES:
            stress = 1 + STRESSES.index(symbol)
        elif symbol in PHONEMES:
            codes.append(1 + PHONEMES.index(symbol) + _STRESS * stress)
            stress = 0
    codes = codes[:PLACES]
    return [int(starts_word), *codes, *[0] * (PLACES - len(codes))]


def decode(row: Tensor) -> str:
    """A row of the table → its phonemes, a leading space where the token begins a word."""
    starts_word, *codes = row.tolist()
    shown = (("", *STRESSES)[code // _STRESS] + PHONEMES[code % _STRESS - 1] for code in codes if code)
    return " " * starts_word + "".join(shown)


def features(table: Tensor) -> Tensor:
    """Rows of the table (T, TABLE_WIDTH) uint8 → (T, PRONUNCIATION_SIZE) float32, 0 or `MARK`.

    Phonemes by their place from the beginning, the last ones by their place from the end as well, each with its stress.
    """
    codes = table[:, 1:].long()
    count = (codes > 0).sum(1, keepdim=True)
    back = count - 1 - torch.arange(TAIL, device=table.device)  # (T, TAIL): places of the last phonemes
    codes = torch.cat((codes, codes.gather(1, back.clamp(min=0)).masked_fill(back < 0, 0)), 1)
    symbols = F.one_hot(codes % _STRESS, len(PHONEMES) + 1)[..., 1:]
    stresses = F.one_hot(codes // _STRESS, len(STRESSES) + 1)[..., 1:]
    return MARK * torch.cat((table[:, :1], torch.cat((symbols, stresses), -1).flatten(1)), 1).float()


class TextRows:
    """Makes the speech decoder's text rows of an LLM's tokens."""

    def __init__(self, views: Sequence[str], embed: Callable[[list[int]], Tensor], table: Tensor) -> None:
        """
        Args:
            views: what a row holds, in order: "hidden", "embedding", "pronunciation".
            embed: token ids → the LLM's input embeddings (T, D).
            table: (V, TABLE_WIDTH) uint8, how every token is pronounced; may be empty where the views do not ask.

        Raises:
            ConfigError: the views ask for pronunciations and the table has none.
        """
        if "pronunciation" in views and not len(table):
            raise ConfigError("text_input asks for pronunciations and the decoder's table has none: pronounced is 0")
        self.views = views
        self.embed = embed
        self.table = table

    def __call__(self, hidden: Tensor, ids: Sequence[int]) -> Tensor:
        """Hidden states (T, D) after the LLM read each token, and the tokens → (T, input_size) float32."""
        rows = [hidden.float()]
        if "embedding" in self.views:
            rows.append(self.embed(list(ids)).to(hidden.device).float())
        if "pronunciation" in self.views:
            chosen = self.table[torch.tensor(list(ids), dtype=torch.long, device=self.table.device)]
            rows.append(features(chosen).to(hidden.device))
        return torch.cat(rows, -1)

    def end(self, token: int) -> Tensor:
        """(1, input_size): the row of the token that closes a text. It has no hidden state; its embedding stands in."""
        return self(self.embed([token]), [token])
