"""The stages strung together: read, preprocess, encode, prefill, generate; each timed, each with its counts.

Reading and preprocessing run beside encoding. Each stage is timed by its own work, so together they can be more than the clock on
the wall shows.

qa = VideoQA.load("demo", budget=0.25)
video = qa.encode("clip.mp4")
for piece in video.ask("What colour is the square?"):
    print(piece, end="")
video.report
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import torch

from evoprune import methods
from evoprune.model.clock import Clock
from evoprune.model.cost import estimate_first_token
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.cache import Cache
from evoprune.pipeline.encoding import PreparedVideo, Progress
from evoprune.pipeline.loading import LoadedModel, load_model, no_tokenizer
from evoprune.pruning.budget import AUTO, AUTO_MOST, DEFAULT, keep_count, parse_budget_or_auto
from evoprune.video.decode import FrameChunk, choose_decoder, read_frames
from evoprune.video.plan import Plan, default_max_visual_tokens, make_plan
from evoprune.video.probe import probe
from evoprune.vision.encoder import Unchosen
from evoprune.vision.tower import tower_geometry, tower_shape


class VideoQA:
    """A loaded model with a pruning method and a budget, ready for videos.

    Args:
        loaded: from `models.load_model`.
        budget: share of visual tokens kept, a number in (0, 1] or a preset's name; or "auto", if the method can choose.
        method: name of a pruning method, `method_args` its settings as texts.
        encoder_budget: share of the units that the encoder goes on computing, in (0, 1]; default: as the method has it follow
            from the budget. The setting of that name.
        seed: of everything random.

    Raises:
        UsageError: a bad budget or method. ModelError: a model without a tokenizer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        budget: float | str = DEFAULT,
        method: str = methods.DEFAULT,
        method_args: dict[str, str] | None = None,
        encoder_budget: float | None = None,
        seed: int = 0,
        load_seconds: float | None = None,
    ):
        self.loaded = loaded
        self.asked_budget = parse_budget_or_auto(budget)
        self.method_name = method
        self.method = methods.get(method, methods.with_encoder_budget(method_args, encoder_budget))
        if self.asked_budget == AUTO:
            self.method = self.method.automatic()
        self.budget = AUTO_MOST if self.asked_budget == AUTO else self.asked_budget
        self.seed = seed
        self.load_seconds = load_seconds
        if loaded.tokenizer is None:
            raise no_tokenizer(loaded.id)

    @classmethod
    def load(
        cls,
        model: str = "demo",
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        offline: bool = False,
        load_format: str = "auto",
        quantize: str = "none",
        progress: Callable[[int, int], None] | None = None,
        **settings,
    ) -> "VideoQA":
        """Loads a model and wraps it; `settings` are the constructor's. Raises what `load_model` raises."""
        start = time.perf_counter()
        # Settings are checked before any weights are read.
        budget = parse_budget_or_auto(settings.get("budget", DEFAULT))
        args = methods.with_encoder_budget(settings.get("method_args"), settings.get("encoder_budget"))
        rule = methods.get(settings.get("method", methods.DEFAULT), args)
        if budget == AUTO:
            rule.automatic()
        loaded = load_model(
            model, revision=revision, device=device, dtype=dtype, offline=offline, load_format=load_format,
            quantize=quantize, to_answer=True, progress=progress,
        )  # fmt: skip
        return cls(loaded, load_seconds=time.perf_counter() - start, **settings)

    def unpruned(self) -> "VideoQA":
        """The same model and seed with every visual token kept: what pruning is compared with."""
        return VideoQA(self.loaded, budget=1.0, method="none", seed=self.seed, load_seconds=self.load_seconds)

    @property
    def default_max_visual_tokens(self) -> int:
        """Limit before pruning where none is given."""
        return default_max_visual_tokens(on_cpu=self.loaded.device == "cpu", is_demo=self.loaded.is_demo)

    def estimate_first_token(self, plan: Plan, text_tokens: int = 40) -> float | None:
        """Seconds until the first token, roughly; None where nobody has to wait for it (CUDA, the demo model)."""
        if self.loaded.device != "cpu" or self.loaded.is_demo:
            return None
        model = self.loaded.model
        tower = tower_shape(model.model.visual)
        keep = keep_count(self.budget, plan.visual_tokens)
        count, height, width = self.method.plan(plan.grid, keep)
        geo = tower_geometry(model.model.visual, height, width)
        rows = [geo.units] * (tower.depth + 1)
        budget = keep / plan.visual_tokens
        if self.method.merges(budget):
            left = min(geo.units, self.method.allowance(geo.units, max(1, keep // count)))
            rows = [geo.units, *self.method.rows(tower, geo.units, geo.windows, left)]  # of a grid that repeats nothing
            early = self.method.narrows_after(tower, budget)
            if early is not None:
                most = max(1, round(self.method.encoder_share(budget) * geo.units))
                rows[early:] = [min(n, most) for n in rows[early:]]
        rows = [count * n for n in rows]
        return estimate_first_token(model, rows, count, geo.windows, min(keep, rows[0]) + text_tokens)

    def prepare(
        self,
        path: str | os.PathLike[str],
        *,
        fps: float | None = None,
        frames: int | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        max_frames: int | None = None,
        max_visual_tokens: int | None = None,
        decoder: str = "auto",
        name: str | None = None,
        overlap: bool = True,
        cache: Cache | None = None,
        read: Callable[..., Iterator[FrameChunk]] = read_frames,
        tower: Callable[..., Unchosen] | None = None,
    ) -> PreparedVideo:
        """Finds out what there is to look at in a video; no frame is read yet.

        Args:
            path: the file.
            fps: frames a second; default: what the model's processor asks for. `frames`: how many in all, instead.
            start_s, end_s: the part to look at, in seconds.
            max_frames: instead of the model's own limit.
            max_visual_tokens: limit before pruning; default: `default_max_visual_tokens`.
            decoder: how to read it, see `video.decode.read_frames`.
            name: what reports call the video; default: its path.
            overlap: whether a thread reads and preprocesses ahead; what comes out is the same.
            cache: where encoded videos are kept, with what was chosen; so a method that reads the question leaves it alone.
            read: what gives the frames; something else than `read_frames` shows something else than the video, and is not cached.
            tower: another way to the encoder's rows than `encode_rows`.

        Raises:
            VideoError: missing, unreadable or empty. UsageError: numbers that make no sense. OutOfMemory.
        """
        host = Clock(torch.device("cpu"))  # of what is done beside the encoder, and must not wait for a GPU
        with host.stage("read"):
            info = probe(path)
            decoder = choose_decoder(decoder, info)
            plan = make_plan(
                info,
                self.loaded.video,
                fps=fps,
                frames=frames,
                start_s=start_s,
                end_s=end_s,
                max_frames=max_frames,
                max_visual_tokens=self.default_max_visual_tokens if max_visual_tokens is None else max_visual_tokens,
            )
        return PreparedVideo(
            self, info, decoder, plan, host, name=name, overlap=overlap, cache=cache, read=read, tower=tower
        )

    def encode(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        on_plan: Callable[[Plan], None] | None = None,
        on_encode: Callable[[Plan], None] | None = None,
        **how,
    ) -> EncodedVideo:
        """Reads, preprocesses and encodes a video, chunk by chunk; the next ones are made ready while one is encoded.

        Args:
            path, how: what `prepare` takes: `fps`, `frames`, `start_s`, `end_s` and so on.
            progress: called with "encode", frames done and frames in all, after every chunk; then, where all of the video goes
                through some of the tower's layers together, with "layers", those done and those in all.
            on_plan: called with the plan, as it is without pruning, before the first frame is read.
            on_encode: the same once it is sure that frames will be read: the video was not in the cache.

        Raises:
            What `prepare` raises.
        """
        with closing(self.prepare(path, **how)) as video:
            if on_plan:
                on_plan(video.full)
            return video.encode(progress=progress, on_encode=on_encode)
