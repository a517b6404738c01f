"""What is known of a model before it is loaded, from this machine alone: no weights are read and no hub is asked."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from evoprune.bundled import demo_in
from evoprune.errors import ModelError, UsageError
from evoprune.model.config import Config
from evoprune.model.quantize import check as check_quantize
from evoprune.model.strict_json import read_object
from evoprune.model.weights import QwenVL, empty
from evoprune.pipeline.loading import hub
from evoprune.pipeline.loading.device import DTYPES, pick_device, pick_dtype
from evoprune.pipeline.loading.fingerprint import of_files
from evoprune.pipeline.loading.folder import (
    BUNDLED_CONFIGS,
    input_limits,
    locate,
    read_config,
    weight_files,
)
from evoprune.pipeline.loading.weights import needed_bytes, stay_mapped
from evoprune.pipeline.options import ModelOptions
from evoprune.video.plan import InputLimits


@dataclass(frozen=True)
class KnownModel:
    """A model that has not been loaded.

    Attributes:
        id: its name as given.
        config, limits: its dimensions, and its limits for videos and pictures, by kind.
        folder: where it is on this machine; None where only its dimensions are known.
        files: its weights on this machine; none if they are missing or incomplete.
        dtype: the short name of the dtype that it would be loaded in, on `device`.
        quantize: how its language model would be quantised.
        stored: the dtype of the published weights; None where unknown.
        tree: the names and shapes of its weights, without memory.
    """

    id: str
    config: Config
    limits: dict[str, InputLimits]
    folder: Path | None
    files: tuple[Path, ...]
    dtype: str
    device: torch.device
    quantize: str
    stored: torch.dtype | None
    tree: QwenVL

    @property
    def is_demo(self) -> bool:
        """Whether this is a bundled demo model."""
        return demo_in(self.folder) is not None

    @property
    def parameters(self) -> int:
        """Numbers in the weights; shared ones count once."""
        return sum(weight.numel() for weight in self.tree.parameters())

    @cached_property
    def weights_bytes(self) -> int:
        """Of memory that the loaded weights take."""
        dtype = DTYPES[self.dtype]
        mapped = (
            stay_mapped(list(self.files), dtype, self.device) if self.files else self.stored == dtype
        )  # as a download would be
        return needed_bytes(self.config, dtype, self.quantize, mapped)

    @property
    def weights_fingerprint(self) -> str:
        """What identifies the weights (`loading.fingerprint`).

        Raises:
            UsageError: they are not on this machine.
        """
        if not self.files:
            hint = "give a budget as a number, or download them first"
            raise UsageError(f"the weights of {self.id} are not on this machine, so nothing was tuned on them", hint)
        return of_files(self.files, self.tree)

    @property
    def download_bytes(self) -> int | None:
        """Of weights that have to be downloaded, roughly; 0 if they are here, None where that is unknown."""
        if self.files:
            return 0
        return self.parameters * self.stored.itemsize if self.stored and hub.is_id(self.id) else None


def look_up(options: ModelOptions) -> KnownModel:
    """What this machine knows of a model.

    Raises:
        UsageError: a device that cannot be used, or on which weights cannot be quantised; a revision of something local.
        ModelError: neither its folder nor its config is on this machine, or they are damaged.
    """
    name, revision = options.model, options.revision
    bundled = name in BUNDLED_CONFIGS and revision is None and not Path(name).is_dir()
    folder = hub.cached_folder(name, revision) if hub.is_id(name) and not Path(name).is_dir() else None
    if folder is None and not bundled:
        folder = _local(name, revision)
    path = BUNDLED_CONFIGS[name] if folder is None else folder / "config.json"
    config, device = read_config(path), pick_device(options.device)
    check_quantize(options.quantize, device)
    try:
        files = () if folder is None else tuple(weight_files(folder))
    except ModelError:
        files = ()
    return KnownModel(
        id=name,
        config=config,
        limits=input_limits(folder, config.vision_config),
        folder=folder,
        files=files,
        dtype=pick_dtype(options.dtype, device, is_demo=demo_in(folder) is not None),
        device=device,
        quantize=options.quantize,
        stored=_stored_dtype(path),
        tree=empty(config),
    )


def _local(name: str, revision: str | None) -> Path:
    """The folder of a model that is not in the hub's cache."""
    if hub.is_id(name) and not Path(name).exists():
        at = "" if revision is None else f" --revision {revision}"
        files = f"config.json preprocessor_config.json{at}"
        hint = f"{hub.kind_hint(name)}its settings are small, and suffice: hf download {name} {files}"
        raise ModelError(f"{name} is not on this machine, and inspect does not use the network", hint)
    return locate(name, revision, True, files=None)[0]


def _stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype of the published weights, if a config.json that has been checked says so."""
    content = read_object(path)
    name = content.get("dtype", content.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(name))
