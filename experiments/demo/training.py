"""Shared by the training scripts: options, optimizers, checkpoints, the loss on answers, and the files of the finished model."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.video import InputLimits
from experiments.demo.muon import Muon
from experiments.demo.shared_prompts import hidden_of_rows
from experiments.demo.team import Team

LOG_EVERY = 30.0  # interval between log lines, in seconds
SAVE_EVERY = 180.0
Learn = Callable[[torch.Tensor], None]  # function that takes a loss and runs one step of all optimizers

# torch reads this variable during its first operation. The default is too small, so kernels would be rebuilt.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def recipe_parser(description: str | None, recipe) -> argparse.ArgumentParser:
    """Return the parser of a training script, with the folder `out` and an option for every field of `recipe`, a dataclass."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for checkpoint, log and weights")
    for name, value in asdict(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser


def half_precision() -> torch.autocast:
    """Autocast to bfloat16 on CPUs with bfloat16 matmul. Disabled on other CPUs, where float32 is several times as fast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def answer_loss(model, video: torch.Tensor, batch: dict, pack: dict) -> tuple[torch.Tensor, ...]:
    """Return the loss on the answers to one pack of questions.

    Args:
        video: The merger's output, `[prompts, units per prompt, D]`.
        batch: A dict with `prefix`, the token IDs shared by all prompts, `[P]`; `slots`, a mask of the visual token IDs, bool
            `[P]`; and `where`, the positions, `[3, P]`.
        pack: The result of `batches.packed`.

    Returns:
        The loss; the answer numbers, `64 * prompt + segment`; whether all tokens in each answer are correct, bool; and the visual
        token states after half of the language model, `[prompts, units per prompt, D]`.
    """
    text = model.model.language_model
    prompts, _, longest = pack["tokens"].shape
    prefix = text.embed_tokens(batch["prefix"]).expand(prompts, -1, -1)
    prefix = prefix.masked_scatter(batch["slots"][:, None].expand_as(prefix), video.to(prefix.dtype))
    segment = pack["segment"]
    own = (segment[..., None] == segment[..., None, :]) & torch.ones(longest, longest, dtype=torch.bool).tril()
    section = model.config.text_config.rope_parameters["mrope_section"]
    hidden, middle = hidden_of_rows(
        text, prefix, batch["where"], text.embed_tokens(pack["tokens"]), pack["place"], own, section
    )
    held = pack["target"] >= 0
    logits = F.linear(hidden[held], text.embed_tokens.weight).float()
    target = pack["target"][held]
    each = F.cross_entropy(logits, target, reduction="none")
    # Each answer has a number. Long answers have a higher weight than short ones, but not in proportion to their length.
    number = (torch.arange(prompts)[:, None, None] * 64 + pack["segment"])[held]
    numbers, answer = number.unique(return_inverse=True)
    length = torch.bincount(answer)
    weight = length.float().rsqrt()[answer]
    wrong = torch.zeros(len(length)).index_add_(0, answer, (logits.argmax(-1) != target).float())
    return (each * weight).sum() / weight.sum(), numbers, wrong == 0, middle[:, batch["slots"]]


def optimizers(recipe, modules: list[nn.Module], share: Sequence[float] = ()) -> list[torch.optim.Optimizer]:
    """Return Muon for hidden matrices and AdamW for all other parameters.

    Each parameter group records its peak learning rate (`peak`) and its module index (`module`).

    Args:
        share: A learning rate factor for each module. Missing factors default to 1.
    """
    made = []
    for matrix, rate in ((True, recipe.muon_lr), (False, recipe.adam_lr)):
        groups = []
        for number, module in enumerate(modules):
            lr = rate * (share[number] if number < len(share) else 1.0)
            params = [
                p
                for name, p in module.named_parameters()
                if matrix == (p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name)
            ]
            if params:
                groups.append({"params": params, "lr": lr, "peak": lr, "module": number})
        if matrix:
            made.append(Muon(groups, momentum=0.95, weight_decay=0.05))
        else:
            made.append(torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01))
    return made


def rate(step: int, steps: int, recipe) -> float:
    """Return the learning rate factor at a step: warm-up, then constant at 1, then cosine decay to one fiftieth."""
    start = steps * (1 - recipe.decay)
    if step < start:
        return min(1.0, (step + 1) / recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def learn_from(
    loss: torch.Tensor, opts: list[torch.optim.Optimizer], parameters: list[nn.Parameter], team: Team
) -> None:
    """Backpropagate the loss, average the gradients over the `team`, and run one step of all optimizers."""
    for optimizer in opts:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    team.complete(parameters)
    team.average([p.grad for p in parameters if p.grad is not None])
    learned = [p for p in parameters if p.grad is not None]
    nn.utils.clip_grad_norm_(learned, 1.0)
    for optimizer in opts:
        optimizer.step()


class Run:
    """A training run in a folder, with its checkpoints, log and clock."""

    def __init__(self, folder: Path, recipe):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.recipe = recipe
        self.saved = time.monotonic()
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

    def save(self, stage: int | str, step: int, modules, opts, every: float) -> None:
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


class Log:
    """Running means of losses and accuracies since the last log line."""

    def __init__(self, run: Run, stage: int | str):
        self.run = run
        self.stage = stage
        self._clear()

    def _clear(self) -> None:
        self.clock = time.monotonic()
        self.steps = 0
        self.sums = {}

    def add(self, name: str, total: float, count: float = 1) -> None:
        old = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = old[0] + total, old[1] + count

    def write(self, step: int, last: bool = False) -> None:
        """Write a log line if enough time has passed since the last one. `step` is the number of completed steps."""
        self.steps += 1
        passed = time.monotonic() - self.clock
        if passed < LOG_EVERY and not last:
            return
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.run.log(stage=self.stage, step=step, at=round(time.time()), step_s=passed / self.steps, **means)
        self._clear()


def resumed(opts: list[torch.optim.Optimizer], state: dict | None) -> int:
    """Load the optimizer state from a checkpoint, if there is one, and return the next step."""
    if state is None:
        return 0
    for optimizer, saved in zip(opts, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"] + 1


def run_stage(
    run: Run,
    stage: int | str,
    steps: range,
    saved: Sequence[nn.Module],
    opts: list[torch.optim.Optimizer],
    one_step: Callable[[int, Learn, Log], None],
    team: Team | None = None,
    end: float = math.inf,
    share: Callable[[int, int], float] = lambda step, module: 1.0,
) -> bool:
    """Run the steps of a stage, writing the log and checkpoints. Returns True if the stage is finished.

    Args:
        saved: The modules whose weights are stored in the checkpoint.
        one_step: A function that trains on the next batch.
        team: The processes of the run. Defaults to only this process.
        end: The time at which to write a checkpoint and stop, as measured by `time.monotonic`.
        share: A function that returns the learning rate factor, given a step and a module's index in `optimizers`.
    """
    team = team or Team(0, 1)
    parameters = [p for optimizer in opts for group in optimizer.param_groups for p in group["params"]]
    learn = partial(learn_from, opts=opts, parameters=parameters, team=team)
    log = Log(run, stage)
    for step in steps:
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, steps.stop, run.recipe) * share(step, group["module"])
        one_step(step, learn, log)
        last = step + 1 == steps.stop
        late = team.any(time.monotonic() > end)
        if team.rank == 0:
            log.write(step + 1, last)
            run.save(stage, step, saved, opts, every=0.0 if late or last else SAVE_EVERY)
        if late:
            return False
    return True


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, make, *args):
        self.make = make
        self.args = args

    def __iter__(self):
        torch.set_num_threads(1)
        return self.make(*self.args)


def in_worker(make, *args) -> Iterator:
    """Run a batch generator in a worker process that prefetches a few batches."""
    return iter(torch.utils.data.DataLoader(_Stream(make, *args), batch_size=None, num_workers=1, prefetch_factor=4))


def export(folder: Path, model, tokenizer, most: int = 10 * 14, frames: int = 24) -> None:
    """Save the model with bfloat16 weights in the hub's file layout, limited to `most` units per frame and `frames` frames."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"size": {"shortest_edge": 4 * 4 * 784, "longest_edge": most * 784}}
    shared = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": InputLimits.image_mean,
        "image_std": InputLimits.image_std,
    }
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.0, "min_frames": 2, "max_frames": frames}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video | limits | shared, indent=2) + "\n")
    image = {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | limits | shared, indent=2) + "\n")
