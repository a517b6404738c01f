"""Small pictures with a coverage: textures, things, boards of signs, shadows."""

from functools import lru_cache

import numpy as np

from evoprune.demo.painting import glyph_mask, outline_mask
from evoprune.demo.scenes.clip import COLOURS, SIGN, Thing

Sprite = tuple[np.ndarray, np.ndarray]  # colours float32 [h, w, 3] and coverage float32 [h, w] in [0, 1]


@lru_cache(maxsize=1024)
def texture_field(texture: str, size: int, period: int, turn: int = 0) -> np.ndarray:
    """How far each pixel of a `size` square is from the first colour to the second: float32 in [0, 1].

    `period`: pixels until the texture repeats itself. turn: eighths of a half circle by which it is rotated.
    """
    axis = np.arange(size) - (size - 1) / 2
    cos, sin = np.cos(turn * np.pi / 8), np.sin(turn * np.pi / 8)
    u, v = axis[None, :] * cos + axis[:, None] * sin, axis[:, None] * cos - axis[None, :] * sin
    if texture == "plain":
        return np.zeros((size, size), np.float32)
    wave = 2 * np.pi / period
    field = {
        "striped": lambda: np.sin(v * wave),
        "dotted": lambda: np.cos(u * wave) + np.cos(v * wave) - 0.7,
        "checked": lambda: 2 * np.sin(u * wave) * np.sin(v * wave),
    }[texture]()
    return np.clip(0.5 + 2.0 * field, 0, 1).astype(np.float32)


def thing_sprite(thing: Thing, changed: bool) -> Sprite:
    """A thing or a sign, before or after its change."""
    if thing.is_sign:
        return _board(thing.after if changed else thing.text, thing)
    first = np.array(COLOURS[thing.after] if changed else thing.rgb, np.float32)
    # The other colour of a texture: darker where the first is light, lighter where it is dark.
    light = first.mean() > 95
    second = first * np.float32(0.3) if light else first * np.float32(0.35) + np.float32(165)
    r = thing.radius
    turn = 2 if thing.texture == "striped" else 0
    field = texture_field(thing.texture, 2 * r, max(5, round(r / 2.2)), turn)[..., None]
    return first + field * (second - first), outline_mask(thing.outline, r)


def _board(text: str, sign: Thing) -> Sprite:
    """A text on a board with a rim."""
    glyph, pitch = sign.glyph, sign.pitch
    height, width = glyph + 6, len(text) * pitch + 6
    back = np.array(sign.rgb, np.float32)
    ink = np.float32(20) if back.mean() > 95 else np.float32(240)
    colours = np.broadcast_to(back, (height, width, 3)).copy()
    colours[[0, -1]] = colours[:, [0, -1]] = back * np.float32(0.5)
    for number, character in enumerate(text):
        mask = glyph_mask(character, glyph)
        left = 3 + number * pitch + (pitch - mask.shape[1]) // 2
        area = colours[3 : 3 + glyph, left : left + mask.shape[1]]
        area += mask[..., None] * (ink - area)
    return colours, np.ones((height, width), np.float32)


@lru_cache(maxsize=2048)
def thing_shadow(outline: str, height: int, width: int) -> np.ndarray:
    """The shadow of a thing or a board of this size in pixels, two pixels larger to each side: float32."""
    cover = np.ones((height, width), np.float32) if outline == SIGN else outline_mask(outline, height // 2)
    return soft_shadow(cover, 2) * np.float32(0.4)


def soft_shadow(cover: np.ndarray, reach: int) -> np.ndarray:
    """The shadow of a coverage, `reach` pixels larger to each side: float32."""
    shadow = np.pad(cover, reach)
    for axis in (0, 1):
        total = np.cumsum(np.pad(shadow, [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]), axis=axis)
        n = shadow.shape[axis]
        window = 2 * reach + 1
        shadow = (np.take(total, range(window, window + n), axis) - np.take(total, range(n), axis)) / np.float32(window)
    return shadow.astype(np.float32)
