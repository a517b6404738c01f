"""What the README shows, run as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def readme_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


def test_the_transcript_of_the_readme(cli):
    """What it shows is what comes, but for times, memory, and the processors of whoever tries it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^```text\n\$ evoprune (ask samples.*?)\n(.*?)^```", readme, re.S | re.M).groups()
    result = cli(*shlex.split(command))

    def counts(text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line and not line.startswith(("model", "first token", "memory"))]
        return [re.sub(r"^(\S+|  pruning) +[\d.,]+ *#*", r"\1 ", line).split() for line in lines]

    assert counts(shown) == counts(result.out + result.err)


@pytest.mark.parametrize("number", range(2, len(readme_blocks())))
def test_loops_of_the_readme(tmp_path, number):
    """Every shell block after the two that install, run as it stands in a folder that looks like an installed clone."""
    block = readme_blocks()[number]
    if "jq" in block and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "evoprune"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m evoprune_cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    written = "".join(path.read_text() for path in tmp_path.glob("*.jsonl")) + done.stdout.decode()
    clips = len(list((ROOT / "samples").glob("*.webm" if "webm" in block else "*.mp4")))
    assert len(written.splitlines()) == clips
