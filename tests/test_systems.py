"""macOS and Windows, as far as they can be tested on Linux: modules and attributes that they lack, paths, and the workflow.

In `SIMULATED`, a process loses what Windows or macOS does not have, and then runs a command.
"""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from evoprune.session import ModelOptions
from evoprune.util import PATH, is_url, shown, without_password
from evoprune_cli.words import split_words

ROOT = Path(__file__).parent.parent
CLIP = "samples/square.mp4"
QUESTION = "What colour is the square?"
# These files run only on Linux, where videos are decoded in a separate process.
ONLY_LINUX = {f"evoprune/video/sandbox/{name}.py" for name in ("channel", "isolation", "worker")}
PACKAGES = ("evoprune", "evoprune_cli", "plugins/serve/evoprune_serve", "plugins/mcp/evoprune_mcp")
SIMULATED = """
import asyncio, ctypes, io, json, multiprocessing, os, select, signal, socket, subprocess, sys, sysconfig, tempfile
import av, click, huggingface_hub, jinja2.sandbox, numpy, PIL.Image, rich.console, rich.progress, safetensors.torch
import tokenizers, torch, transformers, typer

sysconfig.get_config_vars()
system = sys.argv.pop(1)
missing = {  # modules and attributes
    "darwin": ((), {os: ("memfd_create", "sched_getaffinity", "posix_fadvise", "MFD_CLOEXEC", "MFD_ALLOW_SEALING")}),
    "win32": (
        ("fcntl", "resource", "termios", "pwd", "grp", "readline", "pty"),
        {
            os: ("memfd_create", "sched_getaffinity", "posix_fadvise", "pread", "pwrite", "getuid", "geteuid", "getpgid", "killpg",
                "fchmod", "fchown", "chown", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK", "O_ASYNC", "fork", "fwalk",
                "register_at_fork", "sysconf", "statvfs", "mkfifo", "WIFEXITED", "getloadavg", "set_blocking", "lchown"),
            signal: ("SIGHUP", "SIGKILL", "SIGALRM", "SIGIO", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGWINCH", "SIGTSTP", "SIGCONT",
                "pthread_sigmask", "setitimer", "ITIMER_REAL", "alarm", "SIG_UNBLOCK"),
            socket: ("send_fds", "recv_fds", "AF_UNIX"),
            select: ("poll", "epoll"),
        },
    ),
}
modules, attributes = missing[system]
for name in modules:
    sys.modules[name] = None
for module, names in attributes.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
os.supports_dir_fd = set()
plain_open, plain_exists = open, os.path.exists


def without_proc(file, *args, **options):
    if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return plain_open(file, *args, **options)


io.open = without_proc
import builtins

builtins.open = without_proc
sys.platform = system
from evoprune_cli.__main__ import start

sys.exit(start())
"""


def simulated(system: str, *args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SIMULATED, system, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, stdin=subprocess.DEVNULL)


@pytest.mark.full
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_commands_run_without_what_other_systems_lack(system, tmp_path):
    done = simulated(system, "ask", CLIP, QUESTION, "--json", "--show", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"] == "green" and (tmp_path / "page.html").stat().st_size

    rows = tmp_path / "rows.jsonl"
    for _ in range(2):  # the second time, the answered row is kept
        done = simulated(system, "batch", CLIP, "-Q", QUESTION, "-o", rows, "-m", "demo", "--resume", "-q")
        assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, rows.read_text().splitlines())
    assert record["answer"] == "green"


@pytest.mark.full
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_inspect_runs_without_what_other_systems_lack(system):
    done = simulated(system, "inspect", CLIP, "--scan", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scan"]["frames"] == 72
    done = simulated(system, "inspect", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_no_module_or_attribute_is_used_that_a_system_lacks(system, tmp_path):
    """According to the types of the standard library, for the parts of the code that this system can reach."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    options = ("--platform", system, "--ignore-missing-imports", "--follow-imports=skip", "--cache-dir", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "mypy", *options, *PACKAGES], capture_output=True, text=True, cwd=ROOT)
    assert "source files)" in done.stdout, done.stdout + done.stderr
    lines = re.findall(r"^(\S+?):(\d+): error: (Module .*has no attribute.*)$", done.stdout, re.MULTILINE)
    assert [line for line in lines if line[0].replace("\\", "/") not in ONLY_LINUX] == []
    assert ONLY_LINUX & {line[0] for line in lines}  # the check finds what it should find


# Paths of Windows.

DRIVE = r"C:\clips\a b.mp4"
SHARE = r"\\host\share\a.mp4"


@pytest.mark.parametrize("path", [DRIVE, SHARE, "C:/clips/a.mp4", "C:a.mp4"])
def test_a_path_of_windows_is_a_file(path):
    assert not is_url(path) and without_password(path) == path == shown(path)
    assert split_words([path, QUESTION]) == ((path,), QUESTION)
    assert split_words([path]) == ((path,), None)


def test_the_last_word_is_an_input_if_it_looks_like_a_path_of_windows():
    for path in (r"C:\clips\frames", "C:/clips/frames", r"\\host\share", r"..\clips\frames", r".\frames"):
        assert PATH.fullmatch(path) and split_words([CLIP, path]) == ((CLIP, path), None), path
    for question in ("What is at 5:30?", "a: red", "C: or D?", r"\o/"):
        assert split_words([CLIP, question]) == ((CLIP,), question)


@pytest.mark.parametrize("name", [r"C:\models\qwen", r"\\host\models\qwen"])
def test_a_folder_of_windows_is_no_hub_id(name):
    from evoprune.errors import ModelError

    with pytest.raises(ModelError, match="neither a folder here nor a hub id"):
        ModelOptions(model=name).local_folder()
    with pytest.raises(ModelError, match="no such file"):
        ModelOptions(model=name + ".gguf").local_folder()


# The workflow.

WORKFLOW = ROOT / ".github/workflows/tests.yml"


def test_the_workflow_runs_the_blocks_of_the_readme_on_three_systems():
    workflow = yaml.load(WORKFLOW.read_text(), yaml.BaseLoader)  # reads `on` as text
    assert {"push", "pull_request"} <= {*workflow["on"]} and workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    systems = job["strategy"]["matrix"]["os"]
    assert {name.split("-")[0] for name in systems} == {"ubuntu", "macos", "windows"}
    assert job["runs-on"] == "${{ matrix.os }}"
    (step,) = (step for step in job["steps"] if "run" in step)
    assert step["shell"] == "bash" and step["run"] == ".ci/run readme" and (ROOT / ".ci/run").is_file()


@pytest.mark.full
def test_the_workflow_follows_its_schema():
    if find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed: .ci/run systems")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, str(WORKFLOW)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
