"""Test methods from entry points in other packages, which are made up for the tests, and the methods in the documentation."""

import json
import re
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.errors import PluginError, UsageError
from evoprune.methods import TowerShape, registry
from evoprune.methods.language import select_in_language
from evoprune.methods.types import Selection
from evoprune.vision import encode_rows
from tests.cli.conftest import cli  # noqa: F401
from tests.contrib.eager import COLUMNS, a_prompt, deep_model, run_method
from tests.contrib.public import public_layer
from tests.methods.tokens import encoded, plan_of
from tests.prompts import VIDEO, processed
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from evoprune.methods.base import Selector
from evoprune.methods.types import Selection

@dataclass(frozen=True)
class First(Selector):
    "The first tokens of the video."
    name: ClassVar[str] = "first"
    skip: int = 0

    def select(self, tokens, keep):
        if self.skip < -1:
            raise SystemExit(0)
        if self.skip < 0:
            raise ZeroDivisionError("no such token")
        return Selection(torch.arange(self.skip, self.skip + keep))
"""
ENTRIES = """[evoprune.methods]
first = extra_methods:First
absent = no_such_module:Thing
wrong = extra_methods:torch
random = extra_methods:First
reuse = extra_methods:First
with,comma = extra_methods:First
"""
# Invalid results of a selector (24 of 96 units expected), by the error message; and classes that are refused when loaded.
RETURNS = {
    "returned an object of class list instead of a Selection": "[1]",
    "returned 26 units instead of 24": "Selection(torch.arange(keep + 2))",
    "returned 0 units instead of 24": "Selection(torch.arange(0))",
    "returned kept as int32 .24. instead of int64 .K.": "Selection(torch.arange(keep).int())",
    "returned kept as int64 .1, 24. instead of": "Selection(torch.arange(keep)[None])",
    "returned kept as bool .96.": "Selection(torch.arange(96) < keep)",
    "returned an object of class list as kept": "Selection(list(range(keep)))",
    "returned kept on meta": "Selection(torch.arange(keep, device='meta'))",
    "returned units that are not in ascending": "Selection(torch.arange(keep).flip(0))",
    "returned units from 80 to 103 of a video with units 0 to 95": "Selection(torch.arange(80, 80 + keep))",
    "returned units from -1 to 22": "Selection(torch.arange(-1, keep - 1))",
    "returned unit_to_token as float32 .96.": "Selection(torch.arange(keep), torch.zeros(96))",
    "returned a unit_to_token whose": "Selection(torch.arange(keep), torch.zeros(96).long())",
    "returned weight as float32 .24. instead of": "Selection(torch.arange(keep), None, torch.ones(keep))",
    "returned a weight that is not": "Selection(torch.arange(keep), None, torch.ones(96) / 0)",
    "returned size as int64 .24.": "Selection(torch.arange(keep), size=torch.arange(keep))",
    "returned means, tokens as float32 .2.": "Selection(torch.arange(keep), means=(torch.ones(2),) * 3)",
    "returned means that are not three": "Selection(torch.arange(keep), means=torch.ones(2))",
    "returned means of units that do not exist": (
        "Selection(torch.arange(keep), means=(torch.arange(keep), torch.arange(keep) + 90, torch.ones(keep)))"
    ),
    "or with weights that are not": (
        "Selection(torch.arange(keep), means=(torch.arange(keep), torch.arange(keep), torch.zeros(keep)))"
    ),
    "returned a size that is not": "Selection(torch.arange(keep), size=torch.zeros(keep))",
    "failed: ZeroDivisionError: division": "1 / 0",
}
REFUSED = {
    "is incomplete: class Mine has no select": "@dataclass(frozen=True)\nclass Mine(Selector):\n    name = 'mine'",
    "Mine needs name = 'mine'": "@dataclass(frozen=True)\nclass Mine(First):\n    name = 'your'",
    "a different name in its class: Mine needs": "@dataclass(frozen=True)\nclass Mine(Selector):\n    select = First.select",
    "is not a dataclass: Mine needs": "class Mine(First):\n    name = 'mine'\n    more: int = 1",
}
PAGES = ["CONTRIBUTING.md", "docs/adding-a-method.md", "docs/methods.md"]
DOCUMENTED = ["longest", "sieve", "neighbours", "mixed", "asked", "loudest"]
GRID = (4, 4, 6)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Add a folder to the import path that contains an installed package with methods."""
    yield from installed(tmp_path, monkeypatch, "extra_methods", {"extra_methods": MODULE}, ENTRIES)


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """Install the modules and entry points that the documentation shows, and yield these modules by name."""
    pages = "\n".join(Path(page).read_text(encoding="utf-8") for page in PAGES)
    modules = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", pages, re.S | re.M))
    blocks = map(tomllib.loads, re.findall(r"^```toml\n(.*?)^```", pages, re.S | re.M))
    entries = [block["project"]["entry-points"]["evoprune.methods"].items() for block in blocks]
    texts = "[evoprune.methods]\n" + "".join(f"{name} = {place}\n" for block in entries for name, place in block)
    for _ in installed(tmp_path, monkeypatch, "docs_examples", modules, texts):
        yield modules


def installed(folder, monkeypatch, name, modules, entries):
    """Install a package with methods, and hide those of all other packages except evoprune, which may be installed here."""
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    facts = folder / f"{name}-1.2.dist-info"
    facts.mkdir()
    title = name.replace("_", "-")
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(folder)
    seen = (registry.OWN, title)
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [each for each in entry_points(group=group) if each.dist.name in seen]
    )
    forget()
    yield folder
    forget()
    for module in modules:
        sys.modules.pop(module, None)


def forget():
    registry._entry_points.cache_clear()
    registry._plugins.cache_clear()
    registry._warn_of_ignored.cache_clear()


def test_they_are_listed_after_the_built_in_ones_and_loaded_when_selected(package):
    assert methods.available()[-3:] == ["absent", "first", "wrong"] and methods.available().count("random") == 1
    assert methods.available(plugins=False) == methods.available()[:-3] and "extra_methods" not in sys.modules
    made = methods.get("first:skip=2")
    assert made.name == "first" and made.skip == 2
    with pytest.raises(UsageError, match="no setting 'skipp'"):
        methods.get("first:skipp=2")
    lines = methods.plugins()
    assert lines["first"] == "of extra-methods 1.2"
    assert lines["wrong"] == "of extra-methods 1.2, broken: is not a Method: extra_methods:torch"
    assert lines["absent"].startswith("of extra-methods 1.2, broken: cannot be loaded")
    assert all("ignored" in lines[name] for name in ("random", "reuse", "with,comma"))


@pytest.mark.parametrize(("name", "says"), [("absent", "No module named"), ("wrong", "is not a Method")])
def test_a_broken_one_fails_only_when_it_is_selected(package, name, says):
    for text in (name, f"reuse+{name}"):
        with pytest.raises(UsageError, match=says) as caught:
            methods.MethodChain.parse(text)
        assert "extra-methods 1.2" in caught.value.message and "uninstall" in caught.value.hint
    with pytest.raises(UsageError, match="'with,comma' is a list"):
        methods.get("with,comma")


def one_more(folder, text):
    """Add a method called `mine` to the package."""
    (folder / "extra_methods.py").write_text(MODULE + text)
    with (folder / "extra_methods-1.2.dist-info/entry_points.txt").open("a") as entries:
        entries.write("mine = extra_methods:Mine\n")
    forget()


@pytest.mark.parametrize("says", REFUSED)
def test_a_class_that_is_no_method_is_refused_when_it_is_loaded(package, says):
    one_more(package, REFUSED[says])
    with pytest.raises(UsageError, match=says) as caught:
        methods.get("mine")
    assert caught.value.message.startswith("method 'mine' of extra-methods 1.2 ")


@pytest.mark.few(6)
@pytest.mark.parametrize("says", RETURNS)
def test_what_one_returns_is_checked(package, says):
    select = f"    def select(self, tokens, keep):\n        return {RETURNS[says]}\n"
    one_more(package, f"@dataclass(frozen=True)\nclass Mine(Selector):\n    name: ClassVar[str] = 'mine'\n{select}")
    patches, method = clip(GRID, changes(GRID, 0.5)), methods.get("mine")
    with pytest.raises(PluginError, match=says) as caught:
        encoded(method, patches, GRID, 24)
    assert caught.value.message.startswith("method 'mine' of extra-methods 1.2 ")


def fill(seen):
    for value in vars(seen).values():
        if isinstance(value, torch.Tensor):
            value.fill_(1)


@pytest.mark.parametrize("name", ["longest", "neighbours", "loudest"])
@pytest.mark.parametrize("more", [(), ("following", "unrotated", "evened")])
def test_one_may_write_into_what_it_gets(documented, monkeypatch, name, more):
    """Because an evaluation uses the same encoder rows for all methods, each method gets copies."""
    method, call = methods.get(name), "match" if name == "neighbours" else "select"
    patches, sizes, prompt = clip(GRID, changes(GRID, 1.0)), torch.rand(COLUMNS) + 1, a_prompt()
    plan = method if name == "loudest" else plan_of(method, TowerShape.of_tower(tiny_tower()), GRID, 24)

    def result():
        if name == "loudest":
            return run_method(deep_model(), method, *prompt, 0.5, sizes)[0]
        rows = encode_rows(tiny_tower(), [patches], plan)
        return torch.cat([rows.select_tokens().features, rows.selector_input.rows])

    expected, real = result(), getattr(type(method), call)

    def writes(self, tokens, *rest):
        found = real(self, tokens, *rest)
        seen = [getattr(tokens, layer)() for layer in more if name == "loudest"] or [tokens]
        for each in (*seen, *(SimpleNamespace(x=x) for x in rest)):
            fill(each)
        return found

    monkeypatch.setattr(type(method), call, writes)
    assert torch.equal(result(), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("skip", [-1, 40])
@pytest.mark.parametrize("way", ["VideoQA", "encode", "EvoPrune"])
def test_every_way_of_running_one_names_it(package, way, skip):
    one_more(package, "@dataclass(frozen=True)\nclass Mine(First):\n    name: ClassVar[str] = 'mine'\n")
    how, model = {"budget": 0.5, "method": f"first:skip={skip}"}, tiny_model()
    methods.get("mine")
    video = processed(model, [3, (VIDEO, 2, 8, 8), 3])
    with pytest.raises(PluginError, match=r"method 'first' of extra-methods 1.2 (failed|returned)"):
        if way == "VideoQA":
            evoprune.VideoQA.load("demo", **how | {"method": f"first:skip={skip * 9}"}).encode("samples/square.mp4")
        elif way == "encode":
            evoprune.encode(model, video["pixel_values_videos"], video["video_grid_thw"], **how)
        else:
            with evoprune.EvoPrune(**how)(model):
                model(**video)


def test_the_documented_methods_are_short_and_complete(documented):
    assert set(documented) == set(DOCUMENTED) == set(methods.plugins())
    assert methods.available()[-6:] == sorted(DOCUMENTED)
    for name, module in documented.items():
        assert module.count("\n") < 40
        assert methods.plugins()[name] == "of docs-examples 1.2" and methods.get(name).name == name
    kinds = [methods.get(name).acts for name in DOCUMENTED]
    assert kinds == ["after", "inside", "inside", "input", "after", "language"]


@pytest.mark.few(6)
@pytest.mark.parametrize("keep", [1, 9, 50, 96])
@pytest.mark.parametrize(
    "name", ["longest", "sieve", "neighbours", "asked", "reuse+longest", "reuse:threshold=5+asked:power=0"]
)
def test_the_documented_methods_keep_their_budget_in_the_encoder(documented, name, keep):
    patches, question = clip(GRID, changes(GRID, 0.5)), torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    args = methods.MethodChain.parse(name), patches, GRID, keep
    made, in_pieces = (encoded(*args, question=question, piece_units=size) for size in (10**6, 1))
    assert len(made.kept) == keep and torch.equal(made.kept, in_pieces.kept)
    if keep < 96:
        live = [rows for _, rows in made.layers]
        assert (live[0] < 96) == (name == "sieve" or name.startswith("reuse"))
        assert (live[-1] < live[0]) == (name in ("sieve", "neighbours"))


def test_the_documented_input_method_goes_from_smaller_to_fewer_frames(documented):
    grids = [methods.get(f"mixed:time={time}").resize((8, 8, 12), 192) for time in (0, 0.5, 1)]
    assert grids == [methods.get("downscale").resize((8, 8, 12), 192), (4, 6, 8), (2, 8, 12)]
    method = methods.get("mixed")
    for keep in (1, 24, 40, 96):
        small = method.resize(GRID, keep)
        assert len(encoded(method, clip(small, changes(small, 1.0)), GRID, keep).kept) <= keep


def test_the_documented_methods_work_on_a_hugging_face_model(documented):
    model, question = tiny_model(), torch.randn(3, 64)
    video = processed(model, [3, (VIDEO, 2, 8, 8), 3])
    args = model, video["pixel_values_videos"], video["video_grid_thw"]
    for name in ("longest", "neighbours", "asked", "reuse+longest"):
        assert evoprune.encode(*args, budget=0.25, method=name, question=question).features.shape == (8, 64)


@pytest.mark.parametrize(
    "wrong", [lambda x: x + 60, lambda x: x[:-1], lambda x: x.flip(0), torch.Tensor.float, torch.Tensor.tolist]
)
def test_what_a_language_method_returns_is_checked(documented, wrong, monkeypatch):
    kind = type(methods.get("loudest"))
    select = kind.select
    monkeypatch.setattr(kind, "select", lambda *args: Selection(wrong(select(*args).kept)))
    with pytest.raises(PluginError, match=r"method 'loudest' of docs-examples .* returned"):
        select_in_language(methods.get("loudest"), public_layer("random", 0, (3, 4, 5), 7))


ASK = ("ask", "samples/square.mp4", "--json", "-n", "2", "-b", "0.25")
QUESTIONS = ("-Q", "What colour is the square?", "-Q", "Does anything move?")


@pytest.mark.full
def test_commands_know_them(package, cli):  # noqa: F811
    record = cli(*ASK, *QUESTIONS[:2], "--method", "first:skip=3").record
    assert record["pruning"]["kept_per_pair"] == [21, 15, 0, 0, 0, 0]
    done = cli(*ASK, *QUESTIONS[:2], "--method", "absent")
    assert done.code == 2 and "'absent' of extra-methods 1.2 cannot be loaded" in done.err
    done = cli("inspect")
    folded = " ".join(done.out.split())
    assert done.code == 0 and "broken: cannot be loaded (ModuleNotFoundError" in folded


def test_a_built_in_name_cannot_be_taken_and_commands_warn_of_it_once(package, cli):  # noqa: F811
    two = ("batch", "samples/square.mp4", *QUESTIONS, "-m", "demo", "--frames", "4", "-n", "1", "-o", "-")
    err = cli(*two, "--method", "random").err
    warning = (
        "warning: method 'random' of extra-methods 1.2 is ignored: evoprune has a method random; give it another name"
    )
    assert err.splitlines().count(warning) == err.count("ignored") == 1
    assert type(methods.get("random")).__module__ == "evoprune.methods.baselines"
    assert methods.MethodChain.parse("reuse+first:skip=3").selector == methods.get("first:skip=3")


def test_what_fails_inside_one_is_not_called_a_bug_of_this_package(package, cli):  # noqa: F811
    failing = (*ASK[:2], *QUESTIONS[:2], "--method", "first:skip=-1")
    done = cli(*failing)
    error, hint = done.err.splitlines()[-2:]
    assert error == "error: method 'first' of extra-methods 1.2 failed: ZeroDivisionError: no such token"
    assert done.code == 1 and "the authors of that package" in hint and "Traceback" not in done.err
    assert cli(*failing, "--json").record["error"]["type"] == "plugin"
    assert "in select" in cli(*failing, "--debug").err
    # This would end the command as if it had answered.
    done = cli(*ASK[:2], *QUESTIONS[:2], "--method", "first:skip=-2")
    assert (
        done.code == 1
        and "error: method 'first' of extra-methods 1.2 failed: SystemExit: 0" in done.err
        and not done.out
    )


@pytest.mark.parametrize(
    ("name", "tokens", "layers"),
    [("asked", 36, None), ("longest+loudest:share=0.5", 36, [[0, 36], [1, 36], [2, 18], [3, 18]]), ("mixed", 36, None)],
)
def test_a_documented_method_works_in_a_command(documented, cli, name, tokens, layers):  # noqa: F811
    for line in cli(*ASK, *QUESTIONS, "--method", name).out.splitlines():
        pruning = json.loads(line)["pruning"]
        assert pruning["language_layers"] == layers and 0 < pruning["visual_tokens_kept"] <= tokens
        assert pruning["visual_tokens_kept"] == tokens or name == "mixed"


@pytest.mark.parametrize("text", ["evoprune+first", "tome+first", "first+first", "none+first", "first+divprune"])
def test_impossible_combinations_with_methods_of_other_packages(package, text):
    with pytest.raises(UsageError, match="methods cannot be combined"):
        methods.MethodChain.parse(text)
    assert (
        methods.MethodChain.parse("reuse+first").selector.name == "first"
        and methods.MethodChain.parse("first+fastv").name == "first+fastv"
    )


def test_the_code_of_a_method_is_all_that_its_package_brings(package, tmp_path):
    found = {}
    for helper in ("SHARE = 1\n", "SHARE = 2\n"):
        (package / "helper_of_methods.py").write_text(helper)
        found[helper] = (
            methods.MethodText("evoprune+fastv").plugin_code() | methods.MethodText("reuse+first").plugin_code()
        )
    assert len({code["first"] for code in found.values()}) == 2
    qa, cache = evoprune.VideoQA.load("demo", method="first"), evoprune.Cache(tmp_path / "cache")
    assert [qa.encode("samples/square.mp4", cache=cache).report.cache for _ in range(2)] == ["miss", "hit"]
    (package / "helper_of_methods.py").write_text("SHARE = 3\n")
    assert qa.encode("samples/square.mp4", cache=cache).report.cache == "miss"


@pytest.mark.full
def test_a_run_is_not_gone_on_with_other_code_of_a_method(package, cli, tmp_path):  # noqa: F811
    data, run = "samples/questions.jsonl", tmp_path / "run"
    asked = ("eval", "--data", data, "--limit", "1", "-b", "0.5", "--method", "reuse+first", "--json")
    assert cli(*asked, "-o", run).code == 0 and cli(*asked, "--resume", run).code == 0
    rows = tmp_path / "rows.jsonl"
    batch = ("batch", "samples/square.mp4", "-Q", "What digit is it?", "-m", "demo", "--method", "first", "-o", rows)
    assert cli(*batch).code == 0 and cli(*batch, "--resume").code == 0
    (package / "extra_methods.py").write_text(MODULE + "# changed\n")
    for command in ((*asked, "--resume", run), (*batch, "--resume")):
        result = cli(*command)
        assert result.code == 2 and "plugins" in result.err
    assert methods.MethodText("evoprune+fastv").plugin_code() == methods.MethodText("reuse+scope").plugin_code() == {}


NOISY = "import sys\nprint('hello of a package')\n"
MINE = "@dataclass(frozen=True)\nclass Mine(First):\n    name: ClassVar[str] = 'mine'\n    def select(self, tokens, keep):\n"


def test_one_that_leaves_the_program_when_it_is_imported_is_broken(package, cli):  # noqa: F811
    (package / "extra_methods.py").write_text("raise SystemExit('no licence')\n")
    with pytest.raises(UsageError, match=r"'first' of extra-methods 1.2 cannot be loaded .SystemExit: ") as caught:
        methods.MethodChain.parse("first")
    assert "uninstall" in caught.value.hint
    done = cli("methods")
    assert done.code == 0 and "cannot be loaded" in done.out


def test_what_one_prints_goes_to_stderr(package, cli):  # noqa: F811
    one_more(package, f"{NOISY}{MINE}        print('selecting')\n        return super().select(tokens, keep)\n")
    done = cli(*ASK, *QUESTIONS[:2], "--method", "mine")
    assert done.record["pruning"]["method"] == "mine" and done.err.startswith("hello of a package\nselecting\n")
    del sys.modules["extra_methods"]
    done = cli("inspect", "--json")
    assert done.record["schema"] and "hello of a package\n" in done.err
    two = ("batch", "samples/square.mp4", *QUESTIONS, "-m", "demo", "--frames", "4", "-n", "1", "-o", "-")
    done = cli(*two, "--method", "mine")
    assert len([json.loads(line) for line in done.out.splitlines()]) == 2 and "selecting" in done.err
