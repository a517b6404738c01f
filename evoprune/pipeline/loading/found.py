"""A model that was found, before its weights are read: where it is, its config, and what identifies its weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from evoprune.bundled import Demo, demo_in
from evoprune.errors import UsageError
from evoprune.model.config import Config
from evoprune.model.quantize import check as check_quantize
from evoprune.model.weights import empty
from evoprune.pipeline.loading import fingerprint, hub
from evoprune.pipeline.loading.device import pick_device
from evoprune.pipeline.loading.folder import BUNDLED_CONFIGS, locate, read_config, weight_files
from evoprune.pipeline.loading.weights import check_layers
from evoprune.pipeline.options import ModelOptions


@dataclass(frozen=True)
class FoundModel:
    """Made by `find_model`.

    Attributes:
        options: which model, and how it is to be loaded.
        device: where to.
        folder: its files; None for a bundled config. `commit`: on the hub, None for anything local.
        config: the content of its config.json.
    """

    options: ModelOptions
    device: torch.device
    folder: Path | None
    commit: str | None
    config: Config

    @property
    def random(self) -> bool:
        """Whether its weights are made, not read."""
        return self.options.load_format == "dummy"

    @property
    def demo(self) -> Demo | None:
        """Which bundled demo model this is the folder of; None for any other model."""
        return demo_in(self.folder)

    @cached_property
    def files(self) -> list[Path]:
        """The files of its weights; none of random ones.

        Raises:
            ModelError: they are missing, damaged, or have another number of layers than the config.
        """
        files = [] if self.random else weight_files(self.folder)
        check_layers(self.config, files)
        return files

    @cached_property
    def weights_fingerprint(self) -> str:
        """What identifies the weights (`loading.fingerprint`); at 3B a tenth of a second.

        Raises:
            UsageError: they are random. ModelError: they are missing or damaged.
        """
        if self.random:
            hint = "take the weights (load format auto), or give a budget as a number"
            raise UsageError(f"the weights of {self.options.model} are random, so nothing was tuned on them", hint)
        files = self.files  # which checks the number of layers, before a tree of that many is built
        return fingerprint.of_files(files, empty(self.config))


def find_model(options: ModelOptions) -> FoundModel:
    """Finds a model, and downloads it if it is on the hub and not here yet.

    Raises:
        UsageError, ModelError: as `loading.load_model`.
    """
    device = pick_device(options.device)
    check_quantize(options.quantize, device)
    name, revision, random = options.model, options.revision, options.load_format == "dummy"
    if random and name in BUNDLED_CONFIGS and not Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"the bundled config of {name} has no revision {revision!r}", "leave the revision out")
        return FoundModel(options, device, None, None, read_config(BUNDLED_CONFIGS[name]))
    folder, commit = locate(name, revision, options.offline, files=None if random else hub.FILES)
    return FoundModel(options, device, folder, commit, read_config(folder / "config.json"))
