"""Options of `evoprune tune` alone."""

from functools import partial

from evoprune_cli import completion
from evoprune_cli.options import argument, option, swept

_asked, _output = partial(option, "What is asked"), partial(option, "Output")

Videos = argument(list[str], "VIDEO", "Video files like those that will be asked about.")
Questions = _asked(
    list[str] | None,
    "-Q",
    "--question",
    "Asked of every video; repeatable. Default: three general ones.",
    metavar="TEXT",
)
QuestionFile = _asked(str | None, "--questions", "A text file with a question on each line.", metavar="FILE")
Agree = _asked(
    float,
    "--agree",
    "Share of the full answers' tokens at which the pruned model must make the same first choice, at the lower end of "
    "the 95% interval.",
    metavar="SHARE",
)
Budgets = swept(
    list[str] | None,
    "-b",
    "--budget",
    "Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
    **completion.BUDGETS,
)
Methods = swept(
    list[str] | None, "--method", "Further methods to try, beside those that are always tried.", **completion.METHODS
)
Operations = swept(bool, "--operations", "Find the recipe of the method operations for this model instead.")
TimeLimit = swept(
    float,
    "--time-limit",
    "Of the whole run, loading included. The most promising settings are tried on all videos, the others on fewer.",
    metavar="SECONDS",
)
NoSave = _output(bool, "--no-save", "Do not save the recommendation, which -b tuned uses.")
Output = _output(str | None, "-o", "--output", "Also write the results there, as JSON.", metavar="FILE.json")
Chart = _output(str | None, "--chart", "Draw agreement against the time to the first token.", metavar="FILE.svg")
Json = _output(bool, "--json", "The results as one JSON line instead of a table.")
