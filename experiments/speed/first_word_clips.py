"""Create the clips for `first_word`: `python -m experiments.speed.first_word_clips KIND FILE --seconds N`.

A piece that lasts a few seconds is encoded once, and the clip repeats the encoded piece. Each frame displays its number within the
piece, which makes it possible to check which frames a reader returns. The clips resemble real recordings: they have sliding
backgrounds with the spectrum of natural images, moving foreground objects, grain, and cuts.
"""

import argparse
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

BITS = 12  # number of bits in the frame number
STRIPE = 20  # the stripes that encode the frame number take up 1/20 of the height
CLOCK = Fraction(1, 1000)  # time base for variable-frame-rate files
MAX_BYTES = 4 * 2**30  # maximum size of a clip
SCREEN_CYCLE = 8  # number of seconds after which the screen activity repeats
TINY = 8  # in a trial run, the height and width are divided by this


@dataclass(frozen=True)
class Kind:
    """A type of clip.

    Attributes:
        size: The height and width in pixels.
        piece_s: The length in seconds of the encoded piece, which is then repeated.
        gop: The maximum number of frames between two keyframes. 0 uses the encoder's default.
        cuts: The times at which a new scene begins in the piece, in seconds.
        screen: Whether the clip is a screen recording, which has a new frame only when something changes.
    """

    title: str
    ending: str
    codec: str
    size: tuple[int, int]
    piece_s: int
    fps: int = 30
    gop: int = 0
    cuts: tuple[float, ...] = ()
    screen: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def times_s(self) -> list[float]:
        """Presentation timestamps of the piece's frames, in seconds."""
        if not self.screen:
            return [number / self.fps for number in range(self.piece_s * self.fps)]
        return [time_s for second in range(self.piece_s) for time_s in _screen_times(second, self.fps)]

    def seconds(self, asked: float) -> int:
        """Return the length, in seconds, of the shortest clip of whole pieces that lasts at least `asked` seconds."""
        return max(1, math.ceil(asked / self.piece_s - 1e-9)) * self.piece_s

    def number_at(self, time_s: float) -> int:
        """Return the number of the frame on screen at the given time in the clip."""
        return bisect_right(self.times_s, time_s % self.piece_s + 1e-6) - 1


QUIET = "log-level=none"
KINDS = {
    # By default, x264 inserts a keyframe at a cut or after 250 frames.
    "hd": Kind("1080p H.264, x264's defaults", "mp4", "libx264", (1080, 1920), 30, cuts=(4.1, 6.0, 15.2, 17.9, 22.0)),
    "uhd": Kind("4K HEVC, a keyframe a second", "mp4", "libx265", (2160, 3840), 4, gop=30,
        options={"preset": "ultrafast", "x265-params": QUIET}),
    "vp9": Kind("720p VP9", "webm", "libvpx-vp9", (720, 1280), 20, gop=150, cuts=(7.0,),
        options={"deadline": "realtime", "cpu-used": "6", "crf": "32", "b": "0", "row-mt": "1"}),
    "screen": Kind("screen recording, variable rate", "mp4", "libx264", (1080, 1920), 64, screen=True,
        options={"preset": "veryfast"}),
    "ts": Kind("1080p MPEG-TS, a keyframe a second", "ts", "libx264", (1080, 1920), 10, fps=25, gop=25, cuts=(5.3,),
        options={"preset": "veryfast"}),
}  # fmt: skip


def _screen_times(second: int, fps: int) -> list[float]:
    """Return the frame times within one second of the screen cycle. The page scrolls, is typed on, and then stays still."""
    moment = second % SCREEN_CYCLE
    if moment == 0:
        return [second + number / fps for number in range(fps)]
    if moment < SCREEN_CYCLE / 2:
        return [float(second), second + 0.4, second + 0.7]
    return [second + 1 - 1 / fps] if moment == SCREEN_CYCLE - 1 else []  # makes the file last as long as the piece


def even(side: int) -> int:
    """Return half of `side`, rounded down to an even number as required by encoders, but at least 2."""
    return max(2, side // 2 * 2)


def pictures(kind: Kind, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the frames of the piece, uint8 `[height, width, 3]`."""
    height, width = size
    frames = _screen(kind, height, width) if kind.screen else _scenes(kind, height, width)
    for number, frame in enumerate(frames):
        _write_number(frame, number)
        yield frame


def _scenes(kind: Kind, height: int, width: int) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    grain = [draw.integers(-3, 4, (height, width, 1), np.int16) for _ in range(4)]
    reach = max(2, height // 8)  # how far the background slides, in pixels
    side = height // 5
    begins = (0.0, *(cut for cut in kind.cuts if cut < kind.piece_s), math.inf)
    scene = -1
    for number, time_s in enumerate(kind.times_s):
        if time_s >= begins[scene + 1]:
            scene += 1
            ground = _scenery(draw, height + reach, width + reach)
            thing = _scenery(draw, side, side)
        moved = time_s - begins[scene]
        y = round(reach * (0.5 + 0.5 * math.sin(0.31 * moved)))
        x = round(reach * (0.5 - 0.5 * math.cos(0.23 * moved)))
        frame = ground[y : y + height, x : x + width].astype(np.int16)
        across = round((width - side) * (0.5 + 0.5 * math.sin(0.9 * moved + scene)))
        down = round((height - side) * (0.5 + 0.4 * math.cos(0.7 * moved)))
        frame[down : down + side, across : across + side] = thing
        yield np.clip(frame + grain[number % len(grain)], 0, 255).astype(np.uint8)


def _scenery(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return an image of two-color noise with an amplitude that falls with frequency, uint8 `[height, width, 3]`."""
    rows = np.fft.fftfreq(height)[:, None]
    columns = np.fft.rfftfreq(width)[None, :]
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    spectrum = np.fft.rfft2(draw.standard_normal((height, width))) * fall
    waves = np.fft.irfft2(spectrum, (height, width))
    light = np.clip(0.5 + waves / (5 * waves.std() + 1e-9), 0, 1)[..., None]
    dark = draw.integers(0, 120, 3)
    bright = draw.integers(140, 256, 3)
    return (dark + light * (bright - dark)).astype(np.uint8)


def _screen(kind: Kind, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield frames showing a white page with lines of words, which scrolls and is then typed on."""
    draw = np.random.default_rng(1)
    line = max(4, height // 45)
    page = np.full((2 * height, width, 3), 250, np.uint8)
    for top in range(line, 2 * height - line, 2 * line):
        x = 2 * line
        while x < width * draw.uniform(0.6, 0.95):
            word = line * int(draw.integers(1, 7))
            page[top : top + line, x : min(x + word, width)] = draw.integers(20, 90)
            x += word + line
    offset = 0
    typed = 0
    for time_s in kind.times_s:
        if int(time_s) % SCREEN_CYCLE == 0:
            offset = (offset + max(1, line // 3)) % height
        else:
            typed = (typed + line) % (width - line)
        frame = page[offset : offset + height].copy()
        frame[height // 2 : height // 2 + line, :typed] = 60
        yield frame


def _write_number(frame: np.ndarray, number: int) -> None:
    """Draw a frame's number onto the frame, in place, as stripes at the bottom. The leftmost stripe is the highest bit."""
    bits = np.array([(number >> bit) & 1 for bit in reversed(range(BITS))], np.uint8)
    width = frame.shape[1]
    frame[-_stripe(frame) :] = (bits[np.arange(width) * BITS // width] * 180 + 40)[None, :, None]


def number_of(frame: np.ndarray) -> int:
    """Read the number drawn onto a decoded frame."""
    stripes = frame[-_stripe(frame) // 2 :]
    width = frame.shape[1]
    number = 0
    for place in range(BITS):
        begin = width * (4 * place + 1) // (4 * BITS)
        end = max(begin + 1, width * (4 * place + 3) // (4 * BITS))
        number = 2 * number + int(stripes[:, begin:end].mean() > 128)
    return number


def _stripe(frame: np.ndarray) -> int:
    return max(4, frame.shape[0] // STRIPE)


def write_piece(path: Path, kind: Kind, shrink: int = 1) -> None:
    """Encode the piece of a kind, with its height and width divided by `shrink`."""
    import av

    size = even(kind.size[0] // shrink), even(kind.size[1] // shrink)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(kind.codec, rate=kind.fps, options=kind.options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if kind.gop:
            stream.codec_context.gop_size = kind.gop
        clock = CLOCK if kind.screen else Fraction(1, kind.fps)
        if kind.screen:
            stream.codec_context.time_base = CLOCK
        for time_s, picture in zip(kind.times_s, pictures(kind, size), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = clock
            frame.pts = round(time_s / clock)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def join(piece: Path, clip: Path, kind: Kind, seconds: float) -> None:
    """Write a clip that repeats the encoded piece, without re-encoding, until it lasts at least `seconds` seconds.

    Raises:
        ValueError: If the clip would be larger than `MAX_BYTES`.
    """
    import av

    times = kind.seconds(seconds) // kind.piece_s
    if (needed := times * piece.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{clip.name} would take {needed / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.0f}")
    with av.open(str(clip), "w") as out:
        made = None
        for number in range(times):
            with av.open(str(piece)) as source:
                stream = source.streams.video[0]
                made = made or out.add_stream_from_template(stream)
                shift = round(number * kind.piece_s / stream.time_base) - (stream.start_time or 0)
                for packet in source.demux(stream):
                    if packet.dts is None:
                        continue
                    packet.pts += shift
                    packet.dts += shift
                    packet.stream = made
                    out.mux(packet)


def make_clip(path: Path, name: str, seconds: float, shrink: int = 1) -> None:
    """Write a clip of the given kind, unless it exists, and keep its piece next to it. See `join` for exceptions."""
    kind = KINDS[name]
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    piece = path.parent / f"piece-{name}-{shrink}.{kind.ending}"
    if not piece.exists():
        writing = piece.with_stem(f"writing-{piece.stem}")
        write_piece(writing, kind, shrink)
        writing.replace(piece)
    writing = path.with_stem(f"writing-{path.stem}")
    join(piece, writing, kind, seconds)
    writing.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--shrink", type=int, default=1, help="factor by which the sides of the pictures are divided")
    args = parser.parse_args(arguments)
    make_clip(args.file, args.kind, args.seconds, args.shrink)


if __name__ == "__main__":
    main()
