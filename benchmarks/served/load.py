"""Load: one process that asks a server over kept connections, and times every answer.

    python benchmarks/served/load.py PORT BODIES --clients 16 --seconds 60
    python benchmarks/served/load.py PORT BODIES --clients 1 --requests 2000
    python benchmarks/served/load.py PORT BODIES --clients 16 --seconds 600 --rate 400

BODIES holds one JSON body a line, sent in turn to /v1/recommend; a line may begin with another path
and a tab. Eight # in a line become a number that does not come again. Without --rate each client
asks again as soon as it is answered. With it, requests fall due at even distances, whether or not
the server keeps up, and an answer's time counts from when its request was due. Prints one line of
JSON.

It is one thread on epoll and plain sockets, with the bytes of all requests made beforehand: on two
cores that a server shares with its load, what the load costs is what the server does not get. Its
own processor time is in the result.
"""

from __future__ import annotations

import argparse
import json
import math
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

TIMEOUT = 30.0  # seconds without any answer
PATH = "/v1/recommend"
NUMBER = b"########"


def request(line: bytes, port: int) -> bytes:
    """The bytes of one POST."""
    before, tab, after = line.partition(b"\t")
    path, body = (before.decode(), after) if tab else (PATH, line)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """One connection, on which one request at a time is under way."""

    def __init__(self, port: int, items: int) -> None:
        self._port, self._items = port, items
        self.socket: socket.socket
        self.due, self._listed = 0.0, True
        self._got = b""
        self._wanted = 0
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self._port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got, self._wanted = b"", 0

    def send(self, raw: bytes, due: float, listed: bool) -> None:
        self.due, self._listed = due, listed
        self.socket.sendall(raw)

    def receive(self) -> str | None:
        """What has come: None: not all yet; "": a good answer; else what is wrong."""
        try:
            part = self.socket.recv(1 << 16)
        except OSError as error:
            return type(error).__name__
        if not part:
            return "closed"
        self._got = got = self._got + part
        if not self._wanted:
            end = got.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = got[:end].lower()
            place = head.find(b"content-length:")
            if place < 0:
                return "no length"
            self._wanted = end + 4 + int(head[place + 15 :].split(b"\r\n", 1)[0])
        if len(got) < self._wanted:
            return None
        self._got, self._wanted = b"", 0
        if got[9:12] != b"200":
            return got[9:12].decode("latin-1")
        if self._listed and self._items and got.count(b'"item_id"') != self._items:
            return "other count of items"
        return ""


class Load:
    """A run of so many clients.

    Args:
      port: Of the server.
      requests: Their bytes.
      clients: Connections.
      items: That every answer must hold; 0: not looked at.
    """

    def __init__(self, port: int, requests: list[bytes], clients: int, items: int) -> None:
        lists = f"POST {PATH} ".encode()
        self._requests = [(raw, raw.startswith(lists), NUMBER in raw) for raw in requests]
        self._next, self._number = 0, 0
        self._clients = [Client(port, items) for _ in range(clients)]
        self._poll = select.epoll()
        self._by_file: dict[int, Client] = {}
        for client in self._clients:
            self._watch(client)

    def _watch(self, client: Client) -> None:
        self._by_file[client.socket.fileno()] = client
        self._poll.register(client.socket.fileno(), select.EPOLLIN)

    def run(self, seconds: float, most: int, rate: float) -> dict[str, Any]:
        """Asks for so long, or so often.

        Args:
          seconds: After which nothing is sent any more.
          most: Requests; 0: as many as there is time for.
          rate: Requests a second; 0: each client again as soon as it is answered.
        """
        self._took: list[float] = []
        self._wrong: dict[str, int] = {}
        idle, sent, answered = deque(self._clients), 0, 0
        before, begun = time.process_time(), time.perf_counter()
        ends, last = begun + seconds, begun
        clock = time.perf_counter
        while True:
            now = clock()
            while idle and now < ends and (not most or sent < most):
                due = begun + sent / rate if rate else now
                if due > now:
                    break
                self._send(idle.popleft(), due)
                sent += 1
            if len(idle) == len(self._clients) and (now >= ends or (most and sent >= most)):
                break
            wait = TIMEOUT
            if rate and idle and now < ends:
                wait = max(0.0, begun + sent / rate - now)
            elif len(idle) == len(self._clients):
                break
            events = self._poll.poll(wait)
            if not events and wait == TIMEOUT:
                self._wrong["timeout"] = len(self._clients) - len(idle)
                break
            for file, _ in events:
                client = self._by_file[file]
                told = client.receive()
                if told is None:
                    continue
                last = clock()
                answered += 1
                if told:
                    self._wrong[told] = self._wrong.get(told, 0) + 1
                    self._again(file, client)
                else:
                    self._took.append(last - client.due)
                idle.append(client)
        return self._summary(answered, last - begun, time.process_time() - before)

    def _send(self, client: Client, due: float) -> None:
        raw, listed, numbered = self._requests[self._next]
        if numbered:
            self._number += 1
            raw = raw.replace(NUMBER, b"%08d" % self._number)
        client.send(raw, due, listed)
        self._next = (self._next + 1) % len(self._requests)

    def _again(self, file: int, client: Client) -> None:
        """Connects anew after an error."""
        self._poll.unregister(file)
        del self._by_file[file]
        client.socket.close()
        client.connect()
        self._watch(client)

    def _summary(self, answered: int, wall: float, cpu: float) -> dict[str, Any]:
        took = sorted(self._took)
        wrong = sum(self._wrong.values())
        return {
            "requests": answered,
            "seconds": wall,
            "rate": len(took) / wall if wall else 0.0,
            "errors": wrong,
            "wrong": self._wrong,
            **{name: _part(took, share) for name, share in PARTS.items()},
            "cpu": cpu,
        }


PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}


def _part(took: list[float], share: float) -> float | None:
    """Milliseconds that this share of the times stays within."""
    if not took:
        return None
    return 1e3 * took[min(len(took) - 1, max(0, math.ceil(share * len(took)) - 1))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--items", type=int, default=10, help="that each answer must hold")
    parser.add_argument("--skip", type=int, default=0, help="bodies that are left out at first")
    told = parser.parse_args()
    bodies = told.bodies.read_bytes().splitlines()
    bodies = bodies[told.skip % len(bodies) :] + bodies[: told.skip % len(bodies)]
    requests = [request(body, told.port) for body in bodies]
    load = Load(told.port, requests, told.clients, told.items)
    json.dump(load.run(told.seconds, told.requests, told.rate), sys.stdout)
    print()


if __name__ == "__main__":
    main()
