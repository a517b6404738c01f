"""Values computed from files are used until the files change."""

import copy
import os
import time
from types import SimpleNamespace

import pytest

from evoprune.files import COARSE_TICK_NS, TICK_NS, FileIdentity, FileMemo


@pytest.fixture
def settled(tmp_path):
    """Return a file that was changed long enough ago."""
    path = tmp_path / "file"
    path.write_text("old")
    time.sleep(2 * TICK_NS / 1e9)
    return path


def test_a_value_is_computed_once_for_each_state_of_a_file(settled):
    memo, computed = FileMemo(2), []

    def value():
        computed.append(1)
        return settled.read_text()

    assert [memo.get(settled, value) for _ in range(3)] == ["old"] * 3 and len(computed) == 1
    assert memo.get(settled, lambda: "other", also="option") == "other"
    assert copy.deepcopy(memo).get(settled, value) == "old" and len(computed) == 2
    status = os.stat(settled)
    settled.write_text("new")  # in place, with the same size and date
    os.utime(settled, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert memo.get(settled, value) == "new"
    other = settled.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, settled)
    assert memo.get(settled, value) == "two"
    settled.unlink()
    with pytest.raises(FileNotFoundError):
        memo.get(settled, value)
    assert FileIdentity.settled(settled) is None


def test_what_may_be_stale_is_not_kept(settled):
    memo, computed = FileMemo(1), []

    def changing():
        settled.write_text(f"{len(computed):3}")
        computed.append(1)

    for _ in range(2):  # the file changes while its value is computed, and just before it is computed
        memo.get(settled, changing)
    time.sleep(2 * TICK_NS / 1e9)
    memo.get(settled, lambda: computed.append(1), lambda value: False)
    memo.get(settled, lambda: computed.append(1))
    assert len(computed) == 4


def test_whole_seconds_need_more_time(settled, monkeypatch):
    whole_ns = 5 * 10**9  # a file system without fractions of a second
    times = SimpleNamespace(st_dev=1, st_ino=2, st_size=3, st_mtime_ns=whole_ns, st_ctime_ns=whole_ns)
    monkeypatch.setattr(os, "stat", lambda path: times)
    for wait_ns, is_settled in ((2 * TICK_NS, False), (COARSE_TICK_NS, False), (COARSE_TICK_NS + 1, True)):
        monkeypatch.setattr(time, "time_ns", lambda wait_ns=wait_ns: whole_ns + wait_ns)
        assert (FileIdentity.settled(settled) is not None) == is_settled


def test_only_the_latest_values_are_kept(settled):
    paths = [settled, *(settled.with_name(f"file{n}") for n in range(2))]
    for path in paths[1:]:
        path.touch()
    time.sleep(2 * TICK_NS / 1e9)
    memo, computed = FileMemo(2), []
    for path in (paths[0], paths[1], paths[0], paths[2], paths[0], paths[1]):
        memo.get(path, lambda path=path: computed.append(path))
    assert computed == [*paths, paths[1]]
