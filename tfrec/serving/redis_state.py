"""RedisState: the state of several servers at once, in one Redis.

What is written is written by scripts, each of which Redis runs as a whole before anything else.
Nothing is kept in memory here, since another server may change it at any time.

Redis keeps what it acknowledged only if it is told to: ``appendonly yes`` and ``appendfsync
always`` (a kill and a power cut cost nothing); with ``everysec`` either may cost up to the last two
seconds, without ``appendonly`` all since its last snapshot. Its ``maxmemory-policy`` must be
``noeviction`` (its default) or ``volatile-...``. One database of a Redis (``/DB``) holds one state;
Redis Cluster is not supported.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tfrec.errors import ConfigError, StateError
from tfrec.serving.state import Event, Item, check_events, check_items, check_text

SCHEMA = 1
_AT_ONCE = 500

# tfrec:history:USER  list of event numbers      tfrec:events   number -> event as JSON
# tfrec:ids           event id -> number         tfrec:users    set of users with events
# tfrec:items         item id -> item as JSON    tfrec:changes  item ids by their last change
# tfrec:deleted       set of item ids            tfrec:vectors:KEY  item id -> vector
# tfrec:numbers       last event number, last change number, schema
_APPEND = """
local new = {}
for place = 1, #ARGV, 3 do
  local id, user, event = ARGV[place], ARGV[place + 1], ARGV[place + 2]
  if redis.call('HEXISTS', 'tfrec:ids', id) == 1 then
    new[#new + 1] = 0
  else
    local number = redis.call('HINCRBY', 'tfrec:numbers', 'event', 1)
    redis.call('HSET', 'tfrec:ids', id, number)
    redis.call('HSET', 'tfrec:events', number, event)
    redis.call('RPUSH', 'tfrec:history:' .. user, number)
    redis.call('SADD', 'tfrec:users', user)
    new[#new + 1] = 1
  end
end
return new
"""
# A list is read in pieces, since a call takes at most some 8,000 arguments.
_HISTORIES = """
local found = {}
for place, user in ipairs(ARGV) do
  local key, events = 'tfrec:history:' .. user, {}
  for start = 0, redis.call('LLEN', key) - 1, 5000 do
    local numbers = redis.call('LRANGE', key, start, start + 4999)
    for _, event in ipairs(redis.call('HMGET', 'tfrec:events', unpack(numbers))) do
      events[#events + 1] = event
    end
  end
  found[place] = '[' .. table.concat(events, ',') .. ']'
end
return found
"""
_FORGET = """
local key = 'tfrec:history:' .. ARGV[1]
local numbers = redis.call('LRANGE', key, 0, -1)
for _, number in ipairs(numbers) do
  local event = redis.call('HGET', 'tfrec:events', number)
  redis.call('HDEL', 'tfrec:ids', cjson.decode(event)[1])
  redis.call('HDEL', 'tfrec:events', number)
end
redis.call('DEL', key)
redis.call('SREM', 'tfrec:users', ARGV[1])
redis.call('SADD', 'tfrec:forgotten', ARGV[1])
return #numbers
"""
_PUT_ITEMS = """
local keys = redis.call('SMEMBERS', 'tfrec:vector_keys')
for place = 1, #ARGV, 3 do
  local id, deleted = ARGV[place], ARGV[place + 1]
  local change = redis.call('HINCRBY', 'tfrec:numbers', 'change', 1)
  redis.call('HSET', 'tfrec:items', id, ARGV[place + 2])
  redis.call('ZADD', 'tfrec:changes', change, id)
  redis.call(deleted == '1' and 'SADD' or 'SREM', 'tfrec:deleted', id)
  for _, key in ipairs(keys) do
    redis.call('HDEL', 'tfrec:vectors:' .. key, id)
  end
end
"""
_ITEMS = """
local ids = redis.call('ZRANGEBYSCORE', 'tfrec:changes', '(' .. ARGV[1], '+inf',
  'WITHSCORES', 'LIMIT', 0, ARGV[2])
local found = {}
for place = 1, #ids, 2 do
  found[#found + 1] = ids[place + 1]
  found[#found + 1] = redis.call('HGET', 'tfrec:items', ids[place])
end
return found
"""
# Not by MULTI, which a Redis that is full refuses.
_COUNTS = """
local items = redis.call('HLEN', 'tfrec:items') - redis.call('SCARD', 'tfrec:deleted')
return {redis.call('HLEN', 'tfrec:events'), redis.call('SCARD', 'tfrec:users'), items}
"""


class RedisState:
    """Implements :class:`~tfrec.serving.state.State` in a Redis that many processes share.

    A call that no answer came to may have been carried out. Whoever sends its events again, with
    the ids they had, has each of them once.
    """

    def __init__(self, url: str, timeout: float = 1.0) -> None:
        """Connects; later on, connections that broke are made anew by themselves.

        Args:
          url: ``redis://[USER:PASSWORD@]HOST:PORT/DB``, ``rediss://`` for TLS.
          timeout: Seconds to connect, and seconds to wait for an answer.

        Raises:
          ConfigError: the address is none.
          StateError: Redis does not answer, or a newer tfrec wrote what is in it.
        """
        self._name = _shown(url)
        # A connection that broke while it lay idle is noticed at its next use: hence one more try.
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=again
        )
        script = self._redis.register_script
        self._append, self._histories = script(_APPEND), script(_HISTORIES)
        self._forget, self._put_items = script(_FORGET), script(_PUT_ITEMS)
        self._items, self._counts = script(_ITEMS), script(_COUNTS)
        try:
            self._check_schema()
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See :meth:`State.append`."""
        events = tuple(events)
        check_events(events)
        if not events:
            return []
        told = [part for e in events for part in (e.event_id, e.user_id, _packed(e))]
        with self._explained():
            return [new == 1 for new in self._append(args=told)]

    def history(self, user_id: str) -> list[Event]:
        """See :meth:`State.history`."""
        return self.histories([user_id])[0]

    def histories(self, user_ids: Sequence[str]) -> list[list[Event]]:
        """See :meth:`State.histories`."""
        if not user_ids:
            return []
        with self._explained():
            found = self._histories(args=list(user_ids))
        return [[Event(*values) for values in json.loads(events)] for events in found]

    def forget(self, user_id: str) -> int:
        """See :meth:`State.forget`. Redis's file holds the events until it is rewritten.

        It is from time to time, and at once by ``redis-cli BGREWRITEAOF``.
        """
        with self._explained():
            return int(self._forget(args=[user_id]))

    def forgotten(self, user_ids: Sequence[str]) -> set[str]:
        """See :meth:`State.forgotten`."""
        if not user_ids:
            return set()
        with self._explained():
            are = self._redis.smismember("tfrec:forgotten", list(user_ids))
        return {user_id for user_id, is_one in zip(user_ids, are, strict=True) if is_one}

    def events(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """See :meth:`State.events`."""
        with self._explained():
            last = int(self._redis.hget("tfrec:numbers", "event") or 0)
        for start in range(after + 1, last + 1, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, last + 1))
            with self._explained():
                found = self._redis.hmget("tfrec:events", list(numbers))
            for number, event in zip(numbers, found, strict=True):
                if event is not None:
                    yield number, Event(*json.loads(event))

    def put_items(self, items: Sequence[Item]) -> None:
        """See :meth:`State.put_items`."""
        items = tuple(items)
        check_items(items)
        told: list[str | int] = []
        for item in items:
            told += [item.item_id, int(item.deleted), _packed_item(item)]
        if told:
            with self._explained():
                self._put_items(args=told)

    def items(self, after: int = 0) -> Iterator[tuple[int, Item]]:
        """See :meth:`State.items`."""
        while True:
            with self._explained():
                found = iter(self._items(args=[after, _AT_ONCE]))
            came = False
            for change, item in zip(found, found, strict=True):
                after, came = int(change), True
                yield after, Item(*json.loads(item))
            if not came:
                return

    def vectors(self, key: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See :meth:`State.vectors`."""
        known: dict[str, bytes] = {}
        rest = iter(item_ids)
        while chunk := list(islice(rest, _AT_ONCE)):
            with self._explained():
                found = self._redis.hmget(f"tfrec:vectors:{key}", chunk)
            known.update((i, v) for i, v in zip(chunk, found, strict=True) if v is not None)
        return known

    def put_vectors(self, key: str, vectors: Mapping[str, bytes]) -> None:
        """See :meth:`State.put_vectors`."""
        if not vectors:
            return
        with self._explained(), self._redis.pipeline(transaction=True) as both:
            both.sadd("tfrec:vector_keys", key)
            both.hset(f"tfrec:vectors:{key}", mapping=dict(vectors))
            both.execute()

    def get(self, name: str) -> str:
        """See :meth:`State.get`."""
        with self._explained():
            return bytes(self._redis.hget("tfrec:settings", name) or b"").decode()

    def set(self, name: str, value: str) -> None:
        """See :meth:`State.set`."""
        with self._explained():
            self._redis.hset("tfrec:settings", name, value)

    def counts(self) -> dict[str, int]:
        """See :meth:`State.counts`."""
        with self._explained():
            events, users, items = self._counts()
        return {"events": events, "users": users, "items": items}

    def durability(self) -> str:
        """See :meth:`State.durability`. What Redis says of its own settings."""
        try:
            with self._explained():
                told = self._redis.config_get("append*", "maxmemory*")
        except StateError as error:
            return f"{self._name} does not tell what it keeps ({error})"
        return f"{self._name}: {_kept(told)}{_evicted(told)}"

    def close(self) -> None:
        """See :meth:`State.close`."""
        self._redis.close()

    def _check_schema(self) -> None:
        with self._explained():
            self._redis.hsetnx("tfrec:numbers", "schema", SCHEMA)
            schema = int(self._redis.hget("tfrec:numbers", "schema"))
        if schema > SCHEMA:
            raise StateError(
                f"{self._name} has schema {schema}, and this tfrec knows {SCHEMA}: a newer one "
                "wrote it; upgrade tfrec, or give another --state"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except redis.BusyLoadingError:
            raise StateError(f"{self._name} reads its files just now; try again soon") from None
        except (redis.TimeoutError, redis.ConnectionError) as error:
            raise StateError(f"{self._name} cannot be reached: {error}") from None
        except redis.RedisError as error:
            raise StateError(f"{self._name} refuses: {error}") from None
        except UnicodeEncodeError as error:
            check_text("an id", error.object)


def _shown(url: str) -> str:
    """The address without user and password, for messages."""
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        int(parts.path.strip("/") or 0)
    except ValueError:
        raise ConfigError(
            "the address of the state is no redis://HOST:PORT/DB; port and database are numbers"
        ) from None
    return f"Redis at {parts.hostname or 'localhost'}:{port}{parts.path}"


def _packed(event: Event) -> str:
    e = event
    return json.dumps([e.event_id, e.user_id, e.item_id, e.event, e.timestamp, e.value])


def _packed_item(item: Item) -> str:
    cells = dict(item.attributes)
    return json.dumps([item.item_id, item.title, item.text, cells, item.created, item.deleted])


def _kept(told: Mapping[str, str]) -> str:
    if told.get("appendonly") != "yes":
        return (
            "a kill or a power cut costs all events since its last snapshot; set `appendonly yes` "
            "and `appendfsync always`"
        )
    if told.get("appendfsync") == "always":
        return "an acknowledged event survives a kill and a power cut"
    seconds = "up to two seconds of" if told.get("appendfsync") == "everysec" else "the latest"
    return (
        f"appendfsync {told.get('appendfsync')}: a kill or a power cut may cost {seconds} events; "
        "set `appendfsync always` to lose none"
    )


def _evicted(told: Mapping[str, str]) -> str:
    policy = told.get("maxmemory-policy", "noeviction")
    if told.get("maxmemory", "0") == "0" or not policy.startswith("allkeys"):
        return ""
    return f"; maxmemory-policy {policy} drops histories when memory is short: set noeviction"
