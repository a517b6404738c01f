"""Transcribe the speech in a video using faster-whisper. The prompt includes the transcript in place of subtitles.

Transcription runs on the CPU in a separate thread, so it overlaps with loading the model and reading frames. A worker process
decodes the audio track (`read_audio`), so faster-whisper never opens the file itself. The audio is split at quiet points into
windows of limited length, so memory use doesn't depend on the length of the video.

The transcript depends only on the audio, the time span, and the speech model, because decoding is deterministic. Windows are
transcribed independently, except that all of them use the language detected in the first spoken words.

This module doesn't import torch or faster-whisper until there is something to transcribe.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

from evoprune.errors import ModelError, first_line, is_out_of_memory
from evoprune.session.hub import cached_folder, fetch, reach
from evoprune.session.reading import Reading, ReadingGroup, SharedChunks, state_of
from evoprune.timeline import Timeline
from evoprune.untrusted import loads
from evoprune.util import file_stats, installed_version, open_safetensors
from evoprune.video import Plan, SamplingOptions, Scope, Subtitles, Video, read_audio, read_subtitles

if TYPE_CHECKING:
    import numpy as np
    from faster_whisper import WhisperModel

    from evoprune.language import Tokenizer
    from evoprune.session.cache import Cache

# Hub IDs of the speech models, by name. `FILES` lists the files that faster-whisper would download.
MODELS = {
    "tiny": "Systran/faster-whisper-tiny",
    "base": "Systran/faster-whisper-base",
    "small": "Systran/faster-whisper-small",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
}
FILES = ("config.json", "preprocessor_config.json", "model.bin", "tokenizer.json", "vocabulary.*")
AUTO = "base"  # the model used for "auto"
RATE = 16_000  # sample rate in Hz
WINDOW_S = 120.0  # maximum length of a window in seconds
LAST_S = 15.0  # a full window is cut at its quietest point within this many seconds of its end
QUIET_S = 0.2  # resolution for finding the quietest point, in seconds
BRIDGE_S = 1.0  # shorter gaps in the audio, in seconds, are filled with silence; a longer gap ends the window
MIN_WINDOW_S = 0.1  # shorter windows, in seconds, aren't transcribed
# Whisper's own limit on the compression ratio. A higher ratio indicates repetitive text, which is common for music and noise.
REPEATED = 2.4
MAX_TRANSCRIPTS = 64  # maximum number of finished transcripts to keep in memory
STAGE = "speech"
NO_SOUND = "no_sound"
DAMAGED = "damaged_sound"
OPTIONS = {
    "beam_size": 5,
    "temperature": 0.0,
    "condition_on_previous_text": False,  # with True, one wrong line could cause more wrong lines
}

Line = tuple[float, float, str]
Progress = Callable[[str, int, int], None]


class SpeechModelOptions(Protocol):
    """Fields of `ModelOptions` that also apply to the speech model. Using a protocol avoids a circular import."""

    @property
    def offline(self) -> bool: ...

    @property
    def cores(self) -> int | None: ...


@dataclass(frozen=True)
class Transcript:
    """The transcribed speech in a time span of a video."""

    lines: list[Line] = field(default_factory=list)
    language: str | None = None
    damaged: bool = False  # whether parts of the audio couldn't be decoded


def with_speech(
    tokenizer: "Tokenizer",
    plan: Plan,
    sampling: SamplingOptions,
    options: SpeechModelOptions,
    *,
    timeline: Timeline | None = None,
    cache: "Cache | None" = None,
    progress: Progress | None = None,
) -> Plan:
    """Return a copy of a plan that uses the transcribed speech as subtitles.

    The plan is returned unchanged if it already has subtitles, if it is for an image, or if `speech` is "none". See `speech_of`
    for the other arguments and the errors.
    """
    if sampling.speech == "none" or plan.subtitles.source is not None or plan.info.is_picture:
        return plan
    span = plan.full.sampling.start_s, plan.full.sampling.end_s
    found = speech_of(plan.info, sampling, span, options, timeline=timeline, cache=cache, progress=progress)
    return replace(plan, subtitles=found.fitted(sampling.max_subtitle_tokens, lambda text: len(tokenizer.encode(text))))


def speech_of(
    info: Video,
    sampling: SamplingOptions,
    span: tuple[float, float],
    options: SpeechModelOptions,
    *,
    timeline: Timeline | None = None,
    cache: "Cache | None" = None,
    progress: Progress | None = None,
) -> Subtitles:
    """Transcribe the speech in a time span of a video.

    For a video without an audio track, the result has no lines, and it has a warning unless `speech` is "auto".

    Args:
        sampling: The sampling options. `speech` is the speech model name and must not be "none".
        span: The start and end, in seconds from the first frame.
        options: The language model options, some of which also apply to the speech model.
        timeline: Records the transcription as the "speech" stage.
        cache: The disk cache, which also stores transcripts.
        progress: Called while waiting, with "speech", the number of seconds transcribed so far, and the total number of seconds.

    Raises:
        ModelError: If the speech model is damaged or cannot be downloaded.
        VideoError: If the file can no longer be read.
        OutOfMemory: If there is not enough memory.
    """
    if not info.has_sound:
        return Subtitles(warnings=[] if sampling.speech == "auto" else [NO_SOUND])
    wanted = _SpeechRequest.of(info, sampling, span, options)
    heard = wanted.cached(cache) or wanted.wait_for_transcript(timeline or Timeline(), cache, progress)
    warnings = [DAMAGED] if heard.damaged else []
    source = f"speech ({wanted.model})"
    return Subtitles(source, heard.lines, warnings, speech=wanted.model, language=heard.language)


def begin_speech(plan: Plan, sampling: SamplingOptions, options: SpeechModelOptions) -> Callable[[], None]:
    """Start transcribing an input that will be opened later. Return a function that cancels the request.

    Canceling stops the transcription unless another request needs the same transcript.
    """
    span = plan.full.sampling.start_s, plan.full.sampling.end_s
    info = plan.info
    if sampling.speech == "none" or info.is_picture or not info.has_sound:
        return lambda: None
    if read_subtitles(info, sampling.subtitles_wanted, start_s=span[0], end_s=span[1]).source is not None:
        return lambda: None
    wanted = _SpeechRequest.of(info, sampling, span, options)
    return partial(wanted.release, wanted.begin())


@dataclass(frozen=True)
class _SpeechRequest:
    """Identifies a transcript. Requests that compare equal share the same transcription and transcript."""

    info: Video = field(compare=False)
    path: str
    state: tuple | None  # file state; see `state_of`
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

    def begin(self) -> SharedChunks["_Piece"]:
        """Return this request's transcription, starting it if necessary. The caller must call `release` when it is done."""
        with _lock:
            spoken = _transcripts.get(self)
            if spoken is None or not spoken.acquire():
                spoken = _transcripts[self] = SharedChunks(self, self._pieces, _group())
                spoken.acquire()
            _transcripts.move_to_end(self)
            return spoken

    def release(self, spoken: SharedChunks["_Piece"]) -> None:
        """End the use of a transcription that `begin` returned, which may have failed and been replaced in the meantime."""
        with _lock:
            stopped = spoken.release() and not spoken.is_complete
            if stopped and _transcripts.get(self) is spoken:
                del _transcripts[self]
            unused = [key for key, each in _transcripts.items() if not each.users]
            for key in unused[: max(0, len(_transcripts) - MAX_TRANSCRIPTS)]:
                del _transcripts[key]
        if stopped:
            spoken.stop()

    def wait_for_transcript(self, timeline: Timeline, cache: "Cache | None", progress: Progress | None) -> Transcript:
        """Start the transcription unless it is already running, and wait for the transcript."""
        spoken = self.begin()
        reading = spoken.read()
        total = max(1, round(self.span[1] - self.span[0]))

        def tell() -> None:
            if progress:
                progress(STAGE, min(reading.frames, total), total)

        try:
            with timeline.stage(STAGE, waiting=True):
                tell()
                pieces = list(reading.chunks(tell))
        finally:
            self.release(spoken)
        timeline.add(reading.timeline.take())
        language = next((piece.language for piece in pieces if piece.language), None)
        lines = [line for piece in pieces for line in piece.lines]
        heard = Transcript(lines, language, any(piece.damaged for piece in pieces))
        if cache and not heard.damaged:
            self._store(cache, heard)
        return heard

    # The disk cache.

    def cached(self, cache: "Cache | None") -> Transcript | None:
        """Return the transcript from the disk cache, or None on a cache miss."""
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
        """Return the cache key, a hash of everything that affects the transcript. Raises OSError if a file is missing."""
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
            "code": [installed_version(name) for name in ("evoprune", "faster-whisper", "ctranslate2", "av")],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _store(self, cache: "Cache", heard: Transcript) -> None:
        from safetensors.numpy import save

        try:
            key = self._key(cache)
        except OSError:
            return
        if state_of(self.path) != self.state:
            return  # the file was replaced in the meantime, so the key may belong to the new file
        facts = {"key": key, **asdict(heard)}
        about = json.dumps(facts)
        content = save({}, {"about": about, "digest": hashlib.blake2b(about.encode()).hexdigest()})
        cache.of_speech.write(key, lambda file: file.write(content))

    # The thread.

    def _pieces(self, reading: Reading) -> Iterator["_Piece"]:
        return reading.timeline.each(STAGE, self._transcribe(reading))

    def _transcribe(self, reading: Reading) -> Iterator["_Piece"]:
        """Transcribe the audio one window at a time, and yield the transcribed lines."""
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
            yield _Piece(lines, language if lines else None, bool(damaged))


@dataclass(frozen=True)
class _Piece:
    """The transcribed lines of a window."""

    lines: list[Line]
    language: str | None
    damaged: bool


_lock = threading.RLock()
_transcripts: OrderedDict[_SpeechRequest, SharedChunks[_Piece]] = OrderedDict()


@lru_cache(maxsize=1)
def _group() -> ReadingGroup:
    """Return the group shared by all transcriptions, which makes them run one after another."""
    return ReadingGroup()


def _forget() -> None:
    """Discard all state in a forked child process, where the threads don't exist."""
    global _lock
    _lock = threading.RLock()
    _transcripts.clear()
    _group.cache_clear()
    _whisper.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _windows(info: Video, start_s: float, end_s: float) -> Iterator[tuple[float, "np.ndarray", int]]:
    """Split the audio in a time span into windows that can be transcribed separately.

    For each window, this yields its start in seconds, its samples, float32 `[n]`, and the number of damaged packets so far.
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
    """Return the sample index at which to cut a window, in the middle of the quietest section of its last few seconds."""
    import numpy as np

    size = round(QUIET_S * RATE)
    count = round(LAST_S / QUIET_S)
    last = samples[-size * count :].reshape(count, size)
    return len(samples) - size * count + int(np.square(last).sum(1).argmin()) * size + size // 2


def _transcribed(model: "WhisperModel", samples: "np.ndarray", language: str | None) -> Iterator[tuple[Line, str]]:
    """Transcribe a window, and yield each line with its language. Line timestamps are in seconds from the start of the window.

    Each stretch of speech between two pauses is transcribed separately. Otherwise, Whisper might merge the words before and after a
    pause into a single line, or hallucinate words during silence and music.
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
    """Return a speech model's folder, downloading the model if necessary.

    Raises:
        ModelError: If the model is missing and cannot be downloaded, for example in offline mode.
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
    """Return a speech model's folder, or None if the model has to be downloaded first."""
    if model not in MODELS:
        return os.path.abspath(model)
    folder = cached_folder(MODELS[model], None)
    return (
        str(folder) if folder and all((folder / name).is_file() for name in ("model.bin", "tokenizer.json")) else None
    )


def check_offline(speech: str, offline: bool) -> None:
    """In offline mode, check that the speech model has already been downloaded. Never downloads anything.

    Raises:
        ModelError: If offline mode is on and the model is missing.
    """
    model = AUTO if speech == "auto" else speech
    if speech != "none" and offline:
        _folder(model, offline)
