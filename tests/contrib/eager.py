"""A reference language model in float64 that never removes a column. Dropped visual tokens are hidden by a mask.

The rule of a method is a function that takes an `EagerLayer` and returns the columns that stay. It follows the method's
specification line by line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from evoprune.language import prompt_positions, video_positions
from evoprune.language.decoder import KVCache, logits
from evoprune.methods import LanguageMethod
from evoprune.model import Config, QwenVL
from tests.methods.kinds import INNER
from tests.tiny import tiny_config

# Methods with a rule of their own for dropping tokens. `operations` follows a recipe (test_operations.py).
DROPPING = tuple(name for name in INNER if name != "operations")
BEFORE, GRID, TEXT = 5, (4, 3, 4), 11  # a prompt: text, a video, text
VISUAL = list(range(BEFORE, BEFORE + math.prod(GRID)))
COLUMNS = BEFORE + len(VISUAL) + TEXT


@cache
def deep_model(depth: int = 8, seed: int = 0) -> QwenVL:
    """Return a tiny model with more layers and larger weights, so that tokens differ in attention."""
    content = tiny_config().to_dict()
    content["text_config"]["num_hidden_layers"] = depth
    content["text_config"].pop("layer_types", None)
    model, random = QwenVL(Config.parse(content)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.6 * weight[0].numel() ** -0.5, generator=random)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1, generator=random)
            else:
                weight.fill_(1.0)
    return model


def a_prompt(seed: int = 0, hidden: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings `[C, hidden]` and positions `[3, C]`, with time, height and width."""
    positions = prompt_positions(COLUMNS, [(BEFORE, video_positions(GRID, 1.5, 2))])
    return torch.randn(COLUMNS, hidden, generator=torch.Generator().manual_seed(seed)), positions


def pairs() -> torch.Tensor:
    return torch.arange(GRID[0]).repeat_interleave(GRID[1] * GRID[2])


def inside() -> torch.Tensor:
    """Return row and column per visual token, as shares of height and width."""
    return torch.tensor([[row / GRID[1], column / GRID[2]] for _, row, column in product(*map(range, GRID))])


@dataclass
class EagerLayer:
    """The state after a layer that a rule may read. Heads are expanded, and columns cover the whole prompt."""

    model: "Eager"
    number: int  # index of the layer, from 0
    alive: list[int]  # visual columns still present
    entering: torch.Tensor  # [C, hidden]
    x: torch.Tensor  # [C, hidden]
    left: int  # number of tokens left by the plan
    due: bool
    memory: dict

    def weights(self, next_layer: bool = False, rotated: bool = True, causal: bool = True, keys=None) -> torch.Tensor:
        """Return attention weights `[heads, C, C]`. Dropped columns have no weight."""
        number, x = (self.number + 1, self.x) if next_layer else (self.number, self.entering)
        return self.model.weights(number, x, self.alive, rotated, causal, keys)


class Eager:
    def __init__(self, model, embeds, positions, sizes=None):
        self.model, self.embeds, self.positions = model, embeds.double(), positions
        self.config = model.config.text_config
        self.tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.dim = self.config.hidden_size // self.heads
        self.bias = torch.zeros(len(embeds)) if sizes is None else sizes.double().log()
        self.blind = 0

    def linear(self, name, x):
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def norm(self, name, x):
        scale = (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x / scale * self.tensors[f"{name}.weight"]

    def turn(self, x, columns=None):
        """Rotate `[C, heads, dim]`, each column by its own position."""
        rope, half = self.config.rope_parameters, self.dim // 2
        axes = [axis for axis, size in enumerate(rope["mrope_section"]) for _ in range(size)]
        speed = torch.tensor([rope["rope_theta"] ** (-2 * pair / self.dim) for pair in range(half)]).double()
        angle = (self.positions[axes].T.double() * speed)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def project(self, number, x, kind):
        h = self.norm(f"model.language_model.layers.{number}.input_layernorm", x)
        name = f"model.language_model.layers.{number}.self_attn.{kind}_proj"
        return self.linear(name, h).view(len(x), -1, self.dim)

    def weights(self, number, x, alive, rotated=True, causal=True, keys=None):
        q = self.project(number, x, "q")
        k = self.project(number, x, "k") if keys is None else keys
        if rotated:
            q, k = self.turn(q), self.turn(k)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.dim) + self.bias
        mask = torch.ones(len(x), len(x), dtype=torch.bool).tril() if causal else torch.ones(len(x), len(x)).bool()
        gone = [column for column in VISUAL if column not in alive]
        mask[:, gone] = False
        for column in gone:  # it attends only to itself, and no other row attends to it
            mask[column, column] = True
        if number < self.blind:
            mask[VISUAL[-1] + 1 :, VISUAL] = False
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def mlp(self, number, x):
        at = f"model.language_model.layers.{number}"
        h = self.norm(f"{at}.post_attention_layernorm", x)
        gate = self.linear(f"{at}.mlp.gate_proj", h)
        return self.linear(f"{at}.mlp.down_proj", gate / (1 + (-gate).exp()) * self.linear(f"{at}.mlp.up_proj", h))

    def run(self, rule: Callable[[EagerLayer], list[int] | None], plan) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Return the logits of the last column, and the numbers of visual tokens left after layers."""
        x, alive, memory, dropped, self.cached = self.embeds, list(VISUAL), {}, [], []
        self.blind = plan.blind
        final = plan.drops[-1].left if plan.drops else 0
        for number in range(self.config.num_hidden_layers):
            entering = x
            self.cached.append((self.turn(self.project(number, x, "k")), self.project(number, x, "v"), list(alive)))
            values = self.project(number, x, "v").repeat_interleave(self.heads // self.kv_heads, 1)
            seen = torch.einsum("hqk,khd->qhd", self.weights(number, x, alive), values).flatten(1)
            x = x + self.linear(f"model.language_model.layers.{number}.self_attn.o_proj", seen)
            x = x + self.mlp(number, x)
            after = number + 1
            if after in plan.looks:
                drops = {drop.after: drop.left for drop in plan.drops}
                left = drops.get(after, final) if not plan.exact else drops[after]
                seen = EagerLayer(self, number, alive, entering, x, left, after in drops, memory)
                kept = rule(seen)
                if kept is not None:
                    x, alive = seen.x, kept
                    dropped.append((after, len(alive)))
        return self.linear("lm_head", self.norm("model.language_model.norm", x[-1])), dropped

    def decoded(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits of columns that follow the prompt of `run` and see only a layer's remaining columns."""
        x, count, prompt, self.positions = embeds.double(), len(embeds), self.positions, positions
        for number, (keys, values, alive) in enumerate(self.cached):
            gone = [column for column in VISUAL if column not in alive]
            mask = torch.ones(count, len(keys) + count, dtype=torch.bool).tril(len(keys))
            mask[:, gone] = False
            new = self.turn(self.project(number, x, "k")), self.project(number, x, "v")
            keys, values = (
                torch.cat(both).repeat_interleave(self.heads // self.kv_heads, 1)
                for both in zip((keys, values), new, strict=True)
            )
            scores = torch.einsum("qhd,khd->hqk", self.turn(self.project(number, x, "q")), keys) / math.sqrt(self.dim)
            scores = scores + torch.cat([self.bias, torch.zeros(count)])
            seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values).flatten(1)
            x = x + self.linear(f"model.language_model.layers.{number}.self_attn.o_proj", seen)
            x = x + self.mlp(number, x)
        self.positions = prompt
        return self.linear("lm_head", self.norm("model.language_model.norm", x))


def run_method(
    model, method: LanguageMethod, embeds, positions, budget: float, sizes=None, cache: KVCache | None = None
):
    """Run the decoder with the method. Returns logits, the drops and the cache."""
    dropping = method.reading(model, budget, embeds, torch.tensor(VISUAL), pairs(), inside())
    cache = cache or KVCache(model, 1)
    made = logits(model, embeds, positions, cache, sizes, dropping=dropping)
    return made, dropping, cache
