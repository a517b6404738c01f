"""What all readers share: what a file is by its first bytes, opening it, its packets, its frames, and their pixels as displayed.

FFmpeg sees the bytes of the one file, and no other file.
"""

import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

import av
import av.logging
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from evoprune.errors import LFS, LFS_HINT, VideoError
from evoprune.util import LONGEST, missing_hint, shorten, shown
from evoprune.video.info import Video, fitted
from evoprune.video.readers import colour

# Called with a mark for each damaged packet or image: the same mark for the same damage.
Damage = Callable[[object], None]
Crop = Sequence[int]  # pixels that are cut off a stored frame on the left, right, top and bottom
Decode = Callable[[Packet | None], list[VideoFrame]]

FALLBACK_FPS = 25.0  # of a stream that states no frame rate; FFmpeg assumes the same
MOV = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"
# Containers that files are often joined in, byte by byte (`cat a.ts b.ts`, the parts of a DVD), so that the clock restarts.
PROGRAM_STREAM = "mpeg"
AVI = "avi"
JOINED = ("mpegts", PROGRAM_STREAM)
# a step back by more is another clock; so is, in such a container, a longer gap
BACK_S = 0.1
LONGEST_GAP_S = 600.0
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS, a flag of formats
LEAST_CLOCK_HZ = (
    1000  # a rate that is a clock's frequency, and as high, is no rate of frames: Matroska counts milliseconds
)
TAG_CHARACTERS = 4000  # tags with more are left out, because tags travel with every `Video`
# For `av.open`: tags that are not UTF-8 do not make a file unreadable. PyAV 19 always reads them so, and has no such argument.
ANY_TAGS = {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}
MAX_PIXELS = 2**27  # of a still picture: photographs of 100 megapixels have fewer
MAX_VIDEO_PIXELS = 2**26  # of a frame of a video: 8K video, and 11K video of 360 degrees, have fewer
# Decompression bombs: a video may have so many pixels, in all its frames together, or so many for each byte of its file if that is
# more. Videos of a screen on which nothing moves have up to 2**17 for each byte.
MAX_DECODED_PIXELS = 2**33
MAX_PIXELS_PER_BYTE = 2**18
INCOMPLETE = (
    "is it a complete video file? An MP4 or MOV cut off before its index, usually at its end, cannot be read at all"
)
# Containers in which packet follows packet. At damage, FFmpeg searches for the next packet without an error.
DENSE = (MATROSKA, "flv")
# Codecs whose decoder (FFmpeg 8), with several threads, returned other pixels in one reading of four of a clip of ten seconds.
UNTHREADED = ("theora", "vp3", "vp4")
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders of streams that say they have transparency
CROPPING = re.compile(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)")  # left, right, top, bottom
SAMPLE_AES = "/ 0x00DB)"  # in `stream_log`: the type of an H.264 stream in MPEG-TS that HLS encrypts
TOLERANCE_S = 0.0006  # a frame counts as on screen so much before its time: Matroska rounds times to milliseconds
FORMATS = "MP4, MOV, MKV, WebM, AVI and GIF are read, most others that FFmpeg knows, pictures, and folders of images"
OTHERS = {
    b"#EXTM3U": "a playlist", b"ffconcat version": "a playlist", b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document", b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive", b"\x7fELF": "a program",
    b"SQLite format 3": "a database", b"\x93NUMPY": "a NumPy array",
    b"\xff\xfe": "a text file", b"\xfe\xff": "a text file",  # in UTF-16
}  # fmt: skip
MEDIA = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"\0\0\1", b"\x30\x26\xb2\x75", b"GIF8", b"YUV4MPEG2")
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")  # of MP4 and MOV, after four bytes
# Pictures, by Pillow's names of their formats. HEIC is recognised, and refused.
PICTURES = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF")
PICTURE_HEADS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF87a": "GIF", b"GIF89a": "GIF",
}  # fmt: skip
PICTURE_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC"}
of_thread = threading.local()  # its `alive` is what `alive` does in another thread
CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\f\b\x1b"))  # characters that no text has
# For every value of EXIF's orientation, as `orientation`: clockwise degrees, and whether a left-right flip comes first.
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True),
    5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False),
}  # fmt: skip


class Shown(NamedTuple):
    """Hold what a reader yields for a time."""

    time_s: float  # the frame's own, from the first frame
    rgb: np.ndarray  # uint8 `[H, W, 3]`, as displayed
    other_size: bool = False  # whether it has another size than the video, to which it was scaled
    moved: bool = False  # whether it is a keyframe nearby instead of the frame on screen


Frames = Iterator[Shown]


def alive() -> None:
    """Called after each frame or packet. A worker process reports it, because one that is silent for long counts as hung."""
    getattr(of_thread, "alive", report_alive)()


def report_alive() -> None:
    """Do what `alive` does in the first thread."""


def picture_size(pixels: int, decoders: int = 1) -> None:
    """Called before pictures of so many pixels are decoded, side by side by several decoders, which raises the memory limit."""


class Encrypted(ValueError):
    """Raised when a packet is encrypted. `reading` turns it into the error that names the file."""


def encrypted(path: str) -> VideoError:
    return VideoError(f"the video in {path} is encrypted", "give a copy without DRM, or decrypt it with its key first")


def ignore_damage(mark: object) -> None: ...


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def picture_format(path: str) -> str | None:
    """Pillow's name of a picture's format; None if the file does not begin as pictures do."""
    head = _head(path)
    if head[4:8] == b"ftyp":
        brand = PICTURE_BRANDS.get(head[8:12])
        if brand == "HEIC" and b"avif" in head[16 : head[3]]:
            return "AVIF"
        return brand
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "BMP"  # by the size of its header
    return next((name for start, name in PICTURE_HEADS.items() if head.startswith(start)), None)


def not_a_video(path: str, *, unrecognised: bool) -> VideoError | None:
    """Return the error for a file that FFmpeg could not read, if it surely holds something else than a video.

    Where FFmpeg recognised nothing in it, whatever does not begin as videos do is none.
    """
    head = _head(path)
    if not head or head.startswith(MEDIA) or head[4:8] in BOXES:
        return None
    kind = next((name for start, name in OTHERS.items() if head.startswith(start)), None)
    if kind is None and len(head.translate(None, CONTROL)) == len(head):
        kind = "a text file"
    if head.startswith(LFS):
        return VideoError(f"{path} is a git-lfs pointer", LFS_HINT)
    if kind:
        return VideoError(f"{path} is not a video: it is {kind}", FORMATS)
    if unrecognised:
        return VideoError(f"{path} is not a video, or its beginning is damaged", FORMATS)
    return None


def _head(path: str) -> bytes:
    try:
        # An empty one may be a device that waits (/proc/kmsg).
        if not os.path.isfile(path) or not os.path.getsize(path):
            return b""
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what PyAV and the file system raise about the file into `VideoError`, which says so where it surely is no video.

    So is FFmpeg's lack of memory, as a damaged file may ask for any amount; `MemoryError`, such as numpy's, is left alone.
    """
    try:
        yield
    except Encrypted as error:
        raise encrypted(path) from error
    except (VideoError, av.error.FFmpegError, OSError, ValueError) as error:
        if no_video := not_a_video(path, unrecognised=isinstance(error, av.error.InvalidDataError)):
            raise no_video from error
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"cannot read {path}: {reason(error)}", INCOMPLETE) from error


def check_file(path: str) -> None:
    """Raises VideoError: a URL, no such file, not a file, or an empty one."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if "://" in path:
            hint = missing_hint(path, "")
            raise VideoError(f"{shown(path)} is a URL, not a file", hint) from None
        if os.path.islink(path):
            raise VideoError(f"{path} is a link to a file that is not there", "check where it leads") from None
        raise VideoError(f"no such file: {shown(path) or repr(path)}", missing_hint(path, "check the path")) from None
    except ValueError:  # such as a null byte
        raise VideoError(f"no file can have the name {shorten(repr(path), LONGEST)}", "check the path") from None
    except OSError as error:
        hint = missing_hint(path, "check the path, and whether you may read it")
        raise VideoError(f"cannot read {shown(path)}: {error.strerror}", hint) from error
    if not stat.S_ISREG(status.st_mode):
        problem = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise VideoError(f"{path} is {problem}", "give a video file; - reads one from standard input")
    if not status.st_size:
        raise VideoError(f"{path} is empty", "was it copied or downloaded to its end?")


@contextmanager
def open_video(path: str) -> Iterator[InputContainer]:
    """Provide an opened file. Raises what `check_file` raises, and as `reading`."""
    check_file(path)
    with open(path, "rb", buffering=0) as file, open_bytes(file) as container:
        if container.format.name == "tty":  # FFmpeg draws text files as a terminal would
            raise VideoError(f"{path} is not a video: it is a text file", FORMATS)
        yield container


def open_bytes(file: BinaryIO, format_name: str | None = None, max_pixels: int = MAX_VIDEO_PIXELS) -> InputContainer:
    """Open what a seekable binary file holds, in FFmpeg's format of that name if it is known; PyAV raises its own errors.

    Frames of more than `max_pixels` are not decoded.
    """
    # FFmpeg gets bytes and no name, because it takes what precedes a colon in a name for a protocol, and %d for a pattern.
    # The whitelist allows no protocol, so a playlist in the file reaches neither other files nor the network.
    options = {"protocol_whitelist": "none", "max_pixels": str(max_pixels)}
    nameless = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    return av.open(nameless, format=format_name, options=options, **ANY_TAGS)


def moving(container: InputContainer) -> list[VideoStream]:
    """Return the video tracks without cover pictures, and without stills if there is anything else (as in animated AVIF)."""
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return [track for track in tracks if track.frames != 1] or tracks


def video_stream(
    container: InputContainer, path: str, *, threads: int = 1, max_pixels: int = MAX_VIDEO_PIXELS
) -> VideoStream:
    """Return the stream to show, decoded with so many `threads`.

    Raises VideoError: no video, only a cover picture, no decoder in this build of FFmpeg, or frames of more than `max_pixels`.
    """
    tracks = moving(container)
    if not tracks:
        content = "only a cover picture" if container.streams.video else "no video stream"
        raise VideoError(f"{path} has {content}", "give a file with moving pictures")
    best = container.streams.best("video")
    stream = best if best in tracks else tracks[0]
    if stream.codec_context is None:
        hint = "convert it to H.264, e.g. with ffmpeg, unless it is damaged or encrypted"
        raise VideoError(f"there is no decoder for the video in {path}", hint)
    width = stream.codec_context.width
    height = stream.codec_context.height
    if width * height > max_pixels:
        hint = f"at most {max_pixels // 10**6} megapixels can be read; is it damaged?"
        raise VideoError(f"{path} says that its pictures have {width:,} x {height:,} pixels", hint)
    stream.codec_context.options = {"max_pixels": str(max_pixels)}  # a frame may state another size
    picture_size(width * height)
    if stream.codec_context.codec.canonical_name in UNTHREADED:
        threads = 1
    stream.thread_type = "AUTO" if threads > 1 else "NONE"
    stream.codec_context.thread_count = threads
    return stream


def tags(container: InputContainer) -> dict[str, str]:
    """Return the tags of a container, at most 200, except those that are too long. Bytes that are not UTF-8 become U+FFFD."""
    short = ((key, text) for key, text in container.metadata.items() if len(key) + len(text) <= TAG_CHARACTERS)
    return {_valid_text(key): _valid_text(text) for key, text in islice(short, 200)}


def _valid_text(tag: str) -> str:
    return tag.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def thread_count(cores: int) -> int:
    """Return the threads of a decoder for so many cores: one more, at most 16, as each holds a picture; or one."""
    if cores <= 1:
        return 1
    return min(cores + 1, 16)


def nothing_decoded(path: str) -> VideoError:
    hint = (
        f"it is damaged, incomplete, encrypted, or its pictures are larger than {MAX_VIDEO_PIXELS // 10**6} megapixels"
    )
    return VideoError(f"no frame of {path} can be decoded", hint)


def packets(
    container: InputContainer, stream: Stream, damaged: Damage = ignore_damage, *, every_stream: bool = False
) -> Iterator[Packet | None]:
    """Packets up to the end. If the file breaks off, the last one is None, which makes the decoder return what it still holds.

    `damaged` is called where bytes were skipped, in containers that make it visible. With `every_stream` the others are read too,
    which reports progress between packets that are far apart.
    """
    dense = container.format.name in DENSE
    end = None
    slack = 0
    try:
        read = container.demux() if dense or every_stream else container.demux(stream)
        for count, packet in enumerate(read):
            alive()
            if count > container.size:  # more packets than bytes: the index is a loop
                raise av.error.InvalidDataError(0, "endless")
            if dense and packet.pos is not None:
                if end is not None and packet.pos - end > slack:
                    damaged(-packet.pos)
                # Headers between two packets are no damage, nor is the transparency of the first one.
                end = max(end or 0, packet.pos) + packet.size
                slack = 2**12 + 2 * packet.size
            if packet.stream.index == stream.index:  # in the packet itself, the one at the end has none
                yield packet
    # PyAV (18) raises IndexError where damage looks like a new stream.
    except (av.error.FFmpegError, IndexError):
        yield None


def shown_otherwise(
    stream: VideoStream, hdr: str | None, first: VideoFrame | None = None
) -> dict[str, bool | float | str | None]:
    """Fields of `Video` about what players show in another way, by the `first` frame, or by the header alone.

    `hdr`: `Video.hdr_format`.
    """
    context = stream.codec_context
    interlaced = bool(first.interlaced_frame) if first else context.field_order > 1  # 1 is progressive
    aspect = stream.sample_aspect_ratio
    return {
        "hdr": hdr is not None,
        "hdr_format": hdr,
        "interlaced": interlaced,
        "pixel_aspect": float(aspect) if aspect and aspect != 1 else None,
    }


def stream_log(stream: Stream) -> str:
    """Return FFmpeg's description of a stream, which has facts that PyAV has no attribute for."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        log = stream.container.dumps_format()
    finally:
        av.logging.set_level(level)
    parts = re.split(r"^  Stream #0:(\d+)", log, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(str(stream.index), "")


def check_encryption(stream: VideoStream, log: str, path: str) -> None:
    """Raises VideoError if the container says that the stream is encrypted. In MP4 the packets say so (`decoder`).

    Args:
        log: see `stream_log`.
    """
    sample_aes = stream.container.format.name == "mpegts" and SAMPLE_AES in log.partition("\n")[0]
    if sample_aes or "enc_key_id" in stream.metadata:  # FFmpeg's tag for ContentEncryption in Matroska and WebM
        raise encrypted(path)


def cropping(log: str) -> Crop | None:
    """Return the pixels that a container crops, from `stream_log`; None if it crops none.

    MP4 says so in a clap box, Matroska in PixelCrop. Cropping by the codec is done in the decoder.
    """
    found = CROPPING.search(log)
    return (int(found[1]), int(found[2]), int(found[3]), int(found[4])) if found else None


def cropped(frame: VideoFrame, crop: Crop | None) -> VideoFrame:
    """Return a stored frame without the cropped pixels. A frame that is too small for the crop stays whole."""
    left, right, top, bottom = crop or (0, 0, 0, 0)
    width = frame.width - left - right
    height = frame.height - top - bottom
    if not crop or width <= 0 or height <= 0:
        return frame
    return colour.filtered(frame, ("crop", f"{width}:{height}:{left}:{top}:exact=1"))


def decoder(stream: VideoStream, crop: Crop | None) -> Decode:
    """Return the function that decodes a packet of a stream into cropped frames.

    FFmpeg's own decoders of VP8 and VP9 leave out transparency; those of libvpx do not. The function raises Encrypted.
    """
    context = stream.codec_context
    name = WITH_ALPHA.get(context.codec.canonical_name)
    if name and stream.metadata.get("alpha_mode") == "1":
        context = CodecContext.create(name, "r")
        context.options = stream.codec_context.options
        context.thread_count = stream.codec_context.thread_count

    def decode(packet: Packet | None) -> list[VideoFrame]:
        if packet is not None and packet.has_sidedata("encryption_info"):
            raise Encrypted  # a decoder would make noise of it, or damage
        return [cropped(frame, crop) for frame in context.decode(packet)]

    return decode


def decoded_frames(
    stream: VideoStream, packets: Iterator[Packet | None], damaged: Damage = ignore_damage, crop: Crop | None = None
) -> Iterator[VideoFrame]:
    """Yield the frames of some packets of `packets`, cropped, in display order, without damaged ones; patched up frames count.

    `damaged` is called for both, and where the file breaks off.
    """
    decode = decoder(stream, crop)
    for packet in packets:
        if packet is not None and not packet.size and packet.dts is not None:
            continue  # the frame before is repeated; FFmpeg's decoders take a packet without data for the end
        broken = packet is None or packet.is_corrupt
        frames = []
        try:
            frames = decode(packet)
        except av.error.FFmpegError:  # the next packet may be whole
            broken = True
        if broken:
            damaged(_stamp(packet))
        for frame in frames:
            alive()
            if frame.is_corrupt:
                damaged(_stamp(frame))
            yield frame


def _stamp(data: Packet | VideoFrame | None) -> int | None:
    """Return the time at which a packet or a frame is displayed, or else decoded, in ticks; None where it has none."""
    if data is None:
        return None
    return data.dts if data.pts is None else data.pts


def incomplete_joints(info: Video) -> int:
    """Return how many packets may be incomplete without any damage: one where each part of a stream without headers ends."""
    if info.container not in JOINED:
        return 0
    return info.clock_restarts


def restarts(passed_s: float, container: str) -> bool:
    """Return whether two times in a row, so many seconds apart, are of different clocks."""
    return passed_s < -BACK_S or (passed_s > LONGEST_GAP_S and container in JOINED)


def frame_rate(stream: VideoStream) -> tuple[float | None, bool]:
    """Frames a second on average, None where nothing tells; and whether they are a guess.

    Of a raw stream, which has no times, FFmpeg knows what the stream states of itself, and assumes `FALLBACK_FPS` otherwise. Where
    the container states no rate, its average may be the frequency of the clock.
    """
    if stream.container.format.flags & NO_TIMESTAMPS:
        stated = stream.codec_context.framerate
        return float(stated or stream.guessed_rate or FALLBACK_FPS), not stated
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    rate = next((rate for rate in rates if rate < LEAST_CLOCK_HZ or rate * stream.time_base != 1), None)
    return rate and float(rate), False


def stated_frames(container: InputContainer, stream: VideoStream) -> int:
    """Return how many frames the header counts, or has time for at its rate; 0 where it tells neither."""
    length_s = float((stream.duration or 0) * stream.time_base)
    if container.duration:
        length_s = container.duration / av.time_base
    return stream.frames or math.floor(length_s * float(stream.average_rate or 0) + 0.5)


def frame_time(frame: VideoFrame, stream: VideoStream) -> float | None:
    """Return the time of a frame by the file's own clock, in seconds; None where the file states none (raw streams)."""
    # AVI stores decoding times only. The presentation times that FFmpeg derives are wrong if frames are stored out of
    # order; the decoding times are right up to a constant.
    stamp = frame.dts if stream.container.format.name == AVI else frame.pts
    if stamp is None:
        return None
    return float(stamp * stream.time_base)


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Return the clockwise rotation in degrees (0, 90, 180 or 270), and whether a left-right flip comes before it."""
    matrix = colour.side_data(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    # Row vectors times the matrix, y downwards: the image's x axis goes to (a, b), its y axis to (c, d).
    a, b, _, c, d = (int(x) for x in np.frombuffer(matrix, np.int32, count=5))
    mirrored = a * d < b * c
    if mirrored:
        a = -a
        b = -b
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360, mirrored


def turned_size(size: tuple[int, int], rotation_deg: int) -> tuple[int, int]:
    """Return the two sides of a frame after a rotation, or before it."""
    return size if rotation_deg % 180 == 0 else size[::-1]


def to_rgb(
    frame: VideoFrame, width: int, height: int, rotation_deg: int, mirrored: bool, converter: colour.Converter
) -> np.ndarray:
    """Return uint8 `[height, width, 3]`: the frame as `Converter.rgb` says, rotated and scaled to this size.

    A frame of another shape keeps it, between black borders.
    """
    inner = fitted(turned_size((frame.width, frame.height), rotation_deg), (width, height))
    rgb = rotated(converter.rgb(frame, *turned_size(inner, rotation_deg)), rotation_deg, mirrored)
    if inner == (width, height):
        return rgb
    bordered = np.zeros((height, width, 3), np.uint8)
    left = (width - inner[0]) // 2
    top = (height - inner[1]) // 2
    bordered[top : top + inner[1], left : left + inner[0]] = rgb
    return bordered


def rotated(rgb: np.ndarray, rotation_deg: int, mirrored: bool) -> np.ndarray:
    """Return a view of stored pixels `[h, w, 3]` as displayed: flipped left to right if `mirrored`, then rotated clockwise."""
    if mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, -rotation_deg // 90)  # rot90 rotates anticlockwise
