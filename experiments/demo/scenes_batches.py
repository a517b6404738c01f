"""Training data for the second world: infinite, seeded batches of clips with labels and questions. Imported by `train_scenes`."""

from dataclasses import dataclass

import numpy as np
import torch

from evoprune.language import prompt_positions, video_positions
from evoprune.video import SamplingPlan
from experiments.demo.batches import packed
from experiments.demo.build import BEFORE_VIDEO
from experiments.demo.questions import Question
from experiments.demo.scenes.asking import ask
from experiments.demo.scenes.clip import Clip
from experiments.demo.scenes.compose import SPLITS, compose, draw
from experiments.demo.scenes.drawing import render_with_map
from experiments.demo.scenes.happening import types_for
from experiments.demo.scenes_labels import dense_labels, story_labels
from experiments.demo.scenes_lessons import lessons
from experiments.demo.scenes_model import prompt
from experiments.demo.training_clips import through_codec

GROUPS = ("text", "look", "place", "count", "gist", "events", "motion", "moment", "choice", "open", "lesson")
# Token IDs of <|image_pad|> and <|video_pad|>.
IMAGE = 6
VIDEO = 7


@dataclass(frozen=True)
class ScenesRecipe:
    """Training run hyperparameters. Stage 2 steps are counted from the start of that stage."""

    seed: int = 0
    reader: str = ""  # folder of a trained model whose language model serves as the starting point; "" means a new one
    processes: int = 4  # number of processes, each with its own batches
    vision_steps: int = 1600
    # Number of steps that train only the merger to produce the visual tokens of `reader`, if there is one.
    match_steps: int = 400
    steps: int = 7000
    open_steps: int = 600  # number of steps on questions without options about small images, with the tower frozen
    still_steps: int = 1200  # number of steps on small images only
    small_steps: int = 5600  # number of steps without the largest frames and lengths
    vision_units: int = 768  # number of units in a first-stage batch
    units: int = 768  # approximate number of units in a second-stage batch
    # Learning rate factor for the merger in the second stage, while the rest of the tower is frozen.
    tower_rate: float = 0.4
    thawed: float = 0.5  # additional factor for the whole tower after that
    thaw_steps: int = 300  # number of steps until the learning rate reaches its value with `thawed`
    reader_rate: float = 0.4  # learning rate factor for a language model that has already been trained
    labels: float = 0.3  # weight of the auxiliary loss in the second stage
    # Fraction of lessons among the questions in the second stage, once some questions have options.
    lessons: float = 0.4
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.4  # fraction of a stage over which the learning rate decays


# Frame sizes as ((height, width) in units, weight).
TINY = (((4, 6), 4.0), ((6, 4), 1.0), ((4, 4), 0.7), ((5, 7), 1.5))
SMALL = (*TINY, ((6, 8), 2.0))
STILLS = (
    *SMALL,
    ((8, 12), 3.0),
    ((12, 8), 0.5),
    ((9, 16), 0.8),
    ((12, 18), 0.4),
)  # additional image sizes, used while videos are still small
LARGE = (((4, 6), 1.0), ((5, 7), 1.0), ((6, 8), 2.0), ((8, 12), 3.0), ((12, 8), 0.6), ((9, 16), 0.8), ((12, 18), 0.4))
PAIRS = ((1, 1.5), (2, 0.5), (3, 0.7), (4, 2.0), (6, 1.5), (8, 1.5), (12, 0.6), (16, 0.3))
MOST = 1200  # maximum number of units per clip
PACES = (1.0, 1.0, 1.0, 0.5, 0.8, 1.25, 2.0)  # seconds per frame pair
UNITS_PER_QUESTION = 6  # the text of a question costs about as much computation as this many units
NEVER_OPEN = ("extreme", "there", "missing")
OFFSET = 16_000  # maximum offset to add to the positions of a prompt's inputs


def drawn(clip: Clip, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Render a clip for training. One time in five, the frames contain video codec artifacts.

    Returns:
        The frames, the patch and unit labels (see `dense_labels`), and the unit labels over time (see `story_labels`).
    """
    times = SamplingPlan.even(0.0, clip.seconds, 2 * clip.pairs).times_s
    frames, maps = render_with_map(clip, times)
    if rng.random() < 0.2:
        frames = through_codec(frames, int(rng.integers(2, 9)))
    return frames, *dense_labels(clip, times, maps), story_labels(clip, times, maps)


def vision_batches(recipe: ScenesRecipe, first: int, rank: int = 0):
    """Yield an infinite sequence of batches for stage 1, consisting of crowded frame pairs.

    Each batch is `(frames uint8 [2 * G, H, W, 3], patch labels, unit labels, (height, width))`. Every second batch has clips of two
    frame pairs with moving objects and cameras.
    """
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 1, step))  # draws the shape, which must be the same in all processes
        sizes = SMALL
        if step >= recipe.vision_steps * 0.8:
            sizes = (*SMALL, ((8, 12), 3.0))
        height, width = draw(rng, sizes)
        pairs = 1 + step % 2
        rng = np.random.default_rng((recipe.seed, 1, step, rank))
        made = []
        for _ in range(max(4, recipe.vision_units // (height * width)) // pairs):
            clip = compose(_key(rng), height, width, pairs, float(pairs), crowd=float(rng.uniform(1, 3)))
            made.append(drawn(clip, rng))
        frames, patches, units, _ = (torch.from_numpy(np.concatenate(part)) for part in zip(*made, strict=True))
        yield frames, patches, units, (height, width)
        step += 1


def _key(rng: np.random.Generator) -> tuple[int, int]:
    return SPLITS["train"], int(rng.integers(2**40, 2**62))


def question_batches(recipe: ScenesRecipe, tokenizer, first: int, rank: int = 0):
    """Yield an infinite sequence of batches for stage 2, as dicts of tensors.

    All prompts in a batch have the same shape. Each prompt has one or two clips and several questions.
    """
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 2, step))  # draws the shape, which must be the same in all processes
        height, width, pairs = _shape(recipe, step, rng)
        pace = 1.0
        if pairs > 1:
            pace = float(rng.choice(PACES))
        n = height * width * pairs
        inputs = 1
        if rng.random() < 0.15 and n <= MOST // 2:
            inputs = 2
        image = pairs == 1 and rng.random() < 0.6
        noun, pad = ("picture", IMAGE) if image else ("video", VIDEO)
        plain = step < recipe.open_steps
        questions = _questions(n, plain)
        share = recipe.lessons
        cost_of_question = UNITS_PER_QUESTION
        if plain:
            share = 0.0
            cost_of_question = 2
        prompts = round(recipe.units / (n * inputs + cost_of_question * questions))
        least = 2
        if n > recipe.units // 2:
            least = 1
        prompts = max(least, prompts)
        rng = np.random.default_rng((recipe.seed, 2, step, rank))
        crowd = (1.0, 1.0)
        if height * width < 60:
            crowd = (0.8, 2)
        asked = []
        made = []
        for _ in range(prompts):
            size = height, width, pairs, pairs * pace
            clips = [compose(_key(rng), *size, crowd=float(rng.uniform(*crowd))) for _ in range(inputs)]
            made += [drawn(clip, rng) for clip in clips]
            asked.append(_asked(clips, noun, rng, questions, plain, share))
        frames, patches, units, story = (torch.from_numpy(np.concatenate(part)) for part in zip(*made, strict=True))
        prefix, where, after = _prefix(ids, (pairs, height, width), pace, inputs, pad, rng)
        yield {
            "frames": frames,
            "labels": (patches, units),
            "story": story.view(prompts, -1),
            "grid": (pairs, height, width),
            "prefix": torch.tensor(prefix),
            "slots": torch.tensor([token in (IMAGE, VIDEO) for token in prefix]),
            "where": where,
            "pack": packed(asked, ids, after),
            "groups": _numbered_groups(asked),
        }
        step += 1


def _shape(recipe: ScenesRecipe, step: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Choose a random height and width, in units, and a number of frame pairs that suit the training step."""
    if step < recipe.still_steps:
        return *draw(rng, TINY), 1
    while True:
        pairs = draw(rng, PAIRS)
        sizes = SMALL
        most = MOST // 3
        if step >= recipe.small_steps:
            sizes = LARGE
            most = MOST
        elif pairs == 1:
            sizes = STILLS
        height, width = draw(rng, sizes)
        if height * width * pairs <= most:
            return height, width, pairs


def _questions(units: int, plain: bool) -> int:
    """Return the number of questions per prompt, which is higher for large clips and for short (`plain`) questions."""
    if not plain and units < 60:
        return 8
    if not plain and units < 200:
        return 14
    return 16


def _asked(
    clips: list[Clip], noun: str, rng: np.random.Generator, count: int, plain: bool, taught: float
) -> list[Question]:
    """Ask questions about the clips in one prompt. The questions are worded as the model sees them, and sorted in packing order.

    Args:
        clips: One or two clips.
        noun: The word for a clip in questions about two clips.
        count: The number of questions.
        plain: Whether to ask questions without options.
        taught: The fraction of lessons among the questions.
    """
    questions = []
    for number, clip in enumerate(clips):
        which = ""
        if len(clips) > 1:
            which = f"In the {('first', 'second')[number]} {noun}: "
        share = -(-count // len(clips))
        fitting = {name: kind for name, kind in types_for(clip).items() if not (plain and name in NEVER_OPEN)}
        if taught:
            fitting |= lessons(clip, taught, fitting)
        choice = 0.0
        if not plain:
            choice = float(rng.choice([0.3, 0.75]))
        for q in ask(clip, rng, share, fitting, choice=choice):
            questions.append(Question(q.type, which + prompt(q), q.answer, q.options, q.groups))
    return questions


def _prefix(
    ids, grid, pace: float, inputs: int, pad: int, rng: np.random.Generator
) -> tuple[list[int], torch.Tensor, int]:
    """Return the token IDs that precede a question, their positions, and the next position."""
    before = ids(BEFORE_VIDEO)
    n = int(np.prod(grid))
    prefix = before[:-1]
    videos = []
    for _ in range(inputs):
        prefix = [*prefix, *ids("<|vision_start|>")]
        videos.append((len(prefix), video_positions(grid, pace, 2)))
        prefix = [*prefix, *[pad] * n, *ids("<|vision_end|>")]
    where = prompt_positions(len(prefix), videos)
    if rng.random() < 0.3:  # simulates the end of a long stream
        where[:, len(before) - 1 :] += int(rng.integers(OFFSET))
    return prefix, where, int(where.max()) + 1


def _numbered_groups(asked: list[list[Question]]) -> torch.Tensor:
    """Return each question's groups: bool `[64 * (prompts + 1), groups]`, indexed by the number `64 * prompt + segment`."""
    member = torch.zeros(64 * (len(asked) + 1), len(GROUPS), dtype=torch.bool)
    for row, questions in enumerate(asked):
        for segment, q in enumerate(questions, 1):
            for group in q.groups:
                if group in GROUPS:
                    member[64 * row + segment, GROUPS.index(group)] = True
    return member
