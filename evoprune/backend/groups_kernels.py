"""The operator of backend/groups.py as kernels of Triton: a program for each group compares its units with each other."""

import torch
import triton
import triton.language as tl

TILE = 16  # units that all others of a group are compared with at a time


@triton.jit
def _owners(owner, order, first, last, i):
    """The owner of the units i of a group; -1 for none, and past its end."""
    unit = tl.load(order + first + i, mask=first + i < last, other=0)
    return tl.load(owner + unit, mask=first + i < last, other=-1)


@triton.jit
def _count(owner, length, order, start, own, key_length, tile: tl.constexpr, block: tl.constexpr):
    """How many units each row owns, at the first of them; and how many rows there are."""
    group = tl.program_id(0)
    first, last = tl.load(start + group), tl.load(start + group + 1)
    last = tl.where(tl.load(length + group) > 0, last, first)
    i = tl.arange(0, block)
    mine = _owners(owner, order, first, last, i)
    before, total = tl.zeros((block,), tl.int32), tl.zeros((block,), tl.int32)
    for at in range(0, block, tile):
        j = at + tl.arange(0, tile)
        same = _owners(owner, order, first, last, j)[:, None] == mine[None, :]
        total += tl.sum(tl.where(same, 1, 0), 0)
        before += tl.sum(tl.where(same & (j[:, None] < i[None, :]), 1, 0), 0)
    leads = (mine >= 0) & (before == 0)
    tl.store(own + first + i, tl.where(leads, total, 0), mask=first + i < tl.load(start + group + 1))
    tl.store(key_length + group, tl.sum(tl.where(leads, 1, 0), 0))


@triton.jit
def _place(owner, length, order, start, own, ends, keys, of, count, tile: tl.constexpr, block: tl.constexpr):
    """Writes the rows of a group behind those of the groups before it."""
    group = tl.program_id(0)
    first, last = tl.load(start + group), tl.load(start + group + 1)
    i = tl.arange(0, block)
    mine, owned = _owners(owner, order, first, last, i), tl.load(own + first + i, mask=first + i < last, other=0)
    rank, rows = tl.zeros((block,), tl.int32), tl.sum(tl.where(owned > 0, 1, 0), 0)
    for at in range(0, block, tile):
        j = at + tl.arange(0, tile)
        leads = tl.load(own + first + j, mask=first + j < last, other=0) > 0
        less = _owners(owner, order, first, last, j)[:, None] < mine[None, :]
        rank += tl.sum(tl.where(leads[:, None] & less, 1, 0), 0)
    slot = tl.load(ends + group) - rows + rank
    tl.store(keys + slot, mine, mask=owned > 0)
    tl.store(of + slot, (group + tl.zeros((block,), tl.int32)).to(tl.int64), mask=owned > 0)
    tl.store(count + slot, owned.to(tl.int64), mask=owned > 0)


def owner_groups(owner, length, order, start, longest):
    total, owner, block = len(length), owner.contiguous(), triton.next_power_of_2(max(longest, TILE))
    own, key_length = torch.empty_like(owner, dtype=torch.int32), torch.empty_like(length)
    keys, count, of = torch.zeros_like(owner), torch.zeros_like(owner), torch.full_like(owner, total)
    how = {"tile": TILE, "block": block, "num_warps": max(1, min(8, block // 128))}
    _count[total,](owner, length, order, start, own, key_length, **how)
    _place[total,](owner, length, order, start, own, key_length.cumsum(0), keys, of, count, **how)
    return keys, of, count, key_length
