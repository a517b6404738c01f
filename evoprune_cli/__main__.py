"""Where the process begins. Everything else is imported inside `start`, so that Ctrl-C during imports ends quietly."""

import os
import sys

# How the threads of a parallel step wait for the next one. By default they spin for milliseconds, on cores that other programs, or
# the thread that everybody waits for, need. OpenMP reads this when torch is loaded.
SLEEP = {"OMP_WAIT_POLICY": "passive"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ |= SLEEP
    try:
        from evoprune_cli.main import run

        run()
    except KeyboardInterrupt:  # before `run` handles it
        sys.exit(130)
    finally:
        # Python takes an interruption inside `exec("...")`, as dataclasses use it, for one that nobody caught, even if somebody
        # did, and kills itself by SIGINT in the end. The next `exec` makes it forget.
        exec("")  # noqa: S102 (runs nothing)


if __name__ == "__main__":
    start()
