"""Jobs shared out over processes."""

import subprocess
import sys

SCRIPT = """
import time
from evoprune.evaluation.processes import map_in_processes

def start():
    return work

def work(job):
    print("at work", flush=True)
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
