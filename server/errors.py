"""From an exception to a status and a body: one table for both dialects.

The native dialect (/generate and the rest) answers {"error": …, "error_type": …}, /v1 answers OpenAI's object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.responses import Response

from ..backends.errors import ChipsetError
from ..core.errors import EngineDied, InvalidRequest, Overloaded, RequestFailed, TemplateError


class CannotListen(ChipsetError):
    """The port is in use, or the address is none of this machine."""

    exit_code = 9


class NotReady(ChipsetError):
    """The model is being loaded, or the server is ending; becomes a 503."""


class ContextTooLong(InvalidRequest):
    """Prompt and new tokens exceed what the model or the server holds."""


class NotBuilt(InvalidRequest):
    """A known field that this server does not serve yet."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class WrongField(InvalidRequest):
    """A field has a value that it may not have."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class HttpError(ChipsetError):
    """What HTTP itself refuses: path, method, key, host, body."""

    def __init__(
        self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorRow:
    """How one class of errors is answered."""

    native_status: int
    native_type: str
    openai_status: int
    openai_type: str
    code: str | None = None
    prefix: str = ""
    """Put before the message in the native dialect."""
    message: str | None = None
    """Replaces the message in both."""
    headers: Mapping[str, str] = field(default_factory=dict)


_INVALID = ErrorRow(
    native_status=422,
    native_type="validation",
    openai_status=400,
    openai_type="invalid_request_error",
    prefix="Input validation error: ",
)
_RETRY = {"Retry-After": "1"}
_NO_RETRY = {"x-should-retry": "false"}

TABLE: tuple[tuple[type[BaseException], ErrorRow], ...] = (
    (
        ContextTooLong,
        ErrorRow(
            native_status=422,
            native_type="validation",
            openai_status=400,
            openai_type="invalid_request_error",
            code="context_length_exceeded",
            prefix="Input validation error: ",
        ),
    ),
    (
        TemplateError,
        ErrorRow(
            native_status=422,
            native_type="template_error",
            openai_status=400,
            openai_type="invalid_request_error",
            prefix="Template error: ",
        ),
    ),
    (InvalidRequest, _INVALID),
    (
        Overloaded,
        ErrorRow(
            native_status=429,
            native_type="overloaded",
            openai_status=429,
            openai_type="rate_limit_error",
            code="rate_limit_exceeded",
            message="Model is overloaded",
            headers=_RETRY,
        ),
    ),
    (
        NotReady,
        ErrorRow(
            native_status=503,
            native_type="unhealthy",
            openai_status=503,
            openai_type="service_unavailable",
            headers=_RETRY,
        ),
    ),
    (
        EngineDied,
        ErrorRow(
            native_status=503,
            native_type="generation",
            openai_status=503,
            openai_type="service_unavailable",
            code="engine_died",
            message="The engine ended while it worked on this request",
            headers=_RETRY,
        ),
    ),
    (
        RequestFailed,
        ErrorRow(
            native_status=424,
            native_type="generation",
            openai_status=500,
            openai_type="server_error",
            prefix="Request failed during generation: ",
            headers=_NO_RETRY,
        ),
    ),
)
"""The first class that an exception is an instance of wins."""

_BUG = ErrorRow(
    native_status=500,
    native_type="internal",
    openai_status=500,
    openai_type="server_error",
    message="Internal server error",
    headers=_NO_RETRY,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A rendered error."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    error_type: str

    def response(self) -> Response:
        """As an HTTP response."""
        return Response(self.body, self.status, dict(self.headers), media_type="application/json")


def is_openai(path: str) -> bool:
    """Whether errors of this path have OpenAI's shape."""
    return path.startswith("/v1/") or path == "/v1"


def render(error: BaseException, *, openai: bool) -> Answer:
    """The one place where an exception becomes bytes. What is in no row is a bug, and says nothing of itself."""
    if isinstance(error, HttpError):
        row = ErrorRow(
            native_status=error.status,
            native_type=error.kind,
            openai_status=error.status,
            openai_type=error.kind,
            headers=error.headers,
        )
    else:
        row = next((row for kind, row in TABLE if isinstance(error, kind)), _BUG)
    # what a client sent may be quoted in it, and need not be Unicode
    message = (row.message or str(error)).encode("utf-8", "backslashreplace").decode()
    if openai:
        status, kind = row.openai_status, row.openai_type
        param = getattr(error, "param", None)
        body = {"message": message, "type": kind, "param": param, "code": row.code}
        encoded = msgspec.json.encode({"error": body})
    else:
        status, kind = row.native_status, row.native_type
        encoded = msgspec.json.encode({"error": row.prefix + message, "error_type": kind})
    return Answer(status=status, body=encoded, headers=row.headers, error_type=row.native_type)
