"""Data preparation: true invariants of the texts, and shards that survive kills and notice damage."""

import io
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import carriers, cli, common, dialogues, features, open_answers, speech, texts, turns, voices
from tests.test_flow import tiny_flow
from tests.tiny_model import tiny_llm, tokenizer
from vocalnet import evaluation
from vocalnet.errors import DataError
from vocalnet.shards import read_arrays, text_id
from vocalnet.training.vocoder import at_mel_frames
from vocalnet.vocoder.flow import Flow

TINY = common.SIZES["tiny"]


@pytest.fixture(scope="module")
def facts():
    return texts.load_facts()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts.make_texts(folder, TINY)
    return folder


# ---------------------------------------------------------------- texts


def test_validation_phrasings_are_never_trained_on(facts):
    trained = {question.lower() for fact in facts for question in fact.train}
    asked = {question.lower() for fact in facts for question in fact.valid}
    assert len(trained) >= 50_000
    assert not trained & asked


def test_no_longer_phrasing_hides_a_validation_phrasing():
    train = ["What is {a}?", "Tell me {a}.", "Name {a}."]
    longer = carriers.carried(train, ["Could you tell me {a}?", "So, what is {a}?"])
    assert "Hey, what is {a}?" in longer
    assert "Do you happen to know {a}?" in longer
    assert "Hey, name {a}." in longer
    assert not [text for text in longer if "could you tell me" in text.lower() or "so, what is" in text.lower()]
    assert len(set(longer)) == len(longer)


def test_every_fact_has_phrasings_of_its_own(facts):
    for fact in facts:
        assert len(fact.train) >= 3, fact
        assert fact.valid, fact
    # Openings and endings multiply phrasings, but most are worded differently.
    opened = tuple(opener for opener in carriers.BEFORE_QUESTION)
    plain = [question for fact in facts for question in fact.train if not question.startswith(opened)]
    assert len(plain) > 50_000


def test_validation_words_are_all_heard_in_training(facts):
    trained = {word for fact in facts for question in fact.train for word in turns.words(question)}
    assert {word for fact in facts for question in fact.valid for word in turns.words(question)} <= trained


def test_everything_is_speakable_and_short(facts):
    for fact in facts:
        for text in [*fact.train, *fact.valid, fact.answer]:
            assert texts.SPEAKABLE.fullmatch(text), text
        assert len(turns.words(fact.answer)) <= 14
    assert len({word for fact in facts for word in turns.words(fact.answer)}) < 4500


def test_every_answer_is_accepted_by_its_own_keys(facts):
    for fact in facts:
        spoken = f" {' '.join(turns.words(fact.answer))} "
        assert any(f" {' '.join(turns.words(key))} " in spoken for key in fact.accept), fact


def test_arithmetic_is_right(facts):
    sums = {fact.answer: fact.accept for fact in facts if fact.category in ("addition", "multiplication")}
    assert sums["Seven plus eight is fifteen."] == ["fifteen", "15"]
    assert sums["Six times seven is forty two."] == ["forty two", "42"]
    answers = {fact.answer for fact in facts}
    for answer in [
        "Fifty six divided by eight is seven.",
        "Twelve squared is one hundred forty four.",
        "The square root of eighty one is nine.",
        "Ten percent of two hundred is twenty.",
        "One hour after twelve o'clock is one o'clock.",
        "Two days after Saturday is Monday.",
        "If today is Sunday, tomorrow is Monday.",
        "There are three hundred minutes in five hours.",
        "The first letter of elephant is E.",
        "The word elephant has eight letters.",
        "Ten, nine, eight, seven, six, five, four, three, two, one.",
    ]:
        assert answer in answers, answer


def test_a_before_a_vowel_is_an():
    assert turns.sentence("a {x} and a {y}", {"x": "owlet", "y": "unicorn"}) == "An owlet and a unicorn"
    assert turns.sentence("Is {x} a vowel?", {"x": "A"}) == "Is A a vowel?"


def test_a_table_that_extends_another_shares_its_phrasings(tmp_path):
    head = "category: c, fields: [a, b], answer: '{a} is {b}.', accept: '{b}', train: ['What is {a}?'], valid: []"
    (tmp_path / "a.yaml").write_text("[{extends: c, facts: 'Fire = hot'}]")
    (tmp_path / "b.yaml").write_text(f"[{{{head}, facts: 'Ice = cold'}}]")
    assert [fact.answer for fact in texts.load_facts(tmp_path)] == ["Ice is cold.", "Fire is hot."]
    assert len(texts.load_facts(tmp_path, per_category=1)) == 1
    (tmp_path / "a.yaml").write_text("[{extends: d, facts: 'Fire = hot'}]")
    with pytest.raises(DataError, match="extends 'd', which no table"):
        texts.load_facts(tmp_path)


@pytest.mark.parametrize(
    ("number", "spoken"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety nine"), (366, "three hundred sixty six")],
)
def test_numbers_as_words(number, spoken):
    assert texts.number_words(number) == spoken


def test_texts_are_deterministic_and_valid_is_balanced(data, tmp_path):
    texts.make_texts(tmp_path, TINY)
    for name in ("train", "valid", "sentences"):
        assert (tmp_path / f"texts/{name}.jsonl").read_bytes() == (data / f"texts/{name}.jsonl").read_bytes()
    categories = [row["category"] for row in texts.read_jsonl(data / "texts/valid.jsonl") if not row["history"]]
    assert max(Counter(categories).values()) == 1


@pytest.fixture(scope="module")
def told(facts):
    """Questions with a history, of both splits."""
    return {
        split: dialogues.make_dialogues(facts, 1500, split == "valid", random.Random(0)) for split in ("train", "valid")
    }


def test_questions_with_a_history_are_distinct_speakable_and_of_every_kind(told):
    for split, turns_ in told.items():
        assert len({turn.id for turn in turns_}) == len(turns_) == 1500
        shares = Counter(turn.category for turn in turns_)
        assert shares.keys() == {"ellipsis", "pronoun", "repeat", "thanks", "name", "unrelated"}
        assert min(shares.values()) >= 40
        for turn in turns_:
            assert turn.split == split
            assert 1 <= len(turn.history) <= 3
            for text in [turn.question, turn.answer, *(text for exchange in turn.history for text in exchange)]:
                assert texts.SPEAKABLE.fullmatch(text), text
            assert any(
                f" {' '.join(turns.words(key))} " in f" {' '.join(turns.words(turn.answer))} " for key in turn.accept
            )


def test_follow_ups_of_validation_are_never_trained_on(told, facts):
    kinds = {"pronoun", "repeat", "thanks", "name"}
    asked = {split: {turn.question for turn in made if turn.category in kinds} for split, made in told.items()}
    assert asked["valid"]
    assert not asked["train"] & asked["valid"]
    openings = tuple(form.split("{")[0] for form in dialogues.ELLIPSIS_VALID)
    for split, made in told.items():
        opened = {turn.question.startswith(openings) for turn in made if turn.category == "ellipsis"}
        assert opened == {split == "valid"}
    held_out = {question for fact in facts for question in fact.valid}
    spoken = {question for turn in told["train"] for question, _ in turn.history} | asked["train"]
    assert not spoken & held_out
    assert not {turn.question for turn in told["train"] if turn.category == "unrelated"} & held_out


def test_a_follow_up_means_what_its_history_says():
    def capital(country, city):
        fields = {"country": country, "capital": city}
        asked = [f"What is the capital of {country}?"]
        return turns.Fact("capital", asked, ["Name it."], f"{city} it is.", [city.lower()], [], fields, "country")

    capitals = [capital("France", "Paris"), capital("Spain", "Madrid")]
    language = turns.Fact("language", ["x"], ["y"], "French it is.", ["french"], [], {"country": "France"}, "country")
    made = dialogues.make_dialogues([*capitals, language], 60, False, random.Random(1))
    ellipses = [turn for turn in made if turn.category == "ellipsis" and len(turn.history) == 1]
    pronouns = [turn for turn in made if turn.category == "pronoun" and "speak" in turn.question]
    assert ellipses
    assert pronouns
    for turn in ellipses:
        assert ("Spain" in turn.question) == (turn.answer == "Madrid it is.")
        assert turn.history[0][1] != turn.answer
    assert all(turn.history[-1] == ["What is the capital of France?", "Paris it is."] for turn in pronouns)


def test_questions_with_a_history_are_recorded_apart(data):
    rows = texts.read_jsonl(data / "texts" / "valid.jsonl")
    assert [bool(row["history"]) for row in rows] == sorted(bool(row["history"]) for row in rows)
    size = common.Size(1, 6, 0, 24, 60, 8, 40, 60, 30, 30, 20, 4, 10, 0.1)
    plans, _ = speech.question_plan(data, size, 0)
    apart = [row for name, plan in plans["kokoro"].items() if name.startswith("dialogue-") for row in plan]
    assert len(apart) == 4
    assert all(row["history"] for row in apart)
    assert not [
        row for name, plan in plans["kokoro"].items() if name.startswith("valid-") for row in plan if row["history"]
    ]


def test_the_packages_own_evaluation_is_held_out(facts):
    """mini-qa asks what earlier tables held out; no training question may ever be one of its."""
    folder = Path(evaluation.__file__).parent / "data" / "mini-qa"
    asked = set()
    for shard in folder.glob("*.tar"):
        for _, files in common.read_tar(shard):
            asked.add(json.loads(files["json"])["text"].lower())
    assert len(asked) > 100
    assert not asked & {question.lower() for fact in facts for question in fact.train}


def test_sentences_beside_the_answers_are_new_distinct_and_of_every_kind(facts):
    questions = [question for fact in facts for question in fact.train[:2]]
    sentences = texts.coverage_sentences(facts, questions, 4000, random.Random(0))
    answers = {fact.answer for fact in facts}
    assert len(set(sentences)) == len(sentences) == 4000
    assert not answers & set(sentences)
    assert all(texts.SPEAKABLE.fullmatch(text) for text in sentences)
    kinds = [texts.chatterbot_sentences(), texts.crossed(facts, random.Random(0)), questions]
    kinds.append([text for fact in facts for text in fact.sentences])
    assert all(len(set(kind) & set(sentences)) > 300 for kind in kinds)


def test_crossed_answers_keep_their_words_but_not_their_company():
    told = [
        turns.Fact("capital", [], [], f"The capital of {a} is {b}.", [b.lower()], fields={"of": a, "is": b}, first="of")
        for a, b in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
    ]
    mixed = texts.crossed(told, random.Random(1))
    assert any(text not in {fact.answer for fact in told} for text in mixed)
    for text in mixed:
        assert text.split()[3] in ("France", "Italy", "Spain")
        assert text.split()[-1] in ("Paris.", "Rome.", "Madrid.")


def test_ambiguous_table_is_refused(tmp_path):
    head = "category: c, fields: [a, b], answer: '{a} is {b}.', accept: '{b}', train: ['What is {a}?'], valid: []"
    table = f"[{{{head}, facts: 'Ice = cold; Ice = wet'}}]"
    (tmp_path / "bad.yaml").write_text(table)
    with pytest.raises(DataError, match="two answers"):
        texts.load_facts(tmp_path)


def test_row_with_a_missing_field_is_named(tmp_path):
    table = "[{category: c, fields: [a, b], answer: x, accept: x, train: [], valid: [], facts: 'Ice'}]"
    (tmp_path / "bad.yaml").write_text(table)
    with pytest.raises(DataError, match="'Ice' has 1 fields, not 2"):
        texts.load_facts(tmp_path)


# ---------------------------------------------------------------- open prompts


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("Dogs are loyal friends. They also bark.", "Dogs are loyal friends.", ""),
        ("Dogs have 4 legs and 1 tail.", "Dogs have four legs and one tail.", ""),
        ("Dogs are loyal and", None, "does not end"),
        ("Dogs.", None, "1 words"),
        ("Dogs are: loyal.", None, "does not end"),
        ("Dogs (and cats) are friends of ours.", None, "not speakable"),
        ("As an AI, I have no dogs at all.", None, "refuses or announces"),
        ("Dogs are friendly because dogs are friendly.", None, "repeats itself"),
        ("What a very very good dogs.", None, "repeats itself"),
        ("I am happy that you came here.", None, "about something else"),
        ("I like cats a lot.", None, "about something else"),
        ("Dogs " + "go on and on " * 5 + "until night.", None, "23 words"),
    ],
)
def test_open_answers_are_checked(text, answer, reason):
    assert open_answers.checked("Do you like dogs?", text, ended=False) == (answer, reason)


def test_open_answers_resume_and_join_the_texts(tmp_path):
    size = replace(TINY, open_prompts=6)
    asked = []

    def ask(question):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(question)
        return ("I like rain and snow a lot. Yes!", True) if len(asked) != 2 else ("It", True)

    with pytest.raises(KeyboardInterrupt):
        open_answers.make_open_answers(tmp_path, size, ask=ask)
    file = tmp_path / "texts" / open_answers.FILE
    file.write_text(file.read_text()[:-9])  # killed while writing the fourth
    asked.pop()
    again = []
    counts = open_answers.make_open_answers(
        tmp_path, size, ask=lambda q: again.append(q) or ("I like snow a lot.", True)
    )
    assert asked + again == open_answers.prompts()[:6]
    assert counts == {"prompts": 6, "kept": 4}
    assert open_answers.make_open_answers(tmp_path, size) == counts, "nothing is left to ask"
    texts.make_texts(tmp_path, size)
    rows = [row for row in texts.read_jsonl(tmp_path / "texts" / "train.jsonl") if row["category"] == "open"]
    assert len(rows) == 4
    assert {row["answer"] for row in rows} == {"I like rain and snow a lot.", "I like snow a lot."}


def test_the_llm_answers_greedily(tmp_path):
    torch.manual_seed(0)
    tiny_llm().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    text, ended = open_answers.asker(tmp_path)("w1 w2")
    assert not ended, "the tiny model never ends"
    assert len(text.split()) <= open_answers.MOST_TOKENS
    assert open_answers.asker(tmp_path)("w1 w2") == (text, ended)


# ---------------------------------------------------------------- who says what


def test_held_out_voices_are_never_trained_on(data):
    size = common.Size(1, 6, 0, 24, 60, 8, 40, 60, 30, 30, 20, 4, 10, 0.1)
    plans, _ = speech.question_plan(data, size, 0)
    used = {"train": set(), "valid": set()}
    for plan in plans.values():
        for name, rows in plan.items():
            split = "train" if name.startswith("train-") else "valid"
            used[split] |= {row["voice"] for row in rows}
            assert {row["split"] for row in rows} == {split}
    assert used["valid"] == set(voices.HELD_OUT_VOICES)
    assert not used["train"] & used["valid"]


def test_tiny_validates_with_its_own_voice_on_held_out_phrasings(data):
    plans, _ = speech.question_plan(data, TINY, 0)
    assert set(plans["kokoro"]) == set()
    held_out = plans["hibari"]["valid-hibari-00000.tar"]
    assert len(held_out) == speech.TINY_VALID
    assert {row["split"] for row in held_out} == {"valid"}
    assert not any(row["history"] for row in held_out)
    trained = {row["question"] for name, rows in plans["hibari"].items() if name.startswith("train-") for row in rows}
    assert len(trained) == TINY.hibari
    assert not trained & {row["question"] for row in held_out}


def test_questions_cover_rare_words_first():
    turns = [
        {"id": f"{i:x}", "question": f"What is {word}?", "answer": "X.", "history": []}
        for i, word in enumerate("abcdefgh")
    ]
    heard = Counter()
    chosen = speech.choose_questions(turns, 16, 4, heard, random.Random(0))
    assert [heard[word] for word in "abcdefgh"] == [2] * 8
    assert len({(row["id"], row["take"]) for row in chosen}) == 16


def test_degraded_audio_has_the_asked_level_and_noise():
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(16000) / 5).astype(np.float32)
    noisy = speech.degrade(tone, speech.Acoustics(1.0, 20.0, 0.2, 0.5), rng)
    assert len(noisy) == len(tone)
    assert np.abs(noisy).max() == pytest.approx(0.5)
    plain = speech.degrade(tone, speech.Acoustics(1.0, None, None, 0.5), rng)
    assert np.allclose(plain, tone * 0.5 / np.abs(tone).max(), atol=1e-6)


def test_pitch_shift_keeps_the_duration():
    def speak(text, voice, speed):  # a second of a 200 Hz tone, at speed 1
        return np.sin(2 * np.pi * 200 * np.arange(round(24000 / speed)) / 24000).astype(np.float32), 24000

    wave = speech.record(speak, "", "", speech.Acoustics(1.0, None, None, 0.5, pitch=1.2))
    assert len(wave) == pytest.approx(16000, abs=2)
    assert np.abs(np.fft.rfft(wave)).argmax() == pytest.approx(240, abs=1)


def test_only_a_source_with_one_voice_is_shifted():
    drawn = [speech.Acoustics.draw(np.random.default_rng(seed), one_voice=True).pitch for seed in range(200)]
    shifted = [pitch for pitch in drawn if pitch != 1]
    assert 60 < len(shifted) < 140
    assert speech.PITCHES[0] <= min(shifted) < 0.9 < 1.1 < max(shifted) <= speech.PITCHES[1]
    assert speech.Acoustics.draw(np.random.default_rng(0)).pitch == 1


def test_spelled_a_is_a_letter():
    assert voices.letter_names("Cat is spelled C A T.") == "Cat is spelled C Eh T."
    assert voices.letter_names("A cat is A big cat.") == "A cat is A big cat."
    assert voices.letter_names("The letter A is a vowel.") == "The letter Eh is a vowel."
    assert voices.letter_names("Is A a vowel or a consonant?") == "Is Eh a vowel or a consonant?"


# ---------------------------------------------------------------- shards


def _make(work):
    return [(key, {"txt": key.encode()}) for key in work], float(len(work))


def _counting(calls):
    def make(work):
        calls.append(work)
        return _make(work)

    return make


def test_resume_after_a_kill_gives_identical_shards(tmp_path):
    plan = {f"train-{i:05d}.tar": [f"a{i}", f"b{i}"] for i in range(4)}

    def dies(work):
        if work[0] == "a2":
            raise KeyboardInterrupt
        return _make(work)

    broken = common.ShardFolder(tmp_path / "broken", {})
    with pytest.raises(KeyboardInterrupt):
        common.run_plan(broken, plan, dies, 1)
    calls = []
    broken.finish(common.run_plan(broken, plan, _counting(calls), 1))
    whole = common.ShardFolder(tmp_path / "whole", {})
    whole.finish(common.run_plan(whole, plan, _make, 1))
    assert calls == [["a2", "b2"], ["a3", "b3"]]
    for name in [*plan, "manifest.json"]:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_changed_input_remakes_only_its_shard(tmp_path):
    folder = common.ShardFolder(tmp_path, {})
    common.run_plan(folder, {"a.tar": ["x"], "b.tar": ["y"]}, _make, 1)
    calls = []
    folder.finish(common.run_plan(folder, {"a.tar": ["x"], "b.tar": ["z"]}, _counting(calls), 1))
    assert calls == [["z"]]
    folder.finish(common.run_plan(folder, {"a.tar": ["x"]}, _make, 1))
    assert not (tmp_path / "b.tar").exists()


def test_damaged_shard_is_noticed_and_remade(tmp_path):
    folder = common.ShardFolder(tmp_path, {})
    folder.finish(common.run_plan(folder, {"a.tar": ["x"]}, _make, 1))
    assert common.check_manifest(tmp_path)["samples"] == 1
    (tmp_path / "a.tar").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a\.tar differs from its manifest"):
        common.check_manifest(tmp_path)
    folder.finish(common.run_plan(folder, {"a.tar": ["x"]}, _make, 1))
    assert dict(common.read_tar(tmp_path / "a.tar")) == {"x": {"txt": b"x"}}
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="missing"):
        common.check_manifest(tmp_path)


def test_truncated_tar_is_one_clear_error(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(common.tar_bytes([("x", {"txt": b"x" * 2000})])[:1000])
    with pytest.raises(DataError, match="damaged"):
        list(common.read_tar(path))


# ---------------------------------------------------------------- speech and features


@pytest.fixture(scope="module")
def hibari():
    pytest.importorskip("hibari")
    pytest.importorskip("onnx")
    return voices.HibariVoice()


def test_frames_know_their_phonemes(hibari):
    speech_ = hibari.synthesize("Cat is spelled C A T.")
    frames = len(speech_.wave) // voices.HIBARI_HOP
    assert len(speech_.frame_phonemes) == len(speech_.f0_hz) == frames
    changes = speech_.frame_phonemes[np.r_[True, np.diff(speech_.frame_phonemes) != 0]]
    spoken = hibari._tts.ids(speech_.phonemes)
    assert set(changes) <= set(spoken)
    assert np.array_equal(hibari.synthesize("Cat is spelled C A T.").wave, speech_.wave)


def test_answers_are_spoken_with_even_features(hibari, data, tmp_path, monkeypatch):
    rows = speech.answer_rows(data, 0)[0][:2]
    samples, seconds = speech._answer_samples([{**row} for row in rows])
    assert [key for key, _ in samples] == [text_id(row["text"]) for row in rows]
    assert seconds > 1
    monkeypatch.setattr(
        features, "whisper_features", lambda wave, encoder: features.torch.zeros(len(wave) // features.MEL_HOP + 1, 8)
    )
    about = json.loads(samples[0][1]["json"])
    arrays = features.answer_arrays(features._audio(samples[0][1]), about, None)
    frames = len(arrays["mel"])
    assert frames % 2 == 0
    assert {len(array) for array in arrays.values()} == {frames}
    assert arrays["voiced"].any()


def test_two_processes_give_the_shards_of_one(hibari, tmp_path, monkeypatch):
    rows = [{"id": text_id(text), "text": text, "kind": "answer"} for text in ("Yes.", "No.", "One.", "Two.")]
    monkeypatch.setattr(speech, "answer_rows", lambda data, seed: (rows[:3], rows[3:]))
    size = replace(TINY, per_shard=2)
    speech.make_answers(tmp_path / "one", size, jobs=1)
    speech.make_answers(tmp_path / "two", size, jobs=2)
    names = ["train-00000.tar", "train-00001.tar", "valid-00000.tar", "manifest.json"]
    for name in names:
        assert (tmp_path / "two" / "answers" / name).read_bytes() == (tmp_path / "one" / "answers" / name).read_bytes()


@pytest.fixture(scope="module")
def kokoro(tmp_path_factory):
    """A folder like Kokoro's with a network that hums: each token its own loudness, a style its own offset."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("kokoro")
    helper, kind = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["tokens"], ["numbers"], to=kind.FLOAT),
        helper.make_node("Tile", ["numbers", "times"], ["long"]),
        helper.make_node("ReduceMean", ["style"], ["offset"], keepdims=1),
        helper.make_node("Mul", ["long", "scale"], ["quiet"]),
        helper.make_node("Add", ["quiet", "offset"], ["moved"]),
        helper.make_node("Div", ["moved", "speed"], ["waveform"]),
    ]
    inputs = [("tokens", kind.INT64, [1, None]), ("style", kind.FLOAT, [1, 256]), ("speed", kind.FLOAT, [1])]
    graph = helper.make_graph(
        nodes,
        "hum",
        [helper.make_tensor_value_info(*given) for given in inputs],
        [helper.make_tensor_value_info("waveform", kind.FLOAT, [1, None])],
        [
            helper.make_tensor("times", kind.INT64, [2], [1, 600]),
            helper.make_tensor("scale", kind.FLOAT, [1], [0.001]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "kokoro-int8.onnx")
    letters = "abcdefghijklmnopqrstuvwxyzæðŋɑɔəɚɛɜɡɪɹʃʊʌʒˈˌː ,.?!"
    (folder / "vocab.json").write_text(json.dumps({"vocab": {letter: i + 1 for i, letter in enumerate(letters)}}))
    (folder / "voices").mkdir()
    for i, voice in enumerate((*voices.KOKORO_VOICES, *voices.HELD_OUT_VOICES)):
        np.full((512, 256), i / 1000, np.float32).tofile(folder / "voices" / f"{voice}.bin")
    return folder


def test_kokoro_asks_in_many_voices(hibari, kokoro, data, tmp_path):
    (tmp_path / "texts").symlink_to(data / "texts")
    size = replace(TINY, kokoro=6, valid_kokoro=4, spoken_dialogues=2, hibari=0, flite=0)
    manifest = speech.make_questions(tmp_path, size, sources=("kokoro",), kokoro=kokoro)
    assert manifest["samples"] == 12
    made = {
        shard["name"].split("-")[0]: [
            (json.loads(files["json"]), features._audio(files))
            for _, files in common.read_tar(tmp_path / "questions" / shard["name"])
        ]
        for shard in manifest["shards"]
    }
    assert {name: len(samples) for name, samples in made.items()} == {"train": 6, "valid": 4, "dialogue": 2}
    assert {about["voice"] for about, _ in made["valid"]} == set(voices.HELD_OUT_VOICES)
    assert all(about["history"] for about, _ in made["dialogue"])
    assert not any(about["history"] for about, _ in made["valid"])
    assert {about["source"] for about, _ in made["train"]} == {"kokoro"}
    # 25 ms a phoneme, here 600 samples: the network has heard every phoneme that hibari found.
    about, wave = made["valid"][0]
    phonemes = " ".join(hibari.phonemize(about["text"]))
    assert len(wave) == pytest.approx(16000 * 0.025 * (len(phonemes) + 2), rel=0.15)
    assert float(wave.abs().max()) == pytest.approx(about["level"], abs=0.01)
    with pytest.raises(DataError, match="no Kokoro voice 'xx_nobody'"):
        voices.KokoroVoice(kokoro)("Yes.", "xx_nobody", 1.0)


def test_predicted_mels_are_the_flows_own(tmp_path, capsys):
    flow = tiny_flow()
    flow.save(tmp_path / "flow")
    rng = np.random.default_rng(0)
    tokens = {name: rng.integers(0, flow.config.tokens, 8 + i).astype(np.int16) for i, name in enumerate("abc")}
    for split, names in (("train", "ab"), ("valid", "c")):
        samples = []
        for name in names:
            content = io.BytesIO()
            np.save(content, tokens[name])
            samples.append((name, {"npy": content.getvalue()}))
        folder = common.ShardFolder(tmp_path / "answer_tokens", {})
        common.atomic_write(folder.folder / f"{split}-00000.tar", common.tar_bytes(samples))
    cli.main(["predicted_mels", "--data", str(tmp_path), "--flow", str(tmp_path / "flow")])
    assert "predicted_mels" in capsys.readouterr().out
    mels = dict(read_arrays(tmp_path / "predicted_mels", "*.tar", "npy"))
    assert mels.keys() == tokens.keys()
    loaded = Flow.from_folder(tmp_path / "flow")
    for name, row in tokens.items():
        expected = loaded.mel(torch.from_numpy(row.astype(np.int64))[None])[0]
        assert mels[name].shape == (2 * len(row), 80)
        np.testing.assert_allclose(mels[name], expected.numpy(), atol=0.02)
    with pytest.raises(SystemExit):
        cli.main(["predicted_mels", "--data", str(tmp_path), "--flow", str(tmp_path / "nothing")])
    assert capsys.readouterr().err.count("\n") == 1


def test_synthesis_frames_are_read_at_mel_frame_centres():
    picked = at_mel_frames(np.arange(16), 10, 300, 480)
    assert picked.tolist() == [1, 2, 4, 6, 7, 9, 10, 12, 14, 15]


# ---------------------------------------------------------------- command line


def test_errors_are_one_line(tmp_path, capsys):
    for arguments, message in [
        (["check", "--data", str(tmp_path)], "nothing is prepared"),
        (["answers", "--data", str(tmp_path)], "run `python -m data_prep texts` first"),
        (["answer_tokens", "--data", str(tmp_path)], "needs --tokenizer"),
        (["texts", "--data", str(tmp_path), "--sources", "siri"], "unknown source 'siri'"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        common.atomic_write(tmp_path / "file" / "x", b"")


def test_help_lists_the_steps(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "question_features" in capsys.readouterr().out
