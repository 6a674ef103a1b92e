"""Stage 2: the speech decoder learns to say the LLM's answers.

The LLM does not train here, so its hidden states are computed once and kept on disk; after that only the decoder runs.
Each distinct spoken sentence has one sequence of speech tokens and up to a few questions that lead to it, so the
decoder meets the same words in several contexts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vocalnet.config import to_dict
from vocalnet.decoding import generate_chunk
from vocalnet.errors import ConfigError, DataError
from vocalnet.parts import load_part, save_part
from vocalnet.sampling import SamplingConfig, draw
from vocalnet.speech_decoder import IGNORE, SpeechDecoder, TrainingPass, layers_of, token_losses
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.text_rows import PRONUNCIATION_SIZE
from vocalnet.training.answer_states import AnswerStates
from vocalnet.training.own_answers import own_answers
from vocalnet.training.speak_config import SpeakTaskConfig
from vocalnet.training.spoken import Spoken, answer_pairs, first_pairs, load_spoken, paired_tokens

POOL_BATCHES = 16  # batches are cut from length-sorted pools of this many, then shuffled


class SpeakModel(nn.Module):
    """The decoder, and linear layers for the auxiliary tasks, which are thrown away after training."""

    def __init__(self, decoder: SpeechDecoder, phonemes: int, order: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self.phoneme_head = nn.Linear(decoder.config.width, phonemes) if phonemes else None
        self.order_head = nn.Linear(decoder.config.width, decoder.config.vocabulary) if order else None


class SpeakTask:
    """Stage 2 for the engine (see `vocalnet.training.task.Task`)."""

    def __init__(self, config: SpeakTaskConfig, data_dir: Path, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.train = load_spoken(data_dir, "train", config)
        self.valid = load_spoken(data_dir, "valid", config)
        self.states = {
            split: AnswerStates(data_dir, config, answer_pairs(items))
            for split, items in (("train", self.train), ("valid", self.valid))
        }
        table = self.states["train"].pronunciations
        torch.manual_seed(seed)
        wanted = replace(config.decoder, pronounced=len(table))
        if config.init_decoder is not None:
            decoder = start_decoder(config.init_decoder, wanted, config.modules_from == "decoder")
            decoder.requires_grad_(config.train == "all")
            decoder.mtp_layers.requires_grad_(True)
        else:
            decoder = SpeechDecoder(wanted)
            initialise(decoder)
        if config.train == "modules" and not decoder.pronunciations.equal(table):
            raise ConfigError(
                f"train is 'modules' but {config.init_decoder} learned from other pronunciations than {data_dir} has; "
                "make them again from its data, or set train to 'all'"
            )
        decoder.pronunciations.copy_(table)
        if config.init_tokens is not None:
            carry_tokens(decoder, paired_tokens(config.init_tokens, self.train, decoder.config.units))
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
        if not self.model.decoder.pronunciations.cpu().equal(self.states["train"].pronunciations):
            raise DataError("the pronunciations in the data changed since this run's checkpoint; give another output")
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
        options = to_dict(self.config) | {
            "llm": Path(self.config.llm).name,
            "lora": None,
            "init_decoder": None,
            "init_tokens": None,
        }
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
        """Text rows (T, input_size), some of them without all but their phonemes."""
        if not self.config.phonemes_alone or "pronunciation" not in self.model.decoder.config.text_views:
            return rows
        dense = torch.arange(rows.shape[-1], device=rows.device) < rows.shape[-1] - PRONUNCIATION_SIZE
        alone = torch.rand(len(rows), 1, device=rows.device) < self.config.phonemes_alone
        alone &= rows[:, -PRONUNCIATION_SIZE:].any(-1, keepdim=True)  # the end token, and signs, have none
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
    Views of the text that the trained decoder did not have begin without effect; those that it had and `config` has
    not are left out.
    """
    trained = load_part(SpeechDecoder, SpeechDecoderConfig, folder)
    wanted = {name: getattr(config, name) for name in ("text_input", "pronounced", "mtp_head", "mtp_modules")}
    if trained.config.units != config.units:
        raise ConfigError(f"units is {config.units}; {folder} speaks {trained.config.units}")
    if (trained.config.text_input == "hidden") != (config.text_input == "hidden"):
        raise ConfigError(f"text_input is '{config.text_input}'; {folder} was trained on '{trained.config.text_input}'")
    decoder = SpeechDecoder(replace(trained.config, **wanted))
    initialise(decoder)
    state = {name: value for name, value in trained.state_dict().items() if name != "pronunciations"}
    if decoder.config.pronounced:
        same = decoder.config.pronounced == trained.config.pronounced
        state["pronunciations"] = trained.pronunciations if same else decoder.pronunciations
    if config.text_input != trained.config.text_input:
        weight = state["text_input.proj.weight"]
        parts = weight.split([size for _, size in trained.config.view_sizes], 1)
        columns = dict(zip(trained.config.text_views, parts, strict=True))
        kept = [columns.get(view, weight.new_zeros(len(weight), size)) for view, size in decoder.config.view_sizes]
        state["text_input.proj.weight"] = torch.cat(kept, 1)
    own = (trained.config.mtp_head, trained.config.mtp_modules)
    if not fresh and own == (config.mtp_head, config.mtp_modules):
        decoder.load_state_dict(state)
        return decoder
    decoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("mtp_layers.")}, strict=False)
    decoder.mtp_layers.start_from(layers_of(decoder.decode_layers)[-1], decoder.norm, decoder.output_proj)
    return decoder


@torch.no_grad()
def carry_tokens(decoder: SpeechDecoder, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives every token the mean of what the decoder knew of the tokens that stood in its place before.

    A tokenizer that was trained on means nearly the same by its codes, but moves some; their rows of embedding and
    output move with them, and tokens that never occur keep their own.
    """
    size = decoder.config.vocabulary
    places = torch.cat([new * size + old for old, new in pairs])
    table = torch.bincount(places, minlength=size * size).view(size, size).float()
    table += torch.diag((table.sum(1) == 0).float())
    table /= table.sum(1, keepdim=True)
    for name, parameter in decoder.named_parameters():  # the MTP modules' own outputs as well
        if name == "embedding.weight" or name.endswith(("output_proj.weight", "output_proj.bias")):
            parameter.copy_(table @ parameter)


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
