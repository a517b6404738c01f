"""The ablations: every variant exists, and the tables agree with the samples."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from evoprune import methods
from evoprune.bench.eval import EvalSettings
from evoprune.session.options import GenerationOptions
from experiments import ablations
from experiments.ablations import ABLATIONS, Ablation, table
from experiments.paired import in_points, paired_difference


def sample(method, budget, video, number, right, live=0.5):
    return {
        "row": "method", "method": method, "budget": budget, "video": video, "id": f"{video}-{number}", "right": right,
        "live_share": live, "kept_share": live / 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_is_a_method_and_differs_from_all_others(name):
    made = [methods.parse(spec) for spec in ABLATIONS[name].specs().values()]
    assert len(made) >= 2 and len({repr(method) for method in made}) == len(made)


def test_a_variant_is_settings_or_the_name_of_another_method():
    variants = {"as it is": "", "set": "a=1:b=2", "other": "evs", "combined": "reuse:threshold=5+mmr:lam=0.7"}
    assert [*Ablation("?", "m", variants).specs().values()] == ["m", "m:a=1:b=2", *[*variants.values()][2:]]
    assert Ablation("?", "reuse+mmr", {"0.7": "lam=0.7"}).specs() == {"0.7": "reuse+mmr:lam=0.7"}


def test_differences_are_paired():
    random = np.random.default_rng(0)
    others = [sample("a", 0.1, f"v{v}", i, bool(random.random() < 0.5)) for v in range(40) for i in range(3)]
    same = [s | {"method": "b"} for s in reversed(others)]
    assert in_points(*paired_difference(same, others)) == "+0.0 (+0.0 to +0.0)"
    better = [s | {"right": True} for s in others]
    share = 100 * (1 - np.mean([s["right"] for s in others]))
    assert in_points(*paired_difference(better, others)).startswith(f"{share:+.1f} (")
    low, high = in_points(*paired_difference(better, others)).split("(")[1].rstrip(")").split(" to ")
    assert 0 < float(low) < share < float(high) < 100


def test_the_table_holds_every_variant_at_every_budget():
    samples = [
        sample(spec, budget, f"v{v}", 0, v < n, live=budget)
        for spec, n in (("m", 6), ("m:x=1", 9))
        for budget in (0.5, 0.1)
        for v in range(12)
    ] + [{"row": "full", "error": {}, "method": "m", "budget": 0.5}]
    lines = table(Ablation("?", "m", {"without": "", "with": "x=1"}), samples, (0.5, 0.1))
    assert lines[2] == "| without | 50.0 |  | 0.50 | 0.25 | 50.0 |  | 0.10 | 0.05 |"
    assert lines[3].startswith("| with | 75.0 | +25.0 (") and lines[3].endswith("| 0.10 | 0.05 |")
    assert all(line.count("|") == lines[0].count("|") for line in lines)


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
