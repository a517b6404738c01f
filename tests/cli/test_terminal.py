"""Printed text: folded lines, tables on narrow terminals, answers broken between words."""

import io
import os
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from evoprune import VideoQA
from evoprune.backend import Device, Quantization
from evoprune.language import GenerationOptions
from evoprune.report import Report, VideoFacts
from evoprune.statistics import stats_block
from evoprune_cli.running import note_model
from evoprune_cli.terminal import (
    Line,
    encoding,
    print_json,
    print_warning,
    width_of,
)
from tests.cli.screen import visible
from tests.loading import load_model


class Writes(io.RawIOBase):
    """Record each write that reaches the system."""

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
        ("demo_model", "clips/a.mp4", None, "its answer about a.mp4 is meaningless"),
        ("demo_model", "clips/a.mp4", 0, "its answer about clips/a.mp4 is meaningless"),
        ("demo_model", "clips/a.mp4", 3, "its answers about 4 videos are meaningless"),
        ("demo_model", "-", None, "its answer about standard input is meaningless"),
        ("cut_short", "clips/a.mp4", 1, "a length of ? (and 1 more video)"),
        ("other_tracks", "clips/a.mp4", None, "note: a.mp4 has several video tracks: the default one is read, or"),
        ("hdr_video", "clips/a.mp4", None, "note: a.mp4 is HDR, mapped to SDR\n"),
    ],
)  # fmt: skip
def test_a_warning_says_which_video_it_is_about(capsys, name, path, more, says):
    print_warning(name, VideoFacts(path=path), more)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("more", [None, 0, 3])
def test_the_warning_of_a_full_cache_has_its_path(capsys, monkeypatch, tmp_path, more):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    print_warning("cache_not_written", VideoFacts(path="clip.mp4"), more)
    err = capsys.readouterr().err
    assert f"(by default {tmp_path / 'cache'})" in err and ("clip.mp4" in err) == (more is not None)


def test_a_model_in_8_bits_that_nobody_asked_for_is_noted(saved, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(Device, "default_dtype", "fp32")
    monkeypatch.setattr("evoprune.session.loading.description.LARGE_MODEL", 1)
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**40))

    def noted(**options) -> str:
        session = VideoQA(load_model(str(saved), **options)).session
        note_model(session, GenerationOptions(), False)
        return capsys.readouterr().err

    if "int8" not in Quantization.kinds(torch.device("cpu")):
        assert noted() == ""
        return
    first, second = noted(), noted()
    assert "note: int8, the fastest form on a CPU; --quantize none is exact" in first and first.startswith(second)
    assert f"the quantized weights are kept in {tmp_path / 'weights'} for later runs" in first.replace("\n", " ")
    assert noted(quantize="int8") == noted(quantize="none") == noted(dtype="fp32") == ""
    assert noted(store_quantized=False) == second


@pytest.mark.parametrize("stated", ["", "0", "-5", "\u00b2", "wide"])
def test_columns_that_are_no_number_are_the_usual_ones(monkeypatch, stated):
    monkeypatch.setenv("COLUMNS", stated)
    with open(os.devnull) as no_terminal:
        assert width_of(no_terminal) == 80


@pytest.mark.parametrize("width", [40, 80])
def test_stats_block_fits_the_terminal(cli, width):
    report = Report.from_json(cli("ask", "samples/square.mp4", "What colour is the square?", "--json").out)
    lines = stats_block(report, width, verbose=True)
    assert all(len(line) <= width for line in lines)
    for line, rest in pairwise(lines):  # no line ends earlier than it must
        if rest.startswith(" " * 11) and "now" not in rest:
            assert len(line) + 1 + len(rest.split()[0]) > width, (line, rest)
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
    """Finished work, total, elapsed and remaining time; less of it on narrow terminals."""
    now = [0.0]
    line, said = Line("loading", now=lambda: now[0]), []
    steps = {5: ("reading, frame", 0, 768), 15: ("reading, frame", 100, 768), 66: ("row", 1, 4)}
    for at, step in (steps | {75: ("row", 2, 4, "encoding 3/9")}).items():
        now[0] = at
        line.show(*step)
        said.append(line.text(width))
    del said[2]
    assert said == says and all(len(text) <= width for text in said)
    now[0] = 78.0  # the clock advances without news
    assert line.text(80) == "row 2/4: encoding 3/9, 1:18, ~20 s left"
    assert line.plain() == "[1:18] row 2/4: encoding 3/9, ~20 s left"


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
    """One line on a terminal, empty afterwards; nothing if stderr is not a terminal."""
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
