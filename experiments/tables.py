"""Write Markdown tables. Imported by other experiments; not a script."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = False) -> list[str]:
    """Return the lines of a Markdown table. If `numbers` is True, all columns except the first are right-aligned."""
    rule = "|---" + ("|--:" if numbers else "|---") * (len(heads) - 1) + "|"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]
