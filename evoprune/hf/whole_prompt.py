"""Let a `generate` call with a pruned prompt look as if the prompt weren't pruned.

The result, callbacks, streamers, and length limits refer to the token IDs of the unpruned prompt.
"""

from collections.abc import Callable
from copy import copy

import torch

from evoprune.hf import interface


def with_whole_prompt(prompt: torch.Tensor, places: int, ids: torch.Tensor) -> torch.Tensor:
    """Replace the pruned prompt at the start of each row with the unpruned prompt.

    Args:
        prompt: The unpruned prompts, int64 `[B, L]`.
        places: Number of columns in the pruned prompts.
        ids: The pruned prompts and the subsequently generated tokens, int64 `[B * n, places + new]`.
    """
    prompt = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), 0)
    return torch.cat([prompt, ids[:, places:]], 1)


def with_whole_prompts(model, call: dict, pruned_call: dict) -> dict:
    """Adapt a `generate` call with a pruned prompt so that length limits and callbacks still refer to the unpruned prompt.

    Args:
        call: The call with the unpruned prompt.
        pruned_call: The same call with the pruned prompt.
    """
    prompt = call["input_ids"]
    places = pruned_call["input_ids"].shape[1]
    pruned_call = dict(pruned_call)
    for name in ("logits_processor", "stopping_criteria"):
        if pruned_call.get(name):
            wrapped = copy(pruned_call[name])
            wrapped[:] = [_WholePromptCallback(callback, prompt, places) for callback in wrapped]
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


class _WholePromptCallback:
    """Wraps a logits processor or a stopping criterion so that it receives the token IDs of the unpruned prompt."""

    def __init__(self, wrapped: Callable, prompt: torch.Tensor, places: int):
        self._wrapped = wrapped
        self._prompt = prompt
        self._places = places

    def __call__(self, input_ids, scores):
        return self._wrapped(with_whole_prompt(self._prompt, self._places, input_ids), scores)

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


class _WholePromptStreamer:
    """Wraps a streamer so that it receives the unpruned prompt instead of the pruned prompt."""

    def __init__(self, wrapped, prompt: torch.Tensor):
        self._wrapped = wrapped
        self._prompt = prompt

    def put(self, value: torch.Tensor) -> None:
        if self._prompt is not None:
            value = self._prompt.cpu()
            self._prompt = None
        self._wrapped.put(value)

    def end(self) -> None:
        self._wrapped.end()
