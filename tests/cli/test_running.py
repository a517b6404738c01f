"""Test which existing files are replaced by the output files of commands, and which never are."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from evoprune.bench import Case, Panel, draw
from evoprune.bench.overlay import gif, mp4, png, shared_palette
from evoprune.bench.profile_results import ProfileResults
from evoprune.bench.profile_rows import METHOD, ProfileRow
from evoprune.errors import EvopruneError, OutOfMemory, UsageError
from evoprune.files import replacing
from evoprune.report import Environment, ModelFacts
from evoprune_cli import __main__
from evoprune_cli.delivery import check_writable, write_bytes
from evoprune_cli.running import LIBRARIES, prepare
from evoprune_cli.terminal import json_line

SAMPLES = Path("samples")
QUICK = ("-m", "demo", "-b", "0.25", "--frames", "4", "-r", "1", "-w", "0", "-q")
TUNE = ("-m", "demo", "-b", "0.5", "--frames", "4", "-Q", "What digit is it?", "--agree", "0.05", "-q")


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes((SAMPLES / "square.mp4").read_bytes())
    return path


def commands(clip: Path, target: Path) -> dict[str, tuple]:
    """Return every command that writes a file. Each one refuses before it computes anything."""
    return {
        "tune -o": ("tune", clip, *TUNE, "-o", target),
        "tune --chart": ("tune", clip, *TUNE, "--chart", target),
        "profile -o": ("profile", clip, *QUICK, "-o", target),
        "profile --chart": ("profile", clip, *QUICK, "--chart", target),
        "eval --chart": ("eval", "--data", "samples/questions.jsonl", "--chart", target),
        "inspect --overlay": ("inspect", clip, "--overlay", target),
        "ask --show": ("ask", clip, "What happens?", "--show", target),
    }


# Users' files that mention evoprune.
OF_USERS = {
    "script": b"#!/bin/sh\nevoprune ask clip.mp4 'Who comes in?'\n",
    "page": b"# evoprune\n\nevoprune profile 0.1.0 is slow here.\n",
    "comment": b"<!-- evoprune -->\n\nMy notes.\n",
    "settings": b'{"evoprune":{"schema":"evoprune/tune@1"}}',
    "answers": b'{"schema":"evoprune/answer@1","id":"1"}\n',  # output of a batch, which needs --overwrite
    "table": b"row,name,evoprune\n",
    "drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><!-- evoprune --></svg>',
    "web page": b"<!doctype html>\n<html>\n<!-- evoprune ask -->\n",
    "clip": (SAMPLES / "square.mp4").read_bytes() + b"evoprune overlay",
    "picture": (SAMPLES.parent / "docs/overlay.png").read_bytes().replace(b"Software\0evoprune", b"Software\0my-paint"),
}


@pytest.mark.parametrize("what", commands(Path(), Path()))
def test_a_file_of_the_user_is_never_replaced(cli, clip, tmp_path, what):
    named = tmp_path / {"--chart": "named.svg", "--show": "named.html"}.get(what.split()[1], "named.mp4")
    named.symlink_to(other := tmp_path / "other")
    for content in OF_USERS.values():
        other.write_bytes(content)
        result = cli(*commands(clip, named)[what])
        assert result.code == 2 and f"{named} already exists, and evoprune did not write it" in result.err, content[:80]
        assert other.read_bytes() == content and sorted(tmp_path.iterdir()) == [clip, named, other]
    named.unlink()
    named.mkdir()
    assert f"cannot write {named}" in cli(*commands(clip, named)[what]).err


def written() -> dict[str, bytes]:
    """Return one file per kind that evoprune writes."""
    picture = Image.new("RGB", (64, 64))
    results = ProfileResults(
        ModelFacts("model", None, "fp32", "none", "cpu", "auto"),
        0,
        Environment("0.1.0", "2.13.0+cpu", "5.23.0", "a CPU", 2),
        {},
        {"text_tokens": 1, "new_tokens": 1, "repetitions": 1, "time_limit_s": 9},
        [ProfileRow(METHOD, Case(4, 56, 56), 0.5, "evoprune", error="failed")],
        [1e9],
    )
    tables = {form: results.text(form, 80).encode() for form in ("table", "md", "csv", "json")}
    tuned = {
        name: (json_line({"schema": f"evoprune/{name}@1", "model": {}}) + "\n").encode()
        for name in ("tune", "tune-operations")
    }
    overlays = {
        "png": png(picture),
        "gif": gif([picture, picture], 0.1, shared_palette([picture])),
        "mp4": mp4([picture, picture], 0.1),
    }
    web = (SAMPLES.parent / "evoprune_cli/show.html").read_bytes()
    svg = draw("Title", "", [Panel("", "", "", ())]).encode()
    return {**tables, **tuned, **overlays, "svg": svg, "web": web, "nothing": b""}


@pytest.mark.few(2)
@pytest.mark.parametrize("what", commands(Path(), Path()))
def test_what_evoprune_wrote_is_replaced(cli, clip, tmp_path, monkeypatch, what):
    def reached():
        raise EvopruneError("it would be written")

    monkeypatch.setattr(f"evoprune_cli.{what.split()[0]}.prepare", reached)
    named = tmp_path / {"--chart": "named.svg", "--show": "named.html"}.get(what.split()[1], "named.mp4")
    named.symlink_to(tmp_path / "other")
    for content in (None, *written().values()):  # first a dangling link
        if content is not None:
            (tmp_path / "other").write_bytes(content)
        assert "it would be written" in cli(*commands(clip, named)[what]).err, content and content[:80]


@pytest.mark.parametrize(
    "command", [("tune", "-m", "demo"), ("profile",), ("verify",), ("batch", "-m", "demo", "-Q", "Who?")]
)
def test_an_empty_name_is_refused(cli, command):
    result = cli(*command, "samples/square.mp4", "-o", "")
    assert result.code == 2 and ("the name of an output is empty" in result.err or "no output" in result.err)


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "-b", ""),
        ("profile", "--method=,"),
        ("eval", "--data", "samples/questions.jsonl", "-b", " "),
        ("tune", "samples/square.mp4", "-b", ""),
    ],
)
def test_an_empty_list_is_refused(cli, command):
    result = cli(*command)
    assert result.code == 2 and "list is empty" in result.err


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("args", "prints", "file"),
    [
        (("verify", "-m", "demo", "--quick", "-o"), "delivery.print_text", "report.json"),
        (("tune", *TUNE, "--json", "samples/square.mp4", "-o"), "delivery.print_text", "tune.json"),
        (
            ("eval", "--data", "samples/questions.jsonl", "--limit", "1", "-q", "-o"),
            "delivery.print_text",
            "run/results.json",
        ),
        (("profile", *QUICK, "--size", "56x56", "--chart"), "profile.print_text", "chart.svg"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_files_are_written_though_nobody_reads_stdout(cli, monkeypatch, tmp_path, args, prints, file):
    def nobody_reads(*_):
        raise BrokenPipeError

    monkeypatch.setattr(f"evoprune_cli.{prints}", nobody_reads)
    result = cli(*args, tmp_path / file.removesuffix("/results.json"))
    assert (result.code, result.out) == (0, "") and (tmp_path / file).stat().st_size


@pytest.mark.parametrize(
    "args",
    [
        ("batch", "samples/square.mp4", "-Q", "Who?", "-m", "demo", "-o"),
        ("find", "samples/square.mp4", "a red circle", "-o"),
        ("find", "samples/square.mp4", "a red circle", "--srt"),
        ("verify", "-m", "demo", "-o"),
    ],
    ids=lambda args: f"{args[0]} {args[-1]}",
)
def test_the_hint_on_a_missing_folder_is_how_to_create_it(cli, tmp_path, args):
    file = tmp_path / "my runs" / "out.jsonl"
    result = cli(*args, file)
    assert result.code == 2 and result.err.startswith(f"error: cannot write {file}")
    assert result.err.endswith(f", or create the folder: mkdir -p '{file.parent}'\n")


def test_the_name_of_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}/new/"):
        check_writable(f"{tmp_path}/new/")


def test_a_link_into_no_folder_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "file")
    with pytest.raises(UsageError, match="cannot write"):
        check_writable(str(tmp_path / "link"))


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_bytes(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"


def test_an_open_file_is_written_to_as_given(tmp_path):
    with open(tmp_path / "all", "ab") as file:
        for content in (b"one\n", b"two\n"):
            check_writable(f"/dev/fd/{file.fileno()}")
            write_bytes(f"/dev/fd/{file.fileno()}", content)
    assert (tmp_path / "all").read_bytes() == b"one\ntwo\n"
    read, end = os.pipe()
    check_writable(f"/dev/fd/{end}")
    write_bytes(f"/dev/fd/{end}", b"three")
    os.close(end)
    with open(read, "rb") as file:
        assert file.read() == b"three"


@pytest.mark.parametrize("what", ["tune -o", "profile -o", "inspect --overlay"])
def test_an_input_is_never_replaced(cli, clip, tmp_path, what):
    clip.write_bytes(written()["mp4"])
    before = clip.read_bytes()
    (tmp_path / "link.mp4").symlink_to(clip)
    (tmp_path / "hard.mp4").hardlink_to(clip)
    for target in (clip, tmp_path / "link.mp4", tmp_path / "hard.mp4"):
        result = cli(*commands(clip, target)[what])
        assert result.code == 2 and f"{target} would change an input" in result.err
    assert clip.read_bytes() == before


def test_questions_are_never_replaced(cli, tmp_path):
    data = tmp_path / "questions.svg"
    data.write_text("{}")
    assert "would change an input" in cli("eval", "--data", data, "--chart", data).err
    assert data.read_text() == "{}"


def test_a_file_beside_it_stays(tmp_path):
    others = [tmp_path / f"a.json{end}" for end in (".new", ".tmp", f".{os.getpid()}.tmp")]
    for each in others:
        each.write_text("mine")
    write_bytes(str(tmp_path / "a.json"), b"{}")
    assert [each.read_text() for each in others] == ["mine"] * 3
    mode = (tmp_path / "a.json").stat().st_mode
    assert mode == others[0].stat().st_mode and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_a_replaced_file_keeps_its_mode_and_links_to_it(tmp_path, mode):
    (tmp_path / "there").mkdir()
    path, link = tmp_path / "there/a.json", tmp_path / "link.json"
    path.write_text("old")
    path.chmod(mode)
    link.symlink_to(path)
    write_bytes(str(link), b"new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o7777 == mode
    assert list(path.parent.iterdir()) == [path]


def test_private_contents_are_never_readable_by_others(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o600)
    with replacing(path) as file:
        file.write(b"new")
        assert {each.stat().st_mode & 0o777 for each in tmp_path.iterdir()} == {0o600}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_only_a_regular_file_is_replaced_through_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in ("pipe", "link"):
        with pytest.raises(OSError, match="not a regular file"), replacing(tmp_path / path) as file:
            file.write(b"new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_link_that_is_not_followed_is_replaced(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "mine").chmod(0o644)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "link", mode=0o600, through_links=False) as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"new" and (tmp_path / "link").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files to other users")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    os.chown(path, 12345, 23456)
    path.chmod(0o640)
    write_bytes(str(path), b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 23456, 0o640)


@pytest.mark.skipif(os.name != "posix", reason="files have no owners")
@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
def test_a_file_whose_owner_cannot_be_kept_is_replaced(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    path.write_text("old")

    def refused(*_):
        raise OSError(number, os.strerror(number))  # EINVAL if a container has no such user

    monkeypatch.setattr(os, "chown", refused)
    write_bytes(str(path), b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(Exception, match=r"cannot write .*No space left"):
        write_bytes(str(path), json.dumps("new").encode())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "command", [("profile",), ("eval", "--data", "samples/questions.jsonl"), ("tune", "samples/square.mp4")]
)
def test_a_chart_is_refused_where_matplotlib_is_missing(cli, monkeypatch, tmp_path, command):
    monkeypatch.setattr("evoprune_cli.delivery.find_spec", lambda name: None)
    result = cli(*command, "--chart", str(tmp_path / "a.svg"))
    assert result.code == 2 and "charts need matplotlib" in result.err and "[plot]'" in result.err


# --threads and EVOPRUNE_THREADS in every command, and how threads wait for each other.


CLIP = "samples/square.mp4"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("option", "variable", "threads"), [((), None, 1), (("--threads", "3"), "2", 3), ((), "2", 2)], ids=str
)
def test_reports_say_how_many_there_were(cli, tiny_folder, monkeypatch, option, variable, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("EVOPRUNE_THREADS", variable)
    torch.set_num_threads(4)
    asked = (CLIP, "What happens?", "-m", str(tiny_folder), "-n", "1", "--json", *option)
    assert cli("ask", *asked).record["env"]["threads"] == threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("given", "spin"), [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")], ids=str
)
def test_threads_sleep_soon_unless_the_environment_says_otherwise(monkeypatch, given, spin):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr("evoprune_cli.main.run", lambda: None)
    __main__.start()
    assert given.get("GOMP_SPINCOUNT") == spin


def test_without_memory_for_the_libraries(monkeypatch):
    monkeypatch.setattr("evoprune_cli.running.keep_freed_memory", lambda: None)
    for enough in (LIBRARIES, None):
        monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _, enough=enough: enough)
        prepare()
    monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _: LIBRARIES - 1)
    with pytest.raises(OutOfMemory, match=r"^too little memory: 255 MiB are available") as caught:
        prepare()
    assert caught.value.exit_code == 5 and "container" in caught.value.hint
