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
        # Python takes an interruption inside `exec("...")`, as dataclasses use it, for one that nobody caught, even if somebody
        # did, and kills itself by SIGINT in the end. The next `exec` makes it forget.
        exec("")  # noqa: S102 (runs nothing)


if __name__ == "__main__":
    start()
