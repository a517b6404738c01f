"""How many threads a model computes with on the CPU.

PyTorch takes as many as the machine has cores. A parallel step then waits for its last thread, and where other programs are
running, that thread may not be. Small models lose by a second thread even on an idle machine, because their steps are short.
"""

import os

import torch

from evoprune.model.config import Config
from evoprune.model.limits import available_cores
from evoprune.model.precision import AUTO_THREADS
from evoprune.model.weights import empty

# Weights of a model for each of its threads. The demo model has 4 million, the smallest Qwen 2 billion.
WEIGHTS_PER_THREAD = 32_000_000


def thread_count(weights: int, cores: int) -> int:
    """How many threads pay for a model of so many weights on so many idle cores, at least 1."""
    return max(1, min(cores, weights // WEIGHTS_PER_THREAD))


def use_threads(wanted: int | str | None, config: Config) -> None:
    """Sets the number of threads of this process, as `torch.set_num_threads` does.

    Args:
        wanted: the number; "auto" for one by the size of the model and the cores that this process may use, unless OMP_NUM_THREADS
            is set; None to leave the number as it is.
        config: of the model.
    """
    if wanted == AUTO_THREADS and not os.environ.get("OMP_NUM_THREADS"):
        weights = sum(weight.numel() for weight in empty(config).parameters())
        torch.set_num_threads(thread_count(weights, available_cores()))
    elif isinstance(wanted, int):
        torch.set_num_threads(wanted)


def threads_of_each(wanted: int | str | None, processes: int) -> int:
    """How many threads each of several processes gets, that compute what this one would: `wanted`, if it is a number.

    Otherwise as many as this process has, but together no more than there are cores.
    """
    if isinstance(wanted, int):
        return wanted
    return max(1, min(torch.get_num_threads(), available_cores() // processes))
