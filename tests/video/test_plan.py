"""Plans keep every limit, whatever the video and the caps."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError, VideoError
from evoprune.model.config import FAMILIES, QWEN3
from evoprune.video.info import Video
from evoprune.video.plan import MAX_VISUAL_TOKENS, InputLimits, make_plan, smart_resize


def video(width=640, height=360, duration=60.0) -> Video:
    return Video(
        path="a.mp4", duration_s=duration, width=width, height=height, rotation_deg=0, codec="h264", pix_fmt="yuv420p",
        container="mp4", fps=25.0, variable_rate=False, frames_total=None, start_s=0.0, tags={},
    )  # fmt: skip


lengths = st.integers(1, 5000)
limits = st.builds(
    InputLimits,
    min_pixels=st.integers(1, 300).map(lambda n: n * 784),
    max_pixels=st.integers(300, 1000).map(lambda n: n * 784),
    fps=st.floats(0.1, 10),
    min_frames=st.integers(2, 8),
    max_frames=st.integers(8, 768),
)


@settings(max_examples=300, deadline=None)
@example(42, 42, 1.0, InputLimits(min_pixels=2352, max_pixels=235200, fps=1.0, min_frames=3, max_frames=8), 2, None)
@given(lengths, lengths, st.floats(0.05, 20_000), limits, st.integers(1, 30_000), st.none() | st.integers(1, 2000))
def test_every_limit_holds(width, height, duration, limit, cap, frames):
    assume(max(width, height) <= 200 * min(width, height))
    plan = make_plan(video(width, height, duration), limit, frames=frames, max_visual_tokens=cap)
    t, h, w = plan.grid
    assert plan.visual_tokens == t * h * w <= cap and min(plan.grid) >= 1
    assert (plan.height, plan.width) == (h * 28, w * 28) and plan.sampling.frames == 2 * t <= limit.max_frames
    if not plan.capped:
        assert (plan.height, plan.width) == smart_resize(height, width, limit.min_pixels, limit.max_pixels)
    if (
        plan.height * plan.width <= min(limit.min_pixels, limit.max_pixels) * 0.25
    ):  # rounding takes less than half a side
        # Frames get smaller than the model's smallest only where fewer of them would not be larger.
        alone = make_plan(video(width, height, duration), limit, frames=2, max_visual_tokens=cap)
        assert t == 1 or alone.height * alone.width <= plan.height * plan.width


@settings(max_examples=100, deadline=None)
@given(st.floats(1, 5000), st.integers(50, 20_000))
def test_a_higher_cap_never_shows_less(duration, cap):
    less, more = (make_plan(video(duration=duration), InputLimits(), max_visual_tokens=c) for c in (cap, cap * 2))
    assert less.sampling.frames <= more.sampling.frames
    assert less.visual_tokens <= more.visual_tokens or less.sampling.frames < more.sampling.frames


def test_frames_get_smaller_before_they_get_fewer():
    free = make_plan(video(1920, 1080), InputLimits(), max_visual_tokens=10**6)
    assert not free.capped and free.sampling.frames == 120
    smaller = make_plan(video(1920, 1080), InputLimits(), max_visual_tokens=60 * 200)
    assert smaller.capped and smaller.sampling.frames == free.sampling.frames and smaller.height < free.height
    fewer = make_plan(video(1920, 1080), InputLimits(), max_visual_tokens=60 * 50)
    assert fewer.sampling.frames < free.sampling.frames and fewer.height * fewer.width >= 100 * 784


def test_a_limit_on_frames_is_a_cap_too():
    plan = make_plan(video(), InputLimits(max_frames=50), frames=60)
    assert (plan.sampling.frames, plan.token_capped, plan.capped) == (50, False, True)


def test_an_hour_stays_within_the_default():
    plan = make_plan(video(1920, 1080, 3600), InputLimits())
    assert plan.visual_tokens <= MAX_VISUAL_TOKENS and plan.capped


def test_max_frames():
    assert make_plan(video(), InputLimits(), max_frames=7).sampling.frames == 6


def test_a_plan_names_its_limits():
    plan = make_plan(video(), InputLimits(max_frames=50), fps=1.0, max_visual_tokens=5000)
    assert (plan.sampling.wanted, plan.sampling.frames, plan.frame_limit, plan.token_limit) == (60, 50, 50, 5000)
    plan = make_plan(video(), InputLimits(max_frames=50), fps=1.0, max_frames=60, max_visual_tokens=5)
    assert (plan.sampling.wanted, plan.sampling.frames, plan.frame_limit, plan.capped) == (60, 2, 60, True)


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({}, {"max_visual_tokens": 0}, UsageError),
        ({}, {"fps": 1.0, "frames": 4}, UsageError),
        ({}, {"fps": 0.0}, UsageError),
        ({"duration": None}, {}, VideoError),
        ({"width": 5000, "height": 2}, {}, VideoError),
        ({}, {"start_s": 61.0}, VideoError),
    ],
)
def test_what_cannot_be_planned(changes, arguments, error):
    with pytest.raises(error):
        make_plan(video(**changes), InputLimits(), **arguments)


@pytest.mark.parametrize("size", [(480, 854), (1080, 1920), (96, 96), (333, 217), (64, 3000)])
@pytest.mark.parametrize("frames", [4, 32, 200, 768])
def test_frames_of_qwen3_have_the_size_that_its_processor_gives_them(size, frames):
    """With the cap of a frame, which is a setting of the processor."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized

    limits = InputLimits(**FAMILIES[QWEN3].video, patch_size=16)
    info = video(size[1], size[0], 1000.0)
    plan = make_plan(info, limits, frames=frames, max_visual_tokens=10**6)
    each = min(768 * 32 * 32, limits.max_pixels // frames)
    assert (plan.height, plan.width) == resized(frames, *size, 2, 32, limits.min_pixels, each * frames)
