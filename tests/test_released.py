"""Released checkpoints: folders as they are published, at small sizes with weights, at the true ones without."""

import ctypes
import json
import pickle
import platform
import re
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests import released_folders as made
from vocalnet import cli
from vocalnet.audio import WHISPER_HOP, log_mel_whisper
from vocalnet.checkpoints.convert import convert
from vocalnet.checkpoints.cosyvoice import load_hift
from vocalnet.checkpoints.released import Released, adapter_config, expected_shapes, is_released, speech_decoder_config
from vocalnet.checkpoints.settings import Settings
from vocalnet.checkpoints.tensors import check_fit, compact
from vocalnet.decoding import generate_chunk
from vocalnet.encoder import EncoderConfig
from vocalnet.errors import CheckpointError, ConfigError, DownloadError, VocalNetError
from vocalnet.model import VocalNet
from vocalnet.sampling import SamplingConfig
from vocalnet.session import Summary

GREEDY = SamplingConfig()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint's folder with CosyVoice2's beside it, a voice, and the modules that the weights come from."""
    root = tmp_path_factory.mktemp("published")
    weights, llm, encoder, adapter = made.released_weights()
    folder = made.write_released(root / "VocalNet-1B", weights, made.released_config("llama", llm))
    made.write_cosyvoice(root / "CosyVoice2-0.5B")
    return folder, made.write_voice(root / "voice.safetensors"), llm, encoder, adapter


@pytest.fixture(scope="module")
def model(published):
    folder, voice, *_ = published
    return VocalNet.load(folder, precision="fp32", voice=voice)


def question(seconds=0.8):
    noise = np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype(np.float32)
    return 0.1 * np.convolve(noise, np.ones(8, np.float32) / 8, "same").astype(np.float32)


def short(model, texts=12):
    """Generation settings for a short answer, greedy in text so that it can be composed by hand."""
    generation = model.config.generation
    return replace(generation, text=GREEDY, max_text_tokens=texts, max_speech_tokens_per_text_token=3)


def answer(model):
    session = model.session(0, short(model))
    session.push_audio(question(), 16_000)
    pieces = list(session.respond())
    assert isinstance(pieces[-1], Summary)
    sound = np.concatenate([piece.samples for piece in pieces if hasattr(piece, "samples")])
    return pieces[-1], sound, session


# ---- what is loaded ----


def test_compatibility_mode_chooses_itself(model):
    config = model.config.generation
    assert model.speech_decoder.config.compatible
    assert model.encoder.config.full_window
    assert (config.mtp, config.decoding.mode if hasattr(config.decoding, "mode") else config.decoding) == (
        2,
        "accept-all",
    )
    assert config.speech.repetition_penalty == 2
    assert model.prompt.system.startswith("You are a helpful language and speech assistant.")


@torch.no_grad()
def test_language_model_equals_transformers(model, published):
    ids = torch.tensor([[3, 9, 30, 12, 7, 22]])
    state = model.backbone.init_state(150)
    hidden = model.backbone.prefill(model.backbone.embed(ids.repeat(1, 20)), state)
    expected = published[2](ids.repeat(1, 20), output_hidden_states=True)  # 120 positions: the scaled rotary matters
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.backbone.logits(hidden), expected.logits, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_encoder_and_adapter_equal_the_original(model, published):
    """Whisper on its 30 s window, then what belongs to the question: 5 frames a position, an incomplete one dropped."""
    *_, encoder, adapter = published
    wave = torch.from_numpy(question(0.73))
    samples = len(wave)
    padded = F.pad(wave, (0, 30 * 16_000 - samples))
    frames = encoder(log_mel_whisper(padded, 128)[None]).last_hidden_state  # (1, 1500, 64)
    rows = (round(samples / WHISPER_HOP + 0.5) + 1) // 2 // made.STACK
    stacked = frames.reshape(1, 1500 // made.STACK, -1)[0, :rows]
    expected = F.linear(stacked, adapter["linear1.weight"], adapter["linear1.bias"]).relu()
    expected = F.linear(expected, adapter["linear2.weight"], adapter["linear2.bias"])
    from vocalnet.audio import StreamingFeatures

    features = StreamingFeatures(128, full_window=True)
    features.push(wave)
    ours = model.adapter.embeddings(model.encoder.question_frames(features.finish(), samples))[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_speech_decoder_speaks_the_recorded_tokens(model):
    """The packed decoder of the loaded model against the original's streaming token lists."""
    decoder, expected = model.speech_decoder, made.RECORDING["expected"]
    hidden = load_file(made.FIXTURES / "speech_generator/io_tiny.safetensors")["hidden"][0]
    wanted = expected["stream_mtp2_greedy_chunks"]
    state = decoder.init_state(64, 128, 2)
    for i, chunk in enumerate(wanted):
        decoder.add_text(hidden[5 * i : 5 * i + 5], state, last=i == len(wanted) - 1)
        assert generate_chunk(decoder, state, GREEDY, len(chunk)) == chunk


def test_flow_and_hift_give_the_recorded_numbers(model):
    io = load_file(made.FIXTURES / "cosyvoice2/cosyvoice2_io.safetensors")
    mel = model.flow.mel(io["tokens"], prompt=model.voice)
    torch.testing.assert_close(mel.transpose(1, 2), io["mel_streaming_full"], atol=1e-4, rtol=0)
    with torch.no_grad():
        wave = model.vocoder.decode(io["mel_streaming_full"].transpose(1, 2), io["source"])
    torch.testing.assert_close(wave, io["wav_given_source"], atol=1e-3, rtol=0)


def test_older_names_of_hift_load(tmp_path, model):
    hift = load_hift(made.write_cosyvoice(tmp_path, older_names=True))
    hift.fold_weight_norm()
    for name, value in hift.state_dict().items():
        torch.testing.assert_close(value, model.vocoder.state_dict()[name], msg=name)


# ---- a conversation ----


@torch.no_grad()
def by_hand(model, llm, session, part=None):
    """The session's text and speech tokens, composed from transformers' LLM and the original's order of events.

    With `part` the speech decoder begins anew after each so many text tokens. Also: how many tokens each part has.
    """
    turn = session.turns[0]
    embed = llm.get_input_embeddings()
    prompt = [embed(torch.tensor(ids)) for ids in (model.prompt.prefix_ids(), model.prompt.suffix_ids())]
    x = torch.cat([prompt[0], turn.question[0], prompt[1]])[None]
    states, ids, limit = [], [], short(model).max_text_tokens
    for _ in range(limit):
        result = llm(inputs_embeds=x, output_hidden_states=True)
        states.append(result.hidden_states[-1][0, -1:])
        ids.append(int(result.logits[0, -1].argmax()))
        x = torch.cat([x, embed(torch.tensor([[ids[-1]]]))], 1)
    end = embed(torch.tensor([model.prompt.end_id]))
    parts = [torch.cat([*states, end, end])]  # the limit's own end, then the end
    if part:
        parts = [torch.cat([*states[first : first + part], end]) for first in range(0, limit, part)]
    tokens, counts = [], []
    for rows in parts:
        said = spoken_by_hand(model, rows)
        tokens += said
        counts.append(len(said))
    return ids, tokens, counts


def spoken_by_hand(model, rows):
    """Units of a text's rows, five by five."""
    decoder, tokens = model.speech_decoder, []
    state = decoder.init_state(len(rows) + 1, 400, 2)
    for start in range(0, len(rows), 5):
        last = start + 5 >= len(rows)
        decoder.add_text(rows[start : start + 5], state, last)
        new = generate_chunk(decoder, state, model.config.generation.speech, 200 if last else 15)
        eos = decoder.config.eos
        tokens += new[: new.index(eos)] if last and eos in new else new
    return [token for token in tokens if token < decoder.config.units]


def test_a_session_answers_as_the_original_would(model, published):
    summary, sound, session = answer(model)
    ids, tokens, _ = by_hand(model, published[2], session)
    assert session.turns[0].answer_ids == ids
    assert session.speech_tokens == tokens[: len(session.speech_tokens)]
    assert len(session.speech_tokens) > 45
    assert len(sound) == 960 * summary.speech_tokens
    assert np.isfinite(sound).all()
    offline = model.flow.mel(torch.tensor([session.speech_tokens]), prompt=model.voice)
    expected = model.vocoder(offline)[0].clamp(-1, 1).numpy()
    np.testing.assert_allclose(sound, expected, atol=1e-3)


def test_the_decoder_begins_anew_after_a_sentence_as_in_the_original(model, published, monkeypatch):
    """After six tokens and any text, in place of 50 and a full stop; the decoder is made to end its parts."""
    monkeypatch.setattr("vocalnet.session.ORIGINAL_PART_TOKENS", 6)
    monkeypatch.setattr("vocalnet.session.SENTENCE_ENDS", ("",))
    output, (*_, session) = model.speech_decoder.packed_output, answer(model)
    eos = F.one_hot(torch.tensor(model.speech_decoder.config.eos), len(output.bias))
    bias, boost, counts = output.bias, 12.0, [0]
    while min(counts) == 0:  # until both parts say something before they end
        boost -= 0.5
        monkeypatch.setattr(output, "bias", bias + boost * eos)
        ids, tokens, counts = by_hand(model, published[2], session, part=6)
    assert sum(counts) < 90  # below the session's limit
    summary, _, session = answer(model)
    assert len(counts) == 2
    assert min(counts) > 0
    assert session.turns[0].answer_ids == ids
    assert session.speech_tokens == tokens
    assert summary.speech_tokens == sum(counts)


def test_converted_folder_answers_the_same(model, published, tmp_path):
    folder, voice, *_ = published
    convert(folder, tmp_path / "ours", voice=voice)
    file = tmp_path / "ours/config.json"
    settings = json.loads(file.read_text())
    assert settings["generation"].pop("decoder_precision") == settings["generation"].pop("precision") == "bf16"
    settings["generation"] |= {"decoder_precision": "fp32", "precision": "fp32"}
    file.write_text(json.dumps(settings))
    converted = VocalNet.load(tmp_path / "ours")
    assert converted.config.generation == model.config.generation
    (one, sound, _), (other, same, _) = answer(model), answer(converted)
    assert one.text == other.text
    np.testing.assert_allclose(sound, same, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    config = json.loads((tmp_path / "ours/llm/config.json").read_text())
    assert config["model_type"] == "llama"
    assert "unit_vocab_size" not in config


def test_qwen_folder(tmp_path, published):
    weights, llm, *_ = made.released_weights("qwen2")
    config = made.released_config("qwen2", llm)
    folder = made.write_released(tmp_path / "VocalNet-qwen25-7B", weights, config, "qwen2", shards=1)
    loaded = VocalNet.load(folder, "fp32", published[0].parent / "CosyVoice2-0.5B", published[1])
    ids = torch.tensor([[3, 9, 30, 12]])
    hidden = loaded.backbone.prefill(loaded.backbone.embed(ids), loaded.backbone.init_state(8))
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone.logits(hidden), llm(ids).logits, atol=1e-3, rtol=1e-4)
    assert loaded.text_end_id == loaded.prompt.tokenizer.convert_tokens_to_ids("<|endoftext|>") != loaded.prompt.end_id
    assert loaded.prompt.system.startswith("You are Qwen")


def anonymous_mb():
    """Memory of this process that is not a mapped file, in MB."""
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\s+(\d+)", file.read())[1]) / 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_weights_are_never_in_memory_twice(tmp_path):
    """A speech decoder of 130 MB, watched while it loads: at its peak little more than what stays."""
    weights, llm, *_ = made.released_weights()
    config = made.released_config("llama", llm) | {"decoder_ffn_dim": 16384}
    decoder = speech_decoder_config(Settings(config, "config"))
    shapes = expected_shapes(llm.config, EncoderConfig(), adapter_config(Settings(config, "c"), made.WIDTH), decoder)
    for name, shape in shapes.items():
        if name.startswith("speech_generator."):
            weights[name] = torch.zeros(shape)
    folder = made.write_released(tmp_path, weights, config)
    size = sum(weights[name].nbytes for name in weights if name.startswith("speech_generator.")) / 1e6
    del weights
    released = Released(folder)
    libc = ctypes.CDLL(None)  # what was freed, before or while loading, must not be taken for what is loaded:
    libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD: larger blocks go back to the system at once
    libc.malloc_trim(0)
    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = released.load_decoder()
    loaded.prepare_inference("fp32")
    done.set()
    watcher.join()
    assert size > 120
    assert anonymous_mb() - before > 0.8 * size  # it is really there
    assert peak[0] - before < 1.8 * size  # a few layers more while these are packed


# ---- true sizes, on the meta device ----

GENERATOR = {
    "encoder_num_layers": 2, "decoder_num_layers": 4, "decoder_num_heads": 32, "unit_vocab_size": 6561, "mtp_num": 5,
    "special_tokens": 4, "speech_encoder_type": "whisper", "speech_projector_type": "linear",
    "speech_encoder_hidden_size": 1280, "speech_encoder_ds_rate": 5,
}  # fmt: skip
LLMS = {
    "1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Qwen25-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip
PARAMETERS = {"1B": 1_235_814_400, "8B": 8_030_261_248, "Qwen25-7B": 7_615_616_512}  # as published for the LLMs


class Names:
    """Weights that are names and shapes only."""

    def __init__(self, shapes):
        self.shapes = shapes

    def names(self):
        return set(self.shapes)

    def shape(self, name):
        return self.shapes[name]


def generator_shapes(width, ffn):
    """The recorded names of a speech generator, at another width and with the released number of layers."""
    tiny = RECORDED_SHAPES
    sizes = {made.WIDTH: width, 160: ffn, 100: 6565}
    shapes = {}
    for name, shape in tiny.items():
        scaled = tuple(sizes[size] for size in shape)
        shapes[name] = scaled
        if name.startswith("decode_layers.0."):
            shapes |= {name.replace(".0.", f".{i}.", 1): scaled for i in range(4)}
    return {f"speech_generator.{name}": shape for name, shape in shapes.items()}


RECORDED_SHAPES = {
    name: tuple(value.shape)
    for name, value in load_file(made.FIXTURES / "speech_generator/speech_generator_tiny.safetensors").items()
}


@pytest.mark.parametrize(("size", "ffn"), [("1B", 8192), ("8B", 16384), ("Qwen25-7B", 14336)])
def test_names_and_shapes_at_the_true_sizes(size, ffn):
    llm = LLMS[size]
    with torch.device("meta"):
        language = (Qwen2ForCausalLM if "Qwen" in size else LlamaForCausalLM)(llm)
        whisper = WhisperEncoder(
            WhisperConfig(
                d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
            )
        )
    assert sum(parameter.numel() for parameter in language.parameters()) == PARAMETERS[size]
    theirs = {name: tuple(value.shape) for name, value in language.state_dict().items()}
    if llm.tie_word_embeddings:
        del theirs["lm_head.weight"]
    theirs |= {f"model.speech_encoder.{name}": tuple(value.shape) for name, value in whisper.state_dict().items()}
    theirs |= {
        f"model.speech_projector.{name}": shape
        for name, shape in {
            "linear1.weight": (2048, 6400), "linear1.bias": (2048,),
            "linear2.weight": (llm.hidden_size, 2048), "linear2.bias": (llm.hidden_size,),
        }.items()
    }  # fmt: skip
    theirs |= generator_shapes(llm.hidden_size, ffn)
    settings = Settings({**GENERATOR, "llm_hidden_size": llm.hidden_size, "decoder_ffn_dim": ffn}, "config.json")
    encoder = EncoderConfig(mel_bins=128, width=1280, layers=32, heads=20, ffn=5120, full_window=True)
    parts = encoder, adapter_config(settings, llm.hidden_size), speech_decoder_config(settings)
    check_fit(Names(theirs), expected_shapes(llm, *parts), "the checkpoint")


# ---- bad input ----


@pytest.fixture
def writable(published, tmp_path):
    """A copy of the published folder that a test may break, as (folder, weights by shard, config)."""
    weights, llm, *_ = made.released_weights()
    config = made.released_config("llama", llm)

    def write(changed=None, settings=None, shards=3):
        return made.write_released(tmp_path / "broken", {**weights, **(changed or {})}, {**config, **(settings or {})})

    return write, weights, config


def message(folder, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        VocalNet.load(folder, precision="fp32", **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_wrong_shapes_are_named(writable):
    write, *_ = writable
    wrong = {f"speech_generator.mtp_layers.{i}.output_proj.weight": torch.zeros(100, 32) for i in range(5)}
    text = message(write(wrong))
    assert "speech_generator.mtp_layers.{0-4}.output_proj.weight is (100, 32), expected (100, 64)" in text


def test_missing_and_unexpected_weights_are_all_named(writable):
    write, weights, _ = writable
    del weights["model.speech_projector.linear2.bias"], weights["speech_generator.decode_layers.1.mlp.up_proj.weight"]
    folder = write({"model.layers.7.mlp.up_proj.weight": torch.zeros(3), "speech_generator.extra": torch.zeros(1)})
    text = message(folder)
    missing = "model.speech_projector.linear2.bias, speech_generator.decode_layers.1.mlp.up_proj.weight"
    assert f"missing {missing}; unexpected model.layers.7.mlp.up_proj.weight, speech_generator.extra" in text


def test_computed_and_tied_weights_may_be_there(writable):
    write, weights, _ = writable
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }
    assert Released(write(extra)).decoder.compatible


def test_a_missing_shard_is_named(writable):
    write, *_ = writable
    folder = write()
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors of the 3 shards" in message(folder)


def test_a_shard_of_another_download_is_refused(writable):
    write, *_ = writable
    folder = write()
    save_file({"x": torch.zeros(1)}, folder / "model-00002-of-00003.safetensors")
    assert "model-00002-of-00003.safetensors lacks " in message(folder)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"half of it")
    assert "cannot be read" in message(folder)


def test_config_problems_are_told(writable):
    write, _, config = writable
    unknown = message(write(settings={"speech_generator_type": "ctc"}), ConfigError)
    assert "speech_generator_type is 'ctc'" in unknown
    assert "'ar_mtp'" in unknown
    assert "speech_projector_type is 'cformer'" in message(
        write(settings={"speech_projector_type": "cformer"}), ConfigError
    )
    for key in ("mtp_num", "decoder_ffn_dim"):
        del config[key]
    assert "lacks decoder_ffn_dim, mtp_num" in message(write(), ConfigError)
    assert "special_tokens is 5" in message(
        write(settings={"mtp_num": 5, "decoder_ffn_dim": 160, "special_tokens": 5}), ConfigError
    )


class Code:
    """What a malicious pickle holds."""

    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("file", ["flow.pt", "hift.pt"])
def test_a_pickle_with_code_is_refused(file, published, tmp_path, capsys):
    vocoder = made.write_cosyvoice(tmp_path / "cosy")
    torch.save({"x": Code()}, vocoder / file)
    assert f"{file} is refused: it holds Python objects or code" in message(published[0], vocoder=vocoder)
    (vocoder / file).write_bytes(pickle.dumps(Code()))
    assert file in message(published[0], vocoder=vocoder)
    assert "this must not run" not in capsys.readouterr().out


def test_vocoder_problems_are_told(published, tmp_path):
    folder, voice, *_ = published
    vocoder = made.write_cosyvoice(tmp_path / "cosy")
    weights = torch.load(vocoder / "flow.pt", weights_only=True)
    weights["encoder_proj.bias"] = torch.zeros(7)
    del weights["spk_embed_affine_layer.bias"]
    torch.save(weights, vocoder / "flow.pt")
    text = message(folder, vocoder=vocoder, voice=voice)
    assert "missing spk_embed_affine_layer.bias" in text
    assert "encoder_proj.bias is (7,), expected (80,)" in text
    (vocoder / "cosyvoice2.yaml").unlink()  # then the sizes are CosyVoice2-0.5B's
    assert "the sizes of CosyVoice2-0.5B" in message(folder, vocoder=vocoder, voice=voice)
    (vocoder / "flow.pt").unlink()
    assert "no flow.pt" in message(folder, vocoder=vocoder, voice=voice)
    assert "no vocoder folder" in message(folder, vocoder=tmp_path / "nowhere", voice=voice)
    assert "give one" in message(folder)


def test_no_vocoder_beside_the_checkpoint(writable):
    write, *_ = writable
    assert "give the folder of CosyVoice2-0.5B" in message(write())


def test_hub_ids_need_a_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = message("VocalNet/VocalNet-1B-none", DownloadError)
    assert "the hub did not give VocalNet/VocalNet-1B-none" in text
    assert "give its folder" in text


def test_command_line_converts_and_reports(published, tmp_path, monkeypatch, capsys):
    folder, voice, *_ = published
    out = tmp_path / "ours"
    monkeypatch.setattr(sys, "argv", ["vocalnet", "convert", str(folder), "--out", str(out), "--voice", str(voice)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert (out / "voice.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", ["vocalnet", "convert", str(folder / "nothing"), "--out", str(out)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: no model")
    with pytest.raises(VocalNetError, match="no released VocalNet checkpoint"):
        convert(out, tmp_path / "again")
    assert not is_released(out)


def test_names_are_told_on_one_line():
    names = [f"a.{i}.b.{j}.weight" for i in (0, 1, 2, 5) for j in (3, 4)] + ["c.1.x", "c.2.y", "d"]
    assert compact(names) == "a.{0-2,5}.b.{3-4}.weight, c.1.x, c.2.y, d"
