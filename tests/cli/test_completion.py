"""Completion at TAB: suggestions per shell, and installation."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shellingham
from typer.main import get_command

from evoprune.methods import registry
from evoprune_cli.main import app
from tests.methods.plugged import plug

ROOT = Path(__file__).parents[2]
COMMANDS = ["ask", "batch", "watch", "eval", "find", "tune", "inspect", "profile", "verify", "methods", "models"]
BUDGETS = ["full", "high", "balanced", "fast", "auto", "auto:inflection"]
# A line up to the cursor, and the suggestions. Without suggestions, the shell offers files.
LINES = {
    "": COMMANDS,
    "--show": ["--show-completion"],
    "--version pro": ["profile"],
    "ask --meth": ["--method"],
    "ask --frames many -b fu": ["full"],
    "ask clip.mp4 ": [],
    "ask clip.mp4 -b ": BUDGETS,
    "eval -b fast,au": ["fast,auto", "fast,auto:inflection"],
    "profile -b au": [],
    "tune -b fast,": ["fast,full", "fast,high", "fast,balanced"],
    "ask --method divp": ["divprune"],
    "ask --method evoprune:rows=1+fa": ["evoprune:rows=1+fastv"],
    "ask --method evoprune+pool+": [],
    "ask --method reuse+divprune+visip": ["reuse+divprune+visipruner"],
    "ask --method pool,fa": [],
    "eval --method pool,fa": ["pool,fastvid", "pool,fastv"],
    "tune --method pool,evoprune+fa": ["pool,evoprune+fastv"],
    "ask -m ": ["demo", "demo-scenes"],
    "profile -m ./runs": [],
    "ask --device c": ["cpu", "cuda"],
    "profile --quantize int8,": ["int8,none", "int8,int4"],
    "ask --subtitles a": ["auto"],
}


@pytest.fixture
def at_tab(cli, monkeypatch):
    """`at_tab("bash", "ask -m ")` returns the result of a script's request to complete the line."""
    monkeypatch.setenv("COLUMNS", "30")

    def complete(shell: str, line: str, action: str = "get-args"):
        words = f"evoprune {line}"
        monkeypatch.setenv("_EVOPRUNE_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", words.replace(" ", "\n"))
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", action)
        return cli()

    return complete


@pytest.mark.parametrize("line", LINES)
def test_offers(at_tab, monkeypatch, line):
    monkeypatch.setenv("EVOPRUNE_DEBUG", "1")
    monkeypatch.setenv("EVOPRUNE_BUDGET", "7")
    result = at_tab("bash", line)
    assert (result.code, result.err) == (0, "")
    assert sorted(result.out.split()) == sorted(LINES[line])


def test_every_method_is_offered_and_reuse_with_what_may_follow(at_tab):
    assert at_tab("bash", "ask --method ").out.split() == registry.available()
    offered = at_tab("bash", "ask --method reu").out.split()
    assert "reuse+divprune" in offered and "reuse+reuse" not in offered
    assert all(name.startswith("reuse+") for name in offered)


def test_methods_of_other_packages_are_offered_unloaded(at_tab, monkeypatch):
    plug(monkeypatch, "mine", "no_such_module:Thing")
    result = at_tab("bash", "ask --method evoprune+mi")
    assert (result.out, result.err) == ("evoprune+mine\n", "")


def test_every_word_that_a_metavar_names_is_offered():
    group = get_command(app)
    checked = 0
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        for param in command.params:
            for word in re.findall(r"(?:^|\|)([a-z][\w-]*)", param.metavar or ""):
                offered = [item.value for item in param.shell_complete(context, word[:1])]
                assert word in offered, f"{name} {param.opts[0]} offers {offered}"
                checked += 1
    assert checked > 50


def test_zsh(at_tab):
    assert at_tab("zsh", "ask --method evoprune+visip").out == "_arguments '*: :((\"evoprune+visipruner\"))'\n"
    assert '"--quiet":"No progress' in at_tab("zsh", "ask --q").out
    assert at_tab("zsh", "ask clip").out == "_files\n"


def test_fish(at_tab):
    lines = at_tab("fish", "ask --").out.splitlines()
    assert len(lines) > 30 and all(re.fullmatch(r"--[\w-]+\t.{5,61}", line) for line in lines)  # none is folded
    assert at_tab("fish", "ask -m demo-").out == "demo-scenes\n"
    assert at_tab("fish", "ask -m demo-", "is-args").code == 0
    assert at_tab("fish", "ask clip", "is-args").code == 1  # the shell offers files


@pytest.mark.parametrize(
    ("shell", "files"),
    [
        ("bash", {".bash_completions/evoprune.sh": "complete -o default", ".bashrc": "/.bash_completions/evoprune.sh"}),
        ("zsh", {".zfunc/_evoprune": "#compdef evoprune", ".zshrc": "fpath+=~/.zfunc"}),
        ("fish", {".config/fish/completions/evoprune.fish": "complete --command evoprune"}),
    ],
)
def test_install_and_show(cli, monkeypatch, tmp_path, shell, files):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, f"/bin/{shell}"))
    shown = cli("--show-completion")
    assert (shown.code, shown.err, list(tmp_path.iterdir())) == (0, "", [])
    installed = cli("--install-completion")
    script = tmp_path / next(iter(files))
    assert (installed.code, installed.err) == (0, "") and str(script) in installed.out
    assert script.read_text().strip() == shown.out.strip()
    for name, text in files.items():
        assert text in (tmp_path / name).read_text()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_without_slow_imports(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("bash", "/bin/bash"))
    (tmp_path / "script").write_text(cli("--show-completion").out)
    program = tmp_path / "evoprune"
    python = shlex.quote(sys.executable)
    program.write_text(f"""#!/bin/sh
'''exec' {python} "$0" "$@"  # as pip writes it where a path has spaces
' '''
import sys
from evoprune_cli.__main__ import start
try:
    start()
finally:
    print([name for name in ("torch", "numpy", "transformers", "pydantic", "rich") if name in sys.modules], file=sys.stderr)
""")
    program.chmod(0o755)
    line = (
        f"source {tmp_path}/script && complete -p evoprune && COMP_WORDS=(evoprune ask \"'my clip.mp4'\" --method evoprune+visip) "
        f"COMP_CWORD=4 && _evoprune_completion {program} && printf '<%s>' \"${{COMPREPLY[@]}}\""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "--norc", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "complete -o default -F _evoprune_completion evoprune\n<evoprune+visipruner>"
    assert done.stderr == "[]\n"
