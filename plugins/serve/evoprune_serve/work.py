"""Answers requests. One thread computes answers one at a time, while other threads open and read the inputs of upcoming jobs.

Each request is a `Job`. First, the job is admitted to the queue, its files are fetched, and its inputs are opened (probed and
planned). Then the model encodes the inputs, unless an earlier question's encoding can be reused, and answers the question. Clients
take turns: the next job is the oldest ready job of the client whose last turn was longest ago. The inputs of a client's jobs are
opened one job at a time, so that a client with many jobs doesn't delay the others.
"""

import asyncio
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import Context
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

from evoprune.backend import Host
from evoprune.errors import OutOfMemory
from evoprune.report import Report
from evoprune.session import (
    Answer,
    EncodedInputs,
    OpenInputs,
    open_inputs,
)
from evoprune.video import Scope, Stopped
from evoprune.video_qa import VideoQA
from evoprune.vision import EncodedRows
from evoprune_serve.errors import ApiError, ending, full
from evoprune_serve.question import Question
from evoprune_serve.sources import Fetched

OPENERS = 2  # number of threads for opening inputs
AHEAD = 1  # maximum number of jobs to prefetch while another job is being answered
SESSIONS = 32  # maximum number of cached sessions; each combination of model and pruning settings has its own
SHARE = 4  # cached encodings may take up to 1/SHARE of the available memory
LATEST = 20  # number of recent answers used to estimate Retry-After
LONGEST_RETRY_S = 60


class Gone(Exception):
    """Raised to stop work on a job if the client is no longer waiting for the answer."""


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer or of the reasoning before it.

    `logprobs` contains the log probabilities of the tokens since the previous piece, in report format.
    """

    text: str
    thought: bool
    logprobs: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Done:
    """The event at the end of a complete answer.

    Attributes:
        report: The report, which contains the complete answer.
        logprobs: Log probabilities of the tokens since the last piece.
        kept: Whether an earlier question's encoding was reused.
        thought_tokens: Number of thinking tokens.
    """

    report: Report
    logprobs: list[dict[str, Any]] | None
    kept: bool
    thought_tokens: int


@dataclass(frozen=True)
class Failed:
    """The event at the end of a failed request, with a missing or incomplete answer."""

    problem: BaseException


@dataclass(frozen=True)
class Told:
    """An event with a task's message as JSON data. `last` is True for the task's final message."""

    facts: dict[str, Any]
    last: bool = False


Event = Piece | Done | Failed | Told


Put = Callable[[Event], None]


class Job:
    """A request in the queue. The job's events are delivered to the event loop `loop`."""

    def __init__(self, client: str, loop: asyncio.AbstractEventLoop):
        self.client = client
        self.question: Question | None = None  # set by `Work.submit` and `Work.run`
        self.fetched: Fetched | None = None
        self.opened: OpenInputs | None = None
        self.task: Task | None = None  # the task to run in the model thread instead of answering the question
        self.tower: Callable[..., EncodedRows] | None = None  # see `OpenInput`
        self.waits_to_open = False  # whether the inputs still have to be opened
        self.ready = False  # whether the model may start working on the job
        self.begun = False  # whether the inputs are being prefetched
        self.scope = Scope()  # used to stop the readers of inputs being opened
        self.admitted_s = time.perf_counter()
        self.opening_s = 0.0  # time spent opening the inputs
        self.queue_s = 0.0  # time from admission to the start of the answer, excluding `opening_s`
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = False
        self._lock = threading.Lock()

    def put(self, event: Event) -> None:
        """Send an event to the event loop. May be called from any thread."""
        with suppress(RuntimeError):  # the loop is closed because the server is shutting down
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def check(self) -> None:
        """Raise Gone if the job has been canceled."""
        if self._cancelled:
            raise Gone

    def give_up(self) -> None:
        """Mark the job as canceled. Work on the job stops at the next call to `check`."""
        self._cancelled = True

    def files(self) -> Fetched:
        """Return the job's fetched files.

        Raises:
            Gone: If the job has been canceled or has ended.
        """
        with self._lock:
            if self._cancelled or self.fetched is None:
                raise Gone
            return self.fetched

    def keep_open(self, opened: OpenInputs) -> None:
        """Take ownership of opened inputs, which are closed when the job ends.

        Raises:
            Gone: If the job has been canceled, in which case the inputs are closed.
        """
        with self._lock:
            if not self._cancelled:
                self.opened = opened
                return
        opened.close()
        raise Gone

    def hold(self, fetched: Fetched) -> None:
        """Take ownership of fetched files, which are released when the job ends.

        Raises:
            Gone: If the job has been canceled, in which case the files are released.
        """
        with self._lock:
            if not self._cancelled:
                self.fetched = fetched
                return
        fetched.close()
        raise Gone

    def end(self, cancelled: bool = False) -> None:
        """Release all resources owned by the job. If `cancelled` is True, also stop reading its inputs."""
        with self._lock:
            self._cancelled = self._cancelled or cancelled
            opened = self.opened
            fetched = self.fetched
            self.opened = self.fetched = None
        if cancelled:
            self.scope.stop()
        if opened:
            opened.close()
        if fetched:
            fetched.close()


Task = Callable[[Job, Put], None]  # sends events with `Put`; a task that hasn't sent any may be retried


class KeptEncodings:
    """A thread-safe LRU cache of encoded inputs, with at most `most` encodings in up to 1/`SHARE` of the available memory."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, tuple[EncodedInputs, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._kept

    def get(self, key: str) -> EncodedInputs | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: str, encoded: EncodedInputs, size: int) -> None:
        """Add an encoding of `size` bytes, evicting the least recently used encodings if necessary."""
        with self._lock:
            self._kept[key] = encoded, size
            self._kept.move_to_end(key)
            room = Host().available_memory()
            while len(self._kept) > self._most or (
                room is not None and SHARE * self._bytes > room and len(self._kept) > 1
            ):
                self._kept.popitem(last=False)

    def clear(self) -> bool:
        """Evict all encodings. Returns False if the cache was already empty."""
        with self._lock:
            any_kept = bool(self._kept)
            self._kept.clear()
            return any_kept

    @property
    def _bytes(self) -> int:
        return sum(size for _, size in self._kept.values())


class Work:
    """The job queue and its worker threads.

    Args:
        models: The models by name, with their default pruning settings.
        most: Maximum number of requests in the queue.
        keep: Maximum number of encodings to cache for follow-up questions.
    """

    def __init__(self, models: Mapping[str, VideoQA], most: int = 32, keep: int = 8):
        self.models = models
        self._threads_of: VideoQA | None = None  # the model for which the CPU thread count is currently set
        self.kept = KeptEncodings(keep)
        self._most = most
        # Waiting jobs by client. The client whose turn is next comes first.
        self._turns: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        self._opening: set[str] = set()  # clients for which a thread is opening inputs
        self._ending = False  # whether new requests are rejected
        self._closed = False
        self._changed = threading.Condition()
        self._sessions: OrderedDict[str, VideoQA] = OrderedDict()
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._fetchers = ThreadPoolExecutor(most, "evoprune-fetch")
        self._openers = ThreadPoolExecutor(OPENERS, "evoprune-open")
        self._thread = threading.Thread(target=self._serve, name="evoprune-model", daemon=True)
        self._thread.start()

    # Called from the event loop.

    @property
    def waiting(self) -> int:
        with self._changed:
            return self._count()

    @property
    def busy(self) -> bool:
        return self._running is not None

    def retry_s(self) -> int:
        """Return the number of seconds after which a rejected client may retry: the median of recent answer times."""
        usual = statistics.median(self._seconds) if self._seconds else 1.0
        return max(1, min(LONGEST_RETRY_S, ceil(usual)))

    def admit(self, client: str) -> Job:
        """Add a new job for a client to the queue.

        If the queue is full, the newest job of the client with the most waiting jobs is evicted. However, if that client doesn't
        have more waiting jobs than `client` would have with the new job, the new job is rejected instead.

        Raises:
            ApiError: If the queue is full, or the server is shutting down.
        """
        job = Job(client, asyncio.get_running_loop())
        displaced = None
        with self._changed:
            if self._ending:
                raise ending()
            if self._count() >= self._most:
                most = max(self._turns.values(), key=len)
                if len(most) <= len(self._turns.get(client, ())) + 1:
                    raise full(self.retry_s())
                displaced = most[-1]
                self._leave(displaced)
                retry_s = self.retry_s()
            self._turns.setdefault(client, deque()).append(job)
        if displaced:
            displaced.put(Failed(full(retry_s)))
            self.cancel(displaced)
        return job

    async def fetch(self, job: Job, fetch: Callable[[], Fetched]) -> None:
        """Call `fetch` in a thread and pass the fetched files to the job. Exceptions from `fetch` propagate."""
        await asyncio.get_running_loop().run_in_executor(self._fetchers, lambda: job.hold(fetch()))

    def submit(self, job: Job, question: Question) -> None:
        """Prepare a job with fetched files so that the model thread can answer its question."""
        job.question = question
        if job.cancelled:
            return
        fetched = job.fetched
        if fetched and encoding_key(question, fetched) in self.kept:
            self._is_ready(job)
        else:
            with self._changed:
                job.waits_to_open = True
            self._openers.submit(self._prepare_waiting)

    def run(self, job: Job, question: Question, task: Task) -> None:
        """Make the model thread run a task for a job with fetched files."""
        job.question = question
        job.task = task
        self._is_ready(job)

    def cancel(self, job: Job) -> None:
        """Cancel a job if its client is no longer waiting for the answer. Has no effect if the job has already ended."""
        with self._changed:
            self._leave(job)
        if not (job.cancelled or self._closed):
            job.give_up()  # called here because downloads may occupy all threads
            self._fetchers.submit(job.end, cancelled=True)  # run in a thread because it may have to wait for a reader

    def refusal(self) -> ApiError:
        """Return the error for a request dropped by the server while its client was still waiting."""
        return ending() if self._ending else full(self.retry_s())

    def refuse(self) -> None:
        """Reject all waiting jobs and all new jobs."""
        with self._changed:
            self._ending = True
            left = [job for jobs in self._turns.values() for job in jobs]
        for job in left:
            job.put(Failed(ending()))
            self.cancel(job)

    def give_up(self) -> None:
        """Cancel the job currently being answered, if any."""
        if job := self._running:
            job.put(Failed(ending()))
            self.cancel(job)

    def close(self) -> None:
        """Cancel all jobs and stop the threads."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._turns.values() for job in jobs]
            self._changed.notify_all()
            if self._running:
                left.append(self._running)
        for job in left:
            job.end(cancelled=True)
        self._thread.join(timeout=5)
        self._openers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    # The queue. Callers of these methods must hold the lock.

    def _count(self) -> int:
        return sum(map(len, self._turns.values()))

    def _leave(self, job: Job) -> None:
        jobs = self._turns.get(job.client, ())
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._turns[job.client]

    def _next(self) -> Job | None:
        """Return the next job for the model thread, or None if no job is ready."""
        for jobs in self._turns.values():
            for job in jobs:
                if job.ready:
                    return job
        return None

    def _take(self) -> Job | None:
        """Remove the next ready job from the queue and mark it as running. Returns None if no job is ready."""
        job = self._next()
        self._running = job
        if job:
            self._leave(job)
            if job.client in self._turns:
                self._turns.move_to_end(job.client)
        return job

    # Opening inputs, in the opener threads.

    def session(self, question: Question) -> VideoQA:
        """Return the model requested by a question, with the question's pruning settings. Results are cached.

        Raises:
            UsageError: If the model doesn't support the settings.
        """
        qa = self.models[question.model]
        key = question.model + repr(question.pruning)
        with self._changed:
            if key in self._sessions:
                self._sessions.move_to_end(key)
                return self._sessions[key]
        made = VideoQA(qa.loaded, load_seconds=qa.session.load_seconds, **asdict(question.pruning))
        with self._changed:
            made = self._sessions.setdefault(key, made)
            while len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
            return made

    def _prepare_waiting(self) -> None:
        """Open the inputs of waiting jobs, in the order of their turns, until none is left whose client isn't already served."""
        while True:
            with self._changed:
                jobs = ((job for job in jobs if job.waits_to_open) for jobs in self._turns.values())
                firsts = (next(each, None) for each in jobs)
                job = next((job for job in firsts if job and job.client not in self._opening), None)
                if job is None:
                    return
                job.waits_to_open = False
                self._opening.add(job.client)
            try:
                Context().run(self._prepare, job)
            finally:
                with self._changed:
                    self._opening.discard(job.client)

    def _prepare(self, job: Job) -> None:
        """Open a job's inputs, and start prefetching them if another job is being answered."""
        job.scope.enter()
        try:
            self._open(job)
            with self._changed:
                ahead = self.busy and self._reserve_ahead(job)
            if ahead:
                job.opened.begin()
        except BaseException as problem:
            self._fail(job, problem)
            return
        self._is_ready(job)

    def _open(self, job: Job) -> None:
        start = time.perf_counter()
        question = job.question
        qa = self.session(question)
        fetched = job.files()
        opened = open_inputs(qa.session, fetched.inputs(), question.sampling, names=fetched.names, tower=job.tower)
        try:
            with opened.planning():
                qa.session.longest_prompt(opened.plans, [question.text], question.generation)
        except BaseException:
            opened.close()
            raise
        job.keep_open(opened)
        job.opening_s = time.perf_counter() - start

    def _reserve_ahead(self, job: Job) -> bool:
        """Reserve a prefetch slot for a job.

        Returns False if no slot is free or the job already has one. Callers must hold the lock.
        """
        begun = sum(other.begun for jobs in self._turns.values() for other in jobs)
        if job.begun or begun >= AHEAD:
            return False
        job.begun = True
        return True

    def _read_next_ahead(self) -> None:
        with self._changed:
            job = self._next()
            if not (job and job.opened and self._reserve_ahead(job)):
                return
        self._openers.submit(Context().run, self._begin, job)

    def _begin(self, job: Job) -> None:
        job.scope.enter()
        opened = job.opened
        try:
            if opened:
                opened.begin()
        except Stopped:  # the model has already encoded the input
            return
        except BaseException as problem:
            self._fail(job, problem)

    def _is_ready(self, job: Job) -> None:
        with self._changed:
            job.ready = True
            self._changed.notify_all()

    def _fail(self, job: Job, problem: BaseException) -> None:
        with self._changed:
            self._leave(job)
        if not job.cancelled:
            job.put(Failed(problem))
        job.end()

    # Answering, in the model thread.

    def _serve(self) -> None:
        unpacked = [qa.loaded.packing for qa in self.models.values()]
        while True:
            unpacked = [packing for packing in unpacked if packing.waiting]
            with ExitStack() as meanwhile:
                if not self.waiting:
                    for packing in unpacked:
                        meanwhile.enter_context(packing.meanwhile())
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._next())
            with self._changed:
                if self._closed:
                    return
                job = self._take()
            if job is None:  # the job was canceled in the meantime
                continue
            start = time.perf_counter()
            job.queue_s = start - job.admitted_s - job.opening_s
            try:
                self._read_next_ahead()
                self._do(job)
                self._seconds.append(time.perf_counter() - start)
            except BaseException as problem:
                self._fail(job, problem)
            finally:
                self._running = None
                job.end()

    def _do(self, job: Job) -> None:
        """Answer a job's question or run its task. If memory runs out before the first event, clear the caches and retry once."""
        said = False

        def put(event: Event) -> None:
            nonlocal said
            said = True
            job.put(event)

        self._use_threads(self.models[job.question.model])
        work = self._answer if job.task is None else job.task
        try:
            work(job, put)
        except OutOfMemory:
            if said or not self._make_room():
                raise
            if job.opened:  # the inputs have been partially read
                job.opened.close()
                job.opened = None
            work(job, put)

    def _make_room(self) -> bool:
        """Clear everything cached for follow-up questions. Returns False if nothing was cached."""
        patches = [qa.loaded.patches.clear() for qa in self.models.values()]
        return self.kept.clear() or any(patches)

    def _use_threads(self, qa: VideoQA) -> None:
        """Set the number of CPU threads for a model, unless already set."""
        if qa is not self._threads_of:
            qa.loaded.description.use_threads()
            self._threads_of = qa

    def _answer(self, job: Job, put: Put) -> None:
        question = job.question
        key = encoding_key(question, job.files())
        encoded = self.kept.get(key)
        kept = encoded is not None
        if encoded is None:
            encoded = self.encode(job)
        known = 0

        def logprobs() -> list[dict[str, Any]] | None:
            """Return the log probabilities of the tokens since the last call, or None if not requested."""
            nonlocal known
            found = answer.report.logprobs
            if found is None:
                return None
            new = found[known:]
            known = len(found)
            return new

        thought_tokens = 0

        def piece(text: str, thought: bool = False) -> None:
            nonlocal thought_tokens
            job.check()
            if thought:
                thought_tokens = len(answer.ids)
            put(Piece(text, thought, logprobs()))

        answer = begun(encoded, question, partial(piece, thought=True))
        try:
            for text in answer:
                piece(text)
        finally:
            answer.close()
        put(Done(answer.report, logprobs(), kept, thought_tokens))

    def encode(self, job: Job) -> EncodedInputs:
        """Encode a job's inputs and cache the encoding for follow-up questions. Must be called in the model thread."""
        key = encoding_key(job.question, job.files())
        if job.opened is None:  # the encoding was evicted after the job became ready, or memory ran out
            self._open(job)

        def progress(*_: object) -> None:
            job.check()

        opened = job.opened
        if opened is None:
            raise Gone
        encoded = opened.encode(progress)
        job.opened = None
        opened.close()
        self.kept.put(key, encoded, encoded.bytes_with(job.question.generation.max_new_tokens))
        return encoded


def encoding_key(question: Question, fetched: Fetched) -> str:
    """Return the cache key of a question's encoding, which includes everything the encoding depends on."""
    return repr((question.model, fetched.identity, question.sampling, question.pruning))


def begun(encoded: EncodedInputs, question: Question, on_thoughts: Callable[[str], None]) -> Answer:
    """Start answering a question, which may follow earlier turns of a conversation."""
    how = vars(question.generation) | {"seed": question.seed, "on_thoughts": on_thoughts}
    if not question.earlier:
        return encoded.ask(question.text, **how)
    return encoded.chat(question.generation.system, question.earlier).ask(question.text, **how)
