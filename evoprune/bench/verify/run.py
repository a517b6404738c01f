"""The code that runs the checks for `evoprune verify` within a time limit and records their outcomes."""

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import torch

from evoprune.backend import Device, without_packages
from evoprune.bench import clips
from evoprune.bench.results import Results, folded
from evoprune.bench.shared import TimeLimit
from evoprune.bench.verify import checks
from evoprune.bench.verify.subject import DIFFERS, HELD, SKIPPED, Check, Outcome, Subject, skipped
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError, UsageError, first_line, is_out_of_memory
from evoprune.session import BUNDLED_CONFIGS, LoadedModel, ModelOptions, load_model
from evoprune.util import counted, overlapping
from evoprune.video import probe, temporary_folder

SCHEMA = "evoprune/verify@1"
VERDICTS = {
    HELD: "with this model, this machine computes the same results as transformers",
    DIFFERS: "something is wrong; -o FILE.json writes the details for a bug report",
    SKIPPED: "nothing was compared",
}
UNLIMITED_S = 86_400.0
DIGITS = 4  # number of significant digits for figures in the record
# The size of the synthetic clip. Its height and width are not multiples of 28 or 32, so the frames have to be resized.
FRAMES = 8
HEIGHT = 120
WIDTH = 180
# The checks in execution order. Cheap checks, and checks that other checks rely on, come first.
CHECKS = (
    Check("weights", "every tensor, against the same files read by transformers", checks.weights),
    Check("positions", "positions of prompt tokens, against transformers", checks.positions),
    Check("tower", "features without pruning, against transformers' tower", checks.tower),
    Check("logits", "the language model on the same features, against transformers", checks.logits),
    Check("answer", "a greedy answer about a video, token by token, against transformers", checks.answer),
    Check("counts", "rows of each layer and tokens, against the plan", checks.counts),
    Check("plain", "GPU kernels and graphs, against plain PyTorch", checks.accelerated),
    Check("speed", "time to the first token, alternating with transformers", checks.first_token, slow=True),
)

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Finding:
    """A completed check, with its outcome and its duration in seconds."""

    check: Check
    outcome: Outcome
    seconds: float


@dataclass
class VerifyResults(Results):
    """The results of the checks run so far.

    Attributes:
        findings: The outcomes, in check order.
        seconds: The duration of the run so far.
        error: The error that ended the run early, or None.
    """

    loaded: LoadedModel
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    error: dict[str, Any] | None = None

    def of(self, state: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome.state == state]

    @property
    def verdict(self) -> str:
        """The overall result: `DIFFERS` if any check found a difference, `SKIPPED` if nothing was compared, otherwise `HELD`."""
        return next((state for state in (DIFFERS, HELD) if self.of(state)), SKIPPED)

    def document(self) -> dict[str, Any]:
        """Return the record of the run as a JSON-serializable dict. It contains no paths, prompts, or machine names."""
        loaded = self.loaded
        env = Device(loaded.device).environment()
        counts = {state: len(self.of(state)) for state in (HELD, DIFFERS, SKIPPED)}
        checks = [
            {"name": finding.check.name, "compares": finding.check.compares, "state": finding.outcome.state}
            | {
                "says": finding.outcome.says,
                "figures": _short(finding.outcome.figures),
                "seconds": round(finding.seconds, 2),
            }
            for finding in self.findings
        ]
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            **counts,
            "model": _facts(loaded),
            "env": asdict(env) | {"platform": f"{platform.system()} {platform.machine()}"},
            "checks": checks,
            "seconds": round(self.seconds, 2),
            "peak_bytes": Device(loaded.device).peak_memory(),
            "error": self.error,
        }

    def table(self, width: int) -> str:
        """Return the results as text: the model, the machine, one line per check with its figures, and the verdict."""
        return render(self.document(), width)


def render(document: dict[str, Any], width: int) -> str:
    model = document["model"]
    env = document["env"]
    about = f"{model['id'] or model['family']}, {model['dtype']}, {model['device']}: {env['device_name']}"
    versions = ", ".join(f"{name} {env[name]}" for name in ("evoprune", "torch", "transformers"))
    lines = [about, f"{versions}, {counted(env['threads'], 'thread')}", ""]
    lines += [f"{check['state']:<8} {check['name']:<10} {check['says']}" for check in document["checks"]]
    counts = ", ".join(f"{document[state]} {state}" for state in (HELD, DIFFERS, SKIPPED))
    lines += ["", f"{counts} in {document['seconds']:.0f} s: {VERDICTS[document['verdict']]}"]
    return "\n".join(folded(lines, width)) + "\n"


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    """Return the model's properties for the record, excluding its path. The model's ID is included only if it is public."""
    config = loaded.model.config
    known = loaded.id in (*BUNDLED_CONFIGS, *DEMOS)
    vision = config.vision_config
    text = config.text_config
    return {
        "id": loaded.id if known else None,
        "family": config.as_written()["model_type"],
        "tower": [vision.depth, vision.hidden_size],
        "language_model": [text.num_hidden_layers, text.hidden_size],
        "dtype": loaded.dtype,
        "device": loaded.device,
        "weights": "random" if loaded.description.random else "read",
        "weights_bytes": loaded.weights_bytes,
    }


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in figures.items()}


@contextmanager
def subject_of(loaded: LoadedModel, path: str | None) -> Iterator[Subject]:
    """Create the subject for the checks from the video or image at `path`, or from a synthetic clip if `path` is None.

    If `path` is not a video or image, raises the same exceptions as `probe`.
    """
    with temporary_folder("evoprune-verify-") as folder:
        video, picture = _material(Path(folder))
        if path is not None:
            video = Path(path)
            probe(path)  # raises an error if the file is not a video or image
        subject = Subject(loaded, video, picture)
        subject.asking(1.0)  # raises an error if the device does not work
        yield subject


def _material(folder: Path) -> tuple[Path, Path]:
    """Write a synthetic clip as a folder of frames and its first frame as an image file. Returns both paths."""
    from PIL import Image

    unit = clips.UNIT
    whole = FRAMES, *(-(-side // unit) * unit for side in (HEIGHT, WIDTH))
    clip = folder / "clip"
    clip.mkdir()
    for number, frame in enumerate(clips.synthetic_clip("motion", *whole)[:, :HEIGHT, :WIDTH]):
        Image.fromarray(np.ascontiguousarray(frame)).save(clip / f"{number}.png")
    return clip, Path(copy(clip / "0.png", folder / "picture.png"))


def run_checks(
    model: ModelOptions,
    path: str | None,
    *,
    time_limit_s: float | None,
    begun: float,
    quick: bool,
    progress: Progress,
    failed: Callable[[Exception], None],
) -> Iterator[VerifyResults]:
    """Load a model and check it, yielding the results so far after each check.

    Args:
        path: The video or image to use, or None for a synthetic clip.
        time_limit_s: The time limit for the whole run, or None for no limit.
        begun: The start time of the run, as returned by `time.perf_counter`.

    See `verify` for the other arguments and `load_model` for exceptions.
    """
    limit = TimeLimit(UNLIMITED_S if time_limit_s is None else time_limit_s, begun=begun)
    progress("loading model", 0, 0, "")
    loaded = load_model(replace(model, quantize="none"), pack=False, to_answer=True)
    if loaded.language.reads_ids:
        raise UsageError(
            f"verify cannot compare {loaded.id}, because its layers also read token ids", "use another model"
        )
    with subject_of(loaded, path) as subject:
        yield from verify(subject, limit, quick=quick, progress=progress, failed=failed)


def verify(
    subject: Subject,
    limit: TimeLimit,
    *,
    quick: bool = False,
    progress: Progress = lambda *what: None,
    failed: Callable[[Exception], None] = lambda problem: None,
    checks: Sequence[Check] = CHECKS,
) -> Iterator[VerifyResults]:
    """Run the checks, yielding the results so far after each check. Checks that have not started by the time limit are skipped.

    Args:
        quick: Whether to skip the slow checks.
        progress: A callback that is passed "check", the number of finished checks, the total, and the name of the next check.
        failed: A callback that is passed any exception raised by a check. The outcome of that check is `DIFFERS`.
    """
    results = VerifyResults(subject.loaded)
    for number, check in enumerate(checks):
        progress("check", number, len(checks), check.name)
        begun = limit.spent
        if quick and check.slow:
            outcome = skipped("--quick")
        elif limit.left <= 0:
            outcome = skipped(f"the time limit of {limit.seconds:g} s was reached")
        else:
            outcome = _outcome(check, subject, failed)
        results.findings.append(Finding(check, outcome, limit.spent - begun))
        results.seconds = limit.spent
        yield results


@overlapping
def _exact_convolutions() -> Iterator[None]:
    """Disable TF32 for float32 convolutions on CUDA within the context, because it rounds their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _outcome(check: Check, subject: Subject, failed: Callable[[Exception], None]) -> Outcome:
    """Run a check and return its outcome.

    If the check raises an exception, for example in a kernel, the outcome is `DIFFERS`. If it runs out of memory, it is skipped.
    """
    try:
        with (
            _exact_convolutions(),
            without_packages(),
        ):  # for the towers and the linear attention layers of transformers
            return check.run(subject)
    except Exception as problem:
        if is_out_of_memory(problem) or (isinstance(problem, EvopruneError) and problem.type == "out_of_memory"):
            return skipped(f"out of memory: {_without_paths(first_line(problem))}")
        failed(problem)
        return Outcome(DIFFERS, _without_paths(f"raised {type(problem).__name__}: {first_line(problem)}"))


def _without_paths(text: str) -> str:
    return re.sub(r"""(?<![\w.])[~.]*/[^\s'",;:)]+|[A-Za-z]:\\[^\s'",;:)]+""", "PATH", text)
