"""The results of `evoprune profile` as a chart."""

from collections.abc import Sequence
from itertools import cycle

from evoprune.profiling.results import BOUND, METHOD, Results, Row, Spread
from evoprune.visualize.chart import COLOURS, INK, Panel, Point, Series, draw
from evoprune.visualize.svg import PALE
from evoprune_cli.profile_tables import device, source
from evoprune_cli.tables import one_line, short_name


def draw_chart(results: Results) -> str:
    """SVG. Where sizes are swept, time against them; else the tower's time against its live share."""
    cases, model = results.cases, results.model
    sweep = len(cases) > 1
    sizes = ", ".join(sorted({f"{case.height}x{case.width}" for case in cases}))
    facts = [model.dtype, device(results), f"frames of {sizes}" if sweep else str(cases[0]), source(results)]
    facts.append(f"median and range of {results.rounds} rounds" if results.rounds > 1 else "1 round")
    name = short_name(model.id) + " with random weights" * (model.load_format == "dummy")
    used = ", ".join(dict.fromkeys(one_line(row.method) for row in results.rows if row.kind == METHOD))
    title = f"{name}: {'time to the first token' if sweep else f'encode against live share of {used}'}"
    return draw(title, ", ".join(facts), _sweep(results) if sweep else [_live_share(results)])


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """By name: plain transformers grey, evoprune without pruning black, methods in colour; a bound like the row below it."""
    pruned = {row.name: row.budget for row in rows if row.kind == METHOD}
    made = dict(zip(pruned, cycle(COLOURS), strict=False))
    bounds = {f"bound -b {pruned[name]:g}": colour for name, colour in reversed(made.items())}
    return made | bounds | {"Hugging Face": PALE, "budget 1.0": INK}


def _scale(results: Results) -> tuple[str, float]:
    """The unit for all times of a chart, and what to multiply seconds by."""
    longest = max((max(row.seconds("first_token")) for row in results.rows if row.samples), default=0)
    return ("seconds", 1.0) if longest >= 2 else ("milliseconds", 1000.0)


def _point(x: float, spread: Spread, factor: float, label: str = "") -> Point:
    return Point(x, spread.median * factor, spread.low * factor, spread.high * factor, label)


def _series(lines: dict[str, list[Point]], colours: dict[str, str]) -> tuple[Series, ...]:
    """A line for each name, from left to right; a bound is dashed."""
    ordered = {name: tuple(sorted(points, key=lambda point: point.x)) for name, points in lines.items()}
    return tuple(Series(name, points, colours[name], name.startswith("bound")) for name, points in ordered.items())


def _sweep(results: Results) -> list[Panel]:
    """Encode, and the first token, against the frames, or against the units where their size changes too."""
    by_frames = len({(case.height, case.width) for case in results.cases}) == 1
    unit, factor = _scale(results)
    colours, panels = _colours(results.rows), []
    for stage, title in (("encode", "Encode"), ("first_token", "First token (encode + prefill)")):
        lines: dict[str, list[Point]] = {}
        for row in results.rows:
            figures = results.figures(row)
            if figures and (row.kind != BOUND or stage == "first_token"):
                x = row.case.frames if by_frames else row.counts.units
                lines.setdefault(row.name, []).append(_point(x, getattr(figures, stage), factor))
        xs = tuple(sorted({point.x for points in lines.values() for point in points}))
        label = "frames" if by_frames else "units (visual tokens before pruning)"
        panels.append(Panel(title, label, unit, _series(lines, colours), xs))
    return panels


def _live_share(results: Results) -> Panel:
    unit, factor = _scale(results)
    lines: dict[str, list[Point]] = {}
    for row in results.rows:
        figures = results.figures(row)
        if figures and row.kind != BOUND and row.quantize == "none":  # a line a method
            name = row.method if row.kind == METHOD else row.name
            label = f"-b {row.budget:g}" if row.counts.live_share < 1 else ""
            lines.setdefault(name, []).append(_point(row.counts.live_share, figures.encode, factor, label))
    fixed = {"Hugging Face": PALE, "budget 1.0": INK}
    colours = fixed | dict(zip((name for name in lines if name not in fixed), cycle(COLOURS), strict=False))
    full = [(Point(0, 0), Point(1, points[0].y)) for name, points in lines.items() if name == "budget 1.0"]
    ideal = [Series("live share of budget 1.0's time", points, PALE, dashed=True) for points in full]
    series = (*ideal, *_series(lines, colours))
    return Panel("Encode", "live share: rows computed, mean over all layers", unit, series)
