"""`evoprune ask`: answers questions about videos and images, and prints the answers to stdout."""

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.report import Report, name_inputs, warned
from evoprune.session import ModelOptions, PipelineOptions, PruneOptions
from evoprune.util import PATH, check_text, clock, counted, is_url, listed, shown, without_password
from evoprune.video import SamplingOptions, local_file, probe, warm_up
from evoprune_cli import options as opt
from evoprune_cli.running import load, prepare
from evoprune_cli.terminal import (
    BEGAN_S,
    check_output,
    columns,
    downloading,
    encodable,
    encoding,
    failure,
    note,
    paint,
    print_error,
    print_json,
    print_stream,
    print_warning,
    printable,
    progress,
    tell,
)
from evoprune_cli.words import ASK, STDIN, check_folders, check_words, exists, split_words

if TYPE_CHECKING:
    from evoprune.session import Answer, Askable, Chat, EncodedInputs, ModelDescription, ReadAhead, Session
    from evoprune.video import Plan, Video
    from evoprune_cli.remote import RemoteAnswer, RemoteChat, RemoteInputs, Unpruned
    from evoprune_cli.show import Page

MAX_QUESTION = 2**22  # maximum number of characters to read from stdin, which may never reach end of file


@dataclass(frozen=True, kw_only=True)
class AskArguments(opt.AnsweringArguments):
    """The arguments of `evoprune ask`."""

    words: opt.argument(
        list[str],
        "INPUT",
        "Videos and images (files, folders of frames, URLs, or - for stdin), then the question in quotes. "
        "Without a question or -Q, the question is read from stdin.",
    )
    more: opt.option(
        list[str] | None,
        "-Q --question TEXT",
        "Question to ask; repeatable. Inputs are encoded once for all.",
    ) = None
    interactive: opt.option(
        bool,
        "-i --interactive",
        "Ask questions at a prompt: q or Ctrl-D ends it, Ctrl-C stops an answer. Needs a terminal; a question on the command "
        "line is optional.",
    ) = False
    history: opt.History = None
    compare: opt.option(
        bool,
        "--compare",
        "Also answer without pruning, and print both answers; with --json in the field `compare` of the same line.",
    ) = False
    show: opt.option(
        str | None,
        "--show FILE.html",
        "Write a web page with the answers, and the frames and what happened to their units.",
        opt.OUTPUT,
    ) = None
    cache: opt.Cache = False
    via: opt.Via = None


@opt.command(
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    *SamplingOptions.FILES,
    *GenerationOptions.ANSWER,
    short="more interactive compare model budget fps frames start_s end_s max_new_tokens json quiet verbose",
)
def ask(given: AskArguments) -> int:
    """Ask a question about videos or images. The answer goes to stdout, everything else to stderr.

    \b
    evoprune ask clip.mp4 "What happens?"
    evoprune ask clip.mp4 photo.jpg "Is this man in the video?"
    evoprune ask clip.mp4 "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune ask clip.mp4 -Q "Who is there?" -Q "What do they do?" -b fast
    evoprune ask photo.jpg "What does the sign say?" -b fast --compare
    evoprune ask clip.mp4 "What happens?" --show page.html
    evoprune ask clip.mp4 --interactive
    echo "What happens?" | evoprune ask clip.mp4 --json
    """
    inputs, question = split_words(given.words)
    asked = [*([] if question is None else [question]), *(given.more or [])]
    names = [without_password(path) for path in inputs]
    several = given.interactive or len(asked) > 1
    talk = Conversation(names, given, interactive=given.interactive, several=several)
    talk.questions = asked or [""]
    with contextlib.ExitStack() as cleanup, talk.recording_failures():
        check_output()
        check_words(inputs, question)
        if not given.via:
            warm_up()  # warms up while this process imports its dependencies
        talk.questions = _questions(inputs, asked, given.interactive)
        request = Request(inputs, names, talk.questions, _parse(given))
        page = None
        if given.show is not None:
            if given.via not in (None, "", "auto"):
                raise UsageError(
                    "--show draws what a model does here, and --via asks a server", "leave one of them out"
                )
            from evoprune_cli.show import Page

            page = Page(given.show, inputs)
            talk.on_report = page.add
        elif given.via and _ask_server(request, given, talk, cleanup):
            return 0
        checked = _check(request, given.quiet, cleanup)
        _run(request, checked, given, talk, cleanup, page)
    return 0


@dataclass(frozen=True)
class Request:
    """What to ask about which inputs, and how.

    Attributes:
        inputs: The inputs as typed.
        names: The inputs without passwords, for messages and records.
        questions: The questions, to which an interactive prompt appends.
        pipeline: The options that determine the answers.
    """

    inputs: Sequence[str]
    names: Sequence[str]
    questions: list[str]
    pipeline: PipelineOptions


@dataclass(frozen=True)
class Checked:
    """Inputs that can be read and fit into the context, found without torch and the weights.

    Attributes:
        paths: The inputs as local files.
        model: The model's description.
        download_s: Time to download the inputs, in seconds.
        description_s: Time to download the model's small files, in seconds, or 0 if the model is local.
    """

    paths: list[str]
    model: "ModelDescription"
    download_s: float
    description_s: float


def _parse(given: AskArguments) -> PipelineOptions:
    """Return the options that determine the answers, after checking their combinations."""
    if given.history:
        from evoprune_cli.prompt import check_history

        check_history(given.history, given.interactive, given.compare)
    pipeline = replace(given.options, check_model=not given.via).parse()
    check_generation(pipeline.generation, given.json or given.show is not None)
    return pipeline


def _ask_server(request: Request, given: AskArguments, talk: "Conversation", cleanup: contextlib.ExitStack) -> bool:
    """Answer the questions by asking a server (`--via`). Returns False if there isn't one and the model is to be loaded here."""
    from evoprune_cli.remote import LocalInput, RemoteInputs, set_options
    from evoprune_cli.via import find_server

    pipeline = request.pipeline
    sampling = pipeline.sampling
    with progress(not given.quiet) as show:
        server = find_server(given.via, given.options, {"--cache": given.cache}, show, given.quiet)
        if server is None:
            return False
        check_folders(request.inputs, request.questions or ["What happens?"], server.model)
        check_text(*request.questions, pipeline.generation.system)
        sampling.check_one_file(len(request.inputs))
        paths = [cleanup.enter_context(local_file(path, progress=downloading(show))) for path in request.inputs]
        files = [LocalInput(path, name, sampling) for path, name in zip(paths, request.names, strict=True)]
        options = set_options(given.options, pipeline)
        inputs = RemoteInputs(server, files, options, compare=given.compare)
        cleanup.callback(server.leave)
        cleanup.callback(inputs.close)
        # At a prompt, the server says first whether the questions form a conversation.
        first = "" if given.interactive else request.questions[0]
        inputs.encode(first, given.history == opt.ON, show)
        if not given.quiet:
            for line in [*_picture_notes(inputs.are_pictures, sampling), *inputs.notes]:
                tell(line)
    encode_full = inputs.unpruned if given.compare else None
    if given.interactive:
        single = inputs.why_single
        if given.history or given.compare:
            from evoprune_cli.prompt import why_single_questions

            single = why_single_questions(given.history, None, given.compare)
        chat = None if single else inputs.chat(pipeline.generation.system)
        talk.begin(inputs, pipeline.generation, encode_full, chat, inputs.agreement_of)
        _converse(request, talk, chat, [] if given.quiet else _greeting(request.names, single, given.history))
        return True
    talk.begin(inputs, pipeline.generation, encode_full, agreement=inputs.agreement_of)
    for question in request.questions:
        talk.answer(question)
    return True


def _picture_notes(pictures: bool, sampling: SamplingOptions) -> list[str]:
    """Return a note on options without effect if all inputs are images."""
    if pictures and (sampling.sets_frames or sampling.max_frames):
        return ["note: --fps, --frames and --max-frames have no effect on images"]
    return []


def _check(request: Request, quiet: bool, cleanup: contextlib.ExitStack) -> Checked:
    """Check everything that can be checked before loading the model. Downloads inputs from the web until `cleanup` ends."""
    from evoprune.session import describe, probed
    from evoprune.video import choose_decoder

    pipeline = request.pipeline
    sampling = pipeline.sampling
    check_folders(request.inputs, request.questions or ["What happens?"], pipeline.model.model)
    choose_decoder(sampling.decoder)
    check_text(*request.questions, pipeline.generation.system)
    began = time.perf_counter()
    with progress(not quiet and any(map(is_url, request.inputs))) as show:
        how = {"offline": pipeline.model.offline, "progress": downloading(show)}
        paths = [cleanup.enter_context(local_file(path, **how)) for path in request.inputs]
    downloaded = time.perf_counter()
    infos = [probed(path, folder_fps=sampling.frame_rate) for path in paths]
    probed_at = time.perf_counter()
    model = describe(pipeline.model)
    description_s = 0.0 if pipeline.model.local_folder() else time.perf_counter() - probed_at
    _check_inputs(infos, model, sampling, quiet)
    return Checked(paths, model, downloaded - began, description_s)


def _run(
    request: Request,
    checked: Checked,
    given: AskArguments,
    talk: "Conversation",
    cleanup: contextlib.ExitStack,
    page: "Page | None" = None,
) -> None:
    """Load the model while the inputs are being read, encode the inputs, and answer the questions.

    The page of --show is written at the end, even if the questions are interrupted.
    """
    from evoprune.session import ReadAhead

    pipeline = request.pipeline
    asked = (
        [] if given.cache else [(checked.paths, pipeline.sampling)]
    )  # with the disk cache, there may be nothing to read
    ahead = cleanup.enter_context(ReadAhead(checked.model, asked, pipeline.pruning))
    encode = partial(_encode, request, checked.paths, given.cache, given.quiet)
    with progress(not given.quiet) as show:
        if page:
            show("loading model")
            prepare()
            page.check(pipeline.pruning.config())
        session = _load(pipeline, checked, given.quiet, show)
        if given.history == opt.ON:
            session.pruning.method.check_conversation()
        encoded = encode(session, show, ahead=ahead, page=page)
    ahead.close()
    if page:
        cleanup.callback(_write_page, page, given)
    encode_full = (lambda show: encode(session.unpruned(), show, full=True)) if given.compare else None
    agreement = partial(_agreement, encoded, pipeline.generation)
    if given.interactive:
        from evoprune_cli.prompt import why_single_questions

        why_single = why_single_questions(given.history, session, given.compare)
        chat = encoded.chat(pipeline.generation.system) if why_single is None else None
        talk.begin(encoded, pipeline.generation, encode_full, chat, agreement)
        greeting = [] if given.quiet else _greeting(request.names, why_single, given.history)
        _converse(request, talk, chat, greeting, session.loaded.packing.meanwhile)
        return
    talk.begin(encoded, pipeline.generation, encode_full, agreement=agreement)
    for question in request.questions:
        talk.answer(question, last=len(request.questions) == 1 and not given.compare)


def _write_page(page: "Page", given: AskArguments) -> None:
    if page.write() and not given.quiet:
        tell(f"page: {shown(given.show)}")


def _load(pipeline: PipelineOptions, checked: Checked, quiet: bool, show: Callable[..., None]) -> "Session":
    """Load the model. The model's small files, which may have been downloaded, are part of the load time."""
    session = load(pipeline, show, quiet, model=checked.model)
    load_s = (session.load_seconds or 0.0) + checked.description_s
    startup_s = time.perf_counter() - BEGAN_S - checked.download_s - load_s
    return replace(session, load_seconds=load_s, startup_seconds=startup_s)


def _greeting(names: Sequence[str], why_single: str | None, history: str | None) -> list[str]:
    """Return the lines printed before the interactive prompt."""
    files = listed([os.path.basename(os.path.abspath(path)) for path in names])
    lines = [f"Ask about {files}. /help for help, q or Ctrl-D to end."]
    if why_single and history is None:
        lines.append(f"Questions are independent: {why_single}.")
    return lines


def _agreement(
    encoded: "EncodedInputs", generation: GenerationOptions, full: "EncodedInputs", question: str, answer: "Answer"
) -> dict[str, Any]:
    """Compare the answer about the inputs without pruning (`full`) with the predictions for the pruned inputs (`encoded`)."""
    from evoprune.bench import Reference

    return Reference.of_answer(full, question, answer, generation).agreement(encoded).record()


def _converse(
    request: Request,
    talk: "Conversation",
    chat: "Chat | RemoteChat | None",
    greeting: Sequence[str],
    meanwhile: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> None:
    """Answer the questions from the command line, and then typed questions. For `meanwhile`, see `typed_questions`."""
    from evoprune_cli.prompt import typed_questions

    for question in [*request.questions]:
        talk.attempt(question)
    for line in greeting:
        tell(line)
    for question in typed_questions(meanwhile=meanwhile, chat=chat):
        request.questions.append(question)
        talk.attempt(question, typed=True)


def check_generation(generation: GenerationOptions, json: bool) -> None:
    """Raise UsageError for --logprobs without --json, or for `--choices options`, which is only supported by `evoprune batch`."""
    if generation.choices_from_rows:
        raise UsageError("--choices options works only in a batch", "give two or more texts")
    if generation.logprobs is not None and not json:
        raise UsageError("--logprobs works only with JSON records", "add --json")


def _encode(
    request: Request,
    paths: list[str],
    cache: bool,
    quiet: bool,
    session: "Session",
    show: Callable[..., None],
    full: bool = False,
    ahead: "ReadAhead | None" = None,
    page: "Page | None" = None,
) -> "EncodedInputs":
    """Encode the inputs at `paths`, after reporting the limits that apply to them on stderr."""
    from evoprune.session import open_inputs

    show("reading")
    sampling = request.pipeline.sampling
    stored = None
    if cache:
        from evoprune.session import Cache

        stored = Cache()
    step = encoding(show)
    given = {"names": request.names, "cache": stored, "ahead": ahead, "progress": step}
    if page:
        if stored and not quiet:
            tell("note: with --show, the inputs are encoded again, and --cache has no effect")
        given |= {"cache": None, "frames": page.frames, "tower": page.tower}
        step = page.watching(step)
    with contextlib.closing(open_inputs(session, paths, sampling, **given)) as opened:
        plans = opened.plans
        if request.questions:
            with opened.planning():
                session.longest_prompt(plans, request.questions, request.pipeline.generation)
        if not quiet and not full:
            for plan in plans:
                for line in notes_about(plan, sampling):
                    tell(line)
        encoded = opened.encode(step)
        if page:
            page.encoded(plans)
        return encoded


def _questions(inputs: Sequence[str], given: list[str], interactive: bool) -> list[str]:
    """Return all questions in order. If there is neither -Q nor a prompt, read one from stdin, unless stdin is the video.

    Raises:
        VideoError: If there is no question on the command line, and an input doesn't exist.
        UsageError: If there is no question, a question is empty, or -i is used without a terminal.
    """
    if interactive:
        if sys.stdin is None or not sys.stdin.isatty():
            message = "--interactive reads questions from a terminal, but stdin is not one"
            raise UsageError(message, "to ask several questions at once, repeat -Q")
    elif not given:
        for path in inputs:
            if not exists(path):
                probe(path)  # raises the error about the path, which is reported before the missing question
        if STDIN in inputs:
            raise UsageError("no question, and stdin is the video", 'cat clip.mp4 | evoprune ask - "What happens?"')
        given = [_question_from_stdin(inputs)]
    if not all(q.strip() for q in given):
        raise UsageError("the question is empty", _usage(inputs))
    return given


def _usage(inputs: Sequence[str]) -> str:
    """Return an example command for a hint, using the user's own inputs if they exist."""
    if not all(map(exists, inputs)):
        return ASK
    names = " ".join(shlex.quote(without_password(shown(path))) for path in inputs)
    question = "What happens?" if len(inputs) == 1 else "What differs?"
    return f'evoprune ask {names} "{question}"'


def _question_from_stdin(inputs: Sequence[str]) -> str:
    """Read the question from stdin.

    Raises:
        UsageError: If stdin contains no question. If the last input may have been intended as the question, the hint says so.
    """
    *before, last = inputs
    named = ""
    if before and not PATH.fullmatch(last):
        named = f"{shown(last)} is a file; to ask it as a question: -Q {shown(last)}"
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no question", named or f"{_usage(inputs)}, or -i for a prompt")
    try:
        question = sys.stdin.read(MAX_QUESTION + 1)
    except UnicodeDecodeError as problem:
        raise UsageError("the question on stdin is not valid text", "write it in UTF-8") from problem
    if len(question) > MAX_QUESTION:
        message = f"the question on stdin has more than {MAX_QUESTION:,} characters"
        raise UsageError(message, "shorten it: no model reads that much")
    question = question.removeprefix("\ufeff").strip()
    if not question:
        raise UsageError("no question, and stdin is empty", named or _usage(inputs))
    return question


def _check_inputs(infos: "list[Video]", model: "ModelDescription", sampling: SamplingOptions, quiet: bool) -> None:
    """Plan how to read the inputs, so errors are detected within milliseconds, before torch and the weights are loaded.

    For the exceptions, see `ModelDescription.plan`.
    """
    from evoprune.video import read_subtitles

    sampling.check_one_file(len(infos))
    for line in [] if quiet else _picture_notes(all(info.is_picture for info in infos), sampling):
        tell(line)
    for info, wanted in zip(infos, sampling.of_each(infos), strict=True):
        wanted.check_picture(info)
        model.plan(info, wanted)
        if wanted.subtitle_file:
            read_subtitles(info, wanted.subtitles)


def notes_about(plan: "Plan", sampling: SamplingOptions) -> list[str]:
    """Return notes about how an input is read: its limits, and its subtitles."""
    return [*_limit_notes(plan.full, sampling), *_subtitle_notes(plan)]


def _limit_notes(plan: "Plan", sampling: SamplingOptions) -> Iterator[str]:
    """Yield a note if fewer or smaller frames are read than requested by the options or the model's frame rate."""
    if sampling.max_frames is None and plan.sampling.wanted > plan.frame_limit:
        every_s = plan.sampling.seconds_per_frame
        every = f"{every_s:,.0f} s" if every_s >= 100 else f"{every_s:.3g} s"
        wanted = "requested frames" if plan.limited else "frames at the model's rate"
        read = f"{plan.sampling.frames:,} of {plan.sampling.wanted:,} {wanted}"
        yield f"limited to {read}, one every {every} (--max-frames)"
    if plan.token_capped:
        most = f"{plan.token_limit:,} tokens"
        if sampling.max_visual_tokens is None and plan.token_limit < sampling.MAX_VISUAL_TOKENS:
            most += " on a CPU"
        seen = "an image" if plan.is_picture else f"{plan.sampling.frames} frames"
        yield f"limited to {most} (--max-visual-tokens): {seen} of {plan.width}x{plan.height}"


def _subtitle_notes(plan: "Plan") -> Iterator[str]:
    """Yield a note with the subtitle source and line count, or the reason why no subtitles are read."""
    lines = plan.subtitles
    if lines.source is None:
        if lines.note:
            yield f"note: no subtitles: {lines.note}"
        return
    read = counted(lines.lines, "line")
    if lines.lines_in_prompt < lines.lines:
        read = f"{lines.lines_in_prompt:,} of {read} (--max-subtitle-tokens)"
    yield f"{'speech' if lines.speech else 'subtitles'}: {lines.speech or lines.source}, {read}"


class Conversation:
    """Asks questions about encoded inputs and prints the answers.

    The object keeps track of answered questions, so only unanswered questions are reported after an interruption. Statistics are
    printed unless --json or -q is given: a block for the first answer, and a single line for each later answer. At an interactive
    prompt, each answer gets a single line.

    Attributes:
        questions: All questions so far.
        answered: The number of questions answered or failed so far.
        on_report: Called with the report of each finished or interrupted answer, or None.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        given: opt.AnsweringArguments,
        *,
        interactive: bool,
        several: bool,
    ):
        """Store the options of the command. `inputs` are display names, and `several` is True for more than one question."""
        self._show_thoughts = given.show_thoughts
        self.questions = [""]
        self.answered = 0
        self.on_report: Callable[[Report], None] | None = None
        self._names = inputs
        self._json = given.json
        self._verbose = given.verbose
        self._quiet = given.quiet
        plain = not given.json and not given.quiet
        self._echo = several and plain and sys.stderr.isatty()  # echo questions from the command line on stderr
        self._blocks = 0 if interactive else 1  # number of answers with a stats block; later answers get a single line
        if given.verbose or given.stats:
            self._blocks = math.inf
        stats = plain if given.stats is None else given.stats
        self._stats = stats or (given.verbose and not given.quiet)
        self._generation: GenerationOptions | None = None
        self._inputs: EncodedInputs | RemoteInputs | None = None
        self._chat: Chat | RemoteChat | None = None  # set if the questions form a conversation
        self._full: EncodedInputs | Unpruned | None = None
        self._encode_full: Callable[..., EncodedInputs | Unpruned] | None = None
        self._running: Answer | RemoteAnswer | None = None  # the answer being generated
        self._half: Report | None = None  # report of a question with only its pruned answer so far
        self._warned: set[str] = set()  # names of warnings already printed
        self._finished = 0  # answers printed so far

    def begin(
        self,
        inputs: "EncodedInputs | RemoteInputs",
        generation: GenerationOptions,
        encode_full: Callable[..., "EncodedInputs | Unpruned"] | None,
        chat: "Chat | RemoteChat | None" = None,
        agreement: Callable[..., dict[str, Any] | None] = lambda full, question, answer: None,
    ) -> None:
        """Set the encoded inputs, and print any warnings about the inputs and the model.

        Args:
            encode_full: A function that encodes the inputs again without pruning, or None if answers are not compared.
            chat: The conversation about the inputs, or None if the questions are independent of each other.
            agreement: A function that compares the answer without pruning with the predictions for the pruned inputs. Its arguments
                are the inputs without pruning, the question, and the answer.
        """
        self._chat, self._agreement = chat, agreement
        self._inputs, self._generation, self._encode_full = inputs, generation, encode_full
        _print_warnings(inputs.report)
        self._warned = set(inputs.report.warnings)
        if self._verbose and not self._quiet and inputs.ignores_sound:
            print_warning("sound_ignored", inputs.report.video)
            self._warned.add("sound_ignored")

    def answer(self, question: str, typed: bool = False, identity: str | None = None, last: bool = False) -> None:
        """Ask a question and print the answer.

        Args:
            typed: Whether the user typed the question at a prompt, so it is already visible on the terminal.
            identity: An ID for the question's record, or None.
            last: Whether no other question about the inputs follows.
        """
        if self._echo and not typed:
            from evoprune_cli.prompt import PROMPT

            tell(f"{PROMPT}{' '.join(question.split())}")
        report = self._ask_and_print(self._chat or self._inputs, question, "pruned", last).report
        report.id = identity or report.id
        if self._encode_full:
            self._half = report
            if self._full is None:  # encoded here so that the first pruned answer doesn't wait for it
                with progress(not self._quiet) as show:
                    self._full = self._encode_full(show)
            answer = self._ask_and_print(self._full, question, "full")
            report.compare, self._half = answer.report, None
            report.agreement = self._agreement(self._full, question, answer)
        self.answered += 1  # counted before printing, so an interruption doesn't print the record twice
        self._finish(report)

    def attempt(self, question: str, typed: bool = False, identity: str | None = None, goes_on: bool = True) -> bool:
        """Answer a question, printing usage errors instead of raising them. If `goes_on` is True, Ctrl-C isn't raised either.

        Returns:
            False if a usage error prevented the answer.
        """
        before = self.answered
        messages = self._chat.messages if self._chat else None
        try:
            self.answer(question, typed, identity)
        except UsageError as problem:
            self.break_off(problem, [question])
            print_error(problem.message, problem.hint)
            return False
        except BaseException as problem:
            unanswered = [question]
            if self.answered != before:
                unanswered = []
            self.break_off(problem, unanswered)
            if not (goes_on and isinstance(problem, KeyboardInterrupt)):
                raise
            note()  # starts a new line after the ^C printed by the terminal
            if self._chat and self._chat.messages == messages and not self._quiet:
                tell("The stopped answer and its question were removed.")
        return True

    @contextlib.contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Call `break_off` for all unanswered questions if the block fails or is interrupted."""
        try:
            yield
        except BaseException as problem:
            self.break_off(problem, self.questions[self.answered :])
            raise

    def break_off(self, problem: BaseException, unanswered: list[str]) -> None:
        """Print statistics after a failure and, with --json, an error record for each unanswered question."""
        if isinstance(problem, BrokenPipeError | SystemExit) or not unanswered:
            return
        interrupted = not isinstance(problem, Exception)
        running = self._running
        self._running = None
        if running:
            running.close()  # a server would otherwise go on with it
        report = running.report if interrupted and running else None
        if self._half:
            report = report or self._failure(unanswered[0], problem)
        if report:
            report.finish_reason = "interrupt" if interrupted else "error"
        if self._half:
            self._half.compare = report
            report = self._half
            self._half = None
        self.answered += len(unanswered)
        if report:
            unanswered = unanswered[1:]
        if report and interrupted:
            self._finish(report)
        elif report and self._json:
            print_json(report)
        if self._json:
            for missing in unanswered:
                print_json(self._failure(missing, problem))
            problem.reported = True

    def _ask_and_print(
        self,
        inputs: "Askable | Chat | RemoteInputs | RemoteChat | Unpruned",
        question: str,
        label: str,
        last: bool = False,
    ) -> "Answer | RemoteAnswer":
        with contextlib.ExitStack() as line:  # the progress line

            def think(piece: str) -> None:
                if self._show_thoughts:
                    line.close()
                    note(paint(encodable(piece), "2"), end="")
                else:
                    show("thinking")

            answer = self._running = inputs.ask(question, on_thoughts=think, last=last, **vars(self._generation))
            new = [name for name in answer.report.warnings if name not in self._warned]
            _print_warnings(answer.report, new)
            self._warned.update({*new} - {"history_cut"})  # repeat this warning whenever earlier turns are omitted
            show = line.enter_context(progress(not self._quiet))
            show("reading prompt")
            try:
                first = next(answer, "")
            finally:
                if self._show_thoughts and answer.report.thoughts:
                    note()
        if (seen := answer.report.stream) and not (self._json or self._quiet):
            tell(f"up to {clock(seen['end_s'])}:")
        if self._json:
            for _ in answer:
                pass
        else:
            if self._encode_full:
                first = f"{label}: {first}"
            print_stream(chain([first], answer))
        self._running = None
        return answer

    def _finish(self, report: Report) -> None:
        if self.on_report:
            self.on_report(report)
        if self._json:
            print_json(report)
        else:
            names = {"answer_cut", "thoughts_cut", "thoughts_only"}
            cut = [record for record in (report, report.compare) if record and names & {*record.warnings}]
            for record in cut[:1]:
                _print_warnings(record, [*names])
        self._finished += 1
        if not self._stats:
            return

        from evoprune import statistics

        if self._finished <= self._blocks:
            note()
            for line in statistics.stats_block(report, columns(), self._verbose):
                note(paint(printable(line), "2"))
        elif report.compare:
            tell(f"pruned: {statistics.summary(report)}")
            tell(f"full: {statistics.summary(report.compare)}")
        else:
            tell(statistics.summary(report))

    def _failure(self, question: str, problem: BaseException) -> Report:
        """Return the record of a question left unanswered because of `problem`."""
        reason = "error" if isinstance(problem, Exception) else "interrupt"
        report = Report(question=question, finish_reason=reason, error=failure(problem))
        name_inputs(report, self._names)
        return report


def _print_warnings(report: Report, names: Sequence[str] | None = None) -> None:
    """Print a report's warnings: input warnings first, then model warnings.

    If `names` is given, only warnings with these names are printed.
    """
    for name, video in warned(report):
        if name != "limited" and (names is None or name in names):  # a note has already described the limit
            print_warning(name, video)
