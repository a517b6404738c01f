"""The encoder's rows of a video, computed once for all methods and budgets that give the tower the same work.

Methods that act after the encoder differ only in what they select.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

import torch

from evoprune.model.cost import Clock
from evoprune.pruning.encoder_plan import EncoderPlan, SetAside
from evoprune.vision.encoded import EncodedRows
from evoprune.vision.encoder import encode_rows

# Encodings held: enough for the selectors behind `reuse`, which need attention, keys, both or nothing, at three budgets, whatever
# other methods run between them.
HELD = 32


class SharedRows:
    """Of one video, in one model.

    Attributes:
        saved: seconds that the latest call would have taken more if its rows had not been there.
    """

    def __init__(self):
        self.saved = 0.0
        self._held: OrderedDict[tuple, tuple[EncodedRows, float]] = OrderedDict()

    def encode_rows(self, visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **how) -> EncodedRows:
        """As `vision.encoder.encode_rows`."""
        key = (_tower_work(plan), *sorted(how.items()))
        if key in self._held:
            for _ in patches:  # the reader of the patches counts damaged frames
                pass
            self._held.move_to_end(key)
            rows, self.saved = self._held[key]
        else:
            clock, self.saved = Clock(visual.patch_embed.proj.weight.device), 0.0
            start = clock.now()
            rows = encode_rows(visual, clock.each("wait", patches), plan, **how)
            self._held[key] = rows, clock.now() - start - clock.seconds["wait"]
            if len(self._held) > HELD:
                self._held.popitem(last=False)
        return replace(rows, plan=plan, timer=rows.timer.copy())  # each caller adds its own times


def _tower_work(plan: EncoderPlan) -> tuple:
    """What the tower's rows depend on: everything if tokens may be selected inside, else what is collected."""
    inside = plan.stages[:-1] if plan.tokens else plan.stages
    if any(not isinstance(stage.reduce, SetAside) for stage in inside):
        return (plan,)
    needs = plan.tokens.selector.needs if plan.tokens else frozenset()
    return plan.grid, plan.reuse, inside, needs, plan.prunes
