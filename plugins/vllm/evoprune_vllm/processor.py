"""vLLM processor subclasses that insert exactly K placeholders into the prompt for each video.

In models with a timestamp before each frame pair (Qwen3-VL and Qwen3.5), the number of tokens after each timestamp is unknown until
the video has been encoded. Therefore, timestamps and markers are also replaced by placeholders, and the encoder returns their
embeddings. As in vLLM's own pruning, a frame pair keeps its timestamp and markers even if it has no tokens left.

The processors store K and the number of seconds per frame pair along with a video's patches. They don't use the seconds stored by
vLLM because these have the model's dtype. In bfloat16, 0.7 s would become 0.699 s, and positions would be off by one.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLDummyInputsBuilder, Qwen2_5_VLMultiModalProcessor
from vllm.model_executor.models.qwen2_vl import Qwen2VLDummyInputsBuilder, Qwen2VLMultiModalProcessor
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder, Qwen3VLMultiModalProcessor
from vllm.multimodal.inputs import MultiModalFieldConfig

from evoprune.errors import EvopruneError
from evoprune.methods import Grid
from evoprune.model import VisionConfig
from evoprune_vllm.positions import LIMIT, extent
from evoprune_vllm.pruning import BUDGET, request_budget

# Fields added by the processors for each video.
KEEP = "evoprune_keep"
SECONDS = "evoprune_seconds"
END = "<|vision_end|>"
MOST_WORDS = 16  # maximum number of tokens in a timestamp and its markers
FIXED = {
    "patch_size",
    "temporal_patch_size",
    "merge_size",
}  # Hugging Face processor options fixed by the model


def in_units(grids: torch.Tensor, merge: int) -> list[Grid]:
    """Convert Hugging Face grids, int64 `[items, 3]`, from patches to units of `merge` by `merge` patches."""
    return [(t, h // merge, w // merge) for t, h, w in grids.tolist()]


def without_own(options: Mapping) -> dict:
    """Return the options without this package's own options, which are unknown to the Hugging Face processor."""
    return {name: value for name, value in options.items() if name != BUDGET}


class DummyInputs:
    """Mixin for the dummy inputs used by vLLM for memory profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return vLLM's text followed by an end-of-video marker because a prompt must not end with a video."""
        return super().get_dummy_text(mm_counts) + END


class Processor:
    """Mixin for vLLM processors. Invalid request options raise a ValueError, which vLLM shows to the client."""

    def apply(self, inputs, timing_ctx):
        """Run vLLM's processor, and check that the prompt doesn't end with a video.

        Raises:
            ValueError: If the prompt ends with a video. In that case, the positions of generated tokens would be unknown because
                they can't be derived from the last token of a pruned video.
        """
        made = super().apply(inputs, timing_ctx)
        places = made["mm_placeholders"].get("video", [])
        if any(place.offset + place.length == len(made["prompt_token_ids"]) for place in places):
            raise ValueError(f"the prompt ends with a video; write {END} and the rest of the chat template after it")
        return made

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        """Run vLLM's processor, and add K and the number of seconds per frame pair to the result for each video."""
        for options in (hf_kwargs, *(each for each in hf_kwargs.values() if isinstance(each, Mapping))):
            if fixed := sorted(FIXED & set(options)):
                raise ValueError(f"{fixed[0]} is fixed by the model")
        made = super()._apply_hf_processor_main(mm_items, without_own(hf_kwargs))
        if "video_embeds" in made:
            raise ValueError("videos that are encoded already cannot be pruned; send the video itself")
        try:
            config = self.info.ctx.get_mm_config()
            options = config.merge_mm_processor_kwargs(hf_kwargs)
            budget = request_budget(options, config.video_pruning_rate)
        except EvopruneError as problem:
            raise ValueError(f"{problem.message}; {problem.hint}") from problem
        if "video_grid_thw" in made:
            sizes = VisionConfig.of(self.info.get_hf_config().vision_config)
            grids = in_units(made["video_grid_thw"], sizes.spatial_merge_size)
            known = self._get_hf_mm_inputs(mm_items, without_own(hf_kwargs))[0].get("video_metadata")
            seconds = self._seconds(sizes, known or [None] * len(grids), grids)
            kept = [budget.keep(grid) for grid in grids]
            made[KEEP] = torch.tensor(kept, dtype=torch.int64, device="cpu")
            made[SECONDS] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        return made

    def _seconds(self, sizes: VisionConfig, known: list, grids: list[Grid]) -> list[float]:
        """Return the number of seconds per frame pair for each video.

        This is 1.0 if the model's positions don't depend on time, or if the video's frame rate is unknown.

        Raises:
            ValueError: If a video requires more positions than the model supports.
        """
        text = self.info.get_hf_config().get_text_config()
        found = []
        most = min(LIMIT, 4 * text.max_position_embeddings)  # the number of rotary positions computed by vLLM
        for grid, video in zip(grids, known, strict=True):
            seconds = 1.0
            if sizes.tokens_per_second and video is not None and video.sampled_fps:
                seconds = sizes.temporal_patch_size / video.sampled_fps
            if self._extent(grid, seconds, sizes.tokens_per_second) >= most:
                raise ValueError(f"a video of {grid[0] * seconds:,.0f} s has more than the model's {most:,} positions")
            found.append(seconds)
        return found

    _extent = staticmethod(extent)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return stock | {name: MultiModalFieldConfig.batched("video", keep_on_cpu=True) for name in (KEEP, SECONDS)}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        stock = super()._get_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)

        def pruned(update):
            if update.modality != "video":
                return update

            def placeholders(item: int):
                return self._placeholders(update, item, int(out_mm_kwargs["video"][item][KEEP].data))

            return replace(update, replacement=placeholders)

        return [pruned(update) for update in stock]

    def _placeholders(self, update, item: int, keep: int):
        return update.target * keep


class TimedProcessor(Processor):
    """Mixin for processors of model families with a timestamp before each frame pair."""

    def _placeholders(self, update, item: int, keep: int):
        stock = update.replacement(item)
        token = self.info.get_hf_config().video_token_id
        if not self.info.ctx.get_mm_config().is_multimodal_pruning_enabled():
            return stock
        return [token] * (keep + sum(each != token for each in stock.full))

    @staticmethod
    def _extent(grid: Grid, *_) -> int:
        return grid[0] * (MOST_WORDS + max(grid[1:]))


class DummyInputs25(DummyInputs, Qwen2_5_VLDummyInputsBuilder):
    """Dummy inputs for Qwen2.5-VL."""


class DummyInputs2(DummyInputs, Qwen2VLDummyInputsBuilder):
    """Dummy inputs for Qwen2-VL."""


class Processor25(Processor, Qwen2_5_VLMultiModalProcessor):
    """The processor for Qwen2.5-VL."""


class Processor2(Processor, Qwen2VLMultiModalProcessor):
    """The processor for Qwen2-VL."""


class DummyInputs3(DummyInputs, Qwen3VLDummyInputsBuilder):
    """Dummy inputs for Qwen3-VL and Qwen3.5."""


class Processor3(TimedProcessor, Qwen3VLMultiModalProcessor):
    """The processor for Qwen3-VL and Qwen3.5."""
