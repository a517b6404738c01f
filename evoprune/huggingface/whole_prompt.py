"""What `generate` calls with ids while it runs is shown them as they would be had nothing been dropped from the prompt."""

from collections.abc import Callable
from copy import copy

import torch

from evoprune.huggingface import interface
from evoprune.huggingface.columns import with_whole_prompt


def showing_whole_prompts(model, call: dict, small: dict) -> dict:
    """The shortened call of `generate`, in which lengths count the tokens that were dropped, and everybody sees them."""
    prompt, places = call["input_ids"], small["input_ids"].shape[1]
    small = dict(small)
    for name in ("logits_processor", "stopping_criteria"):
        if small.get(name):
            told = copy(small[name])
            told[:] = [_ShownWholePrompts(one, prompt, places) for one in told]
            small[name] = told
    if (allowed := small.get("prefix_allowed_tokens_fn")) is not None:
        small["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, with_whole_prompt(prompt[row, None], places, ids[None])[0]
        )
    if small.get("streamer") is not None:
        small["streamer"] = _StreamedWholePrompt(small["streamer"], prompt)
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


class _ShownWholePrompts:
    """A logits processor or stopping criterion that is shown ids as they would be had nothing been dropped."""

    def __init__(self, told: Callable, prompt: torch.Tensor, places: int):
        self._told, self._prompt, self._places = told, prompt, places

    def __call__(self, input_ids, scores):
        return self._told(with_whole_prompt(self._prompt, self._places, input_ids), scores)

    def __getattr__(self, name: str):
        return getattr(self._told, name)


class _StreamedWholePrompt:
    """A streamer to which the prompt, which comes first, is put whole."""

    def __init__(self, told, prompt: torch.Tensor):
        self._told, self._prompt = told, prompt

    def put(self, value: torch.Tensor) -> None:
        self._told.put(value if self._prompt is None else self._prompt.cpu())
        self._prompt = None

    def end(self) -> None:
        self._told.end()
