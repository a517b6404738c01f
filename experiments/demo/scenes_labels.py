"""Auxiliary head labels, which describe what patches and units show in a clip of scenes. Imported by `scenes_batches`."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.demo.painting import CHARACTERS
from experiments.demo.scenes.clip import COLOURS, MOTIONS, OUTLINES, SIGN, TEXTURES, Clip

IGNORED = -100
LOOKS = (*OUTLINES, SIGN)
NOTHING = len(LOOKS)
BLANK = len(CHARACTERS)
PATCH = 14
SLOT = 7
# How a unit has changed since the previous frame pair. If it shows an object, the object was already there, moved in along one of
# the MOTIONS, is new, or has changed. Otherwise, the previous object disappeared or moved away, or there was no object before
# either.
STILL = 0
CAME = 1
NEW = 5
CHANGED = 6
GONE = 7
LEFT = 8
EMPTY = 9
STORY_WEIGHT = torch.tensor([0.2, 1, 1, 1, 1, 1, 1, 1, 1, 0.05])
# A patch's labels are the outline, texture, and color of the object at its center, the characters in its left and right halves, and
# the object's motion between the two frames of the pair. A unit's label indicates whether the unit contains the center of an
# object.
PATCH_CLASSES = {
    "outline": NOTHING + 1, "texture": len(TEXTURES), "colour": len(COLOURS), "left": BLANK + 1, "right": BLANK + 1,
    "motion": 1 + len(MOTIONS),
}  # fmt: skip
ROWS = COLUMNS = 24


def dense_labels(clip: Clip, times: Sequence[float], maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return patch and unit labels in Hugging Face's order. IGNORED means unlabeled.

    Args:
        times: Two times for each frame pair, in seconds.
        maps: The index of the object shown at each pixel, `[len(times), height, width]`.

    Returns:
        int64 `[pairs, units, 4, 6]` for patches, and int64 `[pairs, units]` for units.
    """
    pairs = len(times) // 2
    height = clip.height // PATCH
    width = clip.width // PATCH
    first, second = (maps[i::2, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH] for i in (0, 1))
    labels = np.full((pairs, height, width, len(PATCH_CLASSES)), IGNORED)
    middles = np.zeros((pairs, height // 2, width // 2), np.int64)
    for pair in range(pairs):
        t = times[2 * pair]
        looks = np.array([_looks(thing, t) for thing in clip.things] + [(NOTHING, IGNORED, IGNORED)])
        labels[pair, ..., :3] = looks[first[pair]]
        labels[pair][first[pair] != second[pair]] = IGNORED
        labels[pair, ..., 3:5] = BLANK
        motions = np.array([_motion(clip, thing, t, times[2 * pair + 1]) for thing in clip.things] + [IGNORED])
        labels[pair, ..., 5] = np.where(first[pair] == second[pair], motions[first[pair]], IGNORED)
        for number, thing in enumerate(clip.things):
            if not all(thing.visible(at) for at in times[2 * pair : 2 * pair + 2]):
                continue
            x, y = _on_frame(clip, thing, t)
            if 0 <= x < clip.width and 0 <= y < clip.height and maps[2 * pair, int(y), int(x)] in (number, -1):
                middles[pair, int(y) // 28, int(x) // 28] = 1
            if thing.is_sign:
                _write(labels[pair, ..., 3:5], clip, number, t, maps[2 * pair])
    by_unit = labels.reshape(pairs, height // 2, 2, width // 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return by_unit.reshape(pairs, height * width // 4, 4, -1), middles.reshape(pairs, -1)


def story_labels(clip: Clip, times: Sequence[float], maps: np.ndarray) -> np.ndarray:
    """Return how each unit has changed since the previous frame pair, int64 `[pairs, units]`. In the first pair, it is IGNORED.

    See `dense_labels` for the arguments.
    """
    pairs = len(times) // 2
    height = clip.height // 28
    width = clip.width // 28
    # A unit shows the highest-numbered object among its patch centers, so objects take precedence over the background.
    shown = maps[::2, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].reshape(pairs, height, 2, width, 2).astype(np.int64)
    shown = shown.transpose(0, 1, 3, 2, 4).reshape(pairs, height * width, 4).max(-1)
    labels = np.full((pairs, height * width), IGNORED)
    for pair in range(1, pairs):
        before = times[2 * pair - 2]
        now = times[2 * pair]
        of_things = [_story(clip, thing, before, now) for thing in clip.things]
        left = [LEFT if thing.visible(now) else GONE for thing in clip.things]
        there = np.array([*of_things, EMPTY])
        was = np.array([*left, EMPTY])
        labels[pair] = np.where(shown[pair] >= 0, there[shown[pair]], was[shown[pair - 1]])
    return labels


def _story(clip: Clip, thing, before: float, now: float) -> int:
    if not thing.visible(before):
        return NEW
    if before < thing.turn <= now:
        return CHANGED
    motion = _motion(clip, thing, before, now, least=4.0)
    if motion in (STILL, IGNORED):
        return motion
    return CAME - 1 + motion


def _looks(thing, t: float) -> tuple[int, int, int]:
    """Return the labels for an object's outline, texture, and color at time t."""
    outline = LOOKS.index(thing.outline)
    colours = list(COLOURS)
    if thing.is_sign:
        return outline, IGNORED, colours.index(thing.colour)
    colour = thing.colour if t < thing.turn else thing.after
    return outline, TEXTURES.index(thing.texture), colours.index(colour)


def _motion(clip: Clip, thing, t: float, then: float, least: float = 2.0) -> int:
    """Return the label for an object's motion within the frame between times `t` and `then`, including camera motion.

    0 means that the object moves by less than half of `least` pixels, 1 + i means direction i of MOTIONS, and IGNORED means that
    the motion is unclear.
    """
    dx, dy = (b - a for a, b in zip(_on_frame(clip, thing, t), _on_frame(clip, thing, then), strict=True))
    far, less = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < least / 2:
        return 0
    if far < least or less > far / 2:
        return IGNORED
    way = (np.sign(dx) * (abs(dx) > abs(dy)), np.sign(dy) * (abs(dy) > abs(dx)))
    return 1 + list(MOTIONS.values()).index(way)


def _on_frame(clip: Clip, thing, t: float, dx: float = 0.0) -> tuple[float, float]:
    x, y = thing.centre(t)
    return clip.on_frame(x + dx, y, t)


def _write(slots: np.ndarray, clip: Clip, number: int, t: float, seen: np.ndarray) -> None:
    """Label all slots that contain the center of a visible sign character."""
    thing = clip.things[number]
    text = thing.after if thing.is_sign and t >= thing.turn else thing.text
    for at, character in enumerate(text):
        x, y = _on_frame(clip, thing, t, (at + 0.5 - len(text) / 2) * thing.pitch)
        if 0 <= x < clip.width and 0 <= y < clip.height and seen[int(y), int(x)] == number:
            slots[int(y) // PATCH, int(x) // PATCH, int(x) % PATCH // SLOT] = CHARACTERS.index(character)


class Head(nn.Module):
    """Predicts each unit's labels, row and column from the tower's last layer. The head is discarded after training."""

    def __init__(self, hidden: int, text_hidden: int):
        super().__init__()
        self.patch = nn.Linear(hidden, sum(PATCH_CLASSES.values()))
        self.unit = nn.Linear(4 * hidden, 2 + ROWS + COLUMNS)
        self.story = nn.Linear(text_hidden, len(STORY_WEIGHT))

    def forward(self, flat: torch.Tensor, patches: torch.Tensor, units: torch.Tensor, height: int, width: int):
        """Return the loss, and the accuracy of each label for the log.

        Args:
            flat: The states in the last layer, `[G, units, 4 * hidden]`.
            patches: The patch labels from `dense_labels`.
            units: The unit labels from `dense_labels`.
            height: The grid height, in units.
            width: The grid width, in units.
        """
        outs = self.patch(flat.unflatten(-1, (4, -1))).float().split(list(PATCH_CLASSES.values()), -1)
        middle, row, column = self.unit(flat).float().split([2, ROWS, COLUMNS], -1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        loss = 0.2 * sum(
            F.cross_entropy(out.flatten(0, 1), p.flatten().expand(flat.shape[:2]).flatten())
            for out, p in ((row, y), (column, x))
        )
        loss = loss + 2 * F.cross_entropy(middle.flatten(0, 1), units.flatten(), torch.tensor([0.2, 1.0]))
        right = {}
        for name, out, label in zip(PATCH_CLASSES, outs, patches.unbind(-1), strict=True):
            blank = {"outline": NOTHING, "left": BLANK, "right": BLANK, "motion": 0}.get(name, -1)
            held = (label >= 0) & (label != blank)
            if not held.any():
                continue
            is_character = name in ("left", "right")
            weight = torch.ones(out.shape[-1])
            if blank >= 0:  # most patches show nothing
                weight[blank] = 0.1 if is_character else 0.2
            loss = loss + F.cross_entropy(out.flatten(0, 2), label.flatten(), weight, ignore_index=IGNORED)
            logged = "character" if is_character else name
            right[logged] = (out.argmax(-1) == label)[held].float().mean().item()
        there = units == 1
        right["middle"] = 1.0
        if there.any():
            right["middle"] = (middle.argmax(-1) == 1)[there].float().mean().item()
        return loss, right

    def told(self, states: torch.Tensor, story: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss and the accuracies for labels predicted from visual tokens inside the language model.

        Args:
            states: The visual token states, `[..., D]`.
            story: The labels from `story_labels`, `[...]`.
        """
        if not (story != IGNORED).any():
            return states.new_zeros(()), {}
        out = self.story(F.rms_norm(states, states.shape[-1:])).float()
        happened = (story != IGNORED) & (story != STILL) & (story != EMPTY)
        right = {}
        if happened.any():
            right["story"] = (out.argmax(-1) == story)[happened].float().mean().item()
        return F.cross_entropy(out.flatten(0, -2), story.flatten(), STORY_WEIGHT, ignore_index=IGNORED), right
