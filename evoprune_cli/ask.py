"""`evoprune ask`: one video, one question, the answer on stdout."""

import sys
from typing import Annotated

import typer

from evoprune import methods
from evoprune.errors import EvopruneError, UsageError
from evoprune.pruning.budget import DEFAULT, PRESETS, parse_budget
from evoprune.report import Report, VideoFacts
from evoprune_cli.render import note, print_stats, print_warning, progress

MODEL, PRUNING, SAMPLING, GENERATION, OUTPUT = "Model", "Pruning", "Sampling", "Generation", "Output"
_PRESETS = ", ".join(f"{name} {value:g}" for name, value in PRESETS.items())


def ask(
    video: Annotated[str, typer.Argument(help="The video file.", show_default=False)],
    question: Annotated[
        str | None,
        typer.Argument(help="The question, quoted; without it, read from stdin.", show_default=False),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            envvar="EVOPRUNE_MODEL",
            metavar="ID|DIR|demo",
            help="Hub id, local folder, or demo: the bundled tiny model.",
            rich_help_panel=MODEL,
        ),
    ] = "demo",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL, show_default=False)
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to run.", rich_help_panel=MODEL)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|bf16|fp16|fp32",
            help="auto: bf16 where the hardware has it; the demo fp32.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=MODEL)] = False,
    budget: Annotated[
        str,
        typer.Option(
            "-b",
            "--budget",
            envvar="EVOPRUNE_BUDGET",
            metavar="SHARE|PRESET",
            help=f"Share of visual tokens kept, in (0, 1], or {_PRESETS}. full is the exact answer.",
            rich_help_panel=PRUNING,
        ),
    ] = DEFAULT,
    method: Annotated[
        str, typer.Option(metavar="|".join(methods.available()), help="How tokens are pruned.", rich_help_panel=PRUNING)
    ] = methods.DEFAULT,
    method_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A setting of the method; repeatable.",
            rich_help_panel=PRUNING,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0, rich_help_panel=PRUNING)] = 0,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second to look at; default: what the model asks for.",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="How many frames to look at instead; odd rounds up.", rich_help_panel=SAMPLING, show_default=False
        ),
    ] = None,
    start: Annotated[
        str, typer.Option(metavar="TIME", help="Where to start: 90, 1:30 or 01:30:00.", rich_help_panel=SAMPLING)
    ] = "0",
    end: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Where to stop; default: the end.", rich_help_panel=SAMPLING, show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", help="Longest answer.", rich_help_panel=GENERATION)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("-t", "--temperature", help="0 is greedy.", rich_help_panel=GENERATION)
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", rich_help_panel=GENERATION)] = 1.0,
    system: Annotated[
        str | None,
        typer.Option(
            "-s", "--system", metavar="TEXT", help="A system prompt.", rich_help_panel=GENERATION, show_default=False
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON line on stdout instead of text.", rich_help_panel=OUTPUT)
    ] = False,
    stats: Annotated[
        bool | None,
        typer.Option(
            "--stats/--no-stats",
            help="Stage times and token counts on stderr; default: unless --json or -q.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="No progress, no stats.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", help="Also rows of every layer, settings, versions.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Tracebacks. [env var: EVOPRUNE_DEBUG]", rich_help_panel=OUTPUT)
    ] = False,
) -> int:
    """Ask a question about a video. The answer goes to stdout, everything else to stderr.

    evoprune ask clip.mp4 "What happens?"

    evoprune ask clip.mp4 "What is said?" -m Qwen/Qwen2.5-VL-3B-Instruct -b fast

    echo "What happens?" | evoprune ask clip.mp4 --json
    """
    session = None
    try:
        question = question if question is not None else _question_from_stdin()
        _check_before_loading(video, budget, method, start, end, fps, frames, question)
        from evoprune.video.sampling import parse_time

        with progress(not quiet) as show:
            from evoprune.language.generate import GenerationSettings
            from evoprune.pipeline import VideoQA

            GenerationSettings(max_new_tokens, temperature, top_p, seed)
            show("loading model")
            qa = VideoQA.load(
                model, revision=revision, device=device, dtype=dtype, offline=offline, budget=budget, method=method,
                method_args=_pairs(method_arg), seed=seed,
            )  # fmt: skip
            show("reading video")
            session = qa.encode(
                video, fps=fps, frames=frames, start_s=parse_time(start), end_s=parse_time(end) if end else None,
                progress=lambda stage, done, total: show("encoding", done, total),
            )  # fmt: skip
            show("reading prompt")
            pieces = session.ask(
                question, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
            )
            first = next(pieces, "")
        _print_answer(first, pieces, silent=json)
    except EvopruneError as problem:
        if json:
            print(_failure(video, question, problem).to_json(), flush=True)
        raise
    except BaseException:
        # Interrupted or terminated: what there is has been printed, or is printed now.
        if session is not None and session.report.question:
            session.report.finish_reason = "interrupt"
            _finish(session.report, json, stats, quiet, verbose)
        raise
    _finish(session.report, json, stats, quiet, verbose)
    return 0


def _question_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no question", 'evoprune ask video.mp4 "What happens?"')
    try:
        question = sys.stdin.read().strip()
    except UnicodeDecodeError as problem:
        raise UsageError("the question on stdin is not valid text", "write it in UTF-8") from problem
    if not question:
        raise UsageError("no question, and stdin is empty", 'evoprune ask video.mp4 "What happens?"')
    return question


def _check_before_loading(video, budget, method, start, end, fps, frames, question) -> None:
    """All that can be wrong with flags and files, found out in milliseconds, before torch is imported or weights are read."""
    if not question.strip():
        raise UsageError("the question is empty", 'evoprune ask video.mp4 "What happens?"')
    parse_budget(budget)
    if method not in methods.available():
        raise UsageError(f"no pruning method {method!r}", f"one of {', '.join(methods.available())}")
    if fps is not None and frames is not None:
        raise UsageError("--fps and --frames exclude each other", "give one of the two")
    from evoprune.video.probe import probe
    from evoprune.video.sampling import parse_time, plan_sampling

    begin, stop = parse_time(start), parse_time(end) if end else None
    info = probe(video)
    if info.duration_s is not None:
        plan_sampling(info.duration_s, fps=fps or 2.0, frames=frames, start_s=begin, end_s=stop)


def _pairs(texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--method-arg {text!r} is not NAME=VALUE", "for example --method-arg allocation=mean")
        pairs[name] = value
    return pairs


def _print_answer(first: str, rest, silent: bool) -> None:
    """Streams the answer; the closing newline comes even when it is cut short."""
    if silent:
        for _ in rest:
            pass
        return
    try:
        print(_encodable(first), end="", flush=True)
        for piece in rest:
            print(_encodable(piece), end="", flush=True)
    finally:
        print(flush=True)


def _encodable(text: str) -> str:
    """What stdout can take: characters outside its encoding become escapes instead of an error."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _finish(report: Report, json: bool, stats: bool | None, quiet: bool, verbose: bool) -> None:
    if json:
        print(_encodable(report.to_json()), flush=True)
    for name in report.warnings:
        print_warning(name)
    if stats or verbose or (stats is None and not json and not quiet):
        note()
        print_stats(report, verbose)


def _failure(video: str, question: str | None, problem: EvopruneError) -> Report:
    report = Report(question=question, finish_reason="error", video=VideoFacts(path=video))
    report.error = {
        "code": problem.exit_code,
        "type": problem.type,
        "stage": problem.stage,
        "message": problem.message,
        "hint": problem.hint,
    }
    return report
