"""`evoprune watch`: answers questions about a live video while it is running."""

import contextlib
import json as jsonlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import floor, inf
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.session import ModelOptions, PipelineOptions, PruneOptions, StreamOptions
from evoprune.util import check_text, clock, counted, missing_hint, parse_time, size
from evoprune.video import LiveSource, warm_up
from evoprune_cli import options as opt
from evoprune_cli.ask import Conversation, check_generation
from evoprune_cli.prompt import check_history, typed_questions, why_single_questions
from evoprune_cli.running import SOME_FAILED, load
from evoprune_cli.terminal import check_output, columns, note, print_error, print_titled, printable, progress, tell

if TYPE_CHECKING:
    from evoprune.session import Chat

MAX_LINE = 2**22  # maximum length of a question from a pipe, in bytes
TICK_S = 0.05
STATUS_S = 1.0
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class WatchArguments(opt.AnsweringArguments):
    """The arguments of `evoprune watch`."""

    source: opt.argument(
        str,
        "SOURCE",
        "An rtsp, http, udp or tcp URL, a camera (/dev/video0), a file, even while it is being written, or - for a pipe on stdin.",
    )
    question: opt.option(
        list[str] | None, "-Q --question TEXT", "Question to ask at the end of the source, or see --every; repeatable."
    ) = None
    every: opt.option(
        str | None,
        "--every TIME",
        "Ask -Q at this interval of source time, such as 30s. Files and downloads wait for "
        "the answer; for other sources, stderr reports which answers were skipped.",
    ) = None
    questions: opt.option(
        str | None,
        "--questions FILE",
        'Read questions from a pipe: JSON lines with "question" and optionally "id"; - for stdin.',
    ) = None
    history: opt.History = None
    pace: opt.option(
        str,
        "--pace",
        "source: frames as they arrive; file: at the pace of the file's timestamps.",
        "Source",
        **opt.one_of("source", "file"),
    ) = "source"
    timeout: opt.option(
        str, "--timeout TIME", "How long the source may be silent, or a file may not grow; at most 20s.", "Source"
    ) = "10s"
    reconnects: opt.option(
        int,
        "--reconnects",
        "Maximum number of consecutive attempts to reopen a URL or camera that ended or failed.",
        "Source",
    ) = 5


@opt.command(
    *StreamOptions.WATCHING,
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    "fps",
    "max_visual_tokens",
    *GenerationOptions.ANSWER,
    short="question every questions pace window_s memory_s model budget fps json quiet",
    offline={"help": "Never use the network, except for SOURCE."},
)
def watch(given: WatchArguments) -> int:
    """Ask about live video while it runs. Without -Q and --questions, questions are typed at a prompt.

    \b
    evoprune watch rtsp://camera.local/stream
    evoprune watch /dev/video0 -Q "Who is there?" --every 30s --json >> log.jsonl
    evoprune watch clip.mp4 --pace file -Q "What happened?"
    ffmpeg -i SOURCE -f mpegts - | evoprune watch - -Q "What happens?" --every 10s
    """
    asked = given.question or []
    check_output()
    warm_up()  # warms up while this process imports its dependencies
    # This checks the source, so that a wrong path is reported before a missing question.
    timeout_s = parse_time(given.timeout)
    source = LiveSource(given.source, given.pace, timeout_s, given.reconnects, _say_nothing if given.quiet else tell)
    every_s = _parse_interval(given.every, asked)
    _check(given, asked)
    pipeline = given.options.parse()
    check_text(*asked, pipeline.generation.system)
    check_generation(pipeline.generation, given.json)
    return _run(given, source, asked, every_s, pipeline)


def _parse_interval(every: str | None, asked: list[str]) -> float | None:
    """Return the interval between questions in seconds, or None if they are asked once."""
    if every and not asked:
        raise UsageError("--every needs a question", "add -Q TEXT")
    if every is None:
        return None
    every_s = parse_time(every)
    if every_s <= 0:
        raise UsageError(f"--every is {every}, not above 0", "give a time above 0")
    return every_s


def _check(given: WatchArguments, asked: list[str]) -> None:
    """Check that there are questions, and that they don't come from the same pipe as the video."""
    if given.questions == STDIN and given.source == STDIN:
        raise UsageError("standard input is both the video and the questions", "give one of them as a file")
    if not all(text.strip() for text in asked):
        raise UsageError("the question is empty", '-Q "What happens?"')
    prompt = _has_prompt(given)
    if prompt and (given.source == STDIN or sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError("no questions, and stdin is not a terminal", "use -Q TEXT --every 30s, or --questions FILE")
    if given.questions is not None:
        _check_questions(given.questions)
    check_history(given.history, prompt, hint="leave it out, or leave out -Q and --questions")


def _has_prompt(given: WatchArguments) -> bool:
    return not (given.question or given.questions)


def _run(
    given: WatchArguments, opened: LiveSource, asked: list[str], every_s: float | None, pipeline: PipelineOptions
) -> int:
    """Load the model, and answer questions while the source is being read. Returns the exit code."""
    speak = _say_nothing if given.quiet else tell
    prompt = _has_prompt(given)
    talk = Conversation([opened.name], given, interactive=prompt, several=len(asked) > 1)
    try:
        with progress(not given.quiet) as show:
            session = load(pipeline, show, given.quiet, streams=True)
        from evoprune.live import LiveFeed, VideoStream

        system = pipeline.generation.system
        stream = VideoStream(session, pipeline.stream, pipeline.sampling, system, opened.name)
        with LiveFeed(stream, opened, pipeline.stream.window_s, every_s or inf) as feed:
            with progress(not given.quiet) as show:
                show("waiting for a frame")
                while not feed.begun.wait(TICK_S):
                    pass
            feed.check()
            why_single = why_single_questions(given.history, session) if prompt else None
            chat = stream.chat(system) if prompt and why_single is None else None
            begin = partial(talk.begin, stream, pipeline.generation, None, chat)
            watching = _Watching(talk, begin, stream, feed, session.loaded.device, prompt, given.quiet, speak)
            if prompt:
                speak("Ask about the video so far. /help for help; q, Ctrl-D or Ctrl-C to end.")
                if why_single and given.history is None:
                    speak(f"Questions are independent: {why_single}.")
            code = watching.converse(chat) if prompt else watching.serve(asked, every_s, given.questions)
            feed.check()
            return code
    except BaseException as problem:
        if not talk.answered:
            talk.break_off(problem, asked)
        raise


def _say_nothing(text: str) -> None:
    pass


class _Watching:
    """Asks questions about a stream while it is being read.

    Ctrl-C stops the answer to a typed question. At any other time, it ends the command.
    """

    def __init__(
        self,
        talk: Conversation,
        begin: Callable[[], None],
        stream,
        feed,
        device: str,
        prompt: bool,
        quiet: bool,
        speak: Callable[[str], None],
    ):
        """Store everything needed to ask questions, without asking any yet.

        Args:
            begin: A function called when the first question is asked, so the stream's window can fill before then.
            prompt: Whether questions are typed at a prompt.
        """
        self._talk = talk
        self._begin = begin
        self._stream = stream
        self._feed = feed
        self._device = device
        self._prompt = prompt
        self._speak = speak
        self._failed = 0
        self._skips = False  # whether frames are being skipped
        self._status = not quiet and sys.stderr.isatty()
        # Time at which the last status line was printed, and whether the line is still visible.
        self._status_at = 0.0
        self._status_visible = False

    def converse(self, chat: "Chat | None") -> int:
        """Answer questions from the terminal until q or Ctrl-C ends the prompt, even after the video source has ended.

        `chat` is the conversation about the stream, or None if the questions are independent of each other.
        """
        questions = typed_questions(twice=False, chat=chat)
        while True:
            if self._status:
                note(self._state())
            if (question := next(questions, None)) is None:
                return 0
            self._answer(question, typed=True)

    def serve(self, asked: list[str], every_s: float | None, questions: str | None) -> int:
        """Answer questions from the command line and the pipe until no more can arrive, or the video source fails.

        After the end of a video, questions from the pipe are still answered. Returns the exit code.
        """
        lines = None if questions is None else _lines(questions)
        if every_s is not None:
            every_s = self._feasible_interval(every_s)
        next_s = every_s
        asked_s = -1.0
        answered_s = 0.0
        said_end = False
        while True:
            ended = self._feed.ended.wait(TICK_S)
            self._show_state()
            latest_s = self._feed.latest_s  # read this first, so that all earlier frames have been fed by then
            now_s = self._stream.until_s or 0.0
            due = next_s is not None and max(now_s, latest_s) >= next_s - self._feed.TOLERANCE_S
            new = now_s > asked_s
            if new and (due or ended):
                asked_s = now_s
                for question in asked:
                    self._answer(question)
            if due:
                until_s = now_s if new else latest_s
                over_s = max(next_s, floor(until_s / every_s) * every_s)
                self._report_skipped(next_s, over_s, every_s, new, next_s <= answered_s)
                answered_s = self._feed.latest_s
                next_s = over_s + every_s
                self._feed.ask_at(next_s)
            while lines and not lines.empty():
                if (line := lines.get()) is None:
                    lines = None
                else:
                    self._ask_line(line)
            if not (lines or (asked and not ended)) or (ended and self._feed.problem):
                self._clear()
                return SOME_FAILED if self._failed else 0
            if ended:
                if not said_end:
                    said_end = True
                    self._clear()
                    self._speak("the video has ended; waiting for more questions (Ctrl-C stops)")
                time.sleep(TICK_S)

    def _show_state(self) -> None:
        """Report if frames begin or cease to be skipped, and update the status line."""
        if (self._feed.backlog.stride > 1) != self._skips:
            self._skips = not self._skips
            if self._skips:
                self._warn("too slow for all frames: some are skipped at regular intervals")
            else:
                self._clear()
                self._speak("frames are no longer skipped")
        if self._status and time.monotonic() - self._status_at >= STATUS_S:  # overwrites the previous line
            self._status_at, self._status_visible = time.monotonic(), True
            _write(f"\r{self._state()}\x1b[K")

    def _feasible_interval(self, every_s: float) -> float:
        """Return the interval between questions.

        If the interval between sampled frames is longer, issue a warning and return it instead.
        """
        step_s = self._stream.step_s
        if step_s is None or every_s >= step_s:
            return every_s
        self._warn(f"one frame is sampled every {step_s:.3g} s (--fps), so -Q is not asked more often")
        self._feed.ask_at(step_s)
        return step_s

    def _report_skipped(self, first_s: float, over_s: float, every_s: float, asked: bool, busy: bool) -> None:
        """Report the number of repeated questions skipped from `first_s` to `over_s`, excluding `over_s` if `asked` is True.

        Args:
            busy: Whether the previous answer lasted until `first_s` or longer.
        """
        count = round((over_s - first_s) / every_s) + (not asked)
        if not count:
            return
        why = "no frame was sampled in between"
        if not asked:
            why = "no frame has arrived since the previous one"
        elif busy:
            why = "the video continued during the previous answer"
        last_s = first_s + (count - 1) * every_s
        when = f"at {clock(first_s)}"
        if count > 1:
            when = f"from {clock(first_s)} to {clock(last_s)}"
        self._warn(f"{counted(count, 'answer')} skipped, {when}: {why}")

    def _warn(self, text: str) -> None:
        self._clear()
        print_titled("warning:", text)

    def _ask_line(self, line: bytes) -> None:
        """Answer a question from the pipe. For an invalid line, print an error record and continue."""
        try:
            fields = jsonlib.loads(line)
            asked = fields.get("question") if isinstance(fields, dict) else None
            if not isinstance(asked, str) or not asked.strip():
                raise ValueError('no "question"')
            identity = fields.get("id")
            if identity is not None:
                if isinstance(identity, bool) or not isinstance(identity, str | int):
                    raise ValueError('"id" is neither text nor a whole number')
                identity = str(identity)
                identity.encode()  # fails if a surrogate has no partner
        except (ValueError, RecursionError) as problem:
            wrong = UsageError(f"a line of --questions is not a question: {problem}", '{"question": "What happens?"}')
            self._failed += 1
            self._clear()
            self._talk.break_off(wrong, [line.decode(errors="replace").rstrip("\n")])
            print_error(wrong.message, wrong.hint)
        else:
            self._answer(asked, identity=identity)

    def _answer(self, question: str, **kwargs) -> None:
        self._clear()
        if self._begin:
            self._begin()
            self._begin = None
        self._failed += not self._talk.attempt(question, **kwargs, goes_on=self._prompt)

    def _clear(self) -> None:
        if self._status_visible:
            self._status_visible = False
            _write("\r\x1b[K")

    def _state(self) -> str:
        from evoprune.backend import Device

        seen = self._stream.seen
        until_s = self._stream.until_s
        feed = self._feed
        backlog = self._feed.backlog
        said = f"{clock(until_s or 0.0)} seen"
        if backlog.skipped:
            said += f", {backlog.skipped:,} skipped"
        if backlog.stride > 1:
            said += f" (now {100 - 100 / backlog.stride:.0f}%)"
        if feed.problem:
            said += "; failed"
        elif feed.ended.is_set():
            said += "; ended"
        else:
            said += f"; lag {backlog.lag_s:.1f} s"
        if seen:
            said += f", {counted(seen.frames, 'frame')}, {counted(seen.tokens, 'token')}"
        return printable(f"{said}, {size(Device(self._device).memory_in_use()[0])}")[: columns() - 1]


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _check_questions(path: str) -> None:
    """Raise UsageError if a file of questions doesn't exist or can't be read. Pipes are not opened."""
    if path == STDIN:
        return
    if not os.path.exists(path):
        raise UsageError(f"no such file: {path}", missing_hint(path, "to read stdin: --questions -"))
    if os.path.isdir(path) or not os.access(path, os.R_OK):
        why = "it is a folder" if os.path.isdir(path) else "permission denied"
        raise UsageError(f"cannot read {path}: {why}", "to read stdin: --questions -")


def _lines(path: str) -> "queue.SimpleQueue[bytes | None]":
    """Return a queue that receives the nonempty lines from a pipe, followed by None at the end.

    The lines are read in a separate thread, which doesn't hold the locks of Python's streams while waiting.
    """
    pending: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        typed = path == STDIN
        name = sys.stdin.fileno() if typed else path
        with contextlib.suppress(OSError), open(name, "rb", closefd=not typed) as file:
            for line in filter(bytes.strip, iter(partial(file.readline, MAX_LINE), b"")):
                pending.put(line)
        pending.put(None)

    threading.Thread(target=read, daemon=True).start()
    return pending
