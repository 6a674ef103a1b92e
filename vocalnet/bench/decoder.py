"""`vocalnet bench decoder`: the speech decoder alone, streaming, for every kind of head, K, precision, width and batch.

Each case is a stream with random weights and no end: 5 text rows, 15 speech tokens, 5 text rows, …. All cases of one
layout and head take turns within each round, so that ratios compare what ran side by side. A case is held against

* its *floor*: the bytes of weights that its products read, at the speed of one large read on this machine;
* its *linear layers*: the same products with the same rows, one after the other, and nothing in between;
* its *plain linear layers*: those products by `torch.nn.functional.linear` on weights as PyTorch stores them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from vocalnet.batch import Lockstep
from vocalnet.bench.report import machine
from vocalnet.config import from_dict
from vocalnet.decoding import generate_chunk
from vocalnet.errors import ConfigError
from vocalnet.layers import KVCache, LlamaLayer
from vocalnet.linears import DenseLinear, HalfLinear, Int8Linear, PackedLinear, Precision, int8_available
from vocalnet.model import MINI
from vocalnet.mtp import MTP_HEADS, check_kind
from vocalnet.native import NativeLayer, NativeLinear
from vocalnet.native.layer import AttentionStruct
from vocalnet.parts import CONFIG_FILE, read_json
from vocalnet.sampling import SamplingConfig
from vocalnet.speech_decoder import SpeechDecoder
from vocalnet.speech_decoder_config import SpeechDecoderConfig

PERIOD = 4
"""Chunks after which steps and chunks meet again: 60 tokens are whole steps for every K up to 5."""
LARGE_READ = 256_000_000
"""Bytes read to measure the memory's speed: more than any cache holds."""
PLAIN_LIMIT = 1_000_000_000
"""Plain linear layers are measured up to this many bytes of weights, which have to be held twice for it."""


def layout(name: str) -> SpeechDecoderConfig:
    """The decoder's configuration by name: `mini`, `576` (the reference's measured layout) or `1b` (VocalNet-1B).

    Raises:
        ConfigError: unknown name.
    """
    if name == "mini":
        file = MINI / "speech_decoder" / CONFIG_FILE
        return from_dict(SpeechDecoderConfig, read_json(file), str(file))
    if name == "576":
        return SpeechDecoderConfig(llm_hidden_size=576, width=576, heads=9, ffn=1536, units=6561)
    if name == "1b":
        return SpeechDecoderConfig(llm_hidden_size=2048, width=2048, heads=32, ffn=8192, units=6561)
    raise ConfigError(f"layout is '{name}'; allowed: mini, 576, 1b")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every combination of the lists; chunks per stream and rounds."""

    layouts: tuple[str, ...] = ("576",)
    heads: tuple[str, ...] = ("sequential",)
    drafts: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    chunks: int = 41
    repeats: int = 3
    device: str = ""

    def __post_init__(self) -> None:
        for name in self.layouts:
            layout(name)
        for kind in self.heads:
            check_kind(kind)
        checks = {
            "drafts": (min(self.drafts, default=-1), 0),
            "batches": (min(self.batches, default=0), 1),
            "chunks": (self.chunks, PERIOD + 1),
            "repeats": (self.repeats, 1),
        }
        for name, (value, least) in checks.items():
            if value < least:
                raise ConfigError(f"{name} of the benchmark is {value}; allowed: {least} or more")
        if self.device not in ("", "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ConfigError(f"device is '{self.device}'; allowed here: cpu{', cuda' * torch.cuda.is_available()}")
        for precision in self.precisions:
            if precision not in self._offered:
                raise ConfigError(f"precision is '{precision}'; allowed on {self.place}: {', '.join(self._offered)}")

    @property
    def place(self) -> str:
        """The device to run on."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _offered(self) -> list[str]:
        usable = self.place == "cpu" and int8_available()
        return [name for name in ("fp32", "bf16", "int8") if name in get_args(Precision) and (name != "int8" or usable)]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The precisions to measure."""
        return self.precisions or tuple(self._offered)


@dataclass
class Case:
    """One stream to measure, and what was measured so far."""

    layout: str
    head: str
    drafts: int
    precision: str
    batch: int
    captured: bool
    decoder: SpeechDecoder
    times: list[list[float]] = field(default_factory=list)
    """Per round the seconds of each chunk."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of each chunk, all answers together."""
    linears: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    """Per round the seconds of the (plain) linear layers of a chunk, averaged over a period."""
    work: Work | None = None


@dataclass
class Work:
    """What one period of chunks asked of the weights."""

    products: list[tuple[PackedLinear, Tensor]] = field(default_factory=list)
    """Every product in order, with its input."""
    layer_calls: int = 0

    @property
    def read_bytes(self) -> int:
        """Bytes of weights read."""
        return sum(linear.weight_bytes for linear, _ in self.products)


@contextmanager
def recorded(work: Work) -> Iterator[None]:
    """Notes every product and layer call in `work`."""

    def noting(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(self: PackedLinear, x: Tensor) -> Tensor:
            work.products.append((self, x))
            return product(self, x)

        return call

    finish, whole = LlamaLayer._finish, NativeLayer.__call__

    def counted(self: LlamaLayer, x: Tensor, attended: Tensor) -> Tensor:
        work.layer_calls += 1
        return finish(self, x, attended)

    def opened(
        self: NativeLayer,
        x: Tensor,
        told: AttentionStruct,
        caches: Sequence[KVCache],
        after: tuple[NativeLayer, ...] = (),
    ) -> Tensor:
        inputs = ((part, x.new_ones(*x.shape[:-1], part.shape[1])) for layer in (self, *after) for part in layer.parts)
        work.products += inputs
        work.layer_calls += 1 + len(after)
        return whole(self, x, told, caches, after)

    with (
        patch.object(DenseLinear, "__call__", noting(DenseLinear.__call__)),
        patch.object(HalfLinear, "__call__", noting(HalfLinear.__call__)),
        patch.object(Int8Linear, "__call__", noting(Int8Linear.__call__)),
        patch.object(NativeLinear, "__call__", noting(NativeLinear.__call__)),
        patch.object(NativeLayer, "__call__", opened),
        patch.object(LlamaLayer, "_finish", counted),
    ):
        yield


def stream(case: Case, chunks: int) -> Iterator[int]:
    """Speaks `chunks` chunks; yields the number of tokens after each. One answer alone goes the way of a session."""
    decoder, config = case.decoder, case.decoder.config
    device = decoder.embedding.weight.device
    size = config.text_chunk
    max_text, max_speech = size * chunks + 1, (config.speech_chunk + 1) * (chunks + 1)
    text = torch.randn(case.batch, size, config.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    if case.batch == 1 and not case.captured:
        state = decoder.init_state(max_text, max_speech, case.drafts)
        for _ in range(chunks):
            decoder.add_text(text[0], state)
            yield len(generate_chunk(decoder, state, SamplingConfig(), config.speech_chunk))
        return
    lockstep = Lockstep(decoder, case.batch, case.drafts, max_text, max_speech, capture=case.captured)
    for _ in range(chunks):
        lockstep.add_text(text)
        yield sum(len(tokens) for tokens in lockstep.generate(config.speech_chunk))


@torch.inference_mode()
def run_round(case: Case, chunks: int) -> None:
    """One stream of a case, and its linear layers alone."""
    times, tokens = [], []
    since = time.perf_counter()
    for count in stream(case, chunks):
        now = time.perf_counter()
        times.append(now - since)
        tokens.append(count)
        since = now
    case.times.append(times)
    case.tokens = tokens
    if case.work is None:
        case.work = observed(case)
    products = case.work.products
    case.linears.append(seconds_per_chunk(case, [(linear.product, x) for linear, x in products]))
    if case.precision != "int8" and case.decoder.embedding.weight.device.type == "cpu":
        held = sum(linear.weight_bytes for linear in {id(linear): linear for linear, _ in products}.values())
        if held <= PLAIN_LIMIT:
            case.plain.append(seconds_per_chunk(case, plain(products)))


def observed(case: Case) -> Work:
    """The work of one period of chunks, the first chunk left out. Captured steps do what uncaptured ones do."""
    work = Work()
    chunks = stream(replace(case, captured=False), PERIOD + 1)
    next(chunks)
    with recorded(work):
        for _ in chunks:
            pass
    return work


def plain(products: list[tuple[PackedLinear, Tensor]]) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The same products on row-major weights."""
    weights: dict[int, Tensor] = {}
    calls: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for linear, x in products:
        assert not isinstance(linear, Int8Linear)
        weight = weights.setdefault(id(linear), torch.full(linear.shape, 0.01, dtype=x.dtype))
        calls.append((lambda y, weight=weight: F.linear(y, weight), x))  # type: ignore[misc]
    return calls


def seconds_per_chunk(case: Case, calls: list[tuple[Callable[[Tensor], Tensor], Tensor]]) -> float:
    """Time of products one after the other, made in a period, as a chunk's share."""
    on_cuda = case.decoder.embedding.weight.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    since = time.perf_counter()
    for product, x in calls:
        product(x)
    if on_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - since) / PERIOD


def make_decoder(config: SpeechDecoderConfig, head: str, drafts: int, precision: str, device: str) -> SpeechDecoder:
    """A decoder with random weights, ready to stream."""
    torch.manual_seed(0)
    decoder = SpeechDecoder(replace(config, mtp_head=head, mtp_modules=drafts, compatible=False)).to(device)
    assert precision in get_args(Precision)
    decoder.prepare_inference(precision)  # type: ignore[arg-type]
    return decoder


def cases_of(config: BenchConfig, name: str, head: str) -> list[Case]:
    """All cases of a layout and a head, next-token prediction (K = 0) first: the others are compared with it."""
    drafts = sorted({count for count in config.drafts if count > 0})
    captured = (False, True) if config.place == "cuda" else (False,)
    cases = []
    for precision in config.wanted:
        decoders = {0: make_decoder(layout(name), "sequential", 0, precision, config.place)}
        if drafts and MTP_HEADS[head](decoders[0].config.layer, 1, 1).group == 1:
            largest = make_decoder(layout(name), head, drafts[-1], precision, config.place)
            decoders |= dict.fromkeys(drafts, largest)
        for count in drafts:  # a group head makes as many drafts as it has weights for
            if count not in decoders:
                decoders[count] = make_decoder(layout(name), head, count, precision, config.place)
        cases += [
            Case(name, head if count else "none", count, precision, batch, graph, decoder)
            for count, decoder in decoders.items()
            for batch in config.batches
            for graph in captured
        ]
    return cases


def run_decoder_bench(config: BenchConfig, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs all measurements; `progress` is told what is done."""
    speed = read_speed(config.place)
    rows: list[dict[str, Any]] = []
    for name in config.layouts:
        for head in config.heads if any(config.drafts) else config.heads[:1]:
            cases = cases_of(config, name, head)
            for case in cases:  # warms up, and captures
                for _ in stream(case, PERIOD + 1):
                    pass
            for number in range(config.repeats):
                progress(f"{name} {head}: round {number + 1} of {config.repeats}, {len(cases)} cases")
                for case in cases:
                    run_round(case, config.chunks)
            found = [measured(case, cases, speed) for case in cases]
            rows += [row for row in found if row["drafts"] or not any(same(row, known) for known in rows)]
    settings = {**asdict(config), "device": config.place, "precisions": config.wanted}
    return {"machine": machine(), "settings": settings, "read_gb_per_s": round(speed / 1e9, 1), "cases": rows}


KEYS = ("layout", "head", "drafts", "precision", "batch", "captured")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same case."""
    return all(one[key] == other[key] for key in KEYS)


def read_speed(device: str) -> float:
    """Bytes per second of one large read; the best of several."""
    block = torch.ones(LARGE_READ // 4, device=device)
    best = 0.0
    for _ in range(8):
        since = time.perf_counter()
        block.sum().item()
        best = max(best, LARGE_READ / (time.perf_counter() - since))
    return best


def chunk_seconds(case: Case) -> list[float]:
    """Seconds of each chunk, the median of all rounds."""
    return [statistics.median(chunk) for chunk in zip(*case.times, strict=True)]


def seconds_per_token(case: Case, first: int = 1, last: int | None = None) -> float:
    """Seconds per token over some chunks, the first left out unless asked for."""
    return sum(chunk_seconds(case)[first:last]) / sum(case.tokens[first:last])


def measured(case: Case, cases: list[Case], speed: float) -> dict[str, Any]:
    """A case as a row of the report; `_ms` are for 15 speech tokens of every answer."""
    assert case.work is not None
    chunk_tokens = case.decoder.config.speech_chunk * case.batch
    token_s = seconds_per_token(case)
    read_bytes = case.work.read_bytes / PERIOD
    floor_s, linears_s = read_bytes / speed, statistics.median(case.linears)
    chunk_s = token_s * chunk_tokens
    row = {key: getattr(case, key) for key in KEYS} | {
        "tokens_per_s": round(1 / token_s, 1),
        "chunk_ms": round(1000 * chunk_s, 2),
        "layer_calls": case.work.layer_calls / PERIOD,
        "read_mb": round(read_bytes / 1e6, 1),
        "floor_ms": round(1000 * floor_s, 2),
        "over_floor": round(chunk_s / floor_s, 2),
        "linears_ms": round(1000 * linears_s, 2),
        "over_linears": round(chunk_s / linears_s, 2),
        "plain_linears_ms": round(1000 * statistics.median(case.plain), 2) if case.plain else None,
        "over_plain_linears": round(chunk_s / statistics.median(case.plain), 2) if case.plain else None,
    }
    alike = [other for other in cases if (other.batch, other.captured) == (case.batch, case.captured)]
    for name, reference in (
        ("times_ntp", next(o for o in alike if not o.drafts and o.precision == case.precision)),
        ("times_fp32", next((o for o in alike if o.drafts == case.drafts and o.precision == "fp32"), None)),
    ):
        row[name] = None if reference is None else round(seconds_per_token(reference) / token_s, 2)
    late = len(case.tokens) >= 40
    row["chunk_40_over_2"] = (
        round(seconds_per_token(case, 40 - PERIOD, 40) / seconds_per_token(case, 1, 1 + PERIOD), 3) if late else None
    )
    return row


COLUMNS = {
    "layout": "layout",
    "head": "head",
    "drafts": "K",
    "precision": "prec.",
    "batch": "batch",
    "captured": "graph",
    "tokens_per_s": "tokens/s",
    "chunk_ms": "ms/chunk",
    "layer_calls": "layers",
    "read_mb": "MB read",
    "floor_ms": "floor ms",
    "over_floor": "÷floor",
    "linears_ms": "linears ms",
    "over_linears": "÷linears",
    "over_plain_linears": "÷plain",
    "times_ntp": "×NTP",
    "times_fp32": "×fp32",
    "chunk_40_over_2": "40th÷2nd",
}


def format_table(report: dict[str, Any]) -> str:
    """The report as a table in Markdown, which reads well as it is."""
    made = report["machine"]
    place = made["gpu"] if report["settings"]["device"] == "cuda" else f"{made['cpu']}, {made['threads']} threads"
    rows = [list(COLUMNS.values())]
    rows += [[_shown(case[key]) for key in COLUMNS] for case in report["cases"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    head = f"{place}, torch {made['torch']}; one large read: {report['read_gb_per_s']} GB/s"
    return "\n".join([head, "", *lines])


def _shown(value: Any) -> str:
    """A cell's text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:g}" if isinstance(value, float) else str(value)
