"""The ablations: every variant exists, and the tables agree with the samples."""

from dataclasses import replace
from functools import partial

import pytest

from evoprune import methods
from evoprune.bench.eval import EvalSettings
from evoprune.session.options import GenerationOptions
from experiments.accuracy import ablations
from experiments.accuracy.ablations import ABLATIONS, Ablation


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_is_a_method_and_differs_from_all_others(name):
    made = [methods.parse(spec) for spec in ABLATIONS[name].specs().values()]
    assert len(made) >= 2 and len({repr(method) for method in made}) == len(made)


def test_a_variant_is_settings_or_the_name_of_another_method():
    variants = {"as it is": "", "set": "a=1:b=2", "other": "evs", "combined": "reuse:threshold=5+mmr:lam=0.7"}
    assert [*Ablation("?", "m", variants).specs().values()] == ["m", "m:a=1:b=2", *[*variants.values()][2:]]
    assert Ablation("?", "reuse+mmr", {"0.7": "lam=0.7"}).specs() == {"0.7": "reuse+mmr:lam=0.7"}


@pytest.fixture
def few(monkeypatch):
    """Two ablations of two variants each, and answers of two tokens."""
    first_two = {
        name: replace(ABLATIONS[name], variants=dict([*ABLATIONS[name].variants.items()][:2]))
        for name in ("spending", "selector")
    }
    monkeypatch.setattr(ablations, "ABLATIONS", first_two)
    generation = GenerationOptions(max_new_tokens=2)
    monkeypatch.setattr(ablations, "EvalSettings", partial(EvalSettings, generation=generation))


def test_the_command_writes_the_tables_and_resumes_its_run(tmp_path, saved, capsys, few):
    asked = [str(tmp_path / "run"), "--limit", "1", "--only", "spending,selector", "--model", str(saved), "-b", "0.1"]
    ablations.main([*asked, "--markdown", str(tmp_path / "a.md")])
    text = (tmp_path / "a.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("shapes (validation, block 0): 1 clips, ")
    assert text.count("### ") == 2 and "| 0.5 |" in text and "| random |" in text
    ablations.main(asked)  # nothing is left to do
    printed = capsys.readouterr()
    assert text in printed.out and not printed.err
