"""The two sides of a benchmark on one clip: our own pipeline, and plain Hugging Face transformers, stage by stage."""

import sys
from contextlib import closing
from dataclasses import dataclass
from math import prod

import torch

from evoprune.language.generate import GenerationSettings, column_counts, embed_prompt, prefill, stream
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.methods.base import Method
from evoprune.model.clock import Clock
from evoprune.model.cost import tower_flop
from evoprune.model.sizes import PATCHES
from evoprune.pipeline.loading import LoadedModel
from evoprune.profiling import synthetic
from evoprune.profiling.results import Case, Counts
from evoprune.pruning.budget import keep_count
from evoprune.video.decode import read_frames
from evoprune.video.plan import VideoLimits, make_plan
from evoprune.video.probe import VideoInfo
from evoprune.video.sampling import even_times
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import patchify, resize
from evoprune.vision.tower import tower_geometry

# Text tokens before and after the video, as many as a chat template and a short question have.
TEXT_BEFORE, TEXT_AFTER = 15, 15
SYNTHETIC_FPS = 2.0

Frames = tuple[torch.Tensor, float]  # uint8 [F, H, W, 3], and the seconds from one grid to the next


def synthetic_frames(kind: str, case: Case) -> Frames:
    """A clip made by formula, at Qwen's own frame rate."""
    return torch.from_numpy(synthetic.clip(kind, case.frames, case.height, case.width)), 2 / SYNTHETIC_FPS


def video_frames(info: VideoInfo, case: Case) -> Frames:
    """Frames of a video, spread over all of it."""
    plan = make_plan(info, VideoLimits(), frames=case.frames, max_frames=case.frames, max_visual_tokens=sys.maxsize)
    with closing(read_frames(info, plan.sampling.times_s)) as chunks:
        small = [resize(torch.from_numpy(chunk.frames), case.height, case.width) for chunk in chunks]
    return torch.cat(small), plan.sampling.seconds_per_grid()


@dataclass(frozen=True)
class Clip:
    """A clip that is ready for the tower, and the prompt around it.

    Attributes:
        patches: `[4 * N, 1176]` in Hugging Face's order, on the device and in the dtype of the weights.
        grid: (T, H, W) in units. `seconds_per_grid`: from one grid to the next.
        ids: int64 `[15 + N + 15]`, any tokens for the text, and zeros for the video.
        positions: int64 `[3, 15 + N + 15]` by Qwen's rule; `following`: that of the first new token.
        whole: units that the clip has without pruning, more than N if a method made the input smaller.
    """

    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float
    ids: torch.Tensor
    positions: torch.Tensor
    following: int
    whole: int

    @property
    def units(self) -> int:
        return len(self.patches) // PATCHES


def prepare(
    loaded: LoadedModel,
    frames: torch.Tensor,
    seconds_per_grid: float,
    method: Method | None = None,
    budget: float = 1.0,
) -> Clip:
    """Preprocesses a clip, made smaller where `method` acts on the input.

    Tokens of the text are drawn from the whole vocabulary, always the same ones.
    """
    v, visual = loaded.video, loaded.model.model.visual
    count, height, width, _ = frames.shape
    grid = (count // v.temporal_patch_size, height // v.unit, width // v.unit)
    whole = prod(grid)
    if method is not None and (smaller := method.plan(grid, keep_count(budget, whole))) != grid:
        grid, fewer = smaller, smaller[0] * v.temporal_patch_size
        picked = [int(time) for time in even_times(0, count, fewer)]
        frames = resize(frames[picked], grid[1] * v.unit, grid[2] * v.unit)
        seconds_per_grid *= count / fewer
    patches = patchify(frames, v.image_mean, v.image_std, v.patch_size, v.temporal_patch_size, v.merge_size)
    random, size = torch.Generator().manual_seed(0), loaded.model.config.text_config.vocab_size
    text = torch.randint(size, (TEXT_BEFORE + TEXT_AFTER,), generator=random)
    video = torch.zeros(len(patches) // PATCHES, dtype=torch.int64)
    ids = torch.cat([text[:TEXT_BEFORE], video, text[TEXT_BEFORE:]])
    span = VideoSpan(TEXT_BEFORE, grid, seconds_per_grid)
    positions = prompt_positions(len(ids), [span], visual.config.tokens_per_second)
    patches = patches.to(visual.patch_embed.proj.weight)
    return Clip(patches, grid, seconds_per_grid, ids, positions, int(positions.max()) + 1, whole)


@dataclass(frozen=True)
class Turn:
    """What came of one run: the work it was, seconds of pruning in the tower, and the tokens generated."""

    counts: Counts
    prune: float
    tokens: list[int]


def run_ours(
    loaded: LoadedModel, clip: Clip, method: Method, keep: int, new_tokens: int, seed: int, clock: Clock
) -> Turn:
    """Our own pipeline from patches to new tokens, with `keep` tokens for the language model."""
    model, visual = loaded.model, loaded.model.model.visual
    with clock.stage("encode"):
        embed = model.model.language_model.embed_tokens
        question = embed(clip.ids[-TEXT_AFTER:].to(embed.weight.device)) if method.reads_question else None
        encoded = encode(
            visual, [clip.patches], clip.grid, method, min(keep, clip.units), question=question,
            seconds_per_grid=clip.seconds_per_grid, seed=seed,
        )  # fmt: skip
    with clock.stage("prefill"):
        embeds, columns = embed_prompt(model, clip.ids, encoded.features, TEXT_BEFORE, clip.units, encoded.kept)
        counts = column_counts(encoded.counts, TEXT_BEFORE, len(embeds))
        state = prefill(model, embeds, clip.positions[:, columns], clip.following, counts=counts)
    with clock.stage("generate"):
        tokens = list(stream(model, state, GenerationSettings(new_tokens), eos_ids=()))
    counts = _counts(visual, clip, encoded.layers, len(encoded.rows), len(encoded.kept))
    return Turn(counts, encoded.prune_seconds, tokens)


@torch.inference_mode()
def run_hugging_face(loaded: LoadedModel, reference, clip: Clip, new_tokens: int, clock: Clock) -> Turn:
    """Transformers' own tower, language model and cache, every token read, logits of the last column alone.

    Args:
        reference: the transformers model that shares the weights of `loaded`. Its parts are called
            one by one, without what its `generate` does around them, so that stages can be told apart.
    """
    from transformers import DynamicCache

    text = reference.model.language_model
    device, (time_, rows, columns) = clip.patches.device, clip.grid
    grid_thw = torch.tensor([[time_, 2 * rows, 2 * columns]], device=device)
    # Row 0 says where a column is in the text, the others are the positions in time, height and width.
    positions = torch.cat([torch.arange(len(clip.ids))[None], clip.positions])[:, None].to(device)
    with clock.stage("encode"):
        features = reference.model.visual(clip.patches, grid_thw=grid_thw).pooler_output
    with clock.stage("prefill"):
        embeds = text.embed_tokens(clip.ids.to(device))
        embeds[TEXT_BEFORE : TEXT_BEFORE + clip.units] = features
        cache = DynamicCache(config=reference.config.text_config)
        hidden = text(inputs_embeds=embeds[None], position_ids=positions, past_key_values=cache, use_cache=True)
        logits = reference.lm_head(hidden.last_hidden_state[:, -1])
    with clock.stage("generate"):
        tokens = [int(logits.argmax())]
        while len(tokens) < new_tokens:
            embeds = text.embed_tokens(torch.tensor([tokens[-1:]], device=device))
            position = torch.full((4, 1, 1), clip.following + len(tokens) - 1, device=device)
            position[0] = len(clip.ids) + len(tokens) - 1
            hidden = text(inputs_embeds=embeds, position_ids=position, past_key_values=cache, use_cache=True)
            tokens.append(int(reference.lm_head(hidden.last_hidden_state[:, -1]).argmax()))
    layers = [(layer, clip.units) for layer in range(len(reference.model.visual.blocks))]
    return Turn(_counts(loaded.model.model.visual, clip, layers, clip.units, clip.units), 0.0, tokens)


def _counts(visual, clip: Clip, layers: list[tuple[int, int]], rows: int, tokens: int) -> Counts:
    windows = tower_geometry(visual, *clip.grid[1:]).windows
    flop = tower_flop(visual.config, [*(entered for _, entered in layers), rows], clip.grid[0], windows)
    share = sum(entered for _, entered in layers) / len(layers) / clip.whole
    return Counts(clip.whole, rows, share, tuple(layers), tokens, len(clip.ids) - clip.units + tokens, flop)
