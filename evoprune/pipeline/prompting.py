"""The fourth stage: the language model reads a question about videos and pictures (prefill)."""

from collections.abc import Sequence

from evoprune.errors import names_plugins
from evoprune.language.decoder import KVCache
from evoprune.language.generate import PrefillState, Visual, column_sizes, dropping_for, embed_prompt, prefill
from evoprune.language.positions import VisualSpan, prompt_positions
from evoprune.language.prompt import Prompt
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.options import GenerationOptions
from evoprune.pipeline.question_check import check_context, check_memory, check_question, prompt_about
from evoprune.pipeline.view import View
from evoprune.vision.encoded import Encoded


class PromptReader:
    """Reads prompts about the same inputs, one at a time.

    Attention is causal: keys and values of what precedes the question do not depend on it. So a later question under the same
    system prompt uses them again, and only what follows the inputs, and mostly their subtitles, is read. Where tokens leave inside
    the language model, they leave by the question, and each prompt is read as a whole.
    """

    def __init__(self, engine: Engine, views: Sequence[View]):
        self._engine, self._loaded, self._views = engine, engine.loaded, views
        # The system prompt, the cache, and how many of its columns no question changes.
        self._prefix: tuple[str | None, KVCache, int] | None = None

    def forget(self) -> None:
        """Frees the keys and values of earlier prompts: the next one is about other tokens."""
        self._prefix = None

    def build(self, question: str, options: GenerationOptions, kept: int) -> Prompt:
        """The prompt of a question, with room for all visual tokens of the inputs, of which `kept` will be read.

        Raises:
            UsageError: it does not fit into the model's context. OutOfMemory. ModelError: an unusable chat template.
        """
        check_question(self._loaded, question)
        prompt = prompt_about(self._loaded.tokenizer, self._views, question, options.system)
        check_context(self._loaded, prompt.text_tokens, kept, options.max_new_tokens)
        check_memory(self._engine, prompt.text_tokens, kept)
        return prompt

    @names_plugins()
    def read(self, encoded: Sequence[Encoded], prompt: Prompt, system: str | None) -> PrefillState:
        """The state that decoding starts from.

        Args:
            encoded: the tokens of each input.
            prompt: from `build`. `system`: the prompt's.
        """
        model = self._loaded.model
        positions = prompt_positions(
            len(prompt.input_ids), self._spans(prompt), model.config.vision_config.tokens_per_second
        )
        following = int(positions.max()) + 1
        visuals = [Visual(place, e.features, e.kept, e.size) for place, e in zip(prompt.places, encoded, strict=True)]
        embeds, columns = embed_prompt(model, prompt.input_ids, visuals)
        positions = positions[:, columns]
        sizes = column_sizes(visuals, columns)
        grids = [view.plan.grid for view in self._views]
        if dropping := dropping_for(model, self._engine.method, self._engine.budget, visuals, grids, embeds, columns):
            return prefill(model, embeds, positions, following, sizes=sizes, dropping=dropping)
        shared = prompt.prefix_length - prompt.visual_tokens + sum(len(e.kept) for e in encoded)
        cache, known = self._take_prefix(system, shared)
        sizes = None if sizes is None else sizes[known:]
        state = prefill(model, embeds[known:], positions[:, known:], following, cache, sizes)
        self._prefix = system, state.cache, shared
        return state

    def _spans(self, prompt: Prompt) -> list[VisualSpan]:
        """Where in the prompt each input stands, and its grid."""
        pair = self._loaded.video.temporal_patch_size
        return [
            VisualSpan(place.start, view.plan.grid, view.seconds_per_pair(pair))
            for place, view in zip(prompt.places, self._views, strict=True)
        ]

    def _take_prefix(self, system: str | None, shared: int) -> tuple[KVCache | None, int]:
        """The cache up to the question, and its columns; nothing where there is none for this system prompt.

        Args:
            shared: columns of the new prompt that its question does not change.
        """
        taken, self._prefix = self._prefix, None
        if taken is None or taken[0] != system:
            return None, 0
        _, cache, known = taken
        known = min(known, shared)  # both end with the inputs or with their subtitles
        cache.crop(known)
        self._prefix = system, cache, known  # a prompt that breaks off leaves this much
        return cache, known
