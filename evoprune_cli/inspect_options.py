"""Options of `evoprune inspect` alone."""

from evoprune_cli import completion
from evoprune_cli.options import argument, option

OVERLAYS = (".png", ".gif", ".mp4")  # endings of the pictures that `inspect --overlay` draws

Video = argument(
    str | None, "VIDEO", "A video file, a folder of frames, or - for stdin; without it, a report on this machine."
)
Overlay = option(
    None,
    str | None,
    "--overlay",
    f"Draw which units are read, reused, merged and dropped ({', '.join(OVERLAYS)}). "
    "Loads the model; pruning options are for this.",
    metavar="FILE",
)
Scan = option(None, bool, "--scan", "Decode the whole video and report damage, true length and variable rate.")
ClearCache = option(
    None, bool, "--clear-cache", "Delete the encoded videos that `ask --cache` keeps on disk, then report."
)
ForgetTuned = option(
    None,
    str | None,
    "--forget-tuned",
    "Delete the tuned setting and the recipe of a model (by name or beginning of its fingerprint) or all, then report.",
    **completion.one_of("NAME", "FINGERPRINT", "all"),
)
Json = option(None, bool, "--json", "JSON on stdout instead of text.")
