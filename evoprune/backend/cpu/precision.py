"""How weights are read and held, by name, and with how many threads they are used. Imports no torch."""

from typing import Any, Literal, get_args

from evoprune.errors import UsageError

DtypeName = Literal["bf16", "fp16", "fp32"]
Quantize = Literal["none", "int8", "int4"]
LoadFormat = Literal["auto", "dummy"]  # from their files, or random ones of the same shapes
DTYPE_NAMES = get_args(DtypeName)
QUANTIZE = get_args(Quantize)
LOAD_FORMATS = get_args(LoadFormat)
AUTO_THREADS = "auto"
MAX_THREADS = 256


def short_dtype(given: Any) -> Any:
    """Return the short name of one of torch's dtypes, or of its name ("bfloat16", "torch.float16"); anything else as it is."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    text = str(given).removeprefix("torch.")
    if type(given).__name__ == "dtype":
        given = text
    return names.get(text, given)


def check_dtype(name: str) -> None:
    """Raises UsageError: neither "auto" nor one of `DTYPE_NAMES`."""
    if name not in ("auto", *DTYPE_NAMES):
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPE_NAMES)}")


def check_quantize(kind: str) -> None:
    """Raises UsageError: not one of `QUANTIZE`."""
    if kind not in QUANTIZE:
        raise UsageError(f"unknown quantisation {kind!r}", f"use {', '.join(QUANTIZE)}")


def parse_threads(given: int | str | None) -> int | str | None:
    """Return a number of threads, "auto", or None. Raises UsageError: neither, or out of range."""
    if given is None or given == AUTO_THREADS:
        return given
    text = str(given)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise UsageError(f"{text!r} is not a number of threads", f"use {AUTO_THREADS}, or 1 to {MAX_THREADS}")
    return int(text)
