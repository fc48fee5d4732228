"""Errors of the service, and errors as answers: a JSON problem (RFC 9457) with our error class and its sentence."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from calotype.errors import (
    CalotypeError,
    FormatError,
    InputError,
    LimitError,
    ModelNotFoundError,
    TargetError,
)


class ParameterError(InputError):
    """A parameter of the query is unknown or out of range."""


class TokenError(CalotypeError):
    """The bearer token is missing or wrong."""


class SlowTransferError(CalotypeError):
    """The client took too long to send its body."""


class BusyError(CalotypeError):
    """There is no room for another request. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TimeLimitError(CalotypeError):
    """The work took longer than a request may take."""


class Problem(BaseModel):
    """The body of every answer that is an error."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    error: str
    """Class of the error."""
    detail: str
    """One sentence: what is wrong and what to do."""


MEDIA_TYPE = "application/problem+json"
# The first class that fits.
_STATUS: tuple[tuple[type[CalotypeError], HTTPStatus], ...] = (
    (ParameterError, HTTPStatus.BAD_REQUEST),
    (TokenError, HTTPStatus.UNAUTHORIZED),
    (ModelNotFoundError, HTTPStatus.NOT_FOUND),
    (SlowTransferError, HTTPStatus.REQUEST_TIMEOUT),
    (LimitError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (InputError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (FormatError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (TargetError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (BusyError, HTTPStatus.SERVICE_UNAVAILABLE),
    (TimeLimitError, HTTPStatus.GATEWAY_TIMEOUT),
)


def _answer(status: HTTPStatus, error: str, detail: str, headers: dict[str, str]) -> Response:
    problem = Problem(title=status.phrase, status=status, error=error, detail=detail)
    return Response(problem.model_dump_json(), status, headers, MEDIA_TYPE)


async def of_calotype(_: Request, error: Exception) -> Response:
    """Answer for an error that we raise on purpose."""
    status = next((s for kind, s in _STATUS if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, TokenError):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, SlowTransferError):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return _answer(status, type(error).__name__, str(error), headers)


async def of_http(_: Request, error: Exception) -> Response:
    """Answer for a path or method that is not there."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = "see /openapi.json for the paths and methods that this service has"
    return _answer(status, "HTTPException", detail, dict(error.headers or {}))


async def of_anything(_: Request, error: Exception) -> Response:
    """Answer for an error that we did not foresee; the server logs its traceback."""
    detail = "an unexpected error of the service: please report it with the service's log"
    return _answer(HTTPStatus.INTERNAL_SERVER_ERROR, type(error).__name__, detail, {})
