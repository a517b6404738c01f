"""The commands of README and guide run as they stand there, and every link of the documents leads somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.examples import MADE_BY, counts

ROOT = Path(__file__).parents[2]


PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]


def test_the_transcript_of_the_readme(cli):
    """The output equals it, except for times, memory and the processor."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^```text\n\$ evoprune (ask samples.*?)\n(.*?)^```", readme, re.S | re.M).groups()
    result = cli(*shlex.split(command))
    assert counts(shown) == counts(result.out + result.err), MADE_BY


@pytest.mark.full
def test_the_guide_explains_every_line_of_the_stats(cli):
    written = cli("ask", "samples/square.mp4", "What happens?", "--compare", "-v", "-b", "fast").err
    names = re.findall(r"(?m)^ *(first token|encode \+ prefill|visual tokens|(?!the\b)[a-z]+)(?![=a-z])", written)
    table = "".join(line for line in (ROOT / "docs/guide.md").read_text("utf-8").splitlines() if line.startswith("| "))
    assert {"video", "now", "compare", "kept"} <= set(names) and [n for n in names if f"`{n}`" not in table] == []


@pytest.mark.full
def test_shell_blocks_run_one_after_the_other(tmp_path):
    """In one folder that looks like an installed clone; each block gives a line a clip."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "evoprune"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m evoprune_cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) >= 2
    for block in blocks:
        if "jq" in block and not shutil.which("jq"):
            continue
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr.decode()
        file = re.search(r"\S+\.jsonl", block)
        lines = ((tmp_path / file[0]).read_text() if file else done.stdout.decode()).splitlines()
        clips = sorted(path.name for path in (ROOT / "samples").glob("*.webm" if "webm" in block else "*.mp4"))
        assert len(lines) == len(clips)
        answers = [line.split("\t")[-1] for line in lines]
        if file:
            records = sorted(map(json.loads, lines), key=lambda record: record["video"]["path"])
            assert [Path(record["video"]["path"]).name for record in records] == clips
            answers = [record["answer"] for record in records]
        digits = {"flash.mp4": "2", "pan.mp4": "5", "square.mp4": "7", "three.mp4": "9"}
        there = "no" if "webm" in block else "yes"
        assert answers == [digits[clip] if "Which digit" in block else there for clip in clips]


# What the commands of the documents ask of `samples/`, and the right answers.
ASKED = {
    "What colour is the square?": "green",
    "What digit is it?": "7",
    "What happens to the square?": "pruned: appears\nfull: stays",  # at 0.05, beside the answer from all tokens
    "Which way does the green heart move?": "right",
}


def test_what_the_documents_ask_is_answered_right(cli):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "results")
    asked = set()
    for command in dict.fromkeys(re.findall(r'(?m)^evoprune (ask samples/.*".*".*)$', pages)):
        words = shlex.split(command, comments=True)
        result, questions = cli(*words, "-q"), [word for word in words if word in ASKED]
        assert (result.code, result.out.strip()) == (0, "\n".join(ASKED[q] for q in questions)), command
        asked |= set(questions)
    assert asked == set(ASKED)


@pytest.mark.parametrize(
    ("page", "answers"), [("README.md", ["green"]), ("docs/guide.md", ["green", "7", "cyan", "green", "0.0", "6.0"])]
)
def test_the_demo_answers_right_in_python(capsys, page, answers):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    names: dict = {}
    for block in blocks:
        if "samples/" in block:
            exec(block, names)
    assert re.sub(r"\(\d+ ms\)", " ", capsys.readouterr().out).split() == answers


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{n}" if n else anchor for anchor, last in found.items() for n in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_module_that_exists(page):
    for name in re.findall(
        r"python -m ((?:evoprune|evoprune_cli|experiments|tests)[\w.]*)", page.read_text(encoding="utf-8")
    ):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
