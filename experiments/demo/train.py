"""Train the bundled demo model from scratch on procedural clips: `python -m experiments.demo.train OUT`.

Training has two stages. In the first stage, the vision tower learns on its own to name what its merge units show, using crowded
single grids. In the second stage, the tower is frozen so that the language model's input doesn't change, and the language model
learns to answer many questions about each clip. The clips are short at first, and by the end, the frames are as large as in the
evaluation.

Training is seeded. It writes a checkpoint every few minutes and resumes from it when run again. The training curve is written to
`OUT/log.jsonl`. The finished model in OUT has the hub's file layout.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.vision import normalised, pixel_patches
from experiments.demo.batches import ATTRIBUTES, COLUMNS, ROWS, Recipe, question_batches, vision_batches
from experiments.demo.build import build_config, build_tokenizer, init_weights
from experiments.demo.forward import tower
from experiments.demo.training import (
    Learn,
    Log,
    Run,
    answer_loss,
    export,
    half_precision,
    in_worker,
    optimizers,
    recipe_parser,
    resumed,
    run_stage,
)


class Head(nn.Module):
    """The auxiliary head, which predicts the content and position of each merge unit. It is discarded after training."""

    def __init__(self, features: int):
        super().__init__()
        self.sizes = [*ATTRIBUTES.values(), ROWS, COLUMNS]
        self.sizes[0] += 1  # one additional class, for units that don't show an object
        self.linear = nn.Linear(features, sum(self.sizes))

    def forward(self, flat: torch.Tensor, labels: torch.Tensor, height: int, width: int):
        """Return the loss and, for the log, the accuracy for each attribute.

        Args:
            flat: The unit states, `[G, units, F]`.
            labels: The unit labels, `[G, units, A]`.
            height: The grid height, in units.
            width: The grid width, in units.
        """
        outs = self.linear(flat).float().split(self.sizes, -1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = [p.flatten().expand(flat.shape[:2]) for p in (y, x)]
        loss = 0.0
        right = {}
        for name, out, label in zip([*ATTRIBUTES, "row", "column"], outs, [*labels.unbind(-1), *places], strict=True):
            weight = None
            if name == "shape":  # most units don't show an object
                weight = torch.ones(out.shape[-1])
                weight[-1] = 0.2
            if not (label >= 0).any():
                continue
            part = F.cross_entropy(out.flatten(0, 1), label.flatten(), weight, ignore_index=-100)
            if name in ("row", "column"):
                part = part * 0.2
            loss = loss + part
            held = label >= 0
            if name == "shape":
                held &= label < out.shape[-1] - 1
            right[name] = (out.argmax(-1) == label)[held].float().mean().item()
        return loss, right


@torch.no_grad()
def look(visual, batch: dict) -> torch.Tensor:
    """Return the frozen tower's output for a batch of clips, before the merger's projection: `[G, units, 4 * hidden]`."""
    _, height, width = batch["grid"]
    return tower(visual, normalised(pixel_patches(batch["frames"])), height, width)[1]


def train(folder: Path, recipe: Recipe) -> None:
    """Run both stages, resuming from the checkpoint in `folder` if there is one."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    run = Run(folder, recipe)
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config())
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    head = Head(128 * 4)
    init_weights(head, torch.Generator().manual_seed(recipe.seed + 1))
    state = run.load()
    if state:
        model.load_state_dict(state["modules"][0])
        head.load_state_dict(state["modules"][1])
    for stage in range(state["stage"] if state else 1, 3):
        train_stage(run, stage, model, head, tokenizer, state)
        state = None
    export(folder, model, tokenizer)
    run.log(done=True)


def train_stage(run: Run, stage: int, model, head: Head, tokenizer, state: dict | None) -> None:
    """Run one stage, resuming from the checkpoint `state` if there is one."""
    recipe = run.recipe
    visual = model.model.visual
    if stage == 1:
        opts = optimizers(recipe, [visual, head])
        steps = range(resumed(opts, state), recipe.vision_steps)
        batches = in_worker(vision_batches, recipe, steps.start)
        run_stage(run, 1, steps, (model, head), opts, lambda *how: vision_step(visual, head, next(batches), *how[1:]))
    else:
        opts = optimizers(recipe, [visual.merger.mlp, model.model.language_model])
        steps = range(resumed(opts, state), recipe.steps)
        batches = in_worker(question_batches, recipe, tokenizer, steps.start)
        run_stage(run, 2, steps, (model, head), opts, lambda *how: question_steps(model, next(batches), *how[1:]))


def vision_step(visual, head: Head, batch: tuple, learn: Learn, log: Log) -> None:
    """Run one stage 1 training step, in which the vision tower learns to predict labels."""
    frames, labels, (height, width) = batch
    with half_precision():
        _, flat = tower(visual, normalised(pixel_patches(frames)), height, width)
        loss, right = head(flat, labels, height, width)
    learn(loss)
    log.add("loss", loss.item())
    for name, share in right.items():
        log.add(name, share)


def question_steps(model, batch: dict, learn: Learn, log: Log) -> None:
    """Train on one stage 2 batch, with one optimizer step per pack of questions."""
    with half_precision():
        flat = look(model.model.visual, batch)
    for pack in batch["packs"]:
        with half_precision():
            video = model.model.visual.merger.mlp(flat).reshape(
                len(pack["tokens"]), -1, model.config.text_config.hidden_size
            )
            loss, _, right, _ = answer_loss(model, video, batch, pack)
        learn(loss)
        log.add("loss", loss.item())
        log.add("right", right.float().mean().item())


def main() -> None:
    parser = recipe_parser(__doc__, Recipe())
    args = vars(parser.parse_args())
    out = args.pop("out")
    train(out, Recipe(**args))


if __name__ == "__main__":
    main()
