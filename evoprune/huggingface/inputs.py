"""Calls of a Hugging Face model without the columns of what was pruned: its own arguments in, its own arguments out.

A call is a dict of arguments of `forward` or `generate` by name. Positions are those of the whole prompt, so they keep their
gaps; only the running number of each token, by which attention masks are made, closes up.
"""

from dataclasses import dataclass
from itertools import islice

import torch

from evoprune.errors import UsageError
from evoprune.huggingface import interface
from evoprune.huggingface.columns import Columns
from evoprune.vision.encoded import Encoded


@dataclass(frozen=True)
class Past:
    """What is to be known of a cache whose prompt was pruned, to go on from it.

    Attributes:
        columns: what is left of the prompt.
        delta: int64 `[B, L]`, for each column of the prompt, were it the last: added to the number of tokens before a later one it
            gives that one's position.
        counts: float32 `[B, C]`, as how many attention counts each of the columns left; None for one each.
    """

    columns: Columns
    delta: torch.Tensor
    counts: torch.Tensor | None = None

    def held(self, length: int) -> "Past":
        """The same of a cache of `length` columns; behind the prompt there may be any others."""
        if length >= self.columns.places:
            return self
        columns = self.columns.first(length)
        counts = None if self.counts is None else self.counts[:, :length]
        return Past(columns, self.delta[:, : columns.width], counts)


def check_prompt(model, call: dict, generating: bool) -> torch.Tensor:
    """Which columns of a call, to `generate` or by hand, are video placeholders: bool `[B, L]`.

    Raises:
        UsageError: the videos and the prompt do not fit together, or something cannot go with the pruned prompt.
    """
    ids, mask, grids = call.get("input_ids"), call.get("attention_mask"), call.get("video_grid_thw")
    if ids is None or call.get("inputs_embeds") is not None:
        raise UsageError("inputs_embeds beside a video cannot be pruned", "pass input_ids, in which the video is seen")
    if mask is not None and mask.shape != ids.shape:
        raise UsageError(
            f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}", "pass the processor's own mask"
        )
    video = ids == model.config.video_token_id
    units = 0 if grids is None else int(grids.prod(-1).sum()) // model.config.vision_config.spatial_merge_size**2
    if not units or units != int(video.sum()):
        raise UsageError(
            f"input_ids have {int(video.sum())} video tokens, video_grid_thw makes {units}",
            "pass all that one call of the processor returned",
        )
    if len(interface.seconds_per_grid(call)) != len(grids):
        raise UsageError("second_per_grid_ts are not one for each video", "pass all that the processor returned")
    if not generating:
        _check_arguments(call)
    return video


def _check_arguments(call: dict) -> None:
    """Raises UsageError if a call by hand has what is meant for its columns but cannot go with them."""
    shape = call["input_ids"].shape
    known = {"input_ids", "attention_mask", "position_ids", *interface.PER_COLUMN, *interface.VISION_INPUTS}
    for name, value in call.items():
        per_column = isinstance(value, torch.Tensor) and value.shape[:2] == shape and name not in known
        if per_column or name.startswith("cu_seq_lens"):
            raise UsageError(f"{name} cannot go with a pruned prompt", "leave it out, or remove the pruning first")
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        raise UsageError("logits_to_keep as indices would miss their columns", "pass how many at the end, or 0")


def without_pruned(
    model, call: dict, video: torch.Tensor, encoded: Encoded, positions: str, generating: bool
) -> tuple[dict, Past]:
    """The call without what was pruned from its videos.

    Args:
        call: a new prompt; it is left as it is.
        video: from `check_prompt`.
        encoded: all its videos.
        positions: "host" or "qwen"; those of the call come first.
        generating: whether this is for `generate`.

    Returns:
        The call, and what its cache will have to remember.

    Raises:
        UsageError: packed sequences.
    """
    ids, mask = call["input_ids"], call.get("attention_mask")
    if mask is None and generating:
        mask = interface.inferred_mask(model, call)
    used = torch.ones_like(ids) if mask is None else mask
    pruned = torch.ones(len(encoded.owner), dtype=torch.bool, device=ids.device)
    pruned[encoded.kept.to(ids.device)] = False
    columns = Columns.without(torch.zeros_like(video).masked_scatter(video, pruned), mask)
    small = {name: value for name, value in call.items() if name not in interface.VISION_INPUTS}
    small["input_ids"] = columns.take(ids, interface.pad_id(model, call))
    if mask is not None or columns.padded:
        small["attention_mask"] = columns.take(used)
    small |= {n: columns.take(call[n], fill) for n, fill in interface.PER_COLUMN.items() if call.get(n) is not None}
    if small.get("labels") is not None:  # no padding foretells a row's first token
        small["labels"][:, 1:].masked_fill_(columns.index[:, :-1].to(small["labels"].device) < 0, -100)
    at = _positions(model, call, mask, positions, generating)
    small["position_ids"] = columns.take(at)
    if len(at) == 4:
        small["position_ids"][0] = interface.text_positions(columns.take(used))
    small[interface.ENCODED] = _encoded(model, call, encoded)
    furthest = at[-3:].amax(0).masked_fill(used == 0, -1).cummax(1).values
    return small, Past(columns, furthest + 1 - used.cumsum(1), _counts(video, columns, encoded))


def _counts(video: torch.Tensor, columns: Columns, encoded: Encoded) -> torch.Tensor | None:
    """Of the columns that are left, float32 `[B, C]`; None for one each."""
    if encoded.size is None:
        return None
    units = torch.ones(len(encoded.owner), device=video.device)
    units[encoded.kept.to(video.device)] = encoded.size.to(video.device)
    return columns.take(torch.ones(video.shape, device=video.device).masked_scatter(video, units), 1)


def _positions(model, call: dict, mask: torch.Tensor | None, rule: str, generating: bool) -> torch.Tensor:
    """Of every column of the whole prompt, `[3 or 4, B, L]`; the first of four is the running number."""
    ids = call["input_ids"]
    used = torch.ones_like(ids) if mask is None else mask
    given = call.get("position_ids")
    if given is None and rule == "host":
        given = interface.model_positions(model, call, mask, generating)
    elif given is None:
        given = interface.qwen_positions(model, call, mask)
        if generating:
            given = torch.cat([interface.text_positions(used)[None], given])
    elif given.ndim == 2:
        given = given.expand(3, *ids.shape)
    given = given.to(ids.device).expand(-1, *ids.shape)
    if len(given) == 4 and used.all() and not torch.equal(given[0], interface.text_positions(used)):
        raise UsageError("several sequences packed in a row cannot be pruned", "pass them as rows of a batch")
    return given


def _encoded(model, call: dict, encoded: Encoded) -> dict:
    """What the model would have made of videos and pictures; the latter it makes itself."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    per_pair = iter(encoded.kept_per_pair)
    tokens = [sum(islice(per_pair, grids)) for grids, _, _ in encoded.grids]
    video = BaseModelOutputWithPooling(pooler_output=encoded.features.split(tokens))
    found = (call.get(interface.ENCODED) or {}) | {"video": video}
    if call.get("pixel_values") is not None:
        found["image"] = model.get_image_features(call["pixel_values"], call["image_grid_thw"], return_dict=True)
    return found


def continued(model, call: dict, past: Past, length: int, generating: bool) -> dict:
    """The call that goes on from a cache of `length` columns.

    Args:
        past: of that cache, and no longer.
        generating: whether this is for `generate`, whose ids and mask cover what is in the cache too.

    Raises:
        UsageError: the mask does not cover what the cache stands for and what is new.
    """
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if call.get("pixel_values") is not None or (generating and call.get("inputs_embeds") is not None):
        raise UsageError("only text can follow a pruned video in past_key_values", "pass the whole conversation anew")
    new = call["inputs_embeds"] if ids is None else ids
    if len(new) % len(past.delta):
        raise UsageError(
            f"{len(new)} rows go on from past_key_values of {len(past.delta)} prompts",
            "go on with all rows, or with none",
        )
    columns = past.columns.repeated(len(new) // len(past.columns.index))
    known = columns.width + length - columns.places
    total = mask.shape[1] if mask is not None else new.shape[1] + (0 if generating else known)
    if total <= known or (not generating and total != known + new.shape[1]):
        raise UsageError(
            f"{total} columns go on from past_key_values that stand for {known}",
            "ids and attention_mask count the video's tokens that were pruned, as if they were there",
        )
    columns = columns.following(total)
    if mask is None and generating:
        mask = interface.inferred_mask(model, call)
    used = torch.ones(len(new), total, dtype=torch.int64, device=new.device) if mask is None else mask
    small = {name: value for name, value in call.items() if name not in interface.VISION_INPUTS}
    if mask is not None or columns.padded:
        small["attention_mask"] = columns.take(used)
    if ids is not None and ids.shape[1] == total:
        small["input_ids"] = columns.take(ids, interface.pad_id(model, call))
    for name, fill in interface.PER_COLUMN.items():
        if call.get(name) is not None and call[name].shape[1] == total:
            small[name] = columns.take(call[name], fill)
    at = call.get("position_ids")
    if at is None:
        delta = past.delta[:, -1:].to(new.device).repeat_interleave(len(new) // len(past.delta), 0)
        at = (interface.text_positions(used) + delta).expand(3, -1, -1)
        small["position_ids"] = columns.take(at) if generating else at[..., known:]
    elif at.shape[-1] == total:
        small["position_ids"] = columns.take(at)
    return small
