"""Generation: encoded inputs are asked a question, and the answer is streamed.

Answers about the same inputs share the keys and values of their prompt. So a lock is held while a piece is generated, and by
`Answer.text` until the answer is complete. It is never held while the caller has control: an iteration cannot block another one.
"""

import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Unpack, overload

import torch
from typing_extensions import TypeVar  # which torch needs; that of Python has defaults from 3.13 on

from evoprune.errors import DoesNotFit, UsageError, error_record
from evoprune.language.choices import ChosenTokens, tokens_of
from evoprune.language.decoder import KVCache
from evoprune.language.generate import (
    AnswerConstraint,
    PrefillState,
    StopStrings,
    TokenLogprobs,
    TokenStream,
    begins_with_thoughts,
    can_crop,
    dropping_for,
    embed_ids,
    layers_of,
    new_cache,
    prefill,
    stream_answer,
    teacher_forced_logits,
)
from evoprune.language.hosted import HostedCache
from evoprune.language.prompt import Prompt, Tokenizer
from evoprune.language.pruned import prune_prompt
from evoprune.language.schema import SchemaOfClass, checked_value, instance_of
from evoprune.language.settings import OF_ROWS
from evoprune.language.turns import Turn, messages_of, turns_of
from evoprune.model.cost import Clock
from evoprune.report import ABOUT_SOUND, OF_INPUTS, Report, TokenCounts
from evoprune.session.encoded import EncodedInput
from evoprune.session.options import GenerationOptions
from evoprune.session.prompting import check_not_empty, fitting_prompt, positions_of
from evoprune.session.report import fill_dropped, fill_pruning, fill_times, inputs_report
from evoprune.session.session import Session, check_conversation
from evoprune.session.signatures import takes
from evoprune.util import check_type, counted, from_keywords
from evoprune.video.info import VIDEO
from evoprune.video.plan import Plan
from evoprune.vision.encoder import Encoded

if TYPE_CHECKING:
    from evoprune.session.keywords import GenerationKeywords, UntypedKeywords

Shape = TypeVar("Shape")  # the class that is given as schema
Parsed = TypeVar("Parsed", default=Any)


class Uncopied:
    """Base of what belongs to its process and its model, with caches and locks: pickle and copy refuse it."""

    INSTEAD: ClassVar[str]  # what to do

    def __reduce_ex__(self, protocol: int):
        """Raises TypeError."""
        raise TypeError(f"no {type(self).__name__} can be pickled or copied: {self.INSTEAD}")


class Answer(Uncopied, Iterator[str], Generic[Parsed]):
    """An answer, in pieces as they are generated. Generation begins with the first piece.

    An iteration goes on where the one before stopped; over a complete answer it begins again. `str(answer)`, `answer == text` and
    `text in answer` are those of `answer.text`, and generate what is left of it. Sets and dicts take `answer.text` alone.

    Threads may read answers of one video at the same time: each `text` is generated as a whole, one after the other. An iteration
    ends with an error if another answer began between two of its pieces, in this thread or another.

    A model may think first: its thoughts are no part of the answer, but `thoughts`, and come before the first piece.

    `report` is up to date after each piece, `report.answer` what there is so far; `ids` are its tokens so far, those of thoughts
    among them, without the one that ends it.

    Raises, while it is read, and again whenever it is read after that; `report.error` says the same:
        UsageError: the question and its answer do not fit into the model's context, or another question was asked meanwhile.
        OutOfMemory. ModelError: numbers that are NaN or infinite.
    """

    INSTEAD = "take answer.text and answer.report"

    def __init__(
        self,
        report: Report,
        pieces: Iterator[str],
        lock: AbstractContextManager | None = None,
        ids: list[int] | None = None,
        instances: list[Any] | None = None,
    ):
        self.report = report
        self.ids = [] if ids is None else ids
        self._instances = [] if instances is None else instances
        self._pieces = pieces
        self._lock = lock or nullcontext()
        self._problem: Exception | None = None
        self._made: list[str] = []
        self._complete = False

    def __iter__(self) -> Iterator[str]:
        return iter(self._made) if self._complete else self

    def __next__(self) -> str:
        with self._lock:
            if self._problem is not None:  # the generator has ended, as if the answer were complete
                raise _once_more(self._problem)
            try:
                self._made.append(next(self._pieces))
                return self._made[-1]
            except StopIteration:
                self._complete = self.report.finish_reason != "interrupt"
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
        """The whole answer: generates what is left of it."""
        with self._lock:
            for _ in self:
                pass
        return self.report.answer or ""

    @property
    def thoughts(self) -> str | None:
        """What the model wrote before the answer, as far as it has; None if it did not think."""
        return self.report.thoughts

    @property
    def parsed(self) -> Parsed:
        """The value of a complete answer with the option `schema`, or None if it was cut. Generates what is left of it.

        An instance of `schema` if that is a class, else what `json.loads` returns.
        """
        str(self)
        return self._instances[0] if self._instances else self.report.parsed

    @property
    def logprobs(self) -> list[dict[str, Any]] | None:
        """The log probability of each token of `ids`, and of others in its place, as docs/json.md says; None without the option."""
        return self.report.logprobs

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """What the option `choices` names, each with its log probability and its probability among them; None without it."""
        str(self)
        return self.report.choices

    def __str__(self) -> str:
        return self.text

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self.text

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, str | Answer) and self.text == str(other)

    __hash__ = None  # in a set or as a key it would not be found by the text that it equals

    def close(self) -> None:
        """Stops: nothing more is generated, and `report.finish_reason` is "interrupt" if there was more to come."""
        with self._lock:
            self._pieces.close()
            self.report.finish_reason = self.report.finish_reason or "interrupt"

    def __repr__(self) -> str:
        if self.report.answer is None and self.report.finish_reason is None:
            return "<Answer, not read yet; .text reads it>"
        return f"<Answer {self.report.answer or ''!r}, {self.report.finish_reason or 'not complete'}>"


def _once_more(problem: Exception) -> Exception:
    """Return the same exception without its traceback, whose frames hold the memory of what failed."""
    again = type(problem).__new__(type(problem), *problem.args)
    vars(again).update(vars(problem))
    return again


def logprobs_record(tokenizer: Tokenizer, token: int, logprobs: TokenLogprobs) -> dict[str, Any]:
    """Return the log probabilities of a token, and of others in its place, as reports hold them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.backend.decode([token], skip_special_tokens=False)
        return {"id": token, "token": text, "logprob": logprob, "bytes": [*tokenizer.bytes_of(token)]}

    return entry(token, logprobs.chosen) | {"top_logprobs": [entry(*each) for each in logprobs.top]}


class Askable(ABC, Uncopied):
    """What can be asked, one question at a time: its keys and values serve every question. Threads wait for one another."""

    INSTEAD = "threads may share it; another process needs a VideoQA of its own, and encodes there"
    OVERTAKEN = "another question was asked meanwhile"  # why an answer ends that is not the latest one any more

    def __init__(self, session: Session):
        self._session = session
        self._lock = threading.RLock()
        # how often it was asked; whether a report has had the times of the inputs
        self._turn = 0
        self._paid = False

    @property
    def ignores_sound(self) -> bool:
        """True if a video has sound, and no subtitles were read in its place."""
        return False

    @abstractmethod
    def _blank_report(self) -> Report:
        """Return the report of an answer before its question is read, of its own."""

    @abstractmethod
    def _read(
        self,
        question: str,
        options: GenerationOptions,
        report: Report,
        clock: Clock,
        earlier: Sequence[Turn] | None = None,
    ) -> PrefillState:
        """Return the state from which the answer is decoded. `earlier`: of a conversation; None where it is none."""

    @abstractmethod
    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None:
        """Raises DoesNotFit where a question of a conversation does not fit into the model's context."""

    def _ended(self, turn: int) -> None:
        """Is called once the answer of that number is complete, was closed or failed."""

    @overload
    def ask(
        self,
        question: str,
        *,
        schema: type[Shape],
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions)
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Asks a question. The first answer's report includes the times of the inputs, later ones do not.

        Args:
            question: taken literally.
            seed: of the draw of tokens; None for that of the `VideoQA`, so that the same question has the same answer.
            on_thoughts: called with each piece of the model's thoughts, as it comes.
            options: how the answer is generated: the fields of `keywords.GenerationKeywords`.

        Raises UsageError: an option out of range, or a question that is empty or no text. TypeError: an unknown option.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        return self._answer(question, generation, seed, on_thoughts)

    def chat(self, system: str | None = None, messages: Sequence[Mapping[str, str]] = ()) -> "Chat":
        """Begins a conversation, whose questions are asked with what was said before.

        Args:
            system: a system prompt; None for the model's own.
            messages: what was said already: dicts with `role`, "user" and "assistant" in turn, and `content`, a text.

        Raises UsageError: messages of another form, or a method that reads the question.
        """
        check_conversation(self._session.pruning.method)
        return Chat(self, check_type("system", system, str | None), turns_of(messages))

    def _answer(
        self,
        question: str,
        generation: GenerationOptions,
        seed: int | None,
        on_thoughts: Callable[[str], None] | None,
        earlier: Sequence[Turn] | None = None,
    ) -> Answer:
        """As `ask`. `earlier`: what was said before, in a conversation; None where it is none."""
        check_not_empty(question)
        seed = check_type("seed", seed, int | None)
        check_type("on_thoughts", on_thoughts, Callable | None)
        if generation.repetition_penalty is None:
            generation = replace(
                generation, repetition_penalty=self._session.loaded.generation.repetition_penalty or 1.0
            )
        if seed is None:
            seed = self._session.pruning.seed
        self._check_choices(generation)
        report = self._report_of(question, generation, seed)
        ids: list[int] = []
        instances: list[Any] = []
        on_thoughts = on_thoughts or (lambda piece: None)
        pieces = self._pieces(question, generation, seed, report, ids, instances, on_thoughts, earlier)
        return Answer(report, pieces, self._lock, ids, instances)

    def _report_of(self, question: str, options: GenerationOptions, seed: int = 0) -> Report:
        report = self._blank_report()
        fresh = Report()
        report.id = fresh.id
        report.created_utc = fresh.created_utc
        report.question = question
        report.generation = options.record(seed)
        if options.logprobs is not None:
            report.logprobs = []
        if "demo_model" not in report.warnings and not self._session.loaded.knows_words(question):
            report.warnings.append("demo_question")
        if self.ignores_sound and ABOUT_SOUND.search(question):
            report.warnings.append("sound_ignored")
        if not options.thinking and self._session.loaded.tokenizer.always_thinks:
            report.warnings.append("always_thinks")
        return report

    def _check_choices(self, options: GenerationOptions) -> None:
        """Raises UsageError: the model cannot choose among these."""
        if options.choices is None:
            return
        tokenizer = self._session.loaded.tokenizer
        if options.choices == OF_ROWS:
            raise UsageError("choices 'options' are those of the rows of a batch", "give two texts or more")
        if tokenizer.always_thinks:
            raise UsageError(
                "this model thinks before every answer, so choices have no probability before that", "leave choices out"
            )
        tokens_of(tokenizer, options)

    def _pieces(
        self,
        question: str,
        options: GenerationOptions,
        seed: int,
        report: Report,
        ids: list[int],
        instances: list[Any],
        on_thoughts: Callable[[str], None],
        turns: Sequence[Turn] | None,
    ) -> Iterator[str]:
        """Generates an answer and keeps its report and its `ids` up to date.

        `instances` gets the instance of the class that is the schema, once the answer is complete.
        """
        self._turn += 1
        turn = self._turn
        loaded = self._session.loaded
        clock = Clock(self._session.device)
        if self._paid:
            clock.seconds = dict.fromkeys(OF_INPUTS, 0.0)
            earlier = 0.0
            report.time_ms.encode_prune = 0.0
        else:  # the inputs' time, until a question has paid for it
            clock.seconds, earlier = self._spent
        fill_times(report, clock.seconds, earlier, loaded.device)
        start = clock.now()
        packing = loaded.packing
        packed = packing.seconds
        constraint = None
        if options.grammar is not None:
            with clock.stage("prefill"):  # once a model, its vocabulary is taken in
                constraint = loaded.vocabulary.constraint(options.grammar)
        state = self._read(question, options, report, clock, turns)
        if constraint is not None:
            begun = begins_with_thoughts(loaded.tokenizer, state.prompt_ids)
            constraint = AnswerConstraint(constraint, loaded.tokenizer, begun, options.thinking)
        if options.choices is None:
            tokens = TokenStream(state, options, loaded.eos_ids, seed, constraint)
        else:
            tokens = ChosenTokens(state, options, loaded.tokenizer, loaded.eos_ids, loaded.one_by_one)
        stops = StopStrings(options.stop or ())
        self._paid = True
        report.time_ms.ttft_wall = (earlier + clock.now() - start) * 1000
        report.answer = ""
        before = packing.seconds

        def update() -> None:
            ids[:] = tokens.ids
            report.tokens.new, report.finish_reason = len(ids), tokens.finish_reason
            report.stop_reason = stops.found
            if stops.found is not None:
                report.finish_reason = "stop"
            if options.choices is not None:
                report.choices = [asdict(choice) for choice in tokens.choices]
            if report.logprobs is not None:
                known = len(report.logprobs)
                new = zip(ids[known:], tokens.logprobs[known:], strict=True)
                report.logprobs += [logprobs_record(loaded.tokenizer, *each) for each in new]
            clock.seconds["pack"] = packing.seconds - packed
            total = earlier + clock.now() - start
            fill_times(report, clock.seconds, total, loaded.device, packing.seconds - before)

        update()
        try:
            pieces = stream_answer(loaded.tokenizer, tokens, state.prompt_ids)
            if options.stop:
                pieces = stops.cut(pieces)
            for piece, thought in clock.each("generate", pieces):
                if thought:
                    report.thoughts = (report.thoughts or "") + piece
                    update()
                    if piece:
                        on_thoughts(piece)
                    continue
                report.answer += piece
                update()
                yield piece
                if turn != self._turn:
                    raise UsageError(self.OVERTAKEN, "finish one answer before the next question")
            update()
            if options.schema is not None and tokens.finish_reason == "stop" and stops.found is None:
                value = checked_value(report.answer, options.schema)
                if value is not None and isinstance(options.schema, SchemaOfClass):
                    instances.append(instance_of(options.schema.kind, report.answer))
                report.parsed = value
            thinking = report.thoughts is not None and not report.answer
            report.thoughts = (report.thoughts or "").rstrip() or None
            if report.finish_reason == "length" and thinking:
                report.warnings.append("thoughts_cut")
            elif report.finish_reason == "length":
                report.warnings.append("answer_cut")
            elif report.thoughts and not report.answer and report.stop_reason is None:
                report.warnings.append("thoughts_only")
        finally:
            self._ended(turn)


class Chat(Uncopied):
    """A conversation: each question is asked with what was said before. Made by `chat` of what can be asked.

    The model reads all of it, in its own chat template; keys and values of what it has read already are used again. Thoughts are
    not part of it. An answer is, once it is complete: one that failed or was closed leaves the conversation as it was, and so does
    one that ended inside its thoughts. What does not fit into the model's context is left out, the oldest turns first; then
    `report.warnings` of the next answer has "history_cut", before it is generated.
    """

    INSTEAD = "take chat.messages"

    def __init__(self, inputs: Askable, system: str | None, turns: Sequence[Turn]):
        self.system = system
        self._inputs = inputs
        self._turns = [*turns]
        self._latest = object()  # stands for the question that may still become a turn

    def __repr__(self) -> str:
        return f"<Chat, {counted(len(self._turns), 'turn')}, about {self._inputs!r}>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as `chat` takes it, in a list of the caller's own."""
        return messages_of(self._turns)

    def clear(self) -> None:
        """Forgets what was said."""
        self._latest = object()
        self._turns = []

    def undo(self) -> str | None:
        """Takes the latest question back, with its answer. Returns it; None if there is none."""
        self._latest = object()
        return self._turns.pop().question if self._turns else None

    @overload
    def ask(
        self,
        question: str,
        *,
        schema: type[Shape],
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions)
    def ask(
        self,
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Asks the next question. The answer ends with an error if another question of the conversation was asked meanwhile.

        Args: as of `EncodedInputs.ask`. `system` belongs to the conversation.

        Raises: as `EncodedInputs.ask`, and what reading its answer raises of a prompt. UsageError: another system prompt.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        if generation.system not in (None, self.system):
            raise UsageError(
                "a conversation has one system prompt", "give it to chat(), which begins another conversation"
            )
        generation = replace(generation, system=self.system)
        check_not_empty(question)
        earlier = self._fitting(question, generation)
        answer = self._inputs._answer(question, generation, seed, on_thoughts, earlier)
        dropped = len(self._turns) - len(earlier)
        answer.report.conversation = {"turns": len(earlier), "dropped": dropped}
        if earlier and self._inputs._session.loaded.demo:
            answer.report.warnings.append("demo_history")
        if dropped:
            answer.report.warnings.append("history_cut")
        self._latest = latest = object()
        pieces = self._remembered(answer, earlier, latest)
        return Answer(answer.report, pieces, self._inputs._lock, answer.ids, answer._instances)

    def _fitting(self, question: str, generation: GenerationOptions) -> list[Turn]:
        """Return the latest turns that fit into the model's context together with the question.

        Raises DoesNotFit: it does not fit alone.
        """

        def fits(dropped: int) -> bool:
            try:
                self._inputs._check_fits(question, generation, self._turns[dropped:])
            except DoesNotFit:
                return False
            return True

        if fits(0):
            return [*self._turns]
        # Few are tried: each is rendered in a process of its own.
        dropped = bisect_left(range(len(self._turns)), True, 1, key=fits)
        turns = self._turns[dropped:]
        if not turns:
            self._inputs._check_fits(question, generation, turns)
        return turns

    def _remembered(self, answer: Answer, earlier: list[Turn], latest: object) -> Iterator[str]:
        """Yield an answer, which then becomes a turn."""
        if latest is not self._latest:
            raise UsageError(self._inputs.OVERTAKEN, "finish one answer before the next question")
        yield from answer
        said = answer.report.answer
        if latest is self._latest and (said or answer.report.thoughts is None):
            self._turns = [*earlier, Turn(answer.report.question, said)]


@dataclass
class Held:
    """A cache, and what it holds."""

    cache: KVCache | HostedCache
    prompt: torch.Tensor  # int64 on the CPU, ids of its first columns
    answer: Sequence[int] = ()  # of those behind them, which may become more

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat([self.prompt, torch.tensor(self.answer, dtype=torch.int64, device="cpu")])

    def common(self, ids: torch.Tensor) -> int:
        """Return how many columns a prompt begins with, of the same inputs, that the cache holds. `ids`: int64 on the CPU."""
        own = self.ids
        length = min(len(own), len(ids))
        differ = (own[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class EncodedInputs(Askable):
    """Inputs that were encoded once and can be asked about together, one question at a time.

    Threads wait for one another (`Answer`). A method that reads the question selects tokens for each one anew. `report` describes
    the encodings, and never changes: each answer has one of its own. `plans`: of each input, what was looked at, and how large.

    Attention is causal: keys and values before the question do not depend on it. So a later question under the same system prompt
    uses them again, and one of a conversation also those of what was said. Where tokens leave inside the language model, they
    leave by the question, and each prompt is read as a whole.

    A recurrent state (Qwen3.5) is known only where a pass ends. So where layers have one, what is before the question is a pass of
    its own, and in a conversation so is what is before the answer, unless `last_question`, to be set before it is asked, says that
    no question follows. One that follows after all waits longer.
    """

    def __init__(self, session: Session, encodings: Sequence[EncodedInput]):
        super().__init__(session)
        self._encodings = [encoding.own() for encoding in encodings]
        self.plans = [encoding.plan for encoding in encodings]
        # What prompts were read up to: one cache, which can be cropped, or copies of recurrent ones, the shortest first.
        self._held: list[Held] = []
        self.last_question = False
        self._blank = inputs_report(session, self._encodings)
        self.report = deepcopy(self._blank)
        fill_times(self.report, *self._spent, session.loaded.device)

    def __repr__(self) -> str:
        said = []
        for plan, tokens in ((encoding.plan, encoding.encoded) for encoding in self._encodings):
            count, height, width = plan.grid
            size = f"a picture of {height}x{width} units"
            if plan.kind == VIDEO:
                size = f"{plan.sampling.frames} frames, {counted(count, 'frame pair')} of {height}x{width} units"
            said.append(f"{plan.name!r}: {size}, {len(tokens.kept):,} of {plan.units:,} visual tokens kept")
        return f"<EncodedInputs {', '.join(said)}>"

    def with_session(self, session: Session) -> "EncodedInputs":
        """Return the same tokens, read by a session that differs in what happens inside the language model alone."""
        return EncodedInputs(session, self._encodings)

    @property
    def encoded(self) -> Encoded:
        """The tokens of the first input; none before the question where the method reads it. `rows` of the cache hold no data."""
        return self._encodings[0].encoded

    @property
    def plan(self) -> Plan:
        return self.plans[0]

    @property
    def ignores_sound(self) -> bool:
        return any(plan.info.has_sound and not plan.subtitles.lines for plan in self.plans)

    def read_along(
        self, question: str, ids: Sequence[int], system: str | None = None, think: str = "off"
    ) -> tuple[torch.Tensor, float]:
        """Reads a question and a given answer, the tokens `ids`, at least one: teacher forcing. Errors: as of `Answer`.

        Returns the logits of every token of the answer, each behind those before it, float32 `[len(ids), vocabulary]`; and the
        seconds from the question to the first of them.
        """
        options = GenerationOptions(max_new_tokens=len(ids), system=system, think=think)
        with self._lock:
            self._turn += 1
            clock = Clock(self._session.device)
            state = self._read(question, options, self._report_of(question, options), clock)
            seconds = sum(clock.seconds.values())
            given = torch.tensor(ids, dtype=torch.int64, device="cpu")
            loaded = self._session.loaded
            with clock.stage("generate"):
                logits = teacher_forced_logits(state, given, one_by_one=loaded.one_by_one)
            return logits, seconds

    @property
    def _spent(self) -> tuple[dict[str, float], float]:
        """The busy seconds of each stage, and the wall-clock seconds, of all inputs together."""
        every = self._encodings
        stages = {stage: sum(encoding.seconds[stage] for encoding in every) for stage in OF_INPUTS}
        return stages, sum(encoding.wall_seconds for encoding in every)

    def _blank_report(self) -> Report:
        return deepcopy(self._blank)

    @torch.inference_mode()
    def _select_for(self, question: str, report: Report) -> None:
        """Has the method select tokens for this question; keys and values of earlier ones are of no use then."""
        loaded = self._session.loaded
        before = 0.0
        if self._paid:
            before = self._prune_seconds
        self._held = []
        ids = torch.tensor(loaded.tokenizer.encode(question), dtype=torch.int64, device="cpu")
        words = embed_ids(loaded.model, ids)  # without the prompt around them
        self._encodings = [encoding.selected(words) for encoding in self._encodings]
        fill_pruning(report, self._session, self._encodings)
        report.time_ms.encode_prune = (self._prune_seconds - before) * 1000

    @property
    def _prune_seconds(self) -> float:
        return sum(encoding.encoded.prune_seconds for encoding in self._encodings)

    def _fitting_prompt(self, question: str, options: GenerationOptions, earlier: Sequence[Turn] | None) -> Prompt:
        kept = sum(encoding.kept for encoding in self._encodings)
        return fitting_prompt(self._session, self.plans, question, options, kept, earlier or ())

    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None:
        self._fitting_prompt(question, options, earlier)

    def _read(
        self,
        question: str,
        options: GenerationOptions,
        report: Report,
        clock: Clock,
        earlier: Sequence[Turn] | None = None,
    ) -> PrefillState:
        """Return the state from which the answer is decoded; the tokens are selected first, if the method reads the question."""
        with clock.stage("prefill"):
            prompt = self._fitting_prompt(question, options, earlier)
        if selects := any(encoding.unselected for encoding in self._encodings):
            with clock.stage("encode"):
                self._select_for(question, report)
        with clock.stage("prefill"):
            last = self.last_question or selects  # what is selected anew has a prompt of its own
            state = self._prefill(prompt, last, goes_on=earlier is not None)
            state.prompt_ids = prompt.input_ids
            visual = sum(len(encoding.encoded.kept) for encoding in self._encodings)
            columns = state.cache.length
            report.tokens = TokenCounts(columns - visual, visual, columns, 0)
        fill_dropped(report, state.dropping)
        return state

    def _prefill(self, prompt: Prompt, last: bool, goes_on: bool) -> PrefillState:
        """Return the state that decoding of a prompt starts from.

        `last`: nothing has to be kept for another question. `goes_on`: it may be one of the same conversation.
        """
        loaded = self._session.loaded
        pruning = self._session.pruning
        model = loaded.model
        read = [encoding.encoded for encoding in self._encodings]
        positions = positions_of(prompt, self.plans, loaded)
        pruned = prune_prompt(prompt.input_ids, prompt.places, read, positions, partial(embed_ids, model))
        share = pruning.budget.share_of_all([plan.grid for plan in self.plans])
        if dropping := dropping_for(model, pruning.method, share, read, pruned):
            return prefill(
                model, pruned.embeds, pruned.positions, pruned.following, None, pruned.sizes, dropping, pruned.deepstack
            )
        crops = can_crop(model)
        # Columns up to which another prompt may be the same.
        ends = [prompt.prefix_length, prompt.turn_length] if goes_on else [prompt.prefix_length]
        ends = [int((pruned.columns < end).sum()) for end in ends]
        if goes_on and crops:
            ends.append(len(pruned) - 1)  # the last column is read in any case: its logits are those of the answer
        inputs = int(pruned.visual.nonzero()[-1]) + 1
        cache, known = self._take_prefix(pruned.ids[: ends[-1]], inputs, last)
        if not (crops or last):
            for end in ends:
                if end <= known:
                    continue
                if cache is None:
                    cache = new_cache(model, end)
                part = pruned[known:end]
                given = {"sizes": part.sizes, "deepstack": part.deepstack}
                layers_of(model).forward(model, part.embeds, part.positions, cache, **given)
                self._held = [*self._held[:1], Held(cache, pruned.ids[:end])]
                cache = cache.copy()
                known = end
        rest = pruned[known:]
        state = prefill(model, rest.embeds, rest.positions, rest.following, cache, rest.sizes, None, rest.deepstack)
        if crops and goes_on:
            self._held = [Held(state.cache, pruned.ids, state.answer)]
        elif crops:
            self._held = [Held(state.cache, pruned.ids[: ends[-1]])]
        return state

    def _take_prefix(self, ids: torch.Tensor, inputs: int, last: bool) -> tuple[KVCache | HostedCache | None, int]:
        """Return a cache of the beginning of a prompt, and how many of its columns it holds.

        `ids`: int64 on the CPU, those columns of the prompt that another one may have had. `inputs`: columns up to the end of the
        inputs; a cache that holds fewer is of no use.
        """
        held = self._held
        self._held = []
        if can_crop(self._session.loaded.model):
            if not held or (known := held[0].common(ids)) < inputs:
                return None, 0
            cache = held[0].cache
            cache.crop(known)
            self._held = [Held(cache, ids[:known])]  # a prompt that breaks off leaves this much
            return cache, known
        held = [each for each in held if each.common(ids) == len(each.prompt)]
        if not held:
            return None, 0
        longest = held[-1]
        if last:
            return longest.cache, len(longest.prompt)
        self._held = held
        return longest.cache.copy(), len(longest.prompt)


def together(session: Session, inputs: Sequence[EncodedInputs]) -> EncodedInputs:
    """Inputs that were encoded apart, to be asked about together. Raises UsageError: none, or one of another model or pruning."""
    if not inputs:
        raise UsageError("there is no input", "give at least one path, or what encode made of it")
    if any(encoded._session is not session for encoded in inputs):
        raise UsageError("an input was encoded by another VideoQA", "encode it with this one")
    if len(inputs) == 1:
        return inputs[0]
    return EncodedInputs(session, [encoding for encoded in inputs for encoding in encoded._encodings])
