"""Answers in a decoder's own words, to train its drafts on what it will really say (self-distillation, FastMTP)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vocalnet.batch import generate_batch
from vocalnet.files import replacing
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder

ANSWERS_PER_FILE = 512
ANSWERS_PER_BATCH = 32
LONGEST = 1.5
"""An answer may become this many times as long as the recorded one before it is cut."""


def own_answers(
    decoder: SpeechDecoder,
    text: Callable[[int], Tensor],
    lengths: Sequence[int],
    folder: Path,
    content: str,
    temperature: float,
    seed: int,
) -> list[Tensor]:
    """What the decoder says by itself, token by token, for each of many texts.

    Made in batches and kept on disk in files of `ANSWERS_PER_FILE`, each written atomically, so that an interrupted
    run goes on where it stopped.

    Args:
        text: index → (T, input_size) rows.
        lengths: tokens of the recorded answers.
        folder: gets one folder for each decoder, temperature, seed and content.
        content: identifies the texts.
        temperature: 0 is greedy.

    Returns:
        Per text (S,) int64, without EOS.
    """
    key = hashlib.sha256(json.dumps([content, temperature, seed, len(lengths)]).encode())
    for name, weight in decoder.state_dict().items():
        if not name.startswith("mtp_layers."):
            key.update(weight.float().cpu().numpy().tobytes())
    folder = folder / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    answers: list[Tensor] = []
    starts = range(0, len(lengths), ANSWERS_PER_FILE)
    for start in tqdm(starts, desc="answers in the decoder's own words", unit="file"):
        file = folder / f"{start // ANSWERS_PER_FILE:05d}.safetensors"
        if not file.is_file():
            chosen = range(start, min(start + ANSWERS_PER_FILE, len(lengths)))
            made = _generate(decoder, text, chosen, lengths, temperature, seed + start)
            sizes = torch.tensor([len(row) for row in made], dtype=torch.int32)
            tokens = torch.tensor([token for row in made for token in row], dtype=torch.int32)
            with replacing(file) as temporary:
                save_file({"tokens": tokens, "lengths": sizes}, temporary)
        part = load_file(file)
        answers += part["tokens"].long().split(part["lengths"].tolist())
    return answers


def _generate(
    decoder: SpeechDecoder,
    text: Callable[[int], Tensor],
    chosen: Sequence[int],
    lengths: Sequence[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """The answers to the chosen texts, those of about equal length together."""
    device = decoder.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    order = sorted(chosen, key=lambda i: lengths[i])
    made: dict[int, list[int]] = {}
    for first in range(0, len(order), ANSWERS_PER_BATCH):
        group = order[first : first + ANSWERS_PER_BATCH]
        limits = [int(LONGEST * lengths[i]) + 1 for i in group]
        texts = [text(i).to(device) for i in group]
        sampling = SamplingConfig(temperature=temperature)
        rows = generate_batch(decoder, texts, sampling, limits, modules=0, generator=generator)
        made |= dict(zip(group, rows, strict=True))
    return [made[i] for i in chosen]
