"""Other distances for the selection of `evoprune`, and what each is worth: `python -m experiments.distances OUT.jsonl`.

Each clip's questions are asked with every distance and weight of time. OUT.jsonl has a line a clip, distance and budget; a run that
breaks off goes on where it ended. The table gives accuracy, and the paired difference to today's distance with its 95% interval.
`experiments.geometry` says how much each depends on the geometry of features.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from evoprune.evaluation.demo_clips import ClipName, clips_asked, demo_video
from evoprune.evaluation.frames import SharedFrames
from evoprune.evaluation.grading import grade
from evoprune.pipeline.engine import make_engine
from evoprune.pipeline.loading.model import LoadedModel, load_model
from evoprune.pipeline.opening import open_video
from evoprune.pipeline.options import ModelOptions, PruneOptions
from evoprune.pruning import distance
from experiments.paired import in_points, paired_difference

Distance = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TODAY = "today"

# Each replaces `places_and_salience` of `pruning.distance`. A share is the weight of a row, `[E, 1]`.


def _share(rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    count = torch.bincount(owner[owner >= 0], minlength=len(rows)).float()
    return (count / count.sum())[:, None]


def _salience(unlike: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    salience = distance.rounded(unlike) * (share[:, 0] > 0)
    return salience / salience.max().clamp(min=distance.STEP)


def by_spread(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines as today, divided by their spread, 1 - |mean|^2."""
    share, unit = _share(rows, owner), F.normalize(rows.float(), dim=1)
    mean = (share * unit).sum(0)
    unlike = 1 - unit @ F.normalize(mean, dim=0)
    return unit / (1 - mean.square().sum()).clamp(min=1e-6).sqrt(), _salience(unlike, share)


def centred(scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Distance:
    """Differences to the mean; `scale` divides them, of differences and shares."""

    def places(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share, rows = _share(rows, owner), rows.float()
        off = rows - (share * rows).sum(0)
        place = off / scale(off, share).clamp(min=1e-12)
        return place, _salience(place.square().sum(1) / 2, share)

    return places


def _deviations(off: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each channel; of one that hardly varies, a little more."""
    variance = (share * off.square()).sum(0)
    return (variance + 1e-3 * variance.mean()).sqrt()


DISTANCES: dict[str, Distance | None] = {
    TODAY: None,
    "cosine by its spread": by_spread,
    "centred, by the mean square": centred(lambda off, share: (share * off.square()).sum().sqrt()),
    "centred, by the largest": centred(lambda off, share: off.square().sum(1).max().sqrt()),
    "standardised": centred(lambda off, share: _deviations(off, share) * off.shape[1] ** 0.5),
    "half standardised": centred(
        lambda off, share: (d := _deviations(off, share).sqrt()) * (share * (off / d).square()).sum().sqrt()
    ),
    "standardised, by the largest": centred(
        lambda off, share: (d := _deviations(off, share)) * (off / d).square().sum(1).max().sqrt()
    ),
}


@contextmanager
def using(places: Distance | None) -> Iterator[None]:
    """Has the selection use another distance."""
    today = distance.places_and_salience
    distance.places_and_salience = places or today
    try:
        yield
    finally:
        distance.places_and_salience = today


def lines_of(
    loaded: LoadedModel, clip: ClipName, folder: Path, tried: list[tuple[str, str]], budgets: list[float]
) -> Iterator[dict]:
    """A line for each distance with its settings, and each budget: which answers about a clip are right."""
    with demo_video(clip.split, clip.seed, folder, world=clip.world) as video:
        frames = SharedFrames()
        for budget in budgets:
            for name, settings in tried:
                method = f"evoprune:{settings}" if settings else "evoprune"
                engine = make_engine(loaded, PruneOptions(budget, method))
                with using(DISTANCES[name]), closing(open_video(engine, video.path, read=frames.read)) as opened:
                    encoded = opened.encode()
                    answers = [encoded.ask(row.prompt, max_new_tokens=64).text for row in video.rows]
                right = [bool(grade(row, answer)) for row, answer in zip(video.rows, answers, strict=True)]
                yield {"clip": str(clip), "distance": name, "settings": settings, "budget": budget, "right": right}


def table(lines: list[dict]) -> str:
    """Markdown: a row for each distance with its settings, two columns for each budget."""
    samples: dict[tuple, dict[float, list[dict]]] = {}
    for line in lines:
        row = samples.setdefault((line["distance"], line["settings"]), {}).setdefault(line["budget"], [])
        row += [{"video": line["clip"], "id": i, "right": right} for i, right in enumerate(line["right"])]
    budgets = sorted({line["budget"] for line in lines}, reverse=True)
    made = ["| distance | settings | " + " | ".join(f"-b {b:g} | difference" for b in budgets) + " |"]
    made.append("|---|---|" + "---|---|" * len(budgets))
    for (name, settings), of_budget in samples.items():
        cells = [name, settings]
        for budget in budgets:
            own = of_budget[budget]
            share = sum(s["right"] for s in own) / len(own)
            cells += [f"{100 * share:.1f}", in_points(*paired_difference(own, samples[TODAY, ""][budget]))]
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-b", "--budget", type=float, action="append", default=[], help="default: 0.25 and 0.1")
    parser.add_argument("--try", dest="tried", action="append", default=[], metavar="DISTANCE[/SETTINGS]")
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--clips", type=int, default=100)
    args = parser.parse_args()
    tried = [(TODAY, ""), *((name, settings) for name, _, settings in (text.partition("/") for text in args.tried))]
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(line["clip"], line["distance"], line["settings"], line["budget"]) for line in lines}
    budgets, loaded = args.budget or [0.25, 0.1], load_model(ModelOptions(args.model, dtype="fp32"))
    with TemporaryDirectory() as folder, open(args.out, "a") as file:
        for clip in clips_asked([args.world], "validation", args.block, args.clips):
            left = [t for t in tried if any((str(clip), *t, b) not in done for b in budgets)]
            for line in lines_of(loaded, clip, Path(folder), left, budgets) if left else ():
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
    print(table(lines))


if __name__ == "__main__":
    sys.exit(main())
