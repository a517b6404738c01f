"""Fill in the reports that accompany answers, with facts about the inputs, their pruning, and the time spent in each stage.

`pruning_facts` is also used for models pruned through `evoprune.hf`.
"""

from collections.abc import Sequence
from dataclasses import fields
from math import prod
from typing import TYPE_CHECKING

from evoprune.backend import Device
from evoprune.methods import PruneConfig
from evoprune.report import EQUAL_SCORES, InputFacts, InputTimes, Memory, Pruning, Rate, Report, Sampling, VideoFacts
from evoprune.session.result import InputResult
from evoprune.session.session import Session
from evoprune.vision import Encoded

if TYPE_CHECKING:
    from evoprune.methods import Dropping


def pruning_facts(config: PruneConfig, units: int, read: Sequence[Encoded], positions: str) -> Pruning:
    """Summarize how one or more inputs were pruned. All counts are totals over all inputs.

    Args:
        units: Total number of visual units before pruning.
        read: The encoded inputs.
        positions: Which code computes the positions: "qwen" (evoprune) or "host" (the Hugging Face model).
    """
    layers = zip(*(tokens.layers for tokens in read), strict=True)
    kept = sum(len(tokens.kept) for tokens in read)
    below = max(tokens.after_tower_below for tokens in read)
    small = None
    if below:
        small = sum(prod(grid) < below for tokens in read for grid in tokens.grids)
    return Pruning(
        method=config.name,
        args=config.method.args,
        budget=config.budget.recorded,
        kept_ratio=kept / units,
        visual_tokens_in=units,
        visual_tokens_kept=kept,
        encoder_rows=sum(len(tokens.rows) for tokens in read),
        encoder_live_share=sum(tokens.live_share * len(tokens.unit_to_row) for tokens in read) / units,
        layers=[[same[0][0], sum(rows for _, rows in same)] for same in layers],
        kept_per_pair=[count for tokens in read for count in tokens.kept_per_pair],
        positions=positions,
        after_tower_below=below or None,
        after_tower_inputs=small,
    )


def inputs_report(session: Session, encodings: Sequence[InputResult]) -> Report:
    """Return a report about encoded inputs, excluding the total stage times added by `fill_times`."""
    loaded = session.loaded
    states = {encoding.cache for encoding in encodings}
    report = Report(
        memory=Memory(weights_bytes=loaded.weights_bytes),
        model=loaded.facts(),
        env=Device(loaded.device).environment(),
        inputs=[_input_facts(session, encoding) for encoding in encodings],
        # Report a "hit" only if all inputs were cache hits.
        cache=next(state for state in ("miss", "off", "hit") if state in states),
    )
    if len(report.inputs) == 1:
        only = report.inputs[0]
        report.video = only.video
        report.sampling = only.sampling
        report.subtitles = only.subtitles
    fill_pruning(report, session, encodings)
    report.time_ms.load = None if session.load_seconds is None else session.load_seconds * 1000
    report.time_ms.startup = None if session.startup_seconds is None else session.startup_seconds * 1000
    for part, spent in loaded.load_seconds.items():
        setattr(report.time_ms, f"load_{part}", spent * 1000)
    report.time_ms.encode_prune = sum(encoding.encoded.prune_seconds for encoding in encodings) * 1000
    report.warnings = list(
        dict.fromkeys(name for facts in report.inputs for name in facts.warnings if name != EQUAL_SCORES)
    )
    subtitles = any(facts.subtitles for facts in report.inputs)
    if doubt := loaded.doubt([encoding.plan.info for encoding in encodings], subtitles):
        report.warnings.append(doubt)
    if loaded.description.random:
        report.warnings.append("random_weights")
    if loaded.not_stored:
        report.warnings.append("weights_not_stored")
    if all(encoding.encoded.flat for encoding in encodings):
        report.warnings.append(EQUAL_SCORES)
    return report


def _input_facts(session: Session, encoding: InputResult) -> InputFacts:
    """Return the facts about a single input, excluding the pruning facts added by `fill_pruning`."""
    plan = encoding.plan
    tokens = encoding.encoded
    merge = session.loaded.video.merge_size
    own = ("path", "decoder", "damaged")
    known = {f.name: getattr(plan.info, f.name) for f in fields(VideoFacts) if f.name not in own}
    times = {stage: spent * 1000 for stage, spent in encoding.seconds.items()}
    count, height, width = plan.grid
    grid = [count, height * merge, width * merge]
    sampling = Sampling(frames=plan.sampling.frames, resized_hw=[plan.height, plan.width], grid_thw=grid)
    if not plan.is_picture:
        sampling.start_s = plan.sampling.start_s
        sampling.end_s = plan.sampling.end_s
        sampling.timestamps_s = list(plan.sampling.times_s)
        sampling.seek = "keyframes" if plan.moved else "exact"
        sampling.read_s = list(plan.read_s)
        sampling.seconds_per_pair = plan.sampling.seconds_per_pair(session.loaded.video.temporal_patch_size)
    warnings = [*encoding.warnings, *plan.subtitles.warnings]
    if tokens.flat:
        warnings.append(EQUAL_SCORES)
    return InputFacts(
        path=plan.name,
        kind=plan.kind,
        video=VideoFacts(**known, path=plan.name, decoder=plan.decoder, damaged=encoding.damaged),
        sampling=sampling,
        time_ms=InputTimes(**times, encode_prune=tokens.prune_seconds * 1000),
        cache=encoding.cache,
        subtitles=plan.subtitles.record(),
        warnings=warnings,
    )


def fill_pruning(report: Report, session: Session, encodings: Sequence[InputResult]) -> None:
    """Add pruning facts to a report, both for each input and in total."""

    def pruning(group: Sequence[InputResult]) -> Pruning:
        units = sum(member.plan.units for member in group)
        return pruning_facts(session.pruning, units, [member.encoded for member in group], "qwen")

    report.pruning = pruning(encodings)
    for facts, encoding in zip(report.inputs, encodings, strict=True):
        facts.pruning = pruning([encoding])


def fill_times(report: Report, seconds: dict[str, float], total: float, device: str, late_packing: float = 0.0) -> None:
    """Add stage times, the total time, memory use, and the generation rate to a report.

    Args:
        seconds: The time spent in each stage, in seconds.
        total: The wall-clock time in seconds.
        device: The device to report memory use for.
        late_packing: The time spent packing weights during generation, in seconds, which is excluded from the generation rate.
    """
    times = report.time_ms
    for stage, spent in seconds.items():
        setattr(times, stage, spent * 1000)
    times.total = total * 1000
    times.ttft_model = None if times.prefill is None else times.encode + times.prefill
    # Prefill already produces the first token, so the generation rate includes only subsequent tokens.
    passes = max(0, (report.tokens.new or 0) - 1)
    generating = seconds.get("generate", 0.0) - late_packing
    rate = Rate()
    if passes and generating > 0:
        rate = Rate(passes / generating)
    report.rate = rate
    report.memory.peak_bytes = Device(device).peak_memory()
    report.memory.own_bytes, report.memory.mapped_bytes = Device(device).memory_in_use()


def fill_dropped(report: Report, dropping: "Dropping | None") -> None:
    """Add the number of visual tokens read by each language model layer to a report. This synchronizes the device.

    Does nothing if `dropping` is None, which means that no tokens are dropped inside the language model.
    """
    if dropping is not None:
        report.pruning.language_layers = [list(layer) for layer in enumerate(dropping.layers)]
        work = dropping.work and [[layer, *counts] for layer, counts in enumerate(dropping.work)]
        report.pruning.language_work = work
        report.time_ms.prefill_prune = dropping.timer.seconds() * 1000
