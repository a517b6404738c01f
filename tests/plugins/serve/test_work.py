"""The queue of the server: the order of jobs, their states, and what is left of a job that has ended."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from evoprune.errors import VideoError
from evoprune.session import OpenInputs, PipelineOptions
from evoprune.video_qa import VideoQA
from tests.plugins.serve.serving import REASON, SAMPLES, body

pytest.importorskip("starlette", reason=REASON)

from evoprune_serve.chat import read_chat
from evoprune_serve.errors import ApiError
from evoprune_serve.question import Question
from evoprune_serve.sources import Fetched, LocalFile
from evoprune_serve.work import Assignment, Done, Failed, Gone, Job, Piece, State, Told, Work

LONGEST_S = 60.0
PIECE = Piece("piece", False, None)
LAST = Told({}, last=True)


class Files(Fetched):
    """The file of a request, which counts how often it is released."""

    def __init__(self, name: str = "square.mp4"):
        self.closed = 0
        stack = ExitStack()
        stack.callback(self._release)
        super().__init__([LocalFile(str(SAMPLES / "square.mp4"), name, name)], stack)

    def _release(self) -> None:
        self.closed += 1


class Inputs:
    """Opened inputs that have no frames. Reading ahead and encoding take a moment."""

    def __init__(self, pause=lambda: None):
        self.plans: list = []
        self.closed = 0
        self._pause = pause

    def planning(self):
        return nullcontext()

    def begin(self) -> None:
        self._pause()

    def encode(self, progress):
        self._pause()
        progress()
        return SimpleNamespace(bytes_with=lambda tokens: 1)

    def close(self) -> None:
        self.closed += 1

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def question(text: str = "What colour is the square?") -> Question:
    return read_chat(body(text), PipelineOptions(), ["demo"])[0]


async def soon(waiting):
    return await asyncio.wait_for(waiting, LONGEST_S)


async def events_of(job: Job) -> list:
    """Return the events of a job up to the last one."""
    events = [await soon(job.next())]
    while not events[-1].last:
        events.append(await soon(job.next()))
    return events


async def until(true) -> None:
    end = time.monotonic() + LONGEST_S
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


@contextmanager
def working(qa: VideoQA, **settings: int) -> Iterator[Work]:
    work = Work({"demo": qa}, **settings)
    try:
        yield work
    finally:
        work.close()


class Plug:
    """A task that occupies the model thread until it is pulled."""

    def __init__(self):
        self._pulled = threading.Event()

    def __call__(self, job: Job, put) -> None:
        assert self._pulled.wait(LONGEST_S)
        put(LAST)

    def pull(self) -> None:
        self._pulled.set()

    async def into(self, work: Work, client: str = "plug") -> Job:
        job = work.admit(client)
        await work.submit(job, question(), Files, self)
        await until(lambda: job.state is State.RUNNING)
        return job


def test_clients_take_turns(qa):
    """The client that has waited longest comes next. A full queue still admits a client with fewer queued requests."""
    order = []

    async def go(work: Work) -> None:
        plug = Plug()
        await plug.into(work)
        jobs = [work.admit("a") for _ in range(3)] + [work.admit("b")]
        late = work.admit("c")
        (event,) = await events_of(jobs[2])
        assert isinstance(event, Failed) and event.problem.status == 429 and jobs[2].state is State.ENDED
        with pytest.raises(ApiError):
            work.admit("c")
        with pytest.raises(Gone):
            await work.submit(jobs[2], question(), Files)
        left = [*jobs[:2], jobs[3], late]
        for job in left:
            await work.submit(job, question(), Files, lambda job, put: (order.append(job), put(LAST)))
        plug.pull()
        for job in left:
            await events_of(job)
        assert order == [jobs[0], jobs[3], late, jobs[1]]

    with working(qa, most=4) as work:
        asyncio.run(go(work))


def test_the_inputs_of_a_client_are_opened_one_job_at_a_time(qa, monkeypatch):
    """The others don't wait for them. The next one is that of the client whose turn is next."""
    opened = SimpleQueue()
    ends = {name: threading.Event() for name in ("a0", "a1", "a2", "b", "c")}

    def opening(session, inputs, sampling, names, tower):
        opened.put(names[0])
        assert ends[names[0]].wait(LONGEST_S)
        raise VideoError("broken")

    async def go(work: Work) -> None:
        for name in ends:
            await work.submit(work.admit(name[0]), question(), lambda name=name: Files(name))
        assert {opened.get(timeout=LONGEST_S) for _ in range(2)} == {"a0", "b"}
        turn = work.admit("a")
        await work.submit(turn, question(), Files, lambda job, put: put(LAST))
        await events_of(turn)  # now it is the turn of the others
        ends["a0"].set()
        assert opened.get(timeout=LONGEST_S) == "c"
        ends["c"].set()
        assert opened.get(timeout=LONGEST_S) == "a1"
        ends["b"].set()
        await until(lambda: work.waiting == 2)
        await asyncio.sleep(0.05)
        assert opened.empty()
        ends["a1"].set()
        assert opened.get(timeout=LONGEST_S) == "a2"

    monkeypatch.setattr("evoprune_serve.work.open_inputs", opening)
    with working(qa, most=8) as work:
        try:
            asyncio.run(go(work))
        finally:
            for end in ends.values():
                end.set()


@pytest.mark.parametrize("problem", [None, RuntimeError])
def test_inputs_that_the_model_encodes_first_are_not_read_ahead(qa, monkeypatch, problem):
    """The job does not fail if its inputs are closed before the thread starts to read them."""
    begins, goes_on = threading.Event(), threading.Event()
    ended = SimpleQueue()
    usual = OpenInputs.begin

    def begin(opened: OpenInputs) -> None:
        if threading.current_thread().name.startswith("evoprune-open"):
            begins.set()
            if problem:
                raise problem
            assert goes_on.wait(LONGEST_S)
            try:
                usual(opened)
            finally:
                ended.put(True)
        else:
            usual(opened)

    async def go(work: Work) -> None:
        plug = Plug()
        await plug.into(work)
        job = work.admit("a")
        await work.submit(job, question(), Files)
        assert await asyncio.to_thread(begins.wait, LONGEST_S)
        if not problem:
            assert job.state is State.READING
            plug.pull()
        *_, last = await events_of(job)
        goes_on.set()
        if problem:
            assert isinstance(last, Failed) and isinstance(last.problem, problem)
            plug.pull()
        else:
            assert isinstance(last, Done) and ended.get(timeout=LONGEST_S)

    monkeypatch.setattr(OpenInputs, "begin", begin)
    with working(qa) as work:
        asyncio.run(go(work))


ORDER = [State.FETCHING, State.WAITING, State.OPENING, State.READY, State.READING, State.RUNNING, State.ENDED]
FOLLOWS = {*pairwise(ORDER[:-1]), (State.FETCHING, State.READY), (State.READY, State.RUNNING)}


def in_state(state: State, files: Files, inputs: Inputs) -> Job:
    """Return a job that has gone through all the states up to this one."""
    job = Job("a", asyncio.get_running_loop())
    owned = {State.WAITING: Assignment(question(), lambda job, put: None, files), State.READY: inputs}
    for each in ORDER[1 : ORDER.index(state) + 1]:
        if each is State.ENDED:
            job.end()
        else:
            job.change(each, owned.get(each))
    return job


@pytest.mark.parametrize("state", ORDER)
def test_a_job_only_goes_forward_and_closes_what_it_cannot_own(state):
    async def go() -> None:
        for following in ORDER[:-1]:
            files, inputs, more = Files(), Inputs(), Inputs()
            job = in_state(state, files, inputs)
            if (state, following) in FOLLOWS:
                job.change(following)
                assert job.state is following
                continue
            with pytest.raises(Gone if state is State.ENDED else RuntimeError):
                job.change(following, more)
            assert more.closed == 1 and job.state is state
            job.end()
            reached = [each for each in ORDER[:-1] if ORDER.index(each) <= ORDER.index(state)]
            assert (files.closed, inputs.closed) == (State.WAITING in reached, State.READY in reached)

    asyncio.run(go())


@pytest.mark.parametrize("state", ORDER)
def test_a_job_that_has_ended_holds_nothing_and_sends_nothing(state):
    async def go() -> None:
        files, inputs = Files(), Inputs()
        job = in_state(state, files, inputs)
        kept = [weakref.ref(each) for each in (files, inputs)]
        if job.state not in (State.FETCHING, State.ENDED):
            kept += [weakref.ref(each) for each in (job.assignment.question, job.assignment.task, job.assignment.scope)]
        job.end(Failed(VideoError("first")))
        job.end(Failed(VideoError("second")))
        job.put(PIECE)
        job.put(LAST)
        if state is not State.ENDED:
            (event,) = await events_of(job)
            assert event.problem.message == "first"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job.next(), 0.01)
        for function in (job.check, job.take_inputs, lambda: job.assignment):
            with pytest.raises(Gone):
                function()
        del files, inputs
        gc.collect()
        assert [each() for each in kept] == [None] * len(kept)

    asyncio.run(go())


def test_nothing_of_a_request_stays_after_its_answer(qa, monkeypatch):
    """The caller still has the jobs: one that was answered, one that failed, and one that was given up while it was running."""

    def broken(session, inputs, sampling, names, tower):
        raise VideoError("broken")

    def endless(job: Job, put) -> None:
        while True:
            time.sleep(0.001)
            job.check()

    async def go(work: Work) -> None:
        jobs, kept = [work.admit("a") for _ in range(3)], []
        for job, task in zip(jobs, (None, None, endless), strict=True):
            asked, files = question(), Files(str(len(kept)))
            kept += [weakref.ref(asked), weakref.ref(files)]
            await work.submit(job, asked, lambda files=files: files, task)
            del asked, files
            if task:
                await until(lambda job=job: job.state is State.RUNNING)
                work.cancel(job)
            else:
                (*_, last) = await events_of(job)
                assert isinstance(last, Failed if job is jobs[1] else Done)
                del last
            monkeypatch.setattr("evoprune_serve.work.open_inputs", broken)
        await until(lambda: gc.collect() >= 0 and not any(each() for each in kept))
        assert [job.state for job in jobs] == [State.ENDED] * 3

    with working(qa) as work:
        asyncio.run(go(work))


def test_a_job_ends_once_whoever_ends_it_first():
    """In each round, threads take a job through its states, send events, and end it in a random order."""
    threads, rounds = 4, 60
    rng = random.Random(0)

    asked = question()

    def steps(job: Job, given: list) -> None:
        given.append(Files())
        job.change(State.WAITING, Assignment(asked, lambda job, put: None, given[0]))
        job.change(State.OPENING)
        given.append(Inputs())
        job.change(State.READY, given[1])
        job.change(State.RUNNING)
        job.put(PIECE)
        if taken := job.take_inputs():
            taken.close()
        job.check()
        job.put(PIECE)
        job.put(LAST)

    async def one(number: int) -> None:
        given: list = []
        job = Job("a", asyncio.get_running_loop())
        begin = threading.Barrier(threads)
        pauses = [rng.uniform(0, 0.0003) for _ in range(threads)]
        problems = []

        def run(thread: int) -> None:
            begin.wait()
            try:
                if thread == 0:
                    steps(job, given)
                else:
                    time.sleep(pauses[thread])
                    job.end(Failed(Gone(thread)) if thread % 2 else None)
            except Gone:
                pass
            except BaseException as problem:
                problems.append(problem)

        running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(LONGEST_S)
        assert not problems and job.state is State.ENDED
        assert [each.closed for each in given] == [1] * len(given)
        found = []
        job.put(LAST)
        try:
            while True:
                found.append(await asyncio.wait_for(job.next(), 0.001))
        except TimeoutError:
            assert not any(event.last for event in found[:-1])

    async def go() -> None:
        for number in range(rounds):
            await one(number)

    asyncio.run(go())


class Telling:
    """An answer of a few pieces."""

    def __init__(self, encoded, asked: Question, on_thoughts):
        self.report = SimpleNamespace(logprobs=None)
        self.ids: list[int] = []
        self._pieces = iter([asked.text] * 3)

    def __iter__(self):
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None: ...


@pytest.mark.parametrize("seed", range(4))
def test_each_job_ends_whatever_happens_to_it(qa, monkeypatch, seed):
    """Requests come, fail, are given up, and are displaced at random times, and the server closes in the middle of them."""
    rng = random.Random(seed)
    lock = threading.Lock()
    everything: list = []
    jobs: list[Job] = []
    ends: list[list] = []
    most = rng.choice([30, 50, 100])  # the server ends after this many, if one has been answered
    ending: list[bool] = []

    def is_whole(found: list) -> bool:
        return bool(found) and isinstance(found[-1], Done | Told) and found[-1].last

    def chance(share: float) -> bool:
        with lock:
            return rng.random() < share

    def pause() -> None:
        with lock:
            seconds = rng.choice([0, 0, 0.0003, 0.002])
        time.sleep(seconds)

    def fail(share: float) -> None:
        pause()
        if chance(share):
            raise VideoError("broken")

    def fetch() -> Files:
        fail(0.1)
        with lock:
            files = Files(rng.choice("abcdefgh"))
            everything.append(files)
        return files

    def opening(session, inputs, sampling, names, tower):
        fail(0.1)
        opened = Inputs(lambda: fail(0.1))
        everything.append(opened)
        return opened

    def task(job: Job, put) -> None:
        for _ in range(3):
            fail(0.1)
            put(Told({}))
            job.check()
        put(LAST)

    async def client(work: Work, name: str) -> None:
        tries = 12
        while tries and not ending:
            try:
                job = work.admit(name)
            except ApiError:
                await asyncio.sleep(0.001)
                continue
            tries -= 1
            jobs.append(job)
            if len(jobs) >= most and any(map(is_whole, ends)):
                work.refuse()
                ending.append(True)
            found: list = []
            ends.append(found)
            try:
                async with asyncio.timeout(LONGEST_S if name == "a" else rng.choice([0.001, 0.004, LONGEST_S])):
                    await work.submit(job, question(), fetch, task if chance(0.3) else None)
                    while not found or not found[-1].last:
                        found.append(await job.next())
            except (Gone, VideoError, TimeoutError):
                pass
            work.cancel(job)

    async def go(work: Work) -> None:
        clients = [asyncio.ensure_future(client(work, name)) for name in "aabbbc"]
        await asyncio.wait_for(asyncio.gather(*clients), LONGEST_S)
        work.give_up()
        await until(lambda: not work.busy and not work.waiting)
        await asyncio.sleep(0)
        for job, found in zip(jobs, ends, strict=True):
            assert not any(event.last for event in found[:-1])
            if found and found[-1].last:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(job.next(), 0)

    monkeypatch.setattr("evoprune_serve.work.open_inputs", opening)
    monkeypatch.setattr("evoprune_serve.work.begun", Telling)
    model = SimpleNamespace(session=SimpleNamespace(longest_prompt=lambda *_: None))
    monkeypatch.setattr(Work, "session", lambda self, question: model)
    with working(qa, most=4, keep=2) as work:
        asyncio.run(go(work))
    until_s = time.monotonic() + LONGEST_S
    while not all(each.closed == 1 for each in everything):
        assert time.monotonic() < until_s, [(type(each).__name__, each.closed) for each in everything]
        time.sleep(0.002)
    assert all(job.state is State.ENDED for job in jobs) and work.waiting == 0 and not work.busy
    assert any(map(is_whole, ends))


def test_jobs_end_when_the_server_closes(qa):
    """A job that is running, one that is ready, one whose files come, and a later one."""
    fetches, stays = threading.Event(), threading.Event()
    files = [Files() for _ in range(3)]

    def running(job: Job, put) -> None:
        while not stays.is_set():
            time.sleep(0.002)
            job.check()

    def late() -> Files:
        fetches.set()
        assert stays.wait(LONGEST_S)
        return files[2]

    async def go() -> None:
        work = Work({"demo": qa})
        jobs = [work.admit("a") for _ in range(3)]
        for job, its in zip(jobs[:2], files, strict=False):
            await work.submit(job, question(), lambda its=its: its, running)
        fetching = asyncio.ensure_future(work.submit(jobs[2], question(), late))
        await until(lambda: jobs[0].state is State.RUNNING and fetches.is_set())
        await asyncio.to_thread(work.close)
        stays.set()
        with pytest.raises(Gone):
            await fetching
        assert [job.state for job in jobs] == [State.ENDED] * 3 and [each.closed for each in files] == [1] * 3
        with pytest.raises(ApiError):
            work.admit("a")

    asyncio.run(go())
