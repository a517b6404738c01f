"""Where the process begins. Everything else is imported inside `start`, so that Ctrl-C during imports ends quietly."""

import sys


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    try:
        from evoprune_cli.main import run

        run()
    except KeyboardInterrupt:  # before `run` handles it
        sys.exit(130)
    finally:
        # After Ctrl-C inside `exec("...")`, which dataclasses use, Python kills itself by SIGINT at exit even if the exception was
        # caught. Another `exec` clears that state.
        exec("")


if __name__ == "__main__":
    start()
