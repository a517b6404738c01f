"""A model's weights: read from safetensors files or made at random, and brought into the form in which they are fastest here."""

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from evoprune.backend.devices import available_memory, is_host, uses_kernels
from evoprune.backend.layers import join, join_tower
from evoprune.cpu.linear import PackingTime
from evoprune.cpu.linear import pack as pack_layers
from evoprune.cpu.machine import page_in
from evoprune.cpu.quantize import Progress, places, saved_bytes
from evoprune.errors import ModelError, ModelWarning
from evoprune.model.config import Config
from evoprune.model.weights import QwenVL, empty, name_in_memory
from evoprune.text import counted

BELONG = "config.json and the weights must belong together; get the model again"
MERGE = "merge it into its base model (PEFT: merge_and_unload) and save that"
# How names of tensors begin that other programs wrote, and what to do about it.
ELSEWHERE = {
    "base_model.model.": f"the weights are those of a model under an adapter; {MERGE}",
    "module.": "the weights are those of a DistributedDataParallel or DataParallel around the model; save its `module`",
    "_orig_mod.": "the weights are those of a model under torch.compile; save its `_orig_mod`",
    "vision_tower.": "the weights are a conversion, as of MLX; take the original checkpoint",
    "language_model.model.": "the weights are a conversion, as of MLX; take the original checkpoint",
}
RESERVE = 2**29  # bytes that packed weights leave for the work itself
IN_FILE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors call them
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids)$")  # buffers of older files, which follow from the config
NAMED = 3  # tensors that are not used, in a warning


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Of each tensor in safetensors files: its file, that file opened by safetensors, and its name there."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as content:
            for stored in content.keys():  # noqa: SIM118 (not a dict)
                yield file, content, stored


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
    found, unused = {}, []
    for file, content, stored in stored_tensors(files):
        name = name_in_memory(stored)
        if name not in wanted:
            unused += [] if COMPUTED.search(name) else [stored]
            continue
        weight = content.get_tensor(stored)
        if weight.shape != wanted[name] or not weight.is_floating_point():
            what = f"{weight.dtype} {list(weight.shape)} where config.json wants {list(wanted[name])}"
            problem = f"the weights in {file.parent} cannot be loaded: {stored} is {what}".replace("torch.", "")
            raise ModelError(problem, BELONG)
        weight = weight if name.removesuffix(".weight") in as_stored else weight.to(device, dtype)
        if name in found and not torch.equal(weight, found[name]):
            problem = f"the weights in {file.parent} cannot be loaded: {name} is stored twice, with other values"
            raise ModelError(problem, BELONG)
        found[name] = weight
    if config.tie_word_embeddings:  # to what there is; `separate_head` was asked before
        if HEAD in found:
            found.setdefault(EMBEDDINGS, found.pop(HEAD))
        del wanted[HEAD]
    if missing := sorted(wanted.keys() - found.keys()):
        problem = f"the weights in {files[0].parent} lack {counted(len(missing), 'tensor')}, first {missing[0]}"
        raise ModelError(problem, "get the model again")
    if unused:
        are = "tensor of the weights is" if len(unused) == 1 else "tensors of the weights are"
        said = f"{len(unused):,} {are} not used in {files[0].parent}: {', '.join(unused[:NAMED])}"
        warnings.warn(said + (", ..." if len(unused) > NAMED else ""), ModelWarning, stacklevel=2)
    model.load_state_dict(found, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


def separate_head(files: Iterable[Path]) -> bool:
    """Whether files hold an output layer that differs from the embeddings: transformers then ties the two under no config."""
    stored = ((name_in_memory(name), content, name) for _, content, name in stored_tensors(files))
    found = {known: content.get_tensor(name) for known, content, name in stored if known in (HEAD, EMBEDDINGS)}
    if len(found) < 2:
        return False
    head, embeddings = found.values()
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> QwenVL:
    """A model with seeded random weights, for benchmarks: speed does not depend on the values. Takes seconds at 3B."""
    model = empty(config)
    for module in model.modules():  # not `to_empty`, which imports torch's compiler for two seconds
        for name, weight in [*module.named_parameters(recurse=False)]:
            made = torch.empty(weight.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    model.tie()
    # One block of noise, repeated. Its length is a prime, so that no two rows of a matrix are equal.
    random = torch.Generator().manual_seed(0)
    block = torch.randn(1_048_573, generator=random, dtype=torch.float32, device="cpu").mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0 if name.endswith("bias") else 1)
                continue
            noise = block.roll(int(torch.randint(len(block), (), generator=random, dtype=torch.int64, device="cpu")))
            for piece in weight.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
    return model


def check_layers(config: Config, files: list[Path]) -> None:
    """Raises ModelError where the weights, if there are any, lack the last layer of the tower or of the language model."""
    names = {name_in_memory(stored) for _, _, stored in stored_tensors(files)}
    last = {
        "model.visual.blocks": config.vision_config.depth,
        "model.language_model.layers": config.text_config.num_hidden_layers,
    }
    for layers, count in last.items():
        if files and not any(name.startswith(f"{layers}.{count - 1}.") for name in names):
            last_layer = f"{layers}.{count - 1}, the last layer that config.json counts"
            known = (hint for start, hint in ELSEWHERE.items() if any(name.startswith(start) for name in names))
            raise ModelError(f"the weights in {files[0].parent} lack {last_layer}", next(known, BELONG))


def needed_bytes(config: Config, dtype: torch.dtype, quantize: str, mapped: bool) -> int:
    """Bytes that the weights take, from when they are read. `mapped`: whether they `stay_mapped`.

    Memory-mapped weights count: dropped ones are read again for every token. Those that are quantised are read no more than once.
    """
    model = empty(config).to(dtype)
    wide = sum(weight.nbytes for weight in model.parameters())
    return wide - saved_bytes(model, quantize) if quantize != "none" and mapped else wide


def stay_mapped(files: list[Path], dtype: torch.dtype, device: torch.device, quantize: str = "none") -> bool:
    """Whether weights are used, or quantised, as they are in their files."""
    if not files or not is_host(device):
        return False
    if quantize != "none":
        return True
    stored = {content.get_slice(name).get_dtype() for _, content, name in stored_tensors(files[:1])}
    return stored == {IN_FILE[dtype]}


def page_in_weights(model: QwenVL) -> None:
    """Starts to read memory-mapped weights in the order of their use, unless memory for all of them is missing."""
    tower, language = model.model.visual, model.model.language_model
    weights = [*tower.parameters(), *language.layers.parameters(), *language.embed_tokens.parameters()]
    available = available_memory("cpu")
    if available is None or available > sum(weight.nbytes for weight in weights):
        page_in(weights)


def make_ready(
    model: QwenVL, quantize: str, *, pack: bool = True, progress: Progress | None = None, store: str | None = None
) -> PackingTime:
    """Quantises the linear layers of a model on the CPU in place, or packs them; on CUDA, joins them. Arguments as `load_model`.

    Those of the tower are packed now, those of the language model when few rows come: the tower is a sixth of a 3B model, and
    packed it encodes about a tenth faster; the language model would make the first word wait. Where memory is short, none are.
    `store`: the fingerprint of quantised weights on disk; None for no storing. Returns how long layers have packed, so far.
    """
    spent = PackingTime()
    if uses_kernels(model.device):
        join(model)
        join_tower(model.model.visual)
    if not is_host(model.device):
        return spent
    if quantize != "none":
        from evoprune.session.loading.stored import quantize_once

        quantize_once(model, quantize, store, progress)
        return spent
    linear_bytes = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
    available = available_memory("cpu")
    if pack and (available is None or available > linear_bytes + RESERVE):
        pack_layers(model.model.visual)
        pack_layers(model, spent)
    return spent
