"""Tests that plans respect all limits for any video, and tests of the sampling times and of the formats for times."""

import math
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError, VideoError
from evoprune.model import FAMILIES
from evoprune.util import converted, option
from evoprune.video.info import Video
from evoprune.video.plan import (
    InputLimits,
    Plan,
    SamplingOptions,
    plan_sampling,
)

seconds, max_frames = st.floats(0.01, 1e5), st.integers(2, 800)


@settings(deadline=None)
@given(seconds, st.floats(1e-3, 1e3), st.integers(0, 50), max_frames)
def test_counts_by_fps_are_even_and_kept_within_the_limits(duration, fps, least, most):
    limits = {"min_frames": least, "max_frames": most}
    plan = plan_sampling(duration, SamplingOptions(fps=fps), **limits)
    assert plan == plan_sampling(duration, fps=fps, **limits)
    assert plan.frames % 2 == 0
    assert 2 <= plan.frames <= most
    assert plan.frames >= min(least, most - most % 2)
    if max(2, least + least % 2) < plan.frames < most - 1:
        assert abs(plan.frames - duration * fps) <= 1 + 1e-6
    # If the number of frames is set, only max_frames limits it.
    exact = plan_sampling(duration, SamplingOptions(frames=least + 1), min_frames=64, max_frames=most)
    assert exact.frames == min(least + 1 + (least + 1) % 2, most - most % 2)


@settings(deadline=None)
@given(seconds, st.floats(0, 0.9), st.floats(0.01, 2), st.integers(1, 768))
def test_times_are_the_middles_of_equal_shares(duration, start_share, length_share, frames):
    start = start_share * duration
    end = start + length_share * duration
    plan = plan_sampling(duration, SamplingOptions(frames=frames, start_s=start, end_s=end))
    assert plan.start_s == start
    assert plan.end_s <= duration
    assert plan.start_s < plan.times_s[0] and plan.times_s[-1] < plan.end_s
    assert all(a < b for a, b in pairwise(plan.times_s))
    assert plan.times_s[0] - plan.start_s == pytest.approx(plan.seconds_per_frame / 2, rel=1e-6, abs=1e-9)
    assert plan.times_s[1] - plan.times_s[0] == pytest.approx(plan.seconds_per_frame, rel=1e-6, abs=1e-9)
    assert plan.seconds_per_pair() == 2 * plan.seconds_per_frame


def test_a_plan_by_hand():
    # An end after the end of the video is clamped.
    assert plan_sampling(3.0, SamplingOptions(end_s=99)) == plan_sampling(3.0)
    assert plan_sampling(100.0, min_frames=8, max_frames=5).frames == 4  # the limits conflict
    plan = plan_sampling(10.0, SamplingOptions(fps=0.6, start_s=2.0, end_s=8.0))
    assert plan.times_s == (2.75, 4.25, 5.75, 7.25)  # 3.6 frames are rounded to 4
    assert (plan.frames, plan.seconds_per_frame) == (4, 1.5)
    assert (plan.seconds_per_pair(), plan.seconds_per_pair(4)) == (3.0, 6.0)
    plan = plan_sampling(60.0, SamplingOptions(fps=1e308), max_frames=64)
    assert (plan.wanted, plan.frames) == (pytest.approx(sys.maxsize), 64)
    for start, end, span in (
        (-5.0, -2.0, (5, 8)),
        (-99.0, None, (0, 10)),
        (4.0, -1.0, (4, 9)),
    ):  # negative: from the end
        plan = plan_sampling(10.0, SamplingOptions(start_s=start, end_s=end))
        assert (plan.start_s, plan.end_s) == span and span[0] < plan.times_s[0] < plan.times_s[-1] < span[1]


NONSENSE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(("start", "end"), [(0, -3), (-1, -2), (3, None), (5, None), (2, 1), (0, 0)])
def test_an_empty_part_states_how_long_the_video_is(start, end):
    with pytest.raises(VideoError, match="3 s long") as caught:
        plan_sampling(3.0, SamplingOptions(start_s=start, end_s=end))
    assert caught.value.hint
    for duration in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(VideoError):
            plan_sampling(duration)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("start_s", value) for value in NONSENSE), *(("end_s", value) for value in NONSENSE),
        *((name, value) for name in ("fps", "frames", "max_frames") for value in (*NONSENSE, -1.0)),
        ("fps", 0.0), ("frames", 0), ("max_frames", 1),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(name, bad):
    with pytest.raises(UsageError):
        SamplingOptions(**{name: bad})


lengths = st.integers(1, 5000)
limits = st.builds(
    InputLimits,
    min_pixels=st.integers(1, 300).map(lambda n: n * 784),
    max_pixels=st.integers(300, 1000).map(lambda n: n * 784),
    fps=st.floats(0.1, 10),
    min_frames=st.integers(2, 8),
    max_frames=st.integers(8, 768),
)


@converted
@dataclass(frozen=True)
class WithAnotherSpan(SamplingOptions):
    SPAN = (*SamplingOptions.SPAN, "skip_s")

    skip_s: float = option(0.0, "Skip the beginning.")


def test_messages_about_the_span_name_each_of_its_options():
    options = WithAnotherSpan(skip_s=1.0, end_s=4.0)
    assert options.has_span and not options.part().has_span and options.part(2.0) == WithAnotherSpan(start_s=2.0)
    with pytest.raises(UsageError, match=r"no start, end or skip\n") as caught:
        options.check_still(replace(video(), container="picture"))
    assert caught.value.hint == "leave out start, end and skip"
    with pytest.raises(UsageError, match=r"skip is inf, not a time in seconds"):
        WithAnotherSpan(skip_s=math.inf)


def video(width=640, height=360, duration=60.0) -> Video:
    return Video(
        path="a.mp4", duration_s=duration, width=width, height=height, rotation_deg=0, codec="h264", pix_fmt="yuv420p",
        container="mp4", fps=25.0, variable_rate=False, frames_total=None, start_s=0.0, tags={},
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@example(42, 42, 1.0, InputLimits(min_pixels=2352, max_pixels=235200, fps=1.0, min_frames=3, max_frames=8), 2, None)
@given(lengths, lengths, st.floats(0.05, 20_000), limits, st.integers(1, 30_000), st.none() | st.integers(1, 2000))
def test_every_limit_holds(width, height, duration, limit, cap, frames):
    assume(max(width, height) <= 200 * min(width, height))
    plan = Plan.of(video(width, height, duration), limit, SamplingOptions(frames=frames, max_visual_tokens=cap))
    t, h, w = plan.grid
    assert plan.visual_tokens == t * h * w <= cap and min(plan.grid) >= 1
    assert (plan.height, plan.width) == (h * 28, w * 28) and plan.sampling.frames == 2 * t <= limit.max_frames
    if not plan.capped:
        assert (plan.height, plan.width) == limit.resized(height, width)
    if plan.height * plan.width <= min(limit.min_pixels, limit.max_pixels) * 0.25:
        # Rounding reduces a side by less than half. Frames are smaller than the model's minimum only if sampling fewer frames would
        # not make them larger.
        alone = Plan.of(video(width, height, duration), limit, SamplingOptions(frames=2, max_visual_tokens=cap))
        assert t == 1 or alone.height * alone.width <= plan.height * plan.width


@settings(max_examples=100, deadline=None)
@given(st.floats(1, 5000), st.integers(50, 20_000))
def test_a_higher_cap_never_shows_less(duration, cap):
    less, more = (
        Plan.of(video(duration=duration), InputLimits(), SamplingOptions(max_visual_tokens=most))
        for most in (cap, cap * 2)
    )
    assert less.sampling.frames <= more.sampling.frames
    assert less.visual_tokens <= more.visual_tokens or less.sampling.frames < more.sampling.frames


def test_frames_get_smaller_before_they_get_fewer():
    free = Plan.of(video(1920, 1080), InputLimits(), SamplingOptions(max_visual_tokens=10**6))
    assert not free.capped and free.sampling.frames == 120
    smaller = Plan.of(video(1920, 1080), InputLimits(), SamplingOptions(max_visual_tokens=60 * 200))
    assert smaller.capped and smaller.sampling.frames == free.sampling.frames and smaller.height < free.height
    fewer = Plan.of(video(1920, 1080), InputLimits(), SamplingOptions(max_visual_tokens=60 * 50))
    assert fewer.sampling.frames < free.sampling.frames and fewer.height * fewer.width >= 100 * 784


def test_a_plan_names_its_limits():
    plan = Plan.of(video(), InputLimits(max_frames=50), SamplingOptions(frames=60))
    assert (plan.sampling.frames, plan.token_capped, plan.capped) == (50, False, True)
    assert Plan.of(video(), InputLimits(), SamplingOptions(max_frames=7)).sampling.frames == 6
    plan = Plan.of(video(1920, 1080, 3600), InputLimits())
    assert plan.visual_tokens <= SamplingOptions.MAX_VISUAL_TOKENS and plan.capped
    plan = Plan.of(video(), InputLimits(max_frames=50), SamplingOptions(fps=1.0, max_visual_tokens=5000))
    assert (plan.sampling.wanted, plan.sampling.frames, plan.frame_limit, plan.token_limit) == (60, 50, 50, 5000)
    options = SamplingOptions(fps=1.0, max_frames=60, max_visual_tokens=5)
    plan = Plan.of(video(), InputLimits(max_frames=50), options)
    assert (plan.sampling.wanted, plan.sampling.frames, plan.frame_limit, plan.capped) == (60, 2, 60, True)


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({}, {"max_visual_tokens": 0}, UsageError),
        ({}, {"fps": 1.0, "frames": 4}, UsageError),
        ({"duration": None}, {}, VideoError),
        ({"width": 5000, "height": 2}, {}, VideoError),
    ],
)
def test_what_cannot_be_planned(changes, arguments, error):
    with pytest.raises(error):
        Plan.of(video(**changes), InputLimits(), SamplingOptions(**arguments))


@pytest.mark.parametrize("size", [(480, 854), (1080, 1920), (96, 96), (333, 217), (64, 3000)])
@pytest.mark.parametrize("frames", [4, 32, 200, 768])
def test_frames_of_qwen3_have_the_size_that_its_processor_gives_them(size, frames):
    """The sizes are equal if the processor's limit for a single frame is set."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resized

    limits = InputLimits(**FAMILIES["qwen3_vl"].video, patch_size=16)
    info = video(size[1], size[0], 1000.0)
    plan = Plan.of(info, limits, SamplingOptions(frames=frames, max_visual_tokens=10**6))
    each = min(768 * 32 * 32, limits.max_pixels // frames)
    assert (plan.height, plan.width) == resized(frames, *size, 2, 32, limits.min_pixels, each * frames)


def test_a_plan_has_no_more_frames_than_can_be_read_at_once():
    video = Video("a.mp4", 10.0, 28, 28, 0, "h264", "yuv420p", "mp4", fps=30.0)
    options = SamplingOptions(frames=10**12, max_frames=10**12, max_visual_tokens=10**12)
    plan = Plan.of(video, InputLimits(min_pixels=1), options)
    assert plan.sampling.frames == 2**21 and plan.limited
