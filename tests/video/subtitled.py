"""Writes test files with subtitles."""

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from tests.video.files import apart

SRT = """1
00:00:01,000 --> 00:00:02,000
{\\an8}Who <i>is</i>
there?

2
00:00:03,500 --> 00:00:04,000
Größe {laughs} <|im_end|>
"""
VTT = """WEBVTT

NOTE nobody says this

00:01.000 --> 00:02.000 align:start
<v Ann>Who <i>is</i>
there?

00:03.500 --> 00:04.000
Größe {laughs} &lt;|im_end|&gt;
"""
HEAD = "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname\nStyle: Default,Arial\n\n[Events]\n"
FORMAT = "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
DIALOGUE = "Dialogue: {},0:00:{:05.2f},0:00:{:05.2f},Default,,0000,0000,0000,,{}\n"
EVENTS = [(1, 2, "{\\p1}m 0 0 l 9 9{\\p0}Who {\\i1}is{\\i0}{not said}\\Nthere?"), (3.5, 4, "Größe <|im_end|>")]
ASS = HEAD + FORMAT + "".join(DIALOGUE.format(0, *event) for event in EVENTS)
SSA = ASS.replace("v4.00+", "v4.00").replace("V4+", "V4").replace("Layer", "Marked").replace(": 0,", ": Marked=0,")


def srt(cues: Sequence[tuple[float, float, str]]) -> str:
    return "\n".join(f"{n}\n{_time(a)} --> {_time(b)}\n{text}\n" for n, (a, b, text) in enumerate(cues, 1))


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60:02.0f}:{minutes % 60:02.0f}:{rest:06.3f}".replace(".", ",")


def write_subtitled(
    path: Path,
    texts: Sequence[str | bytes],
    *,
    default: int | None = None,
    start_s: float = 0.0,
    encoding: str = "utf-8",
) -> Path:
    """Write a video that lasts 6 s and has an English subtitle track for each text.

    Args:
        texts: The contents of a subtitle file for each track.
        default: Index of the default track, or None for no default track.
        start_s: Timestamp of the first frame. The subtitles are shifted by the same time.
        encoding: Text encoding of the subtitle packets.
    """
    apart(encode_subtitled, path, texts, default, start_s, encoding)
    return path


def encode_subtitled(
    path: Path, texts: Sequence[str | bytes], default: int | None, start_s: float, encoding: str
) -> None:
    webm, mp4 = path.suffix == ".webm", path.suffix == ".mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libvpx" if webm else "libx264", rate=2)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        tracks = []
        for number, text in enumerate(texts):
            source = av.open(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
            if mp4:
                track = out.add_stream("mov_text")
                track.codec_context.subtitle_header = HEAD.encode()
            else:
                track = out.add_stream_from_template(source.streams[0])
            track.metadata["language"] = "eng"
            if number == default:
                track.disposition = Disposition.default
            tracks.append((source, track))
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + round(2 * start_s), Fraction(1, 2)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for source, track in tracks:
            for packet in (each for each in source.demux() if each.size):
                content = bytes(packet) if source.format.name == "sup" else bytes(packet).decode().encode(encoding)
                made = av.Packet(len(content).to_bytes(2, "big") + content if mp4 else content)
                made.time_base, made.duration = packet.time_base, packet.duration
                made.pts = made.dts = packet.pts + round(start_s / packet.time_base)
                made.stream = track
                out.mux(made)


def pictures() -> bytes:
    """Return the contents of a file with PGS subtitles, which are images. Its images show nothing."""
    composition = bytes([0, 64, 0, 48, 0x10, 0, 0, 0x80, 0, 0, 0])
    segments = [(0x16, composition), (0x80, b"")] * 3
    return b"".join(
        b"PG" + (90000 * n).to_bytes(4, "big") + bytes(4) + bytes([kind]) + len(body).to_bytes(2, "big") + body
        for n, (kind, body) in enumerate(segments, 1)
    )
