"""Options of `evoprune batch` alone."""

from functools import partial

from evoprune_cli import completion
from evoprune_cli.options import argument, option

ENGINES = ("local", "ray")
_row, _output, _engine = (partial(option, panel) for panel in ("Rows", "Output", "Engine"))

Videos = argument(
    list[str] | None, "VIDEO", "Video files, folders of videos, or folders of images, each of which is one video."
)
Questions = _row(list[str] | None, "-Q", "--question", "Asked of every video; repeatable.", metavar="TEXT")
Source = _row(
    str | None,
    "--from",
    "In place of VIDEO and -Q: JSONL or CSV rows with video, question and perhaps "
    "id, start, end, options (in CSV a|b|c), subtitles, "
    "answer. Files are relative to the file; - is stdin, which is read to its end first.",
    metavar="FILE|-",
)
Output = _output(
    str | None,
    "-o",
    "--output",
    "Where the records go, each as soon as it is finished; - is stdout. Records of a video stand together.",
    metavar="FILE|-",
)
Resume = _output(
    bool,
    "--resume",
    "Go on with FILE if it exists: rows that have an answer are skipped, rows that failed are asked again.",
)
Overwrite = _output(bool, "--overwrite", "Replace what is in FILE.")
Engine = _engine(
    str,
    "--engine",
    "ray: on a Ray cluster, one model for each GPU, or for each node without GPUs. Needs evoprune[ray].",
    **completion.one_of(*ENGINES),
)
Address = _engine(
    str | None,
    "--address",
    "Of the Ray cluster; default: RAY_ADDRESS, else a cluster on this machine.",
    **completion.one_of("auto", "HOST:PORT"),
)
