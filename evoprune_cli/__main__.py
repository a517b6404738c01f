"""Where the process begins. Everything else is imported inside `start`, so that Ctrl-C during imports ends quietly."""

import os
import signal
import sys

# How long the threads of a parallel step spin before they sleep, waiting for the next one. GNU's OpenMP takes 300,000 turns, many
# milliseconds, on cores that other programs need, or the thread that all wait for. It reads this when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "1000"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ |= SPIN
    sys.excepthook = _report_uncaught
    try:
        from evoprune_cli.main import run

        run()
    except KeyboardInterrupt:  # before `run` handles it
        sys.exit(130)
    finally:
        _end_at_once_from_now_on()
        # Python takes an interruption inside `exec("...")`, as dataclasses use it, for one that nobody caught, even if somebody
        # did, and kills itself by SIGINT in the end. The next `exec` makes it forget.
        exec("")  # noqa: S102 (runs nothing)


def _end_at_once_from_now_on() -> None:
    """Makes a signal end the process: all is done and printed, and Python's own clearing up is no place for exceptions."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):  # else it was ignored from the beginning
            signal.signal(number, lambda which, _: os._exit(128 + which))


def _report_uncaught(kind, problem, trace) -> None:
    """Python's own report, but for Ctrl-C, which may come while another one is being handled."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, problem, trace)


if __name__ == "__main__":
    start()
