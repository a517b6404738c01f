"""Test the built-in methods, their settings and combinations, and where each method works."""

import json
import sys
import time
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import pytest

import evoprune
from evoprune import methods
from evoprune.contrib.fastv import FastV
from evoprune.contrib.mmr import Mmr
from evoprune.errors import UsageError
from evoprune.hf import encoding
from evoprune.methods import registry
from evoprune.methods.base import InputMethod, Method
from evoprune.methods.baselines import DivPrune
from evoprune.methods.budget import Budget
from evoprune.methods.chain import MethodChain
from evoprune.methods.evoprune import EvoPruneMethod, Reuse
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.types import Selection, Tokens
from evoprune.session import PruneOptions
from evoprune_vllm.pruning import served_method
from tests.methods.kinds import INNER


def test_the_registry_lists_what_it_can_get():
    names = methods.available(plugins=False)
    assert {"evoprune", "evoprune-paper", "evoprune-merge", "none", "random"} <= set(names)
    assert methods.MethodText.DEFAULT in names and len(set(names)) == len(names)
    for name in names:
        method, pipeline = methods.get(name), methods.MethodChain.parse(name)
        assert isinstance(method, Method) and sys.modules[type(method).__module__].__doc__
        assert method.name == pipeline.name == name
        assert method.acts in ("none", "input", "inside", "after", "language")
        assert pipeline == MethodChain.of(method) and pipeline.acts == method.acts
        assert pipeline.members == ([] if name == "none" else [method])
        assert (pipeline.language is not None) == (name in INNER)


@pytest.mark.parametrize("name", methods.available(plugins=False))
def test_settings_survive_the_way_through_texts(name):
    method = methods.get(name)
    settings = [f"{field.name}={getattr(method, field.name)}" for field in fields(method)]
    assert methods.get(":".join([name, *settings])) == method


def test_settings_are_parsed_by_their_type():
    method = methods.get("evoprune-paper:first=0.25:neighbours=7:size_bias=false:diversity=-1")
    assert method == EvoPrunePaper(first=0.25, neighbours=7, size_bias=False, diversity=-1.0)
    for text, value in (("TRUE", True), ("1", True), ("0", False), ("False", False)):
        assert methods.get(f"evoprune-paper:size_bias={text}").size_bias is value


@pytest.mark.parametrize("name", ["", "EvoPrune", "magic", "evoprune_paper"])
def test_an_unknown_method_is_refused_with_where_all_are_listed(name):
    with pytest.raises(UsageError) as caught:
        methods.MethodChain.parse(name)
    assert repr(name) in caught.value.message and caught.value.hint.endswith("evoprune methods lists them all")
    assert sum(known in caught.value.hint.split() for known in methods.available(plugins=False)) <= 3


@pytest.mark.parametrize("text", ["evoprune,divprune", "visionzip:dominant=0.5,divprune", "evoprune,no-such", "a,b"])
def test_a_list_is_refused_with_what_takes_one(text):
    with pytest.raises(UsageError, match="is a list") as caught:
        methods.MethodText(text).check()
    assert f"evoprune eval --method {text}" in caught.value.hint and "--compare" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ipcv:keep=2:first=3", "keep=2 is not above 0 and at most 1; first=3 is not from 0 to 1"),
        ("evoprune:alpha=inf:count=-1", "alpha=inf is not a finite number; count=-1 is not at least 0"),
        (
            "evoprune-paper:diversity=nan:neighbours=0",
            "diversity=nan is not a finite number; neighbours=0 is not at least 1",
        ),
        ("fastv:depth=1", "depth=1 is not above 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_each_named_with_their_own_range(text, says):
    with pytest.raises(UsageError) as caught:
        methods.MethodChain.parse(text)
    assert caught.value.message == f"method {text.partition(':')[0]}: {says}"


@pytest.mark.parametrize(("name", "argument"), [("evoprune-paper", "ratio"), ("random", "seed"), ("none", "name")])
def test_an_unknown_argument_is_refused_with_those_there_are(name, argument):
    with pytest.raises(UsageError) as caught:
        methods.MethodChain.parse(f"{name}:{argument}=1")
    assert repr(argument) in caught.value.message and name in caught.value.message
    for field in fields(methods.get(name)):
        assert f"{field.name}={field.default}" in caught.value.hint
    assert caught.value.hint


BAD_VALUES = {
    "evoprune-paper": [
        "first=a", "first=", "first=nan", "first=0.7", "last=1.5", "neighbours=2.5", "neighbours=0", "size_bias=yes",
        "critical=1.1", "critical=nan", "allocation=even", "features=values", "diversity=nan", "attention=-inf",
    ],
    "evoprune": [
        "reuse=-1", "reuse=nan", "reuse=x", "depth=0", "depth=1.1", "depth=nan", "alpha=-1", "alpha=nan", "alpha=inf",
        "floor=1.1", "count=-1", "within=inf", "average=maybe",
    ],
    "mmr": ["lam=1.1", "lam=nan", "importance=queries"],
    "scope": ["alpha=-1"],
    "vispruner": ["important=-0.1", "step=0"],
    "dart": ["text=0:visual=0"],
    "fastvid": ["salient=1.1", "centre=0", "threshold=2", "segments=0", "every=0", "neighbours=0"],
    "mmg": ["threshold=2", "beta=-0.1", "neighbours=0"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), [(name, text) for name in BAD_VALUES for text in BAD_VALUES[name]])
def test_a_bad_value_is_refused_with_what_would_be_good(name, setting):
    with pytest.raises(UsageError) as caught:
        methods.MethodChain.parse(f"{name}:{setting}")
    assert name in caught.value.message and "defaults" in caught.value.hint
    assert setting.partition("=")[0] in caught.value.message or "schedule" in caught.value.message


def made_of(name: str, setting: str, value: object) -> Method:
    behind = "+divprune" if name == "reuse" else ""
    return registry.MethodText(f"{name}:{setting}={value}{behind}").members()[0]


def test_every_number_is_finite_or_has_a_text_in_json():
    """Infinite numbers are rejected unless they have a meaning."""
    infinite = []
    for kind in (Reuse, *(type(methods.get(name)) for name in methods.available(plugins=False))):
        for setting in (f.name for f in fields(kind) if "float" in str(f.type)):
            with pytest.raises(UsageError, match=f"method {kind.name}: .*nan") as caught:
                made_of(kind.name, setting, "nan")
            assert f"{setting}=" in caught.value.hint
            for text in ("inf", "-inf", "1e400"):
                try:
                    made = made_of(kind.name, setting, text)
                except UsageError as problem:
                    assert f"{setting}=" in problem.hint
                else:
                    args = made.args
                    assert made_of(kind.name, setting, json.loads(json.dumps(args, allow_nan=False))[setting]) == made
                    infinite.append(f"{kind.name}:{setting}={text}")
    assert sorted({text.rpartition("=")[0] for text in infinite}) == [
        "evoprune:reuse", "nuwa:reach", "reuse:threshold", "visipruner:token"
    ]  # fmt: skip
    assert not [text for text in infinite if "=-" in text]
    combined = methods.MethodChain.parse("reuse:threshold=inf+mmr+visipruner:token=inf")
    assert combined.args["threshold"] == combined.args["visipruner"]["token"] == "inf"


def test_a_name_may_bring_settings():
    plain, variant = methods.get("evoprune-paper"), methods.get("evoprune-paper:critical=0.2:allocation=mean")
    assert (variant.critical, variant.allocation) == (0.2, "mean") and plain != variant
    assert methods.get("evs-nofloor").args == methods.get("evs:floor=false").args != methods.get("evs").args
    assert methods.get("evs-nofloor").exact and not methods.get("evs").exact


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("reuse+divprune", MethodChain(encoder=Reuse(), selector=DivPrune())),
        ("reuse:threshold=5+mmr:lam=0.7", MethodChain(encoder=Reuse(threshold=5.0), selector=Mmr(lam=0.7))),
        ("evoprune+fastv", MethodChain(encoder=EvoPruneMethod(), language=FastV())),
        ("reuse+mmr+fastv:share=0.3:depth=0.5", MethodChain(None, Reuse(), Mmr(), FastV(share=0.3, depth=0.5))),
        # A plus sign inside a number does not separate methods.
        ("evoprune:reuse=+1.5E+1:count=.1e+1", MethodChain(encoder=EvoPruneMethod(reuse=15.0, count=1.0))),
        ("evoprune:reuse=1e+1+fastv", MethodChain(encoder=EvoPruneMethod(reuse=10.0), language=FastV())),
        (
            "evoprune:count=1+fastv:depth=1e-1",
            MethodChain(encoder=EvoPruneMethod(count=1.0), language=FastV(depth=0.1)),
        ),
        ("reuse:threshold=1e+1+mmr:lam=+7e-1+fastv", MethodChain(None, Reuse(10.0), Mmr(lam=0.7), FastV())),
    ],
)
def test_what_can_be_combined(text, method):
    methods.MethodText(text).check()
    assert methods.MethodChain.parse(text) == method and methods.MethodText(text).plugin_code() == {}


def test_what_a_combination_says_of_itself():
    combined = methods.MethodChain.parse("evoprune+fastv")
    assert combined.args["fastv"] == {"share": 0.5, "depth": 0.0625}
    assert combined.automatic().encoder.within > 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("evoprune", [("evoprune", "evoprune", ())]),
        ("evoprune:reuse=0+fastv", [("evoprune:reuse=0", "evoprune", (("reuse", "0"),)), ("fastv", "fastv", ())]),
        ("a:b=1e+1:c=-.5E+2+d", [("a:b=1e+1:c=-.5E+2", "a", (("b", "1e+1"), ("c", "-.5E+2"))), ("d", "d", ())]),
        ("a:b=c=d:e", [("a:b=c=d:e", "a", (("b", "c=d"), ("e", None)))]),
        ("a:=1:b=", [("a:=1:b=", "a", (("", "1"), ("b", "")))]),
        ("+a:", [("", "", ()), ("a:", "a", (("", None),))]),
        ("1e+1", [("1e", "1e", ()), ("1", "1", ())]),
    ],
)
def test_names_are_read_in_one_place(text, named):
    assert (
        methods.MethodText(text).parts == named
        and "+".join(each.text for each in methods.MethodText(text).parts) == text
    )


@pytest.mark.parametrize(
    "name",
    [
        "reuse", "reuse:threshold=5", "reuse+", "+divprune", "reuse+magic",
        "ipcv+evoprune", "ipcv+tome", "reuse+ipcv", "ipcv+reuse+dart", "ipcv+none",
        "reuse+none", "reuse+tome", "reuse+evoprune", "reuse+downscale", "reuse+reuse",
        "divprune+reuse", "divprune+mmr", "reuse+reuse+divprune", "reuse+mmr+divprune",
        "reuse:then=mmr+divprune",
        "fastv+evoprune", "fastv+fastv", "reuse+fastv", "none+fastv", "mmr+mmr+fastv",
        "evoprune+reuse+fastv", "fastv:share=0.5", "evoprune+fastv:share=0", "fastv:depth=1",
        "visipruner:layer=2",
        "reuse:threshold=0+divprune", "reuse:threshold=nan+divprune", "reuse+mmr:lam=2",
        "evoprune:count=1e+", "evoprune:count=1e+1e+1", "evoprune:count=1e++1", "1e+1",
        "visionzip:dominant", "reuse:threshold+mmr", "visionzip:divprune", "evoprune-paper:",
    ],
)  # fmt: skip
def test_other_combinations_are_refused(name):
    with pytest.raises(UsageError) as caught:
        methods.MethodChain.parse(name)
    assert caught.value.hint


@pytest.mark.parametrize(
    "name", ["fastv+mmr", "evoprune+fastv+fastv", "divprune+mmr", "reuse+fastv", "reuse", "", "a:b=1"]
)
def test_some_are_known_to_be_wrong_before_their_classes_are_loaded(name):
    for known in ("random", "evoprune-paper:nonsense", "reuse:threshold=5+mmr:lam=0.7", "mmr+fastv"):
        methods.MethodText(known).check()
    with pytest.raises(UsageError):
        methods.MethodText(name).check()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("visonzip", "did you mean visionzip? "),
        ("evo-prune", "did you mean evoprune? "),
        ("FastV", "did you mean fastv? "),
        ("reuse+DART", "did you mean dart? "),
        ("sparsevlm2", "did you mean sparsevlm? "),
        ("IDPruner", "did you mean idpruner? "),
        ("MMG-Vid", "mmg is based on it; "),
    ],
)
def test_what_was_probably_meant(name, meant):
    with pytest.raises(UsageError) as caught:
        methods.MethodText(name).check()
    assert caught.value.hint.startswith(meant)


def test_an_installation_without_entry_points_says_so(monkeypatch):
    monkeypatch.setattr(registry, "_plugins", dict)
    with pytest.raises(UsageError) as caught:
        methods.MethodText("tome").check()
    assert caught.value.hint.startswith("the methods of evoprune.contrib are not installed")


def test_only_evoprune_finds_a_budget_by_itself():
    assert methods.MethodChain.parse("evoprune").automatic().encoder.within > 0
    assert methods.MethodChain.parse("evoprune:within=0.2").automatic().encoder.within == 0.2
    for name in {*methods.available(plugins=False), "reuse+divprune"} - {"evoprune"}:
        method = methods.MethodChain.parse(name)
        with pytest.raises(UsageError, match=method.first.name):
            method.automatic()


# The statements of docs/methods.md about all methods: where each works, the contract of a selector, and reasons for refusals.


HEADER = (
    "method", "commands, `VideoQA`", "images", "`EvoPrune(...)(model)`, `apply`", "`evoprune.encode`", "vLLM", "overlay",
    "`-b auto`", "`-b auto:inflection`",
)  # fmt: skip
WHOLE = ("subsample", "evs")  # they keep at least a frame pair, and an image has one (tests/session/test_pictures.py)


def works(call, *args, **more) -> str:
    try:
        call(*args, **more)
    except UsageError:
        return "no"
    return "yes"


def facts(name: str) -> tuple[str, ...]:
    """Return a method's table cells in the order of `HEADER`. tests/cli/test_methods.py runs each method in every command."""
    method = methods.MethodChain.parse(name)
    encode = works(encoding.patch_config, Budget.PRESETS["fast"], name, has_question=True)
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
    """Return the lines of the table, in which methods that work in the same places share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in methods.available(plugins=False):
        rows.setdefault(facts(name), []).append(f"`{name}`")
    lines = [HEADER, ("---",) * len(HEADER), *((", ".join(names), *where) for where, names in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def test_the_document_says_where_each_method_works():
    page = Path("docs/methods.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, "docs/methods.md needs this table:\n" + "\n".join(table())
    names, context = methods.available(plugins=False), HEADER.index("`EvoPrune(...)(model)`, `apply`") - 1
    refused = sum(facts(name)[context] == "no" for name in names)
    assert f"but {refused} of the {len(names)} methods are rejected there" in " ".join(page.split())


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


def test_methods_that_make_inputs_smaller_are_known_before_they_are_loaded():
    own = [name for name in methods.available(plugins=False) if isinstance(methods.get(name), InputMethod)]
    assert sorted(own) == sorted(registry.RESIZING)
    assert [name for name in methods.available(plugins=False) if methods.MethodText(name).may_resize] == list(
        registry.RESIZING
    )
    assert (
        not methods.MethodText("reuse:threshold=5+divprune+fastv").may_resize
        and methods.MethodText("downscale+fastv").may_resize
    )
    assert methods.MethodText("mixed").may_resize  # a method of another package may resize


@pytest.mark.parametrize(
    "text",
    [
        "+".join(["a"] * 100_000), "evoprune" + ":depth=1" * 100_000, "a" * 100_000, ",".join(["evoprune"] * 100_000),
        "evoprune:depth=" + "1" * 100_000, "+" * 100_000, ":" * 8192, "reuse" + "+divprune" * 900, ",".join(["a"] * 4000),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_long_text_is_refused_at_once(text):
    begun = time.process_time()
    for use in (
        lambda: methods.MethodText(text).check(),
        lambda: methods.MethodText(text).members(),
        lambda: PruneOptions(0.5, text).config(),
    ):
        with pytest.raises(UsageError) as caught:
            use()
        assert len(caught.value.message) < 400 and len(caught.value.hint) < 600
    assert time.process_time() - begun < 2
