"""Options of stage 2, the training of the speech decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vocalnet.errors import ConfigError
from vocalnet.speech_decoder_config import SpeechDecoderConfig


@dataclass(frozen=True)
class SpeakTaskConfig:
    """Options of stage 2."""

    decoder: SpeechDecoderConfig  # units must match the speech tokenizer
    llm: str = "smollm2-135m-instruct"  # a base model's name, or a Hugging Face folder
    lora: Path | None = None  # folder of stage 1's LoRA
    system: str = ""  # system prompt; the session must use the same
    init_decoder: Path | None = None  # folder of an exported decoder, to train on
    init_tokens: Path | None = None  # data folder whose answer_tokens it learned, where another tokenizer made these
    sentence_prompts: tuple[str, ...] = ("Tell me something.", "What else can you say?", "Please go on.")
    sentence_share: float = 1.0  # of the sentences that answer nothing: how many an epoch takes, drawn anew each time
    questions_per_answer: int = 3
    train: Literal["all", "modules"] = "all"  # modules: the rest stays as init_decoder has it
    modules_from: Literal["init", "decoder"] = "init"  # decoder: modules begin as copies of its last layer and head
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_positions: int = 1536  # rows of a batch, padding included; small: steps matter more than smooth gradients
    streaming_probability: float = 0.75  # of the streaming mask, by sample
    decay: float = 0.8  # loss of module k weighs decay^k
    normalise_decay: bool = False  # the modules' weights sum to 1, as in FastMTP (with decay 0.6)
    module_steps: int = 120  # steps of one stage of the curriculum; 0: all modules from the start
    curriculum: Literal["delayed", "forward", "reverse"] = "delayed"  # see `active_modules`
    targets: Literal["data", "own"] = "data"  # own: modules learn what the frozen decoder itself would say
    answers: Literal["recorded", "own"] = "recorded"  # own: modules train on what the frozen decoder said by itself
    own_temperature: float = 1.0  # of those targets and answers; 0 takes the likeliest token
    order_weight: float = 0.0  # of token-order prediction, on one extra head
    order_window: int = 16  # tokens ahead that it ranks
    token_noise: float = 0.1  # share of input speech tokens replaced by random ones: errors then stay small
    phonemes_alone: float = 0.0  # share of text tokens shown by their pronunciation alone, where the decoder sees it
    phoneme_weight: float = 0.3  # of the auxiliary phoneme classification
    guide_weight: float = 0.3  # of the loss that points a few heads at the word being said
    guide_layer: int = 1
    guide_heads: int = 2
    word_boundary: int = 16  # phoneme id of the space between words
    validation_sentences: int = 200  # for cross entropy and accuracy
    free_running: int = 24  # of these, how many are also generated

    def __post_init__(self) -> None:
        for name in ("streaming_probability", "token_noise", "sentence_share", "phonemes_alone"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        if self.train == "modules" and self.init_decoder is None:
            raise ConfigError("train is 'modules' but init_decoder is not set; give the folder of a trained decoder")
        if self.init_tokens is not None and (self.init_decoder is None or self.train == "modules"):
            raise ConfigError("init_tokens needs an init_decoder, and train 'all': it changes what that decoder knows")
        if self.train == "modules" and self.decoder.mtp_head == "group":
            raise ConfigError("train is 'modules' but a group head changes what the decoder reads; allowed: all")
        if self.train == "modules" and self.order_weight:
            raise ConfigError("order_weight trains the decoder; set it to 0 where train is 'modules'")
        if self.train == "all" and "own" in (self.targets, self.answers):
            raise ConfigError("own targets and answers need a decoder that stays as it is; set train to 'modules'")
