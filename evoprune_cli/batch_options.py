"""Options of `evoprune batch` alone."""

from typing import Annotated

import typer

from evoprune_cli import completion

ENGINES = ("local", "ray")
_ROWS, _OUTPUT, _ENGINE = "Rows", "Output", "Engine"

Videos = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="VIDEO",
        help="Video files, folders of videos, or folders of images, each of which is one video.",
        show_default=False,
    ),
]
Questions = Annotated[
    list[str] | None,
    typer.Option(
        "-Q",
        "--question",
        metavar="TEXT",
        help="Asked of every video; repeatable.",
        show_default=False,
        rich_help_panel=_ROWS,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE|-",
        help="In place of VIDEO and -Q: JSONL or CSV rows with video, question and perhaps "
        "id, start, end, options (in CSV a|b|c), subtitles, "
        "answer. Files are relative to the file; - is stdin, which is read to its end first.",
        show_default=False,
        rich_help_panel=_ROWS,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE|-",
        help="Where the records go, each as soon as it is finished; - is stdout. Records of a video stand together.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with FILE if it exists: rows that have an answer are skipped, rows that failed are asked again.",
        rich_help_panel=_OUTPUT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what is in FILE.", rich_help_panel=_OUTPUT),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        **completion.one_of(*ENGINES),
        help="ray: on a Ray cluster, one model for each GPU, or for each node without GPUs. Needs evoprune[ray].",
        rich_help_panel=_ENGINE,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        **completion.one_of("auto", "HOST:PORT"),
        help="Of the Ray cluster; default: RAY_ADDRESS, else a cluster on this machine.",
        show_default=False,
        rich_help_panel=_ENGINE,
    ),
]
