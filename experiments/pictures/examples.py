"""Regenerate the images and examples in README and docs: `python -m experiments.pictures.examples`.

This covers the figure that explains the method with its counts, the overlay, the terminal transcript, and the JSON in docs/json.md
and docs/cli.md. It takes a minute or two. Other commands create the charts
and tables in results/, and the picture of the server's page (page.py).
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from evoprune_cli import reference
from experiments.pictures import figure_method

MADE_BY = "make it anew: python -m experiments.pictures.examples"
ROOT = Path(__file__).parents[2]
ASKED = ("ask", "samples/square.mp4", "What colour is the square?")
OVERLAY = ("inspect", "samples/scenes/crossing.mp4", "-m", "demo-scenes", "-b", "0.25", "--json", "--overlay")
# The command that produces the example in each section of docs/json.md.
JSON = {
    "ask and batch": (*ASKED, "--json"),
    "find": ("find", "samples/vanish.webm", "a circle", "--json"),
    "eval": ("eval", "--data", "samples/questions.jsonl", "-b", "0.25", "--json"),
    "tune": ("tune", "samples/square.mp4", "samples/pan.mp4", "-m", "demo", "-Q", "What happens?", "-b", "0.2",
        "--method", "evoprune", "--agree", "0.7", "--json"),
    "profile": ("profile", "-m", "demo", "-b", "0.1", "--frames", "8", "--size", "224x336", "-r", "1", "--format", "json"),
    "verify": ("verify", "-m", "demo", "--quick", "--json"),
    "inspect": ("inspect", "--json"),
    "methods": ("methods", "--json"),
    "Errors": ("ask", "gone.mp4", "What happens?", "--json"),
}  # fmt: skip
WIDTH = 128  # maximum length of a line of JSON
# Beginnings of lines that differ between runs, or that appear only if a step takes at least a millisecond.
MEASURED = ("model", "compile", "store", "  overlap", "first token", "total", "startup", "memory", " " * 11)


def run(*arguments: str) -> tuple[str, str]:
    """Run `evoprune` with a temporary cache folder, and return its stdout and stderr."""
    with tempfile.TemporaryDirectory() as kept:
        own = os.environ | {"EVOPRUNE_CACHE_DIR": kept}
        command = [sys.executable, "-m", "evoprune_cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False)  # noqa: S603
    if not done.stdout:
        raise SystemExit(f"{shlex.join(arguments)}: {done.stderr}")
    return done.stdout, done.stderr


def filled(shape: Any, real: Any) -> Any:
    """Fill the JSON structure of `shape` with values from `real`, keeping the fields of `shape` and their order.

    Objects in lists are matched by name. An object without a match takes its values from the first object in the other list.
    """
    if isinstance(shape, dict):
        return {name: filled(each, real[name]) for name, each in shape.items()}
    if isinstance(shape, list) and shape and isinstance(shape[0], dict):
        named = [next((found for found in real if _name(found) == _name(each)), real[0]) for each in shape]
        return [filled(each, found) for each, found in zip(shape, named, strict=True)]
    return real


def _name(row: dict) -> tuple:
    return row.get("name"), row.get("group", "all")


def counts(text: str) -> list[list[str]]:
    """Return the parts of a transcript that don't change between runs, excluding times, bars, memory, and the processor."""
    lines = [line for line in text.splitlines() if line and not line.startswith(MEASURED)]
    return [re.sub(r"^(\S+|  pruning) +[\d.,]+ *#*", r"\1 ", line).split() for line in lines]


def examples(page: str) -> dict[str, str]:
    """Return the JSON example from each section of docs/json.md."""
    sections = re.split(r"^##+ (.*)\n", page, flags=re.M)
    found = {
        title: re.search(r"^```json\n(.*?)^```", text, re.S | re.M)
        for title, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    return {title: each[1] for title, each in found.items() if each}


def wrapped(content: Any) -> str:
    """Format data as JSON with lines of at most `WIDTH` characters, without line breaks inside strings."""
    words = re.sub(r'"(?:[^"\\]|\\.)*"(: )?', lambda text: text[0].replace(" ", "\0"), json.dumps(content)).split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return "\n".join(lines).replace("\0", " ") + "\n"


def overlay_facts(record: dict) -> str:
    """Return the JSON metadata stored in the overlay's PNG file: the unit counts, the method, and the budget."""
    return json.dumps({name: value for name, value in record["overlay"].items() if name != "file"}, sort_keys=True)


def described(run: figure_method.Run) -> str:
    """Return the alt text for the figure that explains the method."""
    n = run.video.fates.counts()
    pairs = run.video.plan.grid[0]
    before = run.first_layers
    pairs = ("", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight")[pairs]
    return (
        f"{pairs} frame pairs of a clip: {n['units']} units, of which {n['units'] - n['encoded']} are reused and {n['encoded']} "
        f"have changed; {run.layers[0]} of these enter the tower; after layer {before} of {len(run.layers)}, {run.layers[-1]} "
        f"rows go on; after the tower {n['read']} of them become tokens. A method that prunes after the encoder computes "
        f"{n['units']} rows in every layer"
    )


def _write(name: str, change: Callable[[str], str]) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    path.write_text(change(text), encoding="utf-8")


def make_method() -> None:
    made = figure_method.measure(str(ROOT / figure_method.CLIP), figure_method.BUDGET)
    (ROOT / "docs/method.svg").write_text(figure_method.figure(made), encoding="utf-8")
    _write(
        "docs/method.md", lambda text: re.sub(r"!\[[^]]*\]\(method.svg\)", f"![{described(made)}](method.svg)", text)
    )


def make_overlay() -> None:
    with tempfile.TemporaryDirectory() as folder:  # because evoprune overwrites only files that it has written
        file = Path(folder, "overlay.png")
        record = json.loads(run(*OVERLAY, str(file))[0])
        facts = PngImagePlugin.PngInfo()
        facts.add_text("facts", overlay_facts(record))
        Image.open(file).save(ROOT / "docs/overlay.png", pnginfo=facts, optimize=True)


def make_transcript() -> None:
    answer, stats = run(*ASKED)
    stats = stats.lstrip("\n")
    _write(
        "README.md",
        lambda text: re.sub(
            r"(?<=^```text\n)(\$ evoprune ask .*\n)(?:.*\n)*?(?=^```)",
            lambda m: f"{m[1]}{answer}\n{stats}",
            text,
            count=1,
            flags=re.M,
        ),
    )


def make_json() -> None:
    made = {title: json.loads(run(*command)[0]) for title, command in JSON.items()}

    def change(page: str) -> str:
        for title, example in examples(page).items():
            page = page.replace(example, wrapped(filled(json.loads(example), made[title])), 1)
        return page

    _write("docs/json.md", change)


def make_cli() -> None:
    (ROOT / "docs/cli.md").write_text(reference(), encoding="utf-8")


MAKERS = {
    "cli": make_cli,
    "method": make_method,
    "overlay": make_overlay,
    "transcript": make_transcript,
    "json": make_json,
}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pictures.examples", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=MAKERS, help="make these alone")
    os.chdir(ROOT)  # makes the transcript show the clip's path as README does
    for name in parser.parse_args(args).only:
        print(name, flush=True)
        MAKERS[name]()


if __name__ == "__main__":
    main()
