"""Makes torchvision importable with a CPU build of torch. Run this file once in each environment that needs it.

The torchvision package on PyPI is built for CUDA. With a CPU build of torch, importing it fails ("operator torchvision::nms does
not exist"), and so does importing any module that depends on it. Because models don't call the missing operators, declaring them is
enough. This script writes a .pth file that makes Python declare them at startup. If torchvision can already be imported or isn't
installed, the script does nothing.
"""

import sysconfig
from importlib.util import find_spec
from pathlib import Path

MODULE = "declare_operators"
SOURCE = '''"""Declares operators that a torchvision for CUDA expects of torch; written by evoprune_vllm.operators."""

import torch

for name in ("nms", "qnms"):
    torch.library.define("torchvision::" + name, "(Tensor boxes, Tensor scores, float most) -> Tensor")
'''


def declare() -> bool:
    """Write the .pth file if importing torchvision fails because of missing operators. Returns True if the file was written.

    Raises:
        RuntimeError: If importing torchvision fails for another reason.
    """
    if find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except RuntimeError as problem:
        if "torchvision::" not in str(problem):
            raise
        packages = Path(sysconfig.get_path("purelib"))
        (packages / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
        (packages / f"{MODULE}.pth").write_text(f"import {MODULE}\n", encoding="utf-8")
        return True
    return False


if __name__ == "__main__":
    if declare():
        print("torchvision: declared the operators that this torch lacks")
