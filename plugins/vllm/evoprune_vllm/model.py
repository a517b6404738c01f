"""Qwen2.5-VL and Qwen2-VL of vLLM with this project's vision encoder.

vLLM's own tower is not made, so its weights are in memory once. With tensor parallelism, the first process of a group encodes for
all: two processes could select different tokens, if their numbers differed in the last bit.
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
from vllm.model_executor.models.utils import StageMissingLayer, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

from evoprune.cpu.linear import pack
from evoprune.errors import ModelError, UsageError
from evoprune.language.prompt import VisualSpan
from evoprune.model.config import VisionConfig, check_vision, vision_sizes
from evoprune.model.weights import Tower
from evoprune_vllm.attention import add_bias
from evoprune_vllm.positions import COLUMNS, from_columns, generated_offset, known_positions, with_videos
from evoprune_vllm.processor import KEEP, SECONDS, DummyInputs2, DummyInputs25, Processor2, Processor25, in_units
from evoprune_vllm.pruning import encoded, normalisation, request_budget, served_method, try_out, with_columns

logger = init_logger("vllm.evoprune")

PICTURE, VIDEO = "image_grid_thw", "video_grid_thw"


class _Pruned(SupportsMultiModalPruning):
    """Mixed into vLLM's models.

    Raises:
        UsageError: a method that cannot work here, or an option of vLLM that cannot go with it.
        ModelError: the tower computes NaN. PluginError: a method of another package does not keep what it declares.
    """

    supports_encoder_tp_data = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        model_config = vllm_config.model_config
        multimodal = model_config.get_multimodal_config()
        self.config, self.model_config, self.multimodal_config = model_config.hf_config, model_config, multimodal
        self.vllm_config = vllm_config
        self.is_multimodal_pruning_enabled = multimodal.is_multimodal_pruning_enabled()
        self.method = served_method(vllm_config.additional_config)
        self.sizes = vision_sizes(self.config.vision_config)
        _check(self.sizes, vllm_config)
        self.normal = normalisation(*_load_norm_params(model_config))
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            if get_tp_group().rank_in_group:
                self.visual = StageMissingLayer("vision_tower")
            else:  # of vLLM's dtype on its device, to be filled by its loader; drawing random numbers would take seconds
                device = torch.get_default_device()
                with torch.device("meta"):
                    tower = Tower(self.sizes)
                self.visual = tower.to_empty(device=device).eval().requires_grad_(False)
        with self._mark_language_model(vllm_config):
            language = {"prefix": maybe_prefix(prefix, "language_model"), "architectures": ["Qwen2ForCausalLM"]}
            self.language_model = init_vllm_registered_model(vllm_config=vllm_config, **language)
        if self.is_multimodal_pruning_enabled and self.method.weighs:
            add_bias(self.language_model.model.layers, vllm_config)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        if current_platform.is_cpu():
            _let_cpu_runner_prune()
        budget = request_budget({}, multimodal.video_pruning_rate)
        logger.info("videos are encoded by evoprune: method %s, budget %g", self.method.name, budget)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's; then the tower's linear layers are packed, where that makes products on a CPU faster."""
        loaded = super().load_weights(weights)
        if isinstance(self.visual, Tower):
            pack(self.visual)
            if self.is_multimodal_pruning_enabled:
                try_out(self.visual, self.method)
        return loaded

    def embed_multimodal(self, **inputs) -> tuple[torch.Tensor, ...]:
        """Features of each picture and video, `[tokens, hidden]`; pruned videos have `positions.COLUMNS` more columns."""
        with gpu_sync_allowed():  # the encoder reads what it selected
            return tuple(self._features(inputs))

    def _features(self, inputs: dict) -> Iterator[torch.Tensor]:
        group, wide, dtype = get_tp_group(), self.config.get_text_config().hidden_size, self.model_config.dtype
        for name in inputs:
            if name not in ("image_embeds", "pixel_values", "pixel_values_videos"):
                continue
            video = name == "pixel_values_videos"
            grids = in_units(inputs[VIDEO if video else PICTURE], self.sizes.spatial_merge_size)
            units = [prod(grid) for grid in grids]
            if name == "image_embeds":
                yield from inputs[name].to(dtype).split(units)
                continue
            kept, seconds = units, [1.0] * len(units)
            if video:
                kept, seconds = inputs[KEEP].tolist(), inputs[SECONDS].tolist()
            columns = COLUMNS if video and self.is_multimodal_pruning_enabled else 0
            pieces = inputs[name].split([count * self.sizes.spatial_merge_size**2 for count in units])
            for patches, grid, keep, step in zip(pieces, grids, kept, seconds, strict=True):
                if group.rank_in_group:
                    made = torch.empty(keep, wide + columns, dtype=dtype, device=group.device)
                else:
                    given = patches if patches.dtype == torch.uint8 else patches.float()
                    found = encoded(self.visual, given, grid, keep, self.method, self.normal)
                    made = with_columns(found, step, self.sizes.tokens_per_second) if columns else found.features
                yield group.broadcast(made.contiguous())

    def get_mrope_input_positions(self, input_tokens, mm_features) -> tuple[torch.Tensor, int]:
        """`positions.known_positions` of a prompt."""
        items = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            grid = PICTURE if feature.modality == "image" else VIDEO
            seconds = feature.data.get(SECONDS)
            (shape,) = in_units(feature.data[grid].data[None], self.sizes.spatial_merge_size)
            span = VisualSpan(feature.mm_position.offset, shape, 1.0 if seconds is None else float(seconds.data))
            items.append((span, feature.mm_position.length))
        return known_positions(len(input_tokens), items, self.sizes.tokens_per_second)

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        """The features without their additional columns, the prompt's positions, and vLLM's number for generated tokens.

        `multimodal_embeddings`: from the first picture or video that is not computed yet. `mrope_positions`: int64 `[3, prompt]`.
        """
        wide = self.config.get_text_config().hidden_size
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
        """No graphs: how much the encoder computes depends on the video."""
        wide = self.config.get_text_config().hidden_size
        return EncoderCudaGraphConfig(modalities=[], buffer_keys=[], out_hidden_size=wide, max_frames_per_video=1)


def _check(sizes: VisionConfig, config: VllmConfig) -> None:
    """Raises ModelError or UsageError if this package cannot run the tower, or not with these options of vLLM."""
    try:
        check_vision(sizes)
    except ValueError as problem:
        what = f"the vision tower of this model cannot be run: {problem}"
        raise ModelError(what, "serve it without evoprune") from problem
    if config.model_config.dtype == torch.float16:
        raise UsageError("the vision tower of Qwen overflows in float16", "start with --dtype bfloat16 or float32")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        hint = "leave it out, or use the method ngram"
        raise UsageError(f"speculative decoding with {speculative.method} was not tested with pruned videos", hint)


@cache
def _let_cpu_runner_prune() -> None:
    """From now on, vLLM's runner on a CPU notes that a model of this module prunes, if it does. Nothing else changes.

    The runner on GPUs looks at the model after loading. The one on CPUs has a loader of its own, which does not (0.32): vLLM's own
    pruning fails there.
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
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(Processor2, info=Qwen2VLProcessingInfo, dummy_inputs=DummyInputs2)
class EvoPruneQwen2VLForConditionalGeneration(_Pruned, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""
