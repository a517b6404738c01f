"""Find the videos and images in a call to a Hugging Face model, together with their placeholders in the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.language import Place, PrunedPrompt, prune_prompt
from evoprune.vision import Encoded

VISION_ARGUMENTS = {True: ("pixel_values_videos", "video_grid_thw"), False: ("pixel_values", "image_grid_thw")}


@dataclass(frozen=True)
class Visuals:
    """The videos and images to prune in a call."""

    places: list[list[Place]]  # input locations in each batch row; columns include padding
    pixels: torch.Tensor  # input patches in order of occurrence, `[patches, values]`
    grids: torch.Tensor  # size of each input in patches, int64 `[n, 3]`
    videos: tuple[bool, ...]  # whether each input is a video
    seconds: tuple[float, ...]  # time between each input's frame pairs, in seconds

    def prune(self, ids: torch.Tensor, encoded: Sequence[Encoded]) -> list[PrunedPrompt]:
        """Remove the pruned tokens from each row of a batch of prompts, int64 `[B, L]`.

        Args:
            encoded: The encoded videos and images.
        """
        left = iter(encoded)
        return [
            prune_prompt(row, places, list(islice(left, len(places))))
            for row, places in zip(ids.cpu(), self.places, strict=True)
        ]


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
