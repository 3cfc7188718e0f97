"""Every error in OpenAI's shape: one sentence, the field, and what kind of error it is."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from rondo_govern.rules import Denied
from rondo_serve.api.bodies import UNSUPPORTED, ExitBody
from rondo_serve.api.replies import ErrorReply
from rondo_serve.requests import Busy, Closed, Refused

RETRY_CLOSED = 5
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
NESTED: dict[str, type[BaseModel]] = {"exit": ExitBody}
# Names of the ways a value may be written, which pydantic puts into the path of an error.
BRANCHES = ("str", "list", "constrained-str", "function", "float", "int", "dict", "none")


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: What is wrong, where, and what to do.
        param: The field that is wrong.
        code: OpenAI's word for it.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = KINDS.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def of_engine(error: Refused | Denied | Busy | Closed) -> ApiError:
    """Return the answer to a request that the engine did not take."""
    match error:
        case Refused():
            return ApiError(400, str(error), error.param)
        case Denied():
            return of_denied(error)
        case Busy():
            wait = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=wait)
        case _:
            return closed()


def of_denied(error: Denied) -> ApiError:
    """Return the answer to a request that policy, key or quota does not allow."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return ApiError(error.status, str(error), error.param, error.code, headers)


def unrecorded() -> ApiError:
    """Return what is said in place of the end of an answer that cannot be recorded."""
    message = "the answer is not told to the end, since the audit log cannot be written: ask again"
    return ApiError(503, message, code="no_audit", headers={"retry-after": str(RETRY_CLOSED)})


def closed() -> ApiError:
    """Return the answer of a server that takes nothing more."""
    message = "the server takes no more requests: it shuts down or has failed; ask another one"
    return ApiError(503, message, code="closed", headers={"retry-after": str(RETRY_CLOSED)})


def of_validation(error: ValidationError, body: type[BaseModel]) -> ApiError:
    """Return the answer to a body that does not have the shape it must have."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = min(found, key=urgency)
    loc = first["loc"]
    # An error without a place in the body is a body that is no object.
    if not loc:
        return ApiError(400, "the body must be a JSON object, as {...}")
    param = path_of(loc)
    name = str(loc[0])
    if first["type"] == "unsupported":
        return ApiError(400, f"{param}: {first['msg']}: leave them", param, "unsupported")
    if first["type"] == "extra_forbidden":
        return ApiError(400, unknown(loc, param, body), param, "unknown_parameter")
    if name in UNSUPPORTED or str(loc[-1]) in UNSUPPORTED:
        return ApiError(400, f"{param} is not supported here: leave it", param, "unsupported")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing: give it", param, "missing_required_parameter")
    # A value of several possible shapes has an error for each: that of the shape that came nearest.
    same = [one for one in found if one["loc"][0] == loc[0]]
    told = max(same, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    param = path_of(told["loc"])
    reason = told["msg"][0].lower() + told["msg"][1:]
    return ApiError(400, f"{param}: {reason}", param, "invalid_value")


def urgency(error: ErrorDetails) -> int:
    """Return which of several errors is told: the lowest.

    A misspelt field comes first. Within a message it may only be a field of a kind of content that
    is not supported, and then the kind is told.
    """
    if error["type"] != "extra_forbidden":
        return 1
    return 0 if len(error["loc"]) <= 2 else 2


def path_of(loc: tuple[str | int, ...]) -> str:
    """Return the place of an error in a body, as `messages.0.role`."""
    steps = [step for step in loc[:-1] if not is_branch(step)]
    last = [] if is_branch(loc[-1]) and len(loc) > 1 else [loc[-1]]
    return ".".join(str(step)[:100] for step in [*steps, *last])


def is_branch(step: str | int) -> bool:
    """Return whether a step of an error's path names a shape, not a field."""
    return isinstance(step, str) and (step in BRANCHES or "[" in step)


def unknown(loc: tuple[str | int, ...], param: str, body: type[BaseModel]) -> str:
    """Return what is said of a field that is not known, with the nearest one that is."""
    owner = NESTED.get(str(loc[0]), body) if len(loc) == 2 else body
    near = difflib.get_close_matches(str(loc[-1]), list(owner.model_fields), n=1)
    hint = f"did you mean {near[0]}?" if near and len(loc) <= 2 else "leave it"
    return f"there is no field {param}: {hint}"


def handle_errors(app: FastAPI) -> None:
    """Let every error of an app be answered in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:200]
        message = {
            404: f"there is no {path} here: /openapi.json tells what there is",
            405: f"{path} does not take {request.method}: /openapi.json tells what it takes",
        }.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        # The server logs it with its traceback.
        return ApiError(500, "the server made a mistake: its log tells which").response()


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of errors."""
    told = {
        400: "The request is wrong: the message says what and where.",
        401: "A key is needed, or the one that was sent does not hold.",
        403: "A page of another origin asked, the server was called by another name, or the policy "
        "does not allow it.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The queue is full, or a quota is spent: ask again after Retry-After seconds.",
        500: "The server made a mistake.",
        503: "The server shuts down, has failed, or holds too many requests.",
    }
    retry = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
    return {
        status: {"model": ErrorReply, "description": told[status]}
        | ({"headers": retry} if status in (429, 503) else {})
        for status in statuses
    }
