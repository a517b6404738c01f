"""The list of used blocks (results/demo-model.md) agrees with the commands and sentences on the pages."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.test_documents import PAGES, ROOT, commands, lines_of

LIST = ROOT / "results/demo-model.md"
HELD_OUT, VALIDATION, PORTRAIT = "heldout", "validation", "portrait"
MEASURES = ("bits", "frontier", "validity")
NAMED = re.compile(r"(held-out|validation|portrait)[^.|]*?\bblocks? (\d+)(?: (and|to) (\d+))?")


def used_by_commands(text: str) -> Iterator[tuple[str, int]]:
    """Yield split and block for every command on a page that measures on clips."""
    for line in lines_of(text):
        for module, *rest in commands(line, "python -m"):
            if module.rpartition(".")[2] not in MEASURES:
                continue
            given = dict(pairwise(rest))
            block = given.get("--block", given.get("--seed", "0"))
            if block.isdigit() and len(rest) > 1:  # otherwise the command is only mentioned, or has a placeholder
                yield given.get("--split", VALIDATION), int(block)


def used_by_sentences(text: str) -> Iterator[tuple[str, int]]:
    """Yield the split and each block that sentences of a page name."""
    for name, first, word, last in NAMED.findall(" ".join(text.split())):
        blocks = range(int(first), int(last) + 1) if word == "to" else [int(n) for n in (first, last) if n]
        yield from ((HELD_OUT if name == "held-out" else name, block) for block in blocks)


def used(page: Path) -> set[tuple[str, int]]:
    text = page.read_text(encoding="utf-8")
    if page == LIST:  # without the list itself
        text = re.sub(r"## Held-out blocks that are used up.*?(?=\n## )", "", text, flags=re.S)
    return {*used_by_commands(text), *used_by_sentences(text)}


def listed() -> dict[tuple[str, int], str]:
    """Return what used each block of the list, as text."""
    rows = re.findall(r"^\| (`portrait` )?([\d, ]+) \| (.*) \|$", LIST.read_text(encoding="utf-8"), re.M)
    return {
        (PORTRAIT if portrait else HELD_OUT, int(block)): by
        for portrait, blocks, by in rows
        for block in blocks.split(",")
    }


def free() -> dict[str, int]:
    """Return the next free block per split."""
    found = re.search(
        r"next free blocks are held-out (\d+), `portrait` (\d+) and validation (\d+)", LIST.read_text("utf-8")
    )
    return dict(zip((HELD_OUT, PORTRAIT, VALIDATION), map(int, found.groups()), strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_that_a_page_uses_are_in_the_list_which_names_the_page(page):
    for split, block in used(page):
        assert block < free()[split], f"{split} {block} is called free, and {page.name} uses it"
        if split != VALIDATION:
            by = listed().get((split, block), "")
            link = "](#" if page == LIST else f"[{page.name}]"
            assert link in by, f"{split} {block} is used by {page.name}, and the list says: {by}"


@pytest.mark.parametrize("split", [HELD_OUT, PORTRAIT])
def test_each_block_before_the_free_one_is_in_the_list(split):
    assert sorted(block for name, block in listed() if name == split) == list(range(free()[split]))


def test_pages_that_the_list_names_use_the_block():
    for (split, block), by in listed().items():
        for name in re.findall(r"\[([\w-]+\.md)\]", by):
            assert (split, block) in used(LIST.parent / name), f"{name} does not use {split} {block}"


def test_commands_and_sentences_are_understood():
    text = """About 40 held-out clips (blocks 3 and 5), and validation clips of blocks 7 to 9.

```text
python -m experiments.accuracy.frontier runs/a --split heldout --seed 13
python -m experiments.accuracy.bits --block 4
python -m experiments.accuracy.bits --block N
```
"""
    assert set(used_by_commands(text)) == {(HELD_OUT, 13), (VALIDATION, 4)}
    assert list(used_by_sentences(text)) == [(HELD_OUT, 3), (HELD_OUT, 5), *((VALIDATION, n) for n in (7, 8, 9))]
