"""The command line: `vocalnet COMMAND --help`. Errors that a user can act on print one line and exit with status 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vocalnet.errors import VocalNetError
from vocalnet.files import write_json

if TYPE_CHECKING:
    from vocalnet.session import Session

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

ModelOption = Annotated[str, typer.Option("--model", help="mini, or a model folder.")]
SeedOption = Annotated[int, typer.Option(help="Fixes text, tokens and waveform on one machine.")]
MtpOption = Annotated[int | None, typer.Option(help="MTP modules to use, 0 to the model's own number.")]
# spelled out: importing `vocalnet.decoding`, which has the same list, takes as long as importing torch
DecodingOption = Annotated[
    Literal["accept-all", "verified", "relaxed"] | None, typer.Option(help="How drafts are used.")
]
OutOption = Annotated[Path | None, typer.Option(help="WAV file, or a folder for several answers.")]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a question.")]
HostOption = Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a key.")]
PortOption = Annotated[int, typer.Option(help="0 takes a free one.")]
KeyOption = Annotated[str | None, typer.Option(envvar="VOCALNET_API_KEY", help="What clients must present.")]


@app.command()
def chat(
    questions: Annotated[
        list[Path] | None, typer.Argument(help="Sound files, answered in turn as one conversation.")
    ] = None,
    out: OutOption = None,
    model: ModelOption = "mini",
    mtp: MtpOption = None,
    decoding: DecodingOption = None,
    seed: SeedOption = 0,
    json_lines: JsonLinesOption = False,
) -> None:
    """Answers spoken questions aloud, while the answer is still being made.

    Example: vocalnet chat examples/question.wav --out answer.wav

    Without files it listens to the microphone. Without --out it plays, or writes answer.wav where nothing can play.
    """
    from vocalnet.chat import chat_files, chat_microphone, choose_output
    from vocalnet.devices import has_microphone
    from vocalnet.errors import AudioError

    inputs = questions or []
    if not inputs and not has_microphone():
        raise AudioError("no question and no microphone; give a sound file: vocalnet chat examples/question.wav")
    output = choose_output(inputs or [Path("microphone.wav")], out, json_lines)
    for file in inputs:
        if len(inputs) == 1 and not file.is_file():
            raise AudioError(f"no audio file {file}; give the path of a WAV, FLAC, OGG or MP3 file")
    session = load_session(model, mtp, decoding, seed)
    if not inputs:
        chat_microphone(session, output)
    elif chat_files(session, inputs, output):
        raise typer.Exit(2)


def load_session(model: str, mtp: int | None, decoding: str | None, seed: int) -> Session:
    """A session with the generation settings that were given."""
    from vocalnet.model import VocalNet

    loaded = VocalNet.load(model)
    given: dict[str, Any] = {"mtp": mtp, "decoding": decoding}
    changes = {key: value for key, value in given.items() if value is not None}
    return loaded.session(seed, replace(loaded.config.generation, **changes))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context, recipe: Annotated[Path, typer.Argument(help="A YAML file, as in recipes/.")]) -> None:
    """Trains one stage; resumes where it stopped.

    Example: vocalnet train recipes/speak.yaml trainer.max_minutes=10
    """
    from vocalnet.training.engine import main as run

    raise typer.Exit(run([str(recipe), *context.args]))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def prepare(context: typer.Context) -> None:
    """Prepares training data, step by step (only in a clone of the project, which holds data_prep).

    Example: vocalnet prepare texts --data data --size tiny
    """
    from vocalnet.errors import ConfigError

    try:
        from data_prep.__main__ import main as run
    except ModuleNotFoundError as error:
        raise ConfigError(f"data preparation needs {error.name}; run it in a clone, after `make setup`") from error
    run(context.args)


@app.command()
def pack(
    runs: Annotated[Path, typer.Argument(help="Folder with one exported part each: adapter, lora, …")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    settings: Annotated[Path, typer.Option(help="YAML with the model's top-level configuration.")],
    card: Annotated[Path | None, typer.Option(help="JSON with data, recipes and scores.")] = None,
) -> None:
    """Gathers trained parts into a model folder.

    Example: vocalnet pack runs/parts --out vocalnet/weights/mini --settings recipes/mini.yaml
    """
    import torch

    from vocalnet.config import from_dict, load_yaml
    from vocalnet.model import VocalNetConfig
    from vocalnet.model import pack as run
    from vocalnet.parts import read_json

    config = from_dict(VocalNetConfig, load_yaml(settings), str(settings))
    parts = {folder.name: folder for folder in sorted(runs.iterdir()) if folder.is_dir()}
    run(out, config, parts, read_json(card) if card else {}, torch.float16)
    print(f"packed {', '.join(parts)} into {out}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a released VocalNet-1B, -8B or -Qwen25-7B.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    vocoder: Annotated[
        str | None, typer.Option(help="Folder or hub id of CosyVoice2-0.5B (default: beside the source).")
    ] = None,
    voice: Annotated[
        Path | None, typer.Option(help="The voice to speak in: .safetensors or .npz (tokens, mel, speaker), or sound.")
    ] = None,
) -> None:
    """Writes a model folder from a checkpoint that VocalNet's authors released.

    Example: vocalnet convert VocalNet-1B --vocoder CosyVoice2-0.5B --voice prompt.wav --out models/vocalnet-1b
    """
    from vocalnet.checkpoints.convert import convert as run

    config = run(source, out, vocoder, voice)
    print(f"converted {config.name} into {out}")


bench = typer.Typer(rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.callback(invoke_without_command=True)
def bench_conversation(
    context: typer.Context,
    model: ModelOption = "mini",
    questions: Annotated[list[Path] | None, typer.Option(help="Sound files to ask (default: the examples).")] = None,
    repeats: Annotated[int, typer.Option(help="How often each question is asked.")] = 5,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measures latency and work per stage, real-time factor, memory, and the cost of late chunks.

    Example: vocalnet bench --repeats 10
    """
    if context.invoked_subcommand is not None:
        return
    from vocalnet.bench import format_report, run_bench

    report = run_bench(model, questions or [], repeats)
    print(json.dumps(report) if json_lines else format_report(report))


@bench.command("decoder")
def bench_decoder(
    layouts: Annotated[str, typer.Option(help="Of mini, 576, 1b; several with commas, as below.")] = "576",
    heads: Annotated[str, typer.Option(help="Kinds of MTP head, or all.")] = "sequential",
    drafts: Annotated[str, typer.Option(help="Numbers of drafts K; 0 is next-token prediction.")] = "0,1,2,3,4,5",
    precisions: Annotated[str, typer.Option(help="Of fp32, bf16, int8 (default: all that run here).")] = "",
    batches: Annotated[str, typer.Option(help="Numbers of answers in lockstep.")] = "1",
    chunks: Annotated[int, typer.Option(help="Chunks of 5 text and 15 speech tokens in a stream.")] = 41,
    repeats: Annotated[int, typer.Option(help="Rounds, in which all cases take turns.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda (default: cuda where present, with graphs).")] = "",
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measures the speech decoder alone, streaming with random weights: tokens/s, ms a chunk, bytes read, ratios.

    Example: vocalnet bench decoder --drafts 0,4 --precisions fp32,bf16,int8 --out decoder.json
    """
    from vocalnet.bench.decoder import BenchConfig, format_table, run_decoder_bench
    from vocalnet.mtp import MTP_HEADS

    config = BenchConfig(
        _words(layouts),
        tuple(MTP_HEADS) if heads == "all" else _words(heads),
        _numbers("--drafts", drafts),
        _words(precisions),
        _numbers("--batches", batches),
        chunks,
        repeats,
        device,
    )
    report = run_decoder_bench(config, lambda line: print(line, file=sys.stderr))
    if out is not None:
        write_json(out, report)
    print(json.dumps(report) if json_lines else format_table(report))


@bench.command("server")
def bench_server(
    model: ModelOption = "mini",
    questions: Annotated[list[Path] | None, typer.Option(help="Sound files to ask (default: the examples).")] = None,
    sessions: Annotated[str, typer.Option(help="Levels of load: conversations at once.")] = "1,2,4,8",
    turns: Annotated[int, typer.Option(help="Questions a conversation asks at each level.")] = 4,
    max_sessions: Annotated[int, typer.Option(help="The server's limit; levels beyond it are refused in part.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Also write the report there, as JSON, and a plot.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measures a server under load, from another process: first audio, real-time factor, gaps, refusals.

    Example: vocalnet bench server --sessions 1,2,4 --out server.json
    """
    from vocalnet.bench.conversation import EXAMPLES

    with _extra("serve"):
        import websockets  # noqa: F401 - asked for before minutes of measuring

        from vocalnet.bench.server import LoadConfig, format_load, plot_load, run_server_bench

    files = tuple(questions or sorted(EXAMPLES.glob("*.wav")))
    config = LoadConfig(model, files, _numbers("--sessions", sessions), turns, max_sessions)
    report = run_server_bench(config, lambda line: print(line, file=sys.stderr))
    if out is not None:
        write_json(out, report)
        plot_load(report, out.with_suffix(".png"))
    print(json.dumps(report) if json_lines else format_load(report))


def _words(given: str) -> tuple[str, ...]:
    """A list with commas."""
    return tuple(word.strip() for word in given.split(",") if word.strip())


def _numbers(option: str, given: str) -> tuple[int, ...]:
    """A list of whole numbers with commas."""
    from vocalnet.errors import ConfigError

    try:
        return tuple(int(word) for word in _words(given))
    except ValueError as error:
        raise ConfigError(f"{option} is '{given}'; expected whole numbers with commas, such as 0,2,4") from error


@app.command(name="eval")
def evaluate(
    what: Annotated[str, typer.Argument(help="A suite, a folder in a suite's form, a folder of speech, or 'compare'.")],
    runs: Annotated[list[Path] | None, typer.Argument(help="The two runs to compare.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the suite's data, in its published form.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Only the few items that come with the package.")] = False,
    subsets: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only the first items of each subset.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out items whose sound is missing.")] = False,
    conditions: Annotated[str, typer.Option(help="Ask again under these, as in noise:10,telephone; or standard.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; an interrupted one goes on.")] = None,
    model: ModelOption = "mini",
    answers: Annotated[Path | None, typer.Option(help="Measure these answers (ITEM.wav) instead of a model's.")] = None,
    mtp: MtpOption = None,
    decoding: DecodingOption = None,
    seed: SeedOption = 0,
    measures: Annotated[str, typer.Option(help="Comma-separated, or all: see the README.")] = "default",
    voice: Annotated[Path | None, typer.Option(help="Recording of the voice that answers should have.")] = None,
    recogniser: Annotated[str, typer.Option(help="whisper-base, or a folder with another Whisper.")] = "whisper-base",
    judge_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, as in http://localhost:8000/v1.")] = "",
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")] = "",
    judge_price: Annotated[tuple[float, float], typer.Option(help="Per million tokens in and out.")] = (0.0, 0.0),
    jobs: Annotated[int, typer.Option(help="Processes; timings are only fair with one.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Work on a Ray cluster.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew.")] = False,
) -> None:
    """Asks a suite's questions aloud, measures the answers, and writes a report; resumes where it stopped.

    Example: vocalnet eval mini-qa --limit 50 --out evaluations/mini

    Example: vocalnet eval compare evaluations/mini evaluations/other

    Suites: mini-qa, mini-dialogue, openaudiobench, voicebench, vocalbench, uro-bench, seed-tts-eval.
    """
    from vocalnet.errors import ConfigError
    from vocalnet.evaluation import command
    from vocalnet.evaluation.judge import JudgeConfig
    from vocalnet.evaluation.worker import Settings

    if what == "compare":
        if runs is None or len(runs) != 2:
            raise ConfigError(f"compare takes two runs, {len(runs or [])} given: vocalnet eval compare A B")
        command.run_compare(runs[0], runs[1], out)
        return
    if runs:
        raise ConfigError(f"one suite or folder at a time; '{runs[0]}' is too much (or did you mean eval compare A B?)")
    chosen, notes = command.chosen_measures(measures)
    judge = JudgeConfig(judge_url, judge_model, *judge_price)
    source = "" if answers else model
    settings = Settings(source, str(answers or ""), seed, mtp, decoding, recogniser, chosen, str(voice or ""), judge)
    wanted = command.parts_of(subsets), limit, partial, command.chosen_conditions(conditions)
    command.run_eval(command.Options(what, data, sample, *wanted, out, jobs, ray, fresh, notes), settings)


@app.command()
def talk(
    questions: Annotated[
        list[Path] | None, typer.Argument(help="Sound files, asked in turn as one conversation.")
    ] = None,
    url: Annotated[str, typer.Option(help="The server's WebSocket.")] = "ws://127.0.0.1:8000/v1/realtime",
    key: Annotated[str, typer.Option(envvar="VOCALNET_API_KEY", help="The server's API key, if it has one.")] = "",
    out: OutOption = None,
    mtp: MtpOption = None,
    decoding: DecodingOption = None,
    json_lines: JsonLinesOption = False,
) -> None:
    """Talks to a running server (`vocalnet serve`) and shows the latency of every answer.

    Example: vocalnet talk examples/question.wav --out answer.wav

    Without files it listens to the microphone, and speaking over an answer stops it.
    """
    from vocalnet.chat import choose_output

    with _extra("serve"):
        from vocalnet.demo.talk import talk as run

    given: dict[str, Any] = {"mtp": mtp, "decoding": decoding}
    generation = {name: value for name, value in given.items() if value is not None}
    output = choose_output(questions, out, json_lines) if questions else None
    if run(url, key, questions or [], output, generation):
        raise typer.Exit(2)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Says which extra a missing package belongs to."""
    from vocalnet.errors import ConfigError

    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"this command needs {error.name}; install it: pip install 'vocalnet[{name}]'") from error


@app.command()
def serve(
    model: ModelOption = "mini",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: KeyOption = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="Listen beyond this machine without a key.")] = False,
    origin: Annotated[list[str] | None, typer.Option(help="Web origins allowed besides the server's own.")] = None,
    max_sessions: Annotated[int, typer.Option(help="Conversations at once; further ones are refused.")] = 4,
    record: Annotated[Path | None, typer.Option(help="Folder for a recording of every conversation.")] = None,
    mtp: MtpOption = None,
    decoding: DecodingOption = None,
    seed: SeedOption = 0,
) -> None:
    """Serves conversations over WebSockets: the OpenAI Realtime protocol at /v1/realtime, plain PCM at /v1/stream.

    Example: vocalnet serve --port 8000
    """
    with _extra("serve"):
        from vocalnet.serving.run import serve as run
        from vocalnet.serving.settings import ServeSettings

    settings = ServeSettings(
        host=host, port=port, api_key=api_key, origins=tuple(origin or ()), max_sessions=max_sessions, record=record,
        seed=seed, mtp=mtp, decoding=decoding,
    )  # fmt: skip
    settings.check_exposure(open_to_all)
    from vocalnet.model import VocalNet

    run(VocalNet.load(model), settings)


@app.command()
def demo(
    model: ModelOption = "mini",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: KeyOption = None,
    mtp: MtpOption = None,
    decoding: DecodingOption = None,
    seed: SeedOption = 0,
) -> None:
    """Serves a voice-chat page, with the real-time server behind it.

    Example: vocalnet demo --port 8000
    """
    with _extra("demo"):
        from vocalnet.demo.run import demo as run
        from vocalnet.serving.settings import ServeSettings

    settings = ServeSettings(host=host, port=port, api_key=api_key, seed=seed, mtp=mtp, decoding=decoding)
    settings.check_exposure()
    from vocalnet.model import VocalNet

    run(VocalNet.load(model), settings)


@app.command()
def replay(
    recording: Annotated[Path, typer.Argument(help="A folder that `vocalnet serve --record` wrote.")],
    model: ModelOption = "mini",
) -> None:
    """Plays a recorded session again, from its seed, and says whether the server answers the same.

    Example: vocalnet replay recordings/sess_2f81a9c03d4b1
    """
    from vocalnet.errors import DataError
    from vocalnet.model import VocalNet

    with _extra("serve"):
        from vocalnet.serving.record import read_recording
        from vocalnet.serving.record import replay as run

    read_recording(recording)
    result = run(VocalNet.load(model), recording)
    print(f"{result.messages} messages replayed, {result.events} events compared")
    if result.difference:
        raise DataError(f"the replay differs: {result.difference}")
    print("identical")


@app.command()
def info(model: ModelOption = "mini") -> None:
    """Shows what a model is made of, what it scored, and what this machine offers.

    Example: vocalnet info
    """
    from vocalnet.info import describe

    print(describe(model))


def main() -> None:
    """Entry point."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except VocalNetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # full disk, no permission
        print(f"error: {error.strerror or error}: {error.filename or 'no file'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
