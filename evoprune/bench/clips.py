"""The clips used by `profile` and `verify`, with frames that are either synthetic or read from a video.

Synthetic clips are byte-identical on every machine and in every version, because they are computed with integers only and take
their random numbers from a hash function.

A *grid* consists of two frames, and a *unit* is a square of 28x28 (or 32x32) pixels in both frames. Below, f, y, x and c are
zero-based indices of frames, rows, columns and color channels.

`noise`     Every pixel is byte(1, f, y, x, c). Pixels are independent, so there is no redundancy to exploit.
`static90`  Both frames of the first grid are texture(2). In every later grid, a tenth of the units (rounded half up) is replaced:
            the units with the smallest mix(3, grid, unit), where ties go to the earlier unit. The pixels of these units are
            byte(4, f, y, x, c). As a result, different units change in each grid and return to the texture in the next one.
`motion`    Ordinary motion: texture(5) as the background, three textured discs that move steadily in front of it and wrap around at
            the edges, and sensor noise from -3 to 3. About a third of the units change visibly from one grid to the next (more if
            the image is only a few units wide).
"""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
import torch

from evoprune.bench.profile_rows import Case, ProfileSettings
from evoprune.errors import UsageError
from evoprune.language import Place, prompt_positions
from evoprune.methods import PruneConfig, TowerShape
from evoprune.model import VisionConfig
from evoprune.session import LoadedModel
from evoprune.video import (
    InputLimits,
    Plan,
    SamplingOptions,
    SamplingPlan,
    Video,
    read_chunks,
)
from evoprune.vision import normalised, pixel_patches, resize

# The default side length of a merge unit, in pixels, and the number of frames in a grid.
UNIT = 28
PAIR = 2
SCALES = ((64, 3), (32, 2), (16, 1), (8, 1), (4, 1))
Draw = Callable[[int], np.ndarray]  # takes a frame index and returns integers [H, W, 3] from 0 to 255


def synthetic_clip(content: str, frames: int, height: int, width: int, unit: int = UNIT) -> np.ndarray:
    """Compute a synthetic clip.

    Args:
        content: One of `ProfileSettings.SYNTHETIC`.
        unit: The side length of a merge unit, in pixels.

    Returns:
        uint8 `[frames, height, width, 3]`.

    Raises:
        ValueError: If `content` is unknown, or if the size is not a whole number of grids and units.
    """
    if content not in ProfileSettings.SYNTHETIC:
        raise ValueError(f"unknown synthetic clip {content!r}: choose one of {', '.join(ProfileSettings.SYNTHETIC)}")
    if min(frames, height, width) < 1 or frames % PAIR or height % unit or width % unit:
        raise ValueError(f"{frames} frames of {height}x{width} are not whole grids of whole units")
    draw = {"motion": _motion, "static90": partial(_static, unit=unit), "noise": _noise}[content](height, width)
    clip = np.empty((frames, height, width, 3), np.uint8)
    for f in range(frames):  # one frame at a time to save memory
        clip[f] = draw(f)
    return clip


def _mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash the numbers in sequence, adding each number to the previous hash. Returns uint32, broadcast to a common shape.

    The hash function is lowbias32 (https://nullprogram.com/blog/2018/07/31/), which relies on the overflow of uint32 products.
    NumPy does not warn about the overflow if the arrays have at least one dimension.
    """
    hashes = np.zeros(1, np.uint32)
    for number in numbers:
        hashes = hashes + np.atleast_1d(number).astype(np.uint32)
        hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x7FEB352D)
        hashes = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x846CA68B)
        hashes ^= hashes >> np.uint32(16)
    return hashes


def _byte(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash the numbers and return the top byte of the hash, as int64 values from 0 to 255."""
    return (_mix(*numbers) >> np.uint32(24)).astype(np.int64)


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the row, column, and channel indices of an image, in shapes that broadcast together."""
    return np.arange(height)[:, None, None], np.arange(width)[:, None], np.arange(3)


def _texture(seed: int, height: int, width: int) -> np.ndarray:
    """Return a smooth texture, int64 `[height, width, 3]`, with values from 0 to 255.

    The texture is a weighted mean of several layers, one for each scale in `SCALES`. The layer for scale `s` has a random byte at
    every `s`-th pixel and interpolates between these pixels.
    """
    texture = np.zeros((height, width, 3), np.int64)
    for s, weight in SCALES:
        b = _byte(seed, s, *_axes((height - 1) // s + 2, (width - 1) // s + 2))
        i, p = np.divmod(np.arange(height), s)
        j, q = np.divmod(np.arange(width)[:, None], s)
        above, below = ((s - q) * b[row][:, j[:, 0]] + q * b[row][:, j[:, 0] + 1] for row in (i, i + 1))
        p = p[:, None, None]
        texture += weight * (((s - p) * above + p * below) // (s * s))
    return texture // sum(weight for _, weight in SCALES)


def _noise(height: int, width: int) -> Draw:
    return lambda f: _byte(1, f, *_axes(height, width))


def _static(height: int, width: int, unit: int) -> Draw:
    still = _texture(2, height, width)
    columns = width // unit
    units = height // unit * columns

    def draw(f: int) -> np.ndarray:
        if f < PAIR:
            return still
        new = np.zeros(units, bool)
        new[_mix(3, f // PAIR, np.arange(units)).argsort(kind="stable")[: (units + 5) // 10]] = True
        new = new.reshape(-1, columns, 1).repeat(unit, 0).repeat(unit, 1)
        return np.where(new, _byte(4, f, *_axes(height, width)), still)

    return draw


def _motion(height: int, width: int) -> Draw:
    still = _texture(5, height, width)
    m = min(height, width)
    radii = [m * (6 + k) // 48 for k in range(3)]
    skins = [(2 * _texture(6 + k, 2 * r + 1, 2 * r + 1) + _byte(9, k, np.arange(3))) // 3 for k, r in enumerate(radii)]
    speeds = ((0, width // 24), (m // 40, -(width // 28)), (-(m // 30), width // 32))

    def draw(f: int) -> np.ndarray:
        picture = still.copy()
        for k, (r, skin, (dy, dx)) in enumerate(zip(radii, skins, speeds, strict=True)):
            v = _away(m * (4 + 5 * k) // 16 + f * dy, height)
            u = _away(width * (3 + 5 * k) // 16 + f * dx, width)
            rows, columns = np.nonzero(v[:, None] ** 2 + u**2 <= r * r)
            picture[rows, columns] = skin[v[rows] + r, u[columns] + r]
        n = _byte(10, f, *_axes(height, width))
        return (picture + n % 4 + n // 4 % 4 - 3).clip(0, 255)

    return draw


def _away(centre: int, size: int) -> np.ndarray:
    """Return the signed distance of each row or column from `centre`, wrapping around at the edges: int64 `[size]`."""
    return (np.arange(size) - centre + size // 2) % size - size // 2


# The number of text tokens before and after the video, similar to a chat template with a short question.
TEXT_BEFORE = 15
TEXT_AFTER = 15
# The number of text tokens around each frame pair in prompts with timestamps: a timestamp and a marker before it, and a marker
# after it.
BEFORE_PAIR = 7
AFTER_PAIR = 1
SYNTHETIC_FPS = 2.0

Frames = tuple[torch.Tensor, float]  # frames, uint8 [F, H, W, 3], and the interval between grids, in seconds


def synthetic_frames(content: str, case: Case, unit: int = UNIT) -> Frames:
    """Return a synthetic clip at Qwen's frame rate, or only its first frame if the case is an image. `unit` is in pixels."""
    clip = synthetic_clip(content, max(PAIR, case.frames), case.height, case.width, unit)
    return torch.from_numpy(clip[: case.frames]), 2 / SYNTHETIC_FPS


def video_frames(info: Video, case: Case) -> Frames:
    """Read frames spread evenly over a video. If `info` describes an image, return the image."""
    source = info
    max_frames = max(2, case.frames)
    if info.is_picture:
        source = replace(info, width=case.width, height=case.height)  # the size that the frames will be resized to
    wanted = SamplingOptions(frames=case.frames, max_frames=max_frames, max_visual_tokens=sys.maxsize)
    plan = Plan.of(info, InputLimits(), wanted)
    with closing(read_chunks(source, plan.sampling.times_s)) as chunks:
        small = [resize(torch.from_numpy(chunk.pixels), case.height, case.width) for chunk in chunks]
    return torch.cat(small), plan.sampling.seconds_per_pair()


def case_grid(case: Case, limits: InputLimits) -> tuple[int, int, int]:
    """Return the size of a case as (T, H, W) in units.

    Raises:
        UsageError: If the frame size is not a multiple of the merge unit.
    """
    if case.height % limits.unit or case.width % limits.unit:
        raise UsageError(
            f"frames of {case.height}x{case.width} pixels are not a whole number of merge units",
            f"height and width must be multiples of {limits.unit}, for example {8 * limits.unit}x{12 * limits.unit}",
        )
    return max(1, case.frames // limits.temporal_patch_size), case.height // limits.unit, case.width // limits.unit


def place_of(grid: tuple[int, int, int], times: bool) -> Place:
    """Return the position of a clip's units in the prompt. `times` specifies whether the prompt has timestamps for frame pairs."""
    if not times:
        return Place((range(TEXT_BEFORE, TEXT_BEFORE + prod(grid)),))
    return Place.of_pairs([BEFORE_PAIR] * grid[0], grid[1] * grid[2], start=TEXT_BEFORE, after=AFTER_PAIR)


def text_tokens(config: VisionConfig, case: Case, limits: InputLimits) -> int:
    """Return the number of text tokens in a case's unpruned prompt."""
    place = place_of(case_grid(case, limits), config.traits.timestamps and case.frames > 1)
    return (place.around or place.runs)[-1].stop + TEXT_AFTER - len(place)


@dataclass(frozen=True)
class Clip:
    """A clip preprocessed for the vision tower, and a prompt that contains it."""

    pixels: torch.Tensor  # uint8 `[4 * N, values]`, patches in Hugging Face's order, on the weights' device
    patches: torch.Tensor  # the same patches, normalized and in the weights' dtype, as input for transformers
    grid: tuple[int, int, int]  # (T, H, W) in units
    seconds_per_pair: float  # interval between grids, in seconds
    ids: torch.Tensor  # int64 `[L]`, random token IDs for the text, and zeros for the video
    place: Place  # position of the video's tokens in the prompt
    positions: torch.Tensor  # int64 `[3, L]`, rotary positions according to Qwen's rule
    following: int  # position of the first new token
    unpruned: int  # number of units before pruning; more than N if the method made the input smaller

    @property
    def units(self) -> int:
        return prod(self.grid)


def prepare(
    loaded: LoadedModel,
    frames: torch.Tensor,
    seconds_per_pair: float,
    config: PruneConfig | None = None,
) -> Clip:
    """Preprocess a clip and build a prompt that contains it. The text tokens are random but identical across runs.

    If the method in `config` prunes by shrinking the input, the clip is resized first.
    """
    v = loaded.video
    visual = loaded.model.model.visual
    count, height, width, _ = frames.shape
    grid = case_grid(Case(count, height, width), v)
    unpruned = prod(grid)
    smaller = config.plan(TowerShape.of_tower(visual), grid).grid if config else grid
    if smaller != grid:
        grid = smaller
        fewer = min(count, smaller[0] * v.temporal_patch_size)
        picked = [int(time) for time in SamplingPlan.even(0, count, fewer).times_s]
        frames = resize(frames[picked], grid[1] * v.unit, grid[2] * v.unit)
        seconds_per_pair *= count / fewer
    weight = visual.patch_embed.proj.weight
    pixels = pixel_patches(frames.to(weight.device), v.patch_size, v.temporal_patch_size, v.merge_size)
    config = loaded.model.config
    random = torch.Generator().manual_seed(0)
    size = config.text_config.vocab_size
    vision = config.vision_config
    place = place_of(grid, vision.traits.timestamps and count > 1)
    length = (place.around or place.runs)[-1].stop + TEXT_AFTER
    text = torch.randint(size, (length - len(place),), generator=random, dtype=torch.int64, device="cpu")
    video = torch.zeros(length, dtype=torch.bool, device="cpu").index_fill_(0, place.columns, True)
    ids = torch.zeros(length, dtype=torch.int64, device="cpu").masked_scatter_(~video, text)
    positions = prompt_positions(length, place.positions(grid, seconds_per_pair, vision.tokens_per_second))
    patches = normalised(pixels, v.normal).to(weight.dtype)
    return Clip(pixels, patches, grid, seconds_per_pair, ids, place, positions, int(positions.max()) + 1, unpruned)
