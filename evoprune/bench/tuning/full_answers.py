"""The unpruned model's answers, which candidates are compared with."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evoprune.bench.evaluation.shared import SharedFrames, SharedInput, SharedRows
from evoprune.bench.tuning.agreement import Reference, reference
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, VideoError
from evoprune.session.answering import EncodedInputs
from evoprune.session.encoding import open_inputs
from evoprune.session.engine import Engine
from evoprune.session.options import SamplingOptions

TOKENS = (64, 32, 16, 8)  # of an answer, at most; fewer where time is short
SLOW = 1 / 10  # of the time there is: a first encoding that takes longer is not repeated
Progress = Callable[[str], None]
Clock = Callable[[], float]


@dataclass(frozen=True)
class FullAnswers:
    """What the unpruned model says about a video, a reference a question."""

    path: str
    references: tuple[Reference, ...]
    first_s: float  # seconds of encoding and of reading the first question
    took_s: float  # that all of it took

    @property
    def tokens(self) -> int:
        return sum(len(given.ids) for given in self.references)


def encode(
    engine: Engine, path: str, sampling: SamplingOptions, frames: SharedFrames, rows: SharedRows | None = None
) -> tuple[EncodedInputs, float]:
    """A video, encoded, and the seconds of encoding: also those that shared rows have saved."""
    kind = partial(SharedInput, shared_frames=frames, shared_rows=rows)
    with closing(open_inputs(engine, [Path(path)], sampling, names=[path], kind=kind)) as opened:
        video = opened.encode()
    return video, video.report.time_ms.encode / 1000 + (rows.saved if rows else 0.0)


class Answering:
    """Answers the questions about all videos within `seconds`, by the clock `now`.

    Where answers would take longer they become shorter, then fewer questions are asked, then videos are left out.
    """

    def __init__(
        self, engine: Engine, sampling: SamplingOptions, questions: tuple[str, ...], seconds: float, now: Clock
    ):
        self.made: list[FullAnswers] = []  # a video each
        self.problems: dict[str, EvopruneError] = {}  # of videos that cannot be read or computed, by path
        self.tokens, self.asked = TOKENS[0], len(questions)  # of an answer, at most; of a video
        self._next_s = 0.0  # that the next video takes
        self.engine, self._sampling, self._questions = engine.unpruned(), sampling, questions
        self._seconds, self._now, self._begun = seconds, now, now()

    def answer(self, videos: tuple[str, ...], progress: Progress = lambda what: None) -> None:
        """Answers what the time allows, the first readable video in any case. Raises the first problem if there is none."""
        for number, path in enumerate(videos):
            if self.made and self._left < self._next_s:
                return
            progress(f"answering in full, video {number + 1} of {len(videos)}")
            try:
                self.made.append(self._answered(path, len(videos) - number))
                self._next_s = self.made[-1].took_s if len(self.made) > 1 else self._next_s
            except (VideoError, ModelError, OutOfMemory) as problem:
                self.problems[path] = problem
        if not self.made:
            raise next(iter(self.problems.values()))

    @property
    def _left(self) -> float:
        return self._seconds - (self._now() - self._begun)

    def _answered(self, path: str, videos: int) -> FullAnswers:
        """`videos`: how many are to be answered from now on."""
        start, frames = self._now(), SharedFrames()
        video, seconds = encode(self.engine, path, self._sampling, frames)
        spent = self._now() - start
        if not self.made:
            if spent < SLOW * self._seconds:
                video, seconds = encode(self.engine, path, self._sampling, frames)  # the first time also warms up
            self._plan(video, spent, videos)
        made: list[Reference] = []
        for question in self._questions[: self.asked]:
            answer = video.ask(question, max_new_tokens=self.tokens)
            str(answer)  # generates it
            made.append(reference(video, question, answer.ids, answer.report.finish_reason == "stop"))
        return FullAnswers(path, tuple(made), seconds + made[0].seconds, self._now() - start)

    def _plan(self, video: EncodedInputs, encoding: float, videos: int) -> None:
        """The longest answers to the most questions for which there is time, by a short answer; `encoding`: seconds a video."""
        question, every = self._questions[0], len(self._questions)
        for _ in range(2):  # the first time also warms up
            start = self._now()
            answer = video.ask(question, max_new_tokens=TOKENS[-1])
            str(answer)
            reference(video, question, answer.ids, ended=False)
        token = (answer.report.time_ms.generate or 0.0) / 1000 / max(1, len(answer.ids))
        reading = self._now() - start - token * len(answer.ids)
        choices = [(tokens, every) for tokens in TOKENS] + [(TOKENS[-1], asked) for asked in range(every - 1, 0, -1)]
        for self.tokens, self.asked in choices:
            self._next_s = encoding + self.asked * (reading + self.tokens * token)
            if videos * self._next_s <= self._left:
                return
