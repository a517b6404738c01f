"""The program's entry point. All imports happen inside `start`, so pressing Ctrl-C during an import doesn't show a traceback."""

import os
import sys  # both were already imported at Python startup

# Number of iterations for which an idle OpenMP thread spins before going to sleep. With GNU OpenMP's default of 300,000, idle
# threads keep their cores busy for many milliseconds, even if those cores are needed by other programs or by the thread that all
# others are waiting for. This variable is read when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "10000"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
INTERRUPTED = 130
TERMINATED = 143


def start() -> None:
    """Run the command line, as `evoprune` and `python -m evoprune_cli` do."""
    sys.excepthook = _report_uncaught
    import atexit
    import signal

    usual = signal.getsignal(signal.SIGINT)
    if callable(usual):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit immediately because there is nothing to clean up yet
    if not any(name in os.environ for name in CHOSEN):
        os.environ |= SPIN
    endings: list[int | str | None] = []
    atexit.register(_end_by_signal, endings)  # registered first, so that it is called last
    try:
        from evoprune_cli.main import run

        if callable(usual):
            signal.signal(signal.SIGINT, usual)
        run()
    except KeyboardInterrupt:  # Ctrl-C arrived before `run` could handle it
        endings.append(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except SystemExit as ended:
        endings.append(ended.code)
        raise
    finally:
        _end_at_once_from_now_on()
        # If a KeyboardInterrupt passes through `exec("...")`, which dataclasses use, Python considers it unhandled even if it is
        # caught later, and kills itself with SIGINT at exit. Another `exec` clears this state.
        exec("")  # runs nothing  # noqa: S102


def _end_by_signal(endings: list[int | str | None]) -> None:
    """End an interrupted or terminated process immediately, because Python's shutdown may crash while a thread imports torch.

    An interrupted process kills itself with SIGINT so that a surrounding shell loop also stops. If the process merely exited with
    code 130, the loop would continue.
    """
    import contextlib
    import signal

    if not {INTERRUPTED, TERMINATED} & {*endings}:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader has exited, or the stream is closed
            stream.flush()
    if TERMINATED in endings:
        os._exit(TERMINATED)
    if os.name != "posix" or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        os._exit(INTERRUPTED)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _end_at_once_from_now_on() -> None:
    """Make signals terminate the process immediately. All work is done, and an exception would interrupt Python's shutdown."""
    import signal

    if callable(signal.getsignal(signal.SIGINT)):  # otherwise, the signal was already ignored at startup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and callable(signal.getsignal(number)):
            signal.signal(number, lambda *_: os._exit(TERMINATED))


def _report_uncaught(category, problem, trace) -> None:
    """Report an uncaught exception as Python does, but print nothing if Ctrl-C was pressed during exception handling."""
    if not issubclass(category, KeyboardInterrupt):
        sys.__excepthook__(category, problem, trace)


if __name__ == "__main__":
    start()
