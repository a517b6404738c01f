"""Checks each line from the client before the MCP SDK reads it.

The SDK silently drops all lines that it can't parse, so the client would wait for a reply forever.
"""

import json
from typing import Any

MAX_BYTES = 2**22  # maximum length of a line, in bytes
PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS = -32700, -32600, -32602  # error codes of JSON-RPC
TOO_LONG = f"the line is longer than {MAX_BYTES >> 20} MiB"


def checked(line: bytes) -> tuple[bytes, list[dict[str, Any]]]:
    """Check a line from the client.

    Returns:
        The line to pass on to the SDK, which is empty if there is nothing to pass on, and the JSON-RPC errors to reply with.
    """
    # The SDK also replaces invalid UTF-8, but it would split the line at a carriage return, which JSON allows as whitespace.
    text = line.decode("utf-8-sig", "replace").replace("\r", " ").strip()
    if not text:
        return b"", []
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return b"", [error(PARSE_ERROR, f"the line is not JSON: {problem}")]
    if isinstance(message, list) and message:
        return b"", [
            error(INVALID_REQUEST, "batches are not supported: send one message per line", each) for each in message
        ]
    problem = _problem(message, text)
    if problem:
        return b"", [error(*problem, message)]
    return text.encode() + b"\n", []


def error(code: int, text: str, message: Any = None) -> dict[str, Any]:
    """Return a JSON-RPC error. Its `id` is the ID of `message`, or None if this is not a request with a valid ID."""
    number = message.get("id") if isinstance(message, dict) and not _is_response(message) else None
    return {"jsonrpc": "2.0", "id": number if _is_id(number) else None, "error": {"code": code, "message": text}}


def _problem(message: Any, text: str) -> tuple[int, str] | None:
    """Return the error code and the reason why the SDK can't answer a message, or None if it can."""
    from mcp_types import jsonrpc_message_adapter
    from pydantic import ValidationError

    if not isinstance(message, dict):
        return INVALID_REQUEST, "the message is not an object"
    if message.get("jsonrpc") != "2.0":
        return INVALID_REQUEST, 'jsonrpc is not "2.0"'
    if not _is_response(message):
        method = message.get("method")
        if not isinstance(method, str):
            return INVALID_REQUEST, "method is not a string"
        # The SDK would read a request with an invalid ID as a notification, and not reply.
        if not _is_id(message.get("id")) and ("id" in message or not method.startswith("notifications/")):
            return INVALID_REQUEST, "id is not a string or an integer"
        if not isinstance(message.get("params"), dict | None):
            return INVALID_PARAMS, "params is not an object"
    try:
        jsonrpc_message_adapter.validate_json(text)
    except ValidationError as problem:
        code = INVALID_REQUEST if _is_response(message) else INVALID_PARAMS
        return code, f"the message cannot be read (is half of a surrogate pair missing?): {problem.errors()[0]['msg']}"
    return None


def _is_response(message: dict[str, Any]) -> bool:
    """Return True if a message answers a request of the server, so its ID is the server's own."""
    return "method" not in message and ("result" in message or "error" in message)


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
