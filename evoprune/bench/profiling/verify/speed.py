"""What is measured: time to the first token beside transformers', kernels, memory, and how often the program waits."""

from statistics import median

import torch
from torch.nn.attention import SDPBackend

from evoprune.backend.attention import varlen_kernel
from evoprune.backend.devices import exact_shapes, is_host, memory_in_use, peak_memory, reset_peak_memory
from evoprune.bench.profiling.clips import prepare, synthetic_frames
from evoprune.bench.profiling.results import Case
from evoprune.bench.profiling.runners import run_evoprune, run_hugging_face
from evoprune.bench.profiling.verify.outcome import HELD, Outcome, judged, skipped
from evoprune.bench.profiling.verify.subject import BUDGET, QUESTION, SAMPLING, Subject
from evoprune.bench.profiling.verify.waiting import Waiting
from evoprune.cpu.linear import can_pack
from evoprune.methods import parse
from evoprune.methods.plans import keep_count
from evoprune.session.planning import TEXT, encoding_bytes, fitting_chunk
from evoprune.text import size
from evoprune.vision.tower import tower_shape

ROUNDS = 3
# How often the program may wait from the first patches to the first token of a video, outside of selections, which wait as often
# as their content has it. Once for the counts of changed units, once for the checks and the tokens that are kept, and twice for the
# first token: whether its logits are numbers, and which is the largest (docs/gpu.md).
WAITS = 4


def first_token(subject: Subject) -> Outcome:
    """Medians of encode and prefill in turns, in seconds: evoprune at the usual budget, and transformers; and their ratio."""
    loaded, method = subject.loaded, parse("evoprune")
    (plan,) = subject.about(subject.video).plans
    case = Case(SAMPLING.frames, plan.height, plan.width)
    clip = prepare(loaded, *synthetic_frames("motion", case, loaded.video.unit))
    pruned = method.plan(tower_shape(loaded.model.model.visual), clip.grid, keep_count(BUDGET, clip.units))
    rounds = []
    for _ in range(ROUNDS + 1):
        turns = (
            run_hugging_face(loaded, subject.transformers, clip, 1),
            run_evoprune(loaded, clip, pruned, method, BUDGET, 1, 0),
        )
        rounds.append([turn.sample.first_token for turn in turns])
    theirs, ours = map(median, zip(*rounds[1:], strict=True))  # the first round warms up
    figures = {"transformers_s": theirs, "evoprune_s": ours, "ratio": median(a / b for a, b in rounds[1:])}
    both = f"{ours:.2f} s, transformers {theirs:.2f} s: {figures['ratio']:.1f} times as fast"
    return Outcome(HELD, f"first token {both} (weights are not packed here)", figures)


def kernels(subject: Subject) -> Outcome:
    """What computes attention in the tower and in the language model, and products."""
    device, dtype, text = subject.device, subject.dtype, subject.loaded.model.config.text_config
    heads = text.num_attention_heads
    q = torch.empty(1, heads, 8, text.hidden_size // heads, dtype=dtype, device=device)
    tower, language = _sdpa(q, attn_mask=q.new_zeros(8, 8)), _sdpa(q, is_causal=True)
    if is_host(device):
        capability = torch.backends.cpu.get_cpu_capability()
        products = f"oneDNN, {capability}" if torch.backends.mkldnn.is_available() else capability
        products += ", packed" if can_pack(subject.loaded.model.lm_head.weight) else ", plain"
        tower = "products" if dtype == torch.bfloat16 else tower
    else:
        products = f"torch's for {device.type}, fp32 with {torch.get_float32_matmul_precision()} precision"
        tower = "varlen" if varlen_kernel(device, dtype) else tower
    return Outcome(HELD, f"attention: tower {tower}, language model {language}; products: {products}")


def _sdpa(q: torch.Tensor, **how) -> str:
    """The kernel that torch takes for attention, where the device says it."""
    try:
        return f"sdpa ({SDPBackend(torch._fused_sdp_choice(q, q, q, **how)).name.lower()})"
    except (AttributeError, RuntimeError, ValueError):
        return "sdpa"


def memory(subject: Subject) -> Outcome:
    """The most memory that a question takes beside the weights, against the estimate by which questions are refused."""
    qa, device = subject.asking(), subject.loaded.device
    if not reset_peak_memory(device):
        return skipped("this system cannot measure it for a part of a run")
    (plan,) = subject.plans(qa.engine, [subject.video])
    chunk_units, encoder = fitting_chunk(qa.engine, plan), plan.encoder
    prompt = qa.engine.prompt_columns(encoder.keep, TEXT)
    config = subject.loaded.model.config
    estimate = encoding_bytes(config, encoder, chunk_units, subject.dtype.itemsize, prompt)
    on_cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated(device) if on_cuda else sum(memory_in_use(device))  # as `peak_memory` counts
    subject.encode(qa, [subject.video]).read_along(QUESTION, [0])
    peak = peak_memory(device) - before
    return judged(f"{size(max(0, peak))} beside the weights, estimated {size(estimate)}", {"bytes": (peak, estimate)})


def waits(subject: Subject) -> Outcome:
    """How often the program waits for the device from the start of encoding to the first token."""
    if exact_shapes(subject.device):
        return skipped("reading a value of a CPU waits for nothing")
    qa = subject.asking()
    for _ in range(2):  # the first time makes what is kept for later
        with Waiting() as mode:
            subject.encode(qa, [subject.video]).ask(QUESTION, max_new_tokens=1).text  # noqa: B018
    times, inside = len(mode.outside), len(mode.places) - len(mode.outside)
    return judged(f"{times} times, and {inside} times in selections", {"waits": (times, WAITS)})
