"""Test jobs that are distributed over several processes."""

import errno
import multiprocessing
import os
import subprocess
import sys

import pytest

from evoprune.bench import processes
from evoprune.bench.processes import map_in_processes
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError

pytestmark = pytest.mark.full

SCRIPT = """
import sys
import time
from evoprune.bench.processes import map_in_processes

def start():
    return work

def work(job):
    sys.__stdout__.write("at work\\n")
    sys.__stdout__.flush()
    time.sleep(100)
    return []

if __name__ == "__main__":
    list(map_in_processes(start, [1, 2], 2))
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "jobs.py").write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "jobs.py")], stdout=subprocess.PIPE, text=True)
    assert [parent.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    parent.kill()
    assert parent.communicate(timeout=30)[0] == ""  # the output ends once no process holds it


def cannot_start():
    raise ModelError("no model here", "look elsewhere")


def crashes():
    os._exit(3)


# The thread that ends a pool runs concurrently, so an error in it shows in only a few of many failures, and only as a warning.
@pytest.mark.full
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("start", "code", "message"), [(cannot_start, 4, "no model here"), (crashes, 1, "one of 2 ")])
def test_a_failure_at_the_start_ends_all_processes(start, code, message, capfd):
    before = set(multiprocessing.active_children())
    for _ in range(6):
        with pytest.raises(EvopruneError, match=message) as caught:
            list(map_in_processes(start, range(2000), 2))
        assert caught.value.exit_code == code and caught.value.hint
        assert set(multiprocessing.active_children()) <= before
    assert capfd.readouterr().err == ""


def test_the_system_ends_a_process_that_takes_too_much_memory(monkeypatch):
    kills = iter((5, 6))
    monkeypatch.setattr("evoprune.backend.limits.Host.oom_kills", lambda _: next(kills))
    with pytest.raises(OutOfMemory, match="one of 2 processes"):
        list(map_in_processes(crashes, range(10), 2))


def double():
    return _doubled


def _doubled(job):
    if job == 5:
        raise ValueError("job 5")
    return [{"job": 2 * job}]


@pytest.mark.few(1)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fails", [False, True], ids=["closed", "failed"])
def test_results_come_in_order_and_no_process_stays(fails):
    before, made = set(multiprocessing.active_children()), []
    each = map_in_processes(double, range(100), 2)
    if fails:
        with pytest.raises(ValueError, match="job 5"):
            made.extend(each)
    else:
        made.extend(next(each) for _ in range(5))
        each.close()
    assert made == [[{"job": 2 * job}] for job in range(5)]
    assert set(multiprocessing.active_children()) <= before


def test_a_system_without_room_for_another_process(monkeypatch):
    def refuses(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", refuses)
    with pytest.raises(UsageError, match="cannot start another process: Too many open files"):
        list(map_in_processes(crashes, [1], 2))
