"""The flow: streams, bounded caches, its loss and its training task (parity with upstream: test_reference.py)."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vocalnet.errors import CheckpointError, ConfigError, DataError, VocalNetError
from vocalnet.parts import save_part
from vocalnet.speech_tokenizer import SpeechTokenizer, TokenizerConfig
from vocalnet.training.flow import FlowTask, FlowTaskConfig, write_predicted_mels
from vocalnet.vocoder.chunks import visible_rows
from vocalnet.vocoder.flow import EstimatorConfig, Flow, FlowConfig, FlowPrompt, TokenEncoderConfig, mini_flow_config


@pytest.fixture(scope="module")
def official() -> Flow:
    """CosyVoice2's structure at small sizes, random weights."""
    torch.manual_seed(0)
    encoder = TokenEncoderConfig(width=32, heads=4, ffn=48, blocks=1)
    estimator = EstimatorConfig(width=32, heads=2, head_width=16, transformer_blocks=2, mid_stages=2)
    return Flow(FlowConfig(tokens=96, speaker_width=24, encoder=encoder, estimator=estimator, steps=2)).eval()


@pytest.fixture(scope="module")
def prompt() -> FlowPrompt:
    return FlowPrompt(torch.arange(10)[None], torch.zeros(1, 20, 80), torch.ones(1, 24))


def tiny_config(kind: str = "convnext", **changes) -> FlowConfig:
    """Mini's structure at a fraction of its size; also with a conformer, of bounded context and with convolutions."""
    config = mini_flow_config(60, (4, 5, 3))
    encoder = dataclasses.replace(config.encoder, kind=kind, width=16, heads=2, ffn=16, blocks=1, up_blocks=1)
    estimator = dataclasses.replace(config.estimator, width=16, heads=2, head_width=8, mid_stages=1)
    return dataclasses.replace(
        config, encoder=encoder, estimator=estimator, left_chunks=2, hidden_condition=4, temperature=1.0, **changes
    )


def tiny_flow(kind: str = "convnext", **changes) -> Flow:
    """A tiny flow whose estimator does something (its last layer starts at zero)."""
    flow = Flow(tiny_config(kind, **changes)).eval()
    torch.nn.init.normal_(flow.decoder.estimator.final_proj.weight)
    return flow


def stream(flow: Flow, tokens: torch.Tensor, sizes: list[int], **options) -> torch.Tensor:
    state, mels, first = flow.init_state(tokens.shape[1] + 20, **options), [], 0
    for size in sizes:
        mel, state = flow.step(tokens[:, first : first + size], state, final=first + size >= tokens.shape[1])
        first += size
        mels.append(mel)
    assert first >= tokens.shape[1]
    return torch.cat(mels, dim=1)


def test_fixed_noise_is_upstreams(official, prompt):
    """Upstream draws 300 s of noise after seeding with 0; the recording holds its beginning."""
    recorded = load_file(Path(__file__).parent / "fixtures/cosyvoice2/cosyvoice2_io.safetensors")["noise"]
    tokens = torch.arange(60)[None]
    with_ours = official.mel(tokens, prompt=prompt)
    torch.testing.assert_close(with_ours, official.mel(tokens, prompt=prompt, noise=recorded.transpose(1, 2)))


@pytest.mark.parametrize("sizes", [[60], [18, 25, 17], [7] * 9])
def test_official_stream_equals_offline(official, prompt, sizes):
    tokens = torch.randint(96, (1, 60))
    mel = stream(official, tokens, sizes, prompt=prompt)
    torch.testing.assert_close(mel, official.mel(tokens, prompt=prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (5, 6), (7, 1), (8, 15), (52, 6), (53, 15), (97, 44)])
@pytest.mark.parametrize("kind", ["convnext", "conformer"])
def test_mini_stream_equals_offline(kind, length, size):
    flow = tiny_flow(kind)
    tokens = torch.randint(60, (1, length))
    sizes = [size] * (-(-length // size))
    torch.testing.assert_close(stream(flow, tokens, sizes), flow.mel(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["convnext", "conformer"])
def test_growing_prefix_leaves_frames_unchanged(kind):
    flow = tiny_flow(kind)
    tokens = torch.randint(60, (1, 40))
    whole = flow.mel(tokens)
    for count in (13, 23, 38):
        part = flow.mel(tokens[:, :count], final=False)
        full_chunks = (count - 3) // 5 * 10
        torch.testing.assert_close(part[:, :full_chunks], whole[:, :full_chunks], atol=1e-4, rtol=0)


def test_frames_come_as_soon_as_the_lookahead_is_there():
    flow = tiny_flow()
    state = flow.init_state()
    counts = [flow.step(torch.zeros(1, 1, dtype=torch.long), state)[0].shape[1] for _ in range(14)]
    assert [place for place, count in enumerate(counts, start=1) if count] == [8, 13]
    assert sum(counts) == 20


def test_caches_do_not_grow():
    flow = tiny_flow()
    state = flow.init_state()

    def cached() -> int:
        return sum(ring.keys.numel() for step in state.estimator for stage in step.stages for ring in stage.rings)

    before = cached()
    for _ in range(40):
        flow.step(torch.randint(60, (1, 5)), state)
    assert cached() == before
    assert state.pending.shape[1] < 8


@pytest.mark.parametrize("kind", ["convnext", "conformer"])
def test_padded_batch_equals_single_utterances(kind):
    flow = tiny_flow(kind)
    tokens, lengths = torch.randint(60, (2, 31)), torch.tensor([31, 12])
    batch = flow.mel(tokens, lengths=lengths)
    torch.testing.assert_close(batch[:1], flow.mel(tokens[:1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch[1:, :24], flow.mel(tokens[1:, :12]), atol=1e-4, rtol=0)


def test_left_chunks_bound_what_is_seen():
    rows = torch.arange(8)
    visible = visible_rows(rows, rows, chunk=2, left_chunks=2)
    assert visible[7].tolist() == [False, False, True, True, True, True, True, True]
    assert visible[2].tolist() == [True, True, True, True, False, False, False, False]


def test_bfloat16_stream():
    flow = tiny_flow().to(torch.bfloat16)
    mel = stream(flow, torch.randint(60, (1, 12)), [12])
    assert mel.shape == (1, 24, 80)
    assert mel.isfinite().all()


def test_stream_refuses_more_than_it_can_hold(official, prompt):
    state = official.init_state(max_tokens=50, prompt=prompt)
    with pytest.raises(VocalNetError, match="max_tokens"):
        official.step(torch.zeros(1, 90, dtype=torch.long), state)


def test_ended_stream_refuses_tokens():
    flow = tiny_flow()
    _, state = flow.step(torch.zeros(1, 3, dtype=torch.long), flow.init_state(), final=True)
    with pytest.raises(VocalNetError, match="ended"):
        flow.step(torch.zeros(1, 3, dtype=torch.long), state)


def test_speaker_is_required(official):
    with pytest.raises(VocalNetError, match="FlowPrompt"):
        official.mel(torch.zeros(1, 5, dtype=torch.long))


def test_levels_must_fit_tokens():
    with pytest.raises(ConfigError, match="not 100"):
        FlowConfig(tokens=100, token_levels=(8, 8))


@pytest.mark.parametrize("streaming", [True, False])
def test_loss_ignores_padding(streaming):
    flow = tiny_flow()
    tokens, mel = torch.randint(60, (2, 10)), torch.randn(2, 20, 80)
    lengths = torch.tensor([10, 4])
    losses = []
    for filler in (0.0, 50.0):
        mel[1, 8:] = filler
        torch.manual_seed(1)
        losses.append(flow.cfm_loss(tokens, mel, lengths, streaming=streaming)[0])
    torch.testing.assert_close(losses[0], losses[1])


def test_official_loss_trains_every_parameter(official):
    flow = Flow(official.config)
    loss, _ = flow.cfm_loss(torch.randint(96, (4, 12)), torch.randn(4, 24, 80), speaker=torch.randn(4, 24))
    loss.backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_loss_falls():
    flow = tiny_flow()
    tokens = torch.randint(60, (4, 15))
    mel = torch.randn(60, 160)[tokens].view(4, 30, 80)  # a mel that follows from the token
    optimizer = torch.optim.AdamW(flow.parameters(), 2e-2)
    history = []
    for _ in range(15):
        loss, metrics = flow.cfm_loss(tokens, mel)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(metrics["prior"]))
    assert history[-1] < 0.9 * history[0]


def test_save_and_load(tmp_path):
    flow = tiny_flow()
    flow.save(tmp_path)
    tokens = torch.randint(60, (1, 9))
    torch.testing.assert_close(Flow.from_folder(tmp_path).mel(tokens), flow.mel(tokens))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Flow.from_folder(tmp_path / "nowhere")


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def packed(**arrays: np.ndarray) -> bytes:
    stream_ = io.BytesIO()
    np.savez(stream_, **arrays)
    return stream_.getvalue()


def single(array: np.ndarray) -> bytes:
    stream_ = io.BytesIO()
    np.save(stream_, array)
    return stream_.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared data of five and two sentences; the mels are one row longer than the tokens cover."""
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("valid", 2)):
        tokens = {f"{split}{i}": random.integers(0, 60, 8 + 9 * i).astype(np.int16) for i in range(count)}
        mels = {name: random.normal(-5, 2, (2 * len(row) + 1, 80)).astype(np.float16) for name, row in tokens.items()}
        write_archive(
            tmp_path / "answer_tokens" / f"{split}-00000.tar",
            {f"{name}.npy": single(row) for name, row in tokens.items()},
        )
        write_archive(
            tmp_path / "answer_features" / f"{split}-00000.tar",
            {f"{name}.npz": packed(mel=mel) for name, mel in mels.items()},
        )
    return tmp_path


def test_task_batches_are_deterministic_and_complete(data):
    config = FlowTaskConfig(flow=tiny_config(), batch_tokens=60, max_utterance_tokens=30)
    task = FlowTask(config, data, seed=1)
    first, again, other = list(task.batches(0)), list(task.batches(0)), list(task.batches(1))
    assert sum(len(batch["lengths"]) for batch in first) == 5
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))
    assert any(a["tokens"].tolist() != b["tokens"].tolist() for a, b in zip(first, other, strict=False))
    assert max(batch["tokens"].shape[1] for batch in first) <= 30
    assert all(batch["mel"].shape[1] == 2 * batch["tokens"].shape[1] for batch in first)


def test_task_trains_validates_and_exports(data, tmp_path):
    task = FlowTask(FlowTaskConfig(flow=tiny_config()), data, seed=1)
    assert task.model.mel_mean.mean() == pytest.approx(-5, abs=0.5)
    parameters = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    assert len(parameters) == len(list(task.model.parameters()))
    loss, metrics = task.loss(next(iter(task.batches(0))), step=0)
    loss.backward()
    assert set(metrics) == {"flow", "prior"}
    with torch.no_grad():
        assert set(task.validate()) == {"mel_l1", "estimate_l1", "flow", "prior"}
    task.export(tmp_path)
    target = write_predicted_mels(Flow.from_folder(tmp_path), data, "valid")
    with tarfile.open(target) as tar:
        shapes = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())).shape for member in tar}
    assert shapes == {"valid0.npy": (16, 80), "valid1.npy": (34, 80)}


def test_the_encoder_trains_alone_on_its_share_of_the_loss(data, tmp_path):
    with pytest.raises(ConfigError, match="initial is not set"):
        FlowTaskConfig(flow=tiny_config(), train="encoder")
    start = FlowTask(FlowTaskConfig(flow=tiny_config()), data, seed=1)
    start.export(tmp_path)
    config = FlowTaskConfig(flow=start.model.config, train="encoder", lr=3e-3, initial=tmp_path)
    task = FlowTask(config, data, seed=1)
    batch = next(iter(task.batches(0)))
    arguments = (batch["tokens"], batch["mel"], batch["lengths"])
    _, whole = task.model.cfm_loss(*arguments)
    loss, metrics = task.loss(batch, 0)
    assert metrics.keys() == {"prior"}
    assert metrics["prior"].item() == pytest.approx(whole["prior"].item(), rel=1e-6)
    assert loss.item() == pytest.approx(task.config.flow.prior_weight * metrics["prior"].item(), rel=1e-6)
    trained = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    assert not {id(p) for p in task.model.decoder.parameters()} & {id(p) for p in trained}
    loss.backward()
    assert all(parameter.grad is not None for parameter in trained), "all that trains is taught"


def test_encoder_starts_from_the_tokenizers_decoder(data, tmp_path):
    sizes = TokenizerConfig(levels=(4, 5, 3), width=16, hidden=16, token_blocks=1, frame_blocks=1)
    tokenizer = SpeechTokenizer(sizes).eval()
    save_part(tokenizer, sizes, tmp_path / "tokenizer")
    config = FlowTaskConfig(flow=tiny_config(), tokenizer=tmp_path / "tokenizer", lr=2e-3, encoder_lr=1e-4)
    task = FlowTask(config, data, seed=1)
    tokens = torch.randint(60, (1, 12))
    torch.testing.assert_close(task.model.estimate(tokens)[0], tokenizer.decode(tokens[0]), atol=1e-4, rtol=0)
    assert sorted({group["lr"] for group in task.parameter_groups()}) == [1e-4, 2e-3]
    task.model.save(tmp_path / "flow")
    other = SpeechTokenizer(sizes).eval()
    save_part(other, sizes, tmp_path / "other")
    anew = FlowTask(
        dataclasses.replace(config, tokenizer=tmp_path / "other", initial=tmp_path / "flow"), data, seed=2
    ).model
    torch.testing.assert_close(anew.estimate(tokens)[0], other.decode(tokens[0]), atol=1e-4, rtol=0)
    estimator = task.model.decoder.state_dict()
    assert all(value.equal(estimator[name]) for name, value in anew.decoder.state_dict().items())
    with pytest.raises(ConfigError, match="kind convnext"):
        FlowTask(dataclasses.replace(config, flow=tiny_config("conformer")), data, seed=1)


def test_task_says_what_is_missing(data, tmp_path):
    with pytest.raises(DataError, match=r"train-\*\.tar"):
        FlowTask(FlowTaskConfig(flow=tiny_config()), tmp_path / "empty", seed=1)
    few = dataclasses.replace(tiny_config(), tokens=10, token_levels=())
    with pytest.raises(ConfigError, match=r"options\.flow\.tokens is 10"):
        FlowTask(FlowTaskConfig(flow=few), data, seed=1)
