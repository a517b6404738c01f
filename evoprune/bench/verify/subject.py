"""The two sides that `evoprune verify` compares: a loaded model, and the transformers model built from the same files.

Also the outcome of a check (held, differs or skipped), and the distance between the results of two programs. The limit for a
distance is the rounding error of the transformers model, measured by running it in a wider dtype than its weights. This needs no
second copy of the weights: each module widens its own weights while it computes, large ones a piece at a time. Quantized weights
cannot compute in another dtype, so the outputs of their modules are perturbed by one more random rounding instead.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend import Device, cache_name
from evoprune.bench.hugging_face import hugging_face_model, share_equal
from evoprune.hf import arguments, read_patches
from evoprune.language import GenerationOptions
from evoprune.session import EncodedInputs, LoadedModel, open_inputs, read_whole
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA

HELD = "held"
DIFFERS = "differs"
SKIPPED = "skipped"
# Allowed distance between two roundings of the same number, as a multiple of the distance between one rounding and the exact
# number. The largest of many distances varies more than their mean.
MEAN = 2.0
LARGEST = 3.0
FEW = 8  # rows; below this, the mean varies as much as the largest distance
# A relative error above this is never called rounding. Unrelated logits are 1.4 apart; a bug may cause as little as 0.3.
COARSE = 0.25


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        state: `HELD`, `DIFFERS` or `SKIPPED`.
        says: one line with the difference, the reason for skipping, or the figures.
        figures: numbers by name. Each judged number also has its limit, under NAME_limit.
    """

    state: str
    says: str
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        compares: description of both sides of the comparison, for users.
        run: the function that compares; called with a `Subject`.
        slow: whether `--quick` skips it.
    """

    name: str
    compares: str
    run: Callable[[Any], Outcome]
    slow: bool = False


def skipped(why: str) -> Outcome:
    return Outcome(SKIPPED, why)


def judged(says: str, limits: dict[str, tuple[float, float]]) -> Outcome:
    """Compare figures with their limits.

    Args:
        says: the text of the outcome if all figures are within their limits.
        limits: (figure, limit) by name.

    Returns:
        `DIFFERS` with the first figure above its limit (or NaN). `SKIPPED` if an error exceeds `COARSE` but not its limit: rounding
        is amplified so much that it could hide a bug. Otherwise `HELD`.
    """
    figures: dict[str, float | None] = {}
    for name, (value, limit) in limits.items():
        figures[name] = value if isfinite(value) else None
        figures[f"{name}_limit"] = limit
    for name, (value, limit) in limits.items():
        if not value <= limit:  # also true for NaN
            return Outcome(DIFFERS, f"{name.replace('_', ' ')} {value:.2g}, expected at most {limit:.2g}", figures)
    for name, (value, limit) in limits.items():
        if name.endswith("error") and value > COARSE:
            why = f"not comparable: {name.replace('_', ' ')} {value:.2g}, and rounding errors may be {limit:.2g}"
            return Outcome(SKIPPED, why, figures)
    return Outcome(HELD, says, figures)


class Gap(NamedTuple):
    """Relative distances between rows: their mean, the largest distance, and the number of rows."""

    mean: float
    largest: float
    rows: int = FEW

    def limits(self, noise: "Gap", times: float = 1.0) -> dict[str, tuple[float, float]]:
        """Return the figures with their limits, given `noise`, the distance caused by one rounding.

        With fewer than `FEW` rows, only the largest distance is returned.
        """
        limits = {}
        if self.rows >= FEW:
            limits["mean_error"] = (self.mean, times * MEAN * noise.mean)
        limits["largest_error"] = (self.largest, times * LARGEST * noise.largest)
        return limits

    def worse(self, other: Sequence[float]) -> "Gap":
        return Gap(max(self.mean, other[0]), max(self.largest, other[1]), self.rows)

    def __str__(self) -> str:
        return f"error {self.mean:.1e}, at most {self.largest:.1e}"


def gap(made: torch.Tensor, expected: torch.Tensor, centred: bool = False) -> Gap:
    """Return the distances between the rows of `made` `[n, D]` and `expected`, relative to the norms of the expected rows.

    Args:
        centred: subtract each row's mean first. Used for logits, because only differences between logits matter.

    Returns:
        The distances; infinite if the shapes differ.
    """
    made, expected = (x.detach().cpu().double() for x in (made, expected))
    if made.shape != expected.shape:
        return Gap(float("inf"), float("inf"))
    if centred:
        made, expected = (x - x.mean(1, keepdim=True) for x in (made, expected))
    tiny = torch.finfo(torch.float32).tiny
    distances = (made - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=tiny)
    return Gap(float(distances.mean()), float(distances.max()), len(distances))


MAX_WEIGHTS = 2**24  # weights widened at a time
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return a wider dtype that exposes the rounding of `dtype`, or None if the device has none."""
    wide = WIDER.get(dtype)
    if wide == torch.float64 and device.type == "mps":
        return None
    return wide


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Make the modules of `model` that hold weights compute in `dtype` until the context ends."""
    held = [module for module in model.modules() if own_weights(module) and type(module) is not nn.Conv1d]
    for module in held:
        module.forward = partial(_forward_of(module), module, type(module).forward, dtype)
    config = getattr(model.config, "text_config", None)
    experts = getattr(config, "_experts_implementation", None)
    if experts is not None:  # fused expert kernels do not support float64
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if experts is not None:
            config._experts_implementation = experts
        for module in held:
            del module.forward


def own_weights(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the weights that a module uses in its own forward, each with its holder and name.

    These are the module's own weights, and the weights of child convolutions that it reads directly.
    """
    holders = [module, *(child for child in module.children() if type(child) is nn.Conv1d)]
    return [(holder, name, weight) for holder in holders for name, weight in holder.named_parameters(recurse=False)]


def _forward_of(module: nn.Module) -> Callable:
    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, nn.Embedding):
        return _embedding
    return _others


def _linear(layer: nn.Linear, _forward: Callable, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    rows = layer.weight.split(max(1, MAX_WEIGHTS // layer.in_features))
    output = torch.cat([F.linear(x.to(dtype), piece.to(dtype)) for piece in rows], -1)
    if layer.bias is not None:
        output = output + layer.bias.to(dtype)
    return output


def _embedding(layer: nn.Embedding, forward: Callable, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return forward(layer, ids).to(dtype)


def _others(module: nn.Module, forward: Callable, dtype: torch.dtype, *given: torch.Tensor, **named) -> torch.Tensor:
    """Run the forward of norms, convolutions, gates and experts with weights widened one module at a time."""
    plain = own_weights(module)
    for holder, name, weight in plain:
        if weight.is_floating_point():
            holder._parameters[name] = nn.Parameter(weight.to(dtype), requires_grad=False)
    try:
        return forward(module, *(x.to(dtype) if x.is_floating_point() else x for x in given), **named)
    finally:
        for holder, name, weight in plain:
            holder._parameters[name] = weight


@contextmanager
def rounding_again(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Perturb module outputs in `dtype` by one more random rounding until the context ends.

    The relative perturbation of a matrix product is the rounding of `dtype`, or of a sum in fp32 with as many terms, whichever is
    larger.
    """
    random = torch.Generator().manual_seed(0)

    def off(module: nn.Module, _: tuple, output: Any) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor) or output.dtype != dtype:
            return None
        terms = getattr(module, "in_features", 1)
        rounding = max(torch.finfo(dtype).eps, terms**0.5 * torch.finfo(torch.float32).eps)
        share = torch.rand(output.shape, generator=random, dtype=torch.float32, device="cpu").to(output.device) - 0.5
        return (output + output.float() * (rounding * share)).to(dtype)

    hooks = [module.register_forward_hook(off) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


QUESTION = "What happens in this video?"
# Enough for several frame pairs and windows, and small enough for a large model on a CPU.
SAMPLING = SamplingOptions(frames=8, max_visual_tokens=128)
NEW_TOKENS = 16
BUDGET = 0.25
INSIDE = "evoprune:inner=always"  # small clips: a GPU would otherwise prune only after the tower


class Subject:
    """A model and two input files. Everything derived from them is computed lazily, when a check first needs it.

    Frames may be smaller than the model's own limits allow, so that several frame pairs make few tokens.

    Attributes:
        loaded: the model with plain weights, shared by both sides, and without a minimum frame size.
        video: the file to compare on; may be a picture.
        picture: a picture to ask about together with the video.
        differing: names of tensors that transformers reads differently from the same files. Filled when `transformers` is first
            used.
        not_read: why transformers does not read the files, or None if it does.
    """

    def __init__(self, loaded: LoadedModel, video: Path, picture: Path):
        self._asked: dict[tuple[Path, ...], Asked] = {}
        self.differing: list[str] = []
        self.not_read: str | None = None
        limits = {kind: replace(limit, min_pixels=limit.unit**2) for kind, limit in loaded.limits.items()}
        self.loaded = replace(loaded, description=replace(loaded.description, limits=limits))
        self.video = video
        self.picture = picture

    @cached_property
    def transformers(self):
        """Build transformers' model and set its special tokens.

        It reads the files itself if there are any and memory suffices for a second copy of the weights; otherwise it is built from
        our tensors. Tensors that are equal on both sides are then shared.
        """
        model = self.loaded.model
        origin = self.loaded.description
        missing_memory = Device(self.loaded.device).shortage(self.loaded.weights_bytes)
        if origin.random or origin.quantization or missing_memory:
            self.not_read = "random weights are not in a file"
            if missing_memory:
                self.not_read = f"a second copy of the weights {missing_memory}"
            elif origin.quantization:
                self.not_read = "only one copy of quantized weights is in memory"
            reference = hugging_face_model(model)
        else:
            reference = read_whole(origin.folder, self.dtype, self.device)
            self.differing = share_equal(reference, model)
        specials = self.loaded.tokenizer.specials()
        names = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}
        for name, token in names.items():
            setattr(reference.config, name, specials[f"<|{token}|>"])
        return reference

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.dtype

    def asking(self, budget: float, method: str = INSIDE) -> VideoQA:
        """Return evoprune's side. A budget of 1.0 prunes nothing."""
        if budget == 1:
            method = "none"
        return VideoQA(self.loaded, budget=budget, method=method)

    def encode(self, budget: float, method: str = INSIDE) -> EncodedInputs:
        """Encode the video with evoprune."""
        return self.asking(budget, method).encode(self.video, **vars(SAMPLING))

    def about(self, *paths: Path) -> "Asked":
        """Return the question about these inputs in the form that both sides read. The results are cached."""
        if paths not in self._asked:
            self._asked[paths] = Asked(self, paths)
        return self._asked[paths]

    @torch.inference_mode()
    def features(self, call: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the features of transformers' tower.

        Returns:
            `[1 + n, tokens, hidden]` in prompt order: the final features, then n levels of DeepStack features.
        """
        kinds = call["mm_token_type_ids"][0]
        parts = {}
        names = {2: ("pixel_values_videos", "video_grid_thw"), 1: ("pixel_values", "image_grid_thw")}  # by token type
        for kind, (pixels, grids) in names.items():
            if pixels in call:
                output = self.transformers.model.visual(call[pixels].to(self.dtype), grid_thw=call[grids])
                inner = getattr(output, "deepstack_features", None) or ()
                parts[kind] = torch.stack([output.pooler_output, *inner])
        first = next(iter(parts.values()))
        every = first.new_empty(len(first), len(kinds), first.shape[2])
        for kind, part in parts.items():
            every[:, kinds == kind] = part
        return every[:, kinds > 0]

    @torch.inference_mode()
    def logits(
        self,
        call: dict[str, torch.Tensor],
        positions: torch.Tensor,
        features: torch.Tensor,
        answer: Sequence[int] = (),
        last: int = 1,
        first: int = 0,
    ) -> torch.Tensor:
        """Compute the logits of transformers' language model after each of the last tokens, `[last, vocabulary]`.

        Args:
            positions: int64 `[3, L]`, for the prompt; positions of the answer follow on.
            features: features of the inputs, from `features`, used instead of running transformers' tower.
            answer: tokens after the prompt.
            first: number of columns to read into a cache before the rest. They must contain all visual tokens. 0 uses no cache.
        """
        from transformers import DynamicCache

        text = self.transformers.model.language_model
        more = torch.tensor(answer, dtype=torch.int64, device=self.device)
        ids = torch.cat([call["input_ids"][0], more])
        embeds = text.embed_tokens(ids)
        visual = torch.nn.functional.pad(call["mm_token_type_ids"][0] > 0, (0, len(answer)))
        embeds[visual] = features[0].to(embeds)
        inner = {}
        if len(features) > 1:
            inner = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(features[1:].to(embeds))}
        row = torch.arange(len(embeds), dtype=torch.int64, device="cpu")
        following = positions.max() + 1 + row[: len(answer)]
        every = torch.cat([row[None], torch.cat([positions, following.expand(3, -1)], 1)])
        places = every[:, None].to(self.device)
        cache = DynamicCache(config=text.config) if first else None
        if first:
            if inner:
                inner["visual_pos_masks"] = visual[None, :first]
            read = {"inputs_embeds": embeds[None, :first], "position_ids": places[..., :first]}
            read |= self._ids(ids[:first])
            text(**read, **{cache_name(): cache}, use_cache=True, **inner)
            embeds = embeds[first:]
            places = places[..., first:]
            inner = {}
        read = {"inputs_embeds": embeds[None], "position_ids": places, cache_name(): cache} | self._ids(ids[first:])
        hidden = text(**read, use_cache=cache is not None, **inner)
        return self.transformers.lm_head(hidden.last_hidden_state[0, -last:])

    def _ids(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the argument with token ids, int64 `[L]`, of a language model that reads them in addition to embeddings."""
        return (
            {"ple_input_ids": ids[None]} if self.transformers.config.text_config.to_dict().get("ple_layer_ids") else {}
        )

    @cached_property
    def video_logits(self) -> torch.Tensor:
        """Transformers' logits after each text token that follows the video."""
        asked = self.about(self.video)
        return self.logits(asked.call, asked.positions, asked.features, last=asked.text_behind)

    @cached_property
    def _otherwise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Transformers' features and logits with different rounding: in a wider dtype, or with one more random rounding."""
        dtype = None if self.loaded.description.quantization else wider(self.dtype, self.device)
        other = rounding_again if dtype is None else computing_in
        asked = self.about(self.video)
        with other(self.transformers, dtype or self.dtype):
            features = self.features(asked.call)
            logits = self.logits(asked.call, asked.positions, features, last=asked.text_behind)
        return features, logits

    @cached_property
    def features_noise(self) -> Gap:
        """Rounding error of transformers' features."""
        features = self.about(self.video).features
        return self.noise(gap(features.flatten(0, 1), self._otherwise[0].flatten(0, 1)))

    @cached_property
    def logits_noise(self) -> Gap:
        """Rounding error of transformers' logits, computed from the pixels."""
        return self.noise(gap(self.video_logits, self._otherwise[1], centred=True))

    def noise(self, distance: Gap) -> Gap:
        """Raise a distance to at least the rounding of a single number, because a short sum may happen to be exact."""
        rounding = torch.finfo(self.dtype).eps
        return distance.worse((rounding, rounding))

    @cached_property
    def _same_features(self) -> torch.Tensor:
        """Logits with different rounding than `video_logits`, as expected from another language model reading the same features.

        If both sides run the same transformers modules, they differ only in how many columns they read at a time.
        """
        if not self.loaded.language.runs_modules:
            return self._otherwise[1]
        asked = self.about(self.video)
        columns = asked.text_behind, len(asked.prompt.input_ids) - asked.text_behind
        return self.logits(asked.call, asked.positions, asked.features, last=columns[0], first=columns[1])

    @cached_property
    def language_noise(self) -> Gap:
        """Rounding error of the logits of a language model, given the same features."""
        return self.noise(gap(self.video_logits, self._same_features, centred=True))

    @cached_property
    def logit_noise(self) -> float:
        """Rounding error of a single logit: the largest centered difference, relative to the largest centered logit."""
        ours, other = (x.cpu().double() for x in (self.video_logits, self._same_features))
        ours, other = (x - x.mean(1, keepdim=True) for x in (ours, other))
        return max(float((ours - other).abs().max() / other.abs().max()), torch.finfo(self.dtype).eps)


class Asked:
    """The question about some inputs, in the form that both sides read.

    Attributes:
        plans: the plan of each input.
        prompt, positions: this project's prompt and its positions, int64 `[3, L]`, with nothing pruned.
        call: the arguments for transformers' model.
    """

    def __init__(self, subject: Subject, paths: Sequence[Path]):
        session = subject.asking(1.0).session
        loaded = subject.loaded
        self._subject = subject
        with closing(open_inputs(session, paths, SAMPLING)) as opened:
            self.plans = opened.plans
        units = sum(plan.units for plan in self.plans)
        self.prompt = session.fitting_prompt(self.plans, QUESTION, GenerationOptions(), units)
        self.positions = loaded.positions_of(self.prompt, self.plans)
        # Resize frames as the encoder does.
        read = [read_patches(plan, loaded.limits[plan.kind], subject.device) for plan in self.plans]
        call = arguments(self.prompt, read, loaded.limits, loaded.model.config.vision_config)
        self.call = {name: value.to(subject.device) for name, value in call.items()}

    @cached_property
    def features(self) -> torch.Tensor:
        """The features of transformers' tower, see `Subject.features`."""
        return self._subject.features(self.call)

    @property
    def text_behind(self) -> int:
        """Number of prompt tokens after the last input."""
        return len(self.prompt.input_ids) - self.prompt.places[-1].runs[-1].stop
