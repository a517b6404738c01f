"""How weights are read and held, by name. Imports no torch."""

from evoprune.errors import UsageError

DTYPE_NAMES = ("bf16", "fp16", "fp32")
QUANTIZE = ("none", "int8", "int4")
LOAD_FORMATS = ("auto", "dummy")  # from their files, or random ones of the same shapes


def check_dtype(name: str) -> None:
    """Raises:
    UsageError: neither "auto" nor one of `DTYPE_NAMES`.
    """
    if name not in ("auto", *DTYPE_NAMES):
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPE_NAMES)}")


def check_quantize(kind: str) -> None:
    """Raises:
    UsageError: not one of `QUANTIZE`.
    """
    if kind not in QUANTIZE:
        raise UsageError(f"unknown quantisation {kind!r}", f"use {', '.join(QUANTIZE)}")
