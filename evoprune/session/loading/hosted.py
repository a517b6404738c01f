"""Load models through transformers: quantized checkpoints, and models whose language model isn't supported natively.

transformers is restricted to reading safetensors files. It never executes code shipped with a model, and never uses the network. It
can unpack the weights of each quantization method, but the packages that compute with packed weights must be installed separately.
"""

import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch

from evoprune.backend import (
    Device,
    accept_biases,
    choose_functions,
)
from evoprune.errors import ModelError, ModelWarning, first_line, is_out_of_memory
from evoprune.model import Config, HostedVL
from evoprune.session.loading.description import ADAPTER
from evoprune.session.loading.weights import (
    MISMATCH_HINT,
    PACKAGES,
    PLAIN,
    check_no_copies,
    name_in_memory,
    open_gguf,
    stored_tensors,
    weight_files,
)
from evoprune.untrusted import read_object
from evoprune.util import counted, listed, overlapping
from evoprune.video import temporary_folder

# Config entries that list unquantized modules.
UNQUANTIZED = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
# Config entries that stay at the top level because they don't belong to the language model.
TOP_LEVEL_ENTRIES = (
    "model_type", "architectures", "vision_config", "text_config", "quantization_config", "tie_word_embeddings", "dtype",
    "torch_dtype",
)  # fmt: skip
# Repetitive log messages to suppress, by logger. The first recommends GPU packages (`backend.hosted.FUSED`) that wouldn't be used.
# The second is logged for each matrix product and says that 8-bit layers compute in fp16.
REPETITIVE_LOGS = {
    "transformers.integrations.hub_kernels": "falling back to its reference",
    "bitsandbytes.autograd._functions": "inputs will be cast",
}


def load_hosted(
    config: Config, folder: Path, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> HostedVL:
    """Load a model from a folder using transformers, and warn about unused tensors.

    Args:
        quantization: The checkpoint's quantization method, or None.

    Raises:
        ModelError: If transformers cannot read the model, a tensor is missing, or a tensor has the wrong shape or dtype.
    """
    check_no_copies(weight_files(folder))
    if config.text_config.experts and not quantization:
        _check_experts(folder, config.text_config.experts.num_experts)
    kwargs = {}
    try:
        with _environment_kept():
            if quantization:
                kwargs = {"device_map": {"": device}, "config": _quantized_config(folder, quantization, device)}
            elif has_flat_config(folder):
                kwargs = {"config": _read_config(folder)}
            # Mismatches are reported below.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            host, info = read_whole(folder, dtype, device, **kwargs)
    # transformers and the quantization packages raise many different exceptions for damaged files.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        hint = MISMATCH_HINT
        if quantization:
            hint = "install the package that it names"
        hint += "; or upgrade transformers: pip install -U transformers"
        raise ModelError(f"transformers cannot load {folder}: {first_line(problem)}", hint) from problem
    if missing := sorted(map(str, info["missing_keys"])):
        raise _missing_tensors(folder, missing)
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        what = f"{name} is {list(shape)}, but config.json expects {list(wanted)}"
        raise ModelError(f"the weights in {folder} cannot be loaded: {what}", MISMATCH_HINT)
    if not quantization:
        for _, content, stored in stored_tensors(weight_files(folder)):
            kind = content.get_slice(stored).get_dtype()
            if kind not in PLAIN and ".ple_embedding." not in stored and stored not in info["unexpected_keys"]:
                what = f"{stored} is {kind}, but config.json does not mention quantization"
                raise ModelError(f"the weights in {folder} cannot be loaded: {what}", MISMATCH_HINT)
    if unused := sorted(map(str, info["unexpected_keys"])):
        are = "is" if len(unused) == 1 else "are"
        message = f"{counted(len(unused), 'tensor')} of the weights in {folder} {are} not used: {', '.join(unused[:3])}"
        warnings.warn(message, ModelWarning, stacklevel=2)
    model = _hosted_model(config, host, experts=not quantization)  # quantized experts have their own implementations
    if quantization:
        model.package = f"a layer quantized by {listed(PACKAGES.get(quantization, [quantization]))}"
    return model


@overlapping
def _environment_kept() -> Iterator[None]:
    """Return a context manager that restores the environment variables and `sys.path` on exit.

    Some quantization packages modify them on import. For example, gptqmodel changes the hub cache location.
    """
    variables = dict(os.environ)
    path = list(sys.path)
    try:
        yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ |= variables
        sys.path[:] = path


def _check_experts(folder: Path, count: int) -> None:
    """Check that all expert tensors exist and have consistent shapes.

    transformers merges the expert tensors, but only logs a message if merging fails, so this function checks them separately.

    Raises:
        ModelError: If an expert tensor is missing, or its shape differs from the corresponding tensor in other experts.
    """
    alike: dict[str, dict[str, tuple[int, ...]]] = {}
    for _, content, stored in stored_tensors(weight_files(folder)):
        if ".experts." in stored:
            shape = tuple(content.get_slice(stored).get_shape())
            alike.setdefault(re.sub(r"\.\d+\.", ".*.", stored), {})[stored] = shape
    for shapes in alike.values():
        of_layers = {re.sub(r"experts\.\d+\.", "experts.*.", name) for name in shapes}
        every = {name.replace("*", str(i)) for name in of_layers for i in range(count)}
        if missing := sorted(every - shapes.keys()):
            raise _missing_tensors(folder, missing)
        (usual, _), *_ = Counter(shapes.values()).most_common()
        for name, shape in shapes.items():
            if shape != usual:
                what = f"{name} is {list(shape)}, but that of other experts is {list(usual)}"
                raise ModelError(f"the weights in {folder} cannot be loaded: {what}", MISMATCH_HINT)


def _missing_tensors(folder: Path, missing: list[str]) -> ModelError:
    problem = f"the weights in {folder} lack {counted(len(missing), 'tensor')}, first {missing[0]}"
    return ModelError(problem, "download the model again")


def _quantized_config(folder: Path, quantization: str, device: torch.device):
    """Return the transformers config of a quantized checkpoint, with corrected names for the unquantized modules.

    Published checkpoints list the tower under its old name, `visual`, so transformers would treat it as quantized. On a CPU without
    kernels for the packed weights, the config also tells transformers to dequantize them while loading.
    """
    from transformers.quantizers import AutoQuantizationConfig

    config = _read_config(folder)
    # Some programs write quantization_config to text_config, where older versions of transformers find it only for a few families.
    if not getattr(config, "quantization_config", None):
        config.quantization_config = config.text_config.quantization_config
    if Device(device).widens(quantization):
        config.quantization_config["dequantize"] = True
    for field in UNQUANTIZED:
        names = config.quantization_config.get(field)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            renamed = [re.sub(r"^(re:)?\^?visual\b", r"\1model.visual", name_in_memory(name)) for name in names]
            config.quantization_config[field] = list(dict.fromkeys([*names, *renamed]))
    # Raise an error for unknown methods. Older versions of transformers only warn, and interpret packed weights as plain numbers.
    AutoQuantizationConfig.from_dict(deepcopy(config.quantization_config))
    return config


def has_flat_config(folder: Path) -> bool:
    """Return True if config.json has the language model settings at the top level instead of in `text_config`."""
    return not read_object(folder / "config.json").get("text_config")


def _read_config(folder: Path):
    """Read the transformers config from a model folder.

    Language model settings at the top level are moved to `text_config`, because newer model families read only `text_config` and
    would otherwise use default settings.
    """
    from transformers import AutoConfig

    if not has_flat_config(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    content = read_object(folder / "config.json")
    whole = {name: value for name, value in content.items() if name in TOP_LEVEL_ENTRIES or name.endswith("_token_id")}
    own = {
        name: value for name, value in content.items() if name not in TOP_LEVEL_ENTRIES or name == "tie_word_embeddings"
    }
    return AutoConfig.for_model(**whole | {"text_config": own})


def read_whole(folder: Path, dtype: torch.dtype, device: torch.device, **kwargs):
    """Load a model from a folder using `from_pretrained` and sdpa attention.

    Returns:
        The result of `from_pretrained`: the model, or a tuple of the model and the loading info if requested in `kwargs`.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    with quiet_transformers(), _without_adapter(folder) as plain:
        source = AutoModelForImageTextToText
        if tensors := open_gguf(folder):
            config = _read_config(folder)
            kwargs |= {"config": config, "state_dict": {name: tensors.get_slice(name) for name in tensors.entries}}
            plain, source = None, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        loaded = source.from_pretrained(
            plain,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **kwargs,
        )
    host = loaded[0] if isinstance(loaded, tuple) else loaded
    if not kwargs.get("device_map"):  # quantized layers are already on their device
        host.to(device)
    else:
        in_one_dtype(host, dtype)
    host.eval().requires_grad_(False)
    return loaded


def in_one_dtype(host, dtype: torch.dtype) -> None:
    """Convert all unquantized layers to a single dtype.

    Otherwise, some layers of bitsandbytes checkpoints would keep their stored dtype.
    """
    for module in host.modules():
        weights = list(module.parameters(recurse=False))
        # Skip 8-bit weights, which have separate scales, and other parameter classes, which are packed.
        if all(type(w) is torch.nn.Parameter and w.is_floating_point() and w.itemsize > 1 for w in weights):
            for weight in weights:
                weight.data = weight.data.to(dtype)


def widen(model: HostedVL, dtype: torch.dtype, skip: Collection[str]) -> None:
    """Convert a model's weights to a given dtype, except for the input embeddings and the weights in `skip`.

    Args:
        skip: Names of weights to leave unchanged because they will be quantized.
    """
    for name, weight in model.named_parameters():
        if name not in skip and weight is not model.model.language_model.embed_tokens.weight:
            weight.data = weight.data.to(dtype)


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yield a model folder without an adapter, because transformers would apply the adapter using PEFT.

    If there is an adapter next to the weights, this yields a temporary folder with links to all other files.
    """
    if not (folder / ADAPTER).exists():
        yield folder
        return
    with temporary_folder() as links:
        for file in folder.iterdir():
            if file.name != ADAPTER:
                Path(links, file.name).symlink_to(file.resolve())
        yield Path(links)


def random_hosted(config: Config, dtype: torch.dtype, device: torch.device) -> HostedVL:
    """Return a model with seeded random weights, for benchmarks that depend only on the weight shapes."""
    host = meta_model(config, dtype, device)
    model = _hosted_model(config, host, experts=True)
    model.fill_random(device)
    host.tie_weights()
    return model


def _hosted_model(config: Config, host, *, experts: bool) -> HostedVL:
    host.eval().requires_grad_(False)
    # The KV cache keeps all columns, and language/hosted.py masks the columns outside of a window.
    host.model.language_model.config.sliding_window = None
    model = HostedVL(config, host.model.visual, host.model.language_model, host.lm_head)
    choose_functions(model, experts=experts)
    accept_biases(model)
    for logger in REPETITIVE_LOGS:
        logging.getLogger(logger).addFilter(_is_not_repetitive)  # adding the same filter again has no effect
    return model


def _is_not_repetitive(record: logging.LogRecord) -> bool:
    return REPETITIVE_LOGS[record.name] not in record.getMessage()


def meta_model(config: Config, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"):
    """Create a transformers model with the dimensions in `config`, with weights on the meta device that take no memory.

    Only the rotary frequencies are on `device`, because they are computed from the config instead of being loaded.
    """
    from transformers import AutoModelForImageTextToText

    settings = hugging_face_config(config)
    with torch.device("meta"):
        host = AutoModelForImageTextToText.from_config(settings, dtype=dtype, attn_implementation=attention)
    for parent in list(host.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq"):
                with device:
                    setattr(parent, name, type(child)(child.config))
    return host


def hugging_face_config(config: Config):
    """Convert a `Config` to a transformers config with the same dimensions, using the config class of the model's family."""
    from transformers import AutoConfig

    content = config.as_written()
    content["text_config"] |= {"bos_token_id": None, "eos_token_id": config.text_config.eos_token_id}
    return AutoConfig.for_model(**content)


@overlapping
def quiet_transformers() -> Iterator[None]:
    """Return a context manager that limits transformers to logging errors and disables its progress bars."""
    from transformers.utils import logging as log

    level = log.get_verbosity()
    bars = log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
