"""The body of a request: read within its limits, whatever its content type says, and checked."""

import asyncio
from concurrent.futures import Executor
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from rondo_serve.api.errors import ApiError, of_validation

# Time that a client has to send a body.
SECONDS = 15.0
# Bytes of a body that is checked on the loop; a larger one takes so long that others notice.
SMALL = 64_000

B = TypeVar("B", bound=BaseModel)


async def read(request: Request, body: type[B], most: int, worker: Executor) -> B:
    """Read and check a request's body, a large one on the worker's thread.

    Raises:
        ApiError: It is too large or too slow, no JSON, or not of the shape it must have.
    """
    try:
        async with asyncio.timeout(SECONDS):
            raw = await read_bytes(request, most)
    except TimeoutError as error:
        message = f"the body did not arrive within {SECONDS:.0f} seconds: send it at once"
        raise ApiError(408, message, headers={"connection": "close"}) from error
    except ClientDisconnect as error:
        raise ApiError(400, "the body broke off: send all of it") from error
    if len(raw) <= SMALL:
        return checked(raw, body)
    return await asyncio.get_running_loop().run_in_executor(worker, checked, raw, body)


def checked(raw: bytes, body: type[B]) -> B:
    """Return what the bytes of a body say.

    Raises:
        ApiError: They are no JSON, or not of the shape they must have.
    """
    try:
        found = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ApiError(400, f"the body is no JSON: {reason}", code="invalid_json") from error
    try:
        return body.model_validate(found)
    except ValidationError as error:
        raise of_validation(error, body) from error


async def read_bytes(request: Request, most: int) -> bytes:
    """Return the bytes of a body.

    Raises:
        ApiError: There are more than `most`.
    """
    raw = bytearray()
    # Counted as it comes: a length that is told may be wrong, or missing.
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > most:
            message = f"the body is larger than the {most} bytes that are taken: send less"
            raise ApiError(413, message, code="body_too_large")
    return bytes(raw)
