"""Test that other packages import only the public names of a package, from its `__init__.py`, and that each name is used."""

import ast
import re
from collections.abc import Iterator
from functools import cache
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
    "session": 34,
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
        yield from sorted(path for path in (ROOT / top).rglob("*.py*") if path.suffix in (".py", ".pyi"))


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
    if not re.search(r"^\s*(from|import) +(evoprune(_cli|\.\w+)\.|\.)", code, re.M):
        return  # true of most files, and faster than parsing
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            modules = [".".join([*base, node.module])]
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
    assert list(inner_imports(ROOT / "evoprune/session/x.py", "from ..video.frames import probe"))
    assert list(inner_imports(ROOT / "evoprune/__init__.pyi", "from .video.frames import probe as probe"))
    assert not list(inner_imports(ROOT / "evoprune/__init__.pyi", "from .video import probe as probe"))
    assert not list(inner_imports(ROOT / "evoprune/video/__init__.pyi", "from .frames import probe as probe"))
    assert not list(inner_imports(ROOT / "tests/video/x.py", code)) and not list(
        inner_imports(ROOT / "evoprune/video/x.py", code)
    )


@pytest.mark.parametrize("room", ["evoprune", *ROOMS])
def test_a_door_has_what_it_says(room):
    door = import_module(room)
    assert len(set(door.__all__)) == len(door.__all__) and set(door.__all__) <= set(dir(door))
    for name in door.__all__:
        assert hasattr(door, name), name
    assert not hasattr(door, "nothing_of_this_name")


def uses(text: str) -> Iterator[tuple[str, str]]:
    """Yield each name that a file or page imports from a package with a door, or reads from the package, with the package."""
    text = re.sub(r"^from \.", "from evoprune.", text, flags=re.M)
    for room, names in re.findall(r"from (evoprune\.\w+|evoprune_cli) import +(\([^)]*\)|.*)", text):
        yield from ((room, name) for name in re.findall(r"\w+", re.sub(r"#.*| as \w+", "", names)))
    alias = re.search(r"import methods as (\w+)|$", text)[1] or "methods"
    yield from (("evoprune.methods", name) for name in re.findall(rf"\b{alias}\.(\w+)", text))


@cache
def used_in(path: Path) -> frozenset[tuple[str, str]]:
    return frozenset(uses(path.read_text(encoding="utf-8")))


def outside(room: str) -> Iterator[Path]:
    """Yield the files and pages outside a package whose uses of a name make it public. Tests alone do not."""
    tests, own = ROOT / "tests", ROOMS[room]
    yield from (path for path in files() if not path.is_relative_to(own) and not path.is_relative_to(tests))
    yield from (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/*.md"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_on_a_door_is_used_outside_the_room(room):
    used = {name for path in outside(room) for found, name in used_in(path) if found == room}
    unused = {*import_module(room).__all__} - used
    assert not unused, f"names on the door of {room} that only {room} and tests use: {sorted(unused)}"


def test_uses_are_found_however_they_are_written():
    code = "from evoprune.video import (\n    probe,  # scan\n    Video as V,\n)\nevoprune.methods.get(name)"
    assert {*uses(code)} == {("evoprune.video", "probe"), ("evoprune.video", "Video"), ("evoprune.methods", "get")}
    assert {*uses("from .hf import apply as apply")} == {("evoprune.hf", "apply")}
    assert {*uses("from evoprune import methods as registry\nregistry.get(name)")} == {("evoprune.methods", "get")}


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "evoprune_cli"])
def test_the_doors_are_narrow(room):
    assert len(import_module(room).__all__) <= MOST_NAMES[ROOMS[room].name]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


# Matches the definition of a private function, class, attribute, or variable of a module.
DEFINED = re.compile(r"(?:\b(?:def|class) |\bself\.|^)(_(?!_)\w+)(?=[(\[: ,=])", re.M)


def private_names() -> dict[str, set[str]]:
    """Return the private names that the code of rooms and other modules defines, with the folders of tests that may use them."""
    found: dict[str, set[str]] = {}
    for path in (path for path in files() if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests")):
        parts = path.relative_to(ROOT).parts
        folder = {"evoprune": parts[1], "evoprune_cli": "cli", "plugins": f"plugins/{parts[1]}"}.get(parts[0], parts[0])
        for name in DEFINED.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, set()).add(folder)
    return found


def used_private_names(code: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the private names of other objects that a test reads, imports, or patches, with their lines."""
    for node in ast.walk(code):
        names = []
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evoprune"):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            given = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            names = [each.rpartition(".")[2] for each in given if isinstance(each, str)]
        yield from ((node.lineno, name) for name in names if is_private(name))


def test_no_test_uses_private_names_of_another_room():
    """A folder of tests may use those of the room that it mirrors, and offer functions to other tests, as tests/live/inside.py."""
    known = private_names()
    foreign = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        folder = path.parent.relative_to(ROOT / "tests").as_posix()
        code = path.read_text(encoding="utf-8")
        if not re.search(r"[.\"'\s]_(?!_)\w", code):
            continue  # faster than parsing
        own = {*DEFINED.findall(code), "_name"}  # ctypes has an attribute `_name`
        for line, name in used_private_names(ast.parse(code)):
            rooms = known.get(name, set()) - {folder, *folder.split("/")[:1]}
            if name not in own and rooms and rooms == known[name]:
                foreign.append(f"{path.relative_to(ROOT)}:{line}: {name} of {', '.join(sorted(rooms))}")
    assert not foreign, "\n".join(foreign)
