"""What is printed: lines that fold, tables on narrow terminals, answers that are broken between words."""

import io
import os
import random
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from evoprune import VideoQA
from evoprune.language.settings import GenerationOptions
from evoprune.report import Report, VideoFacts, stats_block
from evoprune.session.loading.description import describe
from evoprune.session.options import ModelOptions
from evoprune_cli.running import note_model
from evoprune_cli.terminal import (
    Line,
    Wrapped,
    encoding,
    fitting,
    print_json,
    print_stream,
    print_warning,
    table,
    width_of,
)
from evoprune_cli.tune import render_operations as operations_table
from tests.cli.screen import visible
from tests.loading import load_model


class Writes(io.RawIOBase):
    """Notes each write that reaches the system."""

    def __init__(self):
        self.made = []

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        self.made.append(bytes(content))
        return len(content)


def test_a_long_record_is_one_write(monkeypatch):
    """Processes that share a file, as under `xargs -P`, keep their lines whole."""
    raw = Writes()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    print_json(Report(question="?" * 20_000))
    assert len(raw.made) == 1 and raw.made[0].endswith(b"}\n")


NAME = "my holiday/" + "long-" * 8 + "a b.mp4"


@pytest.mark.parametrize("columns", [40, 80])
def test_errors_fold_between_words_on_a_terminal_and_never_in_a_pipe(cli, columns):
    args = ("ask", NAME, "Who?", "--json")
    error, hint = cli(*args).err.splitlines()
    assert error == f"error: no such file: {NAME}" and hint.startswith("hint: check")
    assert visible(cli(*args, columns=columns).err) == (
        ["error: no such file:", f"       {NAME}", hint] if columns == 40 else [error, hint]
    )


def test_hints_keep_options_whole(cli):
    error, hint, *rest = visible(cli("batch", "a.mp4", columns=40).err)
    assert error.startswith("error: ") and hint.startswith("hint: ")
    assert rest and all(line.startswith("      ") and len(line) <= 40 for line in rest)
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in " ".join(rest).split()


@pytest.mark.parametrize(
    ("name", "path", "more", "says"),
    [
        ("demo_model", "clips/a.mp4", None, "its answer about a.mp4 means nothing"),
        ("demo_model", "clips/a.mp4", 0, "its answer about clips/a.mp4 means nothing"),
        ("demo_model", "clips/a.mp4", 3, "its answers about 4 videos mean nothing"),
        ("demo_model", "-", None, "its answer about standard input means nothing"),
        ("cut_short", "clips/a.mp4", 1, "it lasts until ? (and 1 more video)"),
        ("dolby_vision", "clips/a.mp4", None, "warning: a.mp4 is Dolby Vision"),
        ("hdr_video", "clips/a.mp4", None, "note: a.mp4 is HDR, mapped to SDR\n"),
    ],
)  # fmt: skip
def test_a_warning_says_which_video_it_is_about(capsys, name, path, more, says):
    print_warning(name, VideoFacts(path=path), more)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, True),
        ({"quantize": "int8"}, False),
        ({"description": describe(ModelOptions(dtype="bf16"))}, False),
        ({"weights_bytes": 10}, False),
    ],
)
def test_a_large_model_in_fp32_is_told_of_8_bits(saved, capsys, changes, said, monkeypatch):
    monkeypatch.setattr("evoprune.backend.cpu.quantize.kinds", lambda device: ["int8"])
    loaded = replace(load_model(str(saved), dtype="fp32"), weights_bytes=2**32)
    session = VideoQA(loaded).session
    note_model(replace(session, loaded=replace(loaded, **changes)), GenerationOptions(), False)
    assert ("--quantize int8 is about twice as fast" in capsys.readouterr().err) == said


NAMES = [f"evoprune:alpha={alpha}:reuse=0 -b 0.25" for alpha in (1, 2, 3)]
CELLS = {"first token": lambda name: "3.21x", "agree": lambda name: "97.1 (95.0-99.0)", "KL": lambda name: "0.012"}


@pytest.mark.parametrize("width", [80, 60, 48, 40, 34])
def test_a_name_is_wrapped_and_not_cut(width):
    lines, titles = fitting(NAMES, str, CELLS, ("KL",), width)
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    place = (
        lines[0].index("first")
        if "first token" in lines[0]
        else min(line.find("3.21x") for line in lines if "3.21x" in line)
    )
    shown = "".join(line[:place].strip() for line in lines).replace(" ", "")
    assert shown == "".join(NAMES).replace(" ", "")
    assert sum("3.21x" in line and "97.1 (95.0-99.0)" in line for line in lines) == len(NAMES)
    assert titles == list(CELLS)[: 3 if width > 60 else 2]


@pytest.mark.parametrize("width", [80, 40, 30])
def test_recipes_of_operations(width):
    rows = [
        {"budget": 0.2, "share": 0.21, "operations": 1234, "kl": 0.1234, "agree": 0.97},
        {"budget": 0.3, "share": 0.31, "operations": 1000, "kl": None, "agree": None},
    ]
    document = {
        "model": {"id": "m", "dtype": "fp32", "device": "cpu"}, "answer_tokens": 9, "questions": 1, "seconds": 1.0, "rows": rows,
        "videos": {"answered": 1, "wanted": 1}, "failures": [], "error": None, "complete": True,
    }  # fmt: skip
    lines = operations_table(document, width).splitlines()
    assert max(map(len, lines[:-1])) <= width and "-b 0.2  21.0%" in " ".join(lines) and "0.123" in " ".join(lines)
    assert any(line.startswith("-b 0.3  31.0%") and "-" in line[14:] for line in lines)
    assert ("operations: left out" in " ".join(lines)) == (width >= 40)


def test_words_of_a_text_are_wrapped_and_not_cut():
    lines, _ = table(
        ["name", "acts", "source"], [["evoprune-merge", "in the encoder", "arXiv 2603.03681,"]], 30, right=False
    )
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 30
    columns = [lines[0].index(title) for title in ("name", "acts", "source")] + [30]
    whole = ["".join("".join(line[a:b] for line in lines[1:]).split()) for a, b in pairwise(columns)]
    assert whole == ["evoprune-merge", "intheencoder", "arXiv2603.03681,"]


TEXT = (
    "A small purple triangle moves up. The digit 2 appears.\n\n  Then: unbreakablewordsarelongerthanaline, and so on."
)


def shown(text: str, width: int, pieces: int = 1) -> str:
    """What is written of a text that comes in pieces of random length."""
    draw, written = random.Random(pieces), []
    wrapped, rest = Wrapped(width, written.append), text
    while rest:
        count = draw.randint(1, 7) if pieces > 1 else len(rest)
        wrapped.add(rest[:count])
        rest = rest[count:]
    wrapped.flush()
    return "".join(written)


@pytest.mark.parametrize("width", [10, 20, 33, 200])
def test_lines_end_between_words(width):
    text = shown(TEXT, width)
    assert text.split() == TEXT.split() and text.count("\n\n") == 1
    for line in text.split("\n"):
        for word in re.finditer(r"\S+", line):  # the terminal breaks at multiples of its width
            assert len(word[0]) > width or word.start() // width == (word.end() - 1) // width
    assert all(shown(TEXT, width, pieces) == text for pieces in range(2, 9))


def test_what_fits_is_not_changed():
    assert shown(TEXT, 500) == TEXT and shown("green", 5) == "green"
    assert shown("ab cd", 5) == "ab cd" and shown("ab cde", 5) == "ab\ncde"


def test_a_word_is_written_as_soon_as_the_next_one_begins():
    written = []
    wrapped = Wrapped(20, written.append)
    wrapped.add("gre")
    assert written == []
    wrapped.add("en ")
    assert written == ["green"]


def test_wide_characters_need_no_spaces():
    assert shown("\u4e00" * 7, 8) == "\u4e00" * 4 + "\n" + "\u4e00" * 3


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_broken_in_a_pipe(monkeypatch, capsys, terminal):
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_stream(iter(["one two ", "three", " four\tfive"]))
    assert capsys.readouterr().out == ("one two\nthree four\nfive\n" if terminal else "one two three four\tfive\n")


@pytest.mark.parametrize("stated", ["", "0", "-5", "\u00b2", "wide"])
def test_columns_that_are_no_number_are_the_usual_ones(monkeypatch, stated):
    monkeypatch.setenv("COLUMNS", stated)
    with open(os.devnull) as no_terminal:
        assert width_of(no_terminal) == 80


@pytest.mark.parametrize("width", [40, 80])
def test_stats_block_fits_the_terminal(cli, width):
    report = Report.from_json(cli("ask", "samples/square.mp4", "What colour is the square?", "--json").out)
    assert all(len(line) <= width for line in stats_block(report, width))
    report.pruning.visual_tokens_in, report.pruning.encoder_rows, report.pruning.visual_tokens_kept = 24576, 12288, 6144
    report.tokens.visual, report.tokens.prompt, report.video.frames_total = 6144, 6190, 1234567
    report.video.path, report.model.id = f"/a/{'long' * 40}.mp4", f"/b/{'long' * 40}"
    assert all(len(line) <= width for line in stats_block(report, width))


@pytest.mark.parametrize(
    ("width", "says"),
    [
        (
            80,
            [
                "reading, frame 0/768, 0:05",
                "reading, frame 100/768, 0:15, ~70 s left",
                "row 2/4: encoding 3/9, 1:15, ~20 s left",
            ],
        ),
        (30, ["reading, frame 0/768, 0:05", "reading, frame 100/768", "row 2/4, 1:15, ~20 s left"]),
        (12, ["reading, fra", "reading, fra", "row 2/4"]),
    ],
)
def test_a_line_of_progress(width, says):
    """What is done, of how much, for how long already, and for how much longer; less of it where the terminal is narrow."""
    now = [0.0]
    line, said = Line("loading", now=lambda: now[0]), []
    steps = {5: ("reading, frame", 0, 768), 15: ("reading, frame", 100, 768), 66: ("row", 1, 4)}
    for at, step in (steps | {75: ("row", 2, 4, "encoding 3/9")}).items():
        now[0] = at
        line.show(*step)
        said.append(line.text(width))
    del said[2]
    assert said == says and all(len(text) <= width for text in said)
    now[0] = 78.0  # without news the clock goes on
    assert line.text(80) == "row 2/4: encoding 3/9, 1:18, ~20 s left"


def test_frames_are_read_before_they_are_encoded():
    said = []
    step = encoding(lambda *what: said.append(what))
    for each in (("input", 2, 3), ("read", 4, 8), ("encode", 2, 8), ("read", 8, 8), ("encode", 8, 8), ("layers", 1, 2)):
        step(*each)
    names = ("reading, frame", 4, 8), ("reading, frame", 8, 8), ("encoding, frame", 8, 8), ("encoding, layer", 1, 2)
    assert said == [(f"input 2/3: {name}", done, total) for name, done, total in names]


@pytest.mark.few(2)
@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ("ask", "samples/square.mp4", "What?", "-m", "demo", "--frames", "4"),
            ["reading, frame 4/4", "encoding, frame 4/4"],
        ),
        (("inspect", "samples/square.mp4", "--scan"), ["scanning, frame 0/72"]),
        (
            ("batch", "samples/square.mp4", "-Q", "Who?", "-m", "demo", "-o", "-"),
            ["row 0/1: reading, frame 12/12", "row 1/1"],
        ),
    ],
)
def test_what_commands_show(cli, monkeypatch, args, says, columns):
    """On one line of a terminal, which is empty afterwards; nothing where stderr is none."""
    seen, show = [], Line.show

    def noting(self, *what):
        show(self, *what)
        seen.append(re.sub(r", \d+:\d\d.*", "", self.text(80)))

    monkeypatch.setattr(Line, "show", noting)
    quiet = cli(*args)
    assert quiet.code == 0 and seen == [] and "frame 4/4" not in quiet.err
    shown = cli(*args, columns=columns)
    assert shown.code == 0 and [text for text in says if text not in seen] == [], seen
    left = [line for line in visible(shown.err) if re.match(r"[-\\|/] ", line) or "reading, frame" in line]
    assert left == [] and max(map(len, visible(shown.err)), default=0) <= columns
