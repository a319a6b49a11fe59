"""Connections: what a client may take of one before the head of its request is there."""

from __future__ import annotations

import asyncio
import logging
import secrets
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tfrec.serving.answers import error_body
from tfrec.serving.security import HEADERS

HEAD_BYTES = 1 << 16
"""Of a request beside its body; a parser that is given more keeps it all, and ever more slowly."""

HEAD_SECONDS = 20.0
"""In which a head must have come, from the connection or the head's first byte on."""

READ_SECONDS = 30.0
"""In which a client that let answers pile up must have read some of them."""

_BESIDE = 8  # bytes beside each one of a body: chunks of a few bytes are odd, and allowed

_quiet = logging.getLogger("tfrec.serving.connections")
_quiet.setLevel(logging.ERROR)  # else anybody could fill the logs with what is no HTTP


class Connection(HttpToolsProtocol):
    """An HTTP/1.1 connection whose heads are bounded in bytes and in time, and so are its pauses.

    The application sees a request once its head is whole, so no limit of its own reaches a client
    that sends a head for ever, or half of one. Nor to one that asks and then reads nothing.

    Attributes:
      refused: Connections that were ended for one of these reasons, in this process.
    """

    refused = 0

    _beside = 0
    _in_head = True
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self.logger = _quiet
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._came()
        super().connection_lost(exc)  # which ends the pause of writing too

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        self._beside += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside > HEAD_BYTES:
            self._refuse(431, f"the head of the request is larger than {HEAD_BYTES} bytes")
        elif self._in_head and self._beside and self._late is None:
            self._wait()

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
        # What comes next belongs to a head, even if it is a line's end that no head begins with.
        self._in_head, self._beside = True, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Called when the client does not read."""
        super().pause_writing()
        if self._unread is None:
            self._wait_for_reader()

    def resume_writing(self) -> None:
        """Called when it reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

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
        elif not self._beside:
            self.transport.close()  # nothing was asked
        elif not self.transport.is_closing():
            self._refuse(408, "the head of the request did not come in time")

    def _wait_for_reader(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(READ_SECONDS, self._gave_up_reader, size)

    def _gave_up_reader(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._wait_for_reader()
            return
        Connection.refused += 1
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        Connection.refused += 1
        if self._answering:
            self.transport.close()  # another answer must not stand in the one under way
            return
        request_id = secrets.token_hex(8)
        body = error_body("bad_request", message, request_id)
        lines = (
            b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode()),
            *(name + b": " + value for name, value in HEADERS),
            b"x-request-id: " + request_id.encode(),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
        )
        self.transport.write(b"\r\n".join((*lines, b"", body)))
        self.transport.close()
