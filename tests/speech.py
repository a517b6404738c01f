"""Sound with known contents, and a stand-in for faster-whisper that says when it is loud."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest

from tests.video.files import apart, numbered_frames

RATE = 16_000
Bursts = list[tuple[float, float]]  # start and end of every loud part, in seconds


def write_sounding(path: Path, length_s: float, bursts: Bursts, **how) -> Path:
    """Write a video with tones, see `encode_sounding`."""
    apart(encode_sounding, str(path), length_s, bursts, **how)
    return path


def encode_sounding(
    path: str,
    length_s: float,
    bursts: Bursts,
    *,
    rate: int = 44_100,
    layout: str = "stereo",
    codec: str = "aac",
    fps: int = 2,
    video_from_s: float = 0.0,
    sound_from_s: float = 0.0,
    gap: tuple[float, float] | None = None,
) -> None:
    """Encode a video that is silent except for tones. All times are on the file's clock.

    Args:
        video_from_s, sound_from_s: start times of the two tracks.
        gap: a time span for which the file has no audio packets.
    """
    with av.open(path, "w") as out:
        video = out.add_stream("libx264", rate=fps, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.gop_size = 4
        sound = out.add_stream(codec, rate=rate, layout=layout)
        frames = numbered_frames(8)
        for number in range(int((length_s - video_from_s) * fps)):
            frame = av.VideoFrame.from_ndarray(frames[number % 8], format="rgb24")
            frame.pts = number + round(video_from_s * fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        size = sound.codec_context.frame_size or 1024
        channels = 2 if layout == "stereo" else 1
        for at in range(round(sound_from_s * rate), round(length_s * rate), size):
            times = np.arange(at, at + size) / rate
            if gap and gap[0] <= times[0] < gap[1]:
                continue
            loud = np.zeros(size, bool)
            for start_s, end_s in bursts:
                loud |= (times >= start_s) & (times < end_s)
            tone = (0.5 * np.sin(2 * np.pi * 440 * times) * loud).astype(np.float32)
            planar = sound.codec_context.format.is_planar
            values = np.stack([tone] * channels) if planar else np.repeat(tone, channels)[None]
            for kind in (np.int16, np.int32):
                if f"s{np.iinfo(kind).bits}" in sound.codec_context.format.name:
                    values = (values * np.iinfo(kind).max).astype(kind)
            frame = av.AudioFrame.from_ndarray(values, format=sound.codec_context.format.name, layout=layout)
            frame.sample_rate, frame.pts = rate, at
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))


def loud_parts(samples: np.ndarray, start_s: float = 0.0) -> Bursts:
    """Return the loud parts of sound, in seconds, to 50 ms."""
    step = RATE // 20
    count = len(samples) // step
    loud = np.abs(samples[: count * step].reshape(count, step)).max(1) > 0.1
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    return [(start_s + a / 20, start_s + b / 20) for a, b in edges.reshape(-1, 2).tolist()]


class LoudModel:
    """Stand-in for `faster_whisper.WhisperModel`: writes a line for every loud part."""

    loads = 0
    calls: list[tuple[float, str | None]] = []  # noqa: RUF012 (length in seconds and language of every call)
    problem: Exception | None = None
    language = "de"

    def __init__(self, folder: str, **how):
        assert how["local_files_only"] and how["device"] == "cpu"
        LoudModel.loads += 1

    def transcribe(self, samples: np.ndarray, language: str | None = None, **how):
        assert samples.dtype == np.float32 and samples.ndim == 1
        LoudModel.calls.append((len(samples) / RATE, language))
        if LoudModel.problem:
            raise LoudModel.problem
        said = (
            SimpleNamespace(start=a, end=b, text=f" loud for  {b - a:.0f} s", compression_ratio=1.0)
            for a, b in loud_parts(samples)
        )
        return said, SimpleNamespace(language=language or LoudModel.language)


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Replace faster-whisper by `LoudModel`, and return the folder of a speech model for it."""
    module = ModuleType("faster_whisper")
    module.WhisperModel = LoudModel
    module.vad = ModuleType("faster_whisper.vad")
    module.vad.get_speech_timestamps = lambda samples: (
        [{"start": 0, "end": len(samples)}] if loud_parts(samples) else []
    )
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setitem(sys.modules, "faster_whisper.vad", module.vad)
    LoudModel.loads, LoudModel.problem, LoudModel.language = 0, None, "de"
    LoudModel.calls.clear()
    folder.mkdir()
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return str(folder)
