"""Untrusted input cannot run code, access the network or damage files."""

import json
import os
import pickle
import re
import resource
import shutil
import socket
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from evoprune.bench.eval_folder import RunFolder
from evoprune.errors import ModelError, UsageError
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.cli.conftest import cli  # noqa: F401
from tests.loading import edit
from tests.threads import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("evoprune", "evoprune_cli") for path in (ROOT / package).rglob("*.py"))
CLIP = ROOT / "samples/square.mp4"
QUICK = ("-m", "demo", "-n", "2", "--frames", "4")

# --- the code ---


def test_the_code_compiles_no_text_and_trusts_no_remote_code():
    """Ruff rejects eval, exec, shells and pickles (see pyproject.toml), but has no rules for what is tested here."""
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![.\w])(compile|__import__)\(", source), path
        assert set(re.findall(r"trust_remote_code\W+(\w+)", source)) <= {"False"}, path


# --- models ---


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def mine(folder: Path, struck: Path) -> None:
    """Add everything to a model's folder that some library might run, such as custom code and pickles."""
    code = f"import os\nos.mkdir({str(struck)!r})\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "setup.py", "__init__.py"):
        (folder / name).write_text(code)
    kinds = ("AutoModel", "AutoConfig", "AutoProcessor", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    edit(folder / "config.json", auto_map={kind: "modeling_evil.Evil" for kind in kinds})
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )
    for name in ("pytorch_model.bin", "training_args.bin", "scheduler.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(struck)))


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.json and merges.txt"])
def test_a_model_brings_weights_and_no_code(folder, tmp_path, tokenizer):
    struck = tmp_path / "struck"
    if tokenizer != "tokenizer.json":
        learned = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(learned["vocab"]))
        merges = (m if isinstance(m, str) else " ".join(m) for m in learned["merges"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        (folder / "tokenizer.json").unlink()
    mine(folder, struck)
    try:
        qa = VideoQA(load_model(str(folder)))
        "".join(qa.encode(CLIP).ask("What?", max_new_tokens=1))
    except ModelError as problem:  # no tokenizer without its code
        assert tokenizer != "tokenizer.json" and "cannot be loaded" in problem.message
    assert not struck.exists()


def test_a_pickle_is_no_model(folder, tmp_path):
    mine(folder, tmp_path / "struck")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        load_model(str(folder))
    assert not (tmp_path / "struck").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os.mkdir('struck') }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(folder, template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    qa = VideoQA(load_model(str(folder)))
    with pytest.raises(ModelError, match="template"):
        list(qa.encode(CLIP).ask("What?", max_new_tokens=1))
    assert not (tmp_path / "struck").exists()


# --- the network ---


@pytest.fixture
def no_network(monkeypatch):
    """Block all network access, and return a list that grows with each attempt to resolve a host or to connect."""
    asked = []

    def refuse(*args, **_):
        asked.append(args[-1])
        raise OSError("no network here")

    for place, names in (
        (socket.socket, ("connect", "connect_ex", "sendto")),
        (socket, ("getaddrinfo", "gethostbyname", "create_connection")),
    ):
        for name in names:
            monkeypatch.setattr(place, name, refuse)
    return asked


def test_no_network_unless_a_model_id_asks(cli, no_network, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert cli("ask", CLIP, "What?", *QUICK, "-q").code == 0
    assert cli("batch", CLIP, "-Q", "What?", *QUICK, "-q", "-o", tmp_path / "a.jsonl").code == 0
    data = ("--data", "samples/questions.jsonl", "--limit", "1", "-b", "0.5")
    assert cli("eval", *data, *QUICK, "-q").code == 0
    assert cli("inspect").code == 0 and cli("inspect", CLIP).code == 0
    offline = cli("ask", CLIP, "What?", "-m", "org/none", "--offline")
    assert offline.code == 4 and "offline" in offline.err
    assert cli("ask", "https://example.org/a.mp4", "What?", "--offline").code == 2
    assert no_network == []
    # Shows that the fixture notices network access.
    assert cli("ask", CLIP, "What?", "-m", "org/none").code == 4 and no_network


# --- names and places ---

NAMES = [
    "two words ",
    'it\'s "so"',
    "new\nline",
    "Überraschung 🎬",
    "-o",
    "--help",
    "$HOME `ls`;|&",
    "*?[a]{b}",
    "%s%n",
    "~",
]


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_nothing_but_a_name(cli, tmp_path, monkeypatch, name):  # noqa: F811
    place, here = tmp_path / name, f"./{name}"
    place.mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copy(CLIP, place / f"{name}.mp4")
    (place / "model").symlink_to(ROOT / "evoprune/bundled/demo")
    row = {"video": f"{name}.mp4", "question": "What?", "answer": "x"}
    (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for words in (
        ("ask", f"{here}/{name}.mp4", "What?"),
        ("batch", "--from", f"{here}/{name}.jsonl", "-o", f"{here}/{name}.out"),
        ("eval", "--data", f"{here}/{name}.jsonl", "-b", "0.5", "-o", f"{here}/{name} run"),
    ):
        made = cli(*words, "-m", f"{here}/model", *QUICK[2:], "-q")
        assert made.code == 0, made.err
    assert json.loads((place / f"{name}.out").read_text())["video"]["path"] == f"{name}.mp4"
    assert json.loads((place / f"{name} run/results.json").read_text())["items"]["answered"] == 1
    inside = {"model", *(f"{name}{end}" for end in (".mp4", ".jsonl", ".out", " run"))}
    assert {path.name for path in place.iterdir()} == inside and list(tmp_path.iterdir()) == [place]


def test_links_are_followed_and_stay(cli, tmp_path):  # noqa: F811
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "out.jsonl").symlink_to(there / "real.jsonl")
    asked = ("batch", CLIP, "-Q", "What?", *QUICK, "-q", "-o", tmp_path / "out.jsonl")
    assert cli(*asked).code == 0 and cli(*asked, "-Q", "Why?", "--resume").code == 0
    assert (tmp_path / "out.jsonl").is_symlink() and len((there / "real.jsonl").read_text().splitlines()) == 2
    (tmp_path / "circle").symlink_to("circle")
    for target in ("circle", "circle/a.jsonl"):
        result = cli(*asked[:-1], tmp_path / target)
        assert result.code == 2 and "cannot write" in result.err and "Traceback" not in result.err
    assert cli("ask", CLIP, "What?", "-m", tmp_path / "circle").code == 4
    assert cli("ask", tmp_path / "circle", "What?").code == 3


# --- disks ---


@contextmanager
def room(path: Path, more: int):
    """Limit files to `more` bytes beyond the size of this one, to imitate a disk that fills up in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.full
@pytest.mark.parametrize("more", [0, 1, 100])
def test_the_disk_is_full_while_an_evaluation_writes(cli, tmp_path, monkeypatch, more):  # noqa: F811
    asked = ("eval", "--data", "samples/questions.jsonl", "--limit", "2", "-b", "0.5", "--method", "random", *QUICK)
    whole, place = tmp_path / "whole", tmp_path / "run"
    assert cli(*asked, "-o", whole).code == 0
    real, calls = RunFolder.add, []

    def add(self, samples):
        calls.append(1)
        with room(self.path / "samples.jsonl", more) if len(calls) > 1 else nullcontext():
            real(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "add", add)
        result = cli(*asked, "-o", place)
    assert result.code == 2 and f"error: cannot write {place / 'samples.jsonl'}: File too large" in result.err
    first = (place / "samples.jsonl").read_bytes()
    assert first and (whole / "samples.jsonl").read_bytes().startswith(first)
    assert json.loads((place / "results.json").read_text())["videos"]["evaluated"] == 1
    assert cli(*asked, "--resume", place).code == 0
    assert (place / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_results_that_do_not_fit_leave_the_earlier_ones_and_other_files(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"seek": "auto"})
    mine, left = folder.path / "results.json.new", folder.path / "results.json.evoprune-0123abcd.tmp"
    for each in (mine, left):
        each.write_text("mine")
    folder.finish({"first": 1})
    with room(folder.path / "results.json", -5), pytest.raises(UsageError, match=r"results\.json: File too large"):
        folder.finish({"second": list(range(1000))})
    assert json.loads((folder.path / "results.json").read_text()) == {"first": 1}
    RunFolder.resume(folder.path, {"seek": "auto"})  # removes files of a killed run
    assert mine.read_text() == "mine"
    assert {path.name for path in folder.path.iterdir()} == {"settings.json", "results.json", mine.name}


def test_stdout_onto_a_full_disk(cli, tmp_path):  # noqa: F811
    """If a redirected answer does not fit, the error is about the output and is not reported as a bug."""
    with open("/dev/full", "wb") as full:
        saved = os.dup(1)
        os.dup2(full.fileno(), 1)
        try:
            result = cli("ask", CLIP, "What?", *QUICK, "-q")
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    assert result.code == 2 and "cannot write the output: No space" in result.err
