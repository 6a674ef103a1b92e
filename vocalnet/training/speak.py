"""Stage 2: the speech decoder learns to say the LLM's answers.

The LLM does not train here, so its hidden states are computed once and kept on disk; after that only the decoder runs.
Each distinct spoken sentence has one sequence of speech tokens and up to a few questions that lead to it, so the
decoder meets the same words in several contexts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vocalnet.config import to_dict
from vocalnet.decoding import generate_chunk
from vocalnet.errors import ConfigError, DataError
from vocalnet.files import replacing
from vocalnet.parts import load_part, save_part
from vocalnet.prompt import ChatPrompt, Turn
from vocalnet.sampling import SamplingConfig, draw
from vocalnet.shards import read_arrays, text_id
from vocalnet.speech_decoder import IGNORE, SpeechDecoder, SpeechDecoderConfig, TrainingPass, layers_of, token_losses
from vocalnet.text_rows import SPELLING_SIZE, TextRows
from vocalnet.training.own_answers import own_answers

POOL_BATCHES = 16  # batches are cut from length-sorted pools of this many, then shuffled
STATES_PER_FILE = 512  # answers in one file of precomputed states
STATES_BATCH = 16


@dataclass(frozen=True)
class SpeakTaskConfig:
    """Options of stage 2."""

    decoder: SpeechDecoderConfig  # units must match the speech tokenizer
    llm: str = "smollm2-135m-instruct"  # a base model's name, or a Hugging Face folder
    lora: Path | None = None  # folder of stage 1's LoRA
    system: str = ""  # system prompt; the session must use the same
    init_decoder: Path | None = None  # folder of an exported decoder, to train on
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
    letters_alone: float = 0.0  # share of text tokens shown by their letters alone, where the decoder sees those
    phoneme_weight: float = 0.3  # of the auxiliary phoneme classification
    guide_weight: float = 0.3  # of the loss that points a few heads at the word being said
    guide_layer: int = 1
    guide_heads: int = 2
    word_boundary: int = 16  # phoneme id of the space between words
    validation_sentences: int = 200  # for cross entropy and accuracy
    free_running: int = 24  # of these, how many are also generated

    def __post_init__(self) -> None:
        for name in ("streaming_probability", "token_noise", "sentence_share", "letters_alone"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        if self.train == "modules" and self.init_decoder is None:
            raise ConfigError("train is 'modules' but init_decoder is not set; give the folder of a trained decoder")
        if self.train == "modules" and self.decoder.mtp_head == "group":
            raise ConfigError("train is 'modules' but a group head changes what the decoder reads; allowed: all")
        if self.train == "modules" and self.order_weight:
            raise ConfigError("order_weight trains the decoder; set it to 0 where train is 'modules'")
        if self.train == "all" and "own" in (self.targets, self.answers):
            raise ConfigError("own targets and answers need a decoder that stays as it is; set train to 'modules'")


@dataclass(frozen=True)
class Asked:
    """A question, after earlier exchanges if there are any."""

    question: str
    history: tuple[tuple[str, str], ...] = ()  # (question, answer) of each, oldest first


@dataclass(frozen=True)
class Pair:
    """An answer with what led to it."""

    asked: Asked
    answer: str

    def key(self) -> list[Any]:
        """What identifies it in a hash."""
        pair = [self.asked.question, self.answer]
        return [*pair, self.asked.history] if self.asked.history else pair


@dataclass(frozen=True)
class Spoken:
    """A sentence with its speech tokens, and the questions that it answers."""

    name: str
    text: str
    tokens: Tensor  # (S,) int64
    phonemes: Tensor  # (S,) int64, IGNORE where unknown
    words: Tensor  # (S,) int64: index of the word being said, their number in the closing silence, IGNORE where unknown
    questions: tuple[Asked, ...]


class SpeakModel(nn.Module):
    """The decoder, and linear layers for the auxiliary tasks, which are thrown away after training."""

    def __init__(self, decoder: SpeechDecoder, phonemes: int, order: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self.phoneme_head = nn.Linear(decoder.config.width, phonemes) if phonemes else None
        self.order_head = nn.Linear(decoder.config.width, decoder.config.vocabulary) if order else None


def load_spoken(data_dir: Path, split: str, config: SpeakTaskConfig) -> list[Spoken]:
    """All spoken sentences of a split that have speech tokens, in the order of their names.

    Raises:
        DataError: a folder is missing, no sentence has tokens, or tokens lie outside the decoder's units.
    """
    tokens = dict(read_arrays(data_dir / "answer_tokens", f"{split}-*.tar", "npy"))
    phonemes = {}
    if config.phoneme_weight:
        features = read_arrays(data_dir / "answer_features", f"{split}-*.tar", "npz")
        phonemes = {name: arrays["phoneme"] for name, arrays in features}
    said: dict[str, tuple[str, list[Asked]]] = {}
    for line in (data_dir / "texts" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        said.setdefault(text_id(row["spoken"]), (row["answer"], []))[1].append(_asked(row))
    sentences = data_dir / "texts" / "sentences.jsonl"
    if sentences.is_file():  # which split one is in, its tokens tell
        for line in sentences.read_text().splitlines():
            text = json.loads(line)["text"]
            said.setdefault(text_id(text), (text, [Asked(prompt) for prompt in config.sentence_prompts]))
    result = []
    for name in sorted(said.keys() & tokens.keys()):
        text, questions = said[name]
        ids = torch.from_numpy(tokens[name].astype(np.int64))
        if len(ids) and int(ids.max()) >= config.decoder.units:
            raise DataError(f"{name} has token {int(ids.max())}; the decoder's units are {config.decoder.units}")
        chosen = random.Random(name).sample(questions, min(len(questions), config.questions_per_answer))
        frames = phonemes.get(name)
        words = None if frames is None else spoken_words(frames, len(text.split()), config.word_boundary)
        size = len(ids)
        result.append(Spoken(name, text, ids, _at_token_rate(frames, size), _at_token_rate(words, size), tuple(chosen)))
    if not result:
        raise DataError(f"no sentence of the {split} texts has tokens in {data_dir / 'answer_tokens'}")
    return result


def _asked(row: dict[str, Any]) -> Asked:
    """The question of a row of `texts/*.jsonl`."""
    return Asked(row["question"], tuple((question, answer) for question, answer in row.get("history", ())))


def spoken_words(phonemes: np.ndarray, count: int, boundary: int) -> np.ndarray | None:
    """Frame-level phonemes (T,), 0 for silence → index of the word in each frame (T,), `count` in the closing silence.

    None if there are not `count` words between boundaries, as with numbers written in digits.
    """
    said = np.flatnonzero(phonemes)
    if not len(said):
        return None
    starts = np.diff((phonemes == boundary).astype(np.int64), prepend=0) == 1
    words = np.cumsum(starts)  # a boundary counts with the word that it opens
    if words[said[-1]] != count - 1:
        return None
    words[said[-1] + 1 :] = count
    return words


def text_words(text: str, ends: Sequence[int]) -> list[int]:
    """Index of the word that each token belongs to, from where in the text the tokens end."""
    return [max(0, len(text[:end].split()) - 1) for end in ends]


def _at_token_rate(values: np.ndarray | None, size: int) -> Tensor:
    """(T,) labels at 50 Hz → (size,) at 25 Hz, IGNORE where there is none."""
    row = torch.full((size,), IGNORE, dtype=torch.long)
    if values is not None:
        known = torch.from_numpy(values.astype(np.int64))[::2][:size]
        row[: len(known)] = known
    return row


class AnswerStates:
    """Hidden states of answers under their questions' prompts: computed once, then read from disk.

    A folder per combination of LLM, LoRA, prompt and pairs; files of `STATES_PER_FILE` pairs, written atomically, so
    that an interrupted run goes on where it stopped.
    """

    def __init__(self, folder: Path, config: SpeakTaskConfig, pairs: Sequence[Pair]) -> None:
        """See `rows` for what is kept of each pair."""
        self.pairs = pairs
        self.config = config
        self.llm_folder = _llm_folder(config.llm)
        self.prompt = ChatPrompt.from_pretrained(self.llm_folder, config.system)
        content = hashlib.sha256(
            json.dumps([self.llm_folder.name, config.system, [pair.key() for pair in pairs]]).encode()
        )
        if config.lora is not None:
            content.update((config.lora / "adapter_model.safetensors").read_bytes())
        self.folder = folder / content.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fill(pairs)
        self.hidden, self.ids = self._load(len(pairs))
        table = self._embedding_table()
        self.text_rows = TextRows(config.decoder.text_views, table.__getitem__, self.prompt.tokenizer)
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


class SpeakTask:
    """Stage 2 for the engine (see `vocalnet.training.task.Task`)."""

    def __init__(self, config: SpeakTaskConfig, data_dir: Path, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.train = load_spoken(data_dir, "train", config)
        self.valid = load_spoken(data_dir, "valid", config)
        self.states = {
            "train": AnswerStates(data_dir / "answer_states", config, answer_pairs(self.train)),
            "valid": AnswerStates(data_dir / "answer_states", config, answer_pairs(self.valid)),
        }
        torch.manual_seed(seed)
        if config.init_decoder is not None:
            decoder = start_decoder(config.init_decoder, config.decoder, config.modules_from == "decoder")
            decoder.requires_grad_(config.train == "all")
            decoder.mtp_layers.requires_grad_(True)
        else:
            decoder = SpeechDecoder(config.decoder)
            initialise(decoder)
        phonemes = 1 + max(int(item.phonemes.max()) for item in self.train if len(item.phonemes))
        auxiliary = config.phoneme_weight and config.train == "all"
        if config.answers == "own":
            self.train = self._own_words(decoder, data_dir)
        self.model = SpeakModel(decoder, max(phonemes, 0) if auxiliary else 0, config.order_weight > 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weight decay on matrices alone."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        common = {"lr": self.config.lr, "betas": (0.9, 0.98)}
        return [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.config.weight_decay, **common},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **common},
        ]

    def batches(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Every answer and a share of the other sentences once, under one question each.

        Batches are of about equal length, drawn and shuffled by (seed, epoch).
        """
        generator = random.Random(f"{self.seed}/{epoch}")
        first = first_pairs(self.train)
        order = list(range(len(self.train)))
        generator.shuffle(order)
        if self.config.sentence_share < 1:
            others = [i for i in order if self.train[i].questions[0].question in self.config.sentence_prompts]
            left_out = set(others[round(len(others) * self.config.sentence_share) :])
            order = [i for i in order if i not in left_out]
        for group in _bucketed(order, self._rows, self.config.batch_positions, generator):
            pairs = [first[i] + generator.randrange(len(self.train[i].questions)) for i in group]
            coins = [generator.random() < self.config.streaming_probability for _ in group]
            yield self._collate([self.train[i] for i in group], pairs, coins, self.states["train"])

    def loss(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Cross entropies of decoder and modules, and the auxiliary phoneme classification."""
        decoder, config = self.model.decoder, self.config
        modules = active_modules(config, decoder.config.mtp_modules, step)
        noisy = [self._noisy(row) for row in batch["tokens"]]
        everything = config.train == "all"
        guided = (config.guide_layer, config.guide_heads) if config.guide_weight and everything else None
        result = decoder.training_pass(
            [self._veiled(rows) for rows in batch["text"]] if everything else batch["text"],
            batch["tokens"],
            batch["streaming"],
            modules,
            noisy,
            guided,
            decoder_logits=everything or config.targets == "own",
        )
        if config.targets == "own":
            result = own_targets(result, [len(row) + 1 for row in batch["tokens"]], decoder, config.own_temperature)
        loss, losses = token_losses(result, config.decay, normalised=config.normalise_decay)
        metrics: dict[str, float | Tensor] = {**losses, "positions": float(len(result.targets[0]))}
        extra, details = self._auxiliary(result, batch)
        return loss + extra, metrics | details

    def _auxiliary(self, result: TrainingPass, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The weighted losses beside token prediction, and each as a metric."""
        config, group = self.config, self.model.decoder.mtp_layers.group
        loss = result.hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, float | Tensor] = {}
        if self.model.phoneme_head is not None:
            targets = torch.cat([F.pad(row, (0, 1), value=IGNORE)[::group] for row in batch["phonemes"]])
            phoneme = F.cross_entropy(self.model.phoneme_head(result.hidden).float(), targets, ignore_index=IGNORE)
            loss = loss + config.phoneme_weight * phoneme
            metrics["phoneme"] = phoneme.detach()
        if result.attention is not None:
            words = [F.pad(row, (0, 1), value=IGNORE)[::group] for row in batch["words"]]
            guide = guide_loss(result.attention, batch["text_words"], words)
            loss = loss + config.guide_weight * guide
            metrics["guide"] = guide.detach()
        if self.model.order_head is not None:
            full = [F.pad(row, (0, 1), value=self.model.decoder.config.eos) for row in batch["tokens"]]
            order = order_loss(self.model.order_head(result.hidden).float(), full, config.order_window, group)
            loss = loss + config.order_weight * order
            metrics["order"] = order.detach()
        return loss, metrics

    def validate(self) -> dict[str, float]:
        """Under the streaming mask: CE and accuracy per head, and token error of free generation with K = 0 and all."""
        metrics = self._teacher_forced()
        head, most = self.model.decoder.mtp_layers, self.model.decoder.config.mtp_modules
        for modules in sorted({0, most} if head.group == 1 else {most}):
            metrics[f"token_error_k{modules}"] = self._free_running(modules)
        return metrics

    def export(self, folder: Path) -> None:
        """Writes the decoder's weights and config."""
        save_part(self.model.decoder, self.model.decoder.config, folder)
        options = to_dict(self.config) | {"llm": Path(self.config.llm).name, "lora": None, "init_decoder": None}
        (folder / "task.json").write_text(json.dumps(options, indent=2) + "\n")

    # Parts

    def _own_words(self, decoder: SpeechDecoder, data_dir: Path) -> list[Spoken]:
        """The training sentences as the decoder itself says them; where phonemes and words lie is then unknown."""
        states, first = self.states["train"], first_pairs(self.train)
        lengths = [len(item.tokens) for item in self.train]
        made = own_answers(
            decoder,
            lambda index: states.rows(first[index]),
            lengths,
            data_dir / "own_answers",
            states.folder.name,
            self.config.own_temperature,
            self.seed,
        )
        unknown = [torch.full_like(tokens, IGNORE) for tokens in made]
        return [
            replace(item, tokens=tokens, phonemes=blank, words=blank)
            for item, tokens, blank in zip(self.train, made, unknown, strict=True)
        ]

    def _noisy(self, tokens: Tensor) -> Tensor:
        """Input tokens, some of them replaced by random units."""
        if not self.config.token_noise:
            return tokens
        other = torch.randint_like(tokens, self.model.decoder.config.units)
        return torch.where(torch.rand(tokens.shape, device=tokens.device) < self.config.token_noise, other, tokens)

    def _veiled(self, rows: Tensor) -> Tensor:
        """Text rows (T, input_size), some of them without all but the letters."""
        config = self.model.decoder.config
        if not self.config.letters_alone or "spelling" not in config.text_views:
            return rows
        dense = torch.arange(rows.shape[-1], device=rows.device) < rows.shape[-1] - SPELLING_SIZE
        alone = torch.rand(len(rows), 1, device=rows.device) < self.config.letters_alone
        return rows.masked_fill(alone & dense, 0)

    def _rows(self, index: int) -> int:
        """Rows of a sentence, about: text tokens are some 4 characters long."""
        return len(self.train[index].tokens) + len(self.train[index].text) // 4 + 3

    def _collate(
        self, items: Sequence[Spoken], pairs: Sequence[int], coins: Sequence[bool], states: AnswerStates
    ) -> dict[str, Any]:
        """`text`, `tokens`, `phonemes`, `words`, `text_words`: a tensor per sample; `streaming` (B,) bool."""
        return {
            "text": [states.rows(pair) for pair in pairs],
            "tokens": [item.tokens for item in items],
            "phonemes": [item.phonemes for item in items],
            "words": [item.words for item in items],
            "text_words": [states.words(pair) for pair in pairs],
            "streaming": torch.tensor(coins),
        }

    def _teacher_forced(self) -> dict[str, float]:
        """CE and top-1 accuracy of every head over the validation sentences, weighted by targets."""
        decoder, device = self.model.decoder, self.model.decoder.embedding.weight.device
        first, totals, count = first_pairs(self.valid), dict[str, float](), 0
        chosen = range(min(self.config.validation_sentences, len(self.valid)))
        for start in range(0, len(chosen), 16):
            group = chosen[start : start + 16]
            items = [self.valid[i] for i in group]
            batch = self._collate(items, [first[i] for i in group], [True] * len(group), self.states["valid"])
            result = decoder.training_pass(
                [row.to(device) for row in batch["text"]],
                [row.to(device) for row in batch["tokens"]],
                batch["streaming"].to(device),
            )
            size = len(result.targets[0])
            for name, value in token_losses(result, self.config.decay, accuracy=True)[1].items():
                totals[name] = totals.get(name, 0.0) + float(value) * size
            count += size
        return {name: value / count for name, value in sorted(totals.items())}

    def _free_running(self, modules: int) -> float:
        """Edits per token between greedy streaming generation and the recorded tokens."""
        decoder, first = self.model.decoder, first_pairs(self.valid)
        chosen = range(min(self.config.free_running, len(self.valid)))
        edits = total = 0
        for i in chosen:
            tokens = self.valid[i].tokens.tolist()
            text = self.states["valid"].rows(first[i]).to(decoder.embedding.weight.device)
            state = decoder.init_state(len(text) + 1, 2 * len(tokens) + 32, modules)
            decoder.add_text(text, state, last=True)
            edits += edit_distance(generate_chunk(decoder, state, SamplingConfig(), 2 * len(tokens) + 16), tokens)
            total += len(tokens)
        return edits / max(1, total)


def guide_loss(attention: Tensor, text_words: Sequence[Tensor], words: Sequence[Tensor]) -> Tensor:
    """Minus the log of the attention that lies on the word about to be said: heads learn to follow the text.

    Alignment would emerge by itself, but late (Tachibana et al., 2018, guide attention along the diagonal). Rows whose
    word is not visible yet do not count.

    Args:
        attention: (N, heads, text rows), log attention; N counts the rows of all samples, S_i + 1 each here.
        text_words: per sample (T_i,), the word of each text row.
        words: per sample (S_i + 1,), the word of the token that each row predicts, IGNORE where there is none.
    """
    rows = pad_sequence(list(text_words), True, -1).repeat_interleave(
        torch.tensor([len(row) for row in words], device=attention.device), 0
    )  # (N, Tt)
    target = torch.cat(list(words))
    hit = (rows == target[:, None])[:, None, : attention.shape[-1]]  # (N, 1, Tt)
    found = attention.masked_fill(~hit, float("-inf")).amax(-1) > float("-inf")
    mass = attention.masked_fill(~hit, -1e4).logsumexp(-1)  # (N, heads)
    return -(mass * found).sum() / found.sum().clamp(min=1)


def active_modules(config: SpeakTaskConfig, count: int, step: int) -> int:
    """How many of `count` modules take part at a step.

    delayed: none for a stage, then one more each stage (the decoder itself learns first); forward: one, then one more
    each stage; reverse: all, then one less each stage, down to one (curricula of Aynetdinov and Akbik, 2025).
    """
    if not config.module_steps:
        return count
    stage = step // config.module_steps
    if config.curriculum == "reverse":
        return max(min(1, count), count - stage)
    return min(count, stage + (config.curriculum == "forward"))


@torch.no_grad()
def own_targets(
    result: TrainingPass, lengths: Sequence[int], decoder: SpeechDecoder, temperature: float
) -> TrainingPass:
    """The pass with targets drawn from the decoder's own law at the rows where it predicts them (self-distillation).

    A module then learns what the decoder would say there, not what one recording happened to have; that is what
    verification accepts. `lengths`: rows of each sample.
    """
    logits = result.logits[0]
    assert logits is not None
    scores = logits.detach().float()
    own = scores.argmax(-1) if temperature == 0 else draw(torch.softmax(scores / temperature, -1))
    targets = list(result.targets)
    for predictor in range(1, len(targets)):
        offset = decoder.mtp_layers.offset(predictor)
        targets[predictor] = torch.cat(
            [F.pad(row, (0, offset), value=IGNORE)[offset:] for row in own.split(list(lengths))]
        )
    return replace(result, logits=[None, *result.logits[1:]], targets=targets)


def order_loss(scores: Tensor, tokens: Sequence[Tensor], window: int, group: int = 1) -> Tensor:
    """Token-order prediction (Zuhri et al., 2025): rank the vocabulary by how soon each token comes.

    Listwise cross entropy between softmax(y) and softmax(scores), where y[v] = window - distance to v's next
    occurrence, and −∞ where there is none within the window.

    Args:
        scores: (N, vocabulary) at the rows of all samples.
        tokens: per sample (S_i,), the token that each row predicts, EOS included; every `group`-th begins a row.
    """
    coming = torch.cat([F.pad(row, (0, window - 1), value=IGNORE).unfold(0, window, 1)[::group] for row in tokens])
    before = torch.tril(torch.ones(window, window, dtype=torch.bool, device=coming.device), -1)
    again = ((coming[:, :, None] == coming[:, None, :]) & before).any(-1)  # a nearer one counts
    rank = torch.arange(window, 0, -1, device=coming.device, dtype=torch.float32).expand(len(coming), -1)
    law = rank.masked_fill(again | (coming == IGNORE), float("-inf")).softmax(-1)
    found = scores.log_softmax(-1).gather(1, coming.clamp(min=0))
    return -(law * found).sum(-1).mean()


def start_decoder(folder: Path, config: SpeechDecoderConfig, fresh: bool = False) -> SpeechDecoder:
    """A trained decoder with the text input and the MTP modules that `config` asks for.

    The modules are the folder's own if it has the same kind and number, unless `fresh`; else they begin as copies of
    the decoder's last layer and output head, from which they learn several times faster than from random weights.
    Views of the text that the trained decoder did not have begin without effect.
    """
    trained = load_part(SpeechDecoder, SpeechDecoderConfig, folder)
    wanted = {name: getattr(config, name) for name in ("text_input", "mtp_head", "mtp_modules")}
    if not config.text_input.startswith(trained.config.text_input):
        raise ConfigError(f"text_input is '{config.text_input}'; {folder} was trained on '{trained.config.text_input}'")
    decoder = SpeechDecoder(replace(trained.config, **wanted))
    initialise(decoder)
    state = trained.state_dict()
    if config.text_input != trained.config.text_input:
        weight = state["text_input.proj.weight"]
        state["text_input.proj.weight"] = F.pad(weight, (0, decoder.config.input_size - weight.shape[1]))
    own = (trained.config.mtp_head, trained.config.mtp_modules)
    if not fresh and own == (config.mtp_head, config.mtp_modules):
        decoder.load_state_dict(state)
        return decoder
    decoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("mtp_layers.")}, strict=False)
    decoder.mtp_layers.start_from(layers_of(decoder.decode_layers)[-1], decoder.norm, decoder.output_proj)
    return decoder


def initialise(decoder: SpeechDecoder) -> None:
    """Normal weights of 0.02; the two matrices that write to the residual stream smaller the deeper the stack."""
    depth = decoder.config.layers + decoder.config.projector_layers + decoder.config.mtp_modules
    for name, parameter in decoder.named_parameters():
        if parameter.ndim > 1:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if writes else 0.02)
    decoder.mtp_layers.reset()


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Least number of insertions, deletions and substitutions that turn one sequence into the other."""
    row = np.arange(len(second) + 1)
    target = np.asarray(second)
    for i, token in enumerate(first, start=1):
        diagonal = row[:-1] + (target != token)
        best = np.minimum(diagonal, row[1:] + 1)
        # Insertions run along the row: a running minimum of cost minus position.
        steps = np.arange(1, len(second) + 1)
        best = np.minimum.accumulate(np.concatenate(([i], best - steps)))[1:] + steps
        row = np.concatenate(([i], best))
    return int(row[-1])


def answer_pairs(items: Sequence[Spoken]) -> list[Pair]:
    """Every question with its answer, sentence after sentence."""
    return [Pair(question, item.text) for item in items for question in item.questions]


def first_pairs(items: Sequence[Spoken]) -> list[int]:
    """Index of each sentence's first pair in `answer_pairs`."""
    counts = [len(item.questions) for item in items]
    return [sum(counts[:i]) for i in range(len(counts))] if len(counts) < 2 else [0, *np.cumsum(counts)[:-1].tolist()]


def _bucketed(order: Sequence[int], rows: Any, budget: int, generator: random.Random) -> list[list[int]]:
    """Shuffled batches of items of about equal length whose rows, padded, stay within `budget`."""
    mean = max(1, sum(map(rows, order)) // max(1, len(order)))
    pool = max(1, POOL_BATCHES * budget // mean)
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        group: list[int] = []
        for item in sorted(order[start : start + pool], key=rows):
            if group and rows(item) * (len(group) + 1) > budget:
                batches.append(group)
                group = []
            group.append(item)
        batches.append(group)
    generator.shuffle(batches)
    return batches


def _llm_folder(name: str) -> Path:
    """A folder as given, or a base model by name."""
    if Path(name).is_dir():
        return Path(name)
    from vocalnet.checkpoints import base_model

    return base_model(name)
