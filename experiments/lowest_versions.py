"""Runs the test suite with the lowest versions that pyproject.toml allows: `python -m experiments.lowest_versions`.

uv resolves the versions of all dependencies and of the extras `test` and `ray`, pip installs them into a new virtual environment.
The one exception is torch, whose older builds are too large to try; the version of the running environment is installed. Options
after `--` go to pytest: `python -m experiments.lowest_versions -- -n 4 tests/huggingface`.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent


def lowest_versions(folder: Path) -> Path:
    """Writes the lowest versions, without torch and what torch needs, as a requirements file into `folder`.

    Raises:
        subprocess.CalledProcessError: uv is not installed, or the bounds contradict each other.
    """
    without, requirements = folder / "without-torch.txt", folder / "lowest.txt"
    without.write_text("torch; python_version < '3'\n", encoding="utf-8")
    run(
        sys.executable, "-m", "uv", "pip", "compile", "-q", ROOT / "pyproject.toml", "--extra", "test", "--extra", "ray",
        "--resolution", "lowest-direct", "--override", without, "--no-annotate", "--python", sys.executable, "-o", requirements,
    )  # fmt: skip
    return requirements


def make_environment(folder: Path, requirements: Path) -> Path:
    """Installs the requirements, torch and this project (editable) into a new environment; returns its Python."""
    python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(sys.executable, "-m", "venv", folder / "env")
    torch = version("torch").partition("+")[0]
    run(python, "-m", "pip", "install", "-q", "-r", requirements, f"torch=={torch}")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT)
    return python


def run(*command: str | Path) -> None:
    """Runs a command of this script's own words; its output goes to this script's."""
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.lowest_versions", description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="keep the environment in this folder, which must be new")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args(argv)
    with TemporaryDirectory() as temporary:
        folder = options.into or Path(temporary)
        folder.mkdir(parents=True, exist_ok=options.into is None)
        requirements = lowest_versions(folder)
        print(requirements.read_text(encoding="utf-8"), flush=True)
        python = make_environment(folder, requirements)
        done = subprocess.run([python, "-m", "pytest", "-q", *options.pytest], cwd=ROOT)  # noqa: S603
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
