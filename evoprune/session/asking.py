"""Ask questions about encoded inputs. answering.py generates the answers.

All answers about the same inputs share the keys and values of their common prompt prefix. Generating a piece of an answer requires
a lock, and `Answer.text` holds that lock until the answer is complete. Iterating over an answer releases the lock while the
caller's code runs, so it cannot block other threads.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from typing import TYPE_CHECKING, ClassVar, Unpack, overload

import torch

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions, PrefillState, PrefixCache, Prompt, Turn, prune_prompt
from evoprune.model import Clock, Cost
from evoprune.report import ABOUT_SOUND, EncodingTimes, Report, TokenCounts
from evoprune.session.answering import Answering
from evoprune.session.answers import Answer, Shape
from evoprune.session.memory import TEXT
from evoprune.session.report import fill_dropped, fill_pruning, fill_times, inputs_report
from evoprune.session.result import InputResult
from evoprune.session.session import Session
from evoprune.signatures import suggests, takes
from evoprune.suggestions import Suggesting, not_callable
from evoprune.util import Uncopied, check_question, check_type, counted, from_keywords
from evoprune.video import Plan
from evoprune.vision import Encoded

if TYPE_CHECKING:
    from evoprune.keywords import GenerationKeywords, UntypedKeywords
    from evoprune.session.chat import Chat


class Askable(ABC, Uncopied, Suggesting):
    """Base class for encoded inputs that can answer questions, one at a time.

    All questions share the inputs' keys and values in the KV cache. Threads asking questions at the same time wait for each other.
    """

    INSTEAD = "threads may share it; another process must load a VideoQA and encode again"
    # Error message for reading an answer after another question has been asked.
    OVERTAKEN = "another question was asked meanwhile"
    if not TYPE_CHECKING:
        __call__ = not_callable("video.ask(question)")

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.RLock()
        self._turn = 0  # number of questions asked so far

    @property
    def ignores_sound(self) -> bool:
        """Whether any video has an audio track, but neither subtitles nor a transcript."""
        return False

    def _report_of_inputs(self, encodings: Sequence[InputResult]) -> Report:
        """Return a report about the encoded inputs, excluding the total stage times added by `fill_times`."""
        return inputs_report(self._session, encodings)

    @abstractmethod
    def _blank_report(self) -> Report:
        """Return a new report that describes the inputs, but doesn't contain a question or an answer yet."""

    @abstractmethod
    def _claim_times(self) -> tuple[EncodingTimes, Callable[[], None]]:
        """Return the encoding times that no answer has reported yet, and claim them for the next report.

        Returns:
            A tuple of the times and a function that gives up the claim, for use if there will be no report.
        """

    @abstractmethod
    def _read(self, answering: Answering, clock: Clock) -> PrefillState:
        """Build the prompt for a question, prefill it, and return the state from which the answer is decoded.

        Adds the token counts and anything else known about the prompt to the report of `answering`.
        """

    @abstractmethod
    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None:
        """Check that a question and the earlier turns of its conversation fit into the model's context.

        Raises:
            DoesNotFit: If the question and the earlier turns don't fit.
        """

    def _ended(self, turn: int) -> None:
        """Handle the end of an answer. Called when the answer is complete, is closed, or has failed.

        Args:
            turn: The question number.
        """

    @overload
    def ask(
        self,
        question: str,
        *,
        schema: type[Shape],
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        last: bool = False,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        last: bool = False,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions, names=GenerationOptions.ANSWER)
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        last: bool = False,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Ask a question about the inputs. Only the first answer's report includes the encoding time.

        Args:
            question: The question, which is passed to the model unchanged.
            seed: Random seed for token sampling. Defaults to the seed of the `VideoQA`, so asking the same question again produces
                the same answer.
            on_thoughts: Called with each piece of reasoning text as soon as it is generated. Other threads that ask about the same
                inputs wait until it returns.
            last: Whether this is the last question about the inputs, so that a model with recurrent layers can read the prompt in a
                single pass.
            options: Generation options; see `keywords.GenerationKeywords`.

        Raises:
            UsageError: If an option is out of range, or the question is empty or not a string.
            TypeError: If an option is unknown.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        return self._answer(Answering(question, generation, seed, on_thoughts, last=last))

    @suggests
    def chat(self, system: str | None = None, messages: Sequence[Mapping[str, str]] = ()) -> "Chat":
        """Start a multi-turn conversation about the inputs, in which questions can refer to earlier questions and answers.

        Args:
            system: The system prompt. None means the model's default.
            messages: Earlier turns, as dicts with the keys `role` (alternating between "user" and "assistant") and `content` (a
                string).

        Raises:
            UsageError: If `messages` has an invalid format, or the pruning method reads the question.
        """
        self._session.pruning.method.check_conversation()
        from evoprune.session.chat import Chat

        return Chat(self, check_type("system", system, str | None), Turn.from_messages(messages))

    def _answer(self, answering: Answering) -> Answer:
        """Answer a question; see `ask`. Options and a seed that are not set get the values of the model and the session."""
        self._session.check_process()
        loaded, options = self._session.loaded, answering.options
        check_question(answering.question)
        check_type("seed", answering.seed, int | None)
        check_type("on_thoughts", answering.on_thoughts, Callable | None)
        if options.repetition_penalty is None:
            answering.options = replace(options, repetition_penalty=loaded.generation.repetition_penalty or 1.0)
        if answering.seed is None:
            answering.seed = self._session.pruning.seed
        # Fail early if the choices are invalid for this model.
        options.choice_ids(loaded.tokenizer)
        answering.report = self._report_of(answering)
        return Answer(answering.report, answering.pieces(self), self._lock, answering)

    def _report_of(self, answering: Answering) -> Report:
        """Return a new report about a question that hasn't been answered yet."""
        question, options = answering.question, answering.options
        report = self._blank_report()
        fresh = Report()
        report.id = fresh.id
        report.created_utc = fresh.created_utc
        report.question = question
        report.generation = options.record(answering.seed)
        if options.logprobs is not None:
            report.logprobs = []
        if "demo_model" not in report.warnings:
            if self._session.loaded.demo and options.schema is not None:
                report.warnings.append("demo_schema")
            elif not self._session.loaded.knows_words(question):
                report.warnings.append("demo_question")
        if self.ignores_sound and ABOUT_SOUND.search(question):
            report.warnings.append("sound_ignored")
        if not options.thinking and self._session.loaded.tokenizer.always_thinks:
            report.warnings.append("always_thinks")
        return report


class EncodedInputs(Askable):
    """Encoded videos and images that can answer any number of questions, one at a time.

    Threads asking questions at the same time wait for each other (see `Answer`). For each new question, the model reads only the
    part of the prompt that differs from earlier prompts (`PrefixCache`). Pruning methods that read the question select new tokens
    for each question.

    Attributes:
        report: Report on how the inputs were encoded. It never changes, because each answer has its own report.
        plans: One plan per input, specifying its frames, its size, and how it is encoded.
    """

    AS_INPUT = "pass it to ask directly: ask([encoded, ...], question)"  # hint for functions that expect a path
    MEANT: ClassVar = {
        **dict.fromkeys(("generate", "answer"), "video.ask(question)"),
        **{each.name: f"video.report.{each.name}" for each in fields(Report)},
        "kept": "video.report.pruning.visual_tokens_kept",
    }

    def __init__(self, session: Session, encodings: Sequence[InputResult]):
        super().__init__(session)
        self._encodings = [replace(encoding, encoded=encoding.encoded.own()) for encoding in encodings]
        self.plans = [encoding.plan for encoding in encodings]
        self._prefix = PrefixCache(session.loaded.language)
        self._report_template = self._report_of_inputs(self._encodings)
        self.report = deepcopy(self._report_template)
        spent = total_times(self._encodings)
        fill_times(self.report, spent.stages, spent.wall, session.loaded.device)

    def __repr__(self) -> str:
        descriptions = []
        for plan, tokens in ((encoding.plan, encoding.encoded) for encoding in self._encodings):
            count, height, width = plan.grid
            size = f"an image of {height}x{width} units"
            if not plan.is_picture:
                size = f"{plan.sampling.frames} frames, {counted(count, 'frame pair')} of {height}x{width} units"
            descriptions.append(f"{plan.name!r}: {size}, {len(tokens.kept):,} of {plan.units:,} visual tokens kept")
        return f"<EncodedInputs {', '.join(descriptions)}>"

    @classmethod
    def together(cls, session: Session, inputs: Sequence["EncodedInputs"]) -> "EncodedInputs":
        """Combine separately encoded inputs so that a question can refer to all of them.

        Raises:
            UsageError: If there are no inputs, or an input was encoded by a different session.
        """
        if not inputs:
            raise UsageError("no input given", "give at least one path, or the result of encode()")
        if any(encoded._session is not session for encoded in inputs):
            raise UsageError("an input was encoded by another VideoQA", "encode it with this one")
        if len(inputs) == 1:
            return inputs[0]
        return cls(session, [encoding for encoded in inputs for encoding in encoded._encodings])

    def with_session(self, session: Session) -> "EncodedInputs":
        """Reuse the encoded tokens in another session, whose pruning settings may differ only inside the language model."""
        return EncodedInputs(session, self._encodings)

    @property
    def encoded(self) -> Encoded:
        """The visual tokens of the first input.

        If the pruning method reads the question, there are no tokens until the first question is asked. For an input loaded from
        the disk cache, `rows` has a shape but no data.
        """
        return self._encodings[0].encoded

    @property
    def plan(self) -> Plan:
        return self.plans[0]

    @property
    def waited_seconds(self) -> float:
        """Time that encoding spent waiting for reading, preprocessing, and transcripts, in seconds."""
        return sum(encoding.waited_seconds for encoding in self._encodings)

    @property
    def ignores_sound(self) -> bool:
        return any(plan.info.has_sound and not (plan.subtitles.lines or plan.subtitles.speech) for plan in self.plans)

    def read_along(
        self, question: str, ids: Sequence[int], system: str | None = None, think: str = "off"
    ) -> tuple[torch.Tensor, float]:
        """Score a given answer by reading it together with its question (teacher forcing). Raises the same errors as `Answer`.

        Args:
            ids: The answer's token IDs. There must be at least one.

        Returns:
            A tuple of the logits and the time to the first logits in seconds. The logits, float32 `[len(ids), vocabulary]`, predict
            each answer token from the question and the preceding tokens.
        """
        options = GenerationOptions(max_new_tokens=len(ids), system=system, think=think)
        with self._lock:
            self._turn += 1
            clock = Clock(self._session.device)
            answering = Answering(question, options, seed=0)
            answering.report = self._report_of(answering)
            state = self._read(answering, clock)
            seconds = sum(clock.seconds.values())
            given = torch.tensor(ids, dtype=torch.int64, device="cpu")
            with clock.stage("generate"):
                logits = state.logits_along(given)
            return logits, seconds

    def bytes_with(self, new_tokens: int) -> int:
        """Estimate the memory for the inputs and the KV cache, in bytes, for a question with `new_tokens` answer tokens."""
        model = self._session.loaded.model
        kept = self.report.pruning.visual_tokens_kept
        rows = self.report.pruning.encoder_rows + kept
        return Cost(model.config).conversation_bytes(rows, kept + TEXT + new_tokens, model.dtype.itemsize)

    def _claim_times(self) -> tuple[EncodingTimes, Callable[[], None]]:
        claimed = [encoding for encoding in self._encodings if encoding.reported.acquire(blocking=False)]

        def give_up() -> None:
            for encoding in claimed:
                encoding.reported.release()

        return total_times(claimed), give_up

    def _blank_report(self) -> Report:
        return deepcopy(self._report_template)

    @torch.inference_mode()
    def _select_for(self, question: str, report: Report) -> None:
        """Select the visual tokens for a question, and discard the keys and values cached for earlier questions."""
        loaded = self._session.loaded
        before = self._prune_seconds
        self._prefix.forget()
        ids = torch.tensor(loaded.tokenizer.encode(question), dtype=torch.int64, device="cpu")
        words = loaded.language.embed(ids)  # embed the question without the rest of the prompt
        self._encodings = [
            replace(encoding, encoded=encoding.encoded.for_question(words)) for encoding in self._encodings
        ]
        fill_pruning(report, self._session, self._encodings)
        report.time_ms.encode_prune += (self._prune_seconds - before) * 1000

    @property
    def _prune_seconds(self) -> float:
        return sum(encoding.encoded.prune_seconds for encoding in self._encodings)

    def _fitting_prompt(self, question: str, options: GenerationOptions, earlier: Sequence[Turn] | None) -> Prompt:
        kept = sum(encoding.encoded.keep for encoding in self._encodings)
        return self._session.fitting_prompt(self.plans, question, options, kept, earlier or ())

    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None:
        self._fitting_prompt(question, options, earlier)

    def _read(self, answering: Answering, clock: Clock) -> PrefillState:
        """Build the prompt for a question, prefill it, and return the state from which the answer is decoded.

        If the pruning method reads the question, the visual tokens are selected first.
        """
        with clock.stage("prefill"):
            prompt = self._fitting_prompt(answering.question, answering.options, answering.earlier)
        if selects := any(encoding.encoded.selectable for encoding in self._encodings):
            with clock.stage("encode"):
                self._select_for(answering.question, answering.report)
        with clock.stage("prefill"):
            # If tokens are selected again for each question, later prompts cannot reuse this one, so treat every question as the
            # last one.
            state = self._prefill(prompt, answering.last or selects, goes_on=answering.earlier is not None)
            state.prompt_ids = prompt.input_ids
            visual = sum(len(encoding.encoded.kept) for encoding in self._encodings)
            columns = state.cache.length
            answering.report.tokens = TokenCounts(columns - visual, visual, columns, 0)
        fill_dropped(answering.report, state.dropping)
        return state

    def _prefill(self, prompt: Prompt, last: bool, goes_on: bool) -> PrefillState:
        """Read a prompt and return the state for decoding the answer. See `PrefixCache.read` for `last` and `goes_on`."""
        loaded = self._session.loaded
        pruning = self._session.pruning
        read = [encoding.encoded for encoding in self._encodings]
        positions = loaded.positions_of(prompt, self.plans)
        pruned = prune_prompt(prompt.input_ids, prompt.places, read, positions, loaded.language.embed)
        share = pruning.budget.share_of_all([plan.grid for plan in self.plans])
        dropping = loaded.language.dropping_for(pruning.method, share, read, pruned)
        return self._prefix.read(pruned, prompt, last, goes_on, dropping)


def total_times(encodings: Iterable[InputResult]) -> EncodingTimes:
    """Return the time spent on encoding, summed over all inputs."""
    total = EncodingTimes()
    for encoding in encodings:
        total.add(encoding.times)
    return total
