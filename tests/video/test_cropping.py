"""Every reader crops frames if the container says so (with a clap box in MP4, or with PixelCrop in Matroska)."""

from contextlib import closing

import av
import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.clips import cut_clip
from evoprune.video.frames import probe, read_chunks
from evoprune.video.readers import decord
from evoprune.video.readers.live import LiveReader
from tests.video.files import crop_video, number_of, numbered_frames, write_video

EDGES = 6, 26, 20, 12  # left, right, top, bottom


@pytest.fixture(scope="module")
def cropped(tmp_path_factory):
    """Paths of three cropped files: an MP4, a Matroska file, and an MP4 that is also rotated."""
    folder = tmp_path_factory.mktemp("cropped")
    left, right, top, bottom = EDGES
    frames = [np.full((80, 96, 3), 255, np.uint8) for _ in range(30)]
    for stored, shown in zip(frames, numbered_frames(30), strict=True):
        stored[top:-bottom, left:-right] = shown
    paths = {}
    for name, rotation in (("plain.mp4", 0), ("turned.mp4", 90)):
        path = write_video(folder / f"whole_{name}", frames, rotation=rotation)
        paths[name] = crop_video(path, folder / name, *EDGES)
    paths["plain.mkv"] = folder / "plain.mkv"
    with av.open(str(paths["plain.mp4"])) as source, av.open(str(paths["plain.mkv"]), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return paths


def check(rgb, number, turned=False):
    """Check that a frame shows the right number, and that its white edges have been cropped."""
    upright = np.rot90(rgb) if turned else rgb
    assert upright.shape == (48, 64, 3) and number_of(upright) == number
    assert (upright < 240).all()


@pytest.mark.parametrize("seek", ["exact", "keyframes"])
@pytest.mark.parametrize("name", ["plain.mp4", "plain.mkv", "turned.mp4"])
def test_frames_are_cropped_before_they_are_turned(cropped, name, seek):
    info = probe(cropped[name])
    turned = name == "turned.mp4"
    assert (info.width, info.height) == ((48, 64) if turned else (64, 48))
    assert list(info.crop) == list(EDGES)
    frames = [rgb for chunk in read_chunks(info, [0.0, 1.0, 2.0], seek=seek, part_s=1.0) for rgb in chunk.pixels]
    for rgb, number in zip(frames, (0, 10, 20), strict=True):
        check(rgb, number, turned)


def test_live_video_is_cropped(cropped):
    with closing(LiveReader(str(cropped["plain.mkv"]), "plain.mkv", 1.0)) as reader:
        found = reader.next(0.5)
        rgb = np.empty((1, found["height"], found["width"], 3), np.uint8)
        reader.fill(rgb)
        check(rgb[0], 5)


@pytest.mark.parametrize("name", ["plain.mp4", "plain.mkv"])
@pytest.mark.parametrize("exact", [False, True])
def test_clips_are_cropped(cropped, name, exact, tmp_path):
    clip = cut_clip(probe(cropped[name]), 1.0, 1.5, str(tmp_path), exact=exact)
    (chunk,) = read_chunks(probe(clip.path), [0.0])
    assert chunk.pixels[0].shape == (48, 64, 3) and number_of(chunk.pixels[0]) == 10


def test_decord_refuses_cropped_videos(cropped):
    with pytest.raises(VideoError, match="crop"):
        decord.check(probe(cropped["plain.mp4"]))
