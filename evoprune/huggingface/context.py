"""Prunes videos inside a Hugging Face model, on the inputs of its own processor.

    with evoprune.EvoPrune(budget=0.1)(model) as run:
        out = model.generate(**inputs)
    run.report

The package encodes the videos. It then calls the model's own `generate` or `forward` without the columns of pruned tokens. What
`generate` returns starts with the whole prompt again, and callbacks that receive ids see the whole prompt. Pictures and text are
never pruned. Flash and flex attention take no mask of numbers, so under them every token weighs as one unit, whatever its cluster
size is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.huggingface import interface
from evoprune.huggingface.call_report import call_report
from evoprune.huggingface.cluster_bias import cluster_bias
from evoprune.huggingface.columns import with_whole_prompt
from evoprune.huggingface.encoding import encode, patch_method
from evoprune.huggingface.inputs import Past, check_prompt, continued, without_pruned
from evoprune.huggingface.patches import Patches
from evoprune.huggingface.whole_prompt import with_whole_prompts
from evoprune.model.clock import Clock
from evoprune.pruning.budget import DEFAULT, parse_budget
from evoprune.report import Report

PAST = "evoprune"  # attribute that is set on caches; copies of a cache have it too


@dataclass(frozen=True)
class PruningContext:
    """Settings of pruning. Called with a model, it returns the context in which that model prunes.

    Users reach it as `evoprune.EvoPrune`.

    Attributes:
        budget: share of the visual tokens of each video to keep, a number in (0, 1] or the name of a preset.
        method, method_args: name of a pruning method, and its settings as texts.
        positions: "host" gives each token the position that the model itself gives it, so that budget 1.0 is the model's own
            output; "qwen" starts the text after a video at the end of the video's time, as Qwen trained its models
            (`language.positions`).
        seed: for methods that draw at random.

    Raises:
        UsageError: a bad budget, method or `positions`, or a method that resizes frames or reads the question.
    """

    budget: float | str = DEFAULT
    method: str = methods.DEFAULT
    method_args: dict[str, str] | None = None
    positions: Literal["host", "qwen"] = "host"
    seed: int = 0

    def __post_init__(self):
        parse_budget(self.budget)
        patch_method(self.method, self.method_args)
        if self.positions not in ("host", "qwen"):
            raise UsageError(f"positions {self.positions!r} are not known", "host or qwen")

    def __call__(self, model) -> "PrunedModel":
        """The context for a with-block; pruning starts when the block is entered.

        Raises:
            ModelError: not a `Qwen2_5_VL-` or `Qwen2VLForConditionalGeneration`.
        """
        return PrunedModel(model, self)


def apply(model, **settings) -> "PrunedModel":
    """Prunes inside `model` from now on, until `remove()` of the result is called.

    Args:
        settings: as in `PruningContext`.

    Raises:
        ModelError: not a `Qwen2_5_VL-` or `Qwen2VLForConditionalGeneration`.
        UsageError: bad settings, or the model is pruned already.
    """
    return PruningContext(**settings)(model).__enter__()


class PrunedModel:
    """A model that prunes videos, from entering the context (or `apply`) to leaving it (or `remove`).

    `generate` and direct calls of the model work as before, on shorter prompts. A direct call returns logits of the columns that
    are left (`columns`). Later calls may use the caches; their ids and masks count the whole prompt.
    Refused with UsageError: `inputs_embeds` beside a video, videos or pictures that follow `past_key_values`, videos that are
    encoded already, packed sequences, and gradients of the tower.

    Attributes:
        model, settings: as given.
        report: of the latest call with a video: tokens before and after pruning, rows of every layer, live share, milliseconds.
        columns: of the same call: which columns of its prompt are left.
    """

    def __init__(self, model, settings: PruningContext):
        interface.check_model(model)
        self.model, self.settings = model, settings
        self.report, self.columns = Report(), None
        self._patches = Patches(model, {"generate": self._generate, "forward": self._forward})

    def __enter__(self) -> "PrunedModel":
        self._patches.install()
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model; does nothing the second time.

        Raises:
            UsageError: other code has replaced `generate` or `forward` since.
        """
        self._patches.remove()

    def _forward(self, stock: Callable, call: dict) -> Any:
        pruned, past = self._without_pruned(call, generating=False)
        with cluster_bias(self.model, past and past.sizes):
            out = stock(**pruned)
        _remember(past, out if isinstance(out, tuple) else out.to_tuple())
        return out

    @torch.no_grad()
    def _generate(self, stock: Callable, call: dict) -> Any:
        if call.get("input_ids") is None and call.get("inputs") is not None:
            call = call | {"input_ids": call["inputs"], "inputs": None}
        clock = Clock(self.model.device)
        start = clock.now()
        pruned, past = self._without_pruned(call, generating=True)
        if past is None:
            with self._patches.suspend():
                return stock(**pruned)
        prompt, places = call["input_ids"], pruned["input_ids"].shape[1]
        with cluster_bias(self.model, past.sizes), self._patches.suspend():
            out = stock(**with_whole_prompts(self.model, call, pruned))
        _remember(past, (call.get("past_key_values"), getattr(out, "past_key_values", None)))
        if call.get("pixel_values_videos") is not None:
            self.report.time_ms.total = (clock.now() - start) * 1000
        if isinstance(out, torch.Tensor):
            return with_whole_prompt(prompt, places, out)
        out.sequences = with_whole_prompt(prompt, places, out.sequences)
        return out

    def _without_pruned(self, call: dict, generating: bool) -> tuple[dict, Past | None]:
        """The call without pruned columns, and the `Past` that its cache must carry.

        If nothing is pruned, these are the call itself and None.
        """
        cache = call.get("past_key_values")
        length = 0 if cache is None else int(cache.get_seq_length())
        if (call.get(interface.ENCODED) or {}).get("video") is not None:
            raise UsageError(f"a video in {interface.ENCODED} is encoded already", "pass pixel_values_videos instead")
        if call.get("pixel_values_videos") is not None:
            if length:
                raise UsageError(
                    "a video cannot go on from past_key_values", "pass the whole conversation without them"
                )
            return self._prune(call, generating)
        past = getattr(cache, PAST, None)
        if past is None:
            return call, None
        if not length:  # the cache was emptied, and the next prompt in it is whole
            delattr(cache, PAST)
            return call, None
        past = past.held(length)
        return continued(self.model, call, past, length, generating), past

    def _prune(self, call: dict, generating: bool) -> tuple[dict, Past]:
        """Encodes the videos of a call; returns as `_without_pruned`."""
        settings, visual, pixels = self.settings, self.model.model.visual, call["pixel_values_videos"]
        trained = visual.training and any(weight.requires_grad for weight in visual.parameters())
        if torch.is_grad_enabled() and (trained or pixels.requires_grad):
            raise UsageError(
                "a vision tower that prunes has no gradients",
                "to train the language model alone: model.model.visual.requires_grad_(False)",
            )
        video = check_prompt(self.model, call, generating)
        clock = Clock(visual.patch_embed.proj.weight.device)
        with clock.stage("encode"):
            encoded = encode(
                self.model, pixels, call["video_grid_thw"], budget=settings.budget, method=settings.method,
                method_args=settings.method_args, seconds_per_pair=interface.seconds_per_pair(call), seed=settings.seed,
            )  # fmt: skip
        if not interface.takes_numbers(self.model):
            encoded = replace(encoded, size=None)
        pruned, past = without_pruned(self.model, call, video, encoded, settings.positions, generating)
        self.columns = past.columns
        method, share = patch_method(settings.method, settings.method_args), parse_budget(settings.budget)
        self.report = call_report(self.model, call, pruned, encoded, settings.method, method, share, settings.positions)
        self.report.time_ms.encode = clock.seconds["encode"] * 1000
        self.report.time_ms.encode_prune = encoded.prune_seconds * 1000
        return pruned, past


def _remember(past: Past | None, results: Iterable[Any]) -> None:
    """Attaches `past` to the cache among the results of a call, for later calls that use that cache."""
    for cache in results:
        if past is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, PAST, past)
