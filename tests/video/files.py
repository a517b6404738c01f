"""Writes test videos in which each frame shows its own number. Each video is encoded in a separate process.

The separate process is needed because an encoder may change the process in which it runs. When libsvtav1 runs as root, it switches
to the real-time scheduling class, which child processes inherit. If the test process itself encoded AV1, its children could starve
all other programs and freeze the machine.
"""

import multiprocessing
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from evoprune.video.frames import read_chunks
from evoprune.video.sandbox import isolation

BITS = 8
CLOCK = Fraction(1, 1000)
# Child processes are forked from a server that has already imported this file, so each one starts within milliseconds.
CONTEXT = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(["tests.video.files"])


def apart(function: Callable, *arguments, **how):
    """Call a function in another process and return its result. The function, its arguments and its result must be picklable."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(partial(function, *arguments, **how)).result()


@contextmanager
def in_this_process() -> Iterator[None]:
    """Make evoprune read videos in this process instead of in a worker process."""
    usual = isolation.POSSIBLE
    isolation.POSSIBLE = False
    try:
        yield
    finally:
        isolation.POSSIBLE = usual


def numbered_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a frame, uint8 `[height, width, 3]`, that shows `number` (0..255) as vertical stripes, highest bit on the left."""
    bits = np.array([(number >> bit) & 1 for bit in reversed(range(BITS))], np.uint8)
    row = bits[np.arange(width) * BITS // width] * 180 + 40
    return np.broadcast_to(row[:, None], (height, width, 3)).astype(np.uint8)


def number_of(rgb: np.ndarray) -> int:
    """Return the number that a frame from `numbered_frame` shows. It can be read even after lossy encoding."""
    middles = (2 * np.arange(BITS) + 1) * rgb.shape[1] // (2 * BITS)
    return int("".join("1" if rgb[:, x].mean() > 128 else "0" for x in middles), 2)


def numbered_frames(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [numbered_frame(i, height, width) for i in range(count)]


def write_video(path: Path | str, frames: Iterable[np.ndarray], **how) -> Path:
    """Run `encode_video` in another process to write a file of RGB frames."""
    apart(encode_video, str(path), list(frames), **how)
    return Path(path)


def encode_video(
    path: str,
    frames: Sequence[np.ndarray],
    *,
    fps: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    mirrored: bool = False,
    pts: Sequence[float] | None = None,
    start: float = 0.0,
    gop: int = 10,
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    audio_s: float = 0.0,
    container_options: dict[str, str] | None = None,
) -> None:
    """Encode RGB frames into a file. The file's extension determines the container.

    Args:
        codec, options: FFmpeg's name for the encoder, and the encoder's options.
        rotation, mirrored: How players turn the frames. They first flip the frames left to right if `mirrored` is True, and then
            rotate them clockwise by `rotation` degrees.
        pts: The time of each frame in seconds. By default, times are spaced evenly according to `fps`, beginning at `start`.
        gop: Maximum number of frames from one keyframe to the next.
        audio_s: Length of a silent audio track in seconds, or 0 for no audio.
        container_options: Options for the container, such as `{"movflags": "faststart"}`.
    """
    times = [start + i / fps for i in range(len(frames))] if pts is None else pts
    with av.open(path, "w", container_options=container_options or {}) as out:
        out.metadata.update(metadata or {})
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        tick = 1 / Fraction(fps)
        if pts is not None or start:
            stream.codec_context.time_base = tick = CLOCK
        if rotation or mirrored:
            # FFmpeg rotates counterclockwise and then flips, so the rotation must go in the opposite direction if there is a flip.
            stream.set_display_rotation(rotation if mirrored else -rotation, hflip=mirrored)
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio_s else None
        converter = VideoReformatter()  # shared by all frames, because creating it takes longer than converting a frame
        for rgb, time in zip(frames, times, strict=True):
            frame = converter.reformat(av.VideoFrame.from_ndarray(rgb, format="rgb24"), format=pix_fmt)
            frame.pts, frame.time_base = round(time / tick), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            for at in range(0, int(audio_s * 8000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate, silence.pts = 8000, at
                out.mux(sound.encode(silence))
            out.mux(sound.encode(None))


def write_sound(path: Path, cover: bool = False) -> Path:
    """Write one second of silence to an MP3 or AAC file, depending on the extension, with a cover image if `cover` is True."""
    apart(encode_sound, path, cover)
    return path


def encode_sound(path: Path, cover: bool) -> None:
    with av.open(str(path), "w") as out:
        sound = out.add_stream("mp3" if path.suffix == ".mp3" else "aac", rate=44100, layout="mono")
        if cover:
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        for at in range(0, 44100, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, at
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        if cover:
            shown = av.VideoFrame.from_ndarray(numbered_frame(0), format="rgb24").reformat(format="yuvj420p")
            out.mux(picture.encode(shown))
            out.mux(picture.encode(None))


def add_beside(path: Path, out: Path, beside: str) -> Path:
    """Copy a video file and put another stream before the video: "subtitles", or a "cover" image."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        other = target.add_stream({"subtitles": "ass", "cover": "mjpeg"}[beside], rate=1)
        if beside == "cover":
            other.width, other.height, other.pix_fmt = 64, 48, "yuvj420p"
            other.disposition = av.stream.Disposition.attached_pic
            packet = av.Packet(write_image(out.with_suffix(".jpg"), quarters()).read_bytes())
        else:
            packet = av.Packet(b"0,0,Default,,0,0,0,,hello")
        video = target.add_stream_from_template(source.streams.video[0])
        packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = other, CLOCK, 0, 0, 1000
        target.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = video
                target.mux(packet)
    return out


def quarters():
    """Return a frame with four colors: red and green in the upper half, blue and white in the lower half."""
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:24, :32, 0] = rgb[:24, 32:, 1] = rgb[24:, :32, 2] = 255
    rgb[24:, 32:] = 255
    return rgb


def spoil(path, out, packets):
    """Copy a file to `out` and overwrite the contents of the given packets."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if packet.size and i in packets:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    out.write_bytes(content)
    return out


def crop_video(path: Path, out: Path, left: int, right: int, top: int, bottom: int) -> Path:
    """Copy an H.264 MP4 and add a clap box that tells players how many pixels to crop from each side of the frames."""
    content = bytearray(path.read_bytes())
    at = 0
    boxes = []
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        at = content.index(kind, at) - 4
        boxes.append(at)
    height, width = (int.from_bytes(content[at + place : at + place + 2], "big") for place in (34, 32))
    numbers = (width - left - right, 1, height - top - bottom, 1, left - right, 2, top - bottom, 2)
    clap = struct.pack(">I4s8i", 40, b"clap", *numbers)
    end = at + int.from_bytes(content[at : at + 4], "big")
    for box in boxes:
        size = int.from_bytes(content[box : box + 4], "big") + len(clap)
        content[box : box + 4] = size.to_bytes(4, "big")
    content[end:end] = clap
    out.write_bytes(content)
    return out


def write_image(path: Path | str, rgb: np.ndarray) -> Path:
    """Write an image to a JPEG, PNG, WebP or BMP file, depending on the extension."""
    codec, pix_fmt = {
        ".jpg": ("mjpeg", "yuvj444p"),
        ".jpeg": ("mjpeg", "yuvj444p"),
        ".png": ("png", "rgb24"),
        ".webp": ("libwebp", "bgra"),
        ".bmp": ("bmp", "bgr24"),
    }[Path(path).suffix.lower()]
    encoder = av.CodecContext.create(codec, "w")
    (encoder.height, encoder.width), encoder.pix_fmt, encoder.time_base = rgb.shape[:2], pix_fmt, CLOCK
    packets = [
        *encoder.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pix_fmt)),
        *encoder.encode(None),
    ]
    Path(path).write_bytes(b"".join(bytes(packet) for packet in packets))
    return Path(path)


def pixels(chunks):
    """Return the frames of all chunks as one array, uint8 `[n, H, W, 3]`."""
    return np.concatenate([chunk.pixels for chunk in chunks])


def numbers(info, times, **how):
    """Read the frames at the given times and return the numbers that the frames show."""
    return [number_of(rgb) for chunk in read_chunks(info, times, **how) for rgb in chunk.pixels]


SAID = {  # for each file: how to write it, the facts that it states, and the expected warning
    "pq.mp4": ({"codec": "libx265", "pix_fmt": "yuv420p10le"}, {"color_trc": 16}, {"hdr": True}, "hdr_video"),
    "hlg.mkv": ({"codec": "libx265", "pix_fmt": "yuv420p10le"}, {"color_trc": 18}, {"hdr": True}, "hdr_video"),
    "fields.mp4": ({"options": {"x264-params": "interlaced=1"}}, {}, {"interlaced": True}, "interlaced_video"),
    "wide.mp4": ({}, {"sample_aspect_ratio": Fraction(16, 11)}, {"pixel_aspect": 16 / 11}, None),
    "wide.mkv": ({}, {"sample_aspect_ratio": Fraction(16, 11)}, {"pixel_aspect": 16 / 11}, None),
    "absurd.mkv": ({}, {"sample_aspect_ratio": Fraction(12, 1)}, {"pixel_aspect": 12.0}, "stretched_video"),
    "cameras.mp4": ({"tracks": 3}, {}, {"other_tracks": 2}, "other_tracks"),
    "plain.mp4": ({}, {}, {"hdr": False, "interlaced": False, "pixel_aspect": None, "other_tracks": 0}, None),
}


def write_said(path: Path) -> tuple[dict, str | None]:
    """Write the file that `SAID` describes under this file name. Returns the expected facts and the expected warning."""
    how, settings, facts, warning = SAID[path.name]
    how = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x265-params": "log-level=none"}, "tracks": 1} | how
    with av.open(str(path), "w") as out:
        tracks = [out.add_stream(how["codec"], rate=10, options=how["options"]) for _ in range(how["tracks"])]
        for track in tracks:
            track.height, track.width, track.pix_fmt = 48, 64, how["pix_fmt"]
            for name, value in settings.items():
                setattr(track.codec_context, name, value)
        for i, rgb in enumerate(numbered_frames(4)):
            for track in tracks:
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=how["pix_fmt"])
                frame.pts, frame.time_base = i, Fraction(1, 10)
                if "color_trc" in settings:
                    frame.color_trc = settings["color_trc"]
                out.mux(track.encode(frame))
        for track in tracks:
            out.mux(track.encode(None))
    return facts, warning
