"""Sizes and schedule of the speech decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vocalnet.errors import ConfigError
from vocalnet.layers import LayerConfig
from vocalnet.mtp import check_kind
from vocalnet.text_rows import PRONUNCIATION_SIZE


@dataclass(frozen=True)
class SpeechDecoderConfig:
    """Sizes and schedule of the speech decoder.

    `compatible` reproduces the arithmetic of the released checkpoints: text and speech share one position counter, a
    stream sees all text there is, and its chunks break off where the original's do (`vocalnet.decoding`).
    `speech_position_scale` sets the pace of speech positions against text positions (text rows per speech token), in
    the first `scaled_heads` heads (all by default); the others count speech rows one by one.
    """

    llm_hidden_size: int
    width: int
    heads: int
    ffn: int
    units: int
    layers: int = 4
    projector_layers: int = 2
    mtp_head: str = "sequential"  # a key of vocalnet.mtp.MTP_HEADS
    mtp_modules: int = 5
    text_chunk: int = 5
    speech_chunk: int = 15
    text_input: Literal["hidden", "hidden+embedding", "hidden+embedding+pronunciation"] = "hidden"  # see `TextRows`
    pronounced: int = 0  # tokens in the table of pronunciations
    speech_position_scale: float = 1.0
    scaled_heads: int | None = None
    rotary_base: float = 10000.0
    eps: float = 1e-6
    compatible: bool = False

    def __post_init__(self) -> None:
        check_kind(self.mtp_head)
        if self.compatible and (
            self.text_input != "hidden" or self.width != self.llm_hidden_size or self.speech_position_scale != 1
        ):
            raise ConfigError(
                "compatible needs text_input 'hidden', width equal to llm_hidden_size and speech_position_scale 1; "
                f"got '{self.text_input}', {self.width} and {self.llm_hidden_size}, {self.speech_position_scale}"
            )
        if self.compatible and self.mtp_head != "sequential":
            raise ConfigError(f"mtp_head is '{self.mtp_head}'; released checkpoints (compatible) have 'sequential'")
        if self.text_chunk < 1 or self.speech_chunk < 1 or self.mtp_modules < 0:
            raise ConfigError(
                f"text_chunk {self.text_chunk} and speech_chunk {self.speech_chunk} must be at least 1, "
                f"mtp_modules {self.mtp_modules} at least 0"
            )

    @property
    def bos(self) -> int:
        """Begins the text rows."""
        return self.units

    @property
    def sos(self) -> int:
        """Begins the speech rows."""
        return self.units + 1

    @property
    def eos(self) -> int:
        """Ends the speech."""
        return self.units + 2

    @property
    def vocabulary(self) -> int:
        """Speech tokens, then BOS, SOS, EOS and padding."""
        return self.units + 4

    @property
    def input_size(self) -> int:
        """Width of one text row."""
        return sum(size for _, size in self.view_sizes)

    @property
    def text_views(self) -> list[str]:
        """What a text row holds of a token, in order."""
        return self.text_input.split("+")

    @property
    def view_sizes(self) -> list[tuple[str, int]]:
        """Each view with its width."""
        sizes = {"pronunciation": PRONUNCIATION_SIZE}
        return [(view, sizes.get(view, self.llm_hidden_size)) for view in self.text_views]

    @property
    def layer(self) -> LayerConfig:
        """Every layer has this shape."""
        return LayerConfig(width=self.width, heads=self.heads, ffn=self.ffn, eps=self.eps)
