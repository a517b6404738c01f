"""Generate training data for the demo model: infinite, seeded batches of clips with labels or questions. Imported by `train`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evoprune.language import prompt_positions, video_positions
from evoprune.video import SamplingPlan
from experiments.demo.build import AFTER_QUESTION, BEFORE_VIDEO
from experiments.demo.clips import COLOURS, MOTIONS, SHAPES, SIZES, Clip, make_clip
from experiments.demo.drawing import render
from experiments.demo.lessons import ask_all
from experiments.demo.questions import Question
from experiments.demo.training_clips import dense_grid, through_codec

# Number of classes of each attribute that the auxiliary head predicts for the object centered in a unit. The last class of "shape"
# means that there is no object centered in the unit.
ATTRIBUTES = {
    "shape": len(SHAPES) + 1,  # digits count as one more shape
    "colour": len(COLOURS),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "digit": 10,
}
# Size of the largest grid for which the head can predict rows and columns.
ROWS = 12
COLUMNS = 16


@dataclass(frozen=True)
class Recipe:
    """Training run hyperparameters. Training is seeded, so the resulting weights are determined by the hyperparameters and the
    code."""

    seed: int = 0
    vision_steps: int = 1500
    steps: int = 3000
    short_steps: int = 300  # number of steps in the second stage that use only short clips and small frames
    small_steps: int = 1700  # number of steps in the second stage that exclude the largest frames
    vision_batch: int = 64  # batch size of the first stage, as a number of grids with 4x6 units
    units: int = 2304  # approximate number of merge units in a batch of clips
    questions: int = 10  # number of questions about a clip per step, doubled if a batch has only a few clips
    packs: int = 2  # number of training steps per batch of clips, each with different questions
    muon_lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.5  # fraction of a stage over which the learning rate decays


# Frame sizes as ((height, width) in units, weight). SMALL is for early training; LARGE adds larger frames and is used later.
SMALL = (((4, 6), 4.0), ((6, 4), 1.0), ((4, 4), 0.7), ((5, 7), 1.5), ((6, 8), 2.0))
LARGE = (((4, 6), 2.0), ((6, 4), 0.5), ((4, 4), 0.3), ((5, 7), 1.0), ((6, 8), 2.0), ((8, 12), 3.0), ((12, 8), 0.8))
SHORT = 3  # maximum number of grids per clip during `short_steps`, which also use only the first three frame sizes
LENGTHS = ((1, 0.5), (2, 0.7), (3, 1.2), (4, 2.0), (6, 3.0), (8, 1.5), (12, 0.3))
MOST = 800  # maximum number of merge units per clip
PACES = (1.0, 1.0, 1.0, 1.0, 0.5, 2 / 3, 0.8, 1.25, 1.5, 2.0)  # seconds per grid


def unit_labels(clip: Clip, times: Sequence[float], height: int, width: int) -> np.ndarray:
    """Return the labels of every unit in every grid, int64 `[T * height * width, attributes]`. -100 means unlabeled."""
    grids = len(times) // 2
    labels = np.full((grids, height, width, len(ATTRIBUTES)), -100)
    labels[..., 0] = ATTRIBUTES["shape"]  # the class after all shapes and digits, which means "no object"
    for g in range(grids):
        middle = (times[2 * g] + times[2 * g + 1]) / 2
        for thing in clip.things:
            if not (thing.visible(times[2 * g]) and thing.visible(times[2 * g + 1])):
                continue
            x, y = thing.centre(middle)
            cell = labels[g, min(int(y // 28), height - 1), min(int(x // 28), width - 1)]
            colour = list(COLOURS).index(thing.colour)
            motion = list(MOTIONS).index(thing.motion)
            if thing.is_digit:
                cell[:] = (len(SHAPES), colour, -100, motion, int(thing.kind))
            else:
                cell[:] = (SHAPES.index(thing.kind), colour, list(SIZES).index(thing.size), motion, -100)
    return labels.reshape(-1, len(ATTRIBUTES))


def noisy(frames: np.ndarray, rng: np.random.Generator, gop: int) -> np.ndarray:
    """Return the frames unchanged or, half of the time, with the artifacts of a video codec."""
    return through_codec(frames, int(rng.integers(2, 6)), gop) if rng.random() < 0.5 else frames


def vision_batches(recipe: Recipe, first: int):
    """Yield an infinite sequence of batches for stage 1, consisting of crowded single grids.

    Each batch is `(frames uint8 [2 * G, H, W, 3], labels, (height, width))`.
    """
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 1, step))
        height, width = [(4, 6), (4, 6), (6, 4), (5, 7), (6, 8), (8, 12), (12, 8)][int(rng.integers(7))]
        frames = []
        labels = []
        for _ in range(max(6, recipe.vision_batch * 24 // (height * width))):
            clip = dense_grid(rng, height * 28, width * 28, round(14 * height * width / 24 * rng.uniform(0.3, 1)))
            times = SamplingPlan.even(0.0, 1.0, 2).times_s
            frames.append(render(clip, times))
            labels.append(unit_labels(clip, times, height, width))
        yield (
            torch.from_numpy(noisy(np.concatenate(frames), rng, 2)),
            torch.from_numpy(np.stack(labels)),
            (height, width),
        )
        step += 1


def draw(rng: np.random.Generator, choices):
    """Draw a random value from `((value, weight), ...)`, with probabilities proportional to the weights."""
    odds = np.array([odds for _, odds in choices])
    return choices[rng.choice(len(choices), p=odds / odds.sum())][0]


def question_batches(recipe: Recipe, tokenizer, first: int):
    """Yield an infinite sequence of batches for stage 2, as dicts of tensors.

    All clips in a batch have the same shape, and each batch comes with several packs of questions about them.
    """
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 2, step))
        while True:
            height, width = draw(rng, SMALL if step < recipe.small_steps else LARGE)
            grids = draw(rng, LENGTHS)
            short = grids <= SHORT and height * width <= 24
            if short or (step >= recipe.short_steps and grids * height * width <= MOST):
                break
        pace = float(rng.choice(PACES))
        n = grids * height * width
        count = min(24, max(4, round(recipe.units / n)))
        questions = recipe.questions * (1 if count > 6 else 2)
        frames = []
        packs = [[] for _ in range(recipe.packs)]
        for _ in range(count):
            clip = make_clip("train", int(rng.integers(2**62)), height * 28, width * 28, grids * pace, grids)
            frames.append(noisy(render(clip, SamplingPlan.even(0.0, clip.seconds, 2 * grids).times_s), rng, gop=12))
            asked = ask_all(clip, rng, questions * recipe.packs)
            for number, pack in enumerate(packs):
                pack.append(asked[number :: recipe.packs])
        before = ids(BEFORE_VIDEO)
        prefix = before + [7] * n + ids("<|vision_end|>")
        inside = video_positions((grids, height, width), pace, 2)
        where = prompt_positions(len(prefix), [(len(before), inside)])
        yield {
            "frames": torch.from_numpy(np.concatenate(frames)),
            "grid": (grids, height, width),
            "prefix": torch.tensor(prefix),
            "where": where,
            "slots": torch.tensor([token == 7 for token in prefix]),
            "packs": [packed(pack, ids, int(where.max()) + 1) for pack in packs],
        }
        step += 1


ROW = 64  # number of tokens per row of questions, or more if a single question requires more


def packed(prompts: list[list[Question]], ids, start: int) -> dict[str, torch.Tensor]:
    """Pack each prompt's questions and answers into rows, with several questions per row if they fit.

    Returns:
        Four int64 tensors `[prompts, rows, L]`. `tokens` contains the token IDs. `place` contains their positions, which restart at
        `start` for every question. `segment` is the one-based question number, or -1 for padding. `target` contains the answer
        tokens, each at the position that predicts it, and -100 everywhere else.
    """
    after = ids(AFTER_QUESTION)
    filled = []
    longest = ROW
    for questions in prompts:
        parts = []
        for number, q in enumerate(questions, 1):
            asked = ids(q.question) + after
            said = [*ids(q.answer), 2]
            n = len(asked) + len(said)
            parts.append(
                (asked + said, range(start, start + n), [number] * n, [-100] * (len(asked) - 1) + said + [-100])
            )
            longest = max(longest, n)
        filled.append(parts)
    # Round up to limit the number of different lengths, because matrix kernels are compiled for every shape.
    longest = -(-longest // 16) * 16
    made = [_in_rows(parts, longest) for parts in filled]
    rows = max(map(len, made))

    def padded(column: int, fill: int) -> torch.Tensor:
        whole = torch.full((len(made), rows, longest), fill)
        for prompt, bins in enumerate(made):
            for row, parts in enumerate(bins):
                values = [value for part in parts for value in part[column]]
                whole[prompt, row, : len(values)] = torch.tensor(values)
        return whole

    return {"tokens": padded(0, 0), "place": padded(1, start), "segment": padded(2, -1), "target": padded(3, -100)}


def _in_rows(parts: list[tuple], longest: int) -> list[list[tuple]]:
    """Pack the parts into rows of at most `longest` tokens by first-fit decreasing: longest first, into the first row with room."""
    rows = []
    room = []
    for part in sorted(parts, key=lambda part: -len(part[0])):
        at = next((i for i, left in enumerate(room) if left >= len(part[0])), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(longest)
        rows[at].append(part)
        room[at] -= len(part[0])
    return rows
