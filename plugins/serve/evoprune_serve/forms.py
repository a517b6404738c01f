"""Reads an upload form (multipart/form-data), and writes its file to the store while it arrives."""

import re
from typing import Any
from urllib.parse import unquote

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from evoprune_serve.errors import refused
from evoprune_serve.store import Incoming

MOST_FIELDS = 8
MOST_FIELD_BYTES = 1024
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
# A file name with other characters, as some clients send it although RFC 7578 forbids it.
EXTENDED_NAME = re.compile(rb";\s*filename\*\s*=\s*\"?utf-8'[^']*'([^;\"]*)", re.IGNORECASE)


class UploadForm:
    """A form with a file called `file` and text fields.

    Parsing is slow for some data, so `write` must be called in a thread.

    Args:
        content_type: The request's Content-Type.
        incoming: Where to write the file.

    Attributes:
        fields: The values of the text fields by name.
        filename: The name of the file, or None before the file arrives.
        complete: Whether the end of the form has arrived.

    Raises:
        ApiError: If the Content-Type has no usable boundary, or another character set than UTF-8.
    """

    def __init__(self, content_type: str, incoming: Incoming):
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False
        self._incoming = incoming
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""
        self._field = ""  # name of the current text field
        self._value: bytearray | None = None  # its bytes, or None inside the file
        _, options = parse_options_header(content_type)
        _check_charset(options)
        if not options.get(b"boundary"):
            raise refused("the Content-Type of the form has no boundary")
        try:
            self._parser = python_multipart.MultipartParser(options[b"boundary"], self._callbacks())
        except FormParserError as problem:
            raise refused(f"the form is not valid: {problem}") from problem

    def write(self, data: bytes) -> None:
        """Parse the next part of the form.

        Raises:
            ApiError: If the form is invalid, or its file can't be stored.
        """
        try:
            self._parser.write(data)
        except FormParserError as problem:
            raise refused(f"the form is not valid: {problem}") from problem

    def _callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in options:
            raise refused("a part of the form has no Content-Disposition with a name")
        name = _text(options[b"name"])
        self._value = None
        if name == "file":
            if self.filename is not None:
                raise refused("the form has more than one file", "file")
            extended = EXTENDED_NAME.search(disposition)
            self.filename = unquote(_text(extended[1])) if extended else _text(options.get(b"filename", b""))
            return
        if b"filename" in options:
            raise refused(f"the file is in the field {name[:60]}; send it in the field file", name[:60])
        _, kind_options = parse_options_header(self._headers.get(b"content-type", b""))
        _check_charset(kind_options)
        if len(self.fields) >= MOST_FIELDS:
            raise refused(f"the form has more than {MOST_FIELDS} fields")
        if name in self.fields:
            raise refused(f"the form has the field {name[:60]} twice", name[:60])
        self._field = name
        self._value = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._incoming.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MOST_FIELD_BYTES:
            raise refused(f"the field {self._field[:60]} has more than {MOST_FIELD_BYTES} bytes", self._field[:60])

    def _on_part_end(self) -> None:
        if self._value is not None:
            self.fields[self._field] = _text(self._value)

    def _on_end(self) -> None:
        self.complete = True


def _check_charset(options: dict[bytes, bytes]) -> None:
    charset = _text(options.get(b"charset", b"utf-8"))
    if charset.lower() not in CHARSETS:
        raise refused(f"the character set {charset[:60]} is not supported: send UTF-8")


def _text(data: bytes | bytearray) -> str:
    return data.decode(errors="replace")
