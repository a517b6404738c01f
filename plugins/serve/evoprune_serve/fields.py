"""Reads the fields of JSON requests. Unknown fields are rejected because clients wouldn't notice an ignored option."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from evoprune.util import did_you_mean
from evoprune_serve.errors import refused

NUMBER = (int, float)
KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}
MOST_CHARACTERS = 60  # maximum length of a value in an error message


def json_text(value: Any) -> str:
    """Format a value for an error message: as JSON if it is short; otherwise, as a description of its type."""
    if characters(value) <= MOST_CHARACTERS:
        text = json.dumps(value, ensure_ascii=False)
        if len(text) <= MOST_CHARACTERS:
            return text
    return KINDS[type(value)]


def characters(value: Any) -> int:
    """Return a lower bound on the length of a value as JSON, without writing it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(characters, value), start=len(value))
    if isinstance(value, dict):
        return sum(map(len, value), start=sum(map(characters, value.values()), start=len(value)))
    return 1


class Fields:
    """The fields of a JSON object in a request, taken one at a time.

    Fields not taken before `end` is called are rejected. Null fields are treated as missing.
    """

    def __init__(self, value: Any, place: str = ""):
        if not isinstance(value, dict):
            raise refused(f"{place or 'the body'} is {json_text(value)}, not an object", place or None)
        self._place = place
        self._left = {name: each for name, each in value.items() if each is not None}
        self._known: set[str] = set()  # names of the fields that were asked for

    def name_of(self, field: str) -> str:
        return f"{self._place}.{field}" if self._place else field

    def take(self, field: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Take an optional field and return its value, or `default` if the field is missing.

        Raises:
            ApiError: If the value has the wrong type.
        """
        self._known.add(field)
        if field not in self._left:
            return default
        value = self._left.pop(field)
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and not {bool, object} & {*wanted}):
            words = " or ".join(KINDS[kind] for kind in wanted if not (kind is int and float in wanted))
            raise refused(
                f"{self.name_of(field)} is {json_text(value)}, not {words}", self.name_of(field), "invalid_type"
            )
        return value

    def need(self, field: str, kinds: type | tuple[type, ...]) -> Any:
        """Take a required field and return its value.

        Raises:
            ApiError: If the field is missing or its value has the wrong type.
        """
        if field not in self._left:
            raise refused(f"{self.name_of(field)} is missing", self.name_of(field), "missing_required_parameter")
        return self.take(field, kinds)

    def has(self, field: str) -> bool:
        self._known.add(field)
        return field in self._left

    def refuse(self, field: str, why: str) -> NoReturn:
        raise refused(f"{self.name_of(field)} {why}", self.name_of(field), "unsupported_value")

    def end(self, neutral: Mapping[str, Callable[[Any], bool]] | None = None) -> None:
        """Raise ApiError if any fields have not been taken.

        Args:
            neutral: Maps each field that may remain to a function that returns True if the field's value has no effect.
        """
        for field, value in self._left.items():
            name = self.name_of(field[:60])
            if field not in (neutral or {}):
                meant = did_you_mean(field, self._known).strip()
                raise refused(f"{name} is not supported here" + (meant and f"; {meant}"), name, "unsupported_parameter")
            if not neutral[field](value):
                self.refuse(field, f"is {json_text(value)}, which is not supported here")
