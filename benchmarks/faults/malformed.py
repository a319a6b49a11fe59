"""Malformed, huge, slow and half-open requests: each is refused, and nobody else notices.

    python benchmarks/faults/malformed.py BUNDLE [--requests 100000] [--at-once 200]

What is malformed or huge comes from so many connections at once; of the slow ones, which send a
byte at a time, and the half-open ones, which send a part or nothing and wait, there is one in fifty
each, all of them held open beside. A client of good manners asks all the time and is timed, with
the attack and before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections import Counter

from ground import Asking, Server, arguments, served, table, verdict

HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = HEAD + b"Connection: close\r\n"


def told(body: bytes, path: bytes = b"/v1/recommend") -> bytes:
    """A whole request, whatever its body is."""
    head = CLOSE.replace(b"/v1/recommend", path)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


MALFORMED = {
    "bytes of no protocol": b"\x00\x01\xff\xfe" * 16,
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "no version": b"GET /\r\n\r\n",
    "a method that is none": b"BREW /coffee HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /v1/popular HTTP/1.1\r\nConnection: close\r\n\r\n",
    "another host": b"GET / HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n",
    "bytes in the path": b"GET /v1/items/\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a length and chunks": HEAD
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no JSON": told(b"{'k': 3}"),
    "no UTF-8": told(b'{"user_id": "\xff"}'),
    "half a character": told(b'{"user_id": "\\ud800"}'),
    "nested arrays": told(b"[" * 50_000),
    "an array": told(b"[]"),
    "a key that is none": told(b'{"colour": 1}'),
    "a k out of range": told(b'{"k": 1e99}'),
    "no number": told(b'{"diversity": NaN}'),
    "an event of nobody": told(b'{"event_id": "x"}', b"/v1/events"),
    "a path that is none": told(b"{}", b"/v1/nothing"),
}
HUGE = {
    "a body of 2 MB": told(b" " * (2 << 20)),
    "a body said to be of 1 TB": CLOSE + b"Content-Length: 1099511627776\r\n\r\n{}",
    "a head of 256 KB": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
    + b"a" * (1 << 18)
    + b"\r\n\r\n",
    "a path of 256 KB": b"GET /" + b"a" * (1 << 18) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "50,000 headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 50_000 + b"\r\n",
    "100,000 ids": told(b'{"exclude": [' + b'"i",' * 99_999 + b'"i"]}'),
    "a line of 2 MB": told(b"x" * (2 << 20), b"/v1/items:import"),
}
RARE = 40  # of so many requests, one is huge


async def one(port: int, sent: bytes, seconds: float = 60.0) -> str:
    """What becomes of a request: a status, or how the connection ended."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(sent)
                answer = await reader.read(64)
                with contextlib.suppress(ConnectionError):
                    while await reader.read(1 << 16):
                        pass
    except ConnectionError:
        return "closed"
    except TimeoutError:
        return "no answer"
    return answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/1.1 ") else "closed"


async def slow(port: int) -> str:
    """A request of good form, a byte a second, until somebody ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        begun = time.monotonic()
        for byte in HEAD * 10:
            if time.monotonic() - begun > 60:
                return "no end"
            with contextlib.suppress(ConnectionError):
                writer.write(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    answer = await reader.read(64)
                    return answer.split(b" ")[1].decode() if answer else "closed"
    return "no end"


async def half_open(port: int, sent: bytes) -> str:
    return await one(port, sent, 60.0)


async def attack(port: int, asked: object) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    beside = asked.requests // 50
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - asked.at_once - 200
    beside = min(beside, room // 2)
    parts = (b"", b"GET", HEAD, HEAD + b"Content-Length: 50\r\n\r\n{")
    held = [asyncio.create_task(slow(port)) for _ in range(beside)]
    opened = [asyncio.create_task(half_open(port, parts[n % 4])) for n in range(beside)]
    rest = iter(range(asked.requests - 2 * beside))
    malformed, huge = list(MALFORMED.items()), list(HUGE.items())

    async def work() -> None:
        for number in rest:
            rare, turn = number % RARE == 0, number // RARE if number % RARE == 0 else number
            name, sent = (huge if rare else malformed)[turn % len(huge if rare else malformed)]
            found.setdefault(name, Counter())[await one(port, sent)] += 1

    await asyncio.gather(*(work() for _ in range(asked.at_once)))
    found["slow: a byte a second"] = Counter(await asyncio.gather(*held))
    found["half-open"] = Counter(await asyncio.gather(*opened))
    return found


def settled(server: Server, files: int) -> bool:
    """Whether all connections are gone after a moment."""
    deadline = time.monotonic() + 60
    while server.files() > files + 5 and time.monotonic() < deadline:
        time.sleep(0.5)
    return server.files() <= files + 5


def main() -> None:
    asked = arguments(__doc__, requests=(100_000, "requests"), **{"at-once": (200, "at once")})
    with served(asked.bundle) as server:
        with Asking(server, 1) as before:
            time.sleep(5)
        memory, files = server.memory_mb(), server.files()
        begun = time.monotonic()
        with Asking(server, 1) as during:
            found = asyncio.run(attack(server.port, asked))
        took = time.monotonic() - begun
        back = settled(server, files)
        ended, left, tracebacks = server.memory_mb(), server.files(), server.tracebacks()
        code = server.end()
    rows = [(name, sum(c.values()), dict(c)) for name, c in sorted(found.items())]
    table("what became of each request", ("request", "times", "answers"), rows)
    statuses = sum(found.values(), Counter())
    bad = {s: n for s, n in statuses.items() if not s.startswith("4") and s != "closed"}
    told = [
        ("requests", f"{sum(statuses.values())} in {took:.0f} s"),
        ("neither refused nor closed", bad or 0),
        ("the other client's answers", dict(during.statuses)),
        ("its p50 and p99 before", before.times()),
        ("its p50 and p99 during the attack", during.times()),
        ("memory before and after", f"{memory:.0f} MB, {ended:.0f} MB"),
        ("open files before and after", f"{files}, {left}"),
        ("tracebacks", tracebacks),
        ("exit code", code),
    ]
    table("the server", ("", "found"), told)
    good = set(during.statuses) == {"200"} and not bad and back
    verdict(good and not tracebacks and code == 0 and ended < memory + 100)


if __name__ == "__main__":
    main()
