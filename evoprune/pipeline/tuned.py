"""Tuned settings: the method and budget that were found best for a model, kept for each user, for a budget of "tuned".

A setting is a file named by the fingerprint of the model's weights (pipeline/kept.py). No torch.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from typing import Any

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.keywords import check_types
from evoprune.pipeline.kept import Shelf, folder, write
from evoprune.pipeline.options import PruneOptions
from evoprune.pruning.budget import TUNED, parse_budget

SCHEMA = "evoprune/tuned@1"
ALL = "all"


@dataclass(frozen=True)
class Tuned:
    """A setting, and what was measured when it was found.

    Attributes:
        method: with its settings, as `--method` takes it. `budget`: share of visual tokens kept.
        model: the model's name at that time, for people.
        created_utc: ISO date and time.
        agree: the agreement that was asked for. `agreement`: what was measured; `low`: the lower end of its 95% interval.
        first_token: time to the first token as a share of that with nothing pruned.
        videos, questions: how many were measured.
        version: of evoprune.

    Raises:
        UsageError: a value that cannot be.
    """

    method: str
    budget: float
    model: str
    created_utc: str
    agree: float
    agreement: float
    low: float
    first_token: float
    videos: int
    questions: int
    version: str

    def __post_init__(self):
        check_types(self)
        methods.parse(self.method)
        parse_budget(self.budget)
        try:
            datetime.fromisoformat(self.created_utc)
        except ValueError as problem:
            raise UsageError(
                f"created_utc {self.created_utc!r} is no date and time", "give it in ISO format"
            ) from problem
        for name in ("agree", "agreement", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, not a share", "give a number from 0 to 1")
        if not self.first_token > 0 or min(self.videos, self.questions) < 1:
            raise UsageError("first_token, videos and questions must be above 0", "give what was measured")

    @property
    def origin(self) -> dict[str, Any]:
        """What reports say of where a method and budget come from: `pruning.tuned`."""
        return {name: getattr(self, name) for name in ("created_utc", "agree", "low", "videos", "questions")}


def resolve(options: PruneOptions, name: str | None, weights: Callable[[], str]) -> tuple[PruneOptions, Tuned | None]:
    """Options with the model's own method and budget in the place of "tuned", and the setting; other options unchanged, and None.

    Args:
        name: of the model, for errors; None where that is unknown.
        weights: gives the fingerprint of its weights; called for a budget of "tuned" only.

    Raises:
        UsageError: the model was never tuned, or its setting is damaged. Whatever `weights` raises.
    """
    if options.budget != TUNED:
        return options, None
    if (tuned := find(weights())) is None:
        hint = f"evoprune tune VIDEO... -m {name or 'MODEL'} finds one; or give a budget"
        raise UsageError(f"no tuned setting for {name or 'this model'}", hint)
    return replace(options, budget=tuned.budget, method=tuned.method), tuned


_SHELF = Shelf(TUNED, SCHEMA, Tuned, "tuned setting", "evoprune tune")
find, every, save, remove = _SHELF.find, _SHELF.every, _SHELF.save, _SHELF.remove


def matching(text: str, more: Sequence[tuple[str, Any]] = ()) -> list[tuple[str, Any]]:
    """The settings that a text names: "all", the name of a model, or the beginning of a fingerprint.

    Args:
        more: what else is kept for models, of which those without a setting are named the same way.

    Raises:
        UsageError: it names none, or more than one without being "all".
    """
    settings = [*(dict(more) | dict(every())).items()] if more else every()
    if text == ALL:
        return settings
    found = [(f, s) for f, s in settings if text and (getattr(s, "model", None) == text or f.startswith(text))]
    if not found:
        raise UsageError(f"no tuned setting is named {text!r}", "evoprune inspect lists them")
    if len(found) > 1:
        several = ", ".join(fingerprint[:12] for fingerprint, _ in found)
        raise UsageError(f"{text!r} names {len(found)} tuned settings: {several}", f"name one of these, or {ALL}")
    return found


def never_tuned(model: str, weights: Callable[[], str]) -> bool:
    """Whether weights have no setting; at most once for a model, because the next call finds a mark and says no.

    Args:
        model: a fingerprint of the model that costs nothing (`LoadedModel.fingerprint`), by which the mark is named.
        weights: gives the fingerprint of its weights; called where there is no mark.
    """
    mark = folder() / "seen" / sha256(model.encode()).hexdigest()
    if os.path.exists(mark):  # unlike a path's own method, it raises nothing
        return False
    with suppress(OSError):  # without a mark, the next run asks again
        write(mark, "")
    return not os.path.exists(_SHELF.path(weights()))
