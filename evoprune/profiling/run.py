"""How fast a model answers, against plain Hugging Face transformers on the same weights: what `evoprune profile` runs.

All rows take turns, round after round, in one process. Speed does not depend on the values of the weights, so random ones of the
true dimensions will do. Nor do the counts: how many rows a layer computes follows from the budget and the pixels.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from evoprune.model.machine import environment, reset_peak_memory
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.profiling.bench import Bench, Progress, Source
from evoprune.profiling.clips import TEXT_AFTER, TEXT_BEFORE
from evoprune.profiling.results import FULL, METHOD, Case, Results, Row, bound_of
from evoprune.profiling.settings import Settings


def measure(
    loaded: LoadedModel,
    cases: Sequence[Case],
    source: Source,
    settings: Settings,
    *,
    about: dict | None = None,
    progress: Progress = lambda what: None,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Results]:
    """Runs all rows in turn, round after round.

    Args:
        loaded: the model.
        cases: the clips' sizes.
        source: makes the frames of a case.
        settings: what is swept and how often.
        about: what else to note among the settings: `video` or `synthetic`.
        progress: called with a description of what comes next.
        now: the clock of the time limit, in seconds.

    Yields:
        The results so far after each measured round, of which there is at least one. A round that breaks off leaves the results of
        the rounds before it as they are.
    """
    progress("preparing")
    bench = Bench(loaded, cases, source, settings, progress)
    results = _blank_results(loaded, settings, about or {})
    results.notes.extend(bench.notes)
    start = now()
    for measured in paced(bench.run_round, settings, now):
        spent = now() - start
        if measured:
            rows = _with_bounds([replace(row) for row in bench.rows])
            rounds = results.rounds + 1
            results = replace(results, rows=rows, matmul_rates=[*bench.rates], rounds=rounds, seconds=spent)
            yield results
        else:
            results = replace(results, warmups=results.warmups + 1, warmup_seconds=spent)


def paced(run_round: Callable[[str, bool], None], settings: Settings, now: Callable[[], float]) -> Iterator[bool]:
    """Runs rounds while they fit into the time limit. The previous round says how long the next one takes.

    The first warm-up and the first measured round run in any case.

    Args:
        run_round: called with a title, and whether the round is measured.
        now: a clock in seconds.

    Yields:
        After each round, whether it was measured.
    """
    start, last = now(), 0.0
    for name, measured, wanted in (("warm-up", False, settings.warmups), ("round", True, settings.repetitions)):
        for number in range(wanted):
            begun = now()
            if number and begun - start + last > settings.time_limit_s:
                break
            run_round(f"{name} {number + 1} of {wanted}", measured)
            last = now() - begun
            yield measured


def _with_bounds(rows: list[Row]) -> list[Row]:
    """The rows, with a bound before the methods of each budget, made from the first of these that did not fail."""
    made, seen, full = [], set(), None
    for row in rows:
        full = row if row.kind == FULL else full
        if row.kind == METHOD and row.method != "none" and (row.case, row.budget) not in seen:
            seen.add((row.case, row.budget))
            like = [r for r in rows if (r.kind, r.case, r.budget) == (METHOD, row.case, row.budget)]
            made.append(bound_of(full, next((r for r in like if not r.error), row)))
        made.append(row)
    return made


def _blank_results(loaded: LoadedModel, settings: Settings, about: dict) -> Results:
    alone = reset_peak_memory(loaded.device)
    return Results(
        model=replace(loaded.facts(), quantize="none"),
        weights_bytes=loaded.weights_bytes,
        env=environment(loaded.device),
        machine={"python": platform.python_version(), "platform": platform.platform(), "processors": os.cpu_count()},
        settings={**about, **asdict(settings), "text_tokens": TEXT_BEFORE + TEXT_AFTER},
        notes=[]
        if alone
        else ["peak memory is the whole process's so far: this system cannot measure it for each row"],
    )
