"""Methods with a trained scorer: messages, reports, and the disk cache."""

import json

import pytest

from tests.scorers import scorer_tensors, write_scorer

SQUARE = "samples/square.mp4"
BOTH = ("idpruner", "visionselector")


@pytest.mark.parametrize("name", BOTH)
def test_a_model_without_a_scorer_is_told_where_to_get_one(cli, tiny_folder, tmp_path, name):
    asked = ("ask", SQUARE, "What?", "-m", str(tiny_folder), "-b", "0.25", "-n", "1", "--frames", "4")
    made = cli(*asked, "--method", name)
    assert made.code and made.out == ""
    first, second = made.err.splitlines()[-2:]
    assert "needs a scorer trained for this model" in first and "YF-T/IDPruner" in second and "mmr" in second
    width = json.loads((tiny_folder / "config.json").read_text())["vision_config"]["out_hidden_size"]
    setting = write_scorer(tmp_path, scorer_tensors(width))
    assert cli(*asked, "--method", f"{name}:{setting}").code == 0


def test_the_cache_distinguishes_scorers_by_content(cli, tmp_path):
    asked = ("ask", SQUARE, "What?", "-n", "1", "--frames", "4", "-b", "0.25", "--cache", "--json")
    seen = []
    for seed in (0, 0, 1):
        setting = write_scorer(tmp_path / "scorer", scorer_tensors(192, seed=seed))
        made = cli(*asked, "--method", f"idpruner:{setting}").record
        seen.append((made["pruning"]["args"]["scorer"], made["cache"]))
    (first, before), (same, again), (other, after) = seen
    assert first == same != other and (before, again, after) == ("miss", "hit", "miss")
