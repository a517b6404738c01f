"""The checks for `evoprune verify`, which compare evoprune with transformers or plain PyTorch using the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf, prod
from statistics import median

import torch
import torch.nn.functional as F

from evoprune.backend import Device, mean_rows, nearest_selected, plain_pytorch, reuse_scan, tube_radii
from evoprune.bench.clips import prepare, synthetic_frames
from evoprune.bench.profile import run_evoprune, run_hugging_face
from evoprune.bench.profile_results import median_ratio
from evoprune.bench.profile_rows import Case
from evoprune.bench.shared import ROUND, TimeLimit, paced
from evoprune.bench.verify.subject import (
    BUDGET,
    DIFFERS,
    HELD,
    INSIDE,
    NEW_TOKENS,
    QUESTION,
    SAMPLING,
    SKIPPED,
    Gap,
    Outcome,
    Subject,
    gap,
    judged,
    skipped,
)
from evoprune.errors import first_line, is_out_of_memory
from evoprune.hf import model_positions, takes_encoded
from evoprune.language import prune_prompt
from evoprune.methods import TowerShape, arange_on
from evoprune.model import PATCHES
from evoprune.session import PruneOptions
from evoprune.util import counted
from evoprune.vision import Encoded


def weights(subject: Subject) -> Outcome:
    """Check that evoprune's weights match the tensors that transformers reads from the same files bit for bit."""
    count = len(list(subject.transformers.parameters()))
    if subject.not_read:
        return skipped(subject.not_read)
    if names := subject.differing:
        says = f"{counted(len(names), 'tensor')} not equal to the files as transformers reads them, first {names[0]}"
        return Outcome(DIFFERS, says, {"differing": len(names), "differing_limit": 0})
    says = f"all {count} tensors equal to the files as transformers reads them"
    return Outcome(HELD, says, {"differing": 0, "differing_limit": 0})


def tower(subject: Subject) -> Outcome:
    """Compare the features computed by evoprune's and transformers' vision towers without pruning."""
    encoded = subject.encode(1.0).encoded
    theirs = subject.about(subject.video).features.flatten(0, 1)
    return _within(gap(encoded.every_feature, theirs), subject.features_noise)


def positions(subject: Subject) -> Outcome:
    """Compare the rotary positions of a prompt's tokens with transformers.

    Within an input, the positions must be the same as in transformers. The text after an input must start at the position following
    the input's largest position, as in Qwen's code.
    """
    pair = subject.loaded.video.temporal_patch_size
    for paths in ([subject.video], [subject.picture, subject.video]):
        asked = subject.about(*paths)
        ours = asked.positions
        call = {name: value.cpu() for name, value in asked.call.items()}
        # The seconds must be exact. With rounded seconds, a product that should be an integer may be slightly smaller, so it would
        # be truncated to the previous position.
        if "second_per_grid_ts" in call:
            seconds = [asked.plans[-1].sampling.seconds_per_pair(pair)]
            if seconds[0] % 1 and not takes_encoded(subject.transformers):
                return skipped("this transformers cuts seconds from one frame pair to the next to whole ones")
            call["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        theirs = model_positions(subject.transformers, call, call["attention_mask"], False)[:, 0]
        # The prompt has one run per text, image, or video.
        runs = []
        at = 0
        _, lengths = call["mm_token_type_ids"][0].unique_consecutive(return_counts=True)
        for run in theirs.split(lengths.tolist(), 1):
            runs.append(run - run[:, :1] + at)
            at = int(runs[-1].max()) + 1
        expected = torch.cat(runs, 1)
        if wrong := int((ours != expected).any(0).sum()):
            first = int((ours != expected).any(0).nonzero()[0])
            says = f"{counted(wrong, 'position')} of {ours.shape[1]} differ, first {ours[:, first].tolist()}, expected "
            return Outcome(DIFFERS, says + str(expected[:, first].tolist()), {"wrong": wrong, "wrong_limit": 0})
    return Outcome(HELD, f"all {ours.shape[1]} equal for an image and a video", {"wrong": 0, "wrong_limit": 0})


def logits(subject: Subject) -> Outcome:
    """Compare the logits of evoprune's and transformers' language models, given features from transformers' vision tower."""
    language = subject.loaded.language
    asked = subject.about(subject.video)
    last, *inner = asked.features
    (plan,) = asked.plans
    every = arange_on(plan.units, "cpu")
    added = None
    if inner:
        added = torch.stack(inner)
    tokens = Encoded(last, every, last, every, (plan.grid,), [], 0.0, deepstack=added)
    whole = asked.prompt
    prompt = prune_prompt(whole.input_ids, whole.places, [tokens], asked.positions, language.embed)
    cache = language.new_cache(len(prompt))
    ours = language.logits(
        prompt.embeds, prompt.positions, cache, last=asked.text_behind, deepstack=prompt.deepstack, ids=prompt.ids
    )
    return _within(gap(ours, subject.video_logits, centred=True), subject.language_noise)


def answer(subject: Subject) -> Outcome:
    """Check that transformers would give the same greedy answer as evoprune.

    The answer is fed to transformers, which must consider evoprune's token the most probable at each position, up to rounding
    errors. If evoprune's language model is itself a transformers module, both sides read features from evoprune's tower, so that
    smaller differences can be detected. In this case, the features are compared separately.
    """
    if subject.loaded.language.answer_window is not None:
        return Outcome(SKIPPED, "sliding_window: a pass over the whole answer in transformers has no window")
    inputs = subject.encode(1.0)
    answer = inputs.ask(QUESTION, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
    text = answer.text
    ids = [*answer.ids]
    asked = subject.about(subject.video)
    rows = len(ids) + (answer.report.finish_reason == "stop")
    features = asked.features
    limits = {}
    if not subject.loaded.model.native:
        features = inputs.encoded.every_feature.view(features.shape)
        limits = gap(features.flatten(0, 1), asked.features.flatten(0, 1)).limits(subject.features_noise)
    theirs = subject.logits(asked.call, asked.positions, features, ids[: rows - 1], last=rows).float().cpu()
    ends = torch.tensor(subject.loaded.eos_ids, dtype=torch.int64, device="cpu")
    chosen = [theirs[row, token] for row, token in enumerate(ids[:rows])]
    chosen += [theirs[row, ends].max() for row in range(len(ids), rows)]
    ours = torch.stack(chosen)
    # 0 if both sides choose the same token, and 1 if our token's logit is only average.
    margin = (theirs.amax(1) - ours) / (theirs.amax(1) - theirs.mean(1))
    first = next((row for row in range(rows) if margin[row] > 0), None)
    same = f"{counted(rows, 'token')} equal, {len(text)} characters"
    if first is not None:
        same = f"token {first + 1} of {rows} differs, by {margin[first]:.1%} of its logit, within rounding"
    outcome = judged(same, limits | {"margin_error": (float(margin.max()), 2 * subject.logit_noise)})
    if outcome.state == DIFFERS and first is not None:
        says = f"token {first + 1} of {rows}: transformers prefers another by {margin[first]:.1%}; {outcome.says}"
        return Outcome(DIFFERS, says, outcome.figures)
    return outcome


def _within(distance: Gap, noise: Gap) -> Outcome:
    return judged(f"{distance}; rounding alone {noise.mean:.1e}, {noise.largest:.1e}", distance.limits(noise))


@contextmanager
def counted_rows(visual: torch.nn.Module) -> Iterator[list[int]]:
    """Count the rows computed by each vision tower layer. Yields a list of counts that is updated during forward passes."""
    rows = [0] * len(visual.blocks)

    def note(layer: int, _, given: tuple[torch.Tensor]) -> None:
        rows[layer] += given[0].shape[:-1].numel() // PATCHES

    hooks = [block.attn.qkv.register_forward_pre_hook(partial(note, i)) for i, block in enumerate(visual.blocks)]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def counts(subject: Subject) -> Outcome:
    """Check that the row counts per layer and the token count match the plan exactly, at two budgets and without reuse."""
    summaries = []
    for budget in (BUDGET, 0.1):
        with counted_rows(subject.loaded.model.model.visual) as rows:
            encoded = subject.encode(budget, f"{INSIDE}:reuse=0")
        plan = encoded.plan.encoder
        result = encoded.encoded
        tokens = ("tokens", len(result.kept), plan.keep), ("features", len(result.features), plan.keep)
        layers = enumerate(zip(rows, plan.layers, strict=True))
        for what, entered, planned in (*((f"rows in layer {i}", *pair) for i, pair in layers), *tokens):
            if entered != planned:
                says = f"{entered} {what} at {budget:g}, expected {planned}"
                return Outcome(DIFFERS, says, {"count": entered, "count_limit": planned})
        summaries.append(f"{plan.units} units, {plan.rows} rows, {plan.keep} tokens at {budget:g}")
    return Outcome(HELD, "; ".join(summaries))


ROUNDS = 3


def first_token(subject: Subject) -> Outcome:
    """Compare the time to first token, which includes encoding a clip and prefilling the prompt.

    Evoprune and transformers take turns, so that changes in machine speed affect both.
    """
    loaded = subject.loaded
    config = PruneOptions(BUDGET, "evoprune").config()
    (whole,) = subject.about(subject.video).plans
    case = Case(SAMPLING.frames, whole.height, whole.width)
    clip = prepare(loaded, *synthetic_frames("motion", case, loaded.video.unit))
    plan = config.plan(TowerShape.of_tower(loaded.model.model.visual), clip.grid)

    def run_round(*_) -> tuple[float, float]:
        theirs = run_hugging_face(loaded, subject.transformers, clip, 1)
        return theirs.sample.first_token, run_evoprune(loaded, clip, plan, config, 1).sample.first_token

    rounds = [turns for phase, turns in paced(run_round, 1, ROUNDS, TimeLimit(inf)) if phase == ROUND]
    theirs, ours = map(median, zip(*rounds, strict=True))
    figures = {"transformers_s": theirs, "evoprune_s": ours, "ratio": median_ratio(*zip(*rounds, strict=True))}
    both = f"{ours:.2f} s, transformers {theirs:.2f} s: {figures['ratio']:.1f}x as fast"
    return Outcome(HELD, f"first token {both} (weights are not packed here)", figures)


GRID = (6, 9, 13)
ROWS = 500
WIDTH = 128
STEPS = 16384  # distances are measured in steps, as in methods/farthest.py
SAME = 0.99  # fraction of units that must be equal; the others may differ because of rounding in sums


def accelerated(subject: Subject) -> Outcome:
    """Compare the results of GPU kernels and CUDA graphs with plain PyTorch.

    If decoding cannot use a CUDA graph but all other comparisons pass, the outcome is `SKIPPED`.
    """
    if not Device(subject.device).uses_kernels:
        return skipped("kernels and graphs need CUDA, and EVOPRUNE_PLAIN turns them off")
    figures: dict[str, tuple[float, float]] = {}
    for name, share in _selections(subject.device).items():
        figures[f"{name}_unlike"] = (1 - share, 1 - SAME)
    with plain_pytorch():
        expected = subject.encode(1.0).encoded.every_feature
    actual = subject.encode(1.0).encoded.every_feature
    features = gap(actual, expected)
    figures |= {f"tower_{name}": limit for name, limit in features.limits(subject.features_noise).items()}
    summary = f"tower {features}"
    decoded = _decoded(subject)
    if not isinstance(decoded, str):
        logits = gap(*decoded, centred=True)
        figures |= {f"decoding_{name}": limit for name, limit in logits.limits(subject.logits_noise, 2).items()}
        summary += f"; decoding {logits}"
    outcome = judged(summary, figures)
    if outcome.state == DIFFERS:
        return Outcome(DIFFERS, f"{outcome.says}; EVOPRUNE_PLAIN=1 turns off kernels and graphs", outcome.figures)
    if isinstance(decoded, str):
        return Outcome(SKIPPED, f"no graph: {decoded}; {outcome.says}", outcome.figures)
    return outcome


def _selections(device: torch.device) -> dict[str, float]:
    """Compare the selection and reuse operators with plain PyTorch on random data.

    Returns:
        The fraction of equal values, keyed by operator.
    """
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(device)

    place = drawn(ROWS, WIDTH) * (STEPS / WIDTH) ** 0.5
    salience = drawn(ROWS).abs().clamp(max=1)
    units = prod(GRID)
    row = torch.randint(ROWS, (units,), generator=random, dtype=torch.int64, device="cpu").to(device)
    index = arange_on(units, device)
    time = (index // (units // GRID[0])).float() / (GRID[0] - 1)
    tubes = index.view(GRID).transpose(0, 1).flatten(1)  # one tube per frame row
    tubes = F.pad(tubes, (0, 5), value=units)
    half = place.square().sum(1) / 2
    weight = STEPS * salience**2
    first = (salience * STEPS / 2).round()
    means = (drawn(GRID[0], 117, 96) * 20 + 128).clamp(0, 255)
    means[1::2, 30:] = means[:-1:2, 30:]

    def outputs() -> dict[str, torch.Tensor]:
        radii = tube_radii(place, half, weight, first, row, time, tubes, units)
        kept = radii.topk(units // 4).indices.sort().values
        scanned = reuse_scan(means, means[0], torch.zeros_like(row[:117]), False, 0, 8.0)[0]
        of = nearest_selected(place, half, weight, row, time, selected)
        averages = mean_rows(place, of, row, torch.ones_like(time), len(selected))
        mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, kept, True)
        return {"selection": mask, "clusters": of, "reuse": scanned, "means": averages.round(decimals=2)}

    selected = torch.arange(0, units, 4, dtype=torch.int64, device=device)
    actual = outputs()
    with plain_pytorch():
        expected = outputs()
    return {name: float((actual[name] == expected[name]).float().mean()) for name in actual}


@torch.inference_mode()
def _decoded(subject: Subject) -> tuple[torch.Tensor, torch.Tensor] | str:
    """Compute the logits at each answer position twice, with CUDA graphs and with plain PyTorch.

    Returns:
        Two tensors `[n, vocabulary]`, or the reason why CUDA graphs cannot be used.
    """
    if Device(subject.device).capture is None:
        return "this device has no graphs"
    language = subject.loaded.language
    if not language.can_capture:
        return "layers have hooks, quantized weights, or experts that are chosen on the host"
    encoded = subject.encode(1.0)
    answer = encoded.ask("What happens?", max_new_tokens=NEW_TOKENS)
    answer.text  # generates the answer  # noqa: B018
    embeds = language.embed(torch.arange(64, dtype=torch.int64, device="cpu"))
    positions = torch.arange(64, dtype=torch.int64, device="cpu").expand(3, -1)
    with plain_pytorch():
        state = language.prefill(embeds, positions, 64)
        ids = torch.tensor([*(answer.ids or [0]), 0], dtype=torch.int64, device="cpu")
        plain = state.logits_along(ids, one_by_one=True)[1:]
    state = language.prefill(embeds, positions, 64)
    try:
        decoded = state.graph_logits_along(ids[:-1])
    except Exception as problem:  # if graph capture fails, evoprune decodes answers with plain PyTorch
        if is_out_of_memory(problem):
            raise
        return first_line(problem)
    return decoded, plain
