"""App: the HTTP of a server: paths, bodies and answers. What they mean is the service's matter."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Match, Mount, Route
from starlette.staticfiles import StaticFiles

import tfrec
from tfrec.config import ServeConfig
from tfrec.errors import InputError, SetupError, TfrecError
from tfrec.serving import asking, openapi, schemas
from tfrec.serving.answers import STATUS, error_body
from tfrec.serving.asking import Ask
from tfrec.serving.exposures import ExposureLog, Shown
from tfrec.serving.schemas import RecommendBody, ShelvesBody
from tfrec.serving.service import (
    Answer,
    BusyError,
    ClosingError,
    LateError,
    Service,
    attributes_of,
)
from tfrec.serving.state import Event, Item
from tfrec.serving.telemetry import CONTENT_TYPE, Telemetry
from tfrec.serving.versions import Version

WEB = Path(__file__).parent / "web"
EVENTS = ("view", "click", "like", "dislike", "hide", "rating", "purchase")
_LINES = 64  # of an import, put together
_NAMES = {status: code for code, status in STATUS.items()}
_EVENTS = TypeAdapter(list[schemas.EventBody])

B = TypeVar("B", bound=BaseModel)


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field


class App:
    """The handlers of all paths.

    Args:
      service: What answers.
      settings: Of the server.
      telemetry: What counts and times.
      exposures: Where what was shown is written; None: nowhere.
    """

    def __init__(
        self,
        service: Service,
        settings: ServeConfig,
        telemetry: Telemetry,
        exposures: ExposureLog | None,
    ) -> None:
        self.service, self.settings = service, settings
        self.telemetry, self.exposures = telemetry, exposures
        self.started = time.monotonic()

    # --- recommendations -------------------------------------------------------------------------

    async def recommend(self, request: Request) -> Response:
        """The best items for one person."""
        body = await self._body(request, RecommendBody)
        answer = await self._asked(request, body, ())
        return self._items(request, answer, body.user_id)

    async def shelves(self, request: Request) -> Response:
        """Several lists for one person."""
        body = await self._body(request, ShelvesBody)
        answer = await self._asked(request, body, tuple(dict.fromkeys(body.shelves)))
        self._shown(request, answer, body.user_id)
        shelves = asking.shelf_answer(answer.lists, answer.version.chain)
        return self._told(request, {"shelves": shelves, "model_version": answer.version.name})

    async def search(self, request: Request) -> Response:
        """Items by words."""
        words = _text(request, "q", self.settings.max_text).strip()
        if not words:
            raise RefusedError("bad_request", "q is empty; say what to look for", "q")
        k, user = self._k(request), _text(request, "user_id", 512) or None

        def find(version: Version, wanted: Any, ask: Ask) -> Any:
            return asking.search(version.chain, words, k, wanted)

        return await self._look(request, user, k, find)

    async def similar(self, request: Request) -> Response:
        """The items most like one."""
        item_id, k = request.path_params["item_id"], self._k(request)
        user = _text(request, "user_id", 512) or None

        def find(version: Version, wanted: Any, ask: Ask) -> Any:
            row = _known_row(version, item_id)
            return asking.similar(version.chain, row, k, version.chain.asked([wanted]))

        return await self._look(request, user, k, find)

    async def popular(self, request: Request) -> Response:
        """What most have met."""
        k, user = self._k(request), _text(request, "user_id", 512) or None

        def find(version: Version, wanted: Any, ask: Ask) -> Any:
            return asking.popular(version.chain, k, version.chain.asked([wanted]))

        return await self._look(request, user, k, find)

    async def _asked(
        self, request: Request, body: RecommendBody, shelves: tuple[Any, ...]
    ) -> Answer:
        self._check(body)
        _stages(request).mark("parse")
        _stages(request).user_id = body.user_id or ""
        async with asyncio.timeout(self.settings.deadline):
            answer = await self.service.ask(body, _id(request), shelves)
        return self._timed(request, answer)

    async def _look(
        self, request: Request, user: str | None, k: int, find: Callable[..., Any]
    ) -> Response:
        _stages(request).mark("parse")
        _stages(request).user_id = user or ""
        waiting = self.service.look(user, _id(request), k, find)
        async with asyncio.timeout(self.settings.deadline):
            answer = await asyncio.wrap_future(waiting)
        return self._items(request, self._timed(request, answer), user)

    def _timed(self, request: Request, answer: Answer) -> Answer:
        stages = _stages(request)
        for span in answer.spans:
            stages.add(*span)
        stages.model_version = answer.version.name
        return answer

    def _items(self, request: Request, answer: Answer, user: str | None) -> Response:
        self._shown(request, answer, user)
        items = answer.lists["items"].items
        return self._told(request, {"items": items, "model_version": answer.version.name})

    def _shown(self, request: Request, answer: Answer, user: str | None) -> None:
        """Counts and logs the lists of an answer."""
        for some in answer.lists.values():
            sources = [item["source"] for item in some.items]
            self.telemetry.served.record(some.rows, sources, some.diversity)
            if self.exposures is not None and some.items:
                self.exposures.record(
                    Shown(
                        request_id=_id(request),
                        user_id=user or "",
                        item_ids=[item["item_id"] for item in some.items],
                        scores=[item["score"] for item in some.items],
                        propensities=some.propensity.tolist(),
                        sources=sources,
                        policy=answer.version.policy,
                        model_version=answer.version.name,
                        timestamp=time.time(),
                    )
                )

    def _check(self, body: RecommendBody) -> None:
        limits = self.settings
        self._within("k", body.k, limits.max_k)
        self._within("profile", len(body.profile or ""), limits.max_text, " characters")
        values = sum(map(len, body.filters.values())) + len(body.filters)
        for name, count in (
            ("history", len(body.history)),
            ("exclude", len(body.exclude)),
            ("include", len(body.include)),
            ("filters", values),
        ):
            self._within(name, count, limits.max_ids, " entries")
        if body.profile and not self._reads_texts:
            raise RefusedError("unprocessable", "this model reads no texts: leave out profile")

    @property
    def _reads_texts(self) -> bool:
        return any(v.chain.text.shape[1] for v in self.service.versions.loaded.values())

    def _within(self, name: str, value: int, most: int, of: str = "") -> None:
        if value > most:
            raise RefusedError("unprocessable", f"{name} is {value}{of}; at most {most}{of}", name)

    def _k(self, request: Request) -> int:
        k = self._number(request, "k", "10")
        self._within("k", k, self.settings.max_k)
        return k

    def _number(self, request: Request, name: str, default: str) -> int:
        told = request.query_params.get(name, default)
        if not told.isascii() or not told.isdigit() or len(told) > 9 or not int(told):
            message = f"{name} is a whole number from 1, not '{told[:40]}'"
            raise RefusedError("unprocessable", message, name)
        return int(told)

    # --- events and users ------------------------------------------------------------------------

    async def events(self, request: Request) -> Response:
        """Takes in what people did."""
        raw = await request.body()
        text = raw.lstrip()
        if not text:
            raise RefusedError("bad_request", "the body is empty; send an event or a list of them")
        many = text[:1] == b"["
        try:
            found = _EVENTS.validate_json(text if many else b"[" + text + b"]")
        except ValidationError as error:
            raise _problem(error, 0 if many else 1) from None
        self._within("events", len(found), self.settings.max_bulk, " events")
        now = time.time()
        events = [self._event(told, now) for told in found]
        _stages(request).user_id = events[0].user_id if events else ""
        async with asyncio.timeout(self.settings.deadline):  # sent again, they are the same events
            new = await self._blocking(lambda: self.service.append(events))
        self.telemetry.events(e.event for e, is_new in zip(events, new, strict=True) if is_new)
        accepted = sum(new)
        return self._told(request, {"accepted": accepted, "known": len(new) - accepted})

    def _event(self, told: schemas.EventBody, now: float) -> Event:
        if told.event == "rating" and told.value is None:
            raise RefusedError("unprocessable", "a rating needs a value", "value")
        when = now if told.timestamp is None else told.timestamp
        return Event(told.event_id, told.user_id, told.item_id, told.event, when, told.value)

    async def user(self, request: Request) -> Response:
        """What is known about somebody."""
        user_id = _path_id(request, "user_id")

        def work() -> dict[str, Any]:
            history = self.service.state.history(user_id)
            gone = bool(self.service.state.forgotten([user_id]))
            version = self.service.versions.of(user_id)
            return _about_user(version, user_id, history, gone)

        return self._told(request, await self._model(work))

    async def forget(self, request: Request) -> Response:
        """Forgets somebody for good."""
        user_id = _path_id(request, "user_id")

        def work() -> int:
            events = self.service.state.forget(user_id)
            if self.exposures is not None:
                self.exposures.forget(user_id)
            return events

        events = await self._blocking(work)
        return self._told(request, {"user_id": user_id, "forgotten": True, "events": events})

    async def users(self, request: Request) -> Response:
        """Some of those who are known, for a page to pick from."""
        limit = min(self._number(request, "limit", "50"), 1000)
        wanted = _text(request, "q", 512).casefold()

        def work() -> list[dict[str, Any]]:
            version = self.service.versions.of("")
            return _some_users(version, wanted, limit, self.service.state.forgotten)

        return self._told(request, {"users": await self._model(work)})

    # --- items -----------------------------------------------------------------------------------

    async def item(self, request: Request) -> Response:
        """What is known about an item."""
        item_id = _path_id(request, "item_id")
        return self._told(request, await self._model(lambda: self._about(item_id)))

    async def put_item(self, request: Request) -> Response:
        """Adds or changes an item, which can be recommended when the answer comes."""
        item_id = _changed_id(request)
        body = await self._body(request, schemas.ItemBody)
        item = self._item(item_id, body)
        new = not await self._model(lambda: self._there(item_id))
        await asyncio.wrap_future(self.service.put_items([item]))
        self._resized()
        told = await self._model(lambda: self._about(item_id))
        return self._told(request, told, 201 if new else 200)

    async def delete_item(self, request: Request) -> Response:
        """Takes an item out."""
        item_id = _changed_id(request)
        if not await asyncio.wrap_future(self.service.delete_item(item_id)):
            raise RefusedError("not_found", f"there is no item '{item_id[:80]}'")
        self._resized()
        return self._told(request, {"item_id": item_id, "deleted": True})

    async def import_items(self, request: Request) -> Response:
        """Adds or changes many items, one JSON object on each line."""
        done, errors, number = 0, [], 0
        items: list[Item] = []
        async for line in _lines(request, self.settings.max_body):
            number += 1
            if not line.strip():
                continue
            try:
                body = schemas.ImportedItem.model_validate_json(line)
                items.append(self._item(body.item_id, body))
            except (ValidationError, RefusedError) as error:
                problem = _problem(error, 0) if isinstance(error, ValidationError) else error
                errors.append({"line": number, "message": problem.message})
            if len(items) == _LINES:
                done += await self._put_some(items, errors, number)
                items = []
        done += await self._put_some(items, errors, number)
        self._resized()
        return self._told(request, {"imported": done, "errors": errors[:1000]})

    async def _put_some(
        self, items: Sequence[Item], errors: list[dict[str, Any]], number: int
    ) -> int:
        if not items:
            return 0
        try:
            await asyncio.wrap_future(self.service.put_items(items))
            return len(items)
        except InputError as error:
            if len(items) == 1:
                errors.append({"line": number, "message": f"{items[0].item_id}: {error}"})
                return 0
        return sum([await self._put_some([item], errors, number) for item in items])

    def _item(self, item_id: str, body: schemas.ItemBody) -> Item:
        self._within("title", len(body.title), self.settings.max_text, " characters")
        self._within("text", len(body.text), self.settings.max_text, " characters")
        catalog = self.service.versions.of("").chain.catalog
        unknown = sorted(set(body.attributes) - set(catalog.attributes))
        if unknown:
            known = ", ".join(catalog.attributes) or "none"
            message = f"items have no attribute '{unknown[0][:80]}'; they have: {known}"
            raise RefusedError("unprocessable", message, "attributes")
        try:
            cells = attributes_of(body.attributes, catalog.schema.separator)
        except InputError as error:
            raise RefusedError("unprocessable", str(error), "attributes") from None
        return Item(item_id, body.title, body.text, cells, time.time())

    def _there(self, item_id: str) -> bool:
        chain = self.service.versions.of("").chain
        row = chain.catalog.row(item_id)
        return bool(row) and row not in chain.deleted

    def _about(self, item_id: str) -> dict[str, Any]:
        version = self.service.versions.of("")
        chain, row = version.chain, _known_row(version, item_id)
        return {
            "item_id": item_id,
            "title": chain.catalog.titles[row],
            "text": chain.catalog.texts[row],
            "attributes": chain.catalog.cells(row),
            "created": chain.created.get(row),
            "origin": "live" if row in chain.created else "bundle",
        }

    def _resized(self) -> None:
        chain = self.service.versions.of("").chain
        self.telemetry.served.resized(len(chain.index.ids))

    # --- the server itself -----------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """The versions of the bundle, and who gets which."""
        told = await self._blocking(self.service.versions.told)
        return self._told(request, {"versions": told})

    async def activate(self, request: Request) -> Response:
        """Gives a version a share of the users, or all of them."""
        name = request.path_params["version"]
        raw = await request.body()
        body = schemas.ActivateBody() if not raw.strip() else _parsed(raw, schemas.ActivateBody)
        known = {one["version"] for one in self.service.versions.told()}
        if name not in known:
            there = ", ".join(sorted(known))
            raise RefusedError(
                "not_found", f"there is no version '{name[:40]}'; there are: {there}"
            )
        try:
            await self._blocking(lambda: self.service.activate(name, body.share))
        except SetupError:
            raise
        except TfrecError:
            message = f"version {name} cannot be loaded, and what was served goes on; see the log"
            raise RefusedError("conflict", message) from None
        return await self.models(request)

    async def catalog(self, request: Request) -> Response:
        """What a page needs to know of the items."""

        def work() -> dict[str, Any]:
            chain = self.service.versions.of("").chain
            columns = chain.catalog.schema.vocabularies
            return {
                "items": len(chain.index.ids),
                "attributes": {name: chain.catalog.values(name)[:100] for name in columns},
                "events": list(EVENTS),
                "languages": ["en", "zh"],
                "text": bool(chain.text.shape[1]),
                "writable": True,
                "diversity": self.service.versions.of("").steps.diversity,
            }

        return self._told(request, await self._model(work))

    async def stats(self, request: Request) -> Response:
        """Figures of the running server."""

        def work() -> dict[str, Any]:
            kind = "redis" if self.settings.state.startswith("redis") else "sqlite"
            return {
                "uptime": time.monotonic() - self.started,
                "memory_mb": round(_memory() / 1e6, 1),
                "versions": self.service.versions.told(),
                "state": {**self.service.state.counts(), "kind": kind},
                "waiting": self.service.waiting,
            }

        told = await self._blocking(work)
        return self._told(request, {**self.telemetry.stats(), **told})

    async def healthz(self, request: Request) -> Response:
        """Whether the process lives."""
        return self._told(request, {"status": "ok", "version": tfrec.__version__})

    async def readyz(self, request: Request) -> Response:
        """Whether it can answer."""
        async with asyncio.timeout(self.settings.deadline):
            ready = await self._blocking(lambda: self.service.ready)
        if not ready:
            raise RefusedError("unavailable", "not ready to answer")
        return self._told(request, {"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads."""
        return Response(self.telemetry.render(), media_type=CONTENT_TYPE)

    # --- how all of them work --------------------------------------------------------------------

    async def _body(self, request: Request, model: type[B]) -> B:
        return _parsed(await request.body(), model)

    async def _blocking(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def _model(self, work: Callable[[], Any]) -> Any:
        async with asyncio.timeout(self.settings.deadline):
            return await asyncio.wrap_future(self.service.call(work))

    def _told(self, request: Request, content: Mapping[str, Any], status: int = 200) -> Response:
        body = to_json({**content, "request_id": _id(request)}, inf_nan_mode="null")
        return Response(body, status, media_type="application/json")


def _parsed(raw: bytes, model: type[B]) -> B:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise _problem(error, 0) from None


def _problem(error: ValidationError, skip: int) -> RefusedError:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]][skip:]
    if first["type"] == "json_invalid":
        return RefusedError("bad_request", f"the body is not JSON: {first['msg']}")
    field = ".".join(place) or "body"
    message = first["msg"].removeprefix("Value error, ")
    return RefusedError("unprocessable", f"{field}: {message}"[:300], field)


def _id(request: Request) -> str:
    found: str = request.scope["state"]["request_id"]
    return found


def _stages(request: Request) -> Any:
    return request.scope["state"]["stages"]


def _text(request: Request, name: str, most: int) -> str:
    told = request.query_params.get(name, "")
    if len(told) > most:
        raise RefusedError(
            "unprocessable", f"{name} has {len(told)} characters; at most {most}", name
        )
    return told


def _path_id(request: Request, name: str) -> str:
    found: str = request.path_params[name]
    if not found or len(found) > 512 or "\0" in found:
        raise RefusedError("unprocessable", f"{name} has 1 to 512 characters", name)
    return found


def _changed_id(request: Request) -> str:
    if request.path_params["item_id"].endswith("/similar"):  # which can be asked for alone
        raise HTTPException(405)
    return _path_id(request, "item_id")


def _known_row(version: Version, item_id: str) -> int:
    row = version.chain.catalog.row(item_id)
    if not row or row in version.chain.deleted:
        raise RefusedError("not_found", f"there is no item '{item_id[:80]}'")
    return row


def _about_user(
    version: Version, user_id: str, history: Sequence[Event], gone: bool
) -> dict[str, Any]:
    chain = version.chain
    catalog = chain.catalog
    row = -1 if gone else chain.users.row(user_id)
    return {
        "user_id": user_id,
        "known": bool(history) or row >= 0,
        "profile": chain.users.texts[row] if row >= 0 else "",
        "history": [
            {
                "event_id": e.event_id,
                "item_id": e.item_id,
                "event": e.event,
                "timestamp": e.timestamp,
                "value": e.value,
                "title": catalog.titles[catalog.row(e.item_id)],
            }
            for e in history
        ],
        "earlier": _earlier(version, row) if row >= 0 else [],
    }


def _earlier(version: Version, row: int) -> list[dict[str, Any]]:
    """What the bundle knows of a user, oldest first."""
    known, catalog = version.chain.interactions, version.chain.catalog
    own = slice(int(known.offsets[row]), int(known.offsets[row + 1]))
    return [
        {
            "item_id": catalog.ids[item],
            "title": catalog.titles[item],
            "event": known.event_names[event],
            "timestamp": when,
            "value": None if rating != rating else rating,
        }
        for item, event, when, rating in zip(
            known.item[own].tolist(),
            known.event[own].tolist(),
            known.timestamp[own].tolist(),
            known.rating[own].tolist(),
            strict=True,
        )
    ]


def _some_users(
    version: Version, wanted: str, limit: int, forgotten: Callable[[Sequence[str]], set[str]]
) -> list[dict[str, Any]]:
    chain = version.chain
    out: list[dict[str, Any]] = []
    counts = chain.interactions.offsets
    for row, user_id in enumerate(chain.users.ids):
        if len(out) == limit:
            break
        profile = chain.users.texts[row]
        if wanted and wanted not in user_id.casefold() and wanted not in profile.casefold():
            continue
        events = int(counts[row + 1] - counts[row])
        out.append({"user_id": user_id, "events": events, "profile": profile})
    gone = forgotten([str(one["user_id"]) for one in out])
    return [one for one in out if one["user_id"] not in gone]


async def _lines(request: Request, longest: int) -> AsyncIterator[bytes]:
    rest, number = bytearray(), 1
    async for chunk in request.stream():
        *ends, begin = chunk.split(b"\n")
        for end in ends:
            yield bytes(rest + end)
            rest.clear()
            number += 1
        rest += begin
        if len(rest) > longest:
            message = f"line {number} is longer than {longest} bytes; the lines before it were put"
            raise RefusedError("too_large", message)
    if rest:
        yield bytes(rest)


def _memory() -> int:
    """Bytes of memory that the process has now."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- putting it together -------------------------------------------------------------------------

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    service: Service,
    settings: ServeConfig,
    telemetry: Telemetry,
    exposures: ExposureLog | None = None,
) -> Starlette:
    """The application, without what guards it.

    Args:
      service: Started.
      settings: Of the server.
      telemetry: What counts and times.
      exposures: Where what was shown is written; None: nowhere.
    """
    app = App(service, settings, telemetry, exposures)
    paths: list[tuple[str, str, Handler, type[BaseModel] | None, type[BaseModel] | None]] = [
        ("POST", "/v1/recommend", app.recommend, RecommendBody, schemas.Items),
        ("POST", "/v1/shelves", app.shelves, ShelvesBody, None),
        ("POST", "/v1/events", app.events, schemas.EventBody, None),
        ("GET", "/v1/search", app.search, None, schemas.Items),
        ("GET", "/v1/popular", app.popular, None, schemas.Items),
        ("GET", "/v1/items/{item_id:path}/similar", app.similar, None, schemas.Items),
        ("POST", "/v1/items:import", app.import_items, schemas.ImportedItem, None),
        ("GET", "/v1/items/{item_id:path}", app.item, None, None),
        ("PUT", "/v1/items/{item_id:path}", app.put_item, schemas.ItemBody, None),
        ("DELETE", "/v1/items/{item_id:path}", app.delete_item, None, None),
        ("GET", "/v1/users", app.users, None, None),
        ("GET", "/v1/users/{user_id:path}", app.user, None, None),
        ("DELETE", "/v1/users/{user_id:path}", app.forget, None, None),
        ("GET", "/v1/models", app.models, None, None),
        ("POST", "/v1/models/{version}:activate", app.activate, schemas.ActivateBody, None),
        ("GET", "/v1/catalog", app.catalog, None, None),
        ("GET", "/v1/stats", app.stats, None, None),
        ("GET", "/healthz", app.healthz, None, None),
        ("GET", "/readyz", app.readyz, None, None),
        ("GET", "/metrics", app.metrics, None, None),
    ]
    description = json.dumps(
        openapi.document(
            [(m, p, h.__doc__ or "", body, answer) for m, p, h, body, answer in paths], settings
        )
    )

    async def described(request: Request) -> Response:
        return Response(description, media_type="application/json")

    routes = [Route(path, handler, methods=[method]) for method, path, handler, *_ in paths]
    routes += [
        Route("/openapi.json", described),
        Route("/", _page("index.html")),
        Route("/operate", _page("operate.html")),
    ]
    static = Mount("/static", StaticFiles(directory=WEB, check_dir=False))
    return Starlette(routes=[*routes, static], exception_handlers=_errors())


def _page(name: str) -> Handler:
    async def page(request: Request) -> Response:
        return FileResponse(WEB / name, headers={"cache-control": "no-cache"})

    return page


def _errors() -> dict[Any, Any]:
    """Every error in the one form, and nothing of the server's insides in it."""

    def answer(request: Request, code: str, message: str, field: str | None = None) -> Response:
        body = error_body(code, message, _id(request), field)
        headers = {"retry-after": "1"} if code == "unavailable" else None
        return Response(body, STATUS[code], headers, "application/json")

    async def refused(request: Request, error: Any) -> Response:
        return answer(request, error.code, error.message, error.field)

    async def wrong(request: Request, error: Any) -> Response:
        return answer(request, "unprocessable", str(error))

    async def broken(request: Request, error: Any) -> Response:
        return answer(request, "unavailable", "what is stored cannot be reached; try again soon")

    async def late(request: Request, error: Any) -> Response:
        return answer(request, "deadline", "there was no answer in time")

    async def busy(request: Request, error: Any) -> Response:
        return answer(request, "unavailable", "too many requests wait; try again soon")

    async def closing(request: Request, error: Any) -> Response:
        return answer(request, "unavailable", "the server is going down")

    async def other(request: Request, error: Any) -> Response:
        found = answer(request, _NAMES.get(error.status_code, "bad_request"), str(error.detail))
        if error.headers:
            found.headers.update(error.headers)
        if error.status_code == 405:
            found.headers["allow"] = _allowed(request)
        return found

    return {
        RefusedError: refused,
        InputError: wrong,
        SetupError: broken,
        LateError: late,
        TimeoutError: late,
        BusyError: busy,
        ClosingError: closing,
        HTTPException: other,
    }


def _allowed(request: Request) -> str:
    """The methods of a path, which are on as many routes; the router tells of the first alone."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            if route.path.endswith("/similar"):
                return "GET, HEAD"
            methods |= route.methods or set()
    return ", ".join(sorted(methods))
