"""Make an environment for tests that the usual one cannot run, and run them there.

    python -m experiments.environments NAME [--into DIR] [-- OPTIONS OF PYTEST]

| NAME | tests |
|---|---|
| vllm | the plugin for vLLM, on a CPU |
| serve | the server, with real clients |
| ray | batches on Ray, also the slow ones |
| lmms-eval | the model for lmms-eval, in lmms-eval |
| processor | what transformers' processors make, which need torchvision |
| transformers | transformers' own tests on models that prune; `--source DIR` is a checkout, which is installed |
| device | on a second device, which is not the CPU (tests/second_device) |
| lowest | the default tests, with the lowest versions that pyproject.toml allows |

torch is the version of the running environment: older builds are too large to try, and other packages would bring newer ones.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.environments.recipes import RECIPES, block_of, filled, run, run_block


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and those of pytest after `--`."""
    own = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.environments",
        usage="%(prog)s NAME [--into DIR] [-- OPTIONS OF PYTEST]",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("name", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="keep the environment in this folder, which must be new"
    )
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkout of transformers, for its tests")
    options = parser.parse_args(argv[:own])
    if (options.name == "transformers") != (options.source is not None):
        parser.error("--source DIR belongs to transformers, which needs it")
    return options, list(argv[own + 1 :])


def main(argv: Sequence[str] | None = None) -> int:
    options, pytest = parsed(sys.argv[1:] if argv is None else argv)
    recipe = RECIPES[options.name]
    with TemporaryDirectory() as temporary:
        folder = (options.into or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=options.into is None)
        words = {
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
