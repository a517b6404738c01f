"""The operator of greedy selections by cosine, against its definition one cosine at a time."""

import pytest
import torch

from evoprune.backend.operators import greedy_cosine, snap
from tests.backend.cases import unit_rows
from tests.threads import one_thread  # noqa: F401


def by_hand(unit, weight, bonus, factor, keep, from_nearest) -> list[int]:
    cosine = snap(unit @ unit.T).tolist()
    rows, selected = range(len(unit)), []

    def score(i: int) -> float:
        if selected:
            near = max(cosine[i][j] for j in selected)
        else:
            near = max((cosine[i][j] for j in rows if j != i), default=-1.0) if from_nearest else 0.0
        if bonus is not None:
            return snap(bonus[i] - factor * torch.tensor(near)).item()
        far = 1 - torch.tensor(max(near, -1.0))
        return (far if weight is None else snap(far * weight[i])).item()

    while len(selected) < keep:
        selected.append(max((i for i in rows if i not in selected), key=lambda i: (score(i), -i)))
    return sorted(selected)


@pytest.mark.parametrize("rows", [1, 2, 19])
@pytest.mark.parametrize("kind", ["plain", "weight", "bonus"])
@pytest.mark.parametrize("from_nearest", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_are_selected_one_after_another(rows, kind, from_nearest, share):
    unit, value = unit_rows(rows, 16)
    args = unit, value if kind == "weight" else None, value if kind == "bonus" else None, 0.5
    keep = round(share * rows)
    made = greedy_cosine(*args, keep, from_nearest)
    assert made.dtype == torch.int64 and made.tolist() == by_hand(*args, keep, from_nearest)
