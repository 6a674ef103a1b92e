"""The text backbone: equal to transformers in every family and precision it claims, streaming, LoRA, errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vocalnet.backbone import Backbone, ForeignDecoder, LeanDecoder, is_lean, load_config
from vocalnet.errors import CheckpointError, ConfigError
from vocalnet.linears import int8_available
from vocalnet.lora import LoraAdapter, save_lora

SIZES = {
    "vocab_size": 80, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])
needs_int8 = pytest.mark.skipif(not int8_available(), reason="no int8 kernels in this build of PyTorch")


def make(family):
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    }[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@torch.no_grad()
def reference(model, ids=IDS):
    """transformers' hidden states after the final norm, and logits."""
    out = model(ids, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


def run(backbone, edges, ids=IDS):
    """Prefill in chunks; the last token by step."""
    state = backbone.init_state(32)
    parts = [backbone.prefill(backbone.embed(ids[:, a:b]), state) for a, b in zip([0, *edges[:-1]], edges, strict=True)]
    hidden, logits = backbone.step(int(ids[0, -1]), state)
    return torch.cat([*parts, hidden[None]], 1), logits, state


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "gpt2"])
@pytest.mark.parametrize("edges", [[9], [1, 2, 6, 9]])
def test_hidden_states_and_logits_equal_transformers(family, edges):
    model = make(family)
    hidden, logits = reference(model)
    backbone = Backbone(model, "fp32")
    assert isinstance(backbone.decoder, ForeignDecoder if family == "gpt2" else LeanDecoder)
    ours, last, state = run(backbone, edges)
    assert torch.allclose(ours, hidden, atol=1e-4)
    assert torch.allclose(last, logits[:, -1], atol=1e-4)
    assert torch.allclose(backbone.logits(ours), logits, atol=1e-4)
    assert state.length == 10


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), pytest.param("int8", 0.08, marks=needs_int8)])
def test_lower_precisions_stay_close(family, precision, tolerance):
    model = make(family)
    hidden, _ = reference(model)
    ours, _, _ = run(Backbone(model, precision), [4, 9])
    assert ((ours.float() - hidden).norm() / hidden.norm()) < tolerance


def test_greedy_text_equals_transformers(llama):
    expected = llama.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 10:]
    backbone = Backbone(llama, "fp32")
    state = backbone.init_state(32)
    token = int(backbone.logits(backbone.prefill(backbone.embed(IDS), state)[:, -1]).argmax())
    tokens = []
    for _ in range(12):
        tokens.append(token)
        token = int(backbone.step(token, state)[1].argmax())
    assert tokens == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_truncate_forgets_an_interrupted_answer(family):
    backbone = Backbone(make(family), "fp32")
    expected, _, state = run(backbone, [9])
    backbone.truncate(state, 4)
    again = backbone.prefill(backbone.embed(IDS[:, 4:]), state)
    assert torch.allclose(again, expected[:, 4:], atol=1e-5)
    with pytest.raises(ConfigError, match="10 positions"):
        backbone.truncate(state, 11)


def test_conversations_do_not_share_state(llama):
    backbone = Backbone(llama, "fp32")
    one, two = backbone.init_state(16), backbone.init_state(32)
    first = backbone.prefill(backbone.embed(IDS), one)
    backbone.prefill(backbone.embed(IDS.flip(1)), two)
    assert torch.equal(first, backbone.prefill(backbone.embed(IDS), backbone.init_state(16)))
    assert (one.length, two.length) == (10, 10)


def test_a_folder_loads_like_the_model_also_in_shards(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    expected, _, _ = run(Backbone(llama, "fp32"), [9])
    assert torch.equal(run(Backbone(tmp_path, "fp32"), [9])[0], expected)


def test_configs_derived_from_llama_are_read_as_llama(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings.update(model_type="vocalnet_llama", architectures=["VocalNetLlamaForCausalLM"], txt_token_num=5)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert is_lean(load_config(tmp_path))
    expected, _, _ = run(Backbone(llama, "fp32"), [9])
    assert torch.equal(run(Backbone(tmp_path, "fp32"), [9])[0], expected)


def make_lora(folder, module="model.layers.1.self_attn.q_proj", width=64, alpha=8.0):
    factors = torch.randn(4, width) * 0.3, torch.randn(64, 4) * 0.3
    save_lora(folder, {module: factors}, alpha)
    return factors


def test_lora_is_merged_at_load(tmp_path):
    model = make("llama")
    a, b = make_lora(tmp_path)
    ours, _, _ = run(Backbone(model, "fp32", lora=tmp_path), [9])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 2.0 * b @ a
    assert torch.allclose(ours, reference(model)[0], atol=1e-4)


def test_lora_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = make("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(make("llama"), config).eval()
    adapted.save_pretrained(tmp_path)
    ours, _, _ = run(Backbone(model, "fp32", lora=tmp_path), [9])
    assert torch.allclose(ours, reference(adapted)[0], atol=2e-4)


def test_wrong_lora_folders_are_refused(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        LoraAdapter(tmp_path)
    make_lora(tmp_path / "layer", module="model.layers.7.self_attn.q_proj")
    with pytest.raises(CheckpointError, match="belongs to another model"):
        Backbone(llama, "fp32", lora=tmp_path / "layer")
    make_lora(tmp_path / "shape", width=32)
    with pytest.raises(CheckpointError, match="64 x 32"):
        Backbone(llama, "fp32", lora=tmp_path / "shape")


def test_broken_folders_say_what_is_wrong(llama, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Backbone(tmp_path)
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        Backbone(tmp_path, "fp32")
    save_file({**weights, "model.layers.1.mlp.up_proj.weight": lost[:5]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="its config says"):
        Backbone(tmp_path, "fp32")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        Backbone(tmp_path, "fp32")


def test_limits_are_checked(llama):
    backbone = Backbone(llama, "fp32")
    with pytest.raises(ConfigError, match="allows 1 to 64"):
        backbone.init_state(65)
    with pytest.raises(ConfigError, match="needs 10 positions, its cache has 8"):
        backbone.prefill(backbone.embed(IDS), backbone.init_state(8))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_an_accelerator(llama, precision):
    hidden, _ = reference(llama)
    ours, _, _ = run(Backbone(llama, precision, device="cuda"), [4, 9])
    assert ((ours.float().cpu() - hidden).norm() / hidden.norm()) < (0.03 if precision == "bf16" else 1e-3)
