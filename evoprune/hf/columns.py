"""Remove pruned tokens from the arguments of a call to a Hugging Face model.

A column is a token position in a batch of prompts, and a call is a dict with the keyword arguments of `forward` or `generate`.
M-RoPE positions still refer to the unpruned prompt, so they have gaps after pruning. Attention masks are built from each token's
index within its row, which has no gaps.

The remaining columns are right-aligned, so that all rows still end where the answer begins. Rows with fewer remaining columns are
padded on the left, and unneeded padding is removed. Callbacks passed to `generate` still receive the token IDs of the unpruned
prompt.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import pad

from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.language import Place, PrunedPrompt, prune_prompt
from evoprune.methods import arange_on
from evoprune.vision import Encoded

VISION_ARGUMENTS = {True: ("pixel_values_videos", "video_grid_thw"), False: ("pixel_values", "image_grid_thw")}
PAST = "evoprune"  # KV cache attribute, which is inherited by copies of the cache


@dataclass(frozen=True, repr=False)
class Columns:
    """Maps the columns of a pruned batch to columns of the original batch.

    Columns of the pruned batch are called places, to distinguish them from columns of the original batch.
    """

    # int64 `[B, C]`, which maps each place to its original column. Each row starts with padding (-1), followed by the remaining
    # columns in ascending order.
    index: torch.Tensor
    width: int  # number of columns in the unpruned batch

    @classmethod
    def of(cls, left: Sequence[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None = None) -> "Columns":
        """Right-align each row's remaining columns, using only as many places as needed for the longest row.

        Args:
            left: One tensor per row, listing the remaining columns in ascending order, int64 `[n]`.
            ids: Token IDs of the unpruned batch, int64 `[B, L]`.
            mask: The attention mask `[B, L]`, which is 0 at padding, or None if there is no padding. Padding before a row's first
                token is removed if it would take more places than needed for the longest row.
        """
        needed = left
        if mask is not None:
            padding = (mask.cumsum(1) == 0).sum(1).tolist()
            needed = [columns[columns >= first] for columns, first in zip(left, padding, strict=True)]
        places = max(1, *map(len, needed))
        return cls(_right_aligned(left, places, -1).to(ids.device), ids.shape[1])

    def __repr__(self) -> str:
        return f"<Columns: {self.places:,} of {self.width:,} in a batch of {len(self.index)}>"

    @property
    def places(self) -> int:
        """Number of columns in the pruned batch (C)."""
        return self.index.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any row is padded to the length of the longest row."""
        return bool((self.index < 0).any())

    def take(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Select the tensor entries that correspond to the remaining columns.

        Args:
            x: A tensor with one entry per column of the unpruned batch, `[..., B or 1, width]`.
            fill: The padding value.

        Returns:
            A tensor with one entry per column of the pruned batch, `[..., B, C]`.
        """
        index = self.index.to(x.device)
        x = x.expand(*x.shape[:-2], len(index), -1)
        return x.gather(-1, index.clamp(min=0).expand(*x.shape[:-1], -1)).masked_fill(index < 0, fill)

    def following(self, width: int) -> "Columns":
        """Return a copy with new columns appended for a batch that has grown to `width` columns."""
        more = arange_on(width, self.index.device)[self.width :]
        return Columns(torch.cat([self.index, more.expand(len(self.index), -1)], 1), width)

    def first(self, places: int) -> "Columns":
        """Return a copy cropped to the first `places` columns of the pruned batch.

        The copy's width includes the pruned columns between its last remaining column and the next one.

        Raises:
            UsageError: If the rows would be cropped at different columns of the unpruned batch.
        """
        ends = self.index[:, places].unique()
        if len(ends) > 1:
            hint = "crop the cache of each prompt separately"
            raise UsageError("the KV cache was cropped in the middle of a padded batch", hint)
        return Columns(self.index[:, :places], int(ends))

    def repeated(self, times: int) -> "Columns":
        """Repeat each row `times` times, for beam search or multiple answers per prompt."""
        return Columns(self.index.repeat_interleave(times, 0), self.width)


def _right_aligned(rows: Sequence[torch.Tensor], places: int, fill: float) -> torch.Tensor:
    """Stack rows of varying lengths into a tensor `[B, places]`, cropping or padding each row on the left."""
    return torch.stack([pad(row, (places - len(row), 0), value=fill) for row in rows])  # negative padding crops a row


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


@dataclass(frozen=True)
class Visuals:
    """The videos and images to prune in a call."""

    places: list[list[Place]]  # input locations in each batch row; columns include padding
    pixels: torch.Tensor  # input patches in order of occurrence, `[patches, values]`
    grids: torch.Tensor  # size of each input in patches, int64 `[n, 3]`
    videos: tuple[bool, ...]  # whether each input is a video
    seconds: tuple[float, ...]  # time between each input's frame pairs, in seconds


@dataclass(frozen=True)
class Past:
    """Information about a pruned prompt needed for later calls with the same KV cache."""

    columns: Columns  # prompt columns that remain after pruning
    # int64 `[B, L]`, one value per prompt column. If the prompt is cropped right after a column, the position of a later token is
    # that column's value plus the number of preceding tokens.
    delta: torch.Tensor
    sizes: torch.Tensor | None = None  # cluster sizes of the remaining columns, float32 `[B, C]`; None if all are 1

    def cropped(self, length: int) -> "Past":
        """Return the `Past` for the same KV cache after cropping to `length` columns.

        If the cache still contains the entire prompt, this returns the object itself.
        """
        if length >= self.columns.places:
            return self
        columns = self.columns.first(length)
        sizes = None if self.sizes is None else self.sizes[:, :length]
        return Past(columns, self.delta[:, : columns.width], sizes)


def remember(past: Past | None, results: Iterable[Any]) -> None:
    """Attach `past` to the KV cache in a call's results, so that later calls with this cache can find it."""
    for cache in results:
        if past is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, PAST, past)


def find_visuals(model, call: dict, pictures: bool) -> Visuals:
    """Find the videos in a call with a new prompt, and also the images if `pictures` is True.

    Raises:
        UsageError: If the videos or images don't match the prompt.
    """
    kinds = [
        video for video in (True, False) if call.get(VISION_ARGUMENTS[video][0]) is not None and (video or pictures)
    ]
    for video in kinds:
        _check_placeholders(model, call, video)
    grids = call.get("video_grid_thw")
    if grids is not None and len(interface.seconds_per_pair(call)) != len(grids):
        raise UsageError(
            "second_per_grid_ts does not have one value per video", "pass everything that the processor returned"
        )
    places = []
    pruned = []
    for ids, inputs in zip(call["input_ids"].tolist(), interface.placed_inputs(model, call, None), strict=True):
        inputs = [each for each in inputs if each.is_video in kinds]
        places.append([_with_times(each.place, ids, model.config.vision_end_token_id) for each in inputs])
        pruned += inputs
    videos = tuple(each.is_video for each in pruned)
    seconds = tuple(each.seconds_per_pair for each in pruned)
    pixels, grids = ({video: call[VISION_ARGUMENTS[video][i]] for video in kinds} for i in (0, 1))
    if len(kinds) == 1:
        (only,) = kinds
        return Visuals(places, pixels[only], grids[only], videos, seconds)
    patches = {video: pixels[video].split(grids[video].prod(-1).tolist()) for video in kinds}
    parts = {video: iter(zip(patches[video], grids[video], strict=True)) for video in kinds}
    pixels, grids = zip(*(next(parts[video]) for video in videos), strict=True)
    return Visuals(places, torch.cat(pixels), torch.stack(grids), videos, seconds)


def _with_times(place: Place, ids: list[int], end_marker: int) -> Place:
    """Extend a video's location in the prompt to include the timestamps and markers around its frame pairs.

    In a video with timestamps, each frame pair is a separate run of placeholders. Its timestamp is located between the end marker
    of the previous run and its own start marker. The first timestamp has no preceding end marker, so it is found by searching
    backward for the first token of the second timestamp. `ids` contains the token IDs of the entire row.
    """
    runs = place.runs
    if len(runs) == 1:
        return place
    around = []
    before = ids[: runs[0].start]
    time = ids[runs[0].stop + 1]
    start = max((at for at, token in enumerate(before) if token == time), default=len(before) - 1)
    for run in runs:
        if ids[run.stop] == end_marker:
            around.append(range(start, run.stop + 1))
        else:
            around.append(run)
        start = run.stop + 1
    return Place(runs, tuple(around))


def _check_placeholders(model, call: dict, video: bool) -> None:
    """Raise UsageError if the number of video or image placeholders in the prompt doesn't match the grids."""
    name = interface.PREFIXES[video]
    grids = call.get(f"{name}_grid_thw")
    found = int((call["input_ids"] == getattr(model.config, f"{name}_token_id")).sum())
    units = 0
    if grids is not None:
        units = int(grids.prod(-1).sum()) // model.config.vision_config.spatial_merge_size**2
    if not units or units != found:
        problem = f"input_ids have {found} {name} tokens, but {name}_grid_thw needs {units}"
        raise UsageError(problem, interface.ONE_CALL)


def unsupported_reason(model, call: dict, generating: bool, optional: bool) -> UsageError | None:
    """Return an error explaining why evoprune cannot run a call with a new prompt and videos, or None if it can.

    Args:
        optional: Whether the model's own code could run the call instead and produce the same result.
    """
    visual = model.model.visual
    given = [call.get(name) for name in ("pixel_values_videos", "pixel_values")]
    if call.get(interface.ENCODED) or given == [None, None]:
        return UsageError(
            f"the inputs in {interface.ENCODED} are already encoded", "pass the processor's pixels instead"
        )
    # Weights require gradients by default, even in eval mode, where gradients are rarely needed. In those rare cases, `backward`
    # raises an error.
    training = visual.training or optional
    traced = any(pixels is not None and pixels.requires_grad for pixels in given)
    if torch.is_grad_enabled() and (traced or (training and trained_weights(visual))):
        return no_gradients()
    ids = call.get("input_ids")
    if ids is None or call.get("inputs_embeds") is not None:
        hint = "pass input_ids, which contain the video's tokens"
        return UsageError("inputs_embeds together with a video cannot be pruned", hint)
    per_column = ("attention_mask", *interface.PER_COLUMN)
    for name in ("input_ids", *per_column, "position_ids", "video_grid_thw", "image_grid_thw"):
        if not isinstance(call.get(name), torch.Tensor | None):
            hint = "call the processor with return_tensors='pt'"
            return UsageError(f"{name} is of class {type(call[name]).__name__}, not a tensor", hint)
    if ids.ndim != 2:
        return UsageError(f"input_ids has shape {list(ids.shape)}, not [prompts, columns]", "pass input_ids[None]")
    for name in (*per_column, "position_ids"):
        # The shape of `position_ids` varies, so compare only the last dimension.
        compared = slice(-1, None) if name == "position_ids" else slice(None)
        if call.get(name) is not None and call[name].shape[compared] != ids.shape[compared]:
            shapes = f"shape {list(call[name].shape)} of {name} does not match {list(ids.shape)} of input_ids"
            return UsageError(shapes, "pass a value for each column of the whole prompt")
    if _has_packed_sequences(call):
        return UsageError("several sequences packed into one row cannot be pruned", "pass them as rows of a batch")
    if generating:
        return None
    shape = ids.shape
    known = {"input_ids", "attention_mask", "position_ids", *interface.PER_COLUMN, *interface.VISION_INPUTS}
    for name, value in call.items():
        per_column = isinstance(value, torch.Tensor) and value.shape[:2] == shape and name not in known
        if per_column or name.startswith("cu_seq_lens"):
            return UsageError(
                f"{name} cannot be combined with a pruned prompt", "leave it out, or remove the pruning first"
            )
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        return UsageError("logits_to_keep as indices would select wrong columns", "pass a number of last columns, or 0")
    return None


def _has_packed_sequences(call: dict) -> bool:
    """Return True if a batch row contains multiple packed sequences, based on the text indices in `position_ids`."""
    at = call.get("position_ids")
    mask = call.get("attention_mask")
    if at is None or len(at) != 4 or at.ndim != 3 or not (mask is None or mask.all()):
        return False
    return not torch.equal(at[0], arange_on(at.shape[2], at.device).expand_as(at[0]))


def without_pruned(
    model, call: dict, visuals: Visuals, encoded: Sequence[Encoded], positions: str, generating: bool
) -> tuple[dict, Past]:
    """Remove the pruned columns from a call with a new prompt.

    Args:
        encoded: The encoded videos and images, in the order of `visuals`.
        positions: How to compute positions ("qwen" or "host"). Ignored if the call has `position_ids`.

    Returns:
        A tuple of the new call and the `Past` to attach to its KV cache.

    Raises:
        UsageError: See `interface.encoded_inputs`.
    """
    ids = call["input_ids"]
    mask = call.get("attention_mask")
    if mask is None and generating:
        mask = interface.inferred_mask(model, call)
    used = interface.mask_or_ones(ids, mask)
    left = iter(encoded)
    prompts = [
        prune_prompt(row, places, list(islice(left, len(places))))
        for row, places in zip(ids.cpu(), visuals.places, strict=True)
    ]
    # If all tokens are kept, keep the padding as well, so that the results are the same as without pruning.
    prunes = any(len(prompt) < ids.shape[1] for prompt in prompts)
    padding = mask if prunes else None
    columns = Columns.of([prompt.columns for prompt in prompts], ids, padding)
    pruned_call = {name: value for name, value in call.items() if name not in interface.VISION_INPUTS}
    pruned_call["input_ids"] = columns.take(ids, interface.pad_id(model, call))
    if mask is not None or columns.padded:
        pruned_call["attention_mask"] = columns.take(used)
    if call.get("mm_token_type_ids") is not None:
        pruned_call["mm_token_type_ids"] = columns.take(call["mm_token_type_ids"])
    pruned_call |= _targets(call, columns, interface.mask_or_ones(ids, padding))
    at = _positions(model, call, mask, positions, generating)
    pruned_call["position_ids"] = columns.take(at)
    if len(at) == 4:
        pruned_call["position_ids"][0] = interface.text_positions(columns.take(used))
    trained = trained_weights(model.model.visual)
    features_of = {True: [], False: []}  # features of videos (True) and images (False)
    for each, is_video in zip(encoded, visuals.videos, strict=True):
        features = each.features
        if (
            trained and torch.is_grad_enabled()
        ):  # models in eval mode are rarely trained, so raise an error only in `backward`
            features = _NoGradients.apply(features, trained[0])
        features_of[is_video].append((features, each.deepstack))
    pruned_call |= interface.encoded_inputs(model, call, features_of[True], features_of[False] or None)
    furthest = at[-3:].amax(0).masked_fill(used == 0, -1).cummax(1).values
    return pruned_call, Past(columns, furthest + 1 - used.cumsum(1), _sizes(prompts, columns))


def _targets(call: dict, columns: Columns, used: torch.Tensor) -> dict:
    """Return the labels of the remaining columns, as `labels` or `shift_labels`, depending on the arguments of the call.

    Each remaining column predicts the token in the next remaining column. `labels` contains the token in the same column, whereas
    `shift_labels` contains the token in the next column.

    Args:
        used: The attention mask `[B, L]`, which is 0 at padding. Padding has no labels, because its length depends on the number of
            columns pruned from other rows.
    """
    first = columns.take(used).cumsum(1)[:, :-1] == 0
    targets = {}
    for name, shifted in (("labels", 0), ("shift_labels", 1)):
        if (given := call.get(name)) is None:
            continue
        labels = columns.take(pad(given, (shifted, 0), value=-100)[:, : columns.width], -100)
        labels[:, 1:].masked_fill_(first.to(labels.device), -100)
        targets[name] = torch.cat([labels[:, shifted:], given[:, columns.width - shifted :]], 1)
    return targets


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
    return _right_aligned(rows, columns.places, 1)


def _positions(model, call: dict, mask: torch.Tensor | None, rule: str, generating: bool) -> torch.Tensor:
    """Return the M-RoPE positions of all columns in the unpruned prompt, int64 `[3 or 4, B, L]`.

    If there are four positions per column, the first one is the token's zero-based index in its row.
    """
    ids = call["input_ids"]
    used = interface.mask_or_ones(ids, mask)
    given = call.get("position_ids")
    if given is None and rule == "host":
        given = interface.model_positions(model, call, mask, generating)
    elif given is None:
        given = interface.qwen_positions(model, call, mask)
        if generating:
            given = torch.cat([interface.text_positions(used)[None], given])
    elif given.ndim == 2:
        given = given.expand(3, *ids.shape)
    return given.to(ids.device).expand(-1, *ids.shape)


def continued(model, call: dict, past: Past, length: int, generating: bool) -> dict:
    """Remove the pruned columns from a call that continues from a pruned prompt's KV cache.

    Args:
        past: The cache's `Past`, already cropped to the cache length (`Past.cropped`).
        length: Number of columns in the cache.
        generating: Whether this is a call to `generate`, whose token IDs and mask also cover the cached columns.

    Raises:
        UsageError: If the call has images, or its rows or columns don't match the unpruned prompt in the cache.
    """
    ids = call.get("input_ids")
    mask = call.get("attention_mask")
    if call.get("pixel_values") is not None or (generating and call.get("inputs_embeds") is not None):
        raise UsageError("only text can follow a pruned video in a KV cache", "pass the whole conversation again")
    new = call["inputs_embeds"] if ids is None else ids
    if len(new) % len(past.delta):
        problem = f"{len(new)} rows continue a KV cache of {len(past.delta)} prompts"
        raise UsageError(problem, "continue all rows, or pass the whole conversation")
    columns = past.columns.repeated(len(new) // len(past.columns.index))
    known = columns.width + length - columns.places
    if mask is not None:
        total = mask.shape[1]
    elif generating:
        total = new.shape[1]
    else:
        total = known + new.shape[1]
    if total <= known or (not generating and total != known + new.shape[1]):
        problem = f"{total} columns continue a KV cache that represents {known}"
        raise UsageError(problem, "count the pruned tokens of the video in ids and attention_mask too")
    columns = columns.following(total)
    if mask is None and generating:
        mask = interface.inferred_mask(model, call)
    used = mask
    if mask is None:
        used = torch.ones(len(new), total, dtype=torch.int64, device=new.device)
    pruned_call = {name: value for name, value in call.items() if name not in interface.VISION_INPUTS}
    if mask is not None or columns.padded:
        pruned_call["attention_mask"] = columns.take(used)
    if ids is not None and ids.shape[1] == total:
        pruned_call["input_ids"] = columns.take(ids, interface.pad_id(model, call))
    for name, fill in interface.PER_COLUMN.items():
        if call.get(name) is not None and call[name].shape[1] == total:
            pruned_call[name] = columns.take(call[name], fill)
    at = call.get("position_ids")
    if at is None:
        delta = past.delta[:, -1:].to(new.device).repeat_interleave(len(new) // len(past.delta), 0)
        at = (interface.text_positions(used) + delta).expand(3, -1, -1)
        pruned_call["position_ids"] = columns.take(at) if generating else at[..., known:]
    elif at.shape[-1] == total:
        pruned_call["position_ids"] = columns.take(at)
    return pruned_call


def no_gradients() -> UsageError:
    hint = "to train only the language model: model.model.visual.requires_grad_(False)"
    return UsageError("the vision tower has no gradients while it prunes", hint)


def trained_weights(visual) -> list[torch.Tensor]:
    return [weight for weight in visual.parameters() if weight.requires_grad]


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise no_gradients()
