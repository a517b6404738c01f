"""Measure what it costs to read keyframes near the sampling times in place of the frames at these times.

    python -m experiments.accuracy.seek -o runs/seek-shapes.jsonl --world shapes --split heldout --block 14
    python -m experiments.accuracy.seek -o runs/seek-scenes.jsonl --world scenes --split heldout --block 14
    python -m experiments.accuracy.seek runs/seek-shapes.jsonl runs/seek-scenes.jsonl

The first two forms add a line a clip, sampling, kind of times and budget, and leave out what the file has. The third prints tables.

A sampling time is the middle of one of n equal parts of the video. The clips have a keyframe every second. Three kinds of times:

- exact: the middles.
- keyframes: where keyframes lie in a part, its time is moved to the one nearest to the middle.
- random: every time is drawn from its part.

Positions in the prompt are those of the middles in all three. Pictures, which have no times, are left out.
"""

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from evoprune.bench.processes import map_in_processes
from evoprune.bench.questions import VideoQuestions, grade
from evoprune.session.encoding import OpenInput, open_inputs
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.session.reading import chunk_bytes
from evoprune.session.session import Session
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.plan import SamplingPlan
from evoprune.video.sandbox.isolation import OnFrames
from experiments.demo.worlds import SCENES, SHAPES, WORLDS
from experiments.demo.write import ClipName, clips_asked, demo_video

MODELS = {SHAPES.name: "demo", SCENES.name: "demo-scenes"}
VIDEOS = {SHAPES.name: (), SCENES.name: ("video",)}  # the groups of questions about videos; () for all
KEYFRAME_S = 1.0
RATES = (2.0, 0.75)  # frames a second: the models' own; and parts of 1 to 1.5 s, so that each has a keyframe
BUDGETS = ("full", "balanced", "fast")
EXACT = "exact"
KEYFRAMES = "keyframes"
RANDOM = "random"
# Groups of questions, of either world.
KINDS = ("flash", "moment", "time", "events", "motion", "space", "detail", "gist")
TOKENS = 64
ROUNDING = 1e-6  # seconds

Move = Callable[[SamplingPlan, int], tuple[float, ...]]  # the times to read, with a seed


def parts(sampling: SamplingPlan) -> list[tuple[float, float]]:
    """Return the equal parts of the span, as seconds [start, end), whose middles are the sampling times."""
    edges = np.linspace(sampling.start_s, sampling.end_s, sampling.frames + 1).tolist()
    return list(pairwise(edges))


def exact(sampling: SamplingPlan, seed: int) -> tuple[float, ...]:
    return sampling.times_s


def at_keyframes(sampling: SamplingPlan, seed: int) -> tuple[float, ...]:
    """Return the times, each moved to the nearest keyframe in its part, if there is one: those that `--seek keyframes` reads."""
    moved = []
    for middle, (start, end) in zip(sampling.times_s, parts(sampling), strict=True):
        first = math.ceil((start - ROUNDING) / KEYFRAME_S)
        beyond = math.ceil((end - ROUNDING) / KEYFRAME_S)
        keyframes = [number * KEYFRAME_S for number in range(first, beyond)]
        moved.append(min(keyframes, key=lambda time_s: abs(time_s - middle), default=middle))
    return tuple(moved)


def at_random(sampling: SamplingPlan, seed: int) -> tuple[float, ...]:
    """Times drawn from all of their parts alike."""
    rng = np.random.default_rng(seed)
    return tuple(float(rng.uniform(start, end)) for start, end in parts(sampling))


MOVES: dict[str, Move] = {EXACT: exact, KEYFRAMES: at_keyframes, RANDOM: at_random}


@dataclass(eq=False)
class MovedInput(OpenInput):
    """An input whose frames are read at other times than those that the prompt is made for."""

    shares: ClassVar[bool] = False

    move: Callable[[SamplingPlan], tuple[float, ...]]

    def frames(self, on_frames: OnFrames) -> Iterator[FrameChunk]:
        plan = self.plan
        times_s = self.move(plan.sampling)
        return read_frames(plan.source, times_s, decoder=plan.decoder, chunk_bytes=chunk_bytes(plan), cores=self.cores)


Job = tuple[ClipName, Sequence[str]]  # a clip and the budgets at which it is asked about


def start(model: str, groups: Sequence[str], folder: str) -> Callable[[Job], list[dict]]:
    """Return what each process begins with: the function that makes the lines of a clip."""
    loaded = load_model(ModelOptions(model, dtype="fp32", threads=1))
    return partial(lines_of, loaded, groups, Path(folder))


def lines_of(loaded: LoadedModel, groups: Sequence[str], folder: Path, job: Job) -> list[dict]:
    """Return a line a sampling, kind of times and budget."""
    clip, budgets = job
    made = []
    with demo_video(clip, folder, groups=groups, keyframe_s=KEYFRAME_S) as video:
        for fps in RATES:
            for times, move in MOVES.items():
                kind = partial(MovedInput, move=partial(move, seed=clip.seed))
                for budget in budgets:
                    session = Session(loaded, PruneOptions(budget, seed=clip.seed).config())
                    made.append(answered(session, video, fps, kind) | {"times": times, "budget": budget})
    return made


def answered(session: Session, video: VideoQuestions, fps: float, kind: Callable[..., MovedInput]) -> dict:
    """Of all questions about a clip whether the answer is right, and how far its frames were moved."""
    with closing(open_inputs(session, [video.path], SamplingOptions(fps=fps), kind=kind)) as opened:
        encoded = opened.encode()
        sampling = opened.plans[0].sampling
        moved = opened.inputs[0].move(sampling)
    apart = [abs(to - time_s) for to, time_s in zip(moved, sampling.times_s, strict=True)]
    said = [encoded.ask(row.prompt, max_new_tokens=TOKENS).text for row in video.rows]
    return {
        "clip": video.name,
        "fps": fps,
        "frames": len(apart),
        "moved": sum(distance > ROUNDING for distance in apart),
        "moved_s": round(sum(apart), 6),
        "answers": said,
        "right": [bool(grade(row, text)) for row, text in zip(video.rows, said, strict=True)],
        "types": [row.type for row in video.rows],
        "groups": [list(row.groups) for row in video.rows],
    }


def right_of(lines: Iterable[dict], group: str | None = None) -> dict[str, dict[str, list[bool]]]:
    """By kind of times and by clip, whether the answers are right. `group`: of questions; default: all of them."""
    found: dict[str, dict[str, list[bool]]] = {times: defaultdict(list) for times in MOVES}
    for line in lines:
        asked = zip(line["right"], line["groups"], strict=True)
        right = [each for each, groups in asked if group is None or group in groups]
        if right:
            found[line["times"]][line["clip"]] += right
    return found


def difference(right: Sequence[Sequence[bool]], others: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Difference of two shares of right answers to the same questions, and its standard error, both in percentage points.

    Each has a sequence of answers a clip. Answers about a clip depend on each other, so the error is that over clips.
    """
    counts = np.array([len(each) for each in right], float)
    more = np.array([sum(mine) - sum(theirs) for mine, theirs in zip(right, others, strict=True)], float)
    mean = more.sum() / counts.sum()
    variance = np.sum((more - mean * counts) ** 2) * len(counts) / max(1, len(counts) - 1)
    return 100 * float(mean), 100 * float(np.sqrt(variance) / counts.sum())


def cells(lines: Iterable[dict], group: str | None = None) -> list[str]:
    """Questions, and percent of right answers with each kind of times, the moved ones with the difference to exact ones."""
    found = right_of(lines, group)
    clips = sorted(found[EXACT])
    base = [found[EXACT][clip] for clip in clips]
    made = [f"{sum(map(len, base)):,}", f"{_percent(base):.1f}"]
    for times in (KEYFRAMES, RANDOM):
        right = [found[times][clip] for clip in clips]
        mean, error = difference(right, base)
        made += [f"{_percent(right):.1f}", f"{mean:+.1f} ± {error:.1f}"]
    return made


def _percent(right: Iterable[Sequence[bool]]) -> float:
    return 100 * float(np.mean([each for clip in right for each in clip]))


def table(lines: Sequence[dict]) -> list[str]:
    """Rows of Markdown: of each sampling one a budget, one of all budgets together, and of these one a kind of question."""
    heads = ("sampling", "budget", "questions", "exact", "keyframes", "difference", "random", "difference")
    made = ["| " + " | ".join(heads) + " |", "|---|---|" + "--:|" * 6]
    for fps in dict.fromkeys(line["fps"] for line in lines):
        sampled = [line for line in lines if line["fps"] == fps]
        groups = {group for line in sampled for each in line["groups"] for group in each}
        budgets = dict.fromkeys(line["budget"] for line in sampled)
        rows = {f"`-b {b}`": cells(line for line in sampled if line["budget"] == b) for b in budgets}
        rows["all"] = cells(sampled)
        rows |= {f"all: {kind}": cells(sampled, kind) for kind in KINDS if kind in groups}
        made += ["| " + " | ".join([f"{fps:g} frames/s", name, *row]) + " |" for name, row in rows.items()]
    return made


def moves(lines: Sequence[dict]) -> list[str]:
    """Rows of Markdown: how many frames are moved in each sampling, and how far."""
    made = ["| sampling | times | frames moved | how far, mean of these |", "|---|---|--:|--:|"]
    rows: dict[tuple[float, str], list[dict]] = defaultdict(list)
    for line in lines:
        rows[line["fps"], line["times"]].append(line)
    for (fps, times), each in rows.items():
        moved = sum(line["moved"] for line in each)
        if moved:
            share = moved / sum(line["frames"] for line in each)
            far = sum(line["moved_s"] for line in each) / moved
            made.append(f"| {fps:g} frames/s | {times} | {share:.0%} | {far:.2f} s |")
    return made


def read(path: Path) -> list[dict]:
    """Return the lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="lines to print tables of")
    parser.add_argument("--world", default=SHAPES.name, choices=WORLDS)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--block", type=int)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("-b", "--budget", default=",".join(BUDGETS), help="some of: %(default)s")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(arguments)
    if args.files:
        for path in args.files:
            lines = read(path)
            print("\n".join(["", f"## {path.stem}", "", *table(lines), "", *moves(lines)]))
        return
    if args.output is None or args.block is None:
        parser.error("--output and --block are needed, or files to print")
    groups = VIDEOS[args.world]
    done = {(line["clip"], line["budget"]) for line in read(args.output)} if args.output.exists() else set()
    jobs = []
    for clip in clips_asked(args.world, args.split, args.block, args.clips, groups):
        missing = [budget for budget in args.budget.split(",") if (str(clip), budget) not in done]
        if missing:
            jobs.append((clip, missing))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        args.output.open("a", encoding="utf-8") as file,
        closing(map_in_processes(partial(start, MODELS[args.world], groups, folder), jobs, args.processes)) as each,
    ):
        for number, made in enumerate(each, args.clips - len(jobs) + 1):
            file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in made))
            file.flush()
            print(f"{number} of {args.clips}", flush=True)


if __name__ == "__main__":
    main()
