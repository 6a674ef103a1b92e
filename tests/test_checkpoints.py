"""Base models: conversion from both formats, and fetching with everything that can go wrong, without a network."""

import errno
import hashlib
import json
import struct
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from vocalnet.checkpoints import REGISTRY, BaseModel, HubSource, Wheel, base_model, fetch, resolve
from vocalnet.checkpoints.ctranslate2 import read_model, whisper_weights
from vocalnet.checkpoints.gguf import convert_gguf, restore_halves, weight_name
from vocalnet.errors import CheckpointError, DownloadError


def make_wheel(folder, package, files):
    """A wheel with the given members; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def join(content: Path, folder: Path) -> None:
    """The conversion of the fake model: its parts in order."""
    folder.mkdir()
    (folder / "config.json").write_bytes(b"".join(part.read_bytes() for part in sorted(content.rglob("part*"))))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A registered model of two wheels, and a pip that copies them from a folder. Returns that folder."""
    shelf = tmp_path / "shelf"
    wheels = tuple(
        Wheel(name, "1.0", make_wheel(shelf, name, {f"{name}/part{name[-1]}": text}), 1)
        for name, text in (("fake1", '{"a":'), ("fake2", " 1}"))
    )
    monkeypatch.setitem(REGISTRY, "fake", BaseModel("fake", "MIT", wheels, join, HubSource("some/fake", "r"), 1))
    monkeypatch.setenv("VOCALNET_CACHE", str(tmp_path / "cache"))
    calls = []

    def pip(command, **options):
        calls.append(command)
        package = command[-1].partition("==")[0]
        found = shelf / f"{package}-1.0-py3-none-any.whl"
        if not found.is_file():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution")
        (Path(command[command.index("--dest") + 1]) / found.name).write_bytes(found.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return shelf, calls, tmp_path / "cache" / "models"


def left_over(models):
    """What lies in the cache besides locks."""
    return [path.name for path in models.iterdir() if path.suffix != ".lock"] if models.is_dir() else []


def test_a_model_is_fetched_once_and_converted(fake, capsys):
    _, calls, models = fake
    folder = base_model("fake")
    assert json.loads((folder / "config.json").read_text()) == {"a": 1}
    assert base_model("fake") == folder == resolve("fake")
    assert len(calls) == 2
    assert all("--no-deps" in call and "--only-binary=:all:" in call for call in calls)
    assert left_over(models) == ["fake"]
    output = capsys.readouterr()
    assert output.out == ""
    assert "fake1==1.0 (1 MB)" in output.err


def test_a_failing_download_is_one_clear_line_and_leaves_nothing(fake):
    shelf, _, models = fake
    (shelf / "fake2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"could not fetch fake2==1\.0 \(No matching distribution\)") as caught:
        base_model("fake")
    assert "\n" not in str(caught.value)
    assert left_over(models) == []


def test_a_replaced_package_is_refused(fake):
    shelf, _, models = fake
    make_wheel(shelf, "fake1", {"fake1/part1": "something else"})
    with pytest.raises(DownloadError, match="sha256"):
        base_model("fake")
    assert left_over(models) == []


def test_a_full_disk_is_told_before_and_during(fake, monkeypatch):
    _, _, models = fake
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DownloadError, match="GB for a while"):
            base_model("fake")

    def full(content, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    broken = BaseModel("fake", "MIT", REGISTRY["fake"].wheels, full, REGISTRY["fake"].hub, 1)
    monkeypatch.setitem(REGISTRY, "fake", broken)
    with pytest.raises(DownloadError, match="disk is full"):
        base_model("fake")
    assert left_over(models) == []


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(CheckpointError, match="did you mean 'whisper-base'"):
        base_model("whisper_base")
    with pytest.raises(CheckpointError, match="give a folder, a hub id"):
        resolve("nothing")
    assert resolve(tmp_path) == tmp_path


def test_registry_is_pinned():
    for name, model in REGISTRY.items():
        assert model.name == name
        assert model.licence in ("Apache-2.0", "MIT")
        assert all(len(wheel.sha256) == 64 and wheel.version for wheel in model.wheels)
        assert len(model.hub.revision) == 40


def to_pairs(weight, heads):
    """llama.cpp's row order, as its converter makes it from Hugging Face's."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_query_rows_are_put_back():
    weight = torch.arange(48.0).view(24, 2)
    assert torch.equal(restore_halves(to_pairs(weight, 3), 3), weight)


def test_gguf_names():
    assert weight_name("blk.11.attn_q.bias") == "model.layers.11.self_attn.q_proj.bias"
    assert weight_name("rope_freqs.weight") is None
    with pytest.raises(CheckpointError, match="attn_rot"):
        weight_name("blk.0.attn_rot.weight")


def write_gguf(path, model):
    """A Llama in GGUF: Q8_0 where the row length allows, a byte-level tokenizer of a few words."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<s>", "</s>", "<unk>", *(chr(ord("a") + i) for i in range(26)), "ab", "Ġ", "Ċ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    kinds = [
        "attn_norm",
        "ffn_norm",
        *(f"attn_{k}" for k in ("q", "k", "v", "output")),
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ]
    stored = [f"blk.{index}.{kind}.weight" for index in range(2) for kind in kinds]
    names = {weight_name(name): name for name in stored}
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for ours, theirs in names.items():
        weight = model.state_dict()[ours]
        if "q_proj" in ours or "k_proj" in ours:
            weight = to_pairs(weight, config.num_attention_heads if "q_proj" in ours else config.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokens


def test_gguf_becomes_a_folder_that_computes_the_same(tmp_path):
    from vocalnet.backbone import Backbone

    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = write_gguf(tmp_path / "tiny.gguf", model)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert len(tokens) == 32
    ids = torch.tensor([[0, 5, 9, 30]])
    backbone = Backbone(tmp_path / "out", "fp32")
    state = backbone.init_state(8)
    ours = backbone.logits(backbone.prefill(backbone.embed(ids), state))
    with torch.no_grad():
        expected = model(ids).logits
    assert (ours - expected).norm() / expected.norm() < 0.02  # 8-bit weights
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.chat_template
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [tokens.index("ab")]


def test_other_files_are_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to be read")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")


def ctranslate2_variables(weights, layers):
    """Whisper's weights under CTranslate2's names, attention products stacked."""
    variables = {}

    def put(target, source, norm=False):
        variables[f"{target}/{'gamma' if norm else 'weight'}"] = weights[f"{source}.weight"]
        variables[f"{target}/{'beta' if norm else 'bias'}"] = weights[f"{source}.bias"]

    def stacked(target, source, names):
        zeros = torch.zeros_like(weights[f"{source}.q_proj.bias"])
        parts = [f"{source}.{name}" for name in names]
        variables[f"{target}/weight"] = torch.cat([weights[f"{part}.weight"] for part in parts])
        variables[f"{target}/bias"] = torch.cat([weights.get(f"{part}.bias", zeros) for part in parts])

    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    variables["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        variables[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"model.{side}.layer_norm", norm=True)
        for index in range(layers):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            stacked(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ["q_proj", "k_proj", "v_proj"])
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", norm=True)
            if side == "decoder":
                stacked(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn", ["q_proj"])
                stacked(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ["k_proj", "v_proj"])
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                put(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", norm=True)
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", norm=True)
    return variables


def write_model_bin(path, variables, aliases=()):
    """CTranslate2's container, version 6."""

    def text(value):
        raw = value.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    parts = [struct.pack("<I", 6), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, tensor in variables.items():
        array = np.ascontiguousarray(tensor.numpy().astype(np.float16))
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", 4, array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    for alias, name in aliases:
        parts += [text(alias), text(name)]
    path.write_bytes(b"".join(parts))


def test_whisper_weights_come_back_bit_for_bit(tmp_path):
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    aliases = [("decoder/projection/weight", "decoder/embeddings/weight")]
    write_model_bin(tmp_path / "model.bin", ctranslate2_variables(weights, 2), aliases)
    variables = read_model(tmp_path / "model.bin")
    assert "decoder/projection/weight" in variables
    converted = whisper_weights(variables)
    assert set(converted) == set(weights)
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_a_cut_whisper_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 6) + b"\x08\0Whisper\0"[:5])
    with pytest.raises(CheckpointError, match="cut short"):
        read_model(tmp_path / "model.bin")


@pytest.mark.slow
def test_real_whisper_when_it_is_there():
    folder = fetch.cache_folder() / "models" / "whisper-base"
    if not (folder / "config.json").is_file():
        pytest.skip("whisper-base is not in the cache")
    weights = load_file(folder / "model.safetensors")
    assert weights["model.encoder.embed_positions.weight"].shape == (1500, 512)
