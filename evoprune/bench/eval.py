"""The code behind `evoprune eval`, which asks all questions without pruning and then again with each method at each budget.

Each answer is stored as a sample (a plain dict). `scores.py` converts the samples to a table.

Costs are reported as the number of operations for a model with the dimensions of Qwen2.5-VL-3B. To compute them, the per-layer row
counts of the evaluated tower are mapped to the 3B model's 32 layers by relative depth (see `_stretched`), as is the prompt length
if it differs between layers. Scoring and merging, which require a few percent of the tower's operations, are not included.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import torch

from evoprune.backend import Device, Host
from evoprune.batch import Row, Span
from evoprune.bench.eval_folder import SIZE_RULE, RunFolder
from evoprune.bench.eval_results import EvalResults
from evoprune.bench.eval_settings import SCORES, EvalSettings
from evoprune.bench.processes import map_in_processes
from evoprune.bench.questions import VideoQuestions, grade, of_groups
from evoprune.bench.scores import BLIND, FULL, METHOD, SCHEMA, precision, row_name, score_rows
from evoprune.bench.shared import (
    SharedRows,
    after_tower_below,
    after_tower_note,
    gray_frames,
    model_and_machine,
    swept,
)
from evoprune.errors import ModelError, OutOfMemory, UsageError, VideoError, callback_errors, error_record
from evoprune.methods import MethodChain, TowerShape
from evoprune.model import Cost
from evoprune.report import Report
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
    weights_of,
)
from evoprune.util import counted, file_changes, generator_seed
from evoprune.video import input_state

COST_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
NOTE = (
    f"operations: tower and prefill at the dimensions of {COST_MODEL.rpartition('/')[2]}, from the actual rows of each layer "
    "(by relative depth) and the actual prompt length"
)


T = TypeVar("T")


def _stretched(rows: Sequence[T], depth: int) -> list[T]:
    """Map per-layer values to a model with `depth` layers, so that each layer gets the value from the same relative depth."""
    return [rows[layer * len(rows) // depth] for layer in range(depth)]


class AnswerCost:
    def __init__(self, loaded: LoadedModel, encoded: EncodedInputs):
        config = describe(ModelOptions(COST_MODEL, load_format="dummy")).config
        vision = config.vision_config
        grids, height, width = encoded.plan.grid
        windows = TowerShape.of_tower(loaded.model.model.visual).windows(height, width)
        entered = [rows for _, rows in encoded.report.pruning.layers]
        rows = [*_stretched(entered, vision.depth), encoded.report.pruning.encoder_rows]
        self._cost = Cost(config)
        self._depth = config.text_config.num_hidden_layers
        self._tower = self._cost.tower_flop(rows, grids, windows) / 1e12

    def of(self, report: Report) -> dict[str, float]:
        """Return an answer's cost as sample fields. `tflop_3b` is the number of multiplications and additions / 10^12."""
        pruning = report.pruning
        tokens = report.tokens
        read = [count for _, count in pruning.language_layers or [(0, pruning.visual_tokens_kept)]]
        work = pruning.language_work or [[layer, *[count] * 3] for layer, count in pruning.language_layers or []]
        lengths = tokens.prompt
        if work:
            lengths = [[tokens.text + count for count in counts] for _, *counts in _stretched(work, self._depth)]
        prefill = self._cost.prefill_flop(lengths) / 1e12
        return {
            "units": pruning.visual_tokens_in,
            "tokens": pruning.visual_tokens_kept,
            "layer_tokens": sum(read) / len(read),
            "kept_share": pruning.kept_ratio,
            "live_share": pruning.encoder_live_share,
            "prompt": report.tokens.prompt,
            "tflop_3b": self._tower + prefill,
            "tflop_3b_tower": self._tower,
            "tflop_3b_prefill": prefill,
        }


# A progress callback. It is called with the current step, or by `Evaluation.run` with "video", the number of finished videos, the
# total, and the current step.
Progress = Callable[..., None]


@dataclass(frozen=True)
class Variant:
    row: str
    method: str = "none"
    budget: float | str = 1.0

    @property
    def name(self) -> str:
        return row_name(**asdict(self))


def variants(settings: EvalSettings) -> list[Variant]:
    """Return the variants to evaluate: full, blind, and all combinations of a method and a budget that prune any tokens.

    Raises:
        UsageError: If the settings are invalid.
    """
    if settings.score not in SCORES:
        raise UsageError(f"score is {settings.score!r}, which is unknown", f"use {' or '.join(SCORES)}")
    pruned = [Variant(METHOD, *pair) for pair in swept(settings.methods, settings.budgets)]
    unpruned = [Variant(FULL)]
    if settings.blind:
        unpruned.append(Variant(BLIND))
    return unpruned + pruned


class Evaluation:
    """An evaluation of pruning methods on questions about videos.

    To run it, create an instance, `load` the model, call `run`, and then get the results from `document`.

    Raises:
        UsageError: If a method, a setting, or a group does not exist.
    """

    def __init__(self, settings: EvalSettings, videos: Sequence[VideoQuestions]):
        self.settings = settings
        self.variants = variants(settings)
        self.folder: RunFolder | None = None
        self.ahead: ReadAhead | None = None  # may have prefetched the first videos
        chosen = of_groups(videos, settings.groups)
        if videos and not chosen:
            raise UsageError(
                f"no question is in the group {' or '.join(settings.groups)}", "see the field groups in the file"
            )
        self.videos = chosen[: settings.limit]
        self.total = len(self.videos)
        self.samples: list[dict] = []
        self.loaded: LoadedModel | None = None

    def load(self, progress: Callable[[int, int], None] | None = None, model: ModelDescription | None = None) -> None:
        """Load the model. If its description is already known, pass it as `model`.

        Raises:
            UsageError: If a method is incompatible with the model, or if the resumed run used a different model.

        See `load_model` for other exceptions.
        """
        model = model or describe(self.settings.model)
        for name in {variant.method for variant in self.variants}:
            model.check_method(MethodChain.parse(name))
        self.loaded = load_model(model, progress=progress)
        if self.folder:
            self.folder.check_model(model.state)
            self.folder.check_size_rule(self._after_tower_below())

    def keep_in(self, path: Path, resume: bool = False) -> None:
        """Store all subsequent samples in a folder. If `resume` is True, continue the run stored there.

        See `RunFolder` for exceptions.
        """
        opening = RunFolder.resume if resume else RunFolder.create
        self.folder = opening(path, self._record())
        self.folder.check_size_rule(self._after_tower_below())
        self.samples = list(self.folder.samples)
        states = {sample["video"]: sample.get("files") for sample in self.samples}
        for video in self.videos:
            if change := file_changes(states.get(video.name), _state(video)):
                hint = "restore the earlier file, or choose a new -o DIR"
                raise UsageError(f"{video.name} has changed since {path} was started: {change}", hint)

    @property
    def failed(self) -> bool:
        return any("error" in sample for sample in self.samples)

    def run(self, progress: Progress = lambda *what: None, processes: int = 1) -> None:
        """Evaluate all videos without samples.

        Videos that cannot be read, do not fit into memory, or make the model fail are excluded from all results.

        Args:
            progress: A callback for each step. See `Progress`.
            processes: The number of processes. With more than one, each process loads its own model.

        Raises:
            OutOfMemory: If there is not enough memory for one model per process.
        """
        done = {sample["video"] for sample in self.samples}
        missing = [video for video in self.videos if video.name not in done]
        if processes > 1:
            loaded = self.loaded
            model = self.settings.model
            if loaded and (short := Device(loaded.device).shortage(processes * weights_of(loaded.description).bytes)):
                hint = "use fewer processes (--processes) or a smaller model"
                raise OutOfMemory(f"{processes} copies of {loaded.id}: {short}", hint, stage="load")
            model = replace(model, threads=threads_of_each(model.threads, processes))
            results = map_in_processes(partial(_start, replace(self.settings, model=model)), missing, processes)
        else:
            results = self._reading_ahead(missing, progress)
        with closing(results):
            for number, samples in enumerate(results, len(done) + 1):
                if processes > 1:
                    progress("video", number, self.total)
                if self.folder:
                    self.folder.add(samples)
                self.samples += samples

    def _reading_ahead(self, videos: Sequence[VideoQuestions], progress: Progress) -> Iterator[list[dict]]:
        """Evaluate videos one at a time while the next videos are prefetched. Yields the samples of one video at a time."""
        done = self.total - len(videos)
        with closing(in_flight(videos, self._opened, self.loaded)) as ahead:
            for number, (video, opened) in enumerate(ahead, done):
                yield self.evaluate(video, lambda what, at=number: progress("video", at, self.total, what), opened)

    def _opened(self, video: VideoQuestions) -> OpenInputs:
        """Open all of a video's time spans that questions refer to, so that they can be prefetched for the first variant."""
        return OpenInputs.joined([self._open(self.variants[0], video, span) for span in Span.group(video.rows)])

    def evaluate(
        self,
        video: VideoQuestions,
        progress: Progress = lambda *what: None,
        opened: OpenInputs | Exception | None = None,
    ) -> list[dict]:
        """Evaluate one video and return its samples, grouped by variant.

        If the video fails, the result instead contains one sample with an `error` for each question.

        Args:
            video: The video and the questions about it.
            progress: A callback for each step.
            opened: The prefetched video, the exception raised while opening it, or None if it was not prefetched. Its
                patches stay in memory until all variants have been evaluated.
        """
        with callback_errors() as passing:
            return self._evaluated(video, passing(progress), opened)

    def _evaluated(
        self, video: VideoQuestions, progress: Progress, opened: OpenInputs | Exception | None
    ) -> list[dict]:
        samples: list[dict] = []
        files = _state(video)
        try:
            if isinstance(opened, Exception):
                raise opened
            for span in Span.group(video.rows):
                rows = SharedRows()
                for variant in self.variants:
                    progress(variant.name)
                    asked = self._asked(variant, video, span, rows, progress)
                    samples += [sample | {"files": files} for sample in asked]
        except (UsageError, VideoError, ModelError, OutOfMemory) as problem:
            error = error_record(problem)
            return [_about(video, row) | {"error": error} for row in video.rows]
        finally:
            if isinstance(opened, OpenInputs):
                opened.close()
        return samples

    def _session(self, variant: Variant, video: VideoQuestions) -> Session:
        settings = self.settings
        seed = crc32(video.name.encode("utf-8", "surrogateescape"), generator_seed(settings.seed))
        options = PruneOptions(budget=variant.budget, method=variant.method, seed=seed)
        return Session(self.loaded, options.config())

    def _open(self, variant: Variant, video: VideoQuestions, span: Span, rows: SharedRows | None = None) -> OpenInputs:
        """Open a video for a variant. `rows` is a cache of the tower's rows shared by all variants, or None for prefetching."""
        blind = variant.row == BLIND
        return open_inputs(
            self._session(variant, video),
            [video.path],
            self.settings.sampling.with_overrides(**span.sampling),
            names=[video.name],
            frames=gray_frames if blind else None,
            tower=None if blind or rows is None else rows.encode_rows,
            ahead=self.ahead,
        )

    def _asked(
        self, variant: Variant, video: VideoQuestions, span: Span, rows: SharedRows, progress: Progress
    ) -> Iterator[dict]:
        def tell(stage: str, done: int, total: int) -> None:
            if stage == "read" and done < total:
                progress(f"{variant.name}, frame {done:,}/{total:,}")

        settings = self.settings
        with closing(self._open(variant, video, span, rows)) as opened:
            encoded = opened.encode(tell)
            session = opened.session
        cost = AnswerCost(self.loaded, encoded)
        pruned = encoded.report.time_ms.encode_prune
        for row in span.rows:
            last = row is span.rows[-1]
            if settings.score == "likelihood" and row.options:
                row = replace(row, scored=True)
            answer = encoded.ask(row.prompt, last=last, **vars(row.generation(settings.generation)))
            text = "".join(answer)
            right = grade(row, text)
            sample = {
                **asdict(variant),
                "question": row.question,
                "expected": row.answer,
                "answer": text,
                "thoughts": answer.thoughts,
                "right": bool(right),
                "unparseable": right is None,
                "choices": answer.choices,
                "warnings": answer.report.warnings,
                **cost.of(answer.report),
            }
            if settings.timed:
                times = answer.report.time_ms
                prune_ms = pruned  # a method that does not read the question finishes before the first question
                if session.pruning.method.reads_question:
                    prune_ms = times.encode_prune
                sample["prune_ms"] = prune_ms + (times.prefill_prune or 0.0)
            yield _about(video, row) | sample

    def results(self, error: dict | None = None) -> EvalResults:
        """Return the results so far. `error` is the error that ended the run early, or None."""
        return EvalResults(self.document(error))

    def document(self, error: dict | None = None) -> dict[str, Any]:
        """Return the results so far as a JSON-serializable dict. `error` is the error that ended the run early, or None."""
        failed = {s["video"]: s["error"]["message"] for s in self.samples if "error" in s}
        good = [s for s in self.samples if "error" not in s and s["row"] == FULL]
        rows = score_rows(self.samples)
        return {
            "schema": SCHEMA,
            **model_and_machine(self.loaded),
            "settings": self._record(),
            "videos": {"wanted": self.total, "evaluated": len({s["video"] for s in good}), "failed": len(failed)},
            "items": {"answered": len(good), "failed": sum("error" in s for s in self.samples)},
            "rows": rows,
            "failures": [{"video": name, "message": message} for name, message in sorted(failed.items())],
            "notes": [*filter(None, [precision(rows)]), *self._notes()],
            "error": error,
        }

    def _record(self) -> dict[str, Any]:
        """Return the settings as stored in the results, including the model's files and the device's size limit, if known."""
        known = self.settings.record()
        state = self.loaded.description.state if self.loaded else self.settings.model.state()
        if state:
            known["files"] = state
        if below := self._after_tower_below():
            known[SIZE_RULE] = below
        return known

    def _after_tower_below(self) -> int | None:
        """Return the number of units below which any method prunes inputs only after the tower.

        Returns None if no model is loaded yet.
        """
        if self.loaded is None:
            return None
        pruned = [variant for variant in self.variants if variant.row == METHOD]
        configs = [PruneOptions(variant.budget, variant.method).config() for variant in pruned]
        return after_tower_below(configs, self.loaded.device)

    def _notes(self) -> list[str]:
        notes = [NOTE]
        if note := after_tower_note(self._after_tower_below() or 0):
            notes.append(note)
        total = counted(len(self.samples), "answer")
        for name, what in {
            "answer_cut": "may be incomplete",
            "thoughts_cut": "ended while the model was still thinking",
        }.items():
            if cut := sum(name in s.get("warnings", ()) for s in self.samples):
                notes.append(f"{cut:,} of {total} {what}: token limit reached (-n, max_new_tokens)")
        if any({"demo_model", "demo_untold"} & {*s.get("warnings", ())} for s in self.samples):
            notes.append("the demo model knows only its own clips; its answers about other videos are meaningless")
        return notes


def _start(settings: EvalSettings) -> Callable[[VideoQuestions], list[dict]]:
    """Load a model in this process, and return a function that evaluates one video."""
    evaluation = Evaluation(settings, [])  # no videos, because `evaluate` gets them one at a time
    evaluation.load()
    return evaluation.evaluate


def _state(video: VideoQuestions) -> dict[str, Any] | None:
    return input_state(str(video.path))


def _about(video: VideoQuestions, row: Row) -> dict[str, Any]:
    return {"video": video.name, "id": row.id, "type": row.type, "groups": list(row.groups)}


def threads_of_each(wanted: int | str | None, processes: int) -> int:
    """Return the number of threads for each process.

    Args:
        wanted: The number of threads per process. If it is not an int, each process gets as many threads as this process, or fewer
            if the total would exceed the number of cores.
    """
    if isinstance(wanted, int):
        return wanted
    return max(1, min(torch.get_num_threads(), Host().available_cores() // processes))
