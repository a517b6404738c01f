"""Options of `evoprune eval` alone."""

from functools import partial

from evoprune.evaluation.splits import BOTH, SPLITS, WORLDS
from evoprune_cli import completion
from evoprune_cli.options import option, swept

_data, _output = partial(option, "Data"), partial(option, "Output")

Data = _data(
    str,
    "--data",
    "Questions: JSONL or CSV rows with video, question, answer and perhaps id, options, type, groups. Or demo: clips "
    "of the demo models' generators.",
    **completion.one_of("FILE", "demo"),
)
Limit = _data(
    int | None, "--limit", "At most so many videos; default: all of a file, or 100 demo clips.", metavar="N", min=1
)
World = _data(
    str,
    "--world",
    "The demo's clips: coloured shapes and digits, or crowded scenes with signs.",
    **completion.one_of(*WORLDS, BOTH),
)
Groups = _data(
    list[str] | None,
    "--group",
    "Only questions of these groups; of scenes picture (one frame pair) or video, for example.",
    metavar="LIST",
)
Split = _data(
    str,
    "--split",
    "The demo's clips: to report on, to tune on, or upright ones with a panning camera, to report on.",
    **completion.one_of(*SPLITS),
)
Seed = _data(
    int,
    "--seed",
    "Block of the demo's clips; blocks share no clip. Also the seed of methods that draw at random.",
    metavar="<int>",
    min=0,
    max=2**31 - 1,
)
Blind = swept(bool, "--blind", "Also ask without the video: a grey one of the same size and length.")
Processes = _output(
    int,
    "--processes",
    "Videos at a time, each in a process with its own copy of the model.",
    metavar="N",
    min=1,
    max=256,
)
Output = _output(
    str | None,
    "-o",
    "--output",
    "Write settings, samples and results there; if it exists, to DIR-2 and so on.",
    metavar="DIR",
)
Resume = _output(str | None, "--resume", "Continue the interrupted run in DIR. Needs the same options.", metavar="DIR")
Chart = _output(str | None, "--chart", "Draw accuracy against tokens and against cost.", metavar="FILE.svg")
Json = _output(bool, "--json", "The results as one JSON line instead of a table.")
