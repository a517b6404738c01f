"""Tests of temporary files, including the files that killed processes leave behind."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from evoprune.video.temporary import LOCK, temporary_file, temporary_folder
from tests.cli.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no file locks of Unix")

HOLD = """
import time
from evoprune.video.temporary import temporary_file
with temporary_file([b"content"], "the video") as path:
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def spool(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_of_a_killed_process_is_deleted(spool):
    environment = os.environ | {"TMPDIR": str(spool), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True) as holder:
        left = Path(holder.stdout.readline().strip())
        with temporary_file([b"other"], "the video"):
            assert left.read_bytes() == b"content"  # the folder's process is still running
        holder.kill()
    assert left.exists()
    with temporary_folder() as folder:
        assert not left.parent.exists()
        assert os.stat(folder).st_mode & 0o777 == 0o700
        with temporary_folder():
            assert os.path.isdir(folder)
    assert not list(spool.iterdir())


def test_other_folders_stay(spool):
    """Folders without a lock file are kept, because users may have made them. Links are kept, because they may lead anywhere."""
    (spool / "evoprune-results").mkdir()
    other = spool / "other"
    other.mkdir()
    (other / LOCK).touch()
    (spool / "evoprune-link").symlink_to(other)
    (spool / "evoprune-file").touch()
    with temporary_folder():
        pass
    assert {path.name for path in spool.iterdir()} == {"evoprune-results", "other", "evoprune-link", "evoprune-file"}
    assert (other / LOCK).exists()


def test_a_signal_while_the_folder_is_made_leaves_nothing(spool, monkeypatch):
    real = os.mkdir

    def interrupted(*given):
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder():
        pass
    assert not list(spool.iterdir())


def test_a_folder_that_another_process_deletes_before_it_is_locked_is_made_again(spool, monkeypatch):
    import fcntl

    real = fcntl.flock
    deleted = []

    def slow(file, how):
        if not deleted:
            (taken,) = spool.glob("evoprune-*")
            deleted.append(taken)
            (taken / LOCK).unlink()
            taken.rmdir()
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with temporary_folder() as folder:
        assert os.path.isdir(folder) and folder != str(deleted[0])


def test_a_killed_question_about_standard_input_leaves_nothing_to_the_next_one(spool):
    environment = os.environ | {"TMPDIR": str(spool)}
    command = [sys.executable, "-m", "evoprune_cli", "inspect", "-"]
    how = {"cwd": ROOT, "env": environment, "stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **how) as process:
        until = time.monotonic() + 30
        while not list(spool.glob("evoprune-*/stdin")) and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
    assert list(spool.glob("evoprune-*/stdin"))
    with subprocess.Popen(command, **how) as process:
        process.communicate(b"no video")
    assert process.returncode == 3 and not list(spool.iterdir())
