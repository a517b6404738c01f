"""What a GPU's first question would wait for is begun while weights and frames are read: kernels compiled, libraries set up.

A model of one layer with the same widths answers about a few units, in a thread of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from evoprune.backend.devices import run_beside
from evoprune.backend.layers import join, join_tower
from evoprune.language.generate import TokenStream, Visual, column_deepstack, column_sizes, embed_prompt, prefill
from evoprune.language.prompt import Place
from evoprune.language.settings import GenerationOptions
from evoprune.methods.registry import parse
from evoprune.model.config import PATCHES, Config
from evoprune.session.loading.weights import random_model
from evoprune.vision.encoder import encode
from evoprune.vision.tower import tower_shape

GRID, KEEP, WORDS = (2, 8, 8), 32, 8


def warm_up(config: Config, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Begins on CUDA. Returns what waits until it is done; it does nothing else, and raises nothing."""
    return run_beside(partial(_answer, config, dtype, device), device)


def _answer(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    vision, text = config.vision_config, config.text_config
    full = (0,) if vision.fullatt_block_indexes else ()
    small = replace(
        config,
        vision_config=replace(vision, depth=2, fullatt_block_indexes=full, deepstack_visual_indexes=()),
        text_config=replace(text, num_hidden_layers=1, vocab_size=1024),
    )
    model = random_model(small, dtype, device)
    join(model)
    join_tower(model.model.visual)
    visual, (pairs, height, width) = model.model.visual, GRID
    units = pairs * height * width
    values = visual.patch_embed.proj.weight[0].numel()
    pixels = torch.randint(256, (units * PATCHES, values), dtype=torch.uint8, device=device)
    plan = parse("evoprune").plan(tower_shape(visual), GRID, KEEP)
    encoded = encode(visual, [pixels], plan)
    place = Place((range(WORDS, WORDS + units),))
    visuals = [Visual(place, encoded.features, encoded.kept, encoded.size, encoded.deepstack)]
    ids = torch.zeros(2 * WORDS + units, dtype=torch.int64, device="cpu")
    embeds, columns = embed_prompt(model, ids, visuals)
    deepstack = column_deepstack(visuals, columns, embeds)
    state = prefill(
        model, embeds, columns.expand(3, -1), len(ids), None, column_sizes(visuals, columns), None, deepstack
    )
    list(TokenStream(model, state, GenerationOptions(max_new_tokens=2), eos_ids=()))
