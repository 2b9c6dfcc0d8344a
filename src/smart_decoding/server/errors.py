"""Errors in OpenAI's shape, with the status that its clients expect.

The shape: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from smart_decoding.errors import CapacityError, SmartError

log = logging.getLogger("smart.server")

_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
}
RETRY_AFTER = 5  # seconds, by default


class ApiError(Exception):
    """An answer other than 200.

    retry_after: seconds; every 429 and 503 has them, as its cause may pass.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status)
        self.param = param
        self.headers: dict[str, str] = {}
        if status in (429, 503):
            self.headers["Retry-After"] = str(retry_after or RETRY_AFTER)
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        if self.status == 429:
            kind = "rate_limit_error"
        else:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        message = self.message.encode("utf-8", "replace").decode()  # it may quote lone surrogates
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The same with status and headers."""
        return JSONResponse(self.body, self.status, self.headers)


def shutting_down() -> ApiError:
    """Return the error of requests that arrive or still wait when the server ends."""
    return ApiError(503, "the server is shutting down", "shutting_down")


def gone() -> ApiError:
    """Return the error of a client that has hung up: it is for the log."""
    return ApiError(499, "the client has gone")


def of_smart_error(error: SmartError) -> ApiError:
    """Blame the request for what the engine refuses."""
    code = "context_length_exceeded" if isinstance(error, CapacityError) else "invalid_value"
    name = str(error).partition("=")[0]
    return ApiError(400, str(error), code, name if name.isidentifier() else None)


def install(app: FastAPI) -> None:
    """Make every error of `app` come out in the one shape."""

    async def respond(_: Request, error: Exception) -> JSONResponse:
        return _api_error(error).response

    for kind in (ApiError, SmartError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, respond)


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SmartError):
        return of_smart_error(error)
    if isinstance(error, HTTPException):
        no_route = error.status_code == 404  # anything else not found is an ApiError
        message = "there is no such route here: GET /openapi.json lists them"
        found = ApiError(error.status_code, message if no_route else str(error.detail))
        found.headers |= error.headers or {}  # a 405 says what is allowed
        return found
    if isinstance(error, RequestValidationError):
        return of_validation(error.errors())
    log.error("request failed", exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the first error; of a value that may be of several types, the deepest."""
    field = errors[0]["loc"][:2]
    first = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    kind = first["type"]
    # Behind "body" and the field's name "list[...]" is a type that was tried.
    path = [
        part for i, part in enumerate(map(str, first["loc"])) if i and (i == 1 or "[" not in part)
    ]
    param = path[0] if path else None
    if kind == "extra_forbidden":
        return ApiError(400, f"{'.'.join(path)} is not supported", "unsupported_parameter", param)
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(path) or 'the body'}: {reason}", "invalid_value", param)
