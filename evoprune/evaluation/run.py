"""Accuracy against budget: what `evoprune eval` runs.

Every video is shown through the same pipeline as `evoprune ask`, once in full and once for every method and budget, and each time
asked all its questions. What comes of it is a sample an answer, a plain dict, and of these the table in `scores.py`.

Cost is told in operations at the dimensions of Qwen2.5-VL-3B: from the rows that the run's own tower computed in each layer, taken
over to the 3B's 32 layers by relative depth (layer l of 32 stands for layer floor(l * depth / 32) of a tower with `depth` layers),
and from the true length of the prompt. Scoring and merging, a few percent of the tower, are not in it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np

import evoprune
from evoprune import methods
from evoprune.errors import ModelError, OutOfMemory, UsageError, VideoError, error_record
from evoprune.evaluation.demo_clips import BLOCK, clip_name, demo_video, seeds
from evoprune.evaluation.folder import RunFolder
from evoprune.evaluation.processes import shown
from evoprune.evaluation.questions import Video
from evoprune.evaluation.scores import BLIND, FULL, METHOD, SCHEMA, row_name, score_rows
from evoprune.evaluation.shared_encoding import SharedRows
from evoprune.model.cost import prefill_flop, stretched, tower_flop
from evoprune.model.machine import environment
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.engine import make_engine
from evoprune.pipeline.loading import LoadedModel, load_model
from evoprune.pipeline.model_folder import describe_model
from evoprune.pipeline.opening import open_video
from evoprune.pipeline.options import GenerationOptions, ModelOptions, PruneOptions, SamplingOptions
from evoprune.report import Report
from evoprune.video.decode import FrameChunk, read_frames
from evoprune.video.probe import VideoInfo
from evoprune.vision.tower import tower_geometry

DEMO, DEMO_CLIPS = "demo", 100
COST_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
Progress = Callable[[str], None]
RECORDED = (
    "fps",
    "frames",
    "max_frames",
    "max_visual_tokens",
    "max_new_tokens",
    "model",
    "revision",
    "dtype",
    "quantize",
)


@dataclass(frozen=True)
class Settings:
    """What is asked, and how; two runs with the same settings give the same results.

    Attributes:
        data: path of a file of questions, or "demo"; `digest`: of the file's content.
        split, seed: which clips of the demo's generator; the seed is also that of methods that draw lots.
        limit: at most so many videos; None for all of a file, and 100 clips of the demo's.
        budgets, methods: each method at each budget. `method_args`: settings of the methods, as texts.
        blind: also ask without the video.
        model, sampling, generation: options of the pipeline; all answers are greedy unless `generation` says otherwise.
        timed: whether samples hold `prune_ms` too, milliseconds that scores, merging and choice took, for the video or, where the
            choice depends on it, for the question; in these two runs differ.
        version: of this program.
    """

    data: str
    budgets: tuple[float, ...]
    methods: tuple[str, ...] = (methods.DEFAULT,)
    method_args: dict[str, str] = field(default_factory=dict)
    blind: bool = False
    split: str = "heldout"
    seed: int = 0
    limit: int | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    generation: GenerationOptions = field(default_factory=lambda: GenerationOptions(max_new_tokens=64))
    digest: str | None = None
    timed: bool = False
    version: str = evoprune.__version__

    def record(self) -> dict[str, Any]:
        """All that results depend on, as flat data for JSON."""
        groups = asdict(self.model) | asdict(self.sampling) | asdict(self.generation)
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "sampling", "generation")}
        return own | {name: groups[name] for name in RECORDED}


@dataclass(frozen=True)
class Side:
    """One row of the table: the video in full, none of it, or a method at a budget."""

    kind: str
    method: str = "none"
    budget: float = 1.0

    @property
    def name(self) -> str:
        return row_name(self.kind, self.method, self.budget)


def digest(path: Path) -> str:
    """What a file's content is recognised by."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sides(settings: Settings) -> list[Side]:
    """Full budget first, then the blind row, then method after method. What prunes nothing is the full budget.

    Raises:
        UsageError: a method that is not there, or settings it does not have.
    """
    named = {name: methods.get(name, settings.method_args) for name in settings.methods if name != "none"}
    pairs = dict.fromkeys(product(named, settings.budgets))
    pruned = [Side(METHOD, name, budget) for name, budget in pairs if named[name].prunes(budget)]
    return [Side(FULL), *([Side(BLIND)] if settings.blind else []), *pruned]


class Evaluation:
    """One run: made, checked, loaded, run; the document can be had at any time.

    Args:
        settings: what is asked.
        videos: of a file; None for the demo's clips.

    Raises:
        UsageError: a method that is not there, settings it does not have, or more clips than a block of the demo's holds.
    """

    def __init__(self, settings: Settings, videos: Sequence[Video] | None):
        self.settings, self.sides = settings, sides(settings)
        self.folder: RunFolder | None = None
        limit = settings.limit
        self.total = len(videos[:limit]) if videos is not None else limit or DEMO_CLIPS
        if videos is None and self.total > BLOCK:
            raise UsageError(
                f"a block of the demo's clips holds {BLOCK:,}", "lower --limit, or take several blocks (--seed)"
            )
        self._videos = videos
        self.files = ""  # where the demo's clips are put while they are shown
        self.samples: list[dict] = []
        self.loaded: LoadedModel | None = None

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Raises what `load_model` raises."""
        self.loaded = load_model(self.settings.model, progress=progress)

    def keep_in(self, path: Path, resume: bool = False) -> None:
        """Writes samples into a folder from now on; to `resume`, into that of a run cut short, whose samples it takes over.

        Raises:
            UsageError: it cannot be made, or there is no such run with the same settings.
        """
        self.folder = (RunFolder.resume if resume else RunFolder.create)(path, self.settings.record())
        self.samples = list(self.folder.samples)

    @property
    def failed(self) -> bool:
        """Whether a video failed."""
        return any("error" in sample for sample in self.samples)

    def run(self, tell: Progress = lambda what: None, processes: int = 1) -> None:
        """Shows all videos that have no samples yet. One that cannot be read or computed, or does not fit, is left out
        of all rows and counted.

        Args:
            tell: told, in words, what is about to happen.
            processes: so many videos at a time, each in a process with a model of its own; samples and their order are the same.
        """
        done = {sample["video"] for sample in self.samples}
        missing = self._missing(done)
        with TemporaryDirectory(prefix="evoprune-eval-") as self.files:
            if processes > 1:
                each = shown(self.settings, missing, self.files, processes)
            else:
                each = (
                    self.show(job, lambda what, at=number: tell(f"video {at} of {self.total}: {what}"))
                    for number, job in enumerate(missing, len(done) + 1)
                )
            with closing(each):
                for number, made in enumerate(each, len(done) + 1):
                    if processes > 1:
                        tell(f"video {number} of {self.total}")
                    if made and self.folder:
                        self.folder.add(made)
                    self.samples += made

    def _missing(self, done: set[str]) -> list[Video] | list[int]:
        """Videos of the file, or seeds of the demo's clips."""
        if self._videos is not None:
            return [video for video in self._videos[: self.settings.limit] if video.name not in done]
        s = self.settings
        return [seed for seed in seeds(s.seed, self.total) if clip_name(s.split, seed) not in done]

    def show(self, job: Video | int, tell: Progress = lambda what: None) -> list[dict]:
        """The samples of a video, or of the demo's clip of that seed, side after side; or of its failure, one a question."""
        if isinstance(job, int):
            with demo_video(self.settings.split, job, Path(self.files)) as video:
                return self.show(video, tell)
        video, made, frames, rows = job, [], Frames(), SharedRows()
        try:
            for side in self.sides:
                tell(side.name)
                made += self._asked(side, video, frames, rows)
        except (VideoError, ModelError, OutOfMemory) as problem:
            error = error_record(problem)
            return [_about(video, i) | {"error": error} for i in range(len(video.items))]
        return made

    def _asked(self, side: Side, video: Video, frames: "Frames", rows: SharedRows) -> Iterator[dict]:
        settings, method = self.settings, side.kind == METHOD
        options = PruneOptions(
            budget=side.budget,
            method=side.method,
            method_args=settings.method_args if method else {},
            seed=((settings.seed << 32) + crc32(video.name.encode("utf-8", "surrogateescape"))) % 2**63,
        )
        engine = make_engine(self.loaded, options)
        how = {"read": grey_frames} if side.kind == BLIND else {"read": frames.read, "encode_rows": rows.encode_rows}
        with closing(open_video(engine, video.path, settings.sampling, name=video.name, **how)) as opened:
            encoded = opened.encode()
        cost, pruned = Cost(self.loaded, encoded), encoded.report.time_ms.encode_prune
        for number, item in enumerate(video.items):
            answer = encoded.ask(item.prompt, **vars(settings.generation))
            said = "".join(answer)
            grade = item.grade(said)
            # Where it does not depend on the question it was all done before the first.
            prune_ms = answer.report.time_ms.encode_prune if engine.method.reads_question else pruned
            times = {"prune_ms": prune_ms} if settings.timed else {}
            yield _about(video, number) | {
                "row": side.kind,
                "method": side.method,
                "budget": side.budget,
                "question": item.question,
                "expected": item.answer,
                "answer": said,
                "right": bool(grade),
                "unparseable": grade is None,
                "warnings": answer.report.warnings,
                **cost.of(answer.report),
                **times,
            }

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """The results so far, as plain data for JSON; `error` is what cut the run short."""
        failed = {s["video"]: s["error"]["message"] for s in self.samples if "error" in s}
        good = [s for s in self.samples if "error" not in s and s["row"] == FULL]
        loaded = self.loaded
        return {
            "schema": SCHEMA,
            "model": asdict(loaded.facts()) if loaded else None,
            "env": asdict(environment(loaded.device)) if loaded else None,
            "settings": self.settings.record(),
            "videos": {"wanted": self.total, "shown": len({s["video"] for s in good}), "failed": len(failed)},
            "items": {"answered": len(good), "failed": sum("error" in s for s in self.samples)},
            "rows": score_rows(self.samples),
            "failures": [{"video": name, "message": message} for name, message in sorted(failed.items())],
            "notes": self._notes(),
            "error": error,
        }

    def _notes(self) -> list[str]:
        notes = [
            f"operations: tower and prefill at the dimensions of {COST_MODEL.rpartition('/')[2]}, from the true rows of each "
            "layer, by relative depth, and the true length of the prompt"
        ]
        if self.settings.method_args:
            given = ", ".join(f"{name}={value}" for name, value in self.settings.method_args.items())
            notes.append(f"settings of the methods: {given}")
        if self.settings.data == DEMO:
            notes.append("small synthetic clips: how methods rank on them, not what a real Qwen2.5-VL scores")
        if any("demo_model" in s.get("warnings", ()) for s in self.samples):
            notes.append("the demo model knows only its own clips; what it says about other videos means nothing")
        return notes


class Cost:
    """What showing a video took: rows, tokens, and operations at 3B dimensions."""

    def __init__(self, loaded: LoadedModel, encoded: EncodedVideo):
        config, _ = describe_model(COST_MODEL)
        vision, (grids, height, width) = config.vision_config, encoded.plan.grid
        windows = tower_geometry(loaded.model.model.visual, height, width).windows
        entered = [rows for _, rows in encoded.report.pruning.layers]
        rows = [*stretched(entered, vision.depth), encoded.report.pruning.encoder_rows]
        self._text = config.text_config
        self._tower = tower_flop(vision, rows, grids, windows) / 1e12

    def of(self, report: Report) -> dict[str, float]:
        """As part of a sample, once the question was asked. `tflop`: 10^12 multiplications and additions."""
        pruning, prefill = report.pruning, prefill_flop(self._text, report.tokens.prompt) / 1e12
        return {
            "units": pruning.visual_tokens_in,
            "tokens": pruning.visual_tokens_kept,
            "kept_share": pruning.kept_ratio,
            "live_share": pruning.encoder_live_share,
            "prompt": report.tokens.prompt,
            "tflop_3b": self._tower + prefill,
            "tflop_3b_tower": self._tower,
            "tflop_3b_prefill": prefill,
        }


class Frames:
    """A video's frames, read once for all rows that look at the same moments of it."""

    def __init__(self):
        self._held: dict[tuple, list[FrameChunk]] = {}

    def read(self, info: VideoInfo, times_s: Sequence[float], **how) -> Iterator[FrameChunk]:
        """As `read_frames`. What comes in several chunks is too much to be held, and is read again."""
        key = (tuple(times_s), *sorted(how.items()))
        if key in self._held:
            yield from self._held[key]
            return
        chunks = []
        with closing(read_frames(info, times_s, **how)) as read:
            for chunk in read:
                chunks = [*chunks, chunk][:2]
                yield chunk
        if len(chunks) == 1:
            self._held[key] = chunks


def _about(video: Video, number: int) -> dict[str, Any]:
    item = video.items[number]
    return {"video": video.name, "id": item.id, "type": item.type, "groups": list(item.groups)}


def grey_frames(info: VideoInfo, times_s: Sequence[float], *, decoder: str, chunk_bytes: int) -> Iterator[FrameChunk]:
    """Instead of `read_frames`: as many frames, all of them grey."""
    at_once = max(2, chunk_bytes // (info.width * info.height * 3) // 2 * 2)
    for first in range(0, len(times_s), at_once):
        times = tuple(times_s[first : first + at_once])
        yield FrameChunk(first, np.full((len(times), info.height, info.width, 3), 128, np.uint8), times)
