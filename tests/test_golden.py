"""A real stage at a tiny size: the losses of its first steps are those measured when it was written."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml

from vocalnet.training import engine

TOKENS = 30


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def packed(save, *arrays, **named) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """Sentences whose mel is a fixed pattern per token plus noise, in the prepared data's layout."""
    random = np.random.default_rng(0)
    patterns = random.normal(-5, 2, (TOKENS, 80))
    for folder in ("answer_tokens", "answer_features"):
        (tmp_path / folder).mkdir()
    for split, sentences in (("train", 12), ("valid", 2)):
        with (
            tarfile.open(tmp_path / f"answer_tokens/{split}-00000.tar", "w") as tokens_tar,
            tarfile.open(tmp_path / f"answer_features/{split}-00000.tar", "w") as features_tar,
        ):
            for i in range(sentences):
                tokens = random.integers(0, TOKENS, random.integers(10, 30)).astype(np.int16)
                mel = np.repeat(patterns[tokens], 2, axis=0) + random.normal(0, 0.3, (2 * len(tokens), 80))
                add(tokens_tar, f"{split}{i}.npy", packed(np.save, tokens))
                add(features_tar, f"{split}{i}.npz", packed(np.savez, mel=mel.astype(np.float16)))
    return tmp_path


FLOW = {
    "tokens": TOKENS,
    "chunk_tokens": 5,
    "left_chunks": 4,
    "encoder": {
        "width": 32,
        "heads": 2,
        "ffn": 64,
        "blocks": 1,
        "up_blocks": 1,
        "conv_kernel": 3,
        "scale_input": False,
    },
    "estimator": {
        "width": 32,
        "heads": 2,
        "head_width": 16,
        "transformer_blocks": 1,
        "mid_stages": 1,
        "activation": "silu",
    },
    "speaker_width": 0,
    "prompt": False,
    "normalise_mel": True,
    "guidance": 0.0,
    "guidance_drop": 0.0,
    "prior_weight": 1.0,
    "official_noise": False,
    "steps": 2,
}
GOLDEN = [2.9446, 2.8578, 2.8047]
"""Mean losses of steps 1–5, 6–10 and 11–15, torch 2.13 CPU; other processors round differently, hence the tolerance."""


def test_flow_losses(data, tmp_path):
    torch.set_num_threads(1)
    trainer = {"max_steps": 15, "warmup_steps": 3, "precision": "fp32", "log_every": 5}
    recipe = {"task": "flow", "data": str(data), "output": str(tmp_path / "out"), "seed": 1, "trainer": trainer}
    path = tmp_path / "flow.yaml"
    path.write_text(yaml.safe_dump({**recipe, "options": {"flow": FLOW, "batch_tokens": 60, "lr": 3e-3}}))
    assert engine.train(path)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["group"] == "train"] == pytest.approx(GOLDEN, rel=1e-2)
    validation = json.loads((tmp_path / "out/result.json").read_text())["validation"]
    assert set(validation) == {"mel_l1", "estimate_l1", "flow", "prior"}
    assert {"model.safetensors", "config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
