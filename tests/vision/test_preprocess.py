"""Frames to patches: the resize, and Hugging Face's order and values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from evoprune.video.plan import smart_resize
from evoprune.vision.preprocess import CLIP_MEAN, CLIP_STD, patchify, resize

GREY_LEVEL = 1 / 255 / min(CLIP_STD)


def outcome(function, *args, **kwargs):
    """What it returns, or that it raised ValueError."""
    try:
        return tuple(function(*args, **kwargs))
    except ValueError:
        return "ValueError"


def noise(height: int, width: int, frames: int = 1, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=random)


def ramp(height: int, width: int) -> torch.Tensor:
    """One frame of three smooth gradients."""
    y, x = torch.linspace(0, 255, height)[:, None], torch.linspace(0, 255, width)[None]
    planes = [y.expand(height, width), x.expand(height, width), (x + y) / 2]
    return torch.stack(planes, -1)[None].round().to(torch.uint8)


def hf_patches(frame: torch.Tensor, smallest: int, largest: int) -> tuple[torch.Tensor, list[int]]:
    processor = hf.Qwen2VLImageProcessorPil(min_pixels=smallest, max_pixels=largest)
    made = processor(images=frame.numpy(), return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 400) | st.integers(1, 2_000_000),
    st.integers(0, 2_000_000),
    st.sampled_from([28, 32, 14]),
)
def test_smart_resize_is_hugging_faces(height, width, smallest, room, factor):
    limits = {"min_pixels": smallest, "max_pixels": smallest + room, "factor": factor}
    assert outcome(smart_resize, height, width, **limits) == outcome(hf.smart_resize, height, width, **limits)


@pytest.mark.parametrize(
    "size", [(1, 200), (1, 201), (200, 1), (201, 1), (14, 14), (42, 70), (13, 13), (28, 28), (720, 1280), (2160, 3840)]
)
@pytest.mark.parametrize("limits", [(3136, 12845056), (100352, 602112), (784, 784)])
def test_smart_resize_at_its_edges(size, limits):
    assert outcome(smart_resize, *size, *limits) == outcome(
        hf.smart_resize, *size, min_pixels=limits[0], max_pixels=limits[1]
    )


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-28, 28)])
def test_smart_resize_refuses_empty_frames(size):
    with pytest.raises(ValueError, match="must be positive"):
        smart_resize(*size, 3136, 100_000)


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (140, 112)])
def test_patches_of_a_still_image_are_hugging_faces(size):
    frame = noise(*size)
    theirs, grid = hf_patches(frame, 784, 10**6)
    assert grid == [1, size[0] // 14, size[1] // 14]
    torch.testing.assert_close(patchify(frame.repeat(2, 1, 1, 1)), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("frame", "limits"),
    [
        (noise(100, 150), (784, 10**6)),  # a little larger and smaller
        (noise(240, 320, seed=1), (784, 25 * 784)),  # down by far
        (noise(30, 41, seed=2), (40 * 784, 10**6)),  # up by far
        (ramp(90, 333), (784, 20 * 784)),
    ],
)
def test_resized_patches_are_hugging_faces_within_one_grey_level(frame, limits):
    height, width = smart_resize(*frame.shape[1:3], *limits)
    ours = patchify(resize(frame, height, width).repeat(2, 1, 1, 1))
    theirs, grid = hf_patches(frame, *limits)
    assert grid == [1, height // 14, width // 14]
    far = (ours - theirs).abs()
    assert far.max() <= GREY_LEVEL + 1e-5
    assert (far > 1e-3).float().mean() < 0.05  # and most pixels are the same


def test_resize_leaves_frames_of_the_right_size_alone():
    frames = noise(56, 84, frames=2)
    assert resize(frames, 56, 84) is frames


def test_resize_treats_every_frame_by_itself():
    frames = noise(60, 90, frames=3)
    together = resize(frames, 84, 56)
    assert together.dtype == torch.uint8 and together.shape == (3, 84, 56, 3)
    assert torch.equal(together, torch.cat([resize(frame[None], 84, 56) for frame in frames]))


def patches_by_hand(frames, mean, std, patch, temporal, merge):
    """Frame pair, unit row, unit column, row and column in the unit; then channel, frame, row, column."""
    f, h, w, channels = frames.shape
    unit = patch * merge
    pixels = frames.numpy().astype(np.float64) / 255
    rows = []
    for pair in range(f // temporal):
        for top in range(0, h, unit):
            for left in range(0, w, unit):
                for py in range(merge):
                    for px in range(merge):
                        y0, x0 = top + py * patch, left + px * patch
                        rows.append(
                            [
                                (pixels[pair * temporal + t, y0 + y, x0 + x, c] - mean[c]) / std[c]
                                for c in range(channels)
                                for t in range(temporal)
                                for y in range(patch)
                                for x in range(patch)
                            ]
                        )
    return torch.tensor(np.array(rows), dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((4, 28, 56), {}),
        ((6, 8, 12), {"patch": 2, "merge": 2}),
        ((3, 6, 12), {"patch": 2, "temporal": 1, "merge": 3}),
        ((4, 4, 8), {"patch": 4, "temporal": 4, "merge": 1, "mean": (0.1, 0.5, 0.9), "std": (1.0, 0.5, 2.0)}),
    ],
)
def test_patches_of_a_video_against_loops(shape, cut):
    frames = noise(shape[1], shape[2], frames=shape[0])
    whole = {"mean": CLIP_MEAN, "std": CLIP_STD, "patch": 14, "temporal": 2, "merge": 2} | cut
    torch.testing.assert_close(patchify(frames, **cut), patches_by_hand(frames, **whole), atol=1e-5, rtol=1e-5)


def test_patchify_does_not_change_its_input():
    frames = noise(28, 28, frames=2)
    before = frames.clone()
    patchify(frames)
    assert torch.equal(frames, before)
