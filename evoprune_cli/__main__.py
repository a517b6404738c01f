"""Where the process begins: all imports come after there is somebody to end it quietly when it is interrupted."""

import sys


def start() -> None:
    """`evoprune` and `python -m evoprune_cli`."""
    try:
        from evoprune_cli.main import run

        run()
    except KeyboardInterrupt:  # before `run` could take care of it
        sys.exit(130)


if __name__ == "__main__":
    start()
