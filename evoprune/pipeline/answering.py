"""A video that was encoded, and the last stages, through which each question goes: prefill and generate. Reports tell of all."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.language.decoder import KVCache
from evoprune.language.generate import (
    GenerationSettings,
    TokenStream,
    column_counts,
    embed_prompt,
    embed_question,
    prefill,
    stream,
    stream_text,
)
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.language.prompt import build_prompt
from evoprune.model.clock import Clock
from evoprune.model.machine import environment, peak_memory
from evoprune.report import Memory, Pruning, Rate, Report, Sampling, TokenCounts, VideoFacts
from evoprune.video.info import is_demo_clip
from evoprune.video.plan import Plan
from evoprune.video.probe import VideoInfo
from evoprune.vision.encoded import Encoded
from evoprune.vision.encoder import Unchosen, choose

if TYPE_CHECKING:
    from evoprune.pipeline.video_qa import VideoQA


class EncodedVideo:
    """A video that was encoded once and can be asked about. `report` describes the latest question (or none yet).

    `plan` is what was looked at; `units` are the visual tokens there would be without pruning, which are more if the method
    made the input smaller. From the cache, `encoded.rows` have a shape but hold no data. A method that reads the question chooses
    for each one anew, among the rows of the one encoding; before the first, `encoded` has no tokens.
    """

    def __init__(
        self,
        qa: "VideoQA",
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
        counts = column_counts(encoded.counts, prompt.video_start, len(embeds))
        cache, known = self._take_prefix(system)
        counts = None if counts is None else counts[known:]
        state = prefill(model, embeds[known:], positions[:, known:], following, cache, counts)
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
                budget=qa.method.told(qa.asked_budget),
                encoder_budget=qa.method.encoder_share(qa.budget),
                visual_tokens_in=self.units,
                encoder_rows=len(encoded.rows),
                encoder_live_share=encoded.live_share * len(encoded.owner) / self.units,
                layers=[list(layer) for layer in encoded.layers],
                positions="qwen",
            ),
            memory=Memory(weights_bytes=loaded.weights_bytes),
            model=loaded.facts(),
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
