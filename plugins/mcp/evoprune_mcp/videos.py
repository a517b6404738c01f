"""Answers questions about files with a single model and a cache of recent encodings.

All methods block, so they are called from worker threads.
"""

from collections import OrderedDict
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evoprune.errors import EvopruneError, OutOfMemory, UsageError
from evoprune.report import warned, warning_text
from evoprune.session import PipelineOptions
from evoprune.util import parse_time
from evoprune.video import input_state, probe
from evoprune_cli import load, tell
from evoprune_mcp.advice import for_agents
from evoprune_mcp.folders import Folders, real_paths
from evoprune_mcp.worker import Report

if TYPE_CHECKING:
    from evoprune import Cache, EncodedInputs, VideoQA

KEPT = 8  # maximum number of encodings cached for follow-up questions
# Stages of `VideoQA.encode` and `VideoQA.find`. For each stage, the progress message, and the fraction of the total work completed
# when the stage begins and when it ends. Stages may overlap because frames are encoded while others are being read.
STAGES = {
    "read": ("reading, frame", 0.0, 0.6),
    "encode": ("encoding, frame", 0.0, 0.6),
    "layers": ("encoding, layer", 0.6, 1.0),
    "speech": ("transcribing, second", 0.0, 0.0),
    "segment": ("reading segment", 0.0, 0.8),
    "piece": ("looking closer, part", 0.8, 0.9),
    "moment": ("moment", 0.9, 1.0),
}


@dataclass
class Answered:
    """The answer to a question.

    Attributes:
        answer: The text of the answer.
        cut: Whether the answer was cut off at the token limit.
        reused: Whether the input had already been encoded for an earlier question.
        warnings: Reasons to doubt the answer, such as damage in the video.
    """

    answer: str
    cut: bool
    reused: bool
    warnings: list[str]


@dataclass
class Found:
    """A time span in a video that matches a query. Times are in seconds, and `score` is a probability."""

    start_s: float
    end_s: float
    best_s: float
    score: float


@dataclass
class Moments:
    """The moments of a video that match a query, sorted by score, with the best match first."""

    moments: list[Found]


class Videos:
    """Answers an agent's questions about video and image files.

    Args:
        folders: The folders that files may be read from.
        options: The default options for all questions.
        cache: Whether to also cache encoded videos on disk.
        quiet: Whether to suppress notes about the model.
    """

    def __init__(self, folders: Folders, options: PipelineOptions, cache: bool, quiet: bool):
        self.folders = folders
        self._options = options
        self._cached = cache
        self._quiet = quiet
        self._qa: VideoQA | None = None
        self._kept: OrderedDict[str, EncodedInputs] = OrderedDict()

    def load_early(self, report: Report) -> None:
        """Load the model before the first question. If loading fails, the error is printed, and the first question tries again."""
        try:
            self._model(report)
        except EvopruneError as problem:
            tell(f"error: {problem}")

    def ask(
        self,
        report: Report,
        paths: list[str],
        question: str,
        start: float | str | None,
        end: float | str | None,
        budget: float | str | None,
    ) -> Answered:
        """Answer a question about one or more inputs together.

        Raises:
            EvopruneError: If an argument, an input, or the model is invalid.
        """
        if not question.strip():
            raise UsageError("the question is empty", "ask in words")
        span = {"start_s": start, "end_s": end}
        times = {name: parse_time(value) if isinstance(value, str) else value for name, value in span.items()}
        sampling = replace(self._options.sampling, **{name: time for name, time in times.items() if time is not None})
        pruning = self._options.pruning if budget is None else replace(self._options.pruning, budget=budget)
        with self.folders.opened(paths, self._beside) as files:
            states = [(real_paths(file), input_state(file, sampling.subtitles_wanted)) for file in files]
            key = repr((states, times, pruning))
            reused = key in self._kept
            encoded = None
            try:
                encoded = self._encoded(key, files, sampling, pruning, report)
            except OutOfMemory:
                if not self._kept:
                    raise
            if encoded is None:  # not in the `except` block, because the error still refers to partial results there
                self._kept.clear()
                encoded = self._encoded(key, files, sampling, pruning, report)
            return self._answer(encoded, question, reused, report)

    def _answer(self, encoded: "EncodedInputs", question: str, reused: bool, report: Report) -> Answered:
        def answering(_piece: str) -> None:
            report(1.0, "answering")

        answering("")
        with closing(encoded.ask(question, on_thoughts=answering, **vars(self._options.generation))) as answer:
            for piece in answer:
                answering(piece)
        made = answer.report
        texts = [warning_text(name, video) for name, video in warned(made)]
        warnings = [for_agents(text) or text for text in texts]
        return Answered(made.answer or "", made.finish_reason == "length", reused, warnings)

    def find(self, report: Report, path: str, query: str) -> Moments:
        """Return the moments in a video that match a query, best first. For the exceptions, see `ask`."""
        from evoprune.moments import Search

        with self.folders.opened([path], self._beside) as (file,):
            qa = self._model(report)
            cache = self._cache()
            segments = cache.of_segments if cache else None
            with Search(qa.session, file, [query], self._options.find, self._options.sampling, segments) as search:
                search.run(partial(_show, report, [1, 1]))
                times = [(each.start_s, each.end_s, each.best_s, each.score) for each in search.moments()]
        return Moments([Found(*(round(number, 3) for number in each)) for each in times])

    def describe(self, path: str) -> dict[str, Any]:
        """Return a file's metadata without using the model: `kind`, and all known fields of `evoprune.video.Video`.

        Raises:
            EvopruneError: If the file can't be read, or the agent isn't allowed to read it.
        """
        with self.folders.opened([path], subtitles=False) as (file,):
            video = replace(probe(file), path=real_paths(file))
        return {"kind": video.kind} | {name: value for name, value in asdict(video).items() if value is not None}

    @property
    def _beside(self) -> bool:
        """Whether subtitle files next to the videos are read."""
        return self._options.sampling.subtitles_wanted == "auto"

    def _encoded(self, key: str, paths: list[str], sampling: Any, pruning: Any, report: Report) -> "EncodedInputs":
        """Return the cached encoding of the inputs, or encode them."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        qa = self._model(report)
        if pruning != self._options.pruning:
            from evoprune import VideoQA

            qa = VideoQA(qa.loaded, **asdict(pruning))
        progress = partial(_show, report, [1, len(paths)])
        encoded = qa.encode(paths, progress=progress, cache=self._cache(), **vars(sampling))
        self._kept[key] = encoded
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return encoded

    def _model(self, report: Report) -> "VideoQA":
        """Return the model, loading it first if necessary."""
        if self._qa is None:
            from evoprune import VideoQA

            self._qa = VideoQA(load(self._options, lambda what, *_: report(0.0, what), self._quiet))
        return self._qa

    def _cache(self) -> "Cache | None":
        if not self._cached:
            return None
        from evoprune import Cache

        return Cache()


def _show(report: Report, which: list[int], stage: str, done: int, total: int) -> None:
    """Convert the progress of `VideoQA.encode` or `VideoQA.find` to a fraction of the total work, and report it.

    Args:
        which: The number of the current input and the total number of inputs. Updated in place.
    """
    number, count = which
    if stage == "input":
        which[0] = done
    elif stage in STAGES:
        name, before, after = STAGES[stage]
        share = before + (after - before) * done / max(total, 1)
        text = f"{name} {done:,}/{total:,}"
        if count > 1:
            text = f"input {number}/{count}: {text}"
        report((number - 1 + share) / count, text)
