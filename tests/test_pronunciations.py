"""The table of pronunciations: letters aligned with phonemes, tokens cut out of words, a table from spoken data."""

from __future__ import annotations

import io
import json
import random
import tarfile

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from data_prep import cli, pronunciations
from data_prep.pronunciations import Aligner, TokenCounts, make_pronunciations, plain, split_units, table_of
from tests.tiny_model import TEMPLATE
from vocalnet.text_rows import decode
from vocalnet.training.answer_states import PRONUNCIATIONS

STANDS_FOR = {"a": "æ", "e": "ɛ", "i": "ɪ", "o": "ɑ", "x": "ks", "q": "kw", "h": "", "b": "b", "d": "d", "t": "t"}


def toy_word(generator):
    letters = "".join(generator.choice("aeio") + generator.choice("xqhbdt") for _ in range(generator.randint(1, 4)))
    return letters, tuple("".join(STANDS_FOR[letter] for letter in letters))


@pytest.fixture(scope="module")
def aligner():
    generator = random.Random(0)
    return Aligner([toy_word(generator) for _ in range(600)])


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE of a few words: "tabid" and "box" are one token each, longer ones fall in pieces."""
    model = Tokenizer(BPE())
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=ByteLevel.alphabet())
    model.train_from_iterator([" tabid box. tabid, box"] * 20 + [" boxes edit"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def said(counts, words, text):
    return [counts.most_common(token) for token in words(text)["input_ids"]]


def test_letters_find_what_they_stand_for(aligner):
    generator = random.Random(1)
    for _ in range(100):
        letters, units = toy_word(generator)
        spans = aligner(letters, units)
        assert ["".join(units[slice(*span)]) for span in spans] == [STANDS_FOR[letter] for letter in letters]


def test_words_with_more_phonemes_than_letters_allow_are_refused(aligner):
    assert aligner("x", ("k", "s")) == [(0, 2)]
    assert aligner("x", ("ɛ", "k", "s")) is None
    assert aligner("xyz", ("k", "s", "ˈɛ")) is not None, "an unknown letter, and a stressed phoneme"


def test_signs_stand_for_nothing(aligner, words):
    """The h is silent, and a full stop must not take a phoneme in its stead."""
    assert aligner("bah.", ("b", "æ")) == [(0, 1), (1, 2), (2, 2), (2, 2)]
    assert aligner("boxe,", ("b", "ɑ", "k", "s", "ɛ"))[-2:] == [(4, 5), (5, 5)]
    counts = TokenCounts(words, aligner)
    counts.add([" tabid."], [["tˈæbɪd."]], 1.0)
    counts.add([" tabids"] * 5, [["tæbɪds"]] * 5, 1.0)
    assert said(counts, words, " tabid") == ["tˈæbɪd"], "a whole word, though a full stop follows"


def test_units_keep_their_stress_and_places():
    assert split_units("pˈɛɹɪs.") == ("p", "ˈɛ", "ɹ", "ɪ", "s")
    assert plain("Bogotá") == "bogota"


def test_tokens_take_their_letters_share_of_a_word(aligner, words):
    counts = TokenCounts(words, aligner)
    counts.add([" tabid"], [["tˈæbɪd"]], 1.0)
    assert words.tokenize(" tabid") == ["Ġtabid"]
    assert said(counts, words, " tabid") == ["tˈæbɪd"]
    pieces = words.tokenize("tabidaxe")
    assert len(pieces) > 2, "not one token"
    counts.add(["tabidaxe"], [["tæbɪdˈæksɛ"]], 1.0)
    assert "".join(said(counts, words, "tabidaxe")) == "tæbɪdˈæksɛ"


def test_the_most_frequent_way_wins_and_whole_words_weigh_more(aligner, words):
    counts = TokenCounts(words, aligner)
    counts.add([" box"] * 3, [["bˈɑks"], ["bɑks"], ["bɑks"]], 1.0)
    assert said(counts, words, " box") == ["bɑks"]
    counts.add([" boxed"] * 5, [["bˈɑksɛd"]] * 5, 1.0)
    assert said(counts, words, " box") == ["bɑks"]
    counts.add(["box. no"], [["bɑks.", "nO"]], 1.0)
    assert said(counts, words, ".") == [None], "a full stop stands for no phoneme"


def test_a_table_has_a_row_for_every_token(aligner, words):
    counts = TokenCounts(words, aligner)
    counts.add([" tabid"], [["tˈæbɪd"]], 1.0)
    asked = []
    table = table_of(words, counts, lambda text: asked.append(text) or "ə")
    rows = dict(zip(words.convert_ids_to_tokens(range(len(words))), (decode(row) for row in table), strict=True))
    assert rows["Ġtabid"] == " tˈæbɪd"
    assert rows["<|end|>"] == ""
    assert rows["."] == "."
    assert rows["b"] == "ə"
    assert "tabid" not in asked
    assert all(text.isascii() and text.isalnum() for text in asked)


def test_the_step_reads_what_was_spoken(words, tmp_path, capsys, monkeypatch):
    pytest.importorskip("hibari")
    lexicon = pronunciations.hibari_lexicon()
    assert len(lexicon) > 80_000
    few = dict(sorted(lexicon.items())[::40])
    monkeypatch.setattr(pronunciations, "hibari_lexicon", lambda: few)
    words.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit):
        cli.main(["pronunciations", "--data", str(tmp_path), "--llm", str(tmp_path / "llm")])
    assert "data_prep answers" in capsys.readouterr().err
    (tmp_path / "answers").mkdir()
    with tarfile.open(tmp_path / "answers" / "train-00000.tar", "w") as tar:
        for i, row in enumerate([("a tabid box.", "ə tˈɛbəd bˈɑks."), ("12", "twˈɛlv ənd mˈɔɹ")]):
            content = json.dumps(dict(zip(("text", "phonemes"), row, strict=True))).encode()
            info = tarfile.TarInfo(f"{i}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made = make_pronunciations(tmp_path, tmp_path / "llm")
    table = load_file(tmp_path / PRONUNCIATIONS)["table"]
    assert len(table) == made["tokens"] == len(words)
    of = dict(zip(words.convert_ids_to_tokens(range(len(words))), (decode(row) for row in table), strict=True))
    assert of["Ġtabid"] == " tˈɛbəd", "as it was spoken"
    assert of["Ġbox"] == " bˈɑks"
    assert of["3"] == "θɹˈi"
    before = (tmp_path / PRONUNCIATIONS).stat().st_mtime_ns
    assert make_pronunciations(tmp_path, tmp_path / "llm") == made
    assert (tmp_path / PRONUNCIATIONS).stat().st_mtime_ns == before, "made once"
    (tmp_path / PRONUNCIATIONS).write_bytes(b"cut")
    assert make_pronunciations(tmp_path, tmp_path / "llm") == made
