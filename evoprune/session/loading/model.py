"""Load a model, after checking everything that can be checked without reading the weights.

Code shipped with a model is never executed.
"""

import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evoprune.backend import (
    Device,
    Host,
    Packing,
    Quantization,
    empty_cache,
    prepare,
    weights_bytes,
)
from evoprune.bundled import Demo
from evoprune.errors import (
    DoesNotFit,
    ModelError,
    ModelWarning,
    OutOfMemory,
    UsageError,
    callback_errors,
    is_out_of_memory,
)
from evoprune.language import (
    LanguageModel,
    Prompt,
    Tokenizer,
    Turn,
    prompt_positions,
)
from evoprune.methods import MethodChain, TowerShape
from evoprune.model import (
    PATCHES,
    Config,
    GenerationSettings,
    Model,
    QwenVL,
)
from evoprune.report import ModelFacts
from evoprune.session.gguf.folder import naming_files
from evoprune.session.loading.description import ModelDescription, describe, read_json, valid
from evoprune.session.loading.weights import (
    DTYPES,
    EMBEDDINGS,
    HEAD,
    MISMATCH_HINT,
    ModelWeights,
    WeightFiles,
    name_in_memory,
    stored_tensors,
    weights_of,
)
from evoprune.session.options import NATIVE, TRANSFORMERS, ModelOptions
from evoprune.session.patches import PatchStore
from evoprune.signatures import takes
from evoprune.untrusted import pick
from evoprune.util import counted, from_keywords, listed
from evoprune.video import InputLimits, Plan, Video
from evoprune.vision import encode_rows

if TYPE_CHECKING:
    from evoprune.language import Vocabulary

# Generation settings that transformers supports but evoprune ignores, mapped to the values that disable them.
IGNORED_SETTINGS = dict.fromkeys(
    ("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length",
     "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_p", "penalty_alpha",
     "no_repeat_ngram_size", "sequence_bias", "stop_strings", "suppress_tokens", "top_h", "constraints", "dola_layers",
     "force_words_ids", "watermarking_config"), 0
) | dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1)  # fmt: skip


@dataclass
class LoadedModel:
    """A loaded model with its tokenizer and settings, ready to answer questions."""

    description: ModelDescription  # everything known about the model before loading
    model: Model  # the weights on `device`, and the config
    # The tokenizer with its chat template, or None for a model with random weights and no tokenizer files.
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]  # IDs of the tokens that end an answer
    generation: GenerationSettings  # settings from generation_config.json
    quantize: str
    weights_bytes: int  # total size of the weights in memory; tied weights count once
    fingerprint: str | None  # changes when the weight files are modified or moved; None if unknown
    load_seconds: dict[str, float]  # duration of the steps "tokenizer", "weights" and "prepare"
    packing: Packing  # packs the remaining layers later, and measures the time
    quantized_file: Path | None = None  # file containing the newly stored quantized weights, or None
    not_stored: bool = (
        False  # whether the quantized weights should be stored, but are not, so every start quantizes them again
    )
    ready: Callable[[], None] = lambda: None  # waits for `_warm_up`, which starts during loading
    # Patches of recent inputs, which can be encoded again with different settings without reading their files again.
    patches: PatchStore = field(default_factory=PatchStore)

    def __repr__(self) -> str:
        return f"<LoadedModel {self.id!r} in {self.dtype} on {self.device}>"

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The llguidance vocabulary used to constrain answers to a grammar.

        Raises:
            UsageError: If llguidance is not installed.
        """
        from evoprune.language import Vocabulary

        return Vocabulary(self.tokenizer, self.eos_ids)

    @property
    def language(self) -> LanguageModel:
        return LanguageModel(self.model)

    @property
    def id(self) -> str:
        """The name of a bundled demo model, or the user-specified folder or hub ID."""
        return self.description.id

    @property
    def dtype(self) -> str:
        """The weight dtype: "bf16", "fp16", or "fp32"."""
        return self.description.dtype

    @property
    def device(self) -> str:
        return self.description.device

    @property
    def limits(self) -> dict[str, InputLimits]:
        """Input size limits, by input type ("video" or "picture")."""
        return self.description.limits

    @property
    def demo(self) -> Demo | None:
        """The matching bundled `Demo`, or None if this is not a demo model or has random weights."""
        return self.description.demo

    @property
    def cores(self) -> int | None:
        """Maximum number of cores for reading videos, or None for all cores available to this process."""
        return self.description.options.cores

    @property
    def idle_cores(self) -> int:
        """Number of cores that the model leaves idle for reading inputs. May be 0.

        This is the number of available cores, or N with `--threads N`, minus the cores used by the device (`busy_cores`).
        """
        cores = Host().available_cores()
        if self.cores is not None:
            cores = min(cores, self.cores)
        return max(0, cores - Device(self.device).busy_cores)

    @property
    def span(self) -> int | None:
        """Number of temporal positions in the longest training clip, or None if only the context length limits them."""
        return self.demo.span if self.demo else None

    def knows(self, info: Video) -> bool:
        """Return False if this is a demo model and the video wasn't created by the generator of its training clips."""
        return self.demo is None or self.demo.made(info.tags)

    def knows_words(self, question: str) -> bool:
        """Return False if this is a demo model and the question contains words that don't occur in its training data."""
        return self.demo is None or not self.demo.unknown_words(question)

    def doubt(self, inputs: Sequence[Video], subtitles: bool) -> str | None:
        """Return a warning name if the inputs don't resemble the model's training data; otherwise, return None.

        Args:
            subtitles: Whether any input has subtitles.
        """
        foreign = [info for info in inputs if not self.knows(info)]
        if foreign:
            return "demo_model" if any(Demo.stores_tags(info.container) for info in foreign) else "demo_untold"
        unlike = self.demo is not None and (len(inputs) > self.demo.inputs or subtitles)
        return "demo_inputs" if unlike else None

    def check_answers(self) -> None:
        """Check that the model can answer questions, which requires a tokenizer and a device other than meta.

        Raises:
            ModelError: If the model has no tokenizer.
            UsageError: If the model is on the meta device.
        """
        if self.tokenizer is None:
            raise _no_tokenizer(self.id)
        if not Device(self.model.device).holds_values:
            raise UsageError("device 'meta' cannot compute", "use cpu, or auto")

    def check_texts(self, question: str, system: str | None = None, earlier: Sequence[Turn] = ()) -> None:
        """Reject an extremely long question, system prompt, or conversation, because tokenizing it could take minutes.

        Raises:
            DoesNotFit: If even the beginning of the text exceeds the model's context.
        """
        self._check_beginning(question, "a question", "ask a shorter question")
        self._check_beginning(system or "", "a system prompt", "give a shorter system prompt")
        conversation = "\n".join(text for turn in earlier for text in (turn.question, turn.answer))
        self._check_beginning(conversation, "a conversation", "leave out the first turns")

    def _check_beginning(self, text: str, what: str, hint: str) -> None:
        """Check that text fits into the model's context, tokenizing only the part that could possibly fit.

        Args:
            what: Description of the text in the error message, such as "a question".
            hint: Hint in the error message that tells the user what to do.

        Raises:
            DoesNotFit: If the beginning of the text doesn't fit.
        """
        context = self.model.config.text_config.max_position_embeddings
        if not context:
            return
        beginning = text[: 8 * context]  # assume at most 8 characters per token
        # Splitting a word may add a few tokens, but the rest of the prompt and the answer need more tokens than that anyway.
        if len(beginning) < len(text) and len(self.tokenizer.encode(beginning)) > context:
            length = f"{what} of {len(text):,} characters"
            raise DoesNotFit(f"{length} does not fit into the {context:,} tokens of this model's context", hint)

    def check_context(self, text: int, visual: int, new: int) -> None:
        """Check that the prompt and the answer fit into the model's context together.

        Args:
            text: Number of text tokens in the prompt.
            visual: Number of visual tokens in the prompt.
            new: Maximum number of tokens in the answer.

        Raises:
            DoesNotFit: If the prompt and the answer exceed the context length.
        """
        context = self.model.config.text_config.max_position_embeddings
        if context is not None and text + visual + new > context:
            raise DoesNotFit(
                f"{counted(text, 'token')} of text, {counted(visual, 'visual token')} and an answer of up to "
                f"{counted(new, 'token')} do not fit into the {context:,} tokens of this model's context",
                "shorten the question or the answer (-n, max_new_tokens), keep fewer visual tokens (-b, budget) or "
                "subtitles (--max-subtitle-tokens, max_subtitle_tokens), or read fewer frames (--max-frames, max_frames)",
            )

    def positions_of(self, prompt: Prompt, plans: Sequence[Plan]) -> torch.Tensor:
        """Return the M-RoPE positions of the prompt tokens according to Qwen's rule, int64 `[3, L]`."""
        pair = self.video.temporal_patch_size
        per_second = self.model.config.vision_config.tokens_per_second
        videos = []
        for place, plan in zip(prompt.places, plans, strict=True):
            videos += place.positions(plan.grid, plan.sampling.seconds_per_pair(pair), per_second)
        return prompt_positions(len(prompt.input_ids), videos)

    @property
    def video(self) -> InputLimits:
        """Input limits for videos. The patch sizes also apply to images."""
        return self.limits["video"]

    def facts(self) -> ModelFacts:
        description = self.description
        quantize = description.quantization or self.quantize
        engine = NATIVE if self.model.native else TRANSFORMERS
        return ModelFacts(
            id=self.id,
            revision=description.commit,
            dtype=self.dtype,
            quantize=quantize,
            device=self.device,
            load_format=description.options.load_format,
            engine=engine,
        )


@takes(ModelOptions, names=ModelOptions.LOADING)
@naming_files
def load_model(
    model: str | os.PathLike[str] | ModelOptions | ModelDescription = "demo",
    *,
    pack: bool = True,
    to_answer: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> LoadedModel:
    """Load a Qwen3.8, Qwen3.6, Qwen3.5, Qwen3-VL, Qwen2.5-VL, or Qwen2-VL model.

    Args:
        model: The model name, its `ModelOptions`, or the result of `describe`.
        pack: Whether to pack the weights when running on a CPU, if memory allows. Packed weights are faster, but their values can
            no longer be read.
        to_answer: Whether the model will answer questions. If True, a model without a tokenizer is rejected before its weights are
            read.
        progress: Called with the number of layers quantized so far and the total number of layers.
        options: The remaining fields of `ModelOptions`, if `model` is a name.

    Raises:
        UsageError: If an option is invalid.
        OutOfMemory: If the weights do not fit into memory.
        TypeError: If a keyword is unknown, or options are given although `model` is not a name.
        ModelError: If the model is missing, unsupported, or damaged, or the hub cannot be reached.
    """
    if isinstance(model, str | os.PathLike):
        (model,) = from_keywords({"model": model, **options}, ModelOptions)
    elif options:
        raise TypeError(f"{listed(sorted(options))} can only be given with the name of a model")
    if not isinstance(model, ModelDescription):
        model = describe(model)
    stored = weights_of(model)
    stored.download()
    settings = model.options
    folder = model.folder
    model.use_threads()
    tokenizer = None
    start = time.perf_counter()
    if folder is not None and (Tokenizer.is_in(folder) or not model.random):
        tokenizer = Tokenizer.load(folder)
    if to_answer and tokenizer is None:
        raise _no_tokenizer(settings.model)
    generation = read_generation(folder)
    ends = eos_ids(folder, generation, model.config, tokenizer)
    stored.files  # noqa: B018 (checked here)
    seconds = {"tokenizer": time.perf_counter() - start}
    work = partial(_warm_up, stored.config, DTYPES[model.dtype], stored.device, model.native)
    ready = Device(stored.device).run_beside(work)
    with callback_errors() as passing:
        weights, packing, quantized_file, not_stored = _loaded(stored, pack, passing(progress), seconds)
    return LoadedModel(
        description=model,
        model=weights,
        tokenizer=tokenizer,
        eos_ids=ends,
        generation=generation,
        quantize=model.quantize,
        weights_bytes=weights_bytes(weights),
        fingerprint=stored.fingerprint,
        load_seconds=seconds,
        packing=packing,
        quantized_file=quantized_file,
        not_stored=not_stored,
        ready=ready,
    )


def _loaded(
    stored: ModelWeights, pack: bool, progress: Callable[[int, int], None] | None, seconds: dict[str, float]
) -> tuple[Model, Packing, Path | None, bool]:
    """Load the weights, then quantize and pack them as requested.

    Args:
        seconds: A dict to which the durations of the "weights" and "prepare" steps are added.

    Returns:
        A tuple of the model, its `Packing`, `LoadedModel.quantized_file`, and `LoadedModel.not_stored`.

    Raises:
        OutOfMemory: If the weights do not fit into memory.
    """
    model = stored.description
    name = model.id
    device = stored.device
    quantize = model.quantize
    if not model.native:
        from evoprune.session.loading import hosted
    dtype = DTYPES[model.dtype]
    start = time.perf_counter()
    if short := Device(device).shortage(stored.bytes):
        raise OutOfMemory(f"loading {name} {short} ({device})", stored.what_fits(), stage="load")
    try:
        if not model.native:
            read_in = stored.read_dtype(model.dtype, quantize)
            if stored.files:
                weights = hosted.load_hosted(stored.config, model.folder, read_in, device, model.quantization)
            else:
                weights = hosted.random_hosted(stored.config, read_in, device)
            if quantize != "none":
                hosted.widen(weights, dtype, skip=Quantization(quantize).weights(weights))
        elif stored.files:
            weights = load_weights(stored.config, stored.files, dtype, device, quantize, _store_key(stored))
        else:
            weights = QwenVL.random(stored.config, dtype, device)
        read = time.perf_counter()
        quantized_file = None
        not_stored = False
        packing = Packing()
        if quantize == "none":
            packing = prepare(weights, pack)
        else:
            quantized_file, not_stored = _quantize(weights, stored, progress)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        message = f"the weights of {name} do not fit into memory ({device})"
        raise OutOfMemory(message, stored.what_fits(), stage="load") from problem
    seconds |= {"weights": read - start, "prepare": time.perf_counter() - read}
    return weights, packing, quantized_file, not_stored


def _store_key(stored: ModelWeights) -> str | None:
    """Return the `fingerprint` argument of `quantize_once`: None if the quantized weights should not be stored."""
    model = stored.description
    wanted = model.large if model.options.store_quantized is None else model.options.store_quantized
    return f"{stored.fingerprint} {model.dtype}" if wanted and stored.files else None


def _quantize(
    weights: Model, stored: ModelWeights, progress: Callable[[int, int], None] | None
) -> tuple[Path | None, bool]:
    """Quantize the linear layers in place. See `quantize_once` for the result."""
    from evoprune.session.loading.stored import can_store, quantize_once

    model = stored.description
    key = _store_key(stored)
    writes = can_store(stored.bytes, spare=not model.options.store_quantized)
    file, again = quantize_once(weights, model.quantize, key, progress, writes, weights.deferred)
    weights.deferred.clear()
    empty_cache()  # frees the memory of the original weights
    return file, again and key is not None


def read_generation(folder: Path | None) -> GenerationSettings:
    """Read a model's generation_config.json and warn about ignored settings."""
    path = None
    content = {}
    if folder is not None:
        path = folder / "generation_config.json"
        content = read_json(path)
    if ignored := sorted(name for name, off in IGNORED_SETTINGS.items() if content.get(name) and content[name] != off):
        warnings.warn(f"ignored settings in {path}: {listed(ignored)}", ModelWarning, stacklevel=2)
    with valid(f"{path} is damaged"):
        return pick(GenerationSettings, content, "")


def eos_ids(
    folder: Path | None, generation: GenerationSettings, config: Config, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return the different IDs of the tokens that end an answer.

    They are read from generation_config.json, falling back to config.json and then to the tokenizer. Tokens outside the model's
    vocabulary are omitted with a warning.

    Raises:
        ModelError: If none of the tokens is in the vocabulary.
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
    ids = tuple(dict.fromkeys(ids))
    if never := [token for token in ids if token >= config.text_config.vocab_size]:
        message = f"eos_token_id {', '.join(map(str, never))} is not in the vocabulary"
        if len(never) == len(ids):
            raise ModelError(f"{folder}/{file}: {message}, so no answer would end", "download the file again")
        warnings.warn(f"{folder}/{file}: {message}", ModelWarning, stacklevel=2)
    return tuple(token for token in ids if token not in never)


def _no_tokenizer(name: str) -> ModelError:
    hint = "give a folder with config.json and a tokenizer; to measure speed without one: evoprune profile"
    return ModelError(f"random weights of {name} have no tokenizer, so no question can be asked", hint)


def load_weights(
    config: Config,
    files: WeightFiles,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = "none",
    store_key: str | None = None,
) -> QwenVL:
    """Read the weights of a natively supported model, and warn about unused tensors.

    On the CPU, weights stored in `dtype` stay memory-mapped until they are packed. If the model will be quantized, its linear
    layers and embeddings stay memory-mapped regardless of their dtype. If the output layer is tied to the embeddings and the files
    contain only the output layer, its tensor is used for both.

    Args:
        store_key: If an earlier run stored parameters under this fingerprint, they are memory-mapped (see `stored_parameters`).

    Raises:
        ModelError: If tensors are missing, have the wrong shape, or are stored twice with different values.
    """
    folder = next(iter(files)).parent
    model = QwenVL.empty(config)
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    as_stored = []
    known = {}
    if quantize != "none":
        from evoprune.session.loading.stored import stored_parameters

        as_stored = [HEAD, EMBEDDINGS, *Quantization(quantize).weights(model)]
        known = stored_parameters(model, quantize, store_key)
    # Buffers that are recomputed from the config, even though older checkpoints include them, and layers for multi-token
    # prediction that are not used (see `ModelWeights.config`)
    ignored = re.compile(r"(^|\.)(inv_freq|position_ids)$|^mtp\.")
    tensors = {}
    homes = {}
    unused = []
    deferred = {}  # functions that read the weights on the meta device, by name
    experts = None
    if config.text_config.experts:
        from evoprune.session.loading.experts import SeparateExperts

        experts = SeparateExperts(wanted)
    for file, content, stored in stored_tensors(files):
        name = name_in_memory(stored)
        if name not in wanted:
            if experts and (place := experts.place_of(name)):
                weight = content.get_tensor(stored)
                _check_weight(file, stored, weight, experts.shape_at(place))
                experts.add(place, weight)
            elif not ignored.search(name):
                unused.append(stored)
            continue
        if name in known:
            weight = known[name]
        elif name in as_stored and hasattr(content, "placeholder"):
            # Dequantized layers would not fit into memory together, so each one is read when it is quantized.
            weight = content.compact(stored) if name == EMBEDDINGS else content.placeholder(stored)
            deferred[name] = partial(_read_in_memory, config, content, stored, wanted[name])
        else:
            weight = content.get_tensor(stored)
        weight = _as_in_memory(config, weight, wanted[name])
        _check_weight(file, stored, weight, wanted[name])
        if name not in as_stored:
            weight = weight.to(device, dtype)
        if name in tensors and not torch.equal(weight, tensors[name]):
            problem = f"the weights in {file.parent} cannot be loaded: {name} is stored twice with different values"
            places = listed(sorted({homes[name].name, file.name}))
            raise ModelError(problem, f"delete the wrong one ({places}); or download the model again")
        tensors[name] = weight
        homes[name] = file
    if experts and (missing := experts.missing):
        raise _missing_tensors(folder, missing)
    for name, stored_dtype in experts.dtypes.items() if experts else ():
        if name in as_stored:  # joining the experts of all layers would take as much memory as the whole model
            tensors[name] = torch.empty(wanted[name], dtype=stored_dtype, device="meta")
            deferred[name] = partial(experts.join, name)
        else:
            tensors[name] = experts.join(name).to(device, dtype)
    if config.tie_word_embeddings:  # `separate_head` has checked that they don't differ
        if HEAD in tensors:
            tensors.setdefault(EMBEDDINGS, tensors.pop(HEAD))
        del wanted[HEAD]
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise _missing_tensors(folder, missing)
    if unused:
        are = "is" if len(unused) == 1 else "are"
        message = f"{counted(len(unused), 'tensor')} of the weights in {folder} {are} not used: {', '.join(unused[:3])}"
        if len(unused) > 3:
            message += ", ..."
        warnings.warn(message, ModelWarning, stacklevel=2)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie()
    model.deferred = deferred
    return model.requires_grad_(False)


def _missing_tensors(folder: Path, missing: Sequence[str]) -> ModelError:
    problem = f"the weights in {folder} lack {counted(len(missing), 'tensor')}, first {missing[0]}"
    return ModelError(problem, "download the model again")


def _check_weight(file: Path, stored: str, weight: torch.Tensor, shape: torch.Size) -> None:
    """Check the shape and the dtype of a stored tensor.

    Raises:
        ModelError: If the shape is wrong, or the dtype shows that the weights are quantized.
    """
    unscaled = weight.is_floating_point() and weight.itemsize > 1  # weights in other dtypes have separate scales
    if weight.shape != shape or not unscaled:
        what = f"{weight.dtype} {list(weight.shape)}, but config.json expects {list(shape)}"
        problem = f"the weights in {file.parent} cannot be loaded: {stored} is {what}".replace("torch.", "")
        raise ModelError(problem, MISMATCH_HINT)


def _read_in_memory(config: Config, content, stored: str, shape: torch.Size) -> Any:
    """Return the weights of a layer. A matrix is an object that reads its rows when it is split."""
    if len(shape) == 2:
        return content.get_slice(stored)
    return _as_in_memory(config, content.get_tensor(stored), shape)


def _as_in_memory(config: Config, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return a stored tensor in the layout of the module tree: the experts' matrices of Qwen3-VL are stored transposed."""
    transposed = config.vision_config.traits.transposes_experts and weight.ndim == 3 and weight.shape != shape
    return weight.transpose(1, 2) if transposed else weight


def _warm_up(config: Config, dtype: torch.dtype, device: torch.device, native: bool) -> None:
    """Compile GPU kernels and initialize libraries while the weights load, so the first question doesn't have to wait for them.

    This runs a question about a few visual units through a small model with the same layer widths. The small model has at least two
    layers, because the top layer computes only a few columns and therefore uses different kernels. If transformers runs the model,
    the small model's `intermediate_size` is 1.
    """
    vision = config.vision_config
    text = config.text_config
    levels = len(vision.deepstack_visual_indexes)
    depth = max(2, levels)
    full = (0,) if vision.fullatt_block_indexes else ()
    width = 1
    if native:
        width = text.intermediate_size
    net = text.delta_net
    if native and net:
        net = replace(net, layer_types=net.layer_types[-depth:])  # the last layer may differ from those before it
    small = replace(
        config,
        vision_config=replace(
            vision, depth=depth, fullatt_block_indexes=full, deepstack_visual_indexes=tuple(range(levels))
        ),
        text_config=replace(
            text,
            num_hidden_layers=depth,
            vocab_size=1024,
            intermediate_size=width,
            delta_net=net,
            mtp_num_hidden_layers=0,
        ),
    )
    model = QwenVL.random(small, dtype, device)
    prepare(model, packs=False)
    visual = model.model.visual
    grid = (2, 8, 8)
    units = 2 * 8 * 8
    values = visual.patch_embed.proj.weight[0].numel()
    pixels = torch.randint(256, (units * PATCHES, values), dtype=torch.uint8, device=device)
    # Use the plan for a larger input, because reuse and token selection inside the tower need additional kernels.
    plan = MethodChain.parse("evoprune:inner=always").plan(TowerShape.of_tower(visual), grid, units // 4)
    from evoprune.language import warm_up

    warm_up(model, encode_rows(visual, [pixels], plan).select_tokens(), native)
