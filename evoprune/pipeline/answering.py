"""The last stages: an encoded video is asked a question, and the answer is streamed.

Answers of one video share the keys and values of its prompt. So a lock of the video is held while a piece is generated, and by
`Answer.text` until the answer is complete. It is never held while the caller has control: an iteration cannot block another one.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict

import torch

from evoprune.errors import UsageError, error_record, names_plugins
from evoprune.language.generate import GenerationSettings, PrefillState, along, embed_question, stream, stream_text
from evoprune.model.clock import Clock
from evoprune.pipeline.encoding import Encoding
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.fill_report import fill_kept, fill_times, video_report
from evoprune.pipeline.keywords import names_options
from evoprune.pipeline.options import GenerationOptions
from evoprune.pipeline.prompting import PromptReader
from evoprune.pipeline.view import View
from evoprune.report import Report, TokenCounts
from evoprune.text import counted
from evoprune.video.info import VideoInfo
from evoprune.video.plan import Plan
from evoprune.vision.encoded import Encoded
from evoprune.vision.token_selection import EncodedRows, select_tokens


class Answer(Iterator[str]):
    """An answer, in pieces as they are generated: iterate over it once. Generation begins with the first piece.

    Threads may read answers of one video at the same time: each `text` is generated as a whole, one after the other. An iteration
    ends with an error if another answer began between two of its pieces, in this thread or another.

    Attributes:
        report: of this answer; up to date after each piece, complete after the last. `report.answer` is what there is so far.
        ids: its tokens so far, without the one that ends it.
        text: the whole answer; reading it generates what is left.

    Raises, while it is read, and again whenever it is read after that; `report.error` says the same:
        UsageError: the question and its answer do not fit into the model's context, or another question was asked meanwhile.
        OutOfMemory. ModelError: numbers that are NaN or infinite.
    """

    def __init__(
        self,
        report: Report,
        pieces: Iterator[str],
        lock: AbstractContextManager | None = None,
        ids: list[int] | None = None,
    ):
        self.report, self.ids = report, [] if ids is None else ids
        self._pieces, self._lock = pieces, lock or nullcontext()
        self._problem: Exception | None = None

    def __next__(self) -> str:
        with self._lock:
            if self._problem is not None:  # the generator has ended, as if the answer were complete
                raise _once_more(self._problem)
            try:
                return next(self._pieces)
            except StopIteration:
                raise
            except Exception as problem:
                self._problem = _once_more(problem)
                self.report.finish_reason, self.report.error = "error", error_record(problem)
                raise
            except BaseException:
                self.report.finish_reason = self.report.finish_reason or "interrupt"
                raise

    @property
    def text(self) -> str:
        """The whole answer: generates what is left of it. What there is so far is `report.answer`."""
        with self._lock:
            for _ in self:
                pass
        return self.report.answer or ""

    def __str__(self) -> str:
        return self.text

    def close(self) -> None:
        """Stops: nothing more is generated, and `report.finish_reason` is "interrupt" if there was more to come."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _once_more(problem: Exception) -> Exception:
    """The same exception without its traceback, whose frames hold the memory of what failed."""
    again = type(problem).__new__(type(problem), *problem.args)
    vars(again).update(vars(problem))
    return again


class EncodedVideo:
    """A video that was encoded once and can be asked about, one question at a time. Threads wait for one another (`Answer`).

    A method that reads the question selects tokens for each one anew, among the rows of the one encoding; before the first
    question `encoded` has no tokens.

    Attributes:
        report: describes the encoding; it never changes. Each answer has a report of its own.
        encoded: the tokens that the language model reads. From the cache, `encoded.rows` have a shape but hold no data.
        view: what was looked at.
    """

    def __init__(self, engine: Engine, view: View, encoding: Encoding):
        result = encoding.result
        self.view = view
        self.encoded: Encoded = result.nothing_selected() if isinstance(result, EncodedRows) else result
        self._engine, self._encoding = engine, encoding
        self._prompts = PromptReader(engine.loaded, view)
        self._turn, self._paid, self._lock = 0, False, threading.RLock()
        self._blank = video_report(engine, view, encoding, self.encoded)
        self.report = deepcopy(self._blank)
        fill_times(self.report, encoding.seconds, encoding.wall_seconds, engine.loaded.device)

    @property
    def info(self) -> VideoInfo:
        """Facts about the file."""
        return self.view.info

    @property
    def plan(self) -> Plan:
        """Which frames were looked at, and how large."""
        return self.view.plan

    @property
    def units(self) -> int:
        """Visual tokens with nothing pruned; more than were looked at, if the method made the input smaller."""
        return self.view.units

    def __repr__(self) -> str:
        (count, height, width), sampling = self.plan.grid, self.plan.sampling
        pairs = f"{counted(count, 'frame pair')} of {height}x{width} units"
        return (
            f"<EncodedVideo {self.view.name!r}: {sampling.frames} frames, {pairs}, "
            f"{len(self.encoded.kept):,} of {self.units:,} visual tokens kept>"
        )

    @names_options
    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        system: str | None = None,
    ) -> Answer:
        """Asks a question. The first answer's report includes the time of the video, later ones do not.

        Args:
            question: taken literally.
            max_new_tokens: the most tokens of the answer, at least 1.
            temperature: 0 takes the most probable token; above 0 tokens are drawn, from logits divided by it.
            top_p: draw only among the most probable tokens that together reach this probability, in (0, 1].
            system: a system prompt; None for the model's own.

        Raises:
            UsageError: an option out of range, or a question that is empty or no text. TypeError: an unknown option.
        """
        options = GenerationOptions(max_new_tokens, temperature, top_p, system)
        if not isinstance(question, str):
            raise UsageError(f"the question is {question!r}, not a text", 'for example video.ask("What happens?")')
        if not question.strip():
            raise UsageError("the question is empty", 'for example video.ask("What happens?")')
        settings = options.settings(self._engine.seed)
        report = self._report_of(question, settings)
        ids: list[int] = []
        return Answer(report, self._pieces(question, options, settings, report, ids), self._lock, ids)

    def read_along(self, question: str, ids: Sequence[int], system: str | None = None) -> tuple[torch.Tensor, float]:
        """Reads a question and a given answer to it: what the model would have said at each token (teacher forcing).

        Args:
            question: taken literally.
            ids: the answer's tokens, at least one.
            system: a system prompt; None for the model's own.

        Returns:
            The logits of every token of the answer, each behind those before it, float32 `[len(ids), vocabulary]`; and the seconds
            from the question to the first of them.

        Raises:
            UsageError: question and answer do not fit into the model's context. OutOfMemory. ModelError: numbers that are NaN or
            infinite.
        """
        options = GenerationOptions(max_new_tokens=len(ids), system=system)
        with self._lock:
            self._turn += 1
            clock = Clock(self._engine.device)
            state = self._read(question, options, self._report_of(question, options.settings()), clock)
            seconds, given = sum(clock.seconds.values()), torch.tensor(ids, dtype=torch.int64, device="cpu")
            with clock.stage("generate"):
                return along(self._engine.loaded.model, state, given), seconds

    def _report_of(self, question: str, settings: GenerationSettings) -> Report:
        report, fresh = deepcopy(self._blank), Report()
        report.id, report.created_utc, report.question = fresh.id, fresh.created_utc, question
        report.generation = asdict(settings)
        return report

    def _pieces(
        self,
        question: str,
        options: GenerationOptions,
        settings: GenerationSettings,
        report: Report,
        ids: list[int],
    ) -> Iterator[str]:
        """Generates an answer and keeps its report and its `ids` up to date."""
        self._turn += 1
        turn = self._turn
        clock, earlier = self._new_clock(report)
        start, packing = clock.now(), self._engine.loaded.packing
        packed = packing.seconds
        loaded = self._engine.loaded
        tokens = stream(loaded.model, self._read(question, options, report, clock), settings, loaded.eos_ids)
        self._paid = True
        report.time_ms.ttft_wall = (earlier + clock.now() - start) * 1000
        report.answer, before = "", packing.seconds

        def update() -> None:
            ids[:] = tokens.ids
            report.tokens.new, report.finish_reason = len(ids), tokens.finish_reason
            clock.seconds["pack"] = packing.seconds - packed
            total = earlier + clock.now() - start
            fill_times(report, clock.seconds, total, self._engine.loaded.device, packing.seconds - before)

        update()
        try:
            for piece in clock.each("generate", stream_text(self._engine.loaded.tokenizer, tokens)):
                report.answer += piece
                update()
                yield piece
                if turn != self._turn:
                    raise UsageError(
                        "another question was asked meanwhile", "finish one answer before the next question"
                    )
            update()
        except GeneratorExit:  # the reader stopped early
            update()
            raise

    def _new_clock(self, report: Report) -> tuple[Clock, float]:
        """A clock for an answer, and the wall-clock seconds before it: the video's time, until a question has paid for it."""
        clock, wall = Clock(self._engine.device), self._encoding.wall_seconds
        clock.seconds = dict(self._encoding.seconds)
        if self._paid:
            clock.seconds, wall = dict.fromkeys(clock.seconds, 0.0), 0.0
            report.time_ms.encode_prune = 0.0
        fill_times(report, clock.seconds, wall, self._engine.loaded.device)
        return clock, wall

    @names_plugins()
    def _select_for(self, question: str, report: Report) -> None:
        """Has the method select tokens for this question; keys and values of earlier ones are of no use then."""
        loaded, before = self._engine.loaded, self.encoded.prune_seconds if self._paid else 0.0
        self._prompts.forget()
        self.encoded = select_tokens(self._encoding.result, embed_question(loaded.model, loaded.tokenizer, question))
        fill_kept(report, self.view, self.encoded)
        report.time_ms.encode_prune = (self.encoded.prune_seconds - before) * 1000

    def _read(self, question: str, options: GenerationOptions, report: Report, clock: Clock) -> PrefillState:
        """The state from which the answer is decoded; the tokens are selected first, if the method reads the question."""
        selects = isinstance(self._encoding.result, EncodedRows)
        with clock.stage("prefill"):
            kept = self.view.encoder.keep if selects else len(self.encoded.kept)
            prompt = self._prompts.build(question, options, kept)
        if selects:
            with clock.stage("encode"):
                self._select_for(question, report)
        with clock.stage("prefill"):
            visual, text = len(self.encoded.kept), prompt.text_tokens
            report.tokens = TokenCounts(text, visual, text + visual, 0)
            return self._prompts.read(self.encoded, prompt, options.system)
