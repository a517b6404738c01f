"""The kinds of files that the tests use, and the result that is expected from each decoder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.video.files import add_beside, numbered_frames, write_video


@dataclass(frozen=True)
class Kind:
    """How to write a kind of file, and what to expect from it.

    `decord_refuses` is part of decord's error message for the file, or None if decord can read it. `hidden` is the number of frames
    that are stored but never displayed. `stored` is True if the file is in `data/`, because the encoders in PyAV's wheels cannot
    write it. `beside` names another stream that comes before the video (see `add_beside`).
    """

    how: dict[str, Any] = field(default_factory=dict)
    decord_refuses: str | None = None
    frames: int = 40
    size: tuple[int, int] = (48, 64)
    hidden: int = 0
    stored: bool = False
    beside: str | None = None


# The VP9 files were written by vpxenc 1.12 with --kf-max-dist=10 --end-usage=q --cq-level=30 --cpu-used=1. The 10-bit file was
# written with these options and --profile=2 --bit-depth=10 --input-bit-depth=10 --auto-alt-ref=0.
DATA = Path(__file__).parent / "data"
HEVC = {"codec": "libx265", "options": {"x265-params": "log-level=none"}}
VP9 = {"codec": "libvpx-vp9"}
AV1 = {"codec": "libsvtav1"}
OPEN_GOP = {"options": {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}}
VARY = {"pts": [0.01 * i * i for i in range(40)]}
NO_TIMES = "does not report the times"
UNRELIABLE = "reliably"

KINDS = {
    "h264.mp4": Kind(),
    "h264.mov": Kind(),
    "h264.mkv": Kind(),
    "h264.flv": Kind(),
    "h264.ts": Kind(decord_refuses=UNRELIABLE),
    "h264.avi": Kind(decord_refuses=NO_TIMES),
    "h264.h264": Kind(decord_refuses=UNRELIABLE),
    "hevc.mp4": Kind(HEVC),
    "hevc.mkv": Kind(HEVC),
    "hevc.ts": Kind(HEVC, decord_refuses=UNRELIABLE),
    "vp8.webm": Kind({"codec": "libvpx"}),
    "vp9.webm": Kind(VP9),
    # A file with hidden reference frames, as in most VP9 files.
    "vp9_hidden.webm": Kind(stored=True, decord_refuses="stops at damage"),
    "av1.mkv": Kind(AV1, decord_refuses="no decoder for AV1"),
    "av1.mp4": Kind(AV1, decord_refuses="no decoder for AV1"),
    "picture.gif": Kind({"codec": "gif", "pix_fmt": "rgb8"}, decord_refuses=UNRELIABLE),
    "mjpeg.avi": Kind({"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "mpeg4.avi": Kind({"codec": "mpeg4"}),
    "mpeg4.mp4": Kind({"codec": "mpeg4"}),
    "mpeg2.mpg": Kind({"codec": "mpeg2video", "fps": 25}, decord_refuses=UNRELIABLE),
    "wmv2.wmv": Kind({"codec": "wmv2"}, decord_refuses=UNRELIABLE),
    "prores.mov": Kind({"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
    "h264_10.mp4": Kind({"pix_fmt": "yuv420p10le"}),
    "vp9_10.webm": Kind(stored=True),
    "hevc_10.mkv": Kind(HEVC | {"pix_fmt": "yuv420p10le"}),
    "av1_10.mkv": Kind(AV1 | {"pix_fmt": "yuv420p10le"}, decord_refuses="no decoder for AV1"),
    "422.mp4": Kind({"pix_fmt": "yuv422p"}),
    "444_10.mp4": Kind({"pix_fmt": "yuv444p10le"}, size=(47, 63)),
    "hevc_12.mkv": Kind(HEVC | {"pix_fmt": "yuv420p12le"}),
    "444.webm": Kind(VP9 | {"pix_fmt": "yuv444p"}),
    "interlaced.mp4": Kind({"options": {"x264-params": "interlaced=1"}}, decord_refuses="deinterlace"),
    "rgb.mp4": Kind({"codec": "libx264rgb", "pix_fmt": "rgb24"}),
    "alpha.mov": Kind({"codec": "prores_ks", "pix_fmt": "yuva444p10le"}, decord_refuses="transparent"),
    "png16.mov": Kind({"codec": "png", "pix_fmt": "rgb48be"}, size=(47, 63)),
    "ffv1.mkv": Kind({"codec": "ffv1", "pix_fmt": "bgr0"}, size=(47, 63)),
    "raw.avi": Kind({"codec": "rawvideo", "pix_fmt": "bgr24"}, size=(47, 63)),
    "sorenson.flv": Kind({"codec": "flv"}, size=(47, 63)),
    "mpeg1.mpg": Kind({"codec": "mpeg1video", "fps": 25}, decord_refuses=UNRELIABLE),
    "vp9.ivf": Kind(VP9, decord_refuses=UNRELIABLE),
    "raw.y4m": Kind({"codec": "wrapped_avframe"}, decord_refuses=UNRELIABLE),
    "mpeg2.mxf": Kind({"codec": "mpeg2video", "fps": 25}, decord_refuses=UNRELIABLE),
    "picture.apng": Kind({"codec": "apng", "pix_fmt": "rgb24"}, decord_refuses=UNRELIABLE),
    "subtitles.mkv": Kind(beside="subtitles"),
    "cover.mp4": Kind(beside="cover"),
    "cover.mkv": Kind(beside="cover"),
    "late.mp4": Kind({"start": 5.0}),
    "late.mkv": Kind({"start": 5.0}),
    "late.ts": Kind({"start": 5.0}, decord_refuses=UNRELIABLE),
    "negative.mkv": Kind({"start": -0.5}),
    "negative.mp4": Kind({"start": -0.5}, decord_refuses=NO_TIMES, hidden=5),
    "vary.mp4": Kind(VARY),
    "vary.mkv": Kind(VARY),
    "vary.webm": Kind(VARY | VP9),
    "vary.ts": Kind(VARY, decord_refuses=UNRELIABLE),
    "open_gop.mp4": Kind(OPEN_GOP),
    "open_gop.mkv": Kind(OPEN_GOP),
    "refresh.mp4": Kind({"options": {"x264-params": "intra-refresh=1"}}),
    "one_group.mp4": Kind({"gop": 1000}),
    "fragments.mp4": Kind({"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "no_length.mkv": Kind({"container_options": {"live": "1"}}, decord_refuses="cannot open the file"),
    "odd.mp4": Kind({"pix_fmt": "yuv444p"}, size=(47, 63)),
    "odd.webm": Kind(VP9, size=(47, 63)),
    "turned.mp4": Kind({"rotation": 90}),
    "turned_back.mov": Kind({"rotation": 270}),
    "upside_down.mp4": Kind({"rotation": 180}),
    "turned.mkv": Kind({"rotation": 90}),
    "mirrored.mp4": Kind({"rotation": 90, "mirrored": True}, decord_refuses="mirrored"),
    "mirrored.mkv": Kind({"rotation": 90, "mirrored": True}),
    "one.mp4": Kind(frames=1),
    "one.mkv": Kind(frames=1),
    "one.webm": Kind(VP9, frames=1),
    "short.mp4": Kind(frames=3),
    "short.mkv": Kind(frames=3, decord_refuses=NO_TIMES),
    "short.webm": Kind(VP9, frames=3),
}


def write_kind(folder: Path, name: str) -> Path:
    """Return the path of a file of this kind, whose frames are numbered from 0. It is written on first use, unless it is stored."""
    path, kind = folder / f"kind_{name}", KINDS[name]
    if kind.stored:
        return DATA / name
    if not path.exists():
        write_video(path, _upright(kind), **kind.how)
        if kind.beside:
            add_beside(path.rename(folder / f"alone_{name}"), path, kind.beside)
    return path


def _upright(kind: Kind) -> list[np.ndarray]:
    """Return frames whose numbers are upright after a player has rotated and flipped the frames."""
    turns, mirrored = kind.how.get("rotation", 0) // 90, kind.how.get("mirrored", False)
    displayed = kind.size if turns % 2 == 0 else kind.size[::-1]
    frames = [np.rot90(rgb, turns) for rgb in numbered_frames(kind.frames, *displayed)]
    return [np.ascontiguousarray(rgb[:, ::-1] if mirrored else rgb) for rgb in frames]


def table() -> str:
    both = [name for name, kind in KINDS.items() if not kind.decord_refuses]
    pyav = [name for name, kind in KINDS.items() if kind.decord_refuses]
    lines = ["| answered with | kinds | files |", "|---|---|---|"]
    for readers, names in (("PyAV and decord", both), ("PyAV alone; decord: exit code 3", pyav)):
        lines.append(f"| {readers} | {len(names)} | {', '.join(names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
