"""Runs the checks one after another within a time limit, and makes a record of what came of them."""

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evoprune.backend.devices import environment, exact_convolutions, peak_memory
from evoprune.backend.hosted import without_packages
from evoprune.bench import clips
from evoprune.bench.profile_results import TimeLimit
from evoprune.bench.verify import checks
from evoprune.bench.verify.subject import DIFFERS, HELD, SKIPPED, Check, Outcome, Subject, skipped
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError, first_line, is_out_of_memory
from evoprune.model.config import as_written
from evoprune.session.loading.hub import BUNDLED_CONFIGS
from evoprune.session.loading.model import LoadedModel
from evoprune.video.frames import probe
from evoprune.video.info import PICTURE
from evoprune.video.temporary import temporary_folder

SCHEMA = "evoprune/verify@1"
DIGITS = 4  # of a figure in the record
# of the clips made by formula; no multiples of 28 or 32: frames are resized
FRAMES = 8
HEIGHT = 120
WIDTH = 180
# In the order in which they run: the cheap ones and those on which others rest come first.
CHECKS = (
    Check("kernels", "nothing: what computes attention and products here", checks.kernels),
    Check("weights", "every tensor, with what transformers reads of the same files", checks.weights),
    Check("patches", "pixels of resized frames, with transformers' processor", checks.patches),
    Check("positions", "positions of a prompt's tokens, with transformers'", checks.positions),
    Check("tower", "features with nothing pruned, with transformers' tower", checks.tower),
    Check("logits", "the language model on the same features, with transformers'", checks.logits),
    Check("answer", "a greedy answer about a video, token by token, with transformers'", checks.answer),
    Check("inputs", "the same about a picture and a video together", checks.inputs, slow=True),
    Check("again", "a second question about a video, with the same question asked first", checks.again),
    Check("counts", "rows of each layer and tokens, with the plan", checks.counts),
    Check("chunks", "tokens from the smallest pieces, with those from the usual ones", checks.pieces),
    Check("reuse", "a clip that stands still, with and without reuse", checks.reuse),
    Check("model", "EvoPrune(...)(model) of transformers, with VideoQA, both pruned", checks.transformers_model),
    Check("plain", "kernels and graphs of a GPU, with plain PyTorch", checks.accelerated),
    Check("waits", "how often the program waits for the device, with the design", checks.waits),
    Check("memory", "the peak of a question, with the estimate", checks.memory),
    Check("packed", "products with packed weights, with those in fp64", checks.packed),
    Check("batch", "a batch of two in transformers' model, with each prompt by itself", checks.batch, slow=True),
    Check("threads", "tokens with another number of threads", checks.threads, slow=True),
    Check("int8", "an answer with weights in 8 bits, with the weights as they are", checks.int8, slow=True),
    Check("int4", "the same in 4 bits", checks.int4, slow=True),
    Check("speed", "time to the first token, with transformers' in turns", checks.first_token, slow=True),
    Check("methods", "every method on a short clip, with its plan and with itself", checks.every_method, slow=True),
)

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Finding:
    """Hold a check, its outcome, and how long it took."""

    check: Check
    outcome: Outcome
    seconds: float


@dataclass
class VerifyResults:
    """Hold the results so far; `findings` in the order of the checks."""

    loaded: LoadedModel
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, state: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome.state == state]

    @property
    def verdict(self) -> str:
        """Return the worst state that there is; `SKIPPED` where nothing was compared."""
        return next((state for state in (DIFFERS, HELD) if self.of(state)), SKIPPED)

    def document(self) -> dict[str, Any]:
        """Return the record, without paths, prompts and names of machines."""
        loaded = self.loaded
        env = environment(loaded.device)
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
            "peak_bytes": peak_memory(loaded.device),
        }


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    """Return what a model is, without its place: its name only where everybody has it."""
    config = loaded.model.config
    known = loaded.id in (*BUNDLED_CONFIGS, *DEMOS)
    vision = config.vision_config
    text = config.text_config
    return {
        "id": loaded.id if known else None,
        "family": as_written(config)["model_type"],
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
    """Provide what is compared: a file that the user names, in the place of the clip or the picture made by formula."""
    with temporary_folder("evoprune-verify-") as folder:
        video, still, picture = _material(Path(folder))
        if path is not None:
            if probe(path).kind == PICTURE:
                picture = Path(path)
            else:
                video = Path(path)
        subject = Subject(loaded, video, still, picture)
        subject.asking()  # raises where the device computes nothing
        yield subject


def _material(folder: Path) -> tuple[Path, Path, Path]:
    """Return a clip in which things move, a clip that stands still, and a picture: two folders of frames and a file."""
    from PIL import Image

    unit = clips.UNIT
    whole = FRAMES, *(-(-side // unit) * unit for side in (HEIGHT, WIDTH))
    moving, still = (clips.synthetic_clip(kind, *whole)[:, :HEIGHT, :WIDTH] for kind in ("motion", "static90"))
    for name, frames in (("moving", moving), ("still", still[:1].repeat(FRAMES, 0)), ("picture", still[:1])):
        (folder / name).mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(np.ascontiguousarray(frame)).save(folder / name / f"{number}.png")
    return folder / "moving", folder / "still", folder / "picture" / "0.png"


def verify(
    subject: Subject,
    limit: TimeLimit,
    *,
    quick: bool = False,
    progress: Progress = lambda *what: None,
    failed: Callable[[Exception], None] = lambda problem: None,
    checks: Sequence[Check] = CHECKS,
) -> Iterator[VerifyResults]:
    """Runs the checks; those that would begin after the time limit are skipped.

    Args:
        quick: leaves out slow checks.
        progress: called with "check", how many are done, all, and the name of the next one.
        failed: called with what a check raised, which counts as a difference.

    Yields the results so far, after each check.
    """
    results = VerifyResults(subject.loaded)
    subject.limit = limit
    for number, check in enumerate(checks):
        progress("check", number, len(checks), check.name)
        begun = limit.spent
        if quick and check.slow:
            outcome = skipped("--quick")
        elif limit.left <= 0:
            outcome = skipped(f"the time limit of {limit.seconds:g} s was over")
        else:
            outcome = _outcome(check, subject, failed)
        results.findings.append(Finding(check, outcome, limit.spent - begun))
        results.seconds = limit.spent
        yield results


def _outcome(check: Check, subject: Subject, failed: Callable[[Exception], None]) -> Outcome:
    """Return what comes of a check; a kernel that does not run, or a library that lacks a function, is a finding as well."""
    try:
        with exact_convolutions(), without_packages():  # of transformers' towers, and of its layers of linear attention
            return check.run(subject)
    except Exception as problem:
        if is_out_of_memory(problem) or (isinstance(problem, EvopruneError) and problem.type == "out_of_memory"):
            return skipped(f"out of memory: {_without_paths(first_line(problem))}")
        failed(problem)
        return Outcome(DIFFERS, _without_paths(f"raised {type(problem).__name__}: {first_line(problem)}"))


def _without_paths(text: str) -> str:
    return re.sub(r"""(?<![\w.])[~.]*/[^\s'",;:)]+|[A-Za-z]:\\[^\s'",;:)]+""", "PATH", text)
