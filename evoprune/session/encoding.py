"""Turn video and image files into visual tokens: probe the inputs, plan how to read them, then read, patchify, and encode them.

If an encoded input is already in the disk cache, its tokens are loaded from the cache instead.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, Self

import torch

import evoprune
from evoprune.backend import Device, empty_cache
from evoprune.errors import OutOfMemory, UsageError, callback_errors, memory_guard, named
from evoprune.methods import MethodText
from evoprune.model import Clock
from evoprune.report import INPUT_STAGES, OVERLAP
from evoprune.session.ahead import ReadAhead
from evoprune.session.asking import EncodedInputs
from evoprune.session.cache import Cache, Entry, own_code
from evoprune.session.encoded import EncodedInput
from evoprune.session.memory import TEXT
from evoprune.session.patches import PatchChunk, content_key, patch_bytes
from evoprune.session.prompting import with_subtitles
from evoprune.session.reading import Reading, Readings, probed
from evoprune.session.session import Session
from evoprune.session.speech import STAGE, with_speech
from evoprune.util import brief
from evoprune.video import Folder, FrameChunk, GivenInput, HeldVideo, Input, Plan, SamplingOptions, Stopped, read_chunks
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


@dataclass(eq=False)
class OpenInput:
    """A video or image opened for encoding. Encode it once, and then close it.

    Attributes:
        frames: Changes or replaces the frames, or None. If it is not None, later runs on the same files can't reuse the patches.
        tower: Runs the vision tower on the patches. Defaults to `encode_rows`.
        threaded: Whether a background thread prepares the next chunks while the encoder processes the current one.
        ahead: A prefetch that may have already read the frames, or None.
        cache: The disk cache, or None. On a cache hit, reading and encoding are skipped. On a miss, the encoded input is stored.
        temporary: Whether the files will be deleted when the input is closed, so they cannot be shared with later inputs.
        cores: Maximum number of cores for reading, or None for all cores available to this process.
    """

    session: Session
    plan: Plan
    clock: Clock  # measures the "plan", "read", and "preprocess" stages
    _: KW_ONLY
    frames: FrameFilter | None = None
    tower: Tower | None = None
    threaded: bool = True
    ahead: ReadAhead | None = None
    cache: Cache | None = None
    temporary: bool = False

    def __post_init__(self):
        self.cores = self.session.loaded.cores
        self.damaged = 0
        self.read_early = False  # whether reading started in the background before encoding
        self.waited_s = 0.0  # time spent waiting for patches during encoding, in seconds
        self.other_size = self.moved = False
        self.read_s: tuple[float, ...] = ()  # timestamps of the decoded frames, in seconds
        self._reported_frames = -1  # frame count most recently passed to `progress`
        self._progress: Progress | None = None
        # The key of this input's patches in the patch store, or None if they aren't stored.
        self._patch_key: Hashable | None = None
        self._reading: Reading[PatchChunk] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def _frames(self, on_frames: Callable[[int], None]) -> Iterator[FrameChunk]:
        """Yield the sampled frames in chunks, calling `on_frames` with the number of frames read so far."""
        plan = self.plan
        if self.ahead and (early := self.ahead.take(plan)):
            yield from self._prefetched_frames(early)
            return
        given = {"chunk_bytes": plan.chunk_bytes, "cores": self.cores, "on_frames": on_frames}
        with closing(read_chunks(plan.source, plan.sampling.times_s, **given, **plan.read_arguments)) as frames:
            yield from frames

    def _prefetched_frames(self, early: Reading[FrameChunk]) -> Iterator[FrameChunk]:
        """Yield prefetched frames, and add any read time hidden behind other work to the clock's "read" stage."""
        with closing(early):
            hidden_s = 0.0
            for chunk in early.chunks():
                self.clock.seconds["read"] += early.hidden_s - hidden_s
                hidden_s = early.hidden_s
                yield chunk
                del chunk  # drop this reference, so that the caller can free the frames

    @cached_property
    def key(self) -> str | None:
        """This input's key in the disk cache, or None if the input cannot be cached."""
        with self.clock.stage("read"):
            return self._current_key()

    @cached_property
    def stored(self) -> Entry | None:
        """This input's entry in the disk cache, or None on a cache miss."""
        if self.key is None:
            return None
        with self.clock.stage("read"):
            return self.cache.load(self.key, self.session.device)

    def _current_key(self) -> str | None:
        return entry_key(self.session, self.plan, self.cache.content_hash) if self.cache else None

    def begin(self) -> None:
        """Start reading in a separate thread, unless the input is in the disk cache.

        If the patches can be kept in the patch store, the thread reads the entire input. Otherwise, it stays only a few chunks
        ahead of the encoder.
        """
        self.read_early = True
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
        clock = Clock(self.session.device)
        pruning = self.session.pruning
        start = clock.now()
        before = dict.fromkeys(INPUT_STAGES, 0.0) | self.clock.seconds
        heard_before = before[STAGE] - before[OVERLAP]  # time the caller waited for transcription, in seconds
        read_before = 0.0 if self.read_early else before["read"]  # time the caller waited for reading, in seconds
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        warnings += plan.info.warnings
        with callback_errors() as passing:
            self._progress = passing(progress)
            result, cache = self._result(clock, self._progress, pieces, warnings)
        wall = before["plan"] + heard_before + read_before + clock.now() - start
        rows = None
        tokens = result
        if isinstance(result, EncodedRows):
            rows = result
            tokens = rows.nothing_selected()
        wanted = pruning.prunes and pruning.budget.keep(plan.full.grid) < plan.units
        if plan.is_picture and rows is None and wanted and len(tokens.kept) == plan.units:
            warnings.append("whole_picture")  # the method keeps at least one whole frame pair
        plan = replace(plan, read_s=self.read_s, moved=self.moved)
        waited = read_before + self.waited_s
        seconds = dict.fromkeys(INPUT_STAGES, 0.0) | clock.seconds | self.clock.seconds
        ahead = seconds["read"] + seconds["preprocess"] - waited
        seconds[OVERLAP] += max(0.0, ahead)
        # If waiting took longer than reading, the machine was busy or the reader thread was still working on another input.
        seconds["read"] += max(0.0, -ahead)
        return EncodedInput(plan, tokens, rows, seconds, wall, cache, tuple(warnings), self.damaged)

    def _result(
        self, clock: Clock, progress: Progress | None, pieces: Sequence[int] | None, warnings: list[str]
    ) -> tuple[Encoded | EncodedRows, str]:
        """Load the encoded input from the disk cache, or encode it and store the result there.

        The time spent storing the result is added to the "store" stage of `clock`, and any warning names are added to `warnings`.

        Returns:
            A tuple of the tokens (or the rows, if the pruning method reads the question) and the cache state (see
            `EncodedInput.cache`).
        """
        if self.stored:
            self.read_s = self.stored.read_s
            self.moved = self.stored.moved
            return self.stored.encoded, "hit"
        result = self._compute(clock, progress, pieces, warnings)
        if self.key is None:
            return result, "off"
        # Don't store a video that is damaged or has a changing frame size, because a cache hit wouldn't repeat the warning.
        # Recompute the key before storing, because the file may have been replaced in the meantime.
        whole = not self.damaged and not self.other_size
        with clock.stage("store"):
            storable = whole and self._current_key() == self.key
            if storable and not self.cache.store(self.key, Entry(result, self.read_s, self.moved)):
                warnings.append("cache_not_written")
        return result, "miss"

    def _compute(
        self, clock: Clock, progress: Progress | None, pieces: Sequence[int] | None, warnings: list[str]
    ) -> Encoded | EncodedRows:
        """Encode the input, adding its "compile" and "encode" times to `clock` and its warnings to `warnings`.

        Returns:
            The tokens or, if the pruning method reads the question, the rows to select tokens from.
        """
        plan = self.plan
        loaded = self.session.loaded
        pruning = self.session.pruning
        if pieces is None:
            with self.clock.stage("plan"):
                pieces = self.session.fitting_pieces(plan)
        with clock.stage("compile"):
            loaded.ready()
        start = clock.now()
        options = {"seed": pruning.seed, "normal": loaded.limits[plan.kind].normal}
        if progress:
            options["on_layer"] = partial(progress, "layers")
        late = pruning.method.reads_question and plan.encoder.prunes
        visual = loaded.model.model.visual
        tower = self.tower or encode_rows
        try:
            with closing(self):
                for piece_units in pieces:
                    try:
                        with memory_guard("encode"):
                            patches = self._patches(clock, progress)
                            rows = tower(visual, patches, plan.encoder, piece_units=piece_units, **options)
                            result = rows if late else rows.select_tokens()
                        break
                    except OutOfMemory as problem:
                        if problem.stage != "encode" or piece_units == pieces[-1]:
                            raise
                    if self._patch_key is None:
                        self._release_reading()
                    loaded.patches.clear()
                    empty_cache()
        finally:
            self.waited_s = clock.seconds.pop("wait", 0.0)
        clock.seconds["encode"] = clock.now() - start - self.waited_s
        if self.damaged:
            warnings.append("damaged_video")
        if self.other_size:
            warnings.append("changing_size")
        return result

    def _patches(self, clock: Clock, progress: Progress | None) -> Iterator[torch.Tensor]:
        """Yield the patches, one chunk of frames at a time. Each call starts again from the first frame."""
        self.damaged = 0
        self.other_size = self.moved = False
        self.read_s = ()
        chunks = self._start_reading().chunks(self._report_frames) if self.threaded else self._patch_chunks()
        for chunk in clock.each("wait", chunks):
            self._report_frames()
            self.damaged += chunk.damaged
            self.other_size = self.other_size or chunk.other_size
            self.moved = self.moved or chunk.moved
            self.read_s += chunk.times_s
            yield chunk.patches
            if progress:
                progress("encode", chunk.end, self.plan.sampling.frames)

    def _start_reading(self) -> Reading[PatchChunk]:
        """Return the `Reading` that produces this input's patches, starting it if necessary.

        Raises:
            Stopped: If the input has been closed.
        """
        with self._lock:
            if self._closed:
                raise Stopped
            if self._reading is None:
                self._reading = self._shared_reading() or Reading(self._patch_chunks, Readings(AHEAD_BYTES))
            return self._reading

    @property
    def _shares(self) -> bool:
        """Whether later runs on the same files may reuse this input's patches."""
        return self.frames is None and not self.temporary

    def _shared_reading(self) -> Reading[PatchChunk] | None:
        """Return a `Reading` whose patches are kept in the model's patch store, or None if they cannot be stored."""
        if not self._shares:
            return None
        device = self.session.device
        limits = self.session.loaded.limits[self.plan.kind]
        key = content_key(self.plan, limits, device)
        if key is None:
            return None
        size = patch_bytes(self.plan, limits)
        reading = self.session.loaded.patches.open(key, size, device, self._patch_chunks)
        if reading:
            self._patch_key = key
        return reading

    def _release_reading(self) -> None:
        """Release this input's `Reading`. If the patches are needed again, a new `Reading` is started."""
        with self._lock:
            reading = self._reading
            key = self._patch_key
            self._reading = self._patch_key = None
        if key is not None:
            keep = True
            if self.plan.info.is_folder and reading.complete:
                # A damaged image is replaced with a neighbor that may not be part of the key.
                keep = not any(chunk.damaged for chunk in reading.chunks())
            self.session.loaded.patches.close(key, reading, keep)
        elif reading:
            reading.close()

    def _report_frames(self) -> None:
        if self._progress and self._reading and self._reading.frames > self._reported_frames:
            self._reported_frames = self._reading.frames
            self._progress("read", self._reported_frames, self.plan.sampling.frames)

    def _patch_chunks(self, reading: Reading[PatchChunk] | None = None) -> Iterator[PatchChunk]:
        """Convert the frames to patches, one chunk at a time, and record the "read" and "preprocess" times.

        Args:
            reading: The `Reading` whose thread runs this method, or None. This method updates its frame count.
        """
        on_frames = reading.at_least if reading else lambda frames: None
        limits = self.session.loaded.limits[self.plan.kind]
        frames = self._frames(on_frames)
        if self.frames is not None:
            frames = self.frames(self.plan, frames)
        with closing(frames):
            for chunk in self.clock.each("read", frames):
                on_frames(chunk.end)
                with self.clock.stage("preprocess"):
                    patches = patches_of(chunk.pixels, self.plan, limits, self.session.device)
                yield PatchChunk(patches, chunk.end, chunk.times_s, chunk.damaged, chunk.other_size, chunk.moved)


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
        """Start reading the first input in the background.

        All inputs are marked as read early, so that their read time before encoding isn't reported as waiting time.
        """
        for opened in self.inputs:
            opened.read_early = True
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
            given = {"clock": opened.clock, "cache": cache, "progress": progress}
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
        return self.inputs[0].clock.stage("plan")

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
                with opened.clock.stage("plan"):
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
    # Use CPU clocks here, because a GPU clock would synchronize with the GPU.
    clocks = [Clock(torch.device("cpu")) for _ in paths]
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
        for each, clock in zip(given, clocks, strict=True):
            file = stack.enter_context(each.local(**how))
            with clock.stage("read"):
                infos.append(probed(file, folder_fps=sampling.frame_rate))
        for each, clock, info, wanted, name in zip(given, clocks, infos, sampling.of_each(infos), names, strict=True):
            with clock.stage("read"):
                plan = loaded.description.plan(info, wanted, session.pruning, name)
                plan = with_subtitles(loaded.tokenizer, plan, wanted)
            inputs.append(
                OpenInput(
                    session,
                    plan,
                    clock,
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
