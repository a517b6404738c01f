"""HDR is detected, however the file states it, and mapped to SDR. Every format and matrix is converted or rejected by name."""

import gc
import shutil
import subprocess
import zlib
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.format import names
from av.video.reformatter import VideoReformatter

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_chunks, scan
from evoprune.video.live import LiveSource
from evoprune.video.readers import colour, ffmpeg
from evoprune.video.readers.live import LiveReader
from tests.video.files import numbered_frame, pixels, quarters, write_video

SIDE = 16
# Patches of color, as 10-bit values of Y and the two color differences, in limited range.
PATCHES = np.array(
    [
        *([level, 512, 512] for level in (64, 160, 256, 352, 448, 544, 640, 940)),
        *([300, 480, 600], [400, 600, 450], [450, 450, 460], [500, 560, 580]),
        *([350, 450, 520], [550, 460, 560], [600, 540, 490], [280, 530, 540]),
    ]
)
# The result of FFmpeg 5.1 for these patches, with HDR mapped as in `colour`. `ffmpeg_maps` runs the command.
MAPPED = {
    "PQ": [
        *((0, 0, 0), (26, 26, 26), (61, 61, 61), (113, 113, 113), (183, 183, 183), (227, 227, 227), (248, 248, 248)),
        *((255, 255, 255), (194, 0, 45), (0, 117, 235), (0, 210, 61), (247, 78, 207), (125, 116, 33), (249, 132, 89)),
        *((134, 205, 250), (107, 58, 92)),
    ],
    "HLG": [
        *((0, 0, 0), (42, 42, 42), (84, 84, 84), (126, 126, 126), (167, 167, 167), (197, 197, 197), (220, 220, 220)),
        *((255, 255, 255), (183, 64, 72), (0, 144, 204), (86, 185, 105), (221, 127, 195), (135, 128, 65), (224, 155, 129)),
        *((160, 198, 224), (125, 82, 111)),
    ],
}  # fmt: skip
CURVES = {"PQ": 16, "HLG": 18}
HDR = {"colorspace": 9, "color_primaries": 9, "color_range": 1}
X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:qp=1"}}
LIGHT_LEVELS = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1):max-cll=1000,400"


def frame_of(planes, pix_fmt, **facts):
    """Build a frame from its planes, each an array `[h, w]`. `facts` are attributes to set on the frame."""
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.frombuffer(plane, values.dtype).reshape(len(values), -1)
        rows[:, : values.shape[1]] = values
    for name, value in facts.items():
        setattr(frame, name, value)
    return frame


def patches(bits=10, sampling="444", full=False):
    """Return the planes of a frame that shows `PATCHES`, and FFmpeg's name for the pixel format."""
    scale = 2.0 ** (bits - 10)
    values = PATCHES.astype(float)
    if full:
        values = (values - [64, 512, 512]) * [1023 / 876, 1023 / 896, 1023 / 896] + [0, 512, 512]
    values = np.clip(np.round(values * scale), 0, 2**bits - 1).astype(np.uint8 if bits == 8 else "<u2")
    planes = [np.repeat(np.repeat(values[None, :, i], SIDE, 0), SIDE, 1) for i in range(3)]
    across, down = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}[sampling]
    planes[1:] = [plane[::down, ::across] for plane in planes[1:]]
    return planes, f"yuv{sampling}p{'' if bits == 8 else f'{bits}le'}"


def middles(rgb):
    return rgb[SIDE // 2, SIDE // 2 :: SIDE].astype(int)


def write(path, *, codec="ffv1", options=None, frame=None, pix_fmt=None, count=4, rotation=0, **facts):
    """Write a file that shows one frame several times. `facts` are attributes to set on the frame and on the encoder."""
    frame = frame or av.VideoFrame.from_ndarray(numbered_frame(7), format="rgb24").reformat(format=pix_fmt)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        for name, value in facts.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        if rotation:
            stream.set_display_rotation(-rotation)
        for i in range(count):
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def remux(path, out, **facts):
    """Copy the packets to another file whose header states the given facts."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for name, value in facts.items():
            setattr(stream.codec_context, name, value)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return out


def dolby_record(profile, base):
    """Return a Dolby Vision configuration box (version 1.0, level 1) that states that there are metadata and a base layer."""
    bits = f"{profile:07b}{1:06b}101{base:04b}"
    content = bytes([1, 0]) + int(bits.ljust(22 * 8, "0"), 2).to_bytes(22, "big")
    return (8 + len(content)).to_bytes(4, "big") + b"dvcC" + content


def with_record(path, out, profile, base):
    content, box = bytearray(path.read_bytes()), dolby_record(profile, base)
    moov = content.rindex(b"moov")
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"hev1"):
        at = content.index(name, moov) - 4
        content[at : at + 4] = (int.from_bytes(content[at : at + 4], "big") + len(box)).to_bytes(4, "big")
    at = content.index(b"hvcC", moov) - 4
    content[at:at] = box
    out.write_bytes(content)
    return out


def dolby_metadata(profile, full_range):
    """Return an HEVC unit with Dolby Vision metadata that leaves frames unchanged (ETSI GS CCM 001)."""

    def ue(value):
        return f"{value + 1:b}".zfill(2 * (value + 1).bit_length() - 1)

    header = f"{25:08b}{2:06b}{18:011b}{profile:04b}00001000{ue(23)}01{full_range}{ue(2)}{ue(2)}{ue(4)}000001"
    mapping = f"00{ue(0) * 3}" + f"{ue(0)}{0:010b}{1023:010b}" * 3 + ue(0) * 2
    curves = f"{ue(0)}{ue(0)}0{ue(0)}{0:023b}{ue(2 - 1)}{0:023b}" * 3
    bits = header + mapping + curves
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    content = int(bits, 2).to_bytes(len(bits) // 8, "big")
    content += zlib.crc32(content[1:]).to_bytes(4, "big") + b"\x80"
    escaped, zeros = bytearray(), 0
    for byte in content:
        if zeros >= 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = 0 if byte else zeros + 1
    return b"\0\0\0\1\x7c\1" + bytes(escaped)


def with_metadata(path, out, unit):
    """Copy a raw HEVC stream and insert `unit` after each frame."""
    units = path.read_bytes().replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    out.write_bytes(b"".join(b"\0\0\0\1" + u + (unit if u[0] >> 1 < 32 else b"") for u in units))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Paths of 10-bit HEVC files without color information, by extension."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        ending: write(folder / f"plain.{ending}", pix_fmt="yuv420p10le", **X265) for ending in ("mp4", "mkv", "hevc")
    }


def check_seen(path, hdr_format):
    """Check that HDR is detected and mapped in a file and in a live source, or that Dolby Vision's own format is rejected."""
    info = probe(path)
    assert (info.hdr, info.hdr_format) == (hdr_format is not None, hdr_format)
    assert info.warnings == ["hdr_video"] * info.hdr
    with closing(LiveReader(str(path), path.name, 1.0)) as reader:
        header = reader.next(0.0)
        assert header["hdr_format"] == hdr_format
        live = np.empty((1, header["height"], header["width"], 3), np.uint8)
        if hdr_format == "IPTPQc2":
            with pytest.raises(VideoError, match="Dolby Vision"):
                reader.fill(live)
            with pytest.raises(VideoError, match="Dolby Vision") as caught:
                list(read_chunks(info, [0.0]))
            assert "HDR10 or SDR" in caught.value.hint
            return
        reader.fill(live)
    (chunk,) = read_chunks(info, [0.0])
    assert (live == chunk.pixels).all()
    with av.open(str(path)) as container:
        as_sdr = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert (chunk.pixels[0] == as_sdr).all() == (hdr_format is None)


@pytest.mark.parametrize("name", ["frames", "header.mp4", "header.mkv", "prores.mov", "vp9.webm", "light_levels"])
@pytest.mark.parametrize("hdr_format", CURVES)
def test_hdr_by_curves_of_frames_and_headers(name, hdr_format, plain, tmp_path):
    trc = CURVES[hdr_format]
    if name == "frames":
        path = write(tmp_path / "frames.mp4", pix_fmt="yuv420p10le", color_trc=trc, **X265)
    elif name.startswith("header"):
        path = remux(plain["mp4"], tmp_path / name, color_trc=trc, colorspace=9, color_primaries=9)
    elif name == "light_levels":
        options = {"x265-params": f"log-level=none:{LIGHT_LEVELS}"}
        path = write(tmp_path / "levels.mp4", codec="libx265", options=options, pix_fmt="yuv420p10le")
        hdr_format = "PQ"
    else:
        codec, pix_fmt = ("prores_ks", "yuv422p10le") if name == "prores.mov" else ("libvpx-vp9", "yuv420p")
        path = write(tmp_path / name, codec=codec, pix_fmt=pix_fmt, color_trc=trc)
    check_seen(path, hdr_format)


@pytest.mark.parametrize("trc", [1, 2, 6, 13, 14, 15])  # 14 and 15 mean BT.2020 with 10 and 12 bits
def test_other_curves_are_sdr_to_the_bit(trc, tmp_path):
    check_seen(write(tmp_path / "sdr.mkv", pix_fmt="yuv420p10le", color_trc=trc, colorspace=9, color_primaries=9), None)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("profile", "base", "hdr_format"),
    [(5, 0, "IPTPQc2"), (8, 1, "PQ"), (8, 4, "HLG"), (8, 2, None), (7, 6, "PQ"), (20, 0, "IPTPQc2")],
)
def test_dolby_vision_by_its_record(profile, base, hdr_format, container, plain, tmp_path):
    if (profile, container) == (20, "mkv"):
        pytest.skip("PyAV does not write it")
    path = with_record(plain["mp4"], tmp_path / "record.mp4", profile, base)
    check_seen(remux(path, tmp_path / "record.mkv") if container == "mkv" else path, hdr_format)


@pytest.mark.parametrize("tag", ["dvhe", "dvh1"])
def test_dolby_vision_by_its_tag(tag, plain, tmp_path):
    path = tmp_path / "tag.mp4"
    path.write_bytes(plain["mp4"].read_bytes().replace(b"hev1", tag.encode()))
    check_seen(path, "IPTPQc2")
    base = write(tmp_path / "base.mp4", pix_fmt="yuv420p10le", color_trc=16, colorspace=9, color_primaries=9, **X265)
    base.write_bytes(base.read_bytes().replace(b"hev1", tag.encode()))  # players without Dolby Vision read it as HDR10
    check_seen(base, "PQ")


@pytest.mark.parametrize(("profile", "full_range", "hdr_format"), [(0, 1, "IPTPQc2"), (1, 0, None)])
def test_dolby_vision_by_the_metadata_of_frames(profile, full_range, hdr_format, plain, tmp_path):
    path = with_metadata(plain["hevc"], tmp_path / "units.hevc", dolby_metadata(profile, full_range))
    with av.open(str(path)) as container:
        assert "DOVI_METADATA" in next(container.decode(video=0)).side_data
    check_seen(path, hdr_format)
    source = LiveSource(str(path), pace="file", timeout_s=1.0)
    if hdr_format is None:
        with closing(source.frames(lambda: 0.0)) as frames:
            next(frames)
            assert (source.facts["hdr"], source.facts["hdr_format"]) == (False, None)


def test_a_title_that_sounds_like_dolby_vision_is_none(tmp_path):
    title = "DOVI configuration record: version: 1.0, profile: 5, level: 1, compatibility id: 0\n  Stream #0:0"
    info = probe(write_video(tmp_path / "title.mkv", [numbered_frame(1)], metadata={"title": title}))
    assert not info.hdr


def test_frames_after_hdr_in_a_joined_file_are_what_they_say(tmp_path):
    hdr = write(tmp_path / "hdr.ts", pix_fmt="yuv420p10le", color_trc=16, count=10, **X265)
    sdr = write(tmp_path / "sdr.ts", pix_fmt="yuv420p10le", count=10, **X265)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(hdr.read_bytes() + sdr.read_bytes())
    info = probe(joined)
    assert info.hdr and info.clock_restarts == 1
    right = [pixels(read_chunks(probe(path), [0.5]))[0] for path in (hdr, sdr)]
    assert (pixels(read_chunks(info, [0.5, 1.5])) == right).all()
    with closing(LiveReader(str(joined), "it", 1.0)) as reader:
        for after_s, expected in zip((0.5, 1.5), right, strict=True):
            assert reader.next(after_s)
            live = np.empty((1, 48, 64, 3), np.uint8)
            reader.fill(live)
            assert (live[0] == expected).all()


@pytest.mark.parametrize("hdr_format", MAPPED)
@pytest.mark.parametrize("rotation", [0, 90])
def test_hdr_is_mapped_as_ffmpeg_maps_it(hdr_format, rotation, tmp_path):
    planes, pix_fmt = patches()
    frame = frame_of(planes, pix_fmt)
    facts = HDR | {"color_trc": CURVES[hdr_format]}
    container = {"codec": "ffv1"} if not rotation else X265
    path = write(
        tmp_path / ("turned.mp4" if rotation else "hdr.mkv"), frame=frame, rotation=rotation, **container, **facts
    )
    info = probe(path)
    (chunk,) = read_chunks(info, [0.0, 0.1])
    for rgb in chunk.pixels:
        assert np.abs(middles(np.rot90(rgb, rotation // 90)) - MAPPED[hdr_format]).max() <= 1
    smaller = pixels(read_chunks(replace(info, width=info.width // 2, height=info.height // 2), [0.0]))[0]
    inside = np.rot90(smaller, rotation // 90)[SIDE // 4, SIDE // 4 :: SIDE // 2].astype(int)
    assert np.abs(inside - MAPPED[hdr_format]).max() <= 1


def ffmpeg_maps(planes, pix_fmt, hdr_format, full):
    """Convert a frame with the ffmpeg program, and return the result as uint8 `[h, w, 3]`."""
    curve = {"PQ": "smpte2084", "HLG": "arib-std-b67"}[hdr_format]
    filters = (
        f"setparams=color_primaries=bt2020:color_trc={curve}:colorspace=bt2020nc:range={'pc' if full else 'tv'},"
        "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
        "zscale=t=bt709:m=gbr:r=full,format=gbrp,format=rgb24"
    )
    height, width = planes[0].shape
    raw = ["-f", "rawvideo", "-pix_fmt", pix_fmt, "-s", f"{width}x{height}", "-i", "-"]
    command = ["ffmpeg", "-loglevel", "error", *raw, "-vf", filters, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    content = b"".join(plane.tobytes() for plane in planes)
    made = subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout
    return np.frombuffer(made, np.uint8).reshape(height, width, 3)


def has_zscale():
    if shutil.which("ffmpeg") is None:
        return False
    filters = subprocess.run(["ffmpeg", "-filters"], capture_output=True, text=True).stdout
    return " zscale " in filters and " tonemap " in filters


@pytest.mark.few(6)
@pytest.mark.skipif(not has_zscale(), reason="no ffmpeg with zscale")
@pytest.mark.parametrize("hdr_format", MAPPED)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sampling", ["444", "422", "420"])
@pytest.mark.parametrize("bits", [8, 10, 12])
def test_hdr_is_mapped_as_the_ffmpeg_that_is_here_maps_it(bits, sampling, full, hdr_format):
    planes, pix_fmt = patches(bits, sampling, full)
    frame = frame_of(planes, pix_fmt, **HDR | {"color_trc": CURVES[hdr_format], "color_range": 2 if full else 1})
    got = colour.Converter("it").rgb(frame, frame.width, frame.height)
    assert np.abs(middles(got) - middles(ffmpeg_maps(planes, pix_fmt, hdr_format, full))).max() <= 2


@pytest.mark.parametrize("hdr_format", MAPPED)
@pytest.mark.parametrize(
    "pix_fmt", ["gbrp10le", "gbrp12le", "rgb48le", "gbrap12le", "p010le", "yuva444p10le", "x2rgb10le"]
)
def test_the_same_colours_in_other_formats(pix_fmt, hdr_format):
    planes, source = patches()
    frame = frame_of(planes, source, colorspace=9, color_range=1)
    frame = VideoReformatter().reformat(frame, format=pix_fmt)
    for name, value in (HDR | {"color_trc": CURVES[hdr_format]}).items():
        setattr(frame, name, value)
    got = colour.Converter("it").rgb(frame, frame.width, frame.height)
    assert np.abs(middles(got) - MAPPED[hdr_format]).max() <= 3


def test_transparent_hdr_is_put_over_white():
    planes, pix_fmt = patches()
    alpha = np.full_like(planes[0], 1023)
    alpha[: SIDE // 4] = 0
    frame = frame_of([*planes, alpha], pix_fmt.replace("yuv", "yuva"), color_trc=16, **HDR)
    got = colour.Converter("it").rgb(frame, frame.width, frame.height)
    assert np.abs(middles(got) - MAPPED["PQ"]).max() <= 1
    assert (got[0] == 255).all()


def test_a_frame_is_computed_in_strips(monkeypatch):
    planes, pix_fmt = patches()
    frame = frame_of(planes, pix_fmt, color_trc=16, **HDR)
    whole = colour.Converter("it").rgb(frame, frame.width, frame.height)
    monkeypatch.setattr(colour, "STRIP", 3 * frame.width)
    assert (colour.Converter("it").rgb(frame, frame.width, frame.height) == whole).all()


def test_the_primaries_of_hdr():
    """Display P3's red is inside BT.2020 but outside BT.709, so it is clipped. BT.709's red stays unchanged."""
    red = np.full((16, 16), 600, "<u2")
    none = np.zeros_like(red)

    def shown(primaries):
        frame = frame_of([none, none, red], "gbrp10le", color_trc=16, colorspace=0, color_primaries=primaries)
        return colour.Converter("it").rgb(frame, 16, 16)[8, 8].tolist()

    assert shown(1)[1:] == [0, 0]
    assert shown(2) == shown(9)  # PQ implies BT.2020 by default
    assert shown(1)[0] < shown(12)[0] < shown(9)[0]


REFUSED = {
    **{8: "ycgco", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c"},
    **{14: "ictcp", 15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro"},
}


def check_refused(error, path, *words):
    assert error.exit_code == 3 and "BT.709" in error.hint
    assert error.message.startswith(f"the colors of {path} cannot be converted: ")
    assert all(word in error.message for word in words)


@pytest.mark.parametrize("matrix", REFUSED)
def test_a_matrix_that_cannot_be_converted_is_named(matrix, tmp_path):
    path = write(tmp_path / "matrix.mkv", pix_fmt="yuv444p", colorspace=matrix, count=3)
    info, words = probe(path), ("yuv444p", f"matrix {REFUSED[matrix]},", "range", "primaries", "curve")
    assert scan(path).frames == 3  # the frames are not damaged
    with pytest.raises(VideoError) as caught:
        list(read_chunks(info, [0.0]))
    check_refused(caught.value, path, *words)
    with closing(LiveReader(str(path), "it", 1.0)) as reader:
        header = reader.next(0.0)
        with pytest.raises(VideoError) as caught:
            reader.fill(np.empty((1, header["height"], header["width"], 3), np.uint8))
    check_refused(caught.value, "it", *words)


def test_folders_name_what_cannot_be_converted_and_map_hdr(tmp_path, in_process, monkeypatch):
    frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24").reformat(format="rgb48be")
    for i in range(2):
        encoder = av.CodecContext.create("png", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, "rgb48be", Fraction(1, 10)
        encoder.color_trc, encoder.color_primaries = 16, 9
        frame.color_trc, frame.color_primaries = 16, 9
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        Path(tmp_path / f"{i}.png").write_bytes(b"".join(bytes(packet) for packet in packets))
    info = probe(tmp_path)
    assert (info.hdr_format, info.warnings) == ("PQ", ["hdr_video"])
    right = colour.Converter("it").rgb(frame, 64, 48)
    assert (pixels(read_chunks(info, [0.0])) == right).all()
    monkeypatch.setattr(colour, "UNREAD", ("rgb48be",))
    with pytest.raises(VideoError) as caught:
        list(read_chunks(info, [0.0]))
    check_refused(caught.value, tmp_path, "rgb48be")


def test_lack_of_memory_is_not_damage(monkeypatch):
    def fail(*_, **__):
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(colour.Converter, "_reformat", fail)
    frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
    with pytest.raises(MemoryError) as caught:
        colour.Converter("it").rgb(frame, 64, 48)
    assert not isinstance(caught.value, av.error.FFmpegError)


COARSE = {"bgr8", "rgb8", "bgr4", "rgb4", "bgr4_byte", "rgb4_byte", "monob", "monow"}  # fewer than 4 bits per channel


@pytest.mark.few(40)
@pytest.mark.parametrize("name", sorted(names))
def test_every_format_is_converted_or_refused(name):
    """The formats include some that libswscale would read incorrectly or crash on."""
    rgb, reformatter = quarters(), VideoReformatter()
    source = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    known = True
    try:
        if name in colour.UNREAD:
            raise ValueError
        frame = reformatter.reformat(source, format=name)
    except (av.error.FFmpegError, ValueError):  # evoprune may still be able to read the format
        known = False
        try:
            frame = av.VideoFrame(64, 48, name)
        except (av.error.FFmpegError, ValueError):
            return  # the format is for frames on a graphics card
        for plane in frame.planes:
            np.frombuffer(plane, np.uint8)[:] = 0
    try:
        got = colour.Converter("it").rgb(frame, 64, 48)
    except VideoError as error:
        check_refused(error, "it", f": {name},")
        return
    assert got.shape == (48, 64, 3)
    if known and name not in COARSE and not name.startswith(("gray", "ya")):
        at = [(12, 10), (12, 50), (36, 10), (36, 50)]
        assert max(np.abs(got[y, x].astype(int) - rgb[y, x]).max() for y, x in at) <= 20


@pytest.mark.parametrize("form", ["gray", "gray10le", "gray16le", "ya8"])
def test_grey_of_limited_range_is_expanded(form):
    bits = 10 if "10" in form else 16 if "16" in form else 8
    stored = np.array([[16, 64, 128, 192, 235]]).repeat(4, 0) << (bits - 8)
    stored = stored.astype(np.uint8 if bits == 8 else np.uint16)
    if form == "ya8":
        stored = np.stack([stored, np.full_like(stored, 255)], 2).reshape(4, -1)
    for said, expected in ((2, (16, 64, 128, 192, 235)), (1, (0, 56, 130, 205, 255))):
        frame = frame_of([stored], form, color_range=said) if form != "ya8" else av.VideoFrame(5, 4, form)
        if form == "ya8":
            np.frombuffer(frame.planes[0], np.uint8).reshape(4, -1)[:, :10] = stored
            frame.color_range = said
        rgb = colour.Converter("a.mkv").rgb(frame, 5, 4)
        assert np.abs(rgb[0, :, 0].astype(int) - expected).max() <= 1 and (rgb == rgb[:1, :, :1]).all()


def test_a_frame_frees_its_memory_when_nobody_has_it_any_more():
    frame = frame_of([np.zeros((4, 4), np.uint8)], "gray")
    gc.collect()
    gc.disable()
    try:
        colour.Converter("a.mkv").rgb(frame, 4, 4)
        ffmpeg.orientation(frame)
        del frame
        assert gc.collect() == 0
    finally:
        gc.enable()
