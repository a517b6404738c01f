"""`evoprune ask`: one video, one question or several, the answers on stdout."""

import os
import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.pruning.budget import DEFAULT, parse_budget_or_auto
from evoprune.video.sandbox.isolation import warm_up
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, Output
from evoprune_cli.interactive import check_terminal, converse
from evoprune_cli.render import encoding, note, progress, roughly

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
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Keep the video and ask on at a prompt: Ctrl-D ends it, Ctrl-C an answer. Needs a terminal, but no question.",
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also answer with nothing pruned, and print both; with --json in the field `compare` of the same line.",
        ),
    ] = False,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = "none",
    load_format: opt.LoadFormat = "auto",
    offline: opt.Offline = False,
    budget: opt.Budget = DEFAULT,
    method: opt.MethodName = methods.DEFAULT,
    encoder_budget: opt.EncoderBudget = None,
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
    cache: opt.Cache = False,
    debug: opt.Debug = False,
) -> int:
    """Ask a question about a video. The answer goes to stdout, everything else to stderr.

    \b
    evoprune ask clip.mp4 "What happens?"
    evoprune ask clip.mp4 "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune ask clip.mp4 -Q "Who is there?" -Q "What do they do?" -b fast
    evoprune ask clip.mp4 "What happens?" -b fast --compare
    evoprune ask clip.mp4 --interactive
    echo "What happens?" | evoprune ask clip.mp4 --json
    """
    output = Output(json, bool(stats or verbose or (stats is None and not json and not quiet)), verbose, quiet)
    generation = {"system": system, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk, questions = Conversation(video, output, generation), _asked(question, more) or [""]
    with ExitStack() as cleanup:
        try:
            warm_up()  # while this process imports what it needs
            questions = _questions(question, more, system, video == "-", interactive)
            sampling = _check_flags(budget, method, decoder, start, end, fps, frames, max_frames, max_visual_tokens)
            path = cleanup.enter_context(_local(video, question))
            _check_video(path, decoder, sampling)
            with progress(not quiet) as show:
                from evoprune.language.generate import GenerationSettings
                from evoprune.pipeline.cache import Cache, default_folder
                from evoprune.pipeline.video_qa import VideoQA

                GenerationSettings(max_new_tokens, temperature, top_p, seed)
                show("loading model")
                qa = VideoQA.load(
                    model, revision=revision, device=device, dtype=dtype, offline=offline,
                    load_format=load_format, quantize=quantize,
                    progress=lambda done, total: show("quantizing", done, total), budget=budget,
                    method=method, method_args=opt.settings(method_arg, encoder_budget), seed=seed,
                )  # fmt: skip

                def encode(qa, show, **told):
                    show("reading video")
                    return qa.encode(
                        path, name=video, decoder=decoder, cache=Cache(default_folder()) if cache else None,
                        progress=encoding(show), **told, **sampling,
                    )  # fmt: skip

                talk.session = encode(
                    qa, show,
                    on_plan=lambda plan: _foretell_limits(plan, sampling, quiet),
                    on_encode=lambda plan: _foretell_wait(qa, plan, quiet),
                )  # fmt: skip
            if compare:
                full = qa.unpruned()
                talk.encode_full = lambda show: encode(
                    full, show, on_encode=lambda plan: _foretell_wait(full, plan, quiet, "with nothing pruned ")
                )
            if interactive:
                converse(talk, questions)
                return 0
            for asked in questions:
                talk.answer(asked, last=talk.answered + 1 == len(questions))
        except BaseException as problem:
            talk.break_off(problem, questions[talk.answered :])
            raise
    return 0


def _asked(question: str | None, more: list[str] | None) -> list[str]:
    return [*([question] if question is not None else []), *(more or [])]


def _questions(
    question: str | None, more: list[str] | None, system: str | None, from_pipe: bool, interactive: bool
) -> list[str]:
    """All questions in order; from stdin only if there is none, none is to be typed, and the video does not come from there."""
    questions = _asked(question, more)
    if interactive:
        check_terminal()
    elif not questions:
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

    parse_budget_or_auto(budget)
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
    from evoprune.video.decode import choose_decoder
    from evoprune.video.plan import MAX_VISUAL_TOKENS, VideoLimits, make_plan
    from evoprune.video.probe import probe

    info = probe(path)
    choose_decoder(decoder, info)
    limit = sampling["max_visual_tokens"]
    make_plan(info, VideoLimits(), **(sampling | {"max_visual_tokens": MAX_VISUAL_TOKENS if limit is None else limit}))


def _foretell_wait(qa, plan, quiet: bool, how: str = "") -> None:
    """How long it will take, if it is long."""
    wait = None if quiet else qa.estimate_first_token(plan)
    if wait is not None and wait > LONG_WAIT_S:
        note(f"estimated first token {how}{roughly(wait)}")


def _foretell_limits(plan, sampling: dict, quiet: bool) -> None:
    """That it is less than was asked for, or than the model's own rate asks for, that is looked at."""
    if quiet:
        return
    asked = sampling["frames"] is not None or sampling["fps"] is not None
    if sampling["max_frames"] is None and plan.sampling.wanted > plan.frame_limit:
        whence = "asked for" if asked else "at this model's rate"
        note(f"{plan.sampling.wanted:,} frames {whence}; it takes {plan.frame_limit:,} (--max-frames)")
    if plan.capped:
        from evoprune.video.plan import MAX_VISUAL_TOKENS

        where = " on a CPU" if sampling["max_visual_tokens"] is None and plan.token_limit < MAX_VISUAL_TOKENS else ""
        seen = f"{plan.sampling.frames} frames of {plan.width}x{plan.height}"
        note(f"at most {plan.token_limit:,} tokens{where} (--max-visual-tokens): {seen}")
