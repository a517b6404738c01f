"""Options of `evoprune inspect` alone."""

from typing import Annotated

import typer

from evoprune_cli import completion

OVERLAYS = (".png", ".gif", ".mp4")  # endings of the pictures that `inspect --overlay` draws

Video = Annotated[
    str | None,
    typer.Argument(
        metavar="VIDEO",
        help="A video file, a folder of frames, or - for stdin; without it, a report on this machine.",
        show_default=False,
    ),
]
Overlay = Annotated[
    str | None,
    typer.Option(
        "--overlay",
        metavar="FILE",
        help=f"Draw which units are read, reused, merged and dropped ({', '.join(OVERLAYS)}). "
        "Loads the model; pruning options are for this.",
        show_default=False,
    ),
]
Scan = Annotated[
    bool, typer.Option("--scan", help="Decode the whole video and report damage, true length and variable rate.")
]
ClearCache = Annotated[
    bool,
    typer.Option("--clear-cache", help="Delete the encoded videos that `ask --cache` keeps on disk, then report."),
]
ForgetTuned = Annotated[
    str | None,
    typer.Option(
        "--forget-tuned",
        **completion.one_of("NAME", "FINGERPRINT", "all"),
        help="Delete the tuned setting and the recipe of a model (by name or beginning of its fingerprint) or all, then report.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")]
