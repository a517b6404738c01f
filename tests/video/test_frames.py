"""Tests that the right frame is read at any time, with the right pixels, from every kind of file and with every decoder."""

import io
import pickle
import struct
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, read_chunks, scan
from evoprune.video.info import TOLERANCE_S
from evoprune.video.readers import ffmpeg, pyav
from evoprune.video.readers.deinterlacing import deinterlacing
from tests.decoders import DECODERS, EVERY
from tests.video.files import (
    in_this_process,
    number_of,
    numbered_frames,
    numbers,
    pixels,
    quarters,
    write_image,
    write_video,
)
from tests.video.good import good_files
from tests.video.kinds import KINDS, table, write_kind

WHOLE = [name for name, kind in KINDS.items() if kind.frames == 40 and not kind.hidden]


# Files with every codec, and with unusual times and sizes. The other containers are tested only with -m full.
FEW = (
    "h264.mp4", "hevc.ts", "vp9.webm", "av1.mkv", "h264_10.mp4", "mpeg4.avi", "late.ts", "vary.mkv", "open_gop.mp4", "odd.mp4",
    "turned.mp4", "mirrored.mkv", "interlaced.mp4", "picture.gif",
)  # fmt: skip


@pytest.fixture(
    scope="session", params=[name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in WHOLE]
)
def info(request, folder):
    return probe(write_kind(folder, request.param))


@pytest.fixture(scope="session")
def long_file(folder):
    """A video that lasts 25.6 s and has a keyframe every second."""
    return write_video(folder / "long.mp4", numbered_frames(256))


def everything(info):
    """Decode a whole file. Returns a list of (seconds from the first frame, RGB) in display order."""
    with av.open(info.path) as container:
        stream = container.streams.best("video")
        rate = ffmpeg.frame_rate(stream)[0]
        converter, decoded = VideoReformatter(), container.decode(stream)
        shown = ((pts, whole()) for pts, whole in deinterlacing((frame.pts, frame) for frame in decoded))
        rgb = ((pts, converter.reformat(frame, format="rgb24").to_ndarray()) for pts, frame in shown)
        frames = [(pts, turned(picture, info)) for pts, picture in rgb]
        if frames[0][0] is None or info.path.endswith("avi"):  # files without timestamps
            return [(float(i / rate), rgb) for i, (_, rgb) in enumerate(frames)]
        return [(float((pts - frames[0][0]) * stream.time_base), rgb) for pts, rgb in frames]


def turned(rgb, info):
    return np.rot90(np.fliplr(rgb) if info.mirrored else rgb, -info.rotation_deg // 90)


def expected(frames, wanted):
    """Return the frame that a player displays at the time `wanted`."""
    return max((f for f in frames if f[0] <= wanted + TOLERANCE_S), key=lambda f: f[0], default=frames[0])


def test_the_frame_on_screen_is_read(info):
    frames = everything(info)
    times = sorted([-1.0, 0.0, *np.linspace(0, info.duration_s, 23), *(t for t, _ in frames[::3]), 99.0])
    chunks = list(read_chunks(info, times))
    displayed = [expected(frames, wanted) for wanted in times]
    assert [t for chunk in chunks for t in chunk.times_s] == pytest.approx([t for t, _ in displayed])
    np.testing.assert_array_equal(pixels(chunks), np.stack([rgb for _, rgb in displayed]))
    assert numbers(info, [t + 0.001 for t, _ in frames]) == list(range(40))  # in the order in which they were written


GROUPS = {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal:scenecut=0"}
LONG_FILES = {  # how to write each file, and whether the frames between distant times can be skipped
    "long.mp4": ({}, True),
    "long.ts": ({"start": 3.0}, True),
    "long.mov": ({"start": 3.0}, True),
    "long.mkv": ({"start": 3.0}, True),
    "long.webm": ({"codec": "libvpx-vp9"}, True),
    "av1.mkv": ({"codec": "libsvtav1"}, True),
    "long_hevc.mp4": ({"codec": "libx265", "options": {"x265-params": "log-level=none"}}, True),
    "open_gop.mp4": ({"options": GROUPS}, False),
    "refresh.mp4": ({"options": {"x264-params": "intra-refresh=1:scenecut=0"}}, False),
    "open_gop.ts": ({"options": GROUPS}, False),
    "fragments.mp4": ({"container_options": {"movflags": "frag_keyframe+empty_moov"}}, False),
    "no_index.mkv": ({"container_options": {"live": "1"}}, False),
    "one_keyframe.mp4": ({"gop": 1000, "options": {"sc_threshold": "0"}}, False),
    "one_keyframe.ts": ({"gop": 1000, "options": {"sc_threshold": "0"}}, False),
    "long.avi": ({}, False),
    "long.flv": ({}, False),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", LONG_FILES)
def test_jumps_change_nothing_but_how_much_is_decoded(name, folder, decoded, monkeypatch):
    how, short = LONG_FILES[name]
    info = probe(write_video(folder / f"jump_{name}", numbered_frames(256), **how))
    for step in (0.7, 3.3, 6.1):
        times = np.arange(0.05, info.duration_s + step, step)
        with monkeypatch.context() as patch:
            patch.setattr(pyav, "planned", lambda info, times, *how: [pyav.Run(tuple(times), (None,))])
            straight = list(read_chunks(info, times, cores=1))
        jumping = list(read_chunks(info, times))
        np.testing.assert_array_equal(pixels(straight), pixels(jumping))
        assert [c.times_s for c in straight] == [c.times_s for c in jumping]
        assert [number_of(rgb) for rgb in pixels(straight)] == [min(int(t * 10 + 0.01), 255) for t in times]
    decoded[0] = 0
    assert numbers(info, [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]) == [0, 50, 100, 150, 200, 250]
    # The number includes frames that were decoded by threads whose work is not needed.
    assert decoded[0] < (200 if short else 3 * 256)


@pytest.mark.few(8)
@pytest.mark.parametrize("frames_fitting", [0, 1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("total", [2, 7, 10])
def test_chunks_are_bounded_and_whole_pairs(frames_fitting, total, long_file):
    info = probe(long_file)
    times = [0.05 + 0.1 * i for i in range(total)]
    chunks = list(read_chunks(info, times, chunk_bytes=frames_fitting * 64 * 48 * 3 + 100))
    sizes = [len(chunk.pixels) for chunk in chunks]
    assert [chunk.first for chunk in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(sizes) <= max(2, frames_fitting)
    assert all(size % 2 == 0 for size in sizes[:-1])
    assert [number_of(rgb) for rgb in pixels(chunks)] == list(range(total))
    for chunk in chunks:
        assert chunk.pixels.dtype == np.uint8
        assert chunk.pixels.flags.c_contiguous
        assert len(chunk.times_s) == len(chunk.pixels)


def test_chunks_are_read_one_by_one(long_file, decoded):
    chunks = read_chunks(probe(long_file), [0.05 + 0.1 * i for i in range(200)], chunk_bytes=1, cores=1)
    next(chunks)
    assert decoded[0] <= 3


def test_the_file_is_closed_on_early_exit(long_file, in_process, monkeypatch):
    info, opened, original = probe(long_file), [], ffmpeg.open_video

    @contextmanager
    def noticing(*part):
        with original(*part) as container:
            opened.append(container)
            yield container

    monkeypatch.setattr(ffmpeg, "open_video", noticing)
    chunks = read_chunks(info, [0.05, 0.15, 0.25, 9.95], chunk_bytes=1, cores=1)
    next(chunks)
    assert any(container.input_was_opened for container in opened)
    chunks.close()
    assert not any(container.input_was_opened for container in opened)


def test_requests(long_file, folder):
    # The metadata can be sent to another process, and so can chunks.
    info = pickle.loads(pickle.dumps(probe(long_file)))
    chunk = pickle.loads(pickle.dumps(next(read_chunks(info, (1.05, 2.05)))))
    assert [number_of(rgb) for rgb in chunk.pixels] == [10, 20] and list(read_chunks(info, [])) == []
    with pytest.raises(VideoError, match=r"no such file: .*gone.mp4"):
        list(read_chunks(replace(info, path=str(folder / "gone.mp4")), [0.0]))
    with pytest.raises(UsageError, match="unknown decoder 'vhs'"):
        read_chunks(info, [0.0], decoder="vhs")
    for times in ([1.0, 0.5], [float("nan")], [0.0, float("inf")]):
        with pytest.raises(UsageError, match="ascend"):
            read_chunks(info, times)


@pytest.mark.few(14)
@pytest.mark.parametrize("decoder", EVERY)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_answered_or_refused(name, decoder, folder, capfd):
    kind, path = KINDS[name], write_kind(folder, name)
    capfd.readouterr()  # discards what the encoders have written
    info = probe(path)
    times = sorted([-1.0, 0.0, *np.linspace(0, info.duration_s, 23), 99.0])
    reason = kind.decord_refuses if decoder == "decord" else None
    if reason:
        with pytest.raises(VideoError) as caught:
            list(read_chunks(info, times, decoder=decoder))
        assert caught.value.exit_code == 3
        assert reason in caught.value.message and info.path in caught.value.message
        assert caught.value.hint == "use decoder pyav"
    else:
        right, got = (list(read_chunks(info, times, decoder=d)) for d in ("pyav", decoder))
        shown, expected = ([number_of(rgb) for rgb in pixels(chunks)] for chunks in (got, right))
        assert shown == expected == sorted(shown) and (shown[0], shown[-1]) == (kind.hidden, kind.frames - 1)
        assert got[0].times_s == pytest.approx(right[0].times_s, abs=1e-6)
        difference = np.abs(pixels(got).astype(int) - pixels(right))
        # The two readers round differently if there are more than 8 bits, and at odd edges, where chroma pixels are half covered.
        assert difference.max() <= 2 or (name == "odd.webm" or ("_10" in name and difference.mean() < 2))
    assert capfd.readouterr() == ("", "")


def test_the_results_hold_this_table():
    page = Path(__file__).parents[2] / "results" / "video.md"
    assert table() in page.read_text(encoding="utf-8")


def read_everything(path, decoder, chunk_frames):
    """Read a file and return its metadata, the result of a scan, and the times and pixels of some frames, or else the error."""
    info = probe(path)
    end = info.duration_s
    times = sorted([0.0, *np.linspace(0, end, 12), *np.random.default_rng(0).uniform(0, end, 5), end + 1])
    chunk_bytes = chunk_frames * info.width * info.height * 3
    try:
        chunks = list(read_chunks(info, times, decoder=decoder, chunk_bytes=chunk_bytes))
    except VideoError as problem:
        return info, None, (problem.message, problem.hint), None
    displayed = [(chunk.first, chunk.times_s, chunk.damaged) for chunk in chunks]
    return info, replace(scan(path), seconds=0.0), displayed, pixels(chunks)


@pytest.mark.parametrize(
    "name", ["h264.mp4", "vary.webm", "turned.mp4", "late.ts", "folder", pytest.param("200", marks=pytest.mark.slow)]
)
def test_files_apart_and_here(name, folder, tmp_path):
    files = [tmp_path] if name == "folder" else good_files(tmp_path) if name == "200" else [write_kind(folder, name)]
    for i, rgb in enumerate(numbered_frames(9) if name == "folder" else ()):
        write_image(tmp_path / f"{i}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}", rgb)
    assert len(files) == (200 if name == "200" else 1)
    for i, path in enumerate(files):
        for decoder in DECODERS:
            apart = read_everything(path, decoder, 4 + i % 7)
            with in_this_process():
                here = read_everything(path, decoder, 4 + i % 7)
            assert apart[:3] == here[:3] and np.array_equal(apart[3], here[3]), path
            assert decoder == "decord" or apart[3] is not None


def first_picture(path):
    return next(read_chunks(probe(path), [0.0])).pixels[0]


def corners(picture):
    """Return an image's size and the colors of its corners: upper left, upper right, lower left, lower right."""
    height, width = picture.shape[:2]
    colours = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    places = [(y, x) for y in (8, height - 8) for x in (8, width - 8)]
    return (height, width), "".join(colours[tuple(int(v > 128) for v in picture[place])] for place in places)


@pytest.mark.parametrize(
    ("matrix", "order"),
    [((0, 1, -1, 0), "BRWG"), ((0, -1, 1, 0), "GWRB"), ((-1, 0, 0, -1), "WBGR"), ((-1, 0, 0, 1), "GRWB")],
)
def test_the_matrix_of_a_phone_is_read_as_phones_mean_it(matrix, order, folder):
    path = write_video(folder / "phone.mp4", [quarters()] * 2)
    content = bytearray(path.read_bytes())
    # If a phone is held upright, it writes (0, 1, -1, 0) here, as 16.16 fixed-point numbers.
    at = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert corners(first_picture(path))[1] == order


def test_full_range_is_honoured(folder):
    grey = [np.full((48, 64, 3), 10, np.uint8)] * 2
    path = write_video(folder / "full.mp4", grey, codec="mjpeg", pix_fmt="yuvj420p")
    assert abs(int(first_picture(path).mean()) - 10) <= 2


CLEAR = np.zeros((48, 64, 4), np.uint8)  # red, half-transparent black, and fully transparent, which is stored as black
CLEAR[:, :24] = 200, 0, 0, 255
CLEAR[:, 24:40] = 0, 0, 0, 128
# The expected colors of these three parts over white, from left to right.
OVER_WHITE = [(200, 0, 0), (127, 127, 127), (255, 255, 255)]
TRANSPARENT = {
    "prores.mov": ("prores_ks", "yuva444p10le", {}),
    "animation.mov": ("qtrle", "argb", {}),
    "png.mov": ("png", "rgba", {}),
    "ffv1.mkv": ("ffv1", "bgra", {}),
    "vp9.webm": ("libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
}


@pytest.mark.parametrize("name", [*TRANSPARENT, "a.gif", "a.apng"])
def test_transparent_parts_of_videos_are_put_over_white(name, tmp_path):
    if name in TRANSPARENT:
        codec, pix_fmt, options = TRANSPARENT[name]
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream(codec, rate=10, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
            for i in range(3):
                frame = av.VideoFrame.from_ndarray(CLEAR, format="rgba").reformat(format=pix_fmt)
                frame.pts, frame.time_base = i, Fraction(1, 10)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    else:
        first, *others = [Image.fromarray(np.roll(CLEAR, i, 1)) for i in range(3)]
        how = {"format": "PNG"} if name == "a.apng" else {"disposal": 2}
        first.save(tmp_path / name, save_all=True, append_images=others, duration=100, **how)
    (chunk,) = read_chunks(probe(tmp_path / name), [0.05, 0.25])
    for got in chunk.pixels if name in TRANSPARENT else chunk.pixels[:1]:
        difference = np.abs(np.subtract([got[24, x].astype(int) for x in (10, 32, 56)], OVER_WHITE)).max(1)
        assert max(difference[[0, 2]] if name == "a.gif" else difference) <= 4  # GIF has no partial transparency


@pytest.mark.parametrize(("ending", "mode"), [("png", "RGBA"), ("webp", "RGBA"), ("png", "LA"), ("png", "P")])
def test_transparent_frames_of_a_folder_are_put_over_white(ending, mode, tmp_path):
    """The result is the same as for still images, which other tests compare with transformers."""
    image = Image.fromarray(CLEAR[..., 0]).convert("P") if mode == "P" else Image.fromarray(CLEAR).convert(mode)
    how = {"transparency": 0} if mode == "P" else {"lossless": True, "exact": True} if ending == "webp" else {}
    image.save(tmp_path / f"a.{ending}", **how)
    image.resize((128, 96), Image.Resampling.NEAREST).save(tmp_path / f"b.{ending}", **how)
    (chunk,) = read_chunks(probe(tmp_path), [0.0, 0.5])
    right = first_picture(tmp_path / f"a.{ending}").astype(int)
    assert np.abs(chunk.pixels - right)[:, 24, [10, 32, 56]].max() <= 4 and right[24, 56].tolist() == [255] * 3


@pytest.mark.parametrize(("untrusted", "threads"), [((), 3), (("h264",), 1)])
def test_decoders_that_differ_with_several_threads_get_one(long_file, monkeypatch, untrusted, threads):
    assert "theora" in ffmpeg.UNTHREADED
    monkeypatch.setattr(ffmpeg, "UNTHREADED", untrusted)
    with ffmpeg.open_video(str(long_file)) as container:
        stream = ffmpeg.video_stream(container, str(long_file), threads=3)
        assert stream.codec_context.thread_count == threads


@pytest.mark.parametrize("orientation", [2, 4, 5, 7, 8])
@pytest.mark.parametrize("name", ["a.mov", "a.png"])
def test_moving_pictures_are_turned_and_mirrored_by_their_exif_data(name, orientation, tmp_path):
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = [Image.fromarray(quarters() // shade) for shade in (1, 2)]
    path = tmp_path / name
    if name == "a.png":
        stored[0].save(path, exif=tags, save_all=True, append_images=stored[1:], duration=500)
    else:
        with av.open(str(path), "w") as out:
            stream = out.add_stream("mjpeg", rate=2)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
            for number, picture in enumerate(stored):
                content = io.BytesIO()
                picture.save(content, "JPEG", exif=tags, quality=95)
                packet = av.Packet(content.getvalue())
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 2), number, number
                out.mux(packet)
    stored[0].getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(stored[0])).astype(int)
    (chunk,) = read_chunks(probe(path), [0.0])
    assert chunk.pixels[0].shape == expected.shape
    middles = np.s_[6:-6:12, 6:-6:12]
    assert np.abs(chunk.pixels[0][middles] - expected[middles]).max() < 12
