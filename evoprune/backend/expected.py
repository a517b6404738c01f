"""Which device torch is going to use, told before torch is imported, which takes seconds."""

import math
import os
import re
from importlib.util import find_spec
from pathlib import Path

from evoprune.backend.limits import ROOT

# Of the drivers of GPUs on Linux: NVIDIA's, AMD's, and that of Windows below Linux.
NODES = ("nvidia[0-9]*", "kfd", "dxg")
# In torch's module `version`: of CUDA or ROCm, if torch was built with it.
BUILT_WITH = re.compile(r"^(?:cuda|hip)\b[^=]*=\s*['\"]", re.MULTILINE)


# Visual tokens before pruning that a CPU encodes in about a minute.
MAX_VISUAL_TOKENS_CPU = 4_096


def visual_token_limit(name: str) -> float:
    """Return how many visual tokens a device of this name takes before pruning; infinity where the model alone limits them."""
    return MAX_VISUAL_TOKENS_CPU if expects_host(name) else math.inf


def expects_host(name: str, root: Path = ROOT) -> bool:
    """Return whether the device of a name is going to be the CPU (`devices.is_host`).

    "auto" is the CPU without a GPU's driver, without a torch that can use one, or where GPUs are hidden from this process. A driver
    may be there that torch cannot use; so it is a guess.
    """
    if name != "auto":
        return name.partition(":")[0] == "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    driver = not (root / "dev").is_dir() or any(next((root / "dev").glob(node), None) for node in NODES)
    return hidden or not driver or not _built_for_gpus()


def _built_for_gpus() -> bool:
    """Return whether the installed torch can use GPUs of CUDA or ROCm; True where its files do not tell."""
    try:
        folders = find_spec("torch").submodule_search_locations
        return bool(BUILT_WITH.search(Path(folders[0], "version").with_suffix(".py").read_text(encoding="utf-8")))
    except (AttributeError, TypeError, IndexError, OSError, ValueError):  # frozen, or laid out in another way
        return True
