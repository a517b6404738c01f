"""Train the model of the second world from scratch on a CPU: `python -m experiments.demo.train_scenes OUT`.

Training has two stages. In the first stage, the tower learns on its own to name what each patch shows, including the characters on
signs. In the second stage, the tower and the language model together learn to answer many questions about each clip. At first,
these are questions without options about small images, and the tower is frozen, because the gradients from an untrained language
model would destroy what the tower has learned. After that, the tower is also trained, so that its attention becomes meaningful.
Later, training adds short and small videos, and finally frames as large as in the evaluation.

Two out of five questions are lessons (`scenes_lessons`), because with hard questions alone, accuracy stayed at chance level for
thousands of steps. Accuracy on most questions about time also stayed at chance level until the tower was trained to name motion,
and the language model to name how each unit has changed since the previous frame pair.

With `--reader`, the language model is taken from a trained model. In this case, the merger alone is trained between the two stages
to produce that model's visual tokens, because a new tower's merger learns only slowly from answers.

Questions with options are answered with an option's text. Answering with the option's letter was also tried, but the answers were
still random after thousands of questions. It made no difference whether the letters were first taught from text, or whether a head
scored each option.

Training is seeded. It writes a checkpoint with the optimizer state every few minutes and resumes from it when run again, so it can
be run in phases (`--minutes`). The training curve is written to `OUT/log.jsonl`. The finished model in OUT has the hub's file
layout.
"""

import math
import time
from pathlib import Path

import torch

from evoprune.vision import normalised, pixel_patches
from experiments.demo.build import init_weights
from experiments.demo.forward import tower
from experiments.demo.scenes_batches import GROUPS, ScenesRecipe, question_batches, vision_batches
from experiments.demo.scenes_labels import Head
from experiments.demo.scenes_model import HIDDEN, keep_large, scenes_config, scenes_tokenizer
from experiments.demo.team import Team, run_team
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

SIZE = 16 * 24, 32  # limits of the finished model: number of units per frame, and number of frames
MATCH = "match"  # the stage between stages 1 and 2, which trains the merger


def build(folder: Path, recipe: ScenesRecipe):
    """Return the untrained model, the auxiliary head, and the tokenizer. If `folder` already contains a tokenizer, it is reused."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    seed = recipe.seed
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(scenes_config())
    init_weights(model, torch.Generator().manual_seed(seed))
    head = Head(HIDDEN, model.config.text_config.hidden_size)
    init_weights(head, torch.Generator().manual_seed(seed + 1))
    keep_large(model.model.visual)
    if recipe.reader:
        model.model.language_model.load_state_dict(trained(recipe.reader).language_model.state_dict())
    words = folder / "tokenizer"
    if words.exists():
        return model, head, AutoTokenizer.from_pretrained(words)
    tokenizer = AutoTokenizer.from_pretrained(recipe.reader) if recipe.reader else scenes_tokenizer()
    tokenizer.save_pretrained(words)
    return model, head, tokenizer


def trained(folder: str):
    """Load the trained model from `folder` in float32, without its output layer."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model


def train(team: Team, folder: Path, recipe: ScenesRecipe, minutes: float) -> None:
    """Run all stages, resuming from the checkpoint in `folder` if there is one. After `minutes`, write a checkpoint and stop."""
    run = Run(folder, recipe)
    end = time.monotonic() + 60 * minutes
    model, head, tokenizer = build(folder, recipe)
    state = run.load()
    if state:
        model.load_state_dict(state["modules"][0])
        head.load_state_dict(state["modules"][1])
    stages = (1, MATCH, 2) if recipe.reader else (1, 2)
    reached = state["stage"] if state else 1
    for stage in stages[stages.index(reached) :]:
        if not train_stage(team, run, stage, model, head, tokenizer, state if stage == reached else None, end):
            return
    if team.rank == 0:
        export(folder, model, tokenizer, *SIZE)
        run.log(done=True)


def train_stage(
    team: Team, run: Run, stage: int | str, model, head: Head, tokenizer, state: dict | None, end: float
) -> bool:
    """Run one stage, resuming from `state` if it is a checkpoint of this stage. Returns True if the stage is finished."""
    recipe = run.recipe
    visual = model.model.visual
    steps = {1: recipe.vision_steps, MATCH: recipe.match_steps, 2: recipe.steps}[stage]
    modules = [visual, head]
    shares = [1.0, 1.0]
    if stage == MATCH:
        modules = [visual.merger.mlp]
        aim = trained(recipe.reader).visual
    elif stage == 2:
        modules.append(model.model.language_model)
        of_reader = 1.0
        if recipe.reader:
            of_reader = recipe.reader_rate
        shares = [recipe.tower_rate, recipe.tower_rate, of_reader]
    opts = optimizers(recipe, modules, shares)
    first = resumed(opts, state)
    if stage == 2:
        batches = in_worker(question_batches, recipe, tokenizer, first, team.rank)
    else:  # the merger is trained on the same type of batches as the first stage
        start = first + (recipe.vision_steps if stage == MATCH else 0)
        batches = in_worker(vision_batches, recipe, start, team.rank)

    def one_step(step: int, learn: Learn, log: Log) -> None:
        if stage == 1:
            vision_step(model, head, next(batches), learn, log)
        elif stage == MATCH:
            match_step(visual, aim, next(batches), learn, log)
        else:
            labels = recipe.labels if step >= recipe.open_steps else 0.0
            question_step(model, head, next(batches), learn, log, labels)
        keep_large(visual)

    def share(step: int, module: int) -> float:
        # Modules 0 and 1 are the tower and the head.
        return tower_share(step, recipe) if stage == 2 and module < 2 else 1.0

    return run_stage(run, stage, range(first, steps), (model, head), opts, one_step, team, end, share)


def tower_share(step: int, recipe: ScenesRecipe) -> float:
    """Return the factor by which `tower_rate` is multiplied at a step of stage 2.

    The factor is 1 while only the merger is trained. After that, it is small, to prevent the tower from forgetting.
    """
    if step < recipe.open_steps:
        return 1.0
    return recipe.thawed * min(1.0, (step - recipe.open_steps + 1) / recipe.thaw_steps)


def vision_step(model, head: Head, batch: tuple, learn: Learn, log: Log) -> None:
    """Run one stage 1 training step, in which the vision tower learns to predict labels."""
    frames, patches, units, (height, width) = batch
    with half_precision():
        _, flat = tower(model.model.visual, normalised(pixel_patches(frames)), height, width)
        loss, right = head(flat, patches, units, height, width)
    learn(loss)
    log.add("loss", loss.item())
    for name, share in right.items():
        log.add(name, share)


def match_step(visual, aim, batch: tuple, learn: Learn, log: Log) -> None:
    """Train the merger of `visual` for one step to produce the same visual tokens as the tower `aim`."""
    frames, _, _, (height, width) = batch
    patches = normalised(pixel_patches(frames))
    with half_precision():
        with torch.no_grad():
            _, flat = tower(visual, patches, height, width)
            wanted = tower(aim, patches, height, width)[0].float()
        missed = visual.merger.mlp(flat).float() - wanted
    loss = missed.square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
    learn(loss)
    log.add("unexplained", loss.item())


def question_step(model, head: Head, batch: dict, learn: Learn, log: Log, labels: float) -> None:
    """Run one stage 2 training step. `labels` is the auxiliary loss weight. If it is 0, the tower is frozen."""
    _, height, width = batch["grid"]
    with half_precision():
        with torch.set_grad_enabled(labels > 0):
            _, flat = tower(model.model.visual, normalised(pixel_patches(batch["frames"])), height, width)
            seen, right = head(flat, *batch["labels"], height, width)
        merged = model.model.visual.merger.mlp(flat)
        video = merged.reshape(len(batch["pack"]["tokens"]), -1, merged.shape[-1])
        loss, numbers, good, states = answer_loss(model, video, batch, batch["pack"])
        told, happened = head.told(states, batch["story"])
    with_labels = loss
    if labels:
        with_labels = loss + labels * (seen + told)
    learn(with_labels)
    log.add("loss", loss.item())
    log.add("seen", seen.item())
    for label in ("character", "motion", "story"):
        log.add(label, (right | happened).get(label, 0.0), label in right | happened)
    log.add("right", good.sum().item(), len(good))
    family = "picture" if batch["grid"][0] == 1 else "video"
    for group, member in zip(GROUPS, batch["groups"][numbers].T, strict=True):
        log.add(f"{family}.{group}", good[member].sum().item(), member.sum().item())


def main() -> None:
    parser = recipe_parser(__doc__, ScenesRecipe())
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after this many minutes and save a checkpoint"
    )
    args = vars(parser.parse_args())
    out = args.pop("out")
    minutes = args.pop("minutes")
    recipe = ScenesRecipe(**args)
    build(out, recipe)  # create the tokenizer before the processes need it
    run_team(train, recipe.processes, out, recipe, minutes)


if __name__ == "__main__":
    main()
