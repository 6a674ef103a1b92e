"""The adapter's two forms, and its CTC head."""

import pytest
import torch

from vocalnet.adapter import AdapterConfig, SpeechAdapter
from vocalnet.errors import ConfigError, DataError

TOKENS = range(100, 120)


@pytest.fixture(params=[0, 1])
def adapter(request):
    """A small collapsed adapter over 20 tokens, with a CTC head decided enough to emit some of them."""
    config = AdapterConfig(encoder_width=16, context=request.param, hidden=32, width=24, vocabulary=20, dropout=0.0)
    module = SpeechAdapter(config).eval()
    module.set_vocabulary(TOKENS)
    module.attach(torch.randn(200, 24) * 0.13)
    with torch.no_grad():
        module.ctc_scale.fill_(5.0)
    return module


def test_five_frames_become_one_position(adapter):
    hidden, lengths = adapter(torch.randn(2, 53, 16), torch.tensor([53, 20]))
    assert hidden.shape == (2, 11, 24)
    assert lengths.tolist() == [11, 4]


def test_output_lies_at_the_embeddings_scale(adapter):
    hidden, _ = adapter(torch.randn(1, 50, 16) * 30)
    assert torch.allclose(hidden.square().mean(-1).sqrt(), torch.tensor(0.136), atol=1e-3)


def test_a_batch_equals_its_samples(adapter):
    frames, lengths = torch.randn(4, 203, 16), torch.tensor([203, 100, 57, 10])
    together = adapter.embeddings(frames, lengths)
    for row, sample, length in zip(together, frames, lengths.tolist(), strict=True):
        assert torch.allclose(row, adapter.embeddings(sample[None, :length])[0], atol=1e-5)


def test_a_longer_recording_leaves_earlier_positions_unchanged(adapter):
    frames = torch.randn(1, 100, 16)
    known = 10 - adapter.config.context  # the last of a part still waits for its neighbours
    assert torch.allclose(adapter(frames[:, :50])[0][:, :known], adapter(frames)[0][:, :known], atol=1e-6)


def positions(adapter, classes):
    """Hidden positions that CTC reads as these classes (0: blank, i: token i − 1), (1, T, width)."""
    table = torch.cat([adapter.blank[None], adapter.table])
    return table[torch.tensor(classes)][None].detach()


def test_collapse_drops_blanks_and_merges_repeats(adapter):
    hidden = positions(adapter, [0, 3, 3, 0, 3, 7, 0, 0, 1])
    lengths = torch.tensor([9])
    assert adapter.transcribe(hidden, lengths) == [[102, 102, 106, 100]]
    with torch.no_grad():
        adapter.ctc_scale.fill_(50.0)  # certain: the expected embedding is the token's own
    (rows,) = adapter.collapse(hidden, lengths)
    assert torch.allclose(rows, adapter.table[[2, 2, 6, 0]], atol=1e-4)
    assert adapter.transcribe(hidden, torch.tensor([5])) == [[102, 102]]


def test_collapse_of_blanks_alone_is_empty(adapter):
    (rows,) = adapter.collapse(positions(adapter, [0, 0, 0]), torch.tensor([3]))
    assert rows.shape == (0, 24)


def test_collapse_passes_gradients(adapter):
    frames = torch.randn(2, 60, 16)
    sum(row.sum() for row in adapter.embeddings(frames)).backward()
    assert adapter.linear1.weight.grad.abs().sum() > 0


def test_ctc_learns_to_spell(adapter):
    frames, lengths = torch.randn(3, 60, 16), torch.tensor([60, 60, 40])
    targets = [[100, 105, 105], [119], [103, 104, 103, 111]]
    optimizer = torch.optim.Adam(adapter.parameters(), 3e-3)
    for _ in range(120):
        hidden, positions_ = adapter(frames, lengths)
        loss = adapter.ctc_loss(hidden, positions_, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert adapter.transcribe(*adapter(frames, lengths)) == targets


def test_unknown_tokens_are_refused(adapter):
    with pytest.raises(DataError, match=r"\[7, 300\]"):
        adapter.classes_of([100, 300, 7])


def test_the_table_stays_out_of_the_checkpoint(adapter):
    state = adapter.state_dict()
    assert "table" not in state
    copy = SpeechAdapter(adapter.config).eval()
    copy.load_state_dict(state)
    assert copy.vocabulary.tolist() == list(TOKENS)


def test_released_form_is_two_bare_layers():
    config = AdapterConfig(
        encoder_width=16, hidden=32, width=24, mode="frames", activation="relu", input_norm=False, output_norm=False
    )
    adapter = SpeechAdapter(config).eval()
    assert {name.split(".")[0] for name in adapter.state_dict()} == {"linear1", "linear2"}
    frames = torch.randn(1, 50, 16)
    first, second = adapter.linear1, adapter.linear2
    expected = second(torch.relu(first(frames.reshape(10, 80))))
    assert torch.allclose(adapter.embeddings(frames)[0], expected, atol=1e-6)


def test_contradicting_settings_are_refused(adapter):
    with pytest.raises(ConfigError, match="vocabulary 0"):
        SpeechAdapter(AdapterConfig(mode="collapsed"))
    with pytest.raises(ConfigError, match="2 distinct token ids"):
        adapter.set_vocabulary([1, 2, 2])
    with pytest.raises(ConfigError, match="width 10"):
        adapter.attach(torch.zeros(200, 10))
