"""Remove pruned tokens from a call to a Hugging Face model: parse the call, change the batch of prompts, and write it back.

A call is a dict with the keyword arguments of `forward` or `generate`. `Batch.of` and `Batch.of_prompt` parse it, `without_pruned`
and `continued` change the batch, and `Batch.into` writes it back. See `Columns` for the columns of a batch.

M-RoPE positions still refer to the unpruned prompt, so they have gaps after pruning. Attention masks are built from each token's
index within its row, which has no gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.hf.columns import Columns, Past, right_aligned
from evoprune.hf.supported import no_gradients, trained_weights
from evoprune.hf.visuals import Visuals
from evoprune.language import PrunedPrompt
from evoprune.vision import Encoded

NO_TARGET = interface.PER_COLUMN["labels"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """The arguments of a call that have one value per column, for B rows of L columns.

    If a call continues from a KV cache, each argument covers either all columns, including the cached columns, or only the new
    columns. `generate` always receives all token IDs.
    """

    given: torch.Tensor  # the token IDs, int64 `[B, L]`, or the embeddings, `[B, L, hidden]`
    ids: torch.Tensor | None  # None if the call has embeddings
    mask: torch.Tensor | None  # attention mask `[B, L]`, 0 at padding; None if there is no padding
    positions: (
        torch.Tensor | None
    )  # M-RoPE positions `[3 or 4, B, L]`, where the first of 4 is the token's index in its row
    types: torch.Tensor | None  # `mm_token_type_ids`
    labels: torch.Tensor | None  # the tokens to predict in each column
    shift_labels: torch.Tensor | None  # the tokens to predict in the next column
    pad_id: int
    generating: bool  # whether this is a call to `generate`

    @classmethod
    def of(cls, model, call: dict, generating: bool) -> "Batch":
        """Parse a call. `generate` infers the mask if the call has none."""
        ids = call.get("input_ids")
        mask = call.get("attention_mask")
        if mask is None and generating and ids is not None:
            mask = interface.inferred_mask(model, call)
        return cls(
            given=call["inputs_embeds"] if ids is None else ids,
            ids=ids,
            mask=mask,
            positions=call.get("position_ids"),
            types=call.get("mm_token_type_ids"),
            labels=call.get("labels"),
            shift_labels=call.get("shift_labels"),
            pad_id=interface.pad_id(model, call),
            generating=generating,
        )

    @classmethod
    def of_prompt(cls, model, call: dict, rule: str, generating: bool) -> "Batch":
        """Parse a call with a new prompt that has token IDs, and compute the positions if they aren't given.

        Args:
            rule: How to compute positions ("qwen" or "host").
        """
        batch = cls.of(model, call, generating)
        positions = batch.positions
        if positions is None and rule == "host":
            positions = interface.model_positions(model, call, batch.mask, generating)
        elif positions is None:
            positions = interface.qwen_positions(model, call, batch.mask)
            if generating:
                indices = interface.text_positions(batch.mask_of(batch.ids.shape[1]))
                positions = torch.cat([indices[None], positions])
        elif positions.ndim == 2:
            positions = positions.expand(3, *batch.ids.shape)
        return replace(batch, positions=positions.to(batch.ids.device).expand(-1, *batch.ids.shape))

    def mask_of(self, width: int) -> torch.Tensor:
        """Return the attention mask, or a mask of ones for `width` columns if the call has no mask."""
        if self.mask is not None:
            return self.mask
        return torch.ones(len(self.given), width, dtype=torch.int64, device=self.given.device)

    def take(self, columns: Columns) -> "Batch":
        """Return the batch with only the remaining columns. Arguments that cover only new columns don't change."""

        def left(x: torch.Tensor | None, fill: int = 0) -> torch.Tensor | None:
            return x if x is None or x.shape[-1] != columns.width else columns.take(x, fill)

        mask = self.mask
        if mask is None and columns.padded:
            mask = self.mask_of(columns.width)
        return replace(
            self,
            ids=left(self.ids, self.pad_id),
            mask=left(mask),
            positions=left(self.positions),
            types=left(self.types),
            labels=left(self.labels, NO_TARGET),
            shift_labels=left(self.shift_labels, NO_TARGET),
        )

    def into(self, call: dict) -> dict:
        """Return the arguments of a call with the values of this batch, and without videos and images."""
        values = {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "mm_token_type_ids": self.types,
            "labels": self.labels,
            "shift_labels": self.shift_labels,
        }
        call = {name: value for name, value in call.items() if name not in interface.VISION_INPUTS}
        return call | {name: value for name, value in values.items() if value is not None}


def without_pruned(batch: Batch, prompts: Sequence[PrunedPrompt]) -> tuple[Batch, Past]:
    """Remove the pruned columns from a batch of new prompts.

    Args:
        batch: The result of `Batch.of_prompt`.
        prompts: The pruned prompt of each row.

    Returns:
        A tuple of the pruned batch and the `Past` to attach to its KV cache.
    """
    width = batch.ids.shape[1]
    # If all tokens are kept, keep the padding as well, so that the results are the same as without pruning.
    prunes = any(len(prompt) < width for prompt in prompts)
    columns = Columns.of([prompt.columns for prompt in prompts], batch.ids, batch.mask if prunes else None)
    used = batch.mask_of(width)
    pruned = batch.take(columns)
    positions = pruned.positions
    if len(positions) == 4:
        positions = torch.cat([interface.text_positions(columns.take(used))[None], positions[1:]])
    starts = columns.take(used if prunes else torch.ones_like(batch.ids)).cumsum(1) == 0
    pruned = replace(
        pruned,
        positions=positions,
        labels=_labels(batch.labels, columns, starts),
        shift_labels=_shift_labels(batch.shift_labels, columns, starts),
    )
    furthest = batch.positions[-3:].amax(0).masked_fill(used == 0, -1).cummax(1).values
    return pruned, Past(columns, furthest + 1 - used.cumsum(1), _sizes(prompts, columns))


def _labels(labels: torch.Tensor | None, columns: Columns, starts: torch.Tensor) -> torch.Tensor | None:
    """Return the labels of the remaining columns. A column's label is its own token, which the previous column predicts.

    Args:
        starts: bool `[B, C]`, True at the padding of each row. Padding predicts nothing, because its length depends on the number
            of columns pruned from other rows.
    """
    if labels is None:
        return None
    labels = columns.take(labels, NO_TARGET)
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(starts[:, :-1].to(labels.device), NO_TARGET)], 1)


def _shift_labels(labels: torch.Tensor | None, columns: Columns, starts: torch.Tensor) -> torch.Tensor | None:
    """Return the labels of the remaining columns if a column's label is the token that it predicts.

    Each remaining column predicts the token in the next remaining column, and the last one predicts its original label.

    Args:
        starts: See `_labels`.
    """
    if labels is None:
        return None
    own = pad(labels, (1, 0), value=NO_TARGET)[:, : columns.width]
    return torch.cat([_labels(own, columns, starts)[:, 1:], labels[:, columns.width - 1 :]], 1)


def _sizes(prompts: Sequence[PrunedPrompt], columns: Columns) -> torch.Tensor | None:
    """Return the cluster sizes of the remaining columns, float32 `[B, C]`, or None if all are 1. Each prompt is one row."""
    if all(prompt.sizes is None for prompt in prompts):
        return None
    rows = []
    for prompt in prompts:
        sizes = prompt.sizes
        if sizes is None:
            sizes = torch.ones(len(prompt), dtype=torch.float32, device="cpu")
        rows.append(sizes.to(columns.index.device))
    return right_aligned(rows, columns.places, 1)


def continued(batch: Batch, past: Past, length: int) -> Batch:
    """Remove the pruned columns from a batch that continues from a pruned prompt's KV cache.

    Args:
        past: The cache's `Past`, already cropped to the cache length (`Past.cropped`).
        length: Number of columns in the cache.

    Raises:
        UsageError: If the rows or columns don't match the unpruned prompt in the cache.
    """
    rows, new = batch.given.shape[:2]
    if rows % len(past.delta):
        problem = f"{rows} rows continue a KV cache of {len(past.delta)} prompts"
        raise UsageError(problem, "continue all rows, or pass the whole conversation")
    times = rows // len(past.delta)
    known = past.columns.width + length - past.columns.places
    total = new if batch.generating else known + new
    if batch.mask is not None:
        total = batch.mask.shape[1]
    if total <= known or (not batch.generating and total != known + new):
        problem = f"{total} columns continue a KV cache that represents {known}"
        raise UsageError(problem, "count the pruned tokens of the video in ids and attention_mask too")
    if batch.positions is None:
        delta = past.delta[:, -1:].to(batch.given.device).repeat_interleave(times, 0)
        positions = (interface.text_positions(batch.mask_of(total)) + delta).expand(3, -1, -1)
        batch = replace(batch, positions=positions if batch.generating else positions[..., known:])
    return batch.take(past.columns.repeated(times).following(total))


def with_features(model, call: dict, visuals: Visuals, encoded: Sequence[Encoded]) -> dict:
    """Return the arguments for passing encoded videos and images to a call.

    Args:
        encoded: The encoded videos and images, in the order of `visuals`.

    Raises:
        UsageError: See `interface.encoded_inputs`.
    """
    trained = trained_weights(model.model.visual)
    features_of = {True: [], False: []}  # features of videos (True) and images (False)
    for each, is_video in zip(encoded, visuals.videos, strict=True):
        features = each.features
        if trained and torch.is_grad_enabled():
            # Models in eval mode are rarely trained, so raise an error only in `backward`.
            features = _NoGradients.apply(features, trained[0])
        features_of[is_video].append((features, each.deepstack))
    return interface.encoded_inputs(model, call, features_of[True], features_of[False] or None)


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise no_gradients()
