"""Checks below a budget of 1.0: counts, what must not depend on chunks or threads, every method, reuse, transformers' model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from evoprune.backend.devices import is_host
from evoprune.backend.layers import unjoined
from evoprune.bench.profiling.verify.outcome import DIFFERS, HELD, Outcome, gap, judged, skipped
from evoprune.bench.profiling.verify.subject import BUDGET, NEW_TOKENS, QUESTION, SHORT, Subject
from evoprune.cpu.quantize import kinds, quantize, saved_bytes
from evoprune.errors import UsageError
from evoprune.hf.context import EvoPrune
from evoprune.methods.registry import built_in
from evoprune.model import cost
from evoprune.model.config import PATCHES
from evoprune.model.weights import shared
from evoprune.session.answering import EncodedInputs
from evoprune.session.loading.calibration import calibrate
from evoprune.text import counted
from evoprune.video_qa import VideoQA

# Share of the tokens that 16 bits may select otherwise: units that are nearly alike round to the same distance.
FLIPS = 0.1
# What 8 and 4 bits may cost: mean KL in nats a token, of which 0.001 was measured with 8 bits (results/int8.md); and the error of
# logits, which finds a fault where all words are about as likely: five and three times what small models have, and besides ten
# times what the dtype's own rounding grows to in the layers of this model.
KL, ERRORS, GROWTH = {"int8": 0.05, "int4": 0.5}, {"int8": 0.1, "int4": 0.3}, 10
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
            encoded = subject.encode(subject.asking(budget, "evoprune:reuse=0"), [subject.video])
        plan, made = encoded.plan.encoder, encoded.encoded
        tokens = ("tokens", len(made.kept), plan.keep), ("features", len(made.features), plan.keep)
        layers = enumerate(zip(rows, plan.layers, strict=True))
        for what, entered, planned in (*((f"rows in layer {i}", *pair) for i, pair in layers), *tokens):
            if entered != planned:
                says = f"{entered} {what} at {budget:g}, expected {planned}"
                return Outcome(DIFFERS, says, {"count": entered, "count_limit": planned})
        said.append(f"{plan.units} units, {plan.rows} rows, {plan.keep} tokens at {budget:g}")
    return Outcome(HELD, "; ".join(said))


def chunks(subject: Subject) -> Outcome:
    """The same tokens from chunks of one frame pair."""
    qa = subject.asking()
    usual, small = (subject.encode(qa, [subject.video], chunk_units=units) for units in (None, 1))
    return _same(subject, usual, small)


def threads(subject: Subject) -> Outcome:
    if not is_host(subject.device):
        return skipped("a CPU's matter")
    before, qa = torch.get_num_threads(), subject.asking()
    usual = subject.encode(qa, [subject.video])
    usual.read_along(QUESTION, [0])
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        return _same(subject, usual, subject.encode(qa, [subject.video]))
    finally:
        torch.set_num_threads(before)


def _same(subject: Subject, one: EncodedInputs, other: EncodedInputs) -> Outcome:
    """Whether two encodings have the same tokens and lead to the same logits."""
    kept, again = ({*each.encoded.kept.tolist()} for each in (one, other))
    flips = len(kept - again) / len(kept)
    limits = {"tokens_selected_otherwise": (flips, FLIPS if subject.dtype.itemsize == 2 else 0.0)}
    found = gap(*(each.read_along(QUESTION, [0])[0] for each in (other, one)), centred=True)
    if not flips:
        limits |= found.limits(subject.logits_noise, 2)
    other_ones = f", {flips:.0%} of them other ones" if flips else ""
    return judged(f"{counted(len(kept), 'token')}{other_ones}; logits: {found}", limits)


def every_method(subject: Subject) -> Outcome:
    """Each method on a short clip, twice: as many tokens as planned, no NaN, and the same tokens again."""
    ran, left, every = [], "", (*built_in(), *COMBINED)
    for name in every:
        if ran and subject.limit.left <= 0:
            left = f" of {len(every)}, until the time limit was over"
            break
        try:
            qa = subject.asking(method=name)
            first, second = (subject.encode(qa, [subject.video], SHORT) for _ in range(2))
            found = first.read_along(QUESTION, [0])[0], second.read_along(QUESTION, [0])[0]
        except UsageError:
            if name != "operations":
                raise
            left = " (operations needs a recipe)"
            continue
        ran.append(name)
        plan, kept = first.plan.encoder, first.encoded.kept.tolist()
        if qa.engine.pruning.method.exact and not qa.engine.pruning.method.language and len(kept) != plan.keep:
            return Outcome(DIFFERS, f"{name}: {len(kept)} tokens, expected {plan.keep}")
        if not all(each.isfinite().all() for each in found) or second.encoded.kept.tolist() != kept:
            return Outcome(DIFFERS, f"{name}: NaN, or other tokens the second time")
    return Outcome(HELD, f"{counted(len(ran), 'method')}{left}, each twice", {"methods": len(ran)})


def reuse(subject: Subject) -> Outcome:
    """A clip that stands still: reuse encodes one frame pair, and its tokens are those of encoding every one."""
    plain, reusing = (
        subject.encode(subject.asking(method=name), [subject.still]) for name in ("random", "reuse+random")
    )
    pairs, rows = plain.plan.grid[0], len(reusing.encoded.rows)
    if rows * pairs != plain.plan.units:
        return Outcome(DIFFERS, f"{rows} rows are encoded, expected {plain.plan.units // pairs}", {"rows": rows})
    found = gap(reusing.encoded.every_feature, plain.encoded.every_feature)
    return judged(f"{rows} of {plain.plan.units} units encoded; {found}", found.limits(subject.features_noise))


def transformers_model(subject: Subject) -> Outcome:
    """Logits of a pruned prompt from transformers' language model, and from ours.

    Both towers compute with weights as they are: products with joined ones round otherwise, and a selection depends on that.
    """
    try:
        pruning = EvoPrune(budget=BUDGET, positions="qwen")(subject.transformers)
    except UsageError as older:  # Qwen3-VL in an older transformers
        return skipped(older.message)
    with unjoined():
        ours = subject.encode(subject.asking(), [subject.video]).read_along(QUESTION, [0])[0]
    with pruning:
        theirs = subject.last_logits(subject.about(subject.video).call)
    found = gap(ours, theirs, centred=True)
    says = f"{found}; rounding alone {subject.logits_noise.mean:.1e}"
    return judged(says, found.limits(subject.logits_noise, 2))


def _bits(kind: str, subject: Subject) -> Outcome:
    """How far the answer of the model as it is leads a quantised one astray."""
    if kind not in kinds(subject.device):
        return skipped("not on this device")
    model = subject.loaded.model
    size = sum(weight.nbytes for weight in model.parameters()) - saved_bytes(model, kind)
    if short := cost.shortage(size, str(subject.device)):
        return skipped(f"a quantised copy {short}")
    plain = subject.encode(subject.asking(1.0), [subject.video])
    answer = plain.ask(QUESTION, max_new_tokens=NEW_TOKENS)
    answer.text  # which generates it # noqa: B018
    ids = (*answer.ids, 0)  # only what comes before the last is read
    small = shared(model)
    quantize(small, kind, calibrate)
    qa = VideoQA(replace(subject.loaded, model=small, quantize=kind), budget=1.0, method="none")
    exact, made = (each.read_along(QUESTION, ids)[0] for each in (plain, subject.encode(qa, [subject.video])))
    logs = exact.log_softmax(-1)
    kl = float((logs.exp() * (logs - made.log_softmax(-1))).sum(1).mean())
    error, same = gap(made, exact, centred=True).mean, int((made.argmax(1) == exact.argmax(1)).sum())
    says = f"mean KL {kl:.2g} nats, {same} of {len(ids)} first choices the same, error of logits {error:.1e}"
    most = ERRORS[kind] + GROWTH * subject.logits_noise.mean
    return judged(says, {"kl": (kl, KL[kind]), "mean_error": (error, most)})


int8, int4 = partial(_bits, "int8"), partial(_bits, "int4")
