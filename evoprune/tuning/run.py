"""What `evoprune tune` runs: answers in full, trials of candidates, and the document of results (schema `evoprune/tune@1`)."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import evoprune
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError, error_record
from evoprune.evaluation.frames import SharedFrames
from evoprune.evaluation.shared_encoding import SharedRows
from evoprune.model.machine import environment
from evoprune.pipeline.agreement import Reference, agreement, reference
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.engine import Engine, make_engine
from evoprune.pipeline.loading.model import LoadedModel, load_model
from evoprune.pipeline.opening import open_video
from evoprune.pipeline.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.text import counted
from evoprune.tuning.candidates import Candidate, candidates
from evoprune.tuning.results import SCHEMA, result_rows
from evoprune.tuning.search import Known, Scores, search
from evoprune.tuning.statistics import least_tokens, provable

GENERAL = (
    "What happens in this video, from the beginning to the end?",
    "Who or what can be seen, and where?",
    "Which details, colours, numbers and words can be seen?",
)
ANSWER_TOKENS = (64, 32, 16, 8)  # of a full answer, at most; fewer where time is short
SHARE_OF_FULL = 1 / 3  # of the time limit that the full answers may take
SLOW = 1 / 20  # of the time limit: a first encoding that takes longer is not repeated
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is tuned, and on what.

    Attributes:
        videos: paths of files or folders of frames.
        questions: asked of every video.
        agree: share of tokens on which the pruned model must choose as the full one, in (0, 1).
        time_limit_s: of the whole run, loading included.
        budgets, methods: see `candidates.candidates`.
        model, sampling: options of the pipeline.
        seed: for methods that draw at random.

    Raises:
        UsageError: an agreement or a time limit out of range.
    """

    videos: tuple[str, ...]
    questions: tuple[str, ...] = GENERAL
    agree: float = 0.98
    time_limit_s: float = 600.0
    budgets: tuple[float, ...] = ()
    methods: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.agree < 1:
            raise UsageError(
                f"agreement {self.agree:g} is not between 0 and 1", "for example 0.98; -b full agrees always"
            )
        if not self.time_limit_s > 0:
            raise UsageError(f"a time limit of {self.time_limit_s:g} s leaves no time", "for example 600")

    def record(self) -> dict[str, Any]:
        """As flat data for JSON."""
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "sampling")}
        return own | asdict(self.model) | asdict(self.sampling)


@dataclass(frozen=True)
class _Full:
    """A video that the unpruned model has answered: seconds to its first token, and seconds that all of it took."""

    path: str
    references: tuple[Reference, ...]
    first_s: float
    took_s: float


class Tuning:
    """One run: construct it, `load` a model, `run`. The results are in `document`, at any time.

    Args:
        settings: what is tuned.
        now: a clock in seconds.

    Raises:
        UsageError: an unknown method, settings that it does not have, or nothing to try.
    """

    def __init__(self, settings: Settings, now: Callable[[], float] = time.perf_counter):
        self.settings, self._now, self._begun = settings, now, now()
        self.known: Known = {made: Scores() for made in candidates(settings.budgets, settings.methods)}
        if not self.known:
            raise UsageError("no candidate prunes anything", "give budgets below 1 (-b 0.25,0.1)")
        self.loaded: LoadedModel | None = None
        self.failures: dict[str, dict] = {}  # by video
        self.notes: list[str] = []
        self._full: list[_Full] = []
        self._asked, self._tokens = len(settings.questions), ANSWER_TOKENS[0]

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raises what `load_model` raises."""
        self.loaded = load_model(self.settings.model, to_answer=True, progress=progress)

    @property
    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self.settings.time_limit_s - (self._now() - self._begun)

    def run(self, progress: Progress = lambda what: None, note: Progress = lambda what: None) -> None:
        """Answers in full, then tries candidates until all is known or the time is over.

        A video that cannot be read or computed is left out and named in `failures`.

        Args:
            progress: called with what is done next, and what is the best so far.
            note: called with a sentence to read at once.

        Raises:
            The error of the first video, if none can be read.
        """
        self._answer_all(progress)
        if not self._full:
            return
        if warning := self._too_few():
            self.notes.append(warning)
            note(warning)
        video, frames, rows = None, SharedFrames(), SharedRows()

        def trial(candidate: Candidate, number: int) -> None:
            nonlocal video, frames, rows
            if number != video:  # its frames and rows go before the next video's come
                video, frames, rows = number, SharedFrames(), SharedRows()
            self._try(candidate, self._full[number], frames, rows)

        goal, full = self.settings.agree, self._full
        for candidate, number in search(
            self.known, len(full), goal, trial, lambda: self.left_s, lambda number: full[number].took_s
        ):
            progress(f"video {number + 1} of {len(full)}, {candidate.name}{self._best()}")

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """The results so far, as plain data for JSON; `error` is what cut the run short."""
        loaded, rows = self.loaded, result_rows(self.known, self.settings.agree)
        passing = [row for row in rows if row["passes"]]
        best = max(rows, key=lambda row: (row["low"], row["agreement"]), default=None)
        recommended = min(passing, key=lambda row: row["first_token"], default=None)
        return {
            "schema": SCHEMA,
            "version": evoprune.__version__,
            "model": asdict(loaded.facts()) if loaded else None,
            "env": asdict(environment(loaded.device)) if loaded else None,
            "settings": self.settings.record(),
            "videos": {
                "wanted": len(self.settings.videos),
                "answered": len(self._full),
                "failed": len(self.failures),
            },
            "questions": self._asked,
            "answer_tokens": sum(len(ref.ids) for full in self._full for ref in full.references),
            "seconds": self._now() - self._begun,
            "rows": rows,
            "recommended": recommended and recommended["name"],
            "best": best and best["name"],
            "failures": [{"video": name, **error} for name, error in self.failures.items()],
            "notes": [*self.notes, *self._limits()],
            "error": error,
        }

    def _answer_all(self, progress: Progress) -> None:
        wanted = self.settings.videos
        until = self.left_s * (1 - SHARE_OF_FULL)  # seconds that must be left afterwards
        for number, path in enumerate(wanted):
            if self._full and self.left_s - until < self._full[-1].took_s:
                self.notes.append(f"the time limit allows {counted(len(self._full), 'video')} of {len(wanted)}")
                break
            progress(f"answering in full, video {number + 1} of {len(wanted)}")
            try:
                self._full.append(self._answer(path, until, len(wanted) - number))
            except (VideoError, ModelError, OutOfMemory) as problem:
                self.failures[path] = error_record(problem)
                first = problem if not self._full and number + 1 == len(wanted) else None
                if first is not None:
                    raise

    def _answer(self, path: str, until: float, videos: int) -> _Full:
        """The full answers to a video. After the first answer of all it decides how long and how many the others may be."""
        start, engine, frames = (
            self._now(),
            self._engine(PruneOptions(1.0, "none", seed=self.settings.seed)),
            SharedFrames(),
        )
        video, seconds = self._encode(engine, path, frames)
        if not self._full and self._now() - start < SLOW * self.settings.time_limit_s:
            video, seconds = self._encode(engine, path, frames)  # once more: the first one also warms up
        encoded, references = self._now(), []
        for question in self.settings.questions:
            if len(references) == self._asked:
                break
            answer = video.ask(question, max_new_tokens=self._tokens)
            said = answer.text
            del said
            read = reference(video, question, answer.ids[: self._tokens], self.loaded.eos_ids[0])
            if not self._full and not references:
                each = self._now() - encoded
                rate = answer.report.time_ms.generate / 1000 / max(1, len(answer.ids))
                self._plan(encoded - start, each - rate * len(answer.ids), rate, videos, self.left_s - until)
                read = reference(video, question, answer.ids[: self._tokens], self.loaded.eos_ids[0])
            references.append(read)
        return _Full(path, tuple(references), seconds + references[0].seconds, self._now() - start)

    def _plan(self, encode: float, read: float, token: float, videos: int, left: float) -> None:
        """Fewer tokens an answer, then fewer questions, where the full answers would take longer than they may.

        Args:
            encode, read, token: seconds of a video's encoding, of reading a question, and of a token.
            videos: that are to be answered. left: seconds for all of them.
        """
        asked = len(self.settings.questions)
        choices = [(tokens, asked) for tokens in ANSWER_TOKENS]
        choices += [(ANSWER_TOKENS[-1], fewer) for fewer in range(asked - 1, 0, -1)]
        for self._tokens, self._asked in choices:
            if videos * (encode + self._asked * (read + self._tokens * token)) <= left:
                return

    def _try(self, candidate: Candidate, full: _Full, frames: SharedFrames, rows: SharedRows) -> None:
        """Adds to what is known of a candidate."""
        start, scores = self._now(), self.known[candidate]
        engine = self._engine(PruneOptions(candidate.budget, candidate.method, seed=self.settings.seed))
        video, seconds = self._encode(engine, full.path, frames, rows)
        made = [agreement(given, video) for given in full.references]
        scores.agree.append(sum(int(one.agrees.sum()) for one in made))
        scores.tokens.append(sum(len(one.agrees) for one in made))
        scores.kl += [value for one in made for value in one.kl.tolist()]
        scores.first_s.append(seconds + made[0].seconds)
        scores.full_s.append(full.first_s)
        pruning = video.report.pruning
        scores.kept.append(pruning.visual_tokens_kept / pruning.visual_tokens_in)
        scores.live.append(pruning.encoder_live_share)
        scores.took_s.append(self._now() - start)

    def _engine(self, options: PruneOptions) -> Engine:
        return make_engine(self.loaded, options)

    def _encode(
        self, engine: Engine, path: str, frames: SharedFrames, rows: SharedRows | None = None
    ) -> tuple[EncodedVideo, float]:
        """A video, encoded, and the seconds that this takes without other candidates' rows."""
        how = {"read": frames.read} | ({"encode_rows": rows.encode_rows} if rows else {})
        with closing(open_video(engine, Path(path), self.settings.sampling, name=path, **how)) as opened:
            video = opened.encode()
        return video, video.report.time_ms.encode / 1000 + (rows.saved if rows else 0.0)

    def _too_few(self) -> str | None:
        """A sentence that says so where nothing could pass even if all tokens agreed."""
        tokens, goal = [sum(len(ref.ids) for ref in full.references) for full in self._full], self.settings.agree
        if provable(sum(tokens)) >= goal and len(tokens) > 1:
            return None
        videos = max(2, -(-least_tokens(goal) // max(1, round(float(np.mean(tokens))))))
        asked = f"{counted(sum(tokens), 'token')} of answers about {counted(len(tokens), 'video')}"
        return (
            f"{asked} cannot prove an agreement of {100 * goal:g}%, even if all agree: that takes about {videos} such videos, or "
            "more questions (-Q)"
        )

    def _limits(self) -> list[str]:
        made, settings = [], self.settings
        if self._tokens < ANSWER_TOKENS[0] or self._asked < len(settings.questions):
            made.append(
                f"to keep the time limit: answers of at most {self._tokens} tokens to {self._asked} of "
                f"{counted(len(settings.questions), 'question')}"
            )
        videos = len(self._full)
        if fewer := [scores for scores in self.known.values() if len(scores.tokens) < videos]:
            made.append(
                f"{len(fewer)} of {len(self.known)} settings were not tried on all videos, for want of time or promise"
            )
        return made

    def _best(self) -> str:
        rows = [row for row in result_rows(self.known, self.settings.agree) if row["passes"]]
        best = min(rows, key=lambda row: row["first_token"], default=None)
        return f"; best so far {best['name']}, {1 / best['first_token']:.1f}x" if best else ""


def raise_if_nothing(tuning: Tuning) -> None:
    """Raises:
    EvopruneError: of the first video, where none could be answered.
    """
    if tuning.failures and not tuning.document()["videos"]["answered"]:
        raise EvopruneError(next(iter(tuning.failures.values()))["message"])


def questions_of(path: Path) -> tuple[str, ...]:
    """The questions of a text file, one a line, without empty lines.

    Raises:
        UsageError: it cannot be read, or holds none.
    """
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(
            f"{path} cannot be read as text: {problem}", "a text file with a question on each line"
        ) from problem
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise UsageError(f"{path} holds no question", "a text file with a question on each line")
    return found
