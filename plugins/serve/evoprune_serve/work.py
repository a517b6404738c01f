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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import Context
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import partial
from math import ceil
from typing import Any, ClassVar, Self

from evoprune.backend import Host
from evoprune.errors import OutOfMemory
from evoprune.report import Report
from evoprune.session import (
    Answer,
    EncodedInputs,
    OpenInputs,
    PruneOptions,
    open_inputs,
)
from evoprune.video import Scope, Stopped
from evoprune.video_qa import VideoQA
from evoprune.vision import TowerOutput
from evoprune_serve.errors import ApiError, ending, full
from evoprune_serve.question import Question
from evoprune_serve.sources import Fetched

OPENERS = 2  # number of threads for opening inputs
AHEAD = 1  # maximum number of jobs to prefetch while another job is being answered
SESSIONS = 32  # maximum number of cached sessions; each combination of model and pruning settings has its own
SHARE = 4  # cached encodings may take up to 1/SHARE of the available memory
LATEST = 20  # number of recent answers used to estimate Retry-After
LONGEST_RETRY_S = 60
Tower = Callable[..., TowerOutput]


class Gone(Exception):
    """Raised to stop work on a job that has ended, for example because its client is no longer waiting for the answer."""


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer or of the reasoning before it.

    `logprobs` contains the log probabilities of the tokens since the previous piece, in report format.
    """

    text: str
    thought: bool
    logprobs: list[dict[str, Any]] | None
    last: ClassVar[bool] = False


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
    last: ClassVar[bool] = True


@dataclass(frozen=True)
class Failed:
    """The event at the end of a failed request, with a missing or incomplete answer."""

    problem: BaseException
    last: ClassVar[bool] = True


@dataclass(frozen=True)
class Told:
    """An event with a task's message as JSON data. `last` is True for the task's final message."""

    facts: dict[str, Any]
    last: bool = False


Event = Piece | Done | Failed | Told


Put = Callable[[Event], None]
Progress = Callable[[str, int, int], None]
Task = Callable[["Job", Put], None]  # sends events with `Put`; a task that hasn't sent any may be retried
Run = Callable[[Callable[[], None]], object]  # calls a function, possibly later in another thread


class State(Enum):
    """The states of a job."""

    FETCHING = "its request is checked, and its files are fetched"
    WAITING = "it waits for a thread that opens its inputs"
    OPENING = "its inputs are opened"
    READY = "the model may start working on it"
    READING = "READY, and its inputs are being read ahead"
    RUNNING = "the model works on it"
    ENDED = "its last event has been sent, or its client is gone"


NEXT = {  # the states that may follow each state; ENDED may also follow, see `Job.end`
    State.FETCHING: (State.WAITING, State.READY),
    State.WAITING: (State.OPENING,),
    State.OPENING: (State.READY,),
    State.READY: (State.READING, State.RUNNING),
    State.READING: (State.RUNNING,),
    State.RUNNING: (),
    State.ENDED: (),
}


@dataclass(frozen=True)
class Assignment:
    """The work to do for a job once its files have been fetched.

    Attributes:
        task: The task to run in the model thread, such as answering the question.
        scope: The scope of all threads that work on the job, so that they stop reading when it ends.
    """

    question: Question
    task: Task
    files: Fetched
    scope: Scope = field(default_factory=Scope)

    def unpruned(self) -> Self:
        """Return the same work with a question about all visual tokens."""
        pruning = PruneOptions(budget=1.0, method="none", seed=self.question.pruning.seed)
        return replace(self, question=replace(self.question, pruning=pruning))

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the scope."""

        def entered() -> None:
            self.scope.enter()
            function(*arguments)

        Context().run(entered)

    def close(self, inputs: OpenInputs | None = None) -> None:
        """Stop the threads that work on the job, and release its files and its opened inputs, if any."""
        with ExitStack() as stack:
            stack.callback(self.files.close)
            if inputs:
                stack.callback(inputs.close)
            self.scope.stop()


class Job:
    """A request in the queue, which sends events to the event loop `loop`.

    A job owns its resources, which depend on its state:

        FETCHING             nothing
        WAITING, OPENING     its `Assignment`
        READY, READING       its `Assignment`; its opened inputs, unless the encoding of an earlier question is reused
        RUNNING              its `Assignment`; its opened inputs until the model thread takes them (`take_inputs`)
        ENDED                nothing

    `change` goes on to the next state, and `end` ends the job from any state and releases what it owns. Both may be called from any
    thread. A job ends only once, and nothing is sent afterwards.

    Attributes:
        opening_s: Time spent opening the inputs, in seconds.
        queue_s: Time from admission to the start of the answer in seconds, excluding `opening_s`.
    """

    def __init__(self, client: str, loop: asyncio.AbstractEventLoop):
        self.client = client
        self.admitted_s = time.perf_counter()
        self.opening_s = 0.0
        self.queue_s = 0.0
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._lock = threading.Lock()
        self._state = State.FETCHING
        self._assignment: Assignment | None = None
        self._inputs: OpenInputs | None = None

    @property
    def state(self) -> State:
        return self._state

    def check(self) -> None:
        """Raise Gone if the job has ended."""
        if self._state is State.ENDED:
            raise Gone

    @property
    def assignment(self) -> Assignment:
        """The work to do for the job.

        Raises:
            Gone: If the job has ended.
        """
        assignment = self._assignment
        if assignment is None:
            raise Gone
        return assignment

    def change(self, state: State, owned: Assignment | OpenInputs | None = None) -> None:
        """Go on to the next state.

        Args:
            owned: A resource to own from now on. If there is an exception, it is closed instead.

        Raises:
            Gone: If the job has ended.
            RuntimeError: If `state` cannot follow the current state.
        """
        try:
            with self._lock:
                self.check()
                if state not in NEXT[self._state]:
                    raise RuntimeError(f"a job cannot be {state.name} after {self._state.name}")
                self._state = state
                if isinstance(owned, Assignment):
                    self._assignment = owned
                else:
                    self._inputs = owned or self._inputs
        except BaseException:
            if owned:
                owned.close()
            raise

    @property
    def inputs(self) -> OpenInputs | None:
        """The opened inputs that the job owns, or None if there aren't any."""
        return self._inputs

    def take_inputs(self) -> OpenInputs | None:
        """Hand over the opened inputs to the caller, who must close them. Returns None if the job has none.

        Raises:
            Gone: If the job has ended.
        """
        with self._lock:
            self.check()
            inputs, self._inputs = self._inputs, None
            return inputs

    def put(self, event: Event) -> None:
        """Send an event to the event loop, unless the job has ended. The last event ends the job."""
        if event.last:
            self.end(event)
            return
        with self._lock:
            if self._state is not State.ENDED:
                self._send(event)

    def end(self, last: Event | None = None, run: Run = lambda release: release()) -> None:
        """End the job: send its last event, and release everything that it owns. Has no effect if the job has already ended.

        Args:
            last: The last event, or None if the client is gone.
            run: Called with the function that releases the resources, which may have to wait for a reader.
        """
        with self._lock:
            if self._state is State.ENDED:
                return
            self._state = State.ENDED
            assignment, inputs = self._assignment, self._inputs
            self._assignment = self._inputs = None
            if last:
                self._send(last)
        if assignment:
            run(partial(assignment.close, inputs))

    async def next(self) -> Event:
        return await self._events.get()

    def _send(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed because the server is shutting down
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class KeptEncodings:
    """A thread-safe LRU cache of encoded inputs, with at most `most` encodings in up to 1/`SHARE` of the available memory."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, tuple[EncodedInputs, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

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

    @property
    def is_ending(self) -> bool:
        """Whether the server is shutting down."""
        return self._ending

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
            self._end(displaced, Failed(full(retry_s)), self._in_thread)
        return job

    async def submit(
        self,
        job: Job,
        question: Question,
        fetch: Callable[[], Fetched],
        task: Task | None = None,
        opens: bool = False,
    ) -> dict[str, str]:
        """Fetch a job's files in a thread. Then the job waits for the model thread to answer its question, or to run its task.

        Args:
            opens: Whether the inputs of a task are opened while it waits, as for a question.

        Returns:
            See `Fetched.paths`.

        Raises:
            Gone: If the job has ended.
            Exception: Any exception raised by `fetch`.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._fetchers, self._fetch, job, question, fetch, task, opens
        )

    def cancel(self, job: Job) -> None:
        """End a job whose client is no longer waiting for the answer. Has no effect if the job has already ended."""
        self._end(job, run=self._in_thread)

    def refusal(self) -> ApiError:
        """Return the error for a request dropped by the server while its client was still waiting."""
        return ending() if self._ending else full(self.retry_s())

    def refuse(self) -> None:
        """Reject all waiting jobs and all new jobs."""
        with self._changed:
            self._ending = True
            left = list(self._queued())
        for job in left:
            self._end(job, Failed(ending()), self._in_thread)

    def give_up(self) -> None:
        """Cancel the job currently being answered, if any."""
        if job := self._running:
            self._end(job, Failed(ending()), self._in_thread)

    def close(self) -> None:
        """Cancel all jobs and stop the threads."""
        with self._changed:
            self._ending = self._closed = True
            left = list(self._queued())
            self._changed.notify_all()
            if self._running:
                left.append(self._running)
        for job in left:
            self._end(job)
        self._thread.join(timeout=5)
        self._openers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False)  # its functions release resources, or raise Gone

    def _end(self, job: Job, last: Event | None = None, run: Run = lambda release: release()) -> None:
        """Remove a job from the queue, and end it. See `Job.end`."""
        with self._changed:
            self._leave(job)
        job.end(last, run)

    def _in_thread(self, release: Callable[[], None]) -> None:
        try:
            self._fetchers.submit(release)
        except RuntimeError:  # the threads have been stopped
            release()

    # The queue. Callers of these methods must hold the lock. No job in the queue has ended.

    def _queued(self) -> Iterator[Job]:
        return (job for jobs in self._turns.values() for job in jobs)

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
        return next((job for job in self._queued() if job.state in (State.READY, State.READING)), None)

    def _take(self) -> Job | None:
        """Remove the next ready job from the queue and mark it as running. Returns None if no job is ready."""
        job = self._next()
        self._running = job
        if job:
            job.change(State.RUNNING)
            self._leave(job)
            if job.client in self._turns:
                self._turns.move_to_end(job.client)
        return job

    # Preparing jobs, in the fetcher and opener threads.

    def _fetch(
        self, job: Job, question: Question, fetch: Callable[[], Fetched], task: Task | None, opens: bool
    ) -> dict[str, str]:
        job.check()
        files = fetch()
        paths = files.paths
        assignment = Assignment(question, task or self._answer, files)
        if (task and not opens) or encoding_key(assignment) in self.kept:
            self._ready(job, assignment)
        else:
            job.change(State.WAITING, assignment)
            self._openers.submit(self._prepare_waiting)
        return paths

    def _ready(self, job: Job, owned: Assignment | OpenInputs) -> None:
        job.change(State.READY, owned)
        with self._changed:
            self._changed.notify_all()

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
                jobs = ((job for job in jobs if job.state is State.WAITING) for jobs in self._turns.values())
                firsts = (next(each, None) for each in jobs)
                job = next((job for job in firsts if job and job.client not in self._opening), None)
                if job is None:
                    return
                job.change(State.OPENING)
                assignment = job.assignment
                self._opening.add(job.client)
            try:
                assignment.run(self._prepare, job, assignment)
            finally:
                with self._changed:
                    self._opening.discard(job.client)

    def _prepare(self, job: Job, assignment: Assignment) -> None:
        """Open a job's inputs, and start reading them ahead if another job is being answered."""
        try:
            inputs = self._open(job, assignment)
            self._ready(job, inputs)
        except BaseException as problem:
            self._end(job, Failed(problem))
            return
        with self._changed:
            ahead = self.busy and self._reserve_ahead(job)
        if ahead:
            self._read_ahead(job, inputs)

    def _open(self, job: Job, assignment: Assignment, tower: Tower | None = None) -> OpenInputs:
        start = time.perf_counter()
        question = assignment.question
        qa = self.session(question)
        files = assignment.files
        sampling = files.sampling(question.sampling)
        opened = open_inputs(qa.session, files.inputs(), sampling, names=files.names, tower=tower)
        try:
            for plan in opened.plans:
                sampling.check_picture(plan.info)
            if question.text:
                with opened.planning():
                    qa.session.longest_prompt(opened.plans, [question.text], question.generation)
        except BaseException:
            opened.close()
            raise
        job.opening_s = time.perf_counter() - start
        return opened

    def _reserve_ahead(self, job: Job) -> bool:
        """Change a ready job to READING if fewer than `AHEAD` jobs are. Callers must hold the lock.

        Returns False if there are already enough, or the job isn't ready.
        """
        reading = sum(other.state is State.READING for other in self._queued())
        if job.state is not State.READY or reading >= AHEAD:
            return False
        job.change(State.READING)
        return True

    def _read_next_ahead(self) -> None:
        with self._changed:
            job = self._next()
            inputs = job and job.inputs
            if not (inputs and self._reserve_ahead(job)):
                return
            assignment = job.assignment
        self._openers.submit(assignment.run, self._read_ahead, job, inputs)

    def _read_ahead(self, job: Job, inputs: OpenInputs) -> None:
        try:
            inputs.begin()
        except Stopped:  # the model has already encoded the inputs, or the job has ended
            return
        except BaseException as problem:
            self._end(job, Failed(problem))

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
                assignment = job.assignment
                assignment.run(self._do, job, assignment)
                self._seconds.append(time.perf_counter() - start)
            except BaseException as problem:
                self._end(job, Failed(problem))
            finally:
                self._running = None
                self._end(job)
                assignment = None

    def _do(self, job: Job, assignment: Assignment) -> None:
        """Run a job's task. If memory runs out before the first event, clear the caches and retry once."""
        said = False

        def put(event: Event) -> None:
            nonlocal said
            said = True
            job.put(event)

        self._use_threads(self.models[assignment.question.model])
        try:
            assignment.task(job, put)
        except OutOfMemory:
            if said or not self._make_room():
                raise
            assignment.task(job, put)

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
        question = job.assignment.question
        encoded, kept = self.encoded(job)
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

    def encoded(self, job: Job, progress: Progress = lambda stage, done, total: None) -> tuple[EncodedInputs, bool]:
        """Return a job's encoded inputs, and whether the encoding of an earlier question was reused. See `encode`."""
        if (known := self.kept.get(encoding_key(job.assignment))) is not None:
            return known, True
        return self.encode(job, progress=progress), False

    def encode(
        self,
        job: Job,
        tower: Tower | None = None,
        progress: Progress = lambda stage, done, total: None,
        unpruned: bool = False,
    ) -> EncodedInputs:
        """Encode a job's inputs and cache the encoding for follow-up questions. Must be called in the model thread.

        Args:
            tower: See `open_inputs`. Used only if the inputs haven't been opened yet, as in a task.
            progress: See `OpenInputs.encode`.
            unpruned: Whether to keep all visual tokens, whatever the question's pruning settings.
        """
        assignment = job.assignment
        if unpruned:
            assignment = assignment.unpruned()

        def step(*facts: Any) -> None:
            job.check()
            progress(*facts)

        # They have not been opened if the job has a task, the encoding was evicted since the job became ready, or memory ran out.
        opened = None if unpruned else job.take_inputs()
        with opened or self._open(job, assignment, tower) as opened:
            encoded = opened.encode(step)
        self.kept.put(
            encoding_key(assignment), encoded, encoded.bytes_with(assignment.question.generation.max_new_tokens)
        )
        return encoded


def encoding_key(assignment: Assignment) -> str:
    """Return the cache key of an assignment's encoding, which includes everything the encoding depends on."""
    question = assignment.question
    return repr((question.model, assignment.files.identity, question.sampling, question.pruning))


def begun(encoded: EncodedInputs, question: Question, on_thoughts: Callable[[str], None]) -> Answer:
    """Start answering a question, which may follow earlier turns of a conversation."""
    how = vars(question.generation) | {"seed": question.seed, "on_thoughts": on_thoughts}
    if not (question.earlier or question.conversation):
        return encoded.ask(question.text, **how)
    return encoded.chat(question.generation.system, question.earlier).ask(question.text, **how)
