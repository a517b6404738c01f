"""The columns of a batch of prompts after each row loses some of its own.

The columns that are left of a row move together to the right, so that all rows still end where the answer begins. A row with fewer
columns than another gets padding at its start. Padding on the left that no row needs is removed.
Callbacks of `generate` get ids of the whole prompt.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch

from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.methods.types import ascending


@dataclass(frozen=True, repr=False)
class Columns:
    """The columns that are left of a batch."""

    # int64 `[B, C]`, for each place the column of the whole batch that it holds, ascending; -1 for padding, at the start.
    index: torch.Tensor
    width: int  # number of columns of the whole batch

    @classmethod
    def without(cls, dropped: torch.Tensor, mask: torch.Tensor | None = None) -> "Columns":
        """All columns that are not dropped, in as few places as the longest row needs.

        `dropped`: bool `[B, L]`. `mask`: `[B, L]`, 0 at padding; None without padding. Padding before a row's first token is
        removed where it needs more places than the longest row.
        """
        stays, width = ~dropped, dropped.shape[1]
        needed = stays if mask is None else stays & (mask.cumsum(1) > 0)
        places = max(1, int(needed.sum(1).max()))
        from_the_end = stays.flip(1).cumsum(1).flip(1)
        # Columns without a place go to an extra place at the front, which is cut off.
        place = torch.where(stays, (places + 1 - from_the_end).clamp(min=0), 0)
        index = torch.full((len(dropped), places + 1), -1, dtype=torch.int64, device=dropped.device)
        index.scatter_(1, place, ascending(width, dropped.device).expand_as(place))
        return cls(index[:, 1:], width)

    def __repr__(self) -> str:
        return f"<Columns: {self.places:,} of {self.width:,} in a batch of {len(self.index)}>"

    @property
    def places(self) -> int:
        """C, the number of places."""
        return self.index.shape[1]

    @property
    def padded(self) -> bool:
        """Whether a row has padding, because it has fewer columns left than another."""
        return bool((self.index < 0).any())

    def take(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """The columns of `x` (`[..., B or 1, width]`) that are left: `[..., B, C]`, with `fill` at padding."""
        index = self.index.to(x.device)
        x = x.expand(*x.shape[:-2], len(index), -1)
        return x.gather(-1, index.clamp(min=0).expand(*x.shape[:-1], -1)).masked_fill(index < 0, fill)

    def following(self, width: int) -> "Columns":
        """The columns of the batch continued up to `width` columns, without further drops."""
        more = ascending(width, self.index.device)[self.width :]
        return Columns(torch.cat([self.index, more.expand(len(self.index), -1)], 1), width)

    def first(self, places: int) -> "Columns":
        """The columns before place `places`, and dropped ones just before it. Raises UsageError: rows differ in where that is."""
        ends = self.index[:, places].unique()
        if len(ends) > 1:
            hint = "cut those of each prompt on its own"
            raise UsageError("past_key_values were cut in the middle of a padded batch", hint)
        return Columns(self.index[:, :places], int(ends))

    def repeated(self, times: int) -> "Columns":
        """Each row repeated `times` times, for beams or several answers to a prompt."""
        return Columns(self.index.repeat_interleave(times, 0), self.width)


def with_whole_prompt(prompt: torch.Tensor, places: int, ids: torch.Tensor) -> torch.Tensor:
    """int64 `[B * n, L + new]`: `ids`, `[B * n, places + new]`, with the whole `prompt`, `[B, L]`, for the pruned one."""
    prompt = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), 0)
    return torch.cat([prompt, ids[:, places:]], 1)


def with_whole_prompts(model, call: dict, pruned_call: dict) -> dict:
    """The call of `generate` on a pruned prompt, in which lengths and callbacks refer to the whole prompt, that of `call`."""
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
