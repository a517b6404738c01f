"""The checks: with nothing pruned every step from pixels to the answer, against transformers on the same weights. Below that:
counts, what must not depend on pieces or threads, reuse and every method. Then kernels, memory, waits, time to the first token."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend

from evoprune.backend import operators
from evoprune.backend.attention import varlen_kernel
from evoprune.backend.cpu.linear import PackedLinear, can_pack, packs
from evoprune.backend.cpu.quantize import kinds, quantize, saved_bytes
from evoprune.backend.devices import (
    capture_on,
    counted_memory,
    is_host,
    peak_memory,
    plain_pytorch,
    reset_peak_memory,
    uses_kernels,
)
from evoprune.backend.layers import unjoined
from evoprune.backend.operators import reuse_scan
from evoprune.bench.clips import prepare, synthetic_frames
from evoprune.bench.profile import run_evoprune, run_hugging_face
from evoprune.bench.profile_results import Case
from evoprune.bench.verify.subject import (
    ANOTHER,
    BUDGET,
    DIFFERS,
    HELD,
    INSIDE,
    NEW_TOKENS,
    QUESTION,
    SAMPLING,
    SHORT,
    SKIPPED,
    Gap,
    Outcome,
    Subject,
    gap,
    judged,
    skipped,
)
from evoprune.bench.verify.waiting import Waiting
from evoprune.errors import UsageError, first_line, is_out_of_memory
from evoprune.hf import interface
from evoprune.hf.context import EvoPrune
from evoprune.language import generate, static
from evoprune.language.pruned import prune_prompt
from evoprune.methods import parse
from evoprune.methods.chain import PruneConfig
from evoprune.methods.farthest import STEPS, grid_tables
from evoprune.methods.registry import built_in
from evoprune.methods.types import arange_on
from evoprune.model import cost
from evoprune.model.config import PATCHES
from evoprune.model.weights import shared
from evoprune.session.answering import EncodedInputs
from evoprune.session.loading.stored import calibrate
from evoprune.session.memory import TEXT, encoding_bytes, fitting_pieces
from evoprune.util import counted, size
from evoprune.video.frames import read_frames
from evoprune.video.plan import Plan
from evoprune.video_qa import VideoQA
from evoprune.vision.encoder import Encoded
from evoprune.vision.tower import tower_shape

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
    """Compare the patches of each frame, whose two halves are the patches of a picture."""
    worst = Gap(0.0, 0.0)
    for path, name in ((subject.video, "pixel_values_videos"), (subject.picture, "pixel_values")):
        asked = subject.about(path)
        (plan,) = asked.plans
        pixels = asked.call[name].cpu()
        expected = _patches_of_transformers(subject, plan)
        if pixels.shape != expected.shape:
            return Outcome(DIFFERS, f"patches {list(pixels.shape)}, expected {list(expected.shape)}")
        std = min(subject.loaded.limits[plan.kind].image_std)
        away = (pixels - expected).abs() * std
        worst = worst.worse((float(away.mean()), float(away.max())))
    says = f"at most {worst.largest * 255:.2f} of 255 levels, {worst.mean * 255:.3f} on average"
    return judged(says, {"mean_error": (worst.mean, LEVEL / 4), "largest_error": (worst.largest, LEVEL)})


def _patches_of_transformers(subject: Subject, plan: Plan) -> torch.Tensor:
    """Make `[patches, values]` by its processor of pictures, which works without torchvision; frames are resized by Pillow."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits = subject.loaded.limits[plan.kind]
    size = (plan.width, plan.height)
    processor = Qwen2VLImageProcessorPil(
        image_mean=limits.image_mean, image_std=limits.image_std, patch_size=limits.patch_size, do_resize=False
    )
    with closing(read_frames(plan.source, plan.sampling.times_s, decoder=plan.decoder)) as chunks:
        frames = [Image.fromarray(frame) for chunk in chunks for frame in chunk.pixels]
    if len(frames) == 1:
        frames *= 2
    frames = [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
    first, second = pixels.view(len(frames) // 2, 2, -1, 3, 2, limits.patch_size**2).unbind(1)
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
        ours = asked.positions
        call = {name: value.cpu() for name, value in asked.call.items()}
        if "second_per_grid_ts" in call:  # exactly: a product that is a whole number must not be rounded below it
            seconds = [asked.plans[-1].sampling.seconds_per_pair(pair)]
            if seconds[0] % 1 and not interface.takes_encoded(subject.transformers):
                return skipped("this transformers cuts seconds from one frame pair to the next to whole ones")
            call["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
        theirs = interface.model_positions(subject.transformers, call, call["attention_mask"], False)[:, 0]
        # of text, of a picture or of a video
        runs = []
        at = 0
        _, lengths = call["mm_token_type_ids"][0].unique_consecutive(return_counts=True)
        for run in theirs.split(lengths.tolist(), 1):
            runs.append(run - run[:, :1] + at)
            at = int(runs[-1].max()) + 1
        expected = torch.cat(runs, 1)
        if wrong := int((ours != expected).any(0).sum()):
            first = int((ours != expected).any(0).nonzero()[0])
            says = f"{counted(wrong, 'position')} of {ours.shape[1]}, the first {ours[:, first].tolist()}, expected "
            return Outcome(DIFFERS, says + str(expected[:, first].tolist()), {"wrong": wrong, "wrong_limit": 0})
    return Outcome(HELD, f"all {ours.shape[1]} of a picture and a video equal", {"wrong": 0, "wrong_limit": 0})


def logits(subject: Subject) -> Outcome:
    """Compare the language models alone: both read the features of transformers' tower."""
    model = subject.loaded.model
    asked = subject.about(subject.video)
    last, *inner = asked.features
    (plan,) = asked.plans
    every = arange_on(plan.units, "cpu")
    added = None
    if inner:
        added = torch.stack(inner)
    tokens = Encoded(last, every, last, every, (plan.grid,), [], 0.0, deepstack=added)
    whole = asked.prompt
    prompt = prune_prompt(whole.input_ids, whole.places, [tokens], asked.positions, partial(generate.embed_ids, model))
    cache = generate.new_cache(model, len(prompt))
    options = {"last": asked.text_behind, "deepstack": prompt.deepstack}
    ours = generate.layers_of(model).logits(model, prompt.embeds, prompt.positions, cache, **options)
    return _within(gap(ours, subject.video_logits, centred=True), subject.language_noise)


def answer(subject: Subject) -> Outcome:
    return _same_answer(subject, subject.video)


def inputs(subject: Subject) -> Outcome:
    return _same_answer(subject, subject.picture, subject.video)


def _same_answer(subject: Subject, *paths: Path) -> Outcome:
    """Transformers reads our answer: at each token its first choice is ours, or nearer to ours than rounding can tell.

    Modules that both sides run read the features of our tower, which are compared by themselves: they can be told apart better.
    """
    inputs = subject.encode(subject.asking(1.0), paths)
    said = inputs.ask(QUESTION, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
    text = said.text
    ids = [*said.ids]
    asked = subject.about(*paths)
    rows = len(ids) + (said.report.finish_reason == "stop")
    features = asked.features
    limits = {}
    if not subject.loaded.model.native:
        encoded = [subject.encode(subject.asking(1.0), [path]).encoded.every_feature for path in paths]
        features = torch.cat([each.view(len(features), -1, each.shape[-1]) for each in encoded], 1)
        limits = gap(features.flatten(0, 1), asked.features.flatten(0, 1)).limits(subject.features_noise)
    theirs = subject.logits(asked.call, asked.positions, features, ids[: rows - 1], last=rows).float().cpu()
    ends = torch.tensor(subject.loaded.eos_ids, dtype=torch.int64, device="cpu")
    chosen = [theirs[row, token] for row, token in enumerate(ids[:rows])]
    chosen += [theirs[row, ends].max() for row in range(len(ids), rows)]
    ours = torch.stack(chosen)
    margin = (theirs.amax(1) - ours) / (theirs.amax(1) - theirs.mean(1))  # 0: its choice; 1: a token as good as any
    first = next((row for row in range(rows) if margin[row] > 0), None)
    same = f"{counted(rows, 'token')} equal, {len(text)} characters"
    if first is not None:
        same = f"token {first + 1} of {rows} differs, by {margin[first]:.1%} of its logit, within rounding"
    outcome = judged(same, limits | {"margin_error": (float(margin.max()), 2 * subject.logit_noise)})
    if outcome.state == DIFFERS and first is not None:
        says = f"token {first + 1} of {rows}, where transformers prefers another by {margin[first]:.1%}; {outcome.says}"
        return Outcome(DIFFERS, says, outcome.figures)
    return outcome


def batch(subject: Subject) -> Outcome:
    """Return a batch of two through `EvoPrune(...)(model)`: unpruned as the model alone, and pruned as each prompt by itself."""
    try:
        whole, pruning = (EvoPrune(budget=budget)(subject.transformers) for budget in (1.0, BUDGET))
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
    """Return the calls as one, padded on the left."""
    max_length = max(call["input_ids"].shape[1] for call in calls)
    padded = {}
    for name in calls[0]:
        values = [call[name] for call in calls]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            values = [torch.nn.functional.pad(value, (max_length - value.shape[1], 0)) for value in values]
        padded[name] = torch.cat(values)
    return padded


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
        ours = PackedLinear(layer)
        rounding = layer.in_features**0.5 * torch.finfo(subject.dtype).eps
        for rows in (1, 300):
            random = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, layer.in_features, generator=random, dtype=torch.float32, device="cpu")
            x = x.to(subject.dtype)
            bias = None if layer.bias is None else layer.bias.double()
            exact = torch.nn.functional.linear(x.double(), layer.weight.double(), bias)
            with torch.inference_mode():
                worst = max(worst, gap(ours(x), exact).mean / rounding)
    says = f"{counted(len(layers), 'shape')} of layers, error at most {worst:.2f} of what a sum of so many terms rounds"
    return judged(says, {"error_of_rounding": (worst, 1.0)})


def _within(distance: Gap, noise: Gap, times: float = 1.0) -> Outcome:
    return judged(f"{distance}; rounding alone {noise.mean:.1e}, {noise.largest:.1e}", distance.limits(noise, times))


# Share of the tokens that 16 bits may select otherwise: units that are nearly alike round to the same distance.
FLIPS = 0.1
# What 8 and 4 bits may cost: mean KL in nats a token, of which 0.001 was measured with 8 bits (results/int8.md); and the error of
# logits, which finds a fault where all words are about as likely: five and three times what small models have, and besides ten
# times what the dtype's own rounding grows to in the layers of this model.
KL = {"int8": 0.05, "int4": 0.5}
ERRORS = {"int8": 0.1, "int4": 0.3}
GROWTH = 10
# Recurrent states let errors grow: with random weights to about twice the others'. Layers that make a rounding so many times
# larger make other weights of it: the demo has 12, random Gated DeltaNets have up to 110 in fp32.
RECURRENT = 2
CHAOTIC = 50
COMBINED = ("reuse+divprune", "ipcv+divprune", "evoprune+fastv")


@contextmanager
def counted_rows(visual: torch.nn.Module) -> Iterator[list[int]]:
    """Counts the rows that each layer of a tower really computes."""
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
    """Rows that enter each layer, and tokens, at two budgets. Nothing is reused, so that all numbers are exact."""
    said = []
    for budget in (BUDGET, 0.1):
        with counted_rows(subject.loaded.model.model.visual) as rows:
            encoded = subject.encode(subject.asking(budget, f"{INSIDE}:reuse=0"), [subject.video])
        plan = encoded.plan.encoder
        result = encoded.encoded
        tokens = ("tokens", len(result.kept), plan.keep), ("features", len(result.features), plan.keep)
        layers = enumerate(zip(rows, plan.layers, strict=True))
        for what, entered, planned in (*((f"rows in layer {i}", *pair) for i, pair in layers), *tokens):
            if entered != planned:
                says = f"{entered} {what} at {budget:g}, expected {planned}"
                return Outcome(DIFFERS, says, {"count": entered, "count_limit": planned})
        said.append(f"{plan.units} units, {plan.rows} rows, {plan.keep} tokens at {budget:g}")
    return Outcome(HELD, "; ".join(said))


def pieces(subject: Subject) -> Outcome:
    """Return the same tokens where as many rows as a frame pair has units go through a product at a time."""
    qa = subject.asking()
    usual, small = (subject.encode(qa, [subject.video], in_pieces=small) for small in (False, True))
    return _same(subject, usual, small, subject.logits_noise, 2)


def threads(subject: Subject) -> Outcome:
    if not is_host(subject.device):
        return skipped("a CPU's matter")
    before = torch.get_num_threads()
    qa = subject.asking()
    usual = subject.encode(qa, [subject.video])
    usual.read_along(QUESTION, [0])
    other = 2 if before == 1 else 1
    torch.set_num_threads(other)
    try:
        return _same(subject, usual, subject.encode(qa, [subject.video]), subject.logits_noise, 2)
    finally:
        torch.set_num_threads(before)


def _same(subject: Subject, first: EncodedInputs, second: EncodedInputs, noise: Gap, times: float) -> Outcome:
    """Return whether two encodings have the same tokens and lead to the same logits."""
    kept, again = ({*encoding.encoded.kept.tolist()} for encoding in (first, second))
    flips = len(kept - again) / len(kept)
    max_flips = FLIPS if subject.dtype.itemsize == 2 else 0.0
    limits = {"tokens_selected_otherwise": (flips, max_flips)}
    distance = gap(*(each.read_along(QUESTION, subject.words)[0] for each in (second, first)), centred=True)
    tokens = counted(len(kept), "token")
    if flips:
        tokens += f", {flips:.0%} of them other ones"
    else:
        limits |= distance.limits(noise, times)
    return judged(f"{tokens}; logits: {distance}", limits)


def again(subject: Subject) -> Outcome:
    """Compare a second question, which goes on from the cache that the first one left.

    A language model that transformers runs reads the same columns at a time in both: only what differs between two fresh ones is
    rounding.
    """
    asked, fresh = (subject.encode(subject.asking(), [subject.video]) for _ in range(2))
    asked.read_along(ANOTHER, [0])
    noise = subject.language_noise
    if not subject.loaded.model.native:
        twice = (
            subject.encode(subject.asking(), [subject.video]).read_along(QUESTION, subject.words) for _ in range(2)
        )
        noise = subject.noise(gap(*(logits for logits, *_ in twice), centred=True))
    return _same(subject, fresh, asked, noise, 1)


def every_method(subject: Subject) -> Outcome:
    """Return each method on a short clip, twice: as many tokens as planned, no NaN, and the same tokens again."""
    native = subject.loaded.model.native  # without it no method acts inside the language model
    ran = []
    left = ""
    every = [name for name in (*built_in(), *COMBINED) if native or not parse(name).language]
    for name in every:
        if ran and subject.limit.left <= 0:
            left = f" of {len(every)}, until the time limit was over"
            break
        try:
            qa = subject.asking(method=name)
            first, second = (subject.encode(qa, [subject.video], SHORT) for _ in range(2))
            values = first.read_along(QUESTION, [0])[0], second.read_along(QUESTION, [0])[0]
        except UsageError:
            if name != "operations":
                raise
            left = " (operations needs a recipe)"
            continue
        ran.append(name)
        plan = first.plan.encoder
        kept = first.encoded.kept.tolist()
        if qa.session.pruning.method.exact and not qa.session.pruning.method.language and len(kept) != plan.keep:
            return Outcome(DIFFERS, f"{name}: {len(kept)} tokens, expected {plan.keep}")
        if not all(x.isfinite().all() for x in values) or second.encoded.kept.tolist() != kept:
            return Outcome(DIFFERS, f"{name}: NaN, or other tokens the second time")
    return Outcome(HELD, f"{counted(len(ran), 'method')}{left}, each twice", {"methods": len(ran)})


def reuse(subject: Subject) -> Outcome:
    """Return a clip that stands still: reuse encodes one frame pair, and its tokens are those of encoding every one."""
    plain, reusing = (
        subject.encode(subject.asking(method=name), [subject.still]) for name in ("random", "reuse+random")
    )
    pairs = plain.plan.grid[0]
    rows = len(reusing.encoded.rows)
    if rows * pairs != plain.plan.units:
        return Outcome(DIFFERS, f"{rows} rows are encoded, expected {plain.plan.units // pairs}", {"rows": rows})
    distance = gap(reusing.encoded.every_feature, plain.encoded.every_feature)
    return judged(f"{rows} of {plain.plan.units} units encoded; {distance}", distance.limits(subject.features_noise))


def transformers_model(subject: Subject) -> Outcome:
    """Logits of a pruned prompt from transformers' language model, and from ours.

    Both towers compute with weights as they are: products with joined ones round otherwise, and a selection depends on that.
    """
    try:
        pruning = EvoPrune(budget=BUDGET, method=INSIDE, positions="qwen")(subject.transformers)
    except UsageError as older:  # Qwen3-VL in an older transformers
        return skipped(older.message)
    with unjoined():
        ours = subject.encode(subject.asking(), [subject.video]).read_along(QUESTION, subject.words)[0]
    with pruning:
        theirs = subject.logits_along(subject.about(subject.video).call)
    distance = gap(ours, theirs, centred=True)
    return _within(distance, subject.language_noise, 2)


def _bits(kind: str, subject: Subject) -> Outcome:
    """Return how far the answer of the model as it is leads a quantised one astray."""
    model = subject.loaded.model
    if kind not in kinds(subject.device):
        return skipped("not on this device")
    if not subject.loaded.description.can_be_quantized:
        return skipped("only of dense models that are not quantised")
    size = sum(weight.nbytes for weight in model.parameters()) - saved_bytes(model, kind)
    if short := cost.shortage(size, str(subject.device)):
        return skipped(f"a quantised copy {short}")
    noise = subject.logits_noise.mean
    grown = noise / torch.finfo(subject.dtype).eps
    if grown > CHAOTIC:
        return skipped(f"not comparable: these layers make a rounding {grown:.0f} times as large")
    plain = subject.encode(subject.asking(1.0), [subject.video])
    answer = plain.ask(QUESTION, max_new_tokens=NEW_TOKENS)
    answer.text  # which generates it # noqa: B018
    ids = (*answer.ids, 0)  # only what comes before the last is read
    small = shared(model)
    quantize(small, kind, calibrate)
    qa = VideoQA(replace(subject.loaded, model=small, quantize=kind), budget=1.0, method="none")
    exact, rounded = (side.read_along(QUESTION, ids)[0] for side in (plain, subject.encode(qa, [subject.video])))
    logs = exact.log_softmax(-1)
    kl = float((logs.exp() * (logs - rounded.log_softmax(-1))).sum(1).mean())
    error = gap(rounded, exact, centred=True).mean
    same = int((rounded.argmax(1) == exact.argmax(1)).sum())
    says = f"mean KL {kl:.2g} nats, {same} of {len(ids)} first choices the same, error of logits {error:.1e}"
    times = 1 if generate.can_crop(model) else RECURRENT
    max_error = times * ERRORS[kind] + GROWTH * noise
    return judged(says, {"kl": (kl, times * KL[kind]), "mean_error": (error, max_error)})


int8 = partial(_bits, "int8")
int4 = partial(_bits, "int4")


ROUNDS = 3
# How often the program may wait from the first patches to the first token of a video, outside of selections, which wait as often
# as their content has it. Once for the counts of changed units, once for the checks and the tokens that are kept, and twice for the
# first token: whether its logits are numbers, and which is the largest (docs/gpu.md).
WAITS = 4


def first_token(subject: Subject) -> Outcome:
    """Medians of encode and prefill in turns, in seconds: evoprune at the usual budget, and transformers; and their ratio."""
    loaded = subject.loaded
    config = PruneConfig.of(BUDGET, "evoprune")
    (whole,) = subject.about(subject.video).plans
    case = Case(SAMPLING.frames, whole.height, whole.width)
    clip = prepare(loaded, *synthetic_frames("motion", case, loaded.video.unit))
    plan = config.plan(tower_shape(loaded.model.model.visual), clip.grid)
    rounds = []
    for _ in range(ROUNDS + 1):
        turns = (
            run_hugging_face(loaded, subject.transformers, clip, 1),
            run_evoprune(loaded, clip, plan, config, 1),
        )
        rounds.append([turn.sample.first_token for turn in turns])
    theirs, ours = map(median, zip(*rounds[1:], strict=True))  # the first round warms up
    figures = {"transformers_s": theirs, "evoprune_s": ours, "ratio": median(a / b for a, b in rounds[1:])}
    both = f"{ours:.2f} s, transformers {theirs:.2f} s: {figures['ratio']:.1f} times as fast"
    return Outcome(HELD, f"first token {both} (weights are not packed here)", figures)


def kernels(subject: Subject) -> Outcome:
    """Return what computes attention in the tower and in the language model, and products."""
    device = subject.device
    dtype = subject.dtype
    text = subject.loaded.model.config.text_config
    heads = text.num_attention_heads
    q = torch.empty(1, heads, 8, text.hidden_size // heads, dtype=dtype, device=device)
    tower = _sdpa(q, attn_mask=q.new_zeros(8, 8))
    language = _sdpa(q, is_causal=True)
    if is_host(device):
        capability = torch.backends.cpu.get_cpu_capability()
        products = f"oneDNN, {capability}" if torch.backends.mkldnn.is_available() else capability
        products += ", packed" if can_pack(subject.loaded.model.lm_head.weight) else ", plain"
        if dtype == torch.bfloat16:
            tower = "products"
    else:
        products = f"torch's for {device.type}, fp32 with {torch.get_float32_matmul_precision()} precision"
        if varlen_kernel(device, dtype):
            tower = "varlen"
    return Outcome(HELD, f"attention: tower {tower}, language model {language}; products: {products}")


def _sdpa(q: torch.Tensor, **kwargs) -> str:
    """Return the kernel that torch takes for attention, where the device says it."""
    try:
        return f"sdpa ({SDPBackend(torch._fused_sdp_choice(q, q, q, **kwargs)).name.lower()})"
    except (AttributeError, RuntimeError, ValueError):
        return "sdpa"


def memory(subject: Subject) -> Outcome:
    """Return the most memory that a question takes beside the weights, against the estimate by which questions are refused."""
    qa = subject.asking()
    device = subject.loaded.device
    if not reset_peak_memory(device):
        return skipped("this system cannot measure it for a part of a run")
    (plan,) = subject.plans(qa.session, [subject.video])
    piece_units = fitting_pieces(qa.session, plan)[0]
    encoder = plan.encoder
    prompt = qa.session.prompt_columns(encoder.keep, TEXT)
    config = subject.loaded.model.config
    estimate = encoding_bytes(config, encoder, piece_units, subject.dtype.itemsize, prompt)
    before = counted_memory(device)
    subject.encode(qa, [subject.video]).read_along(QUESTION, [0])
    peak = peak_memory(device) - before
    return judged(f"{size(max(0, peak))} beside the weights, estimated {size(estimate)}", {"bytes": (peak, estimate)})


def waits(subject: Subject) -> Outcome:
    """Return how often the program waits for the device from the start of encoding to the first token.

    Of a language model that transformers runs, to the end of encoding: how often that one waits is not ours.
    """
    if is_host(subject.device):
        return skipped("reading a value of a CPU waits for nothing")
    qa = subject.asking()
    for _ in range(2):  # the first time makes what is kept for later
        with Waiting() as mode:
            encoded = subject.encode(qa, [subject.video])
            if subject.loaded.model.native:
                encoded.ask(QUESTION, max_new_tokens=1).text  # noqa: B018
    times = len(mode.outside)
    inside = len(mode.places) - len(mode.outside)
    return judged(f"{times} times, and {inside} times in selections", {"waits": (times, WAITS)})


GRID = (6, 9, 13)
ROWS = 500
WIDTH = 128
SAME = 0.99  # share of units that two forms of a selection have alike: where sums round otherwise, near ties may turn


def accelerated(subject: Subject) -> Outcome:
    """Return each against its plain form; says the first that differs.

    Skipped where all hold but tokens are decoded without a graph.
    """
    if not uses_kernels(subject.device):
        return skipped("kernels and graphs are for CUDA, and EVOPRUNE_PLAIN switches them off")
    figures: dict[str, tuple[float, float]] = {}
    for name, share in _selections(subject.device).items():
        figures[f"{name}_unlike"] = (1 - share, 1 - SAME)
    with plain_pytorch():
        expected = subject.encode(subject.asking(1.0), [subject.video]).encoded.every_feature
    actual = subject.encode(subject.asking(1.0), [subject.video]).encoded.every_feature
    features = gap(actual, expected)
    figures |= {f"tower_{name}": limit for name, limit in features.limits(subject.features_noise).items()}
    said = f"tower {features}"
    decoded = _decoded(subject)
    if not isinstance(decoded, str):
        logits = gap(*decoded, centred=True)
        figures |= {f"decoding_{name}": limit for name, limit in logits.limits(subject.logits_noise, 2).items()}
        said += f"; decoding {logits}"
    outcome = judged(said, figures)
    if outcome.state == DIFFERS:
        return Outcome(DIFFERS, f"{outcome.says}; EVOPRUNE_PLAIN=1 does without kernels and graphs", outcome.figures)
    if isinstance(decoded, str):
        return Outcome(SKIPPED, f"no graph: {decoded}; {outcome.says}", outcome.figures)
    return outcome


def _selections(device: torch.device) -> dict[str, float]:
    """Return the share of equal values of the operators of selection and reuse, by name."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(device)

    place = drawn(ROWS, WIDTH) * (STEPS / WIDTH) ** 0.5
    salience = drawn(ROWS).abs().clamp(max=1)
    units = GRID[0] * GRID[1] * GRID[2]
    row = torch.randint(ROWS, (units,), generator=random, dtype=torch.int64, device="cpu").to(device)
    time, _, tubes = grid_tables(GRID, str(device))
    half = place.square().sum(1) / 2
    weight = STEPS * salience**2
    first = (salience * STEPS / 2).round()
    means = (drawn(GRID[0], 117, 96) * 20 + 128).clamp(0, 255)
    means[1::2, 30:] = means[:-1:2, 30:]

    def outputs() -> dict[str, torch.Tensor]:
        radii = operators.tube_radii(place, half, weight, first, row, time, tubes, units)
        kept = radii.topk(units // 4).indices.sort().values
        scanned = reuse_scan(means, means[0], torch.zeros_like(row[:117]), False, 0, 8.0)[0]
        of = operators.nearest_selected(place, half, weight, row, time, selected)
        averages = operators.mean_rows(place, of, row, torch.ones_like(time), len(selected))
        mask = torch.zeros_like(row, dtype=torch.bool).index_fill_(0, kept, True)
        return {"selection": mask, "clusters": of, "reuse": scanned, "means": averages.round(decimals=2)}

    selected = torch.arange(0, units, 4, dtype=torch.int64, device=device)
    actual = outputs()
    with plain_pytorch():
        expected = outputs()
    return {name: float((actual[name] == expected[name]).float().mean()) for name in actual}


@torch.inference_mode()
def _decoded(subject: Subject) -> tuple[torch.Tensor, torch.Tensor] | str:
    """Logits along an answer `[n, vocabulary]`: from steps in a graph, and from plain decoding. Or why there is no graph."""
    if capture_on(subject.device) is None:
        return "this device has none"
    if not static.can_step(subject.loaded.model):
        return "layers have hooks, quantised weights, or experts that are chosen on the host"
    model = subject.loaded.model
    encoded = subject.encode(subject.asking(1.0), [subject.video])
    answer = encoded.ask("What happens?", max_new_tokens=NEW_TOKENS)
    answer.text  # which generates it  # noqa: B018
    embeds = generate.embed_ids(model, torch.arange(64, dtype=torch.int64, device="cpu"))
    positions = torch.arange(64, dtype=torch.int64, device="cpu").expand(3, -1)
    with plain_pytorch():
        state = generate.prefill(model, embeds, positions, 64)
        ids = torch.tensor([*(answer.ids or [0]), 0], dtype=torch.int64, device="cpu")
        plain = generate.teacher_forced_logits(state, ids, one_by_one=True)[1:]
    state = generate.prefill(model, embeds, positions, 64)
    steps = static.new_cache(model, static.MIN_COLUMNS)
    holder = object()
    decoded = []
    steps.begin(holder, state.cache, 64, static.MIN_COLUMNS)
    try:
        for token in ids[:-1].tolist():
            steps.following(model, holder, token, lambda logits, best: decoded.append(logits.clone()) or 0)
    except Exception as problem:  # of a capture, after which tokens are decoded plainly
        if is_out_of_memory(problem):
            raise
        return first_line(problem)
    return torch.stack(decoded), plain
