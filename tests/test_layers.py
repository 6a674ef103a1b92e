"""Layers: parity with transformers, offline = streaming, caches, packed products."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LayerConfig, LlamaLayer, Rotary, causal_mask
from vocalnet.linears import Int8Linear, compute_dtype, hadamard, int8_available, pack_linear, spread, spread_block
from vocalnet.norm import RMSNorm

CONFIG = LayerConfig(width=48, heads=6, ffn=64, kv_heads=2, head_dim=8)
needs_int8 = pytest.mark.skipif(not int8_available(), reason="no int8 kernels in this build of PyTorch")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = LlamaLayer(CONFIG).eval().requires_grad_(False)
    for norm in (made.input_layernorm, made.post_attention_layernorm):
        norm.weight.data.uniform_(0.5, 2.0)
    return made


def inputs(length=11, batch=2):
    return torch.randn(batch, length, CONFIG.width, generator=torch.Generator().manual_seed(1))


def rotation(first, last, dtype=torch.float32):
    return Rotary(CONFIG.size)(torch.arange(first, last), dtype)


def stream(layer, x, edges, capacity=16):
    """Steps through x in chunks that end at `edges`."""
    cache = KVCache.allocate(x.shape[0], CONFIG, capacity, x.dtype)
    parts = []
    for first, last in zip([0, *edges[:-1]], edges, strict=True):
        parts.append(layer.step(x[:, first:last], rotation(first, last, x.dtype), cache))
    return torch.cat(parts, 1), cache


def test_layer_equals_transformers(layer):
    reference_config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        rms_norm_eps=CONFIG.eps, attn_implementation="eager",
    )  # fmt: skip
    reference = LlamaDecoderLayer(reference_config, 0).eval()
    reference.load_state_dict(layer.state_dict())
    x = inputs()
    positions = torch.arange(11)[None]
    hidden = LlamaRotaryEmbedding(reference_config)(x, positions)
    additive = torch.zeros(1, 1, 11, 11).masked_fill(~causal_mask(11, 11), float("-inf"))
    with torch.no_grad():
        expected = reference(x, attention_mask=additive, position_embeddings=hidden)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(layer(x, rotation(0, 11), causal=True), expected, atol=1e-5)
    assert torch.allclose(layer(x, rotation(0, 11), causal_mask(11, 11)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_transformers(dtype):
    norm, reference = RMSNorm(48), LlamaRMSNorm(48, eps=1e-5)
    norm.weight.data.uniform_(0.5, 2.0)
    reference.load_state_dict(norm.state_dict())
    x = inputs().to(dtype)
    norm, reference = norm.to(dtype), reference.to(dtype)
    with torch.no_grad():
        assert torch.allclose(norm(x), reference(x), atol=1e-6)
    assert torch.allclose(norm(x), reference(x), atol=1e-6)  # the differentiable form


@pytest.mark.parametrize("edges", [[11], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 9, 11]])
def test_streaming_equals_offline(layer, edges):
    x = inputs()
    streamed, cache = stream(layer, x, edges)
    assert torch.allclose(streamed, layer(x, rotation(0, 11), causal=True), atol=1e-5)
    assert cache.length == 11


def test_a_longer_prefix_never_changes_earlier_output(layer):
    x = inputs()
    whole = layer(x, rotation(0, 11), causal=True)
    for length in (1, 4, 10):
        assert torch.allclose(layer(x[:, :length], rotation(0, length), causal=True), whole[:, :length], atol=1e-5)


def test_truncating_rewinds(layer):
    x = inputs()
    expected, cache = stream(layer, x, [6, 11])
    cache.truncate(6)
    again = layer.step(x[:, 6:], rotation(6, 11), cache)
    assert torch.allclose(again, expected[:, 6:], atol=1e-6)
    with pytest.raises(ConfigError, match="allowed: 0 to 11"):
        cache.truncate(12)


def test_rows_and_visibility_are_the_callers_when_given(layer):
    """Rows may be written anywhere, and attention limited to a range of them."""
    x = inputs()
    expected = layer(x[:, :5], rotation(0, 5), causal=True)
    cache = KVCache.allocate(2, CONFIG, 16)
    for index in range(5):
        out = layer.step(x[:, index : index + 1], rotation(index, index + 1), cache, 7 + index, (7, 8 + index))
        assert torch.allclose(out, expected[:, index : index + 1], atol=1e-5)
    assert cache.length == 0
    mask = causal_mask(5, 5)
    out = layer.step(x[:, :5], rotation(0, 5), cache, 2, (2, 7), mask)
    assert torch.allclose(out, expected, atol=1e-5)


def test_a_full_cache_is_an_error(layer):
    with pytest.raises(ConfigError, match="capacity of 8"):
        stream(layer, inputs(), [11], capacity=8)


def test_only_position_differences_matter_and_they_may_be_fractional(layer):
    x, rotary = inputs(), Rotary(CONFIG.size)
    base = layer(x, rotary(torch.arange(11) * 0.25), causal=True)
    moved = layer(x, rotary(torch.arange(11) * 0.25 + 3.5), causal=True)
    assert torch.allclose(base, moved, atol=1e-5)
    assert not torch.allclose(base, layer(x, rotary(torch.arange(11)), causal=True), atol=1e-3)


def test_gradients_flow_and_match_the_inference_form(layer):
    x = inputs().requires_grad_(True)
    out = layer(x, rotation(0, 11), causal=True)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    with torch.no_grad():
        assert torch.allclose(layer(x, rotation(0, 11), causal=True), out, atol=1e-5)


@pytest.mark.parametrize("spread_stream", [False, True])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), pytest.param("int8", 0.03, marks=needs_int8)]
)
def test_packed_layers_agree_with_plain_ones(layer, precision, tolerance, spread_stream):
    x, dtype = inputs(), compute_dtype(precision)
    expected = layer(x, rotation(0, 11), causal=True)
    packed = copy.deepcopy(layer)
    packed.pack(precision, spread_stream)
    matrix = hadamard(spread_block(CONFIG.width))
    given = spread(x, matrix) if spread_stream else x
    out, _ = stream(packed, given.to(dtype), [4, 5, 11])
    out = spread(out.float(), matrix) if spread_stream else out.float()
    assert (out - expected).abs().max() < tolerance * expected.abs().max()
    assert not list(packed.parameters())


@needs_int8
def test_int8_rows_do_not_disturb_each_other():
    """One row with huge values, such as a first token's, leaves the others exact."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    packed = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(5, 64)
    x[0] *= 1000
    error = (packed(x) - linear(x)).abs().amax(1)
    assert error[1:].max() < 0.05
    assert torch.allclose(packed(x[2:3]), packed(x)[2:3], atol=0.05)


@needs_int8
def test_spreading_makes_int8_exact_where_one_channel_dominates():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, bias=False)
    x = torch.randn(200, 64)
    x[:, 7] = 40
    exact = linear(x).detach()
    plain, mixed = (Int8Linear(linear.weight, None, spread_input=flag)(x) for flag in (False, True))
    assert (mixed - exact).norm() < 0.8 * (plain - exact).norm()


def test_hadamard_is_its_own_inverse():
    x = inputs()
    matrix = hadamard(spread_block(48))
    assert matrix.shape == (16, 16)
    assert torch.allclose(spread(spread(x, matrix), matrix), x, atol=1e-6)


def test_wrong_shapes_and_precisions_say_what_is_allowed():
    with pytest.raises(ConfigError, match="multiple of kv_heads"):
        LayerConfig(width=48, heads=6, ffn=64, kv_heads=4)
    with pytest.raises(ConfigError, match="set head_dim"):
        LayerConfig(width=50, heads=6, ffn=64)
    with pytest.raises(ConfigError, match="allowed: int8, bf16, fp32"):
        pack_linear(torch.zeros(2, 2), None, "int4")
