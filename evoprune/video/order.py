"""The natural order of names in a folder: frame2 before frame10, t_0.16 before t_0.8, t_-1.5 before t_0.5.

A point may be that of a decimal or separate two numbers, and a dash may be a minus sign or a hyphen. All names of one shape decide,
each number by itself. Names have the same shape if they are equal but for their numbers and their endings.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

# A sign, digits with single points between them, and an exponent. A dash behind a digit belongs to a date or a range, an exponent
# without a sign (s1e2) to a series.
NUMBER = re.compile(r"((?<![0-9])[-+])?([0-9]+(?:\.[0-9]+)*)(e[-+][0-9]{1,3}(?![0-9]))?")
VERSION = re.compile(r"(?:^|[^a-z])(?:v|ver|version)[ ._]?$|\.$")  # what stands before numbers whose points separate

Shape = tuple[str, ...]  # what is between the numbers of a name


@dataclass(frozen=True)
class Reading:
    """Says of a number what belongs to it, in all names of one shape."""

    signed: bool = False  # else its dash or plus is text
    decimal: bool = False  # else its points separate whole numbers, as in versions, and its exponent is text


def readings_of(names: Iterable[str]) -> dict[Shape, list[Reading]]:
    """Decide for each shape of these names how its numbers are read."""
    shapes: dict[Shape, list[list[str]]] = {}
    for name in names:
        pieces = _pieces(name)
        shapes.setdefault(tuple(pieces[::4]), []).append(pieces)
    return {shape: _readings(shape, alike) for shape, alike in shapes.items()}


def natural(name: str, readings: Mapping[Shape, list[Reading]] | None = None) -> tuple[list, str, str]:
    """Make a sort key: numbers by their values, endings last; equal values, such as 1 and 01, by the characters.

    `readings`: those of all names that are sorted (`readings_of`); without them every run of digits is a number.
    """
    pieces = _pieces(name)
    shape = tuple(pieces[::4])
    known = (readings or {}).get(shape) or [Reading()] * (len(shape) - 1)
    key = []
    text = shape[0]
    for place, reading in enumerate(known):
        sign, digits, exponent = pieces[4 * place + 1 : 4 * place + 4]
        following = shape[place + 1]
        if not reading.signed:
            text = text + sign
            sign = ""
        if reading.decimal:
            value = (Decimal(sign + digits + exponent),)
        else:
            value = tuple(Decimal(sign + part) for part in digits.split("."))
            following = exponent + following
        key += [text, value]
        text = following
    return [*key, text], _ending(name.casefold()), name


def _pieces(name: str) -> list[str]:
    """Split a name without its ending: a text, a sign, digits, an exponent, and so on, up to a text; empty where there is none."""
    name = name.casefold()
    return [piece or "" for piece in NUMBER.split(name.removesuffix(_ending(name)))]


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1]
    return "" if ending[1:].isdecimal() else ending


def _readings(shape: Shape, alike: list[list[str]]) -> list[Reading]:
    """Decide how the numbers of a shape are read. `alike`: `_pieces` of all names that have it."""
    readings = []
    for place in range(len(shape) - 1):
        signs, numbers, exponents = (set(column) for column in _columns(alike, 4 * place + 1))
        before = shape[place]
        # A dash that all names have separates, but for one behind another separator, or with nothing to separate.
        signed = len(signs) > 1 or ("-" in signs and before[-1:] in ("", "_", "="))
        readings.append(Reading(signed, _is_decimal(before, numbers, signed or any(exponents))))
    return readings


def _columns(alike: list[list[str]], first: int) -> Iterable[tuple[str, ...]]:
    return zip(*(pieces[first : first + 3] for pieces in alike), strict=True)


def _is_decimal(before: str, numbers: set[str], surely: bool) -> bool:
    """Say whether points are those of decimals. `before`: the text there; `surely`: a sign or an exponent tells that they are.

    Fractions of one length are in the same order either way. A program that drops zeros at the end writes fractions of different
    lengths; among versions such as 1.9 and 1.10, some end with a zero.
    """
    parts = [number.split(".") for number in numbers]
    if max(map(len, parts)) > 2:
        return False
    fractions = [part[1] for part in parts if len(part) == 2]
    if surely or len(set(map(len, fractions))) < 2:
        return True
    longer = [fraction for fraction in fractions if len(fraction) > 1]
    begin_with_zero = any(fraction[0] == "0" for fraction in longer)
    if VERSION.search(before):
        return begin_with_zero
    return not any(fraction[-1] == "0" for fraction in longer)
