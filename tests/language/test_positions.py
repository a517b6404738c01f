import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.language.prompt import VisualSpan, prompt_positions, video_positions


def by_hand(length, videos, tokens_per_second):
    """Qwen's rule, one token at a time."""
    starts = {video.start: video for video in videos}
    positions, following, at = [], 0, 0
    while at < length:
        if at in starts:
            video = starts[at]
            t, h, w = video.grid
            inside = [
                [following + int(i * video.seconds_per_pair * tokens_per_second), following + y, following + x]
                for i in range(t)
                for y in range(h)
                for x in range(w)
            ]
        else:
            inside = [[following] * 3]
        positions += inside
        at += len(inside)
        following = max(max(position) for position in positions) + 1
    return torch.tensor(positions).reshape(-1, 3).T


def test_text_alone_counts_up_in_all_three_axes():
    assert prompt_positions(4, [], 2).tolist() == [[0, 1, 2, 3]] * 3


def test_an_empty_prompt_has_no_positions():
    assert prompt_positions(0, [], 2).shape == (3, 0)


def test_video_at_the_start():
    positions = prompt_positions(6, [VisualSpan(0, (1, 2, 2), 1.0)], 2)
    assert positions.tolist() == [[0, 0, 0, 0, 2, 3], [0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 3]]


def test_text_goes_on_after_the_time_of_a_video_that_is_longer_than_wide():
    positions = prompt_positions(8, [VisualSpan(2, (2, 1, 2), 5.0)], 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 12, 12, 13, 14],
        [0, 1, 2, 2, 2, 2, 13, 14],
        [0, 1, 2, 3, 2, 3, 13, 14],
    ]


@pytest.mark.parametrize(
    ("seconds", "clock"),
    [(0.5, [0, 1, 2, 3, 4]), (1, [0, 2, 4, 6, 8]), (3.3, [0, 6, 13, 19, 26]), (0.3, [0, 0, 1, 1, 2])],
)
def test_fractions_of_a_second_count(seconds, clock):
    assert video_positions((5, 1, 1), seconds, 2)[0].tolist() == clock


def test_two_videos_follow_one_another():
    positions = prompt_positions(7, [VisualSpan(1, (2, 1, 1), 2.0), VisualSpan(4, (1, 1, 2), 1.0)], 2)
    assert positions.tolist() == [[0, 1, 5, 6, 7, 7, 9], [0, 1, 1, 6, 7, 7, 9], [0, 1, 1, 6, 7, 8, 9]]


@st.composite
def prompts(draw):
    videos, at = [], 0
    for _ in range(draw(st.integers(0, 3))):
        at += draw(st.integers(0, 4))
        grid = tuple(draw(st.integers(1, 5)) for _ in range(3))
        videos.append(VisualSpan(at, grid, draw(st.floats(0.05, 30))))
        at += videos[-1].tokens
    return at + draw(st.integers(0, 4)), videos, draw(st.sampled_from([1, 2, 4]))


@settings(deadline=None)
@given(prompts())
def test_any_prompt_matches_counting_by_hand(prompt):
    length, videos, tokens_per_second = prompt
    positions = prompt_positions(length, videos, tokens_per_second)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, by_hand(length, videos, tokens_per_second).reshape(3, -1))


@pytest.mark.parametrize(
    ("length", "videos"),
    [
        (3, [VisualSpan(0, (1, 2, 2), 1.0)]),
        (4, [VisualSpan(1, (1, 2, 2), 1.0)]),
        (9, [VisualSpan(0, (1, 2, 2), 1.0), VisualSpan(3, (1, 2, 2), 1.0)]),
    ],
)
def test_videos_that_do_not_fit_are_refused(length, videos):
    with pytest.raises(ValueError, match="does not fit"):
        prompt_positions(length, videos, 2)
