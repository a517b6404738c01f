"""Counts operations of a language model that transformers runs, for prompts of several lengths.

    python -m experiments.prompt_operations -m Qwen/Qwen3.5-4B --columns 1566,414,184

Views are left out: they launch nothing on a GPU. `next`: columns behind a prompt of 160, as of a question (27) and of a token (1).
Nothing is computed: the tensors are on the meta device.
"""

import argparse

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.session.loading.find import describe_model
from evoprune.session.loading.hosted import meta_model
from evoprune.session.options import ModelOptions

BEFORE = 160  # columns of a prompt that others follow


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        return func(*args, **(kwargs or {}))


def count(text: torch.nn.Module, columns: int, before: int = 0) -> int:
    """Operations of a pass of `columns` behind `before` others; `text`: a language model of transformers on the meta device."""
    from transformers import DynamicCache

    cache = DynamicCache(config=text.config)
    for length in filter(None, (before, columns)):
        embeds = torch.zeros(1, length, text.config.hidden_size, device="meta", dtype=torch.bfloat16)
        places = torch.zeros(4, 1, length, device="meta", dtype=torch.int64)
        with Operations() as seen, torch.inference_mode():
            text(inputs_embeds=embeds, position_ids=places, past_key_values=cache, use_cache=True)
    return seen.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="Qwen/Qwen3.5-4B")
    parser.add_argument("--columns", default="1566,414,184", metavar="LIST")
    parser.add_argument("--next", default="27,1", metavar="LIST")
    args = parser.parse_args()
    config = describe_model(ModelOptions(args.model)).config
    text = meta_model(config, torch.bfloat16).model.language_model.eval()
    for before, lengths in ((0, args.columns), (BEFORE, args.next)):
        for length in map(int, lengths.split(",")):
            print(f"{length:6,} columns behind {before:3}: {count(text, length, before):6,} operations", flush=True)


if __name__ == "__main__":
    main()
