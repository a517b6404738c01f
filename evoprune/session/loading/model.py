"""Loads a model. Whatever can be checked is checked before the weights are read, and no code that comes with it is ever run."""

import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evoprune.backend import (
    AUTO_THREADS,
    Packing,
    Progress,
    available_cores,
    empty_cache,
    places,
    prepare,
    run_beside,
    weights_bytes,
)
from evoprune.bundled import Demo, may_be_of_any_world, unknown_words, world_of
from evoprune.errors import ModelError, ModelWarning, OutOfMemory, is_out_of_memory
from evoprune.language import (
    MIN_COLUMNS,
    GenerationOptions,
    NativeStaticCache,
    Place,
    Tokenizer,
    TokenStream,
    embed_ids,
    has_tokenizer,
    hybrid,
    load_tokenizer,
    prefill,
    prune_prompt,
    step,
)
from evoprune.methods import MethodChain, arange_on
from evoprune.model import (
    PATCHES,
    Config,
    GenerationSettings,
    Model,
    QwenVL,
    empty,
    fill_random,
    head_size,
    name_in_memory,
    parameter_count,
    pick,
    shortage,
)
from evoprune.report import ModelFacts
from evoprune.session.loading.description import ModelDescription, describe, read_json, valid
from evoprune.session.loading.weights import (
    BELONG,
    DTYPES,
    EMBEDDINGS,
    HEAD,
    ModelWeights,
    stored_tensors,
    weights_of,
)
from evoprune.session.options import NATIVE, TRANSFORMERS, ModelOptions
from evoprune.session.patches import PatchStore
from evoprune.util import counted, from_keywords, listed
from evoprune.video import VIDEO, InputLimits, Video
from evoprune.vision import encode, tower_shape

if TYPE_CHECKING:
    from evoprune.language import Vocabulary

# Settings of transformers' `generate` that change answers and are not done here, and what they are where they change nothing.
NOT_DONE = dict.fromkeys(
    ("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length",
     "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_p", "penalty_alpha",
     "no_repeat_ngram_size", "sequence_bias", "stop_strings", "suppress_tokens", "top_h", "constraints", "dola_layers",
     "force_words_ids", "watermarking_config"), 0
) | dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1)  # fmt: skip
# Weights of a model for each of its threads. The demo model has 4 million, the smallest Qwen 2 billion.
WEIGHTS_PER_THREAD = 32_000_000


@dataclass
class LoadedModel:
    """A model that is ready to answer."""

    description: ModelDescription  # what was known before it was loaded
    model: Model  # the weights, on `device` in `dtype`, and their config
    tokenizer: Tokenizer | None  # with a chat template; None only for random weights without tokenizer files
    eos_ids: tuple[int, ...]  # that end an answer
    generation: GenerationSettings  # of its files
    quantize: str
    weights_bytes: int  # of all weights in memory, tied ones counted once
    fingerprint: str | None  # changes when the weights' files do, or their place; None where that is unknown
    load_seconds: dict[str, float]  # of the steps of loading: "tokenizer", "weights" and "prepare"
    packing: Packing  # when layers that wait are packed, and how long that has taken since
    ready: Callable[[], None] = lambda: None  # waits for what was begun beside loading (`_warm_up`)
    patches: PatchStore = field(
        default_factory=PatchStore
    )  # of the latest inputs, for other settings of the same model

    def __repr__(self) -> str:
        return f"<LoadedModel {self.id!r} in {self.dtype} on {self.device}>"

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The tokens for answers that follow a grammar. Raises UsageError: llguidance is not installed."""
        from evoprune.language import Vocabulary

        return Vocabulary(self.tokenizer, self.eos_ids)

    @property
    def id(self) -> str:
        """The name of a bundled demo, or the folder or hub id as given."""
        return self.description.id

    @property
    def dtype(self) -> str:
        """ "bf16", "fp16" or "fp32"."""
        return self.description.dtype

    @property
    def device(self) -> str:
        return self.description.device

    @property
    def limits(self) -> dict[str, InputLimits]:
        """The limits of videos and of pictures, by kind."""
        return self.description.limits

    @property
    def demo(self) -> Demo | None:
        """Which bundled demo model this is, with its trained weights."""
        return self.description.demo

    @property
    def cores(self) -> int | None:
        """How many cores reading videos may keep busy; None for all that this process may use."""
        return self.description.options.cores

    @property
    def one_by_one(self) -> bool:
        """Whether tokens have the logits of generation only if they are read one by one: 4 bits serve one row, 8 bits several."""
        return self.quantize == "int4"

    @property
    def span(self) -> int | None:
        """Positions in time that the longest clip of its training had; None where the context alone limits them."""
        return self.demo.span if self.demo else None

    def knows(self, info: Video) -> bool:
        """Return whether a file may be of a kind that the model knows. Of a demo model, only clips of its world are."""
        return self.demo is None or world_of(info.tags) == self.demo.world

    def knows_words(self, question: str) -> bool:
        """Return whether the model may know the words of a question. Of a demo model, only those of its training are."""
        return self.demo is None or not unknown_words(question, self.demo.world)

    def doubt(self, inputs: Sequence[Video], subtitles: bool) -> str | None:
        """Return the warning about inputs, perhaps with `subtitles`, unlike those of the model's training; None for no doubt."""
        foreign = [info for info in inputs if not self.knows(info)]
        if foreign:
            return "demo_untold" if all(may_be_of_any_world(info.container) for info in foreign) else "demo_model"
        unlike = self.demo is not None and (len(inputs) > self.demo.inputs or subtitles)
        return "demo_inputs" if unlike else None

    @property
    def video(self) -> InputLimits:
        """The limits of videos; the patch sizes are those of pictures too."""
        return self.limits[VIDEO]

    def facts(self) -> ModelFacts:
        description = self.description
        quantize = description.quantization or self.quantize
        engine = NATIVE if self.model.native else TRANSFORMERS
        form = self.dtype, quantize, self.device, description.options.load_format, engine
        return ModelFacts(self.id, description.commit, *form)


def load_model(
    model: str | ModelOptions | ModelDescription = "demo",
    *,
    pack: bool = True,
    to_answer: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> LoadedModel:
    """Loads a Qwen3-VL, Qwen2.5-VL or Qwen2-VL model: its name, with other fields of `ModelOptions`; or those; or a described one.

    `pack`: on a CPU, rearrange the weights for speed if there is memory for it; they can no longer be read. `to_answer`: refuse a
    model that has no tokenizer, before its weights are read. `progress`: called with layers quantised and layers in all.

    Raises UsageError: an option that makes no sense here. OutOfMemory: the weights do not fit. TypeError: an unknown keyword.
    ModelError: the model is missing, of another kind, damaged, or out of reach.
    """
    if isinstance(model, str):
        (model,) = from_keywords({"model": model, **options}, ModelOptions)
    if not isinstance(model, ModelDescription):
        model = describe(model)
    stored = weights_of(model)
    stored.download()
    settings = model.options
    folder = model.folder
    use_threads(model)
    tokenizer = None
    start = time.perf_counter()
    if folder is not None and (has_tokenizer(folder) or not model.random):
        tokenizer = load_tokenizer(folder)
    if to_answer and tokenizer is None:
        raise no_tokenizer(settings.model)
    generation = read_generation(folder)
    ends = eos_ids(folder, generation, model.config, tokenizer)
    stored.files  # noqa: B018 (checked here)
    seconds = {"tokenizer": time.perf_counter() - start}
    work = partial(_warm_up, stored.config, DTYPES[model.dtype], stored.device, model.native)
    ready = run_beside(work, stored.device)
    weights, packing = _loaded(stored, pack, progress, seconds)
    return LoadedModel(
        description=model,
        model=weights,
        tokenizer=tokenizer,
        eos_ids=ends,
        generation=generation,
        quantize=settings.quantize,
        weights_bytes=weights_bytes(weights),
        fingerprint=stored.fingerprint,
        load_seconds=seconds,
        packing=packing,
        ready=ready,
    )


def _loaded(
    stored: ModelWeights, pack: bool, progress: Callable[[int, int], None] | None, seconds: dict[str, float]
) -> tuple[Model, Packing]:
    """Return the weights, ready to be used. Writes the times of the parts into `seconds`. Raises OutOfMemory: they do not fit."""
    model = stored.description
    name = model.id
    device = stored.device
    quantize = model.options.quantize
    if not model.native:
        from evoprune.session.loading import hosted
    form = DTYPES[model.dtype], device
    start = time.perf_counter()
    if short := shortage(stored.bytes, str(device)):
        raise OutOfMemory(f"loading {name} {short} ({device})", stored.what_fits(), stage="load")
    try:
        if not model.native:
            read_in = stored.read_dtype(model.dtype, quantize), device
            if stored.files:
                weights = hosted.load_hosted(stored.config, model.folder, *read_in, model.quantization)
            else:
                weights = hosted.random_hosted(stored.config, *read_in)
            if quantize != "none":
                hosted.widen(weights, DTYPES[model.dtype], skip=dict(places(weights, quantize)))
        elif stored.files:
            weights = load_weights(stored.config, stored.files, *form, quantize)
        else:
            weights = random_model(stored.config, *form)
        read = time.perf_counter()
        store = None
        if model.options.store_quantized and stored.files:
            store = f"{stored.fingerprint} {model.dtype}"
        packing = make_ready(weights, quantize, pack=pack, progress=progress, store=store)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        said = f"the weights of {name} do not fit into memory ({device})"
        raise OutOfMemory(said, stored.what_fits(), stage="load") from problem
    seconds |= {"weights": read - start, "prepare": time.perf_counter() - read}
    return weights, packing


def read_generation(folder: Path | None) -> GenerationSettings:
    """Return what a model's generation_config.json says. Warns of what it asks for and nothing here does."""
    path = None
    content = {}
    if folder is not None:
        path = folder / "generation_config.json"
        content = read_json(path)
    if asked := sorted(name for name, off in NOT_DONE.items() if content.get(name) and content[name] != off):
        warnings.warn(f"evoprune does not do what {path} asks for: {listed(asked)}", ModelWarning, stacklevel=2)
    with valid(f"{path} is damaged"):
        return pick(GenerationSettings, content, "")


def eos_ids(
    folder: Path | None, generation: GenerationSettings, config: Config, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return the tokens that end an answer, of the first file that names some.

    Raises ModelError: none of them is one of the model's.
    """
    ids = generation.eos_token_id
    file = "generation_config.json"
    if ids in (None, ()):
        ids = config.text_config.eos_token_id
        file = "config.json"
    if ids in (None, ()) and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    if ids is None:
        ids = ()
    if not isinstance(ids, tuple):
        ids = (ids,)
    if never := [token for token in ids if token >= config.text_config.vocab_size]:
        said = f"eos_token_id {', '.join(map(str, never))} is no token of the model"
        if len(never) == len(ids):
            raise ModelError(f"{folder}/{file}: {said}, so no answer could end", "get the file again")
        warnings.warn(f"{folder}/{file}: {said}", ModelWarning, stacklevel=2)
    return tuple(token for token in ids if token not in never)


def no_tokenizer(name: str) -> ModelError:
    hint = "name a folder that holds config.json and a tokenizer; to measure speed without one: evoprune profile"
    return ModelError(f"random weights of {name} have no tokenizer, so no question can be asked", hint)


def use_threads(model: ModelDescription) -> None:
    """Sets the threads of this process: a number, or "auto", by the model's size and the cores unless OMP_NUM_THREADS is set."""
    wanted = model.options.threads
    if wanted == AUTO_THREADS and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, min(available_cores(), parameter_count(model.config) // WEIGHTS_PER_THREAD)))
    elif isinstance(wanted, int):
        torch.set_num_threads(wanted)


def threads_of_each(wanted: int | str | None, processes: int) -> int:
    """Return the threads of each of several processes: `wanted`, if a number, else as this one has; together at most one a core."""
    if isinstance(wanted, int):
        return wanted
    return max(1, min(torch.get_num_threads(), available_cores() // processes))


def load_weights(
    config: Config, files: list[Path], dtype: torch.dtype, device: torch.device, quantize: str = "none"
) -> QwenVL:
    """Reads the weights. On the CPU, in the dtype of the file, they stay memory-mapped until they are packed.

    Those to be quantised and the embeddings stay so in any dtype. Where input and output embeddings are tied and a file holds the
    output layer alone, it is both. Warns of tensors that are not used.

    Raises ModelError: tensors are missing, of another shape, or stored twice with other values.
    """
    model = empty(config)
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    as_stored = []
    if quantize != "none":
        as_stored = ["lm_head", "model.language_model.embed_tokens", *dict(places(model, quantize))]
    computed = re.compile(r"(^|\.)(inv_freq|position_ids)$")  # buffers of older files, which follow from the config
    tensors = {}
    unused = []
    for file, content, stored in stored_tensors(files):
        name = name_in_memory(stored)
        if name not in wanted:
            if not computed.search(name):
                unused.append(stored)
            continue
        weight = content.get_tensor(stored)
        unscaled = weight.is_floating_point() and weight.itemsize > 1  # others have scales
        if weight.shape != wanted[name] or not unscaled:
            what = f"{weight.dtype} {list(weight.shape)} where config.json wants {list(wanted[name])}"
            problem = f"the weights in {file.parent} cannot be loaded: {stored} is {what}".replace("torch.", "")
            raise ModelError(problem, BELONG)
        if name.removesuffix(".weight") not in as_stored:
            weight = weight.to(device, dtype)
        if name in tensors and not torch.equal(weight, tensors[name]):
            problem = f"the weights in {file.parent} cannot be loaded: {name} is stored twice, with other values"
            raise ModelError(problem, BELONG)
        tensors[name] = weight
    if config.tie_word_embeddings:  # to what there is; `separate_head` was asked before
        if HEAD in tensors:
            tensors.setdefault(EMBEDDINGS, tensors.pop(HEAD))
        del wanted[HEAD]
    if missing := sorted(wanted.keys() - tensors.keys()):
        problem = f"the weights in {files[0].parent} lack {counted(len(missing), 'tensor')}, first {missing[0]}"
        raise ModelError(problem, "get the model again")
    if unused:
        are = "tensor of the weights is" if len(unused) == 1 else "tensors of the weights are"
        said = f"{len(unused):,} {are} not used in {files[0].parent}: {', '.join(unused[:3])}"
        if len(unused) > 3:
            said += ", ..."
        warnings.warn(said, ModelWarning, stacklevel=2)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> QwenVL:
    """Return a model with seeded random weights, for benchmarks: speed does not depend on the values. Takes seconds at 3B."""
    model = empty(config)
    for module in model.modules():  # not `to_empty`, which imports torch's compiler for two seconds
        for name, weight in [*module.named_parameters(recurse=False)]:
            values = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie()
    fill_random(model)
    return model


def make_ready(
    model: Model, quantize: str, *, pack: bool = True, progress: Progress | None = None, store: str | None = None
) -> Packing:
    """Quantises the linear layers of a model in place, or prepares them as its device has it. Arguments as of `load_model`.

    `store`: the fingerprint of quantised weights on disk; None for no storing. Returns what layers that wait share.
    """
    if quantize == "none":
        return prepare(model, pack)
    from evoprune.session.loading.stored import quantize_once

    quantize_once(model, quantize, store, progress)
    empty_cache()  # of the weights that were quantised
    return Packing()


def _warm_up(config: Config, dtype: torch.dtype, device: torch.device, native: bool) -> None:
    """Begins, beside loading, what a GPU's first question would wait for: kernels are compiled, libraries set up.

    A model with the same widths and few layers answers about a few units: at least two, for the top one computes few columns, which
    takes other kernels. A step of decoding follows, as graphs have it. Of a language model that transformers runs, norms and
    the solver of DeltaNets, which is in a library of its own.
    """
    vision = config.vision_config
    text = config.text_config
    levels = len(vision.deepstack_visual_indexes)
    depth = max(2, levels)
    full = (0,) if vision.fullatt_block_indexes else ()
    width = 1
    if native:
        width = text.intermediate_size
    small = replace(
        config,
        vision_config=replace(
            vision, depth=depth, fullatt_block_indexes=full, deepstack_visual_indexes=tuple(range(levels))
        ),
        text_config=replace(text, num_hidden_layers=depth, vocab_size=1024, intermediate_size=width),
    )
    model = random_model(small, dtype, device)
    prepare(model, packs=False)
    visual = model.model.visual
    grid = (2, 8, 8)
    words = 8
    units = 2 * 8 * 8
    values = visual.patch_embed.proj.weight[0].numel()
    pixels = torch.randint(256, (units * PATCHES, values), dtype=torch.uint8, device=device)
    # As of a larger input, whose reuse and selections inside the tower take more kernels.
    plan = MethodChain.parse("evoprune:inner=always").plan(tower_shape(visual), grid, units // 4)
    encoded = encode(visual, [pixels], plan)
    if not native:
        x, of_head = (pixels.new_zeros(2, wide, dtype=dtype) for wide in (text.hidden_size, head_size(text)))
        for rows, plus in ((x, None), (x, x), (of_head, None)):
            hybrid.add_norm(rows, plus, rows[0].float(), text.rms_norm_eps)
        if text.delta_net:
            chunks = pixels.new_zeros(16, hybrid.CHUNK, hybrid.CHUNK, dtype=torch.float32)
            torch.linalg.solve_triangular(chunks, chunks, upper=False, unitriangular=True)  # loads that library
        return
    place = Place((range(words, words + units),))
    ids = torch.zeros(2 * words + units, dtype=torch.int64, device="cpu")
    positions = arange_on(len(ids), "cpu").expand(3, -1)
    prompt = prune_prompt(ids, [place], [encoded], positions, partial(embed_ids, model))
    state = prefill(model, prompt.embeds, prompt.positions, len(ids), None, prompt.sizes, None, prompt.deepstack)
    list(TokenStream(state, GenerationOptions(max_new_tokens=2), eos_ids=()))
    steps = NativeStaticCache(model, MIN_COLUMNS)
    steps.fill(state.cache, len(ids) + 1, MIN_COLUMNS)
    step(model, steps)
