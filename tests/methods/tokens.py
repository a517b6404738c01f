"""Random and adversarial tokens, and helpers for tests that implement a specification line by line."""

from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune import methods
from evoprune.methods import snap
from evoprune.methods.base import Method
from evoprune.methods.chain import MethodChain
from evoprune.methods.plans import EncoderPlan, TowerShape
from evoprune.methods.types import Selection, Tokens
from evoprune.vision import encode_rows
from tests.methods.kinds import NEED_FILES
from tests.vision.tower import tiny_tower

AFTER = [
    name for name in methods.available(plugins=False) if methods.get(name).acts == "after" and name not in NEED_FILES
]
KINDS = ("random", "duplicates", "constant", "zero", "two directions", "drift")


def features_of(kind: str, n: int, seed: int = 0, width: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if kind == "zero":
        return torch.zeros(n, width)
    if kind == "constant":
        return torch.ones(n, width) * 0.3
    made = torch.randn(n, width, generator=random)
    if kind == "duplicates":  # at different lengths, which a cosine ignores
        return made[torch.randint(max(1, n // 3), (n,), generator=random)] * (1 + torch.arange(n)[:, None] % 3)
    if kind == "two directions":
        return made[:2].repeat(n, 1)[:n]
    if kind == "drift":
        return torch.randn(1, width, generator=random) + 0.3 * made.cumsum(0)
    return made


def given_of(kind: str, n: int, seed: int = 0, width: int = 8) -> dict[str, torch.Tensor]:
    """Return every input that a method can request."""
    attention = features_of(kind, n, seed + 1, 1)[:, 0].abs()
    if kind == "duplicates":
        attention = attention.round()
    question = torch.zeros(3, width) if kind == "zero" else features_of("random", 3, seed + 3, width)
    keys, middle = features_of(kind, n, seed + 2, 12), features_of(kind, n, seed + 4, 10)
    return {"attention": attention, "keys": keys, "question": question, "middle": middle}


def tokens_of(kind: str, grid: tuple[int, int, int], seed: int = 0, width: int = 8) -> Tokens:
    n = prod(grid)
    given = given_of(kind, n, seed, width)
    return Tokens(features_of(kind, n, seed, width), torch.arange(n), grid, seed, given)


def selected(name: str, tokens: Tokens, keep: int) -> list[int]:
    made = methods.get(name).select(tokens, keep)
    assert isinstance(made, Selection) and made.kept.dtype == torch.int64
    return made.kept.tolist()


def snapped(value: float) -> float:
    return float(snap(torch.tensor(value, dtype=torch.float64)))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (x / x.norm().clamp(min=1e-12) for x in (a, b))
    return float(snap(a @ b))


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1.0) for value in values]


def first_of(values: list[float], best) -> int:
    return values.index(best(values))


def ranked(values: list[float]) -> list[int]:
    """Return indices sorted by descending value. Ties are sorted by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def encoded(
    method: Method | MethodChain,
    patches: torch.Tensor,
    grid: tuple[int, int, int],
    keep: int,
    full_layers=(1, 3),
    question: torch.Tensor | None = None,
    **how,
):
    """Encode a video with the tiny tower. `how` contains additional arguments for `encode_rows`."""
    visual = tiny_tower(full_layers)
    plan = plan_of(method, TowerShape.of_tower(visual), grid, keep)
    return encode_rows(visual, [patches], plan, **how).select_tokens(question)


def plan_of(method: Method | MethodChain, tower: TowerShape, grid: tuple[int, int, int], keep: int) -> EncoderPlan:
    return (method if isinstance(method, MethodChain) else MethodChain.of(method)).plan(tower, grid, keep)


class Largest(TorchDispatchMode):
    """Records the number of elements in the largest tensor that is created in its scope."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.itemsize)
        return made
