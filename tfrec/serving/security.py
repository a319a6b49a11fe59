"""Security: what passes between a server and the world outside: keys, limits, headers, origins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tfrec.serving.answers import error_body, error_start
from tfrec.serving.keys import Key, Keys, Role
from tfrec.serving.limits import Buckets, sender_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = Mapping[bytes, bytes]
Rule = tuple[str, str, Role | Literal["open"]]
"""A method or ``*``, a path or what it begins with and ``*``, and who may."""

RULES: tuple[Rule, ...] = (
    ("GET", "/", "open"),
    ("GET", "/operate", "open"),
    ("GET", "/static/*", "open"),
    ("GET", "/favicon.ico", "open"),
    ("GET", "/healthz", "open"),
    ("GET", "/readyz", "open"),
    ("*", "/v1/models*", "admin"),
    ("*", "/v1/stats*", "admin"),
    ("*", "/v1/items:import*", "admin"),
    ("DELETE", "/v1/users/*", "admin"),
    ("POST", "/v1/recommend", "read"),
    ("POST", "/v1/shelves", "read"),
    ("POST", "/v1/events", "write"),
    ("PUT", "/v1/items/*", "write"),
    ("DELETE", "/v1/items/*", "write"),
    ("GET", "*", "read"),
)
"""The first that fits decides; where none fits, it takes an admin."""

UNLIMITED = ("/healthz", "/readyz")  # whoever watches over the server must not be told to wait

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)
"""What every answer carries. None is about CORS: no other origin may read anything."""

_NO_STORE = (b"cache-control", b"no-store")
_CLOSE = (b"connection", b"close")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

BYTES_A_SECOND = 100_000  # a slower sender is held for an attack, or as good as one
DRAINED = 1 << 16  # bytes of a refused body that are read so that the connection can be kept
LINGER = 2.0  # seconds in which a sender whose body was refused can take his answer

_log = logging.getLogger("tfrec.serving")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered, as :func:`tfrec.serving.answers.error_body` takes it."""

    code: str
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Guard:
    """ASGI middleware at the edge: refuses what must not come in, marks what goes out.

    It is the outermost layer that answers: what the app raises ends here too, as an error that says
    nothing of the server's insides. Every request gets ``scope["state"]["request_id"]``, and one
    that came with a key ``scope["state"]["key_id"]``.

    Args:
      app: What it guards.
      keys: The keys that open, where they are required.
      required: Whether a key is needed for what is not open.
      rules: Who may do what.
      rate: Requests a second of one key, or of one address without one; 0: any number.
      max_body: Bytes of a request's body.
      max_import: The same for the paths ``imports``.
      imports: Paths whose bodies are long.
      body_seconds: In which a body must have come, and a second more for each 100 kB of it.
      loopback: Whether the server listens to its own machine only. Then nobody needs a key, and
        any page in a browser there could ask: through a name that it makes resolve to this machine
        (DNS rebinding), or with a request from elsewhere (CSRF). So such names are refused.
      hosts: Names besides those of the loopback under which the server is asked.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None = None,
        required: bool = False,
        rules: Sequence[Rule] = RULES,
        rate: float = 0.0,
        max_body: int = 1 << 20,
        max_import: int = 1 << 28,
        imports: Collection[str] = ("/v1/items:import",),
        body_seconds: float = 10.0,
        loopback: bool = True,
        hosts: Iterable[str] = (),
    ) -> None:
        self.app = app
        self.keys = keys
        self.required = required
        self.rules = [(method, path.removesuffix("*"), path, who) for method, path, who in rules]
        self.buckets = Buckets(rate) if rate else None
        self.max_body, self.max_import, self.imports = max_body, max_import, frozenset(imports)
        self.body_seconds = body_seconds
        self.loopback = loopback
        self.hosts = frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection of any kind, as ASGI has it."""
        if scope["type"] == "http":
            await self._exchange(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = dict(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(headers)
        limit = self.max_import if scope["path"] in self.imports else self.max_body
        exchange = Exchange(scope, receive, send, headers, request_id, limit, self.body_seconds)
        refusal = self._refusal(scope, headers, state) or exchange.too_large()
        if refusal is None:
            refusal = await self._passed(scope, exchange)
        if refusal is not None:
            await exchange.refuse(refusal)

    async def _passed(self, scope: Scope, exchange: Exchange) -> Refusal | None:
        """Lets the app answer; what to say in its place if it did not."""
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:  # noqa: BLE001 - whatever it is, it must not reach the client
            if exchange.refusal is None and not exchange.gone:
                _log.exception("request %s failed", exchange.request_id)
        if exchange.started or exchange.gone:
            return None
        return exchange.refusal or Refusal(
            "internal", "the server failed at this; its log says why"
        )

    def _refusal(self, scope: Scope, headers: Headers, state: dict[str, Any]) -> Refusal | None:
        """Why this request must not be answered, as far as its head tells."""
        method, path = scope["method"], scope["path"]
        refusal = self._foreign(method, headers)
        if refusal is not None:
            return refusal
        key = self._key(headers)
        if key is not None:
            state["key_id"] = key.id
        wait = 0.0 if path in UNLIMITED else self._wait(scope, key)
        if wait:
            after = b"%d" % math.ceil(wait)
            message = f"too many requests; try again in {after.decode()} s"
            return Refusal("too_many_requests", message, ((b"retry-after", after),))
        return self._forbidden(method, path, headers, key) if self.required else None

    def _wait(self, scope: Scope, key: Key | None) -> float:
        """Seconds until the sender may ask again; 0: he may now."""
        if self.buckets is None:
            return 0.0
        client = scope.get("client") or ("",)
        return self.buckets.take(f"key {key.id}" if key else sender_of(client[0]))

    def _key(self, headers: Headers) -> Key | None:
        token = _token(headers) if self.required and self.keys is not None else ""
        return self.keys.find(token) if token and self.keys is not None else None

    def _forbidden(
        self, method: str, path: str, headers: Headers, key: Key | None
    ) -> Refusal | None:
        needed = self._needed(method, path)
        if needed == "open" or (key is not None and key.may(needed)):
            return None
        if key is not None:
            message = f"this needs a key with the role {needed}, and yours has {key.role}"
            return Refusal("forbidden", message)
        told = bool(_token(headers))
        message = "this API key is not valid" if told else "an API key is needed: send it as"
        message += "" if told else " Authorization: Bearer KEY"
        challenge = b'Bearer realm="tfrec"' + (b', error="invalid_token"' if told else b"")
        return Refusal("unauthorized", message, ((b"www-authenticate", challenge),))

    def _needed(self, method: str, path: str) -> Role | Literal["open"]:
        method = "GET" if method == "HEAD" else method
        for allowed, start, whole, who in self.rules:
            fits = path.startswith(start) if start is not whole else path == whole
            if fits and allowed in (method, "*"):
                return who
        return "admin"

    def _foreign(self, method: str, headers: Headers) -> Refusal | None:
        """Why a request under this name, or from this origin, is not for us."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.loopback and not self._ours(host):
            return Refusal(
                "forbidden", "this server is asked under the name localhost; another is not known"
            )
        if self.required or method in ("GET", "HEAD", "OPTIONS"):
            return None  # with keys, a foreign page has nothing to borrow
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        authority = origin.partition("://")[2]
        if headers.get(b"sec-fetch-site") == b"cross-site" or (
            origin and authority != host and _name(authority) not in self.hosts
        ):
            return Refusal("forbidden", "a page of another site may not change anything here")
        return None

    def _ours(self, host: str) -> bool:
        name = _name(host)
        return name in LOOPBACK_NAMES or name in self.hosts


class Exchange:
    """One request and its answer on their way through the guard."""

    __slots__ = (
        *("_deadline", "_limit", "_receive", "_received", "_seconds", "_send", "_stored", "_told"),
        *("body_done", "gone", "refusal", "request_id", "started"),
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Headers,
        request_id: str,
        limit: int,
        seconds: float,
    ) -> None:
        self._receive, self._send = receive, send
        self._limit, self._seconds = limit, seconds
        self._deadline = 0.0
        self._told = headers.get(b"content-length")
        self._stored = not scope["path"].startswith("/v1/")
        self.request_id = request_id
        self._received = 0
        self.body_done = self._told in (None, b"0") and b"transfer-encoding" not in headers
        self.gone = self.started = False
        self.refusal: Refusal | None = None

    def too_large(self) -> Refusal | None:
        """Why the body that the head tells of is refused."""
        if self._told is None or (self._told.isdigit() and int(self._told) <= self._limit):
            return None
        return self._too_large()

    def _too_large(self) -> Refusal:
        return Refusal("too_large", f"the body is larger than {self._limit} bytes")

    async def receive(self) -> Message:
        """What the app reads. A body that is refused looks to it like a client that left."""
        if self.body_done:
            message = await self._receive()
            self.gone = self.gone or message["type"] == "http.disconnect"
            return message
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        return await self._next()

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline + self._received / BYTES_A_SECOND):
                message = await self._receive()
        except TimeoutError:
            self.refusal = Refusal("too_slow", "the body did not come in time")
            return {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.gone = True
            return message
        self._received += len(message.get("body", b""))
        self.body_done = not message.get("more_body", False)
        if self._received > self._limit:
            self.refusal = self._too_large()
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """What the app answers; nothing, once its request was refused."""
        if self.refusal is not None and not self.started:
            return
        if message["type"] == "http.response.start":
            self.started = True
            added = [*HEADERS, (b"x-request-id", self.request_id.encode())]
            given = message.get("headers") or ()
            if not self._stored and not any(name == b"cache-control" for name, _ in given):
                added.append(_NO_STORE)
            if not self.body_done:
                added.append(_CLOSE)  # else the rest of the body could come for ever
            message = {**message, "headers": [*given, *added]}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with an error, in such a way that who is still sending can read it.

        A connection that is closed while there is something unread is reset, and that takes the
        answer away from a client that has not read it yet. So a short body is read to its end, and
        a long one for a moment after the answer.
        """
        if refusal.code != "too_slow":
            await self._drain(1.0, DRAINED)
        self.refusal = None
        body = error_body(refusal.code, refusal.message, self.request_id)
        await self.send(dict(error_start(refusal.code, body, refusal.headers)))
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        if refusal.code != "too_slow":
            await self._drain(LINGER, None)
        await self._send({"type": "http.response.body", "body": b""})

    async def _drain(self, seconds: float, most: int | None) -> None:
        """Reads what is left of the body, unless it is known to be longer than ``most`` bytes."""
        told = int(self._told) if self._told and self._told.isdigit() else 0
        if most is not None and told > most:
            return
        read = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.body_done and (most is None or read <= most):
                    message = await self._receive()
                    read += len(message.get("body", b""))
                    self.body_done = not message.get("more_body", False)


def _request_id(headers: Headers) -> str:
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return secrets.token_hex(8)


def _token(headers: Headers) -> str:
    """The token that a request came with; empty: none."""
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get(b"x-api-key", b"").decode("latin-1").strip()


def _name(authority: str) -> str:
    """The host of ``host:port``, with the brackets of an IPv6 address."""
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return authority.partition(":")[0]
