"""Options of `evoprune tune` alone."""

from typing import Annotated

import typer

from evoprune_cli import completion
from evoprune_cli.options import SWEEP

_ASKED, _OUTPUT = "What is asked", "Output"

Videos = Annotated[
    list[str],
    typer.Argument(metavar="VIDEO", help="Video files like those that will be asked about.", show_default=False),
]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        "-Q",
        "--question",
        metavar="TEXT",
        help="Asked of every video; repeatable. Default: three general ones.",
        show_default=False,
        rich_help_panel=_ASKED,
    ),
]
QuestionFile = Annotated[
    str | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        help="A text file with a question on each line.",
        show_default=False,
        rich_help_panel=_ASKED,
    ),
]
Agree = Annotated[
    float,
    typer.Option(
        "--agree",
        metavar="SHARE",
        help="Share of the full answers' tokens at which the pruned model must make the same first choice, at the lower end of "
        "the 95% interval.",
        rich_help_panel=_ASKED,
    ),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "-b",
        "--budget",
        **completion.BUDGETS,
        help="Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
        show_default=False,
        rich_help_panel=SWEEP,
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        **completion.METHODS,
        help="Further methods to try, beside those that are always tried.",
        show_default=False,
        rich_help_panel=SWEEP,
    ),
]
Operations = Annotated[
    bool,
    typer.Option(
        "--operations",
        help="Find the recipe of the method operations for this model instead.",
        rich_help_panel=SWEEP,
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        help="Of the whole run, loading included. The most promising settings are tried on all videos, the others on fewer.",
        rich_help_panel=SWEEP,
    ),
]
NoSave = Annotated[
    bool,
    typer.Option("--no-save", help="Do not save the recommendation, which -b tuned uses.", rich_help_panel=_OUTPUT),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE.json",
        help="Also write the results there, as JSON.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Chart = Annotated[
    str | None,
    typer.Option(
        "--chart",
        metavar="FILE.svg",
        help="Draw agreement against the time to the first token.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="The results as one JSON line instead of a table.", rich_help_panel=_OUTPUT),
]
