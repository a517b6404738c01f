"""Test that other packages import the public names of a package from its `__init__.py`, and nothing from the files inside it."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    **{f"evoprune.{path.parent.name}": path.parent for path in sorted(ROOT.glob("evoprune/*/__init__.py"))},
    "evoprune_cli": ROOT / "evoprune_cli",
}
MOST_NAMES = {  # on each door; may only be lowered
    "backend": 35,
    "session": 35,
    "methods": 38,
    "video": 31,
    "bench": 24,
    "language": 18,
    "model": 20,
    "batch": 12,
    "vision": 11,
    "hf": 13,
    "bundled": 2,
    "live": 2,
    "moments": 2,
    "contrib": 1,
}
MOST_IN_TESTS = 96  # number of inner imports; may only be lowered


def files() -> Iterator[Path]:
    for top in ("evoprune", "evoprune_cli", "plugins", "experiments", "tests"):
        yield from sorted((ROOT / top).rglob("*.py"))


def room_of(module: str) -> str | None:
    """Return the package that a dotted module name belongs to, or None for a module without a door such as `evoprune.errors`."""
    parts = module.split(".")
    return next((room for room in (".".join(parts[:2]), parts[0]) if room in ROOMS), None)


def may_open(path: Path, room: str) -> bool:
    """Return True if a file belongs to a package or to the folder of its tests: `tests/video/` tests `evoprune.video`."""
    tests = ROOT / "tests" / ("cli" if room == "evoprune_cli" else ROOMS[room].name)
    return path.is_relative_to(ROOMS[room]) or path.is_relative_to(tests)


def inner_imports(path: Path, code: str) -> Iterator[str]:
    """Yield the imports of a file that bypass the door of another package."""
    if not re.search(r"^\s*(from|import) +evoprune(_cli|\.\w+)\.", code, re.M):
        return  # true of most files, and faster than parsing
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            room = room_of(module)
            if room and module != room and not may_open(path, room):
                yield f"{path.relative_to(ROOT)}:{node.lineno} imports from {module}, not from {room}"


def test_other_rooms_come_through_the_door():
    inside = [found for path in files() for found in inner_imports(path, path.read_text(encoding="utf-8"))]
    tests = [found for found in inside if found.startswith("tests/")]
    product = [found for found in inside if found not in tests]
    assert not product, "\n".join([f"{len(product)} imports from inside a room:", *product])
    assert len(tests) <= MOST_IN_TESTS, "\n".join(
        ["tests outside of the room's own folder that import from inside it:", *tests]
    )
    code = "import evoprune.video.frames\ndef f():\n    from evoprune.video.sandbox import worker\nfrom evoprune.video import probe"
    assert len(list(inner_imports(ROOT / "evoprune/session/x.py", code))) == 2
    assert not list(inner_imports(ROOT / "tests/video/x.py", code)) and not list(
        inner_imports(ROOT / "evoprune/video/x.py", code)
    )


def declared(room: str) -> tuple[set[str], set[str]]:
    """Return the names that a door imports for type checkers, and the subset that are modules."""
    tree = ast.parse((ROOMS[room] / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}, {
        alias.name for node in imports if node.module == room for alias in node.names
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_has_what_it_says(room):
    door = import_module(room)
    assert len(set(door.__all__)) == len(door.__all__)
    for name in door.__all__:
        if name not in declared(room)[1]:
            assert hasattr(door, name), name
    typed = declared(room)[0]
    assert typed <= set(door.__all__)
    assert not hasattr(door, "nothing_of_this_name")


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "evoprune_cli"])
def test_the_doors_are_narrow(room):
    assert len(import_module(room).__all__) <= MOST_NAMES[ROOMS[room].name]
