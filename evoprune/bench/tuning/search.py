"""The settings that are tried: successive halving (arXiv 1502.07943) over videos, while there is no time for everything."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from statistics import mean, median
from typing import NamedTuple

from evoprune import methods

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
# This project's method as it is, with as few rows as tokens, with more rows and none left out before the tower, and with tokens
# spread evenly over time; and the paper's merging.
METHODS = ("evoprune", "evoprune:rows=1", "evoprune:first=0:rows=0.5", "evoprune:floor=1", "evoprune-paper")
FIRST = 2  # videos that every candidate sees
LEAST = 3  # candidates that are never left out for want of time


@dataclass(frozen=True)
class Candidate:
    """A method, with its settings in its name, at a budget."""

    method: str
    budget: float

    @property
    def name(self) -> str:
        return f"{self.method} -b {self.budget:g}"


def candidates(budgets: Sequence[float] = (), more: Sequence[str] = ()) -> list[Candidate]:
    """`METHODS` and `more` at each of `budgets` or `BUDGETS`, without those that prune nothing. Raises as `methods.parse`."""
    named = {name: methods.parse(name) for name in dict.fromkeys((*METHODS, *more)) if name != "none"}
    pairs = product(named, sorted(set(budgets or BUDGETS), reverse=True))
    return [Candidate(name, budget) for name, budget in pairs if named[name].acts_at(budget)]


class Trial(NamedTuple):
    """What a video shows of a candidate."""

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
    """Those that reach the goal, the fastest first; then the others, the most agreeing first."""

    def key(candidate: Candidate) -> tuple[bool, float]:
        share = observed(known[candidate])
        ratio = median(trial.first_s / trial.full_s for trial in known[candidate])
        return (False, ratio) if share >= goal else (True, -share)

    return sorted((candidate for candidate in known if known[candidate]), key=key)


def rungs(videos: int) -> list[range]:
    """The videos of each round: the first two, then each time as many as before."""
    ends = [min(FIRST, videos)]
    while ends[-1] < videos:
        ends.append(min(2 * ends[-1], videos))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def affordable(order: Sequence[Candidate], known: Known, new: int, rest: int, rounds: int, left: float) -> int:
    """How many of the candidates, the most promising first, go on to the next round.

    `new`, `rest`: videos of the round, and of it and all later `rounds`. `left`: seconds, in equal shares for each of these.
    """
    costs = [mean(trial.took_s for trial in known[candidate]) for candidate in order]
    if sum(costs) * rest <= left:
        return len(order)
    return max(min(LEAST, len(order)), sum(used * new <= left / rounds for used in accumulate(costs)))


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
    alive, all_rounds = list(known), rungs(videos)
    for number, these in enumerate(all_rounds):
        if number:
            alive = [candidate for candidate in promising(known, goal) if candidate in alive]
            rounds = len(all_rounds) - number
            alive = alive[: affordable(alive, known, len(these), videos - these.start, rounds, left())]
        for video in these:
            for candidate in alive:
                took = [made.took_s for made in known[candidate]]
                if left() >= (mean(took) if took else first_guess(video)):
                    yield candidate, video
                    known[candidate].append(trial(candidate, video))
