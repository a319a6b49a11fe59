"""Answers: errors of the server in the one JSON form that all its rooms share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Send

STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "not_allowed": 405,
    "too_slow": 408,
    "conflict": 409,
    "too_large": 413,
    "unprocessable": 422,
    "too_many_requests": 429,
    "internal": 500,
    "unavailable": 503,
    "deadline": 504,
}
"""The code of an error -> the status of the answer that carries it."""


def error_body(code: str, message: str, request_id: str, field: str | None = None) -> bytes:
    """The JSON of an error.

    Args:
      code: A key of :data:`STATUS`.
      message: One line for a person; nothing of the server's insides.
      request_id: By which the request can be found in the logs.
      field: The part of the request that is wrong, where it is one.
    """
    error = {"code": code, "message": message}
    if field is not None:
        error["field"] = field
    return json.dumps({"error": error, "request_id": request_id}, ensure_ascii=False).encode()


def error_start(
    code: str, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> dict[str, object]:
    """The ASGI message that begins the answer with ``body``, an :func:`error_body`."""
    about = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *headers,
    ]
    return {"type": "http.response.start", "status": STATUS[code], "headers": about}


async def send_error(
    send: Send,
    code: str,
    message: str,
    request_id: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Answers an ASGI request with an error."""
    body = error_body(code, message, request_id)
    await send(error_start(code, body, headers))
    await send({"type": "http.response.body", "body": body})
