"""The speech tokenizer: quantiser, determinism, locality of tokens, causality of the decoder, training."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vocalnet.config import from_dict, to_dict
from vocalnet.errors import AudioError, ConfigError, DataError
from vocalnet.speech_tokenizer import FiniteScalarQuantizer, SpeechTokenizer, TokenizerConfig
from vocalnet.training.tokenizer import LossWeights, TokenizerTask, TokenizerTaskConfig, merge_marks, read_utterances

SMALL = TokenizerConfig(levels=(8, 5, 3), whisper_width=16, width=32, hidden=32, token_blocks=1, frame_blocks=1)


def make_tokenizer() -> SpeechTokenizer:
    torch.manual_seed(0)
    tokenizer = SpeechTokenizer(SMALL).eval()
    with torch.no_grad():
        tokenizer.encoder.output.weight *= 20  # spread over the codes
    return tokenizer


@pytest.mark.parametrize("levels", [(8, 8, 8, 5), (8, 5, 5, 5), (3, 2, 7)])
def test_tokens_and_codes_are_a_bijection(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    tokens = torch.arange(int(np.prod(levels)))
    codes = quantizer.to_codes(tokens)
    assert codes.min() == -1
    assert codes.max() == 1
    assert torch.equal(quantizer.to_tokens(codes), tokens)
    assert len(torch.unique(codes, dim=0)) == len(tokens)


def test_quantiser_reaches_every_level_and_no_other() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    x = torch.linspace(-6, 6, 2001)[:, None].expand(-1, 2)
    codes = quantizer(x)
    assert len(codes[:, 0].unique()) == 8
    assert len(codes[:, 1].unique()) == 5
    assert torch.allclose(quantizer.to_codes(quantizer.to_tokens(codes)), codes, atol=1e-6)


def test_gradient_passes_straight_through() -> None:
    quantizer = FiniteScalarQuantizer((8, 5))
    x = torch.randn(7, 2, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 1 - torch.tanh(x.detach()) ** 2, atol=1e-6)


def test_encoding_is_deterministic_and_pairs_frames() -> None:
    tokenizer = make_tokenizer()
    whisper, mel = torch.randn(41, 16), torch.randn(42, 80)
    tokens = tokenizer.encode(whisper, mel)
    assert tokens.shape == (20,)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokenizer.encode(whisper, mel))
    assert len(tokens.unique()) > 5
    assert tokens.min() >= 0
    assert tokens.max() < SMALL.tokens
    assert tokenizer.decode(tokens).shape == (40, 80)


def test_tokens_see_only_their_neighbours() -> None:
    tokenizer = make_tokenizer()
    whisper, mel = torch.randn(80, 16), torch.randn(80, 80)
    changed = mel.clone()
    changed[40:42] += 50  # token 20
    differs = (tokenizer.encode(whisper, mel) != tokenizer.encode(whisper, changed)).nonzero().flatten()
    assert differs.numel()
    assert differs.min() >= 20 - tokenizer.encoder.reach
    assert differs.max() <= 20 + tokenizer.encoder.reach


def test_decoder_waits_for_three_tokens_and_no_more() -> None:
    tokenizer = make_tokenizer()
    tokens = torch.randint(0, SMALL.tokens, (30,))
    changed = tokens.clone()
    changed[20] = (changed[20] + 1) % SMALL.tokens
    moved = (tokenizer.decode(tokens) - tokenizer.decode(changed)).abs().amax(1).nonzero().flatten()
    assert moved.min() == 2 * (20 - SMALL.lookahead)
    prefix = tokenizer.decode(tokens[:15])
    settled = 2 * (15 - SMALL.lookahead)
    assert torch.allclose(prefix[:settled], tokenizer.decode(tokens)[:settled], atol=1e-4)


def test_too_short_speech_and_bad_levels_are_refused() -> None:
    with pytest.raises(AudioError, match="1 frames"):
        make_tokenizer().encode(torch.randn(1, 16), torch.randn(1, 80))
    with pytest.raises(ConfigError, match="levels"):
        TokenizerConfig(levels=(8, 1))


def test_configuration_survives_json() -> None:
    assert from_dict(TokenizerConfig, json.loads(json.dumps(to_dict(SMALL)))) == SMALL


def test_marks_join_their_phoneme() -> None:
    assert merge_marks(np.array([0, 156, 156, 69, 158, 4])).tolist() == [0, 69, 69, 69, 69, 4]


def write_features(folder: Path, split: str, count: int) -> None:
    """A shard of random features in the training format."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
        for number in range(count):
            frames = 2 * int(rng.integers(8, 20))
            arrays = {
                "whisper": rng.standard_normal((frames, 16)).astype(np.float16),
                "mel": rng.standard_normal((frames, 80)).astype(np.float16),
                "log_f0": np.full(frames, 5.3, np.float32),
                "voiced": rng.random(frames) > 0.5,
                "phoneme": rng.integers(0, 178, frames).astype(np.int16),
            }
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            entry = tarfile.TarInfo(f"{split}{number}.npz")
            entry.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(entry, buffer)


def test_task_learns_resumes_its_order_and_exports(tmp_path: Path) -> None:
    features = tmp_path / "answer_features"
    write_features(features, "train", 6)
    write_features(features, "valid", 2)
    task = TokenizerTask(TokenizerTaskConfig(model=SMALL, batch=3, crop_tokens=8), tmp_path, seed=1)
    orders = [[batch["mel"].sum().item() for batch in task.batches(0)] for _ in range(2)]
    assert orders[0] == orders[1]
    optimizer = torch.optim.Adam(task.parameter_groups())
    losses = []
    for step in range(12):
        loss, _ = task.loss(next(iter(task.batches(0))), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert task.validate()["codes_used"] > 1
    task.export(tmp_path)
    again = TokenizerTask(TokenizerTaskConfig(model=SMALL, start=tmp_path), tmp_path, seed=2)
    example = task.valid[0]
    whisper = example.whisper.float().repeat_interleave(2, dim=0)
    assert torch.equal(
        task.tokenizer.encode(whisper, example.mel.float()), again.tokenizer.encode(whisper, example.mel.float())
    )


def test_a_new_predictor_settles_before_it_draws_the_encoder(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_features(tmp_path / "answer_features", split, 3)
    weights = LossWeights(phonemes=0.0, whisper=0.0, pitch=0.0, commitment=0.0)
    config = TokenizerTaskConfig(model=SMALL, weights=weights, settle_steps=2)
    for step, settled in ((1, False), (2, True)):
        gradients = []
        for weight in (0.0, 5.0):
            task = TokenizerTask(replace(config, weights=replace(weights, predictable=weight)), tmp_path, seed=1)
            task.loss(next(task.batches(0)), step)[0].backward()
            gradients.append(task.tokenizer.encoder.output.weight.grad)
            asked = [p.grad for p in task.model["predictor"].parameters()]
            assert any(g is not None and g.abs().max() > 0 for g in asked) == (weight > 0)
        assert gradients[0].equal(gradients[1]) == (not settled)


def test_missing_features_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answer_features"):
        read_utterances(tmp_path, "train")
