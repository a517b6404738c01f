"""Find out which video and image decoders are installed.

Some systems have no decord wheels, older versions of Pillow lack AVIF, and HEIC needs an extra.
"""

from importlib.util import find_spec

import pytest
from PIL import Image

DECODERS = ("pyav", "decord") if find_spec("decord") else ("pyav",)
needs_decord = pytest.mark.skipif("decord" not in DECODERS, reason="decord is not installed")
EVERY = ["pyav", pytest.param("decord", marks=needs_decord)]
needs_heic = pytest.mark.skipif(
    not find_spec("pillow_heif"), reason="pillow-heif is not installed: pip install '.[heic]'"
)
needs_avif = pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="Pillow before 11.3 has no AVIF")
