"""The operator of attention groups: which rows own the units of each window or frame pair.

Two kernels of Triton on CUDA, PyTorch elsewhere; no value is read.
"""

import torch
import torch.nn.functional as F

from evoprune.backend.fallback import with_fallback

MOST_UNITS = 4096  # of a group, which the kernels compare with each other

_LIBRARY = torch.library.Library("evoprune", "FRAGMENT")
_LIBRARY.define(
    "owner_groups(Tensor owner, Tensor length, Tensor group, Tensor order, Tensor start, int rows, int longest)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
owner_groups = torch.ops.evoprune.owner_groups


def _owner_groups(
    owner: torch.Tensor,
    length: torch.Tensor,
    group: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    rows: int,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of G groups the rows that own some of its units, ascending; a group without query rows has none. All are int64.

    `[N]`: these rows, group after group, filled up with 0; `[N]`: the group of each, G where there is none; `[N]`: how many units
    of the group it owns; `[G]`: how many there are.

    Args:
        owner: `[N]`, the row that owns each unit, below `rows`; -1 for none. length: `[G]`, the query rows of each group.
        group: `[N]`, of each unit. order: `[N]`, the units, group after group. start: `[G + 1]`, where each group starts in it.
        longest: at least as many as a group has units.
    """
    units, total = len(owner), len(length)
    unused = total * rows
    asked = (owner >= 0) & (length[group] > 0)
    both = torch.where(asked, group * rows + owner, unused).sort().values
    slot = torch.where(both < unused, F.pad((both[1:] != both[:-1]).cumsum(0), (1, 0)), units)
    keys = torch.full((units + 1,), unused, dtype=torch.int64, device=owner.device).scatter_(0, slot, both)[:units]
    of = keys // rows
    count, key_length = owner.new_zeros(units + 1), owner.new_zeros(total + 1)
    count.scatter_(0, slot, 1, reduce="add")
    key_length.scatter_(0, of, 1, reduce="add")
    return keys % rows, of, count[:units].clone(), key_length[:total].clone()


@with_fallback("the groups of attention", _owner_groups)
def _owner_groups_cuda(owner, length, group, order, start, rows, longest):
    if longest > MOST_UNITS:
        return _owner_groups(owner, length, group, order, start, rows, longest)
    from evoprune.backend import groups_kernels  # Triton takes a while to import

    return groups_kernels.owner_groups(owner, length, order, start, longest)


_LIBRARY.impl("owner_groups", _owner_groups, "CompositeExplicitAutograd")
_LIBRARY.impl("owner_groups", _owner_groups_cuda, "CUDA")
