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
        encode,
        encode_rows,
        joined,
        select_tokens,
        token_selection,
    )
    from evoprune.vision.hooks import Hook
    from evoprune.vision.layout import geometry
    from evoprune.vision.patches import CLIP, Normal, ReferenceBlocks, normalised, patchify
    from evoprune.vision.preprocess import patches_of, pixel_patches, resize
    from evoprune.vision.rows import Rows
    from evoprune.vision.tower import tower_geometry, tower_shape

__all__ = [
    "CLIP",
    "Encoded",
    "EncodedRows",
    "EncoderRun",
    "Hook",
    "Normal",
    "ReferenceBlocks",
    "Rows",
    "encode",
    "encode_rows",
    "geometry",
    "joined",
    "normalised",
    "patches_of",
    "patchify",
    "pixel_patches",
    "resize",
    "select_tokens",
    "token_selection",
    "tower_geometry",
    "tower_shape",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "encoder": [
            "Encoded",
            "EncodedRows",
            "EncoderRun",
            "encode",
            "encode_rows",
            "joined",
            "select_tokens",
            "token_selection",
        ],
        "hooks": ["Hook"],
        "layout": ["geometry"],
        "patches": ["CLIP", "Normal", "ReferenceBlocks", "normalised", "patchify"],
        "preprocess": ["patches_of", "pixel_patches", "resize"],
        "rows": ["Rows"],
        "tower": ["tower_geometry", "tower_shape"],
    },
)
