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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import chain, islice

import torch

from evoprune import methods
from evoprune.ahead import ahead
from evoprune.cache import Cache, entry_key
from evoprune.clock import Clock
from evoprune.cost import estimate_first_token
from evoprune.environment import environment, peak_memory
from evoprune.errors import LESS, OutOfMemory, UsageError
from evoprune.language.decoder import KVCache
from evoprune.language.generate import (
    GenerationSettings,
    TokenStream,
    embed_prompt,
    embed_question,
    prefill,
    stream,
    stream_text,
)
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.language.prompt import build_prompt
from evoprune.memory import memory_guard, shortage, working_memory
from evoprune.models import LoadedModel, load_model, no_tokenizer
from evoprune.plan import Plan, default_max_visual_tokens, make_plan
from evoprune.pruning.budget import AUTO, AUTO_MOST, DEFAULT, keep_count, parse_budget_or_auto
from evoprune.report import Memory, ModelFacts, Pruning, Rate, Report, Sampling, TokenCounts, VideoFacts
from evoprune.video.decode import FrameChunk, choose_decoder, read_frames
from evoprune.video.probe import VideoInfo, probe
from evoprune.vision.devices import units_at_a_time
from evoprune.vision.encoded import Encoded
from evoprune.vision.encoder import Unchosen, choose, encode_rows
from evoprune.vision.preprocess import patchify, resize
from evoprune.vision.tower import tower_geometry, tower_shape

CHUNK_BYTES = 64 * 2**20  # frames as decoded, held at a time
TEXT = 64  # tokens of a prompt around the video, roughly
Progress = Callable[[str, int, int], None]  # stage, done, total


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
        if self.method.acts == "inside" and self.method.prunes(keep / plan.visual_tokens):
            left = min(geo.units, self.method.allowance(geo.units, max(1, keep // count)))
            rows = [geo.units, *self.method.rows(tower, geo.units, geo.windows, left)]  # of a grid that repeats nothing
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
        tower: Callable[..., Unchosen] = encode_rows,
    ) -> "PreparedVideo":
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
            tower: what computes the encoder's rows; something else than `encode_rows` is another way to the same ones.

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
    ) -> "EncodedVideo":
        """Reads, preprocesses and encodes a video, chunk by chunk; the next ones are made ready while one is encoded.

        Args:
            path, how: what `prepare` takes: `fps`, `frames`, `start_s`, `end_s` and so on.
            progress: called with "encode", frames done and frames in all, after every chunk.
            on_plan: called with the plan, as it is without pruning, before the first frame is read.
            on_encode: the same once it is sure that frames will be read: the video was not in the cache.

        Raises:
            What `prepare` raises.
        """
        with closing(self.prepare(path, **how)) as video:
            if on_plan:
                on_plan(video.full)
            return video.encode(progress=progress, on_encode=on_encode)


class PreparedVideo:
    """A video of which it is known what will be looked at: `encode` looks, once. To be closed.

    Attributes:
        full: what would be looked at with nothing pruned. `plan`: what will be; `keep` of its visual tokens are kept.
    """

    def __init__(
        self,
        qa: VideoQA,
        info: VideoInfo,
        decoder: str,
        full: Plan,
        host: Clock,
        *,
        name: str | None,
        overlap: bool,
        cache: Cache | None,
        read: Callable[..., Iterator[FrameChunk]],
        tower: Callable[..., Unchosen],
    ):
        keep = keep_count(qa.budget, full.visual_tokens)
        self.qa, self.info, self.decoder, self.full = qa, info, decoder, full
        self.plan = full.shrunk(qa.method.plan(full.grid, keep), qa.loaded.video)
        self.keep = min(keep, self.plan.visual_tokens)
        self._name, self._overlap, self._read, self._tower = name or info.path, overlap, read, tower
        self._cache = cache if read is read_frames and not qa.method.reads_question else None
        self._host, self._wall, self._begun = host, host.seconds["read"], False
        self._key: str | None = None
        self._cached: Encoded | None = None
        self._pieces: Iterator[tuple[int, torch.Tensor]] | None = None
        self._open = ExitStack()
        self._damaged = 0

    def begin(self) -> None:
        """Has the first chunk ready when it returns, and a thread go on to the next two; or what the cache holds.

        For whoever does something else meanwhile: what the clock on the wall says counts from `encode` on.

        Raises:
            VideoError: unreadable. OutOfMemory.
        """
        self._begun, self._wall = True, 0.0
        self._look_up()
        if self._cached is None:
            pieces = self._prepared()
            self._pieces = chain(list(islice(pieces, 1)), pieces)

    def close(self) -> None:
        """Reads no further."""
        self._pieces = None
        self._open.close()

    def encode(
        self, *, progress: Progress | None = None, on_encode: Callable[[Plan], None] | None = None
    ) -> "EncodedVideo":
        """Arguments and errors as `VideoQA.encode`."""
        qa, clock = self.qa, Clock(self.qa.loaded.model.model.visual.patch_embed.proj.weight.device)
        begun = clock.now() - self._wall
        if not self._begun:
            self._look_up()
        encoded, found = self._cached, "hit" if self._cached else "miss" if self._key else "off"
        warnings = ["cut_short"] if self.info.cut_short and self.plan.sampling.end_s == self.info.duration_s else []
        if encoded:
            clock.seconds = {"read": 0.0, "preprocess": 0.0, "encode": 0.0} | self._host.seconds
        else:
            asked = clock.now()
            if on_encode:
                on_encode(self.full)
            begun += clock.now() - asked  # the caller's time is no part of the work
            encoded = self._encode(clock, progress)
            if self._damaged:  # it is not kept, or the warning would be lost
                warnings.append("damaged_video")
            elif self._key and not self._cache.store(self._key, encoded):
                warnings.append("cache_not_written")
        wall = clock.now() - begun
        info, units = replace(self.info, path=self._name), self.full.visual_tokens
        return EncodedVideo(
            qa, info, self.decoder, self.plan, units, encoded, clock, wall, found, warnings, self._damaged
        )

    def _look_up(self) -> None:
        if not self._cache:
            return
        qa = self.qa
        with self._host.stage("read"):
            self._key = entry_key(self.info.path, qa.loaded, self.plan, self.decoder, qa.method, self.keep, qa.seed)
            self._cached = self._cache.load(self._key, qa.loaded.model.device) if self._key else None

    def _prepared(self) -> Iterator[tuple[int, torch.Tensor]]:
        """For every chunk, how many frames there were up to its end, and its patches. `close` ends it."""
        limits, plan, host = self.qa.loaded.video, self.plan, self._host
        # No more frames at a time than the encoder takes, and no more bytes than a few large frames.
        grids = -(-units_at_a_time(self.qa.loaded.model.device) // (plan.grid[1] * plan.grid[2]))
        chunk_bytes = min(CHUNK_BYTES, grids * limits.temporal_patch_size * self.info.width * self.info.height * 3)

        def prepare() -> Generator[tuple[int, torch.Tensor], None, None]:
            read = self._read(self.info, plan.sampling.times_s, decoder=self.decoder, chunk_bytes=chunk_bytes)
            with closing(read) as chunks:
                for chunk in host.each("read", chunks):
                    self._damaged += chunk.damaged
                    with host.stage("preprocess"):
                        small = resize(torch.from_numpy(chunk.frames), plan.height, plan.width)
                        piece = patchify(
                            small,
                            limits.image_mean,
                            limits.image_std,
                            limits.patch_size,
                            limits.temporal_patch_size,
                            limits.merge_size,
                        )
                    yield chunk.first + len(chunk.frames), piece

        return self._open.enter_context(closing(ahead(prepare()) if self._overlap else prepare()))

    def _encode(self, clock: Clock, progress: Progress | None) -> Encoded | Unchosen:
        """The stages from reading to encoding; `clock` gets the seconds of all. Who reads the question has still to choose.

        Where there is not enough memory after all the video is begun anew, with half as much of it in the tower at a time.
        """
        at_once, start = self._at_once(), clock.now()
        while True:
            try:
                encoded = self._try_to_encode(clock, progress, at_once)
                break
            except OutOfMemory as problem:
                if problem.stage != "encode" or at_once <= self._least:
                    raise
            torch.cuda.empty_cache()  # what is free, but in pieces; nothing where there is no CUDA
            at_once, self._damaged = max(self._least, at_once // 2), 0
        clock.seconds["encode"] = clock.now() - start - clock.seconds.pop("wait", 0.0)
        clock.seconds |= self._host.seconds
        return encoded

    @property
    def _least(self) -> int:
        """Units of a block: the tower takes no fewer at a time."""
        method, (_, height, width) = self.qa.method, self.plan.grid
        inside = method.acts == "inside" and method.prunes(self.keep / self.plan.visual_tokens)
        return (method.block if inside else 1) * height * width

    def _at_once(self) -> int:
        """How many units to encode at a time: fewer than is usual here where memory is short.

        Raises:
            OutOfMemory: there is not enough even for a block, or for the prompt.
        """
        model, plan, least = self.qa.loaded.model, self.plan, self._least
        at_once, sizes = units_at_a_time(model.device), (self.keep + TEXT, model.dtype.itemsize)
        while short := shortage(
            working_memory(model.config, plan.visual_tokens, max(least, at_once), *sizes), str(model.device)
        ):
            if at_once <= least:
                size = f"{plan.sampling.frames} frames of {plan.width}x{plan.height} pixels, {self.keep:,} visual tokens kept"
                raise OutOfMemory(f"{self._name} {short}: {size}", LESS, stage="encode")
            at_once = max(least, at_once // 2)
        return at_once

    def _try_to_encode(self, clock: Clock, progress: Progress | None, at_once: int) -> Encoded | Unchosen:
        qa, plan = self.qa, self.plan

        def patches() -> Iterator[torch.Tensor]:
            for frames_done, piece in clock.each("wait", self._pieces or self._prepared()):
                yield piece
                if progress:
                    progress("encode", frames_done, plan.sampling.frames)

        with memory_guard("encode"), closing(self):
            rows = self._tower(
                qa.loaded.model.model.visual,
                patches(),
                plan.grid,
                qa.method,
                self.keep,
                seconds_per_grid=plan.sampling.seconds_per_grid(qa.loaded.video.temporal_patch_size),
                seed=qa.seed,
                chunk_units=at_once,
            )
            return rows if qa.method.reads_question else choose(rows)


class EncodedVideo:
    """A video that was encoded once and can be asked about. `report` describes the latest question (or none yet).

    `plan` is what was looked at; `units` are the visual tokens there would be without pruning, which are more if the method
    made the input smaller. From the cache, `encoded.rows` have a shape but hold no data. A method that reads the question chooses
    for each one anew, among the rows of the one encoding; before the first, `encoded` has no tokens.
    """

    def __init__(
        self,
        qa: VideoQA,
        info: VideoInfo,
        decoder: str,
        plan: Plan,
        units: int,
        encoded: Encoded | Unchosen,
        clock: Clock,
        wall_seconds: float,
        cache: str = "off",
        warnings: Sequence[str] = (),
        damaged: int = 0,
    ):
        self.qa, self.info, self.decoder, self.plan, self.units = qa, info, decoder, plan, units
        self._unchosen = encoded if isinstance(encoded, Unchosen) else None
        self.encoded = encoded.nothing() if self._unchosen else encoded
        self._clock, self._wall, self._cache, self._warnings = clock, wall_seconds, cache, warnings
        self._damaged = damaged
        # The system prompt, the cache, and how many of its columns no question changes.
        self._prefix: tuple[str | None, KVCache, int] | None = None
        self._turn, self._paid = 0, False
        self.report = self._blank_report()

    def ask(
        self,
        question: str,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """The answer in pieces, as they are generated. `report` is up to date after each piece and complete after the last.

        Args:
            question: taken literally.
            system: a system prompt; None for the model's own.
            max_new_tokens, temperature, top_p: see `GenerationSettings`; the seed is the VideoQA's.

        Raises:
            UsageError: settings out of range, or an empty question.
        """
        if not question.strip():
            raise UsageError("the question is empty", 'put it in quotes: evoprune ask video.mp4 "What happens?"')
        settings = GenerationSettings(max_new_tokens, temperature, top_p, self.qa.seed)
        return self._answer(question, system, settings)

    def _answer(self, question: str, system: str | None, settings: GenerationSettings) -> Iterator[str]:
        loaded, clock = self.qa.loaded, self._clock
        report = self.report = self._next_report(question, settings)
        self._turn += 1
        turn = self._turn
        if self._paid:  # the video's time was counted with the first question that was read
            clock.seconds, self._wall = dict.fromkeys(clock.seconds, 0.0), 0.0
            report.time_ms.encode_prune = 0.0
        clock.seconds.pop("prefill", None), clock.seconds.pop("generate", None)
        self._fill_times(report, self._wall)
        start = clock.now()
        if self._unchosen:
            with clock.stage("encode"):
                self._choose(question, report)
        with clock.stage("prefill"):
            tokens = self._prefill(question, system, settings)
        encoded, self._paid = self.encoded, True
        report.tokens = TokenCounts(self._text_tokens, len(encoded.kept), self._text_tokens + len(encoded.kept), 0)
        report.time_ms.ttft_wall = (self._wall + clock.now() - start) * 1000
        report.answer = ""

        def update() -> None:
            report.tokens.new, report.finish_reason = tokens.tokens, tokens.finish_reason
            self._fill_times(report, self._wall + clock.now() - start)

        update()
        try:
            for piece in clock.each("generate", stream_text(loaded.tokenizer, tokens)):
                report.answer += piece
                update()
                yield piece
                if turn != self._turn:
                    raise UsageError(
                        "another question was asked meanwhile", "finish one answer before the next question"
                    )
            update()
        except GeneratorExit:  # whoever reads stopped early
            update()
            report.finish_reason = report.finish_reason or "interrupt"
            raise

    def _choose(self, question: str, report: Report) -> None:
        """Has the method choose for this question; what was read of the video before is of no use then."""
        loaded, before = self.qa.loaded, self.encoded.prune_seconds if self._paid else 0.0
        self._prefix = None
        self.encoded = choose(self._unchosen, embed_question(loaded.model, loaded.tokenizer, question))
        self._fill_kept(report)
        report.time_ms.encode_prune = (self.encoded.prune_seconds - before) * 1000

    def _prefill(self, question: str, system: str | None, settings: GenerationSettings) -> TokenStream:
        """Reads the prompt, or, for a later question under the same system prompt, only what follows the video.

        Attention is causal: the keys and values of what comes before the question do not depend on it, so the cache is cut
        back to there and used again.
        """
        loaded, encoded = self.qa.loaded, self.encoded
        model, n = loaded.model, len(encoded.owner)
        prompt = build_prompt(loaded.tokenizer, question, n, system=system)
        seconds = self.plan.sampling.seconds_per_grid(loaded.video.temporal_patch_size)
        span = VideoSpan(prompt.video_start, self.plan.grid, seconds)
        positions = prompt_positions(len(prompt.input_ids), [span], model.config.vision_config.tokens_per_second)
        following = int(positions.max()) + 1
        embeds, columns = embed_prompt(model, prompt.input_ids, encoded.features, prompt.video_start, n, encoded.kept)
        positions = positions[:, columns]
        cache, known = self._take_prefix(system)
        state = prefill(model, embeds[known:], positions[:, known:], following, cache)
        self._prefix = system, state.cache, prompt.prefix_length - n + len(encoded.kept)
        self._text_tokens = prompt.text_tokens
        return stream(model, state, settings, loaded.eos_ids)

    def _take_prefix(self, system: str | None) -> tuple[KVCache | None, int]:
        """The cache up to the question, and its columns; nothing where there is none for this system prompt."""
        if self._prefix is None or self._prefix[0] != system:
            self._prefix = None  # its memory goes before the next one is made
            return None, 0
        _, cache, known = self._prefix
        cache.crop(known)
        return cache, known

    def _fill_times(self, report: Report, total: float) -> None:
        seconds = self._clock.seconds
        times = report.time_ms
        for stage, spent in seconds.items():
            setattr(times, stage, spent * 1000)
        times.total = total * 1000
        times.ttft_model = None if times.prefill is None else times.encode + times.prefill
        # The first token falls out of the prefill; the rate is that of the passes after it.
        passes = max(0, (report.tokens.new or 0) - 1)
        report.rate = Rate(passes / seconds["generate"] if passes and seconds.get("generate") else None)
        report.memory.peak_bytes = peak_memory(self.qa.loaded.device)

    def _fill_kept(self, report: Report) -> None:
        pruning, kept = report.pruning, len(self.encoded.kept)
        pruning.visual_tokens_kept, pruning.kept_ratio = kept, kept / self.units
        pruning.kept_per_grid = self.encoded.kept_per_grid

    def _next_report(self, question: str, settings: GenerationSettings) -> Report:
        report = deepcopy(self._blank)
        fresh = Report()
        report.id, report.created_utc, report.question = fresh.id, fresh.created_utc, question
        report.generation = asdict(settings)
        return report

    def _blank_report(self) -> Report:
        qa, info, plan, encoded, loaded = self.qa, self.info, self.plan, self.encoded, self.qa.loaded
        merge = loaded.video.merge_size
        t, h, w = plan.grid
        report = Report(
            video=VideoFacts(
                path=info.path,
                duration_s=info.duration_s,
                width=info.width,
                height=info.height,
                rotation_deg=info.rotation_deg,
                codec=info.codec,
                fps=info.fps,
                variable_rate=info.variable_rate,
                frames_total=info.frames_total,
                decoder=self.decoder,
                stated_s=info.stated_s,
                damaged=self._damaged,
            ),
            sampling=Sampling(
                start_s=plan.sampling.start_s,
                end_s=plan.sampling.end_s,
                frames=plan.sampling.frames,
                timestamps_s=list(plan.sampling.times_s),
                resized_hw=[plan.height, plan.width],
                grid_thw=[t, h * merge, w * merge],
                seconds_per_grid=plan.sampling.seconds_per_grid(loaded.video.temporal_patch_size),
            ),
            pruning=Pruning(
                method=qa.method_name,
                args=asdict(qa.method),
                budget=qa.asked_budget,
                encoder_budget=qa.method.encoder_share(qa.budget),
                visual_tokens_in=self.units,
                encoder_rows=len(encoded.rows),
                encoder_live_share=encoded.live_share * len(encoded.owner) / self.units,
                layers=[[layer, entered] for layer, entered, _ in encoded.layers],
                positions="qwen",
            ),
            memory=Memory(weights_bytes=loaded.weights_bytes),
            model=ModelFacts(
                id=loaded.id,
                revision=loaded.revision,
                dtype=loaded.dtype,
                quantize=loaded.quantize,
                device=loaded.device,
                load_format=loaded.load_format,
            ),
            env=environment(loaded.device),
            warnings=list(self._warnings),
            cache=self._cache,
        )
        self._fill_kept(report)
        report.time_ms.load = None if qa.load_seconds is None else qa.load_seconds * 1000
        report.time_ms.encode_prune = encoded.prune_seconds * 1000
        if loaded.is_demo and not is_demo_clip(info):
            report.warnings.append("demo_model")
        if loaded.load_format == "dummy":
            report.warnings.append("random_weights")
        if encoded.flat:
            report.warnings.append("equal_scores")
        self._blank = report
        made = deepcopy(report)
        self._fill_times(made, self._wall)
        return made


def is_demo_clip(info: VideoInfo) -> bool:
    """Whether the demo model's own generator made this file: it tags its clips."""
    from evoprune.demo.clips import VIDEO_TAG

    return any(key.lower() == "comment" and value == VIDEO_TAG for key, value in info.tags.items())
