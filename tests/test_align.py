"""Stage 1 on a tiny random LLM and made-up features: each phase learns, exports, and hands on to the next."""

import io
import json
import random
import shutil
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vocalnet.adapter import AdapterConfig
from vocalnet.errors import CheckpointError, ConfigError, DataError
from vocalnet.lora import LoraAdapter
from vocalnet.training.align import AlignTask, AlignTaskConfig, LoraSettings, Question, Utterance, balanced

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
ANIMALS = ["cat", "dog", "cow", "duck", "lion", "bee"]
SOUNDS = ["meow", "woof", "moo", "quack", "roar", "buzz"]
WORDS = ["[UNK]", "<s>", "</s>", "user", "assistant", "what", "how", "does", "say", *ANIMALS, *SOUNDS]
ENCODER_WIDTH = 12


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Folder of a tiny Llama with a chat template and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=2, pad_token_id=2,
        initializer_range=0.3,  # logits that LoRA can turn round
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def features(words):
    """Encoder frames of a made-up voice: ten frames a word, the first five in the word's own direction."""
    frames = np.zeros((10 * len(words), ENCODER_WIDTH), np.float16)
    for i, word in enumerate(words):
        frames[10 * i : 10 * i + 5] = np.random.default_rng(WORDS.index(word)).standard_normal(ENCODER_WIDTH)
    return frames


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data in the layout of data_prep."""
    root = tmp_path_factory.mktemp("data")
    (root / "texts").mkdir()
    (root / "question_features").mkdir()
    for split, opening in (("train", "what does"), ("valid", "how does")):
        rows = [
            {"id": f"{split}-{animal}", "question": f"{opening} {animal} say", "answer": sound, "accept": [sound]}
            for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
        ]
        if split == "train":  # held-out phrasings use words heard in training
            rows += [row | {"id": row["id"] + "-2", "question": "how " + row["question"][5:]} for row in rows]
        (root / "texts" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with tarfile.open(root / "question_features" / f"{split}-00000.tar", "w") as tar:
            for row in rows:
                arrays = io.BytesIO()
                np.savez(arrays, whisper=features(row["question"].split()))
                described = json.dumps({"text_id": row["id"]}).encode()
                for suffix, content in (("npz", arrays.getvalue()), ("json", described)):
                    member = tarfile.TarInfo(f"{row['id']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return root


@pytest.fixture
def config(llm):
    """Phase `ctc`; the tests replace what they need."""
    return AlignTaskConfig(
        llm=str(llm),
        adapter=AdapterConfig(encoder_width=ENCODER_WIDTH, hidden=32, dropout=0.0),
        lora=LoraSettings(rank=8, alpha=16),
        batch_size=4,
        answer_tokens=3,
    )


def train(task, steps, rate):
    """The last loss after a little training."""
    groups = [group | {"lr": rate} for group in task.parameter_groups()]
    optimizer = torch.optim.AdamW(groups)
    task.model.train()
    step = 0
    while step < steps:
        for batch in task.batches(step):
            loss, _ = task.loss(batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    task.model.eval()
    return loss.item()


def test_phases_hand_on_to_each_other(config, data, tmp_path):
    ctc = AlignTask(config, data, seed=0)
    assert ctc.model.llm is None
    train(ctc, 90, 1e-2)
    with torch.no_grad():
        assert ctc.validate()["ctc_wer"] < 0.1
    ctc.export(tmp_path / "ctc")

    text = AlignTask(replace(config, phase="answers_text"), data, seed=0)
    assert text.model.adapter is None
    train(text, 80, 1e-2)
    with torch.no_grad():
        assert text.validate() == {"right_by_text": 1.0}
    text.export(tmp_path / "text")
    assert str(config.llm) not in (tmp_path / "text" / "lora" / "adapter_config.json").read_text()

    both = replace(
        config, phase="answers", init_adapter=tmp_path / "ctc" / "adapter", init_lora=tmp_path / "text" / "lora"
    )
    task = AlignTask(replace(both, train_lora=False), data, seed=0)
    with torch.no_grad():
        metrics = task.validate()  # nothing trained yet: the collapsed question reads like the written one
    assert metrics["right_by_text"] == 1.0
    assert metrics["right_by_speech"] >= 0.8
    assert {group["name"] for group in task.parameter_groups()} == {"adapter"}
    task.export(tmp_path / "align")
    assert LoraAdapter(tmp_path / "align" / "lora").targets
    assert len(AlignTask(both, data, seed=0).parameter_groups()) == 2


def test_an_adapter_learns_new_words_and_keeps_what_it_knew(config, data, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(data, small)
    for split in ("train", "valid"):
        texts = small / "texts" / f"{split}.jsonl"
        texts.write_text("".join(line for line in texts.open() if "bee" not in line))
    for archive in (small / "question_features").glob("*.tar"):
        with tarfile.open(data / "question_features" / archive.name) as whole, tarfile.open(archive, "w") as part:
            for member in whole:
                if "bee" not in member.name:
                    part.addfile(member, whole.extractfile(member))
    first = AlignTask(config, small, seed=0)
    first.export(tmp_path / "first")
    second = AlignTask(replace(config, init_adapter=tmp_path / "first" / "adapter"), data, seed=0)
    before, after = first.model.adapter, second.model.adapter
    assert set(after.vocabulary.tolist()) - set(before.vocabulary.tolist()) == {WORDS.index("bee")}
    assert after.table.abs().sum(1).all()  # every word has its embedding
    frames = torch.randn(1, 20, ENCODER_WIDTH)
    assert torch.equal(before.eval()(frames)[0], after.eval()(frames)[0])


@pytest.mark.parametrize("mode", ["collapsed", "frames"])
def test_answers_train_adapter_and_lora(config, data, mode):
    config = replace(config, phase="answers", adapter=replace(config.adapter, mode=mode), kl_weight=0.5)
    task = AlignTask(config, data, seed=0)
    batch = next(iter(task.batches(0)))
    loss, metrics = task.loss(batch, 0)
    assert {"answer", "ctc", "kl", "right", "samples"} <= metrics.keys()
    loss.backward()
    for group in task.parameter_groups():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in group["params"]), group["name"]
    assert train(task, 12, 3e-3) < loss.item()


def test_loss_equals_one_plain_pass_per_sample(config, data, llm):
    """The shared start of the prompt, the padding and the selected rows change nothing."""
    task = AlignTask(replace(config, phase="answers_text", train_lora=True), data, seed=0)
    batch = next(iter(task.batches(0)))
    plain = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    task.model.llm.float()
    losses = []
    for question, answer in zip(batch["questions"], batch["answers"], strict=True):
        ids = torch.cat([task.prefix, question, task.suffix, answer])
        labels = ids.clone()
        labels[: -len(answer)] = -100
        losses.append(plain(ids[None], labels=labels[None]).loss.item())
    loss, _ = task.loss(batch, 0)
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-4)


def with_history(data, folder):
    """The same data, the last question of both splits after two exchanges."""
    shutil.copytree(data, folder)
    for split in ("train", "valid"):
        file = folder / "texts" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[-1]["history"] = [["what does cat say", "meow"], ["how dog", "woof"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_question_after_others_is_read_as_a_session_reads_it(config, data, llm, tmp_path):
    """Prefix, question, suffix, answer, ids between turns, question, suffix: the loss is on the last answer alone."""
    folder = with_history(data, tmp_path / "data")
    task = AlignTask(replace(config, phase="answers", train_adapter=False, ctc_weight=0.0), folder, seed=0)
    question = next(q for q in task.texts.values() if q.history_ids)
    prompt, spoken = task.prompt, [u for u in task.utterances if u.question is question]
    assert len(spoken) == 1
    earlier = []
    for asked, answer in (("what does cat say", "meow"), ("how dog", "woof")):
        earlier += [*prompt.ids(asked), *prompt.suffix_ids(), *prompt.ids(answer), *prompt.next_turn_ids()]
    assert list(question.history_ids) == earlier
    ids = torch.tensor([*prompt.prefix_ids(), *earlier, *question.ids, *prompt.suffix_ids(), *question.answer_ids])
    plain = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16).float()  # the same rounding
    labels = ids.clone()
    labels[: -len(question.answer_ids)] = -100
    expected = plain(ids[None], labels=labels[None]).loss.item()
    task.model.llm.float()
    loss, _ = task.loss(task._collate([question]), 0)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    # A spoken question has its rows in the same place, after the same history.
    task.model.eval()
    batch = task._collate(spoken)
    rows, _ = task._question_rows(batch)
    logits, _ = task._answer_logits(rows, batch["answers"], batch["histories"])
    embed = plain.get_input_embeddings()
    parts = [embed(torch.tensor([*prompt.prefix_ids(), *earlier])), rows[0].float()]
    parts.append(embed(torch.tensor([*prompt.suffix_ids(), *question.answer_ids[:-1]])))
    whole = plain(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(question.answer_ids) :]
    torch.testing.assert_close(logits, whole, atol=1e-3, rtol=1e-3)


def test_validation_tells_questions_with_a_history_apart(config, data, tmp_path):
    folder = with_history(data, tmp_path / "data")
    features = folder / "question_features"
    shutil.copy(features / "valid-00000.tar", features / "dialogue-00000.tar")
    config = replace(config, phase="answers", train_lora=False, validation_questions=3)
    task = AlignTask(config, folder, seed=0)
    assert len(task.valid_dialogues) == 1
    assert not any(question.history_ids for question in task.valid_questions)
    with torch.no_grad():
        metrics = task.validate()
    assert {"right_by_text", "right_after_history", "right_by_speech_after_history"} <= metrics.keys()
    alone = [replace(question, history_ids=()) for question in task.valid_dialogues]
    assert task.answer(alone) != task.answer(task.valid_dialogues), "the history changes what is said"


def test_batches_depend_on_seed_and_epoch_alone(config, data):
    config = replace(config, phase="answers", text_fraction=0.5)
    first, second, third = (AlignTask(config, data, seed) for seed in (0, 0, 1))

    def epoch(task, number):
        return [[ids.tolist() for ids in batch["questions"]] for batch in task.batches(number)]

    assert epoch(first, 0) == epoch(second, 0)
    assert epoch(first, 0) != epoch(first, 1)
    assert epoch(first, 0) != epoch(third, 0)
    spoken = sum(len(batch.get("frames", ())) for batch in first.batches(0))
    written = sum(len(batch["questions"]) for batch in first.batches(0)) - spoken
    assert spoken == written == len(first.utterances)


def test_small_categories_can_weigh_more():
    sizes = {"large": 64, "small": 4, "single": 1}
    questions = [Question(f"{name} {i}", (), (), (), (), name) for name, size in sizes.items() for i in range(size)]
    assert balanced(questions, 1, random.Random(0)) == questions

    def shares(power):
        drawn = balanced(questions, power, random.Random(0))
        assert len(drawn) == pytest.approx(len(questions), abs=2)
        return Counter(question.category for question in drawn), Counter(drawn)

    counts, times = shares(0.5)  # 8 : 2 : 1 of 69
    assert counts == {"large": 50, "small": 13, "single": 6}
    assert {times[question] for question in questions if question.category == "small"} == {3, 4}
    assert shares(0)[0] == {"large": 23, "small": 23, "single": 23}


def test_utterances_are_read_where_the_archive_has_them(config, data):
    task = AlignTask(config, data, seed=0)
    utterance = task.utterances[3]
    assert isinstance(utterance, Utterance)
    expected = features(utterance.question.text.split())
    assert utterance.frames == len(expected)
    assert np.array_equal(utterance.load().numpy(), expected)


def test_what_is_missing_is_named(config, data, tmp_path):
    with pytest.raises(DataError, match="run the texts step"):
        AlignTask(config, tmp_path, seed=0)
    (tmp_path / "texts").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes((data / "texts" / f"{name}.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"no train-\*\.tar"):
        AlignTask(config, tmp_path, seed=0)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        AlignTask(replace(config, init_adapter=tmp_path), data, seed=0)
    with pytest.raises(CheckpointError, match="exported LoRA"):
        AlignTask(replace(config, phase="answers", init_lora=tmp_path), data, seed=0)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match="nothing would be trained"):
        AlignTaskConfig(phase="answers", train_adapter=False, train_lora=False)
    with pytest.raises(ConfigError, match=r"text_fraction is 1\.5"):
        AlignTaskConfig(text_fraction=1.5)
