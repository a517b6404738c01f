"""Reports of the pipeline: what was looked at, what was kept, how long each stage took."""

from collections.abc import Sequence
from dataclasses import fields

from evoprune.backend.devices import environment, memory_in_use, peak_memory
from evoprune.methods.base import Reading
from evoprune.report.records import InputFacts, InputTimes, Memory, Pruning, Rate, Report, Sampling, VideoFacts
from evoprune.session.encoding import Encoding
from evoprune.session.engine import Engine
from evoprune.video.plan import STILL, Plan

FLAT = "equal_scores"


def inputs_report(engine: Engine, encodings: Sequence[Encoding]) -> Report:
    """The report of inputs that were encoded, without the times of their stages."""
    loaded = engine.loaded
    states = {encoding.cache for encoding in encodings}
    report = Report(
        memory=Memory(weights_bytes=loaded.weights_bytes),
        model=loaded.facts(),
        env=environment(loaded.device),
        inputs=[_input_facts(engine, encoding) for encoding in encodings],
        cache=next(state for state in ("miss", "off", "hit") if state in states),  # "hit" if all are from the disk
    )
    if len(report.inputs) == 1:
        only = report.inputs[0]
        report.video, report.sampling, report.subtitles = only.video, only.sampling, only.subtitles
    report.pruning = _pruning(engine, encodings)
    fill_kept(report, encodings)
    report.time_ms.load = None if engine.load_seconds is None else engine.load_seconds * 1000
    for part, spent in loaded.load_seconds.items():
        setattr(report.time_ms, f"load_{part}", spent * 1000)
    report.time_ms.encode_prune = sum(encoding.tokens.prune_seconds for encoding in encodings) * 1000
    report.warnings = list(dict.fromkeys(name for each in report.inputs for name in each.warnings if name != FLAT))
    if not all(loaded.knows(encoding.plan.info) for encoding in encodings):
        report.warnings.append("demo_model")
    elif loaded.demo and (len(encodings) > loaded.demo.inputs or any(each.subtitles for each in report.inputs)):
        report.warnings.append("demo_inputs")
    if loaded.load_format == "dummy":
        report.warnings.append("random_weights")
    if all(encoding.tokens.flat for encoding in encodings):
        report.warnings.append(FLAT)
    return report


def _input_facts(engine: Engine, encoding: Encoding) -> InputFacts:
    plan, tokens = encoding.plan, encoding.tokens
    facts = {"path": plan.name, "decoder": plan.decoder, "damaged": encoding.damaged}
    known = {each.name: getattr(plan.info, each.name) for each in fields(VideoFacts) if each.name not in facts}
    times = {stage: spent * 1000 for stage, spent in encoding.seconds.items()}
    return InputFacts(
        path=plan.name,
        kind=plan.kind,
        video=VideoFacts(**known, **facts),
        sampling=_sampling(engine, plan),
        pruning=_pruning(engine, [encoding]),
        time_ms=InputTimes(**times, encode_prune=tokens.prune_seconds * 1000),
        cache=encoding.cache,
        subtitles=plan.subtitles.record(),
        warnings=[*encoding.warnings, *plan.subtitles.warnings, *([FLAT] if tokens.flat else [])],
    )


def fill_times(report: Report, seconds: dict[str, float], total: float, device: str, late_packing: float = 0.0) -> None:
    """Writes the busy seconds of each stage and in all, and what follows from them; the rate leaves out `late_packing`."""
    times = report.time_ms
    for stage, spent in seconds.items():
        setattr(times, stage, spent * 1000)
    times.total = total * 1000
    times.ttft_model = None if times.prefill is None else times.encode + times.prefill
    # Prefill gives the first token; the rate is that of the passes after it.
    passes = max(0, (report.tokens.new or 0) - 1)
    generating = seconds.get("generate", 0.0) - late_packing
    report.rate = Rate(passes / generating if passes and generating > 0 else None)
    report.memory.peak_bytes = peak_memory(device)
    report.memory.own_bytes, report.memory.mapped_bytes = memory_in_use(device)


def fill_kept(report: Report, encodings: Sequence[Encoding]) -> None:
    """Writes into a report what the language model reads of the inputs."""
    whole = report.pruning, encodings
    each = [(facts.pruning, [encoding]) for facts, encoding in zip(report.inputs, encodings, strict=True)]
    for pruning, some in [whole, *each]:
        pruning.visual_tokens_kept = sum(len(one.tokens.kept) for one in some)
        pruning.kept_ratio = pruning.visual_tokens_kept / sum(one.plan.units for one in some)
        pruning.kept_per_pair = [count for one in some for count in one.tokens.kept_per_pair]


def fill_dropped(report: Report, dropping: Reading | None) -> None:
    """Writes into a report what left inside the language model, if anything could; synchronises."""
    if dropping is not None:
        report.pruning.language_layers = [list(layer) for layer in enumerate(dropping.layers)]
        work = dropping.work and [[layer, *counts] for layer, counts in enumerate(dropping.work)]
        report.pruning.language_work = work
        report.time_ms.prefill_prune = dropping.timer.seconds() * 1000


def _sampling(engine: Engine, plan: Plan) -> Sampling:
    video = engine.loaded.video
    t, h, w = plan.grid
    found = Sampling(
        frames=plan.sampling.frames,
        resized_hw=[plan.height, plan.width],
        grid_thw=[t, h * video.merge_size, w * video.merge_size],
    )
    if plan.sampling is not STILL:
        found.start_s, found.end_s = plan.sampling.start_s, plan.sampling.end_s
        found.timestamps_s = list(plan.sampling.times_s)
        found.seconds_per_pair = plan.sampling.seconds_per_pair(video.temporal_patch_size)
    return found


def _pruning(engine: Engine, encodings: Sequence[Encoding]) -> Pruning:
    """The pruning of some inputs together; `fill_kept` adds what is kept."""
    units, read = sum(encoding.plan.units for encoding in encodings), [encoding.tokens for encoding in encodings]
    layers = zip(*(each.layers for each in read), strict=True)
    return Pruning(
        method=engine.options.method,
        args=engine.method.args,
        budget=engine.reported_budget,
        visual_tokens_in=units,
        encoder_rows=sum(len(each.rows) for each in read),
        encoder_live_share=sum(each.live_share * len(each.owner) for each in read) / units,
        layers=[[same[0][0], sum(rows for _, rows in same)] for same in layers],
        positions="qwen",
    )
