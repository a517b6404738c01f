"""Run llama.cpp's converter on a model with a tokenizer that the converter does not know.

    python -m experiments.gguf.convert SOURCES FOLDER OUT.gguf [--mmproj] [--outtype f32] [--words qwen2]

SOURCES is the folder of llama.cpp with convert_hf_to_gguf.py. All other options are passed to the converter.
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from experiments.speed.processes import ROOT


def convert(sources: Path, folder: Path, out: Path, words: str, *options: str) -> None:
    """Run this module in a process, and print the converter's output only if it fails.

    Args:
        words: The name of the pre-tokenizer in GGUF files.

    Raises:
        RuntimeError: If the converter fails.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.gguf.convert",
        *map(str, (sources, folder, out)),
        "--words",
        words,
        *options,
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603 (this Python)
    if ran.returncode:
        raise RuntimeError(f"the converter failed on {folder}:\n{ran.stdout}{ran.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--words", default="qwen2", help="name of the pre-tokenizer")
    args, options = parser.parse_known_args()
    sys.path[:0] = [str(args.sources), str(args.sources / "gguf-py")]
    from conversion import base

    # The converter recognizes published tokenizers by the tokens of a test text.
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: args.words
    sys.argv = ["convert_hf_to_gguf.py", args.folder, "--outfile", args.out, *options]
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
