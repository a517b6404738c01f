"""Trains the bundled demo model from scratch on procedural clips: `python -m evoprune.demo.train OUT`.

Two stages. First the vision tower alone learns to name what its merge units see on crowded single grids. Then the language
model learns to answer questions, several packed behind each clip: at first with the tower frozen, so that what it looks at
holds still, and on short clips, where things are quickly found; in the end together with the tower on clips of all sizes.

Seeded; writes a checkpoint every few minutes and goes on from it when run again; `OUT/log.jsonl` holds the curve. OUT ends up
in the hub's layout.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read by torch; the default forgets shapes too soon

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.demo.clips import COLOURS, MOTIONS, SHAPES, SIZES, Clip, dense_grid, frame_times, make_clip, render
from evoprune.demo.forward import language, tower
from evoprune.demo.questions import ask
from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.vision.preprocess import CLIP_MEAN, CLIP_STD, patchify

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
BEFORE_VIDEO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 1024
# What the auxiliary head says about the thing whose centre a unit covers; the last class of each is "nothing here".
ATTRIBUTES = {
    "shape": len(SHAPES) + 1,  # digits count as one more shape
    "colour": len(COLOURS),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "digit": 10,
}
ROWS, COLUMNS = 12, 16  # the largest grid the head can name places of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, together with the code."""

    seed: int = 0
    vision_steps: int = 700
    steps: int = 4200
    short_steps: int = 600  # of the second stage, on short clips and small frames
    frozen_steps: int = 3700  # of the second stage, with the tower as it is
    vision_batch: int = 96  # grids of 4x6 units
    units: int = 2304  # merge units a batch of clips, about
    questions: int = 8  # a clip
    muon_lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    tower_factor: float = 0.2  # the tower's learning rate in the second stage, lest it forget what it has learned
    warmup: int = 100
    decay: float = 0.45  # the last part of each stage, along a cosine


# (height, width) in units and how often
SIZES_IN_UNITS = (((4, 6), 4.0), ((6, 4), 1.0), ((4, 4), 0.7), ((5, 7), 1.0), ((6, 8), 1.6), ((8, 12), 0.5))
SHORT = 3  # grids, at most, during `short_steps`; and the frame is one of the first three sizes
LENGTHS = ((1, 0.8), (2, 1.0), (3, 1.5), (4, 2.0), (6, 3.0), (8, 1.5), (12, 0.6))


def build_config():
    """The exact Qwen2.5-VL architecture with tiny numbers."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 8, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192,
            "fullatt_block_indexes": [1, 3, 5, 7], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        },
        tie_word_embeddings=True, vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip


def build_tokenizer():
    """A byte-level BPE with Qwen's special tokens and pre-tokeniser, trained on the questions themselves."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    texts = [BEFORE_VIDEO, AFTER_QUESTION]
    for seed in range(1500):
        for q in ask(make_clip("train", seed), np.random.default_rng(seed), 12):
            texts += [q.question, q.answer]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    state = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in state["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[1:],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- data ------------------------------------------------------------------------------------------------------------


def unit_labels(clip: Clip, times: list[float], height: int, width: int) -> np.ndarray:
    """What each unit of each grid should say: int64 `[T * height * width, attributes]`, -100 where nothing is asked."""
    grids = len(times) // 2
    labels = np.full((grids, height, width, len(ATTRIBUTES)), -100)
    labels[..., 0] = ATTRIBUTES["shape"]  # one past the shapes and the digit: nothing here
    for g in range(grids):
        moment = (times[2 * g] + times[2 * g + 1]) / 2
        for thing in clip.things:
            if not (thing.visible(times[2 * g]) and thing.visible(times[2 * g + 1])):
                continue
            x, y = thing.centre(moment)
            cell = labels[g, min(int(y // 28), height - 1), min(int(x // 28), width - 1)]
            colour, motion = list(COLOURS).index(thing.colour), list(MOTIONS).index(thing.motion)
            if thing.is_digit:
                cell[:] = (len(SHAPES), colour, -100, motion, int(thing.kind))
            else:
                cell[:] = (SHAPES.index(thing.kind), colour, list(SIZES).index(thing.size), motion, -100)
    return labels.reshape(-1, len(ATTRIBUTES))


def vision_batches(recipe: Recipe, first: int):
    """Stage 1: crowded single grids, `(frames uint8 [2 * G, H, W, 3], labels, (height, width))` for ever."""
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 1, step))
        height, width = [(4, 6), (4, 6), (6, 4), (4, 4), (5, 7), (6, 8)][int(rng.integers(6))]
        frames, labels = [], []
        for _ in range(max(8, recipe.vision_batch * 24 // (height * width))):
            clip = dense_grid(rng, height * 28, width * 28, round(14 * height * width / 24 * rng.uniform(0.4, 1)))
            times = frame_times(1.0, 2)
            frames.append(render(clip, times))
            labels.append(unit_labels(clip, times, height, width))
        yield torch.from_numpy(np.concatenate(frames)), torch.from_numpy(np.stack(labels)), (height, width)
        step += 1


def question_batches(recipe: Recipe, tokenizer, first: int):
    """Stage 2: clips of one shape with packed questions, as a dict of tensors, for ever."""
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    before, after = ids(BEFORE_VIDEO), ids(AFTER_QUESTION)
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, 2, step))
        sizes, size_odds = zip(*SIZES_IN_UNITS, strict=True)
        lengths, length_odds = zip(*LENGTHS, strict=True)
        while True:
            height, width = sizes[rng.choice(len(sizes), p=np.array(size_odds) / sum(size_odds))]
            grids = int(rng.choice(lengths, p=np.array(length_odds) / sum(length_odds)))
            small = grids <= SHORT and (height, width) in sizes[:3]
            if small or (step >= recipe.short_steps and grids * height * width <= 480):
                break
        pace = float(rng.choice([1.0, 1.0, 1.0, 0.5, 2 / 3, 0.8, 1.25, 1.5, 2.0]))  # seconds a grid
        n = grids * height * width
        items = []
        for _ in range(min(24, max(4, round(recipe.units / n)))):
            clip = make_clip("train", int(rng.integers(2**62)), height * 28, width * 28, grids * pace, grids)
            times = frame_times(clip.seconds, 2 * grids)
            items.append(
                (render(clip, times), unit_labels(clip, times, height, width), ask(clip, rng, recipe.questions))
            )
        prefix = before + [7] * n + ids("<|vision_end|>")
        where = prompt_positions(len(prefix), [VideoSpan(len(before), (grids, height, width), pace)], 2)
        rows = []
        for _, _, questions in items:
            tokens, place, segment, target = [], [], [], []
            for number, q in enumerate(questions):
                asked = ids(q.question) + after
                said = [*ids(q.answer), 2]
                tokens += asked + said
                place += range(len(asked) + len(said))
                segment += [number + 1] * (len(asked) + len(said))
                target += [-100] * (len(asked) - 1) + said + [-100]
            rows.append((tokens, place, segment, target))
        # Few different lengths: matrix kernels are made anew for every shape, which costs more than padding.
        longest = -(-max(len(r[0]) for r in rows) // 64) * 64

        def pad(column: int, fill: int) -> torch.Tensor:
            return torch.tensor([[*r[column], *[fill] * (longest - len(r[column]))] for r in rows])  # noqa: B023

        yield {
            "frames": torch.from_numpy(np.concatenate([f for f, _, _ in items])),
            "labels": torch.from_numpy(np.stack([lab for _, lab, _ in items])),
            "grid": (grids, height, width),
            "prefix": torch.tensor(prefix),
            "where": where,
            "start": len(before),
            "tokens": pad(0, 0),
            "place": pad(1, 0) + int(where.max()) + 1,
            "segment": pad(2, -1),
            "target": pad(3, -100),
        }
        step += 1


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, make, *args):
        self.make, self.args = make, args

    def __iter__(self):
        torch.set_num_threads(1)
        return self.make(*self.args)


def in_worker(make, *args):
    """Runs a batch generator in one worker process, a few batches ahead."""
    return iter(torch.utils.data.DataLoader(_Stream(make, *args), batch_size=None, num_workers=1, prefetch_factor=4))


# --- model -----------------------------------------------------------------------------------------------------------


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


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """std 1/sqrt(fan in); what is added to the residual stream starts at half of that."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            continue
        std = p[0].numel() ** -0.5
        if "embed_tokens" in name:
            std = p.shape[1] ** -0.5
        if any(part in name for part in ("attn.proj", "down_proj", "o_proj")):
            std /= 2
        p.data.normal_(0, std, generator=generator)


def joint_loss(model, head: Head, batch: dict, frozen: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Loss on the answers, loss of the head, and the share of answers of which every token is right.

    `frozen`: the tower learns nothing, only the merger's projection does.
    """
    grids, height, width = batch["grid"]
    visual = model.model.visual
    with torch.set_grad_enabled(not frozen):
        _, flat = tower(visual, patchify(batch["frames"]), height, width)
    merged = visual.merger.mlp(flat)
    aux, _ = head(flat, batch["labels"].view(flat.shape[0], height * width, -1), height, width)
    clips, longest = batch["tokens"].shape
    text = model.model.language_model
    prefix = text.embed_tokens(batch["prefix"]).expand(clips, -1, -1)
    start, n = batch["start"], grids * height * width
    video = merged.reshape(clips, n, -1).to(prefix.dtype)
    embeds = torch.cat([prefix[:, :start], video, prefix[:, start + n :], text.embed_tokens(batch["tokens"])], 1)
    shared = prefix.shape[1]
    positions = torch.cat([batch["where"][:, None].expand(3, clips, -1), batch["place"].expand(3, -1, -1)], dim=2)
    segment = F.pad(batch["segment"], (shared, 0))  # 0: the shared prefix
    allowed = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    allowed &= torch.ones(shared + longest, shared + longest, dtype=torch.bool).tril()
    bias = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e4)[:, None]
    if torch.is_autocast_enabled("cpu"):
        bias = bias.bfloat16()
    hidden = language(text, embeds, positions, bias, model.config.text_config.rope_parameters["mrope_section"])
    held = batch["target"] >= 0
    logits = F.linear(hidden[:, shared:][held], text.embed_tokens.weight).float()
    target = batch["target"][held]
    each = F.cross_entropy(logits, target, reduction="none")
    # One number an answer. Long answers count for more than short ones, but not in proportion to their length.
    number = (torch.arange(clips)[:, None] * 64 + batch["segment"])[held]
    _, answer = number.unique(return_inverse=True)
    length = torch.bincount(answer)
    weight = length.float().rsqrt()[answer]
    wrong = torch.zeros(len(length)).index_add_(0, answer, (logits.argmax(-1) != target).float())
    return (each * weight).sum() / weight.sum(), aux, {"right": (wrong == 0).float().mean().item()}


# --- training --------------------------------------------------------------------------------------------------------


def optimizers(recipe: Recipe, groups: list[tuple[nn.Module, float]]) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for the rest; each module with a factor on its learning rate."""
    muon, adam = [], []
    for module, factor in groups:
        matrices, rest = [], []
        for name, p in module.named_parameters():
            (matrices if p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name else rest).append(p)
        muon.append({"params": matrices, "lr": recipe.muon_lr * factor})
        adam.append({"params": rest, "lr": recipe.adam_lr * factor})
    made = [
        torch.optim.Muon(muon, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.01),
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
        state = torch.load(self.checkpoint, weights_only=True)
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
    from transformers import Qwen2_5_VLForConditionalGeneration

    run = Run(folder, recipe)
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config())
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    visual = model.model.visual
    head = Head(128 * 4)
    init_weights(head, torch.Generator().manual_seed(recipe.seed + 1))
    state = run.load()
    if state:
        model.load_state_dict(state["modules"][0])
        head.load_state_dict(state["modules"][1])
    stages = {1: recipe.vision_steps, 2: recipe.steps}
    for stage, steps in stages.items():
        first = 0
        if state and state["stage"] > stage:
            continue
        groups = [(visual, 1.0), (head, 1.0)] if stage == 1 else [
            (visual.blocks, recipe.tower_factor), (visual.patch_embed, recipe.tower_factor),
            (visual.merger, 1.0), (model.model.language_model, 1.0), (head, 1.0),
        ]  # fmt: skip
        opts = optimizers(recipe, groups)
        if state and state["stage"] == stage:
            first = state["step"] + 1
            for optimizer, saved in zip(opts, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        batches = (
            in_worker(vision_batches, recipe, first)
            if stage == 1
            else in_worker(question_batches, recipe, tokenizer, first)
        )
        parameters = [p for module, _ in groups for p in module.parameters()]
        seen, clock = {}, time.monotonic()
        for step in range(first, steps):
            batch = next(batches)
            for optimizer in opts:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, steps, recipe)
            with torch.autocast("cpu", torch.bfloat16):
                if stage == 1:
                    frames, labels, (height, width) = batch
                    _, flat = tower(visual, patchify(frames), height, width)
                    loss, report = head(flat, labels, height, width)
                    report = {"loss": loss.item(), **report}
                else:
                    answers, aux, report = joint_loss(model, head, batch, step < recipe.frozen_steps)
                    loss = answers + aux * 0.5
                    report = {"loss": answers.item(), "head": aux.item(), **report}
            for optimizer in opts:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            for optimizer in opts:
                optimizer.step()
            for k, v in report.items():
                seen.setdefault(k, []).append(v)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                means = {k: float(np.mean(v)) for k, v in seen.items()}
                run.log(stage=stage, step=step + 1, seconds=time.monotonic() - clock, **means)
                seen, clock = {}, time.monotonic()
            run.save(stage, step, (model, head), opts)
        run.saved = -math.inf
        run.save(stage, steps - 1, (model, head), opts)
        if stage == 1:
            state = None
    export(folder, model, tokenizer)
    run.log(done=True)


def export(folder: Path, model, tokenizer) -> None:
    """Writes the model in the hub's file layout, weights in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    limits = {"size": {"shortest_edge": 4 * 4 * 784, "longest_edge": 8 * 12 * 784}}
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
