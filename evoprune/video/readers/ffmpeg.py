"""Functions shared by all readers for identifying and opening files, reading packets, decoding frames, and converting them to RGB.

FFmpeg receives only the bytes of the file being read, so it cannot open any other files.
"""

import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EINVAL
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
from evoprune.util import LONGEST, missing_hint, overlapping, shorten, shown
from evoprune.video.info import WIDEST_PIXEL, Video, fitted
from evoprune.video.readers import colour
from evoprune.video.signatures import head_of

# A callback for damaged data. It is called for each damaged packet or image with a mark that identifies the damage. The same damage
# always has the same mark.
Damage = Callable[[object], None]
Crop = Sequence[int]  # number of pixels to crop from the left, right, top, and bottom of a stored frame
Decode = Callable[[Packet | None], list[VideoFrame]]

FALLBACK_FPS = 25.0  # assumed frame rate for streams without a specified rate, as in FFmpeg
MOV = "mov,mp4,m4a,3gp,3g2,mj2"
MATROSKA = "matroska,webm"
AVI = "avi"
# Files in these containers are often concatenated byte by byte (`cat a.ts b.ts`, or the parts of a DVD), so their clock may restart
# partway through.
JOINED = ("mpegts", "mpeg")
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS, a format flag
# Frame rates of at least this value are ignored if they equal the frequency of the file's clock, such as Matroska's 1000 Hz.
LEAST_CLOCK_HZ = 1000
TAG_CHARACTERS = 4000  # longer tags are dropped, because every copy of a `Video` includes the tags
# Arguments for `av.open` that allow non-UTF-8 tags. PyAV 19 no longer has or needs this argument.
ANY_TAGS = {"metadata_errors": "surrogateescape"} if int(av.__version__.split(".")[0]) < 19 else {}
MAX_PIXELS = 2**27  # limit for still images, sufficient for 100-megapixel photos
MAX_VIDEO_PIXELS = 2**26  # limit for video frames, sufficient for 8K video and 11K 360-degree video
# Limits that protect against decompression bombs. A video is rejected if its frames exceed the limits on both the total number of
# pixels and the number of pixels per byte of file size. Static screen recordings have up to 2**17 pixels per byte.
MAX_DECODED_PIXELS = 2**33
MAX_PIXELS_PER_BYTE = 2**18
INCOMPLETE = (
    "is it a complete video file? An MP4 or MOV that is cut off before its index (usually at the end) cannot be read"
)
# Containers without gaps between packets. A gap means that FFmpeg has skipped damaged bytes without reporting an error.
DENSE = (MATROSKA, "flv")
# Codecs to decode with a single thread, because multi-threaded decoding of a test clip produced different pixels in one in four
# runs (FFmpeg 8).
UNTHREADED = ("theora", "vp3", "vp4")
STILLS = ("mjpeg", "png", "bmp", "webp")  # codecs of cover images without a cover image flag
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders for streams with transparency
CROPPING = re.compile(r"Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)")  # left, right, top, bottom
SAMPLE_AES = "/ 0x00DB)"  # appears in the `stream_log` of an H.264 stream in MPEG-TS that was encrypted for HLS
FORMATS = (
    "supported formats: MP4, MOV, MKV, WebM, AVI, GIF, most others that FFmpeg reads, images, and folders of images"
)
OTHERS = {
    b"#EXTM3U": "a playlist", b"ffconcat version": "a playlist", b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document", b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive", b"\x7fELF": "a program",
    b"SQLite format 3": "a database", b"\x93NUMPY": "a NumPy array",
    b"\xff\xfe": "a text file", b"\xfe\xff": "a text file",  # in UTF-16
}  # fmt: skip
MEDIA = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"\0\0\1", b"\x30\x26\xb2\x75", b"GIF8", b"YUV4MPEG2")
BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"styp",
    b"moof",
)  # every MP4 or MOV contains one of these at byte 4
# Image formats listed in hints. HEIC requires an optional package.
PICTURES = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF", "HEIC")
of_thread = threading.local()  # in all threads except the first, its `alive` attribute replaces `report_alive`
CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\f\b\x1b"))  # control characters that never occur in text
# Clockwise rotation in degrees for each EXIF orientation, and whether to flip left to right before rotating (see `orientation`).
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True),
    5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False),
}  # fmt: skip


class Shown(NamedTuple):
    """The frame that a reader found for a requested time."""

    time_s: float  # actual frame timestamp in seconds from the first frame
    rgb: np.ndarray  # uint8 `[H, W, 3]`, as displayed
    other_size: bool = False  # whether the stored frame differed in size from the video and was scaled
    moved: bool = False  # whether this is a nearby keyframe instead of the frame on screen


Frames = Iterator[Shown]


def alive() -> None:
    """Report progress after each frame or packet. A worker process that reports no progress is considered to be hung."""
    getattr(of_thread, "alive", report_alive)()


def report_alive() -> None:
    """Report progress from the first thread. This placeholder does nothing; worker processes replace it with a real function."""


def picture_size(pixels: int, decoders: int = 1) -> None:
    """Announce an image's size in pixels before it is decoded, and the number of decoders that will run in parallel.

    This placeholder does nothing. Worker processes replace it with a function that raises the memory limit accordingly.
    """


class Encrypted(ValueError):
    """Raised when a packet is encrypted. `converting` converts it to a VideoError that includes the file name."""


def encrypted(path: str) -> VideoError:
    return VideoError(f"the video in {path} is encrypted", "use a copy without DRM, or decrypt it with its key first")


def ignore_damage(mark: object) -> None: ...


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def not_a_video(path: str, *, unrecognised: bool) -> VideoError | None:
    """Return an error that explains why an unreadable file is not a video, or None if it may be a damaged video.

    Args:
        unrecognised: True if FFmpeg did not recognize the file format. In this case, a file without a video signature is assumed
            not to be a video.
    """
    head = head_of(path)
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


@contextmanager
def converting(path: str) -> Iterator[None]:
    """Convert PyAV and file system errors to `VideoError`. A `VideoError` is raised unchanged.

    FFmpeg's out-of-memory error is also converted, because a damaged file may request any amount of memory. A `MemoryError` from
    another source, such as NumPy, is not converted.
    """
    try:
        yield
    except VideoError:
        raise
    except Encrypted as error:
        raise encrypted(path) from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"cannot read {path}: {reason(error)}", INCOMPLETE) from error


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Like `converting`, for files read by FFmpeg: if the file is clearly not a video, the message says what it is instead."""
    with converting(path):
        try:
            yield
        except Encrypted:
            raise
        except (VideoError, av.error.FFmpegError, OSError, ValueError) as error:
            if no_video := not_a_video(path, unrecognised=isinstance(error, av.error.InvalidDataError)):
                raise no_video from error
            raise


def check_file(path: str) -> None:
    """Raise VideoError if a path is a URL, does not exist, is not a regular file, or is an empty file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if "://" in path:
            hint = missing_hint(path, "")
            raise VideoError(f"{shown(path)} is a URL, not a file", hint) from None
        if os.path.islink(path):
            raise VideoError(
                f"{path} is a link to a file that does not exist", "check the target of the link"
            ) from None
        raise VideoError(f"no such file: {shown(path) or repr(path)}", missing_hint(path, "check the path")) from None
    except ValueError:  # for example, the path contains a null byte
        raise VideoError(f"{shorten(repr(path), LONGEST)} is not a valid file name", "check the path") from None
    except OSError as error:
        hint = missing_hint(path, "check the path and its permissions")
        raise VideoError(f"cannot read {shown(path)}: {error.strerror}", hint) from error
    if not stat.S_ISREG(status.st_mode):
        problem = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise VideoError(f"{path} is {problem}", "give a video file; - reads one from standard input")
    if not status.st_size:
        raise VideoError(f"{path} is empty", "was it copied or downloaded completely?")


@contextmanager
def open_video(path: str) -> Iterator[InputContainer]:
    """Open a video file and yield its container. Raises the errors of `check_file` and PyAV's own errors (see `reading`)."""
    check_file(path)
    with open(path, "rb", buffering=0) as file, open_bytes(file) as container:
        if container.format.name == "tty":  # FFmpeg's format for text files, which it renders as a terminal would
            raise VideoError(f"{path} is not a video: it is a text file", FORMATS)
        yield container


def open_bytes(file: BinaryIO, format_name: str | None = None, max_pixels: int = MAX_VIDEO_PIXELS) -> InputContainer:
    """Open a container from a seekable binary file. Raises PyAV's own errors.

    Args:
        format_name: FFmpeg's name for the file's format, or None to detect the format.
        max_pixels: Maximum number of pixels in a frame. Larger frames are not decoded.
    """
    # FFmpeg receives the bytes without a file name, because it would interpret the part of a name before a colon as a protocol, and
    # %d as a pattern. The whitelist allows no protocol, so a playlist in the file can open neither files nor network connections.
    options = {"protocol_whitelist": "none", "max_pixels": str(max_pixels)}
    nameless = SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    return av.open(nameless, format=format_name, options=options, **ANY_TAGS)


def moving(container: InputContainer) -> list[VideoStream]:
    """Return the video tracks, excluding cover images. Other still images are also excluded unless there are no other tracks."""
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    return [track for track in tracks if track.frames != 1] or tracks


def video_stream(
    container: InputContainer, path: str, *, threads: int = 1, max_pixels: int = MAX_VIDEO_PIXELS
) -> VideoStream:
    """Return the video stream to display, configured for decoding with `threads` threads.

    Raises:
        VideoError: The file has no video or only a cover image, this build of FFmpeg has no decoder for the video, or a frame has
            more than `max_pixels` pixels.
    """
    tracks = moving(container)
    if not tracks:
        content = "only a cover picture" if container.streams.video else "no video stream"
        raise VideoError(f"{path} has {content}", "give a file that contains video")
    stream = chosen(tracks)
    if stream.codec_context is None:
        hint = "convert it to H.264, e.g. with ffmpeg; or is it damaged or encrypted?"
        raise VideoError(f"FFmpeg has no decoder for the video in {path}", hint)
    width = stream.codec_context.width
    height = stream.codec_context.height
    if width * height > max_pixels:
        hint = f"the limit is {max_pixels // 10**6} megapixels; is the file damaged?"
        raise VideoError(f"{path} states a frame size of {width:,} x {height:,} pixels", hint)
    stream.codec_context.options = {"max_pixels": str(max_pixels)}  # frames may be larger than specified in the header
    picture_size(width * height)
    use_threads(stream, threads)
    return stream


def use_threads(stream: VideoStream, threads: int) -> None:
    """Set the number of decoder threads, before anything is decoded. Some decoders always use a single thread."""
    if stream.codec_context.codec.canonical_name in UNTHREADED:
        threads = 1
    stream.thread_type = "AUTO" if threads > 1 else "NONE"
    stream.codec_context.thread_count = threads


def chosen(tracks: Sequence[VideoStream]) -> VideoStream:
    """Choose the track that a player would show, which is the default track or, if that is ambiguous, the largest track."""

    def rank(track: VideoStream) -> tuple[bool, bool, bool, int]:
        if (context := track.codec_context) is None:
            return False, False, False, 0
        marks = track.disposition
        default = bool(marks & Disposition.default) and not marks & Disposition.dependent
        return True, context.codec.canonical_name not in STILLS, default, context.width * context.height

    return max(tracks, key=rank)


def tags(container: InputContainer) -> dict[str, str]:
    """Return up to 200 of a container's tags, excluding very long tags. Invalid UTF-8 bytes are replaced with U+FFFD."""
    short = ((key, text) for key, text in container.metadata.items() if len(key) + len(text) <= TAG_CHARACTERS)
    return {_valid_text(key): _valid_text(text) for key, text in islice(short, 200)}


def _valid_text(tag: str) -> str:
    return tag.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def thread_count(cores: int) -> int:
    """Return the number of decoder threads for the given number of cores.

    A single core uses one thread. Otherwise, the number of threads is the number of cores plus one, up to a maximum of 16, because
    each thread keeps a frame in memory.
    """
    if cores <= 1:
        return 1
    return min(cores + 1, 16)


def nothing_decoded(path: str) -> VideoError:
    hint = (
        f"it is damaged, incomplete or encrypted, or its frames are larger than {MAX_VIDEO_PIXELS // 10**6} megapixels"
    )
    return VideoError(f"no frame of {path} can be decoded", hint)


def packets(
    container: InputContainer, stream: Stream, damaged: Damage = ignore_damage, *, every_stream: bool = False
) -> Iterator[Packet | None]:
    """Yield a stream's packets. If the file is truncated, None is yielded at the end to flush the decoder.

    Args:
        damaged: Callback for damaged data. It is called if FFmpeg skipped bytes, which is detectable only in the containers in
            `DENSE`.
        every_stream: If True, read the packets of all streams but yield only packets from `stream`, so that progress is reported
            even while no packets from `stream` arrive.
    """
    dense = container.format.name in DENSE
    end = None
    slack = 0
    try:
        read = container.demux() if dense or every_stream else container.demux(stream)
        for count, packet in enumerate(read):
            alive()
            if count > container.size:  # more packets than bytes means that the index contains a loop
                raise av.error.InvalidDataError(0, "endless")
            if dense and packet.pos is not None:
                if end is not None and packet.pos - end > slack:
                    damaged(-packet.pos)
                # Allow for headers between packets, and for transparency data after the first packet.
                end = max(end or 0, packet.pos) + packet.size
                slack = 2**12 + 2 * packet.size
            if packet.stream.index == stream.index:  # the final packet has no index of its own
                yield packet
    # PyAV 18 raises IndexError if damaged data looks like another stream.
    except (av.error.FFmpegError, IndexError):
        yield None


def shown_otherwise(
    stream: VideoStream, hdr: str | None, first: VideoFrame | None = None
) -> dict[str, bool | float | str | None]:
    """Return the fields of `Video` that determine how frames are adapted for display: HDR, interlacing, and pixel aspect ratio.

    Args:
        hdr: The stream's HDR format, as in `Video.hdr_format`.
        first: The first decoded frame, or None if only the header is available.
    """
    context = stream.codec_context
    interlaced = bool(first.interlaced_frame) if first else context.field_order > 1  # 1 is progressive
    # FFmpeg prefers the container's ratio. If neither the container nor the header specifies a ratio, the first frame may contain
    # one.
    aspect = stream.sample_aspect_ratio or context.sample_aspect_ratio
    return {
        "hdr": hdr is not None,
        "hdr_format": hdr,
        "interlaced": interlaced,
        "pixel_aspect": float(aspect) if aspect and aspect != 1 else None,
    }


def stream_log(stream: Stream) -> str:
    """Return FFmpeg's textual description of a stream, which includes properties not available as PyAV attributes."""
    with _logging_info():
        log = stream.container.dumps_format()
    parts = re.split(r"^  Stream #0:(\d+)", log, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(str(stream.index), "")


@overlapping
def _logging_info() -> Iterator[None]:
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        yield
    finally:
        av.logging.set_level(level)


def check_encryption(stream: VideoStream, log: str, path: str) -> None:
    """Raise VideoError if the container marks a stream as encrypted. MP4 marks individual packets instead (see `decoder`).

    Args:
        log: The result of `stream_log`.
    """
    sample_aes = stream.container.format.name == "mpegts" and SAMPLE_AES in log.partition("\n")[0]
    if sample_aes or "enc_key_id" in stream.metadata:  # FFmpeg's tag for ContentEncryption in Matroska and WebM
        raise encrypted(path)


def cropping(log: str) -> Crop | None:
    """Return the number of pixels cropped by the container on each side, or None if there is no cropping.

    MP4 stores the cropping in a clap box, and Matroska in PixelCrop elements. Cropping specified by the codec itself is not
    included, because the decoder applies it.

    Args:
        log: The result of `stream_log`.
    """
    found = CROPPING.search(log)
    return (int(found[1]), int(found[2]), int(found[3]), int(found[4])) if found else None


def cropped(frame: VideoFrame, crop: Crop | None) -> VideoFrame:
    """Crop a frame before rotation. Frames that are too small to be cropped are returned unchanged."""
    left, right, top, bottom = crop or (0, 0, 0, 0)
    width = frame.width - left - right
    height = frame.height - top - bottom
    if frame.interlaced_frame:
        top -= top % 2  # an even number of rows, so that the upper field stays the upper field
    if not crop or width <= 0 or height <= 0:
        return frame
    return colour.filtered(frame, ("crop", f"{width}:{height}:{left}:{top}:exact=1"))


def decoder(stream: VideoStream, crop: Crop | None) -> Decode:
    """Return a function that decodes a packet into cropped frames. It raises `Encrypted` if the packet is encrypted.

    VP8 and VP9 streams with transparency are decoded with libvpx, because FFmpeg's own decoders drop the transparency.
    """
    context = stream.codec_context
    name = WITH_ALPHA.get(context.codec.canonical_name)
    if name and stream.metadata.get("alpha_mode") == "1":
        context = CodecContext.create(name, "r")
        context.options = stream.codec_context.options
        context.thread_count = stream.codec_context.thread_count

    def decode(packet: Packet | None) -> list[VideoFrame]:
        if packet is not None and packet.has_sidedata("encryption_info"):
            raise Encrypted  # decoding would produce noise or look like damage
        return [cropped(frame, crop) for frame in decoded(context, packet)]

    return decode


def decoded(context: CodecContext, packet: Packet | None) -> list:
    """Decode a packet. Raises `av.error.FFmpegError` if that fails, even for packets after the first one.

    If a codec cannot be opened, PyAV 19 raises FFmpeg's error for the first packet, and a plain ValueError for the others.
    """
    try:
        return context.decode(packet)
    except ValueError as problem:
        if isinstance(problem, av.error.FFmpegError) or context.is_open:
            raise
        raise av.error.ArgumentError(EINVAL, str(problem)) from problem


def decoded_frames(
    stream: VideoStream, packets: Iterator[Packet | None], damaged: Damage = ignore_damage, crop: Crop | None = None
) -> Iterator[VideoFrame]:
    """Decode packets and yield cropped frames in display order.

    Undecodable packets are skipped. Damaged frames that the decoder was able to repair are yielded.

    Args:
        packets: Packets as yielded by the `packets` function.
        damaged: Callback for damaged data. It is called for each skipped packet and each repaired frame, and if the file is
            truncated.
    """
    decode = decoder(stream, crop)
    for packet in packets:
        if packet is not None and not packet.size and packet.dts is not None:
            # An empty packet repeats the previous frame. Skip it, because FFmpeg's decoders would mistake it for the end of the
            # stream.
            continue
        broken = packet is None or packet.is_corrupt
        frames = []
        try:
            frames = decode(packet)
        except av.error.FFmpegError:  # the next packet may be intact
            broken = True
        if broken:
            damaged(_stamp(packet))
        for frame in frames:
            alive()
            if frame.is_corrupt:
                damaged(_stamp(frame))
            yield frame


def _stamp(data: Packet | VideoFrame | None) -> int | None:
    """Return the display time of a packet or frame in ticks; otherwise, its decoding time, or None if it has neither."""
    if data is None:
        return None
    return data.dts if data.pts is None else data.pts


def incomplete_joints(info: Video) -> int:
    """Return the number of packets that may be incomplete, but not damaged, because another file was appended after them."""
    if info.container not in JOINED:
        return 0
    return info.clock_restarts


def frame_rate(stream: VideoStream) -> tuple[float | None, bool]:
    """Return the average frame rate in frames per second (None if unknown) and whether the rate is a guess.

    The rate is a guess only for a raw stream, which has no timestamps, without a specified rate. In this case, FFmpeg assumes
    `FALLBACK_FPS`. If a container does not specify the rate, FFmpeg may report the frequency of the file's clock as the average
    rate. Such a rate is ignored.
    """
    if stream.container.format.flags & NO_TIMESTAMPS:
        stated = stream.codec_context.framerate
        return float(stated or stream.guessed_rate or FALLBACK_FPS), not stated
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    rate = next((rate for rate in rates if rate < LEAST_CLOCK_HZ or rate * stream.time_base != 1), None)
    return rate and float(rate), False


def stated_frames(container: InputContainer, stream: VideoStream) -> int:
    """Return the number of frames according to a file header.

    If the header does not specify the number, it is estimated from the duration and the frame rate. If these are missing as well,
    the result is 0.
    """
    length_s = float((stream.duration or 0) * stream.time_base)
    if container.duration:
        length_s = container.duration / av.time_base
    return stream.frames or math.floor(length_s * float(stream.average_rate or 0) + 0.5)


def frame_time(frame: VideoFrame, stream: VideoStream) -> float | None:
    """Return a frame's timestamp in seconds on the file's own clock, or None if there are no timestamps, as in a raw stream."""
    # AVI stores only decoding times. FFmpeg derives display times from them, but the display times are wrong if frames are stored
    # out of order. The decoding times are correct except for a constant offset.
    stamp = frame.dts if stream.container.format.name == AVI else frame.pts
    if stamp is None:
        return None
    return float(stamp * stream.time_base)


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Return a frame's clockwise rotation in degrees (0, 90, 180, or 270) and whether to flip it left to right before rotating."""
    matrix = colour.side_data(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    # Row vectors are multiplied by the matrix, and y points down, so the image's x axis maps to (a, b) and its y axis to (c, d).
    a, b, _, c, d = (int(x) for x in np.frombuffer(matrix, np.int32, count=5))
    mirrored = a * d < b * c
    if mirrored:
        a = -a
        b = -b
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360, mirrored


def turned_size(size: tuple[int, int], rotation_deg: int) -> tuple[int, int]:
    """Return a frame's (width, height) after rotation by a multiple of 90 degrees. This function is its own inverse."""
    return size if rotation_deg % 180 == 0 else size[::-1]


def displayed_size(frame: VideoFrame, pixel_aspect: float | None, rotation_deg: int) -> tuple[int, int]:
    """Return the (width, height) at which a frame is displayed, after conversion to square pixels and rotation.

    To make the pixels square, one side is enlarged to an even number of pixels, as most players do. If the frame would then have
    more than `MAX_VIDEO_PIXELS`, the other side is reduced instead. A `pixel_aspect` beyond `WIDEST_PIXEL` is ignored.
    """
    sides = [frame.width, frame.height]
    if pixel_aspect and 1 / WIDEST_PIXEL <= pixel_aspect <= WIDEST_PIXEL:
        short = 0 if pixel_aspect > 1 else 1  # the side with too few pixels
        scale = max(pixel_aspect, 1 / pixel_aspect)
        if sides[0] * sides[1] * scale > MAX_VIDEO_PIXELS:
            short = 1 - short
            scale = 1 / scale
        even = max(2, 2 * round(sides[short] * scale / 2))
        if abs(even - sides[short]) > 1:
            sides[short] = even
    return turned_size((sides[0], sides[1]), rotation_deg)


def to_rgb(
    frame: VideoFrame,
    width: int,
    height: int,
    rotation_deg: int,
    mirrored: bool,
    converter: colour.Converter,
    pixel_aspect: float | None = None,
) -> np.ndarray:
    """Convert a frame to RGB, rotated and scaled, as uint8 `[height, width, 3]`. For the color conversion, see `Converter.rgb`.

    If the displayed aspect ratio differs from the ratio of `width` to `height`, black borders are added.
    """
    inner = fitted(displayed_size(frame, pixel_aspect, rotation_deg), (width, height))
    rgb = rotated(converter.rgb(frame, *turned_size(inner, rotation_deg)), rotation_deg, mirrored)
    if inner == (width, height):
        return rgb
    bordered = np.zeros((height, width, 3), np.uint8)
    left = (width - inner[0]) // 2
    top = (height - inner[1]) // 2
    bordered[top : top + inner[1], left : left + inner[0]] = rgb
    return bordered


def rotated(rgb: np.ndarray, rotation_deg: int, mirrored: bool) -> np.ndarray:
    """Flip a stored frame `[h, w, 3]` left to right if `mirrored` is True, and then rotate it clockwise for display.

    The result is a view of the same pixels. `rotation_deg` must be a multiple of 90.
    """
    if mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, -rotation_deg // 90)  # rot90 rotates counterclockwise
