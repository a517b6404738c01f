"""Callbacks of `generate` get ids of the whole prompt although the model runs on a pruned one."""

from collections.abc import Callable
from copy import copy

import torch

from evoprune.huggingface import interface
from evoprune.huggingface.columns import with_whole_prompt


def with_whole_prompts(model, call: dict, pruned_call: dict) -> dict:
    """The call of `generate` on a pruned prompt, in which lengths and callbacks refer to the whole prompt.

    Args:
        call: the arguments with the whole prompt.
        pruned_call: the arguments with the pruned prompt; not modified.
    """
    prompt, places = call["input_ids"], pruned_call["input_ids"].shape[1]
    pruned_call = dict(pruned_call)
    for name in ("logits_processor", "stopping_criteria"):
        if pruned_call.get(name):
            wrapped = copy(pruned_call[name])
            wrapped[:] = [_OnWholePrompts(one, prompt, places) for one in wrapped]
            pruned_call[name] = wrapped
    if (allowed := pruned_call.get("prefix_allowed_tokens_fn")) is not None:
        pruned_call["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, with_whole_prompt(prompt[row, None], places, ids[None])[0]
        )
    if pruned_call.get("streamer") is not None:
        pruned_call["streamer"] = _WholePromptStreamer(pruned_call["streamer"], prompt)
    for name in ("max_length", "min_length"):
        if (length := interface.setting(model, call, name)) is None:
            continue
        length = max(0, length - prompt.shape[1] + places)
        if pruned_call.get(name) is None and pruned_call.get("generation_config") is not None:
            pruned_call["generation_config"] = copy(pruned_call["generation_config"])
            setattr(pruned_call["generation_config"], name, length)
        else:
            pruned_call[name] = length
    return pruned_call


class _OnWholePrompts:
    """A logits processor or stopping criterion that gets ids of the whole prompt."""

    def __init__(self, wrapped: Callable, prompt: torch.Tensor, places: int):
        self._wrapped, self._prompt, self._places = wrapped, prompt, places

    def __call__(self, input_ids, scores):
        return self._wrapped(with_whole_prompt(self._prompt, self._places, input_ids), scores)

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class _WholePromptStreamer:
    """A streamer that gets the whole prompt in the first call of `put`, which is the prompt's."""

    def __init__(self, wrapped, prompt: torch.Tensor):
        self._wrapped, self._prompt = wrapped, prompt

    def put(self, value: torch.Tensor) -> None:
        self._wrapped.put(value if self._prompt is None else self._prompt.cpu())
        self._prompt = None

    def end(self) -> None:
        self._wrapped.end()
