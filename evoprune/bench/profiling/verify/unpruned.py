"""Checks with nothing pruned: every step from pixels to the answer against transformers on the same weights."""

from contextlib import closing
from pathlib import Path

import torch

from evoprune.bench.profiling.verify.outcome import DIFFERS, HELD, Gap, Outcome, gap, judged, skipped
from evoprune.bench.profiling.verify.subject import ANOTHER, BUDGET, NEW_TOKENS, QUESTION, Subject
from evoprune.cpu.linear import PackedLinear, packs
from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.hf.context import PruningContext
from evoprune.language import decoder
from evoprune.language.generate import Visual, column_deepstack, embed_prompt
from evoprune.methods.types import ascending
from evoprune.text import counted
from evoprune.video.frames import read_frames
from evoprune.video.plan import Plan

LEVEL = 1.01 / 255  # one level of a pixel, and rounding


def weights(subject: Subject) -> Outcome:
    """Transformers reads the files itself: every tensor of one program is in the other, bit by bit."""
    count = len(list(subject.transformers.parameters()))
    if subject.not_read:
        return skipped(subject.not_read)
    if names := subject.differing:
        says = f"{counted(len(names), 'tensor')} otherwise than transformers reads the files, first {names[0]}"
        return Outcome(DIFFERS, says, {"differing": len(names), "differing_limit": 0})
    says = f"all {count} tensors as transformers reads them of the files"
    return Outcome(HELD, says, {"differing": 0, "differing_limit": 0})


def patches(subject: Subject) -> Outcome:
    """The patches of each frame, which are those of a picture in one half of the values and in the other."""
    worst = Gap(0.0, 0.0)
    for path, name in ((subject.video, "pixel_values_videos"), (subject.picture, "pixel_values")):
        asked = subject.about(path)
        (plan,), made = asked.plans, asked.call[name].cpu()
        expected = _patches_of_transformers(subject, plan)
        if made.shape != expected.shape:
            return Outcome(DIFFERS, f"patches {list(made.shape)}, expected {list(expected.shape)}")
        std = min(subject.loaded.limits[plan.kind].image_std)
        away = (made - expected).abs() * std
        worst = worst.worse((float(away.mean()), float(away.max())))
    says = f"at most {worst.largest * 255:.2f} of 255 levels, {worst.mean * 255:.3f} on average"
    return judged(says, {"mean_error": (worst.mean, LEVEL / 4), "largest_error": (worst.largest, LEVEL)})


def _patches_of_transformers(subject: Subject, plan: Plan) -> torch.Tensor:
    """`[patches, values]`, from its processor of pictures, which works without torchvision; frames are resized by Pillow."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits, size = subject.loaded.limits[plan.kind], (plan.width, plan.height)
    processor = Qwen2VLImageProcessorPil(
        image_mean=limits.image_mean, image_std=limits.image_std, patch_size=limits.patch_size, do_resize=False
    )
    with closing(read_frames(plan.source, plan.sampling.times_s, decoder=plan.decoder)) as chunks:
        frames = [Image.fromarray(frame) for chunk in chunks for frame in chunk.frames]
    frames = [frame.resize(size, Image.Resampling.BICUBIC) for frame in (frames if len(frames) > 1 else 2 * frames)]
    made = processor(images=frames, return_tensors="pt")["pixel_values"]
    first, second = made.view(len(frames) // 2, 2, -1, 3, 2, limits.patch_size**2).unbind(1)
    return torch.stack([first[..., 0, :], second[..., 1, :]], -2).flatten(0, 1).flatten(1)


def tower(subject: Subject) -> Outcome:
    encoded = subject.encode(subject.asking(1.0), [subject.video]).encoded
    theirs = subject.about(subject.video).features.flatten(0, 1)
    return _within(gap(encoded.every_feature, theirs), subject.features_noise)


def positions(subject: Subject) -> Outcome:
    """Inside each input as in transformers; the text behind it begins after its largest position, as Qwen's own code has it."""
    pair = subject.loaded.video.temporal_patch_size
    for paths in ([subject.video], [subject.picture, subject.video]):
        asked = subject.about(*paths)
        made, call = asked.positions, {name: value.cpu() for name, value in asked.call.items()}
        if "second_per_grid_ts" in call:  # exactly: a product that is a whole number must not be rounded below it
            seconds = [asked.plans[-1].sampling.seconds_per_pair(pair)]
            if seconds[0] % 1 and not interface.takes_encoded(subject.transformers):
                return skipped("this transformers cuts seconds from one frame pair to the next to whole ones")
            call["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        theirs = interface.model_positions(subject.transformers, call, call["attention_mask"], False)[:, 0]
        runs, at = [], 0  # of text, of a picture or of a video
        _, lengths = call["mm_token_type_ids"][0].unique_consecutive(return_counts=True)
        for run in theirs.split(lengths.tolist(), 1):
            runs.append(run - run[:, :1] + at)
            at = int(runs[-1].max()) + 1
        expected = torch.cat(runs, 1)
        if wrong := int((made != expected).any(0).sum()):
            first = int((made != expected).any(0).nonzero()[0])
            says = f"{counted(wrong, 'position')} of {made.shape[1]}, the first {made[:, first].tolist()}, expected "
            return Outcome(DIFFERS, says + str(expected[:, first].tolist()), {"wrong": wrong, "wrong_limit": 0})
    return Outcome(HELD, f"all {made.shape[1]} of a picture and a video equal", {"wrong": 0, "wrong_limit": 0})


def logits(subject: Subject) -> Outcome:
    """The language model alone: both sides read the features of transformers' tower."""
    model, asked = subject.loaded.model, subject.about(subject.video)
    (place,), (last, *inner) = asked.prompt.places, asked.features
    visuals = [Visual(place, last, ascending(len(place), "cpu"), deepstack=torch.stack(inner) if inner else None)]
    embeds, columns = embed_prompt(model, asked.prompt.input_ids, visuals)
    added = column_deepstack(visuals, columns, embeds)
    cache = decoder.KVCache(model, len(embeds))
    made = decoder.logits(model, embeds, asked.positions, cache, last=asked.text_behind, deepstack=added)
    return _within(gap(made, subject.video_logits, centred=True), subject.logits_noise)


def answer(subject: Subject) -> Outcome:
    return _same_answer(subject, subject.video)


def inputs(subject: Subject) -> Outcome:
    return _same_answer(subject, subject.picture, subject.video)


def _same_answer(subject: Subject, *paths: Path) -> Outcome:
    """Transformers reads our answer: at each token its first choice is ours, or nearer to ours than rounding can tell."""
    inputs = subject.encode(subject.asking(1.0), paths)
    said = inputs.ask(QUESTION, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
    text, ids, asked = said.text, [*said.ids], subject.about(*paths)
    rows = len(ids) + (said.report.finish_reason == "stop")
    theirs = subject.logits(asked.call, asked.positions, asked.features, ids[: rows - 1], last=rows).float().cpu()
    ends = torch.tensor(subject.loaded.eos_ids, dtype=torch.int64, device="cpu")
    ours = torch.stack([theirs[row, ids[row]] if row < len(ids) else theirs[row, ends].max() for row in range(rows)])
    margin = theirs.amax(1) - ours
    first = next((row for row in range(rows) if margin[row] > 0), None)
    same = f"{counted(rows, 'token')} equal, {len(text)} characters"
    if first is not None:
        same = f"token {first + 1} of {rows} differs, by a margin of {margin[first]:.2g}, within rounding"
    found = judged(same, {"margin": (float(margin.max()), 2 * subject.logit_noise)})
    if found.state == DIFFERS:
        says = f"token {first + 1} of {rows}, where transformers prefers another by {margin[first]:.2g}; {found.says}"
        return Outcome(DIFFERS, says, found.figures)
    return found


def batch(subject: Subject) -> Outcome:
    """A batch of two through `EvoPrune(...)(model)`: unpruned as the model alone, and pruned as each prompt by itself."""
    try:
        whole, pruning = (PruningContext(budget=budget)(subject.transformers) for budget in (1.0, BUDGET))
    except UsageError as older:  # Qwen3-VL in an older transformers
        return skipped(older.message)
    calls = [subject.about(subject.video, question=question).call for question in (QUESTION, ANOTHER)]
    both = _padded(calls)
    stock = subject.last_logits(both)
    with whole:
        unpruned = gap(subject.last_logits(both), stock, centred=True)
    with pruning:
        alone = torch.cat([subject.last_logits(call) for call in calls])
        pruned = gap(subject.last_logits(both), alone, centred=True)
    return _within(unpruned.worse(pruned), subject.logits_noise, 2)


def _padded(calls: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The calls as one, padded on the left."""
    most = max(call["input_ids"].shape[1] for call in calls)
    made = {}
    for name in calls[0]:
        values = [call[name] for call in calls]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            values = [torch.nn.functional.pad(value, (most - value.shape[1], 0)) for value in values]
        made[name] = torch.cat(values)
    return made


def packed(subject: Subject) -> Outcome:
    """Commands compute with packed weights: a product with each shape of layer, against the same in fp64."""
    layers = {}
    for module in subject.transformers.modules():
        if packs(module):
            layers.setdefault(tuple(module.weight.shape), module)
    layers = {shape: layer for shape, layer in layers.items() if layer.weight.numel() < 2**26}
    if not layers:
        return skipped("weights are not packed in this dtype on this device")
    worst = 0.0
    for layer in layers.values():
        ours, least = PackedLinear(layer), layer.in_features**0.5 * torch.finfo(subject.dtype).eps
        for rows in (1, 300):
            random = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, layer.in_features, generator=random, dtype=torch.float32, device="cpu")
            x = x.to(subject.dtype)
            bias = None if layer.bias is None else layer.bias.double()
            exact = torch.nn.functional.linear(x.double(), layer.weight.double(), bias)
            with torch.inference_mode():
                worst = max(worst, gap(ours(x), exact).mean / least)
    says = f"{counted(len(layers), 'shape')} of layers, error at most {worst:.2f} of what a sum of so many terms rounds"
    return judged(says, {"error_of_rounding": (worst, 1.0)})


def _within(found: Gap, noise: Gap, times: float = 1.0) -> Outcome:
    return judged(f"{found}; rounding alone {noise.mean:.1e}, {noise.largest:.1e}", found.limits(noise, times))
