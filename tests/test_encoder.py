"""The encoder equals Hugging Face's Whisper, at any length."""

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from vocalnet.encoder import EncoderConfig, SpeechEncoder
from vocalnet.errors import AudioError, CheckpointError


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny random Whisper and its folder."""
    config = WhisperConfig(
        vocab_size=50, num_mel_bins=80, d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, max_source_positions=1500,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    return model, folder


def test_thirty_seconds_equal_whisper(whisper):
    model, folder = whisper
    mel = torch.randn(2, 80, 3000)
    with torch.no_grad():
        theirs = model.model.encoder(mel).last_hidden_state
        own = SpeechEncoder.from_whisper(folder)(mel)
    assert torch.allclose(own, theirs, atol=1e-5)


@pytest.mark.parametrize("frames", [2, 170, 1000])
def test_any_length_works(whisper, frames):
    encoder = SpeechEncoder.from_whisper(whisper[1])
    assert encoder(torch.randn(1, 80, frames)).shape == (1, frames // 2, 32)


def test_a_batch_equals_its_samples(whisper):
    encoder = SpeechEncoder.from_whisper(whisper[1])
    mel = torch.randn(3, 80, 200)
    assert torch.allclose(encoder(mel)[1], encoder(mel[1:2])[0], atol=1e-5)


def test_bf16_is_close(whisper):
    mel = torch.randn(1, 80, 200)
    exact = SpeechEncoder.from_whisper(whisper[1])(mel)
    rough = SpeechEncoder.from_whisper(whisper[1], torch.bfloat16)(mel)
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.999


def test_questions_get_their_silence(whisper):
    encoder = SpeechEncoder.from_whisper(whisper[1])
    features = encoder.encode_question(torch.randn(16_000))
    assert features.shape == (80, 32)  # 1.6 s at 50 Hz
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_large_sizes_come_from_the_configuration():
    large = EncoderConfig(mel_bins=128, width=64, layers=1, heads=4, ffn=128)
    assert SpeechEncoder(large)(torch.randn(1, 128, 100)).shape == (1, 50, 64)


def test_over_thirty_seconds_is_refused(whisper):
    with pytest.raises(AudioError, match="3002 mel frames"):
        SpeechEncoder.from_whisper(whisper[1])(torch.randn(1, 80, 3002))


def test_folders_that_are_no_whisper_are_refused(whisper, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        SpeechEncoder.from_whisper(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((whisper[1] / name).read_bytes())
    (tmp_path / "config.json").write_text('{"num_mel_bins": 80}')
    with pytest.raises(CheckpointError, match="lacks d_model"):
        SpeechEncoder.from_whisper(tmp_path)
