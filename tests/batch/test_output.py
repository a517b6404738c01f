"""Test that the output file of a batch always has complete lines and only one writer at a time."""

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.batch import RowReader, TableFile
from evoprune.batch.output import RecordFile
from evoprune.errors import UsageError
from evoprune.report import SCHEMA, Report

HEAD = f'{{"schema":"{SCHEMA}",'.encode()  # how records start


def record(name, failed: bool = False, **row) -> Report:
    error = {"message": "no"} if failed else None
    return Report(id=str(name), answer="grün \u2028 \n", error=error, batch={"row": row, "settings": {"budget": 0.5}})


def write(path, *records, **how) -> None:
    with closing(RecordFile(str(path), **how)) as file:
        file.begin()
        for each in records:
            file.add(each)


def ids(path) -> list[str]:
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return [json.loads(line)["id"] for line in content.split(b"\n")[:-1]]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def test_records_are_there_when_add_returns(path):
    with closing(RecordFile(str(path))) as file:
        file.begin()
        for count in range(1, 4):
            file.add(record(count))
            assert len(ids(path)) == count == file.written
    assert Report.from_json(path.read_text().split("\n")[0]).answer == "grün \u2028 \n"


def test_what_is_there_is_not_touched_by_accident(path):
    write(path, record(1))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="already exists"):
        RecordFile(str(path))
    with pytest.raises(UsageError, match="cannot be combined"):
        RecordFile(str(path), resume=True, overwrite=True)
    for how in ({"resume": True}, {"overwrite": True}):
        RecordFile(str(path), **how).close()  # for example if the model is not found
        assert path.read_bytes() == before
    write(path, record(2), overwrite=True)
    assert ids(path) == ["2"]


@pytest.mark.parametrize(
    "content", [b"\0\0\0 ftypisom", b"\0" * 99 + b"x", b'{"question":"What?"}\n', b"notes", HEAD[:-1] + b"x"]
)
@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}, {}])
def test_what_holds_no_records_is_never_replaced(path, content, how):
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        RecordFile(str(path), **how)
    assert path.read_bytes() == content and "--overwrite" not in caught.value.hint


@pytest.mark.parametrize("content", [b"", HEAD, HEAD[:5], HEAD + b'"id":"1"}\n'])
def test_what_is_empty_or_holds_records_is_replaced(path, content):
    path.write_bytes(content)
    write(path, record(2), overwrite=True)
    assert ids(path) == ["2"]


def test_an_open_file_is_written_to_as_given(tmp_path):
    """For example a pipe that the shell names, `>(gzip > x)`, or the shell's own output. Existing content stays."""
    read, end = os.pipe()
    write(f"/dev/fd/{end}", record(1))
    os.close(end)
    with open(read, "rb") as file:
        assert json.loads(file.read())["id"] == "1"
    with open(tmp_path / "all", "ab") as file:
        file.write(b"before\n")
        file.flush()
        write(f"/dev/fd/{file.fileno()}", record(2))
        file.write(b"after\n")
    before, line, after = (tmp_path / "all").read_bytes().splitlines()
    assert (before, json.loads(line)["id"], after) == (b"before", "2", b"after")


def test_nothing_is_left_where_nothing_was_written(path):
    RecordFile(str(path)).close()
    assert not path.exists()
    path.touch()
    RecordFile(str(path)).close()  # an empty file is no output
    assert path.exists()
    write(path, record(1))
    assert ids(path) == ["1"]


runs = st.lists(st.booleans(), max_size=6)  # whether each record is a failure


@settings(deadline=None, max_examples=60)  # waits for the disk
@given(runs, st.data())
def test_cut_off_anywhere_it_goes_on(tmp_path_factory, failures, data):
    """A truncated file keeps its whole records, except those that are asked again."""
    path = tmp_path_factory.mktemp("batch") / "out.jsonl"
    lines = [record(number, failed).to_json().encode() + b"\n" for number, failed in enumerate(failures)]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\0" * 9])) * (cut > 0 and whole[cut - 1] != 10))
    # A line that lacks only its newline is whole.
    wanted = [str(n) for n, end in enumerate(accumulate(map(len, lines))) if end - 1 <= cut]
    if path.read_bytes().endswith(b"\0") and cut + 1 in accumulate(map(len, lines)):
        wanted = wanted[:-1]  # zeros replaced the newline
    with closing(RecordFile(str(path), resume=True)) as file:
        assert [record.id for record in file.earlier_records] == wanted
        assert [record.failed for record in file.earlier_records] == failures[: len(wanted)]
        again = {record.id for record in file.earlier_records if record.failed}
        file.begin(again)
        file.add(record("new"))
    left = [name for name in wanted if name not in again]
    assert ids(path) == [*left, "new"] and path.read_bytes().startswith(b"".join(lines[int(n)] for n in left))
    assert [name.name for name in path.parent.iterdir()] == ["out.jsonl"]


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: lines + b"\n",
        lambda lines: b"\n" + lines,
        lambda lines: lines.replace(b"\n", b"\n \t\n\n"),
        lambda lines: lines.replace(b"\n", b"\r\n") + b"\r\n",
        lambda lines: BOM + lines,
        lambda lines: BOM + b"\r\n" + lines,
        lambda lines: lines[:-1],
        lambda lines: lines + b"\n" + HEAD,  # cut off
        lambda lines: lines + b"\n\0\0\0",
    ],
)
@pytest.mark.parametrize("failed", [(), ("1",), ("3",)])
def test_resuming_after_an_editor_saved_the_file(path, edit, failed):
    write(path, *(record(name, failed=name in failed) for name in "123"))
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(UsageError, match="already exists") as caught:
        RecordFile(str(path))
    assert "--resume" in caught.value.hint
    with closing(RecordFile(str(path), resume=True)) as file:
        assert [each.id for each in file.earlier_records] == ["1", "2", "3"]
        file.begin(failed)
        file.add(record("new"))
    left = [json.loads(line)["id"] for line in path.read_bytes().removeprefix(BOM).split(b"\n") if line.strip()]
    assert left == [*(name for name in "123" if name not in failed), "new"]


def test_resuming_reads_a_row_with_the_deepest_answer(path, tmp_path):
    line = '{"video":"samples/square.mp4","question":"What?","answer":%s}' % ("[" * 99 + "]" * 99)
    (row,) = RowReader().read(io.BytesIO(line.encode()), "rows")
    write(path, record(1, **row.asked, answer=row.answer))
    with closing(RecordFile(str(path), resume=True)) as file:
        assert file.earlier_records[0].row["answer"] == row.answer


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"id": ["1"]},
        {"batch": []},
        {"batch": {"row": [], "settings": {}}},
        {"batch": {"row": {}, "settings": "x"}},
    ],
)
def test_records_of_another_form_are_refused(path, change):
    write(path, record(1))
    path.write_text(path.read_text() + json.dumps(json.loads(record(2).to_json()) | change) + "\n")
    with pytest.raises(UsageError, match="line 2 is not a record"):
        RecordFile(str(path), resume=True)


@pytest.mark.parametrize(
    "content", [b"x" * 200_000, b'"' + b"x" * 200_000, b"a\0b\n", BOM + b"a,b\n", b'"a,b\n', b"\n"]
)
def test_a_table_that_is_not_a_batch_is_never_replaced(path, content):
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="contains no records"):
            TableFile(str(path), [], resume=False, overwrite=overwrite)
    assert path.read_bytes() == content


@pytest.mark.filterwarnings("ignore:rows. fields that are only copied")
def test_a_table_never_has_formulas_and_can_be_read_again(tmp_path):
    fields = {
        "id": "-a",
        "video": "samples/square.mp4",
        "question": "=1+1",
        "note": "@x",
        "=title": "-3",
        "plain": "a=b",
    }
    rows = RowReader(passes_on=True).read(io.BytesIO(json.dumps([fields]).encode()), "rows")
    path = tmp_path / "out.csv"
    answer = Report(id="-a", answer="- a dog\n- a cat", batch={})
    for overwrite in (False, True):
        with closing(TableFile(str(path), rows, resume=False, overwrite=overwrite)) as file:
            file.begin()
            file.add(answer)
    with open(path, encoding="utf-8", newline="") as file:
        titles, cells = csv.reader(file)
    assert titles[:6] == ["id", "video", "question", "note", "'=title", "plain"]
    assert cells[:7] == ["'-a", "samples/square.mp4", "'=1+1", "'@x", "-3", "a=b", "'- a dog\n- a cat"]
    (again,) = RowReader(passes_on=True).read(io.BytesIO(path.read_bytes()), "rows")
    assert (again.id, again.question, dict(again.cells)["note"]) == ("-a", "=1+1", "@x")
    assert dict(again.cells)["answer"] == answer.answer and dict(again.cells)["=title"] == "-3"


def test_records_and_tables_have_no_passwords():
    url = "http://user:secret@localhost/a@b.mp4"
    for fields in ({"video": url}, {"inputs": [url, "samples/square.mp4"]}):
        line = json.dumps(fields | {"question": "What?"}).encode()
        (row,) = RowReader().read(io.BytesIO(line), "rows")
        assert row.paths[0] == url and "secret" not in json.dumps([row.asked, row.cells])
        assert "http://localhost/a@b.mp4" in json.dumps([row.asked, row.cells])


def test_resuming_keeps_mode_and_link(path, tmp_path):
    write(path, record(1, failed=True), record(2))
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    with closing(RecordFile(str(tmp_path / "link"), resume=True)) as file:
        file.begin({"1"})
        with pytest.raises(UsageError, match="another batch"):  # the new file is locked, too
            RecordFile(str(path), resume=True)
    assert (tmp_path / "link").is_symlink() and path.stat().st_mode & 0o777 == 0o640 and ids(path) == ["2"]


GOOD = record(1).to_json()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("notes", 1),
        (Report().to_json() + "\n", 1),  # from `ask --json`
        (f"{GOOD}\nnotes", 2),
        (f"{GOOD}\n{GOOD[:100]}\n{GOOD}\n", 2),
        (f"\n{GOOD}\nx\n", 3),
        (f"{GOOD}\n{Report(id='1').to_json()}", 2),
        ("\0" * 9, 1),
        ("[" * 10**5, 1),
    ],
    ids=range(8),
)
def test_a_file_that_is_not_ours_is_left_alone(path, content, line):
    path.write_text(content)
    with pytest.raises(UsageError, match=f"out.jsonl, line {line} is not a record of a batch") as caught:
        RecordFile(str(path), resume=True)
    assert path.read_text() == content
    assert ("delete it" if line > 1 else "remove this one") in caught.value.hint


def test_records_begin_as_it_is_believed():
    assert GOOD.encode().startswith(HEAD)


def test_one_process_at_a_time_and_a_killed_one_holds_no_lock(path):
    code = "import sys; from evoprune.batch.output import RecordFile as R; r = R(sys.argv[1]); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.read(1)
        with pytest.raises(UsageError, match="another batch is writing"):
            RecordFile(str(path))
    finally:
        other.kill()
        other.communicate()
    write(path, record(1))
    assert ids(path) == ["1"]


def test_many_at_once_lose_nothing(path):
    """All writers retry until they own the file, and each one replaces the file."""
    write(path, record("torn", failed=True))

    def work(name):
        while True:
            try:
                with closing(RecordFile(str(path), resume=True)) as file:
                    file.begin({"torn"} | {record.id for record in file.earlier_records if record.failed})
                    file.add(record(name))
                    file.add(record(f"{name} failed", failed=True))
                return
            except UsageError as problem:
                assert "another batch" in problem.message
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(f"{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ids(path)
    assert sorted(names[:-1]) == [str(n) for n in range(8)] and names[-1] == f"{names[-2]} failed"


@pytest.mark.parametrize("after", [0, 10])
def test_a_full_disk(path, monkeypatch, after):
    """If some bytes still fit, they are removed again."""
    real, full = os.write, []

    def write_some(number, content):
        if len(full) == 0:
            return real(number, content)
        if len(full) == 1 and after:
            full.append(1)
            return real(number, bytes(content[:after]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(RecordFile(str(path))) as file:
        file.begin()
        monkeypatch.setattr(os, "write", write_some)
        file.add(record(1))
        full.append(1)
        with pytest.raises(UsageError, match=r"cannot write .*out.jsonl: No space left on device") as caught:
            file.add(record(2))
        assert caught.value.hint == "free some space there" and file.written == 1
        assert ids(path) == ["1"]
    assert ids(path) == ["1"]


def test_a_full_disk_while_a_copy_is_made(path, monkeypatch):
    write(path, record(1, failed=True), record(2))
    before = path.read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(RecordFile(str(path), resume=True)) as file:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            file.begin({"1"})
    assert path.read_bytes() == before and [name.name for name in path.parent.iterdir()] == ["out.jsonl"]


def test_a_copy_is_made_in_a_file_of_its_own(path):
    """A user's file next to the output stays; leftovers of a killed run are removed."""
    beside = [
        path.with_name(f"out.jsonl{end}") for end in (".new", ".tmp", ".evoprune-1.tmp", ".evoprune-0123abcd.tmp")
    ]
    for each in beside:
        each.write_text(GOOD + "\n")
    write(path, record(1, failed=True), record(2))
    with closing(RecordFile(str(path), resume=True)) as file:
        file.begin({"1"})
    assert ids(path) == ["2"] and sorted(path.parent.iterdir()) == sorted([path, *beside[:3]])
    assert all(each.read_text() == GOOD + "\n" for each in beside[:3])


@pytest.mark.parametrize("place", ["", "no/such/folder/out.jsonl", "file/out.jsonl", "/proc/out.jsonl"])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write") as caught:
        RecordFile(place or str(tmp_path))
    assert "folder that you can write to" in caught.value.hint


@pytest.mark.parametrize("place", ["new/", "there/"])
def test_the_name_of_a_folder_is_no_file(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match=f"cannot write {place}"):
        RecordFile(place)
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_what_is_no_file_is_only_written(tmp_path, capfd):
    with closing(RecordFile("-")) as file:
        file.begin()
        file.add(record(1))
    assert json.loads(capfd.readouterr().out)["id"] == "1"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write(tmp_path / "pipe", record(2))
    assert json.loads(reader.communicate(timeout=20)[0])["id"] == "2"
    for name in ("-", str(tmp_path / "pipe")):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="not a file that can be"):
                RecordFile(name, **how)
    with closing(RecordFile("/dev/full")) as file, pytest.raises(UsageError, match="cannot write /dev/full: No space"):
        file.begin()
        file.add(record(3))


def test_nobody_reads(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with closing(RecordFile(str(tmp_path / "pipe"))) as file:
        file.begin()
        os.close(reader)
        with pytest.raises(BrokenPipeError):
            file.add(record(1))


def test_a_path_of_stray_bytes_is_escaped(path):
    write(path, record(1, video="caf\udce9.mp4"))
    assert json.loads(path.read_text("ascii"))["batch"]["row"] == {"video": "caf\udce9.mp4"}


def test_a_signal_does_not_tear_a_line(path, monkeypatch):
    """If Ctrl-C comes after half of a line, the other half is still written."""
    real, main = os.write, threading.main_thread().ident
    written = []

    def slow(number, content):
        written.append(real(number, bytes(content[: max(1, len(content) // 2)])))
        if len(written) == 1:
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.2)
        return written[-1]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), closing(RecordFile(str(path))) as file:
            file.begin()
            monkeypatch.setattr(os, "write", slow)
            file.add(record(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(written) > 2 and ids(path) == ["1"] and file.written == 1
