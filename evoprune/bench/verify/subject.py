"""The two models compared by `evoprune verify`: evoprune's model, and a transformers model built from the same files.

This module also defines the outcome of a check (held, differs, or skipped) and the distance between the two models' results.

The results may differ by a small multiple of the transformers model's rounding error. To measure this error, the transformers model
is also run in a wider dtype than its weights. This does not require a second copy of the weights, because each module widens its
own weights during computation, and large weights are widened piece by piece. Modules with quantized weights cannot compute in
another dtype, so their outputs are instead randomly rounded a second time.
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
# The maximum distance between two differently rounded results, as a multiple of the distance between one of them and the exact
# result. The largest of many distances varies more than their mean, so its multiple is higher.
MEAN = 2.0
LARGEST = 3.0
FEW = 8  # with fewer rows than this, the mean distance varies as much as the largest distance
# Relative errors above this are never attributed to rounding. For comparison, unrelated logits differ by 1.4, and a bug may cause
# an error of only 0.3.
COARSE = 0.25


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        state: `HELD`, `DIFFERS` or `SKIPPED`.
        says: A one-line description of the difference, the reason for skipping the check, or the figures.
        figures: The measured numbers, keyed by name. The limit for the number NAME is stored as NAME_limit.
    """

    state: str
    says: str
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A check that `evoprune verify` can run.

    Attributes:
        name: The name shown to users.
        compares: A description of the comparison, shown to users.
        run: The function that runs the comparison, given a `Subject`.
        slow: Whether `--quick` skips the check.
    """

    name: str
    compares: str
    run: Callable[[Any], Outcome]
    slow: bool = False


def skipped(why: str) -> Outcome:
    return Outcome(SKIPPED, why)


def judged(says: str, limits: dict[str, tuple[float, float]]) -> Outcome:
    """Compare figures with their limits, and return the resulting outcome.

    Args:
        says: The outcome's text if all figures are within their limits.
        limits: Pairs of a figure and its limit, keyed by name.

    Returns:
        `DIFFERS` if a figure is NaN or exceeds its limit. `SKIPPED` if all figures are within their limits but an error exceeds
        `COARSE`, because rounding errors this large could hide a bug. Otherwise, `HELD`.
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
    """The relative distance between two sets of rows: the mean and the maximum over the rows, and the number of rows."""

    mean: float
    largest: float
    rows: int = FEW

    def limits(self, noise: "Gap", times: float = 1.0) -> dict[str, tuple[float, float]]:
        """Return pairs of a distance and its limit, keyed by name.

        The mean distance is omitted if there are fewer than `FEW` rows.

        Args:
            noise: The distances caused by rounding.
            times: A factor to multiply all limits by.
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
    """Return the distances between the rows of `made` and `expected`, both `[n, D]`, relative to the norms of the expected rows.

    If the shapes differ, the distances are infinite.

    Args:
        centred: Whether to subtract each row's mean first. Use this for logits, because only their differences matter.
    """
    made, expected = (x.detach().cpu().double() for x in (made, expected))
    if made.shape != expected.shape:
        return Gap(float("inf"), float("inf"))
    if centred:
        made, expected = (x - x.mean(1, keepdim=True) for x in (made, expected))
    tiny = torch.finfo(torch.float32).tiny
    distances = (made - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=tiny)
    return Gap(float(distances.mean()), float(distances.max()), len(distances))


MAX_WEIGHTS = 2**24  # maximum number of weights to convert to a wider dtype at a time
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return a wider dtype for measuring the rounding error of `dtype`, or None if the device supports none."""
    wide = WIDER.get(dtype)
    if wide == torch.float64 and device.type == "mps":
        return None
    return wide


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Make all weight-carrying modules of `model` compute in `dtype` within the context."""
    held = [module for module in model.modules() if own_weights(module) and type(module) is not nn.Conv1d]
    for module in held:
        module.forward = partial(_forward_of(module), module, type(module).forward, dtype)
    config = getattr(model.config, "text_config", None)
    experts = getattr(config, "_experts_implementation", None)
    if experts is not None:  # fused expert kernels don't support float64
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        if experts is not None:
            config._experts_implementation = experts
        for module in held:
            del module.forward


def own_weights(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the weights that a module reads in its own forward pass.

    These are the module's own weights and the weights of its child convolutions, which it reads without calling them.

    Returns:
        Triples of the module that owns the weight, the weight's name, and the weight.
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
    """Run the forward pass of a norm, convolution, gate, or experts module with its weights converted to `dtype`."""
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
    """Randomly round all module outputs in `dtype` a second time within the context.

    The output of a matrix product is changed by as much as rounding to `dtype` or rounding in an fp32 sum with the same number of
    terms would change it, whichever is larger.
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
# The clip has several frame pairs and windows, but it is small enough for a large model on a CPU.
SAMPLING = SamplingOptions(frames=8, max_visual_tokens=128)
NEW_TOKENS = 16
BUDGET = 0.25
INSIDE = "evoprune:inner=always"  # because a GPU would otherwise prune clips this small only after the tower


class Subject:
    """The model and the two input files used by the checks. Everything derived from them is computed on first use.

    Frames may be smaller than the model normally allows, so that several frame pairs require only a few tokens.

    Attributes:
        loaded: The model, without its minimum frame size. Its weights are not packed, and the transformers model shares them.
        video: The video or image on which to compare the two models.
        image: An image to ask about together with the video.
        differing: The names of tensors that transformers reads differently from the same files. Populated on first use of
            `transformers`.
        not_read: The reason why transformers doesn't read the files, or None if it does.
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
        """The transformers model, with its special token IDs set.

        If the model has files and there is enough memory for a second copy of the weights, transformers reads the files itself.
        Afterward, equal tensors are shared between the models. Otherwise, the transformers model is built from evoprune's tensors.
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
        """Return a `VideoQA` for evoprune's side of the comparison. A budget of 1.0 disables pruning."""
        if budget == 1:
            method = "none"
        return VideoQA(self.loaded, budget=budget, method=method)

    def encode(self, budget: float, method: str = INSIDE) -> EncodedInputs:
        """Encode the video with evoprune."""
        return self.asking(budget, method).encode(self.video, **vars(SAMPLING))

    def about(self, *paths: Path) -> "Asked":
        """Return the question about the given inputs, prepared for both models. The result is cached."""
        if paths not in self._asked:
            self._asked[paths] = Asked(self, paths)
        return self._asked[paths]

    @torch.inference_mode()
    def features(self, call: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute the features of a prompt's inputs with transformers' vision tower.

        Returns:
            `[1 + n, tokens, hidden]`, in prompt order: the final features, followed by n levels of DeepStack features.
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
        """Compute the transformers language model's logits after each of the last tokens.

        Args:
            positions: int64 `[3, L]`, the positions of the prompt. The answer positions continue from these.
            features: The input features, from the method `features` or from evoprune's tower.
            answer: The tokens that follow the prompt.
            last: The number of tokens at the end of the prompt and answer for which to return logits.
            first: The number of tokens to process into a KV cache before all other tokens. They must include all visual tokens.
                With 0, no cache is used.

        Returns:
            `[last, vocabulary]`.
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
        """Return `ids` (int64 `[L]`) as a keyword argument if the language model reads token IDs in addition to embeddings.

        Otherwise, the result is empty.
        """
        return (
            {"ple_input_ids": ids[None]} if self.transformers.config.text_config.to_dict().get("ple_layer_ids") else {}
        )

    @cached_property
    def video_logits(self) -> torch.Tensor:
        """The logits that transformers computes after each text token that follows the video."""
        asked = self.about(self.video)
        return self.logits(asked.call, asked.positions, asked.features, last=asked.text_behind)

    @cached_property
    def _otherwise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformers model's features and logits with different rounding: in a wider dtype, or randomly rounded again."""
        dtype = None if self.loaded.description.quantization else wider(self.dtype, self.device)
        other = rounding_again if dtype is None else computing_in
        asked = self.about(self.video)
        with other(self.transformers, dtype or self.dtype):
            features = self.features(asked.call)
            logits = self.logits(asked.call, asked.positions, features, last=asked.text_behind)
        return features, logits

    @cached_property
    def features_noise(self) -> Gap:
        """The rounding error of the features from transformers' vision tower."""
        features = self.about(self.video).features
        return self.noise(gap(features.flatten(0, 1), self._otherwise[0].flatten(0, 1)))

    @cached_property
    def logits_noise(self) -> Gap:
        """The rounding error of transformers' logits when computed from pixels, including the feature error."""
        return self.noise(gap(self.video_logits, self._otherwise[1], centred=True))

    def noise(self, distance: Gap) -> Gap:
        """Clamp a distance to at least the rounding error of a single value, because short sums may be exact by chance."""
        rounding = torch.finfo(self.dtype).eps
        return distance.worse((rounding, rounding))

    @cached_property
    def _same_features(self) -> torch.Tensor:
        """Logits that differ from `video_logits` only in rounding, as if another language model had read the same features.

        If both sides run the same transformers modules, these logits are computed by processing the prompt in two parts.
        """
        if not self.loaded.language.runs_modules:
            return self._otherwise[1]
        asked = self.about(self.video)
        columns = asked.text_behind, len(asked.prompt.input_ids) - asked.text_behind
        return self.logits(asked.call, asked.positions, asked.features, last=columns[0], first=columns[1])

    @cached_property
    def language_noise(self) -> Gap:
        """The rounding error of the logits when both language models read the same features."""
        return self.noise(gap(self.video_logits, self._same_features, centred=True))

    @cached_property
    def logit_noise(self) -> float:
        """The rounding error of a single logit, relative to the largest logit, after subtracting the mean of each row of logits."""
        ours, other = (x.cpu().double() for x in (self.video_logits, self._same_features))
        ours, other = (x - x.mean(1, keepdim=True) for x in (ours, other))
        return max(float((ours - other).abs().max() / other.abs().max()), torch.finfo(self.dtype).eps)


class Asked:
    """A question about one or more inputs, prepared for evoprune and for transformers.

    Attributes:
        plans: The plan for each input.
        prompt: Evoprune's prompt without pruning.
        positions: int64 `[3, L]`, the positions of the prompt's tokens.
        call: The arguments for the transformers model.
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
        # Frames must be resized in the same way as by evoprune's encoder.
        read = [read_patches(plan, loaded.limits[plan.kind], subject.device) for plan in self.plans]
        call = arguments(self.prompt, read, loaded.limits, loaded.model.config.vision_config)
        self.call = {name: value.to(subject.device) for name, value in call.items()}

    @cached_property
    def features(self) -> torch.Tensor:
        """The features from transformers' vision tower. See `Subject.features`."""
        return self._subject.features(self.call)

    @property
    def text_behind(self) -> int:
        """The number of text tokens in the prompt after the last input."""
        return len(self.prompt.input_ids) - self.prompt.places[-1].runs[-1].stop
