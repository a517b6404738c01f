"""Every listed method can be chosen in every command that prunes, and its effect is reported."""

import json
from pathlib import Path

import pytest

from evoprune import methods
from tests.methods.kinds import INNER, NEED_FILES, one_of_each

CLIP = "samples/square.mp4"
NAMES = methods.available(plugins=False)
RUN = [name for name in NAMES if name not in NEED_FILES]

PAIRS = [
    f"{before}+{inner}"
    for before, inner in zip(("evoprune", "reuse+divprune", "downscale", "tome"), INNER, strict=False)
]

EXACT = [name for name in NAMES if name != "none" and methods.MethodChain.parse(name).exact]


def reads_question(name: str) -> bool:
    return methods.MethodChain.parse(name).reads_question or name in INNER


@pytest.fixture
def tiny(cli, tiny_folder):
    def call(command, *args, **settings):
        return cli(command, *map(str, args), "-m", str(tiny_folder), **settings)

    return call


@pytest.mark.few(4)
@pytest.mark.parametrize("name", one_of_each([*NAMES, *PAIRS]))
def test_ask(tiny, name):
    made = tiny("ask", CLIP, "What happens?", "-n", 2, "--frames", 8, "-b", 0.25, "--method", name, "--json").record
    pruning = made["pruning"]
    assert made["error"] is None and pruning["method"] == name
    kept = pruning["visual_tokens_kept"]
    read = [tokens for _, tokens in pruning["language_layers"] or []]
    if name in INNER:
        assert kept == 96 and read[0] == 96 and (read[1] == 24 or (name == "visipruner" and 1 <= read[1] <= 24))
    elif name in PAIRS:
        assert kept <= 24 and read[0] == kept and 1 <= read[1] <= kept // 2 and made["time_ms"]["prefill_prune"] > 0
    elif name == "none":
        assert kept == 96 and not read
    elif name == "evs":  # keeps at least the first grid
        assert kept == 24
    else:
        assert kept == 24 or (name not in EXACT and 12 <= kept < 24)


def test_all_are_listed_with_where_they_act(cli, monkeypatch):
    monkeypatch.setattr(methods, "plugins", lambda: {"own": "of a-package 1.0, broken", "evs": "of b-package, ignored"})
    listed = cli("methods", "--json").record["methods"]
    assert [each["name"] for each in listed] == [*NAMES, "own", "evs"]
    assert {each["name"] for each in listed if each["reads_question"]} == {n for n in NAMES if reads_question(n)}
    assert [each["acts"] for each in listed[:-2]] == [methods.get(name).acts for name in NAMES]
    assert all(each["source"] and each["plugin"] is None for each in listed[:-2])
    assert all(each["acts"] is None and "package" in each["plugin"] for each in listed[-2:])
    shown = cli("methods").out
    assert all(f"\n{name} " in shown for name in NAMES) and all(len(line) <= 80 for line in shown.splitlines())


def test_the_settings_of_a_method_are_listed(cli, monkeypatch):
    monkeypatch.setattr(methods, "plugins", lambda: {"evs": "of b-package, ignored"})
    (facts,) = cli("methods", "fastv", "--json").record["methods"]
    assert facts["settings"] == [
        {"name": "share", "default": None, "range": None},
        {"name": "depth", "default": 0.0625, "range": "(0, 1)"},
    ]
    shown = " ".join(cli("methods", "fastv:depth=0.5").out.split())
    assert "share - depth 0.0625 (0, 1) fastv acts in the language model" in shown
    assert "--method fastv:SETTING=VALUE changes a setting" in shown
    assert "floor true evs acts after" in " ".join(cli("methods", "evs").out.split())
    assert "It has no settings" in cli("methods", "divprune").out
    refused = cli("methods", "evoprun")
    assert refused.code == 2 and "did you mean evoprune" in refused.err


@pytest.mark.parametrize("name", NAMES)
def test_a_default_can_be_typed(cli, name):
    (facts,) = cli("methods", name, "--json").record["methods"]
    typed = [f"{each['name']}={each['default']}" for each in facts["settings"] if each["default"] is not None]
    assert methods.get(":".join([name, *typed])) == methods.get(name)


@pytest.mark.full
def test_eval(tiny, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"video": str(Path(CLIP).resolve()), "question": "What happens?", "answer": "nothing"}))
    made = tiny("eval", "--data", data, "-b", 0.25, "--method", ",".join([*RUN, *PAIRS]), "--json").record
    assert {row["method"] for row in made["rows"]} == {*RUN, *PAIRS}
    assert all(1 <= row["layer_tokens"] < row["tokens"] for row in made["rows"] if row["method"] in (*INNER, *PAIRS))
    assert all(row["n"] for row in made["rows"])
    full = made["rows"][0]
    assert all(row["tflop_3b_prefill"] < full["tflop_3b_prefill"] for row in made["rows"] if row["method"] in INNER)


@pytest.mark.full
def test_profile(tiny, monkeypatch):
    monkeypatch.setattr("evoprune.bench.profile.matmul_rate", lambda *_, **__: 1e11)
    quick = ("-r", 1, "-w", 0, "--size", "112x168", "--frames", 4, "-b", 0.25, "-n", 1, "--format", "json")
    result = tiny("profile", *quick, "--method", ",".join([*RUN, *PAIRS]))
    made = json.loads(result.out)
    assert result.code == 0 and not any(row["error"] for row in made["rows"])
    assert {row["method"] for row in made["rows"]} >= {*RUN, *PAIRS} - {"none"}
