"""`evoprune ask`: videos and pictures, one question or several, the answers on stdout."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from evoprune.errors import UsageError, VideoError
from evoprune.session.options import PipelineOptions, SamplingOptions
from evoprune.text import check_text, missing_hint, roughly, shown
from evoprune.video.frames import local_file
from evoprune.video.sandbox.isolation import warm_up
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, check_terminal, converse
from evoprune_cli.loading import load
from evoprune_cli.options import flag, own
from evoprune_cli.terminal import check_output, encoding, note, note_subtitles, progress, tell

if TYPE_CHECKING:
    from evoprune.video.plan import Plan

STDIN = "-"
USAGE = 'evoprune ask video.mp4 "What happens?"'
# How paths look: a URL of data or of a place, the beginning of a path, or the ending of a file.
PATH = re.compile(r"data:\S*|\S+://\S+|(?:/|\.{1,2}/|~)\S*|\S*\.[A-Za-z0-9]{2,5}")
LONGEST_QUESTION = 2**22  # characters that are read from stdin, which may never end
LONG_WAIT_S = 5.0  # from here on the estimated wait is printed


@dataclass(frozen=True)
class Words:
    """The inputs, and the question if there is one among the words."""

    inputs: tuple[str, ...]
    question: str | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> "Words":
        """The last of several words is the question, unless there is such a file, or it looks like the name of one."""
        *before, last = words
        if before and not _exists(last) and not PATH.fullmatch(last):
            return cls(tuple(before), last)
        return cls(tuple(words))

    def check(self) -> None:
        """Raises VideoError or UsageError where one of several inputs is no file. A single one is checked when it is opened."""
        if self.inputs.count(STDIN) > 1:
            raise UsageError("standard input is there twice", "it can be read once")
        if len(self.inputs) == 1 and self.question is None and re.search(r"\s", self.inputs[0]):
            (only,) = self.inputs
            if not _exists(only) and not PATH.search(only):
                raise VideoError(f"no such file: {only}", f"the video comes first: {USAGE}")
        missing = [word for word in self.inputs if not _exists(word)] if len(self.inputs) > 1 else []
        if not missing:
            return
        name, last = missing[0], self.inputs[-1]
        if name == self.inputs[0] and not PATH.fullmatch(name):
            raise VideoError(f"no such file: {name}", f"videos and pictures come first: {USAGE}")
        if not PATH.fullmatch(name):
            words, hint = [*missing, *filter(None, [self.question])], f"quote the question: {USAGE}; a second one: -Q"
            if any(word.startswith("-") for word in words):
                hint = "what follows -- is no option: put options before it"
            raise UsageError(f"unexpected extra words: {' '.join(words)}", hint)
        question = f"; to ask it as a question: -Q {name}" if name == last and self.question is None else ""
        raise VideoError(f"no such file: {shown(name)}", missing_hint(name, f"check the path{question}"))


def _exists(word: str) -> bool:
    try:
        return word == STDIN or os.path.lexists(word)
    except ValueError:  # not a name that a file can have
        return False


@dataclass(frozen=True, kw_only=True)
class Request:
    words: opt.argument(
        list[str],
        "INPUT",
        "Videos and pictures (files, folders of frames, or - for stdin), then the question, quoted. "
        "Without a question or -Q, the question is read from stdin; otherwise only - reads it.",
    )
    more: list[str] | None = own("-Q --question TEXT", "A question; repeatable. All share one encoding.")
    interactive: bool = flag(
        "-i --interactive",
        "Ask further questions at a prompt: q or Ctrl-D ends it, Ctrl-C stops an answer. Needs a terminal, but no question.",
    )
    compare: bool = flag(
        "--compare",
        "Also answer with nothing pruned, and print both; with --json in the field `compare` of the same line.",
    )
    options: opt.MakeOptions
    json: opt.Json = False
    stats: opt.Stats = None
    quiet: opt.Quiet = False
    verbose: opt.Verbose = False
    cache: opt.Cache = False

    @cached_property
    def sorted_words(self) -> Words:
        return Words.of(self.words)

    @property
    def questions(self) -> list[str]:
        first = self.sorted_words.question
        return [*([] if first is None else [first]), *(self.more or [])]

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.sorted_words.inputs


@opt.with_options(*PipelineOptions.KINDS)
def ask(asked: Request) -> int:
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
    talk = Conversation(
        asked.inputs, asked, interactive=asked.interactive, several=asked.interactive or len(asked.questions) > 1
    )
    questions = asked.questions or [""]
    with ExitStack() as cleanup:
        try:
            check_output()
            asked.sorted_words.check()
            warm_up()  # while this process imports what it needs
            questions = _questions(asked)
            options = asked.options()
            from evoprune.video.frames import choose_decoder

            choose_decoder(options.sampling.decoder)
            check_text(*questions, options.generation.system)
            paths = [cleanup.enter_context(local_file(each)) for each in asked.inputs]
            _check_inputs(paths, options.sampling, asked.quiet)
            encode = partial(_encode, asked, options, paths, questions)
            with progress(not asked.quiet) as show:
                qa = load(options, show, asked.quiet)
                encoded = encode(qa.engine, show)
            encode_full = (lambda show: encode(qa.unpruned().engine, show, full=True)) if asked.compare else None
            talk.begin(encoded, options.generation, encode_full)
            if asked.interactive:
                converse(talk, questions, () if asked.quiet else asked.inputs)
            else:
                for question in questions:
                    talk.answer(question)
        except BaseException as problem:
            talk.break_off(problem, questions[talk.answered :])
            raise
    return 0


def _encode(
    asked: Request, options: PipelineOptions, paths: list[str], questions: list[str], engine, show, full: bool = False
):
    """Encodes the inputs at `paths`. First says on stderr which limits apply, and how long it will take if that is long."""
    from evoprune.session.cache import Cache
    from evoprune.session.encoding import open_inputs
    from evoprune.session.planning import QUESTION
    from evoprune.session.prompting import longest_prompt

    show("reading")
    sampling, cache = options.sampling, Cache() if asked.cache else None
    with closing(open_inputs(engine, paths, sampling, names=asked.inputs, cache=cache)) as opened:
        plans, text = opened.plans, QUESTION + sum(plan.subtitles.tokens for plan in opened.plans)
        if questions:
            text = longest_prompt(engine, plans, questions, options.generation)
        for plan in [] if asked.quiet or full else plans:
            _note_limits(plan.full, sampling)
            note_subtitles(plan.subtitles)
        if not asked.quiet and not opened.in_cache:
            _note_wait(engine, plans, text, "with nothing pruned " if full else "")
        return opened.encode(encoding(show))


def _questions(asked: Request) -> list[str]:
    """All questions in order. One is read from stdin if none is given, none will be typed, and stdin is not the video."""
    questions = asked.questions
    if asked.interactive:
        check_terminal()
    elif not questions:
        if STDIN in asked.inputs:
            raise UsageError("no question, and stdin is the video", 'cat clip.mp4 | evoprune ask - "What happens?"')
        questions = [_question_from_stdin(asked.inputs)]
    if not all(q.strip() for q in questions):
        raise UsageError("the question is empty", USAGE)
    return questions


def _question_from_stdin(inputs: Sequence[str]) -> str:
    """Raises UsageError: there is none; the last of several inputs may be meant as one."""
    *before, last = inputs
    named = f"there is a file {shown(last)}; to ask that as the question: -Q {shown(last)}" if before else ""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no question", named or f"{USAGE}, or -i for a prompt")
    try:
        question = sys.stdin.read(LONGEST_QUESTION + 1)
    except UnicodeDecodeError as problem:
        raise UsageError("the question on stdin is not valid text", "write it in UTF-8") from problem
    if len(question) > LONGEST_QUESTION:
        said = f"the question on stdin has more than {LONGEST_QUESTION:,} characters"
        raise UsageError(said, "no model reads so much")
    question = question.removeprefix("\ufeff").strip()
    if not question:
        raise UsageError("no question, and stdin is empty", named or USAGE)
    return question


def _check_inputs(paths: list[str], sampling: SamplingOptions, quiet: bool) -> None:
    """Checks the inputs in milliseconds, before torch is imported or weights are read."""
    from evoprune.video.frames import choose_decoder, probe, read_subtitles
    from evoprune.video.info import AUTO_SUBTITLES, NO_SUBTITLES, VIDEO, check_one_file, check_picture
    from evoprune.video.plan import InputLimits, make_plan

    check_one_file(sampling.subtitles, len(paths))
    found = [probe(path, folder_fps=sampling.frame_rate) for path in paths]
    videos = [info for info in found if info.kind == VIDEO]
    if not quiet and not videos and (sampling.fps or sampling.frames or sampling.max_frames):
        tell("note: --fps, --frames and --max-frames are about videos; a picture is read as it is")
    for info, wanted in zip(found, sampling.of_each(found), strict=True):
        check_picture(info, wanted.subtitles)
        choose_decoder(wanted.decoder, info)
        make_plan(info, InputLimits(), **wanted.numbers)
        if wanted.subtitles not in (NO_SUBTITLES, AUTO_SUBTITLES):
            read_subtitles(info, wanted.subtitles)


def _note_wait(engine, plans: list["Plan"], text: int, condition: str) -> None:
    """How long it will take, if it is long. `text`: tokens of the prompt around the inputs."""
    from evoprune.session.planning import estimate_first_token

    each = [estimate_first_token(engine, plan, 0 if number else text) for number, plan in enumerate(plans)]
    if None not in each and (wait := sum(each)) > LONG_WAIT_S:
        note(f"estimated first token {condition}{roughly(wait)}")


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
        seen = f"{plan.sampling.frames} frames" if plan.kind == VIDEO else "a picture"
        note(f"at most {plan.token_limit:,} tokens{where} (--max-visual-tokens): {seen} of {plan.width}x{plan.height}")
