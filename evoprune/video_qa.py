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
from typing import TYPE_CHECKING

from evoprune.errors import UsageError, names_plugins
from evoprune.keywords import brief, check_type, names_options
from evoprune.session.answering import Answer, EncodedInputs, Uncopied, together
from evoprune.session.encoding import Progress
from evoprune.session.engine import make_engine, unpruned
from evoprune.session.inputs import OpenInputs, open_inputs, paths_of
from evoprune.session.loading.found import FoundModel, find_model
from evoprune.session.loading.model import LoadedModel, load_model, no_tokenizer
from evoprune.session.options import HELD, GenerationOptions, ModelOptions, PruneOptions, SamplingOptions, StreamOptions
from evoprune.session.prompting import longest_prompt
from evoprune.session.saved import Tuned, for_model, make_method

if TYPE_CHECKING:
    from evoprune.live.stream import VideoStream
    from evoprune.session.cache import Cache


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
            from evoprune.session.cache import Cache

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
        from evoprune.live.stream import VideoStream

        check_type("system", system, str | None)
        check_type("name", name, str)
        sampling = SamplingOptions(fps=fps, max_visual_tokens=max_visual_tokens)
        return VideoStream(self.engine, options, sampling, system, name)


@names_plugins()
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
