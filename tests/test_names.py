"""Check that every name in backticks in documents, docstrings and comments exists in the code.

A path must exist. `Class.member`, `module.name` and a name before its file ("`name` (path.py)") must be defined in that class or
file. Every other name must occur in the code as a function, class, attribute, parameter or field, or as a whole string, such as a
JSON field, an option or a method. Names of torch and transformers are looked up in these libraries, and `OTHERS` lists names of
other programs.
"""

import ast
import builtins
import importlib
import io
import keyword
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
TOPS = ("evoprune", "evoprune_cli", "plugins", "experiments")
LIBRARIES = ("torch", "transformers")
FILES = (
    "gif",
    "gz",
    "jpg",
    "json",
    "jsonl",
    "mkv",
    "mp4",
    "pt",
    "pyi",
    "safetensors",
    "srt",
    "svg",
    "toml",
    "txt",
    "vtt",
    "zip",
)
OTHERS = {
    # shells and files
    "sh", "proc", "nohup", "site", "TMPDIR", "https_proxy", "no_proxy", "x1b", "frame2", "frame10", "img",
    "white-space",
    # browsers, Docker and systemd
    "docker", "--cap-drop", "--security-opt", "--read-only", "--tmpfs",
    "sessionStorage", "systemd-analyze", "PrivateDevices", "ProtectHome", "MemoryDenyWriteExecute",
    # pip
    "--extra-index-url", "-i", "--no-build-isolation", "--from", "BUILD_CUDA_EXT",
    # FFmpeg, PyAV and decord
    "zscale", "npl", "bt709", "tonemap", "mobius", "desat", "matroska", "AVDOVIMetadata", "AVDOVIRpuDataHeader", "seek_accurate",
    "skip_frames",
    # torch and transformers: parameters, attributes of objects, and values
    "adjust_lr_fn", "match_rms_adamw", "fullgraph", "modules_to_save", "merge_and_unload", "get_base_model",
    "get_video_features",
    # vLLM and lmms-eval
    "vllm.general_plugins", "vllm.entrypoints.openai.api_server", "mm_processor_kwargs", "video_backend", "decode_opencv",
    "frame_recovery", "--media-io-kwargs", "--trust-request-mm-kwargs", "--allowed-local-media-path", "VLLM_VIDEO_LOADER_BACKEND",
    "--hf-overrides", "--max-model-len", "mvbench", "longvideobench_val_v", "mlvu_dev", "model_args", "token_counts",
    # models and answers
    "Qwen", "Qwen3-VL-4B-Instruct", "boxed", "nWhat", "org",
    "pretrained_selector",
    # placeholders, names that are put together from parts, and the groups of entry points
    "FOLDER", "NAME", "SETTING", "VALUE", "DIR", "OUT", "row_answer", "demo_scenes_model", "demo_scenes_model_folder",
    "demo_model_folder", "evoprune.methods", "evoprune.language_methods", "EVOPRUNE_CONTRACT",
}  # fmt: skip

IDENTIFIER = r"[A-Za-z_]\w*"
# Options, and names with or without dots; parts of names may be joined by hyphens, as in the names of methods.
NAMES = re.compile(rf"(?<![\w./-])--?[a-z][\w-]*|(?<![\w/-]){IDENTIFIER}(?:-[a-z]\w*)*(?:\.{IDENTIFIER})*")
NAME_IN_FILE = re.compile(r"`(\w+)(?:\(\))?`,? (?:\(|in )`?((?:[\w-]+/)*[\w-]+\.py)\b")


@cache
def sources() -> dict[str, str]:
    """Return the text of each Python file and stub of the program and the experiments, by path."""
    files = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py*") if path.suffix in (".py", ".pyi"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def code(path: str) -> list[ast.AST]:
    """Return all nodes of a file except docstrings."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += (child for child in ast.iter_child_nodes(node) if not is_docstring(child))
    return found


def defined(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the functions, classes, parameters, variables and attributes that nodes define."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def strings(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def used() -> set[str]:
    """Return every name and whole string in the code, path components, and names in `pyproject.toml` and configurations."""
    found: set[str] = set()
    for path in sources():
        found |= strings(code(path))
        found |= {
            flag for text in strings(code(path)) if text.startswith("--") for flag in text.split("/")
        }  # --x/--no-x
        found |= {part for part in re.split(r"[/.]", path) if part not in ("py", "pyi")}
        for node in code(path):
            for field in ("name", "id", "attr", "arg", "asname", "module"):
                name = getattr(node, field, None)
                if isinstance(name, str):
                    found |= {name, *name.split(".")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in project["entry-points"].values():
        found |= group.keys()
    found |= project["optional-dependencies"].keys()
    for path in ROOT.glob("evoprune/**/*.json"):
        found |= set(re.findall(r'"(\w+)":', path.read_text(encoding="utf-8")))
    return found | {"--" + name.replace("_", "-") for name in found if name.isidentifier()}


@cache
def endings() -> set[str]:
    """Return the suffixes that the code appends to names: `_low` in `f"{name}_low"`."""
    joined = (node for path in sources() for node in code(path) if isinstance(node, ast.JoinedStr))
    return {text for text in strings(part for each in joined for part in each.values) if re.fullmatch(r"_\w+", text)}


@cache
def in_modules() -> dict[str, set[str]]:
    """Return the names that modules define, by module name. Packages also contain their modules."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        parts = Path(path).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        imported = {alias.asname or alias.name for node in tree(path).body for alias in getattr(node, "names", ())}
        found[names[-1]] |= defined(code(path)) | {name.split(".")[0] for name in imported}
        for package, name in pairwise(names):
            found[package].add(name)
    return found


@cache
def in_classes() -> dict[str, set[str]]:
    """Return the members of classes, by class name. `*` stands for unknown members of a base class from another project."""
    members: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        for node in code(path):
            if isinstance(node, ast.ClassDef):
                members[node.name] |= defined(ast.walk(node))
                bases[node.name] |= {ast.unparse(base).partition("[")[0].split(".")[-1] for base in node.bases}
    own = {name: frozenset(found) for name, found in members.items()}
    for name in own:
        waiting = [*bases[name]]
        while waiting:
            base = waiting.pop()
            members[name] |= own.get(base, {"*"})
            waiting += bases.get(base, ())
    return members


def in_library(chain: list[str]) -> bool:
    """Return True if a dotted name resolves in a library."""
    found = importlib.import_module(chain[0])
    for number, name in enumerate(chain[1:], 2):
        path = ".".join(chain[:number])
        spec = find_spec(path) if hasattr(found, "__path__") and path not in sys.modules else None
        if spec:  # search the text of a module that is not imported here
            text = Path(spec.origin).read_text(encoding="utf-8")
            return all(re.search(rf"\b{each}\b", text) for each in chain[number:])
        if name not in dir(found):
            return False
        if number < len(chain):
            found = getattr(found, name)
    return True


def is_known(name: str) -> bool:
    """Return True if a name without dots belongs to the code, to Python or to other programs."""
    if name in used() or name in OTHERS or hasattr(builtins, name) or hasattr(object, name) or keyword.iskeyword(name):
        return True
    return without_ending(name) in used()


def without_ending(name: str) -> str:
    return next((name.removesuffix(ending) for ending in sorted(endings()) if name.endswith(ending)), name)


@cache
def in_objects() -> set[str]:
    """Return the members of all classes, and all strings. Some strings are names of JSON fields."""
    found = {text for path in sources() for text in strings(code(path))}
    return found.union(*in_classes().values())


@cache
def attributes() -> set[tuple[str, str]]:
    """Return the (owner, attribute) pairs around each dot in the code."""
    nodes = (node for path in sources() for node in code(path) if isinstance(node, ast.Attribute))
    return {(getattr(node.value, "attr", getattr(node.value, "id", "")), node.attr) for node in nodes}


def belongs(owner: str, name: str) -> bool:
    """Return True if `owner.name` can be valid. The owner is a class, a module, or an object of any class."""
    if name in OTHERS or hasattr(object, name) or (owner, name) in attributes():
        return True
    if owner in in_classes():
        return bool({name, "*"} & in_classes()[owner])
    if owner in in_modules() and name not in in_modules()[owner]:
        return bool({name, without_ending(name)} & in_objects())
    return True


def resolves(name: str) -> bool:
    chain = name.split(".")
    if name in OTHERS or name in used():
        return True
    if chain[0] in LIBRARIES and len(chain) > 1:
        return in_library(chain)
    if chain[0] == "tests":
        return (ROOT / "/".join(chain)).with_suffix(".py").exists()
    return all(map(is_known, chain)) and all(belongs(owner, member) for owner, member in pairwise(chain))


def exists(path: str, page: str) -> bool:
    if any((folder / path).exists() for folder in (ROOT, ROOT / "evoprune", (ROOT / page).parent)):
        return True
    return any(source.endswith(f"/{path}") for source in sources())


def unknown(text: str, page: str) -> Iterator[str]:
    """Yield the names in backticks that exist nowhere else."""
    for name, path in NAME_IN_FILE.findall(text):
        files = [source for source in sources() if f"/{source}".endswith(f"/{path}")]
        if (ROOT / path).exists():
            files.append(path)
        if not any(name in defined(code(file)) | strings(code(file)) for file in files):
            yield f"{name} in {path}"
    for quoted in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        if re.fullmatch(r"[\w.-]+/[\w./-]*|[\w-]+\.(?:py|md)", quoted) and exists(quoted, page):
            continue
        if re.search(r"\.(?:py|md)$", quoted) and " " not in quoted:
            yield quoted
            continue
        if quoted in used():
            continue
        for found in NAMES.findall(re.sub(r"\[[^]]*\]|https?://\S+", "", quoted)):
            is_prose = " " in quoted and not re.search(r"_|[a-z][A-Z]|^--|\.", found)
            is_file = found.rpartition(".")[2] in FILES
            if len(found) > 1 and not is_prose and not is_file and not resolves(found):
                yield f"{found} of {quoted}"


def prose(path: str) -> str:
    """Return the docstrings and comments of a file."""
    texts = [node.value.value for node in ast.walk(tree(path)) if is_docstring(node)]
    if re.search(r"#.*`", sources()[path]):
        for token in tokenize.generate_tokens(io.StringIO(sources()[path]).readline):
            if token.type == tokenize.COMMENT:
                texts.append(token.string)
    return "\n\n".join(texts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_a_page_resolve(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    assert not list(unknown(text, page.relative_to(ROOT).as_posix()))


@pytest.mark.parametrize("top", TOPS)
def test_names_of_docstrings_and_comments_resolve(top):
    files = [path for path in sources() if path.startswith(f"{top}/")]
    wrong = [f"{path}: {name}" for path in files for name in unknown(prose(path), path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "stale",
    [
        "`planned_inputs`", "`evoprune.sessions`", "`Session.flush`", "`Plan.encoders`", "`frames.open_inputs`",
        "`chain.farthest_points`", "`--budgets-of`", "`torch.nn.no_such`", "`hf/decoding.py`", "`nowhere.py`",
        "`rows[].lost_share`", "`flush_cache(path)`",
        "`select` (methods/ranking.py)", "`gone_for_good` (`methods/chain.py`)", "`evoprune:no_such_setting=1`",
    ],
)  # fmt: skip
def test_a_stale_name_is_found(stale):
    assert list(unknown(f"It calls {stale} first.", "docs/house.md"))


@pytest.mark.parametrize(
    "right",
    [
        "`open_inputs`", "`Session`", "`VideoQA.stream`", "`methods.selecting.select`", "`video.codec`", "`--budget`",
        "`torch.nn.Linear`", "`methods/chain.py`", "`rows[].difference_low`", "`evoprune:reuse=0+fastv`",
        "`select` (methods/selecting.py)", "`a few words`", "`EvoPrune(...)(model)`", "`[B, 1, L, L]`", "`0.25`",
    ],
)  # fmt: skip
def test_a_name_that_is_there_is_not(right):
    assert not list(unknown(f"It calls {right} first.", "docs/house.md"))
