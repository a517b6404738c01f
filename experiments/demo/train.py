"""Trains the bundled demo model from scratch on procedural clips: `python -m experiments.demo.train OUT`.

Two stages. First the vision tower alone learns to name what its merge units see on crowded single grids. Then the tower is frozen,
so that the language model's input does not change, and the language model learns to answer questions, many packed behind each
clip: at first about short clips, in the end on frames as large as those of the evaluation.

Training is seeded. It writes a checkpoint every few minutes and resumes from it when run again. `OUT/log.jsonl` holds the curve. At
the end OUT has the layout of a model on the hub.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read by torch; the default forgets shapes too soon

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.vision.preprocess import CLIP_MEAN, CLIP_STD, patchify
from experiments.demo.batches import ATTRIBUTES, COLUMNS, ROWS, Recipe, in_worker, question_batches, vision_batches
from experiments.demo.build import build_config, build_tokenizer, init_weights
from experiments.demo.forward import language, tower


class Head(nn.Module):
    """The auxiliary head: what and where, read off every merge unit. Thrown away after training."""

    def __init__(self, features: int):
        super().__init__()
        self.sizes = [*ATTRIBUTES.values(), ROWS, COLUMNS]
        self.sizes[0] += 1  # nothing here
        self.linear = nn.Linear(features, sum(self.sizes))

    def forward(self, flat: torch.Tensor, labels: torch.Tensor, height: int, width: int):
        """Loss and, for the log, the accuracy of each attribute; flat `[G, units, F]`, labels `[G, units, A]`."""
        outs = self.linear(flat).float().split(self.sizes, -1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = [p.flatten().expand(flat.shape[:2]) for p in (y, x)]
        loss, right = 0.0, {}
        for name, out, label in zip([*ATTRIBUTES, "row", "column"], outs, [*labels.unbind(-1), *places], strict=True):
            weight = None
            if name == "shape":  # most units hold nothing
                weight = torch.ones(out.shape[-1])
                weight[-1] = 0.2
            if not (label >= 0).any():
                continue
            part = F.cross_entropy(out.flatten(0, 1), label.flatten(), weight, ignore_index=-100)
            loss = loss + part * (0.2 if name in ("row", "column") else 1.0)
            held = (label >= 0) & ((label < out.shape[-1] - 1) if name == "shape" else True)
            right[name] = (out.argmax(-1) == label)[held].float().mean().item()
        return loss, right


@torch.no_grad()
def look(visual, batch: dict) -> torch.Tensor:
    """What the frozen tower sees of a batch of clips: `[G, units, 4 * hidden]`, before the merger's projection."""
    _, height, width = batch["grid"]
    return tower(visual, patchify(batch["frames"]), height, width)[1]


def answer_loss(model, flat: torch.Tensor, batch: dict, pack: dict) -> tuple[torch.Tensor, dict]:
    """Loss on the answers of one pack of questions, and the share of answers of which every token is right."""
    grids, height, width = batch["grid"]
    clips, longest = pack["tokens"].shape
    text = model.model.language_model
    prefix = text.embed_tokens(batch["prefix"]).expand(clips, -1, -1)
    start, n = batch["start"], grids * height * width
    video = model.model.visual.merger.mlp(flat).reshape(clips, n, -1).to(prefix.dtype)
    embeds = torch.cat([prefix[:, :start], video, prefix[:, start + n :], text.embed_tokens(pack["tokens"])], 1)
    shared = prefix.shape[1]
    positions = torch.cat([batch["where"][:, None].expand(3, clips, -1), pack["place"].expand(3, -1, -1)], dim=2)
    segment = F.pad(pack["segment"], (shared, 0))  # 0: the shared prefix
    allowed = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    allowed &= torch.ones(shared + longest, shared + longest, dtype=torch.bool).tril()
    bias = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e4)[:, None]
    if torch.is_autocast_enabled("cpu"):
        bias = bias.bfloat16()
    hidden = language(text, embeds, positions, bias, model.config.text_config.rope_parameters["mrope_section"])
    held = pack["target"] >= 0
    logits = F.linear(hidden[:, shared:][held], text.embed_tokens.weight).float()
    target = pack["target"][held]
    each = F.cross_entropy(logits, target, reduction="none")
    # One number an answer. Long answers count for more than short ones, but not in proportion to their length.
    number = (torch.arange(clips)[:, None] * 64 + pack["segment"])[held]
    _, answer = number.unique(return_inverse=True)
    length = torch.bincount(answer)
    weight = length.float().rsqrt()[answer]
    wrong = torch.zeros(len(length)).index_add_(0, answer, (logits.argmax(-1) != target).float())
    return (each * weight).sum() / weight.sum(), {"right": (wrong == 0).float().mean().item()}


def optimizers(recipe: Recipe, modules: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for the rest."""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            (matrices if p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name else rest).append(p)
    made = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Warm-up, constant, then down a cosine to a fiftieth."""
    start = steps * (1 - recipe.decay)
    if step < start:
        return min(1.0, (step + 1) / recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


class Run:
    """One training run in a folder: checkpoints, log, clock."""

    def __init__(self, folder: Path, recipe: Recipe):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.recipe, self.saved = folder, recipe, time.monotonic()
        self.checkpoint = folder / "checkpoint.pt"

    def log(self, **record) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(line + "\n")

    def load(self) -> dict | None:
        if not self.checkpoint.exists():
            return None
        state = torch.load(self.checkpoint, weights_only=True)  # noqa: TID251 (opens tensors only)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{self.checkpoint} comes from another recipe: use another folder, or remove it")
        return state

    def save(self, stage: int, step: int, modules, opts, every: float = 180.0) -> None:
        if time.monotonic() - self.saved < every:
            return
        state = {
            "recipe": asdict(self.recipe),
            "stage": stage,
            "step": step,
            "modules": [m.state_dict() for m in modules],
            "optimizers": [o.state_dict() for o in opts],
        }
        unfinished = self.checkpoint.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)
        self.saved = time.monotonic()


def train(folder: Path, recipe: Recipe) -> None:
    """Both stages, from the checkpoint in `folder` if there is one."""
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
    reached = state["stage"] if state else 1
    if reached == 1:
        train_stage(run, 1, recipe.vision_steps, model, head, tokenizer, state)
    train_stage(run, 2, recipe.steps, model, head, tokenizer, state if reached == 2 else None)
    export(folder, model, tokenizer)
    run.log(done=True)


def train_stage(run: Run, stage: int, steps: int, model, head: Head, tokenizer, state: dict | None) -> None:
    """One stage, from `state` if it is a checkpoint of this stage."""
    recipe, visual, first = run.recipe, model.model.visual, 0
    modules = [visual, head] if stage == 1 else [visual.merger.mlp, model.model.language_model]
    opts = optimizers(recipe, modules)
    if state:
        first = state["step"] + 1
        for optimizer, saved in zip(opts, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    made = (vision_batches, recipe, first) if stage == 1 else (question_batches, recipe, tokenizer, first)
    batches = in_worker(*made)
    learn = partial(learn_from, opts=opts, parameters=[p for module in modules for p in module.parameters()])
    seen, clock = {}, time.monotonic()
    for step in range(first, steps):
        batch = next(batches)
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, steps, recipe)
        for report in vision_step(visual, head, batch, learn) if stage == 1 else question_steps(model, batch, learn):
            for name, value in report.items():
                seen.setdefault(name, []).append(value)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            means = {name: float(np.mean(values)) for name, values in seen.items()}
            run.log(stage=stage, step=step + 1, seconds=time.monotonic() - clock, **means)
            seen, clock = {}, time.monotonic()
        run.save(stage, step, (model, head), opts)
    run.saved = -math.inf
    run.save(stage, steps - 1, (model, head), opts)


def learn_from(loss: torch.Tensor, opts: list[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> None:
    """One step of all optimizers."""
    for optimizer in opts:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    for optimizer in opts:
        optimizer.step()


def vision_step(visual, head: Head, batch: tuple, learn: Callable[[torch.Tensor], None]) -> Iterator[dict]:
    """One step of stage 1; yields what to log."""
    frames, labels, (height, width) = batch
    with torch.autocast("cpu", torch.bfloat16):
        _, flat = tower(visual, patchify(frames), height, width)
        loss, report = head(flat, labels, height, width)
    learn(loss)
    yield {"loss": loss.item(), **report}


def question_steps(model, batch: dict, learn: Callable[[torch.Tensor], None]) -> Iterator[dict]:
    """The steps of stage 2 on one batch, one a pack of questions; yields what to log of each."""
    with torch.autocast("cpu", torch.bfloat16):
        flat = look(model.model.visual, batch)
    for pack in batch["packs"]:
        with torch.autocast("cpu", torch.bfloat16):
            loss, report = answer_loss(model, flat, batch, pack)
        learn(loss)
        yield {"loss": loss.item(), **report}


def export(folder: Path, model, tokenizer) -> None:
    """Writes the model in the hub's file layout, weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"size": {"shortest_edge": 4 * 4 * 784, "longest_edge": 10 * 14 * 784}}
    shared = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.0, "min_frames": 2, "max_frames": 24}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video | limits | shared, indent=2) + "\n")
    image = {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | limits | shared, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for checkpoint, log and weights")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = vars(parser.parse_args())
    out = args.pop("out")
    train(out, Recipe(**args))


if __name__ == "__main__":
    main()
