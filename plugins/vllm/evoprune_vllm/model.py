"""vLLM models with evoprune's vision encoder in place of vLLM's.

vLLM's own vision tower is never created, so the tower weights are in memory only once. With tensor parallelism, the first process
in each group encodes for the whole group, because processes with results that differ in the last bit could select different tokens.
"""

from collections.abc import Iterable, Iterator
from functools import cache, wraps
from math import prod

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessingInfo
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration, Qwen2VLProcessingInfo
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3LLMForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3MoeLLMForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.model_executor.models.utils import StageMissingLayer, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

from evoprune.backend import Packing
from evoprune.errors import ModelError, UsageError
from evoprune.language import video_positions
from evoprune.model import Tower, VisionConfig
from evoprune_vllm.attention import add_bias
from evoprune_vllm.positions import (
    COLUMNS,
    extent,
    from_columns,
    generated_offset,
    known_positions,
    with_videos,
)
from evoprune_vllm.processor import (
    KEEP,
    SECONDS,
    DummyInputs2,
    DummyInputs3,
    DummyInputs25,
    Processor2,
    Processor3,
    Processor25,
    in_units,
)
from evoprune_vllm.pruning import (
    encoded,
    normalisation,
    request_budget,
    served_method,
    tokens_of,
    try_out,
    with_columns,
)

logger = init_logger("vllm.evoprune")

PICTURE = "image_grid_thw"
VIDEO = "video_grid_thw"
# For each input field, the field with its grids.
GRIDS = {"image_embeds": PICTURE, "pixel_values": PICTURE, "pixel_values_videos": VIDEO}
OF_MODALITY = {"image": PICTURE, "video": VIDEO}


class _Pruned(SupportsMultiModalPruning):
    """Mixin that adds evoprune's pruning to vLLM models.

    Raises:
        UsageError: If the method can't be used in vLLM, or a vLLM option is incompatible.
        ModelError: If the tower's output contains NaN.
        PluginError: If a third-party method doesn't behave as declared.
    """

    supported_video_pruning_methods = ("evs",)  # vLLM's default; evoprune's method is in --additional-config
    supports_encoder_tp_data = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        model_config = vllm_config.model_config
        multimodal = model_config.get_multimodal_config()
        self.config = model_config.hf_config
        self.model_config = model_config
        self.multimodal_config = multimodal
        self.vllm_config = vllm_config
        self.is_multimodal_pruning_enabled = multimodal.is_multimodal_pruning_enabled()
        self.method = served_method(vllm_config.additional_config)
        self.sizes = VisionConfig.of(self.config.vision_config)
        _check(self.sizes, vllm_config)
        self.wide = self.config.get_text_config().hidden_size * (1 + len(self.sizes.deepstack_visual_indexes))
        self.normal = normalisation(*_load_norm_params(model_config))
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            if get_tp_group().rank_in_group:
                self.visual = StageMissingLayer("vision_tower")
            else:  # uninitialized because vLLM's loader fills it, and random values would take seconds
                device = torch.get_default_device()
                with torch.device("meta"):
                    tower = Tower(self.sizes)
                self.visual = tower.to_empty(device=device).eval().requires_grad_(False)
        with self._mark_language_model(vllm_config):
            self.language_model = self._language(vllm_config, maybe_prefix(prefix, "language_model"))
        if self.is_multimodal_pruning_enabled and self.method.weighs:
            add_bias(self.language_model.model.layers, vllm_config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        if current_platform.is_cpu():
            _let_cpu_runner_prune()
        budget = request_budget({}, multimodal.video_pruning_rate)
        logger.info("videos are encoded by evoprune: method %s, budget %g", self.method.name, budget.video)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights as vLLM does, then pack the tower's linear layers if this speeds up products on the CPU."""
        loaded = super().load_weights(weights)
        if isinstance(self.visual, Tower):
            Packing.now(self.visual)
            if self.is_multimodal_pruning_enabled:
                try_out(self.visual, self.method)
        return loaded

    def embed_multimodal(self, **inputs) -> tuple[torch.Tensor, ...]:
        """Encode images and videos, and return a feature tensor for each input, `[tokens, hidden]`.

        Features of pruned videos have `positions.COLUMNS` additional columns.
        """
        with gpu_sync_allowed():  # the encoder copies the indices of selected rows to the host
            return tuple(self._features(inputs))

    def _language(self, config: VllmConfig, prefix: str) -> nn.Module:
        return init_vllm_registered_model(vllm_config=config, prefix=prefix, architectures=["Qwen2ForCausalLM"])

    def _features(self, inputs: dict) -> Iterator[torch.Tensor]:
        group = get_tp_group()
        dtype = self.model_config.dtype
        for name in inputs:
            if name not in GRIDS:
                continue
            video = GRIDS[name] == VIDEO
            grids = in_units(inputs[GRIDS[name]], self.sizes.spatial_merge_size)
            units = [prod(grid) for grid in grids]
            if name == "image_embeds":
                yield from inputs[name].to(dtype).split(units)
                continue
            kept = units
            seconds = [1.0] * len(units)
            times = [()] * len(units)
            if video:
                kept = inputs[KEEP].tolist()
                seconds = inputs[SECONDS].tolist()
            placed = video and self.is_multimodal_pruning_enabled
            if placed:
                times = inputs.get("timestamps", times)
            pieces = inputs[name].split([count * self.sizes.spatial_merge_size**2 for count in units])
            for patches, grid, keep, step, own in zip(pieces, grids, kept, seconds, times, strict=True):
                words = [self._words(float(time)) for time in own]
                text = self._text(words, patches.device)
                if group.rank_in_group:
                    rows = keep
                    columns = self.wide
                    if text is not None:
                        rows += len(text)
                    if placed:
                        columns += COLUMNS
                    made = torch.empty(rows, columns, dtype=dtype, device=group.device)
                else:
                    given = patches if patches.dtype == torch.uint8 else patches.float()
                    found = encoded(self.visual, given, grid, keep, self.method, self.normal)
                    if placed:
                        made = with_columns(found, step, self.sizes.tokens_per_second, [*map(len, words)], text)
                    else:
                        made = tokens_of(found)
                yield group.broadcast(made.contiguous())

    def _words(self, time: float) -> list[int]:
        """Return the token IDs of the timestamp and start marker that precede the visual tokens of a frame pair."""
        written = self.tokenizer.encode(f"<{time:.1f} seconds>", add_special_tokens=False)
        return [*written, self.config.vision_start_token_id]

    def _text(self, words: list[list[int]], device: torch.device) -> torch.Tensor | None:
        """Return the embeddings of all timestamps and markers, `[n, hidden]`, or None if there are no timestamps.

        All processes of a tensor-parallel group must call this, because each process computes a part of the embeddings.
        """
        if not words:
            return None
        ids = [word for before in words for word in (*before, self.config.vision_end_token_id)]
        return self.language_model.embed_input_ids(torch.tensor(ids, dtype=torch.int64, device=device))

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """Compute the prompt positions known before the videos are encoded. See `positions.known_positions`."""
        items = []
        clock = self.sizes.tokens_per_second
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            place = feature.mm_position
            name = OF_MODALITY[feature.modality]
            (grid,) = in_units(feature.data[name].data[None], self.sizes.spatial_merge_size)
            if "timestamps" in feature.data:
                words = place.length - int(feature.data[KEEP].data)
                items.append((place.offset, place.length, words + grid[0] * max(grid[1:]), None))
                continue
            seconds = 1.0
            if name == VIDEO:
                seconds = float(feature.data[SECONDS].data)
            known = None
            if place.length == prod(grid):
                known = video_positions(grid, seconds, clock)
            items.append((place.offset, place.length, extent(grid, seconds, clock), known))
        return known_positions(len(input_tokens), items)

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        """Fill in the positions of pruned videos, which arrive in the extra feature columns.

        Args:
            multimodal_embeddings: Image and video features, starting with the first input not computed yet.
            mrope_positions: int64 `[3, prompt]`.

        Returns:
            The features without the extra columns, the prompt positions, and the position offset of generated tokens.
        """
        wide = self.wide
        videos = [each[:, wide:] for each in multimodal_embeddings if each.shape[1] > wide]
        with gpu_sync_allowed():
            if videos:
                columns = torch.cat(videos).to(mrope_positions.device)
                ids = torch.as_tensor(input_ids, dtype=torch.int64, device=mrope_positions.device)
                places = (ids[num_computed_tokens:] == self.config.video_token_id).nonzero()[:, 0] + num_computed_tokens
                mrope_positions = with_videos(mrope_positions, places[: len(columns)], from_columns(columns))
            features = [each[:, :wide] for each in multimodal_embeddings]
            return features, mrope_positions, generated_offset(mrope_positions)

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """Disable CUDA graphs for the encoder because its amount of work depends on the video."""
        return EncoderCudaGraphConfig(modalities=[], buffer_keys=[], out_hidden_size=self.wide, max_frames_per_video=1)


class _Timed(_Pruned):
    """Mixin for model families with a timestamp before each frame pair. Attributes have the same names as in vLLM models."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.tokenizer = cached_tokenizer_from_config(self.model_config)
        text = self.config.get_text_config()
        levels = len(self.sizes.deepstack_visual_indexes)
        self.use_deepstack = levels > 0
        self.deepstack_num_level = levels
        self.visual_dim = text.hidden_size
        self.multiscale_dim = levels * text.hidden_size
        room = vllm_config.scheduler_config.max_num_batched_tokens, text.hidden_size
        dtype = self.model_config.dtype
        device = torch.get_default_device()
        self.deepstack_input_embeds = [torch.zeros(room, dtype=dtype, device=device) for _ in range(levels)]
        self.deepstack_input_embeds_num_tokens = 0

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """Return the positions of a prompt.

        Without pruning, timestamps and markers need no placeholders, so vLLM computes the positions.
        """
        if self.is_multimodal_pruning_enabled:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        return super(_Pruned, self).get_mrope_input_positions(input_tokens, mm_features)


def _check(sizes: VisionConfig, config: VllmConfig) -> None:
    """Raise ModelError if the vision tower isn't supported, or UsageError if a vLLM option isn't supported."""
    try:
        sizes.check()
    except ValueError as problem:
        what = f"the vision tower of this model cannot be run: {problem}"
        raise ModelError(what, "serve it without evoprune") from problem
    if config.model_config.dtype == torch.float16:
        raise UsageError("the vision tower of Qwen overflows in float16", "start with --dtype bfloat16 or float32")
    if config.parallel_config.pipeline_parallel_size > 1:
        hint = "start with --tensor-parallel-size instead"
        raise UsageError("only the first stage of a pipeline learns the positions of pruned videos", hint)
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        hint = "leave it out, or use the method ngram"
        raise UsageError(f"speculative decoding with {speculative.method} was not tested with pruned videos", hint)


@cache
def _let_cpu_runner_prune() -> None:
    """Patch vLLM's CPU runner so that it knows whether a model from this module prunes.

    The GPU runner reads this from the model after loading. The CPU runner in vLLM 0.32 and 0.33 loads models differently and
    doesn't read it, so even vLLM's own pruning fails on the CPU.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.initialize_kv_cache

    @wraps(stock)
    def initialize_kv_cache(runner, *args, **options):
        if isinstance(runner.model, _Pruned):
            runner.is_multimodal_pruning_enabled = runner.model.is_multimodal_pruning_enabled
        return stock(runner, *args, **options)

    CPUModelRunner.initialize_kv_cache = initialize_kv_cache


@MULTIMODAL_REGISTRY.register_processor(Processor25, info=Qwen2_5_VLProcessingInfo, dummy_inputs=DummyInputs25)
class EvoPruneQwen2_5_VLForConditionalGeneration(_Pruned, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with evoprune's vision encoder."""


@MULTIMODAL_REGISTRY.register_processor(Processor2, info=Qwen2VLProcessingInfo, dummy_inputs=DummyInputs2)
class EvoPruneQwen2VLForConditionalGeneration(_Pruned, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with evoprune's vision encoder."""


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3VLProcessingInfo, dummy_inputs=DummyInputs3)
class EvoPruneQwen3VLForConditionalGeneration(_Timed, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with evoprune's vision encoder."""

    def _language(self, config: VllmConfig, prefix: str) -> nn.Module:
        text = config.with_hf_config(self.config.text_config, architectures=["Qwen3ForCausalLM"])
        return Qwen3LLMForCausalLM(vllm_config=text, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3VLMoeProcessingInfo, dummy_inputs=DummyInputs3)
class EvoPruneQwen3VLMoeForConditionalGeneration(_Timed, Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL mixture-of-experts (MoE) models with evoprune's vision encoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.packed_modules_mapping = self.packed_modules_mapping | self.language_model.packed_modules_mapping
        self.set_moe_parameters()

    def _language(self, config: VllmConfig, prefix: str) -> nn.Module:
        text = config.with_hf_config(self.config.text_config, architectures=["Qwen3MoeForCausalLM"])
        return Qwen3MoeLLMForCausalLM(vllm_config=text, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3_5ProcessingInfo, dummy_inputs=DummyInputs3)
class EvoPruneQwen3_5ForConditionalGeneration(_Timed, Qwen3_5ForConditionalGeneration):  # noqa: N801
    """Qwen3.5 with evoprune's vision encoder."""

    def _language(self, config: VllmConfig, prefix: str) -> nn.Module:
        return Qwen3_5ForCausalLM(vllm_config=config, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(Processor3, info=Qwen3_5MoeProcessingInfo, dummy_inputs=DummyInputs3)
class EvoPruneQwen3_5MoeForConditionalGeneration(_Timed, Qwen3_5MoeForConditionalGeneration):  # noqa: N801
    """Qwen3.5 mixture-of-experts (MoE) models with evoprune's vision encoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.set_moe_parameters()

    def _language(self, config: VllmConfig, prefix: str) -> nn.Module:
        return Qwen3_5MoeForCausalLM(vllm_config=config, prefix=prefix)
