"""Reads a video's audio track for speech recognition. The file is decoded in a worker process."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.util import did_you_mean, install_hint, missing_hint
from evoprune.video.info import AUDIO_RATE, Video

if TYPE_CHECKING:
    import numpy as np

PIECE_S = 30.0
SPEECH_MODELS = ("tiny", "base", "small", "large-v3-turbo")
SPEECH_FILES = ("model.bin", "config.json", "tokenizer.json")  # required files in a speech model's folder


def check_speech(speech: str) -> None:
    """Validate the `speech` option as far as possible without loading a model.

    Raises:
        UsageError: The option is neither a known name nor a folder containing a CTranslate2 model, or faster-whisper is not
            installed.
    """
    if speech == "none":
        return
    if speech not in ("auto", *SPEECH_MODELS):
        choices = f"use auto, {', '.join(SPEECH_MODELS)}, or a folder with a Whisper model for CTranslate2"
        if not os.path.isdir(speech):
            meant = "" if os.sep in speech else did_you_mean(speech, ("auto", "none", *SPEECH_MODELS))
            raise UsageError(f"there is no speech model {speech!r}", missing_hint(speech, choices, meant))
        missing = [name for name in SPEECH_FILES if not os.path.isfile(os.path.join(speech, name))]
        if missing:
            raise UsageError(f"{speech} is no speech model: it has no {missing[0]}", choices)
    if "faster_whisper" not in sys.modules and find_spec("faster_whisper") is None:
        raise UsageError("speech needs faster-whisper, which is not installed", install_hint("speech"))


@dataclass(frozen=True)
class SoundPiece:
    """A block of consecutive samples from a video's audio track."""

    start_s: float  # timestamp of the first sample, in seconds from the first video frame
    samples: "np.ndarray"  # float32 `[n]` between -1 and 1, mono, 16 kHz
    damaged: int  # number of undecodable packets so far

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples) / AUDIO_RATE


def read_audio(info: Video, start_s: float, end_s: float) -> Iterator[SoundPiece]:
    """Yield a span of a video's audio in pieces of at most `PIECE_S` seconds. Yields nothing if there is no audio track.

    If the audio track has a gap, the next piece starts later than the previous piece ends. Undecodable packets are skipped and
    counted. To stop early, close the iterator.

    Args:
        start_s, end_s: Start and end of the span, in seconds from the first video frame.

    Raises:
        VideoError: The file has become unreadable. See also `isolation.run_task`.
    """
    from evoprune.video.sandbox.isolation import with_retry

    if info.has_sound:
        with closing(with_retry(partial(_read_once, info, start_s, end_s))) as pieces:
            yield from pieces


def _read_once(info: Video, start_s: float, end_s: float, fresh: bool) -> Iterator[SoundPiece]:
    import numpy as np

    from evoprune.video.sandbox.channel import FrameMemory
    from evoprune.video.sandbox.isolation import HINT, Crash, borrow

    size = 4 * round(PIECE_S * AUDIO_RATE)
    # Declare twice the actual size so that each piece gets its own memory, which the worker releases after use.
    memory = FrameMemory(2 * size)
    with borrow(info.path, fresh) as request:
        request.ask("sound", info=asdict(info), start_s=start_s, end_s=end_s)
        done = False
        after_s = -math.inf
        while not done:
            content, said = request.fill(memory, (size,))
            done = said["done"]
            at_s = float(said["start_s"])
            count = said["samples"]
            if not count and done:
                at_s = end_s
            if not (0 <= count <= size // 4 and at_s >= max(start_s, after_s) - 1 and at_s <= end_s):
                raise Crash(f"the decoder crashed on {info.path} (its answer is invalid)", HINT)
            samples = content.view(np.float32)[:count]
            piece = SoundPiece(at_s, np.clip(np.nan_to_num(samples), -1.0, 1.0), said["damaged"])
            del samples, content
            after_s = piece.end_s
            yield piece
        request.finish()
