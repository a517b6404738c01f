"""Turn video and image files into visual tokens: probe the inputs, plan how to read them, then read, patchify, and encode them.

If an encoded input is already in the disk cache, its tokens are loaded from the cache instead.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import torch

import evoprune
from evoprune.backend import Device, empty_cache
from evoprune.errors import OutOfMemory, UsageError, callback_errors, memory_guard, named
from evoprune.methods import MethodText
from evoprune.report import INPUT_STAGES, OVERLAP
from evoprune.session.ahead import ReadAhead
from evoprune.session.asking import EncodedInputs
from evoprune.session.memory import TEXT
from evoprune.session.patches import content_key, patch_bytes
from evoprune.session.prompting import with_subtitles
from evoprune.session.reading import Reading, ReadingGroup, SharedChunks, probed
from evoprune.session.result import Entry, InputResult
from evoprune.session.session import Session
from evoprune.timeline import Timeline, account, this_thread
from evoprune.util import brief
from evoprune.video import (
    Folder,
    FrameChunk,
    GivenInput,
    Input,
    InputLimits,
    Plan,
    SamplingOptions,
    Stopped,
    read_chunks,
)
from evoprune.vision import TowerOutput, encode_rows, patches_of

if TYPE_CHECKING:
    from evoprune.session.cache import Cache

Path = str | os.PathLike[str]
# A progress callback. Its arguments are a stage ("read", "encode", or "layers"), the amount done so far, and the total.
Progress = Callable[[str, int, int], None]
# Changes or replaces a plan's frames. Its arguments are the plan, and the frames that will be read from the files if they are used.
FrameFilter = Callable[[Plan, Iterator[FrameChunk]], Iterator[FrameChunk]]
# Runs the vision tower. Its arguments are those of `vision.encoder.encode_rows`.
Tower = Callable[..., TowerOutput]

KINDS_HINT = "give a path or a URL, an array of frames, a Pillow image, the bytes of a file, or an open file"
AHEAD_BYTES = 2**26  # maximum size in bytes of prefetched patches outside the patch store


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def read_patches(
    timeline: Timeline,
    on_frames: Callable[[int], None],
    *,
    plan: Plan,
    limits: InputLimits,
    device: torch.device,
    cores: int | None = None,
    ahead: ReadAhead | None = None,
    frames: FrameFilter | None = None,
) -> Iterator[FrameChunk]:
    """Read an input's frames, and yield them as chunks of patches.

    Args:
        timeline: Records the "read" and "preprocess" stages.
        on_frames: Called with the number of frames read so far.
        cores, ahead, frames: See `open_inputs`.
    """

    def read() -> Iterator[FrameChunk]:
        if ahead and (early := ahead.take(plan)):
            try:
                with closing(early):
                    yield from timeline.each("read", early.chunks(), waiting=True)
            finally:
                timeline.add(early.timeline.take())
            return
        with closing(
            read_chunks(
                plan.source,
                plan.sampling.times_s,
                chunk_bytes=plan.chunk_bytes,
                cores=cores,
                on_frames=on_frames,
                **plan.read_arguments,
            )
        ) as chunks:
            yield from chunks

    chunks = read()
    if frames is not None:
        chunks = frames(plan, chunks)
    with closing(chunks):
        for chunk in timeline.each("read", chunks):
            on_frames(chunk.end)
            with timeline.stage("preprocess"):
                patches = patches_of(chunk.pixels, plan, limits, device)
            yield replace(chunk, pixels=patches)


@dataclass(eq=False)
class _Input:
    """A video or image opened for encoding. Encode it once, and then close it.

    Attributes:
        timeline: The intervals in which the input was planned, read, and transcribed.
        temporary: Whether the files will be deleted when the input is closed, so they cannot be shared with later inputs.
        cores: Maximum number of cores for reading, or None for all cores available to this process.

    The other fields are arguments of `OpenInputs`.
    """

    session: Session
    plan: Plan
    timeline: Timeline
    _: KW_ONLY
    frames: FrameFilter | None
    tower: Tower | None
    threaded: bool
    ahead: ReadAhead | None
    cache: "Cache | None"
    temporary: bool

    def __post_init__(self):
        self.cores = self.session.loaded.cores
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

    def wait(self) -> None:
        """Wait until the entire input has been read, or the buffer is full. Don't call this from the thread that will encode."""
        if reading := self._reading:
            reading.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._release_reading()

    def encode(self, progress: Progress | None, pieces: Sequence[int]) -> InputResult:
        """Read, preprocess, and encode the input. For the other arguments and the exceptions, see `OpenInputs.encode`.

        Args:
            pieces: Piece sizes to try, as the number of rows in a single matrix product. If memory runs out, the next size is
                tried.
        """
        plan = self.plan
        device = Device(self.session.device)
        timeline = Timeline(device.now)
        pruning = self.session.pruning
        start = device.now()
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        warnings += plan.info.warnings
        damaged = 0
        cache = "hit"
        with callback_errors() as passing:
            if not (entry := self.stored):
                entry, seen = self._compute(timeline, passing(progress) or _no_progress, pieces)
                damaged = sum(chunk.damaged for chunk in seen)
                if damaged:
                    warnings.append("damaged_video")
                if resized := any(chunk.other_size for chunk in seen):
                    warnings.append("changing_size")
                cache = "off" if self.key is None else "miss"
                # Don't store a video that is damaged or has a changing frame size, because a cache hit wouldn't repeat the warning.
                if cache == "miss" and not (damaged or resized) and not self._store(entry, timeline):
                    warnings.append("cache_not_written")
        spent = account([*self.timeline.take(), *timeline.take()], this_thread(), start, device.now())
        encoded = entry.encoded
        wanted = pruning.prunes and pruning.budget.keep(plan.full.grid) < plan.units
        if plan.is_picture and wanted and encoded.keep == plan.units:
            warnings.append("whole_picture")  # the method keeps at least one whole frame pair
        return InputResult(
            plan=replace(plan, read_s=entry.read_s, moved=entry.moved),
            encoded=encoded,
            seconds=dict.fromkeys(INPUT_STAGES, 0.0) | spent.stages | {OVERLAP: spent.overlap},
            wall_seconds=spent.wall,
            waited_seconds=spent.waited,
            cache=cache,
            warnings=tuple(warnings),
            damaged=damaged,
        )

    def _store(self, entry: Entry, timeline: Timeline) -> bool:
        """Store an entry in the disk cache, in the "store" stage of `timeline`. Return False if it cannot be written.

        Nothing is stored if the file has been replaced since the key was computed.
        """
        with timeline.stage("store"):
            return self._current_key() != self.key or self.cache.store(self.key, entry)

    def _compute(self, timeline: Timeline, progress: Progress, pieces: Sequence[int]) -> tuple[Entry, list[FrameChunk]]:
        """Encode the input, in the "compile" and "encode" stages of `timeline`.

        Returns:
            A tuple of the encoded input, and its chunks without pixels.
        """
        plan = self.plan
        loaded = self.session.loaded
        with timeline.stage("compile"):
            loaded.ready()
        tower = self.tower or encode_rows
        with timeline.stage("encode"), closing(self):
            for piece_units in pieces:
                seen: list[FrameChunk] = []
                try:
                    with memory_guard("encode"):
                        rows = tower(
                            loaded.model.model.visual,
                            self._patches(seen, timeline, progress),
                            plan.encoder,
                            normal=loaded.limits[plan.kind].normal,
                            seed=self.session.pruning.seed,
                            piece_units=piece_units,
                            on_layer=partial(progress, "layers"),
                        )
                        encoded = rows.tokens()
                    break
                except OutOfMemory as problem:
                    if problem.stage != "encode" or piece_units == pieces[-1]:
                        raise
                if self._stored_patches is None:
                    self._release_reading()
                loaded.patches.clear()
                empty_cache()
        read_s = tuple(time_s for chunk in seen for time_s in chunk.times_s)
        return Entry(encoded, read_s, any(chunk.moved for chunk in seen)), seen

    def _patches(self, seen: list[FrameChunk], timeline: Timeline, progress: Progress) -> Iterator[torch.Tensor]:
        """Yield the patches, one chunk of frames at a time, and add each chunk to `seen`, without its pixels.

        Each call starts again from the first frame.
        """
        total = self.plan.sampling.frames
        for chunk in self._chunks(timeline, progress):
            seen.append(replace(chunk, pixels=None))
            yield chunk.pixels
            progress("encode", chunk.end, total)

    def _chunks(self, timeline: Timeline, progress: Progress) -> Iterator[FrameChunk]:
        """Yield the patches in chunks, reporting the number of frames read so far in the meantime."""
        if not self.threaded:
            yield from self._source()(timeline, lambda frames: None)
            return
        reading = self._start_reading()
        reported = -1

        def report() -> None:
            nonlocal reported
            if reading.frames > reported:
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
                source = self._source()

                def patches(reading: Reading[FrameChunk]) -> Iterator[FrameChunk]:  # must not refer to this input
                    return source(reading.timeline, reading.at_least)

                self._stored_patches = self._open_stored(patches)
                if self._stored_patches:
                    self._reading = self._stored_patches.read()
                else:
                    self._reading = Reading(patches, ReadingGroup(AHEAD_BYTES))
            return self._reading

    @property
    def _shares(self) -> bool:
        """Whether later runs on the same files may reuse this input's patches."""
        return self.frames is None and not self.temporary

    def _open_stored(
        self, patches: Callable[[Reading[FrameChunk]], Iterator[FrameChunk]]
    ) -> SharedChunks[FrameChunk] | None:
        """Open this input's patches in the model's patch store, or return None if they cannot be stored."""
        if not self._shares:
            return None
        device = self.session.device
        limits = self._limits
        key = content_key(self.plan, limits, device)
        if key is None:
            return None
        return self.session.loaded.patches.open(key, patch_bytes(self.plan, limits), device, patches)

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
    def _limits(self) -> InputLimits:
        return self.session.loaded.limits[self.plan.kind]

    def _source(self) -> Callable[[Timeline, Callable[[int], None]], Iterator[FrameChunk]]:
        """Return `read_patches` for this input. The function doesn't refer to the input or to the session."""
        return partial(
            read_patches,
            plan=self.plan,
            limits=self._limits,
            device=self.session.device,
            cores=self.cores,
            ahead=self.ahead,
            frames=self.frames,
        )


def entry_key(session: Session, plan: Plan, hashed: Callable[[Path], str]) -> str | None:
    """Return the cache key for an encoded input. Inputs with equal keys have identical encodings.

    Args:
        hashed: A function that hashes a file, such as `Cache.content_hash`.

    Returns:
        The key, or None if the model has no fingerprint, the input is an array, or the file cannot be read.
    """
    from evoprune.session.cache import own_code

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
        "reader": version(plan.decoder_package),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class OpenInputs:
    """Opened videos and images that questions can refer to together. Encode them once, and close them after use.

    Attributes:
        plans: One plan per input.

    Args:
        timelines: For each input, the intervals in which it was planned.
        threaded: Whether a background thread prepares the next chunks while the encoder processes the current one.
        cache: The disk cache, or None. On a cache hit, reading and encoding are skipped. On a miss, the encoded input is stored.
        temporary: The paths of the inputs whose files will be deleted when the inputs are closed.
        files: Closed together with the inputs, such as temporary files.
        frames, tower, ahead: See `open_inputs`.
    """

    def __init__(
        self,
        session: Session,
        plans: Sequence[Plan],
        timelines: Sequence[Timeline] | None = None,
        *,
        frames: FrameFilter | None = None,
        tower: Tower | None = None,
        threaded: bool = True,
        ahead: ReadAhead | None = None,
        cache: "Cache | None" = None,
        temporary: Collection[str] = (),
        files: ExitStack | None = None,
    ):
        self.session = session
        self._files = files or ExitStack()
        self._inputs = [
            _Input(
                session,
                plan,
                timeline,
                frames=frames,
                tower=tower,
                threaded=threaded,
                ahead=ahead,
                cache=cache,
                temporary=plan.info.path in temporary,
            )
            for plan, timeline in zip(plans, timelines or [Timeline() for _ in plans], strict=True)
        ]

    @classmethod
    def joined(cls, parts: "Sequence[OpenInputs]") -> "OpenInputs":
        """Combine the inputs of several objects of the same session. Closing the result closes all of them."""
        joined = cls(parts[0].session, [])
        joined._inputs = [each for part in parts for each in part._inputs]
        for part in parts:
            joined._files.callback(part.close)
        return joined

    @property
    def plans(self) -> list[Plan]:
        return [each.plan for each in self._inputs]

    def begin(self) -> None:
        """Start reading the first input in the background, unless it is in the disk cache."""
        self._inputs[0].begin()

    def read(self) -> None:
        """Read ahead, one input after another, until all have been read or the buffers are full.

        Another thread may encode the inputs in parallel, but don't call this from the thread that will encode them.
        """
        for each in self._inputs:
            each.begin()
            each.wait()

    def hear(self, sampling: SamplingOptions, cache: "Cache | None" = None, progress: Progress | None = None) -> None:
        """Transcribe the inputs' speech while their frames are being read. Does nothing if `speech` is "none".

        Raises the same errors as `speech.with_speech`.
        """
        if sampling.speech == "none":
            return
        from evoprune.session.speech import with_speech

        loaded = self.session.loaded
        if self._inputs[0].threaded and self._inputs[0].frames is None:
            self.begin()
        for each in self._inputs:
            each.plan = with_speech(
                loaded.tokenizer,
                each.plan,
                sampling,
                loaded.description.options,
                timeline=each.timeline,
                cache=cache,
                progress=progress,
            )

    def use_cores(self, cores: int | None) -> None:
        """Limit the number of cores used for reading. This has no effect on inputs already being read.

        Args:
            cores: The number of cores, or None for all cores available to this process.
        """
        for each in self._inputs:
            each.cores = cores

    def planning(self) -> AbstractContextManager[None]:
        """Return a context manager that adds its duration to the "plan" stage, for checks before any frames are read."""
        return self._inputs[0].timeline.stage("plan")

    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Read, preprocess, and encode the inputs one after another.

        Args:
            progress: Called in the current thread with a stage, the amount done so far, and the total. The stage is "read"
                (counting frames read) while waiting for frames, "encode" (counting frames embedded) after each chunk, and "layers"
                (counting completed tower layers) at the end. If there are multiple inputs, this is also called with "input", the
                number of the next input, and the total number of inputs.

        Raises:
            VideoError: If an input is unreadable.
            OutOfMemory: If all inputs together need too much memory, which is checked before any frames are read, or if memory runs
                out.
            ModelError: If the output contains NaN or infinity.
        """
        return EncodedInputs(self.session, self.encode_each(progress))

    def encode_each(self, progress: Progress | None = None) -> list[InputResult]:
        """Encode the inputs like `encode`, and return one result per input."""
        count = len(self._inputs)
        kept = sum(plan.encoder.keep for plan in self.plans)
        pieces = []
        results = []
        for each in self._inputs:
            others = TEXT + kept - each.plan.encoder.keep
            fitting = []
            if not each.stored:
                with each.timeline.stage("plan"):
                    fitting = self.session.fitting_pieces(each.plan, others)
            pieces.append(fitting)
        names = {each.plan.info.path: each.plan.name for each in self._inputs if each.temporary}
        for number, each in enumerate(self._inputs):
            if progress and count > 1:
                progress("input", number + 1, count)
            with named(names):
                results.append(each.encode(progress, pieces[number]))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, free the frames, and delete temporary files. Closing the inputs twice is a no-op.

        The `EncodedInputs` returned by `encode` stay valid, so questions can still be asked after the inputs are closed.
        """
        for each in self._inputs:
            each.close()
        self._files.close()


def open_inputs(
    session: Session,
    paths: Sequence[Input],
    sampling: SamplingOptions | None = None,
    *,
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
    cache: "Cache | None" = None,
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
        frames: Changes or replaces the frames, or None. If it is not None, later runs on the same files can't reuse the patches.
        tower: Runs the vision tower on the patches. Defaults to `encode_rows`.
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
    plans = []
    temporary = set()
    if session.pruning.method.reads_question:
        cache = None
    if names is None:
        names = [each.name for each in given]
    loaded = session.loaded
    downloading = partial(progress, "download") if progress else None
    with ExitStack() as stack:
        for each, timeline in zip(given, timelines, strict=True):
            file = stack.enter_context(each.local(offline=loaded.description.options.offline, progress=downloading))
            with timeline.stage("read"):
                infos.append(probed(file, folder_fps=sampling.frame_rate))
            if each.is_temporary:
                temporary.add(infos[-1].path)
        wanted_of_each = sampling.of_each(infos)
        for timeline, info, wanted, name in zip(timelines, infos, wanted_of_each, names, strict=True):
            with timeline.stage("read"):
                plan = loaded.description.plan(info, wanted, session.pruning, name)
                plans.append(with_subtitles(loaded.tokenizer, plan, wanted))
        opened = OpenInputs(
            session,
            plans,
            timelines,
            frames=frames,
            tower=tower,
            ahead=ahead,
            cache=cache,
            temporary=temporary,
            files=stack.pop_all(),
        )
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
            from evoprune.video import HeldVideo

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
