"""Make the CPU take the code paths of a GPU: Triton's interpreter runs the GPU kernels on CPU tensors.

This needs a separate process with TRITON_INTERPRET=1, because Triton decides at import whether to interpret functions.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from evoprune.backend import attention, operators

OPERATORS = ("standard_places", "tube_radii", "nearest_selected", "mean_rows", "reuse_scan")


def attend(q, k, v, query_ends, key_ends, longest, most, scale):
    """Compute the result of `attend_varlen` group by group."""
    pieces = zip(
        q.split(query_ends.diff().tolist()),
        k.split(key_ends.diff().tolist()),
        v.split(key_ends.diff().tolist()),
        strict=True,
    )
    seen = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in each), scale=scale) for each in pieces]
    return torch.cat([each.transpose(0, 1) for each in seen])


@contextmanager
def gpu_ways() -> Iterator[None]:
    """Patch all evoprune modules imported so far to take the code paths that they take on a GPU."""
    answers = {"uses_kernels": True, "is_host": False}
    library = torch.library.Library("evoprune", "IMPL")
    with ExitStack() as stack:
        stack.callback(library._destroy)
        for module in [module for name, module in sys.modules.items() if name.startswith("evoprune.")]:
            for name in answers.keys() & vars(module).keys():
                stack.enter_context(patch.object(module, name, lambda *_, answer=answers[name]: answer))
        stack.enter_context(patch.object(attention.Attention, "varlen_kernel", property(lambda _: attend)))
        for name in OPERATORS:
            library.impl(name, getattr(operators, f"_{name}_cuda"), "CPU", allow_override=True)
        yield
