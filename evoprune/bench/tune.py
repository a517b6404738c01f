"""What `evoprune tune` runs: the unpruned model answers, candidates are tried, and the results become the rows of a table.

While there is no time for everything, candidates are tried by successive halving (arXiv 1502.07943) over videos.

KL orders the candidates, and agreement is estimated along that order: one with a lower KL is not taken to agree less (isotonic
regression, Ayer and others 1955). The tokens of a video depend on each other, so that they prove less than independent ones: by the
design effect (Kish 1965), variance over videos / variance of independent tokens, estimated from all candidates together.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar, NamedTuple

import numpy as np

from evoprune import methods
from evoprune.backend import pack_waiting
from evoprune.bench.agreement import Reference, agreement_of, reference
from evoprune.bench.results import Results
from evoprune.bench.scores import Z95, share_variance, wilson
from evoprune.bench.shared import (
    SharedInput,
    SharedRows,
    TimeLimit,
    after_tower_below,
    after_tower_note,
    model_and_machine,
    swept,
)
from evoprune.bench.tune_results import TuneResults
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError, error_record
from evoprune.session import (
    EncodedInputs,
    LoadedModel,
    ModelDescription,
    ModelOptions,
    OpenInput,
    OpenInputs,
    PruneOptions,
    ReadAhead,
    SamplingOptions,
    Session,
    check_fits,
    describe,
    idle_cores,
    in_flight,
    load_model,
    open_inputs,
)
from evoprune.util import counted

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
# This project's method as it is, with as few rows as tokens, with more rows and none left out before the tower, and with tokens
# spread evenly over time; and the paper's merging.
METHODS = ("evoprune", "evoprune:rows=1", "evoprune:first=0:rows=0.5", "evoprune:floor=1", "evoprune-paper")
FIRST = 2  # videos that every candidate sees
MIN_CANDIDATES = 3  # candidates that are never left out for want of time


@dataclass(frozen=True)
class Candidate:
    """Hold a method, with its settings in its name, at a budget."""

    method: str
    budget: float

    @property
    def name(self) -> str:
        return f"{self.method} -b {self.budget:g}"


def candidates(budgets: Sequence[float] = (), more: Sequence[str] = ()) -> list[Candidate]:
    """List `METHODS` and `more` at each of `budgets` or `BUDGETS`, without those that prune nothing. Raises as `methods.parse`."""
    return [Candidate(*pair) for pair in swept((*METHODS, *more), sorted({*(budgets or BUDGETS)}, reverse=True))]


class Trial(NamedTuple):
    """Hold the figures of a candidate on one video."""

    agree: int  # tokens of the full answers at which the first choice is the full model's
    tokens: int  # all of them
    kl: list[float]  # of every token
    first_s: float  # to the first token
    full_s: float  # the same with nothing pruned
    took_s: float  # of the trial
    kept: float  # share of the visual tokens
    live: float  # share of the tower's rows


Known = dict[Candidate, list[Trial]]


def observed(trials: Sequence[Trial]) -> float:
    return sum(trial.agree for trial in trials) / sum(trial.tokens for trial in trials)


def promising(known: Known, goal: float) -> list[Candidate]:
    """Sort candidates: first those that reach the goal, by time; then the others, by agreement."""

    def key(candidate: Candidate) -> tuple[bool, float]:
        share = observed(known[candidate])
        if share < goal:
            return True, -share
        return False, median(trial.first_s / trial.full_s for trial in known[candidate])

    return sorted((candidate for candidate in known if known[candidate]), key=key)


def rungs(videos: int) -> list[range]:
    """Return the videos of each round: the first two, then each time as many as before."""
    ends = [min(FIRST, videos)]
    while ends[-1] < videos:
        ends.append(min(2 * ends[-1], videos))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def affordable(order: Sequence[Candidate], known: Known, new: int, rest: int, rounds: int, left: float) -> int:
    """Return how many of the candidates, the most promising first, go on to the next round.

    `new`, `rest`: videos of the round, and of it and all later `rounds`. `left`: seconds, in equal shares for each of these.
    """
    costs = [mean(trial.took_s for trial in known[candidate]) for candidate in order]
    if sum(costs) * rest <= left:
        return len(order)
    return max(min(MIN_CANDIDATES, len(order)), sum(used * new <= left / rounds for used in accumulate(costs)))


def search(
    known: Known,
    videos: int,
    goal: float,
    trial: Callable[[Candidate, int], Trial],
    left: Callable[[], float],
    first_guess: Callable[[int], float],
) -> Iterator[tuple[Candidate, int]]:
    """Tries candidates, video by video, while there is time; `known` grows. Yields the candidate and the video before each trial.

    `goal`: agreement that is asked for. `left`: seconds until the end. `first_guess`: seconds of a first trial on a video.
    """
    alive = list(known)
    all_rounds = rungs(videos)
    for number, these in enumerate(all_rounds):
        if number:
            alive = [candidate for candidate in promising(known, goal) if candidate in alive]
            rounds = len(all_rounds) - number
            alive = alive[: affordable(alive, known, len(these), videos - these.start, rounds, left())]
        for video in these:
            for candidate in alive:
                took = [earlier.took_s for earlier in known[candidate]]
                expected = mean(took) if took else first_guess(video)
                if left() >= expected:
                    yield candidate, video
                    known[candidate].append(trial(candidate, video))


SAME_TIME = 0.05  # medians of times that differ by less are taken as equal


def result_rows(known: Known, goal: float) -> list[dict[str, Any]]:
    """Return a dict for each candidate that was tried, the fastest first (docs/json.md).

    `agreement` is estimated from all candidates (`smoothed`), with its 95% interval over videos; `observed` is its own. `passes`:
    the interval lies at or above the goal. `frontier`: no other is at least as fast and agrees more.
    """
    tried = {candidate: Trial(*zip(*trials, strict=True)) for candidate, trials in known.items() if trials}  # of tuples
    effect = design_effect([(np.array(seen.agree, float), np.array(seen.tokens, float)) for seen in tried.values()])
    rows = []
    shares = _estimates(tried)
    times = _times(tried)
    for candidate, seen in tried.items():
        tokens = sum(seen.tokens)
        videos = len(seen.tokens)
        share = shares[candidate]
        kl = np.concatenate(seen.kl)
        low, high = bounds(share, tokens, videos, effect)
        rows.append(
            {
                "name": candidate.name,
                "method": candidate.method,
                "budget": candidate.budget,
                "videos": videos,
                "tokens": tokens,
                "agreement": share,
                "observed": sum(seen.agree) / tokens,
                "low": low,
                "high": high,
                "kl": float(np.mean(kl)),
                "kl_p95": float(np.percentile(kl, 95)),
                "first_token_ms": 1000 * float(np.median(seen.first_s)),
                "full_first_token_ms": 1000 * float(np.median(seen.full_s)),
                "first_token": times[candidate],
                "kept_share": float(np.mean(seen.kept)),
                "live_share": float(np.mean(seen.live)),
                "passes": low >= goal,
            }
        )
    place = [(-row["first_token"], row["agreement"]) for row in rows]
    for row, own in zip(rows, place, strict=True):
        row["frontier"] = not any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in place)
    return sorted(rows, key=lambda row: row["first_token"])


def _estimates(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """Return the agreement of each, estimated among those that were tried on as many videos."""
    estimates = {}
    for videos in {len(seen.tokens) for seen in tried.values()}:
        group = {candidate: seen for candidate, seen in tried.items() if len(seen.tokens) == videos}
        sums = [(sum(seen.agree), sum(seen.tokens), np.mean(np.concatenate(seen.kl))) for seen in group.values()]
        estimates |= dict(zip(group, smoothed(*map(np.array, zip(*sums, strict=True))).tolist(), strict=True))
    return estimates


def _times(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """Return `first_token` of each. Settings of a method with equally many rows and tokens do the same work; times differ by
    noise.
    """
    of_work = defaultdict(list)
    works = {}
    for candidate, seen in tried.items():
        names = tuple(each.name for each in methods.parse_names(candidate.method))
        works[candidate] = names, round(mean(seen.kept), 6), round(mean(seen.live), 6)
    for candidate, seen in tried.items():
        of_work[works[candidate]] += [first / full for first, full in zip(seen.first_s, seen.full_s, strict=True)]
    return {candidate: median(of_work[work]) for candidate, work in works.items()}


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest row that passes. Of those that are as fast, within `SAME_TIME`, the one with the fewest settings."""
    passing = [row for row in rows if row["passes"]]
    fastest = min((row["first_token"] for row in passing), default=0.0)
    as_fast = [row for row in passing if row["first_token"] <= fastest * (1 + SAME_TIME)]

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return sum(len(each.settings) for each in methods.parse_names(row["method"])), row["first_token"]

    return min(as_fast, key=order, default=None)


def smoothed(agree: np.ndarray, tokens: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Return `[S]`: the share of `agree`ing `tokens` of each of S candidates, estimated from all: it does not rise with the mean
    `kl`.
    """
    blocks: list[tuple[float, float, list[int]]] = []  # agreeing tokens, tokens, and the candidates that share them
    for candidate in np.argsort(kl, kind="stable"):
        block = float(agree[candidate]), float(tokens[candidate]), [int(candidate)]
        while blocks and blocks[-1][0] * block[1] < block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = before[0] + block[0], before[1] + block[1], before[2] + block[2]
        blocks.append(block)
    shares = np.zeros(len(agree))
    for agreeing, all_tokens, members in blocks:
        shares[members] = agreeing / all_tokens
    return shares


def design_effect(candidates: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Return how many tokens prove as much as one independent token; at least 1, None where no candidate shows it.

    `candidates`: of each the agreeing tokens and the tokens of every video.
    """
    over_videos = independent = 0.0
    for agree, tokens in candidates:
        if len(tokens) < 2:
            continue
        total = float(tokens.sum())
        share = float(agree.sum()) / total
        over_videos += share_variance(agree, tokens)
        independent += share * (1 - share) / total
    if not independent:
        return None
    return max(1.0, over_videos / independent)


def bounds(share: float, tokens: int, videos: int, effect: float | None) -> tuple[float, float]:
    """Return the 95% interval of a share, for tokens / `design_effect` independent tokens; one a video if that is None."""
    if effect is None:
        return wilson(share, float(videos))
    return wilson(share, max(1.0, tokens / effect))


def provable(tokens: float) -> float:
    """Return the highest lower bound that so many independent tokens can prove, all of them agreeing."""
    return tokens / (tokens + Z95**2)


def least_tokens(agree: float) -> int:
    """Independent tokens that prove this agreement if all of them agree; `agree` is below 1."""
    return math.ceil(agree * Z95**2 / (1 - agree) - 1e-9)


TOKENS = (64, 32, 16, 8)  # of an answer, at most; fewer where time is short
SLOW = 1 / 10  # of the time there is: a first encoding that takes longer is not repeated
Progress = Callable[..., None]  # what comes next; perhaps how many of it are done, and in all


@dataclass(frozen=True)
class FullAnswers:
    """Hold the answers of the unpruned model about a video, a reference a question."""

    path: str
    references: tuple[Reference, ...]
    first_s: float  # seconds of encoding and of reading the first question
    took_s: float  # that all of it took

    @property
    def tokens(self) -> int:
        return sum(len(given.ids) for given in self.references)


def encode(
    session: Session,
    path: str,
    sampling: SamplingOptions,
    rows: SharedRows | None = None,
    ahead: ReadAhead | None = None,
) -> tuple[EncodedInputs, float]:
    """Return a video, encoded, and the seconds of encoding: also those that shared rows have saved.

    `ahead`: what may have read it.
    """
    kind = partial(SharedInput, shared_rows=rows) if rows else OpenInput
    given = {"names": [path], "kind": kind, "ahead": ahead}
    with closing(open_inputs(session, [Path(path)], sampling, **given)) as opened:
        video = opened.encode()
    seconds = video.report.time_ms.encode / 1000
    if rows:
        seconds += rows.saved
    return video, seconds


class Answering:
    """Answers the questions about all videos within a time limit.

    Where answers would take longer they become shorter, then fewer questions are asked, then videos are left out. The patches of
    videos that were answered stay in memory until this is closed.
    """

    def __init__(
        self,
        session: Session,
        sampling: SamplingOptions,
        questions: tuple[str, ...],
        limit: TimeLimit,
        think: str = "off",
        ahead: ReadAhead | None = None,
    ):
        self._think = think
        self._ahead = ahead
        self.made: list[FullAnswers] = []  # a video each
        self.problems: dict[str, EvopruneError] = {}  # of videos that cannot be read or computed, by path
        # of an answer, at most; of a video
        self.tokens = TOKENS[0]
        self.asked = len(questions)
        self._next_s = 0.0  # that the next video takes
        self._held: list[OpenInputs] = []  # those of `made`
        self.session = session.unpruned()
        self._sampling = sampling
        self._questions = questions
        self._limit = limit

    def answer(self, videos: tuple[str, ...], progress: Progress = lambda *what: None) -> None:
        """Answers what the time allows, the first readable video in any case. Raises the first problem if there is none."""
        loaded = self.session.loaded
        # What takes cores from the model would falsify the times.
        upcoming = in_flight(videos, self._open, loaded) if idle_cores(loaded) else None
        with ExitStack() as cleanup:
            if upcoming:
                cleanup.enter_context(closing(upcoming))
            for number, path in enumerate(videos):
                if self.made and self._limit.left < self._next_s:
                    return
                progress("answering in full, video", number, len(videos))
                try:
                    if upcoming:
                        _, opened = next(upcoming)
                    else:
                        opened = self._open(path, loaded.cores)
                    self.made.append(self._answered(path, opened, len(videos) - number))
                    if len(self.made) > 1:
                        self._next_s = self.made[-1].took_s
                except (VideoError, ModelError, OutOfMemory) as problem:
                    self.problems[path] = problem
        if not self.made:
            raise next(iter(self.problems.values()))

    def close(self) -> None:
        for opened in self._held:
            opened.close()
        self._held.clear()

    def _open(self, path: str, cores: int | None) -> OpenInputs:
        inputs = open_inputs(self.session, [path], self._sampling, ahead=self._ahead)
        inputs.use_cores(cores)
        return inputs

    def _answered(self, path: str, opened: OpenInputs | Exception, videos: int) -> FullAnswers:
        """Answer in full.

        `opened`: the video, to be read, or why it cannot be. `videos`: how many are to be answered from now on.
        """
        if isinstance(opened, Exception):
            raise opened
        self._held.append(opened)
        start = self._limit.now()
        video, seconds = encode(self.session, path, self._sampling, ahead=self._ahead)
        opened.read()  # finds the patches, and keeps them
        spent = self._limit.now() - start
        if not self.made:
            pack_waiting(self.session.loaded.model)  # or the first answers would be slower than the later ones
            if spent < SLOW * self._limit.seconds:
                video, seconds = encode(self.session, path, self._sampling)  # the first time also warms up
            self._plan(video, spent, videos)
        references: list[Reference] = []
        fresh = video.with_session(self.session)  # has read no prompt: its first one takes as long as a pruned one's
        for question in self._questions[: self.asked]:
            answer = video.ask(question, max_new_tokens=self.tokens, think=self._think)
            str(answer)  # generates it
            ended = answer.report.finish_reason == "stop"
            references.append(reference(fresh, question, answer.ids, ended, think=self._think))
        return FullAnswers(path, tuple(references), seconds + references[0].seconds, self._limit.now() - start)

    def _plan(self, video: EncodedInputs, encoding: float, videos: int) -> None:
        """Choose the longest answers to the most questions for which there is time, by a short answer.

        `encoding`: seconds a video.
        """
        question = self._questions[0]
        every = len(self._questions)
        for _ in range(2):  # the first time also warms up
            start = self._limit.now()
            answer = video.ask(question, max_new_tokens=TOKENS[-1], think=self._think)
            str(answer)
            reference(video, question, answer.ids, ended=False, think=self._think)
        token = (answer.report.time_ms.generate or 0.0) / 1000 / max(1, len(answer.ids))
        reading = self._limit.now() - start - token * len(answer.ids)
        choices = [(tokens, every) for tokens in TOKENS] + [(TOKENS[-1], asked) for asked in range(every - 1, 0, -1)]
        for self.tokens, self.asked in choices:
            self._next_s = encoding + self.asked * (reading + self.tokens * token)
            if videos * self._next_s <= self._limit.left:
                return


GENERAL = (
    "What happens in this video, from the beginning to the end?",
    "Who or what can be seen, and where?",
    "Which details, colours, numbers and words can be seen?",
)
SHARE_OF_FULL = 1 / 3  # of the time limit that the full answers may take


@dataclass(frozen=True)
class TuneSettings:
    """Hold the settings of a tuning, and its videos. Raises UsageError: no video or question, or a number out of range."""

    videos: tuple[str, ...]  # paths of files or folders of frames
    questions: tuple[str, ...] = GENERAL  # asked of every one
    agree: float = 0.98  # share of tokens at which the pruned model must choose as the full one does, in (0, 1)
    time_limit_s: float = 600.0  # of the whole run, loading included
    budgets: tuple[float, ...] = ()  # as for `search.candidates`, and `methods`
    methods: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0  # for methods that select at random
    think: str = "off"  # as of `GenerationOptions`

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
    results_of: ClassVar[Callable[[dict[str, Any]], Results]]

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        self.settings = settings
        self.limit = TimeLimit(settings.time_limit_s, now)
        self.loaded: LoadedModel | None = None  # before `load`
        self.answering: Answering | None = None  # the full answers; None before `run`
        self.ahead: ReadAhead | None = None  # what may have read the first video already
        self.model: ModelDescription | None = None  # before `load`

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model; `model`: what is known of it, if that was asked. Raises what `load_model` raises."""
        self.model = model or describe(self.settings.model)
        self.loaded = load_model(self.model, to_answer=True, progress=progress)

    def answer(self, progress: Progress) -> list[FullAnswers]:
        """Raises what `Answering.answer` raises."""
        session = Session(self.loaded, PruneOptions(seed=self.settings.seed).config())
        settings = self.settings
        limit = TimeLimit(SHARE_OF_FULL * settings.time_limit_s, self.limit.now)
        given = session, settings.sampling, settings.questions, limit
        self.answering = Answering(*given, settings.think, self.ahead)
        try:
            self.answering.answer(settings.videos, progress)
        except BaseException:  # such as Ctrl-C while a video is read
            self.answering.close()
            raise
        return self.answering.made

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far, for JSON; `error` is what cut the run short."""
        raise NotImplementedError

    def results(self, error: dict | None = None) -> Results:
        """Return the results so far, with their schema."""
        return type(self).results_of({"schema": self.schema} | self.document(error))

    def facts(self) -> dict[str, Any]:
        """Return what every document says of a run, as plain data for JSON."""
        answers = []
        problems = {}
        asked = 0
        if self.answering:
            answers = self.answering.made
            problems = self.answering.problems
            asked = self.answering.asked
        failures = [{"video": path, "message": error_record(problem)["message"]} for path, problem in problems.items()]
        return {
            **model_and_machine(self.loaded),
            "settings": self.settings.record(),
            "videos": {"wanted": len(self.settings.videos), "answered": len(answers), "failed": len(problems)},
            "questions": asked,
            "answer_tokens": sum(full.tokens for full in answers),
            "seconds": self.limit.spent,
            "failures": failures,
        }


class Tuning(Run):
    """Finds the fastest setting; `known` has the trials of every candidate.

    With quantised weights the full answers are those of the weights as they are, where there is memory for them. Quantisation alone
    is one more candidate.

    Raises UsageError: an unknown method, settings that it does not have, or nothing to try.
    """

    schema = "evoprune/tune@1"
    results_of = TuneResults

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        super().__init__(settings, now)
        self.known: Known = {candidate: [] for candidate in candidates(settings.budgets, settings.methods)}
        if not self.known:
            raise UsageError("no candidate prunes anything", "give budgets below 1 (-b 0.25,0.1)")
        self._quantizes = settings.model.quantize != "none"
        self._problem = None
        if self._quantizes:
            self.known = {Candidate("none", 1.0): []} | self.known

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. Raises what `load_model` raises. UsageError: a method cannot act in the model."""
        self.model = model = model or describe(self.settings.model)
        for candidate in self.known:
            check_fits(methods.parse(candidate.method), model)
        if self._quantizes:
            with suppress(OutOfMemory):  # then the full answers are those of the quantised weights
                exact = replace(model.options, quantize="none", store_quantized=False)
                self.loaded = load_model(replace(model, options=exact), to_answer=True)
        if self.loaded is None:
            super().load(progress, model)

    @property
    def has_results(self) -> bool:
        return any(self.known.values())

    def run(self, progress: Progress = lambda *what: None, note: Callable[[str], None] = lambda what: None) -> None:
        """Answers in full, then tries candidates until everything is known or the time is over.

        Calls `progress` with what comes next, `note` with what is to be read at once. Raises what `Answering.answer` raises.
        """
        answers = self.answer(progress)
        held = {}
        if self._quantizes and self.loaded.quantize == "none":
            self.answering.close()
            patches = self.loaded.patches
            self.loaded = self.answering.session = None  # frees the weights
            super().load(lambda done, of: progress("quantizing, layer", done, of), self.model)
            self.loaded.patches = patches
        elif self._quantizes:
            self._problem = "full answers are those of the quantised weights, because memory for the others is missing"
            note(self._problem)
        if warning := self._too_few():
            note(warning)

        def trial(candidate: Candidate, video: int) -> Trial:
            if video not in held:
                held.clear()  # the rows of the video before
                held[video] = SharedRows()
            start = self.limit.now()
            full = answers[video]
            session = Session(
                self.loaded, PruneOptions(candidate.budget, candidate.method, seed=self.settings.seed).config()
            )
            encoded, seconds = encode(session, full.path, self.settings.sampling, held[video])
            along = [agreement_of(given, encoded) for given in full.references]
            pruning = encoded.report.pruning
            return Trial(
                agree=sum(int(result.agrees.sum()) for result in along),
                tokens=full.tokens,
                kl=[value for result in along for value in result.kl.tolist()],
                first_s=seconds + along[0].seconds,
                full_s=full.first_s,
                took_s=self.limit.now() - start,
                kept=pruning.visual_tokens_kept / pruning.visual_tokens_in,
                live=pruning.encoder_live_share,
            )

        goal = self.settings.agree
        trials = search(
            self.known, len(answers), goal, trial, lambda: self.limit.left, lambda video: answers[video].took_s
        )
        for candidate, video in trials:
            progress(f"video {video + 1} of {len(answers)}, {candidate.name}{self._best()}")
        self.answering.close()

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far, for JSON; `error` is what cut the run short."""
        rows = result_rows(self.known, self.settings.agree)
        passing = recommended(rows)
        best = max(rows, key=lambda row: (row["low"], row["agreement"], -row["first_token"]), default=None)
        notes = []
        if self.answering and self.answering.made:
            notes = self._notes()
        return {
            **self.facts(),
            "rows": rows,
            "recommended": passing and passing["name"],
            "options": passing and {"budget": passing["budget"], "method": passing["method"]},
            "best": best and best["name"],
            "notes": notes,
            "error": error,
        }

    def _too_few(self) -> str | None:
        """Return a sentence that says so where nothing could pass even if all tokens agreed."""
        tokens = [full.tokens for full in self.answering.made]
        goal = self.settings.agree
        if len(tokens) > 1 and provable(sum(tokens)) >= goal:
            return None
        videos = max(2, -(-least_tokens(goal) // max(1, round(mean(tokens)))))
        return (
            f"{counted(sum(tokens), 'token')} of answers about {counted(len(tokens), 'video')} cannot prove that "
            f"{100 * goal:g}% agree, even if all do: that takes about {videos} such videos, or more questions (-Q)"
        )

    def _notes(self) -> list[str]:
        answering = self.answering
        known = self.known.values()
        notes = [self._problem, self._too_few()]
        settings = self.settings
        wanted = len(settings.videos) - len(answering.problems)
        if len(answering.made) < wanted:
            notes.append(f"the time limit left out {wanted - len(answering.made)} of {counted(wanted, 'video')}")
        if answering.tokens < TOKENS[0] or answering.asked < len(settings.questions):
            asked = f"{answering.asked} of {counted(len(settings.questions), 'question')}"
            notes.append(f"the time limit allowed answers of {answering.tokens} tokens to {asked}")
        fewer = sum(len(trials) < len(answering.made) for trials in known)
        if self.has_results and fewer:
            said = "settings were not tried on all videos: the time went to the better ones"
            notes.append(f"{fewer} of {len(known)} {said}")
        if self.loaded:
            configs = [PruneOptions(each.budget, each.method).config() for each in self.known]
            notes.append(after_tower_note(after_tower_below(configs, self.loaded.device)))
        return [note for note in notes if note]

    def _best(self) -> str:
        best = recommended(result_rows(self.known, self.settings.agree))
        if not best:
            return ""
        return f"; best so far: {best['name']}, first token {1 / best['first_token']:.1f}x as fast"
