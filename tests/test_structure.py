"""Test the structure of the code: which imports are allowed, and which arguments each module must specify."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from evoprune.model import FAMILIES

ROOT = Path(__file__).parent.parent
# Entries of evoprune/ in import order: each one imports only from entries before it.
ORDER = (
    "errors", "util", "files", "untrusted", "timeline", "keywords", "suggestions", "signatures", "bundled", "statistics", "report",
    "backend", "model", "methods", "video", "vision", "language", "session", "hf", "live", "moments", "video_qa", "batch",
    "contrib", "bench",
)  # fmt: skip
# Functions of torch that make a tensor from numbers. Without dtype and device, they use the host program's defaults.
MAKERS = (
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip

Graph = dict[str, dict[str, str]]  # importer -> imported -> "file:line" of one such import


@cache
def modules() -> dict[str, Path]:
    """Return every module of the program by its dotted name; a package is the module of its `__init__.py`."""
    found = {}
    for top in (ROOT / "evoprune", ROOT / "evoprune_cli", *ROOT.glob("plugins/*/evoprune_*")):
        for path in sorted(top.rglob("*.py")):
            names = path.relative_to(top.parent).with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    """Return the code of a module. The public names of a package are imports in its stub."""
    code = ast.parse(modules()[name].read_text(encoding="utf-8"))
    if stub(name).exists():
        code.body += ast.parse(stub(name).read_text(encoding="utf-8")).body
    return code


def stub(name: str) -> Path:
    return modules()[name].with_suffix(".pyi")


def is_package(name: str) -> bool:
    return modules()[name].name == "__init__.py"


def targets(name: str, node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a node of module `name` imports: modules, or names inside modules."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = name.split(".") if is_package(name) else name.split(".")[:-1]
        prefix = base[: len(base) - node.level + 1] if node.level else []
        source = ".".join([*prefix, *([node.module] if node.module else [])])
        yield from (f"{source}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value


def imports(name: str) -> Iterator[tuple[str, str]]:
    """Yield each import in a module, at any nesting level: the dotted name, and "file:line"."""
    path = stub(name) if stub(name).exists() else modules()[name]
    for node in ast.walk(tree(name)):
        for target in targets(name, node):
            yield target, f"{path.relative_to(ROOT)}:{node.lineno}"


def module_of(target: str) -> str | None:
    """Return the module of the program that holds a dotted name, or None for a name of another project."""
    while target and target not in modules():
        target = target.rpartition(".")[0]
    return target or None


@cache
def import_graph() -> Graph:
    """Return the imports between modules, without the public names of `evoprune/__init__.pyi`, which are loaded on first use."""
    graph: Graph = {name: {} for name in modules()}
    for name in modules():
        for target, where in imports(name):
            imported = module_of(target)
            if imported not in (None, name) and name != "evoprune":
                graph[name].setdefault(imported, where)
    return graph


def children_graph(package: str) -> Graph:
    """Return the imports between the children of a package: modules, sub-packages as one node, and the package's `__init__`."""

    def child(module: str) -> str | None:
        if module == package:
            return "__init__"
        return module[len(package) + 1 :].split(".")[0] if module.startswith(package + ".") else None

    graph: Graph = defaultdict(dict)
    for importer, imported in import_graph().items():
        for module, where in imported.items():
            a, b = child(importer), child(module)
            if a and b and a != b:
                graph[a].setdefault(b, where)
    return graph


def circle(graph: Graph) -> list[str]:
    """Return one import cycle with the line of every import, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        chain = found.args[1][::-1]
        return [" ".join([chain[0], *(f"-> {b} ({graph[a][b]})" for a, b in pairwise(chain))])]
    return []


def fail_on(offenders: Iterable, problem: str) -> None:
    found = list(offenders)
    assert not found, "\n".join([f"{problem}:", *map(str, found)])


def test_no_file_imports_itself_through_others():
    fail_on(circle(import_graph()), "files that import each other in a circle")
    graph = {"a": {"b": "a.py:1"}, "b": {"c": "b.py:2", "d": "b.py:3"}, "c": {"a": "c.py:4"}, "d": {}}
    (found,) = circle(graph)
    assert all(step in found for step in ("-> b (a.py:1)", "-> c (b.py:2)", "-> a (c.py:4)")) and "d" not in found
    assert circle({"a": {"b": ""}, "b": {"c": ""}, "c": {}}) == []


@pytest.mark.parametrize("package", [name for name in modules() if is_package(name)])
def test_the_children_of_a_package_form_no_circle(package):
    fail_on(circle(children_graph(package)), f"children of {package} that import each other in a circle")


def test_a_package_imports_only_those_before_it_in_the_order():
    places = {name: ORDER.index(name.split(".")[1]) for name in modules() if name.startswith("evoprune.")}
    fail_on(
        (
            f"{where}: {importer} imports {module}"
            for importer, imported in import_graph().items()
            for module, where in imported.items()
            if importer in places and module in places and places[module] > places[importer]
        ),
        "imports of a package that comes later in the order",
    )


def test_the_library_imports_neither_the_command_line_nor_plugins_nor_experiments_nor_tests():
    outside = ("evoprune_cli", "experiments", "tests", "evoprune_lmms_eval", "evoprune_vllm", "lmms_eval", "vllm")
    library = [name for name in modules() if name.split(".")[0] == "evoprune"]
    fail_on(
        (
            f"{where}: {target}"
            for name in library
            for target, where in imports(name)
            if target.split(".")[0] in outside
        ),
        "imports from outside the library",
    )


def test_the_library_has_no_entries_outside_the_order():
    entries = {path.stem for path in (ROOT / "evoprune").iterdir() if path.name[0] not in "_."} - {"py"}
    assert entries == set(ORDER), sorted(entries ^ set(ORDER))


def without_dtype_or_device(code: ast.Module) -> Iterator[ast.Call]:
    """Yield calls that make a tensor and do not state both dtype and device."""
    makers = {f"torch.{name}" for name in MAKERS}
    for node in ast.walk(code):
        stated = {keyword.arg for keyword in node.keywords} if isinstance(node, ast.Call) else {"dtype", "device"}
        if not {"dtype", "device"} <= stated and ast.unparse(node.func) in makers:
            yield node


def test_every_tensor_states_its_dtype_and_its_device():
    fail_on(
        (
            f"{name}:{node.lineno} {ast.unparse(node)}"
            for name in modules()
            for node in without_dtype_or_device(tree(name))
        ),
        "tensors of the host program's default dtype or device",
    )
    right = "torch.zeros(3, dtype=x.dtype, device=x.device), torch.zeros_like(x), x.new_zeros(3), torch.cat([x])"
    assert not list(without_dtype_or_device(ast.parse(right)))
    for wrong in ("torch.zeros(3)", "torch.tensor([1], dtype=torch.int64)", "torch.arange(3, device=x.device)"):
        assert list(without_dtype_or_device(ast.parse(f"y = f({wrong})")))


def test_every_package_says_what_it_is_for():
    packages = [name for name in modules() if is_package(name)]
    fail_on((name for name in packages if not ast.get_docstring(tree(name))), "packages without a docstring")


def test_every_python_file_that_house_md_or_the_code_names_exists():
    """The examples in house.md, which are in fenced blocks, are exempt."""
    tops = ("evoprune", "evoprune_cli", "plugins", "experiments", "tests")
    files = "\n".join(f"/{path.relative_to(ROOT).as_posix()}" for top in tops for path in (ROOT / top).rglob("*.py"))
    house = (ROOT / "docs/house.md").read_text(encoding="utf-8")
    texts = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
    texts["docs/house.md"] = re.sub(r"^```.*?^```", "", house, flags=re.S | re.M)
    named = ((where, name) for where, text in texts.items() for name in re.findall(r"[\w/]+\.py\b", text))
    fail_on(
        (each for each in named if not re.search(rf"/{re.escape(each[1])}$", files, re.M)), "files that do not exist"
    )


# Modules that may ask for a model's family.
FAMILIES_KNOWN_TO = ("evoprune.model.config",)


def asked_families(code: ast.Module) -> Iterator[ast.AST]:
    """Yield nodes that name a model family or read the family of a model."""
    calls = {id(node.func) for node in ast.walk(code) if isinstance(node, ast.Call)}
    for node in ast.walk(code):
        named = node.id if isinstance(node, ast.Name) else getattr(node, "value", None)
        if named in ("QWEN2_5", "QWEN2", "QWEN3", *FAMILIES) or (
            isinstance(node, ast.Attribute) and node.attr == "family" and id(node) not in calls
        ):
            yield node


def test_no_other_file_asks_for_the_family_of_a_model():
    others = [name for name in modules() if name not in FAMILIES_KNOWN_TO]
    fail_on(
        (f"{name}:{node.lineno} {ast.unparse(node)}" for name in others for node in asked_families(tree(name))),
        "questions for the family of a model",
    )
    assert all(list(asked_families(tree(name))) for name in FAMILIES_KNOWN_TO)


# Modules that may ask for the kind of a device: `verify` reports it, vLLM has its own devices, statistics print a record's.
DEVICES_KNOWN_TO = ("evoprune.backend.", "evoprune.bench.verify.", "evoprune_vllm.", "evoprune.statistics")


def asked_devices(code: ast.Module) -> Iterator[ast.AST]:
    """Yield nodes that read the kind of a device, compare its name, or use torch functions for one kind."""
    for node in ast.walk(code):
        asked = r"(.*\.)?device\.type|torch\.(cuda|accelerator|mps|xpu)|.*\.is_(cpu|cuda|meta|mps|xpu)"
        if isinstance(node, ast.Attribute) and re.fullmatch(asked, ast.unparse(node)):
            yield node
        begins = isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "startswith"
        values = ast.walk(node) if begins or isinstance(node, ast.Compare) else ()
        name = r"(cpu|cuda|meta|mps|xpu)(:\d*)?"
        if any(isinstance(each, ast.Constant) and re.fullmatch(name, str(each.value)) for each in values):
            yield node


def test_no_other_file_asks_what_a_device_is():
    others = [name for name in modules() if not f"{name}.".startswith(DEVICES_KNOWN_TO)]
    fail_on(
        (f"{name}:{node.lineno} {ast.unparse(node)}" for name in others for node in asked_devices(tree(name))),
        "questions for a device",
    )
    asked = (
        "x.device.type == kind, device.type, torch.cuda.empty_cache(), x.is_cuda, torch.accelerator.synchronize(), "
        "device == 'cpu', 'cuda:0' != name, (dtype, device) == ('fp32', 'cpu'), name in ('mps', 'xpu'), name.startswith('cuda')"
    )
    assert len(list(asked_devices(ast.parse(asked)))) == 10
    others = "x.device, torch.backends.cuda.flash_sdp_enabled(), dtype.type, x.to('cpu'), name == 'auto', zeros(device='cpu')"
    assert not list(asked_devices(ast.parse(others)))


# Questions about a device that only backend/ asks, and `verify`, which reports the checks that a device has.
QUESTIONS = ("is_host", "uses_kernels", "wants_plain_pytorch")
ANSWERED_FOR = ("evoprune.backend.", "evoprune.bench.verify.")


def questions(code: ast.Module) -> Iterator[ast.AST]:
    """Yield nodes that use one of the questions, however it was imported."""
    for node in ast.walk(code):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [getattr(node, "attr", None), getattr(node, "id", None)]
        if {*names} & {*QUESTIONS}:
            yield node


def test_outside_backend_nobody_asks_what_depends_on_a_device():
    others = [name for name in modules() if not f"{name}.".startswith(ANSWERED_FOR)]
    fail_on(
        (f"{name}:{node.lineno} {ast.unparse(node)}" for name in others for node in questions(tree(name))),
        "questions for a device: call a function of backend/ that does what depends on it",
    )
    defined = {node.name for name in modules() for node in tree(name).body if isinstance(node, ast.FunctionDef)}
    assert {*QUESTIONS} <= defined
    asked = (
        "from evoprune.backend.devices import HOST, is_host\nif devices.is_host(device) or uses_kernels(device): pass"
    )
    assert len(list(questions(ast.parse(asked)))) == 3


def test_imports_are_found_wherever_they_are_written(monkeypatch):
    code = (
        "from evoprune import methods\nfrom . import decoder\nfrom ..video.info import Video\n"
        "def f():\n    import evoprune.report\n    import_module('evoprune.errors')\n"
        "if TYPE_CHECKING:\n    from evoprune.methods.ranking import merge\n"
    )
    monkeypatch.setitem(globals(), "tree", lambda name: ast.parse(code))
    assert {target for target, _ in imports("evoprune.language.generate")} == {
        "evoprune.methods", "evoprune.language.decoder", "evoprune.video.info.Video", "evoprune.report",
        "evoprune.errors", "evoprune.methods.ranking.merge",
    }  # fmt: skip
    assert module_of("evoprune.video.info.Video") == "evoprune.video.info" and module_of("torch.nn") is None


def test_nothing_writes_into_a_frozen_object():
    """Arguments are converted before the fields of a frozen dataclass are set; see `evoprune.util.converted`."""
    fail_on(
        (name for name, path in modules().items() if "object.__setattr__" in path.read_text(encoding="utf-8")),
        "modules that write into a frozen object",
    )
