"""Run the vision encoder of a Hugging Face model, with pruning, on the output of the model's processor.

The encoder uses the model's own weights, or packed or quantized copies.
"""

from dataclasses import fields, replace
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
from evoprune.signatures import suggests
from evoprune.util import check_type
from evoprune.video import InputLimits
from evoprune.vision import Encoded, encode_rows

INT8 = "int8"
SAMPLES = 16  # number of values to compare per weight to detect changes
PROCESSOR = "pass pixel_values_videos and video_grid_thw from one processor call (return_tensors='pt'), in this order"


@suggests
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
    """Run a model's vision tower on one or more videos, and prune each video to the given budget.

    As in the model's own forward pass, the tower layers follow torch autocast. Tokens are always selected in float32.

    Args:
        model: A Hugging Face model of a supported family, such as a `Qwen2_5_VLForConditionalGeneration`, or any object with such
            a model's tower at `model.model.visual`.
        pixel_values_videos: Patches from the model's processor, float `[patches, values]`. For images, pass the processor's
            `pixel_values`. To detect unchanged patches, evoprune assumes normalization with Qwen's mean and standard deviation.
        video_grid_thw: The size of each video (frame pairs, patch rows, patch columns), int64 `[videos, 3]`, from the processor.
            For images, pass the processor's `image_grid_thw`.
        budget: Fraction of visual tokens to keep: a number in (0, 1], a percentage such as "25%", or a preset name. With 1.0, the
            result is the same as the tower's own output.
        method: Name of a pruning method. NAME:SETTING=VALUE changes one of its settings.
        question: Token embeddings of the question from `model.get_input_embeddings()`, `[Q, hidden]`. Required only for methods
            that read the question.
        seed: Random seed for methods that make random choices.

    Returns:
        A single `Encoded` for all videos. In `kept` and `unit_to_row`, units are numbered consecutively across videos, in the order
        of their placeholder tokens.

    Raises:
        UsageError: If the budget or method is invalid, the method resizes frames, the method reads the question but `question` is
            None, or the inputs have an invalid type, dtype, or shape, or don't match each other.
        ModelError: If the model has no supported vision tower.
    """
    method = check_type("method", method, str)
    seed = check_type("seed", seed, int)
    config = patch_config(Budget.parse(budget), method, seed, has_question=question is not None)
    visual = interface.tower_of(model)
    encoded = Encoded.joined(encode_each(visual, pixel_values_videos, video_grid_thw, config, question))
    values = {each.name: getattr(encoded, each.name) for each in fields(encoded)}
    with torch.inference_mode(False):  # inference tensors couldn't be used where gradients are recorded
        tensors = {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(encoded, **tensors)


def encode_each(
    visual,
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    config: PruneConfig,
    question: torch.Tensor | None = None,
) -> list[Encoded]:
    """Encode videos like `encode`, but return a separate `Encoded` object for each video.

    Args:
        visual: The tower.
        config: The pruning settings, from `patch_config`.
        pixel_values_videos, video_grid_thw, question: See `encode`.
    """
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
    """Create pruning settings and check that the pruning method works on patches from a Hugging Face processor.

    Raises:
        UsageError: If the method or one of its settings is unknown, the method resizes frames or acts inside the language model, or
            the method reads the question but `has_question` is False.
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
    """Raise UsageError if the patches and grids from a processor don't match each other or the tower."""
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
    """Raise UsageError unless the question is None or a non-empty float tensor `[Q, hidden]` with the tower's output width."""
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
    """A copy of a model's vision tower that runs faster on a CPU.

    In the copy, linear layers are packed (`cpu.linear`) or quantized to 8 bits (`cpu.quantize`). All other weights are shared with
    the model's own tower, which isn't modified.

    Raises:
        UsageError: If packing isn't supported on the weights' device, or doesn't save time.
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
        # Multiple threads may encode at the same time, so always replace the entire tuple.
        self._state: tuple = (None, None, None)
        self.current()

    def current(self) -> nn.Module:
        """Return the packed tower, repacking the model's layers if they have changed.

        To detect changes, this method compares the layers' tensors, torch's in-place version counters, and a sample of values from
        each tensor. The sample also reveals changes made through `.data`.

        Raises:
            UsageError: If `pack` is True and torch autocast would convert to a dtype other than the weights'.
        """
        if self._pack is True and not Packing.allows_autocast(self._visual.patch_embed.proj.weight.dtype):
            hint = "convert the model with .to(torch.bfloat16) instead, or leave pack out"
            raise UsageError("pack=True does not work with torch.autocast", hint)
        known = {}
        sample = []
        for name, layer in self._visual.named_modules():
            if is_unhooked_linear(layer):
                for part, tensor in layer.named_parameters():  # the weight and the bias
                    flat = tensor.detach().flatten()
                    version = 0 if tensor.is_inference() else tensor._version
                    known[name, part] = layer, tensor.data_ptr(), version
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
