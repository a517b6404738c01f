"""The videos of a call, and its pictures where those are pruned too, in the order in which the prompt has them."""

from dataclasses import dataclass

import torch

from evoprune.errors import UsageError
from evoprune.huggingface import interface

NAMES = {True: ("pixel_values_videos", "video_grid_thw"), False: ("pixel_values", "image_grid_thw")}


@dataclass(frozen=True)
class Visuals:
    """What is pruned in a call."""

    columns: torch.Tensor  # bool `[B, L]`, the placeholders
    pixels: torch.Tensor  # `[patches, values]`, those of all, in the order of their placeholders
    grids: torch.Tensor  # int64 `[n, 3]`, in patches
    videos: tuple[bool, ...]  # of each, whether it is a video
    seconds: tuple[float, ...]  # of each, from one frame pair to the next

    def apart(self, features: list[interface.Features]) -> tuple[list[interface.Features], list[interface.Features]]:
        """The features of the videos, and of the pictures."""
        both = list(zip(features, self.videos, strict=True))
        return [each for each, video in both if video], [each for each, video in both if not video]


def find_visuals(model, call: dict, pictures: bool) -> Visuals:
    """The videos of a new prompt, and its pictures if those are pruned. Raises UsageError: they do not fit the prompt."""
    kinds = [video for video in (True, False) if call.get(NAMES[video][0]) is not None and (video or pictures)]
    columns = torch.zeros_like(call["input_ids"], dtype=torch.bool)
    for video in kinds:
        columns |= _placeholders(model, call, video)
    grids = call.get("video_grid_thw")
    if len(interface.seconds_per_pair(call)) != (0 if grids is None else len(grids)):
        raise UsageError("second_per_grid_ts are not one for each video", "pass all that the processor returned")
    pixels, grids = ({video: call[NAMES[video][i]] for video in kinds} for i in (0, 1))
    if len(kinds) == 1:
        (only,) = kinds
        seconds = interface.seconds_per_pair(call) if only else [1.0] * len(grids[only])
        return Visuals(columns, pixels[only], grids[only], (only,) * len(grids[only]), tuple(seconds))
    each = {
        video: iter(zip(pixels[video].split(grids[video].prod(-1).tolist()), grids[video], strict=True))
        for video in kinds
    }
    found = [pair for row in interface.visual_spans(model, call, None) for pair in row]
    ordered = [next(each[video]) for _, video in found]
    return Visuals(
        columns,
        torch.cat([patches for patches, _ in ordered]),
        torch.stack([grid for _, grid in ordered]),
        tuple(video for _, video in found),
        tuple(spans[0].seconds_per_pair for spans, _ in found),
    )


def empty_runs(model, call: dict, dropped: torch.Tensor) -> torch.Tensor:
    """`dropped`, bool `[B, L]`: columns of pruned tokens; with those of the time and markers of each frame pair that keeps none.

    The time stands between the end marker of one frame pair and the start marker of the next. Before the first pair it begins with
    the token with which it begins before the second.
    """
    leaves, ids = dropped.clone(), call["input_ids"]
    for row, found in enumerate(interface.visual_spans(model, call, None)):
        for spans in (spans for spans, _ in found if len(spans) > 1):
            ends = [span.start + span.tokens for span in spans]
            same = (ids[row, : spans[0].start] == ids[row, ends[0] + 1]).nonzero()
            starts = [int(same[-1]) if len(same) else spans[0].start - 1, *(end + 1 for end in ends)]
            for start, span, end in zip(starts, spans, ends, strict=False):
                marked = int(ids[row, end]) == model.config.vision_end_token_id
                leaves[row, start : end + 1] |= marked and bool(dropped[row, span.start : end].all())
    return leaves


def _placeholders(model, call: dict, video: bool) -> torch.Tensor:
    """The columns of the videos, or of the pictures: bool `[B, L]`."""
    token, name = (model.config.video_token_id, "video") if video else (model.config.image_token_id, "image")
    grids, columns = call.get(NAMES[video][1]), call["input_ids"] == token
    units = 0 if grids is None else int(grids.prod(-1).sum()) // model.config.vision_config.spatial_merge_size**2
    if not units or units != int(columns.sum()):
        raise UsageError(
            f"input_ids have {int(columns.sum())} {name} tokens, {NAMES[video][1]} makes {units}",
            "pass all that one call of the processor returned",
        )
    return columns
