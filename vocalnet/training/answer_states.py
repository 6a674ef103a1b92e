"""What the speech decoder reads in training: the LLM's hidden states of the answers, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vocalnet.errors import DataError
from vocalnet.files import replacing
from vocalnet.prompt import ChatPrompt, Turn
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.text_rows import TABLE_WIDTH, TextRows
from vocalnet.training.speak_config import SpeakTaskConfig
from vocalnet.training.spoken import Asked, Pair, text_words

STATES_PER_FILE = 512  # answers in one file of precomputed states
STATES_BATCH = 16
PRONUNCIATIONS = "pronunciations.safetensors"  # in the data folder


class AnswerStates:
    """Hidden states of answers under their questions' prompts: computed once, then read from disk.

    A folder of `answer_states` per combination of LLM, LoRA, prompt and pairs; files of `STATES_PER_FILE` pairs,
    written atomically, so that an interrupted run goes on where it stopped.
    """

    def __init__(self, data_dir: Path, config: SpeakTaskConfig, pairs: Sequence[Pair]) -> None:
        """See `rows` for what is kept of each pair.

        Raises:
            DataError: the decoder reads pronunciations and there is no table of them for this LLM.
        """
        self.pronunciations = read_pronunciations(data_dir, config.decoder)
        self.pairs = pairs
        self.config = config
        self.llm_folder = _llm_folder(config.llm)
        self.prompt = ChatPrompt.from_pretrained(self.llm_folder, config.system)
        if len(self.pronunciations) not in (0, len(self.prompt.tokenizer)):
            raise DataError(
                f"{PRONUNCIATIONS} has {len(self.pronunciations)} tokens, {self.llm_folder.name} "
                f"{len(self.prompt.tokenizer)}: run `python -m data_prep pronunciations --llm {self.llm_folder}`"
            )
        content = hashlib.sha256(
            json.dumps([self.llm_folder.name, config.system, [pair.key() for pair in pairs]]).encode()
        )
        if config.lora is not None:
            content.update((config.lora / "adapter_model.safetensors").read_bytes())
        self.folder = data_dir / "answer_states" / content.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fill(pairs)
        self.hidden, self.ids = self._load(len(pairs))
        table = self._embedding_table()
        self.text_rows = TextRows(config.decoder.text_views, table.__getitem__, self.pronunciations)
        self.end = self.text_rows.end(self.prompt.end_id)
        self._words: dict[int, Tensor] = {}

    def rows(self, index: int) -> Tensor:
        """(T + 1, input_size): the text rows of pair `index`, the end token's last."""
        return torch.cat((self.text_rows(self.hidden[index], self.ids[index].tolist()), self.end))

    def words(self, index: int) -> Tensor:
        """(T + 2,): the word of each text row of pair `index`; BOS has none (-1), the end token the number of words."""
        if index not in self._words:
            text = self.pairs[index].answer
            spans = self.prompt.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            words = text_words(text, [end for _, end in spans])
            self._words[index] = torch.tensor([-1, *words, len(text.split())])
        return self._words[index]

    def _fill(self, pairs: Sequence[Pair]) -> None:
        """Computes the files that are missing."""
        count = -(-len(pairs) // STATES_PER_FILE)
        missing = [i for i in range(count) if not self._file(i).is_file()]
        if not missing:
            return
        from vocalnet.backbone import Backbone

        backbone = Backbone(self.llm_folder, "bf16", self.config.lora)
        for index in tqdm(missing, desc="hidden states of the answers", unit="file"):
            part = pairs[index * STATES_PER_FILE : (index + 1) * STATES_PER_FILE]
            hidden, ids = self._compute(backbone, part)
            tensors = {
                "hidden": torch.cat(hidden).to(torch.float16),
                "ids": torch.tensor([token for row in ids for token in row], dtype=torch.int32),
                "lengths": torch.tensor([len(row) for row in ids], dtype=torch.int32),
            }
            with replacing(self._file(index)) as temporary:
                save_file(tensors, temporary)

    def _compute(self, backbone: Any, pairs: Sequence[Pair]) -> tuple[list[Tensor], list[list[int]]]:
        """Per pair (T, D) states after each answer token, and the tokens, without the closing one."""
        prompts = [self._prompt_ids(pair.asked) for pair in pairs]
        answers = [self.prompt.answer_ids(pair.answer)[:-1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: len(prompts[i]) + len(answers[i]))
        hidden: list[Tensor] = [torch.empty(0)] * len(pairs)
        for start in range(0, len(order), STATES_BATCH):
            group = order[start : start + STATES_BATCH]
            # Padded on the right under a causal mask: what is read never sees padding.
            batch = pad_sequence([torch.tensor(prompts[i] + answers[i]) for i in group], batch_first=True)
            state = backbone.init_state(batch.shape[1], len(group))
            states = backbone.prefill(backbone.embed(batch), state)  # (B, T, D)
            for row, i in zip(states, group, strict=True):
                hidden[i] = row[len(prompts[i]) : len(prompts[i]) + len(answers[i])].clone()
        return hidden, answers

    def _prompt_ids(self, asked: Asked) -> list[int]:
        """What a session's cache would hold where the answer begins, had all been asked in writing."""
        history = self.prompt.history_ids([Turn(answer, question) for question, answer in asked.history])
        prompt = self.prompt
        return [*prompt.prefix_ids(), *history, *prompt.ids(asked.question), *prompt.suffix_ids()]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _load(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states and ids of all pairs."""
        hidden: list[Tensor] = []
        ids: list[Tensor] = []
        for index in range(-(-count // STATES_PER_FILE)):
            part = load_file(self._file(index))
            lengths = part["lengths"].tolist()
            hidden += part["hidden"].split(lengths)
            ids += part["ids"].long().split(lengths)
        return hidden, ids

    def _embedding_table(self) -> Tensor:
        """(V, D) input embeddings of the LLM, in its file's dtype."""
        from vocalnet.checkpoints.tensors import FolderWeights

        return FolderWeights(self.llm_folder).get("model.embed_tokens.weight")


def read_pronunciations(data_dir: Path, config: SpeechDecoderConfig) -> Tensor:
    """(V, TABLE_WIDTH) uint8: how every token is pronounced; no rows if the decoder does not read that.

    Raises:
        DataError: the table was not made, or its file is damaged.
    """
    if "pronunciation" not in config.text_views:
        return torch.zeros(0, TABLE_WIDTH, dtype=torch.uint8)
    file = data_dir / PRONUNCIATIONS
    again = f"run `python -m data_prep pronunciations --data {data_dir}`"
    if not file.is_file():
        raise DataError(f"no {file.name} in {data_dir}: {again}")
    try:
        table = load_file(file)["table"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}): {again}") from error
    if table.dtype != torch.uint8 or table.shape[1:] != (TABLE_WIDTH,):
        raise DataError(f"{file} has another form ({tuple(table.shape)}, {table.dtype}): {again}")
    return table


def _llm_folder(name: str) -> Path:
    """A folder as given, or a base model by name."""
    if Path(name).is_dir():
        return Path(name)
    from vocalnet.checkpoints import base_model

    return base_model(name)
