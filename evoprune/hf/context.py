"""Prune videos (and optionally images) inside a Hugging Face model, using inputs from the model's own processor.

    with evoprune.EvoPrune(budget=0.1)(model) as run:
        out = model.generate(**inputs)
    run.report

evoprune encodes the videos itself, and then calls the model's own `generate` or `forward` method without the pruned tokens. The
result of `generate` still starts with the unpruned prompt, and callbacks receive its token IDs. Text is never pruned.

Merged tokens are normally weighted by cluster size, which requires a float attention mask. Flash and flex attention don't support
float masks, so they weight all tokens equally.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Unpack

import torch
from torch import nn

from evoprune.backend import Device, accept_biases, weights_bytes
from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.hf.batch import Batch, continued, with_features, without_pruned
from evoprune.hf.columns import PAST, Columns, Past, remember
from evoprune.hf.encoding import INT8, PackedTower, encode_each, patch_config
from evoprune.hf.supported import check_follows, unsupported_reason
from evoprune.hf.visuals import Visuals, find_visuals
from evoprune.hf.whole_prompt import with_whole_prompt, with_whole_prompts
from evoprune.methods import Budget, MethodText, PruneConfig
from evoprune.model import Clock
from evoprune.report import EQUAL_SCORES, Memory, ModelFacts, Report, Sampling, TokenCounts
from evoprune.session import DTYPES, pruning_facts
from evoprune.signatures import explained, suggests, takes
from evoprune.suggestions import Suggesting, unknown_attribute
from evoprune.util import brief, budget_text, converted, from_keywords, option
from evoprune.vision import Encoded

if TYPE_CHECKING:
    from evoprune.keywords import EvoPruneKeywords

METHODS = ("generate", "forward")  # model methods to replace
INNER = "evoprune_inside"  # argument that marks inner calls, which must not prune again
LOCK = threading.Lock()  # shared by all models, because two threads may start pruning the same model at once
Run = Callable[[Callable, dict], Any]  # called with the model's own method and a dict of arguments
SWITCH = "this object only switches pruning on and off"


def _budget(given: Any) -> Any:
    """Return a budget unchanged. An error about an invalid budget lists the presets, so this comes before the type check."""
    Budget.parse(given)
    return given


def _pack(given: Any) -> Any:
    """Return a value of `pack` unchanged, if it is valid."""
    if not isinstance(given, bool) and given != INT8:
        raise UsageError(
            f"pack is {brief(given)}, not True, False or {INT8!r}", "leave it out to encode without packing"
        )
    return given


def _checked_init(init: Callable) -> Callable:
    """Wrap `EvoPrune.__init__` to raise a clearer error for a model or an unknown setting."""
    init = suggests(init)

    @functools.wraps(init)
    def checked(self, *args, **given) -> None:
        for model in (*args, *given.values()):
            if isinstance(model, torch.nn.Module):
                hint = "pass the settings first, then the model: EvoPrune(budget=0.1)(model)"
                raise UsageError(f"an object of class {type(model).__name__} is not a setting", hint)
        init(self, *args, **given)

    return checked


@converted
@dataclass(frozen=True)
class EvoPrune(Suggesting):
    """Pruning settings for a Hugging Face model. Call this object with a model to get a context manager that prunes inside it.

    If `pack` is set, the context manager also stores a packed copy of the tower (`hf.encoding.PackedTower`), which takes as much
    memory as the tower's linear layers: 1.2 GiB for a 3B model in bfloat16, or 0.6 GiB in 8 bits. The model itself doesn't change.

    Raises:
        UsageError: If the budget, method, or `positions` setting is invalid, or the method resizes frames or reads the question.
        TypeError: If an option is unknown.
    """

    MEANT: ClassVar = {"generate": "model.generate inside `with evoprune.EvoPrune(budget=0.1)(model):`"}

    budget: Budget.Given = option(
        Budget.DEFAULT,
        'Share of the visual tokens of each video to keep: a number in (0, 1], a percentage such as "25%", or a preset.',
        accept=_budget,
    )
    method: str = option(MethodText.DEFAULT, "Name of a pruning method, NAME:SETTING=VALUE for its settings.")
    positions: Literal["host", "qwen"] = option(
        "host",
        "host: every token gets the model's own position, so that budget 1.0 reproduces the model's output. "
        "qwen: text after a video starts at the end of the video's time, as in the training of Qwen's models.",
    )
    seed: int = option(0, "Seed of methods that draw at random.")
    pack: bool | Literal["int8"] = option(
        False,
        "On a CPU, encode faster, with packed copies of the tower's linear layers. "
        "int8: with 8-bit copies, twice as fast as float32 and less exact.",
        accept=_pack,
    )
    pictures: bool = option(
        False,
        "Prune images too, each to the same share of its tokens. Otherwise they stay whole.",
    )

    def __post_init__(self):
        if self.positions not in ("host", "qwen"):
            raise UsageError(f"positions is {self.positions!r}, which is unknown", "use host or qwen")
        self.pruning  # noqa: B018 (checked here)

    @functools.cached_property
    def pruning(self) -> PruneConfig:
        return patch_config(Budget.parse(self.budget), self.method, self.seed)

    def __call__(self, model: nn.Module) -> "PrunedModel":
        """Return a context manager that prunes inside a Hugging Face model during a `with` block.

        Raises:
            ModelError: If the model's class is not in `interface.MODELS`.
        """
        return PrunedModel(model, self)

    def __enter__(self) -> NoReturn:
        raise UsageError(f"{self} has no model yet", "with evoprune.EvoPrune(budget=0.1)(model) as run: ...")

    def __exit__(self, *_: object) -> None:
        """Do nothing. Python looks up this method before calling `__enter__`, whose error message explains the correct usage."""


EvoPrune.__init__ = _checked_init(EvoPrune.__init__)  # wrap the method that `dataclass` generated
EvoPrune.__doc__ = explained(EvoPrune.__doc__, EvoPrune)
# Show the public name in help, repr, and tracebacks, because there is also a pruning method named EvoPrune.
EvoPrune.__module__ = "evoprune"


@takes(EvoPrune)
def apply(model: nn.Module, **settings: "Unpack[EvoPruneKeywords]") -> "PrunedModel":
    """Start pruning inside a Hugging Face model. To stop, call `evoprune.remove(model)`, or `remove()` on the result.

    `settings` are the fields of `EvoPrune`.

    Raises:
        ModelError: If the model class isn't supported (see `interface.MODELS`).
        UsageError: If the settings are invalid, the model is already being pruned, or its tower cannot be packed.
        TypeError: If a setting is unknown.
    """
    (pruning,) = from_keywords(settings, EvoPrune)
    return pruning(model).__enter__()


def remove(model: "nn.Module | PrunedModel") -> None:
    """Stop pruning inside a Hugging Face model, regardless of whether `apply` or a context manager was used.

    Does nothing if the model isn't being pruned. For calls still in progress, see `PrunedModel.remove`.

    Args:
        model: The model, or the result of `apply`.

    Raises:
        ModelError: If the model class isn't supported (see `interface.MODELS`).
    """
    if isinstance(model, PrunedModel):
        model = model.model
    interface.check_class(model)
    if end := remover_of(model):
        end()


class PrunedModel:
    """A Hugging Face model whose videos are pruned, either inside a `with` block or between `apply` and `remove`.

    `generate` and direct calls to the model work as before, but on shorter prompts. Direct calls return logits only for the
    remaining columns (see `columns`). A returned KV cache can be passed to later calls, whose token IDs and masks must cover the
    entire prompt, including pruned tokens. The model may be called from multiple threads at the same time.

    Direct calls to inner modules and methods, such as `model.model`, `model.model.visual`, and `model.get_video_features`, are not
    pruned. Pruned columns are also removed from `labels` and `shift_labels`, so models can be trained on pruned prompts.

    Passing videos or images together with a KV cache raises UsageError. With a budget below 1.0, UsageError is also raised for
    `inputs_embeds` combined with a video, already encoded videos, packed sequences, tower gradients, and per-column arguments other
    than labels and the processor output. If nothing needs to be pruned and `positions` is "host", the model's own code runs these
    calls instead. Hooks on the tower's modules are either skipped or called with evoprune's rows, and a warning lists the affected
    modules.
    """

    def __init__(self, model: nn.Module, settings: EvoPrune):
        interface.check_class(model)
        interface.tower_of(model)
        interface.accept_features(model)
        accept_biases(model)
        self.model = model
        self.settings = settings
        self._packed = None
        # The latest report and its prompt's remaining columns, stored for each thread and once for all threads.
        self._latest_of_thread = threading.local()
        self._latest_overall = (Report(), None)
        runs = dict(zip(METHODS, (self._generate, self._forward), strict=True))
        self._patches = Patches(model, runs, self.remove)

    def __repr__(self) -> str:
        state = "active" if self._patches.active else "not active"
        pruning = self.settings.pruning
        budget = budget_text(pruning.budget.recorded)
        return f"<PrunedModel: {pruning.name} at budget {budget}, {state}>"

    if not TYPE_CHECKING:  # with `__getattr__`, type checkers would accept any attribute

        def __getattr__(self, name: str):
            owner = f"{type(self).__name__!r} object"
            if hasattr(vars(self).get("model"), name):
                raise AttributeError(f"{owner} has no attribute {name!r}; use model.{name}: {SWITCH}")
            of_report = {each.name: f"run.report.{each.name}" for each in fields(Report)}
            raise unknown_attribute(owner, name, of_report, dir(self))

        def __call__(self, *_: object, **__: object) -> NoReturn:
            raise TypeError(f"call the model itself: {SWITCH}")

    @property
    def report(self) -> Report:
        """The latest call's report: tokens before and after pruning, rows per layer, live share, and stage times in milliseconds.

        Each thread sees the report for its own latest call. A thread that hasn't called the model yet sees the latest report from
        any thread.

        The report is empty before the first call. If pruning is inactive, the latest call had no video, or the model's own code ran
        the latest call, the report contains only a warning with the reason. A call that continues from a pruned prompt's KV cache
        doesn't change the report.
        """
        latest, _ = self._latest
        if latest.pruning.method is None and not latest.warnings and not self._patches.active:
            return Report(warnings=["not_active"])
        return latest

    @property
    def columns(self) -> Columns | None:
        """The remaining prompt columns in the call described by `report`, or None if the report is empty."""
        return self._latest[1]

    @property
    def _latest(self) -> tuple[Report, Columns | None]:
        return getattr(self._latest_of_thread, "call", self._latest_overall)

    @_latest.setter
    def _latest(self, call: tuple[Report, Columns | None]) -> None:
        self._latest_of_thread.call = self._latest_overall = call

    def __enter__(self) -> "PrunedModel":
        pack = self.settings.pack
        packed = self._packed
        if pack and packed is None:
            packed = PackedTower(self.model.model.visual, pack)
        self._patches.install()
        self._packed = packed
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model's own methods. Calling this again is a no-op.

        If other code, such as torch.compile or an accelerate hook, has wrapped `generate` or `forward` in the meantime, the wrapper
        stays in place, but from now on it calls the model's own method. If another thread is still running `generate`, that call
        finishes with pruning enabled.
        """
        self._patches.remove()
        self._packed = None

    def _forward(self, stock: Callable, call: dict) -> Any:
        inside = call.get(INNER)
        call = {name: value for name, value in call.items() if name != INNER}
        past = None
        if inside is None:
            call, past = self._without_pruned(call, generating=False)
        sizes = getattr(inside or past, "sizes", None)
        if sizes is not None and interface.accepts_float_mask(self.model):
            call = interface.with_cluster_bias(self.model, call, sizes)
        out = stock(**call)
        remember(past, out if isinstance(out, tuple) else out.to_tuple())
        return out

    @torch.no_grad()
    def _generate(self, stock: Callable, call: dict) -> Any:
        if call.get("input_ids") is None and call.get("inputs") is not None:
            call = call | {"input_ids": call["inputs"], "inputs": None}
        clock = Clock(self.model.device)
        start = clock.now()
        with self._patches.outer_call():
            if interface.is_assistant(call):
                call = call | {INNER: _InnerCall()}
            if call.get(INNER) is not None:
                return stock(**call)
            pruned, past = self._without_pruned(call, generating=True)
            if past is None:
                return stock(**pruned | {INNER: _InnerCall()})
            report = self.report
            remember(past, (interface.cache_of(call),))  # before `generate` runs, because a callback may abort it
            out = stock(**with_whole_prompts(self.model, call, pruned) | {INNER: _InnerCall(past.sizes)})
        remember(past, (interface.cache_of(out) if isinstance(out, Mapping) else None,))
        if self._prunes(call):
            report.time_ms.total = (clock.now() - start) * 1000
        prompt = call["input_ids"]
        places = pruned["input_ids"].shape[1]
        if isinstance(out, torch.Tensor):
            return with_whole_prompt(prompt, places, out)
        out.sequences = with_whole_prompt(prompt, places, out.sequences)
        return out

    @torch.compiler.disable  # only the model's own code benefits from compilation
    def _without_pruned(self, call: dict, generating: bool) -> tuple[dict, Past | None]:
        """Prune a call. Return the pruned call and the `Past` for its KV cache, or the unchanged call and None."""
        cache = interface.cache_of(call)
        length = 0 if cache is None else int(cache.get_seq_length())
        if self._prunes(call):
            if length:
                hint = "pass the whole conversation without a KV cache"
                raise UsageError("a video cannot follow a KV cache", hint)
            as_host = self.settings.positions == "host" or call.get("position_ids") is not None
            optional = as_host and not self.settings.pruning.prunes
            if (reason := unsupported_reason(self.model, call, generating, optional)) is None:
                return self._prune(call, generating)
            if not optional:
                raise reason
            self._latest = Report(warnings=["own_code"]), None
            return call, None
        past = getattr(cache, PAST, None)
        if past is None or not length:  # an empty cache starts a new prompt, which isn't pruned
            why = "pictures_only" if interface.has_picture(call) else "no_video"
            self._latest = Report(warnings=[why]), None
            if past is not None:
                delattr(cache, PAST)
            return call, None
        past = past.cropped(length)
        check_follows(call, generating)
        return continued(Batch.of(self.model, call, generating), past, length).into(call), past

    def _prunes(self, call: dict) -> bool:
        return interface.has_video(call) or (self.settings.pictures and interface.has_picture(call))

    def _prune(self, call: dict, generating: bool) -> tuple[dict, Past]:
        """Encode the videos in a call (and the images, if they are pruned), and remove the pruned columns."""
        settings = self.settings
        visual = interface.tower_of(self.model)
        packed = self._packed
        visuals = find_visuals(self.model, call, settings.pictures)
        batch = Batch.of_prompt(self.model, call, settings.positions, generating)
        interface.warn_of_hooks(visual)
        clock = Clock(visual.patch_embed.proj.weight.device)
        with clock.stage("encode"):
            tower = visual
            if packed is not None:
                tower = packed.current()
            encoded = encode_each(tower, visuals.pixels, visuals.grids, settings.pruning)
        batch, past = without_pruned(batch, visuals.prune(batch.ids, encoded))
        pruned = batch.into(call) | with_features(self.model, call, visuals, encoded)
        report = call_report(self.model, call, pruned, visuals, encoded, settings)
        if packed is not None:
            report.memory.weights_bytes += packed.nbytes
        report.time_ms.encode = clock.seconds["encode"] * 1000
        report.time_ms.encode_prune = sum(each.prune_seconds for each in encoded) * 1000
        self._latest = report, past.columns
        return pruned, past


def call_report(
    model, call: dict, pruned: dict, visuals: Visuals, encoded: Sequence[Encoded], settings: EvoPrune
) -> Report:
    """Return the report for a call with pruned inputs, without stage times, which the caller adds.

    Args:
        call: The original arguments. If they include `position_ids`, the `positions` setting has no effect.
        pruned: The arguments to pass to the model.
    """
    device = str(model.device)
    units = sum(len(each.unit_to_row) for each in encoded)
    kept = sum(len(each.kept) for each in encoded)
    mask = pruned.get("attention_mask")
    grids = visuals.grids.tolist()
    prompt = pruned["input_ids"].numel() if mask is None else int(mask.sum())
    tokens = (call["input_ids"] == model.config.image_token_id) | (call["input_ids"] == model.config.video_token_id)
    visual = kept + int(tokens.sum()) - units  # includes all tokens from unpruned inputs
    warnings = []
    if interface.has_picture(call) and all(visuals.videos):
        warnings.append("pictures_whole")
    if all(each.flat for each in encoded):
        warnings.append(EQUAL_SCORES)
    sampling = Sampling()
    if len(grids) == 1:
        sampling.grid_thw = grids[0]
        if visuals.videos[0] and (call.get("second_per_grid_ts") is not None or interface.has_clock(model)):
            sampling.seconds_per_pair = visuals.seconds[0]
    positions = settings.positions if call.get("position_ids") is None else "given"
    return Report(
        sampling=sampling,
        pruning=pruning_facts(settings.pruning, units, encoded, positions),
        tokens=TokenCounts(prompt - visual, visual, prompt),
        memory=Memory(weights_bytes(model), Device(device).peak_memory(), *Device(device).memory_in_use()),
        model=ModelFacts(
            id=model.name_or_path or type(model).__name__,
            dtype=next((name for name, dtype in DTYPES.items() if dtype == model.dtype), str(model.dtype)),
            device=device,
        ),
        env=Device(device).environment(),
        warnings=warnings,
    )


@dataclass(frozen=True)
class _InnerCall:
    """Tells `forward` that it is being called from `generate`, so the columns have already been pruned."""

    # Cluster sizes of the prompt columns, float32 `[B, C]`, or None if all are 1.
    sizes: torch.Tensor | None = None

    def __deepcopy__(self, _) -> None:
        """Return None, so that copies of a call aren't marked as inner calls.

        `generate` copies its arguments for an assistant model, whose `forward` method may not accept this argument.
        """
        return None


def remover_of(model) -> Callable[[], None] | None:
    """Return the function that stops pruning inside a model, or None if the model isn't being pruned."""
    own = vars(model)
    patches = (inspect.unwrap(own[name], stop=_is_active) for name in METHODS if name in own)
    return next((patch.end for patch in patches if _is_active(patch)), None)


class Patches:
    """Temporarily replaces methods of a model object with evoprune functions.

    The replaced methods can call each other. For example, `generate` calls `forward` for each token. These inner calls are marked
    with the `INNER` argument, because a flag on the model would affect other threads calling the same model at the same time.

    Args:
        runs: The replacement functions, by method name.
        end: The function to return from `remover_of`. It must call `remove` and free the owner's other resources.
    """

    def __init__(self, model, runs: dict[str, Run], end: Callable[[], None]):
        self._model = model
        self._runs = runs
        self._end = end
        self._installed: dict[str, _Patch] = {}
        self._replaced: dict[str, Any] = {}
        self._calls = 0

    def install(self) -> None:
        """Replace the model's methods, unless they are already replaced.

        Raises:
            UsageError: If other `Patches` are installed in the model.
        """
        with LOCK:
            if not self._installed:
                if remover_of(self._model):
                    hint = "call evoprune.remove(model) first; "
                    hint += "a service calls evoprune.apply(model, ...) once, at its start"
                    raise UsageError("this model is already pruned", hint)
                own = vars(self._model)
                self._replaced = {name: own[name] for name in self._runs if name in own}
                for name, run in self._runs.items():
                    self._installed[name] = _Patch(getattr(self._model, name), run, self._end)
                    setattr(self._model, name, self._installed[name])
            self._activate(True)

    def remove(self) -> None:
        """Restore the original methods. Does nothing if no methods are replaced.

        If other code has wrapped a replaced method in the meantime, the wrapper stays in place, but from now on it calls the
        model's own method. Calls in progress in other threads can still make inner calls until they return.
        """
        with LOCK:
            self._activate(False)
            self._restore()

    @contextmanager
    def outer_call(self) -> Iterator[None]:
        """Return a context manager for a call with inner calls. The methods stay replaced until the call returns."""
        with LOCK:
            self._calls += 1
        try:
            yield
        finally:
            with LOCK:
                self._calls -= 1
                self._restore()

    @property
    def active(self) -> bool:
        """Whether new calls run the replacement functions instead of the model's own methods."""
        return any(patch.active for patch in self._installed.values())

    def _activate(self, active: bool) -> None:
        for patch in self._installed.values():
            patch.active = active

    def _restore(self) -> None:
        """Restore the original methods, unless the replacements are active or still needed by a call in progress."""
        if self._calls or self.active:
            return
        for name, patch in self._installed.items():
            if vars(self._model).get(name) is patch:
                delattr(self._model, name)
                if name in self._replaced:
                    setattr(self._model, name, self._replaced[name])
        self._installed, self._replaced = {}, {}


class _Patch:
    """Replaces a single method of a model. While the patch is inactive, only inner calls run the replacement."""

    def __init__(self, stock: Callable, run: Run, end: Callable[[], None]):
        functools.update_wrapper(self, stock)
        self.active = True
        self.end = end
        self._stock = stock
        self._run = run
        self._own_signature = inspect.signature(stock)
        others = [parameter for name, parameter in self._own_signature.parameters.items() if name != INNER]
        at = next((i for i, parameter in enumerate(others) if parameter.kind is parameter.VAR_KEYWORD), len(others))
        # Add the argument to the signature, because `generate` rejects any argument missing from `forward`.
        others.insert(at, inspect.Parameter(INNER, inspect.Parameter.KEYWORD_ONLY, default=None))
        self.__signature__ = self._own_signature.replace(parameters=others)

    def __call__(self, *args, **kwargs):
        if not (self.active or INNER in kwargs):
            return self._stock(*args, **kwargs)
        if not args:  # inner calls, which torch.compile may trace, always take this path
            return self._run(self._stock, kwargs)
        call = self._own_signature.bind(*args, **kwargs).arguments
        return self._run(self._stock, call | call.pop("kwargs", {}))

    def __reduce_ex__(self, _):
        if self.active:
            hint = "call evoprune.remove(model) first"
            raise UsageError("a model cannot be copied or pickled while it is pruned", hint)
        return _identity, (self._stock,)


def _is_active(function: Callable) -> bool:
    return isinstance(function, _Patch) and function.active


def _identity(x: Any) -> Any:
    return x
