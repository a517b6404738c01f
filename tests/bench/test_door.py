"""What the command line takes from `evoprune.bench`."""

import ast
from pathlib import Path

import pytest

from evoprune import bench


def test_every_name_is_there_and_no_other():
    for name in bench.__all__:
        assert getattr(bench, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        bench.nothing  # noqa: B018


def test_the_command_line_imports_nothing_from_inside():
    taken = set()
    for path in (Path(__file__).parents[2] / "evoprune_cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evoprune.bench"):
                assert node.module == "evoprune.bench", f"{path.name} imports {node.module}"
                taken |= {alias.name for alias in node.names}
    assert taken == set(bench.__all__)
