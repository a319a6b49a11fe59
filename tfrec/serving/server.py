"""Server: a bundle behind a port, from the first byte read to the last request answered."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import ipaddress
import logging
import operator
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from tfrec.bundle import Bundle
from tfrec.config import ServeConfig
from tfrec.engines import LITERT, ModelsEngine, Status, engine_of
from tfrec.errors import ConfigError, SetupError
from tfrec.serving import logs, traces, versions
from tfrec.serving.app import create_app
from tfrec.serving.connections import Connection
from tfrec.serving.exposures import ExposureLog
from tfrec.serving.keys import Keys
from tfrec.serving.live import LiveRecommender
from tfrec.serving.security import Guard
from tfrec.serving.served import Served
from tfrec.serving.service import Service
from tfrec.serving.state import State, open_state
from tfrec.serving.telemetry import Observer, Telemetry

_log = logging.getLogger("tfrec.serving")

RATE = 50.0
"""Requests a second of one key or address, where others can ask and nothing else is said."""

_ENGINE = {
    "calls": "that a server was to answer",
    "failed": "to which it gave no good answer",
    "retried": "of which it was asked twice",
    "fallbacks": "that LiteRT answered for it",
}

_M_ARENA_MAX = -8  # as malloc.h has it
_GRACE = 20  # seconds for requests that are under way when the server is told to end


@dataclass(frozen=True)
class Place:
    """Where things lie beside the bundle.

    Attributes:
      folder: Of what is not in Redis.
      state: What :func:`open_state` is given.
    """

    folder: Path
    state: str

    @classmethod
    def of(cls, bundle: Path, settings: ServeConfig) -> Place:
        """The folder of the state, or one beside the bundle where that is in Redis."""
        beside = versions.state_folder(bundle)
        if settings.state.startswith(("redis://", "rediss://")):
            return cls(beside, settings.state)
        folder = Path(settings.state) if settings.state else beside
        return cls(folder, str(folder))


def serve(bundle: Path, settings: ServeConfig) -> int:
    """Runs a server until it is told to end.

    Args:
      bundle: The folder.
      settings: Of the server.

    Returns:
      The exit code, 0.

    Raises:
      ArtifactError: there is no bundle, or it is damaged.
      ConfigError: others could reach the server and there is no API key.
      SetupError: the port is in use, or the state cannot be opened.
    """
    _one_arena()
    lines = logs.start()
    signal.signal(signal.SIGTERM, _end)
    try:
        with _listening(settings) as listener, running(bundle, settings, lines) as app:
            address = _address(listener)
            server = uvicorn.Server(_uvicorn(app, settings))
            _drained_by(signal.SIGTERM, server)
            # After start-up nearly nothing becomes garbage that was there before.
            _settle()
            print(f"serving {bundle} at {address}  (Ctrl-C ends it)", flush=True)
            server.run(sockets=[listener])
    finally:
        lines.close()
    return 0


def _end(*_: object) -> None:
    """While nothing is answered yet, there is nothing to wait for, but files to close."""
    raise SystemExit(0)


def _drained_by(number: signal.Signals, server: uvicorn.Server) -> None:
    """The signal ends the server once it has answered, and what comes after it is done too.

    When it has drained, uvicorn raises the signal again for the handler that was there before its
    own. The default one would kill the process before the log of what was shown is written.
    """

    def told(*_: object) -> None:
        server.should_exit = True

    signal.signal(number, told)


@contextlib.contextmanager
def running(bundle: Path, settings: ServeConfig, lines: logs.Lines | None = None) -> Iterator[Any]:
    """The guarded application of a bundle, from start to end.

    Args:
      bundle: The folder.
      settings: Of the server.
      lines: Where a line on each request goes; None: nowhere.

    Yields:
      An ASGI application that is ready to answer.
    """
    loopback = _is_loopback(settings.host)
    place = Place.of(bundle, settings)
    versions.check(bundle)
    keys = _keys(place, settings, loopback)
    with contextlib.ExitStack() as stack:
        state = open_state(place.state, settings.synchronous)
        stack.callback(state.close)
        service = Service(bundle, settings, state, functools.partial(_engine, settings))
        service.start()
        stack.callback(service.close)
        tracer = traces.open_tracer()
        if tracer is not None:
            stack.callback(tracer.close)
        exposures = _exposures(place, settings)
        if exposures is not None:
            stack.callback(exposures.close)
        telemetry = _telemetry(service, exposures, _salt(state, settings), tracer, lines)
        app = create_app(service, settings, telemetry, exposures)
        guarded = Guard(
            app,
            keys=keys,
            required=not loopback,
            rate=settings.rate or (0.0 if loopback else RATE),
            max_body=settings.max_body,
            max_import=settings.max_import,
            loopback=loopback,
            hosts=settings.hosts,
        )
        yield Observer(guarded, telemetry)


def _engine(settings: ServeConfig, version: Bundle, own: ModelsEngine) -> ModelsEngine:
    """The engine of a version, as ``serve.engine`` names it; says whether its server is there."""
    found = engine_of(settings.engine, version, own, settings.engine_timeout)
    if said := found.check():
        _log.info(said)
    return found


def _telemetry(
    service: Service,
    exposures: ExposureLog | None,
    salt: bytes,
    tracer: Any,
    lines: logs.Lines | None,
) -> Telemetry:
    telemetry = Telemetry(None, salt, tracer, lines)
    counted: list[LiveRecommender] = []

    def changed() -> None:
        """What is counted by row of a catalog begins anew with another one."""
        telemetry.versions(dict(service.versions.shares))
        chain = service.versions.of("").chain
        if counted[-1:] != [chain]:
            counted[:] = [chain]
            telemetry.served = Served(chain.popularity)
            telemetry.served.resized(len(chain.index.ids))

    changed()
    service.versions.changed = changed
    telemetry.gauge("tfrec_waiting", "Requests that wait for the models", lambda: service.waiting)
    if service.settings.engine != LITERT:
        _add_engines(telemetry, service)
    about = "Connections ended for what came, or did not come, on them"
    telemetry.counter("tfrec_connections_refused", about, lambda: Connection.refused)
    if lines is not None:
        about = "Lines of the log for which there was no room"
        telemetry.counter("tfrec_log_lines_dropped", about, lambda: lines.dropped)
    if exposures is not None:
        about = "Rows of the log of what was shown that were lost"
        telemetry.counter("tfrec_exposures_dropped", about, lambda: exposures.dropped)
    return telemetry


def _add_engines(telemetry: Telemetry, service: Service) -> None:
    """Figures of the engines of the versions that are loaded."""

    def total(value: Callable[[Status], float]) -> Callable[[], float]:
        def now() -> float:
            engines = [version.chain.engine for version in service.versions.loaded.values()]
            return sum(value(one.status()) for one in engines if isinstance(one, ModelsEngine))

        return now

    away = total(lambda status: status.since is not None)
    telemetry.gauge("tfrec_engine_away", "Versions whose server is away", away)
    for name, about in _ENGINE.items():
        value = total(operator.attrgetter(name))
        telemetry.counter(f"tfrec_engine_{name}", f"Calls of models {about}", value)


def _exposures(place: Place, settings: ServeConfig) -> ExposureLog | None:
    if not settings.exposures:
        return None
    folder = place.folder / "exposures"
    return ExposureLog(folder, settings.exposure_rows, settings.exposure_seconds)


def _salt(state: State, settings: ServeConfig) -> bytes:
    """What is mixed into hashed ids: the same after a restart."""
    if settings.log_salt:
        return settings.log_salt.encode()
    if not state.get("log_salt"):
        state.set("log_salt", secrets.token_hex(16))
    return state.get("log_salt").encode()


def _keys(place: Place, settings: ServeConfig, loopback: bool) -> Keys | None:
    if loopback:
        return None
    path = Path(settings.keys) if settings.keys else place.folder / "keys.json"
    keys = Keys(path)
    if not keys.listing():
        raise ConfigError(
            f"serve.host = '{settings.host}' lets others in, and {path} holds no API key; make one "
            f"with: tfrec keys create --role admin --file {path}"
        )
    return keys


def _one_arena() -> None:
    """Threads share the memory that is free: glibc gives each a heap of its own else."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _settle() -> None:
    """Gives back what reading the bundle took, and leaves out of collections what stays."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _uvicorn(app: Any, settings: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        lifespan="off",
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE,
        backlog=2048,
    )


@contextlib.contextmanager
def _listening(settings: ServeConfig) -> Iterator[socket.socket]:
    """A socket at the host and port.

    Raises:
      SetupError: the port is in use, or may not be used, or there is no such address.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
    except OSError:
        raise SetupError(f"there is no address '{settings.host}'; give another --host") from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)
            listener.listen(2048)
        except OSError as error:
            raise SetupError(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
                "give another with --port"
            ) from None
        listener.setblocking(False)
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
