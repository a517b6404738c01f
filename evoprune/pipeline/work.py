"""How much work a video is: the memory that encoding takes, and the time until the first token."""

from evoprune.errors import LESS, OutOfMemory
from evoprune.model.cost import estimate_first_token as estimate_seconds
from evoprune.model.memory import shortage, working_memory
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.view import View
from evoprune.pruning.budget import keep_count
from evoprune.video.plan import Plan
from evoprune.vision.devices import units_at_a_time
from evoprune.vision.tower import tower_geometry, tower_shape

CHUNK_BYTES = 64 * 2**20  # of frames as decoded, held at a time
TEXT = 64  # tokens of a prompt around the video, roughly
QUESTION = 40  # tokens of a prompt around the video, for the estimate of time


def chunk_bytes(engine: Engine, view: View) -> int:
    """Bytes of decoded frames to hold at a time: no more frames than the encoder takes, and no more than a few large ones."""
    limits, (_, height, width) = engine.loaded.video, view.plan.grid
    pairs = -(-units_at_a_time(engine.loaded.model.device) // (height * width))
    return min(CHUNK_BYTES, pairs * limits.temporal_patch_size * view.info.width * view.info.height * 3)


def least_units(engine: Engine, view: View) -> int:
    """Units of a block of the method: the tower takes no fewer at a time."""
    method, (_, height, width) = engine.method, view.plan.grid
    block = method.block if method.merges(view.keep / view.plan.visual_tokens) else 1
    return block * height * width


def units_at_once(engine: Engine, view: View) -> int:
    """How many units to encode at a time: fewer than is usual where memory is short.

    Raises:
        OutOfMemory: there is not enough even for a block, or for the prompt.
    """
    model, plan, least = engine.loaded.model, view.plan, least_units(engine, view)
    at_once = units_at_a_time(model.device)
    sizes = view.keep + TEXT, model.dtype.itemsize, _late_rows(engine, view)
    while short := shortage(
        working_memory(model.config, plan.visual_tokens, max(least, at_once), *sizes), str(model.device)
    ):
        if at_once <= least:
            size = (
                f"{plan.sampling.frames} frames of {plan.width}x{plan.height} pixels, {view.keep:,} visual tokens kept"
            )
            raise OutOfMemory(f"{view.name} {short}: {size}", LESS, stage="encode")
        at_once = max(least, at_once // 2)
    return at_once


def _late_rows(engine: Engine, view: View) -> int:
    """Rows that are selected inside the tower, at most; 0 where none are."""
    method, units = engine.method, view.plan.visual_tokens
    budget = view.keep / units
    if not method.merges(budget):
        return 0
    if method.narrows_after(tower_shape(engine.loaded.model.model.visual), budget) is None:
        return 0
    return min(units, max(view.keep, round(method.encoder_share(budget) * units)))


def estimate_first_token(engine: Engine, plan: Plan) -> float | None:
    """Seconds until the first token, roughly; None where nobody has to wait for it (CUDA, the demo model).

    Args:
        plan: what would be looked at with nothing pruned.
    """
    if engine.loaded.device != "cpu" or engine.loaded.is_demo:
        return None
    model, method = engine.loaded.model, engine.method
    tower = tower_shape(model.model.visual)
    keep = keep_count(engine.budget, plan.visual_tokens)
    count, height, width = method.plan(plan.grid, keep)
    geo = tower_geometry(model.model.visual, height, width)
    rows = [geo.units] * (tower.depth + 1)
    budget = keep / plan.visual_tokens
    if method.merges(budget):
        left = min(geo.units, method.allowance(geo.units, max(1, keep // count)))
        rows = [geo.units, *method.rows(tower, geo.units, geo.windows, left)]  # of a frame pair with nothing reused
        early = method.narrows_after(tower, budget)
        if early is not None:
            most = max(1, round(method.encoder_share(budget) * geo.units))
            rows[early:] = [min(n, most) for n in rows[early:]]
    rows = [count * n for n in rows]
    return estimate_seconds(model, rows, count, geo.windows, min(keep, rows[0]) + QUESTION)
