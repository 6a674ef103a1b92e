"""Stage 1: the spoken question reaches the LLM, and the LLM knows its answers.

Three phases, each one run of the engine; a later phase starts from an earlier one's export:

- `ctc`: the adapter alone learns to spell questions in the LLM's own tokens (no LLM pass: fast);
- `answers_text`: LoRA on the LLM, written questions and answers only, so it can run before any audio exists;
- `answers`: spoken questions (and a share of written ones) → chat prompt → LLM → cross entropy on the answer, with
  CTC as an auxiliary loss and, if wanted, KL to the same LLM reading the question. Trains adapter, LoRA or both.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.checkpoints import base_model
from vocalnet.config import to_dict
from vocalnet.errors import CheckpointError, ConfigError, DataError
from vocalnet.evaluation.accept import is_right, normalise
from vocalnet.parts import load_part, save_part
from vocalnet.prompt import ChatPrompt, Turn

POOL_BATCHES = 32  # batches are cut from length-sorted pools of this many, then shuffled


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021) on every linear layer but the head."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0  # random masks cost a third of the time on a CPU


@dataclass(frozen=True)
class AlignTaskConfig:
    """Options of stage 1."""

    phase: Literal["ctc", "answers_text", "answers"] = "ctc"
    llm: str = "smollm2-135m-instruct"  # a base model's name, or a Hugging Face folder
    system: str = ""  # system prompt; the session must use the same
    adapter: AdapterConfig = field(default_factory=AdapterConfig)  # vocabulary 0: counted from the training questions
    init_adapter: Path | None = None  # folder of an exported adapter
    init_lora: Path | None = None  # folder of an exported LoRA; merged and frozen unless train_lora
    lora: LoraSettings = field(default_factory=LoraSettings)
    train_adapter: bool = True
    train_lora: bool = True
    adapter_lr: float = 1e-3
    lora_lr: float = 5e-4
    batch_size: int = 32
    category_power: float = 1.0  # of written questions: n of a category count as n^power; below 1 small ones weigh more
    frame_noise: float = 0.0  # Gaussian noise on encoder frames in training, relative to their standard deviation
    text_fraction: float = 0.5  # of the samples in phase `answers`: written questions in place of spoken ones
    ctc_weight: float = 0.3
    kl_weight: float = 0.0  # distillation from the same LLM reading the written question
    validation_questions: int = 60  # per way of asking, for greedy answers
    answer_tokens: int = 32  # longest answer in validation

    def __post_init__(self) -> None:
        if self.phase == "answers" and not (self.train_adapter or self.train_lora):
            raise ConfigError("train_adapter and train_lora are both false; nothing would be trained")
        if not 0.0 <= self.text_fraction < 1.0:
            raise ConfigError(f"text_fraction is {self.text_fraction}; allowed: 0 up to, not including, 1")
        if not 0.0 <= self.category_power <= 1.0:
            raise ConfigError(f"category_power is {self.category_power}; allowed: 0 to 1")


@dataclass(frozen=True)
class Question:
    """A question with its gold answer, as text and as LLM tokens."""

    text: str
    accept: tuple[str, ...]
    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # with the end-of-turn token
    history_ids: tuple[int, ...] = ()  # earlier exchanges, between the prompt's prefix and the question
    category: str = ""


@dataclass(frozen=True)
class Utterance:
    """A spoken question: where its encoder features are."""

    question: Question
    archive: Path
    offset: int
    size: int
    frames: int

    def load(self) -> Tensor:
        """Encoder features (T, 512) float16."""
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            with np.load(io.BytesIO(file.read(self.size))) as arrays:
                return torch.from_numpy(arrays["whisper"])


def load_questions(file: Path, prompt: ChatPrompt) -> dict[str, Question]:
    """Reads a `texts/*.jsonl` file: text id → question.

    Raises:
        DataError: the file is missing or has no question.
    """
    if not file.is_file():
        raise DataError(f"no {file}; run the texts step of data preparation first")
    questions = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        history = [Turn(answer, question) for question, answer in row.get("history", ())]
        questions[row["id"]] = Question(
            row["question"],
            tuple(row["accept"]),
            tuple(prompt.ids(row["question"])),
            tuple(prompt.answer_ids(row["answer"])),
            tuple(prompt.history_ids(history)) if history else (),
            row.get("category", ""),
        )
    if not questions:
        raise DataError(f"{file} is empty; run the texts step of data preparation again")
    return questions


def load_utterances(folder: Path, split: str, questions: dict[str, Question]) -> list[Utterance]:
    """Indexes the archives `{split}-*.tar` of question features, in the order of their names; reads no feature yet.

    Raises:
        DataError: no archive, or a sample whose text is not among the questions.
    """
    archives = sorted(folder.glob(f"{split}-*.tar"))
    if not archives:
        raise DataError(f"no {split}-*.tar in {folder}; run the question features step of data preparation first")
    utterances = []
    for archive in archives:
        arrays: dict[str, tuple[int, int, int]] = {}
        described: dict[str, str] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                content = tar.extractfile(member)
                if content is None:
                    continue
                if suffix == "npz":
                    with np.load(io.BytesIO(content.read())) as loaded:
                        arrays[key] = (member.offset_data, member.size, len(loaded["whisper"]))
                elif suffix == "json":
                    described[key] = json.load(content)["text_id"]
        for key, (offset, size, frames) in arrays.items():
            if described.get(key) not in questions:
                raise DataError(
                    f"{archive}: sample {key} names no question of the {split} texts; prepare the data anew"
                )
            utterances.append(Utterance(questions[described[key]], archive, offset, size, frames))
    return utterances


class AlignModel(nn.Module):
    """Adapter and LLM side by side; `llm` is None in phase `ctc`, `adapter` in phase `answers_text`."""

    def __init__(self, adapter: SpeechAdapter | None, llm: Any | None) -> None:
        super().__init__()
        self.adapter = adapter
        self.llm: Any = llm


def load_llm(folder: Path, config: AlignTaskConfig) -> Any:
    """The frozen bf16 LLM; with LoRA on it (a `PeftModel`) where that is trained, or merged where one is given."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16, attn_implementation="sdpa")
    llm.requires_grad_(False)
    if config.init_lora is not None:
        if not (config.init_lora / "adapter_config.json").is_file():
            raise CheckpointError(f"{config.init_lora} has no adapter_config.json; give the folder of an exported LoRA")
        loaded = PeftModel.from_pretrained(llm, str(config.init_lora), is_trainable=config.train_lora)
        return loaded if config.train_lora else loaded.merge_and_unload()
    if not config.train_lora:
        return llm
    lora = config.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(llm, settings)


def balanced(questions: Sequence[Question], power: float, generator: random.Random) -> list[Question]:
    """About as many questions, a category of n with a share in proportion to n^power (1: each question once)."""
    if power == 1:
        return list(questions)
    categories: dict[str, list[Question]] = {}
    for question in questions:
        categories.setdefault(question.category, []).append(question)
    whole = sum(len(members) ** power for members in categories.values())
    items = []
    for members in categories.values():
        times, rest = divmod(round(len(questions) * len(members) ** power / whole), len(members))
        items += members * times + generator.sample(members, rest)
    return items


class AlignTask:
    """Stage 1 for the engine (see `vocalnet.training.task.Task`)."""

    def __init__(self, config: AlignTaskConfig, data_dir: Path, seed: int) -> None:
        self.config = config
        self.seed = seed
        folder = _llm_folder(config.llm)
        self.prompt = ChatPrompt.from_pretrained(folder, config.system)
        self.texts = load_questions(data_dir / "texts" / "train.jsonl", self.prompt)
        valid_texts = load_questions(data_dir / "texts" / "valid.jsonl", self.prompt)
        self.utterances: list[Utterance] = []
        self.valid_utterances: list[Utterance] = []
        self.spoken_dialogues: list[Utterance] = []  # validation questions that come after others
        llm = load_llm(folder, config) if config.phase != "ctc" else None
        adapter = None
        if config.phase != "answers_text":
            features = data_dir / "question_features"
            self.utterances = load_utterances(features, "train", self.texts)
            self.valid_utterances = load_utterances(features, "valid", valid_texts)
            if any(features.glob("dialogue-*.tar")):
                self.spoken_dialogues = load_utterances(features, "dialogue", valid_texts)
            adapter = self._make_adapter(_embedding_table(folder) if llm is None else llm.get_input_embeddings().weight)
        self.model = AlignModel(adapter, llm)
        alone = [question for question in valid_texts.values() if not question.history_ids]
        after_others = [question for question in valid_texts.values() if question.history_ids]
        self.valid_questions = _sample(alone, config.validation_questions)
        self.valid_dialogues = _sample(after_others, config.validation_questions)
        self.prefix = torch.tensor(self.prompt.prefix_ids())
        self.suffix = torch.tensor(self.prompt.suffix_ids())

    def _make_adapter(self, embeddings: Tensor) -> SpeechAdapter:
        """The adapter to train: new with the vocabulary of all training questions, or loaded and taught new words."""
        vocabulary = sorted({token for question in self.texts.values() for token in question.ids})
        trained = self.config.phase == "ctc" or self.config.train_adapter
        if self.config.init_adapter is not None:
            adapter = load_part(SpeechAdapter, AdapterConfig, self.config.init_adapter)
            if trained and adapter.config.vocabulary:
                adapter = adapter.with_vocabulary(vocabulary + adapter.vocabulary.tolist())
        else:
            torch.manual_seed(self.seed)
            adapter = SpeechAdapter(
                replace(self.config.adapter, vocabulary=len(vocabulary), width=embeddings.shape[-1])
            )
            adapter.set_vocabulary(vocabulary)
        adapter.attach(embeddings.float())
        return adapter.requires_grad_(trained)

    # The engine's side

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter and LoRA, each at its own rate."""
        groups = []
        for name, module, rate in (
            ("adapter", self.model.adapter, self.config.adapter_lr),
            ("lora", self.model.llm, self.config.lora_lr),
        ):
            parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
            if parameters:
                groups.append(
                    {"params": parameters, "lr": rate, "betas": (0.9, 0.98), "weight_decay": 0.01, "name": name}
                )
        return groups

    def batches(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Batches of about equal length, spoken and written questions mixed, shuffled by (seed, epoch)."""
        generator = random.Random(f"{self.seed}/{epoch}")
        items: list[Question | Utterance] = list(self.utterances)
        if self.config.phase == "answers_text":
            items = list(balanced(list(self.texts.values()), self.config.category_power, generator))
        elif self.config.phase == "answers":
            share = self.config.text_fraction
            wanted = round(len(items) * share / (1 - share))
            questions = list(self.texts.values())
            items += generator.sample(questions, wanted) if wanted <= len(questions) else questions
        for group in _bucketed(items, self.config.batch_size, self._cost, generator):
            yield self._collate(group)

    def loss(self, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """CTC, answer cross entropy and distillation, as the phase has them."""
        metrics: dict[str, float | Tensor] = {"samples": float(len(batch["questions"]))}
        rows, ctc = self._question_rows(batch)
        if self.config.phase == "ctc":
            assert ctc is not None
            return ctc, metrics | {"ctc": ctc.detach()}
        logits, targets = self._answer_logits(rows, batch["answers"], batch["histories"])
        loss = F.cross_entropy(logits, targets)
        metrics |= {"answer": loss.detach(), "right": (logits.argmax(-1) == targets).float().mean()}
        if ctc is not None and self.config.ctc_weight:
            metrics["ctc"] = ctc.detach()
            loss = loss + self.config.ctc_weight * ctc
        if self.config.kl_weight and ctc is not None:
            with torch.no_grad():
                written = self._written_rows(batch["questions"])
                teacher, _ = self._answer_logits(written, batch["answers"], batch["histories"])
            kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
            metrics["kl"] = kl.detach()
            loss = loss + self.config.kl_weight * kl
        return loss, metrics

    def validate(self) -> dict[str, float]:
        """Word error rate of the CTC reading; share of right greedy answers to written and to spoken questions."""
        metrics: dict[str, float] = {}
        if self.model.adapter is not None:
            metrics["ctc_wer"] = self._ctc_wer()
        if self.model.llm is not None:
            metrics["right_by_text"] = self._share_right(self.valid_questions)
            if self.valid_dialogues:
                metrics["right_after_history"] = self._share_right(self.valid_dialogues)
            if self.model.adapter is not None:
                metrics["right_by_speech"] = self._share_right(
                    _sample(self.valid_utterances, self.config.validation_questions)
                )
                if self.spoken_dialogues:
                    metrics["right_by_speech_after_history"] = self._share_right(
                        _sample(self.spoken_dialogues, self.config.validation_questions)
                    )
        return metrics

    def export(self, folder: Path) -> None:
        """Writes `adapter/` and `lora/` (PEFT's format), as far as the phase has them, and this stage's config.json."""
        config = to_dict(self.config)
        config["llm"] = Path(self.config.llm).name
        if self.model.adapter is not None:
            save_part(self.model.adapter, self.model.adapter.config, folder / "adapter")
        if self.model.llm is not None:
            if self.config.train_lora:
                for settings in self.model.llm.peft_config.values():
                    settings.base_model_name_or_path = config["llm"]  # not a path of this machine
                self.model.llm.save_pretrained(str(folder / "lora"))
            elif self.config.init_lora is not None and self.config.init_lora.resolve() != (folder / "lora").resolve():
                shutil.copytree(self.config.init_lora, folder / "lora", dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    # Batches

    def _cost(self, item: Question | Utterance) -> float:
        """What an item's padded length is sorted by: LLM positions, or encoder frames where no LLM runs."""
        if self.config.phase == "ctc" and isinstance(item, Utterance):
            return item.frames
        question = item.question if isinstance(item, Utterance) else item
        return len(question.history_ids) + len(question.ids) + len(question.answer_ids)

    def _collate(self, group: Sequence[Question | Utterance]) -> dict[str, Any]:
        """Spoken questions first: `frames` (S, T, 512) and `lengths` (S,) belong to the first S samples."""
        spoken = [item for item in group if isinstance(item, Utterance)]
        written = [item for item in group if isinstance(item, Question)]
        questions = [item.question for item in spoken] + written
        batch: dict[str, Any] = {
            "questions": [torch.tensor(question.ids) for question in questions],
            "answers": [torch.tensor(question.answer_ids) for question in questions],
            "histories": [torch.tensor(question.history_ids, dtype=torch.long) for question in questions],
        }
        if spoken:
            features = [item.load() for item in spoken]
            batch["frames"] = pad_sequence(features, batch_first=True)
            batch["lengths"] = torch.tensor([len(frames) for frames in features])
        return batch

    # The computation

    def _written_rows(self, questions: Iterable[Tensor]) -> list[Tensor]:
        embed = _causal(self.model.llm).get_input_embeddings()
        return [embed(ids) for ids in questions]

    def _question_rows(self, batch: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """What stands in each sample's `<speech>` slot, and the CTC loss of the spoken ones."""
        adapter, questions = self.model.adapter, batch["questions"]
        if "frames" not in batch:
            return self._written_rows(questions), None
        assert adapter is not None
        spoken = len(batch["frames"])
        frames = batch["frames"].float()
        if self.model.training and self.config.frame_noise:
            frames = frames + self.config.frame_noise * frames.std() * torch.randn_like(frames)
        hidden, lengths = adapter(frames, batch["lengths"])
        # Validation may hold tokens that no training question has, which CTC could not spell.
        targets = [ids.tolist() for ids in questions[:spoken]] if self.model.training else []
        ctc = adapter.ctc_loss(hidden, lengths, targets) if targets else None
        if self.config.phase == "ctc":
            return [], ctc
        return adapter.rows(hidden, lengths) + self._written_rows(questions[spoken:]), ctc

    def _answer_logits(
        self, rows: Sequence[Tensor], answers: Sequence[Tensor], histories: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, vocabulary) float32 and targets (N,) over all answer tokens; the head runs on those rows alone."""
        llm = _causal(self.model.llm)
        embed = llm.get_input_embeddings()
        after = embed(self.suffix.to(embed.weight.device))
        sequences = [
            torch.cat([embed(history), row.to(after.dtype), after, embed(answer[:-1])])
            for row, answer, history in zip(rows, answers, histories, strict=True)
        ]
        # All samples share the prompt's beginning: it is run once, with gradients, and its keys and values repeated.
        start = llm.get_decoder()(inputs_embeds=embed(self.prefix.to(after.device))[None], use_cache=True)
        cache = start.past_key_values
        cache.batch_repeat_interleave(len(sequences))
        # Padding is on the right and attention causal, so no mask is needed: padded rows are simply not read.
        inputs = pad_sequence(sequences, batch_first=True)
        hidden = llm.get_decoder()(inputs_embeds=inputs, past_key_values=cache).last_hidden_state  # (B, T, D)
        wanted = torch.cat(
            [hidden[i, len(s) - len(a) : len(s)] for i, (s, a) in enumerate(zip(sequences, answers, strict=True))]
        )
        return llm.get_output_embeddings()(wanted).float(), torch.cat(list(answers))

    # Validation

    def _ctc_wer(self) -> float:
        """Word error rate of greedy CTC over the validation utterances (their written words as reference)."""
        import jiwer

        adapter = self.model.adapter
        assert adapter is not None
        references, readings = [], []
        for group in _chunks(self.valid_utterances, self.config.batch_size):
            batch = self._collate(group)
            device = adapter.linear1.weight.device
            hidden, lengths = adapter(batch["frames"].float().to(device), batch["lengths"].to(device))
            readings += [normalise(self.prompt.decode(ids)) for ids in adapter.transcribe(hidden, lengths)]
            references += [normalise(utterance.question.text) for utterance in group]
        return float(jiwer.wer(references, readings))

    def _share_right(self, items: Sequence[Question | Utterance]) -> float:
        answers = [answer for group in _chunks(items, self.config.batch_size) for answer in self.answer(group)]
        questions = [item.question if isinstance(item, Utterance) else item for item in items]
        right = [is_right(text, q.accept) for text, q in zip(answers, questions, strict=True)]
        return sum(right) / max(1, len(right))

    @torch.no_grad()
    def answer(self, group: Sequence[Question | Utterance]) -> list[str]:
        """Greedy answers to spoken or written questions, all of one kind."""
        llm = _causal(self.model.llm)
        embed = llm.get_input_embeddings()
        device = embed.weight.device
        batch = self._collate(group)
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        moved["questions"] = [ids.to(device) for ids in batch["questions"]]
        rows, _ = self._question_rows(moved)
        before, after = embed(self.prefix.to(device)), embed(self.suffix.to(device))
        sequences = [
            torch.cat([before, embed(history.to(device)), row.to(before.dtype), after])
            for row, history in zip(rows, batch["histories"], strict=True)
        ]
        generated = llm.generate(
            inputs_embeds=pad_sequence(sequences, batch_first=True, padding_side="left"),
            attention_mask=pad_sequence(
                [torch.ones(len(s), dtype=torch.long, device=device) for s in sequences],
                batch_first=True,
                padding_side="left",
            ),
            max_new_tokens=self.config.answer_tokens,
            do_sample=False,
            eos_token_id=list(self.prompt.stop_ids),
            pad_token_id=self.prompt.end_id,
        )
        return [self.prompt.decode(ids.tolist()) for ids in generated]


def _causal(llm: Any) -> Any:
    """The Hugging Face model under a `PeftModel`, or the model itself."""
    return llm.get_base_model() if hasattr(llm, "get_base_model") else llm


def _llm_folder(name: str) -> Path:
    """A folder as given, or a base model by name."""
    return Path(name) if Path(name).is_dir() else base_model(name)


def _embedding_table(folder: Path) -> Tensor:
    """The LLM's input embeddings without keeping the LLM."""
    from transformers import AutoModelForCausalLM

    llm: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    return llm.get_input_embeddings().weight.detach().clone()


def _sample(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, always the same ones."""
    return random.Random(0).sample(list(items), min(count, len(items)))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _bucketed(items: Sequence[Any], size: int, cost: Any, generator: random.Random) -> Iterator[list[Any]]:
    """Shuffled batches of items of about equal cost: sorted within pools, so that little is padding."""
    order = list(items)
    generator.shuffle(order)
    batches = []
    for pool in _chunks(order, size * POOL_BATCHES):
        batches += [list(group) for group in _chunks(sorted(pool, key=cost), size)]
    generator.shuffle(batches)
    yield from batches
