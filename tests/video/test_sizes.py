"""If the frame size changes, all frames are scaled to the first size, letterboxed if necessary, and there is a warning."""

import av
import pytest

from evoprune import VideoQA
from evoprune.video.frames import probe, read_chunks
from evoprune.video.info import fitted
from tests.video.files import number_of, numbered_frames, write_video

SIZES = {
    "turns": ((96, 128), (128, 96)),
    "grows": ((96, 128), (192, 256)),
    "there and back": ((96, 128), (192, 256), (96, 128)),
}
CODECS = {
    "h264": ("ts", {"options": {"bf": "0"}}),  # in MPEG-TS, every keyframe repeats the stream parameters
    "hevc": ("ts", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=0"}}),
    "vp9": ("mkv", {"codec": "libvpx-vp9"}),
    "mjpeg": ("mkv", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "flv1": ("flv", {"codec": "flv"}),
}


def changing(folder, heights_and_widths, codec="h264"):
    """Encode videos of the given sizes, with 10 frames each, and write their packets to a single track."""
    ending, how = CODECS[codec]
    # Matroska does not support Sorenson H.263.
    path, track = folder / f"changing.{'flv' if ending == 'flv' else 'mkv'}", None
    with av.open(str(path), "w") as out:
        for i, size in enumerate(heights_and_widths):
            with av.open(str(write_video(folder / f"{i}.{ending}", numbered_frames(10, *size), **how))) as source:
                stream = source.streams.video[0]
                track = track or out.add_stream_from_template(stream)
                packets = [packet for packet in source.demux(stream) if packet.size]
                first = packets[0].pts
                for packet in packets:
                    packet.pts += round(i / stream.time_base) - first
                    packet.dts, packet.stream = packet.pts, track
                    out.mux(packet)
    return path


def middle(rgb, width_of_part, height_of_part):
    top, left = (rgb.shape[0] - height_of_part) // 2, (rgb.shape[1] - width_of_part) // 2
    return rgb[top : top + height_of_part, left : left + width_of_part]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", SIZES)
def test_frames_that_change_their_size(codec, how, tmp_path):
    path = changing(tmp_path, SIZES[how], codec)
    info = probe(path)
    assert (info.height, info.width, info.warnings) == (*SIZES[how][0], [])
    (chunk,) = read_chunks(info, [0.05 + 0.1 * i for i in range(10 * len(SIZES[how]))])
    assert chunk.other_size
    if how != "turns":
        assert [number_of(rgb) for rgb in chunk.pixels] == [*range(10)] * len(SIZES[how])
        return
    upright = [middle(rgb, 72, 96) for rgb in chunk.pixels[10:]]
    assert [number_of(rgb) for rgb in chunk.pixels[:10]] == [number_of(rgb) for rgb in upright] == [*range(10)]
    assert chunk.pixels[10:, :, :27].max() == chunk.pixels[10:, :, -27:].max() == 0


def test_another_size_is_said_where_it_is_read(tmp_path):
    path = str(changing(tmp_path, SIZES["grows"]))
    for end_s, said in ((0.9, False), (None, True)):
        report = VideoQA.load("demo").encode(path, end_s=end_s).ask("What colour is the square?").report
        assert ("changing_size" in report.warnings) == said


@pytest.mark.parametrize(
    ("size", "outer", "expected"),
    [
        ((64, 48), (64, 48), (64, 48)), ((65, 48), (64, 48), (64, 48)), ((128, 96), (64, 48), (64, 48)),
        ((48, 64), (64, 48), (36, 48)), ((64, 48), (48, 64), (48, 36)), ((4000, 1), (64, 48), (64, 1)),
    ],
)  # fmt: skip
def test_a_frame_of_another_shape_keeps_it(size, outer, expected):
    assert fitted(size, outer) == expected
