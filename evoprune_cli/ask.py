"""`evoprune ask`: one video, one question or several, the answers on stdout."""

import os
import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.pruning.budget import DEFAULT, parse_budget
from evoprune.report import Report, VideoFacts
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.render import encodable, note, print_json, print_stats, print_warning, progress, roughly

# Below this nobody needs to be told how long it will take, in seconds.
LONG_WAIT_S = 5.0
USAGE = 'evoprune ask video.mp4 "What happens?"'


def ask(
    video: Annotated[
        str,
        typer.Argument(metavar="VIDEO", help="The video file, a folder of frames, or - for stdin.", show_default=False),
    ],
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION",
            help="The question, quoted. If there is none, and no -Q, it is read from stdin; otherwise stdin is not read.",
            show_default=False,
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "-Q",
            "--question",
            metavar="TEXT",
            help="A further question; repeatable. All share one encoding.",
            show_default=False,
        ),
    ] = None,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = "none",
    load_format: opt.LoadFormat = "auto",
    offline: opt.Offline = False,
    budget: opt.Budget = DEFAULT,
    method: opt.MethodName = methods.DEFAULT,
    method_arg: opt.MethodArg = None,
    seed: opt.Seed = 0,
    fps: opt.Fps = None,
    frames: opt.Frames = None,
    max_frames: opt.MaxFrames = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    start: opt.Start = "0",
    end: opt.End = None,
    decoder: opt.Decoder = "auto",
    max_new_tokens: opt.MaxNewTokens = 256,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    system: opt.System = None,
    json: opt.Json = False,
    stats: opt.Stats = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> int:
    """Ask a question about a video. The answer goes to stdout, everything else to stderr.

    \b
    evoprune ask clip.mp4 "What happens?"
    evoprune ask clip.mp4 "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune ask clip.mp4 -Q "Who is there?" -Q "What do they do?" -b fast
    echo "What happens?" | evoprune ask clip.mp4 --json
    """
    show_stats = bool(stats or verbose or (stats is None and not json and not quiet))
    questions, answered, session = _asked(question, more) or [""], 0, None
    with ExitStack() as cleanup:
        try:
            questions = _questions(question, more, system, from_pipe=video == "-")
            sampling = _check_flags(budget, method, decoder, start, end, fps, frames, max_frames, max_visual_tokens)
            path = cleanup.enter_context(_local(video, question))
            _check_video(path, decoder, sampling)
            with progress(not quiet) as show:
                from evoprune.language.generate import GenerationSettings
                from evoprune.pipeline import VideoQA

                GenerationSettings(max_new_tokens, temperature, top_p, seed)
                show("loading model")
                qa = VideoQA.load(
                    model, revision=revision, device=device, dtype=dtype, offline=offline,
                    load_format=load_format, quantize=quantize,
                    progress=lambda done, total: show("quantizing", done, total), budget=budget,
                    method=method, method_args=opt.pairs(method_arg), seed=seed,
                )  # fmt: skip
                show("reading video")
                session = qa.encode(
                    path, name=video, decoder=decoder, on_plan=lambda plan: _foretell(qa, plan, sampling, quiet),
                    progress=lambda stage, done, total: show("encoding", done, total), **sampling,
                )  # fmt: skip
                show("reading prompt")
                first = _begin(session, questions[0], system, max_new_tokens, temperature, top_p)
            for turn, asked in enumerate(questions):
                pieces = first if turn == 0 else _begin(session, asked, system, max_new_tokens, temperature, top_p)
                _print_answer(*pieces, silent=json)
                answered += 1  # before it is printed: an interrupted record is better lost than there twice
                _finish(session.report, json, show_stats, verbose, last=answered == len(questions))
        except BaseException as problem:
            _break_off(problem, video, questions[answered:], session, json, show_stats, verbose)
            raise
    return 0


def _break_off(problem: BaseException, video, unanswered, session, json, show_stats, verbose) -> None:
    """What there is when something went wrong: the stats so far, and for `--json` a line for every question not answered."""
    if isinstance(problem, BrokenPipeError | SystemExit):
        return
    interrupted = not isinstance(problem, Exception)
    begun = session is not None and bool(unanswered) and session.report.question == unanswered[0]
    if interrupted and begun:
        session.report.finish_reason = "interrupt"
        _finish(session.report, json, show_stats, verbose, last=True)
        unanswered = unanswered[1:]
    if json:
        for question in unanswered:
            print_json(_failure(video, question, problem, interrupted))
        problem.told = True


def _asked(question: str | None, more: list[str] | None) -> list[str]:
    return [*([question] if question is not None else []), *(more or [])]


def _questions(question: str | None, more: list[str] | None, system: str | None, from_pipe: bool) -> list[str]:
    """All questions in order; from stdin only if there is none and the video does not come from there."""
    questions = _asked(question, more)
    if not questions:
        if from_pipe:
            raise UsageError("no question, and stdin is the video", 'cat clip.mp4 | evoprune ask - "What happens?"')
        questions = [_question_from_stdin()]
    if not all(q.strip() for q in questions):
        raise UsageError("the question is empty", USAGE)
    if any("\ud800" <= character <= "\udfff" for text in (*questions, system or "") for character in text):
        raise UsageError("the question or the system prompt is not valid text", "write it in UTF-8")
    return questions


def _question_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no question", USAGE)
    try:
        question = sys.stdin.read().strip()
    except UnicodeDecodeError as problem:
        raise UsageError("the question on stdin is not valid text", "write it in UTF-8") from problem
    if not question:
        raise UsageError("no question, and stdin is empty", USAGE)
    return question


def _local(video: str, question: str | None):
    from evoprune.video.source import local_file

    if question and os.path.isfile(question) and not os.path.exists(video) and video != "-":
        raise VideoError(f"no such file: {video}", f"the video comes first: {USAGE}")
    return local_file(video)


def _check_flags(budget, method, decoder, start, end, fps, frames, max_frames, max_visual_tokens) -> dict:
    """All that can be wrong with flags alone; what `VideoQA.encode` wants to know of sampling."""
    from evoprune.video.decode import choose_decoder
    from evoprune.video.sampling import parse_time

    parse_budget(budget)
    if not methods.known(method):
        raise UsageError(f"no pruning method {method!r}", f"one of {', '.join(methods.available())}")
    choose_decoder(decoder)
    return {
        "fps": fps,
        "frames": frames,
        "start_s": parse_time(start),
        "end_s": parse_time(end) if end else None,
        "max_frames": max_frames,
        "max_visual_tokens": max_visual_tokens,
    }


def _check_video(path: str, decoder: str, sampling: dict) -> None:
    """All that can be wrong with the video, found out in milliseconds, before torch is imported or weights are read."""
    from evoprune.plan import MAX_VISUAL_TOKENS, VideoLimits, make_plan
    from evoprune.video.decode import choose_decoder
    from evoprune.video.probe import probe

    info = probe(path)
    choose_decoder(decoder, info)
    limit = sampling["max_visual_tokens"]
    make_plan(info, VideoLimits(), **(sampling | {"max_visual_tokens": MAX_VISUAL_TOKENS if limit is None else limit}))


def _foretell(qa, plan, sampling: dict, quiet: bool) -> None:
    """What a user should know before a long wait: how long, and that it is less than was asked for that is looked at."""
    if quiet:
        return
    wait = qa.estimate_first_token(plan)
    if wait is not None and wait > LONG_WAIT_S:
        note(f"estimated first token {roughly(wait)}")
    asked = sampling["frames"] is not None or sampling["fps"] is not None
    if asked and sampling["max_frames"] is None and plan.sampling.wanted > plan.frame_limit:
        note(f"{plan.sampling.wanted:,} frames asked for; this model takes {plan.frame_limit:,} (--max-frames)")
    if plan.capped:
        from evoprune.plan import MAX_VISUAL_TOKENS

        where = " on a CPU" if sampling["max_visual_tokens"] is None and plan.token_limit < MAX_VISUAL_TOKENS else ""
        seen = f"{plan.sampling.frames} frames of {plan.width}x{plan.height}"
        note(f"at most {plan.token_limit:,} tokens{where} (--max-visual-tokens): {seen}")


def _begin(session, question: str, system, max_new_tokens, temperature, top_p):
    """The first piece of an answer, and the rest to come."""
    pieces = session.ask(question, system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    return next(pieces, ""), pieces


def _print_answer(first: str, rest, silent: bool) -> None:
    """Streams the answer; the closing newline comes even when it is cut short."""
    if silent:
        for _ in rest:
            pass
        return
    try:
        print(encodable(first, sys.stdout), end="", flush=True)
        for piece in rest:
            print(encodable(piece, sys.stdout), end="", flush=True)
    finally:
        print(flush=True)


def _finish(report: Report, json: bool, show_stats: bool, verbose: bool, last: bool) -> None:
    if json:
        print_json(report)
    if last:  # the warnings are about the video, the same for every question
        for name in report.warnings:
            print_warning(name)
    if show_stats:
        note()
        print_stats(report, verbose)


def _failure(video: str, question: str, problem: BaseException, interrupted: bool) -> Report:
    """The record of a question that has no answer."""
    reason = "interrupt" if interrupted else "error"
    return Report(question=question, video=VideoFacts(path=video), finish_reason=reason, error=failure(problem))
