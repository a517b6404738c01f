"""Videos that are short, long, damaged, or show nothing for a while."""

import numpy as np
import pytest

import evoprune
from evoprune.errors import VideoError
from evoprune.moments.search import Search
from evoprune.session import FindOptions
from evoprune.video import SamplingOptions
from tests.threads import one_thread  # noqa: F401
from tests.video.files import numbered_frames, spoil, write_video

QUERY = "a red circle"


@pytest.fixture(scope="module")
def demo():
    return evoprune.VideoQA.load("demo", budget=0.25)


def searched(qa, path, sampling=None, **options):
    search = Search(qa.session, str(path), [QUERY], FindOptions(**options), sampling or SamplingOptions())
    with search:
        search.run()
    return search


@pytest.mark.full
def test_ten_hours(demo, tmp_path):
    """The video has a keyframe every five minutes, and the token limit determines the number of segments."""
    frames = numbered_frames(120, 56, 56)
    path = write_video(tmp_path / "long.mp4", frames, pts=[300.0 * n for n in range(120)], gop=1)
    search = searched(demo, path, total_tokens=600)
    assert search.duration_s > 9.9 * 3600 and search.tokens <= 600
    assert 2 <= len(search.segments) == search.asked and search.unread == 0


@pytest.mark.full
def test_minutes_without_frames(demo, tmp_path):
    """A frame stays on screen until the next one."""
    frames = [np.zeros((56, 56, 3), np.uint8), *numbered_frames(3, 56, 56)]
    path = write_video(tmp_path / "gap.mp4", frames, pts=[0.0, 60.0, 60.5, 61.0], gop=1)
    search = searched(demo, path, segment_s=4.0, min_score=0.0)
    assert len(search.segments) == search.asked > 10 and search.unread == 0
    (moment,) = search.moments()  # with this minimum score everything is one moment
    assert (moment.start_s, moment.end_s) == (0.0, search.duration_s)


def test_damaged_in_the_middle(demo, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(120, 56, 56), gop=10)
    path = spoil(whole, tmp_path / "damaged.mp4", range(40, 80))
    search = searched(demo, path, segment_s=2.0)
    assert search.asked == len(search.segments) == 6
    assert search.unread or "damaged_video" in search.warnings
    assert len([score for score in search._scores[QUERY] if np.isfinite(score)]) >= 3


def test_nothing_can_be_read(demo, tmp_path):
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(40, 56, 56), gop=10)
    path = spoil(whole, tmp_path / "damaged.mp4", range(40))
    with pytest.raises(VideoError):
        searched(demo, path, segment_s=2.0)


def test_a_part_that_is_not_there(demo, tmp_path):
    path = write_video(tmp_path / "short.mp4", numbered_frames(20, 56, 56))
    with pytest.raises(VideoError, match="is after the end"):
        searched(demo, path, SamplingOptions(start_s=60.0))
