"""The fourth stage: the language model reads a question about a video (prefill)."""

from evoprune.language.decoder import KVCache
from evoprune.language.generate import PrefillState, column_sizes, embed_prompt, prefill
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.language.prompt import Prompt, build_prompt
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.pipeline.options import GenerationOptions
from evoprune.pipeline.question_check import check_context, check_memory, check_question
from evoprune.pipeline.view import View
from evoprune.vision.encoded import Encoded


class PromptReader:
    """Reads prompts about one video, one at a time.

    Attention is causal: keys and values of what precedes the question do not depend on it. So a later question under the same
    system prompt uses them again, and only what follows the video, and mostly its subtitles, is read.
    """

    def __init__(self, loaded: LoadedModel, view: View):
        self._loaded, self._grid, self._units = loaded, view.plan.grid, view.encoder.units
        self._subtitles = view.subtitles.text
        self._seconds = view.seconds_per_pair(loaded.video.temporal_patch_size)
        # The system prompt, the cache, and how many of its columns no question changes.
        self._prefix: tuple[str | None, KVCache, int] | None = None

    def forget(self) -> None:
        """Frees the keys and values of earlier prompts: the next one is about other tokens."""
        self._prefix = None

    def build(self, question: str, options: GenerationOptions, kept: int) -> Prompt:
        """The prompt of a question, with room for all visual tokens of the video, of which `kept` will be read.

        Raises:
            UsageError: it does not fit into the model's context. OutOfMemory. ModelError: an unusable chat template.
        """
        check_question(self._loaded, question)
        prompt = build_prompt(
            self._loaded.tokenizer, question, self._units, system=options.system, subtitles=self._subtitles
        )
        check_context(self._loaded, prompt.text_tokens, kept, options.max_new_tokens)
        check_memory(self._loaded, prompt.text_tokens, kept)
        return prompt

    def read(self, encoded: Encoded, prompt: Prompt, system: str | None) -> PrefillState:
        """The state that decoding starts from. `system` is the prompt's."""
        model, units = self._loaded.model, prompt.visual_tokens
        span = VideoSpan(prompt.video_start, self._grid, self._seconds)
        positions = prompt_positions(len(prompt.input_ids), [span], model.config.vision_config.tokens_per_second)
        following = int(positions.max()) + 1
        embeds, columns = embed_prompt(
            model, prompt.input_ids, encoded.features, prompt.video_start, units, encoded.kept
        )
        positions = positions[:, columns]
        sizes = column_sizes(encoded.size, prompt.video_start, len(embeds))
        shared = prompt.prefix_length - units + len(encoded.kept)
        cache, known = self._take_prefix(system, shared)
        sizes = None if sizes is None else sizes[known:]
        state = prefill(model, embeds[known:], positions[:, known:], following, cache, sizes)
        self._prefix = system, state.cache, shared
        return state

    def _take_prefix(self, system: str | None, shared: int) -> tuple[KVCache | None, int]:
        """The cache up to the question, and its columns; nothing where there is none for this system prompt.

        Args:
            shared: columns of the new prompt that its question does not change.
        """
        if self._prefix is None or self._prefix[0] != system:
            self._prefix = None  # frees its memory before the next one is made
            return None, 0
        _, cache, known = self._prefix
        known = min(known, shared)  # both end with the video or with its subtitles
        cache.crop(known)
        return cache, known
