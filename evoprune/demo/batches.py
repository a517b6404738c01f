"""What the demo model learns from: endless seeded batches of clips with labels and with questions."""

from dataclasses import dataclass

import numpy as np
import torch

from evoprune.demo.build import AFTER_QUESTION, BEFORE_VIDEO
from evoprune.demo.clips import COLOURS, MOTIONS, SHAPES, SIZES, Clip, dense_grid, frame_times, make_clip, render
from evoprune.demo.questions import ask
from evoprune.language.positions import VideoSpan, prompt_positions

# What the auxiliary head says about the thing whose centre a unit covers; the last class of each is "nothing here".
ATTRIBUTES = {
    "shape": len(SHAPES) + 1,  # digits count as one more shape
    "colour": len(COLOURS),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "digit": 10,
}
ROWS, COLUMNS = 12, 16  # the largest grid the head can name places of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, together with the code."""

    seed: int = 0
    vision_steps: int = 700
    steps: int = 6300
    short_steps: int = 600  # of the second stage, on short clips and small frames
    frozen_steps: int = 6300  # of the second stage, with the tower as it is
    vision_batch: int = 96  # grids of 4x6 units
    units: int = 2304  # merge units a batch of clips, about
    questions: int = 8  # a clip
    muon_lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    tower_factor: float = 0.2  # the tower's learning rate in the second stage, lest it forget what it has learned
    warmup: int = 100
    decay: float = 0.45  # the last part of each stage, along a cosine


# (height, width) in units and how often
SIZES_IN_UNITS = (((4, 6), 4.0), ((6, 4), 1.0), ((4, 4), 0.7), ((5, 7), 1.0), ((6, 8), 1.6), ((8, 12), 0.5))
SHORT = 3  # grids, at most, during `short_steps`; and the frame is one of the first three sizes
LENGTHS = ((1, 0.8), (2, 1.0), (3, 1.5), (4, 2.0), (6, 3.0), (8, 1.5), (12, 0.6))


def unit_labels(clip: Clip, times: list[float], height: int, width: int) -> np.ndarray:
    """What each unit of each grid should say: int64 `[T * height * width, attributes]`, -100 where nothing is asked."""
    grids = len(times) // 2
    labels = np.full((grids, height, width, len(ATTRIBUTES)), -100)
    labels[..., 0] = ATTRIBUTES["shape"]  # one past the shapes and the digit: nothing here
    for g in range(grids):
        moment = (times[2 * g] + times[2 * g + 1]) / 2
        for thing in clip.things:
            if not (thing.visible(times[2 * g]) and thing.visible(times[2 * g + 1])):
                continue
            x, y = thing.centre(moment)
            cell = labels[g, min(int(y // 28), height - 1), min(int(x // 28), width - 1)]
            colour, motion = list(COLOURS).index(thing.colour), list(MOTIONS).index(thing.motion)
            if thing.is_digit:
                cell[:] = (len(SHAPES), colour, -100, motion, int(thing.kind))
            else:
                cell[:] = (SHAPES.index(thing.kind), colour, list(SIZES).index(thing.size), motion, -100)
    return labels.reshape(-1, len(ATTRIBUTES))


def vision_batches(recipe: Recipe, first: int):
    """Stage 1: crowded single grids, `(frames uint8 [2 * G, H, W, 3], labels, (height, width))` for ever."""
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 1, step))
        height, width = [(4, 6), (4, 6), (6, 4), (4, 4), (5, 7), (6, 8)][int(rng.integers(6))]
        frames, labels = [], []
        for _ in range(max(8, recipe.vision_batch * 24 // (height * width))):
            clip = dense_grid(rng, height * 28, width * 28, round(14 * height * width / 24 * rng.uniform(0.4, 1)))
            times = frame_times(1.0, 2)
            frames.append(render(clip, times))
            labels.append(unit_labels(clip, times, height, width))
        yield torch.from_numpy(np.concatenate(frames)), torch.from_numpy(np.stack(labels)), (height, width)
        step += 1


def question_batches(recipe: Recipe, tokenizer, first: int):
    """Stage 2: clips of one shape with packed questions, as a dict of tensors, for ever."""
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    before, after = ids(BEFORE_VIDEO), ids(AFTER_QUESTION)
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 2, step))
        sizes, size_odds = zip(*SIZES_IN_UNITS, strict=True)
        lengths, length_odds = zip(*LENGTHS, strict=True)
        while True:
            height, width = sizes[rng.choice(len(sizes), p=np.array(size_odds) / sum(size_odds))]
            grids = int(rng.choice(lengths, p=np.array(length_odds) / sum(length_odds)))
            small = grids <= SHORT and (height, width) in sizes[:3]
            if small or (step >= recipe.short_steps and grids * height * width <= 480):
                break
        pace = float(rng.choice([1.0, 1.0, 1.0, 0.5, 2 / 3, 0.8, 1.25, 1.5, 2.0]))  # seconds a grid
        n = grids * height * width
        items = []
        for _ in range(min(24, max(4, round(recipe.units / n)))):
            clip = make_clip("train", int(rng.integers(2**62)), height * 28, width * 28, grids * pace, grids)
            times = frame_times(clip.seconds, 2 * grids)
            items.append(
                (render(clip, times), unit_labels(clip, times, height, width), ask(clip, rng, recipe.questions))
            )
        prefix = before + [7] * n + ids("<|vision_end|>")
        where = prompt_positions(len(prefix), [VideoSpan(len(before), (grids, height, width), pace)], 2)
        rows = []
        for _, _, questions in items:
            tokens, place, segment, target = [], [], [], []
            for number, q in enumerate(questions):
                asked = ids(q.question) + after
                said = [*ids(q.answer), 2]
                tokens += asked + said
                place += range(len(asked) + len(said))
                segment += [number + 1] * (len(asked) + len(said))
                target += [-100] * (len(asked) - 1) + said + [-100]
            rows.append((tokens, place, segment, target))
        # Few different lengths: matrix kernels are made anew for every shape, which costs more than padding.
        longest = -(-max(len(r[0]) for r in rows) // 64) * 64

        def pad(column: int, fill: int) -> torch.Tensor:
            return torch.tensor([[*r[column], *[fill] * (longest - len(r[column]))] for r in rows])  # noqa: B023

        yield {
            "frames": torch.from_numpy(np.concatenate([f for f, _, _ in items])),
            "labels": torch.from_numpy(np.stack([lab for _, lab, _ in items])),
            "grid": (grids, height, width),
            "prefix": torch.tensor(prefix),
            "where": where,
            "start": len(before),
            "tokens": pad(0, 0),
            "place": pad(1, 0) + int(where.max()) + 1,
            "segment": pad(2, -1),
            "target": pad(3, -100),
        }
        step += 1


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, make, *args):
        self.make, self.args = make, args

    def __iter__(self):
        torch.set_num_threads(1)
        return self.make(*self.args)


def in_worker(make, *args):
    """Runs a batch generator in one worker process, a few batches ahead."""
    return iter(torch.utils.data.DataLoader(_Stream(make, *args), batch_size=None, num_workers=1, prefetch_factor=4))
