"""Moments as subtitles and as chapters: other programs read what they say."""

import io

import av
import pytest

from evoprune import Moment
from evoprune.moments.subtitles import chapters, srt
from evoprune.video.frames import probe, read_subtitles
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
    """Whatever a query holds."""
    (tmp_path / "a.srt").write_text(srt([*MOMENTS, Moment("x --> y\n\n7\nz ü", 5.0, 6.0, 1.0, 5.5)]), encoding="utf-8")
    info = probe(write_video(tmp_path / "a.mp4", numbered_frames(2)))
    found = read_subtitles(info, "auto").lines
    assert [line[:2] for line in found] == [(1.0, 2.25), (5.0, 6.0), (3723.0, 3730.5)]
    assert [line[2] for line in found] == ["a dog (0.50)", "x -> y 7 z ü (1.00)", "a red star (0.99)"]


@pytest.mark.parametrize("query", [ODD, "plain", "[CHAPTER]", " é "])
def test_chapters_are_read(query):
    moments = [*MOMENTS, Moment(query, 0.5, 4.0, 0.9, 1.0)]
    with av.open(io.BytesIO(chapters(moments).encode()), format="ffmetadata") as container:
        found = container.chapters()
    milliseconds = [(chapter["start"], chapter["end"]) for chapter in found]
    assert milliseconds == [(500, 4000), (1000, 2250), (3723000, 3730500)]
    assert [chapter["metadata"]["title"] for chapter in found] == [query, "a dog", "a red star"]
    assert chapters([]) == ";FFMETADATA1\n"


def test_what_is_special_is_escaped():
    assert "title=a \\= b\\; \\# c \\\\ d\\\ne\n" in chapters([Moment(ODD, 0.0, 1.0, 1.0, 0.5)])
