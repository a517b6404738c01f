"""Options of `evoprune eval` alone."""

from typing import Annotated

import typer

from evoprune.evaluation.splits import BOTH, SPLITS, WORLDS
from evoprune_cli import completion
from evoprune_cli.options import SWEEP

_DATA, _OUTPUT = "Data", "Output"

Data = Annotated[
    str,
    typer.Option(
        "--data",
        **completion.one_of("FILE", "demo"),
        help="Questions: JSONL or CSV rows with video, question, answer and perhaps id, options, type, groups. Or demo: clips "
        "of the demo models' generators.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        help="At most so many videos; default: all of a file, or 100 demo clips.",
        min=1,
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
World = Annotated[
    str,
    typer.Option(
        "--world",
        **completion.one_of(*WORLDS, BOTH),
        help="The demo's clips: coloured shapes and digits, or crowded scenes with signs.",
        rich_help_panel=_DATA,
    ),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        metavar="LIST",
        help="Only questions of these groups; of scenes picture (one frame pair) or video, for example.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        **completion.one_of(*SPLITS),
        help="The demo's clips: to report on, to tune on, or upright ones with a panning camera, to report on.",
        rich_help_panel=_DATA,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="<int>",
        help="Block of the demo's clips; blocks share no clip. Also the seed of methods that draw at random.",
        min=0,
        max=2**31 - 1,
        rich_help_panel=_DATA,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        envvar="EVOPRUNE_MODEL",
        **completion.MODEL,
        help="Hub id, local folder, demo or demo-scenes; default: demo, or demo-scenes for --world scenes.",
        show_default=False,
        rich_help_panel="Model",
    ),
]
Blind = Annotated[
    bool,
    typer.Option(
        "--blind",
        help="Also ask without the video: a grey one of the same size and length.",
        rich_help_panel=SWEEP,
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        help="Videos at a time, each in a process with its own copy of the model.",
        min=1,
        max=256,
        rich_help_panel=_OUTPUT,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="Write settings, samples and results there; if it exists, to DIR-2 and so on.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="Continue the interrupted run in DIR. Needs the same options.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Chart = Annotated[
    str | None,
    typer.Option(
        "--chart",
        metavar="FILE.svg",
        help="Draw accuracy against tokens and against cost.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="The results as one JSON line instead of a table.", rich_help_panel=_OUTPUT),
]
