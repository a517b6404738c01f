"""The trained scorer of VisionSelector (arXiv 2510.16598) and IDPruner (arXiv 2602.13315), which rates a model's visual tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch

from evoprune.bundled import Demo
from evoprune.errors import LFS, LFS_HINT, UsageError
from evoprune.methods import Tokens
from evoprune.untrusted import read_object
from evoprune.util import missing_hint, open_safetensors

WEIGHTS = "model.safetensors"
TENSORS = ("k_proj.weight", "k_proj.bias", "q_proj.weight", "q_proj.bias")
PREFIXES = (
    "_orig_mod.",
    "module.",
    "model.",
    "visual.importance_scorer.",
)  # that training code may leave in tensor names
POINTER = f"{WEIGHTS} is a git-lfs pointer"
HINT = "YF-T/IDPruner on GitHub has scorers for Qwen2.5-VL 3B and 7B: scorer=FOLDER; method mmr needs none"


@dataclass(frozen=True)
class Scorer:
    """A trained scorer in a folder with the files config.json and model.safetensors.

    The score of a token is the mean over all tokens j of (its query) * (key of j) / sqrt(`hidden`), where queries and keys are
    linear in the tokens. This equals its query times the mean key, so computing the scores takes O(N D) time and memory.
    """

    folder: str
    width: int  # number of channels of the tokens
    hidden: int  # number of channels of queries and keys
    model: str  # fingerprint of the model that the scorer was trained for, as in `Tokens`; "" if not stored
    digest: str  # a string of 12 hex digits that identifies the weights

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read a scorer from a folder. Only safetensors files are read.

        Raises:
            UsageError: If the folder cannot be read or does not contain a scorer.
        """
        try:
            config = read_object(Path(folder) / "config.json")
            width, hidden = (_size(config, name) for name in ("in_features", "hidden_dim"))
            tensors = _tensors(Path(folder) / WEIGHTS)
            shapes = {TENSORS[0]: (hidden, width), TENSORS[1]: (hidden,), TENSORS[2]: (hidden, width)}
            for name, tensor in tensors.items():
                expected = shapes.get(name, (hidden,))
                if tuple(tensor.shape) != expected:
                    raise ValueError(f"{name} has shape {[*tensor.shape]}, but config.json says {[*expected]}")
        except OSError as problem:
            where = problem.filename or folder
            if not Path(folder).is_dir():
                raise UsageError(f"there is no scorer folder {folder}", missing_hint(folder, HINT)) from problem
            raise UsageError(f"cannot read the scorer {where}: {problem.strerror or problem}", HINT) from problem
        except ValueError as problem:
            hint = LFS_HINT if str(problem) == POINTER else HINT
            raise UsageError(f"{folder} is not a scorer: {problem}", hint) from problem
        return cls(folder, width, hidden, str(config.get("model", "")), _digest(tensors))

    def check_width(self, width: int) -> None:
        """Check that a model's tokens have the number of channels that the scorer expects.

        Raises:
            UsageError: If they do not.
        """
        if width != self.width:
            problem = (
                f"the scorer {self.folder} is for tokens of {self.width:,} channels, but this model's have {width:,}"
            )
            raise UsageError(problem, f"use a scorer trained for this model; {HINT}")

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Score the tokens `features` (`[N, D]`). Returns float32 `[N]`."""
        key_weight, key_bias, query_weight, query_bias = _weights(self, features.device)
        features = features.float()
        key = key_weight @ features.mean(0) + key_bias  # the mean of all keys
        return (features @ (query_weight.T @ key) + query_bias @ key) / self.hidden**0.5


def scorer_for(tokens: Tokens, scorer: Scorer | None) -> Scorer:
    """Return the scorer to use for a model's tokens: `scorer`, or the bundled scorer of a demo model if it is None.

    Raises:
        UsageError: If the scorer is for another model, or if there isn't one.
    """
    model = tokens.fingerprint
    if scorer is None:
        if model not in demo_scorers():
            raise no_scorer()
        scorer = demo_scorers()[model]
    scorer.check_width(tokens.rows.shape[1])
    if scorer.model and model and scorer.model != model:
        problem = f"the scorer {scorer.folder} was trained for another model"
        raise UsageError(problem, f"use a scorer trained for this model; {HINT}")
    return scorer


def no_scorer() -> UsageError:
    """Return the error for a model without a bundled scorer."""
    return UsageError("this method needs a scorer trained for this model", HINT)


@cache
def demo_scorers() -> Mapping[str, Scorer]:
    """Return the bundled scorers of the demo models, by the fingerprint of the model."""
    scorers = [Scorer.read(str(file.parent)) for file in sorted(Demo.SCORERS.glob("*/config.json"))]
    return {scorer.model: scorer for scorer in scorers}


def _size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= 2**20:
        raise ValueError(f"config.json has no valid {name}")
    return size


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the scorer's tensors from a safetensors file, without the prefixes of their names, in the order of `TENSORS`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a tensor is missing, not floating-point, or not finite, or if the file is a Git LFS pointer.
    """
    with open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(POINTER)
    with open_safetensors(file) as opened:
        names = {_without_prefixes(name): name for name in opened.keys()}  # noqa: SIM118 (not a dict)
        if missing := [name for name in TENSORS if name not in names]:
            raise ValueError(f"{WEIGHTS} has no {missing[0]}")
        tensors = {name: opened.get_tensor(names[name]) for name in TENSORS}
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite numbers")
    return tensors


def _without_prefixes(name: str) -> str:
    while (shorter := next((name.removeprefix(each) for each in PREFIXES if name.startswith(each)), name)) != name:
        name = shorter
    return name


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = sha256()
    for tensor in tensors.values():
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:12]


@lru_cache(maxsize=8)
def _weights(scorer: Scorer, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return a scorer's tensors in the order of `TENSORS`, as float32 on `device`.

    Raises:
        UsageError: If the files have changed since the scorer was read.
    """
    try:
        tensors = _tensors(Path(scorer.folder) / WEIGHTS)
    except (OSError, ValueError):
        tensors = {}
    if _digest(tensors) != scorer.digest:
        raise UsageError(f"the scorer {scorer.folder} has changed since it was read", "run the command again")
    return tuple(
        tensor.to(device, torch.float32, copy=True) for tensor in tensors.values()
    )  # the file may be overwritten
