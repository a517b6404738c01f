"""The clips that are measured: their frames, and what is made of them before the tower runs."""

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod

import torch

from evoprune.bench.profiling import synthetic
from evoprune.bench.profiling.results import Case
from evoprune.errors import UsageError
from evoprune.language.prompt import Place, prompt_positions
from evoprune.methods.chain import Pipeline
from evoprune.methods.plans import keep_tokens
from evoprune.model.config import VisionConfig
from evoprune.session.loading.model import LoadedModel
from evoprune.video.frames import read_frames
from evoprune.video.info import PICTURE, Video
from evoprune.video.plan import InputLimits, make_plan
from evoprune.video.sampling import even_times
from evoprune.vision.preprocess import normalised, pixel_patches, resize
from evoprune.vision.tower import tower_shape

# Text tokens before and after the video, as many as a chat template and a short question have.
TEXT_BEFORE, TEXT_AFTER = 15, 15
# The same around each frame pair, where a prompt has the time of each: the time and a marker, and a marker.
BEFORE_PAIR, AFTER_PAIR = 7, 1
SYNTHETIC_FPS = 2.0

Frames = tuple[torch.Tensor, float]  # uint8 [F, H, W, 3], and the seconds from one grid to the next


def synthetic_frames(content: str, case: Case, unit: int = synthetic.UNIT) -> Frames:
    """A clip made by formula, at Qwen's own frame rate; or a picture, its first frame. `unit`: side of a unit in pixels."""
    made = synthetic.clip(content, max(synthetic.PAIR, case.frames), case.height, case.width, unit)
    return torch.from_numpy(made[: case.frames]), 2 / SYNTHETIC_FPS


def video_frames(info: Video, case: Case) -> Frames:
    """Frames of a video, spread over all of it; or a picture."""
    source, most = info, max(2, case.frames)
    if info.kind == PICTURE:
        source = replace(info, width=case.width, height=case.height)  # which the reader makes of it
    plan = make_plan(info, InputLimits(), frames=case.frames, max_frames=most, max_visual_tokens=sys.maxsize)
    with closing(read_frames(source, plan.sampling.times_s)) as chunks:
        small = [resize(torch.from_numpy(chunk.frames), case.height, case.width) for chunk in chunks]
    return torch.cat(small), plan.sampling.seconds_per_pair()


def case_grid(case: Case, limits: InputLimits) -> tuple[int, int, int]:
    """(T, H, W) of a case in units. Raises UsageError: the frames cannot be cut into merge units."""
    if case.height % limits.unit or case.width % limits.unit:
        raise UsageError(
            f"frames of {case.height}x{case.width} pixels are no whole number of merge units",
            f"height and width must be multiples of {limits.unit}, for example {8 * limits.unit}x{12 * limits.unit}",
        )
    return max(1, case.frames // limits.temporal_patch_size), case.height // limits.unit, case.width // limits.unit


def place_of(grid: tuple[int, int, int], times: bool) -> Place:
    """Where the prompt has the units of a clip. `times`: whether the time of each frame pair is in it."""
    if not times:
        return Place((range(TEXT_BEFORE, TEXT_BEFORE + prod(grid)),))
    pairs, units = grid[0], grid[1] * grid[2]
    starts = [TEXT_BEFORE + pair * (BEFORE_PAIR + units + AFTER_PAIR) + BEFORE_PAIR for pair in range(pairs)]
    around = tuple(range(start - BEFORE_PAIR, start + units + AFTER_PAIR) for start in starts)
    return Place(tuple(range(start, start + units) for start in starts), around)


def text_tokens(config: VisionConfig, case: Case, limits: InputLimits) -> int:
    """Tokens of a case's prompt that are no units, where nothing is pruned."""
    place = place_of(case_grid(case, limits), config.traits.timestamps and case.frames > 1)
    return (place.around or place.runs)[-1].stop + TEXT_AFTER - len(place)


@dataclass(frozen=True)
class Clip:
    """A clip ready for the tower, and the prompt around it."""

    pixels: torch.Tensor  # uint8 `[4 * N, values]`, patches in Hugging Face's order, on the device of the weights
    patches: torch.Tensor  # the same normalised, in the dtype of the weights: what transformers is given
    grid: tuple[int, int, int]  # (T, H, W) in units
    seconds_per_pair: float  # from one grid to the next
    ids: torch.Tensor  # int64 `[L]`, any tokens for the text, and zeros for the video
    place: Place  # where the video is
    positions: torch.Tensor  # int64 `[3, L]` by Qwen's rule
    following: int  # position of the first new token
    unpruned: int  # units of the clip without pruning; more than N if a method made the input smaller

    @property
    def units(self) -> int:
        return prod(self.grid)


def prepare(
    loaded: LoadedModel,
    frames: torch.Tensor,
    seconds_per_pair: float,
    method: Pipeline | None = None,
    budget: float = 1.0,
) -> Clip:
    """Preprocesses a clip, made smaller if `method` acts on the input, with a text of random tokens, always the same."""
    v, visual = loaded.video, loaded.model.model.visual
    count, height, width, _ = frames.shape
    grid = case_grid(Case(count, height, width), v)
    unpruned = prod(grid)
    smaller = method.plan(tower_shape(visual), grid, keep_tokens(budget, grid)).grid if method else grid
    if smaller != grid:
        grid, fewer = smaller, min(count, smaller[0] * v.temporal_patch_size)
        picked = [int(time) for time in even_times(0, count, fewer)]
        frames = resize(frames[picked], grid[1] * v.unit, grid[2] * v.unit)
        seconds_per_pair *= count / fewer
    weight = visual.patch_embed.proj.weight
    pixels = pixel_patches(frames.to(weight.device), v.patch_size, v.temporal_patch_size, v.merge_size)
    random, size = torch.Generator().manual_seed(0), loaded.model.config.text_config.vocab_size
    place = place_of(grid, visual.config.traits.timestamps and count > 1)
    length = (place.around or place.runs)[-1].stop + TEXT_AFTER
    text = torch.randint(size, (length - len(place),), generator=random, dtype=torch.int64, device="cpu")
    video = torch.zeros(length, dtype=torch.bool, device="cpu").index_fill_(0, place.columns, True)
    ids = torch.zeros(length, dtype=torch.int64, device="cpu").masked_scatter_(~video, text)
    positions = prompt_positions(length, place.spans(grid, seconds_per_pair), visual.config.tokens_per_second)
    patches = normalised(pixels, *v.normal).to(weight.dtype)
    return Clip(pixels, patches, grid, seconds_per_pair, ids, place, positions, int(positions.max()) + 1, unpruned)
