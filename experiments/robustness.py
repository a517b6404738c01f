"""What noise does to reuse in time: `python -m experiments.robustness`.

A unit is not encoded again while it differs from its reference by less than some levels of 255 (vision/reuse.py). Coarse
compression and changing light make every unit differ a little, and fine compression keeps small changes that matter. So the demo's
clips with a still camera are written by x264 at several qualities, or get light that grows and fades. The questions are asked with
nothing pruned and with `evoprune`. The table says how much is encoded and how many answers are right.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from evoprune import methods
from evoprune.bench.evaluation.grading import grade
from evoprune.bench.evaluation.questions import Video
from evoprune.session.engine import make_engine
from evoprune.session.inputs import open_inputs
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.options import PruneOptions
from evoprune.video.frames import FrameChunk, read_frames
from experiments.demo.clips import make_clip
from experiments.demo.write import ClipName, demo_video, seeds
from experiments.paired import in_points, paired_difference

PERIOD_S = 4.0  # of the light


@dataclass(frozen=True)
class Noise:
    """A disturbance: x264's constant rate factor, and by how many levels of 255 the light rises and falls."""

    crf: int
    light: float = 0.0

    def __str__(self) -> str:
        return f"crf {self.crf}" + (f", light +-{self.light:g} levels" if self.light else "")


NOISES = (*(Noise(crf) for crf in (10, 18, 23, 28, 33)), *(Noise(18, light) for light in (2, 4, 8)))


def in_changing_light(light: float) -> Callable[..., Iterator[FrameChunk]]:
    """`read_frames`, but with each whole frame brighter or darker by up to `light` levels, in waves over time."""

    def read(info, times_s, **how) -> Iterator[FrameChunk]:
        with closing(read_frames(info, times_s, **how)) as chunks:
            for chunk in chunks:
                wave = [round(light * math.sin(2 * math.pi * t / PERIOD_S)) for t in chunk.times_s]
                lit = chunk.frames.astype(np.int16) + np.array(wave, np.int16)[:, None, None, None]
                yield replace(chunk, frames=lit.clip(0, 255).astype(np.uint8))

    return read


def answers(loaded: LoadedModel, video: Video, noise: Noise, method: str, budget: float) -> list[dict]:
    """A sample for each question: whether the answer is right, the live share, and the share of units that were encoded at all."""
    engine = make_engine(loaded, PruneOptions(budget, method))
    with closing(open_inputs(engine, [video.path], names=[video.name], read=in_changing_light(noise.light))) as opened:
        encoded = opened.encode()
    pruning = encoded.report.pruning
    share = pruning.layers[0][1] / pruning.visual_tokens_in
    return [
        {
            "video": video.name,
            "id": row.id,
            "right": bool(grade(row, "".join(encoded.ask(row.prompt, max_new_tokens=64)))),
            "live": pruning.encoder_live_share,
            "encoded": share,
        }
        for row in video.rows
    ]


def table(samples: dict[tuple[Noise, str], list[dict]], method: str) -> str:
    """Markdown, a row for each noise; the difference is to nothing pruned, with its 95% interval over videos."""
    lines = ["|  | in full | pruned | difference | encoded | live share |", "|---" * 6 + "|"]
    for noise in dict.fromkeys(noise for noise, _ in samples):
        full, mine = samples[noise, "none"], samples[noise, method]
        apart = in_points(*paired_difference(mine, full))
        right = [f"{100 * np.mean([s['right'] for s in some]):.1f}" for some in (full, mine)]
        shares = [f"{np.mean([s[name] for s in mine]):.2f}" for name in ("encoded", "live")]
        lines.append(f"| {' | '.join([str(noise), *right, apart, *shares])} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default=methods.DEFAULT)
    parser.add_argument("-b", "--budget", type=float, default=0.25)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--seed", type=int, default=0, help="block of the split's clips")
    parser.add_argument("--limit", type=int, default=50, help="clips with a still camera")
    asked = parser.parse_args(arguments)
    loaded = load_model(asked.model)
    still = [s for s in seeds(asked.seed, 4 * asked.limit) if not any(make_clip(asked.split, s).pan)][: asked.limit]
    samples: dict[tuple[Noise, str], list[dict]] = {}
    with TemporaryDirectory() as folder:
        for number, seed in enumerate(still, 1):
            print(f"clip {number} of {len(still)}", file=sys.stderr, flush=True)
            for noise in NOISES:
                with demo_video(ClipName(asked.split, seed), Path(folder), noise.crf) as video:
                    for method, budget in (("none", 1.0), (asked.method, asked.budget)):
                        samples.setdefault((noise, method), []).extend(answers(loaded, video, noise, method, budget))
    print(
        f"{len(still)} clips with a still camera, split {asked.split!r}, block {asked.seed}, "
        f"{len(samples[NOISES[0], 'none'])} questions; {asked.method} -b {asked.budget:g}\n"
    )
    print(table(samples, asked.method))


if __name__ == "__main__":
    main()
