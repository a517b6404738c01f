"""The published models that evoprune supports, and the form of their names on the Hugging Face hub. Does not import torch."""

import re
from pathlib import Path

import evoprune
from evoprune.model import FAMILIES
from evoprune.util import listed

# Bundled copies of published config.json files, so that benchmarks can run without network access.
BUNDLED_CONFIGS = {
    f"Qwen/{path.stem}": path for path in sorted((Path(evoprune.__file__).parent / "model" / "configs").glob("*.json"))
}
SERIES = sorted({name for family in FAMILIES.values() for name in family.series}, reverse=True)  # newest first
MODEL_HINT = f"evoprune runs {listed(SERIES)}, such as Qwen/Qwen2.5-VL-3B-Instruct, and its demos"
SMALL_FILES = ("*.json", "*.jinja", "merges.txt")  # settings, tokenizer, and chat template
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_id(name: str) -> bool:
    """Return True if a name looks like a Hugging Face hub ID (`org/name`)."""
    return bool(_ID.fullmatch(name)) and ".." not in name and "--" not in name


def cached_id(folder: Path) -> str:
    """Convert the name of a folder in the hub's local cache (`models--org--name`) to a hub ID (`org/name`)."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)
