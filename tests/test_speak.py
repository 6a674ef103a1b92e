"""Stage 2: data, precomputed hidden states, batches, losses, export; on a tiny LLM and made-up speech tokens."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from tests.tiny_model import pronunciations, tiny_llm, tiny_model, tokenizer
from vocalnet.backbone import Backbone
from vocalnet.decoding import generate_chunk
from vocalnet.errors import ConfigError, DataError
from vocalnet.mtp import MTP_HEADS
from vocalnet.parts import load_part, save_part
from vocalnet.sampling import SamplingConfig
from vocalnet.session import Turn
from vocalnet.shards import text_id
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig
from vocalnet.training.answer_states import PRONUNCIATIONS, AnswerStates
from vocalnet.training.speak import (
    SpeakTask,
    active_modules,
    carry_tokens,
    edit_distance,
    guide_loss,
    order_loss,
    own_targets,
)
from vocalnet.training.speak_config import SpeakTaskConfig
from vocalnet.training.spoken import Asked, Pair, load_spoken, spoken_words, text_words

DECODER = SpeechDecoderConfig(
    llm_hidden_size=48,
    width=32,
    heads=2,
    ffn=48,
    units=50,
    layers=2,
    projector_layers=1,
    mtp_modules=2,
    text_input="hidden+embedding",
    speech_position_scale=0.25,
)


def add(tar, name, write):
    file = io.BytesIO()
    write(file)
    info = tarfile.TarInfo(name)
    info.size = len(file.getvalue())
    file.seek(0)
    tar.addfile(info, file)


def write_split(folder, split, count, seed):
    """Sentences of a few words; word w is spoken as w, w + 1, w, w + 1, with a boundary before the next."""
    generator = random.Random(seed)
    rows = []
    for kind in ("answer_tokens", "answer_features"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with (
        tarfile.open(folder / "answer_tokens" / f"{split}-00000.tar", "w") as tokens,
        tarfile.open(folder / "answer_features" / f"{split}-00000.tar", "w") as features,
    ):
        for i in range(count):
            words = generator.sample(range(40), generator.randint(2, 7))
            text = " ".join(f"w{word}" for word in words)
            spoken = np.array([token for word in words for token in (49, word, word + 1, word, word + 1)][1:])
            phonemes = np.where(spoken == 49, 16, spoken + 20).repeat(2)
            add(tokens, f"{text_id(text)}.npy", lambda f, x=spoken: np.save(f, x.astype(np.int16)))
            add(features, f"{text_id(text)}.npz", lambda f, x=phonemes: np.savez(f, phoneme=x.astype(np.int16)))
            rows += [
                {"id": f"{split}{i}{j}", "question": f"w{j} w{i}", "answer": text, "spoken": text} for j in range(2)
            ]
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data folder, config)."""
    folder = tmp_path_factory.mktemp("speak")
    write_split(folder / "data", "train", 24, 0)
    write_split(folder / "data", "valid", 4, 1)
    torch.manual_seed(0)
    tiny_llm().save_pretrained(folder / "llm")
    tokenizer().save_pretrained(folder / "llm")
    config = SpeakTaskConfig(
        DECODER,
        llm=str(folder / "llm"),
        batch_positions=120,
        module_steps=0,
        free_running=2,
        phoneme_weight=0.3,
        lr=5e-3,
    )
    return folder / "data", config


def test_words_of_speech_and_text():
    frames = np.array([0, 0, 5, 5, 16, 7, 7, 16, 16, 9, 0, 0])
    assert spoken_words(frames, 3, 16).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert spoken_words(frames, 4, 16) is None
    assert spoken_words(np.zeros(5), 1, 16) is None
    assert text_words("The moon.", [1, 3, 6, 8, 9]) == [0, 0, 1, 1, 1]


def test_edit_distance():
    assert edit_distance([], [1, 2]) == 2
    assert edit_distance([1, 2, 3], [1, 3]) == 1
    assert edit_distance(list(b"kitten"), list(b"sitting")) == 3
    assert edit_distance([1, 2], []) == 2


def test_guide_loss_wants_the_word():
    text = [torch.tensor([-1, 0, 0, 1, 2])]
    words = [torch.tensor([0, 1, -100, -100])]
    attention = torch.full((4, 1, 5), -20.0)
    attention[0, 0, 1:3] = np.log(0.5)  # both rows of word 0
    attention[1, 0, 3] = 0.0
    assert guide_loss(attention, text, words).item() == pytest.approx(0, abs=1e-5)
    attention[1, 0, 3] = -3.0
    assert guide_loss(attention, text, words).item() == pytest.approx(1.5, abs=1e-4)
    attention[1, 0, 3] = float("-inf")  # not visible yet: does not count
    assert guide_loss(attention, text, words).item() == pytest.approx(0, abs=1e-5)


def test_states_are_those_of_the_llm(world):
    data, config = world
    task = SpeakTask(config, data, 0)
    states = task.states["train"]
    index = 5
    pair = states.pairs[index]
    backbone = Backbone(states.llm_folder, "bf16")
    prompt = states.prompt.text_ids(pair.asked.question)
    ids = prompt + states.prompt.answer_ids(pair.answer)[:-1]
    hidden = backbone.prefill(backbone.embed(ids), backbone.init_state(len(ids)))[0, len(prompt) :]
    rows = states.rows(index)
    torch.testing.assert_close(rows[:-1, :48], hidden.float(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(rows[:-1, 48:], backbone.embed(ids)[0, len(prompt) :].float(), atol=0.01, rtol=0.01)
    assert rows[-1, :48].equal(rows[-1, 48:])  # the end token: its embedding twice
    # A second task reads the file instead of the LLM.
    for file in states.folder.glob("*.safetensors"):
        file.touch()
        before = file.stat().st_mtime_ns
    SpeakTask(config, data, 0)
    assert file.stat().st_mtime_ns == before


def test_states_under_a_history_are_those_of_a_session(world, tmp_path):
    """A conversation typed into a session: the LLM sees, token for token, what the training states were made from."""
    _, config = world
    history = (("w1 w2", "w3"), ("w4", "w5 w6"))
    pairs = [Pair(Asked("w7", history), "w8 w9 w10"), Pair(Asked("w7"), "w8 w9 w10")]
    states = AnswerStates(tmp_path, config, pairs)
    model = tiny_model()
    seen = []
    prefill = model.backbone.prefill
    model.backbone.prefill = lambda x, state: seen.append((state.length, x.clone())) or prefill(x, state)
    session = model.session()
    for question, answer in history:
        session.push_text(question)
        turn = Turn(session.question.pop().rows, model.prompt.ids(answer))
        session.turns.append(turn)
    session.reread()
    session.push_text("w7")
    list(session.respond(speak=False, max_text_tokens=1))
    rows = {}
    for start, x in seen:
        rows |= {start + i: row for i, row in enumerate(x[0])}
    table = model.backbone.embedding_table
    expected = states._prompt_ids(pairs[0].asked)
    read = torch.stack([rows[i] for i in range(len(expected))])
    assert torch.cdist(read, table.float()).argmin(1).tolist() == expected
    backbone = Backbone(states.llm_folder, "bf16")
    ids = expected + states.prompt.answer_ids("w8 w9 w10")[:-1]
    hidden = backbone.prefill(backbone.embed(ids), backbone.init_state(len(ids)))[0, -3:]
    torch.testing.assert_close(states.hidden[0].float(), hidden.float(), atol=0.05, rtol=0.05)
    assert not torch.allclose(states.hidden[0].float(), states.hidden[1].float(), atol=0.05)


def test_a_history_in_the_texts_reaches_the_states(world, tmp_path):
    data, config = world
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("answer_states"))
    file = tmp_path / "data" / "texts" / "train.jsonl"
    rows = [json.loads(line) | {"history": [["w1", "w2"]]} for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, rows)))
    spoken = load_spoken(tmp_path / "data", "train", config)
    assert {asked.history for item in spoken for asked in item.questions} == {(("w1", "w2"),)}


def test_batches(world):
    data, config = world
    task = SpeakTask(config, data, 0)

    def names(epoch):
        return [[row.tolist() for row in batch["tokens"]] for batch in task.batches(epoch)]

    assert names(0) == names(0)
    assert names(0) != names(1)
    assert sorted(row for batch in names(0) for row in batch) == sorted(item.tokens.tolist() for item in task.train)
    for batch in task.batches(0):
        sizes = [len(row) for row in batch["tokens"]]
        assert len(sizes) == 1 or max(sizes) * len(sizes) <= config.batch_positions
        for text, text_words_, words in zip(batch["text"], batch["text_words"], batch["words"], strict=True):
            assert len(text_words_) == len(text) + 1
            assert words.max() <= text_words_.max()
    coins = torch.cat([batch["streaming"] for epoch in range(20) for batch in task.batches(epoch)]).float()
    assert coins.mean() == pytest.approx(config.streaming_probability, abs=0.08)


def test_an_epoch_takes_all_answers_and_a_share_of_the_sentences(world, tmp_path):
    data, config = world
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("answer_states"))
    texts = tmp_path / "data" / "texts"
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    (texts / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:16])))  # two questions an answer
    sentences = [{"text": row["spoken"]} for row in rows[16::2]]
    (texts / "sentences.jsonl").write_text("\n".join(map(json.dumps, sentences)))
    task = SpeakTask(replace(config, sentence_share=0.25), tmp_path / "data", 0)
    tokens = {tuple(item.tokens.tolist()): item.text for item in task.train}

    def taken(epoch):
        return [tokens[tuple(row.tolist())] for batch in task.batches(epoch) for row in batch["tokens"]]

    answers, others = {row["spoken"] for row in rows[:16]}, {row["text"] for row in sentences}
    assert (len(answers), len(others)) == (8, 16)
    for epoch in range(3):
        assert answers <= set(taken(epoch))
        assert len(taken(epoch)) == 8 + 4
    assert others == {text for epoch in range(24) for text in taken(epoch)} - answers


def train(task, steps):
    optimiser = torch.optim.AdamW(task.parameter_groups())
    losses = []
    torch.manual_seed(0)
    epoch = 0
    while len(losses) < steps:
        for batch in task.batches(epoch):
            loss, metrics = task.loss(batch, len(losses))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append({name: float(value) for name, value in metrics.items()})
        epoch += 1
    return losses


def test_learns_validates_and_exports(world, tmp_path):
    data, config = world
    task = SpeakTask(replace(config, token_noise=0.0), data, 0)
    losses = train(task, 60)
    for name in ("ce0", "ce1", "ce2", "phoneme", "guide"):
        assert sum(row[name] for row in losses[-5:]) < 0.9 * sum(row[name] for row in losses[:5]), name
    task.model.eval()
    with torch.no_grad():
        metrics = task.validate()
    assert {"ce0", "accuracy2", "token_error_k0", "token_error_k2"} <= metrics.keys()
    task.export(tmp_path)
    loaded = load_part(SpeechDecoder, SpeechDecoderConfig, tmp_path)
    assert loaded.config == DECODER
    for name, value in task.model.decoder.state_dict().items():
        assert value.equal(loaded.state_dict()[name])
    modules = SpeakTask(replace(config, train="modules", init_decoder=tmp_path), data, 0)
    train(modules, 1)
    now = modules.model.decoder.state_dict()
    changed = {name for name, value in loaded.state_dict().items() if not value.equal(now[name])}
    assert changed
    assert all(name.startswith("mtp_layers") for name in changed)
    more = replace(config, train="modules", init_decoder=tmp_path, decoder=replace(DECODER, mtp_modules=3))
    decoder = SpeakTask(more, data, 0).model.decoder
    assert decoder.mtp_layers.depth == 3
    for name, value in loaded.state_dict().items():
        assert name.startswith("mtp_layers") or value.equal(decoder.state_dict()[name]), name
    for name, value in loaded.decode_layers[-1].state_dict().items():
        assert value.equal(decoder.mtp_layers[2].decoder_layer.state_dict()[name])


def test_modules_join_one_by_one(world):
    data, config = world
    task = SpeakTask(replace(config, module_steps=10), data, 0)
    batch = next(iter(task.batches(0)))
    for step, heads in [(0, 1), (9, 1), (10, 2), (20, 3), (99, 3)]:
        _, metrics = task.loss(batch, step)
        assert sum(name.startswith("ce") for name in metrics) == heads


def test_errors(world, tmp_path):
    data, config = world
    with pytest.raises(DataError, match="answer_tokens"):
        SpeakTask(config, tmp_path, 0)
    with pytest.raises(DataError, match="units are 20"):
        SpeakTask(replace(config, decoder=replace(DECODER, units=20)), data, 0)
    with pytest.raises(ConfigError, match="init_decoder"):
        replace(config, train="modules")


def test_curricula(world):
    _, config = world

    def active(curriculum):
        chosen = replace(config, curriculum=curriculum, module_steps=10)
        return [active_modules(chosen, 2, step) for step in (0, 9, 10, 20, 99)]

    assert active("delayed") == [0, 0, 1, 2, 2]
    assert active("forward") == [1, 1, 2, 2, 2]
    assert active("reverse") == [2, 2, 1, 1, 1]
    assert active_modules(replace(config, module_steps=0), 2, 5) == 2


def test_order_loss_ranks_what_comes_sooner_higher():
    tokens = [torch.tensor([3, 5, 3, 7])]
    scores = torch.full((4, 9), -50.0)
    for row, ranks in enumerate([{3: 4, 5: 3, 7: 1}, {5: 4, 3: 3, 7: 2}, {3: 4, 7: 3}, {7: 4}]):
        for token, rank in ranks.items():  # window 4, the nearest occurrence counts
            scores[row, token] = rank
    laws = scores.softmax(-1)
    entropy = -(laws * scores.log_softmax(-1)).sum(-1).mean()
    assert order_loss(scores, tokens, 4).item() == pytest.approx(entropy.item(), abs=1e-4)
    assert order_loss(scores.flip(0), tokens, 4) > entropy + 1
    assert order_loss(scores[::2], tokens, 4, group=2).isfinite()


@pytest.mark.parametrize("kind", list(MTP_HEADS))
def test_every_head_trains_on_a_trained_decoder(world, tmp_path, kind):
    data, config = world
    save_part(SpeechDecoder(DECODER), DECODER, tmp_path)
    decoder = replace(DECODER, mtp_head=kind, mtp_modules=3)
    chosen = replace(config, decoder=decoder, init_decoder=tmp_path, token_noise=0.0, order_weight=0.2)
    if kind != "group":
        chosen = replace(chosen, order_weight=0.0, train="modules", targets="own", own_temperature=0.0)
    task = SpeakTask(chosen, data, 0)
    losses = train(task, 24)
    names = [name for name in losses[0] if name.startswith("ce") and name != "ce0"] + ["order"] * (kind == "group")
    assert len(names) >= 2
    for name in names:
        assert sum(row[name] for row in losses[-3:]) < 0.95 * sum(row[name] for row in losses[:3]), name
    with torch.no_grad():
        assert "token_error_k3" in task.validate()


def test_phonemes_are_added_to_a_trained_decoder_without_a_change(world, tmp_path):
    data, config = world
    save_part(SpeechDecoder(DECODER), DECODER, tmp_path)
    reading = replace(DECODER, text_input="hidden+embedding+pronunciation")
    chosen = replace(config, decoder=reading, init_decoder=tmp_path, token_noise=0.0, phonemes_alone=0.4)
    table = pronunciations(len(tokenizer()))
    for content, message in (
        (None, "no pronunciations.safetensors"),
        (b"cut", "is damaged"),
        (save({"rows": table}), "is damaged"),
        (save({"table": table.int()}), "has another form"),
        (save({"table": table[1:]}), f"has {len(table) - 1} tokens"),
    ):
        if content is not None:
            (data / PRONUNCIATIONS).write_bytes(content)
        with pytest.raises(DataError, match=f"{message}.*data_prep pronunciations"):
            SpeakTask(chosen, data, 0)
    save_file({"table": table}, data / PRONUNCIATIONS)
    task, old = SpeakTask(chosen, data, 0), SpeakTask(replace(config, init_decoder=tmp_path), data, 0)
    batch, before = next(task.batches(0)), next(old.batches(0))
    with torch.no_grad():
        now, then = (t.model.decoder.training_pass(b["text"], b["tokens"], b["streaming"], 0).logits[0]
                     for t, b in ((task, batch), (old, before)))  # fmt: skip
    torch.testing.assert_close(now, then)
    rows = torch.cat(batch["text"])
    veiled = [task._veiled(rows) for _ in range(50)]
    shares = torch.stack([(row[:, :96] == 0).all(1).float().mean() for row in veiled])
    told = (rows[:, 96:] != 0).any(1)
    assert shares.mean() / told.float().mean() == pytest.approx(0.4, abs=0.1)
    assert all(row[~told].equal(rows[~told]) for row in veiled), "what has no phonemes is never hidden"
    assert all(row[:, 96:].equal(rows[:, 96:]) for row in veiled)
    weight = task.model.decoder.text_input.proj.weight
    losses = train(task, 24)
    assert sum(row["ce0"] for row in losses[-3:]) < 0.95 * sum(row["ce0"] for row in losses[:3])
    assert weight[:, 96:].abs().max() > 0
    task.export(tmp_path)
    trained = load_part(SpeechDecoder, SpeechDecoderConfig, tmp_path)
    assert trained.pronunciations.equal(table), "the table travels with the decoder"
    again = SpeakTask(chosen, data, 0)
    assert again.model.decoder.text_input.proj.weight.equal(weight)
    save_file({"table": table.roll(1, 0)}, data / PRONUNCIATIONS)
    with pytest.raises(ConfigError, match="learned from other pronunciations"):
        SpeakTask(replace(chosen, train="modules", modules_from="decoder"), data, 0)
    moved = SpeakTask(chosen, data, 0)
    moved.model.decoder.pronunciations.copy_(table)  # as a checkpoint would
    with pytest.raises(DataError, match="changed since"):
        next(moved.batches(0))
    less = SpeakTask(replace(config, init_decoder=tmp_path), data, 0)
    assert less.model.decoder.text_input.proj.weight.equal(weight[:, :96]), "a view may be left out again"
    with pytest.raises(ConfigError, match="was trained on 'hidden\\+embedding\\+pronunciation'"):
        SpeakTask(replace(config, decoder=replace(DECODER, text_input="hidden"), init_decoder=tmp_path), data, 0)


def test_a_decoder_follows_tokens_that_moved():
    decoder = SpeechDecoder(DECODER)
    heads = [module for name, module in decoder.named_modules() if name.endswith("output_proj")]
    assert len(heads) == 3, "the decoder's and two modules'"
    rows = [decoder.embedding.weight, *(row for head in heads for row in (head.weight, head.bias))]
    before = [row.detach().clone() for row in rows]
    names = torch.randperm(DECODER.units - 2)
    other = torch.full((4,), DECODER.units - 2)  # half of the time where 0 was, else where 1 was
    carry_tokens(decoder, [(torch.arange(len(names)), names), (torch.tensor([0, 1, 1, 0]), other)])
    for now, old in zip(rows, before, strict=True):
        torch.testing.assert_close(now[names], old[: len(names)])
        torch.testing.assert_close(now[DECODER.units - 2], (old[0] + old[1]) / 2)
        assert now[DECODER.units - 1 :].equal(old[DECODER.units - 1 :]), "one that never occurs, and the special ones"


def test_older_tokens_are_read_beside_the_present_ones(world, tmp_path):
    data, config = world
    old = SpeechDecoder(DECODER)
    save_part(old, DECODER, tmp_path / "decoder")
    chosen = replace(config, init_decoder=tmp_path / "decoder")
    items = load_spoken(data, "train", config)
    (tmp_path / "old" / "answer_tokens").mkdir(parents=True)
    with tarfile.open(tmp_path / "old/answer_tokens/train-00000.tar", "w") as tar:
        for item in items:  # token t was called t + 1 before
            before = ((item.tokens + 1) % DECODER.units).numpy().astype(np.int16)
            add(tar, f"{item.name}.npy", lambda handle, before=before: np.save(handle, before))
    carried = SpeakTask(replace(chosen, init_tokens=tmp_path / "old"), data, 0).model.decoder
    used = torch.cat([item.tokens for item in items]).unique()
    assert len(used) > 20
    torch.testing.assert_close(carried.embedding.weight[used], old.embedding.weight[(used + 1) % DECODER.units])
    with tarfile.open(tmp_path / "old/answer_tokens/train-00000.tar", "w") as tar:
        add(tar, f"{items[0].name}.npy", lambda handle: np.save(handle, np.full(3, 99, np.int16)))
    with pytest.raises(DataError, match="token 99; the decoder's units are 50"):
        SpeakTask(replace(chosen, init_tokens=tmp_path / "old"), data, 0)
    with pytest.raises(ConfigError, match="needs an init_decoder"):
        replace(config, init_tokens=data)
    (tmp_path / "none" / "answer_tokens").mkdir(parents=True)
    with tarfile.open(tmp_path / "none/answer_tokens/train-00000.tar", "w") as tar:
        add(tar, "x.npy", lambda handle: np.save(handle, np.zeros(3, np.int16)))
    with pytest.raises(DataError, match="share no spoken sentence"):
        SpeakTask(replace(chosen, init_tokens=tmp_path / "none"), data, 0)


def test_own_answers_are_what_the_decoder_says(world, tmp_path):
    data, config = world
    save_part(SpeechDecoder(DECODER), DECODER, tmp_path)
    own = replace(config, train="modules", answers="own", own_temperature=0.0, init_decoder=tmp_path)
    task = SpeakTask(own, data, 0)
    recorded = load_spoken(data, "train", config)
    decoder, states = task.model.decoder, task.states["train"]
    for i in (0, 7):
        rows = states.rows(sum(len(item.questions) for item in recorded[:i]))
        state = decoder.init_state(len(rows) + 1, 256, 0)
        decoder.add_text(rows, state, last=True)
        limit = int(1.5 * len(recorded[i].tokens)) + 1
        assert task.train[i].tokens.tolist() == generate_chunk(decoder, state, SamplingConfig(), limit)
    files = {file: file.stat().st_mtime_ns for file in (data / "own_answers").rglob("*.safetensors")}
    again = SpeakTask(own, data, 0)  # read, not made again
    assert files == {file: file.stat().st_mtime_ns for file in (data / "own_answers").rglob("*.safetensors")}
    assert again.train[3].tokens.equal(task.train[3].tokens)
    assert "ce2" in again.loss(next(iter(again.batches(0))), 0)[1]
    with pytest.raises(ConfigError, match="stays as it is"):
        replace(own, train="all")


def test_own_targets_are_the_decoders_words(world, tmp_path):
    data, config = world
    save_part(SpeechDecoder(DECODER), DECODER, tmp_path)
    task = SpeakTask(replace(config, train="modules", targets="own", init_decoder=tmp_path), data, 0)
    batch, decoder = next(iter(task.batches(0))), task.model.decoder
    result = decoder.training_pass(batch["text"], batch["tokens"], batch["streaming"])
    own = own_targets(result, [len(row) + 1 for row in batch["tokens"]], decoder, 0.0)
    size = len(batch["tokens"][0]) + 1
    said = result.logits[0][:size].argmax(-1).tolist()
    assert own.targets[2][:size].tolist() == [*said[2:], -100, -100]
    assert own.logits[0] is None
    for wrong in ({"train": "all"}, {"order_weight": 0.1}, {"decoder": replace(DECODER, mtp_head="group")}):
        with pytest.raises(ConfigError):
            replace(task.config, **wrong)
