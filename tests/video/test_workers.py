"""Tests that parallel jobs yield their results in order, whatever the threads do."""

import threading
import time
from contextlib import closing, contextmanager

import pytest

from evoprune.video.readers import ffmpeg, workers
from evoprune.video.readers.workers import in_order


class Tools:
    """Tools for `in_order` that make `count` items for each job. `before(job, number)` is called before each item."""

    def __init__(self, count=3, before=lambda job, number: None):
        self.count, self.before = count, before
        self.entered, self.left, self.made = [], [], []

    @contextmanager
    def __call__(self):
        self.entered.append(threading.current_thread())
        try:
            yield self.work
        finally:
            self.left.append(threading.current_thread())

    def work(self, job):
        for number in range(self.count):
            self.before(job, number)
            self.made.append((job, number))
            yield job, number


def everything(jobs, count=3):
    return [(job, number) for job in range(jobs) for number in range(count)]


def left_over():
    return [thread for thread in threading.enumerate() if thread.name == "evoprune-read"]


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
@pytest.mark.parametrize("room", [1, 4, 100])
def test_items_come_in_the_order_of_the_jobs(threads, room):
    tools = Tools(before=lambda job, number: time.sleep(0.002 * (7 * job % 5)))
    assert list(in_order(range(12), tools, threads, room)) == everything(12)
    assert len(tools.entered) == len(tools.left) <= min(threads, 12)
    assert not left_over()


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_job_raises_comes_after_all_items_before_it(threads):
    def fail(job, number):
        if (job, number) == (2, 1):
            raise ZeroDivisionError
        time.sleep(0.01 * (job < 2))

    got = []
    with pytest.raises(ZeroDivisionError):
        for item in in_order(range(6), Tools(before=fail), threads, 100):
            got.append(item)
    assert got == [*everything(2), (2, 0)]
    assert not left_over()


def test_tools_that_fail_are_the_failure_of_their_job():
    @contextmanager
    def broken():
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        list(in_order(range(6), broken, 3, 100))


def test_closing_ends_the_threads_wherever_they_are():
    begun = threading.Event()

    def slow(job, number):
        begun.set()
        for _ in range(1000 if job else 0):
            time.sleep(0.01)
            ffmpeg.alive()

    start = time.monotonic()
    with closing(in_order(range(6), Tools(before=slow), 3, 100)) as items:
        assert next(items) == (0, 0)
        begun.wait()
    assert time.monotonic() - start < 5
    assert not left_over()


def test_no_more_wait_for_their_turn_than_there_is_room():
    release, seen = threading.Event(), []
    tools = Tools(count=20, before=lambda job, number: release.wait(60) if job == 0 else None)
    most = 5 + 3  # each of the other threads holds one finished item

    def look():
        until = time.monotonic() + 30
        while len(tools.made) < most and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.1)
        seen.append(len(tools.made))
        release.set()

    looking = threading.Thread(target=look)
    looking.start()
    assert list(in_order(range(4), tools, 4, 5)) == everything(4, 20)
    looking.join()
    assert seen == [most]


def test_a_thread_that_lives_does_not_hide_one_that_hangs(monkeypatch):
    """One thread hangs in the first job until the other one has done the other jobs, in which it always shows that it lives."""
    signs, counts, hangs, release = [], [], threading.Event(), threading.Event()
    monkeypatch.setattr(ffmpeg, "report_alive", lambda: signs.append(1))
    monkeypatch.setattr(workers, "POLL_S", 0.01)

    def hang(job, number):
        if (job, number) == (0, 0):
            counts.append(len(signs))
            hangs.set()
            release.wait(60)  # without reporting any progress
        if job:
            assert hangs.wait(60)
            time.sleep(0.005)
        if (job, number) == (2, 99):
            counts.append(len(signs))
            release.set()
        ffmpeg.alive()

    assert list(in_order(range(3), Tools(count=100, before=hang), 2, 10**6)) == everything(3, 100)
    before, after = counts
    assert after - before <= 1  # a thread counts as alive until one sign has come without its progress
