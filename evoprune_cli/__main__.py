"""Where the process begins. Everything else is imported inside `start`, so that Ctrl-C during imports ends quietly."""

import os
import sys  # both are there already, when Python begins to run a program

# How long the threads of a parallel step spin before they sleep, waiting for the next one. GNU's OpenMP takes 300,000 turns, many
# milliseconds, on cores that other programs need, or the thread that all wait for. It reads this when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "10000"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
INTERRUPTED = 130
TERMINATED = 143


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    sys.excepthook = _report_uncaught
    import atexit
    import signal

    usual = signal.getsignal(signal.SIGINT)
    if callable(usual):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once: there is nothing yet to clear up
    if not any(name in os.environ for name in CHOSEN):
        os.environ |= SPIN
    endings: list[int | str | None] = []
    atexit.register(_stop_loops_too, endings)  # registered first, called last
    try:
        from evoprune_cli.main import run

        if callable(usual):
            signal.signal(signal.SIGINT, usual)
        run()
    except KeyboardInterrupt:  # before `run` handles it
        endings.append(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        endings.append(ended.code)
        raise
    finally:
        _end_at_once_from_now_on()
        # Python takes an interruption inside `exec("...")`, as dataclasses use it, for one that nobody caught, even if somebody
        # did, and kills itself by SIGINT in the end. The next `exec` makes it forget.
        exec("")  # noqa: S102 (runs nothing)


def _stop_loops_too(endings: list[int | str | None]) -> None:
    """Ends an interrupted process by SIGINT itself, so that a shell stops its loop; after an exit with 130 it would go on."""
    import contextlib
    import signal

    if INTERRUPTED not in endings or os.name != "posix" or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _end_at_once_from_now_on() -> None:
    """Makes a signal end the process: all is done and printed, and Python's own clearing up is no place for exceptions."""
    import signal

    if callable(signal.getsignal(signal.SIGINT)):  # else it was ignored from the beginning
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and callable(signal.getsignal(number)):
            signal.signal(number, lambda *_: os._exit(TERMINATED))


def _report_uncaught(category, problem, trace) -> None:
    """Python's own report, but for Ctrl-C, which may come while another one is being handled."""
    if not issubclass(category, KeyboardInterrupt):
        sys.__excepthook__(category, problem, trace)


if __name__ == "__main__":
    start()
