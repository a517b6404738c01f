"""What `evoprune profile` runs: all rows take turns, round after round, in one process; random weights will do."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from evoprune.backend.devices import environment, reset_peak_memory
from evoprune.backend.limits import available_cores
from evoprune.bench.profiling.bench import Bench, Progress, Source, all_rows
from evoprune.bench.profiling.clips import AFTER_PAIR, BEFORE_PAIR, TEXT_AFTER, TEXT_BEFORE
from evoprune.bench.profiling.results import FULL, HUGGING_FACE, METHOD, Case, Results, Row, bound_of
from evoprune.bench.profiling.runners import Turn
from evoprune.bench.profiling.settings import Settings, TimeLimit
from evoprune.methods.plans import plain
from evoprune.session.loading.model import LoadedModel

WARM_UP, ROUND, COUNTED = "warm-up", "round", "counted"  # what `paced` yields
Round = tuple[float, dict[Row, Turn | str]]  # the rate in matrix products, and the turn of each row or why it failed


def measure(
    loaded: LoadedModel,
    cases: Sequence[Case],
    source: Source,
    settings: Settings,
    *,
    about: dict | None = None,
    progress: Progress = lambda what: None,
    limit: TimeLimit | None = None,
) -> Iterator[Results]:
    """Runs all rows in turn, round after round, as far as they begin in time.

    Args:
        source: makes the frames of a case. `about`: what else to note among the settings: `video` or `synthetic`.
        limit: of the whole run, which may have begun before; None for that of the settings, from now on.

    Yields the results so far after each measured round, of which there is at least one.
    """
    limit, asked = limit or TimeLimit(settings.time_limit_s), all_rows(cases, settings)
    rows = [*asked]
    progress("preparing")
    results = _blank_results(loaded, settings, about or {})
    bench = Bench(loaded, rows, source, settings, progress)
    notes = results.notes + bench.notes

    run_round = partial(_run_round, bench, rows, limit, progress)
    for phase, (rate, turns) in paced(run_round, settings, limit):
        for row, turn in turns.items():
            if isinstance(turn, str):
                row.error, row.samples = turn, []
            else:
                row.counts, row.samples = turn.counts, row.samples + [turn.sample] * (phase != WARM_UP)
        if phase == WARM_UP:
            results.warmups, results.warmup_seconds = results.warmups + 1, limit.spent
            continue
        if phase == COUNTED:
            results.warmups -= 1
            notes.append("without a warm-up: a second round would not have ended in time, so the first one counts")
        results.rows = _with_bounds([replace(row) for row in rows])
        results.matmul_rates.append(rate)
        results.rounds, results.seconds = results.rounds + 1, limit.spent
        results.notes = [*notes, *_left_out(asked, rows, limit)]
        yield results


def _run_round(bench: Bench, rows: list[Row], limit: TimeLimit, progress: Progress, title: str, rounds: int) -> Round:
    """A turn of each row. If `rounds` must end in time, with this one, a row leaves `rows` where they would not if it took
    as long as the slowest one before it. The least stays: Hugging Face, budget 1.0 and the first method of the first case."""
    begun = limit.now()
    progress(f"{title}: matrix products")
    rate, turns, slowest = bench.rate(), {}, 0.0
    method = next((row for row in rows if row.kind == METHOD and row.method != "none"), None)
    least = [row for row in rows if row.case == rows[0].case and (row.kind in (HUGGING_FACE, FULL) or row is method)]
    for row in [row for row in rows if not row.error]:
        start = limit.now()
        if rounds and row not in least and limit.left < rounds * slowest + (rounds - 1) * (start - begun):
            rows.remove(row)
            continue
        progress(f"{title}: {row.name}, {row.case}")
        turns[row] = bench.run(row)
        slowest = max(slowest, limit.now() - start)
    return rate, turns


def _left_out(asked: Sequence[Row], kept: Sequence[Row], limit: TimeLimit) -> list[str]:
    """A remark that names the rows that are missing; none where none are."""
    there, cases = {(row.name, row.case) for row in kept}, {row.case for row in kept}
    missing = [f"all rows of {case}" for case in dict.fromkeys(row.case for row in asked) if case not in cases]
    missing += [f"{row.name}, {row.case}" for row in asked if row.case in cases and (row.name, row.case) not in there]
    return [f"left out to end within {limit.seconds:g} s: {'; '.join(missing)}"] if missing else []


def paced(run_round: Callable[[str, int], Round], settings: Settings, limit: TimeLimit) -> Iterator[tuple[str, Round]]:
    """Runs rounds while they end in time, by the time of the round before; the first one in any case.

    `run_round` gets a title; and for the first round, for which rows may be left out, how many must end in time, else 0.

    Yields each with `WARM_UP` or `ROUND`; and the last warm-up once more with `COUNTED`, if no measured round ends in time.
    """
    last, made, measured = 0.0, None, False
    titles = [(WARM_UP, n, settings.warmups) for n in range(settings.warmups)]
    titles += [(ROUND, n, settings.repetitions) for n in range(settings.repetitions)]
    for phase, number, wanted in titles:
        rounds = 1 if phase == ROUND else 2  # a measured round comes after each warm-up
        if made is None or limit.left >= last * rounds:
            begun = limit.spent
            made = run_round(f"{phase} {number + 1} of {wanted}", 0 if made else rounds)
            last, measured = limit.spent - begun, phase == ROUND
            yield phase, made
    if not measured:
        yield COUNTED, made


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
    notes = []
    if not reset_peak_memory(loaded.device):
        notes.append("peak memory is the whole process's so far: this system cannot measure it for each row")
    if loaded.model.config.vision_config.traits.timestamps:
        more = BEFORE_PAIR + AFTER_PAIR
        notes.append(f"{more} tokens more for the time and the markers of each frame pair of a clip")
    return Results(
        model=replace(loaded.facts(), quantize="none"),
        weights_bytes=loaded.weights_bytes,
        env=environment(loaded.device),
        machine={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "cores": available_cores(),
        },
        settings={
            **about,
            **asdict(settings),
            "budgets": [*map(plain, settings.budgets)],
            "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        },
        notes=notes,
    )
