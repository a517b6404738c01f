"""Generate one answer, from reading the prompt to completing the report. `Answering.pieces` shows all steps in order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from evoprune.errors import UsageError
from evoprune.language import AnswerStream, GenerationOptions, PrefillState, Turn
from evoprune.model import Clock
from evoprune.report import EncodingTimes, Report
from evoprune.session.report import fill_times
from evoprune.session.session import Session


class Answerable(Protocol):
    """The interface of encoded inputs that an answer requires, implemented by `asking.Askable`."""

    OVERTAKEN: ClassVar[str]
    _session: Session
    _turn: int  # number of questions asked so far

    def _claim_times(self) -> tuple[EncodingTimes, Callable[[], None]]: ...

    def _read(self, answering: "Answering", clock: Clock) -> PrefillState: ...

    def _ended(self, turn: int) -> None: ...


@dataclass(eq=False)
class Answering:
    """One question, how to answer it, and the answer generated so far. This object doesn't keep the inputs in memory."""

    question: str
    options: GenerationOptions
    seed: int | None  # None means the seed of the session
    on_thoughts: Callable[[str], None] | None = None  # called with each piece of reasoning text
    earlier: Sequence[Turn] | None = None  # the conversation so far, or None for a single question
    last: bool = False  # whether no other question about the inputs is expected
    report: Report = field(default_factory=Report, init=False)  # updated before each piece
    ids: list[int] = field(
        default_factory=list, init=False
    )  # token IDs generated so far, updated together with the report
    instance: Any = field(
        default=None, init=False
    )  # the parsed answer, if the schema is a class and the answer is complete

    def pieces(self, inputs: Answerable) -> Iterator[str]:
        """Generate the answer and yield its text in pieces.

        Raises:
            UsageError: If another question is asked before this answer is complete.
        """
        report, options = self.report, self.options
        loaded = inputs._session.loaded
        inputs._turn = turn = inputs._turn + 1
        spent, give_up = inputs._claim_times()
        report.time_ms.encode_prune = spent.prune * 1000
        fill_times(report, spent.stages, spent.wall, loaded.device)
        times = _Times(inputs._session, spent)
        try:
            constraint = None
            if options.grammar is not None:
                with times.clock.stage("prefill"):  # the vocabulary is built only once per model
                    constraint = loaded.vocabulary.constraint(options.grammar)
            # Build the prompt, and prefill it.
            state = inputs._read(self, times.clock)
            # Choose one token after another, turn the tokens into text, and stop.
            stream = AnswerStream(state, options, loaded.tokenizer, loaded.eos_ids, self.seed, constraint)
        except BaseException:
            give_up()
            raise
        times.prefilled()
        report.time_ms.ttft_wall = times.total * 1000
        report.answer = ""
        self._update(stream, times)
        try:
            for piece, thought in times.clock.each("generate", stream):
                if thought:
                    report.thoughts = (report.thoughts or "") + piece
                    self._update(stream, times)
                    if piece and self.on_thoughts is not None:
                        self.on_thoughts(piece)
                else:
                    report.answer += piece
                    self._update(stream, times)
                    yield piece
                if turn != inputs._turn:
                    raise UsageError(inputs.OVERTAKEN, "finish one answer before asking the next question")
            self._update(stream, times)
            self._complete(stream)
        finally:
            inputs._ended(turn)

    def _update(self, stream: AnswerStream, times: "_Times") -> None:
        """Update `ids` and the report after a piece."""
        report = self.report
        self.ids[:] = stream.ids
        report.tokens.new = len(self.ids)
        report.finish_reason, report.stop_reason = stream.finish_reason, stream.stop_reason
        if self.options.choices is not None:
            report.choices = [asdict(choice) for choice in stream.choices]
        if report.logprobs is not None:
            report.logprobs += stream.logprobs_since(len(report.logprobs))
        times.fill(report)

    def _complete(self, stream: AnswerStream) -> None:
        """Parse a complete answer, and warn about an answer that was cut off."""
        report = self.report
        if self.options.schema is not None and stream.finish_reason == "stop" and stream.stop_reason is None:
            report.parsed, self.instance = self.options.parse(report.answer)
        thinking = report.thoughts is not None and not report.answer
        report.thoughts = (report.thoughts or "").rstrip() or None
        if report.finish_reason == "length" and thinking:
            report.warnings.append("thoughts_cut")
        elif report.finish_reason == "length":
            report.warnings.append("answer_cut")
        elif report.thoughts and not report.answer and report.stop_reason is None:
            report.warnings.append("thoughts_only")


class _Times:
    """Measures the stages of an answer. Encoding is included in the times of the first answer only.

    Args:
        spent: The time spent on encoding that no other answer has reported.
    """

    def __init__(self, session: Session, spent: EncodingTimes):
        self.clock = Clock(session.device)
        self.clock.seconds = spent.stages
        self._device = session.loaded.device
        self._encoding = spent.wall
        self._start = self.clock.now()
        self._packing = session.loaded.packing
        self._packed = self._packing.seconds  # before the prompt was read
        self._packed_before_tokens = 0.0

    @property
    def total(self) -> float:
        """Time since the question was asked, plus the encoding time, in seconds."""
        return self._encoding + self.clock.now() - self._start

    def prefilled(self) -> None:
        """Record that the tokens are generated from now on. Packing that happens later isn't part of the generation rate."""
        self._packed_before_tokens = self._packing.seconds

    def fill(self, report: Report) -> None:
        """Add the times so far to a report."""
        seconds = self._packing.seconds
        self.clock.seconds["pack"] = seconds - self._packed
        fill_times(report, self.clock.seconds, self.total, self._device, seconds - self._packed_before_tokens)
