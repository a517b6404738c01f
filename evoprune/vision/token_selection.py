"""The tower's output, and the selection of the tokens that the language model reads."""

from dataclasses import dataclass, field, replace

import torch

from evoprune.errors import UsageError
from evoprune.methods.inflection import tokens_before_inflection
from evoprune.methods.selecting import select
from evoprune.model.numerics import not_a_number_error
from evoprune.pruning.encoder_plan import EncoderPlan, Inflection
from evoprune.pruning.indices import ascending, tally
from evoprune.pruning.types import Selection, Tokens
from evoprune.vision import devices
from evoprune.vision.encoded import Encoded
from evoprune.vision.timer import Timer


@dataclass
class Checks:
    """Results that are read at the end, so that the program does not wait for a GPU earlier.

    Attributes are lists of bool tensors without dimension:
        even: for each chunk, whether each of its frame pairs has one colour.
        failed: for each merging, whether a group did not lose its rows.
        numbers: for each chunk, whether its rows are without NaN and infinity.
    """

    even: list[torch.Tensor] = field(default_factory=list)
    failed: list[torch.Tensor] = field(default_factory=list)
    numbers: list[torch.Tensor] = field(default_factory=list)


@dataclass
class EncodedRows:
    """A video after the tower, before tokens are selected.

    Attributes:
        plan: as it was encoded.
        tokens: the input of the selector.
        unit: int64 `[E]`, the unit whose place each row has.
        source: int64 `[T, H*W]` on the CPU, the number of the frame pair whose pixels represent each unit.
        layers: as in `Encoded`.
        selection: the selection inside the tower, if the language model reads exactly those rows; else None.
        timer: measures pruning.
        checks: results that `finish` reads.
    """

    plan: EncoderPlan
    tokens: Tokens
    unit: torch.Tensor
    source: torch.Tensor
    layers: list[tuple[int, int]]
    selection: Selection | None
    timer: Timer
    checks: Checks

    def nothing_selected(self) -> Encoded:
        """An encoding without tokens, for a method whose question is not known yet."""
        flat, seconds = self.finish()
        rows, none = self.tokens.rows, self.unit[:0]
        return Encoded(rows[:0], none, rows, self.tokens.owner, (self.plan.grid,), self.layers, seconds, flat)

    def finish(self) -> tuple[bool, float]:
        """Reads all checks. Only this and the selection inside the tower wait for a GPU.

        Returns:
            Whether each frame pair has one colour; and the time spent on pruning, in seconds.

        Raises:
            ModelError: a row has NaN or infinite values.
            RuntimeError: a merger did not remove its rows.
        """
        if not all_true(self.checks.numbers):
            raise not_a_number_error("encode")
        if self.checks.failed and torch.stack(self.checks.failed).any():
            raise RuntimeError(
                f"method {self.plan.stages[0].reduce.merger.name} did not remove as many rows as it was asked to"
            )
        return bool(self.checks.even) and all_true(self.checks.even), self.timer.seconds()


def all_true(flags: list[torch.Tensor]) -> bool:
    """Whether all are true (bool tensors without dimension); waits for the device."""
    return bool(torch.stack(flags).all())


@torch.inference_mode()
def select_tokens(video: EncodedRows, question: torch.Tensor | None = None) -> Encoded:
    """Selects the tokens that the language model reads. May be called again with another question.

    Args:
        video: from `encoder.encode_rows`.
        question: as in `encoder.encode`; ignored unless the method reads the question.

    Raises:
        ModelError, RuntimeError: as in `EncodedRows.finish`. UsageError, PluginError: as in `selected`.
    """
    tokens = video.tokens
    rows, owner = tokens.rows, tokens.owner
    with video.timer:
        selection = selected(video, question)
        kept = devices.to_device(selection.kept, rows.device)
        features = rows if selection is video.selection else replace(selection, kept=kept).features(rows, owner)
    flat, seconds = video.finish()
    return Encoded(features, kept, rows, owner, (video.plan.grid,), video.layers, seconds, flat, selection.size)


def selected(video: EncodedRows, question: torch.Tensor | None = None) -> Selection:
    """The units that the language model reads; arguments as in `select_tokens`.

    Raises:
        UsageError: the method reads the question, and there is none.
        PluginError: a method of another package returns what is no selection of `keep` units.
    """
    tokens, keep, stage = video.tokens, video.plan.keep, video.plan.tokens
    if video.selection is not None or not video.plan.prunes:
        return video.selection or Selection(video.unit)
    if stage is None:
        few = len(video.unit) > keep
        return Selection(video.unit[_largest(tally(tokens.owner, len(video.unit)), keep)] if few else video.unit)
    selector = stage.selector
    if selector.reads_question:
        if question is None:
            raise UsageError(
                f"method {selector.name} reads the question, and there is none here",
                "give the question with the video, or take another method",
            )
        tokens = replace(tokens, given={**tokens.given, "question": question.to(video.unit.device).float()})
    if isinstance(stage.reduce, Inflection):
        keep = tokens_before_inflection(selector, tokens, keep)
    return select(selector, tokens, keep)


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: the rows of largest cluster `size` (int64 `[E]`); among equal ones, at even distances.

    This serves counts below one row per frame pair, which merging inside frame pairs cannot reach.
    """
    order = ascending(len(size), size.device)
    even = order * keep // len(size)  # a new value marks each row of an even selection
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values
