"""The settings that are tried, and the search among them: successive halving (arXiv 1502.07943) over videos.

All candidates see the first videos, the most promising see them all. Nothing is left out while there is time for everything.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import mean, median

from evoprune import methods

BUDGETS = (0.5, 0.35, 0.25, 0.15, 0.1)
# This project's method as it is, with as few rows as tokens, with its first selection after half of the tower's layers, and with
# tokens spread evenly over time; and the paper's merging.
METHODS = ("evoprune", "evoprune:rows=1", "evoprune:depth=0.5", "evoprune:floor=1", "evoprune-paper")
FIRST = 2  # videos that every candidate sees
LEAST = 3  # candidates that are never left out for want of time


@dataclass(frozen=True)
class Candidate:
    """A method, with its settings in its name, at a budget."""

    method: str
    budget: float

    @property
    def name(self) -> str:
        """As on a command line."""
        return f"{self.method} -b {self.budget:g}"


def candidates(budgets: Sequence[float] = (), more: Sequence[str] = ()) -> list[Candidate]:
    """Every method at every budget, without those that prune nothing.

    Args:
        budgets: instead of `BUDGETS`.
        more: methods beside `METHODS`.

    Raises:
        UsageError: an unknown method, or settings that it does not have.
    """
    named = {name: methods.parse(name) for name in dict.fromkeys((*METHODS, *more)) if name != "none"}
    pairs = product(named, sorted(set(budgets or BUDGETS), reverse=True))
    return [Candidate(name, budget) for name, budget in pairs if named[name].acts_at(budget)]


@dataclass
class Scores:
    """What is known of a candidate; lists have an entry a video.

    Attributes:
        agree, tokens: tokens of the full answers at which the first choice is the full model's, and all of them.
        kl: of every token of all videos.
        first_s, full_s: seconds to the first token, of the candidate and with nothing pruned.
        took_s: seconds that the trial took.
        kept, live: share of the visual tokens kept, and of the tower's rows computed.
    """

    agree: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    full_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of tokens that agree."""
        return sum(self.agree) / sum(self.tokens)

    @property
    def ratio(self) -> float:
        """First-token time / that with nothing pruned, the median over videos."""
        return median(first / full for first, full in zip(self.first_s, self.full_s, strict=True))


Known = dict[Candidate, Scores]


def promising(known: Known, goal: float) -> list[Candidate]:
    """Those that reach the goal, the fastest first; then the others, the most agreeing first."""

    def key(candidate: Candidate) -> tuple[bool, float]:
        scores = known[candidate]
        return (False, scores.ratio) if scores.share >= goal else (True, -scores.share)

    return sorted((candidate for candidate in known if known[candidate].tokens), key=key)


def rungs(videos: int) -> list[range]:
    """The videos of each round: the first two, then each time as many as before."""
    ends = [min(FIRST, videos)]
    while ends[-1] < videos:
        ends.append(min(2 * ends[-1], videos))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def affordable(order: Sequence[Candidate], known: Known, new: int, rest: int, rounds: int, left: float) -> int:
    """How many of the candidates, the most promising first, go on to the next round.

    Args:
        new: videos of the round. rest: videos of this and all later rounds.
        rounds: this and the later ones, which get equal times. left: seconds for all of them.
    """
    costs = [mean(known[candidate].took_s) for candidate in order]
    if sum(costs) * rest <= left:
        return len(order)
    count, used = 0, 0.0
    while count < len(order) and (used + costs[count] * new <= left / rounds or count < LEAST):
        used += costs[count] * new
        count += 1
    return count


def search(
    known: Known,
    videos: int,
    goal: float,
    trial: Callable[[Candidate, int], None],
    left: Callable[[], float],
    first_guess: Callable[[int], float],
) -> Iterator[tuple[Candidate, int]]:
    """Tries candidates, video by video, while there is time.

    Args:
        known: of all candidates; it grows.
        videos: how many there are. goal: agreement that is asked for.
        trial: adds to the scores of a candidate what a video shows.
        left: seconds until the end.
        first_guess: seconds of a first trial on a video.

    Yields:
        Before each trial the candidate and the video.
    """
    alive, all_rounds = list(known), rungs(videos)
    for number, these in enumerate(all_rounds):
        if number:
            alive = [candidate for candidate in promising(known, goal) if candidate in alive]
            rounds = len(all_rounds) - number
            alive = alive[: affordable(alive, known, len(these), videos - these.start, rounds, left())]
        for video in these:
            for candidate in alive:
                took = known[candidate].took_s
                if left() < (mean(took) if took else first_guess(video)):
                    continue
                yield candidate, video
                trial(candidate, video)
