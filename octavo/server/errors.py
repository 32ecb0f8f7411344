"""Every failure becomes OpenAI's error object: {"error": {"message", "type", "param", "code"}}.

Client libraries map by HTTP status, people read the message, programs read `code`. Our own faults carry the request
id and nothing of the inside.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from octavo.errors import EngineDeadError, EngineError, QueueFullError, RequestError

log = logging.getLogger("octavo.server")

RETRY_SECONDS = 5
TYPES = {408: "timeout", 404: "not_found_error", 413: "request_too_large", 503: "service_unavailable"}
CODES = {408: "timeout", 404: "route_not_found", 405: "method_not_allowed", 413: "request_too_large"}
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
PYDANTIC_CODES = {"extra_forbidden": "unsupported_parameter", "missing": "missing_required_parameter"}


@dataclass(slots=True)
class Failure:
    """One answer that is an error."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON that OpenAI would send."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def anthropic_body(self, request_id: str) -> bytes:
        """The JSON that Anthropic would send."""
        named = self.param is None or self.param in self.message  # else nothing would name it in this shape
        message = self.message if named else f"{self.param}: {self.message}"
        error = {"type": ANTHROPIC_TYPES.get(self.status, "invalid_request_error"), "message": message}
        return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})

    def response(self, scope: Scope) -> Response:
        """The same as an HTTP response, in the words of the API that was asked."""
        if not scope["path"].startswith(ANTHROPIC_PATH):
            return Response(self.body(), self.status, self.headers, "application/json")
        status = 529 if self.status == 503 else self.status  # overloaded
        body = self.anthropic_body(scope["state"]["request_id"])
        return Response(body, status, self.headers, "application/json")


def failure_of(error: Exception, request_id: str) -> Failure:
    """What to answer when `error` was raised. What nobody foresaw is logged with its traceback."""
    if isinstance(error, RequestValidationError):
        return _invalid_body(error.errors())
    if isinstance(error, RequestError):
        headers = {"Retry-After": str(math.ceil(error.retry_after))} if isinstance(error, QueueFullError) else {}
        return Failure(error.status, str(error), error.type, error.param, error.code, headers)
    if isinstance(error, Refused):
        return error.failure
    if isinstance(error, EngineDeadError):
        return unavailable(f"the engine is not running: {error}", str(error.code))
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # fastapi could not decode the body and keeps the reason to itself
            return Failure(400, "the body is not JSON in UTF-8, or is nested too deeply", code="invalid_json")
        kind = TYPES.get(error.status_code, "invalid_request_error")
        code = CODES.get(error.status_code)
        return Failure(error.status_code, error.detail, kind, None, code, dict(error.headers or {}))
    log.error("request %s failed", request_id, exc_info=error)
    if isinstance(error, EngineError):
        return Failure(500, f"the engine failed on request {request_id}; others go on", error.type, None, error.code)
    return Failure(500, f"internal error; the server's log has more under request id {request_id}", "server_error")


class Refused(Exception):
    """Carries an answer that is an error."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def unavailable(message: str, code: str) -> Failure:
    """The answer of a server that cannot serve now."""
    return Failure(503, message, TYPES[503], code=code, headers={"Retry-After": str(RETRY_SECONDS)})


def install(app: FastAPI) -> None:
    """Makes `app` answer in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            verb = "no route" if error.status_code == 404 else "wrong method for"
            error = HTTPException(
                error.status_code, f"{verb} {request.method} {request.url.path:.100}; see /openapi.json", error.headers
            )
        return failure_of(error, request.state.request_id).response(request.scope)

    for kind in (RequestValidationError, RequestError, EngineError, HTTPException, Refused):
        app.add_exception_handler(kind, answer)


def _invalid_body(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The first thing that is wrong with a body, and how many more there are."""
    first = errors[0]
    kind = first["type"]
    path = _path(first["loc"])
    if kind == "json_invalid":
        return Failure(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, RequestError):
        param = ".".join(filter(None, (path, raised.param)))
        return Failure(raised.status, str(raised), raised.type, param, raised.code)
    message = f"{path or 'body'}: {first['msg']}"
    if kind == "extra_forbidden":
        message = f"{path} is not a parameter of this server: leave it out"
    elif kind == "missing" and not path:
        message = "the body is empty: send a JSON object"
    if len(errors) > 1:
        message += f" ({len(errors) - 1} more)"
    return Failure(400, message, param=path or None, code=PYDANTIC_CODES.get(kind, "invalid_value"))


def _path(loc: Sequence[str | int]) -> str:
    """("body", "messages", 0, "content", "<list>", 1) as "messages[0].content[1]": tags of unions are left out."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path
