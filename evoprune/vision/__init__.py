"""Turns frames into visual tokens: preprocessing, and the vision tower with pruning between its layers.

`encode_rows` runs the tower according to a pruning method's plan and returns `EncodedRows`. `EncodedRows.select_tokens` then
selects the visual tokens and returns them as `Encoded`. The weights come from a Qwen vision tower loaded either by this project or
by Hugging Face transformers.
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
