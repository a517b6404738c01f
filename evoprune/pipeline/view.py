"""What of a video or a picture will be looked at, decided before any frame is read."""

from dataclasses import dataclass, replace

from evoprune.pipeline.engine import Engine
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.subtitles import PromptSubtitles, prompt_subtitles
from evoprune.pruning.budget import keep_count
from evoprune.pruning.encoder_plan import EncoderPlan
from evoprune.video.frames import choose_decoder
from evoprune.video.info import VIDEO, Video
from evoprune.video.plan import Plan, default_max_visual_tokens, make_plan
from evoprune.vision.tower import tower_shape


@dataclass(frozen=True)
class View:
    """A video, and which frames of it are looked at; or a picture, which is one frame.

    Attributes:
        info: facts about the file.
        name: what reports call it.
        decoder: "pyav" or "decord"; for a picture "pillow".
        full: what would be looked at with nothing pruned.
        plan: what is looked at, which is less if the method makes the input smaller.
        encoder: what the encoder does with it.
        limited: whether the options ask for more frames, or a higher rate, than a limit allows, or frames became smaller for
            them. A limit on frames that the options set themselves does not count, nor does the model's own rate.
        subtitles: what the prompt has of them.
    """

    info: Video
    name: str
    decoder: str
    full: Plan
    plan: Plan
    encoder: EncoderPlan
    limited: bool
    subtitles: PromptSubtitles

    @property
    def kind(self) -> str:
        """ "video" or "picture"."""
        return self.info.kind

    @property
    def source(self) -> Video:
        """What frames are read from: videos at their own size, pictures at the one that the encoder reads."""
        return self.info if self.kind == VIDEO else replace(self.info, width=self.plan.width, height=self.plan.height)

    @property
    def units(self) -> int:
        """Visual tokens with nothing pruned."""
        return self.full.visual_tokens

    @property
    def units_of_pair(self) -> int:
        """Units of a frame pair, the least that the tower takes at a time."""
        return self.plan.grid[1] * self.plan.grid[2]

    @property
    def cut_short(self) -> bool:
        """Whether what is looked at ends where the file breaks off."""
        return self.info.cut_short and self.plan.sampling.end_s == self.info.duration_s

    def seconds_per_pair(self, temporal_patch_size: int) -> float:
        """Time from one frame pair to the next."""
        return self.plan.sampling.seconds_per_pair(temporal_patch_size)


def make_view(engine: Engine, info: Video, sampling: SamplingOptions, name: str | None = None) -> View:
    """Plans which frames of a video are looked at, or how large a picture.

    Raises:
        VideoError: missing, unreadable or empty, or so are its subtitles. UsageError: an unknown or missing decoder.
    """
    decoder = choose_decoder(sampling.decoder, info)
    loaded, numbers = engine.loaded, sampling.numbers
    if numbers["max_visual_tokens"] is None:
        on_cpu = loaded.device == "cpu"
        numbers["max_visual_tokens"] = default_max_visual_tokens(on_cpu=on_cpu, is_demo=loaded.is_demo)
    limits = loaded.limits[info.kind]
    full = make_plan(info, limits, **numbers)
    encoder = _encoder_plan(engine, full)
    plan = full.shrunk(encoder.grid, limits)
    subtitles = prompt_subtitles(
        loaded.tokenizer, info, full.sampling, sampling.subtitles, sampling.max_subtitle_tokens
    )
    return View(info, name or info.path, decoder, full, plan, encoder, _limited(full, sampling), subtitles)


def _limited(plan: Plan, sampling: SamplingOptions) -> bool:
    asked = sampling.fps is not None or sampling.frames is not None
    return asked and (plan.token_capped or (plan.capped and sampling.max_frames is None))


def _encoder_plan(engine: Engine, full: Plan) -> EncoderPlan:
    tower = tower_shape(engine.loaded.model.model.visual)
    return engine.method.plan(tower, full.grid, keep_count(engine.budget, full.visual_tokens))
