"""`evoprune methods`: lists all pruning methods with where each one acts, whether it reads the question, and its source."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from evoprune import methods as registry
from evoprune.bench import text_table
from evoprune.errors import EvopruneError
from evoprune.util import one_line
from evoprune_cli import options as opt
from evoprune_cli.delivery import print_text
from evoprune_cli.terminal import page_width, print_document

ACTS = {
    "none": "nowhere",
    "input": "on the input",
    "inside": "in the encoder",
    "after": "after the encoder",
    "language": "in the language model",
}
COMBINED = (
    "A method is NAME or NAME:SETTING=VALUE. Methods joined by + act one after the other: reuse+NAME encodes only changed units; "
    "ipcv+NAME computes a third of the rows in most layers; NAME+fastv also drops tokens inside the language model."
)
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "name": lambda facts: facts["name"],
    "acts": lambda facts: ACTS.get(facts["acts"], "-"),
    "question": lambda facts: {True: "yes", False: "no", None: "-"}[facts["reads_question"]],
    "source": lambda facts: one_line("; ".join(filter(None, [facts["source"], facts["plugin"]]))),
}


@opt.command(short="json")
def methods(*, json: opt.option(bool, "--json", "Print JSON instead of text.") = False) -> int:
    """List the pruning methods, including those of plug-ins.

    \b
    evoprune methods
    evoprune methods --json
    """
    entries = [_facts(name, None) for name in registry.available(plugins=False)]
    entries += [_facts(name, state) for name, state in registry.plugins().items()]
    if json:
        print_document({"schema": "evoprune/methods@1", "methods": entries, "error": None})
        return 0
    rows = [[cell(entry) for cell in COLUMNS.values()] for entry in entries]
    print_text(text_table([*COLUMNS], rows, COMBINED, page_width()))
    return 0


def _facts(name: str, plugin: str | None) -> dict[str, Any]:
    """Describe a pruning method as an entry for the JSON output.

    `plugin` is the package that provides the method, or None for a built-in method. If a plugin method can't be used, `plugin` also
    contains the reason, and all facts about its behavior are None.
    """
    method = None
    if plugin is None or name not in registry.available(plugins=False):
        with suppress(EvopruneError):
            method = registry.get(name)
    return {
        "name": name,
        "acts": method and method.acts,
        "reads_question": method and (method.acts == "language" or registry.MethodChain.parse(name).reads_question),
        "source": method and method.source,
        "plugin": plugin,
    }
