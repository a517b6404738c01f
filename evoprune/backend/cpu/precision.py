"""Names of dtypes, quantization and load formats, and the number of threads. Imports no torch."""

from typing import Any, Literal, get_args

from evoprune.errors import UsageError

DtypeName = Literal["bf16", "fp16", "fp32"]
Quantize = Literal["none", "int8", "int4"]
LoadFormat = Literal["auto", "dummy"]  # weights from their files, or random weights of the same shapes
DTYPE_NAMES = get_args(DtypeName)
QUANTIZE = get_args(Quantize)
LOAD_FORMATS = get_args(LoadFormat)
AUTO_THREADS = "auto"
MAX_THREADS = 256


def short_dtype(given: Any) -> Any:
    """Return the short name of a torch dtype or dtype name ("bfloat16", "torch.float16"). Other values are returned unchanged."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    text = str(given).removeprefix("torch.")
    if type(given).__name__ == "dtype":
        given = text
    return names.get(text, given)


def check_dtype(name: str) -> None:
    """Check that a dtype name is "auto" or one of `DTYPE_NAMES`. Raises UsageError otherwise."""
    if name not in ("auto", *DTYPE_NAMES):
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPE_NAMES)}")


def check_quantize(kind: str) -> None:
    """Check that a kind of quantization is one of `QUANTIZE`. Raises UsageError otherwise."""
    if kind not in QUANTIZE:
        raise UsageError(f"unknown quantisation {kind!r}", f"use {', '.join(QUANTIZE)}")


def parse_threads(given: int | str | None) -> int | str | None:
    """Return the number of threads, "auto", or None.

    Raises:
        UsageError: `given` is something else, or out of range.
    """
    if given is None or given == AUTO_THREADS:
        return given
    text = str(given)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise UsageError(f"{text!r} is not a number of threads", f"use {AUTO_THREADS}, or 1 to {MAX_THREADS}")
    return int(text)
