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
from collections.abc import Callable
from contextlib import closing

from evoprune.errors import UsageError
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.cache import Cache
from evoprune.pipeline.encoding import Progress
from evoprune.pipeline.engine import make_engine, make_method, unpruned
from evoprune.pipeline.loading.model import LoadedModel, load_model, no_tokenizer
from evoprune.pipeline.opening import open_video
from evoprune.pipeline.options import ModelOptions, PruneOptions, SamplingOptions, from_keywords


class VideoQA:
    """A loaded model with a pruning method and a budget, ready for videos.

    It computes in the dtype that the model was loaded with, also inside torch's autocast.

    Args:
        loaded: from `loading.load_model`.
        load_seconds: how long loading took, for reports.
        options: fields of `PruneOptions`: `budget`, `method`, `method_args`, `seed`.

    Attributes:
        engine: the model and how it prunes, as `opening.open_video` takes it.

    Raises:
        UsageError: a bad budget or method. ModelError: a model without a tokenizer. TypeError: an unknown option.
    """

    def __init__(self, loaded: LoadedModel, *, load_seconds: float | None = None, **options):
        (pruning,) = from_keywords(options, PruneOptions)
        self.engine = make_engine(loaded, pruning, load_seconds)
        if loaded.tokenizer is None:
            raise no_tokenizer(loaded.id)
        if loaded.device == "meta":  # shapes without numbers
            raise UsageError("device 'meta' computes nothing", "cpu always works, auto finds a GPU")

    @classmethod
    def load(cls, model: str = "demo", *, progress: Callable[[int, int], None] | None = None, **options) -> "VideoQA":
        """Loads a model. Options are checked before any weights are read.

        Args:
            model: "demo", a folder, or a hub id.
            progress: called with layers quantised and layers in all.
            options: fields of `ModelOptions` and of `PruneOptions`.

        Raises:
            UsageError, ModelError, OutOfMemory: as `loading.load_model` and the constructor. TypeError: an unknown option.
        """
        start = time.perf_counter()
        wanted, pruning = from_keywords({"model": model, **options}, ModelOptions, PruneOptions)
        make_method(pruning)
        loaded = load_model(wanted, to_answer=True, progress=progress)
        return cls(loaded, load_seconds=time.perf_counter() - start, **vars(pruning))

    @property
    def loaded(self) -> LoadedModel:
        """The model."""
        return self.engine.loaded

    def __repr__(self) -> str:
        loaded, options = self.loaded, self.engine.options
        return (
            f"<VideoQA {loaded.id!r} in {loaded.dtype} on {loaded.device}: "
            f"method {options.method!r}, budget {options.budget}, seed {options.seed}>"
        )

    def unpruned(self) -> "VideoQA":
        """The same model and seed with every visual token kept: what pruning is compared with."""
        engine = unpruned(self.engine)
        return VideoQA(engine.loaded, load_seconds=engine.load_seconds, **vars(engine.options))

    def encode(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        cache: Cache | None = None,
        progress: Progress | None = None,
        **options,
    ) -> EncodedVideo:
        """Reads, preprocesses and encodes a video.

        Args:
            path: the file, or a folder of frames.
            name: what reports call the video; default: its path.
            cache: where encoded videos are kept. Not used for a method that reads the question.
            progress: called with a stage, steps done and steps in all; see `encoding.encode_view`.
            options: fields of `SamplingOptions`: `fps`, `frames`, `start_s`, `end_s`, `max_frames`, `max_visual_tokens`,
                `decoder`.

        Raises:
            VideoError: missing, unreadable or empty. UsageError: numbers that make no sense. OutOfMemory. TypeError: an unknown
            option.
        """
        (sampling,) = from_keywords(options, SamplingOptions)
        with closing(open_video(self.engine, path, sampling, name=name, cache=cache)) as video:
            return video.encode(progress)
