"""Failures: how a call of a client can end without an answer.

ClientError
 ├── UnavailableError     no answer within the deadline, after however many attempts
 ├── RefusedError         the server answered that it will not, and why
 │    ├── DeniedError     401, 403: no key, a wrong one, or one with too low a role
 │    └── NotFoundError   404: there is no such item or version
 └── AnswerError          something answered that is not this server, or not of this version
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of every error of the client."""


class UnavailableError(ClientError):
    """There was no answer within the deadline: no connection, or a server with too much to do.

    Attributes:
      attempts: How often the call was sent.
      status: Of the last answer; None: there was none.
    """

    def __init__(self, message: str, attempts: int, status: int | None = None) -> None:
        super().__init__(message)
        self.attempts, self.status = attempts, status


class RefusedError(ClientError):
    """The server answered with an error.

    Attributes:
      status: HTTP's status.
      code: What kind of error: ``bad_request``, ``unprocessable``, ``conflict``, ...
      message: What is wrong, in a line.
      request_id: By which the request can be found in the server's logs.
      field: The part of the request that is wrong; None: not one alone.
    """

    def __init__(
        self, status: int, code: str, message: str, request_id: str, field: str | None = None
    ) -> None:
        super().__init__(f"{message} ({code}, status {status}, request {request_id})")
        self.status, self.code, self.message = status, code, message
        self.request_id, self.field = request_id, field


class DeniedError(RefusedError):
    """The key is missing, wrong, or of too low a role."""


class NotFoundError(RefusedError):
    """There is no such item or version."""


class AnswerError(ClientError):
    """What answered is not a server of tfrec, or one that this client does not understand."""
