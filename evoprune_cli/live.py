"""`evoprune watch`: live video, and questions about it while it runs. A module may not have the command's name (docs/house.md)."""

import contextlib
import json as jsonlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import floor
from typing import ClassVar

from evoprune.errors import UsageError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import PipelineOptions, StreamOptions
from evoprune.text import check_text, clock, counted, size
from evoprune.video.live import FROM_SOURCE, PACES, STDIN, LiveSource
from evoprune.video.sampling import parse_time
from evoprune.video.sandbox.isolation import warm_up
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.conversation import Conversation, Output
from evoprune_cli.imports import without_collections
from evoprune_cli.interactive import answer, typed
from evoprune_cli.options import own
from evoprune_cli.results import SOME_FAILED
from evoprune_cli.terminal import (
    check_output,
    columns,
    note,
    note_bits,
    note_tuning,
    print_error,
    printable,
    progress,
    tell,
)

LEFT_OUT = ("frames", "start_s", "end_s", "max_frames", "decoder", "subtitles", "max_subtitle_tokens")
LONGEST_LINE = 2**22  # bytes of a question
TICK_S, STATUS_S = 0.05, 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked and when, and what is said about it."""

    PANELS: ClassVar[dict[str, str]] = {"pace": "Source", "stats": "Output"}  # by their first fields

    source: opt.argument(
        str,
        "SOURCE",
        "An rtsp, http, udp or tcp URL, a camera (/dev/video0), a file, also one that grows, or - for a pipe on stdin.",
    )
    question: list[str] | None = own(
        None, "-Q --question TEXT", "A question at the end of the source, or see --every; repeatable."
    )
    every: str | None = own(None, "--every TIME", "Ask -Q each time so much of the source was seen: 30s.")
    questions: str | None = own(
        None, "--questions FILE", 'Questions from a pipe: JSON lines with "question", perhaps "id"; - for stdin.'
    )
    pace: str = own(
        FROM_SOURCE,
        "--pace",
        "source: frames as they come; file: at the pace of a file's own times.",
        **completion.one_of(*PACES),
    )
    timeout: str = own(
        "10s", "--timeout TIME", "How long the source may be silent, and a file take to grow, at most 20s."
    )
    reconnects: int = own(5, "--reconnects", "How often in a row a URL or camera that ended or failed is tried again.")
    options: opt.MakeOptions
    json: opt.Json = False
    stats: bool | None = own(None, "--stats/--no-stats", opt.STATS)
    quiet: opt.Quiet = False
    verbose: bool = own(False, "-v --verbose", opt.VERBOSE)

    @property
    def asked(self) -> list[str]:
        return self.question or []

    @property
    def prompt(self) -> bool:
        """Whether questions are typed."""
        return not (self.question or self.questions)

    @cached_property
    def every_s(self) -> float | None:
        return None if self.every is None else parse_time(self.every)

    def speak(self, text: str) -> None:
        if not self.quiet:
            tell(text)


@opt.with_options(StreamOptions, *PipelineOptions.KINDS, without=LEFT_OUT)
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
    flags = request.json, request.stats, request.verbose, request.quiet
    output = Output.of(*flags, interactive=request.prompt, several=len(request.asked) > 1)
    talk, quiet = Conversation([source.name], output), request.quiet
    try:
        with progress(not quiet) as show:
            check_libraries()
            with without_collections():
                from evoprune.pipeline.live import LiveFeed
                from evoprune.pipeline.video_qa import VideoQA

            show("loading model")
            qa = VideoQA.load(loading=options.model, pruning=options.pruning, progress=partial(show, "quantizing"))
        if not quiet:
            note_tuning(qa.engine)
            note_bits(qa.engine)
        sampling, system = options.sampling, options.generation.system
        limits = {"fps": sampling.fps, "max_visual_tokens": sampling.max_visual_tokens}
        stream = qa.stream(options=options.stream, system=system, name=source.name, **limits)
        with LiveFeed(stream, source, options.stream.window_s) as feed:
            begin = partial(talk.begin, stream, options.generation, None)
            session = _Session(request, talk, begin, stream, feed, qa.engine.loaded.device)
            with progress(not quiet) as show:
                show("waiting for a frame")
                while not feed.begun.wait(TICK_S):
                    pass
            if feed.problem:
                raise feed.problem
            code = session.converse() if request.prompt else session.serve()
            if feed.problem:
                raise feed.problem
            return code
    except BaseException as problem:
        if not talk.answered:
            talk.break_off(problem, request.asked)
        raise


class _Session:
    """A stream that is asked about while it is fed."""

    def __init__(self, request: Request, talk: Conversation, begin: Callable[[], None], stream, feed, device: str):
        self._request, self._talk, self._stream, self._feed = request, talk, stream, feed
        self._begin: Callable[[], None] | None = begin  # with the first question: until then a window may fill
        self._status = _Status(stream, feed, device, not request.quiet)
        self._next_s, self._asked_s, self._skips, self._failed = request.every_s, -1.0, False, 0

    def converse(self) -> int:
        """Questions from the terminal, until q or Ctrl-C. The end of the source does not end it."""
        self._request.speak("Ask about what was seen. /help for help; q, Ctrl-D or Ctrl-C to end.")
        for question in self._status.above(typed(twice=False)):
            self._answer(question, typed=True)
        return 0

    def serve(self) -> int:
        """The questions of the command line and of the pipe, until the source ends, or nobody can ask any more."""
        lines = _lines(self._request.questions) if self._request.questions is not None else None
        while True:
            ended = self._feed.ended.wait(TICK_S)
            self._say_what_is_skipped()
            self._status.line()
            self._ask_what_is_due(ended)
            while lines and (line := _next(lines)) is not None:
                if line is END:
                    lines = None
                    break
                self._ask_line(line)
            if ended or not (lines or self._request.asked):
                self._status.clear()
                return SOME_FAILED if self._failed else 0

    def _ask_what_is_due(self, ended: bool) -> None:
        seen = self._stream.seen
        now_s = seen.end_s if seen else 0.0
        due = self._next_s is not None and now_s >= self._next_s
        if due:
            self._next_s = (floor(now_s / self._request.every_s) + 1) * self._request.every_s
        if due or (ended and now_s > self._asked_s):
            self._asked_s = now_s
            for question in self._request.asked:
                self._ask(question)

    def _ask_line(self, line: bytes) -> None:
        """A question of the pipe; one that is none has a record, and does not end anything."""
        try:
            fields = jsonlib.loads(line)
            asked = fields.get("question") if isinstance(fields, dict) else None
            if not isinstance(asked, str) or not asked.strip():
                raise ValueError('no "question"')
            identity = fields.get("id")
        except (ValueError, RecursionError) as problem:
            wrong = UsageError(f"a line of --questions is no question: {problem}", '{"question": "What happens?"}')
            self._failed += 1
            self._status.clear()
            self._talk.break_off(wrong, [line.decode(errors="replace")])
            print_error(wrong.message, wrong.hint)
            return
        self._ask(asked, None if identity is None else str(identity))

    def _ask(self, question: str, identity: str | None = None) -> None:
        self._status.clear()
        if not self._answer(question, identity=identity):
            self._failed += 1

    def _answer(self, question: str, **how) -> bool:
        if self._begin:
            self._begin()
            self._begin = None
        return answer(self._talk, question, **how)

    def _say_what_is_skipped(self) -> None:
        skips = self._feed.stride > 1
        if skips != self._skips:
            self._skips = skips
            self._status.clear()
            self._request.speak(
                "too slow for all frames: some are skipped, evenly" if skips else "no frames are skipped any more"
            )


class _Status:
    """The status line: on stderr, only where that is a terminal."""

    def __init__(self, stream, feed, device: str, wanted: bool):
        self._stream, self._feed, self._device = stream, feed, device
        self._active, self._latest, self._there = wanted and sys.stderr.isatty(), 0.0, False

    def line(self) -> None:
        """Writes it anew, now and then, over the one before."""
        import time

        if self._active and time.monotonic() - self._latest >= STATUS_S:
            self._latest, self._there = time.monotonic(), True
            self._write(f"\r{self._text()}\x1b[K")

    def clear(self) -> None:
        if self._there:
            self._there = False
            self._write("\r\x1b[K")

    def above(self, questions: Iterator[str]) -> Iterator[str]:
        """Questions that are typed; meanwhile it stands above the prompt, and is written anew while the line is empty."""
        done = threading.Event()
        while True:
            if self._active:
                note(self._text())
            done.clear()
            updating = threading.Thread(target=self._update, args=(done,), daemon=True)
            updating.start()
            try:
                question = next(questions, None)
            finally:
                done.set()
                updating.join()
            if question is None:
                return
            yield question

    def _update(self, done: threading.Event) -> None:
        with contextlib.suppress(ImportError):
            import readline

            while self._active and not done.wait(STATUS_S):
                if not readline.get_line_buffer():
                    self._write(f"\x1b7\x1b[1A\r{self._text()}\x1b[K\x1b8")

    def _text(self) -> str:
        from evoprune.model.machine import memory_in_use

        seen, feed = self._stream.seen, self._feed
        found = memory_in_use(self._device)[0]
        skipped = f", {feed.skipped:,} skipped" if feed.skipped else ""
        skipped += f" (now {100 - 100 / feed.stride:.0f}%)" if feed.stride > 1 else ""
        state = "failed" if feed.problem else "ended" if feed.ended.is_set() else f"lag {feed.lag_s:.1f} s"
        held = f"{clock(seen.end_s)} seen, {counted(seen.frames, 'frame')}" if seen else "the first window fills"
        tokens = f", {seen.tokens:,} tokens" if seen else ""
        return printable(f"{held}{skipped}; {state}{tokens}, {size(found)}")[: columns() - 1]

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


END = object()


def _lines(path: str) -> "queue.SimpleQueue[bytes | object]":
    """Lines of a pipe as they come, and END; read by a thread that holds no lock of Python's streams."""
    found: queue.SimpleQueue[bytes | object] = queue.SimpleQueue()
    if path != STDIN and not os.path.exists(path):
        raise UsageError(f"no such file: {path}", "--questions - reads stdin")

    def read() -> None:
        rest = b""
        with contextlib.suppress(OSError):
            descriptor = sys.stdin.fileno() if path == STDIN else os.open(path, os.O_RDONLY)
            while content := os.read(descriptor, 2**16):
                *whole, rest = (rest + content).split(b"\n")
                for line in [*whole, *([rest] if len(rest) > LONGEST_LINE else [])]:
                    found.put(line)
                rest = b"" if len(rest) > LONGEST_LINE else rest
        found.put(rest)
        found.put(END)

    threading.Thread(target=read, daemon=True).start()
    return found


def _next(lines: "queue.SimpleQueue[bytes | object]") -> bytes | object | None:
    """The next line that is not empty; None where none has come."""
    with contextlib.suppress(queue.Empty):
        while True:
            line = lines.get_nowait()
            if line is END or line.strip():
                return line
    return None
