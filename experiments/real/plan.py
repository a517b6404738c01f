"""What `experiments.real` runs: benchmarks, rows, and their cost. Imported by `experiments.real`; not a script."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from evoprune.errors import UsageError

TASKS = Path(__file__).with_name("tasks")
GIB = 2**30
ENVIRONMENT_GIB = 8  # packages in an environment with lmms-eval and torch for CUDA


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as an lmms-eval task.

    Attributes:
        task: The name of the task or group in lmms-eval.
        dataset: The hub ID of the videos and questions, or None for generated clips.
        folder: The folder below HF_HOME to which lmms-eval unpacks the videos. If it exists, nothing is downloaded.
        include: A folder with tasks that lmms-eval does not have.
    """

    title: str
    task: str
    dataset: str | None
    revision: str | None = None
    folder: str | None = None
    include: str | None = None


BENCHMARKS = {
    "videomme": Benchmark("Video-MME", "videomme", "lmms-eval/Video-MME", folder="videomme"),
    "videomme-subtitles": Benchmark(
        "Video-MME with subtitles", "videomme_w_subtitle", "lmms-eval/Video-MME", folder="videomme"
    ),
    "mvbench": Benchmark("MVBench", "mvbench", "OpenGVLab/MVBench", revision="video", folder="mvbench_video"),
    "mlvu": Benchmark("MLVU, development set", "mlvu_dev", "sy1998/MLVU_dev", folder="mlvu"),
    "longvideobench": Benchmark(
        "LongVideoBench, validation set", "longvideobench_val_v", "longvideobench/LongVideoBench",
        folder="datasets/longvideobench",
    ),
    "clips": Benchmark("generated clips", "evoprune_clips", None, include=str(TASKS)),
    "clips-subtitles": Benchmark(
        "generated clips with subtitles", "evoprune_clips_w_subtitle", None, include=str(TASKS)
    ),
}  # fmt: skip
DEFAULT = ("videomme", "mvbench", "mlvu", "longvideobench")


@dataclass(frozen=True)
class Row:
    """A method with a budget. The row named `BASELINE` keeps all tokens."""

    name: str
    method: str
    budget: float


BASELINE = Row("none", "none", 1.0)


@dataclass(frozen=True)
class Settings:
    """What determines the results. A run can only be continued with the same settings.

    Attributes:
        model: A hub ID or a folder.
        loading: Options of `VideoQA.load` other than the model, such as `dtype`.
        sampling: Options of `VideoQA.encode`, such as `frames`.
        questions: The number of questions drawn from each benchmark.
    """

    model: str
    rows: tuple[Row, ...]
    benchmarks: tuple[str, ...]
    questions: int
    seed: int
    sampling: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the settings with the definitions of the benchmarks, as answers.py reads them."""
        return json.loads(
            json.dumps(asdict(self) | {"benchmarks": {name: asdict(BENCHMARKS[name]) for name in self.benchmarks}})
        )

    def check(self, folder: Path) -> None:
        """Raise UsageError if a folder belongs to a run with other settings."""
        path = folder / "settings.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if changed := [name for name, value in self.as_json().items() if kept.get(name) != value]:
                raise UsageError(
                    f"{folder} holds a run with other settings: {', '.join(changed)}",
                    "repeat the command that began the run, or choose another folder with -o",
                )


def rows_of(methods: Sequence[str], budgets: Sequence[float]) -> tuple[Row, ...]:
    """Return the baseline, followed by each method at each budget below 1."""
    return (
        BASELINE,
        *(
            Row(f"{without_folders(method)} {budget:g}", method, budget)
            for budget in budgets
            if budget < 1
            for method in methods
        ),
    )


def without_folders(method: str) -> str:
    """Return a method's text with the names of folders instead of their paths, for reports."""
    return re.sub(r"=[^,+]*/(?=[^,+/])", "=", method)


def benchmarks_of(names: str) -> tuple[str, ...]:
    """Split a list of names. Raises UsageError if a name is unknown."""
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in chosen:
        if name not in BENCHMARKS:
            close = get_close_matches(name, BENCHMARKS, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(BENCHMARKS)}"
            raise UsageError(f"unknown benchmark {name!r}", hint)
    if not chosen:
        raise UsageError("no benchmark is named", f"choose from {', '.join(BENCHMARKS)}")
    return chosen


def is_here(benchmark: Benchmark, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a benchmark needs no download, because its clips are generated or its videos have been unpacked."""
    if benchmark.dataset is None:
        return True
    home = Path(environment.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return benchmark.folder is not None and (home / benchmark.folder).is_dir()


def download_bytes(benchmark: Benchmark) -> int:
    """Ask the hub for the size of a benchmark's dataset, in bytes. Raises OSError or a subclass if the hub does not say."""
    from huggingface_hub import HfApi

    about = HfApi().dataset_info(benchmark.dataset, revision=benchmark.revision, files_metadata=True, timeout=20)
    return sum(file.size or 0 for file in about.siblings or ())


def hours(settings: Settings, question_s: float, questions: int) -> float:
    """Return an upper bound of the hours that all answers take, if each takes as long as one without pruning."""
    return question_s * questions * len(settings.rows) / 3600
