"""A model's weights: read from safetensors files or made at random, and brought into the form in which they are fastest here."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from evoprune.errors import ModelError
from evoprune.model.config import Config
from evoprune.model.linear import PackingTime
from evoprune.model.linear import pack as pack_layers
from evoprune.model.machine import available_memory
from evoprune.model.paging import page_in
from evoprune.model.quantize import quantize as quantize_layers
from evoprune.model.quantize import saved_bytes
from evoprune.model.weights import QwenVL, empty, name_in_memory, shared

BELONG = "config.json and the weights must belong together; get the model again"
RESERVE = 2**29  # bytes that packed weights leave for the work itself
IN_FILE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors call them


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Of each tensor in safetensors files: its file, that file opened by safetensors, and its name there."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as content:
            for stored in content.keys():  # noqa: SIM118 (not a dict)
                yield file, content, stored


def load_weights(config: Config, files: list[Path], dtype: torch.dtype, device: torch.device) -> QwenVL:
    """Reads the weights. On the CPU, in the dtype of the file, they stay memory-mapped until they are packed.

    Raises:
        ModelError: tensors are missing or have another shape than the config says.
    """
    model = empty(config)
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = {}
    for file, content, stored in stored_tensors(files):
        name = name_in_memory(stored)
        if name not in wanted:
            continue
        weight = content.get_tensor(stored)
        if weight.shape != wanted[name] or not weight.is_floating_point():
            what = f"{weight.dtype} {list(weight.shape)} where config.json wants {list(wanted[name])}"
            problem = f"the weights in {file.parent} cannot be loaded: {stored} is {what}".replace("torch.", "")
            raise ModelError(problem, BELONG)
        found[name] = weight.to(device, dtype)
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(
            f"the weights in {files[0].parent} lack {len(missing)} tensors, first {missing[0]}", "get the model again"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> QwenVL:
    """A model with seeded random weights, for benchmarks: speed does not depend on the values. Takes seconds at 3B."""
    model = empty(config).to(dtype).to_empty(device=device)
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
    """Compares the numbers of layers with the names in the weights, if there are any, before a tree of that many is built.

    Raises:
        ModelError: the last layer of the tower or of the language model is not there.
    """
    names = {name_in_memory(stored) for _, _, stored in stored_tensors(files)}
    last = {
        "model.visual.blocks": config.vision_config.depth,
        "model.language_model.layers": config.text_config.num_hidden_layers,
    }
    for layers, count in last.items():
        if files and not any(name.startswith(f"{layers}.{count - 1}.") for name in names):
            raise ModelError(
                f"the weights in {files[0].parent} lack {layers}.{count - 1}, the last layer that config.json counts",
                BELONG,
            )


def needed_bytes(config: Config, dtype: torch.dtype, quantize: str, mapped: bool) -> int:
    """Bytes that the weights take, from when they are read. `mapped`: whether they `stay_mapped`.

    Memory-mapped weights count. The system may drop them, but then reads them from the disk again for every token. Only those that
    are quantised are read no more than once.
    """
    model = empty(config).to(dtype)
    wide = sum(weight.nbytes for weight in model.parameters())
    return wide - saved_bytes(model, quantize) if quantize != "none" and mapped else wide


def stay_mapped(files: list[Path], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights are used as they are in their files."""
    if not files or device.type != "cpu":
        return False
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
    model: QwenVL, quantize: str, *, pack: bool = True, progress: Callable[[int, int], None] | None = None
) -> PackingTime:
    """Quantises the linear layers of a model on the CPU in place, and packs the others.

    Those of the tower are packed now, those of the language model when few rows come: the tower is a sixth of a 3B model, and
    packed it encodes about a tenth faster; the language model would make the first word wait.

    Where memory is short, layers are not packed, and a quantised model reads prompts through its quantised layers, which is
    slower. Arguments as `load_model`.

    Returns:
        How long layers have packed; it grows when they do.
    """
    spent = PackingTime()
    if model.device.type != "cpu":
        return spent
    linear_bytes = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
    available = available_memory("cpu")
    pack = pack and (available is None or available > linear_bytes + RESERVE)
    if quantize != "none":
        wide = None
        if pack and (available is None or available > 1.7 * linear_bytes):
            wide = shared(model)
            pack_layers(wide.model.language_model, spent)
        quantize_layers(model, quantize, wide, progress)
    if pack:
        pack_layers(model.model.visual)
        pack_layers(model, spent)
    return spent
