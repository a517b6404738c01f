"""The program's entry point. Everything is imported inside `start`, so that Ctrl-C during imports exits quietly."""

import os
import sys  # both were already imported when Python started

# How long OpenMP threads spin between parallel steps before they sleep. GNU OpenMP's default of 300,000 iterations takes many
# milliseconds, on cores needed by other programs or by the thread that all others wait for. It is read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "10000"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
INTERRUPTED = 130
TERMINATED = 143


def start() -> None:
    """Run `evoprune` or `python -m evoprune_cli`."""
    sys.excepthook = _report_uncaught
    import atexit
    import signal

    usual = signal.getsignal(signal.SIGINT)
    if callable(usual):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit at once: there is nothing to clean up yet
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
        # If KeyboardInterrupt passes through `exec("...")`, which dataclasses use, Python considers it unhandled even if it was
        # caught, and ends by killing itself with SIGINT. The next `exec` resets this.
        exec("")  # runs nothing  # noqa: S102


def _stop_loops_too(endings: list[int | str | None]) -> None:
    """End an interrupted process with SIGINT itself, so that a shell also stops its loop. After exit code 130 it would continue."""
    import contextlib
    import signal

    if INTERRUPTED not in endings or os.name != "posix" or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader is gone, or the stream is closed
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _end_at_once_from_now_on() -> None:
    """Let signals end the process at once: all work is done, and exceptions must not interrupt Python's shutdown."""
    import signal

    if callable(signal.getsignal(signal.SIGINT)):  # otherwise it was ignored from the start
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and callable(signal.getsignal(number)):
            signal.signal(number, lambda *_: os._exit(TERMINATED))


def _report_uncaught(category, problem, trace) -> None:
    """Report an uncaught exception like Python, except Ctrl-C, which may arrive while another one is being handled."""
    if not issubclass(category, KeyboardInterrupt):
        sys.__excepthook__(category, problem, trace)


if __name__ == "__main__":
    start()
