"""Who computes first: answers about a stream go before its encoder, which goes before windows that wait to be read."""

from threading import Event, RLock

BRIEF_S = 0.02  # how long a layer of the encoder waits for a token of an answer


class Turns:
    """The lock of the answers about a stream; while one waits for it or holds it, `pause` waits, in another thread."""

    def __init__(self):
        self.lock = RLock()  # for what need not be first
        self.generating = False  # whether the question of an answer is read: the encoder goes on between two tokens
        self._calm = Event()
        self._calm.set()

    def __enter__(self) -> None:
        self._calm.clear()
        self.lock.acquire()

    def __exit__(self, *problem) -> None:
        self.lock.release()
        self._calm.set()

    @property
    def wanted(self) -> bool:
        """Whether an answer waits for the lock, or holds it."""
        return not self._calm.is_set()

    def pause(self) -> None:
        """Waits while a question is read, and briefly while a token is generated."""
        self._calm.wait(BRIEF_S if self.generating else None)
