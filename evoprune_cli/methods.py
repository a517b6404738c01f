"""`evoprune methods`: lists all pruning methods with where each one acts, whether it reads the question, and its source."""

import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, fields
from math import isfinite
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
def methods(
    *,
    name: opt.argument(str | None, "NAME", "A method, whose settings to list.") = None,
    json: opt.option(bool, "--json", "Print JSON instead of text.") = False,
) -> int:
    """List the pruning methods, including those of plug-ins, or a method's settings.

    \b
    evoprune methods
    evoprune methods evoprune
    evoprune methods --json
    """
    if name is None:
        entries = [_facts(each, None) for each in registry.available(plugins=False)]
        entries += [_facts(each, state) for each, state in registry.plugins().items()]
    else:
        name, *_ = name.split(":")  # without settings
        registry.get(name)  # raises an error if the method cannot be used
        entries = [_facts(name, None if name in registry.available(plugins=False) else registry.plugins().get(name))]
    if json:
        print_document({"schema": "evoprune/methods@1", "methods": entries, "error": None})
    elif name is None:
        rows = [[cell(entry) for cell in COLUMNS.values()] for entry in entries]
        print_text(text_table([*COLUMNS], rows, COMBINED, page_width()))
    else:
        _print_settings(entries[0])
    return 0


def _print_settings(facts: dict[str, Any]) -> None:
    """Print an entry of the JSON output as text."""
    name, _, _, source = (cell(facts) for cell in COLUMNS.values())
    about = f"{name} acts {COLUMNS['acts'](facts)} ({source})."
    rows = [[each["name"], _value(each["default"]), each["range"] or ""] for each in facts["settings"]]
    if rows:
        note = f"{about} --method {name}:SETTING=VALUE changes a setting."
        print_text(text_table(("setting", "default", "range"), rows, note, page_width()))
    else:
        print_text(textwrap.fill(f"{about} It has no settings.", page_width()) + "\n")


def _value(default: object) -> str:
    """Return a setting's default as users would type it, or "-" if there isn't one."""
    if default is None:
        return "-"
    return f"{default:g}" if isinstance(default, float) else str(default).lower()


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
        "settings": method and [_setting(each) for each in fields(method)],
    }


def _setting(declared: Field) -> dict[str, Any]:
    (interval,) = getattr(declared.type, "__metadata__", (None,))
    default = declared.default
    if (isinstance(default, float) and not isfinite(default)) or not isinstance(
        default, bool | int | float | str | None
    ):
        default = str(default)
    return {"name": declared.name, "default": default, "range": interval}
