"""Data-parallel training. Each process computes gradients on its own batches, and all processes apply the mean gradient.

On a CPU, two single-threaded processes are faster than one process with two threads, because most operations in a small model are
too small to parallelize.
"""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


class Team:
    """The process group of a training run, as seen by one of its processes. Rank 0 writes the log and the checkpoints."""

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor with its mean over all processes, which must pass the same shapes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def complete(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Set a zero gradient for parameters with a gradient only in other processes."""
        if self.size == 1:
            return
        has = [p.grad is not None for p in parameters]
        counts = torch.tensor(has, dtype=torch.float32, device="cpu")
        dist.all_reduce(counts)
        for p, here, count in zip(parameters, has, counts.tolist(), strict=True):
            if count and not here:
                p.grad = torch.zeros_like(p)

    def any(self, flag: bool) -> bool:
        """Return True, in all processes, if the flag is set in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), dtype=torch.float32, device="cpu")
        dist.all_reduce(votes)
        return votes.item() > 0


def run_team(work: Callable[..., None], size: int, *args) -> None:
    """Run `work(team, *args)` in `size` single-threaded processes, or in this process if `size` is 1."""
    if size == 1:
        torch.set_num_threads(1)
        work(Team(0, 1), *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_member, (size, Path(folder) / "meet", work, args), nprocs=size)


def _member(rank: int, size: int, meet: Path, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    # The timeout is long, because a run may be paused for hours and then resumed.
    dist.init_process_group("gloo", f"file://{meet}", timedelta(days=7), world_size=size, rank=rank)
    try:
        work(Team(rank, size), *args)
    finally:
        dist.destroy_process_group()
