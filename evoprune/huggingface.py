"""For people who already hold a Hugging Face model: its vision tower with pruning inside, on its processor's inputs."""

import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.pruning.budget import keep_count, parse_budget
from evoprune.vision.encoded import Encoded, joined
from evoprune.vision.encoder import encode as encode_video


def encode(
    model,
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    *,
    budget: float | str = 1.0,
    method: str = methods.DEFAULT,
    method_args: dict[str, str] | None = None,
    question: torch.Tensor | None = None,
    seconds_per_grid: float = 1.0,
    seed: int = 0,
) -> Encoded:
    """Runs the vision tower of `model` on one video or several, pruned to `budget` each.

    Args:
        model: a Hugging Face `Qwen2_5_VLForConditionalGeneration`, or anything with its `model.visual`.
        pixel_values_videos: `[patches, 1176]`, as the processor makes them.
        video_grid_thw: int64 `[videos, 3]`: grids, and patches down and across.
        budget: share of the visual tokens that is kept, a number in (0, 1] or a preset's name; 1.0 is the tower's own output.
        method, method_args: name of a pruning method, and its settings as texts.
        question: `[Q, hidden]`, `model.get_input_embeddings()` of the question's tokens, for methods that read it.
        seconds_per_grid, seed: for methods that ask for them.

    Returns:
        `Encoded`; `kept` and `owner` count units over all videos, in the order of the placeholder tokens.

    Raises:
        UsageError: a bad budget or method, one that acts on the frames themselves, one that reads a question that is not there, or
            patches that do not fit the grids.
    """
    share, rule = parse_budget(budget), methods.get(method, method_args)
    if rule.acts == "input":
        raise UsageError(
            f"method {method} acts on frames, and these are patches", "use VideoQA, or shrink the video first"
        )
    visual = model.model.visual
    merge = visual.config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in video_grid_thw.tolist()]
    sizes = [t * h * w * merge**2 for t, h, w in grids]
    if sum(sizes) != len(pixel_values_videos) or not sizes:
        raise UsageError(
            f"{len(pixel_values_videos)} patches do not fit video_grid_thw {video_grid_thw.tolist()}",
            "pass pixel_values_videos and video_grid_thw of one call of the processor",
        )
    return joined(
        [
            encode_video(
                visual, [patches], grid, rule, keep_count(share, len(patches) // merge**2),
                question=question, seconds_per_grid=seconds_per_grid, seed=seed,
            )
            for patches, grid in zip(pixel_values_videos.split(sizes), grids, strict=True)
        ]
    )  # fmt: skip
