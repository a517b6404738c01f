"""Compile the language model's kernels and initialize its libraries before the first question."""

from math import prod

import torch

from evoprune.language import hybrid, static
from evoprune.language.answer import TokenStream
from evoprune.language.generate import LanguageModel
from evoprune.language.prompt import Place
from evoprune.language.pruned import prune_prompt
from evoprune.language.settings import GenerationOptions
from evoprune.methods import arange_on
from evoprune.model import QwenVL, head_size
from evoprune.vision import Encoded


def warm_up(model: QwenVL, encoded: Encoded, native: bool) -> None:
    """Warm up the GPU by answering a question with a small model, including a decoding step in a static cache.

    Args:
        model: A small model with random weights and the same layer widths as the model being loaded.
        encoded: The encoded input for the question.
        native: Whether evoprune's own code will run the language model being loaded. If transformers will run it, no question is
            answered. Instead, only the norms and the DeltaNet solver are run, because the solver has its own library.
    """
    if not native:
        _warm_up_hybrid(model)
        return
    language = LanguageModel(model)
    words = 8
    units = prod(encoded.grids[0])
    place = Place((range(words, words + units),))
    ids = torch.zeros(2 * words + units, dtype=torch.int64, device="cpu")
    positions = arange_on(len(ids), "cpu").expand(3, -1)
    prompt = prune_prompt(ids, [place], [encoded], positions, language.embed)
    state = language.prefill(prompt.embeds, prompt.positions, len(ids), None, prompt.sizes, None, prompt.deepstack)
    list(TokenStream(state, GenerationOptions(max_new_tokens=2), eos_ids=()))
    steps = static.new_cache(model, static.MIN_COLUMNS)
    steps.fill(state.cache, len(ids) + 1, static.MIN_COLUMNS)
    static.step(model, steps)


def _warm_up_hybrid(model: QwenVL) -> None:
    text = model.config.text_config
    like = model.model.language_model.norm.weight
    x, of_head = (like.new_zeros(2, wide) for wide in (text.hidden_size, head_size(text)))
    for rows, plus in ((x, None), (x, x), (of_head, None)):
        hybrid.add_norm(rows, plus, rows[0].float(), text.rms_norm_eps)
    if text.delta_net:
        chunks = like.new_zeros(16, hybrid.CHUNK, hybrid.CHUNK, dtype=torch.float32)
        # Load the solver library
        torch.linalg.solve_triangular(chunks, chunks, upper=False, unitriangular=True)
