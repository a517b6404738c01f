"""Count operations of a language model with linear attention, for prompts of several lengths: of transformers, and ours.

    python -m experiments.speed.prompt_operations -m Qwen/Qwen3.5-4B --columns 1566,414,184

Views are left out: they launch nothing on a GPU. A norm counts as one operation where PyTorch or evoprune has a kernel for it on a
GPU. `next`: columns behind a prompt of 160, as of a question (27) and of a token (1). Nothing is computed: the tensors are on the
meta device.
"""

import argparse
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend.devices import plain_pytorch
from evoprune.language import hosted
from evoprune.model.weights import HostedVL
from evoprune.session.loading.description import describe
from evoprune.session.loading.hosted import meta_model
from evoprune.session.options import ModelOptions

BEFORE = 160  # columns of a prompt that others follow


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not (views or "view" in str(func))
        return func(*args, **(kwargs or {}))


def count(model: HostedVL, columns: int, before: int, own: bool) -> int:
    """Operations of a pass of `columns` behind `before` others: ours, or those of the modules of transformers."""
    cache = hosted.HostedCache(model)
    text = model.model.language_model
    given = {}
    for length in filter(None, (before, columns)):
        x = torch.zeros(length, text.config.hidden_size, device="meta", dtype=torch.bfloat16)
        places = torch.zeros(4, 1, length, device="meta", dtype=torch.int64)
        with Operations() as seen, torch.no_grad():  # an inference mode would hide copies
            if own and before and length == columns > 1:
                given["attention_mask"] = torch.ones(columns, before + columns, device="meta").tril(before)[None, None]
            with nullcontext() if own else plain_pytorch():
                hosted.run(model, x, places, cache.states, **given)
    return seen.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="Qwen/Qwen3.5-4B")
    parser.add_argument("--columns", default="1566,414,184", metavar="LIST")
    parser.add_argument("--next", default="27,1", metavar="LIST")
    args = parser.parse_args()
    config = describe(ModelOptions(args.model), local=True).config
    host = meta_model(config, torch.bfloat16).eval()
    model = HostedVL(config, host.model.visual, host.model.language_model, host.lm_head)
    # Both read rows that are not contiguous from a copy.
    norm = patch("torch.nn.functional.rms_norm", lambda x, *_: torch.empty_like(x.contiguous()))
    sum_and_norm = patch("evoprune.language.hybrid.add_norm", lambda x, *_: (x, torch.empty_like(x.contiguous())))
    for before, lengths in ((0, args.columns), (BEFORE, args.next)):
        for length in map(int, lengths.split(",")):
            theirs = count(model, length, before, own=False)
            with norm, sum_and_norm:
                ours = count(model, length, before, own=True)
            print(f"{length:6,} columns behind {before:3}: {theirs:6,} operations, ours {ours:6,}", flush=True)


if __name__ == "__main__":
    main()
