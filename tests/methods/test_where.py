"""What docs/methods.md says of all methods: where each works, and the contract of a selector; and the reasons of refusals."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path

import pytest

import evoprune
from evoprune import methods
from evoprune.errors import UsageError
from evoprune.hf.encoding import patch_config
from evoprune.methods.types import Selection, Tokens
from evoprune.session.options import PruneOptions
from evoprune_vllm.pruning import served_method

HEADER = (
    "method", "commands, `VideoQA`", "pictures", "`EvoPrune(...)(model)`, `apply`", "`evoprune.encode`", "vLLM", "overlay",
    "`-b auto`", "`-b auto:inflection`",
)  # fmt: skip
WHOLE = ("subsample", "evs")  # keep at least a frame pair, and a picture has one (tests/session/test_pictures.py)


def works(call, *args, **more) -> str:
    try:
        call(*args, **more)
    except UsageError:
        return "no"
    return "yes"


def facts(name: str) -> tuple[str, ...]:
    """Where a method works, in the order of `HEADER`. tests/cli/test_methods.py runs each in every command, with overlays."""
    method = methods.parse(name)
    encode = works(patch_config, 0.5, name, None, has_question=True)
    return (
        "yes",
        "whole" if name in ("none", *WHOLE) else "pruned",
        works(evoprune.EvoPrune, method=name),
        "with `question`" if encode == "yes" and method.reads_question else encode,
        works(served_method, {"evoprune": {"method": name}}),
        "no" if method.reads_question or method.acts == "language" else "yes",
        works(PruneOptions("auto", name).config),
        works(PruneOptions("auto:inflection", name).config),
    )


def table() -> list[str]:
    """The lines of the table: methods that work in the same places share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in methods.built_in():
        rows.setdefault(facts(name), []).append(f"`{name}`")
    lines = [HEADER, ("---",) * len(HEADER), *((", ".join(names), *where) for where, names in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def test_the_document_says_where_each_method_works():
    page = Path("docs/methods.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, "docs/methods.md needs this table:\n" + "\n".join(table())
    names, context = methods.built_in(), HEADER.index("`EvoPrune(...)(model)`, `apply`") - 1
    refused = sum(facts(name)[context] == "no" for name in names)
    assert f"there, {refused} of the {len(names)} names are refused" in " ".join(page.split())


@pytest.mark.parametrize(
    ("name", "says", "hint"),
    [
        ("ipcv", "method ipcv selects with dart, which reads the question", "ipcv+divprune"),
        ("ipcv+par+fastv", "method ipcv+par+fastv acts inside the language model", "ipcv"),
        ("reuse+cdpruner", "method reuse selects with cdpruner, which reads the question", "reuse+divprune"),
        ("dart", "method dart reads the question", "another method"),
        ("mmr+fastv", "acts inside the language model", "here mmr works"),
        ("downscale", "acts on frames", "VideoQA"),
    ],
)
def test_a_refusal_names_what_cannot_work(name, says, hint):
    with pytest.raises(UsageError, match=says.replace("+", r"\+")) as caught:
        evoprune.EvoPrune(method=name)
    assert hint in caught.value.hint
    for other in ("ipcv+divprune", "ipcv+dart:text=0", "reuse+divprune", "cdpruner:question=false"):
        evoprune.EvoPrune(method=other)


def test_the_contract_of_a_selector_names_all_that_it_gets_and_returns():
    page = Path("docs/methods.md").read_text(encoding="utf-8")
    contract = page.partition("### The contract of a selector\n")[2].partition("\n## ")[0]
    known = [field.name for kind in (Tokens, Selection) for field in fields(kind)]
    made = [name for name, value in vars(Tokens).items() if isinstance(value, cached_property | property)]
    assert {"features", "question", "given", "means"} <= {*known, *made}
    assert not [name for name in {*known, *made} if f"{name}`" not in contract]
