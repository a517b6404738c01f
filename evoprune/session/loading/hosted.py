"""Loads a model through transformers: families whose language model this project does not run itself, and quantised checkpoints.

transformers reads the safetensors files, never code that comes with them, and asks no network. It also knows how each method of
quantisation packs its weights; the packages that compute with them are the user's to install.
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

from evoprune.backend import are_widened, choose_functions
from evoprune.errors import ModelError, ModelWarning, first_line, is_out_of_memory
from evoprune.language import use_experts
from evoprune.model import Config, HostedVL, as_written, fill_random, name_in_memory, read_object
from evoprune.session.loading.description import ADAPTER
from evoprune.session.loading.weights import BELONG, PACKAGES, PLAIN, stored_tensors, weight_files
from evoprune.util import counted, listed
from evoprune.video import temporary_folder

# Entries of a config that name the modules which are not quantised.
UNQUANTIZED = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
# Entries of a config that are no settings of the language model alone.
OF_THE_WHOLE = (
    "model_type", "architectures", "vision_config", "text_config", "quantization_config", "tie_word_embeddings", "dtype",
    "torch_dtype",
)  # fmt: skip
# What loggers say again and again. One recommends packages for GPUs (`backend.hosted.FUSED`), which would not be called. That
# layers of 8 bits compute in fp16 is said of every product.
SAID = {
    "transformers.integrations.hub_kernels": "falling back to its reference",
    "bitsandbytes.autograd._functions": "inputs will be cast",
}


def load_hosted(
    config: Config, folder: Path, dtype: torch.dtype, device: torch.device, quantization: str | None
) -> HostedVL:
    """Return the model in a folder, `quantization` its method if it is quantised.

    Raises ModelError: transformers cannot read it, or tensors are missing. Warns of tensors that are not used.
    """
    if config.text_config.experts and not quantization:
        _check_experts(folder, config.text_config.experts.num_experts)
    kwargs = {}
    try:
        with _environment_kept():
            if quantization:
                kwargs = {"device_map": {"": device}, "config": _quantized_config(folder, quantization, device)}
            elif lies_flat(folder):
                kwargs = {"config": _read_config(folder)}
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are named here
            host, info = read_whole(folder, dtype, device, **kwargs)
    # transformers and the packages of quantisation raise of many kinds what a file has wrong.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        hint = BELONG
        if quantization:
            hint = "a package that it names must be installed"
        hint += "; or take a newer transformers: pip install -U transformers"
        raise ModelError(f"transformers cannot load {folder}: {first_line(problem)}", hint) from problem
    if missing := sorted(map(str, info["missing_keys"])):
        raise _lacking(folder, missing)
    for name, shape, wanted in sorted(info["mismatched_keys"]):
        what = f"{name} is {list(shape)} where config.json wants {list(wanted)}"
        raise ModelError(f"the weights in {folder} cannot be loaded: {what}", BELONG)
    if not quantization:
        for _, content, stored in stored_tensors(weight_files(folder)):
            kind = content.get_slice(stored).get_dtype()
            if kind not in PLAIN and stored not in info["unexpected_keys"]:
                what = f"{stored} is {kind}, and config.json says nothing of quantisation"
                raise ModelError(f"the weights in {folder} cannot be loaded: {what}", BELONG)
    if unused := sorted(map(str, info["unexpected_keys"])):
        said = f"{counted(len(unused), 'tensor')} of the weights are not used in {folder}: {', '.join(unused[:3])}"
        warnings.warn(said, ModelWarning, stacklevel=2)
    model = _of(config, host)
    if quantization:
        model.package = f"a layer quantised by {listed(PACKAGES.get(quantization, [quantization]))}"
    else:  # layers of quantised experts have implementations of their own
        use_experts(model)
    return model


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Takes back what packages of quantisation set when they are imported: gptqmodel moves the hub's cache, among others."""
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
    """Raises ModelError: a tensor of an expert is missing, or of another shape than that of the others.

    transformers joins them, and names what it cannot join in a log alone.
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
            raise _lacking(folder, missing)
        (usual, _), *_ = Counter(shapes.values()).most_common()
        for name, shape in shapes.items():
            if shape != usual:
                what = f"{name} is {list(shape)} where the same of others is {list(usual)}"
                raise ModelError(f"the weights in {folder} cannot be loaded: {what}", BELONG)


def _lacking(folder: Path, missing: list[str]) -> ModelError:
    problem = f"the weights in {folder} lack {counted(len(missing), 'tensor')}, first {missing[0]}"
    return ModelError(problem, "get the model again")


def _quantized_config(folder: Path, quantization: str, device: torch.device):
    """Return the config of transformers, in which parts that are not quantised have the names of the modules in memory too.

    Published checkpoints name the tower `visual`, as older releases did; it would be taken for quantised otherwise. Weights for
    which a CPU has no kernels are plain in memory.
    """
    from transformers.quantizers import AutoQuantizationConfig

    config = _read_config(folder)
    # Some programs write it beside the layers that are quantised; older releases look for it there for few families.
    if not getattr(config, "quantization_config", None):
        config.quantization_config = config.text_config.quantization_config
    if are_widened(device, quantization):
        config.quantization_config["dequantize"] = True
    for field in UNQUANTIZED:
        names = config.quantization_config.get(field)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            renamed = [re.sub(r"^(re:)?\^?visual\b", r"\1model.visual", name_in_memory(name)) for name in names]
            config.quantization_config[field] = list(dict.fromkeys([*names, *renamed]))
    # Older releases only warn of a method that they do not know, and read packed weights as if they were plain.
    AutoQuantizationConfig.from_dict(deepcopy(config.quantization_config))
    return config


def lies_flat(folder: Path) -> bool:
    """Say whether the settings of the language model stand at the top level of a config.json, not in `text_config`."""
    return not read_object(folder / "config.json").get("text_config")


def _read_config(folder: Path):
    """Read the config of transformers. Its later families know `text_config` alone, and take their defaults where there is none."""
    from transformers import AutoConfig

    if not lies_flat(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    content = read_object(folder / "config.json")
    whole = {name: value for name, value in content.items() if name in OF_THE_WHOLE or name.endswith("_token_id")}
    own = {name: value for name, value in content.items() if name not in OF_THE_WHOLE or name == "tie_word_embeddings"}
    return AutoConfig.for_model(**whole | {"text_config": own})


def read_whole(folder: Path, dtype: torch.dtype, device: torch.device, **kwargs):
    """Return the model of transformers as it reads a folder, config and weights, by itself; under sdpa."""
    from transformers import AutoModelForImageTextToText

    safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    with quiet_transformers(), _without_adapter(folder) as plain:
        loaded = AutoModelForImageTextToText.from_pretrained(
            plain, dtype=dtype, attn_implementation="sdpa", **safe, **kwargs
        )
    host = loaded[0] if isinstance(loaded, tuple) else loaded
    if not kwargs.get("device_map"):  # layers of quantised weights were made on their device
        host.to(device)
    else:
        in_one_dtype(host, dtype)
    host.eval().requires_grad_(False)
    return loaded


def in_one_dtype(host, dtype: torch.dtype) -> None:
    """Gives layers without quantised weights this dtype. Of bitsandbytes' checkpoints, transformers leaves some as stored."""
    for module in host.modules():
        weights = list(module.parameters(recurse=False))
        # Weights in 8 bits have scales beside them; those of other classes know how they are packed.
        if all(type(w) is torch.nn.Parameter and w.is_floating_point() and w.itemsize > 1 for w in weights):
            for weight in weights:
                weight.data = weight.data.to(dtype)


def widen(model: HostedVL, dtype: torch.dtype, skip: Collection[str]) -> None:
    """Gives weights a dtype, but those of some layers, by name, which are to be quantised, and the input embeddings."""
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight") not in skip and weight is not model.model.language_model.embed_tokens.weight:
            weight.data = weight.data.to(dtype)


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Provide the folder; where an adapter is beside the weights, which transformers would apply with PEFT, links to its other
    files.
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
    """Return a model with seeded random weights, for benchmarks; its values do not change the speed."""
    host = meta_model(config, dtype)
    host.to_empty(device=device)
    fill_random(host)
    with_frequencies(host, device)
    host.tie_weights()
    model = _of(config, host)
    use_experts(model)
    return model


def _of(config: Config, host) -> HostedVL:
    host.eval().requires_grad_(False)
    model = HostedVL(config, host.model.visual, host.model.language_model, host.lm_head)
    choose_functions(model.model.language_model)
    for logger in SAID:
        logging.getLogger(logger).addFilter(_is_news)  # the same one is added once
    return model


def _is_news(record: logging.LogRecord) -> bool:
    return SAID[record.name] not in record.getMessage()


def meta_model(config: Config, dtype: torch.dtype, attention: str = "sdpa"):
    """Return the model of transformers with the numbers of `config`, without memory."""
    from transformers import AutoModelForImageTextToText

    kwargs = {"dtype": dtype, "attn_implementation": attention}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(hugging_face_config(config), **kwargs)


def hugging_face_config(config: Config):
    """Return the config of transformers with the same numbers, of the class for this family."""
    from transformers import AutoConfig

    content = as_written(config)
    content["text_config"] |= {"bos_token_id": None, "eos_token_id": config.text_config.eos_token_id}
    return AutoConfig.for_model(**content)


def with_frequencies(host, device: torch.device) -> None:
    """Makes the rotary frequencies of a model that was on no device: they follow from the config, and are no weights."""
    for parent in list(host.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq"):
                with device:
                    setattr(parent, name, type(child)(child.config))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Provide a context in which transformers shows no progress and logs errors alone."""
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
