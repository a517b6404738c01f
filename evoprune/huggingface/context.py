"""For people who already hold a Hugging Face model: pruning inside it, on the inputs of its own processor.

    with evoprune.EvoPrune(budget=0.1)(model) as run:
        out = model.generate(**inputs)
    run.report

Videos are encoded here, and `generate` and `forward` are called without the columns of what was pruned; all that they do then is
the model's own. What `generate` returns begins with the whole prompt again, and what is called with ids while it runs sees
them so. Pictures are left whole, and text is never pruned. Under flash or flex attention, which take no masks of numbers, a token
counts once, whatever it stands for.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.huggingface import interface
from evoprune.huggingface.cluster_bias import cluster_bias
from evoprune.huggingface.columns import with_whole_prompt
from evoprune.huggingface.inputs import Past, check_prompt, continued, without_pruned
from evoprune.huggingface.whole_prompt import with_whole_prompts
from evoprune.methods.base import Method
from evoprune.model.clock import Clock
from evoprune.model.linear import weights_bytes
from evoprune.model.machine import environment, peak_memory
from evoprune.pipeline.device import DTYPES
from evoprune.pruning.budget import DEFAULT, keep_count, parse_budget
from evoprune.report import Memory, ModelFacts, Pruning, Report, Sampling, TokenCounts
from evoprune.vision.encoded import Encoded, joined
from evoprune.vision.encoder import encode as encode_video
from evoprune.vision.tower import tower_shape

PAST = "evoprune"  # attribute of a cache, which is copied with it


def encode(
    model,
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    *,
    budget: float | str = 1.0,
    method: str = methods.DEFAULT,
    method_args: dict[str, str] | None = None,
    question: torch.Tensor | None = None,
    seconds_per_pair: float | Sequence[float] = 1.0,
    seed: int = 0,
) -> Encoded:
    """Runs the vision tower of `model` on one video or several, pruned to `budget` each.

    Args:
        model: a Hugging Face `Qwen2_5_VLForConditionalGeneration` or `Qwen2VLForConditionalGeneration`, or anything with
            such a tower at `model.visual`.
        pixel_values_videos: `[patches, 1176]`, as the processor makes them.
        video_grid_thw: int64 `[videos, 3]`: grids, and patches down and across.
        budget: share of the visual tokens that is kept, a number in (0, 1] or a preset's name; 1.0 is the tower's own output.
        method, method_args: name of a pruning method, and its settings as texts.
        question: `[Q, hidden]`, `model.get_input_embeddings()` of the question's tokens, for methods that read it.
        seconds_per_pair: of all videos, or of each (the processor's `second_per_grid_ts`). seed: of methods that draw at random.

    Returns:
        `Encoded`; `kept` and `owner` count units over all videos, in the order of the placeholder tokens.

    Raises:
        UsageError: a bad budget or method, one that acts on the frames themselves or reads a question that is not there, or
            patches that do not fit the grids.
        ModelError: there is no such tower.
    """
    share, rule = parse_budget(budget), _rule(method, method_args, asked=question is not None)
    visual = interface.tower_of(model)
    merge = visual.config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in video_grid_thw.tolist()]
    sizes = [t * h * w * merge**2 for t, h, w in grids]
    if sum(sizes) != len(pixel_values_videos) or not sizes:
        raise UsageError(
            f"{len(pixel_values_videos)} patches do not fit video_grid_thw {video_grid_thw.tolist()}",
            "pass pixel_values_videos and video_grid_thw of one call of the processor",
        )
    seconds = [seconds_per_pair] * len(grids) if isinstance(seconds_per_pair, (int, float)) else seconds_per_pair
    tower = tower_shape(visual)
    videos = []
    for patches, grid, step in zip(pixel_values_videos.split(sizes), grids, seconds, strict=True):
        plan = rule.plan(tower, grid, keep_count(share, prod(grid)))
        how = {"question": question, "seconds_per_pair": step, "seed": seed}
        videos.append(encode_video(visual, [patches], plan, rule, **how))
    return joined(videos)


def _rule(name: str, args: dict[str, str] | None, asked: bool = False) -> Method:
    """A method that can work on a processor's output; `asked`: with the question."""
    rule = methods.get(name, args)
    if rule.acts == "input":
        raise UsageError(
            f"method {name} acts on frames, and these are patches", "use VideoQA, or shrink the video first"
        )
    if rule.reads_question and not asked:
        raise UsageError(f"method {name} reads the question, which is not known here", "use VideoQA, or another method")
    return rule


@dataclass(frozen=True)
class EvoPrune:
    """How to prune; called with a model it gives the context in which that model prunes.

    Attributes:
        budget: share of the visual tokens that is kept of each video, a number in (0, 1] or a preset's name.
        method, method_args: name of a pruning method, and its settings as texts.
        positions: "host" has all tokens where the model itself would have them, so that budget 1.0 is its own output;
            "qwen" starts text after the end of a video's time, as Qwen's models were trained (`language.positions`).
        seed: for methods that draw lots.

    Raises:
        UsageError: a bad budget or method, one that acts on the frames themselves or reads the question, unknown positions.
    """

    budget: float | str = DEFAULT
    method: str = methods.DEFAULT
    method_args: dict[str, str] | None = None
    positions: Literal["host", "qwen"] = "host"
    seed: int = 0

    def __post_init__(self):
        parse_budget(self.budget)
        _rule(self.method, self.method_args)
        if self.positions not in ("host", "qwen"):
            raise UsageError(f"positions {self.positions!r} are not known", "host or qwen")

    def __call__(self, model) -> "Pruned":
        """`Pruned`, not yet begun: for a with-block. Raises ModelError where the model is another one."""
        return Pruned(model, self)


def apply(model, **settings) -> "Pruned":
    """Prunes inside `model` from now on, until `remove()` of what is returned; settings are those of `EvoPrune`.

    Raises:
        ModelError: not a `Qwen2_5_VL-` or `Qwen2VLForConditionalGeneration`. UsageError: bad settings, or it is pruned already.
    """
    return EvoPrune(**settings)(model).__enter__()


class Pruned:
    """A model in which videos are pruned as they are encoded, from entering the context, or `apply`, to leaving it, or `remove`.

    `generate` and calls of the model do what they always do, on shorter prompts. A call by hand returns logits of the columns that
    are left (`columns`). Caches may be used in later calls as if nothing had been dropped: ids and masks count the whole prompt.
    Refused (UsageError, with a hint) are `inputs_embeds` beside a video, videos or pictures that go on from `past_key_values`,
    videos that are encoded already, packed sequences, and gradients of the tower.

    Attributes:
        report: of the latest call with a video: tokens in and kept, rows of every layer, live share, times in milliseconds.
        columns: of that call: which columns of its prompt are left.
    """

    def __init__(self, model, settings: EvoPrune):
        interface.check_model(model)
        self.model, self.settings = model, settings
        self.report, self.columns = Report(), None
        self._patches: dict[str, _Patch] = {}
        self._replaced: dict[str, Any] = {}
        self.inside = False  # the model runs on a pruned prompt

    def __enter__(self) -> "Pruned":
        if self._patches:
            return self
        patches = {"generate": self._generate, "forward": self._forward}
        own = vars(self.model)
        if any(isinstance(inspect.unwrap(own[name], stop=_is_patch), _Patch) for name in patches if name in own):
            raise UsageError("this model is pruned already", "remove that first, or leave its with-block")
        self._replaced = {name: own[name] for name in patches if name in own}
        self._patches = {name: _Patch(self, getattr(self.model, name), run) for name, run in patches.items()}
        for name, patch in self._patches.items():
            setattr(self.model, name, patch)
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def remove(self) -> None:
        """Leaves the model as it was. Once it has been removed nothing more happens.

        Raises:
            UsageError: something else has been put in the place of what was put there.
        """
        for name, patch in self._patches.items():
            if vars(self.model).get(name) is not patch:
                raise UsageError(f"something else has replaced the model's {name} since", "take that away first")
        for name in self._patches:
            delattr(self.model, name)
        for name, replaced in self._replaced.items():
            setattr(self.model, name, replaced)
        self._patches, self._replaced = {}, {}

    def _forward(self, stock: Callable, call: dict) -> Any:
        small, past = self._short(call, generating=False)
        with cluster_bias(self.model, past and past.counts):
            out = stock(**small)
        _remember(past, out if isinstance(out, tuple) else out.to_tuple())
        return out

    @torch.no_grad()
    def _generate(self, stock: Callable, call: dict) -> Any:
        if call.get("input_ids") is None and call.get("inputs") is not None:
            call = call | {"input_ids": call["inputs"], "inputs": None}
        clock = Clock(self.model.device)
        start = clock.now()
        small, past = self._short(call, generating=True)
        if past is None:
            return self._undisturbed(stock, small)
        prompt, places = call["input_ids"], small["input_ids"].shape[1]
        with cluster_bias(self.model, past.counts):
            out = self._undisturbed(stock, with_whole_prompts(self.model, call, small))
        _remember(past, (call.get("past_key_values"), getattr(out, "past_key_values", None)))
        if call.get("pixel_values_videos") is not None:
            self.report.time_ms.total = (clock.now() - start) * 1000
        if isinstance(out, torch.Tensor):
            return with_whole_prompt(prompt, places, out)
        out.sequences = with_whole_prompt(prompt, places, out.sequences)
        return out

    def _undisturbed(self, stock: Callable, call: dict) -> Any:
        """What the model does by itself."""
        self.inside = True
        try:
            return stock(**call)
        finally:
            self.inside = False

    def _short(self, call: dict, generating: bool) -> tuple[dict, Past | None]:
        """The call without what is pruned, and what its cache must remember; the call itself where there is nothing to do."""
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
        if not length:  # it was emptied, and what it will hold now is whole
            delattr(cache, PAST)
            return call, None
        past = past.held(length)
        return continued(self.model, call, past, length, generating), past

    def _prune(self, call: dict, generating: bool) -> tuple[dict, Past]:
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
                method_args=settings.method_args, seconds_per_pair=interface.seconds_per_grid(call), seed=settings.seed,
            )  # fmt: skip
        if not interface.takes_numbers(self.model):
            encoded = replace(encoded, size=None)
        small, past = without_pruned(self.model, call, video, encoded, settings.positions, generating)
        self.columns = past.columns
        self.report = self._report(call, small, encoded, clock.seconds["encode"])
        return small, past

    def _report(self, call: dict, small: dict, encoded: Encoded, seconds: float) -> Report:
        settings, model = self.settings, self.model
        device, units = str(model.device), len(encoded.owner)
        mask, grids = small.get("attention_mask"), call["video_grid_thw"].tolist()
        prompt = small["input_ids"].numel() if mask is None else int(mask.sum())
        image = int((call["input_ids"] == model.config.image_token_id).sum())
        visual = len(encoded.kept) + image
        one, rule = len(grids) == 1, _rule(settings.method, settings.method_args)
        timed = one and (call.get("second_per_grid_ts") is not None or interface.has_clock(model))
        report = Report(
            sampling=Sampling(
                grid_thw=grids[0] if one else None,
                seconds_per_grid=interface.seconds_per_grid(call)[0] if timed else None,
            ),
            pruning=Pruning(
                method=settings.method,
                args=asdict(rule),
                budget=rule.reported_budget(parse_budget(settings.budget)),
                kept_ratio=len(encoded.kept) / units,
                visual_tokens_in=units,
                visual_tokens_kept=len(encoded.kept),
                encoder_rows=len(encoded.rows),
                encoder_live_share=encoded.live_share,
                layers=[list(layer) for layer in encoded.layers],
                kept_per_grid=encoded.kept_per_pair,
                positions=settings.positions if call.get("position_ids") is None else "given",
            ),
            tokens=TokenCounts(prompt - visual, visual, prompt),
            memory=Memory(weights_bytes(model), peak_memory(device)),
            model=ModelFacts(
                id=model.name_or_path or None,
                dtype=next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype)),
                device=device,
            ),
            env=environment(device),
            warnings=["equal_scores"] if encoded.flat else [],
        )
        report.time_ms.encode, report.time_ms.encode_prune = seconds * 1000, encoded.prune_seconds * 1000
        return report


def _remember(past: Past | None, results: Iterable[Any]) -> None:
    """Gives the cache among the results of a call what later ones have to know of it."""
    for cache in results:
        if past is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, PAST, past)


class _Patch:
    """Stands in for a method of a model while that one is pruned."""

    def __init__(self, pruned: Pruned, stock: Callable, run: Callable[[Callable, dict], Any]):
        functools.update_wrapper(self, stock)
        self._pruned, self._stock, self._run = pruned, stock, run
        self._signature = inspect.signature(stock)

    def __call__(self, *args, **kwargs):
        if self._pruned.inside:
            return self._stock(*args, **kwargs)
        call = self._signature.bind(*args, **kwargs).arguments
        return self._run(self._stock, call | call.pop("kwargs", {}))

    def __reduce_ex__(self, _):
        raise UsageError("a model cannot be copied or pickled while it is pruned", "remove the pruning first")


def _is_patch(function: Callable) -> bool:
    return isinstance(function, _Patch)
