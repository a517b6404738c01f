"""Live video: a still camera, a change, a cut; questions between and during windows; a memory that is thinned."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import evoprune
from tests.contract.small import Held, demo, encoded, filmed, ground, runs
from tests.live.inside import latest_encoding, windows_in_memory
from tests.tiny import save_tiny

QUESTION, HAPPENS = "What colour is the square?", "What happens?"
DRAWN = {"temperature": 1.5, "seed": 5, "max_new_tokens": 8}


@functools.cache
def loaded(name: str):
    """Return a bundled model, or a tiny one of the family."""
    if name.startswith("demo"):
        return demo(name)
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny(folder, family=name)
        return evoprune.VideoQA.load(str(path), dtype="fp32", device="cpu").loaded


def watched(model: str, method: str, budget: float, seconds: int, window_s: float, **options) -> Held:
    """Watch a stream of two frames per second. Returns the encoded and kept units per window, and some answers."""
    held: Held = {}
    windows: list[Held] = []
    count = 0
    clip = filmed(2 * seconds)
    qa = evoprune.VideoQA(loaded(model), method=method, budget=budget)
    with qa.stream(fps=2, window_s=window_s, **options) as stream:
        for number, frame in enumerate(clip):
            stream.add(frame, number / 2)
            if stream.encoded != count:
                windows.append(window_of(stream))
                count = stream.encoded
            if number % 13 == 12:
                held[f"asked at {number / 2} s"] = answered(stream)
        stream.add(ground(5, 84, 168), seconds + 3.0)  # after a gap, with another shape
        stream.flush()
        windows.append(window_of(stream))
        held["asked in the end"] = answered(stream)
        held["memory"] = left(stream)
    return {f"window {number}": window for number, window in enumerate(windows)} | held


def window_of(stream) -> Held:
    """Return the latest window's encoding, and the memory's seconds, windows, tokens, frames seen and thinned windows."""
    seen = stream.seen
    memory = [seen.start_s, seen.end_s, seen.windows, seen.tokens, seen.frames, seen.thinned]
    made = encoded(latest_encoding(stream))  # the public report has only its counts
    return {"pairs": stream.report.pruning.kept_per_pair, "memory": memory} | made


def left(stream) -> list[list]:
    """Return, for each window in memory, its start and the places of its remaining tokens in the order of their priority."""
    return [[window.start_s, runs(window.order.tolist())] for window in windows_in_memory(stream)]


def answered(stream) -> Held:
    """Ask greedily and with sampling. A question leaves no trace, so each answer is as if it were the first."""
    held: Held = {}
    for name, question, options in (("", QUESTION, {}), ("drawn ", HAPPENS, DRAWN)):
        answer = stream.ask(question, **{"max_new_tokens": 8, **options})
        text, report = answer.text, answer.report
        held |= {f"{name}answer": text, f"{name}ids": answer.ids}
    tokens, seen = report.tokens, report.stream
    counts = [tokens.text, tokens.visual, tokens.prompt]
    return held | {"tokens": counts, "until": seen["end_s"], "seen": [seen["windows"], seen["tokens"], seen["thinned"]]}


def cases() -> Iterator[tuple[str, Callable[[], Held]]]:
    for name, model, method, budget, seconds, window_s, options in (
        ("evoprune", "demo", "evoprune", 0.25, 24, 4.0, {}),
        ("evoprune, thinned", "demo", "evoprune", 0.25, 28, 2.0, {"memory_s": 8.0}),
        ("evoprune 0.1, of tokens", "demo-scenes", "evoprune", 0.1, 20, 4.0, {"memory_tokens": 40}),
        ("nothing pruned", "demo", "none", 1.0, 16, 4.0, {"memory_s": 8.0}),
        ("evoprune-merge", "demo", "evoprune-merge", 0.25, 16, 4.0, {"memory_s": 8.0}),
        ("reuse+visionzip", "demo", "reuse+visionzip", 0.25, 16, 4.0, {"memory_s": 8.0}),
        ("tome, with a system prompt", "demo-scenes", "tome", 0.25, 16, 4.0, {"system": "Be brief."}),
        ("qwen2_5_vl", "qwen2_5_vl", "evoprune", 0.25, 20, 4.0, {"memory_s": 8.0}),
        ("qwen3_vl", "qwen3_vl", "evoprune", 0.25, 20, 4.0, {"memory_s": 8.0}),
    ):
        yield f"stream {name}", partial(watched, model, method, budget, seconds, window_s, **options)
