"""The operators of the selection: each form computes the same, and the radii are what they are said to be."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend import operators
from evoprune.backend.operators import greedy_cosine, snap
from evoprune.bench.verify.waiting import shape_depends_on_values
from tests.backend.cases import SHAPES, clusters, means, points, unit_rows
from tests.threads import one_thread  # noqa: F401

EVERY = pytest.mark.parametrize("name", SHAPES)
KEEP = pytest.mark.parametrize("share", [0.0, 0.3, 1.0])


@EVERY
@KEEP
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_radii_are_the_same_in_the_form_of_the_cpu(name, share, held, monkeypatch):
    """Of the points of the `keep` largest radii; the CPU may leave the others at 0."""
    monkeypatch.setattr(operators, "HELD", held)
    args = points(SHAPES[name], 1)
    keep = max(1, round(share * int((args[4] >= 0).sum())))
    plain = operators._tube_radii(*args, keep)
    made = operators.tube_radii(*args, keep)
    assert made.dtype == torch.float32 and made.shape == args[4].shape
    first = plain >= plain.sort(descending=True).values[keep - 1]
    assert torch.equal(made[first], plain[first]) and ((made == plain) | (made == 0)).all()
    assert torch.equal(made < 0, args[4] < 0)
    assert torch.equal(plain, operators._tube_radii(*args, 1))


@EVERY
def test_points_of_a_tube_fall_in_the_order_in_which_the_farthest_come(name):
    place, half, weight, first, row, time, tubes = args = points(SHAPES[name], 2)
    radii = operators.tube_radii(*args, len(row))
    assert (radii[row < 0] == -1).all() and torch.equal(radii, radii.round())
    for tube in tubes:
        units = [u for u in tube.tolist() if u < len(row) and row[u] >= 0]
        order = sorted(units, key=lambda u: (-radii[u], u))
        if not units:
            continue
        index = torch.tensor(order)
        rows = row[index]
        apart = half[rows][:, None] + half[rows] - place[rows] @ place[rows].T
        apart = (apart + weight[rows] * (time[index][:, None] - time[index]).abs()).round().clamp(min=0)
        begins = max(units, key=lambda u: (first[row[u]], -u))
        if len(order) == 1 or radii[order[1]] > 0:
            assert order[0] == begins and radii[begins] >= first[row[begins]]
        for step in range(1, len(order)):
            near = apart[:step].amin(0)
            if radii[order[step]] > 0:
                assert radii[order[step]] == near[step] == near[step:].max()
                assert radii[begins] > radii[order[step]]


@EVERY
@KEEP
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_the_nearest_is_the_same_in_the_form_of_the_cpu(name, share, held, monkeypatch):
    place, half, weight, _, row, time, _ = points(SHAPES[name], 3)
    there = (row >= 0).nonzero()[:, 0]
    selected = there[:: max(1, round(1 / (share or 1e-3)))]
    args = place, half, weight, row, time, selected
    expected = operators._nearest_selected(*args)
    monkeypatch.setattr(operators, "HELD", held)
    monkeypatch.setattr(operators, "HELD_ON_DEVICE", max(held, len(selected)))
    assert torch.equal(operators.nearest_selected(*args), expected)
    assert torch.equal(operators._nearest_selected(*args), expected)
    assert torch.equal(expected < 0, row < 0)
    assert torch.equal(expected[selected], torch.arange(len(selected)))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_means_are_the_same_in_the_form_of_the_cpu(name, dtype, held, monkeypatch):
    rows, into, row, weight, count = args = clusters(SHAPES[name], 4, dtype)
    monkeypatch.setattr(operators, "HELD", held)
    made = operators.mean_rows(*args)
    assert made.dtype == dtype and torch.equal(made, operators._mean_rows(*args))
    for mean in range(count):
        mine = into == mean
        total = (weight[mine][:, None] * rows[row[mine]].float()).sum(0)
        assert torch.equal(made[mean], (total / weight[mine].sum()).to(dtype))


# The operator of greedy selections by cosine, against its definition one cosine at a time.


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


# The operator of reuse: it may be cut anywhere, and its form for a device reads no value.


class OnADevice(TorchDispatchMode):
    """Has no shape depend on values, nor a branch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not shape_depends_on_values(func, args), func
        assert func is not torch.ops.aten._local_scalar_dense.default, func
        return func(*args, **(kwargs or {}))


def scanned(frames, threshold=8.0, form=operators.reuse_scan):
    return form(frames, frames[0], torch.zeros(frames.shape[1], dtype=torch.int64), False, 0, threshold)


@pytest.mark.parametrize("units", [1, 5, 24])
@pytest.mark.parametrize("kind", ["noise", "still", "cut"])
def test_a_scan_may_be_cut_anywhere(units, kind):
    frames = means(9, units, 0, kind)
    whole = scanned(frames)
    source, held, pair = scanned(frames[:1])
    made = [source]
    for first, count in ((1, 1), (2, 3), (5, 4)):
        source, held, pair = operators.reuse_scan(frames[first : first + count], held, pair, True, first, 8.0)
        made.append(source)
    for ours, expected in zip((torch.cat(made), held, pair), whole, strict=True):
        assert torch.equal(ours, expected)
