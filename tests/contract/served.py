"""Record what the vLLM plugin computes, without vLLM: placeholders, features, positions, biases, and rejected requests.

The tests call the same functions with the same arguments as `evoprune_vllm.model` and `evoprune_vllm.processor`, which use vLLM's
classes.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch

import evoprune
from evoprune.methods import Budget
from tests.contract.running import ROOT
from tests.contract.small import Held, encoded, runs, sums
from tests.tiny import tiny_model

if (plugin := str(ROOT / "plugins/vllm")) not in sys.path:  # under pytest it is on the path already
    sys.path.append(plugin)

from evoprune_vllm import positions, pruning

VIDEO, PICTURE, TEXT = 2, 1, 0
# Items of a prompt, in units: preceding text, kind, grid, seconds per frame pair. END is the text at the end.
ITEMS = ((3, VIDEO, (4, 4, 6), 0.7), (2, PICTURE, (1, 4, 4), 1.0), (1, VIDEO, (2, 2, 4), 1.37))
END = 5
METHODS = ("evoprune", "evoprune:count=1", "evoprune-merge", "divprune", "reuse+visionzip", "tome")
TIMED = ("qwen3_vl", "qwen3_5")  # families that put a timestamp before each frame pair
CLOCK = {"qwen2_5_vl": 2}  # positions per second


def request(family: str, method: str, rate: float) -> Held:
    """Process a prompt of two videos and an image as the plugin's encoder and processor do, then read its positions."""
    visual = tiny_model(family=family).model.visual
    chain = pruning.served_method({"evoprune": {"method": method}})
    budget = pruning.request_budget({}, rate)
    clock = CLOCK.get(family)
    random = torch.Generator().manual_seed(1)
    values = visual.patch_embed.proj.weight[0].numel()
    held: Held = {"weighs": chain.weighs}
    ids: list[int] = []
    items, columns = [], []
    for number, (before, kind, grid, seconds) in enumerate(ITEMS):
        ids += [TEXT] * before
        keep = budget.keep(grid) if kind == VIDEO else prod(grid)
        patches = torch.randn(4 * prod(grid), values, generator=random)
        made = pruning.encoded(visual, patches, grid, keep, chain)
        held[f"input {number}"] = encoded(made)
        if kind == PICTURE:
            rows, more = pruning.tokens_of(made), positions.extent(grid, 1.0, clock)
            known = evoprune_positions(grid, 1.0, clock)
        elif family in TIMED:
            words = [4 + pair % 2 for pair in range(grid[0])]
            text = torch.randn(sum(words) + grid[0], made.features.shape[1], generator=random)
            rows, known = pruning.with_columns(made, seconds, clock, words, text), None
            more = len(rows) - keep + grid[0] * max(grid[1:])
        else:
            rows, known = pruning.with_columns(made, seconds, clock), None
            more = positions.extent(grid, seconds, clock)
        wide = pruning.tokens_of(made).shape[1]
        held[f"input {number}"] |= {"placeholders": len(rows), "embeddings": sums(rows[:, :wide])}
        columns += [] if kind == PICTURE else [rows[:, wide:]]
        items.append((len(ids), len(rows), more, known))
        ids += [kind] * len(rows)
    ids += [TEXT] * END
    return held | read(torch.tensor(ids), items, torch.cat(columns))


def evoprune_positions(grid: tuple[int, int, int], seconds: float, clock: float | None) -> torch.Tensor:
    from evoprune.language import video_positions

    return video_positions(grid, seconds, clock)


def read(ids: torch.Tensor, items: list[tuple], columns: torch.Tensor) -> Held:
    """Return the positions before encoding and after reading in two pieces, and the biases of the video tokens."""
    before, offset = positions.known_positions(len(ids), items)
    made, places = before, (ids == VIDEO).nonzero()[:, 0]
    half = len(places) // 2
    for piece in (slice(0, half), slice(half, None)):
        made = positions.with_videos(made, places[piece], positions.from_columns(columns[piece]))
    plain, bias = positions.split_bias(made)
    return {
        "prompt": [len(ids), len(places), offset, positions.generated_offset(made)],
        "known time, height, width": [runs(row) for row in before.tolist()],
        "read time, height, width": [runs(row) for row in plain.tolist()],
        "bias": [round(each, 4) for each in bias[places].tolist()],
    }


def taken() -> Held:
    """Return which methods and budgets a server accepts, and its messages about the others."""
    held: Held = {}
    for name in (
        *evoprune.methods.available(plugins=False),
        "reuse+divprune",
        "evoprune+fastv",
        "evoprune:within=0.01",
        "no",
    ):
        held[f"method {name}"] = said(pruning.served_method, {"evoprune": {"method": name}})
    for options, rate in (
        ({}, None), ({}, 0.75), ({"evoprune_budget": "50%"}, 0.9), ({"evoprune_budget": "fast"}, 0.9),
        ({"evoprune_budget": 0.5}, None), ({"evoprune_budget": 0}, 0.5), ({"evoprune_budget": "auto"}, 0.5),
        ({"evoprune_bugdet": 1}, 0.5),
    ):  # fmt: skip
        held[f"budget {options} {rate}"] = said(pruning.request_budget, options, rate)
    return held


def said(function: Callable, *args) -> object:
    """Return the result of a function, or the two lines of its error."""
    try:
        made = function(*args)
    except evoprune.EvopruneError as problem:
        return [type(problem).__name__, problem.message, problem.hint]
    return made.video if isinstance(made, Budget) else [made.name, made.exact, made.weighs]


def cases() -> Iterator[tuple[str, Callable[[], Held]]]:
    yield "served methods and budgets", taken
    for family in ("qwen2_5_vl", "qwen2_vl", *TIMED):
        for method in METHODS if family == "qwen2_5_vl" else METHODS[:3]:
            for rate in (0.75, 0.9) if method == "evoprune" else (0.75,):
                yield f"served {family} {method} {rate}", partial(request, family, method, rate)
