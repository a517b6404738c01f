"""Moments as subtitles and chapters that other programs can read."""

import io

import av
import pytest

from evoprune import Moment
from evoprune.video import probe, read_subtitles
from evoprune_cli.subtitles import chapters, srt
from tests.video.files import numbered_frames, write_video

MOMENTS = [
    Moment("a red star", 3723.0004, 3730.5, 0.994, 3725.0),
    Moment("a dog", 1.0, 2.25, 0.5, 1.5),
]
ODD = "a = b; # c \\ d\ne"


def test_srt():
    assert srt(MOMENTS).split("\n\n") == [
        "1\n00:00:01,000 --> 00:00:02,250\na dog (0.50)",
        "2\n01:02:03,000 --> 01:02:10,500\na red star (0.99)\n",
    ]


def test_srt_is_read(tmp_path):
    """Holds for any text in a query."""
    (tmp_path / "a.srt").write_text(srt([*MOMENTS, Moment("x --> y\n\n7\nz ü", 5.0, 6.0, 1.0, 5.5)]), encoding="utf-8")
    info = probe(write_video(tmp_path / "a.mp4", numbered_frames(2)))
    found = read_subtitles(info, "auto").lines
    assert [line[:2] for line in found] == [(1.0, 2.25), (5.0, 6.0), (3723.0, 3730.5)]
    assert [line[2] for line in found] == ["a dog (0.50)", "x -> y 7 z ü (1.00)", "a red star (0.99)"]


def read_chapters(text):
    """Return start, end and title of each chapter, in seconds, as read by FFmpeg."""
    with av.open(io.BytesIO(text.encode()), format="ffmetadata") as container:
        return [(each["start"] / 1000, each["end"] / 1000, each["metadata"]["title"]) for each in container.chapters()]


@pytest.mark.parametrize("query", [ODD, "plain", "[CHAPTER]", " é "])
def test_chapters_are_read(query):
    """Chapters cover the video without gaps, because MP4 players start each chapter at the end of the previous one."""
    moments = [*MOMENTS, Moment(query, 2.25, 4.0, 0.9, 1.0)]
    assert read_chapters(chapters(moments, 4000.5)) == [
        (0.0, 1.0, "-"),
        (1.0, 2.25, "a dog"),
        (2.25, 4.0, query),
        (4.0, 3723.0, "-"),
        (3723.0, 3730.5, "a red star"),
        (3730.5, 4000.5, "-"),
    ]
    assert chapters([]) == chapters([], 9.0) == ";FFMETADATA1\n"


def test_chapters_of_moments_that_overlap():
    moments = [Moment("a", 0.0, 4.0, 1.0, 1.0), Moment("b", 1.0, 2.0, 1.0, 1.5), Moment("c", 3.0, 5.0, 1.0, 4.0)]
    assert read_chapters(chapters(moments)) == [
        (0.0, 1.0, "a"),
        (1.0, 2.0, "a + b"),
        (2.0, 3.0, "a"),
        (3.0, 4.0, "a + c"),
        (4.0, 5.0, "c"),
    ]


def test_what_is_special_is_escaped():
    assert "title=a \\= b\\; \\# c \\\\ d\\\ne\n" in chapters([Moment(ODD, 0.0, 1.0, 1.0, 0.5)])
