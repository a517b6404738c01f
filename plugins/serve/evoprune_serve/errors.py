"""Errors sent to clients, with an HTTP status and a JSON body in OpenAI's error format."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from evoprune.errors import DoesNotFit, EvopruneError, OutOfMemory, UsageError, VideoError, error_record

MOST_CHARACTERS = 2000  # maximum message length, because messages may repeat text from the client
TYPES = {429: "rate_limit_error"}  # by status; for all other statuses, see `ApiError.body`
CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    429: "rate_limit_exceeded",
}


class ApiError(Exception):
    """An error sent to the client in OpenAI's format.

    Args:
        param: The name of the invalid request field, or None.
        code: A short machine-readable error name. The default depends on the status.
        headers: Additional response headers.
        record: The error as in a record of `evoprune ask`, or None if it is an error of the API.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        record: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = _text(message)
        self.param = param and _text(param)
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})
        self.record = record

    @property
    def codes(self) -> list[str]:
        """The code for a log line, if there is one."""
        return [self.code] if self.code else []

    @property
    def body(self) -> dict[str, Any]:
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = TYPES.get(self.status, usual)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _text(said: str) -> str:
    """Make an error message safe to send. Messages may quote client text, which can be long or contain lone surrogates."""
    if len(said) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        said = f"{said[:half]}…{said[-half:]}"
    return said.encode("utf-8", "backslashreplace").decode()


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error for an invalid request (status 400)."""
    return ApiError(400, message, param=param, code=code)


def full(retry_s: int) -> ApiError:
    """Return the error for a request rejected because of overload. The client may retry after `retry_s` seconds."""
    return ApiError(429, "too many requests are waiting: try again later", headers={"Retry-After": str(retry_s)})


def ending() -> ApiError:
    """Return the error for a request that can't be answered before the server shuts down."""
    return ApiError(
        503, "the server is shutting down: try again later", code="shutting_down", headers={"Retry-After": "10"}
    )


def plain(status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> ApiError:
    """Return a generic error for an HTTP status. The default message is the standard phrase, such as "Not Found"."""
    return ApiError(status, detail or HTTPStatus(status).phrase, headers=headers)


def told(problem: BaseException, names: Mapping[str, str]) -> ApiError:
    """Convert an exception to the error shown to the client.

    Unexpected exceptions are not described to clients because their messages may contain private data.

    Args:
        names: Maps each local path to the name shown to the client.
    """
    if isinstance(problem, ApiError):
        return problem
    if not isinstance(problem, EvopruneError):
        return ApiError(
            500, "the server failed: this is a bug; see the server's log for details", code="internal_error"
        )
    message, hint = problem.message, problem.hint or ""
    for path, name in names.items():
        message, hint = message.replace(path, name), hint.replace(path, name)
    record = error_record(problem) | {"message": message, "hint": hint or None}
    if hint:
        message += f" ({hint})"
    statuses = {
        OutOfMemory: (413, "out_of_memory"),
        VideoError: (400, "invalid_video"),
        DoesNotFit: (400, "context_length_exceeded"),
        UsageError: (400, "invalid_value"),
    }
    status, code = next((to for kind, to in statuses.items() if isinstance(problem, kind)), (500, problem.type))
    return ApiError(status, message, code=code, record=record)
