"""One thread computes answers, one after the other; meanwhile others open and read what comes next.

A request is a `Job`: admitted, then its files are fetched, its inputs opened (probed, planned), then the model encodes them, unless
it has for an earlier question, and answers. Clients take turns: the next job is the oldest of the client whose turn is longest ago.
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
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from evoprune.backend import host_memory, packing_meanwhile, waiting_layers
from evoprune.errors import OutOfMemory
from evoprune.model import kv_bytes
from evoprune.report import Report
from evoprune.session import (
    TEXT,
    Answer,
    EncodedInputs,
    OpenInput,
    OpenInputs,
    longest_prompt,
    open_inputs,
    use_threads,
)
from evoprune.video import Scope
from evoprune.video_qa import VideoQA
from evoprune_serve.errors import ApiError, ending, full
from evoprune_serve.question import Question
from evoprune_serve.sources import Fetched

OPENERS = 2  # threads that open inputs
AHEAD = 1  # jobs whose inputs are read while another one is answered
SESSIONS = 32  # settings of pruning that are held
SHARE = 4  # encodings that are kept take at most one part in so many of the memory that is available
LATEST = 20  # answers whose times say when to try again
LONGEST_RETRY_S = 60


class Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, or of the thoughts before it. `logprobs`: of the tokens since the last piece, as reports have them."""

    text: str
    thought: bool
    logprobs: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        logprobs: of tokens since the last piece.
        kept: whether the inputs were encoded before.
        thought_tokens: how many of the tokens are thoughts.
    """

    report: Report
    logprobs: list[dict[str, Any]] | None
    kept: bool
    thought_tokens: int


@dataclass(frozen=True)
class Failed:
    """The end of a request that has no answer, or none that is complete."""

    problem: BaseException


@dataclass(frozen=True)
class Told:
    """What a task tells, as JSON has it. `last`: whether that is the end of it."""

    facts: dict[str, Any]
    last: bool = False


Event = Piece | Done | Failed | Told


Put = Callable[[Event], None]


class Job:
    """A request. Its events come to the event loop that made it."""

    def __init__(self, client: str, loop: asyncio.AbstractEventLoop):
        self.client = client
        self.question: Question | None = None  # from `Work.submit` on
        self.fetched: Fetched | None = None
        self.opened: OpenInputs | None = None
        self.task: Task | None = None  # what is done in place of an answer
        self.kind: Callable[..., OpenInput] = OpenInput  # as of `open_inputs`
        self.ready = False  # whether the model may begin
        self.begun = False  # whether its inputs are read ahead
        self.scope = Scope()  # of what is read while it is opened
        self.admitted_s = time.perf_counter()
        self.opening_s = 0.0  # how long it took to open its inputs
        self.queue_s = 0.0  # how long it waited otherwise, until the model began
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = False
        self._lock = threading.Lock()

    def put(self, event: Event) -> None:
        """Sends an event, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        return await self._events.get()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def check(self) -> None:
        """Raises Gone where nobody waits any more."""
        if self._cancelled:
            raise Gone

    def give_up(self) -> None:
        """Has what is done for the job end where it looks whether it is wanted."""
        self._cancelled = True

    def files(self) -> Fetched:
        """Return what was fetched. Raises Gone."""
        with self._lock:
            if self._cancelled or self.fetched is None:
                raise Gone
            return self.fetched

    def keep_open(self, opened: OpenInputs) -> None:
        """Take inputs that were opened, to be closed with the job. Raises Gone."""
        with self._lock:
            if not self._cancelled:
                self.opened = opened
                return
        opened.close()
        raise Gone

    def hold(self, fetched: Fetched) -> None:
        """Take files, to be closed with the job. Raises Gone."""
        with self._lock:
            if not self._cancelled:
                self.fetched = fetched
                return
        fetched.close()
        raise Gone

    def end(self, cancelled: bool = False) -> None:
        """Closes what the job holds. `cancelled`: also ends what is being done for it."""
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


Task = Callable[[Job, Put], None]  # puts events; may be run once more where it has put none


class KeptEncodings:
    """The latest encodings by key, at most `most`, and no more than fit into a share of the memory that is available."""

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
        """Keeps an encoding that takes so many bytes."""
        with self._lock:
            self._kept[key] = encoded, size
            self._kept.move_to_end(key)
            room = host_memory()
            while len(self._kept) > self._most or (
                room is not None and SHARE * self._bytes > room and len(self._kept) > 1
            ):
                self._kept.popitem(last=False)

    def clear(self) -> bool:
        """Drops all; whether there was any."""
        with self._lock:
            any_kept = bool(self._kept)
            self._kept.clear()
            return any_kept

    @property
    def _bytes(self) -> int:
        return sum(size for _, size in self._kept.values())


class Work:
    """Answers questions, one after the other.

    Args:
        models: by name, and how they prune where a question says nothing.
        most: how many requests may wait.
        keep: how many encodings are kept for further questions.
    """

    def __init__(self, models: Mapping[str, VideoQA], most: int = 32, keep: int = 8):
        self.models = models
        self._threads_of: VideoQA | None = None  # whose number of threads the thread of the models has
        self.kept = KeptEncodings(keep)
        self._most = most
        # What waits, by client; whose turn is next comes first.
        self._turns: OrderedDict[str, deque[Job]] = OrderedDict()
        self._running: Job | None = None
        self._ending = False  # whether new requests are refused
        self._closed = False
        self._changed = threading.Condition()
        self._sessions: OrderedDict[str, VideoQA] = OrderedDict()
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._fetchers = ThreadPoolExecutor(most, "evoprune-fetch")
        self._openers = ThreadPoolExecutor(OPENERS, "evoprune-open")
        self._thread = threading.Thread(target=self._serve, name="evoprune-model", daemon=True)
        self._thread.start()

    # For the event loop.

    @property
    def waiting(self) -> int:
        with self._changed:
            return self._count()

    @property
    def busy(self) -> bool:
        return self._running is not None

    def retry_s(self) -> int:
        """Return in how many seconds there may be room: what an answer takes, usually."""
        usual = statistics.median(self._seconds) if self._seconds else 1.0
        return max(1, min(LONGEST_RETRY_S, ceil(usual)))

    def admit(self, client: str) -> Job:
        """Return a new job of a client, which waits. Raises ApiError: too many do.

        Where it is full, a client that has fewer waiting takes the place of the latest job of the one that has most.
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
        """Has a thread fetch the files of a job. Raises what `fetch` raises."""
        await asyncio.get_running_loop().run_in_executor(self._fetchers, lambda: job.hold(fetch()))

    def submit(self, job: Job, question: Question) -> None:
        """Has a job answered whose files were fetched."""
        job.question = question
        if job.cancelled:
            return
        fetched = job.fetched
        if fetched and encoding_key(question, fetched) in self.kept:
            self._is_ready(job)
        else:
            self._openers.submit(Context().run, self._prepare, job)

    def run(self, job: Job, question: Question, task: Task) -> None:
        """Has the thread of the model run a task about a job whose files were fetched."""
        job.question = question
        job.task = task
        self._is_ready(job)

    def cancel(self, job: Job) -> None:
        """Ends a job that nobody waits for; nothing where it has ended."""
        with self._changed:
            self._leave(job)
        if not (job.cancelled or self._closed):
            job.give_up()  # at once: downloads may have all threads
            self._fetchers.submit(job.end, cancelled=True)  # which may wait for a thread that reads

    def refusal(self) -> ApiError:
        """Return why a request was given up that its client still waits for."""
        return ending() if self._ending else full(self.retry_s())

    def refuse(self) -> None:
        """Ends the jobs that wait, and takes no more."""
        with self._changed:
            self._ending = True
            left = [job for jobs in self._turns.values() for job in jobs]
        for job in left:
            job.put(Failed(ending()))
            self.cancel(job)

    def give_up(self) -> None:
        """Ends the job that is being answered."""
        if job := self._running:
            job.put(Failed(ending()))
            self.cancel(job)

    def close(self) -> None:
        """Ends all jobs and the threads."""
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

    # What waits. With the lock.

    def _count(self) -> int:
        return sum(map(len, self._turns.values()))

    def _leave(self, job: Job) -> None:
        jobs = self._turns.get(job.client, ())
        if job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._turns[job.client]

    def _next(self) -> Job | None:
        """Return the job that comes next of those that are ready."""
        for jobs in self._turns.values():
            for job in jobs:
                if job.ready:
                    return job
        return None

    def _take(self) -> Job | None:
        """Return the next job, which then runs."""
        job = self._next()
        self._running = job
        if job:
            self._leave(job)
            if job.client in self._turns:
                self._turns.move_to_end(job.client)
        return job

    # Opening, in threads of their own.

    def session(self, question: Question) -> VideoQA:
        """Return the model of a question with its settings of pruning. Raises UsageError: they do not fit the model."""
        qa = self.models[question.model]
        key = question.model + repr(question.pruning)
        with self._changed:
            if key in self._sessions:
                self._sessions.move_to_end(key)
                return self._sessions[key]
        made = VideoQA(qa.loaded, load_seconds=qa.session.load_seconds, **vars(question.pruning))
        with self._changed:
            made = self._sessions.setdefault(key, made)
            while len(self._sessions) > SESSIONS:
                self._sessions.popitem(last=False)
            return made

    def _prepare(self, job: Job) -> None:
        """Opens the inputs of a job, and begins to read them where another one is being answered."""
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
        opened = open_inputs(qa.session, fetched.inputs(), question.sampling, names=fetched.names, kind=job.kind)
        try:
            with opened.planning():
                longest_prompt(qa.session, opened.plans, [question.text], question.generation)
        except BaseException:
            opened.close()
            raise
        job.keep_open(opened)
        job.opening_s = time.perf_counter() - start

    def _reserve_ahead(self, job: Job) -> bool:
        """Return whether a job may be read ahead, and counts it; with the lock."""
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

    # Answering, in the thread of the model.

    def _serve(self) -> None:
        unpacked = [qa.loaded.model for qa in self.models.values()]
        while True:
            unpacked = [model for model in unpacked if waiting_layers(model)]
            with ExitStack() as meanwhile:
                if not self.waiting:
                    for model in unpacked:
                        meanwhile.enter_context(packing_meanwhile(model))
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._next())
            with self._changed:
                if self._closed:
                    return
                job = self._take()
            if job is None:  # it was given up meanwhile
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
        """Answers a job, or runs its task; once more where memory was short, and there is something to drop."""
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
            if job.opened:  # it was read in part
                job.opened.close()
                job.opened = None
            work(job, put)

    def _make_room(self) -> bool:
        """Drops what is kept for further questions; whether there was any."""
        patches = [qa.loaded.patches.clear() for qa in self.models.values()]
        return self.kept.clear() or any(patches)

    def _use_threads(self, qa: VideoQA) -> None:
        """Has this thread compute with as many threads as a model wants."""
        if qa is not self._threads_of:
            use_threads(qa.loaded.description)
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
            """Return those that are new."""
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
        """Return the encoding of a job's inputs, which is kept for further questions. In the thread of the model."""
        key = encoding_key(job.question, job.files())
        if job.opened is None:  # it was kept, and dropped since; or memory ran out
            self._open(job)

        def progress(*_: object) -> None:
            job.check()

        opened = job.opened
        if opened is None:
            raise Gone
        encoded = opened.encode(progress)
        job.opened = None
        opened.close()
        self.kept.put(key, encoded, self._bytes(encoded, job.question))
        return encoded

    def _bytes(self, encoded: EncodedInputs, question: Question) -> int:
        """Bytes that an encoding takes with the keys and values of a question, roughly."""
        model = self.models[question.model].loaded.model
        config = model.config
        each = model.dtype.itemsize
        pruning = encoded.report.pruning
        rows = pruning.encoder_rows + pruning.visual_tokens_kept
        columns = pruning.visual_tokens_kept + TEXT + question.generation.max_new_tokens
        return rows * config.text_config.hidden_size * each + kv_bytes(config, columns, each)


def encoding_key(question: Question, fetched: Fetched) -> str:
    """Return what an encoding depends on."""
    return repr((question.model, fetched.identity, question.sampling, question.pruning))


def begun(encoded: EncodedInputs, question: Question, on_thoughts: Callable[[str], None]) -> Answer:
    """Return the answer to a question, after what was said before. The only place that knows of a conversation."""
    how = vars(question.generation) | {"seed": question.seed, "on_thoughts": on_thoughts}
    if not question.earlier:
        return encoded.ask(question.text, **how)
    return encoded.chat(question.generation.system, question.earlier).ask(question.text, **how)
