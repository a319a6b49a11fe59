"""Clients: one that waits for answers, and one to be awaited. All else they share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from tfrec.client import calls
from tfrec.client.answers import (
    Accepted,
    Event,
    Forgotten,
    Imported,
    Item,
    NewItem,
    Recommendations,
    Shelves,
    User,
    Version,
)
from tfrec.client.attempts import Attempts
from tfrec.client.calls import Ask, Call
from tfrec.client.failures import UnavailableError

T = TypeVar("T")

ADDRESS = "http://127.0.0.1:8080"
TIMEOUT, DEADLINE = 5.0, 15.0
IMPORT = 300.0  # seconds for some items of an import, whose texts must be encoded


class _Shared:
    """What both clients are told, and what httpx makes of it."""

    def __init__(
        self,
        address: str = ADDRESS,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
    ) -> None:
        url = httpx.URL(address)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"'{address}' is no address of a server, such as {ADDRESS}")
        self.address, self.timeout, self.deadline = address, timeout, deadline
        headers = {"accept": "application/json", "user-agent": "tfrec-client"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._told = {"base_url": url, "headers": headers}

    def _attempts(self, call: Call[T], deadline: float | None) -> Attempts[T]:
        return Attempts(call, self.timeout, self.deadline if deadline is None else deadline)

    def _attempt_within(self, call: Call[T], deadline: float | None, least: float) -> Attempts[T]:
        """For calls that take long: one attempt may take all of the time."""
        seconds = max(self.deadline, least) if deadline is None else deadline
        return Attempts(call, seconds, seconds)


class Client(_Shared):
    """Asks a server, and waits for its answers. Threads may share one.

    What brings no answer is asked again, with growing pauses, until the deadline: after broken
    connections, and after 429, 502, 503 and 504, as late as the server's Retry-After says. Every
    call may be repeated without harm; events carry ids of their own, and so count once.

    Args:
      address: The server's, with http or https.
      key: An API key, where the server wants one.
      timeout: Seconds that one attempt may take.
      deadline: Seconds that a call may take with all its attempts; each call can be given its own.

    Raises:
      ValueError: the address is none.

    Every method raises :class:`UnavailableError`, :class:`RefusedError` or :class:`AnswerError`,
    all of them a :class:`ClientError`.

    Example:
      >>> with Client() as client:  # doctest: +SKIP
      ...     client.events(Event("42", "50", "like"))
      ...     client.recommend(user_id="42", k=3, explain=True).ids
      ['181', '172', '174']
    """

    def __init__(
        self,
        address: str = ADDRESS,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
    ) -> None:
        super().__init__(address, key, timeout=timeout, deadline=deadline)
        self._http = httpx.Client(**self._told)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def recommend(self, *, deadline: float | None = None, **ask: Unpack[Ask]) -> Recommendations:
        """The best items for one person; see :class:`Ask` for what can be said.

        Example:
          >>> client.recommend(  # doctest: +SKIP
          ...     history=["50", "181"], profile="space adventures", filters={"genres": ["Sci-Fi"]}
          ... ).ids
          ['172', '1196']
        """
        return self._run(self._attempts(calls.recommend(ask), deadline))

    def shelves(
        self,
        which: Sequence[str] | None = None,
        *,
        deadline: float | None = None,
        **ask: Unpack[Ask],
    ) -> Shelves:
        """Several lists for one person; None: all of ``for_you``, ``because``, ``new_to_you``, ...

        Example:
          >>> [s.key for s in client.shelves(["for_you"], user_id="42").shelves]  # doctest: +SKIP
          ['for_you']
        """
        return self._run(self._attempts(calls.shelves(which, ask), deadline))

    def events(self, events: Event | Iterable[Event], *, deadline: float | None = None) -> Accepted:
        """Tells what people did; it counts in the very next recommendation.

        Many are sent in several requests; the deadline is that of each.

        Example:
          >>> client.events([Event("42", "50", "rating", value=5)])  # doctest: +SKIP
          Accepted(accepted=1, known=0)
        """
        found = (self._run(self._attempts(call, deadline)) for call in calls.events(events))
        return calls.summed_events(found)

    def search(
        self, q: str, *, k: int = 10, user_id: str | None = None, deadline: float | None = None
    ) -> Recommendations:
        """Items by words, mixed with a user's taste if one is named.

        Example:
          >>> client.search("a heist that goes wrong", k=1).items[0].title  # doctest: +SKIP
          'Reservoir Dogs (1992)'
        """
        return self._run(self._attempts(calls.look("/v1/search", k, user_id, q=q), deadline))

    def similar(
        self,
        item_id: str,
        *,
        k: int = 10,
        user_id: str | None = None,
        deadline: float | None = None,
    ) -> Recommendations:
        """The items most like one."""
        call = calls.look(f"{calls.at('items', item_id)}/similar", k, user_id)
        return self._run(self._attempts(call, deadline))

    def popular(
        self, *, k: int = 10, user_id: str | None = None, deadline: float | None = None
    ) -> Recommendations:
        """What most have met."""
        return self._run(self._attempts(calls.look("/v1/popular", k, user_id), deadline))

    def item(self, item_id: str, *, deadline: float | None = None) -> Item:
        """What is known about an item; NotFoundError: nothing."""
        return self._run(self._attempts(calls.item(item_id), deadline))

    def put_item(
        self,
        item_id: str,
        title: str,
        text: str = "",
        attributes: Mapping[str, str | Sequence[str]] | None = None,
        *,
        deadline: float | None = None,
    ) -> Item:
        """Adds or changes an item, which can be recommended when this returns.

        Example:
          >>> client.put_item("n1", "Dune", "Spice.", {"genres": ["Sci-Fi"]})  # doctest: +SKIP
          Item(item_id='n1', title='Dune', ...)
        """
        return self._run(self._attempts(calls.put_item(item_id, title, text, attributes), deadline))

    def delete_item(self, item_id: str, *, deadline: float | None = None) -> bool:
        """Takes an item out; NotFoundError: there is none."""
        return self._run(self._attempts(calls.delete_item(item_id), deadline))

    def import_items(
        self, items: Iterable[NewItem | Mapping[str, Any]], *, deadline: float | None = None
    ) -> Imported:
        """Adds or changes many items, some in each request; the deadline is that of each.

        Items that cannot be used are told of and hold up no other.

        Example:
          >>> client.import_items([NewItem("n1", "Dune"), NewItem("n2", "Heat")])  # doctest: +SKIP
          Imported(imported=2, errors=())
        """
        found = (
            self._run(self._attempt_within(call, deadline, IMPORT))
            for call in calls.import_items(items)
        )
        return calls.summed_imports(found)

    def user(self, user_id: str, *, deadline: float | None = None) -> User:
        """What is known about somebody; ``known`` is false of a stranger."""
        return self._run(self._attempts(calls.user(user_id), deadline))

    def forget(self, user_id: str, *, deadline: float | None = None) -> Forgotten:
        """Forgets somebody for good."""
        return self._run(self._attempts(calls.forget(user_id), deadline))

    def models(self, *, deadline: float | None = None) -> list[Version]:
        """The versions of the bundle, and who gets which."""
        return self._run(self._attempts(calls.models(), deadline))

    def activate(
        self, version: str, share: float = 1.0, *, deadline: float | None = None
    ) -> list[Version]:
        """Gives a version of the bundle a share of the users; returns how it is then."""
        call = calls.activate(version, share)
        return self._run(self._attempt_within(call, deadline, 60.0))

    def stats(self, *, deadline: float | None = None) -> dict[str, Any]:
        """Figures of the running server, as they come."""
        return self._run(self._attempts(calls.plain("/v1/stats"), deadline))

    def ready(self) -> bool:
        """Whether the server can answer now."""
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/readyz", timeout=self.timeout).is_success
        return False

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns as soon as the server can answer.

        Raises:
          UnavailableError: it could not within ``timeout`` seconds.
        """
        end, asked = time.monotonic() + timeout, 1
        while not self.ready():
            if time.monotonic() >= end:
                raise _not_ready(self.address, timeout, asked)
            time.sleep(0.1)
            asked += 1

    def _run(self, attempts: Attempts[T]) -> T:
        while True:
            wait: float | None
            try:
                response = self._http.request(**attempts.next())
            except httpx.HTTPError as error:
                wait = attempts.failed(error)
            else:
                wait = attempts.answered(response)
                if wait is None:
                    return attempts.result(response)
            time.sleep(wait)


class AsyncClient(_Shared):
    """The same as :class:`Client`, to be awaited with asyncio; it takes the same arguments.

    Example:
      >>> async with AsyncClient() as client:  # doctest: +SKIP
      ...     await client.recommend(user_id="42", k=3)
    """

    def __init__(
        self,
        address: str = ADDRESS,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        deadline: float = DEADLINE,
    ) -> None:
        super().__init__(address, key, timeout=timeout, deadline=deadline)
        self._http = httpx.AsyncClient(**self._told)  # type: ignore[arg-type]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See :meth:`Client.close`."""
        await self._http.aclose()

    async def recommend(
        self, *, deadline: float | None = None, **ask: Unpack[Ask]
    ) -> Recommendations:
        """See :meth:`Client.recommend`."""
        return await self._run(self._attempts(calls.recommend(ask), deadline))

    async def shelves(
        self,
        which: Sequence[str] | None = None,
        *,
        deadline: float | None = None,
        **ask: Unpack[Ask],
    ) -> Shelves:
        """See :meth:`Client.shelves`."""
        return await self._run(self._attempts(calls.shelves(which, ask), deadline))

    async def events(
        self, events: Event | Iterable[Event], *, deadline: float | None = None
    ) -> Accepted:
        """See :meth:`Client.events`."""
        found = [await self._run(self._attempts(call, deadline)) for call in calls.events(events)]
        return calls.summed_events(found)

    async def search(
        self, q: str, *, k: int = 10, user_id: str | None = None, deadline: float | None = None
    ) -> Recommendations:
        """See :meth:`Client.search`."""
        return await self._run(self._attempts(calls.look("/v1/search", k, user_id, q=q), deadline))

    async def similar(
        self,
        item_id: str,
        *,
        k: int = 10,
        user_id: str | None = None,
        deadline: float | None = None,
    ) -> Recommendations:
        """See :meth:`Client.similar`."""
        call = calls.look(f"{calls.at('items', item_id)}/similar", k, user_id)
        return await self._run(self._attempts(call, deadline))

    async def popular(
        self, *, k: int = 10, user_id: str | None = None, deadline: float | None = None
    ) -> Recommendations:
        """See :meth:`Client.popular`."""
        return await self._run(self._attempts(calls.look("/v1/popular", k, user_id), deadline))

    async def item(self, item_id: str, *, deadline: float | None = None) -> Item:
        """See :meth:`Client.item`."""
        return await self._run(self._attempts(calls.item(item_id), deadline))

    async def put_item(
        self,
        item_id: str,
        title: str,
        text: str = "",
        attributes: Mapping[str, str | Sequence[str]] | None = None,
        *,
        deadline: float | None = None,
    ) -> Item:
        """See :meth:`Client.put_item`."""
        call = calls.put_item(item_id, title, text, attributes)
        return await self._run(self._attempts(call, deadline))

    async def delete_item(self, item_id: str, *, deadline: float | None = None) -> bool:
        """See :meth:`Client.delete_item`."""
        return await self._run(self._attempts(calls.delete_item(item_id), deadline))

    async def import_items(
        self, items: Iterable[NewItem | Mapping[str, Any]], *, deadline: float | None = None
    ) -> Imported:
        """See :meth:`Client.import_items`."""
        found = [
            await self._run(self._attempt_within(call, deadline, IMPORT))
            for call in calls.import_items(items)
        ]
        return calls.summed_imports(found)

    async def user(self, user_id: str, *, deadline: float | None = None) -> User:
        """See :meth:`Client.user`."""
        return await self._run(self._attempts(calls.user(user_id), deadline))

    async def forget(self, user_id: str, *, deadline: float | None = None) -> Forgotten:
        """See :meth:`Client.forget`."""
        return await self._run(self._attempts(calls.forget(user_id), deadline))

    async def models(self, *, deadline: float | None = None) -> list[Version]:
        """See :meth:`Client.models`."""
        return await self._run(self._attempts(calls.models(), deadline))

    async def activate(
        self, version: str, share: float = 1.0, *, deadline: float | None = None
    ) -> list[Version]:
        """See :meth:`Client.activate`."""
        call = calls.activate(version, share)
        return await self._run(self._attempt_within(call, deadline, 60.0))

    async def stats(self, *, deadline: float | None = None) -> dict[str, Any]:
        """See :meth:`Client.stats`."""
        return await self._run(self._attempts(calls.plain("/v1/stats"), deadline))

    async def ready(self) -> bool:
        """See :meth:`Client.ready`."""
        with contextlib.suppress(httpx.HTTPError):
            return (await self._http.get("/readyz", timeout=self.timeout)).is_success
        return False

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """See :meth:`Client.wait_until_ready`."""
        end, asked = time.monotonic() + timeout, 1
        while not await self.ready():
            if time.monotonic() >= end:
                raise _not_ready(self.address, timeout, asked)
            await asyncio.sleep(0.1)
            asked += 1

    async def _run(self, attempts: Attempts[T]) -> T:
        while True:
            wait: float | None
            try:
                response = await self._http.request(**attempts.next())
            except httpx.HTTPError as error:
                wait = attempts.failed(error)
            else:
                wait = attempts.answered(response)
                if wait is None:
                    return attempts.result(response)
            await asyncio.sleep(wait)


def _not_ready(address: str, timeout: float, asked: int) -> UnavailableError:
    return UnavailableError(f"{address} is not ready after {timeout:g} s", asked)
