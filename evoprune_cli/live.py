"""`evoprune watch`: live video, and questions about it while it runs. A module may not have the command's name (docs/house.md)."""

import contextlib
import json as jsonlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import floor

from evoprune.errors import UsageError
from evoprune.live.source import FROM_SOURCE, PACES, STDIN, LiveSource
from evoprune.session.options import PipelineOptions, StreamOptions
from evoprune.text import check_text, clock, counted, size
from evoprune.video.plan import parse_time
from evoprune.video.sandbox.isolation import warm_up
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, answer, typed
from evoprune_cli.loading import load
from evoprune_cli.options import own
from evoprune_cli.results import SOME_FAILED
from evoprune_cli.terminal import check_output, columns, note, print_error, printable, progress, tell

LEFT_OUT = ("frames", "start_s", "end_s", "max_frames", "frame_rate", "decoder", "subtitles", "max_subtitle_tokens")
LONGEST_LINE = 2**22  # bytes of a question
TICK_S, STATUS_S = 0.05, 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    source: opt.argument(
        str,
        "SOURCE",
        "An rtsp, http, udp or tcp URL, a camera (/dev/video0), a file, also one that grows, or - for a pipe on stdin.",
    )
    question: list[str] | None = own(
        "-Q --question TEXT", "A question at the end of the source, or see --every; repeatable."
    )
    every: str | None = own("--every TIME", "Ask -Q each time so much of the source was seen: 30s.")
    questions: str | None = own(
        "--questions FILE", 'Questions from a pipe: JSON lines with "question", perhaps "id"; - for stdin.'
    )
    pace: str = own(
        "--pace",
        "source: frames as they come; file: at the pace of a file's own times.",
        default=FROM_SOURCE,
        **completion.one_of(*PACES),
    )
    timeout: str = own(
        "--timeout TIME", "How long the source may be silent, and a file take to grow, at most 20s.", default="10s"
    )
    reconnects: int = own(
        "--reconnects", "How often in a row a URL or camera that ended or failed is tried again.", default=5
    )
    options: opt.MakeOptions
    json: opt.Json = False
    stats: opt.Stats = None
    quiet: opt.Quiet = False
    verbose: opt.Verbose = False

    @property
    def asked(self) -> list[str]:
        return self.question or []

    @property
    def prompt(self) -> bool:
        return not (self.question or self.questions)

    @cached_property
    def every_s(self) -> float | None:
        return None if self.every is None else parse_time(self.every)

    def speak(self, text: str) -> None:
        if not self.quiet:
            tell(text)


@opt.with_options(StreamOptions, *PipelineOptions.KINDS, without=LEFT_OUT, panels={"pace": "Source"})
def live(request: Request) -> int:
    """Ask about live video while it runs. Without -Q and --questions, questions are typed at a prompt.

    \b
    evoprune watch rtsp://camera.local/stream
    evoprune watch /dev/video0 -Q "Who is there?" --every 30s --json >> log.jsonl
    evoprune watch clip.mp4 --pace file -Q "What happened?"
    ffmpeg -i SOURCE -f mpegts - | evoprune watch - -Q "What happens?" --every 10s
    """
    check_output()
    warm_up()  # while this process imports what it needs
    _check_questions(request)
    made = request.options()
    check_text(*request.asked, made.generation.system)
    timeout_s = parse_time(request.timeout)
    opened = LiveSource(request.source, request.pace, timeout_s, request.reconnects, request.speak)
    return _run(request, opened, made)


def _check_questions(request: Request) -> None:
    """Raises UsageError where there are no questions, or no way for them."""
    source, lines = request.source, request.questions
    if request.every and not request.asked:
        raise UsageError("--every without a question", "-Q TEXT")
    if request.every_s is not None and request.every_s <= 0:
        raise UsageError(f"--every {request.every}", "give a time above 0")
    if lines == STDIN and source == STDIN:
        raise UsageError("standard input is both the video and the questions", "give one of them by its name")
    if not all(each.strip() for each in request.asked):
        raise UsageError("the question is empty", '-Q "What happens?"')
    if request.prompt and (source == STDIN or sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError("no questions, and stdin is no terminal", "-Q TEXT --every 30s, or --questions FILE")


def _run(request: Request, source: LiveSource, options: PipelineOptions) -> int:
    """Loads the model, and asks until the source or the questions end."""
    talk = Conversation([source.name], request, interactive=request.prompt, several=len(request.asked) > 1)
    try:
        with progress(not request.quiet) as show:
            qa = load(options, show, request.quiet)
        from evoprune.live.feed import LiveFeed

        sampling, system = options.sampling, options.generation.system
        limits = {"fps": sampling.fps, "max_visual_tokens": sampling.max_visual_tokens}
        stream = qa.stream(system=system, name=source.name, **limits, **vars(options.stream))
        with LiveFeed(stream, source, options.stream.window_s) as feed:
            session = _Session(request, talk, stream, feed, qa.engine.loaded.device)
            with progress(not request.quiet) as show:
                show("waiting for a frame")
                while not feed.begun.wait(TICK_S):
                    pass
            feed.check()
            session.begin = partial(talk.begin, stream, options.generation, None)
            code = session.converse() if request.prompt else session.serve()
            feed.check()
            return code
    except BaseException as problem:
        if not talk.answered:
            talk.break_off(problem, request.asked)
        raise


class _Session:
    """A stream that is asked about while it is fed. Ctrl-C ends the answer to a typed question, otherwise the command."""

    def __init__(self, request: Request, talk: Conversation, stream, feed, device: str):
        self._request, self._talk, self._stream, self._feed, self._device = request, talk, stream, feed, device
        self.begin: Callable[[], None] | None = None  # with the first question: until then a window may fill
        self._next_s, self._asked_s, self._skips, self._failed = request.every_s, -1.0, False, 0
        self._status = not request.quiet and sys.stderr.isatty()
        self._latest, self._there = 0.0, False  # when the status line was written; whether it stands there

    def converse(self) -> int:
        """Questions from the terminal, until q or Ctrl-C. The end of the source does not end it."""
        self._request.speak("Ask about what was seen. /help for help; q, Ctrl-D or Ctrl-C to end.")
        questions = typed(twice=False)
        while True:
            if self._status:
                note(self._state())
            if (question := next(questions, None)) is None:
                return 0
            self._answer(question, typed=True)

    def serve(self) -> int:
        """The questions of the command line and of the pipe, until the source ends, or nobody can ask any more."""
        lines = _lines(self._request.questions) if self._request.questions is not None else None
        while True:
            ended = self._feed.ended.wait(TICK_S)
            if (self._feed.backlog.stride > 1) != self._skips:
                self._skips = not self._skips
                self._clear()
                more = "too slow for all frames: some are skipped, evenly"
                self._request.speak(more if self._skips else "no frames are skipped any more")
            self._show()
            self._ask_what_is_due(ended)
            while lines and not lines.empty():
                if (line := lines.get()) is None:
                    lines = None
                else:
                    self._ask_line(line)
            if ended or not (lines or self._request.asked):
                self._clear()
                return SOME_FAILED if self._failed else 0

    def _ask_what_is_due(self, ended: bool) -> None:
        now_s = self._stream.until_s or 0.0
        due = self._next_s is not None and now_s >= self._next_s
        if due:
            self._next_s = (floor(now_s / self._request.every_s) + 1) * self._request.every_s
        if due or (ended and now_s > self._asked_s):
            self._asked_s = now_s
            for question in self._request.asked:
                self._answer(question)

    def _ask_line(self, line: bytes) -> None:
        """A question of the pipe; one that is none has a record, and does not end anything."""
        try:
            fields = jsonlib.loads(line)
            asked, identity = (fields.get(name) if isinstance(fields, dict) else None for name in ("question", "id"))
            if not isinstance(asked, str) or not asked.strip():
                raise ValueError('no "question"')
        except (ValueError, RecursionError) as problem:
            wrong = UsageError(f"a line of --questions is no question: {problem}", '{"question": "What happens?"}')
            self._failed += 1
            self._clear()
            self._talk.break_off(wrong, [line.decode(errors="replace").rstrip("\n")])
            print_error(wrong.message, wrong.hint)
        else:
            self._answer(asked, identity=None if identity is None else str(identity))

    def _answer(self, question: str, **how) -> None:
        self._clear()
        if self.begin:
            self.begin()
            self.begin = None
        self._failed += not answer(self._talk, question, **how, goes_on=self._request.prompt)

    def _show(self) -> None:
        """Writes the status line anew, now and then, over the one before."""
        if self._status and time.monotonic() - self._latest >= STATUS_S:
            self._latest, self._there = time.monotonic(), True
            _write(f"\r{self._state()}\x1b[K")

    def _clear(self) -> None:
        if self._there:
            self._there = False
            _write("\r\x1b[K")

    def _state(self) -> str:
        from evoprune.backend.devices import memory_in_use

        seen, until_s, feed, backlog = self._stream.seen, self._stream.until_s, self._feed, self._feed.backlog
        skipped = f", {backlog.skipped:,} skipped" if backlog.skipped else ""
        skipped += f" (now {100 - 100 / backlog.stride:.0f}%)" if backlog.stride > 1 else ""
        state = "failed" if feed.problem else "ended" if feed.ended.is_set() else f"lag {backlog.lag_s:.1f} s"
        held = f"{clock(until_s or 0.0)} seen"
        tokens = f", {counted(seen.frames, 'frame')}, {counted(seen.tokens, 'token')}" if seen else ""
        return printable(f"{held}{skipped}; {state}{tokens}, {size(memory_in_use(self._device)[0])}")[: columns() - 1]


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _lines(path: str) -> "queue.SimpleQueue[bytes | None]":
    """Lines of a pipe as they come, none of them empty, then None; read by a thread that holds no lock of Python's streams."""
    if path != STDIN and not os.path.exists(path):
        raise UsageError(f"no such file: {path}", "--questions - reads stdin")
    found: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        typed = path == STDIN
        with contextlib.suppress(OSError), open(sys.stdin.fileno() if typed else path, "rb", closefd=not typed) as file:
            for line in filter(bytes.strip, iter(partial(file.readline, LONGEST_LINE), b"")):
                found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found
