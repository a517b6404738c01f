"""Read checkpoints that store the experts of a layer one by one, as transformers does. Published checkpoints join them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

# The matrices of each expert, by the name of the joined matrix of all experts, in the order of their rows.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
STORED = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


class Place(NamedTuple):
    """The place of an expert's matrix in the joined matrix of all experts."""

    joined: str  # name of the joined matrix
    number: int  # number of the expert
    part: int  # index in `PARTS`


class SeparateExperts:
    """Collects the matrices of experts that are stored one by one, and joins them.

    Args:
        shapes: The shapes of the model's weights, by name.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]):
        self._shapes = shapes
        self._found: dict[str, dict[Place, torch.Tensor]] = {}

    def place_of(self, name: str) -> Place | None:
        """Return the place of a stored tensor, or None if it is not an expert's matrix."""
        if match := STORED.fullmatch(name):
            prefix, number, matrix = match.groups()
            for known, parts in PARTS.items():
                if matrix in parts and f"{prefix}.{known}" in self._shapes:
                    return Place(f"{prefix}.{known}", int(number), parts.index(matrix))
        return None

    def shape_at(self, place: Place) -> torch.Size:
        """Return the shape of an expert's matrix."""
        _, rows, columns = self._shapes[place.joined]
        return torch.Size((rows // len(_parts(place.joined)), columns))

    def add(self, place: Place, weight: torch.Tensor) -> None:
        self._found.setdefault(place.joined, {})[place] = weight

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the joined matrices that can be made, by name."""
        return {name: next(iter(found.values())).dtype for name, found in self._found.items()}

    @property
    def missing(self) -> list[str]:
        """The names of the tensors that are needed to join the matrices."""
        return [
            f"{name.rpartition('.')[0]}.{place.number}.{_parts(name)[place.part]}.weight"
            for name, found in sorted(self._found.items())
            for place in self._places(name)
            if place not in found
        ]

    def join(self, name: str) -> torch.Tensor:
        """Return a joined matrix, `[experts, rows, columns]`, and forget its parts."""
        found = self._found.pop(name)
        return torch.cat([found[place] for place in self._places(name)]).view(self._shapes[name])

    def _places(self, name: str) -> list[Place]:
        return [
            Place(name, number, part) for number in range(self._shapes[name][0]) for part in range(len(_parts(name)))
        ]


def _parts(joined: str) -> tuple[str, ...]:
    return PARTS[joined.rpartition(".")[2]]
