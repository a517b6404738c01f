"""Loads a model. Whatever can be checked is checked before the weights are read, and no code that comes with it is ever run."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from evoprune.backend.limits import available_cores
from evoprune.bundled import Demo
from evoprune.cpu.linear import PackingTime, weights_bytes
from evoprune.cpu.precision import AUTO_THREADS
from evoprune.cpu.quantize import kinds
from evoprune.errors import ModelError, OutOfMemory, is_out_of_memory
from evoprune.keywords import from_keywords
from evoprune.language.prompt import Tokenizer, has_tokenizer, load_tokenizer
from evoprune.model.config import GenerationSettings
from evoprune.model.cost import shortage
from evoprune.model.weights import QwenVL
from evoprune.report.records import ModelFacts
from evoprune.session.loading.folder import eos_ids, fingerprint, read_generation
from evoprune.session.loading.found import DTYPES, FoundModel, find_model
from evoprune.session.loading.warm import warm_up
from evoprune.session.loading.weights import (
    load_weights,
    make_ready,
    needed_bytes,
    page_in_weights,
    random_model,
    stay_mapped,
)
from evoprune.session.options import ModelOptions
from evoprune.text import size
from evoprune.video.info import VIDEO, Video, world_of
from evoprune.video.plan import InputLimits

# Weights of a model for each of its threads. The demo model has 4 million, the smallest Qwen 2 billion.
WEIGHTS_PER_THREAD = 32_000_000


@dataclass
class LoadedModel:
    """A model that is ready to answer."""

    model: QwenVL  # the weights, on `device` in `dtype`, and their config
    tokenizer: Tokenizer | None  # with a chat template; None only for random weights without tokenizer files
    limits: dict[str, InputLimits]  # of videos and of pictures, by kind
    eos_ids: tuple[int, ...]  # that end an answer
    generation: GenerationSettings  # of its files
    id: str  # the name of a bundled demo, or the folder or hub id as given
    revision: str | None  # commit on the hub, None for anything local
    dtype: str  # "bf16", "fp16" or "fp32"
    device: str
    demo: Demo | None  # which bundled demo model this is, with its trained weights
    load_format: str  # "auto" or "dummy" (random weights)
    quantize: str
    weights_bytes: int  # of all weights in memory, tied ones counted once
    fingerprint: str | None  # changes when the weights' files do, or their place; None where that is unknown
    found: FoundModel  # the model before it was loaded
    load_seconds: dict[str, float]  # of the steps of loading: "tokenizer", "weights" and "prepare"
    packing: PackingTime  # how long layers have packed since, which they do when they are first called with few rows
    ready: Callable[[], None] = lambda: None  # waits for what was begun beside loading (`warm_up`)

    def __repr__(self) -> str:
        return f"<LoadedModel {self.id!r} in {self.dtype} on {self.device}>"

    @property
    def is_demo(self) -> bool:
        return self.demo is not None

    def knows(self, info: Video) -> bool:
        """Whether a file may be of a kind that the model knows. Of a demo model, only clips of its world are."""
        return self.demo is None or world_of(info) == self.demo.world

    @property
    def video(self) -> InputLimits:
        """The limits of videos; the patch sizes are those of pictures too."""
        return self.limits[VIDEO]

    def facts(self) -> ModelFacts:
        return ModelFacts(self.id, self.revision, self.dtype, self.quantize, self.device, self.load_format)


def load_model(
    model: str | ModelOptions | FoundModel = "demo",
    *,
    pack: bool = True,
    to_answer: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> LoadedModel:
    """Loads a Qwen3-VL, Qwen2.5-VL or Qwen2-VL model: its name, with other fields of `ModelOptions`; or those; or a found one.

    `pack`: on a CPU, rearrange the weights for speed if there is memory for it; they can no longer be read. `to_answer`: refuse a
    model that has no tokenizer, before its weights are read. `progress`: called with layers quantised and layers in all.

    Raises UsageError: an option that makes no sense here. OutOfMemory: the weights do not fit. TypeError: an unknown keyword.
    ModelError: the model is missing, of another kind, damaged, or out of reach.
    """
    if isinstance(model, str):
        (model,) = from_keywords({"model": model, **options}, ModelOptions)
    found = model if isinstance(model, FoundModel) else find_model(model)
    model, folder = found.options, found.folder
    use_threads(model.threads, found)
    tokenizer, start = None, time.perf_counter()
    if folder is not None and (has_tokenizer(folder) or not found.random):
        tokenizer = load_tokenizer(folder)
    if to_answer and tokenizer is None:
        raise no_tokenizer(model.model)
    generation = read_generation(folder)
    ends = eos_ids(folder, generation, found.config, tokenizer)
    files, seconds = found.files, {"tokenizer": time.perf_counter() - start}
    ready = warm_up(found.config, DTYPES[found.dtype], found.device)
    weights, packing = _weights(found, pack, progress, seconds)
    return LoadedModel(
        model=weights,
        tokenizer=tokenizer,
        limits=found.limits,
        eos_ids=ends,
        generation=generation,
        id=model.model,
        revision=found.commit,
        dtype=found.dtype,
        device=str(found.device),
        demo=None if found.random else found.demo,
        load_format=model.load_format,
        quantize=model.quantize,
        weights_bytes=weights_bytes(weights),
        fingerprint=fingerprint(model.model, found.commit, folder, files),
        found=found,
        load_seconds=seconds,
        packing=packing,
        ready=ready,
    )


def _weights(
    found: FoundModel, pack: bool, progress: Callable[[int, int], None] | None, seconds: dict[str, float]
) -> tuple[QwenVL, PackingTime]:
    """The weights, ready to be used. Writes the times of the parts into `seconds`. Raises OutOfMemory: they do not fit."""
    name, device, files, quantize = found.id, found.device, found.files, found.options.quantize
    form = DTYPES[found.dtype], device
    hint = "use a smaller model" + (", or bf16 weights (dtype bf16)" if found.dtype == "fp32" else "")
    start = time.perf_counter()

    def needed(kind: str) -> int:
        return needed_bytes(found.config, form[0], kind, mapped=stay_mapped(files, *form, kind))

    if short := shortage(needed(quantize), str(device)):
        fit = [kind for kind in kinds(device) if not shortage(needed(kind), str(device))]
        less = f", or fewer bits: quantize {fit[0]} needs about {size(needed(fit[0]))}" if fit else ""
        raise OutOfMemory(f"loading {name} {short} ({device})", hint + less, stage="load")
    try:
        weights = load_weights(found.config, files, *form, quantize) if files else random_model(found.config, *form)
        if stay_mapped(files, *form, quantize):
            page_in_weights(weights)
        read = time.perf_counter()
        store = None
        if found.options.store_quantized and files:
            store = f"{fingerprint(name, found.commit, found.folder, files)} {found.dtype}"
        packing = make_ready(weights, quantize, pack=pack, progress=progress, store=store)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"the weights of {name} do not fit into memory ({device})", hint, stage="load") from problem
    seconds |= {"weights": read - start, "prepare": time.perf_counter() - read}
    return weights, packing


def no_tokenizer(name: str) -> ModelError:
    hint = "name a folder that holds config.json and a tokenizer; to measure speed without one: evoprune profile"
    return ModelError(f"random weights of {name} have no tokenizer, so no question can be asked", hint)


def thread_count(weights: int, cores: int) -> int:
    """How many threads pay for a model of so many weights on so many idle cores, at least 1."""
    return max(1, min(cores, weights // WEIGHTS_PER_THREAD))


def use_threads(wanted: int | str | None, found: FoundModel) -> None:
    """Sets the threads of this process: a number, or "auto", by the model's size and the cores unless OMP_NUM_THREADS is set."""
    if wanted == AUTO_THREADS and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(thread_count(found.parameters, available_cores()))
    elif isinstance(wanted, int):
        torch.set_num_threads(wanted)


def threads_of_each(wanted: int | str | None, processes: int) -> int:
    """The threads of each of several processes: `wanted`, if a number, else as this one has; together at most one a core."""
    if isinstance(wanted, int):
        return wanted
    return max(1, min(torch.get_num_threads(), available_cores() // processes))
