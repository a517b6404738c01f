"""A loaded model with its pruning method, shared by encoding and answering."""

from dataclasses import dataclass

import torch

from evoprune.errors import names_plugins
from evoprune.methods.chain import Pipeline
from evoprune.methods.plans import largest_share, plain
from evoprune.model.config import Config
from evoprune.session.loading.model import LoadedModel
from evoprune.session.options import PruneOptions, make_method


@dataclass(frozen=True)
class Engine:
    """Made by `make_engine`."""

    loaded: LoadedModel
    options: PruneOptions  # how visual tokens are pruned
    method: Pipeline
    load_seconds: float | None = None  # how long loading took, for reports; None where that is unknown

    def __repr__(self) -> str:
        how = f"method {self.options.method!r}, budget {self.reported_budget}, seed {self.seed}"
        return f"<Engine {self.loaded.id!r} in {self.loaded.dtype} on {self.loaded.device}: {how}>"

    @property
    def share(self) -> float:
        """Share of a video's tokens kept, at most; a `Preset` has another one for stills."""
        return self.options.share

    @property
    def reported_budget(self) -> float | str:
        """The budget as reports have it: 1.0 for a method that prunes nothing, or "auto" or "auto:inflection"."""
        return plain(self.method.reported_budget(self.options.budget))

    def prompt_columns(self, tokens: int, text: int) -> int | tuple[int, ...]:
        """Positions in a prompt of `tokens` visual tokens and `text`, at most, in each layer of the language model or in all."""
        depth = self.loaded.model.config.text_config.num_hidden_layers
        return self.method.prompt_columns(depth, tokens, text, largest_share(self.share))

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self.loaded.model.model.visual.patch_embed.proj.weight.device


def make_engine(loaded: LoadedModel, options: PruneOptions, load_seconds: float | None = None) -> Engine:
    """A loaded model with the method that options name. Raises UsageError: as `make_method` and `check_fits`."""
    method = make_method(options)
    check_fits(method, loaded.model.config)
    return Engine(loaded, options, method, load_seconds)


@names_plugins()
def check_fits(method: Pipeline, config: Config) -> None:
    """Raises UsageError: a method that cannot act in this language model, such as one without a recipe for so many layers."""
    method.language_plan(config.text_config.num_hidden_layers, 64, 1.0)


def unpruned(engine: Engine) -> Engine:
    """The same model and seed with every visual token kept: what pruning is compared with."""
    options = PruneOptions(budget=1.0, method="none", seed=engine.seed)
    return make_engine(engine.loaded, options, engine.load_seconds)
