"""The VisiPruner method, which drops tokens once a layer has shown which of them influence the answer."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import Part, relative
from evoprune.methods import Budget, LanguageMethod, LanguagePlan, LayerTokens, Selection, arange_on, highest


@dataclass(frozen=True)
class VisiPruner(LanguageMethod):
    """VisiPruner (arXiv 2510.17205, section 4): drops tokens after the layer in which they influence the output most.

    In the first `shallow` fraction of the layers, text tokens do not attend to visual tokens. Let o be the attention output of the
    last token, and c_i the contribution of visual token i to it. A layer is decisive if cos(o - c_i, o) is below `layer` for at
    least one token. After the first decisive layer, only the tokens with |c_i| above `token` are kept, up to a maximum of K. A
    later layer is an exit layer if the cosine is at least `exit` for all tokens. After `exits` exit layers, all visual tokens are
    dropped.

    Differences from the paper: this method has a budget. If no layer up to `latest` is decisive, the K tokens with the largest
    contributions are kept. The thresholds were tuned for LLaVA-1.5, not for Qwen.
    """

    name = "visipruner"
    source = "arXiv 2510.17205, section 4"
    exact = False
    attends = "every"

    shallow: Part = 6 / 32  # fraction of the layers, from the first, in which text does not attend to visual tokens
    latest: Part = 0.5  # fraction of the layers after which tokens are dropped if no layer has been decisive
    layer: Part = 0.995  # a layer is decisive if a token's cosine is below this
    token: Annotated[float, "[0, inf]"] = 0.2  # tokens with |c_i| above this are kept
    exit: Part = 0.999  # a layer is an exit layer if every token's cosine is at least this
    exits: Annotated[int, "[0, inf]"] = 2  # number of exit layers after which all tokens are dropped; 0 disables this

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        keep = Budget.count(budget, tokens)
        blind = LanguagePlan.layers_before(self.shallow, depth)
        if keep == tokens or depth < 2:
            return LanguagePlan(depth, tokens, ())
        first = min(blind + 2, depth - 1)
        latest = max(first, LanguagePlan.layers_before(self.latest, depth))
        looks = tuple(range(first, depth))
        return LanguagePlan.of(depth, tokens, {latest: keep}, exact=False, looks=looks, blind=blind)

    def select(self, tokens: LayerTokens) -> Selection | None:
        if not len(tokens.visual):
            return None
        cosine, length = contributions(tokens)
        if "exits" in tokens.memory:
            tokens.memory["exits"] += bool((cosine >= self.exit).all())
            leaving = 0 < self.exits == tokens.memory["exits"]
            return Selection(arange_on(0, length.device)) if leaving else None
        decisive = bool((cosine < self.layer).any())
        if not (decisive or tokens.due):
            return None
        tokens.memory["exits"] = 0
        keep = max(1, min(tokens.left, int((length > self.token).sum()))) if decisive else tokens.left
        return Selection(highest(relative(length), keep))


def contributions(tokens: LayerTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure how much each visual token contributes to the attention output of the last token.

    The contributions c_i to the output o are not computed explicitly, so the cost is O(n heads head_dim).

    Returns:
        cos(o - c_i, o) and |c_i|, both float64 `[n]`.
    """
    weights = tokens.last_weights().double()
    kv_heads = tokens.values.shape[1]
    weights = weights.view(kv_heads, -1, weights.shape[1])  # [kv_heads, group, C]
    out = weights @ tokens.values.transpose(0, 1).double()  # [kv_heads, group, head_dim]
    given = weights[:, :, tokens.visual]
    values = tokens.values[tokens.visual].transpose(0, 1).double()
    along = (given * (out @ values.transpose(1, 2))).sum((0, 1))  # c_i . o
    square = (given.square() * values.square().sum(2)[:, None]).sum((0, 1))  # |c_i|^2
    total = out.square().sum()
    rest = (total - 2 * along + square).clamp(min=0).sqrt()  # |o - c_i|
    return (total - along) / (total.sqrt() * rest).clamp(min=1e-30), square.sqrt()
