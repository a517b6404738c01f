"""What identifies the weights of a model: the same for its files and for the model in memory, whatever its name, folder or dtype.

It is a hash of every 1-D tensor and of the first row of every other one, with names and shapes. So it takes milliseconds for a
model of gigabytes, and a fine-tune or a merged adapter changes it. The output layer is left out, as files may or may not hold it
where it is tied.

Values are compared in bf16. Of a checkpoint in bf16 or fp16 they are equal however it was loaded. Of one in fp32 they are equal
for its files and for models in fp32 and bf16; a model in fp16 has been rounded twice, and differs.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from evoprune.errors import UsageError
from evoprune.model.weights import QwenVL, name_in_memory
from evoprune.pipeline.loading.weights import stored_tensors

LEFT_OUT = "lm_head.weight"
LEAST = 2.0**-14  # smaller values lose digits in fp16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MERGE = "merge it (PEFT: merge_and_unload)"

Row = tuple[str, Sequence[int], torch.Tensor]  # of a tensor: its name in the tree, its shape, and what is hashed of it


def of_files(files: Iterable[Path], tree: QwenVL) -> str:
    """The fingerprint of weights in safetensors files, of which little is read.

    Args:
        tree: of the model, perhaps without memory. Tensors of the files that have no place in it are left out.
    """
    shapes = {name: list(weight.shape) for name, weight in tree.named_parameters()}
    rows: list[Row] = []
    with torch.device("cpu"):  # whatever the host program's default
        for _, content, stored in stored_tensors(files):
            name, tensor = name_in_memory(stored), content.get_slice(stored)
            if name != LEFT_OUT and (shape := tensor.get_shape()) == shapes.get(name):
                rows.append((name, shape, tensor[:1] if len(shape) > 1 else tensor[:]))
    return _fingerprint(rows)


def of_model(model: torch.nn.Module) -> str:
    """The fingerprint of a transformers model in memory, on any device.

    Raises:
        UsageError: its weights cannot be read as those of its checkpoint: they are quantised, offloaded, or an adapter adds to
            them.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise _quantised("this model")
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):
            raise UsageError(f"an adapter changes {name} of this model, so its weights cannot be identified", MERGE)
    rows: list[Row] = []
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise UsageError(f"{name} of this model is on the meta device or offloaded", "load it onto a device")
        if weight.dtype not in DTYPES:
            raise _quantised(f"{name} of this model")
        if name != LEFT_OUT:
            rows.append((name, weight.shape, weight[:1] if weight.ndim > 1 else weight))
    return _fingerprint(rows)


def _quantised(what: str) -> UsageError:
    hint = "load it in bf16, fp16 or fp32, or give a budget as a number"
    return UsageError(f"{what} is quantised, so the weights cannot be identified", hint)


def _fingerprint(rows: list[Row]) -> str:
    found = hashlib.sha256()
    for name, shape, row in sorted(rows, key=lambda row: row[0]):
        values = row.detach().to("cpu", torch.bfloat16).contiguous()
        values = values.masked_fill(~(values.abs() >= LEAST), 0)
        found.update(f"{name} {list(shape)}\n".encode())
        found.update(values.view(torch.int16).numpy())
    return found.hexdigest()
