"""A model that was found, before its weights are read: where it is, what its folder says, and where and how it would be loaded."""

import os
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from evoprune.backend.devices import has_bf16, pick_device
from evoprune.bundled import DEMOS, Demo, demo_in
from evoprune.cpu.quantize import check as check_quantize
from evoprune.errors import ModelError, ModelWarning, UsageError
from evoprune.model.config import Config
from evoprune.model.weights import QwenVL, empty
from evoprune.session.loading.folder import (
    ADAPTER,
    BUNDLED_CONFIGS,
    FILES,
    MODEL_HINT,
    SETTINGS,
    cached_folder,
    download,
    input_limits,
    is_id,
    kind_hint,
    read_config,
    stored_dtype,
    weight_files,
)
from evoprune.session.loading.weights import MERGE, check_layers, needed_bytes, separate_head, stay_mapped
from evoprune.session.options import ModelOptions
from evoprune.text import did_you_mean, is_text
from evoprune.video.plan import InputLimits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class FoundModel:
    """Made by `find_model`, `look_up` and `describe_model`."""

    options: ModelOptions  # which model, and how it is to be loaded
    device: torch.device
    folder: Path | None  # its files; None for a bundled config
    commit: str | None  # on the hub, None for anything local
    config: Config

    @property
    def id(self) -> str:
        return self.options.model

    @property
    def random(self) -> bool:
        """Whether its weights are made, not read."""
        return self.options.load_format == "dummy"

    @property
    def demo(self) -> Demo | None:
        return demo_in(self.folder)

    @property
    def dtype(self) -> str:
        return pick_dtype(self.options.dtype, self.device, is_demo=self.demo is not None)

    @cached_property
    def limits(self) -> dict[str, InputLimits]:
        return input_limits(self.folder, self.config.vision_config)

    @cached_property
    def tree(self) -> QwenVL:
        """The names and shapes of its weights, without memory."""
        return empty(self.config)

    @cached_property
    def files(self) -> list[Path]:
        """The files of its weights; none of random ones. Warns of an adapter beside them, which is not applied.

        Raises ModelError: missing, damaged, or other layers than the config's.
        """
        files = [] if self.random else weight_files(self.folder)
        check_layers(self.config, files)
        if files and (self.folder / ADAPTER).is_file():
            said = f"{self.folder} holds an adapter ({ADAPTER}) beside the weights, which is not used; {MERGE}"
            warnings.warn(said, ModelWarning, stacklevel=2)
        return files

    @cached_property
    def files_here(self) -> list[Path]:
        """The files of its weights on this machine; none if they are missing or incomplete."""
        try:
            return weight_files(self.folder) if self.folder else []
        except ModelError:
            return []

    @property
    def parameters(self) -> int:
        """Numbers in the weights; shared ones count once."""
        return sum(weight.numel() for weight in self.tree.parameters())

    @cached_property
    def weights_bytes(self) -> int:
        """Of memory that the loaded weights take."""
        dtype, quantize = DTYPES[self.dtype], self.options.quantize
        mapped = quantize != "none" or self._stored == dtype  # as a download would be
        if self.files_here:
            mapped = stay_mapped(self.files_here, dtype, self.device, quantize)
        return needed_bytes(self.config, dtype, quantize, mapped)

    @property
    def download_bytes(self) -> int | None:
        """Of weights that have to be downloaded, roughly; 0 if they are here, None where that is unknown."""
        if self.files_here:
            return 0
        return self.parameters * self._stored.itemsize if self._stored and is_id(self.id) else None

    @cached_property
    def _stored(self) -> torch.dtype | None:
        return stored_dtype(BUNDLED_CONFIGS[self.id] if self.folder is None else self.folder / "config.json")


def find_model(options: ModelOptions) -> FoundModel:
    """Finds a model, and downloads it if it is on the hub and not here yet. Errors: as of `load_model`."""
    device, random = usable_device(options), options.load_format == "dummy"
    if random and _is_bundled(options.model):
        if options.revision is not None:
            problem = f"the bundled config of {options.model} has no revision {options.revision!r}"
            raise UsageError(problem, "leave the revision out")
        return _found(options, device)
    return _found(options, device, *locate(options, files=None if random else FILES))


def describe_model(options: ModelOptions) -> FoundModel:
    """Finds a model's settings, and downloads them alone if they are not here yet. A bundled config needs no hub."""
    device = usable_device(options)
    if _is_bundled(options.model) and options.revision is None:
        return _found(options, device)
    return _found(options, device, *locate(options, files=SETTINGS))


def look_up(options: ModelOptions) -> FoundModel:
    """Finds what this machine alone has of a model; no hub is asked.

    Raises ModelError: neither its folder nor its config is on this machine, or they are damaged. UsageError: as `find_model`.
    """
    device, name, revision = usable_device(options), options.model, options.revision
    if is_id(name) and not Path(name).is_dir():
        if (folder := cached_folder(name, revision)) or (name in BUNDLED_CONFIGS and revision is None):
            return _found(options, device, folder)
        if not Path(name).exists():
            at = "" if revision is None else f" --revision {revision}"
            files = f"config.json preprocessor_config.json{at}"
            hint = f"{kind_hint(name)}its settings are small, and suffice: hf download {name} {files}"
            raise ModelError(f"{name} is not on this machine, and inspect does not use the network", hint)
    return _found(options, device, *locate(options, files=None))


def _is_bundled(name: str) -> bool:
    return name in BUNDLED_CONFIGS and not Path(name).is_dir()


def _found(
    options: ModelOptions, device: torch.device, folder: Path | None = None, commit: str | None = None
) -> FoundModel:
    path = BUNDLED_CONFIGS[options.model] if folder is None else folder / "config.json"
    found = FoundModel(options, device, folder, commit, read_config(path))
    if not found.config.tie_word_embeddings or found.random or not separate_head(found.files_here):
        return found
    return replace(found, config=replace(found.config, tie_word_embeddings=False))


def locate(options: ModelOptions, *, files: list[str] | None) -> tuple[Path, str | None]:
    """The folder of a model, and its commit if it is a hub id. `files`: patterns of what to download; None if nothing may be."""
    name, revision = options.model, options.revision
    if not name.strip():
        raise ModelError("the name of the model is empty", MODEL_HINT)
    folder = DEMOS[name].folder if name in DEMOS else Path(os.path.expanduser(name))
    if name in DEMOS and not (folder / "config.json").is_file():
        hint = "install evoprune again, or name another model"
        raise ModelError(f"the bundled {name} model is missing: {folder}", hint)
    if os.path.isdir(folder):  # unlike a path's own method, it raises nothing
        if revision is not None:
            raise UsageError(f"{name} is a local model and has no revision {revision!r}", "leave the revision out")
        if not is_text(os.path.abspath(folder)):  # as the readers of tokenizers and weights want it
            hint = "rename it, or set LC_ALL to a locale with UTF-8, such as C.UTF-8"
            raise ModelError(f"the path {folder} is not valid text", hint)
        return folder, None
    if os.path.exists(folder):
        raise ModelError(f"{name} is a file, not a model", "name the folder that holds config.json and the weights")
    if not is_id(name):
        near = [known for known in BUNDLED_CONFIGS if name.lower() in known.lower()]
        meant = f"did you mean {near[0]}? " if near else did_you_mean(name, DEMOS)
        hint = f"{meant}a hub id is org/name; {MODEL_HINT}"
        raise ModelError(f"{name!r} is neither a folder here nor a hub id", hint)
    if files is None:
        hint = f"random weights need a local folder, {', '.join(DEMOS)}, or {' and '.join(BUNDLED_CONFIGS)}"
        raise ModelError(f"no bundled config for {name}", hint)
    return download(name, revision, options.offline, files, check=read_config)


def usable_device(options: ModelOptions) -> torch.device:
    """The device of options. Raises UsageError if it cannot be used, or weights cannot be quantised on it."""
    device = pick_device(options.device)
    check_quantize(options.quantize, device)
    return device


def pick_dtype(name: str, device: torch.device, is_demo: bool) -> str:
    """A dtype; for "auto" bf16 if the device multiplies it in hardware."""
    if name != "auto":
        return name
    return "bf16" if not is_demo and has_bf16(device) else "fp32"
