"""The kernels in C against the same arithmetic by PyTorch's operators, in float32."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from vocalnet import layers as layers_module
from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LayerConfig, LlamaLayer, Rotary, Rotation, causal_mask, step_all
from vocalnet.linears import DenseLinear, Int8Linear, compute_dtype, hadamard, pack_linear, spread, spread_block
from vocalnet.native import NativeLinear, available
from vocalnet.norm import RMSNorm

pytestmark = pytest.mark.skipif(not available(), reason="no AVX-512 VNNI, or no C compiler")

SIZES = [
    LayerConfig(width=64, heads=2, ffn=64, head_dim=32),
    LayerConfig(width=100, heads=3, ffn=80, kv_heads=1, head_dim=64, qkv_bias=True, output_bias=True, mlp_bias=True),
    LayerConfig(width=576, heads=9, ffn=1536, kv_heads=3),
    LayerConfig(width=96, heads=4, ffn=160, kv_heads=2, head_dim=96),
    LayerConfig(width=256, heads=2, ffn=512, head_dim=128),
]
# Of the largest output: bf16 has 8 bits, int8 7 and a sign, and the sums of many roundings are a little larger.
TOLERANCE = {"bf16": 0.02, "int8": 0.04}


def make_layer(config):
    layer = LlamaLayer(config).eval().requires_grad_(False)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.data.uniform_(0.5, 2.0)
    return layer


def packed(layer, precision):
    made = copy.deepcopy(layer)
    made.pack(precision)
    assert (made.packed.whole is not None) == (precision != "fp32")
    return made


def close(found, expected, precision):
    return (found.float() - expected).abs().max() < TOLERANCE[precision] * expected.abs().max()


def rotation_of(config, first, last, dtype=torch.float32):
    return Rotary(config.size)(torch.arange(first, last), dtype)


def stream(layer, config, x, edges, cache_dtype=None):
    """Steps through x in chunks that end at `edges`, appending."""
    cache = KVCache.allocate(1, config, x.shape[1] + 3, cache_dtype or x.dtype)
    cache.pair.fill_(float("nan"))  # rows that are not there yet must not be read
    parts = [
        layer.step(x[:, first:last], rotation_of(config, first, last, x.dtype), cache)
        for first, last in zip([0, *edges[:-1]], edges, strict=True)
    ]
    assert cache.length == x.shape[1]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"{config.width}-{config.size}")
def test_layer_is_that_of_pytorch(config, precision, threads):
    torch.set_num_threads(threads)
    layer = make_layer(config)
    x = torch.randn(1, 53, config.width)
    expected = layer(x, rotation_of(config, 0, 53), causal=True)
    out, cache = stream(packed(layer, precision), config, x.to(compute_dtype(precision)), [1, 2, 7, 13, 30, 53])
    assert close(out, expected, precision)
    reference, kept = stream(layer, config, x, [53])
    assert torch.allclose(reference, expected, atol=1e-5)
    assert close(cache.pair[:, :, :53], kept.pair[:, :, :53], precision)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_row_is_the_same_however_many_are_computed(precision):
    """Bit for bit: what verified decoding checks with several rows is what next-token prediction says with one."""
    config = SIZES[2]
    layer = packed(make_layer(config), precision)
    x = torch.randn(1, 24, config.width).to(compute_dtype(precision))
    one, _ = stream(layer, config, x, list(range(1, 25)), torch.bfloat16)
    for edges in ([24], [5, 10, 15, 20, 24], [1, 8, 24], [6, 13, 24]):
        assert torch.equal(stream(layer, config, x, edges, torch.bfloat16)[0], one)
    torch.set_num_threads(2)
    assert torch.equal(stream(layer, config, x, [24], torch.bfloat16)[0], one)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_places_and_turns_by_head(kind, cache_dtype):
    """As the speech decoder asks: rows in any order, part of the cache, a mask cut from a wider one, scaled heads."""
    config = SIZES[2]
    layer, rows = make_layer(config), 7
    x = torch.randn(1, rows, config.width)
    places = torch.tensor([20, 3, 21, 22, 4, 23, 24])
    seen = torch.rand(rows, 40) > 0.4
    seen[torch.arange(rows), places] = True
    seen = seen[:, 2:26]
    mask = seen if kind == torch.bool else torch.zeros(rows, 40, dtype=kind)[:, 2:26].masked_fill(~seen, float("-inf"))
    angles = torch.rand(rows, config.heads + config.key_heads, config.size // 2) * 6
    turn = Rotation(
        torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    )  # one for each head
    results = []
    plain_mask = seen if kind == torch.bool else mask.float()
    cases = (
        (layer, torch.float32, plain_mask),
        (packed(layer, "int8"), cache_dtype, mask),
        (packed(layer, "fp32"), torch.float32, mask),
    )
    for made, dtype, given in cases:
        cache = KVCache.allocate(1, config, 30, dtype)
        cache.pair.copy_(torch.randn(cache.pair.shape, generator=torch.Generator().manual_seed(3)))
        results.append((made.step(x, turn, cache, places, (2, 26), given), cache))
        assert cache.length == 0
    (expected, kept), (found, cache), (exact, _) = results
    assert close(found, expected, "int8")
    assert torch.allclose(exact, expected, atol=2e-5)
    assert close(cache.pair, kept.pair, "int8")


def test_float32_attention_is_exact():
    config = SIZES[1]
    layer = make_layer(config)
    x = torch.randn(1, 40, config.width)
    out, _ = stream(packed(layer, "fp32"), config, x, [3, 4, 9, 40])
    assert torch.allclose(out, layer(x, rotation_of(config, 0, 40), causal=True), atol=2e-5)


def test_rows_that_see_nothing_are_not_nan():
    config = SIZES[0]
    layer = packed(make_layer(config), "int8")
    cache = KVCache.allocate(1, config, 8)
    cache.pair.zero_()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    out = layer.step(torch.randn(1, 2, config.width), rotation_of(config, 0, 2), cache, 0, (0, 4), mask)
    assert torch.isfinite(out).all()


def test_very_large_and_zero_rows():
    """A first token's outliers leave the other rows alone, and nothing divides by zero."""
    linear = nn.Linear(192, 130).requires_grad_(False)
    native = pack_linear(linear.weight, linear.bias, "int8")
    x = torch.randn(5, 192)
    x[0] *= 1e6
    x[1] = 0
    found, expected = native(x), linear(x)
    assert torch.equal(found[1], linear.bias)
    for row in (0, 2, 3, 4):
        assert close(found[row], expected[row], "int8")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 40])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (100, 7), (1024, 130), (68, 321)])
def test_products(inputs, outputs, precision, rows):
    linear, norm = nn.Linear(inputs, outputs).requires_grad_(False), RMSNorm(inputs).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    x = 3 * torch.randn(rows, inputs)
    expected = linear(norm(x))
    native = pack_linear(linear.weight, linear.bias, precision, norm)
    assert isinstance(native, NativeLinear)
    for given in (x, x.bfloat16(), x.double()):
        assert close(native(given), expected, precision)
    assert native(x[None]).shape == (1, rows, outputs)


def test_spread_and_paired_products():
    linear = nn.Linear(192, 2 * 80).requires_grad_(False)
    x = torch.randn(9, 192)
    x[:, 7] = 40
    exact = linear(x)
    plain, mixed, paired = (
        pack_linear(linear.weight, linear.bias, "int8", spread_input=flag, paired=pair)(x)
        for flag, pair in ((False, False), (True, False), (True, True))
    )
    assert (mixed - exact).norm() < 0.8 * (plain - exact).norm()
    assert torch.equal(mixed, paired)
    matrix = hadamard(spread_block(192))
    assert torch.allclose(spread(spread(x, matrix), matrix), x, atol=1e-5)


def test_batches_take_pytorchs_way():
    """Two sequences at once are not the kernels' business, but give the same."""
    config = SIZES[0]
    layer = make_layer(config)
    x = torch.randn(2, 9, config.width)
    expected = layer(x, rotation_of(config, 0, 9), causal=True)
    for precision in ("bf16", "int8"):
        cache = KVCache.allocate(2, config, 9, compute_dtype(precision))
        out = packed(layer, precision).step(x.to(cache.pair.dtype), rotation_of(config, 0, 9, cache.pair.dtype), cache)
        assert close(out, expected, precision)


def test_gradients_flow_or_are_refused():
    config = SIZES[0]
    layer = make_layer(config)
    x = torch.randn(1, 4, config.width, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        packed(layer, "int8").step(x, rotation_of(config, 0, 4), KVCache.allocate(1, config, 4))


def test_inputs_that_do_not_fit_are_refused():
    """A kernel would read or write past the end."""
    config = SIZES[0]
    for precision in ("bf16", "int8"):
        layer = packed(make_layer(config), precision)
        dtype = compute_dtype(precision)
        cache = KVCache.allocate(1, config, 8, dtype)
        with pytest.raises(RuntimeError, match=r"expected \(\.\.\., 64\)"):
            layer.step(torch.randn(1, 4, 32, dtype=dtype), rotation_of(config, 0, 4, dtype), cache)
        with pytest.raises(RuntimeError, match=r"expected \(\.\.\., 64\)"):
            layer.packed.qkv(torch.randn(3, 128, dtype=dtype))
        with pytest.raises(RuntimeError, match="on meta"):
            layer.packed.qkv(torch.zeros(3, 64, dtype=dtype, device="meta"))


def test_layers_or_caches_that_differ_are_refused():
    config = SIZES[0]
    stack = [packed(make_layer(config), "int8") for _ in range(2)]
    x, turn = torch.randn(1, 3, config.width), rotation_of(config, 0, 3)
    for capacities, dtypes in (((8, 8, 8), (1, 1, 1)), ((8,), (1,)), ((8, 4), (1, 1)), ((8, 8), (1, 0))):
        kinds = [(torch.bfloat16, torch.float32)[kind] for kind in dtypes]
        caches = [KVCache.allocate(1, config, size, kind) for size, kind in zip(capacities, kinds, strict=True)]
        with pytest.raises(ValueError, match="cache"):
            step_all(stack, x, turn, caches)
    other = [stack[0], packed(make_layer(SIZES[4]), "int8")]
    caches = [KVCache.allocate(1, config, 8) for _ in range(2)]
    with pytest.raises(ValueError, match="one shape"):
        step_all(other, x, turn, caches)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_all_layers_as_one_call(precision):
    config = SIZES[2]
    stack = [packed(make_layer(config), precision) for _ in range(3)]
    x = torch.randn(1, 11, config.width).to(compute_dtype(precision))
    one, all_at_once = ([KVCache.allocate(1, config, 12, torch.bfloat16) for _ in stack] for _ in range(2))
    for first, last in ((0, 1), (1, 6), (6, 11)):
        turn = rotation_of(config, first, last, x.dtype)
        expected = x[:, first:last]
        for layer, cache in zip(stack, one, strict=True):
            expected = layer.step(expected, turn, cache)
        given = x[:, first:last].clone()
        assert torch.equal(step_all(stack, given, turn, all_at_once), expected)
        assert torch.equal(given, x[:, first:last])
    assert [cache.length for cache in all_at_once] == [11, 11, 11]
    assert all(torch.equal(a.pair[:, :, :11], b.pair[:, :, :11]) for a, b in zip(one, all_at_once, strict=True))


def test_rows_and_caches_with_gaps_between_them():
    """Views that the kernels would misread go PyTorch's way."""
    config = SIZES[0]
    layer = packed(make_layer(config), "int8")
    x, turn = torch.randn(1, 3, config.width), rotation_of(config, 0, 3)
    wide = torch.zeros(1, 4, 12, config.size)
    results = []
    for pair, places in (
        (torch.zeros(1, 4, 6, config.size), torch.tensor([0, 2, 4])),
        (torch.zeros(1, 4, 6, config.size), torch.arange(10)[::2][:3]),
        (wide[:, :, :6], torch.tensor([0, 2, 4])),
    ):
        cache = KVCache(pair)
        out = layer.step(x, turn, cache, places, (0, 6), torch.ones(3, 6, dtype=torch.bool))
        results.append((out, pair))
    assert wide[:, :, 6:].abs().max() == 0
    for out, pair in results[1:]:
        assert close(out, results[0][0], "int8")
        assert close(pair, results[0][1], "int8")


def test_a_default_dtype_changes_nothing():
    """transformers sets one while it loads, for the whole process."""
    config = SIZES[0]
    layer = packed(make_layer(config), "int8")
    x = torch.randn(1, 5, config.width)
    expected, _ = stream(layer, config, x, [2, 5])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = layer.step(x, rotation_of(config, 0, 5), KVCache.allocate(1, config, 5, torch.bfloat16))
        logits = layer.packed.qkv(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == logits.dtype == torch.float32
    assert close(found, expected, "int8")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_not_a_number_stays_so(precision):
    config = SIZES[0]
    layer = packed(make_layer(config), precision)
    x = torch.randn(1, 4, config.width).to(compute_dtype(precision))
    x[0, 2, 5] = float("nan")
    out, _ = stream(layer, config, x, [4])
    assert out[:, 2:].isnan().all()  # the last row sees the one before it
    assert layer.packed.output(x)[0, 2].isnan().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_packed_layers_can_be_copied(precision, copied):
    config = SIZES[0]
    layer = packed(make_layer(config), precision)
    x = torch.randn(1, 6, config.width).to(compute_dtype(precision))
    expected, _ = stream(layer, config, x, [2, 6])
    made = copied(layer)
    layer.packed.gate_up.weight.zero_()  # a copy has its own
    assert torch.equal(stream(made, config, x, [2, 6])[0], expected)


def test_rows_outside_the_cache_are_refused():
    config = SIZES[0]
    layer = packed(make_layer(config), "int8")
    cache = KVCache.allocate(1, config, 8)
    before = cache.pair.clone()
    x, turn = torch.randn(1, 3, config.width), rotation_of(config, 0, 3)
    with pytest.raises(ConfigError, match=r"6 to 9 .* capacity of 8"):
        layer.step(x, turn, cache, 6)
    for places, visible in ([6, 7, 8], (0, 8)), ([-1, 0, 1], (0, 8)), ([0, 1, 2], (0, 9)), ([0, 1, 2], (3, 3)):
        with pytest.raises(ConfigError, match="capacity"):
            layer.step(x, turn, cache, torch.tensor(places), visible)
    cache.length = 6
    with pytest.raises(ConfigError, match="capacity"):
        layer.step(x, turn, cache)
    assert torch.equal(cache.pair.nan_to_num(), before.nan_to_num())
    assert cache.length == 6


def test_threads_of_one_process_do_not_disturb_each_other():
    config = SIZES[2]
    layer = packed(make_layer(config), "int8")
    x = torch.randn(1, 20, config.width)
    expected, _ = stream(layer, config, x, [5, 10, 15, 20])
    wrong = []

    def work():
        with torch.inference_mode():
            for _ in range(20):
                if not torch.equal(stream(layer, config, x, [5, 10, 15, 20])[0], expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_causal_mask_equals_no_mask_but_appending():
    config = SIZES[0]
    layer = packed(make_layer(config), "bf16")
    x = torch.randn(1, 6, config.width).bfloat16()
    appended, _ = stream(layer, config, x, [6])
    cache = KVCache.allocate(1, config, 6, torch.bfloat16)
    masked = layer.step(x, rotation_of(config, 0, 6, x.dtype), cache, 0, (0, 6), causal_mask(6, 6))
    assert torch.equal(appended, masked)


def test_more_rows_than_the_table_of_row_numbers(monkeypatch):
    monkeypatch.setattr(layers_module, "_ROWS", torch.arange(4))
    config = SIZES[0]
    layer = packed(make_layer(config), "bf16")
    x = torch.randn(1, 9, config.width).bfloat16()
    short, _ = stream(layer, config, x, [3, 6, 9])
    monkeypatch.undo()
    assert torch.equal(short, stream(layer, config, x, [3, 6, 9])[0])


# ---- without the kernels ----


def run(code, **variables):
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


KIND = (
    "import torch; from vocalnet.linears import pack_linear; "
    "print(type(pack_linear(torch.ones(8, 8), None, 'bf16')).__name__)"
)


def test_switched_off():
    assert run(KIND, VOCALNET_NATIVE="0")[0] == "DenseLinear"


def test_no_compiler(tmp_path):
    out, err = run(KIND, CC=str(tmp_path / "cc"), VOCALNET_CACHE=str(tmp_path))
    assert (out, err) == ("DenseLinear", "")


def test_compiler_that_fails(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, err = run(KIND, CC=str(compiler), VOCALNET_CACHE=str(tmp_path))
    assert out == "DenseLinear"
    assert "no such option" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "native").glob("*.so"))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "native").write_text("not a folder")
    assert run(KIND, VOCALNET_CACHE=str(tmp_path))[0] in ("NativeLinear", "DenseLinear")


def test_no_home():
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "VOCALNET_CACHE")}
    code = "import pathlib; pathlib.Path.home = classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError())); " + KIND
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.stderr) == ("NativeLinear", "")


def test_an_old_compiler(tmp_path):
    """gcc 9 knows AVX-512 VNNI, but not bf16."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *bf16*) echo unknown option >&2; exit 1;; esac\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    code = """
import torch
from vocalnet.linears import pack_linear
torch.manual_seed(0)
weight, x = torch.randn(70, 64), torch.randn(5, 64)
print(type(pack_linear(weight, None, "bf16")).__name__)
error = pack_linear(weight, None, "bf16")(x).float() - x @ weight.T
print(bool(error.abs().max() < 0.2))
"""
    assert run(code, CC=str(compiler), VOCALNET_CACHE=str(tmp_path))[0].split() == ["NativeLinear", "True"]


def test_compiled_once(tmp_path):
    assert run(KIND, VOCALNET_CACHE=str(tmp_path))[0] == "NativeLinear"
    (made,) = (tmp_path / "native").glob("*.so")
    stamp = made.stat().st_mtime_ns
    assert run(KIND, VOCALNET_CACHE=str(tmp_path))[0] == "NativeLinear"
    assert made.stat().st_mtime_ns == stamp


def test_without_kernels_the_same_comes_out(monkeypatch):
    config = SIZES[2]
    layer = make_layer(config)
    x = torch.randn(1, 12, config.width)
    with_kernels, _ = stream(packed(layer, "int8"), config, x, [5, 12])
    for module in ("vocalnet.linears", "vocalnet.layers"):
        monkeypatch.setattr(f"{module}.available", lambda: False)
    without = copy.deepcopy(layer)
    without.pack("int8")
    assert isinstance(without.packed.qkv, Int8Linear)
    assert without.packed.whole is None
    assert close(stream(without, config, x, [5, 12])[0], with_kernels, "int8")
    half = copy.deepcopy(layer)
    half.pack("bf16")
    assert isinstance(half.packed.qkv, DenseLinear)
