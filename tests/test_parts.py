"""Parts and model folders on disk: what is saved loads, and what is broken is named in one line."""

import json

import pytest
import torch

from tests.tiny_model import tiny_llm, tiny_model, tokenizer
from vocalnet import checkpoints
from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.config import to_dict
from vocalnet.errors import CheckpointError, ConfigError
from vocalnet.model import VocalNet, VocalNetConfig, model_folder, pack
from vocalnet.parts import CONFIG_FILE, WEIGHTS_FILE, load_part, save_part


@pytest.fixture
def part(tmp_path):
    adapter = SpeechAdapter(AdapterConfig(encoder_width=8, hidden=8, width=8, mode="frames"))
    save_part(adapter, adapter.config, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_part_loads_as_it_was_saved(part):
    loaded = load_part(SpeechAdapter, AdapterConfig, part)
    again = load_part(SpeechAdapter, AdapterConfig, part)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not loaded.training
    assert sorted(path.name for path in part.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE], "no temporary file is left"


def test_half_precision_weights_load_as_float32(part):
    loaded = load_part(SpeechAdapter, AdapterConfig, part)
    save_part(loaded, loaded.config, part, torch.float16)
    half = load_part(SpeechAdapter, AdapterConfig, part)
    assert half.linear1.weight.dtype == torch.float32
    torch.testing.assert_close(half.linear1.weight, loaded.linear1.weight, atol=1e-3, rtol=1e-3)


def damage_config(part):
    config = json.loads((part / CONFIG_FILE).read_text())
    (part / CONFIG_FILE).write_text(json.dumps({**config, "hiden": 3}))


def damage_shape(part):
    config = json.loads((part / CONFIG_FILE).read_text())
    (part / CONFIG_FILE).write_text(json.dumps({**config, "hidden": 9}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_config, ConfigError, "did you mean 'hidden'"),
        (damage_shape, CheckpointError, "linear1.weight is"),
        (lambda p: (p / WEIGHTS_FILE).unlink(), CheckpointError, f"no {WEIGHTS_FILE}"),
        (lambda p: (p / CONFIG_FILE).unlink(), CheckpointError, f"no {CONFIG_FILE}"),
        (lambda p: (p / WEIGHTS_FILE).write_bytes(b"\x80\x04 not weights"), CheckpointError, "cannot be read"),
        (lambda p: (p / CONFIG_FILE).write_text("{"), CheckpointError, "not valid JSON"),
    ],
)
def test_a_broken_part_is_one_clear_line(part, damage, error, message):
    damage(part)
    with pytest.raises(error, match=message) as caught:
        load_part(SpeechAdapter, AdapterConfig, part)
    assert "\n" not in str(caught.value)


def test_unknown_model_is_named():
    with pytest.raises(CheckpointError, match="no model 'nowhere'"):
        model_folder("nowhere")


def test_a_packed_model_answers_as_the_parts_do(tmp_path, monkeypatch):
    from tests.test_session import ask, speech

    model = tiny_model()
    llm = tmp_path / "llm"
    torch.manual_seed(0)
    tiny_llm().save_pretrained(llm)
    tokenizer().save_pretrained(llm)
    monkeypatch.setattr(checkpoints, "base_model", lambda name: tmp_path / name)
    monkeypatch.setattr("vocalnet.model.SpeechEncoder.from_whisper", lambda folder: model.encoder)
    parts = {}
    for name, module in (("adapter", model.adapter), ("flow", model.flow), ("vocoder", model.vocoder)):
        save_part(module, module.config, tmp_path / "runs" / name)
        parts[name] = tmp_path / "runs" / name
    fresh = type(model.speech_decoder)(model.speech_decoder.config)
    save_part(fresh, fresh.config, tmp_path / "runs" / "speech_decoder")
    parts["speech_decoder"] = tmp_path / "runs" / "speech_decoder"
    config = VocalNetConfig("tiny", "llm", "encoder", generation=model.config.generation)
    with pytest.raises(CheckpointError, match="no part 'flow'"):
        pack(tmp_path / "model", config, {k: v for k, v in parts.items() if k != "flow"}, {}, torch.float16)
    pack(tmp_path / "model", config, parts, {"seed": 0}, torch.float32)
    loaded = VocalNet.load(tmp_path / "model")
    assert to_dict(loaded.config) == to_dict(config)
    _, sound, summary, _ = ask(loaded.session(), speech(0.5))
    assert summary.speech_tokens > 0
    assert len(sound) == 960 * summary.speech_tokens
