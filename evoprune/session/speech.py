"""Transcribe the speech in a video with faster-whisper. In the prompt, the transcript takes the place of subtitles.

Transcription runs on the CPU in its own thread, so that it overlaps with loading the model and reading frames. A worker process
decodes the sound (`read_audio`), and faster-whisper only receives arrays. The sound is split at its quietest points into windows of
limited length, so memory use does not grow with the length of the video.

The transcript depends only on the sound, the time span and the speech model. Decoding does not sample at random. The windows are
independent of each other, except that all of them use the language detected in the first spoken words.

This file imports neither torch nor faster-whisper until something has to be transcribed.
"""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

from evoprune.errors import ModelError, first_line, is_out_of_memory
from evoprune.report import OVERLAP
from evoprune.session.hub import cached_folder, fetch, reach
from evoprune.session.reading import Reading, Readings, state_of, stop_all
from evoprune.untrusted import loads
from evoprune.util import file_stats, open_safetensors
from evoprune.video import Plan, SamplingOptions, Scope, Subtitles, Video, read_audio, read_subtitles

if TYPE_CHECKING:
    import numpy as np
    from faster_whisper import WhisperModel

    from evoprune.language import Tokenizer
    from evoprune.model import Clock
    from evoprune.session.cache import Cache

# Maps the name of each speech model to its hub id. `FILES` are the files that faster-whisper downloads.
MODELS = {
    "tiny": "Systran/faster-whisper-tiny",
    "base": "Systran/faster-whisper-base",
    "small": "Systran/faster-whisper-small",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
}
FILES = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")
AUTO = "base"  # the model that "auto" stands for
RATE = 16_000  # sample rate in Hz
WINDOW_S = 120.0  # maximum length in seconds of a window, which is transcribed as a whole
LAST_S = 15.0  # a window that is full is cut at the quietest part of this many seconds at its end
QUIET_S = 0.2  # the length in seconds of the parts whose loudness is compared
BRIDGE_S = 1.0  # gaps in the sound of up to this many seconds are filled with silence; a longer gap ends the window
MIN_WINDOW_S = 0.1  # windows that are shorter, in seconds, are not transcribed
# Whisper's own limit on the compression ratio. Text with a higher ratio repeats itself in a loop, as often happens with music and
# noise.
REPEATED = 2.4
MAX_TRANSCRIPTS = 64  # maximum number of finished transcripts that are kept in memory
STAGE = "speech"
NO_SOUND = "no_sound"
DAMAGED = "damaged_sound"
OPTIONS = {
    "beam_size": 5,
    "temperature": 0.0,
    "condition_on_previous_text": False,  # if this were True, a wrong line would lead to more wrong lines
}

Line = tuple[float, float, str]
Progress = Callable[[str, int, int], None]


class SpeechModelOptions(Protocol):
    """The fields of `ModelOptions` that also apply to the speech model. This is a protocol in order to avoid a circular import."""

    @property
    def offline(self) -> bool: ...

    @property
    def cores(self) -> int | None: ...


@dataclass(frozen=True)
class Transcript:
    """The speech in a time span of a video."""

    lines: list[Line] = field(default_factory=list)
    language: str | None = None
    damaged: bool = False  # whether some parts of the sound could not be decoded


def with_speech(
    tokenizer: "Tokenizer",
    plan: Plan,
    sampling: SamplingOptions,
    options: SpeechModelOptions,
    *,
    clock: "Clock | None" = None,
    cache: "Cache | None" = None,
    progress: Progress | None = None,
) -> Plan:
    """Return a copy of the plan that uses the transcribed speech as its subtitles.

    If the plan already has subtitles, or if `speech` is "none", the plan itself is returned. For the other arguments and the
    errors, see `speech_of`.
    """
    if sampling.speech == "none" or plan.subtitles.source is not None or plan.info.is_picture:
        return plan
    span = plan.full.sampling.start_s, plan.full.sampling.end_s
    found = speech_of(plan.info, sampling, span, options, clock=clock, cache=cache, progress=progress)
    return replace(plan, subtitles=found.fitted(sampling.max_subtitle_tokens, lambda text: len(tokenizer.encode(text))))


def speech_of(
    info: Video,
    sampling: SamplingOptions,
    span: tuple[float, float],
    options: SpeechModelOptions,
    *,
    clock: "Clock | None" = None,
    cache: "Cache | None" = None,
    progress: Progress | None = None,
) -> Subtitles:
    """Transcribe the speech in a time span of a video.

    If the video has no sound, the result has no lines. Unless `speech` is "auto", it then has a warning.

    Args:
        sampling: The sampling options. `speech` is the name of the speech model and must not be "none".
        span: The start and the end, in seconds from the first frame.
        options: The options of the model that answers, some of which also apply to the speech model.
        clock: The transcription time is added to its stage "speech", and the part that was hidden behind other work is added to
            "overlap".
        cache: The disk cache, which also stores transcripts.
        progress: Called while waiting with "speech", the number of seconds that have been transcribed, and the total number of
            seconds.

    Raises:
        ModelError: If the speech model is damaged or cannot be downloaded.
        VideoError: If the file can no longer be read.
        OutOfMemory: If there is not enough memory.
    """
    if not info.has_sound:
        return Subtitles(warnings=[] if sampling.speech == "auto" else [NO_SOUND])
    wanted = _SpeechRequest.of(info, sampling, span, options)
    heard = wanted.cached(cache) or wanted.wait_for_transcript(clock, cache, progress)
    warnings = [DAMAGED] if heard.damaged else []
    source = f"speech ({wanted.model})"
    return Subtitles(source, heard.lines, warnings, speech=wanted.model, language=heard.language)


def begin_speech(plan: Plan, sampling: SamplingOptions, options: SpeechModelOptions) -> Callable[[], None]:
    """Start to transcribe an input that will be opened later. Return a function that withdraws this request.

    That function stops the transcription, unless something else needs it too.
    """
    span = plan.full.sampling.start_s, plan.full.sampling.end_s
    info = plan.info
    if sampling.speech == "none" or info.is_picture or not info.has_sound:
        return lambda: None
    if read_subtitles(info, sampling.subtitles_wanted, *span).source is not None:
        return lambda: None
    wanted = _SpeechRequest.of(info, sampling, span, options)
    wanted.begin()
    return wanted.release


@dataclass(frozen=True)
class _SpeechRequest:
    """A request for a transcript. Requests that are equal have equal transcripts."""

    info: Video = field(compare=False)
    path: str
    state: tuple | None  # the state of the file; see `state_of`
    span: tuple[float, float]
    model: str
    offline: bool = field(compare=False)
    cores: int | None = field(compare=False)

    @classmethod
    def of(
        cls, info: Video, sampling: SamplingOptions, span: tuple[float, float], options: SpeechModelOptions
    ) -> "_SpeechRequest":
        model = AUTO if sampling.speech == "auto" else sampling.speech
        path = os.path.abspath(info.path)
        return cls(info, path, state_of(path), span, model, bool(options.offline), options.cores)

    def begin(self) -> Reading["_Piece"]:
        """Return the running or finished transcription, or start one. The caller must call `release` when it no longer needs it."""
        with _lock:
            reading = _readings.get(self)
            failed = reading is not None and reading.problem is not None
            if reading is None or failed or not (reading.complete or reading.is_here):
                reading = _readings[self] = Reading(self._pieces, _group(), shared=True)
            _readings.move_to_end(self)
            reading.users += 1
            return reading

    def release(self) -> None:
        stopped = []
        with _lock:
            reading = _readings.get(self)
            if reading is None:
                return
            reading.users -= 1
            if reading.users <= 0 and not reading.complete:
                stopped.append(_readings.pop(self))
            unused = [key for key, each in _readings.items() if each.users <= 0]
            for key in unused[: max(0, len(_readings) - MAX_TRANSCRIPTS)]:
                stopped.append(_readings.pop(key))
        stop_all(stopped)

    def wait_for_transcript(
        self, clock: "Clock | None", cache: "Cache | None", progress: Progress | None
    ) -> Transcript:
        """Wait for the transcript, which is started unless it is already running."""
        reading = self.begin()
        start = time.perf_counter()
        total = max(1, round(self.span[1] - self.span[0]))

        def tell() -> None:
            if progress:
                progress(STAGE, min(reading.frames, total), total)

        try:
            tell()
            pieces = list(reading.chunks(tell))
        finally:
            self.release()
        waited_s = time.perf_counter() - start
        if clock:
            # If a transcript has more than one consumer, only the first one counts the transcription time.
            busy_s = max(waited_s, sum(piece.taken_seconds() for piece in pieces))
            clock.seconds[STAGE] = clock.seconds.get(STAGE, 0.0) + busy_s
            clock.seconds[OVERLAP] = clock.seconds.get(OVERLAP, 0.0) + busy_s - waited_s
        language = next((piece.language for piece in pieces if piece.language), None)
        lines = [line for piece in pieces for line in piece.lines]
        heard = Transcript(lines, language, any(piece.damaged for piece in pieces))
        if cache and not heard.damaged:
            self._store(cache, heard)
        return heard

    # The disk cache.

    def cached(self, cache: "Cache | None") -> Transcript | None:
        """Return the transcript from the disk cache, or None if it is not there."""
        if cache is None:
            return None
        try:
            key = self._key(cache)
            with open_safetensors(cache.of_speech.path(key)) as file:
                about, digest = (file.metadata()[name] for name in ("about", "digest"))
            if digest != hashlib.blake2b(about.encode()).hexdigest():
                return None
            facts = loads(about)
            lines = [(float(start), float(end), str(text)) for start, end, text in facts["lines"]]
            return Transcript(lines, facts["language"]) if facts["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _key(self, cache: "Cache") -> str:
        """Return a hash of everything that a transcript depends on. Raises OSError if a file is missing."""
        folder = _local_folder(self.model)
        if folder is None:
            raise FileNotFoundError(self.model)
        facts = {
            "video": cache.content_hash(self.path),
            "start_s": self.info.start_s,
            "span": self.span,
            "model": file_stats(os.path.join(folder, name) for name in sorted(os.listdir(folder))),
            "windows": [WINDOW_S, LAST_S, QUIET_S, BRIDGE_S, MIN_WINDOW_S, REPEATED],
            "options": OPTIONS,
            "code": [_version(name) for name in ("evoprune", "faster-whisper", "ctranslate2", "av")],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _store(self, cache: "Cache", heard: Transcript) -> None:
        from safetensors.numpy import save

        try:
            key = self._key(cache)
        except OSError:
            return
        facts = {"key": key, **asdict(heard)}
        about = json.dumps(facts)
        content = save({}, {"about": about, "digest": hashlib.blake2b(about.encode()).hexdigest()})
        cache.of_speech.write(key, lambda file: file.write(content))

    # The thread.

    def _pieces(self, reading: Reading) -> Iterator["_Piece"]:
        """Transcribe one window at a time. Each piece contains the lines of one window."""
        start = time.perf_counter()
        model = _loaded(self.model, self.offline, self.cores)
        language = None
        damaged = 0
        for start_s, samples, damaged in _windows(self.info, *self.span):
            lines: list[Line] = []
            if len(samples) >= MIN_WINDOW_S * RATE:
                for line, spoken in _transcribed(model, samples, language):
                    Scope.check()
                    begin_s, end_s, text = line
                    lines.append((start_s + begin_s, start_s + end_s, text))
                    language = spoken
                    reading.at_least(round(start_s + end_s - self.span[0]))
            reading.at_least(round(start_s + len(samples) / RATE - self.span[0]))
            yield _Piece(lines, language if lines else None, bool(damaged), [time.perf_counter() - start])
            start = time.perf_counter()


@dataclass(frozen=True)
class _Piece:
    """The lines of a window, and the number of seconds that transcribing it took, until the first consumer takes that number."""

    lines: list[Line]
    language: str | None
    damaged: bool
    seconds: list[float] = field(default_factory=list)

    def taken_seconds(self) -> float:
        try:
            return self.seconds.pop()
        except IndexError:
            return 0.0


_lock = threading.RLock()
_readings: OrderedDict[_SpeechRequest, Reading[_Piece]] = OrderedDict()


@lru_cache(maxsize=1)
def _group() -> Readings:
    """Return the group that contains all transcriptions, so that they run one after another."""
    return Readings()


def _forget() -> None:
    """Discard all state in a forked child process, where the threads do not exist."""
    global _lock
    _lock = threading.RLock()
    _readings.clear()
    _group.cache_clear()
    _whisper.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _windows(info: Video, start_s: float, end_s: float) -> Iterator[tuple[float, "np.ndarray", int]]:
    """Yield the sound of a time span in windows.

    Each window consists of its start in seconds, its samples, float32 `[n]`, and the number of packets so far that were damaged.
    """
    import numpy as np

    most = round(WINDOW_S * RATE)
    held = np.empty(0, np.float32)
    at_s = start_s
    damaged = 0
    with closing(read_audio(info, start_s, end_s)) as pieces:
        for piece in pieces:
            damaged = piece.damaged
            if not len(piece.samples):
                continue
            gap_s = piece.start_s - (at_s + len(held) / RATE)
            if len(held) and gap_s > BRIDGE_S:
                yield at_s, held, damaged
                held = held[:0]
            if not len(held):
                at_s = piece.start_s
                gap_s = 0.0
            held = np.concatenate([held, np.zeros(max(0, round(gap_s * RATE)), np.float32), piece.samples])
            while len(held) > most:
                end = _quietest(held[:most])
                yield at_s, held[:end], damaged
                at_s += end / RATE
                held = held[end:]
    yield at_s, held, damaged


def _quietest(samples: "np.ndarray") -> int:
    """Return the index of the middle of the quietest part of a window's last seconds."""
    import numpy as np

    size = round(QUIET_S * RATE)
    count = round(LAST_S / QUIET_S)
    last = samples[-size * count :].reshape(count, size)
    return len(samples) - size * count + int(np.square(last).sum(1).argmin()) * size + size // 2


def _transcribed(model: "WhisperModel", samples: "np.ndarray", language: str | None) -> Iterator[tuple[Line, str]]:
    """Yield the lines of a window, with their times in seconds from the start of the window, and the language.

    Each stretch of speech between two pauses is transcribed separately. Otherwise, Whisper could merge the words before and after a
    pause into one line, and could invent words for silence and music.
    """
    from faster_whisper.vad import get_speech_timestamps

    try:
        for part in get_speech_timestamps(samples):
            start_s = part["start"] / RATE
            segments, info = model.transcribe(samples[part["start"] : part["end"]], language=language, **OPTIONS)
            for segment in segments:
                text = " ".join(segment.text.split())
                if text and segment.compression_ratio <= REPEATED:
                    language = info.language
                    yield (start_s + segment.start, start_s + segment.end, text), language
    except (RuntimeError, ValueError) as problem:
        if is_out_of_memory(problem):
            raise
        hint = "check that its folder is complete, and that ctranslate2 supports its version"
        raise ModelError(f"the speech model failed: {first_line(problem)}", hint) from problem


def _loaded(model: str, offline: bool, cores: int | None) -> "WhisperModel":
    folder = _folder(model, offline)
    try:
        return _whisper(folder, cores or 0)
    except (RuntimeError, ValueError, OSError) as problem:
        if is_out_of_memory(problem):
            raise
        raise ModelError(
            f"the speech model in {folder} cannot be loaded: {first_line(problem)}",
            "it is incomplete or damaged: delete the folder to download it again",
        ) from problem


@lru_cache(maxsize=1)
def _whisper(folder: str, cores: int) -> "WhisperModel":
    from faster_whisper import WhisperModel

    return WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=cores, local_files_only=True)


def _folder(model: str, offline: bool) -> str:
    """Return the folder of a speech model. If the model is missing, it is downloaded first.

    Raises:
        ModelError: If the model is missing and cannot be downloaded, or the network may not be used.
    """
    if folder := _local_folder(model):
        return folder
    name = MODELS[model]
    unreachable = reach(name, None, offline)
    if unreachable is not None:
        hint = f"on a machine with network access: hf download {name} --local-dir DIR; then use DIR as the speech model"
        raise ModelError(f"the speech model {model} is not on this machine, and {unreachable}", hint)
    return str(fetch(name, None, FILES, None))


def _local_folder(model: str) -> str | None:
    """Return the folder of a speech model, or None if the model has to be downloaded first."""
    if model not in MODELS:
        return os.path.abspath(model)
    folder = cached_folder(MODELS[model], None)
    return (
        str(folder) if folder and all((folder / name).is_file() for name in ("model.bin", "tokenizer.json")) else None
    )


def check_offline(speech: str, offline: bool) -> None:
    """Check that a speech model is on this machine if the network may not be used. Downloads nothing.

    Raises:
        ModelError: If the model is missing.
    """
    model = AUTO if speech == "auto" else speech
    if speech != "none" and offline:
        _folder(model, offline)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
