"""Converts decoded frames of any pixel format, range, matrix, primaries, and transfer curve to 8-bit BT.709 RGB.

libswscale performs most of the conversion, and this module rejects formats that libswscale does not support. HDR is converted to
SDR in this module, with the same result as FFmpeg's filters
`zscale=t=linear:npl=100,zscale=p=bt709,tonemap=mobius:desat=0,zscale=t=bt709` for displays of 1000 cd/m2. These filters cannot be
used directly, because PyAV does not include zscale, and libswscale's own conversion is too slow: it spends many seconds computing a
table before the first frame. Matrices, primaries, and curves are numbered as in ITU-T H.273, FFmpeg, and PyAV.
"""

import re
import sys
from collections.abc import Mapping
from enum import IntEnum
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.buffer import Buffer
from av.filter import Graph
from av.sidedata.sidedata import SideData, SideDataContainer
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc, VideoReformatter
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.info import HLG, IPT, PQ

CURVES = {ColorTrc.SMPTE2084: PQ, ColorTrc.ARIB_STD_B67: HLG}
UNSTATED = (0, 2, 3)  # values for an unspecified transfer curve
HDR_METADATA = ("MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL", "DYNAMIC_HDR_PLUS")
# FFmpeg's numbers for side data types not named in PyAV 18: LCEVC, the view and the displays of 3D video, and EXIF.
NAMELESS_SIDE_DATA = (28, 29, 30, 31)
# Dolby Vision consists of a base layer, which FFmpeg decodes, and metadata, which is not applied here. The "compatibility id" in
# the Dolby Vision record describes the base layer; for example, 2 means SDR. In some profiles, 0 means Dolby's proprietary format,
# while in others it doesn't identify the format.
DOLBY_RECORD = re.compile(r"DOVI configuration record:.* profile: (\d+),.* compatibility id: (\d+)")
DOLBY_BASES = {1: PQ, 4: HLG, 6: PQ}
DOLBY_OWN = (5, 10, 20)  # profiles in which compatibility id 0 means Dolby's proprietary format
# MP4 codec tags that indicate Dolby's proprietary format, unless the record or the curve says otherwise.
DOLBY_TAGS = ("dvhe", "dvh1", "dvav", "dva1", "dav1")

# Matrices that convert linear BT.2020 (as in BT.2087) or linear Display P3 to linear BT.709.
FROM_BT2020 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
FROM_P3 = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])

# Tone mapping parameters in units of 100 cd/m2. Light below the knee is left unchanged, and light at the peak becomes white.
KNEE = 0.3
PEAK = 10.0
WHITE = 2**16 - 1  # white in 16-bit channels
STRIP = 2**16  # number of pixels to process at a time, small enough to fit in a core's cache
# Rejected pixel formats, for which libswscale incorrectly swaps bytes or aborts the process.
UNREAD = ("rgb565be", "bgr565be", "rgb555be", "bgr555be", "yaf32le", "yaf32be")


class Matrix(IntEnum):
    """Matrix coefficients, numbered as in ITU-T H.273. In lower case, the names are the same as FFmpeg's."""

    GBR = 0
    BT709 = 1
    UNKNOWN = 2
    RESERVED = 3
    FCC = 4
    BT470BG = 5
    SMPTE170M = 6
    SMPTE240M = 7
    YCGCO = 8
    BT2020NC = 9
    BT2020C = 10
    SMPTE2085 = 11
    CHROMA_DERIVED_NC = 12
    CHROMA_DERIVED_C = 13
    ICTCP = 14
    IPT_C2 = 15
    YCGCO_RE = 16
    YCGCO_RO = 17


SUPPORTED_MATRICES = tuple(Matrix(number) for number in (0, 1, 2, 4, 5, 6, 7, 9))  # matrices that libswscale supports


def stated(stream: VideoStream, log: str) -> str | None:
    """Return the HDR format specified in a stream's header, as in `Video.hdr_format`.

    Call this function before decoding the first frame, because decoders overwrite the transfer curve from the header.

    Args:
        log: FFmpeg's description of the stream (see `ffmpeg.stream_log`).
    """
    context = stream.codec_context
    curve = CURVES.get(context.color_trc)
    if record := DOLBY_RECORD.search(log):
        profile, base = map(int, record.groups())
        if profile in DOLBY_OWN and base == 0:
            return IPT
        return curve or DOLBY_BASES.get(base)
    if curve or context.color_trc not in UNSTATED:
        return curve
    # Read the tag from the log, because PyAV fails on non-ASCII codec tags.
    if any(f"({tag} / 0x" in log.partition("\n")[0] for tag in DOLBY_TAGS):
        return IPT
    if "Mastering Display Metadata" in log or "Content Light Level Metadata" in log:
        return PQ
    return None


def side_data(frame: VideoFrame) -> Mapping[str, SideData]:
    """Return a frame's side data by type name. Types not named in PyAV 18 are omitted, because PyAV fails on them."""
    # `frame.side_data` would create a reference cycle that keeps the pixels in memory until the garbage collector runs.
    try:
        return SideDataContainer(frame)
    except ValueError:
        without = [("sidedata", f"mode=delete:type={number}") for number in NAMELESS_SIDE_DATA]
        return SideDataContainer(filtered(frame, *without))


def filtered(frame: VideoFrame, *filters: tuple[str, str]) -> VideoFrame:
    """Apply a chain of FFmpeg filters to a frame. Each filter is a tuple (name, options)."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    graph.link_nodes(source, *(graph.add(*each) for each in filters), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def hdr_format(frame: VideoFrame, header: str | None = None) -> str | None:
    """Return a frame's HDR format, as in `Video.hdr_format`.

    Args:
        header: The HDR format specified in the stream's header. It applies to frames that do not specify a format themselves, or to
            all frames if it is Dolby's proprietary format.
    """
    data = side_data(frame)
    if header == IPT or _is_dolby_own(data.get("DOVI_METADATA")):
        return IPT
    if curve := CURVES.get(frame.color_trc):
        return curve
    if frame.color_trc not in UNSTATED:
        return None
    if header:
        return header
    if any(name in data for name in HDR_METADATA):
        return PQ
    return None


def _is_dolby_own(metadata: Buffer | None) -> bool:
    """Return True if Dolby Vision metadata (FFmpeg's `AVDOVIMetadata`) describes a base layer in Dolby's proprietary format."""
    if metadata is None:
        return False
    metadata = bytes(metadata)
    start = int.from_bytes(metadata[:8], sys.byteorder)  # offset of `AVDOVIRpuDataHeader`
    profile = metadata[start + 4]
    full_range = metadata[start + 10]
    return profile == 0 and full_range == 1  # FFmpeg uses the same rule to guess the profile


def may_be_transparent(form: VideoFormat) -> bool:
    return form.has_palette or any(component.is_alpha for component in form.components)


class Converter:
    """Converts frames of a single video or image to RGB.

    Args:
        name: Source name for error messages.
        header: See `hdr_format`.
    """

    def __init__(self, name: str, header: str | None = None):
        self._name = name
        self._header = header
        self._reformatter = VideoReformatter()

    def rgb(self, frame: VideoFrame, width: int, height: int) -> np.ndarray:
        """Convert a frame to RGB at the given size, as uint8 `[height, width, 3]`. Transparent areas become white.

        Raises:
            VideoError: The frame's pixel format, matrix, or HDR format is not supported.
            MemoryError: There is not enough memory for the conversion.
        """
        hdr = hdr_format(frame, self._header)
        if hdr == IPT:
            problem = f"{self._name} is Dolby Vision without HDR10, HLG or SDR (profile 5), which is not supported"
            raise VideoError(problem, "export it as HDR10 or SDR first")
        try:
            return self._rgb(frame, width, height, hdr)
        except MemoryError as error:  # FFmpeg's subclass of MemoryError would be mistaken for file damage
            raise MemoryError(str(error)) from error
        except (av.error.FFmpegError, ValueError) as error:
            hint = "export it as 8-bit 4:2:0 video in BT.709, as most programs do"
            raise VideoError(f"the colors of {self._name} cannot be converted: {_described(frame)}", hint) from error

    def _rgb(self, frame: VideoFrame, width: int, height: int, hdr: str | None) -> np.ndarray:
        plain = hdr is None and not _is_limited_grey(frame)
        if may_be_transparent(frame.format):
            rgba = self._reformat(frame, "rgba").to_ndarray()
            if rgba[..., 3].min() < 255:
                opaque = rgba[..., :3]
                if not plain:
                    opaque = self._computed(frame, frame.width, frame.height, hdr)
                frame = VideoFrame.from_ndarray(_over_white(opaque, rgba[..., 3:]), format="rgb24")
                plain = True
        if plain:
            return self._reformat(frame, "rgb24", width, height).to_ndarray()
        return self._computed(frame, width, height, hdr)

    def _computed(self, frame: VideoFrame, width: int, height: int, hdr: str | None) -> np.ndarray:
        """Convert an HDR frame or a limited-range gray frame to RGB, mapping the levels here instead of in libswscale."""
        stored = self._reformat(frame, "gbrp16", width, height)
        planes = [np.frombuffer(plane, np.uint16).reshape(height, -1)[:, :width] for plane in stored.planes]
        planes = [planes[2], *planes[:2]]  # red, green, and blue
        black, white = _levels(frame)
        to_bt709 = _to_bt709(frame)
        rgb = np.empty((height, width, 3), np.uint8)
        rows = max(1, STRIP // width)
        for top in range(0, height, rows):
            values = np.stack([plane[top : top + rows].ravel() for plane in planes], dtype=np.float32)
            channels = ((values - black) * (WHITE / (white - black)) + 0.5).clip(0, WHITE).astype(np.uint16)
            strip = _mapped(channels, hdr, to_bt709) if hdr else (channels.astype(np.uint32) + 128) // 257
            rgb[top : top + rows] = strip.T.reshape(-1, width, 3)
        return rgb

    def _reformat(
        self, frame: VideoFrame, form: str, width: int | None = None, height: int | None = None
    ) -> VideoFrame:
        if frame.format.name in UNREAD:
            raise ValueError("libswscale misreads it or crashes")
        return self._reformatter.reformat(frame, width, height, format=form)


def _over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blend RGB pixels with a white background. `rgb` is uint8 `[h, w, 3]`, and the opacity `alpha` is uint8 `[h, w, 1]`."""
    mixed = np.empty(rgb.shape, np.uint8)
    rows = max(1, STRIP // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        strip = np.s_[top : top + rows]
        share = alpha[strip].astype(np.uint16)
        mixed[strip] = (rgb[strip] * share + 255 * (255 - share) + 127) // 255
    return mixed


def _is_yuv(form: VideoFormat) -> bool:
    return not form.is_rgb and len(form.components) >= 3


def _is_limited_grey(frame: VideoFrame) -> bool:
    """Return True if a frame is grayscale with limited range, which libswscale would mistake for full range."""
    return frame.format.name.startswith(("gray", "ya")) and frame.color_range == ColorRange.MPEG


def _levels(frame: VideoFrame) -> tuple[int, int]:
    """Return the black and white levels in libswscale's 16-bit channels, in which shorter values are padded with zero bits."""
    if _is_limited_grey(frame):
        return 16 << 8, 235 << 8
    if _is_yuv(frame.format) and frame.color_range != ColorRange.JPEG:
        return 0, 255 << 8
    added = 16 - min(16, frame.format.components[0].bits)
    return 0, WHITE >> added << added


def _to_bt709(frame: VideoFrame) -> np.ndarray:
    """Return the matrix that converts an HDR frame's linear RGB to linear BT.709, as float32 `[3, 3]`."""
    known = {ColorPrimaries.BT709: np.eye(3), ColorPrimaries.SMPTE432: FROM_P3}
    return known.get(frame.color_primaries, FROM_BT2020).astype(np.float32)  # nearly all HDR video is BT.2020


def _mapped(channels: np.ndarray, hdr: str, to_bt709: np.ndarray) -> np.ndarray:
    """Tone-map the channels of n HDR pixels, given as uint16 `[3, n]`, to SDR RGB, returned as uint8 `[3, n]`."""
    light = to_bt709 @ _light(hdr)[channels]
    # Apply FFmpeg's `tonemap=mobius` to the brightest channel, and scale the other two channels by the same factor.
    square = KNEE * KNEE
    a = square * (1 - PEAK) / (square - 2 * KNEE + PEAK)
    b = (square - 2 * KNEE * PEAK + PEAK) / (PEAK - 1)
    brightest = light.max(axis=0).clip(KNEE, None)
    light *= (b * b + 2 * b * KNEE + square) / (b - a) * (brightest + a) / ((brightest + b) * brightest)
    table = _gamma()
    return table[(np.sqrt(light.clip(0, 1)) * (len(table) - 1) + 0.5).astype(np.uint16)]


@cache
def _light(hdr: str) -> np.ndarray:
    """Return the light emitted by a display for each 16-bit signal value (BT.2100), as float32 `[65536]` in units of 100 cd/m2.

    The display has a peak of 1000 cd/m2. HLG's system gamma of 1.2 is applied to each channel separately, as in zimg.
    """
    signal = np.linspace(0, 1, 2**16)
    if hdr == HLG:
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        return (10 * scene**1.2).astype(np.float32)
    power = signal ** (32 / 2523)
    return (100 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)).astype(
        np.float32
    )


@cache
def _gamma() -> np.ndarray:
    """Return a table of SDR levels (BT.1886) as uint8 `[4096]`, indexed by the square root of light for finer dark levels."""
    return np.round(255 * np.linspace(0, 1, 2**12) ** (2 / 2.4)).astype(np.uint8)


def _described(frame: VideoFrame) -> str:
    ranges = {ColorRange.MPEG: "limited", ColorRange.JPEG: "full"}
    return (
        f"{frame.format.name}, matrix {_named(Matrix, frame.colorspace)}, {ranges.get(frame.color_range, 'unknown')} range, "
        f"primaries {_named(ColorPrimaries, frame.color_primaries)}, curve {_named(ColorTrc, frame.color_trc)}"
    )


def _named(numbers: type[IntEnum], number: int) -> str:
    if number not in set(numbers):
        return f"{number}"
    return numbers(number).name.lower().replace("_", "-")
