"""Videos are read as players show them: deinterlaced, with square pixels, and from the same track if there are several."""

import warnings
from contextlib import closing
from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph

from evoprune.errors import VideoError
from evoprune.video.clips import cut_clip
from evoprune.video.frames import choose_decoder, probe, read_chunks
from evoprune.video.readers import colour, ffmpeg, pyav
from evoprune.video.readers.deinterlacing import deinterlaced, deinterlacing
from evoprune.video.readers.live import LiveReader
from evoprune.video.readers.track import Track
from tests.video.files import apart, crop_video, in_this_process, numbered_frames, pixels, quarters, write_video

X264 = {"options": {"x264-params": "interlaced=1:keyint=8:min-keyint=8:bframes=2"}}
OPEN = {"options": {"x264-params": "interlaced=1:keyint=8:min-keyint=8:bframes=3:open-gop=1:bff=1"}}
INTERLACED = {
    "plain.mp4": X264,
    "plain.mkv": X264,
    "open.ts": OPEN,
    "plain.avi": {"options": {"x264-params": "interlaced=1"}},
}
FRAMES = 30


def woven(count=FRAMES, height=48, width=64):
    """Return interlaced frames of a moving pattern. Odd rows show the pattern half a frame later than even rows."""
    rows, columns = np.mgrid[:height, :width]
    moments = [
        np.stack(
            [127 + 100 * np.sin((columns + 3 * at) / 5), 127 + 100 * np.sin((rows - at) / 9), 40 + 3 * at + 0 * rows],
            -1,
        )
        for at in range(2 * count)
    ]
    frames = np.array(moments).clip(0, 255).astype(np.uint8)
    return [np.where(rows[..., None] % 2, frames[2 * i + 1], frames[2 * i]) for i in range(count)]


@pytest.fixture(params=INTERLACED)
def fields(request, folder):
    path = folder / f"fields_{request.param}"
    return probe(path if path.exists() else write_video(path, woven(), **INTERLACED[request.param]))


def filtered_by_ffmpeg(info):
    """Return all frames of a file, deinterlaced by FFmpeg's filter, which processes the whole video in order here."""
    graph = Graph()
    with closing(Track(info)) as track:
        source = graph.add_buffer(template=track.stream)
        frames = [frame for _, frame in track.from_beginning((), ffmpeg.ignore_damage)]
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame"), graph.add("buffersink")).configure()
    for frame in [*frames, None]:
        graph.push(frame)
    converter = colour.Converter(info.path)
    return np.array([converter.rgb(graph.pull(), info.width, info.height) for _ in frames])


def test_frames_are_deinterlaced_as_by_ffmpeg(fields):
    expected = filtered_by_ffmpeg(fields)
    middles = [(i + 0.5) / fields.fps for i in range(FRAMES)]
    assert fields.interlaced and fields.warnings == ["interlaced_video"] and len(expected) == FRAMES
    together = pixels(read_chunks(fields, middles))
    np.testing.assert_array_equal(together, expected)
    # The result is the same whichever keyframe decoding starts at, and however many decoders there are.
    for i in range(FRAMES):
        np.testing.assert_array_equal(pixels(read_chunks(fields, [middles[i]])), expected[i : i + 1])
    for cores in (1, 2, 5):
        np.testing.assert_array_equal(pixels(read_chunks(fields, middles[::3], cores=cores)), expected[::3])


def combs(rgb):
    """Return how much each row differs on average from the rows above and below it."""
    rows = rgb.astype(int)
    return np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean()


@pytest.mark.parametrize("name", ["plain.mp4", "open.ts"])
def test_a_keyframe_alone_is_deinterlaced_too(name, folder, monkeypatch):
    path = folder / f"fields_{name}"
    info = probe(path if path.exists() else write_video(path, woven(), **INTERLACED[name]))
    (chunk,) = read_chunks(info, [1.5], seek="keyframes", part_s=info.duration_s)
    assert chunk.moved
    monkeypatch.setattr(pyav, "deinterlaced", lambda frame, *near: frame)
    with in_this_process():
        combed = pixels(read_chunks(info, chunk.times_s))[0]
    assert combs(chunk.pixels[0]) < combs(combed) / 2


def test_progressive_and_low_frames_stay():
    plain = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
    assert deinterlaced(plain) is plain
    flat = colour.filtered(av.VideoFrame(64, 2, "yuv420p"), ("setfield", "tff"))
    assert flat.interlaced_frame and deinterlaced(flat) is flat  # the frame has too few rows for the filter


def test_a_neighbour_of_another_size_is_ignored(folder):
    frames = []
    for name, size in {"small.mp4": (48, 64), "large.mp4": (96, 128)}.items():
        info = probe(write_video(folder / name, woven(3, *size), **X264))
        with closing(Track(info)) as track:
            frames.append([frame for _, frame in track.from_beginning((), ffmpeg.ignore_damage)])
    (first, second, _), (other, *_) = frames
    alone = deinterlaced(second, first).to_ndarray()
    np.testing.assert_array_equal(deinterlaced(second, first, other).to_ndarray(), alone)
    assert not deinterlaced(other, first, second).interlaced_frame


def test_a_progressive_frame_is_not_held_back():
    class Frame:
        def __init__(self, interlaced):
            self.interlaced_frame = interlaced

    taken = []

    def frames():
        for number, interlaced in enumerate((False, True, True, False)):
            taken.append(number)
            yield number / 10, Frame(interlaced)

    shown = deinterlacing(frames())
    assert [(next(shown)[0], len(taken)) for _ in range(4)] == [(0.0, 1), (0.1, 3), (0.2, 4), (0.3, 4)]


def test_a_live_source_and_clips_are_deinterlaced(folder, tmp_path):
    path = folder / "fields_plain.mp4"
    info = probe(path if path.exists() else write_video(path, woven(), **X264))
    expected = filtered_by_ffmpeg(info)
    found = []
    with closing(LiveReader(str(path), "fields", 1.0)) as reader:
        while header := reader.next(0.0):
            found.append(np.empty((1, header["height"], header["width"], 3), np.uint8))
            reader.fill(found[-1])
    np.testing.assert_array_equal(np.concatenate(found), expected)
    clip = probe(cut_clip(info, 0.8, 1.6, str(tmp_path), exact=True).path)
    made = pixels(read_chunks(clip, [(i + 0.5) / info.fps for i in range(8)]))
    assert not clip.interlaced and np.abs(made.astype(int) - expected[8:16]).mean() < 5


def test_cropping_does_not_swap_the_fields(folder):
    path = write_video(folder / "fields_to_crop.mp4", woven(), **X264)
    info = probe(crop_video(path, folder / "fields_cropped.mp4", 0, 0, 3, 1))
    assert info.crop[2] == 3 and info.interlaced
    whole, cropped = (pixels(read_chunks(each, [1.05]))[0].astype(int) for each in (probe(path), info))
    assert np.abs(whole[6:40] - cropped[4:38]).mean() < np.abs(whole[6:40] - cropped[5:39]).mean() / 2


def write_wide(path, aspect, size=(48, 64), rotation=0):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(-rotation)
        for i, rgb in enumerate(numbered_frames(4, *size)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("aspect", "rotation", "size"),
    [
        (Fraction(16, 11), 0, (94, 48)),
        (Fraction(11, 16), 0, (64, 70)),
        (Fraction(16, 11), 90, (48, 94)),
        (Fraction(64, 45), 180, (92, 48)),
        (Fraction(101, 100), 0, (64, 48)),
        (Fraction(10, 1), 0, (640, 48)),
        (Fraction(11, 1), 0, (64, 48)),
        (Fraction(1, 11), 0, (64, 48)),
    ],
)
@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_pixels_that_are_not_square(aspect, rotation, size, ending, tmp_path):
    path = tmp_path / f"wide.{ending}"
    if rotation and ending == "ts":
        pytest.skip("MPEG-TS has no rotation")
    apart(write_wide, path, aspect, rotation=rotation)
    info = probe(path)
    assert (info.width, info.height) == size
    assert info.pixel_aspect == pytest.approx(float(aspect), rel=0.02)  # MP4 and Matroska round the aspect ratio
    assert info.warnings == ["stretched_video"] * (max(aspect, 1 / aspect) > 10)
    (chunk,) = read_chunks(info, [0.0, 0.15])
    assert chunk.pixels.shape[1:3] == size[::-1] and not chunk.other_size
    with closing(LiveReader(str(path), "wide", 1.0)) as reader:
        header = reader.next(0.0)
        assert (header["width"], header["height"]) == size
        shown = np.empty((1, *size[::-1], 3), np.uint8)
        reader.fill(shown)
    np.testing.assert_array_equal(shown[0], chunk.pixels[0])


def test_the_container_states_the_shape_as_in_ffmpeg(tmp_path):
    """After remuxing, the container and the stream state different ratios. Players and FFmpeg's filters use the container's."""
    apart(write_wide, tmp_path / "old.mp4", Fraction(16, 11))
    with av.open(str(tmp_path / "old.mp4")) as source, av.open(str(tmp_path / "new.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    info = probe(tmp_path / "new.mkv")
    with av.open(str(tmp_path / "new.mkv")) as container:
        assert info.pixel_aspect == float(container.streams.video[0].sample_aspect_ratio)


def test_a_shape_that_would_take_too_many_pixels(monkeypatch, tmp_path):
    apart(write_wide, tmp_path / "wide.mp4", Fraction(2, 1))
    monkeypatch.setattr(ffmpeg, "MAX_VIDEO_PIXELS", 64 * 48)
    frame = av.VideoFrame(64, 48, "yuv420p")
    assert ffmpeg.displayed_size(frame, 2.0, 0) == (64, 24)
    assert ffmpeg.displayed_size(frame, 0.5, 90) == (48, 32)
    assert ffmpeg.displayed_size(frame, None, 0) == (64, 48)


def test_cropping_comes_before_the_shape(tmp_path):
    apart(write_wide, tmp_path / "wide.mp4", Fraction(2, 1))
    info = probe(crop_video(tmp_path / "wide.mp4", tmp_path / "cropped.mp4", 8, 24, 0, 0))
    assert (info.width, info.height) == (64, 48)


def test_a_clip_of_encoded_frames_has_square_pixels(tmp_path):
    apart(write_wide, tmp_path / "wide.mp4", Fraction(2, 1))
    clip = probe(cut_clip(probe(tmp_path / "wide.mp4"), 0.0, 0.3, str(tmp_path), exact=True).path)
    assert (clip.width, clip.height, clip.pixel_aspect) == (128, 48, None)


@pytest.mark.parametrize("name", ["fields_plain.mp4", "wide.mp4"])
def test_decord_refuses_such_files(name, folder):
    pytest.importorskip("decord")
    path = folder / name
    if not path.exists():
        write_video(path, woven(), **X264) if name.startswith("fields") else apart(write_wide, path, Fraction(2, 1))
    with pytest.raises(VideoError, match=r"deinterlace|square"):
        list(read_chunks(probe(path), [0.0], decoder="decord"))
    assert choose_decoder("auto", probe(path)) == "pyav"


def write_tracks(path, tracks):
    """Write one video track for each (width, disposition). Each track shows a different gray."""
    with av.open(str(path), "w") as out:
        streams = []
        for width, disposition in tracks:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for i in range(4):
            for stream in streams:
                rgb = np.full((48, stream.width, 3), stream.width, np.uint8)
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("ending", "tracks", "width"),
    [
        ("mkv", [(128, 0), (64, 1)], 64),
        ("mkv", [(64, 0), (128, 0)], 128),
        ("mkv", [(64, 1), (128, 1), (192, 0)], 128),
        ("mp4", [(64, 0), (128, 1)], 128),
        ("ts", [(64, 0), (128, 0)], 128),
    ],
)
def test_which_of_several_tracks_is_read(ending, tracks, width, tmp_path):
    path = tmp_path / f"tracks.{ending}"
    apart(write_tracks, path, tracks)
    info = probe(path)
    assert (info.width, info.other_tracks, info.warnings) == (width, len(tracks) - 1, ["other_tracks"])
    assert np.abs(pixels(read_chunks(info, [0.0, 0.3])).astype(int) - width).max() <= 2
    with warnings.catch_warnings(action="ignore"):
        clip = probe(cut_clip(info, 0.0, 0.3, str(tmp_path)).path)
    assert (clip.width, clip.other_tracks) == (width, 0)
