"""`evoprune ask`: one video, one question or several, the answers on stdout."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.language.text import check_text
from evoprune.model.limits import check_libraries
from evoprune.pruning.budget import DEFAULT
from evoprune.text import roughly
from evoprune.video.sandbox.isolation import warm_up
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, Output
from evoprune_cli.help_format import HelpAll
from evoprune_cli.imports import without_collections
from evoprune_cli.interactive import check_terminal, converse
from evoprune_cli.terminal import check_output, encoding, note, note_subtitles, note_tuning, progress, tell

if TYPE_CHECKING:
    from evoprune.pipeline.options import PipelineOptions, SamplingOptions

LONGEST_QUESTION = 2**22  # characters that are read from stdin, which may never end
LONG_WAIT_S = 5.0  # from here on the estimated wait is printed
USAGE = 'evoprune ask video.mp4 "What happens?"'


def ask(
    video: opt.Video,
    question: opt.Question = None,
    more: opt.MoreQuestions = None,
    interactive: opt.Interactive = False,
    compare: opt.Compare = False,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = "none",
    load_format: opt.LoadFormat = "auto",
    offline: opt.Offline = False,
    threads: opt.Threads = "auto",
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
    subtitles: opt.Subtitles = "none",
    max_subtitle_tokens: opt.MaxSubtitleTokens = 2048,
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
    help_all: HelpAll = False,
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
    _run(_Request(video, question, more or [], interactive, compare, cache, quiet), Output.of(locals()), locals())
    return 0


@dataclass(frozen=True)
class _Request:
    """What is asked, besides the options of the pipeline and of the output."""

    video: str
    question: str | None
    more: list[str]
    interactive: bool
    compare: bool
    cache: bool
    quiet: bool

    @property
    def questions(self) -> list[str]:
        """Those of the command line, in order."""
        return [*([self.question] if self.question is not None else []), *self.more]


def _run(request: _Request, output: Output, given: Mapping[str, Any]) -> None:
    """Answers all questions. Where something goes wrong, prints what there is, and raises it.

    Args:
        given: the command's arguments.
    """
    talk, questions = Conversation(request.video, output), request.questions or [""]
    with ExitStack() as cleanup:
        try:
            check_output()
            warm_up()  # while this process imports what it needs
            questions = _questions(request, given["system"])
            options = _check_flags(given)
            path = cleanup.enter_context(_local(request))
            _check_video(path, options.sampling)
            _encode_into(talk, path, request, questions, options)
            if request.interactive:
                converse(talk, questions, None if request.quiet else request.video)
                return
            for question in questions:
                talk.answer(question)
        except BaseException as problem:
            talk.break_off(problem, questions[talk.answered :])
            raise


def _encode_into(
    talk: Conversation, path: str, request: _Request, questions: list[str], options: "PipelineOptions"
) -> None:
    """Loads the model, encodes the video, and hands it to the conversation."""
    with progress(not request.quiet) as show:
        check_libraries()
        with without_collections():
            from evoprune.pipeline.video_qa import VideoQA

        show("loading model")
        qa = VideoQA.load(
            **vars(options.model), **vars(options.pruning),
            progress=lambda done, total: show("quantizing", done, total),
        )  # fmt: skip
        if not request.quiet:
            note_tuning(qa.engine)
        video = _encode(qa.engine, path, request, questions, options, show)

    def encode_full(show):
        return _encode(qa.unpruned().engine, path, request, questions, options, show, full=True)

    talk.begin(video, options.generation, encode_full if request.compare else None)


def _encode(
    engine, path: str, request: _Request, questions: list[str], options: "PipelineOptions", show, full: bool = False
):
    """The video, encoded; first says on stderr which limits apply, and how long it will take if that is long."""
    from evoprune.pipeline.cache import Cache, default_folder
    from evoprune.pipeline.estimate import QUESTION
    from evoprune.pipeline.opening import open_video
    from evoprune.pipeline.question_check import longest_prompt

    show("reading video")
    sampling, cache = options.sampling, Cache(default_folder()) if request.cache else None
    with closing(open_video(engine, path, sampling, name=request.video, cache=cache)) as opened:
        known = opened.view.subtitles
        text = (
            longest_prompt(engine, [opened.view], questions, options.generation)
            if questions
            else QUESTION + known.tokens
        )
        if not request.quiet:
            if not full:
                _note_limits(opened.view.full, sampling)
                note_subtitles(known)
            if not opened.in_cache:
                _note_wait(engine, opened.view, text, "with nothing pruned " if full else "")
        return opened.encode(encoding(show))


def _questions(request: _Request, system: str | None) -> list[str]:
    """All questions in order. One is read from stdin if none is given, none will be typed, and stdin is not the video."""
    questions = request.questions
    if request.interactive:
        check_terminal()
    elif not questions:
        if request.video == "-":
            raise UsageError("no question, and stdin is the video", 'cat clip.mp4 | evoprune ask - "What happens?"')
        questions = [_question_from_stdin()]
    if not all(q.strip() for q in questions):
        raise UsageError("the question is empty", USAGE)
    check_text(*questions, system)
    return questions


def _question_from_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no question", f"{USAGE}, or -i for a prompt")
    try:
        question = sys.stdin.read(LONGEST_QUESTION + 1)
    except UnicodeDecodeError as problem:
        raise UsageError("the question on stdin is not valid text", "write it in UTF-8") from problem
    if len(question) > LONGEST_QUESTION:
        raise UsageError(
            f"the question on stdin has more than {LONGEST_QUESTION:,} characters", "no model reads so much"
        )
    question = question.removeprefix("\ufeff").strip()
    if not question:
        raise UsageError("no question, and stdin is empty", USAGE)
    return question


def _local(request: _Request):
    from evoprune.video.source import local_file

    video, question = request.video, request.question
    if question and os.path.isfile(question) and not os.path.exists(video) and video != "-":
        raise VideoError(f"no such file: {video}", f"the video comes first: {USAGE}")
    return local_file(video)


def _check_flags(given: Mapping[str, Any]) -> "PipelineOptions":
    """The options of the pipeline, with everything checked that can be wrong with flags alone."""
    from evoprune.video.frames import choose_decoder

    options = opt.pipeline_options(given)
    choose_decoder(options.sampling.decoder)
    return options


def _check_video(path: str, sampling: "SamplingOptions") -> None:
    """Checks the video in milliseconds, before torch is imported or weights are read."""
    from evoprune.video.frames import choose_decoder
    from evoprune.video.info import AUTO_SUBTITLES, NO_SUBTITLES
    from evoprune.video.plan import MAX_VISUAL_TOKENS, VideoLimits, make_plan
    from evoprune.video.probe import probe, read_subtitles

    info = probe(path)
    choose_decoder(sampling.decoder, info)
    numbers = sampling.numbers
    if numbers["max_visual_tokens"] is None:
        numbers["max_visual_tokens"] = MAX_VISUAL_TOKENS
    make_plan(info, VideoLimits(), **numbers)
    if sampling.subtitles not in (NO_SUBTITLES, AUTO_SUBTITLES):
        read_subtitles(info, sampling.subtitles)


def _note_wait(engine, view, text: int, how: str) -> None:
    """How long it will take, if it is long. `text`: tokens of the prompt around the video."""
    from evoprune.pipeline.estimate import estimate_first_token

    wait = estimate_first_token(engine, view, text)
    if wait is not None and wait > LONG_WAIT_S:
        note(f"estimated first token {how}{roughly(wait)}")


def _note_limits(plan, sampling: "SamplingOptions") -> None:
    """Where fewer frames, or smaller ones, are looked at than the flags or the model's own rate ask for."""
    if sampling.max_frames is None and plan.sampling.wanted > plan.frame_limit:
        asked = sampling.frames is not None or sampling.fps is not None
        whence = "asked for" if asked else "at this model's rate"
        taken = f"reading {plan.frame_limit:,} of {plan.sampling.wanted:,} frames {whence}"
        tell(f"{taken} (--max-frames raises the limit)")
    if plan.token_capped:
        from evoprune.video.plan import MAX_VISUAL_TOKENS

        where = " on a CPU" if sampling.max_visual_tokens is None and plan.token_limit < MAX_VISUAL_TOKENS else ""
        seen = f"{plan.sampling.frames} frames of {plan.width}x{plan.height}"
        note(f"at most {plan.token_limit:,} tokens{where} (--max-visual-tokens): {seen}")
