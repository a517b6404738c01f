"""Run the pruned encoder on a processor's output, with a Hugging Face model's weights or packed or quantized copies."""

from typing import Any, Literal

import torch
from torch import nn

from evoprune.backend import (
    Packing,
    Quantization,
    is_unhooked_linear,
    shared_copy,
)
from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.methods import Budget, MethodText, PruneConfig, TowerShape
from evoprune.model import VisionConfig, all_finite
from evoprune.session import calibrate_tower
from evoprune.video import InputLimits
from evoprune.vision import Encoded, encode_rows

INT8 = "int8"
SAMPLES = 16  # values sampled from each weight to detect changes
PROCESSOR = "pass pixel_values_videos and video_grid_thw from one processor call (return_tensors='pt'), in this order"


def encode(
    model: Any,
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    *,
    budget: Budget.Given = Budget.DEFAULT,
    method: str = MethodText.DEFAULT,
    question: torch.Tensor | None = None,
    seed: int = 0,
) -> Encoded:
    """Run the vision tower of `model` on one or more videos, and prune each video to `budget`.

    The tower's layers obey torch's autocast, as in the model's own forward. Tokens are selected in float32.

    Args:
        model: A Hugging Face `Qwen3VLForConditionalGeneration`, `Qwen2_5_VLForConditionalGeneration` or
            `Qwen2VLForConditionalGeneration`, or any object with such a tower at `model.visual`.
        pixel_values_videos: float `[patches, values]`, from the model's processor; for images, the processor's `pixel_values`.
            Reuse assumes that the values are normalized with Qwen's own mean and standard deviation.
        video_grid_thw: int64 `[videos, 3]`, from the processor: the number of frame pairs, and of patches down and across; for
            images, the processor's `image_grid_thw`.
        budget: Share of the visual tokens to keep: a number in (0, 1], a percentage such as "25%", or the name of a preset. 1.0
            gives the tower's own output.
        method: Name of a pruning method, or NAME:SETTING=VALUE to change a setting.
        question: `[Q, hidden]`, the token embeddings of the question from `model.get_input_embeddings()`, for methods that read the
            question.
        seed: Seed for methods that draw at random.

    Returns:
        One `Encoded` for all videos. Its `kept` and `unit_to_row` number the units across all videos, in the order of the
        placeholder tokens.

    Raises:
        UsageError: The budget or the method is invalid, the method resizes frames or reads a question that was not passed, or the
            inputs have the wrong type, dtype or shape or do not match one another.
        ModelError: The model has no such tower.
    """
    config = patch_config(Budget.parse(budget), method, seed, has_question=question is not None)
    visual = interface.tower_of(model)
    return Encoded.joined(encode_each(visual, pixel_values_videos, video_grid_thw, config, question))


def encode_each(
    visual,
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    config: PruneConfig,
    question: torch.Tensor | None = None,
) -> list[Encoded]:
    """Encode like `encode`, but take a tower and a config from `patch_config`, and return each video separately."""
    _check_videos(visual, pixel_values_videos, video_grid_thw)
    _check_question(visual, question)
    merge = visual.config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in video_grid_thw.tolist()]
    sizes = [t * h * w * merge**2 for t, h, w in grids]
    tower = TowerShape.of_tower(visual)
    normal = InputLimits(**VisionConfig.of(visual.config).traits.video).normal
    videos = []
    for patches, grid in zip(pixel_values_videos.split(sizes), grids, strict=True):
        plan = config.plan(tower, grid)
        rows = encode_rows(visual, [patches], plan, normal=normal, seed=config.seed)
        videos.append(rows.select_tokens(question))
    return videos


def patch_config(budget: Budget, name: str, seed: int = 0, has_question: bool = False) -> PruneConfig:
    """Return the config for a budget and the method `name`, which must be able to work on a processor's patches.

    Raises:
        UsageError: The method or setting does not exist, the method resizes frames or acts inside the language model, or it reads
            the question and there is no question.
    """
    config = PruneConfig.of(budget, name, seed)
    method = config.method
    if method.acts == "input":
        hint = "use VideoQA, or shrink the video first"
        raise UsageError(f"method {name} acts on frames, but these are patches", hint)
    if method.language:
        works = method.before.name if method.before.members else "evoprune"
        hint = f"use VideoQA or the command line; here {works} works"
        raise UsageError(f"method {name} acts inside the language model, which is not pruned here", hint)
    if method.reads_question and not has_question:
        what, instead = method.refusals
        hint = f"pass question=... to evoprune.encode, use VideoQA, or {instead}"
        raise UsageError(f"{what}, which is not known here", hint)
    return config


def _check_videos(visual, pixels: torch.Tensor, grids: torch.Tensor) -> None:
    """Raise UsageError unless patches and grids come from a processor and match each other and the tower `visual`."""
    width = visual.patch_embed.proj.weight[0].numel()
    merge = visual.config.spatial_merge_size
    valid = isinstance(pixels, torch.Tensor) and pixels.is_floating_point() and pixels.shape[1:] == (width,)
    if not valid:
        raise UsageError(
            f"pixel_values_videos are {_describe(pixels)}, not floating-point [patches, {width}]", PROCESSOR
        )
    valid = isinstance(grids, torch.Tensor) and not (grids.is_floating_point() or grids.dtype == torch.bool)
    if not (valid and grids.ndim == 2 and grids.shape[1] == 3):
        raise UsageError(f"video_grid_thw is {_describe(grids)}, not int64 [videos, 3]", PROCESSOR)
    shapes = grids.tolist()
    if any(min(shape) < 1 or shape[1] % merge or shape[2] % merge for shape in shapes):
        raise UsageError(
            f"video_grid_thw {shapes} is not a list of (T, H, W) with H and W in multiples of {merge}", PROCESSOR
        )
    if not shapes or int(grids.prod(1).sum()) != len(pixels):
        raise UsageError(f"{len(pixels)} patches do not fit video_grid_thw {shapes}", PROCESSOR)
    if not all_finite(pixels.detach()):
        raise UsageError("pixel_values_videos contain NaN or infinity", "check the inputs of the processor")


def _check_question(visual, question: torch.Tensor | None) -> None:
    """Raise UsageError unless the question is None or floating-point `[Q, hidden]`, with Q at least 1 and the tower's width."""
    if question is None:
        return
    width = VisionConfig.of(visual.config).out_hidden_size
    valid = isinstance(question, torch.Tensor) and question.is_floating_point() and question.ndim == 2
    if not (valid and len(question) and question.shape[1] == width):
        hint = "pass model.get_input_embeddings()(ids) for the question's tokens, a one-dimensional tensor"
        raise UsageError(f"the question is {_describe(question)}, not floating-point [tokens, {width}]", hint)


def _describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"of type {type(value).__name__}"


class PackedTower:
    """A model's tower for encoding on a CPU, with linear layers packed (`cpu.linear`) or quantized to 8 bits (`cpu.quantize`).

    The model keeps its own tower unchanged. Both towers share all other weights.

    Raises:
        UsageError: Packing does not work, or saves no time, on the weights' device.
    """

    def __init__(self, visual: nn.Module, pack: Literal[True, "int8"] = True):
        weight = visual.patch_embed.proj.weight
        if pack is True and not Packing.supports(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            hint = "it needs a CPU and float32, or bfloat16 if the CPU multiplies it in hardware; leave it out"
            raise UsageError(f"pack=True does not work in {dtype} on {weight.device} here", hint)
        if pack == INT8:
            Quantization(INT8).check(weight.device)
        self._visual = visual
        self._pack = pack
        self._state: tuple = (None, None, None)  # one tuple, replaced as a whole, because several threads may encode
        self.current()

    def current(self) -> nn.Module:
        """Return the packed tower, packing the model's layers again if they have changed.

        Changes are detected by comparing the layers' tensors, torch's in-place version counters, and a sample of the values, which
        also reveals changes made through `.data`.
        """
        known = {}
        sample = []
        for name, layer in self._visual.named_modules():
            if is_unhooked_linear(layer):
                weight = layer.weight
                flat = weight.detach().flatten()
                version = 0 if weight.is_inference() else weight._version
                known[name] = layer, weight.data_ptr(), version
                sample += flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()
        packed, packed_known, packed_sample = self._state
        if packed is None or (known, sample) != (packed_known, packed_sample):
            packed = shared_copy(self._visual)
            if self._pack == INT8:
                Quantization(INT8).apply(packed, calibrate_tower)
            else:
                Packing.now(packed)
            self._state = packed, known, sample
        return packed

    @property
    def nbytes(self) -> int:
        """Size of the packed layers in bytes, in addition to the model's own layers."""
        return sum(getattr(layer, "nbytes", 0) for layer in self._state[0].modules())
