"""Results of the commands that measure: delivered in the end, or as far as they are known when a run breaks off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from evoprune.errors import UsageError
from evoprune_cli.failures import failure
from evoprune_cli.files import print_text, write_text
from evoprune_cli.terminal import json_line, page_width, print_document

SOME_FAILED = 6  # an exit code


@contextmanager
def rescuing(ready: Callable[[], bool], deliver: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Where the block breaks off and results are ready, calls `deliver` with the record of what ended it."""
    try:
        yield
    except BaseException as problem:
        if ready() and not isinstance(problem, BrokenPipeError | SystemExit):
            with suppress(UsageError):  # the first problem is the one to report
                deliver(failure(problem))
            problem.reported = True
        raise


def show(document: dict[str, Any], render: Callable[[dict, int], str], json: bool) -> None:
    """Prints results: as one JSON line, or as the text that `render` makes for a width."""
    if json:
        print_document(document)
    else:
        print_text(render(document, page_width()))


def write(
    document: dict[str, Any], output: str | None, chart: str | None = None, draw: Callable[[dict], str] | None = None
) -> None:
    """Writes results to the files that are wanted: as JSON, and as a chart of `draw` where there is a row."""
    if output:
        write_text(output, json_line(document) + "\n")
    if chart and document["rows"]:
        write_text(chart, draw(document))
