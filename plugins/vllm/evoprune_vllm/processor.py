"""vLLM's processor of Qwen2.5-VL and Qwen2-VL, which puts exactly K placeholders into the prompt for each video.

It also writes K and the seconds per pair of each video beside its patches. vLLM's own seconds have the model's dtype: in bfloat16,
0.7 s would be 0.699, and positions would be off by one.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLDummyInputsBuilder, Qwen2_5_VLMultiModalProcessor
from vllm.model_executor.models.qwen2_vl import Qwen2VLDummyInputsBuilder, Qwen2VLMultiModalProcessor
from vllm.multimodal.inputs import MultiModalFieldConfig

from evoprune.errors import EvopruneError
from evoprune.methods.plans import Grid, keep_tokens
from evoprune.model.config import VisionConfig, vision_sizes
from evoprune_vllm.positions import LIMIT, extent
from evoprune_vllm.pruning import BUDGET, request_budget

KEEP, SECONDS = "evoprune_keep", "evoprune_seconds"  # fields of each video, beside those of vLLM
END = "<|vision_end|>"


def in_units(grids: torch.Tensor, merge: int) -> list[Grid]:
    """Grids of Hugging Face, int64 `[items, 3]`, in units of `merge` by `merge` patches."""
    return [(t, h // merge, w // merge) for t, h, w in grids.tolist()]


def without_own(options: Mapping) -> dict:
    """The options that are the Hugging Face processor's."""
    return {name: value for name, value in options.items() if name != BUDGET}


class DummyInputs:
    """Inputs with which vLLM measures memory; mixed into vLLM's class."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """vLLM's text, with the end of a video, which prompts need here."""
        return super().get_dummy_text(mm_counts) + END


class Processor:
    """Mixed into vLLM's class. A request with a bad option is refused with ValueError, which clients see."""

    def apply(self, inputs, timing_ctx):
        """The prompt with placeholders. Refused if it ends with a video: what follows starts at the video's end, unless pruned."""
        made = super().apply(inputs, timing_ctx)
        places = made["mm_placeholders"].get("video", [])
        if any(place.offset + place.length == len(made["prompt_token_ids"]) for place in places):
            raise ValueError(f"the prompt ends with a video; write {END} and the rest of the chat template behind it")
        return made

    def _call_hf_processor(self, hf_data, hf_kwargs):
        return super()._call_hf_processor(hf_data, without_own(hf_kwargs))

    def _postprocess_hf_mm_data(self, mm_inputs, hf_processor_mm_kwargs, processed_data):
        made = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if "video_embeds" in made:
            raise ValueError("videos that are encoded already cannot be pruned; send the video itself")
        try:
            config = self.info.ctx.get_mm_config()
            options = config.merge_mm_processor_kwargs(hf_processor_mm_kwargs)
            budget = request_budget(options, config.video_pruning_rate)
        except EvopruneError as problem:
            raise ValueError(f"{problem.message}; {problem.hint}") from problem
        if "video_grid_thw" in made:
            sizes = vision_sizes(self.info.get_hf_config().vision_config)
            grids = in_units(made["video_grid_thw"], sizes.spatial_merge_size)
            seconds = self._seconds(sizes, mm_inputs.get("video_metadata") or [None] * len(grids), grids)
            kept = [keep_tokens(budget, grid) for grid in grids]
            made[KEEP] = torch.tensor(kept, dtype=torch.int64, device="cpu")
            made[SECONDS] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        return made

    def _seconds(self, sizes: VisionConfig, known: list, grids: list[Grid]) -> list[float]:
        """Seconds per pair of each video; 1 for a model without a clock, or a video without a frame rate.

        Raises ValueError: a video lasts longer than the model has positions.
        """
        text, found = self.info.get_hf_config().get_text_config(), []
        most = min(LIMIT, 4 * text.max_position_embeddings)  # as many rotary positions as vLLM computes
        for grid, video in zip(grids, known, strict=True):
            rate = None if video is None else video.sampled_fps
            seconds = sizes.temporal_patch_size / rate if rate and sizes.tokens_per_second else 1.0
            if extent(grid, seconds, sizes.tokens_per_second) >= most:
                raise ValueError(f"a video of {grid[0] * seconds:,.0f} s has more than the model's {most:,} positions")
            found.append(seconds)
        return found

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        stock = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return stock | {name: MultiModalFieldConfig.batched("video", keep_on_cpu=True) for name in (KEEP, SECONDS)}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        stock = super()._get_prompt_updates(mm_items, without_own(hf_processor_mm_kwargs), out_mm_kwargs)

        def pruned(update):
            def placeholders(item: int) -> list[int]:
                return update.target * int(out_mm_kwargs["video"][item][KEEP].data)

            return replace(update, replacement=placeholders)

        return [pruned(update) if update.modality == "video" else update for update in stock]


class DummyInputs25(DummyInputs, Qwen2_5_VLDummyInputsBuilder):
    """Of Qwen2.5-VL."""


class DummyInputs2(DummyInputs, Qwen2VLDummyInputsBuilder):
    """Of Qwen2-VL."""


class Processor25(Processor, Qwen2_5_VLMultiModalProcessor):
    """Of Qwen2.5-VL."""


class Processor2(Processor, Qwen2VLMultiModalProcessor):
    """Of Qwen2-VL."""
