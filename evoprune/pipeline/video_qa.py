"""The whole pipeline in three calls: load, encode, ask.

    qa = VideoQA.load("demo", budget=0.25)
    video = qa.encode("clip.mp4", fps=2)
    answer = video.ask("What colour is the square?")
    for piece in answer:
        print(piece, end="")
    answer.report

Reading and preprocessing run beside encoding. Each stage is timed by its own work, so that together they can take longer than
the wall clock shows.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from evoprune.errors import UsageError, names_plugins
from evoprune.keywords import brief, check_type, names_options
from evoprune.model.cost import Clock
from evoprune.pipeline.answering import Answer, EncodedInputs, Uncopied, together
from evoprune.pipeline.encoding import EncodeRows, OpenInput, Progress, ReadFrames
from evoprune.pipeline.engine import Engine, make_engine, unpruned
from evoprune.pipeline.loading.found import FoundModel, find_model
from evoprune.pipeline.loading.model import LoadedModel, load_model, no_tokenizer
from evoprune.pipeline.options import (
    HELD,
    GenerationOptions,
    ModelOptions,
    PruneOptions,
    SamplingOptions,
    StreamOptions,
)
from evoprune.pipeline.planning import TEXT, fitting_chunk, plan_input
from evoprune.pipeline.prompting import longest_prompt
from evoprune.pipeline.saved import Tuned, for_model, make_method
from evoprune.video.frames import read_frames
from evoprune.video.info import check_one_file
from evoprune.video.probe import probe

if TYPE_CHECKING:
    from evoprune.pipeline.cache import Cache
    from evoprune.pipeline.stream import VideoStream


Path = str | os.PathLike[str]


class VideoQA(Uncopied):
    """A loaded model with a pruning method and a budget, ready for videos.

    It computes in the dtype that the model was loaded with, also inside torch's autocast. `loaded` is from `loading.load_model`;
    `load_seconds` is how long that took, for reports. `engine` is the model and how it prunes, as `open_inputs` takes it.

    Raises:
        UsageError: a bad budget or method. ModelError: a model without a tokenizer. TypeError: an unknown option, or a name in
        the place of a loaded model.
    """

    INSTEAD = "threads may share it; another process loads its own, with VideoQA.load"

    @names_options
    def __init__(self, loaded: LoadedModel, *, load_seconds: float | None = None, pruning: PruneOptions):
        if not isinstance(loaded, LoadedModel):
            if hasattr(loaded, "forward"):
                raise TypeError(f"VideoQA takes no {type(loaded).__name__}; {HELD}")
            raise TypeError(f"VideoQA takes a loaded model; VideoQA.load({loaded!r}) loads one")
        self.engine = make_engine(loaded, pruning, load_seconds)
        if loaded.tokenizer is None:
            raise no_tokenizer(loaded.id)
        if loaded.device == "meta":  # shapes without numbers
            raise UsageError("device 'meta' computes nothing", "cpu always works, auto finds a GPU")

    @classmethod
    @names_options
    def load(
        cls, loading: ModelOptions, *, pruning: PruneOptions, progress: Callable[[int, int], None] | None = None
    ) -> "VideoQA":
        """Loads a model. Options are checked before any weights are read. Errors: as of `load_model` and the constructor.

        `progress`: called with layers quantised and layers in all.
        """
        check_type("progress", progress, Callable | None)
        return load_qa(loading, pruning, progress=progress, kind=cls)

    @property
    def loaded(self) -> LoadedModel:
        return self.engine.loaded

    def __repr__(self) -> str:
        return repr(self.engine).replace("Engine", "VideoQA", 1)

    def unpruned(self) -> "VideoQA":
        """The same model and seed with every visual token kept: what pruning is compared with."""
        engine = unpruned(self.engine)
        return VideoQA(engine.loaded, load_seconds=engine.load_seconds, pruning=engine.options)

    @names_options
    def encode(
        self,
        path: Path | Sequence[Path],
        *,
        sampling: SamplingOptions,
        name: str | None = None,
        cache: "Cache | None" = None,
        progress: Progress | None = None,
    ) -> EncodedInputs:
        """Reads, preprocesses and encodes a video or a picture, or several of them that are asked about together.

        Args:
            path: a file or a folder of frames; or several, in the order in which the model reads them.
            name: what reports call a single input; default: its path.
            cache: where encoded inputs are kept. Not used for a method that reads the question.
            progress: called with a stage, steps done and steps in all; see `encoding.OpenInput.encode`.

        Raises:
            VideoError: missing, unreadable or empty, or so are the subtitles. UsageError: numbers that make no sense, a part of the
            time of a picture, or one file of subtitles for several videos. OutOfMemory. TypeError: an unknown option.
        """
        paths = paths_of(path)
        check_type("name", name, str | None)
        check_type("progress", progress, Callable | None)
        if cache is not None:
            from evoprune.pipeline.cache import Cache  # which few need

            if not isinstance(cache, Cache):
                hint = "give evoprune.Cache(), evoprune.Cache(folder) or None"
                raise UsageError(f"cache is {brief(cache)}, not a Cache", hint)
        names = None if name is None else [name] * len(paths)
        with closing(open_inputs(self.engine, paths, sampling, names=names, cache=cache)) as opened:
            return opened.encode(progress)

    @names_options
    def ask(
        self,
        inputs: "Path | EncodedInputs | Sequence[Path | EncodedInputs]",
        question: str,
        *,
        options: GenerationOptions,
        seed: int | None = None,
    ) -> Answer:
        """Asks one question about one input or several together: `encode`, then `EncodedInputs.ask`.

        Args:
            inputs: in the order in which the model reads them: paths, which are encoded as `encode` does without options; or what
                `encode` of this `VideoQA` made, which is used again.
            question: taken literally.
            seed: as of `EncodedInputs.ask`.

        Errors: as of `encode` and `EncodedInputs.ask`. UsageError: an input was encoded for another model or pruning.
        """
        one = str | os.PathLike | EncodedInputs
        given = [inputs] if isinstance(inputs, one) else inputs
        if not isinstance(given, list | tuple) or not all(isinstance(each, one) for each in given):
            raise UsageError(f"the inputs are {brief(inputs)}, not paths", "give paths, or what encode made of them")
        with ExitStack() as stack:
            opened: list[EncodedInputs | OpenInputs] = []
            for each in given:
                known = isinstance(each, EncodedInputs)
                opened.append(each if known else stack.enter_context(closing(open_inputs(self.engine, paths_of(each)))))
            if isinstance(question, str) and opened:
                held = [plan for each in opened if isinstance(each, EncodedInputs) for plan in each.plans]
                plans = [plan for each in opened for plan in each.plans]
                longest_prompt(self.engine, plans, [question], options, held)
            encoded = [each if isinstance(each, EncodedInputs) else each.encode() for each in opened]
        return together(self.engine, encoded).ask(question, options=options, seed=seed)

    @names_options
    def stream(
        self,
        *,
        options: StreamOptions,
        fps: float | None = None,
        max_visual_tokens: int | None = None,
        system: str | None = None,
        name: str = "stream",
    ) -> "VideoStream":
        """Begins a live video: `add` feeds frames, `ask` asks about what was seen so far. To be closed, by `with`.

        Args:
            fps: frames a second to look at; default: the model's rate.
            max_visual_tokens: of a window, before pruning; as of `encode`.
            system: a system prompt; None for the model's own.
            name: what reports call it.

        Raises UsageError: numbers that make no sense, or a method that cannot prune a stream. TypeError: an unknown option.
        """
        from evoprune.pipeline.stream import VideoStream  # which few need

        check_type("system", system, str | None)
        check_type("name", name, str)
        sampling = SamplingOptions(fps=fps, max_visual_tokens=max_visual_tokens)
        return VideoStream(self.engine, options, sampling, system, name)


@names_plugins()
def open_inputs(
    engine: Engine,
    paths: Sequence[Path],
    sampling: SamplingOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    cache: "Cache | None" = None,
    read: ReadFrames = read_frames,
    encode_rows: EncodeRows | None = None,
    threaded: bool = True,
) -> "OpenInputs":
    """Probes videos and pictures, at least one, in the order in which the model reads them, and plans what is read; reads no frame.

    `sampling` applies to each, what it says of time to the videos. `names`: for reports; default: the paths. `cache`: not used for
    a method that reads the question, nor with another `read`. `read`, `encode_rows`, `threaded`: as of `OpenInput`.

    Raises VideoError: one is missing, unreadable or empty. UsageError: numbers that make no sense, a part of the time where
    there are pictures alone, or a file of subtitles for several inputs.
    """
    sampling = sampling or SamplingOptions()
    check_one_file(sampling.subtitles, len(paths))
    clocks, infos, opened = [Clock(torch.device("cpu")) for _ in paths], [], []  # clocks that never wait for a GPU
    usable = cache if read is read_frames and not engine.method.reads_question else None
    for path, clock in zip(paths, clocks, strict=True):
        with clock.stage("read"):
            infos.append(probe(path, folder_fps=sampling.frame_rate))
    each = zip(clocks, infos, sampling.of_each(infos), names or [None] * len(paths), strict=True)
    for clock, info, wanted, name in each:
        with clock.stage("read"):
            plan = plan_input(engine, info, wanted, name)
        opened.append(OpenInput(engine, plan, clock, read, encode_rows, threaded, usable))
    return OpenInputs(engine, opened)


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed. `plans`: what is looked at, of each."""

    def __init__(self, engine: Engine, inputs: Sequence[OpenInput]):
        self.engine, self.plans, self._inputs = engine, [each.plan for each in inputs], inputs

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded. Reads whole files once, if there is a cache."""
        return all([each.stored is not None for each in self._inputs])

    def begin(self) -> None:
        """Reads the first chunk of the first one, while something else is computed; a thread goes on to the next two.

        Raises VideoError: unreadable. OutOfMemory.
        """
        self._inputs[0].begin()

    @names_plugins()
    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Reads, preprocesses and encodes one after the other.

        `progress`: as of `OpenInput.encode`. Of several inputs also called with "input", which one begins, and how many.

        Errors: as of `OpenInput.encode`. OutOfMemory before anything is read, if all inputs together need too much.
        """
        count, kept = len(self.plans), sum(plan.encoder.keep for plan in self.plans)
        other_tokens = [TEXT + kept - plan.encoder.keep for plan in self.plans]
        for plan, others in zip(self.plans, other_tokens, strict=True) if count > 1 else ():
            fitting_chunk(self.engine, plan, others)
        encodings = []
        for number, (each, others) in enumerate(zip(self._inputs, other_tokens, strict=True), 1):
            if progress and count > 1:
                progress("input", number, count)
            encodings.append(each.encode(progress, others))
        return EncodedInputs(self.engine, encodings)

    def close(self) -> None:
        for each in self._inputs:
            each.close()


def paths_of(given: Any) -> Sequence[Path]:
    """The paths of one or of several inputs, as texts. Raises UsageError if there are none, or what was given are no paths."""
    paths = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(paths, list | tuple) or not paths:
        raise UsageError(f"the input is {brief(given)}, not a path", "give the path of a file or a folder of frames")
    for each in paths:
        if not isinstance(each, str | os.PathLike) or isinstance(os.fspath(each), bytes):
            known = isinstance(each, EncodedInputs)
            hint = "ask takes it as it is: ask([encoded, ...], question)" if known else "give paths of files or folders"
            raise UsageError(f"an input is {brief(each)}, not a path", hint)
    return [os.fspath(each) for each in paths]


def load_qa(
    model: ModelOptions | FoundModel,
    pruning: PruneOptions,
    *,
    tuned: Tuned | None = None,
    progress: Callable[[int, int], None] | None = None,
    kind: type[VideoQA] = VideoQA,
) -> VideoQA:
    """Loads a model, as `VideoQA.load`; "tuned" is resolved before weights are read. `tuned`: where `pruning` is from."""
    start = time.perf_counter()
    make_method(pruning)  # refuses wrong settings before a model is looked for
    found = find_model(model) if isinstance(model, ModelOptions) else model
    pruning, _, setting = for_model(pruning, found.id, lambda: found.weights_fingerprint)
    loaded = load_model(found, to_answer=True, progress=progress)
    made = kind(loaded, load_seconds=time.perf_counter() - start, pruning=pruning)
    made.engine = replace(made.engine, tuned=setting or tuned)
    return made
