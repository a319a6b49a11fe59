"""Connections: what a client may take of one before the head of its request is there."""

from __future__ import annotations

import asyncio
import secrets
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tfrec.serving.answers import error_body

HEAD_BYTES = 1 << 16
"""Of a request beside its body; a parser that is given more keeps it all, and ever more slowly."""

HEAD_SECONDS = 20.0
"""In which a head must have come, from the connection or the head's first byte on."""

_BESIDE = 8  # bytes beside each one of a body: chunks of a few bytes are odd, and allowed


class Connection(HttpToolsProtocol):
    """An HTTP/1.1 connection whose heads are bounded in bytes and in time.

    The application sees a request once its head is whole, so no limit of its own reaches a client
    that sends a head for ever, or half of one.
    """

    _beside = 0
    _in_head = True
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        self._beside += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside > HEAD_BYTES:
            self._refuse(431, f"the head of the request is larger than {HEAD_BYTES} bytes")
        elif self._in_head and self._late is None:
            self._wait()

    def on_message_begin(self) -> None:
        """Called by the parser at the first byte of a request."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """Called by the parser when a head is whole."""
        self._came()
        self._in_head, self._beside = False, 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser for each piece of a body."""
        self._beside = max(self._beside - (1 + _BESIDE) * len(body), 0)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser at the end of a request."""
        self._beside = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What does not read as HTTP gets an error in the form of all others."""
        self._refuse(400, "this is no HTTP request")

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_SECONDS, self._gave_up)

    def _came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _gave_up(self) -> None:
        self._late = None
        if self._answering:
            self._wait()
        elif not self.transport.is_closing():
            self._refuse(408, "the head of the request did not come in time")

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        if self._answering:
            self.transport.close()  # another answer must not stand in the one under way
            return
        body = error_body("bad_request", message, secrets.token_hex(8))
        lines = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join((*lines, "\r\n")).encode() + body)
        self.transport.close()
