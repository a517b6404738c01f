"""`evoprune ask`: videos and pictures, one question or several, the answers on stdout."""

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import PipelineOptions, SamplingOptions
from evoprune.text import check_text, roughly
from evoprune.video.sandbox.isolation import warm_up
from evoprune.video.source import local_file
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, Output
from evoprune_cli.imports import without_collections
from evoprune_cli.interactive import check_terminal, converse
from evoprune_cli.terminal import (
    check_output,
    encoding,
    note,
    note_bits,
    note_subtitles,
    note_tuning,
    progress,
    tell,
)
from evoprune_cli.words import STDIN, USAGE, Words

if TYPE_CHECKING:
    from evoprune.video.info import Video
    from evoprune.video.plan import Plan

LONGEST_QUESTION = 2**22  # characters that are read from stdin, which may never end
LONG_WAIT_S = 5.0  # from here on the estimated wait is printed


@opt.with_options(*PipelineOptions.KINDS)
def ask(
    *,
    words: opt.Inputs,
    more: opt.MoreQuestions = None,
    interactive: opt.Interactive = False,
    compare: opt.Compare = False,
    options: opt.MakeOptions,
    json: opt.Json = False,
    stats: opt.Stats = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    cache: opt.Cache = False,
) -> int:
    """Ask a question about videos or pictures. The answer goes to stdout, everything else to stderr.

    \b
    evoprune ask clip.mp4 "What happens?"
    evoprune ask clip.mp4 photo.jpg "Is this man in the video?"
    evoprune ask clip.mp4 "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune ask clip.mp4 -Q "Who is there?" -Q "What do they do?" -b fast
    evoprune ask photo.jpg "What does the sign say?" -b fast --compare
    evoprune ask clip.mp4 --interactive
    echo "What happens?" | evoprune ask clip.mp4 --json
    """
    request = _Request(Words.of(words), more or [], interactive, compare, cache, quiet)
    several = interactive or len(request.questions) > 1
    _run(request, Output.of(json, stats, verbose, quiet, interactive=interactive, several=several), options)
    return 0


@dataclass(frozen=True)
class _Request:
    """What is asked, besides the options of the pipeline and of the output."""

    words: Words
    more: list[str]
    interactive: bool
    compare: bool
    cache: bool
    quiet: bool

    @property
    def questions(self) -> list[str]:
        """Those of the command line, in order."""
        return [*([self.words.question] if self.words.question is not None else []), *self.more]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files, folders or - for stdin, as they were given."""
        return self.words.inputs


def _run(request: _Request, output: Output, typed: opt.MakeOptions) -> None:
    """Answers all questions. Where something goes wrong, prints what there is, and raises it."""
    talk, questions = Conversation(request.inputs, output), request.questions or [""]
    with ExitStack() as cleanup:
        try:
            check_output()
            request.words.check()
            warm_up()  # while this process imports what it needs
            questions = _questions(request)
            options = _check_flags(typed)
            check_text(*questions, options.generation.system)
            paths = [cleanup.enter_context(local_file(each)) for each in request.inputs]
            _check_inputs(paths, options.sampling, request.quiet)
            _encode_into(talk, paths, request, questions, options)
            if request.interactive:
                converse(talk, questions, () if request.quiet else request.inputs)
                return
            for question in questions:
                talk.answer(question)
        except BaseException as problem:
            talk.break_off(problem, questions[talk.answered :])
            raise


def _encode_into(
    talk: Conversation, paths: list[str], request: _Request, questions: list[str], options: PipelineOptions
) -> None:
    """Loads the model, encodes the inputs, and hands them to the conversation."""
    with progress(not request.quiet) as show:
        check_libraries()
        with without_collections():
            from evoprune.pipeline.video_qa import VideoQA

        show("loading model")
        qa = VideoQA.load(loading=options.model, pruning=options.pruning, progress=partial(show, "quantizing"))
        if not request.quiet:
            note_tuning(qa.engine)
            note_bits(qa.engine)
        encoded = _encode(qa.engine, paths, request, questions, options, show)

    def encode_full(show):
        return _encode(qa.unpruned().engine, paths, request, questions, options, show, full=True)

    talk.begin(encoded, options.generation, encode_full if request.compare else None)


def _encode(
    engine,
    paths: list[str],
    request: _Request,
    questions: list[str],
    options: PipelineOptions,
    show,
    full: bool = False,
):
    """The inputs, encoded; first says on stderr which limits apply, and how long it will take if that is long."""
    from evoprune.pipeline.cache import Cache
    from evoprune.pipeline.opening import open_inputs
    from evoprune.pipeline.planning import QUESTION
    from evoprune.pipeline.prompting import longest_prompt

    show("reading")
    sampling, cache = options.sampling, Cache() if request.cache else None
    with closing(open_inputs(engine, paths, sampling, names=request.inputs, cache=cache)) as opened:
        plans = opened.plans
        said = sum(plan.subtitles.tokens for plan in plans)
        text = longest_prompt(engine, plans, questions, options.generation) if questions else QUESTION + said
        if not request.quiet:
            if not full:
                for plan in plans:
                    _note_limits(plan.full, sampling)
                    note_subtitles(plan.subtitles)
            if not opened.in_cache:
                _note_wait(engine, plans, text, "with nothing pruned " if full else "")
        return opened.encode(encoding(show))


def _questions(request: _Request) -> list[str]:
    """All questions in order. One is read from stdin if none is given, none will be typed, and stdin is not the video."""
    questions = request.questions
    if request.interactive:
        check_terminal()
    elif not questions:
        if STDIN in request.inputs:
            raise UsageError("no question, and stdin is the video", 'cat clip.mp4 | evoprune ask - "What happens?"')
        questions = [_question_from_stdin()]
    if not all(q.strip() for q in questions):
        raise UsageError("the question is empty", USAGE)
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


def _check_flags(typed: opt.MakeOptions) -> PipelineOptions:
    """The options of the pipeline, with everything checked that can be wrong with flags alone."""
    from evoprune.video.frames import choose_decoder

    options = typed()
    choose_decoder(options.sampling.decoder)
    return options


def _check_inputs(paths: list[str], sampling: SamplingOptions, quiet: bool) -> None:
    """Checks the inputs in milliseconds, before torch is imported or weights are read."""
    from evoprune.video.info import VIDEO, check_one_file
    from evoprune.video.probe import probe

    check_one_file(sampling.subtitles, len(paths))
    found = [probe(path) for path in paths]
    videos = [info for info in found if info.kind == VIDEO]
    if not quiet and not videos and (sampling.fps or sampling.frames or sampling.max_frames):
        tell("note: --fps, --frames and --max-frames are about videos; a picture is read as it is")
    for info, wanted in zip(found, sampling.of_each(found), strict=True):
        _check_input(info, wanted)


def _check_input(info: "Video", sampling: SamplingOptions) -> None:
    from evoprune.video.frames import choose_decoder
    from evoprune.video.info import AUTO_SUBTITLES, NO_SUBTITLES, check_picture
    from evoprune.video.plan import InputLimits, make_plan
    from evoprune.video.probe import read_subtitles

    check_picture(info, sampling.subtitles)
    choose_decoder(sampling.decoder, info)
    make_plan(info, InputLimits(), **sampling.numbers)
    if sampling.subtitles not in (NO_SUBTITLES, AUTO_SUBTITLES):
        read_subtitles(info, sampling.subtitles)


def _note_wait(engine, plans: list["Plan"], text: int, how: str) -> None:
    """How long it will take, if it is long. `text`: tokens of the prompt around the inputs."""
    from evoprune.pipeline.planning import estimate_first_token

    each = [estimate_first_token(engine, plan, 0 if number else text) for number, plan in enumerate(plans)]
    if None not in each and (wait := sum(each)) > LONG_WAIT_S:
        note(f"estimated first token {how}{roughly(wait)}")


def _note_limits(plan: "Plan", sampling: SamplingOptions) -> None:
    """Where fewer frames, or smaller ones, are looked at than the flags or the model's own rate ask for."""
    if sampling.max_frames is None and plan.sampling.wanted > plan.frame_limit:
        asked = sampling.frames is not None or sampling.fps is not None
        wanted = f"the {plan.sampling.wanted:,} asked for" if asked else f"the model's {plan.sampling.wanted:,}"
        every = roughly(plan.sampling.seconds_per_frame)
        tell(f"reading {plan.frame_limit:,} frames, one every {every}, not {wanted} (--max-frames)")
    if plan.token_capped:
        from evoprune.video.info import VIDEO
        from evoprune.video.plan import MAX_VISUAL_TOKENS

        where = " on a CPU" if sampling.max_visual_tokens is None and plan.token_limit < MAX_VISUAL_TOKENS else ""
        frames = f"{plan.sampling.frames} frames" if plan.kind == VIDEO else "a picture"
        seen = f"{frames} of {plan.width}x{plan.height}"
        note(f"at most {plan.token_limit:,} tokens{where} (--max-visual-tokens): {seen}")
