"""Callbacks of `generate` get ids of the whole prompt, as if nothing had been dropped from it."""

from collections.abc import Callable
from copy import copy

import torch

from evoprune.huggingface import interface
from evoprune.huggingface.columns import with_whole_prompt


def with_whole_prompts(model, call: dict, small: dict) -> dict:
    """The call of `generate` on a pruned prompt: lengths count the dropped tokens, and callbacks see them."""
    prompt, places = call["input_ids"], small["input_ids"].shape[1]
    small = dict(small)
    for name in ("logits_processor", "stopping_criteria"):
        if small.get(name):
            wrapped = copy(small[name])
            wrapped[:] = [_OnWholePrompts(one, prompt, places) for one in wrapped]
            small[name] = wrapped
    if (allowed := small.get("prefix_allowed_tokens_fn")) is not None:
        small["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, with_whole_prompt(prompt[row, None], places, ids[None])[0]
        )
    if small.get("streamer") is not None:
        small["streamer"] = _WholePromptStreamer(small["streamer"], prompt)
    for name in ("max_length", "min_length"):
        if (length := interface.setting(model, call, name)) is None:
            continue
        length = max(0, length - prompt.shape[1] + places)
        if small.get(name) is None and small.get("generation_config") is not None:
            small["generation_config"] = copy(small["generation_config"])
            setattr(small["generation_config"], name, length)
        else:
            small[name] = length
    return small


class _OnWholePrompts:
    """A logits processor or stopping criterion that gets ids of the whole prompt."""

    def __init__(self, wrapped: Callable, prompt: torch.Tensor, places: int):
        self._wrapped, self._prompt, self._places = wrapped, prompt, places

    def __call__(self, input_ids, scores):
        return self._wrapped(with_whole_prompt(self._prompt, self._places, input_ids), scores)

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class _WholePromptStreamer:
    """A streamer that gets the whole prompt, which comes first."""

    def __init__(self, wrapped, prompt: torch.Tensor):
        self._wrapped, self._prompt = wrapped, prompt

    def put(self, value: torch.Tensor) -> None:
        self._wrapped.put(value if self._prompt is None else self._prompt.cpu())
        self._prompt = None

    def end(self) -> None:
        self._wrapped.end()
