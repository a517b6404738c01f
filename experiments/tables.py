"""Write Markdown tables into pages. Imported by other experiments; not a script."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = False) -> list[str]:
    """Return the lines of a Markdown table. If `numbers` is True, all columns except the first are right-aligned."""
    rule = "|---" + ("|--:" if numbers else "|---") * (len(heads) - 1) + "|"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def fill(page: Path, begin: str, end: str, words: str) -> None:
    """Replace the text between two markers in a page. Raises ValueError if the page doesn't have the markers."""
    text = page.read_text(encoding="utf-8")
    first, last = text.find(begin), text.find(end)
    if not 0 <= first < last:
        raise ValueError(f"{page.name} has no place between {begin} and {end}")
    page.write_text(f"{text[: first + len(begin)]}\n\n{words.strip()}\n\n{text[last:]}", encoding="utf-8")
