"""Turn video and image files into visual tokens: probe the inputs, plan how to read them, then read, patchify, and encode them.

If an encoded input is already in the disk cache, its tokens are loaded from the cache instead.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, Self

import torch

import evoprune
from evoprune.backend import Device, empty_cache
from evoprune.errors import OutOfMemory, UsageError, callback_errors, memory_guard, named
from evoprune.methods import MethodText
from evoprune.report import INPUT_STAGES, OVERLAP
from evoprune.session.ahead import ReadAhead
from evoprune.session.asking import EncodedInputs
from evoprune.session.cache import Cache, Entry, own_code
from evoprune.session.encoded import EncodedInput
from evoprune.session.memory import TEXT
from evoprune.session.patches import content_key, patch_bytes
from evoprune.session.prompting import with_subtitles
from evoprune.session.reading import Reading, Readings, SharedChunks, probed
from evoprune.session.session import Session
from evoprune.session.speech import with_speech
from evoprune.timeline import Timeline, account, this_thread
from evoprune.util import brief
from evoprune.video import (
    Folder,
    FrameChunk,
    GivenInput,
    HeldVideo,
    Input,
    InputLimits,
    Plan,
    SamplingOptions,
    Stopped,
    read_chunks,
)
from evoprune.vision import Encoded, EncodedRows, encode_rows, patches_of

Path = str | os.PathLike[str]
# A progress callback. Its arguments are a stage ("read", "encode", or "layers"), the amount done so far, and the total.
Progress = Callable[[str, int, int], None]
# Changes or replaces a plan's frames. Its arguments are the plan, and the frames that will be read from the files if they are used.
FrameFilter = Callable[[Plan, Iterator[FrameChunk]], Iterator[FrameChunk]]
# Runs the vision tower. Its arguments are those of `vision.encoder.encode_rows`.
Tower = Callable[..., EncodedRows]

KINDS_HINT = "give a path or a URL, an array of frames, a Pillow image, the bytes of a file, or an open file"
AHEAD_BYTES = 2**26  # maximum size in bytes of prefetched patches outside the patch store
READERS = {"pyav": "av", "decord": "decord", "pillow": "pillow"}  # Python packages of the decoders


@dataclass(frozen=True)
class _PatchSource:
    """Reads an input's frames and converts them to patches. It doesn't refer to who asked for them.

    Attributes:
        cores, ahead, filter: See `OpenInput`; `filter` is its `frames`.
    """

    plan: Plan
    limits: InputLimits
    device: torch.device
    cores: int | None
    ahead: ReadAhead | None
    filter: FrameFilter | None

    def __call__(self, reading: Reading[FrameChunk]) -> Iterator[FrameChunk]:
        """Yield the patches in the thread of a `Reading`, and update the number of frames that it has read."""
        return self.patches(reading.timeline, reading.at_least)

    def patches(self, timeline: Timeline, on_frames: Callable[[int], None]) -> Iterator[FrameChunk]:
        """Yield the patches in chunks, calling `on_frames` with the number of frames read so far."""
        frames = self._frames(timeline, on_frames)
        if self.filter is not None:
            frames = self.filter(self.plan, frames)
        with closing(frames):
            for chunk in timeline.each("read", frames):
                on_frames(chunk.end)
                with timeline.stage("preprocess"):
                    patches = patches_of(chunk.pixels, self.plan, self.limits, self.device)
                yield replace(chunk, pixels=patches)

    def _frames(self, timeline: Timeline, on_frames: Callable[[int], None]) -> Iterator[FrameChunk]:
        """Yield the sampled frames in chunks, from the prefetch if it has them."""
        plan = self.plan
        if self.ahead and (early := self.ahead.take(plan)):
            try:
                with closing(early):
                    yield from timeline.each("read", early.chunks(), waiting=True)
            finally:
                timeline.add(early.timeline.take())
            return
        given = {"chunk_bytes": plan.chunk_bytes, "cores": self.cores, "on_frames": on_frames}
        with closing(read_chunks(plan.source, plan.sampling.times_s, **given, **plan.read_arguments)) as frames:
            yield from frames


@dataclass
class _Seen:
    """Facts about the frames that have been read so far.

    Attributes:
        read_s: Timestamps of the decoded frames, in seconds.
        damaged: Number of packets that could not be decoded.
        other_size, moved: See `FrameChunk`.
    """

    read_s: tuple[float, ...] = ()
    damaged: int = 0
    other_size: bool = False
    moved: bool = False

    def add(self, chunk: FrameChunk) -> None:
        self.read_s += chunk.times_s
        self.damaged += chunk.damaged
        self.other_size |= chunk.other_size
        self.moved |= chunk.moved


@dataclass(eq=False)
class OpenInput:
    """A video or image opened for encoding. Encode it once, and then close it.

    Attributes:
        timeline: The intervals in which the input was planned, read, and transcribed.
        frames: Changes or replaces the frames, or None. If it is not None, later runs on the same files can't reuse the patches.
        tower: Runs the vision tower on the patches. Defaults to `encode_rows`.
        threaded: Whether a background thread prepares the next chunks while the encoder processes the current one.
        ahead: A prefetch that may have already read the frames, or None.
        cache: The disk cache, or None. On a cache hit, reading and encoding are skipped. On a miss, the encoded input is stored.
        temporary: Whether the files will be deleted when the input is closed, so they cannot be shared with later inputs.
        cores: Maximum number of cores for reading, or None for all cores available to this process.
        waited_s: Time the encoding thread spent waiting for patches and transcripts, in seconds.
    """

    session: Session
    plan: Plan
    timeline: Timeline = field(default_factory=Timeline)
    _: KW_ONLY
    frames: FrameFilter | None = None
    tower: Tower | None = None
    threaded: bool = True
    ahead: ReadAhead | None = None
    cache: Cache | None = None
    temporary: bool = False

    def __post_init__(self):
        self.cores = self.session.loaded.cores
        self.waited_s = 0.0
        # This input's patches in the patch store, or None if they aren't stored.
        self._stored_patches: SharedChunks[FrameChunk] | None = None
        self._reading: Reading[FrameChunk] | None = None
        self._closed = False
        self._lock = threading.Lock()

    @cached_property
    def key(self) -> str | None:
        """This input's key in the disk cache, or None if the input cannot be cached."""
        with self.timeline.stage("read"):
            return self._current_key()

    @cached_property
    def stored(self) -> Entry | None:
        """This input's entry in the disk cache, or None on a cache miss."""
        if self.key is None:
            return None
        with self.timeline.stage("read"):
            return self.cache.load(self.key, self.session.device)

    def _current_key(self) -> str | None:
        return entry_key(self.session, self.plan, self.cache.content_hash) if self.cache else None

    def begin(self) -> None:
        """Start reading in a separate thread, unless the input is in the disk cache.

        If the patches can be kept in the patch store, the thread reads the entire input. Otherwise, it stays only a few chunks
        ahead of the encoder.
        """
        if self.stored is None:
            self._start_reading()

    def read(self) -> None:
        """Start reading ahead, and wait until the entire input has been read or the buffer is full.

        Don't call this from the thread that will encode the input.
        """
        self.begin()
        if reading := self._reading:
            reading.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._release_reading()

    def encode(self, progress: Progress | None = None, pieces: Sequence[int] | None = None) -> EncodedInput:
        """Read, preprocess, and encode the input.

        Args:
            progress: Called in the current thread with a stage, the amount done so far, and the total. The stage is "read"
                (counting frames read) while waiting for frames, "encode" (counting frames embedded) after each chunk, and "layers"
                (counting completed tower layers) at the end.
            pieces: Piece sizes to try, as the number of rows in a single matrix product. If memory runs out, the next size is
                tried. Defaults to the result of `Session.fitting_pieces`.

        Raises:
            VideoError: If the input is unreadable.
            OutOfMemory: If memory runs out even with the last piece size.
            ModelError: If the output contains NaN or infinity.
        """
        plan = self.plan
        device = Device(self.session.device)
        timeline = Timeline(device.now)
        pruning = self.session.pruning
        start = device.now()
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        warnings += plan.info.warnings
        with callback_errors() as passing:
            result, seen, cache = self._result(timeline, passing(progress), pieces, warnings)
        spent = account([*self.timeline.take(), *timeline.take()], this_thread(), start, device.now())
        self.waited_s = spent.waited
        rows = None
        tokens = result
        if isinstance(result, EncodedRows):
            rows = result
            tokens = rows.nothing_selected()
        wanted = pruning.prunes and pruning.budget.keep(plan.full.grid) < plan.units
        if plan.is_picture and rows is None and wanted and len(tokens.kept) == plan.units:
            warnings.append("whole_picture")  # the method keeps at least one whole frame pair
        plan = replace(plan, read_s=seen.read_s, moved=seen.moved)
        seconds = dict.fromkeys(INPUT_STAGES, 0.0) | spent.stages | {OVERLAP: spent.overlap}
        return EncodedInput(plan, tokens, rows, seconds, spent.wall, cache, tuple(warnings), seen.damaged)

    def _result(
        self, timeline: Timeline, progress: Progress | None, pieces: Sequence[int] | None, warnings: list[str]
    ) -> tuple[Encoded | EncodedRows, "_Seen", str]:
        """Load the encoded input from the disk cache, or encode it and store the result there.

        The result is stored in the "store" stage of `timeline`, and any warning names are added to `warnings`.

        Returns:
            A tuple of the tokens (or the rows, if the pruning method reads the question), facts about the frames, and the cache
            state (see `EncodedInput.cache`).
        """
        if self.stored:
            return self.stored.encoded, _Seen(read_s=self.stored.read_s, moved=self.stored.moved), "hit"
        result, seen = self._compute(timeline, progress, pieces)
        if seen.damaged:
            warnings.append("damaged_video")
        if seen.other_size:
            warnings.append("changing_size")
        if self.key is None:
            return result, seen, "off"
        # Don't store a video that is damaged or has a changing frame size, because a cache hit wouldn't repeat the warning.
        # Recompute the key before storing, because the file may have been replaced in the meantime.
        whole = not seen.damaged and not seen.other_size
        with timeline.stage("store"):
            storable = whole and self._current_key() == self.key
            if storable and not self.cache.store(self.key, Entry(result, seen.read_s, seen.moved)):
                warnings.append("cache_not_written")
        return result, seen, "miss"

    def _compute(
        self, timeline: Timeline, progress: Progress | None, pieces: Sequence[int] | None
    ) -> tuple[Encoded | EncodedRows, "_Seen"]:
        """Encode the input, in the "compile" and "encode" stages of `timeline`.

        Returns:
            A tuple of the tokens, or the rows to select tokens from if the pruning method reads the question, and facts about the
            frames.
        """
        plan = self.plan
        loaded = self.session.loaded
        pruning = self.session.pruning
        if pieces is None:
            with self.timeline.stage("plan"):
                pieces = self.session.fitting_pieces(plan)
        with timeline.stage("compile"):
            loaded.ready()
        options = {"seed": pruning.seed, "normal": loaded.limits[plan.kind].normal}
        if progress:
            options["on_layer"] = partial(progress, "layers")
        late = pruning.method.reads_question and plan.encoder.prunes
        visual = loaded.model.model.visual
        tower = self.tower or encode_rows
        with timeline.stage("encode"), closing(self):
            for piece_units in pieces:
                seen = _Seen()
                patches = self._patches(seen, timeline, progress)
                try:
                    with memory_guard("encode"):
                        rows = tower(visual, patches, plan.encoder, piece_units=piece_units, **options)
                        result = rows if late else rows.select_tokens()
                    break
                except OutOfMemory as problem:
                    if problem.stage != "encode" or piece_units == pieces[-1]:
                        raise
                if self._stored_patches is None:
                    self._release_reading()
                loaded.patches.clear()
                empty_cache()
        return result, seen

    def _patches(self, seen: "_Seen", timeline: Timeline, progress: Progress | None) -> Iterator[torch.Tensor]:
        """Yield the patches, one chunk of frames at a time, and collect facts about the frames in `seen`.

        Each call starts again from the first frame.
        """
        total = self.plan.sampling.frames
        for chunk in self._chunks(timeline, progress):
            seen.add(chunk)
            yield chunk.pixels
            if progress:
                progress("encode", chunk.end, total)

    def _chunks(self, timeline: Timeline, progress: Progress | None) -> Iterator[FrameChunk]:
        """Yield the patches in chunks, reporting the number of frames read so far in the meantime."""
        if not self.threaded:
            yield from self._source.patches(timeline, lambda frames: None)
            return
        reading = self._start_reading()
        reported = -1

        def report() -> None:
            nonlocal reported
            if progress and reading.frames > reported:
                reported = reading.frames
                progress("read", reported, self.plan.sampling.frames)

        for chunk in timeline.each("read", reading.chunks(report), waiting=True):
            report()
            yield chunk

    def _start_reading(self) -> Reading[FrameChunk]:
        """Return the `Reading` that produces this input's patches, starting it if necessary.

        Raises:
            Stopped: If the input has been closed.
        """
        with self._lock:
            if self._closed:
                raise Stopped
            if self._reading is None:
                self._reading = self._shared_reading() or Reading(self._source, Readings(AHEAD_BYTES))
            return self._reading

    @property
    def _shares(self) -> bool:
        """Whether later runs on the same files may reuse this input's patches."""
        return self.frames is None and not self.temporary

    def _shared_reading(self) -> Reading[FrameChunk] | None:
        """Return a `Reading` whose patches are kept in the model's patch store, or None if they cannot be stored."""
        if not self._shares:
            return None
        device = self.session.device
        limits = self.session.loaded.limits[self.plan.kind]
        key = content_key(self.plan, limits, device)
        if key is None:
            return None
        size = patch_bytes(self.plan, limits)
        self._stored_patches = self.session.loaded.patches.open(key, size, device, self._source)
        return self._stored_patches and self._stored_patches.read()

    def _release_reading(self) -> None:
        """Release this input's `Reading`. If the patches are needed again, a new `Reading` is started."""
        with self._lock:
            reading = self._reading
            stored = self._stored_patches
            self._reading = self._stored_patches = None
        if reading is None:
            return
        if stored is None:
            reading.close()
        else:
            keep = True
            if self.plan.info.is_folder and reading.is_complete:
                # A damaged image is replaced with a neighbor that may not be part of the key.
                keep = not any(chunk.damaged for chunk in reading.chunks())
            self.session.loaded.patches.close(stored, keep)
        self.timeline.add(reading.timeline.take())

    @property
    def _source(self) -> "_PatchSource":
        limits = self.session.loaded.limits[self.plan.kind]
        return _PatchSource(self.plan, limits, self.session.device, self.cores, self.ahead, self.frames)


def entry_key(session: Session, plan: Plan, hashed: Callable[[Path], str]) -> str | None:
    """Return the cache key for an encoded input. Inputs with equal keys have identical encodings.

    Args:
        hashed: A function that hashes a file, such as `Cache.content_hash`.

    Returns:
        The key, or None if the model has no fingerprint, the input is an array, or the file cannot be read.
    """
    loaded = session.loaded
    pruning = session.pruning
    limits = loaded.limits[plan.kind]
    if loaded.fingerprint is None or not plan.info.is_file:
        return None
    try:
        # A damaged image may be replaced with an image that is not hashed here, but then nothing is stored.
        content = [hashed(path) for path in Folder.files_read(plan.info, plan.sampling.times_s)]
    except (OSError, ValueError):
        return None
    facts = {
        "files": content,
        "decoder": plan.decoder,
        "seek": plan.seek,
        "times": plan.sampling.times_s,
        "rate": plan.info.fps,  # which images of a folder are shown at these times depends on it
        "size": [plan.height, plan.width],
        "encoder": asdict(plan.encoder),
        "pixels": [*limits.normal, limits.patch_size, limits.temporal_patch_size, limits.merge_size],
        "model": [loaded.fingerprint, loaded.dtype, loaded.quantize, Device(loaded.device).kind],
        "method": [repr(pruning.method.before), pruning.seed],  # the repr includes the classes and all settings
        "code": [evoprune.__version__, torch.__version__, own_code(), MethodText(pruning.name).plugin_code()],
        "reader": version(READERS[plan.decoder]),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class OpenInputs:
    """A group of opened videos and images that questions can refer to together. Encode them once, and close them after use.

    Attributes:
        plans: One plan per input.

    Args:
        files: Temporary input files, which are deleted when the inputs are closed.
    """

    def __init__(self, session: Session, inputs: Sequence[OpenInput], files: ExitStack | None = None):
        self.session = session
        self.inputs = inputs
        self.plans = [opened.plan for opened in inputs]
        self._files = files or ExitStack()
        self._names = {opened.plan.info.path: opened.plan.name for opened in inputs if opened.temporary}

    def begin(self) -> None:
        """Start reading the first input in the background."""
        self.inputs[0].begin()

    def read(self) -> None:
        """Read ahead, one input after another (see `OpenInput.read`). Another thread may encode the inputs in parallel."""
        for opened in self.inputs:
            opened.read()

    def hear(self, sampling: SamplingOptions, cache: Cache | None = None, progress: Progress | None = None) -> None:
        """Transcribe the inputs' speech while their frames are being read. Does nothing if `speech` is "none".

        Raises the same errors as `speech.with_speech`.
        """
        if sampling.speech == "none":
            return
        loaded = self.session.loaded
        if self.inputs[0].threaded and self.inputs[0].frames is None:
            self.inputs[0].begin()
        for opened in self.inputs:
            given = {"timeline": opened.timeline, "cache": cache, "progress": progress}
            opened.plan = with_speech(loaded.tokenizer, opened.plan, sampling, loaded.description.options, **given)
        self.plans = [opened.plan for opened in self.inputs]

    def use_cores(self, cores: int | None) -> None:
        """Limit the number of cores used for reading. This has no effect on inputs already being read.

        Args:
            cores: The number of cores, or None for all cores available to this process.
        """
        for opened in self.inputs:
            opened.cores = cores

    @property
    def waited_s(self) -> float:
        """Time spent waiting for reading and preprocessing during encoding, in seconds."""
        return sum(opened.waited_s for opened in self.inputs)

    def planning(self) -> AbstractContextManager[None]:
        """Return a context manager that adds its duration to the "plan" stage, for checks before any frames are read."""
        return self.inputs[0].timeline.stage("plan")

    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Read, preprocess, and encode the inputs one after another.

        Args:
            progress: See `OpenInput.encode`. If there are multiple inputs, this is also called with "input", the number of the next
                input, and the total number of inputs.

        Raises:
            OutOfMemory: If all inputs together need too much memory. This is checked before any frames are read.
            EvopruneError: See `OpenInput.encode` for other errors.
        """
        count = len(self.plans)
        kept = sum(plan.encoder.keep for plan in self.plans)
        pieces = []
        encodings = []
        for opened in self.inputs:
            others = TEXT + kept - opened.plan.encoder.keep
            fitting = []
            if not opened.stored:
                with opened.timeline.stage("plan"):
                    fitting = self.session.fitting_pieces(opened.plan, others)
            pieces.append(fitting)
        for number, opened in enumerate(self.inputs):
            if progress and count > 1:
                progress("input", number + 1, count)
            with named(self._names):
                encodings.append(opened.encode(progress, pieces[number]))
        return EncodedInputs(self.session, encodings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, free the frames, and delete temporary files. Closing the inputs twice is a no-op.

        The `EncodedInputs` returned by `encode` stay valid, so questions can still be asked after the inputs are closed.
        """
        for opened in self.inputs:
            opened.close()
        self._files.close()


def open_inputs(
    session: Session,
    paths: Sequence[Input],
    sampling: SamplingOptions | None = None,
    *,
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
    cache: Cache | None = None,
    frames: FrameFilter | None = None,
    tower: Tower | None = None,
    ahead: ReadAhead | None = None,
) -> OpenInputs:
    """Probe videos and images, and plan how to read them, without reading any frames yet.

    URLs, bytes, open files, and Pillow images are first written to temporary files, which are deleted when the inputs are closed
    (video/given.py).

    Args:
        paths: The inputs, in the order in which the model should read them. There must be at least one.
        sampling: Sampling options for all inputs. Time-related options apply only to videos.
        progress: Called with "download", the number of bytes received so far, and the total.
        names: The input names in reports, which default to the paths.
        cache: The disk cache. It is ignored if the pruning method reads the question.
        frames: See `OpenInput`.
        tower: See `OpenInput`.
        ahead: A prefetch that may already have read the inputs.

    Raises:
        VideoError: If an input is missing, unreadable, or empty.
        UsageError: If an option is invalid, a time span is specified but all inputs are images, a single subtitle file is specified
            for multiple inputs, or an input is a URL in offline mode.
    """
    session.check_process()
    sampling = sampling or SamplingOptions()
    sampling.check_one_file(len(paths))
    timelines = [Timeline() for _ in paths]
    given = [GivenInput(path) for path in paths]
    infos = []
    inputs = []
    if session.pruning.method.reads_question:
        cache = None
    if names is None:
        names = [each.name for each in given]
    loaded = session.loaded
    how = {"offline": loaded.description.options.offline}
    if progress:
        how["progress"] = partial(progress, "download")
    with ExitStack() as stack:
        for each, timeline in zip(given, timelines, strict=True):
            file = stack.enter_context(each.local(**how))
            with timeline.stage("read"):
                infos.append(probed(file, folder_fps=sampling.frame_rate))
        wanted_of_each = sampling.of_each(infos)
        for each, timeline, info, wanted, name in zip(given, timelines, infos, wanted_of_each, names, strict=True):
            with timeline.stage("read"):
                plan = loaded.description.plan(info, wanted, session.pruning, name)
                plan = with_subtitles(loaded.tokenizer, plan, wanted)
            inputs.append(
                OpenInput(
                    session,
                    plan,
                    timeline,
                    frames=frames,
                    tower=tower,
                    ahead=ahead,
                    cache=cache,
                    temporary=each.is_temporary,
                )
            )
        opened = OpenInputs(session, inputs, stack.pop_all())
    try:
        opened.hear(sampling, cache, progress)
    except BaseException:
        opened.close()
        raise
    return opened


def inputs_of(given: Any, frame_rate: float | None = None, times_s: Sequence[float] | None = None) -> list[Input]:
    """Convert one or more inputs to a list. Paths are converted to strings, and frame arrays to `HeldVideo` objects.

    Args:
        frame_rate: Frame rate of the frame arrays, in frames per second.
        times_s: Frame timestamps of a frame array, in seconds, as an alternative to the frame rate.

    Raises:
        UsageError: If there are no inputs, or an input has an unsupported type. See also `HeldVideo.of`.
    """
    inputs = list(given) if isinstance(given, list | tuple) else [given]
    if not inputs:
        raise UsageError("no input given", KINDS_HINT)
    if times_s is not None and not any(GivenInput(value).is_frames for value in inputs):
        raise UsageError("times_s needs an array of frames", "files contain their own times")
    made: list[Input] = []
    for value in inputs:
        if GivenInput(value).is_frames:
            made.append(HeldVideo.of(value, frame_rate, times_s, several=len(inputs) > 1))
        elif GivenInput(value).has_content:
            made.append(value)
        elif isinstance(value, str | os.PathLike) and not isinstance(os.fspath(value), bytes):
            made.append(os.fspath(value))
        else:
            subject = "the input" if value is given else "an input"
            hint = EncodedInputs.AS_INPUT if isinstance(value, EncodedInputs) else KINDS_HINT
            raise UsageError(f"{subject} is {brief(value)}, which is not supported", hint)
    return made
