"""What is measured: time to the first token beside transformers', kernels, memory, and how often the program waits."""

from statistics import median

import torch

from evoprune.methods import parse
from evoprune.model.device import reading_waits
from evoprune.model.linear import can_pack
from evoprune.model.machine import memory_in_use, peak_memory, reset_peak_memory
from evoprune.pipeline.planning import TEXT, encoding_bytes, fitting_chunk
from evoprune.profiling.clips import prepare, synthetic_frames
from evoprune.profiling.results import Case
from evoprune.profiling.runners import Turn, run_evoprune, run_hugging_face
from evoprune.profiling.verify.outcome import Outcome, judged, skipped
from evoprune.profiling.verify.subject import BUDGET, QUESTION, SAMPLING, Subject
from evoprune.profiling.verify.waiting import Waiting
from evoprune.pruning.budget import keep_count
from evoprune.text import size
from evoprune.vision.attention import varlen_kernel
from evoprune.vision.tower import tower_shape

ROUNDS = 3
# How often the program may wait from the first patches to the first token of a video, outside of selections, which wait as often
# as their content has it. Twice before the rows are selected, once for the groups of those, once for the checks at the end of the
# tower, once for the tokens that are kept, and once for the logits (docs/gpu.md).
WAITS = 6


def first_token(subject: Subject) -> dict[str, float]:
    """Medians of encode and prefill in turns, in seconds: `evoprune` at the usual budget, and `transformers`; and their ratio."""
    loaded, method = subject.loaded, parse("evoprune")
    (plan,) = subject.plans(subject.asking(1.0).engine, [subject.video])
    case = Case(SAMPLING.frames, plan.height, plan.width)
    clip = prepare(loaded, *synthetic_frames("motion", case, loaded.video.unit))
    pruned = method.plan(tower_shape(loaded.model.model.visual), clip.grid, keep_count(BUDGET, clip.units))
    turns: list[tuple[Turn, Turn]] = []
    for _ in range(ROUNDS + 1):
        theirs = run_hugging_face(loaded, subject.transformers, clip, 1)
        turns.append((theirs, run_evoprune(loaded, clip, pruned, method, BUDGET, 1, 0)))
    each = [[turn.sample.encode + turn.sample.prefill for turn in both] for both in turns[1:]]
    theirs, ours = (median(column) for column in zip(*each, strict=True))
    return {"transformers_s": theirs, "evoprune_s": ours, "ratio": median(a / b for a, b in each)}


def kernels(subject: Subject) -> dict[str, str]:
    """What computes attention and products here."""
    device, dtype = subject.device, subject.dtype
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        products = f"oneDNN, {capability}" if torch.backends.mkldnn.is_available() else capability
        return {
            "attention": "sdpa",
            "products": f"{products}, {'packed' if can_pack(subject.loaded.model.lm_head.weight) else 'plain'}",
        }
    attention = "varlen" if varlen_kernel(device, dtype) else "sdpa"
    return {"attention": attention, "products": f"torch's for {device.type}"}


def memory(subject: Subject) -> Outcome:
    """The most memory that a question takes beside the weights, against the estimate by which questions are refused."""
    qa, device = subject.asking(), subject.loaded.device
    if not reset_peak_memory(device):
        return skipped("this system cannot measure it for a part of a run")
    (plan,) = subject.plans(qa.engine, [subject.video])
    chunk_units, encoder = fitting_chunk(qa.engine, plan), plan.encoder
    prompt = qa.engine.prompt_columns(encoder.keep, TEXT)
    model = subject.loaded.model
    estimate = encoding_bytes(model.config, encoder, chunk_units, model.dtype.itemsize, prompt)
    before = _in_use(device)
    subject.encode(qa, [subject.video]).read_along(QUESTION, [0])
    peak = peak_memory(device) - before
    return judged(f"{size(max(0, peak))} beside the weights, estimated {size(estimate)}", {"bytes": (peak, estimate)})


def _in_use(device: str) -> int:
    """Bytes now, as `peak_memory` counts them."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return sum(memory_in_use(device))


def waits(subject: Subject) -> Outcome:
    """How often the program waits for the device from the start of encoding to the first token."""
    if not reading_waits(subject.device):
        return skipped("reading a value of a CPU waits for nothing")
    qa = subject.asking()
    subject.encode(qa, [subject.video]).read_along(QUESTION, [0])
    with Waiting() as mode:
        subject.encode(qa, [subject.video]).read_along(QUESTION, [0])
    times, inside = len(mode.outside), len(mode.places) - len(mode.outside)
    return judged(f"{times} times, and {inside} times in selections", {"waits": (times, WAITS)})
