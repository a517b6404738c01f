"""Decides which of a live stream's threads goes on, and which ones wait."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum

from evoprune.errors import UsageError

STEP_S = 0.02  # maximum time that a layer of the encoder waits while an answer is being generated, in seconds


class GiveWay(Exception):
    """Raised to postpone the prefill of a window, because a question takes precedence or the stream is closed."""


class State(Enum):
    """What the answers to questions need at the moment."""

    IDLE = "no answer is wanted"
    PREFILLING = "a question waits for the memory or is being prefilled, so everything else waits"
    GENERATING = "an answer is being generated, so the encoder goes on slowly, and finished windows wait"
    CLOSED = "the stream is closed or has failed, so everything stops"


@dataclass
class _Resource:
    """Something that one thread uses at a time. A thread may use it several times at once."""

    owner: int | None = None  # the identifier of the thread that uses it
    uses: int = 0
    queue: deque[object] = field(default_factory=deque)  # an object for each waiting thread, the next one first


class Gate:
    """The threads of a stream share two resources: the unfinished window with its frames, and the memory with its KV cache.

    =====================  ==========  =================================================================================
    a thread that          uses        waits for
    =====================  ==========  =================================================================================
    feeds a frame          the window  threads that came before; this includes encoding and prefilling a finished window
    looks for a question   the window  the same; this includes encoding the unfinished window
    answers (`with gate`)  the memory  threads that came before; a window that is being prefilled gives way
    prefills a window      the memory  threads that came before; between layers, it gives way to answers
    runs an encoder layer  nothing     in PREFILLING, answers that use the memory or wait for it; in GENERATING, `STEP_S`
    =====================  ==========  =================================================================================

    A thread that uses the window may then wait for the memory, but not the other way around.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._window = _Resource()
        self._memory = _Resource()
        self._asking = 0  # number of times that answers wait for the memory or use it
        self._calms = 0  # number of times that `_asking` has become 0
        self._answer: int | None = None  # number of the question whose answer is being generated
        self._problem: str | None = None

    @property
    def state(self) -> State:
        if self._problem:
            return State.CLOSED
        if self._answer is not None:
            return State.GENERATING
        return State.PREFILLING if self._asking else State.IDLE

    def check(self) -> None:
        """Raise UsageError if the stream is closed or has failed."""
        if self._problem:
            raise UsageError(self._problem, "start a new stream: VideoQA.stream()")

    def close(self, problem: str) -> None:
        """Close the stream for a reason, unless it is closed already. Threads at work stop at their next layer."""
        with self._changed:
            self._problem = self._problem or problem
            self._changed.notify_all()

    def window(self) -> AbstractContextManager[None]:
        """Use the unfinished window during a `with` block."""
        return self._using(self._window)

    def memory(self) -> AbstractContextManager[None]:
        """Use the memory during a `with` block, but not for an answer."""
        return self._using(self._memory)

    def pause(self) -> None:
        """Let answers go first. Called before each layer of the encoder that runs for a finished window.

        Raises:
            UsageError: If the stream is closed or has failed.
        """
        with self._changed:
            calms = self._calms
            if self._asking and self.state is State.PREFILLING:
                # The calm may have ended before this thread noticed it, so wait for the count.
                self._changed.wait_for(lambda: self._calms > calms or self.state is not State.PREFILLING)
            elif self._asking:
                self._changed.wait_for(lambda: self._calms > calms or self.state is State.CLOSED, STEP_S)
            self.check()

    def __enter__(self) -> None:
        """Use the memory for a part of an answer, during a `with` block."""
        with self._changed:
            self._asking += 1
            try:
                self._take(self._memory)
            except BaseException:  # Ctrl-C
                self._answered()
                raise

    def __exit__(self, *problem: object) -> None:
        with self._changed:
            self._release(self._memory)
            self._answered()

    def give_way(self) -> None:
        """Raise GiveWay if an answer waits for the memory, or the stream is closed. Called before each layer of a prefill."""
        if self._asking or self._problem:
            raise GiveWay

    def begin_answer(self, number: int) -> None:
        """Go to GENERATING, because a question has been prefilled."""
        with self._changed:
            self._answer = number
            self._changed.notify_all()

    def end_answer(self, number: int | None = None) -> None:
        """Leave GENERATING. Has no effect if the current answer is that of another question. None means any question."""
        with self._changed:
            if number in (None, self._answer):
                self._answer = None
                self._changed.notify_all()

    # Callers of these methods must hold the lock, except for `_using`.

    def _answered(self) -> None:
        self._asking -= 1
        if not self._asking:
            self._calms += 1
        self._changed.notify_all()

    @contextmanager
    def _using(self, resource: _Resource) -> Iterator[None]:
        with self._changed:
            self._take(resource)
        try:
            yield
        finally:
            with self._changed:
                self._release(resource)

    def _take(self, resource: _Resource) -> None:
        """Wait for a resource. Threads get it in the order in which they came, so none can keep the others from it."""
        me = threading.get_ident()
        if resource.owner != me:
            place = object()
            resource.queue.append(place)
            try:
                self._changed.wait_for(lambda: resource.owner is None and resource.queue[0] is place)
                resource.owner = me
            finally:
                resource.queue.remove(place)
                self._changed.notify_all()
        resource.uses += 1

    def _release(self, resource: _Resource) -> None:
        resource.uses -= 1
        if not resource.uses:
            resource.owner = None
            self._changed.notify_all()
