"""Turn frames into visual tokens: preprocessing, and the vision tower with pruning between its layers.

The encoder runs a method's plan on the weights of a Qwen3-VL, Qwen2.5-VL or Qwen2-VL tower, either this project's or Hugging
Face's.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.vision.encoder import (
        Encoded,
        EncodedRows,
        EncoderRun,
        encode_rows,
    )
    from evoprune.vision.hooks import Hook
    from evoprune.vision.patches import ReferenceBlocks, normalised
    from evoprune.vision.preprocess import patches_of, pixel_patches, resize
    from evoprune.vision.rows import Rows

__all__ = [
    "Encoded",
    "EncodedRows",
    "EncoderRun",
    "Hook",
    "ReferenceBlocks",
    "Rows",
    "encode_rows",
    "normalised",
    "patches_of",
    "pixel_patches",
    "resize",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "encoder": [
            "Encoded",
            "EncodedRows",
            "EncoderRun",
            "encode_rows",
        ],
        "hooks": ["Hook"],
        "patches": ["ReferenceBlocks", "normalised"],
        "preprocess": ["patches_of", "pixel_patches", "resize"],
        "rows": ["Rows"],
    },
)
