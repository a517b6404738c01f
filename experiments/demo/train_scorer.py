"""Train the bundled scorer of a demo model: `python -m experiments.demo.train_scorer MODEL OUT`, for example `demo OUT`.

The recipe is that of VisionSelector (arXiv 2510.16598). The model is frozen. The scorer's scores become soft weights from 0 to 1,
which are sigmoid(score + offset), with the offset for which they add up to a fifth of the visual tokens. The loss is the next-token
loss on the answers, given visual tokens with these weights.

A weight is added to the language model's attention scores as log(weight), so a token with a weight of 0 is invisible. We could not
find out how the authors apply weights. Multiplying tokens by their weights would have no effect on the keys and values of the first
layer, because the layer's norm scales all tokens to the same length.

OUT is a folder in evoprune/bundled/scorers. Training is seeded.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from evoprune.bundled import DEMOS
from evoprune.methods import Tokens
from evoprune.vision import normalised, pixel_patches
from experiments.demo import batches, scenes_batches
from experiments.demo.forward import tower
from experiments.demo.shared_prompts import hidden_of_rows
from experiments.demo.training import in_worker

SHARE = 0.2  # fraction of the tokens that the soft weights add up to
INITIAL = 0.02  # standard deviation of the initial weights
UNITS = 576  # approximate number of units in a batch
ROWS = 3  # maximum number of rows of questions per prompt
PACKS = 2  # number of steps per batch, each with other questions
LOG_EVERY = 20  # number of steps


class Scorer(nn.Module):
    """The scorer as trained. See `evoprune.contrib.scorer.Scorer`, which computes the same scores."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.k_proj = nn.Linear(width, hidden)
        self.q_proj = nn.Linear(width, hidden)
        for layer in (self.k_proj, self.q_proj):
            nn.init.normal_(layer.weight, std=INITIAL)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Score the tokens of several inputs, `[B, N, D]`. Returns `[B, N]`."""
        key = self.k_proj(tokens).mean(1, keepdim=True)
        return (self.q_proj(tokens) * key).sum(2) / self.k_proj.out_features**0.5


def soft_top(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return the log of sigmoid(score + offset), with the offset for each row of `scores` (`[B, N]`) that makes the mean `share`.

    The gradient includes how the offset depends on the scores.
    """
    with torch.no_grad():
        low, high = -scores.amax(1, keepdim=True) - 10, -scores.amin(1, keepdim=True) + 10
        for _ in range(50):
            middle = (low + high) / 2
            below = (scores + middle).sigmoid().mean(1, keepdim=True) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        weight = (scores + low).sigmoid()
        slope = weight * (1 - weight)
    # An offset with the value `low`, and the gradient that keeps the mean weight constant.
    offset = low - ((scores - scores.detach()) * slope).sum(1, keepdim=True) / slope.sum(1, keepdim=True)
    return F.logsigmoid(scores + offset)


def answer_loss(model, video: torch.Tensor, weight: torch.Tensor, batch: dict, pack: dict) -> torch.Tensor:
    """Return the mean next-token loss on the answers to a pack of questions, given weighted visual tokens.

    Args:
        video: `[prompts, N, D]`, the visual tokens.
        weight: `[prompts, N]`, the logs of their weights.
        batch, pack: See `training.answer_loss`.
    """
    text = model.model.language_model
    prompts, _, longest = pack["tokens"].shape
    prefix = text.embed_tokens(batch["prefix"]).expand(prompts, -1, -1)
    prefix = prefix.masked_scatter(batch["slots"][:, None].expand_as(prefix), video)
    bias = torch.zeros(prefix.shape[:2]).masked_scatter(batch["slots"].expand(prompts, -1), weight)
    segment = pack["segment"]
    own = (segment[..., None] == segment[..., None, :]) & torch.ones(longest, longest, dtype=torch.bool).tril()
    section = model.config.text_config.rope_parameters["mrope_section"]
    hidden, _ = hidden_of_rows(
        text, prefix, batch["where"], text.embed_tokens(pack["tokens"]), pack["place"], own, section, bias
    )
    held = pack["target"] >= 0
    return F.cross_entropy(F.linear(hidden[held], text.embed_tokens.weight), pack["target"][held])


@torch.no_grad()
def seen(model, batch: dict) -> tuple[torch.Tensor, list[dict]]:
    """Return the visual tokens of the first prompts of a batch, and `PACKS` random packs of their questions.

    The tokens are `[inputs, N, D]`, because the scorer sees each input by itself, even if a prompt has two.
    """
    whole = batch["packs"][0] if "packs" in batch else batch["pack"]
    prompts = max(1, round(UNITS / int(batch["slots"].sum())))
    pairs, height, width = batch["grid"]
    frames = batch["frames"].unflatten(0, (len(whole["tokens"]), -1))[:prompts].flatten(0, 1)
    tokens, _ = tower(model.model.visual, normalised(pixel_patches(frames)), height, width)
    packs = []
    for _ in range(PACKS):
        rows = torch.randperm(whole["tokens"].shape[1])[:ROWS]
        packs.append({name: tensor[:prompts, rows] for name, tensor in whole.items()})
    return tokens.reshape(-1, pairs * height * width, tokens.shape[-1]), packs


def train(folder: Path, out: Path, steps: int, rate: float, seed: int) -> None:
    """Train a scorer for the model in `folder`, and write it to `out`."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    width = model.config.vision_config.out_hidden_size
    hidden = width // 2
    scorer = Scorer(width, hidden)
    # The two worlds have vision towers of different depths.
    if model.config.vision_config.depth == 16:
        recipe = scenes_batches.ScenesRecipe(seed=seed + 100, units=UNITS)
        made = in_worker(scenes_batches.question_batches, recipe, tokenizer, recipe.small_steps)
    else:
        recipe = batches.Recipe(seed=seed + 100, units=UNITS, packs=1)
        made = in_worker(batches.question_batches, recipe, tokenizer, recipe.small_steps)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    start = time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if step % PACKS == 0:
            batch = next(made)
            inputs, packs = seen(model, batch)
        pack = packs[step % PACKS]
        prompts = len(pack["tokens"])
        weight = soft_top(scorer(inputs), SHARE)
        loss = answer_loss(model, inputs.view(prompts, -1, width), weight.view(prompts, -1), batch, pack)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0:
            mean = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            print(
                json.dumps({"step": step + 1, "cpu_s": round(time.process_time() - start), "loss": round(mean, 4)}),
                flush=True,
            )
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in scorer.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": "TransformerScorer", "in_features": width, "hidden_dim": hidden}
    norm = model.model.visual.merger.ln_q.weight
    config["model"] = Tokens(inputs[0], torch.arange(inputs.shape[1]), batch["grid"], merger_norm=norm).fingerprint
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the name or the folder of a demo model")
    parser.add_argument("out", type=Path, help="folder for the scorer")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = DEMOS[args.model].folder if args.model in DEMOS else Path(args.model)
    train(folder, args.out, args.steps, args.rate, args.seed)


if __name__ == "__main__":
    main()
