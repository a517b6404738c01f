"""The code behind `evoprune tune`, which compares candidate settings with the unpruned model's answers to a set of questions.

If there is not enough time for all trials, successive halving over videos narrows down the candidates (arXiv 1502.07943).

The candidates' agreement is smoothed with isotonic regression (Ayer et al., 1955), which assumes that a candidate with a lower KL
divergence agrees at least as much as a candidate with a higher one. Because tokens from the same video are correlated, n tokens
carry only as much information as a smaller number of independent tokens. The ratio of these two numbers is the design effect (Kish,
1965), which equals the variance over videos divided by the variance of independent tokens. It is estimated from all candidates
together.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar, NamedTuple

import numpy as np

from evoprune.bench.agreement import Reference
from evoprune.bench.results import Results
from evoprune.bench.scores import Z95, share_variance, wilson
from evoprune.bench.shared import (
    SharedRows,
    TimeLimit,
    after_tower_below,
    after_tower_note,
    model_and_machine,
    swept,
)
from evoprune.bench.tune_results import TuneResults
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError, error_record
from evoprune.methods import MethodChain, MethodText
from evoprune.report import DEMO_KNOWLEDGE
from evoprune.session import (
    EncodedInputs,
    LoadedModel,
    ModelDescription,
    ModelOptions,
    OpenInputs,
    PruneOptions,
    ReadAhead,
    Session,
    describe,
    in_flight,
    load_model,
    open_inputs,
)
from evoprune.util import counted, listed, one_line
from evoprune.video import SamplingOptions

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
# The default method, three variants of it, and the paper's merging. The variants have as many rows as tokens, more rows without a
# selection before the tower, and tokens spread evenly over time.
METHODS = ("evoprune", "evoprune:rows=1", "evoprune:first=0:rows=0.5", "evoprune:floor=1", "evoprune-paper")
FIRST = 2  # number of videos on which to try all candidates
MIN_CANDIDATES = 3  # minimum number of candidates to continue with and to compare on another video


@dataclass(frozen=True)
class Candidate:
    """A method with its settings and a budget, to be tried by `evoprune tune`."""

    method: str
    budget: float

    @property
    def name(self) -> str:
        return f"{self.method} -b {self.budget:g}"


def candidates(budgets: Sequence[float] = (), more: Sequence[str] = ()) -> list[Candidate]:
    """Combine the methods in `METHODS` and `more` with all budgets (by default `BUDGETS`), except combinations that prune nothing.

    See `MethodChain.parse` for exceptions.
    """
    return [Candidate(*pair) for pair in swept((*METHODS, *more), sorted({*(budgets or BUDGETS)}, reverse=True))]


class Trial(NamedTuple):
    """A candidate's measurements on one video."""

    agree: int  # number of full-answer tokens that the pruned model also considers most probable
    tokens: int  # number of full-answer tokens
    kl: list[float]  # KL divergence at each token
    first_s: float  # time to the first token, in seconds
    full_s: float  # time to the first token without pruning, in seconds
    took_s: float  # duration of the trial, in seconds
    kept: float  # fraction of the visual tokens that were kept
    live: float  # fraction of the tower's rows that were computed
    video: int = 0  # index of the video


Known = dict[Candidate, list[Trial]]


def observed(trials: Sequence[Trial]) -> float:
    return sum(trial.agree for trial in trials) / sum(trial.tokens for trial in trials)


def promising(known: Known, goal: float) -> list[Candidate]:
    """Sort the candidates tried so far, most promising first.

    Candidates that reach the required agreement (`goal`) come first, sorted by speed. All other candidates are sorted by agreement.
    """

    def key(candidate: Candidate) -> tuple[bool, float]:
        share = observed(known[candidate])
        if share < goal:
            return True, -share
        return False, median(trial.first_s / trial.full_s for trial in known[candidate])

    return sorted((candidate for candidate in known if known[candidate]), key=key)


def rungs(videos: int) -> list[range]:
    """Divide the videos into rounds of successive halving, and return the video indices for each round.

    The first round has two videos, and each later round doubles the total number.
    """
    ends = [min(FIRST, videos)]
    while ends[-1] < videos:
        ends.append(min(2 * ends[-1], videos))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def affordable(order: Sequence[Candidate], known: Known, new: int, rest: int, rounds: int, left: float) -> int:
    """Return how many candidates can advance to the next round in the remaining time.

    Args:
        order: The candidates, most promising first.
        known: The trials so far, keyed by candidate.
        new: The number of videos in the next round.
        rest: The number of videos in the next round and all later rounds.
        rounds: The number of remaining rounds, which share the remaining time equally.
        left: The remaining time in seconds.
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
    """Try candidates on one video at a time until time runs out, adding the results to `known`.

    Candidates with the same number of trials were always tried on the same videos, and candidates with more trials on these videos
    and others. If there is only enough time for some of the candidates on a video, the most promising ones are tried on it, and the
    search continues with them alone. If there are too few to compare, the results on that video are discarded.

    Args:
        known: The trials so far, keyed by candidate.
        goal: The required agreement.
        trial: A function that tries a candidate on the video with the given index.
        left: A function that returns the remaining time in seconds.
        first_guess: A function that estimates the duration of a candidate's first trial in seconds, given the index of the video.

    Yields:
        The candidate and the video index, before each trial.
    """
    alive = list(known)
    all_rounds = rungs(videos)
    for number, these in enumerate(all_rounds):
        if any(known.values()):  # otherwise, the earlier videos took too long for all candidates
            alive = [candidate for candidate in promising(known, goal) if candidate in alive]
            rounds = len(all_rounds) - number
            alive = alive[: affordable(alive, known, len(these), videos - these.start, rounds, left())]
        for video in these:
            first = not any(known.values())
            if first:
                others = range(video + 1, videos)
                if (
                    len(alive) * first_guess(video)
                    > left()
                    >= len(alive) * min(map(first_guess, others), default=math.inf)
                ):
                    continue  # all candidates can be compared on another video
                enough = 1
            else:
                alive = [candidate for candidate in promising(known, goal) if candidate in alive]
                enough = min(MIN_CANDIDATES, len(alive))
            tried: dict[Candidate, Trial] = {}
            expected = {
                candidate: mean(earlier.took_s for earlier in known[candidate])
                if known[candidate]
                else first_guess(video)
                for candidate in alive
            }
            if left() < sum(expected[candidate] for candidate in alive[:enough]):
                continue
            try:
                for candidate in alive:
                    if left() < expected[candidate]:
                        break
                    yield candidate, video
                    tried[candidate] = trial(candidate, video)._replace(video=video)
            finally:  # also after Ctrl-C
                if len(tried) >= enough:
                    for candidate, result in tried.items():
                        known[candidate].append(result)
                    alive = list(tried)


def most_tried(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the largest number of videos, which are the same videos for all of these rows."""
    most = max((row["videos"] for row in rows), default=0)
    return [row for row in rows if row["videos"] == most]


SAME_TIME = 0.05  # maximum relative difference between two median times that are considered equal


def result_rows(known: Known, goal: float) -> list[dict[str, Any]]:
    """Compute the results table, with one dict per tried candidate, fastest first. See docs/json.md for the fields.

    `agreement` is the estimate computed by `smoothed` from all candidates, with a 95% interval over videos. `observed` is the
    candidate's measured agreement. `passes` is True if the entire interval reaches the goal. `frontier` is True if the candidate
    was tried on the largest number of videos, and no other such candidate is at least as fast with at least the same agreement.
    """
    tried = {
        candidate: Trial(*zip(*trials, strict=True)) for candidate, trials in known.items() if trials
    }  # each field is a tuple with one value per trial
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
    compared = most_tried(rows)
    places = [(-row["first_token"], row["agreement"]) for row in compared]
    for row in rows:
        own = -row["first_token"], row["agreement"]
        beaten = any(other != own and other[0] >= own[0] and other[1] >= own[1] for other in places)
        row["frontier"] = row in compared and not beaten
    return sorted(rows, key=lambda row: row["first_token"])


def _estimates(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """Estimate each candidate's agreement, smoothed over all candidates tried on the same number of videos."""
    estimates = {}
    for videos in {len(seen.tokens) for seen in tried.values()}:
        group = {candidate: seen for candidate, seen in tried.items() if len(seen.tokens) == videos}
        sums = [(sum(seen.agree), sum(seen.tokens), np.mean(np.concatenate(seen.kl))) for seen in group.values()]
        estimates |= dict(zip(group, smoothed(*map(np.array, zip(*sums, strict=True))).tolist(), strict=True))
    return estimates


def _times(tried: dict[Candidate, Trial]) -> dict[Candidate, float]:
    """Return each candidate's time to first token, relative to the time without pruning.

    Candidates with the same methods, videos, and fractions of rows and tokens do the same amount of work, so their times are pooled
    to reduce noise.
    """
    of_work = defaultdict(list)
    works = {}
    for candidate, seen in tried.items():
        names = tuple(each.name for each in MethodText(candidate.method).parts)
        works[candidate] = names, len(seen.tokens), round(mean(seen.kept), 6), round(mean(seen.live), 6)
    for candidate, seen in tried.items():
        of_work[works[candidate]] += [first / full for first, full in zip(seen.first_s, seen.full_s, strict=True)]
    return {candidate: median(of_work[work]) for candidate, work in works.items()}


def recommended(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest row that passes, or None if no row passes.

    Only the passing rows with the largest number of videos are compared, because the others were tried on other videos. Rows with
    fewer videos were less promising on the videos that they have in common. Rows whose time differs from the fastest by at most
    `SAME_TIME` are considered equally fast. Among these, the row with the fewest settings is preferred.
    """
    passing = most_tried([row for row in rows if row["passes"]])
    fastest = min((row["first_token"] for row in passing), default=0.0)
    as_fast = [row for row in passing if row["first_token"] <= fastest * (1 + SAME_TIME)]

    def order(row: dict[str, Any]) -> tuple[int, float]:
        return sum(len(each.settings) for each in MethodText(row["method"]).parts), row["first_token"]

    return min(as_fast, key=order, default=None)


def smoothed(agree: np.ndarray, tokens: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Estimate the candidates' agreement by isotonic regression, assuming that a larger KL divergence means less agreement.

    Args:
        agree: The number of tokens on which each candidate agrees, `[S]`.
        tokens: The number of tokens on which each candidate was tried, `[S]`.
        kl: The mean KL divergence of each candidate, `[S]`.

    Returns:
        The estimated fractions of agreeing tokens, `[S]`.
    """
    blocks: list[
        tuple[float, float, list[int]]
    ] = []  # number of agreeing tokens, number of tokens, and indices of the candidates in the block
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
    """Estimate the design effect, which is the number of tokens that carry as much information as one independent token.

    Args:
        candidates: For each candidate, the number of agreeing tokens and the number of tokens in each video.

    Returns:
        The design effect, which is at least 1, or None if it cannot be estimated.
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
    """Return the 95% confidence interval of an agreement (the fraction of agreeing tokens).

    Args:
        effect: The design effect. If None, each video is treated as a single independent token.
    """
    if effect is None:
        return wilson(share, float(videos))
    return wilson(share, max(1.0, tokens / effect))


def provable(tokens: float) -> float:
    """Return the highest agreement that `tokens` independent tokens can prove: the lower bound if all of them agree."""
    return tokens / (tokens + Z95**2)


def least_tokens(agree: float) -> int:
    """Return the number of independent tokens required to prove an agreement of `agree` (below 1) if all of them agree."""
    return math.ceil(agree * Z95**2 / (1 - agree) - 1e-9)


TOKENS = (64, 32, 16, 8)  # maximum answer lengths in tokens; the first one that fits within the time limit is used
MOST_NAMES = 3  # maximum number of videos that a note names
SLOW = 1 / 10  # the first encoding is not repeated if it takes longer than this fraction of the time limit
Progress = Callable[
    ..., None
]  # called with the next step, optionally followed by the number of finished items and the total


@dataclass(frozen=True)
class FullAnswers:
    """The unpruned model's answers about one video, with one reference per question."""

    path: str
    references: tuple[Reference, ...]
    first_s: float  # time to encode the video and to process the first question, in seconds
    took_s: float  # total time, in seconds
    warnings: frozenset[str] = frozenset()  # names of the warnings of all answers

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
    """Encode a video.

    Args:
        rows: A cache of the tower's rows, or None.
        ahead: A prefetch that may contain the video, or None.

    Returns:
        The encoded video, and the encoding time without the cache, in seconds.
    """
    tower = rows.encode_rows if rows else None
    with closing(open_inputs(session, [Path(path)], sampling, names=[path], tower=tower, ahead=ahead)) as opened:
        video = opened.encode()
    seconds = video.report.time_ms.encode / 1000
    if rows:
        seconds += rows.saved
    return video, seconds


class Answering:
    """Answers the questions about all videos with the unpruned model within a time limit.

    If there is not enough time, the answers are first shortened, then fewer questions are asked, and finally videos are left out.
    The patches of finished videos stay in memory until `close` is called.
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
        self.made: list[FullAnswers] = []  # one per video
        self.problems: dict[str, EvopruneError] = {}  # errors of videos that cannot be read or processed, keyed by path
        self.tokens = TOKENS[0]  # maximum number of tokens per answer
        self.asked = len(questions)  # number of questions to ask about each video
        self._next_s = 0.0  # estimated time for the next video, in seconds
        self._held: list[OpenInputs] = []  # inputs of the videos in `made`
        self.session = session.unpruned()
        self._sampling = sampling
        self._questions = questions
        self._limit = limit

    def answer(self, videos: tuple[str, ...], progress: Progress = lambda *what: None) -> None:
        """Answer the questions about as many videos as time allows, but at least about the first video that can be read.

        Raises:
            EvopruneError: If all videos fail. The error of the first video is raised.
        """
        loaded = self.session.loaded
        # Without idle cores, prefetching would slow down the model and distort the measured times.
        upcoming = in_flight(videos, self._open, loaded) if loaded.idle_cores else None
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
                        opened = self._open(path)
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

    def _open(self, path: str) -> OpenInputs:
        return open_inputs(self.session, [path], self._sampling, ahead=self._ahead)

    def _answered(self, path: str, opened: OpenInputs | Exception, videos: int) -> FullAnswers:
        """Answer all questions about one video.

        Args:
            opened: The opened video, or the exception raised while opening it.
            videos: The number of remaining videos, including this one.
        """
        if isinstance(opened, Exception):
            raise opened
        self._held.append(opened)
        start = self._limit.now()
        video, seconds = encode(self.session, path, self._sampling, ahead=self._ahead)
        opened.read()  # keeps the patches in memory
        spent = self._limit.now() - start
        if not self.made:
            self.session.loaded.packing.finish()  # otherwise, the first answers would be slower than later ones
            if spent < SLOW * self._limit.seconds:
                video, seconds = encode(self.session, path, self._sampling)  # the first encoding was a warm-up
            self._plan(video, spent, videos)
        references: list[Reference] = []
        warnings: set[str] = set()
        fresh = video.with_session(self.session)  # with an empty prefix cache, as for a pruned video
        for question in self._questions[: self.asked]:
            answer = video.ask(question, max_new_tokens=self.tokens, think=self._think)
            str(answer)  # generates the answer
            warnings |= set(answer.report.warnings)
            ended = answer.report.finish_reason == "stop"
            references.append(Reference.of(fresh, question, answer.ids, ended, think=self._think))
        first_s = seconds + references[0].seconds
        return FullAnswers(path, tuple(references), first_s, self._limit.now() - start, frozenset(warnings))

    def _plan(self, video: EncodedInputs, encoding: float, videos: int) -> None:
        """Choose an answer length and a number of questions that fit in the available time, based on the speed of a short test
        answer.

        Args:
            video: The encoded video for the test answer.
            encoding: The time to encode a video, in seconds.
            videos: The number of remaining videos.
        """
        question = self._questions[0]
        every = len(self._questions)
        for _ in range(2):  # the first run is a warm-up
            start = self._limit.now()
            answer = video.ask(question, max_new_tokens=TOKENS[-1], think=self._think)
            str(answer)
            Reference.of(video, question, answer.ids, ended=False, think=self._think)
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
SHARE_OF_FULL = 1 / 3  # fraction of the time limit spent on the unpruned model's answers


@dataclass(frozen=True)
class TuneSettings:
    """The settings and videos of a tuning run.

    Raises:
        UsageError: If there are no videos or no questions, or if a number is out of range.
    """

    videos: tuple[str, ...]  # paths of video files or frame folders
    questions: tuple[str, ...] = GENERAL  # questions to ask about each video
    # Fraction of tokens, in (0, 1), at which the pruned model must make the same choice as the full model.
    agree: float = 0.98
    time_limit_s: float = 600.0  # limit for the whole run, including loading
    budgets: tuple[float, ...] = ()  # see `candidates`, also for `methods`
    methods: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0  # for methods with random selection
    think: str = "off"  # see `GenerationOptions`

    def __post_init__(self):
        if not self.videos or not self.questions:
            raise UsageError("there is nothing to ask", "give at least one video and one question")
        if not 0 < self.agree < 1:
            hint = "use for example 0.98; with -b full, all tokens agree"
            raise UsageError(f"agreement {self.agree:g} is not between 0 and 1", hint)
        if not self.time_limit_s > 0:
            raise UsageError(f"a time limit of {self.time_limit_s:g} s leaves no time", "use for example 600")

    def record(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "sampling")}
        return own | asdict(self.model) | asdict(self.sampling)


class Run:
    """The base class of tuning runs.

    To start a run, create an instance, `load` the model, and then call `run`. `document` returns the results so far at any time.
    """

    schema: ClassVar[str]  # the document's schema
    results_of: ClassVar[Callable[[dict[str, Any]], Results]]

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        self.settings = settings
        self.limit = TimeLimit(settings.time_limit_s, now)
        self.loaded: LoadedModel | None = None  # None before `load`
        self.answering: Answering | None = None  # the full answers; None before `run`
        self.ahead: ReadAhead | None = None  # may have prefetched the first video
        self.model: ModelDescription | None = None  # None before `load`

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. If its description is already known, pass it as `model`.

        See `load_model` for exceptions.
        """
        self.model = model or describe(self.settings.model)
        self.loaded = load_model(self.model, to_answer=True, progress=progress)

    def answer(self, progress: Progress) -> list[FullAnswers]:
        """Answer the questions with the unpruned model. See `Answering.answer` for exceptions."""
        session = Session(self.loaded, PruneOptions(seed=self.settings.seed).config())
        settings = self.settings
        left = max(0.0, self.limit.left)  # loading has taken some of the time
        limit = TimeLimit(SHARE_OF_FULL * left, self.limit.now)
        self.answering = Answering(session, settings.sampling, settings.questions, limit, settings.think, self.ahead)
        try:
            self.answering.answer(settings.videos, progress)
        except BaseException:  # for example, Ctrl-C while reading a video
            self.answering.close()
            raise
        return self.answering.made

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far as a JSON-serializable dict. `error` is the error that ended the run early, or None."""
        raise NotImplementedError

    def results(self, error: dict | None = None) -> Results:
        """Return the results so far. `error` is the error that ended the run early, or None."""
        return type(self).results_of({"schema": self.schema} | self.document(error))

    def facts(self) -> dict[str, Any]:
        """Return the fields shared by all types of tuning run documents, as a JSON-serializable dict."""
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
    """Finds the fastest pruning settings with sufficient agreement with the unpruned model. `known` contains each candidate's
    trials.

    If the model is to be quantized, the full answers are generated with the original weights, provided that they fit into memory.
    Quantization without pruning is then an additional candidate.

    Raises:
        UsageError: If a method is unknown or has invalid settings, or if there is nothing to try.
    """

    schema = "evoprune/tune@1"
    results_of = TuneResults

    def __init__(self, settings: TuneSettings, now: Callable[[], float] = time.perf_counter):
        super().__init__(settings, now)
        self.known: Known = {candidate: [] for candidate in candidates(settings.budgets, settings.methods)}
        if not self.known:
            raise UsageError("no candidate prunes anything", "use budgets below 1 (-b 0.25,0.1)")
        self._quantizes = settings.model.quantize in ("int8", "int4")
        self._problem = None
        if self._quantizes:
            self.known = {Candidate("none", 1.0): []} | self.known

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. If its description is already known, pass it as `model`.

        Raises:
            UsageError: If a method is incompatible with the model.

        See `load_model` for other exceptions.
        """
        self.model = model = model or describe(self.settings.model)
        for candidate in self.known:
            model.check_method(MethodChain.parse(candidate.method))
        if self._quantizes:
            with suppress(OutOfMemory):  # in this case, the full answers are generated with the quantized weights
                exact = replace(model.options, quantize="none", store_quantized=False)
                self.loaded = load_model(replace(model, options=exact), to_answer=True)
        if self.loaded is None:
            super().load(progress, model)

    @property
    def has_results(self) -> bool:
        return any(self.known.values())

    def run(self, progress: Progress = lambda *what: None, note: Callable[[str], None] = lambda what: None) -> None:
        """Answer with the unpruned model, then try candidates until all trials are done or time runs out.

        Args:
            progress: A callback for each step.
            note: A callback for remarks that should be shown immediately.

        See `Answering.answer` for exceptions.
        """
        answers = self.answer(progress)
        held = {}
        if self._quantizes and self.loaded.quantize == "none":
            self.answering.close()
            patches = self.loaded.patches
            self.loaded = self.answering.session = None  # free the weights
            super().load(lambda done, of: progress("quantizing, layer", done, of), self.model)
            self.loaded.patches = patches
        elif self._quantizes:
            self._problem = (
                "full answers come from the quantized weights, because the unquantized ones do not fit into memory"
            )
            note(self._problem)
        if warning := self._too_few():
            note(warning)

        def trial(candidate: Candidate, video: int) -> Trial:
            if video not in held:
                held.clear()  # drop the rows of the previous video
                held[video] = SharedRows()
            start = self.limit.now()
            full = answers[video]
            session = Session(
                self.loaded, PruneOptions(candidate.budget, candidate.method, seed=self.settings.seed).config()
            )
            encoded, seconds = encode(session, full.path, self.settings.sampling, held[video])
            along = [given.agreement(encoded) for given in full.references]
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
        """Return the results so far as a JSON-serializable dict. `error` is the error that ended the run early, or None."""
        rows = result_rows(self.known, self.settings.agree)
        passing = recommended(rows)
        best = max(most_tried(rows), key=lambda row: (row["low"], row["agreement"], -row["first_token"]), default=None)
        compared = self._compared(passing or best, rows)
        notes = []
        if self.answering and self.answering.made:
            notes = self._notes(compared)
        if rows and not passing and all(row["observed"] == 1 for row in rows) and not self._too_few():
            videos = rows[0]["videos"]
            notes.append(
                "all settings agree on all tokens. Without any difference, it is unknown how much the tokens about a video "
                f"depend on one another, so each video counts as one token, and {counted(videos, 'video')} can prove only "
                f"{provable(videos):.0%}. Add videos, or a smaller budget (-b)"
            )
        return {
            **self.facts(),
            "rows": rows,
            "recommended": passing and passing["name"],
            "options": passing and {"budget": passing["budget"], "method": passing["method"]},
            "best": best and best["name"],
            "compared": compared,
            "notes": notes,
            "error": error,
        }

    def _too_few(self) -> str | None:
        """Return a warning if there are too few tokens for any candidate to pass, even with perfect agreement. Otherwise, None."""
        tokens = [full.tokens for full in self.answering.made]
        goal = self.settings.agree
        # With a single video, the design effect cannot be estimated, so the video counts as one token (see `bounds`).
        if provable(sum(tokens) if len(tokens) > 1 else 1) >= goal:
            return None
        videos = max(2, -(-least_tokens(goal) // max(1, round(mean(tokens)))))
        return (
            f"{counted(sum(tokens), 'token')} of answers about {counted(len(tokens), 'video')} cannot prove that "
            f"{100 * goal:g}% agree, even if all do: it takes about {videos} such videos, or more questions (-Q)"
        )

    def _compared(self, chosen: dict[str, Any] | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the number of settings that were tried on the same videos as the chosen one, and the paths of these videos."""
        if not chosen:
            return {"settings": 0, "videos": []}
        trials = next(trials for candidate, trials in self.known.items() if candidate.name == chosen["name"])
        return {
            "settings": sum(row["videos"] == chosen["videos"] for row in rows),
            "videos": [self.answering.made[trial.video].path for trial in trials],
        }

    def _notes(self, compared: dict[str, Any]) -> list[str]:
        answering = self.answering
        known = self.known.values()
        notes = [self._problem, self._too_few()]
        settings = self.settings
        wanted = len(settings.videos) - len(answering.problems)
        if len(answering.made) < wanted:
            notes.append(f"the time limit left out {wanted - len(answering.made)} of {counted(wanted, 'video')}")
        if answering.tokens < TOKENS[0] or answering.asked < len(settings.questions):
            asked = f"{answering.asked} of {counted(len(settings.questions), 'question')}"
            notes.append(f"the time limit allowed only answers of {answering.tokens} tokens to {asked}")
        warnings = frozenset().union(*(each.warnings for each in answering.made))
        unknown = DEMO_KNOWLEDGE if warnings & {"demo_model", "demo_untold"} else None
        if "demo_question" in warnings:
            unknown = unknown or "a question contains words that the demo model was not trained on"
        if unknown:
            notes.append(f"{unknown}, so these answers mean nothing; for a real model: -m Qwen/Qwen2.5-VL-3B-Instruct")
        fewer = sum(len(trials) < len(answering.made) for trials in known)
        if self.has_results and fewer:
            untried = sum(not trials for trials in known)
            names = [one_line(Path(path).name) for path in compared["videos"]]
            if len(names) > MOST_NAMES:
                names = [f"{len(names)} videos, {names[0]} to {names[-1]}"]
            notes.append(
                f"{fewer} of {len(known)} settings were not tried on every video, and {untried} on "
                f"none; {counted(compared['settings'], 'setting')} compared on {listed(names)}"
            )
        if self.loaded:
            configs = [PruneOptions(each.budget, each.method).config() for each in self.known]
            notes.append(after_tower_note(after_tower_below(configs, self.loaded.device)))
        return [note for note in notes if note]

    def _best(self) -> str:
        best = recommended(result_rows(self.known, self.settings.agree))
        if not best:
            return ""
        return f"; best so far: {best['name']}, first token {1 / best['first_token']:.1f}x as fast"
