"""One turn of a benchmark, stage by stage: evoprune, and plain Hugging Face transformers."""

from dataclasses import replace
from typing import NamedTuple

import torch

from evoprune.backend.devices import peak_memory, reset_peak_memory
from evoprune.bench.profiling.clips import TEXT_AFTER, Clip
from evoprune.bench.profiling.results import Counts, Sample
from evoprune.language import generate
from evoprune.methods.chain import Pipeline
from evoprune.methods.plans import EncoderPlan, share_of
from evoprune.methods.types import ascending
from evoprune.model.cost import Clock, tower_flop
from evoprune.session.loading.model import LoadedModel
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import Patches
from evoprune.vision.tower import tower_geometry


class Turn(NamedTuple):
    """What one run counted and measured, and the tokens that it generated."""

    counts: Counts
    sample: Sample
    tokens: list[int]


def run_evoprune(
    loaded: LoadedModel, clip: Clip, plan: EncoderPlan, method: Pipeline, budget: float, new_tokens: int, seed: int
) -> Turn:
    """evoprune from patches to new tokens; as many visual tokens as `plan` keeps reach the language model."""
    model, visual = loaded.model, loaded.model.model.visual
    clock = _start(loaded)
    with clock.stage("encode"):
        embed = model.model.language_model.embed_tokens
        question = embed(clip.ids[-TEXT_AFTER:].to(embed.weight.device)) if method.reads_question else None
        encoded = encode(visual, [Patches(clip.pixels, *loaded.video.normal)], plan, question=question, seed=seed)
    with clock.stage("prefill"):
        visuals = [generate.Visual(clip.place, encoded.features, encoded.kept, encoded.size, encoded.deepstack)]
        embeds, columns = generate.embed_prompt(model, clip.ids, visuals)
        sizes = generate.column_sizes(visuals, columns)
        deepstack = generate.column_deepstack(visuals, columns, embeds)
        share = share_of(budget, [clip.grid])
        dropping = generate.dropping_for(model, method, share, visuals, [clip.grid], embeds, columns)
        positions = clip.positions[:, columns]
        state = generate.prefill(model, embeds, positions, clip.following, None, sizes, dropping, deepstack)
    with clock.stage("generate"):
        tokens = list(generate.TokenStream(model, state, generate.GenerationOptions(new_tokens), eos_ids=()))
    counts = _counts(visual, clip, encoded.layers, len(encoded.rows), len(encoded.kept), len(columns))
    sample = _sample(loaded, clock, encoded.prune_seconds, dropping.timer.seconds() if dropping else 0.0)
    if dropping:
        work = dropping.work and tuple((layer, *each) for layer, each in enumerate(dropping.work))
        counts = replace(counts, language_layers=tuple(enumerate(dropping.layers)), language_work=work)
    return Turn(counts, sample, tokens)


@torch.inference_mode()
def run_hugging_face(loaded: LoadedModel, reference, clip: Clip, new_tokens: int) -> Turn:
    """The tower, language model and cache of transformers' `reference`, one by one; logits are of the last token alone."""
    from transformers import DynamicCache

    clock, text = _start(loaded), reference.model.language_model
    device, (time_, rows, columns) = clip.patches.device, clip.grid
    grid_thw = torch.tensor([[time_, 2 * rows, 2 * columns]], dtype=torch.int64, device=device)
    # Row 0 is the place in the text; the others are the positions in time, height and width.
    positions = torch.cat([ascending(len(clip.ids), "cpu")[None], clip.positions])[:, None].to(device)
    with clock.stage("encode"):
        made = reference.model.visual(clip.patches, grid_thw=grid_thw)
    with clock.stage("prefill"):
        embeds = text.embed_tokens(clip.ids.to(device))
        video = clip.place.columns.to(device)
        embeds[video], inner = made.pooler_output, {}
        if getattr(made, "deepstack_features", None):
            mask = torch.zeros_like(positions[0], dtype=torch.bool).index_fill_(1, video, True)
            inner = {"visual_pos_masks": mask, "deepstack_visual_embeds": made.deepstack_features}
        cache = DynamicCache(config=reference.config.text_config)
        given = {"inputs_embeds": embeds[None], "position_ids": positions, **inner}
        hidden = text(**given, past_key_values=cache, use_cache=True)
        logits = reference.lm_head(hidden.last_hidden_state[:, -1])
    with clock.stage("generate"):
        tokens = [int(logits.argmax())]
        while len(tokens) < new_tokens:
            embeds = text.embed_tokens(torch.tensor([tokens[-1:]], dtype=torch.int64, device=device))
            position = torch.full((4, 1, 1), clip.following + len(tokens) - 1, dtype=torch.int64, device=device)
            position[0] = len(clip.ids) + len(tokens) - 1
            hidden = text(inputs_embeds=embeds, position_ids=position, past_key_values=cache, use_cache=True)
            tokens.append(int(reference.lm_head(hidden.last_hidden_state[:, -1]).argmax()))
    layers = [(layer, clip.units) for layer in range(len(reference.model.visual.blocks))]
    counts = _counts(loaded.model.model.visual, clip, layers, clip.units, clip.units, len(clip.ids))
    return Turn(counts, _sample(loaded, clock), tokens)


def _start(loaded: LoadedModel) -> Clock:
    reset_peak_memory(loaded.device)
    return Clock(torch.device(loaded.device))


def _sample(loaded: LoadedModel, clock: Clock, prune: float = 0.0, prefill_prune: float = 0.0) -> Sample:
    s = clock.seconds
    return Sample(s["encode"], prune, s["prefill"], s["generate"], peak_memory(loaded.device), prefill_prune)


def _counts(visual, clip: Clip, layers: list[tuple[int, int]], rows: int, tokens: int, prompt: int) -> Counts:
    windows = tower_geometry(visual, *clip.grid[1:]).windows
    flop = tower_flop(visual.config, [*(entered for _, entered in layers), rows], clip.grid[0], windows)
    share = sum(entered for _, entered in layers) / len(layers) / clip.unpruned
    return Counts(clip.unpruned, rows, share, tuple(layers), tokens, prompt, flop)
