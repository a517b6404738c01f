"""`evoprune models`: lists the models on this machine, and whether they run here. Uses no network."""

from textwrap import wrap
from typing import Any

from evoprune.session import ModelOptions
from evoprune.util import counted, one_line, size
from evoprune_cli import options as opt
from evoprune_cli.delivery import print_text
from evoprune_cli.terminal import page_width, print_document

PLACES = {"hub": "hub cache", "lmstudio": "LM Studio", "ollama": "Ollama", "folder": "EVOPRUNE_MODELS"}
NONE = (
    "There are no models that evoprune runs in the hub's cache, LM Studio, Ollama, or the folders in EVOPRUNE_MODELS. "
    "The demo needs no download; a larger model: hf download Qwen/Qwen2.5-VL-3B-Instruct"
)


@opt.command(short="json")
def models(*, json: opt.option(bool, "--json", "Print JSON instead of text.") = False) -> int:
    """List the models on this machine: the hub's cache, LM Studio, Ollama, and the folders in EVOPRUNE_MODELS.

    No weights are read. Memory is what the weights need with the default options.

    \b
    evoprune models
    evoprune models --json
    """
    found = ModelOptions.on_this_machine()
    if json:
        entries = [_facts(model) for model in found]
        print_document({"schema": "evoprune/models@1", "models": entries, "error": None})
        return 0
    known = [model for model in found if model.series]
    lines = []
    for model in known:
        sizes = f"{size(model.disk_bytes)} on disk", f"{size(model.needed_bytes)} of memory"
        facts = ", ".join((model.series, PLACES[model.place], *sizes))
        lines += [one_line(model.name), f"  {facts}; {one_line(model.problem or 'runs here')}"]
    lines += ["", "To use a model: evoprune ask video.mp4 -m NAME"] if known else wrap(NONE, page_width())
    if len(found) > len(known):
        others = counted(len(found) - len(known), "other model")
        lines += [f"{others} cannot be run by evoprune; evoprune models --json says why"]
    print_text("\n".join([*lines, ""]))
    return 0


def _facts(model) -> dict[str, Any]:
    return {
        "name": model.name,
        "place": model.place,
        "family": model.series,
        "parameters": model.parameters,
        "disk_bytes": model.disk_bytes,
        "needed_bytes": model.needed_bytes,
        "runs": model.problem is None,
        "problem": model.problem,
    }
