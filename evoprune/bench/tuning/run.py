"""One run of `evoprune tune`: full answers, trials of candidates, and the document of results."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any, ClassVar

from evoprune import methods
from evoprune.backend.devices import environment
from evoprune.bench.evaluation.shared import SharedFrames, SharedRows
from evoprune.bench.tuning.agreement import agreement
from evoprune.bench.tuning.full_answers import TOKENS, Answering, FullAnswers, Progress, encode
from evoprune.bench.tuning.results import least_tokens, provable, recommended, result_rows
from evoprune.bench.tuning.search import Candidate, Known, Trial, candidates, search
from evoprune.errors import OutOfMemory, UsageError, error_record
from evoprune.session.engine import Engine, check_fits
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.text import counted

GENERAL = (
    "What happens in this video, from the beginning to the end?",
    "Who or what can be seen, and where?",
    "Which details, colours, numbers and words can be seen?",
)
SHARE_OF_FULL = 1 / 3  # of the time limit that the full answers may take


@dataclass(frozen=True)
class Settings:
    """What is tuned, and on what. Raises UsageError: no video or question, or a number out of range."""

    videos: tuple[str, ...]  # paths of files or folders of frames
    questions: tuple[str, ...] = GENERAL  # asked of every one
    agree: float = 0.98  # share of tokens at which the pruned model must choose as the full one does, in (0, 1)
    time_limit_s: float = 600.0  # of the whole run, loading included
    budgets: tuple[float, ...] = ()  # as for `search.candidates`, and `methods`
    methods: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0  # for methods that select at random

    def __post_init__(self):
        if not self.videos or not self.questions:
            raise UsageError("there is nothing to ask", "give at least one video and one question")
        if not 0 < self.agree < 1:
            hint = "for example 0.98; with -b full all tokens agree"
            raise UsageError(f"agreement {self.agree:g} is not between 0 and 1", hint)
        if not self.time_limit_s > 0:
            raise UsageError(f"a time limit of {self.time_limit_s:g} s leaves no time", "for example 600")

    def record(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "sampling")}
        return own | asdict(self.model) | asdict(self.sampling)


class Run:
    """Construct it, `load` a model, `run`. The results are in `document`, at any time."""

    schema: ClassVar[str]  # of the document

    def __init__(self, settings: Settings, now: Callable[[], float] = time.perf_counter):
        self.settings, self._now, self._begun = settings, now, now()
        self.loaded: LoadedModel | None = None  # before `load`
        self.answering: Answering | None = None  # the full answers; None before `run`

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raises what `load_model` raises."""
        self.loaded = load_model(self.settings.model, to_answer=True, progress=progress)

    @property
    def spent_s(self) -> float:
        return self._now() - self._begun

    @property
    def left_s(self) -> float:
        return self.settings.time_limit_s - self.spent_s

    def answer(self, progress: Progress) -> list[FullAnswers]:
        """Raises what `Answering.answer` raises."""
        engine, settings = Engine(self.loaded, PruneOptions(seed=self.settings.seed).config()), self.settings
        seconds = SHARE_OF_FULL * settings.time_limit_s
        self.answering = Answering(engine, settings.sampling, settings.questions, seconds, self._now)
        self.answering.answer(settings.videos, progress)
        return self.answering.made

    def facts(self) -> dict[str, Any]:
        """What every document says of a run, as plain data for JSON."""
        made, problems = (self.answering.made, self.answering.problems) if self.answering else ([], {})
        failures = [{"video": path, "message": error_record(problem)["message"]} for path, problem in problems.items()]
        return {
            "model": asdict(self.loaded.facts()) if self.loaded else None,
            "env": asdict(environment(self.loaded.device)) if self.loaded else None,
            "settings": self.settings.record(),
            "videos": {"wanted": len(self.settings.videos), "answered": len(made), "failed": len(problems)},
            "questions": self.answering.asked if self.answering else 0,
            "answer_tokens": sum(full.tokens for full in made),
            "seconds": self.spent_s,
            "failures": failures,
        }


class Tuning(Run):
    """Finds the fastest setting; `known` has the trials of every candidate.

    With quantised weights the full answers are those of the weights as they are, where there is memory for them. Quantisation alone
    is one more candidate.

    Raises UsageError: an unknown method, settings that it does not have, or nothing to try.
    """

    schema = "evoprune/tune@1"

    def __init__(self, settings: Settings, now: Callable[[], float] = time.perf_counter):
        super().__init__(settings, now)
        self.known: Known = {made: [] for made in candidates(settings.budgets, settings.methods)}
        if not self.known:
            raise UsageError("no candidate prunes anything", "give budgets below 1 (-b 0.25,0.1)")
        self._quantizes, self._problem = settings.model.quantize != "none", None
        if self._quantizes:
            self.known = {Candidate("none", 1.0): []} | self.known

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raises what `load_model` raises. UsageError: a method cannot act in the model."""
        if self._quantizes:
            with suppress(OutOfMemory):  # then the full answers are those of the quantised weights
                exact = replace(self.settings.model, quantize="none", store_quantized=False)
                self.loaded = load_model(exact, to_answer=True)
        if self.loaded is None:
            super().load(progress)
        for candidate in self.known:
            check_fits(methods.parse(candidate.method), self.loaded.model.config)

    @property
    def has_results(self) -> bool:
        return any(self.known.values())

    def run(self, progress: Progress = lambda what: None, note: Progress = lambda what: None) -> None:
        """Answers in full, then tries candidates until everything is known or the time is over.

        Calls `progress` with what comes next, `note` with what is to be read at once. Raises what `Answering.answer` raises.
        """
        made, held = self.answer(progress), {}
        if self._quantizes and self.loaded.quantize == "none":
            self.loaded = self.answering.engine = None  # frees the weights
            super().load(lambda done, of: progress(f"quantizing, {done} of {of} layers"))
        elif self._quantizes:
            self._problem = "full answers are those of the quantised weights, because memory for the others is missing"
            note(self._problem)
        if warning := self._too_few():
            note(warning)

        def trial(candidate: Candidate, video: int) -> Trial:
            if video not in held:
                held.clear()  # the frames and rows of the video before
                held[video] = SharedFrames(), SharedRows()
            return self._try(candidate, made[video], *held[video])

        goal = self.settings.agree
        trials = search(self.known, len(made), goal, trial, lambda: self.left_s, lambda video: made[video].took_s)
        for candidate, video in trials:
            progress(f"video {video + 1} of {len(made)}, {candidate.name}{self._best()}")

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """The results so far, for JSON; `error` is what cut the run short."""
        rows = result_rows(self.known, self.settings.agree)
        passing = recommended(rows)
        best = max(rows, key=lambda row: (row["low"], row["agreement"], -row["first_token"]), default=None)
        return {
            **self.facts(),
            "rows": rows,
            "recommended": passing and passing["name"],
            "options": passing and {"budget": passing["budget"], "method": passing["method"]},
            "best": best and best["name"],
            "notes": self._notes() if self.answering and self.answering.made else [],
            "error": error,
        }

    def _try(self, candidate: Candidate, full: FullAnswers, frames: SharedFrames, rows: SharedRows) -> Trial:
        start = self._now()
        pruning = PruneOptions(candidate.budget, candidate.method, seed=self.settings.seed)
        engine = Engine(self.loaded, pruning.config())
        video, seconds = encode(engine, full.path, self.settings.sampling, frames, rows)
        made, pruning = [agreement(given, video) for given in full.references], video.report.pruning
        return Trial(
            agree=sum(int(one.agrees.sum()) for one in made),
            tokens=full.tokens,
            kl=[value for one in made for value in one.kl.tolist()],
            first_s=seconds + made[0].seconds,
            full_s=full.first_s,
            took_s=self._now() - start,
            kept=pruning.visual_tokens_kept / pruning.visual_tokens_in,
            live=pruning.encoder_live_share,
        )

    def _too_few(self) -> str | None:
        """A sentence that says so where nothing could pass even if all tokens agreed."""
        tokens, goal = [full.tokens for full in self.answering.made], self.settings.agree
        if len(tokens) > 1 and provable(sum(tokens)) >= goal:
            return None
        videos = max(2, -(-least_tokens(goal) // max(1, round(mean(tokens)))))
        return (
            f"{counted(sum(tokens), 'token')} of answers about {counted(len(tokens), 'video')} cannot prove that "
            f"{100 * goal:g}% agree, even if all do: that takes about {videos} such videos, or more questions (-Q)"
        )

    def _notes(self) -> list[str]:
        answering, known = self.answering, self.known.values()
        made, settings = [self._problem, self._too_few()], self.settings
        wanted = len(settings.videos) - len(answering.problems)
        if len(answering.made) < wanted:
            made.append(f"the time limit left out {wanted - len(answering.made)} of {counted(wanted, 'video')}")
        if answering.tokens < TOKENS[0] or answering.asked < len(settings.questions):
            asked = f"{answering.asked} of {counted(len(settings.questions), 'question')}"
            made.append(f"the time limit allowed answers of {answering.tokens} tokens to {asked}")
        fewer = sum(len(trials) < len(answering.made) for trials in known)
        if self.has_results and fewer:
            said = "settings were not tried on all videos: the time went to the better ones"
            made.append(f"{fewer} of {len(known)} {said}")
        return [note for note in made if note]

    def _best(self) -> str:
        best = recommended(result_rows(self.known, self.settings.agree))
        return f"; best so far: {best['name']}, first token {1 / best['first_token']:.1f}x as fast" if best else ""
