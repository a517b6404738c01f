"""The settings of `evoprune eval`, from the command line or an earlier run's folder. Does not import torch."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import evoprune
from evoprune.batch import Span
from evoprune.bench.eval_folder import SIZE_RULE, no_folder, stored_settings
from evoprune.bench.questions import VideoQuestions, load_questions, of_groups
from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.methods import Budget, MethodText
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.util import OPTION, record_of
from evoprune.video import SamplingOptions

Score = Literal["text", "likelihood"]
SCORES = get_args(Score)

# Options that are always recorded in the results, even when set to their default values.
RECORDED = (
    "fps", "frames", "max_frames", "max_visual_tokens", "seek", "max_new_tokens", "model", "revision", "dtype", "quantize",
)  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """The settings of an evaluation, which runs each method at each budget.

    Two runs with the same settings produce the same results, except for the times recorded if `timed` is True.
    """

    data: str  # path of the questions file, or a description of the videos
    budgets: tuple[float | str, ...]  # see `Budget.recorded`
    methods: tuple[str, ...] = (MethodText.DEFAULT,)
    blind: bool = False  # whether to also ask each question without the video
    seed: int = 0  # for methods with random selection
    score: Score = "text"  # grade questions with options by the generated text ("text") or by the most probable option
    groups: tuple[str, ...] = ()  # ask only questions in these groups; empty means all questions
    limit: int | None = None  # maximum number of videos; None means all
    model: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    generation: GenerationOptions = field(default_factory=lambda: GenerationOptions(max_new_tokens=64))
    digest: str | None = None  # hash of the questions file
    # Also record `prune_ms`, the pruning time per video, or per question if the method reads the question.
    timed: bool = False
    version: str = evoprune.__version__

    @classmethod
    def stored(cls, folder: Path, model: ModelOptions) -> "EvalSettings":
        """Read the settings of the run stored in a folder. The questions file may have changed since the run started.

        Relative paths of the questions and the model refer to the current folder or, if they are not there, to the nearest parent
        of the run's folder in which they are.

        Args:
            folder: The run's output folder.
            model: The source of options that do not affect answers, such as the device.

        Raises:
            UsageError: If the folder does not contain a run.
        """
        try:
            record = stored_settings(folder)
            settings = cls.of_record(record, model)
            used = settings.model
            if record.get("files"):  # a folder, not a hub ID
                used = replace(used, model=_nearest(used.model, folder, used.folder))
            return replace(settings, model=used, data=_nearest(settings.data, folder, Path(settings.data)))
        except (KeyError, TypeError, ValueError) as problem:
            raise no_folder(folder) from problem

    @classmethod
    def of_record(cls, record: dict[str, Any], model: ModelOptions) -> "EvalSettings":
        others = ("digest", "version", "plugins", "files", SIZE_RULE)
        options = {name: value for name, value in record.items() if name not in others}
        if not options["method_args"]:
            del options["method_args"]
        own = {f.name: options.pop(f.name) for f in fields(cls) if f.name in options and f.name != "model"}
        own["budgets"] = tuple(Budget.parse(each, auto=True).recorded for each in own["budgets"])
        own |= {name: tuple(own[name]) for name in ("methods", "groups")}
        free = (f.name for f in fields(model) if not f.metadata[OPTION].changes_answers)
        pipeline = PipelineOptions.of(**{name: getattr(model, name) for name in free} | options)
        return cls(**own, model=pipeline.model, sampling=pipeline.sampling, generation=pipeline.generation)

    def record(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if name not in ("model", "sampling", "generation")}
        code = {name: code for text in self.methods for name, code in MethodText(text).plugin_code().items()}
        options = record_of((self.sampling, self.generation, self.model), RECORDED)
        if code:
            options["plugins"] = code
        return own | options | {"method_args": {}}  # method settings are part of `methods`

    def read_questions(self) -> tuple["EvalSettings", list[VideoQuestions]]:
        """Read the questions file.

        Returns:
            A copy of the settings that includes the file's digest, and the questions grouped by video.

        Raises:
            UsageError: If the file is invalid (see `load_questions`), or if `score` requires options but none of the questions has
                options.
        """
        path = Path(self.data)
        videos = load_questions(path)
        if self.score == "likelihood" and not any(row.options for video in videos for row in video.rows):
            hint = "leave it out, or add options to questions"
            raise UsageError("--score likelihood needs options, and no question has any", hint)
        return replace(self, digest=hashlib.sha256(path.read_bytes()).hexdigest()), videos

    def inputs(self, videos: Sequence[VideoQuestions]) -> Iterator[tuple[list[str], SamplingOptions]]:
        """Yield the inputs in the order in which the evaluation will read them, so that `ReadAhead` can prefetch them."""
        for video in of_groups(videos, self.groups)[: self.limit]:
            span, *_ = Span.group(video.rows)
            yield [video.path], self.sampling.with_overrides(**span.sampling)


def _nearest(name: str, folder: Path, path: Path) -> str:
    """Return the path of a file or folder named in a run's settings.

    Args:
        name: The name in the settings.
        folder: The run's folder.
        path: The path that the name refers to in the current folder.

    Returns:
        The name itself if `path` exists; otherwise, the path below the nearest parent of `folder` that contains the name. If there
        is none, the name itself.
    """
    if path.exists() or path.is_absolute():
        return name
    return next((str(above / path) for above in folder.resolve().parents if (above / path).exists()), name)
