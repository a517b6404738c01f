"""The sizes that the frames of a stream have, found without decoding it.

A recorder that is turned, or a stream whose quality changes, goes on with frames of another size.
"""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import av
from av.bitstream import BitStreamFilterContext
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from evoprune.video.readers import ffmpeg

Size = tuple[int, int]  # width and height in pixels, as stored

PLACES = 32  # at most, at which a file is looked into; one a second of shorter files
MOST_PACKETS = 300  # from a place to the next keyframe
# FFmpeg's filters that find, in a packet, the parameters that its decoder needs; the size is one of them.
PARAMETERS = {
    "h264": "h264_mp4toannexb,extract_extradata",
    "hevc": "hevc_mp4toannexb,extract_extradata",
    "av1": "extract_extradata",
    "mpeg2video": "extract_extradata",
    "mpeg4": "extract_extradata",
}
# Bytes of a keyframe in which its size stands. Those of H.263 and Sorenson's H.263 differ from frame to frame.
HEADS = {"vp8": 10, "vp9": 10, "flv1": 9, "h263": 8}
JPEG_SIZE = re.compile(rb"\xff[\xc0-\xc2]\0.{6}", re.DOTALL)  # the header of a JPEG's frame


def stored_sizes(
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame,
    crop: ffmpeg.Crop | None,
    duration_s: float | None,
) -> list[Size]:
    """Return the cropped size of the first frame, and others of keyframes at up to `PLACES` places. Moves the container's position.

    Decodes a keyframe only if its parameters differ from those of all before. Other codecs than those above are taken to keep
    their size: the reader finds those that do not.
    """
    sizes = [(first.width, first.height)]
    codec = stream.codec_context.codec.canonical_name
    if codec not in PARAMETERS and codec not in HEADS and codec != "mjpeg":
        return sizes
    seen: set[bytes] = set()
    # The file does not seek, or is damaged, which its reader says; or its times are no numbers to seek to.
    with suppress(av.error.FFmpegError, OverflowError):
        for keyframe in _keyframes(container, stream, duration_s):
            mark, keyframe = _parameters(keyframe, stream, codec)
            if not mark or mark in seen:
                continue
            seen.add(mark)
            extradata = mark if codec in ("h264", "hevc") else None
            size = _decoded_size(keyframe, stream, extradata, crop)
            if size and size not in sizes:
                sizes.append(size)
    return sizes


def _keyframes(container: InputContainer, stream: VideoStream, duration_s: float | None) -> Iterator[Packet]:
    places = min(PLACES, math.ceil(duration_s or PLACES))
    for place in range(places):
        if stream.start_time is None:
            container.seek(container.size * place // places, unsupported_byte_offset=True)
        else:
            at_s = (duration_s or 0.0) * (place + 0.5) / places
            container.seek(stream.start_time + int(at_s / stream.time_base), stream=stream)
        packets = islice(ffmpeg.packets(container, stream), MOST_PACKETS)
        keyframe = next(
            (packet for packet in packets if packet is not None and packet.size and packet.is_keyframe), None
        )
        if keyframe is not None:
            yield keyframe


def _parameters(keyframe: Packet, stream: VideoStream, codec: str) -> tuple[bytes, Packet]:
    """Return the parameters that stand in a keyframe, perhaps none, and the keyframe in the form in which it is decoded with
    them.
    """
    if codec == "mjpeg":
        if found := JPEG_SIZE.search(bytes(keyframe)):
            return found[0], keyframe
        return b"", keyframe
    if codec in HEADS:
        return bytes(keyframe)[: HEADS[codec]], keyframe
    for packet in BitStreamFilterContext(PARAMETERS[codec], stream).filter(keyframe):
        if packet.has_sidedata("new_extradata"):
            return bytes(packet.get_sidedata("new_extradata")), packet
        return b"", packet
    return b"", keyframe


def _decoded_size(
    keyframe: Packet, stream: VideoStream, extradata: bytes | None, crop: ffmpeg.Crop | None
) -> Size | None:
    """Return the cropped size of a keyframe; None if it cannot be decoded alone."""
    decoder = CodecContext.create(stream.codec_context.codec.name, "r")
    decoder.options = {"max_pixels": str(ffmpeg.MAX_VIDEO_PIXELS)}
    decoder.extradata = extradata
    try:
        frames = [*decoder.decode(keyframe), *decoder.decode(None)]
    except av.error.FFmpegError:  # others may be whole
        return None
    if not frames:
        return None
    shown = ffmpeg.cropped(frames[0], crop)
    return shown.width, shown.height
