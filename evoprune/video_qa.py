"""The whole pipeline in three calls: load, encode, ask.

    qa = VideoQA.load("demo", budget=0.25)
    video = qa.encode("clip.mp4", fps=2)
    answer = video.ask("What colour is the square?")
    for piece in answer:
        print(piece, end="")
    answer.report

Reading and preprocessing run in parallel with encoding. Each stage's time is the time it was busy, so the times of different stages
overlap. Read and preprocessing time hidden behind other work is reported as `overlap`. The stages before `generate`, minus
`overlap`, add up to the time to first token.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, Unpack, overload

from evoprune.errors import OTHER_MODELS, UsageError
from evoprune.language import GenerationOptions
from evoprune.session import (
    Answer,
    EncodedInputs,
    FindOptions,
    LoadedModel,
    ModelOptions,
    OpenInputs,
    PruneOptions,
    ReadAhead,
    Session,
    StreamOptions,
    describe,
    inputs_of,
    open_inputs,
)
from evoprune.signatures import takes
from evoprune.suggestions import Suggesting, SuggestingClass, not_callable
from evoprune.util import Uncopied, brief, check_order, check_type, from_keywords
from evoprune.video import GivenInput, Input, SamplingOptions

if TYPE_CHECKING:
    from evoprune.keywords import (
        GenerationKeywords,
        LoadKeywords,
        PruneKeywords,
        SamplingKeywords,
        SearchKeywords,
        UntypedKeywords,
        WatchKeywords,
    )
    from evoprune.live import VideoStream
    from evoprune.moments import Moment
    from evoprune.session import Cache


Path = str | os.PathLike[str]
Shape = TypeVar("Shape")  # the class passed as `schema`


class VideoQA(Uncopied, Suggesting, metaclass=SuggestingClass):
    """A loaded model with a budget and a pruning method, ready to answer questions about videos. Create one with `VideoQA.load`.

    It can be used in a `with` statement, whose end stops reading the inputs given to `load(ahead=)`. The object can still be used
    afterwards, and the model's memory is freed once nothing refers to it.

    `VideoQA` always computes in the dtype of the loaded model, even inside a torch autocast region.

    To process many videos, use `evoprune.batch.answers`, or write your own loop with `in_flight` from evoprune.session. Both read
    the next videos while the current one is being answered.

    Attributes:
        session: The loaded model with its pruning settings. Pass this to the functions in `evoprune.session`.

    Args:
        loaded: A model loaded by `load_model` from evoprune.session, or a `Session`. A session already has a load time and pruning
            options, so `load_seconds` and `options` are ignored in that case.
        load_seconds: The load time in seconds, which is included in reports.
        options: `budget`, `method` and `seed`; see `load`.

    Raises:
        UsageError: If the budget or the method is invalid.
        ModelError: If the model has no tokenizer.
        TypeError: If an option is unknown, or if `loaded` is a model name instead of a loaded model.
    """

    INSTEAD = "threads may share it; another process loads its own, with VideoQA.load"
    MEANT: ClassVar = {
        "from_pretrained": "VideoQA.load(model)",
        "generate": "qa.ask(path, question)",
        "answer": "qa.ask(path, question)",
        "chat": "qa.encode(path).chat()",
        "search": "qa.find(path, query)",
        "batch": "evoprune.batch.answers",
        "report": "answer.report, or qa.encode(path).report",
        **dict.fromkeys(("ask_many", "ask_all", "answers"), "evoprune.batch.answers"),
        **dict.fromkeys(("options", "settings", "pruning"), "qa.session.pruning"),
        "config": "qa.loaded.model.config",
        "name": "qa.loaded.id",
        "model": "qa.loaded.model",
        "device": "qa.loaded.device",
        "dtype": "qa.loaded.dtype",
        "tokenizer": "qa.loaded.tokenizer",
        "processor": "qa.loaded.tokenizer",
        "budget": "qa.session.pruning.budget",
        "method": "qa.session.pruning.method",
        "seed": "qa.session.pruning.seed",
    }
    if not TYPE_CHECKING:
        __call__ = not_callable("qa.ask(path, question)")

    @takes(PruneOptions, names=PruneOptions.PRUNING)
    def __init__(
        self,
        loaded: LoadedModel | Session,
        *,
        load_seconds: float | None = None,
        **options: "Unpack[PruneKeywords]",
    ):
        (pruning,) = from_keywords(options, PruneOptions)
        if hasattr(loaded, "forward"):
            raise TypeError(f"VideoQA does not take a {type(loaded).__name__}; {OTHER_MODELS}")
        if not isinstance(loaded, LoadedModel | Session):
            raise TypeError(f"VideoQA takes a loaded model; VideoQA.load({loaded!r}) loads one")
        self.session = Session(loaded, pruning.config(), load_seconds) if isinstance(loaded, LoadedModel) else loaded
        self._ahead: ReadAhead | None = None  # inputs that are being prefetched, or None
        self.loaded.check_answers()

    @classmethod
    @takes(ModelOptions, PruneOptions, names=(*ModelOptions.LOADING, *PruneOptions.PRUNING))
    def load(
        cls,
        model: Path = "demo",
        *,
        progress: Callable[[int, int], None] | None = None,
        ahead: Path | Sequence[Path] | ReadAhead | None = None,
        **options: "Unpack[LoadKeywords]",
    ) -> "VideoQA":
        """Load a model. All options are checked before any weights are read.

        Raises the same errors as `load_model` and the constructor.

        Args:
            model: A hub id, a local folder, demo, or demo-scenes.
            progress: Called with the number of quantized layers and the total number of layers.
            ahead: The first input that you will pass to `encode` or `ask`, without options. Evoprune reads it while the model
                loads. To read an input with options, pass the result of `evoprune.read_ahead` instead.
            options: How to load the model and how to prune: the fields of `keywords.LoadKeywords`.
        """
        check_type("progress", progress, Callable | None)
        loading, pruning = from_keywords({"model": model, **options}, ModelOptions, PruneOptions)
        if ahead is None:
            return cls(Session.load(loading, pruning, progress=progress))
        if not isinstance(ahead, ReadAhead):
            paths = _paths_of(ahead)
            pruning.config()  # reject invalid settings before looking for the model
            ahead = ReadAhead(describe(loading), [(paths, SamplingOptions())], pruning)
        same = ahead.model.options == loading
        try:
            qa = cls(Session.load(ahead.model if same else loading, pruning, progress=progress))
        except BaseException:
            ahead.close()
            raise
        qa._ahead = ahead
        weakref.finalize(qa, ahead.close)
        return qa

    @property
    def loaded(self) -> LoadedModel:
        return self.session.loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading ahead. If nothing is read ahead, there is nothing to close."""
        if self._ahead is not None:
            self._ahead.close()

    def __repr__(self) -> str:
        return repr(self.session).replace("Session", "VideoQA", 1)

    def unpruned(self) -> "VideoQA":
        """Return a `VideoQA` with the same model and seed that does not prune, as a baseline for comparisons."""
        return VideoQA(self.session.unpruned())

    @takes(SamplingOptions, names=SamplingOptions.FILES)
    def encode(
        self,
        path: Input | Sequence[Input],
        *,
        times_s: Sequence[float] | None = None,
        name: str | None = None,
        cache: "Cache | None" = None,
        progress: Callable[[str, int, int], None] | None = None,
        **options: "Unpack[SamplingKeywords]",
    ) -> EncodedInputs:
        """Read, preprocess, and encode a video or image, or several inputs for questions about all of them together.

        Args:
            path: The path of a file or of a folder of frames; an http or https URL; the bytes of a file; a file opened in binary
                mode, read from its current position; a Pillow image; or frames as a uint8 RGB array `[T, H, W, 3]`, with
                `frame_rate` or `times_s`. For several inputs, pass a list of these in the order in which the model should read
                them.
            times_s: For an array, the ascending start timestamps of the frames, in seconds.
            name: The name of a single input in reports. Defaults to its path, its URL without the password, or `<array>`,
                `<bytes>`, `<file>` or `<picture>`.
            cache: A disk cache for encoded inputs other than arrays. It isn't used if the method reads the question.
            progress: Called with a stage, the number of finished steps, and the total; see `encoding.OpenInputs.encode`. During a
                download, the stage is "download", and the numbers are the bytes received so far and the total (0 if unknown).
            options: How to sample frames: the fields of `keywords.SamplingKeywords`.

        Raises:
            VideoError: If an input or its subtitles are missing, unreadable, empty, or can't be downloaded.
            UsageError: If an option is out of range, an array has the wrong shape or dtype or has neither a frame rate nor times, a
                time span is given for an image, one subtitle file is given for more than one video, or a URL is given after
                `load(offline=True)`.
            OutOfMemory: If a stage needs more memory than is available.
            TypeError: If an option is unknown.
        """
        (sampling,) = from_keywords(options, SamplingOptions)
        inputs = inputs_of(path, options.get("frame_rate"), times_s)
        check_type("name", name, str | None)
        check_type("progress", progress, Callable | None)
        _check_cache(cache)
        names = None if name is None else [name] * len(inputs)
        with open_inputs(
            self.session, inputs, sampling, progress=progress, names=names, cache=cache, ahead=self._ahead
        ) as opened:
            return opened.encode(progress)

    @overload
    def ask(
        self,
        inputs: Input | EncodedInputs | Sequence[Input | EncodedInputs],
        question: str,
        *,
        schema: type[Shape],
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[UntypedKeywords]",
    ) -> Answer[Shape | None]: ...

    @overload
    def ask(
        self,
        inputs: Input | EncodedInputs | Sequence[Input | EncodedInputs],
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer: ...

    @takes(GenerationOptions, names=GenerationOptions.ANSWER)
    def ask(
        self,
        inputs: Input | EncodedInputs | Sequence[Input | EncodedInputs],
        question: str,
        *,
        seed: int | None = None,
        on_thoughts: Callable[[str], None] | None = None,
        **options: "Unpack[GenerationKeywords]",
    ) -> Answer:
        """Ask a question about one or more inputs. Combines `encode` and `EncodedInputs.ask`.

        Args:
            inputs: An input in any format accepted by `encode` except an array, which is encoded with the default options, or a
                result of this object's `encode` method, which is reused. For several inputs, pass a list of these in the order in
                which the model should read them.
            question: The question, which is passed to the model unchanged.
            seed, on_thoughts, options: See `EncodedInputs.ask`.

        Raises:
            UsageError: If an input was encoded by a different model or with different pruning settings.
            VideoError: If the input and the question are swapped.
            EvopruneError: If `encode` or `EncodedInputs.ask` fails.
        """
        (generation,) = from_keywords(options, GenerationOptions)
        check_order(inputs, question, "qa.ask(path, question)")
        given = inputs if isinstance(inputs, list | tuple) else [inputs]
        with ExitStack() as stack:
            opened: list[EncodedInputs | OpenInputs] = []
            for item in given:
                if isinstance(item, EncodedInputs):
                    opened.append(item)
                    continue
                if isinstance(item, list | tuple):
                    raise UsageError(
                        f"an input is {brief(item)}, not a single input", "pass one flat list of all inputs"
                    )
                _refuse_frames(item, "encode it first: qa.ask(qa.encode(frames, frame_rate=30), question)")
                inputs_of_item = open_inputs(self.session, inputs_of(item), ahead=self._ahead)
                opened.append(stack.enter_context(inputs_of_item))
            if isinstance(question, str) and opened:
                encoded_plans = [plan for item in opened if isinstance(item, EncodedInputs) for plan in item.plans]
                plans = [plan for item in opened for plan in item.plans]
                new = [item for item in opened if isinstance(item, OpenInputs)]
                with new[0].planning() if new else nullcontext():
                    self.session.longest_prompt(plans, [question], generation, encoded_plans)
            encoded = [item if isinstance(item, EncodedInputs) else item.encode() for item in opened]
        asked = EncodedInputs.together(self.session, encoded)
        last = asked not in opened  # the caller has no reference to these inputs, so it can't ask another question
        return asked.ask(question, seed=seed, on_thoughts=on_thoughts, last=last, **options)

    @takes(SamplingOptions, StreamOptions, names=(*SamplingOptions.WATCHING, *StreamOptions.WATCHING))
    def stream(
        self,
        *,
        system: str | None = None,
        name: str = "stream",
        **options: "Unpack[WatchKeywords]",
    ) -> "VideoStream":
        """Start watching a live video.

        Use the result in a `with` statement. Its `add` method accepts new frames, and `ask` answers questions about everything seen
        so far.

        Args:
            system: The system prompt, or None for the model's default.
            name: The name of the stream in reports.
            options: How each window is sampled, and how the stream is remembered: the fields of `keywords.WatchKeywords`.

        Raises:
            UsageError: If an option is out of range, or the method can't prune streams.
            TypeError: If an option is unknown.
        """
        from evoprune.live import VideoStream

        sampling, remembered = from_keywords(options, SamplingOptions, StreamOptions)
        check_type("system", system, str | None)
        check_type("name", name, str)
        return VideoStream(self.session, remembered, sampling, system, name)

    @takes(SamplingOptions, FindOptions, names=(*SamplingOptions.SEARCHING, *FindOptions.FINDING))
    def find(
        self,
        path: Input,
        query: str | Sequence[str],
        *,
        progress: Callable[[str, int, int], None] | None = None,
        cache: "Cache | None" = None,
        **options: "Unpack[SearchKeywords]",
    ) -> "list[Moment]":
        """Find the moments in a video that match a query, best first. With several queries, the moments are grouped by query.

        The video is split into segments. Each segment's keyframes are read and encoded once, and the model is then asked each query
        about them. If "yes" is much more probable for one segment than for most others, densely sampled frames are used to
        determine when the moment begins and ends. Memory usage doesn't grow with the length of the video.

        Args:
            path: A single video in any format accepted by `encode`, except an array.
            query: A query such as "a red star", or several queries.
            progress: Called with "segment", the number of segments read so far, and the total. Later called with "piece" for parts
                of the best segments, and, for each query, with "moment", the number of moments whose start and end have been found,
                and the total.
            cache: See `encode`. Encoded segments are stored in a subfolder so that other queries can reuse them.
            options: Which part of the video to search, and how to find moments: the fields of `keywords.SearchKeywords`. `fps`
                applies to all segments. It defaults to the model's rate, or less for a long video (see `total_tokens`).

        Raises:
            UsageError: If an option or a query is invalid, or the input is an array of frames.
            VideoError: If the video is missing, unreadable, or empty, or the input is an image.
            OutOfMemory: If a stage needs more memory than is available.
            TypeError: If an option is unknown.
        """
        from evoprune.moments import Search

        sampling, finding = from_keywords(options, SamplingOptions, FindOptions)
        check_type("progress", progress, Callable | None)
        _check_cache(cache)
        check_order(path, query, "qa.find(path, query)")
        _refuse_frames(path, "write the frames to a video file")
        source, *others = inputs_of(path)
        if others:
            raise UsageError("find takes one video", "call it once per video")
        queries = [query] if isinstance(query, str) else query
        segments = cache.of_segments if cache else None
        with Search(self.session, source, queries, finding, sampling, segments) as search:
            search.run(progress)
            return search.moments()


def _paths_of(given: Any) -> list[str]:
    """Return the given input paths as a list of strings.

    Raises:
        UsageError: If there are no paths, or a value isn't a path.
    """
    paths = given
    if isinstance(given, str | os.PathLike):
        paths = [given]
    if not isinstance(paths, list | tuple) or not paths:
        raise UsageError(f"the input is {brief(given)}, not a path", "pass the path of a file or a folder of frames")
    for path in paths:
        if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
            hint = "pass paths of files or folders"
            if isinstance(path, EncodedInputs):
                hint = EncodedInputs.AS_INPUT
            raise UsageError(f"an input is {brief(path)}, not a path", hint)
    return [os.fspath(path) for path in paths]


def _refuse_frames(given: Any, hint: str) -> None:
    if GivenInput(given).is_frames:
        raise UsageError("an array of frames has no frame rate here", hint)


def _check_cache(cache: Any) -> None:
    if cache is not None:
        from evoprune.session import Cache

        if not isinstance(cache, Cache):
            hint = "pass evoprune.Cache(), evoprune.Cache(folder) or None"
            raise UsageError(f"cache is {brief(cache)}, not a Cache", hint)
