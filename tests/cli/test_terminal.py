"""What is printed, write by write and line by line."""

import io
from dataclasses import replace

import pytest

from evoprune import VideoQA
from evoprune.language.settings import GenerationOptions
from evoprune.report.records import Report, VideoFacts
from evoprune_cli.running import note_model
from evoprune_cli.terminal import print_json, print_warning
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
        ({"dtype": "bf16"}, False),
        ({"device": "cuda"}, False),
        ({"weights_bytes": 10}, False),
    ],
)
def test_a_large_model_in_fp32_is_told_of_8_bits(saved, capsys, changes, said, monkeypatch):
    monkeypatch.setattr("evoprune.cpu.quantize.kinds", lambda device: ["int8"])
    loaded = replace(load_model(str(saved), dtype="fp32"), weights_bytes=2**32)
    engine = VideoQA(loaded).engine
    note_model(replace(engine, loaded=replace(loaded, **changes)), GenerationOptions(), False)
    assert ("--quantize int8 is about twice as fast" in capsys.readouterr().err) == said
