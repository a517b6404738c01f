"""What leaves the tower, and the selection of the tokens that the language model reads among it."""

from dataclasses import dataclass, field, replace

import torch

from evoprune.methods.base import Method
from evoprune.model.numerics import not_a_number_error
from evoprune.pruning.indices import tally
from evoprune.pruning.plan import EncoderPlan
from evoprune.pruning.types import Selection, Tokens
from evoprune.vision import devices
from evoprune.vision.encoded import Encoded
from evoprune.vision.timer import Timer


@dataclass
class Checks:
    """What is read at the end, so that the host need not wait for a GPU before; lists of bool tensors without dimension.

    Attributes:
        even: for each chunk, whether it is of one colour.
        failed: whether a merger did not remove its rows.
        finite: for each chunk, whether its rows are finite.
    """

    even: list[torch.Tensor] = field(default_factory=list)
    failed: list[torch.Tensor] = field(default_factory=list)
    finite: list[torch.Tensor] = field(default_factory=list)


@dataclass
class EncodedRows:
    """A video behind the tower, before tokens are selected.

    Attributes:
        method, plan: that encoded it.
        tokens: what there is to select from.
        unit: int64 `[E]`, the unit whose place each row has.
        source: int64 `[T, H*W]` on the CPU, the number of the frame pair whose pixels represent each unit.
        layers: as in `Encoded`.
        selection: made inside the tower, where that is what the language model reads.
        timer: measures pruning. checks: what is still to be read.
    """

    method: Method
    plan: EncoderPlan
    tokens: Tokens
    unit: torch.Tensor
    source: torch.Tensor
    layers: list[tuple[int, int]]
    selection: Selection | None
    timer: Timer
    checks: Checks

    @property
    def changed_inside(self) -> bool:
        """Whether rows were merged or selected inside the tower."""
        return self.plan.merged is not None or self.plan.select_after is not None

    def nothing_selected(self) -> Encoded:
        """An encoding without tokens, for a method that has still to see the question."""
        flat, seconds = self.finish()
        rows, none = self.tokens.rows, self.unit[:0]
        return Encoded(rows[:0], none, rows, self.tokens.owner, (self.plan.grid,), self.layers, seconds, flat)

    def finish(self) -> tuple[bool, float]:
        """Reads all checks: whether the video is of one colour, and the seconds of pruning.

        The one place where the host waits for a GPU, beside the selection inside the tower.

        Raises:
            ModelError: a row is not finite. RuntimeError: some group did not lose its rows.
        """
        if not all_true(self.checks.finite):
            raise not_a_number_error("encode")
        if self.checks.failed and torch.stack(self.checks.failed).any():
            raise RuntimeError(f"method {self.method.name} did not remove as many rows as it was asked to")
        return bool(self.checks.even) and all_true(self.checks.even), self.timer.seconds()


def all_true(flags: list[torch.Tensor]) -> bool:
    """Whether all are true; waits for the device."""
    return bool(torch.stack(flags).all())


@torch.inference_mode()
def select_tokens(video: EncodedRows, question: torch.Tensor | None = None) -> Encoded:
    """What the language model reads; may be called with one question after another.

    Args:
        question: as in `encoder.encode`; ignored unless the method reads it.
    """
    tokens = video.tokens
    rows, owner = tokens.rows, tokens.owner
    with devices.here(rows.device), video.timer:
        selection = selected(video, question)
        kept = devices.to_device(selection.kept, rows.device)
        features = rows if selection is video.selection else replace(selection, kept=kept).features(rows, owner)
    flat, seconds = video.finish()
    return Encoded(features, kept, rows, owner, (video.plan.grid,), video.layers, seconds, flat, selection.size)


def selected(video: EncodedRows, question: torch.Tensor | None = None) -> Selection:
    """Which units the language model reads; arguments as `select_tokens`.

    Raises:
        TypeError: the method answers with something other than a `Selection`.
    """
    method, tokens, keep = video.method, video.tokens, video.plan.keep
    if video.selection is not None or not video.plan.prunes:
        return video.selection or Selection(video.unit)
    with devices.here(video.unit.device):
        if method.selector is None:
            few = len(video.unit) > keep
            return Selection(video.unit[_largest(tally(tokens.owner, len(video.unit)), keep)] if few else video.unit)
        if method.reads_question:
            given = {**tokens.given, "question": question.to(video.unit.device).float()}
            tokens = replace(tokens, given=given)
        found = method.selector.select(tokens, keep)
    if not isinstance(found, Selection):
        raise TypeError(f"method {method.name} must answer with a Selection, not a {type(found).__name__}")
    return found


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` rows that represent most units, ascending. Among equals those that lie evenly through the video.

    This is the last resort for a count below one row a frame pair, which no merging inside frame pairs can reach.
    """
    order = torch.arange(len(size))
    even = order * keep // len(size)  # a new value wherever an even selection would take the next row
    first = torch.cat([torch.ones(1, dtype=torch.bool), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values
