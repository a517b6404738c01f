import math
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evoprune.errors import UsageError, VideoError
from evoprune.video.plan import parse_time, plan_sampling

seconds = st.floats(0.01, 1e5)
limits = st.integers(2, 800)


@given(seconds, st.floats(1e-3, 1e3), st.integers(0, 50), limits)
def test_counts_by_fps_are_even_and_kept_within_the_limits(duration, fps, least, most):
    plan = plan_sampling(duration, fps=fps, min_frames=least, max_frames=most)
    assert plan.frames % 2 == 0
    assert 2 <= plan.frames <= most
    assert plan.frames >= min(least, most - most % 2)
    if max(2, least + least % 2) < plan.frames < most - 1:
        assert abs(plan.frames - duration * fps) <= 1 + 1e-6


@given(seconds, st.integers(1, 2000), limits)
def test_an_exact_count_rounds_up_to_even_and_stops_at_max_frames_only(duration, frames, most):
    plan = plan_sampling(duration, frames=frames, min_frames=64, max_frames=most)
    assert plan.frames == min(frames + frames % 2, most - most % 2)


@given(seconds, st.floats(0, 0.9), st.floats(0.01, 2), st.integers(1, 768))
def test_times_are_the_middles_of_equal_shares(duration, start_share, length_share, frames):
    start = start_share * duration
    plan = plan_sampling(duration, frames=frames, start_s=start, end_s=start + length_share * duration)
    assert plan.start_s == start
    assert plan.end_s <= duration
    assert plan.start_s < plan.times_s[0] and plan.times_s[-1] < plan.end_s
    assert all(a < b for a, b in pairwise(plan.times_s))
    assert plan.times_s[0] - plan.start_s == pytest.approx(plan.seconds_per_frame / 2, rel=1e-6, abs=1e-9)
    assert plan.times_s[1] - plan.times_s[0] == pytest.approx(plan.seconds_per_frame, rel=1e-6, abs=1e-9)
    assert plan.seconds_per_pair() == 2 * plan.seconds_per_frame


def test_a_plan_by_hand():
    plan = plan_sampling(10.0, fps=0.6, start_s=2.0, end_s=8.0)
    assert plan.times_s == (2.75, 4.25, 5.75, 7.25)  # 3.6 frames are rounded to 4
    assert (plan.frames, plan.seconds_per_frame, plan.seconds_per_pair(), plan.seconds_per_pair(4)) == (
        4,
        1.5,
        3.0,
        6.0,
    )


@pytest.mark.parametrize(
    ("how", "wanted", "frames"),
    [
        ({"fps": 2.0}, 120, 64),
        ({"fps": 0.5}, 30, 30),
        ({"frames": 99}, 100, 64),
        ({"frames": 10}, 10, 10),
        ({"fps": 0.01}, 4, 4),
        ({"fps": 1e308}, pytest.approx(sys.maxsize), 64),
    ],
)
def test_a_plan_knows_how_many_were_wanted(how, wanted, frames):
    plan = plan_sampling(60.0, max_frames=64, **how)
    assert (plan.wanted, plan.frames) == (wanted, frames)


def test_an_end_beyond_the_video_is_its_end():
    assert plan_sampling(3.0, end_s=99) == plan_sampling(3.0)


def test_a_contradiction_of_limits_is_settled_by_the_upper_one():
    assert plan_sampling(100.0, min_frames=8, max_frames=5).frames == 4


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [(-2.0, None, (8, 10)), (0.0, -3.0, (0, 7)), (-5.0, -2.0, (5, 8)), (-99.0, None, (0, 10)), (4.0, -1.0, (4, 9))],
)
def test_times_below_0_count_from_the_end(start, end, span):
    plan = plan_sampling(10.0, start_s=start, end_s=end)
    assert (plan.start_s, plan.end_s) == span and span[0] < plan.times_s[0] < plan.times_s[-1] < span[1]


@pytest.mark.parametrize(
    "part",
    [
        {"end_s": -3.0},
        {"start_s": -1.0, "end_s": -2.0},
        {"start_s": 3.0},
        {"start_s": 5.0},
        {"start_s": 2.0, "end_s": 1.0},
        {"end_s": 0.0},
    ],
)
def test_an_empty_part_states_how_long_the_video_is(part):
    with pytest.raises(VideoError, match="3 s long") as caught:
        plan_sampling(3.0, **part)
    assert caught.value.hint


@pytest.mark.parametrize("duration", [0.0, -1.0, math.nan, math.inf])
def test_a_video_without_length_is_refused(duration):
    with pytest.raises(VideoError):
        plan_sampling(duration)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", ["fps", "frames", "start_s", "end_s", "min_frames", "max_frames"])
def test_numbers_that_make_no_sense_are_refused(name, bad):
    if name.endswith("_s") and bad == -1:
        pytest.skip("counts from the end")
    with pytest.raises(UsageError):
        plan_sampling(3.0, **{name: bad})


@pytest.mark.parametrize("bad", [{"fps": 0.0}, {"frames": 0}, {"max_frames": 1}, {"fps": None}])
def test_a_plan_of_no_frames_is_refused(bad):
    with pytest.raises(UsageError):
        plan_sampling(3.0, **bad)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90), ("90.5", 90.5), ("0", 0), ("1:30", 90), ("90:00", 5400), ("01:30:00", 5400), ("1:02:03.5", 3723.5),
        (" 7 ", 7), ("100:00:00", 360000), ("-5", -5), ("-0:05", -5), ("-1:30.5", -90.5), ("-0", 0),
        ("2s", 2), ("-2s", -2), ("0.5s", 0.5), ("1m30s", 90), ("90m", 5400), ("1h2m3.5s", 3723.5), ("-1h5s", -3605),
    ],
)  # fmt: skip
def test_times_are_parsed(text, expected):
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-",
        "--1",
        "- 1",
        "1:-5",
        "1:",
        ":30",
        "1:60",
        "1:60:00",
        "1:2:3:4",
        "1.5:00",
        "nan",
        "inf",
        "1e3",
        "٣",
        "9" * 400,
        "s",
        "1m90s",
        "1h60m",
        "1h90s",
        "1s1m",
        "1:30s",
        "1.5m",
        "500ms",
        "2 s",
    ],
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(UsageError, match="is not a time"):
        parse_time(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_hours_minutes_and_seconds_add_up(hours, minutes, secs):
    assert parse_time(f"{hours}:{minutes:02}:{secs:02}") == hours * 3600 + minutes * 60 + secs
