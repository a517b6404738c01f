"""Where the process begins. Everything else is imported inside `start`, so that Ctrl-C during imports ends quietly."""

import os
import sys

# How long the threads of a parallel step spin before they sleep, waiting for the next one. GNU's OpenMP takes 300,000 turns, many
# milliseconds, on cores that other programs need, or the thread that all wait for. It reads this when torch is loaded.
SPIN = {"GOMP_SPINCOUNT": "1000"}
CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ |= SPIN
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
