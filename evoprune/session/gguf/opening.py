"""Open the GGUF files of a model folder. Imported with the code that loads models, so it imports `tensors` only for GGUF files."""

from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.session.gguf.folder import gguf_files

if TYPE_CHECKING:
    from evoprune.session.gguf.tensors import GgufTensors


def open_gguf(folder: Path | None) -> "GgufTensors | None":
    """Return the tensors of a model's GGUF files, or None if it is a folder of another kind. See `gguf_tensors` for the errors."""
    if not gguf_files(folder):
        return None

    from evoprune.session.gguf.tensors import gguf_tensors

    return gguf_tensors(folder)
