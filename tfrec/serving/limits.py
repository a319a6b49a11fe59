"""Limits: how many requests of one sender a server takes."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

SENDERS = 10_000


class Buckets:
    """A token bucket for each sender, in bounded memory.

    A sender who was quiet may send ``burst`` requests at once, and ``rate`` a second from then on.
    Past ``most`` senders, the one who was quiet for longest is forgotten: his bucket is full again.

    Args:
      rate: Requests a second.
      burst: Requests at once; None: those of two seconds, one at least.
      most: Senders remembered.
      clock: Seconds that only grow; tests give their own.
    """

    def __init__(
        self,
        rate: float,
        burst: float | None = None,
        most: int = SENDERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate = rate
        self.burst = max(1.0, 2 * rate if burst is None else burst)
        self.most = most
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, sender: str) -> float:
        """Takes a token: 0 if there was one, else the seconds until there will be."""
        now = self._clock()
        left, since = self._buckets.pop(sender, (self.burst, now))
        left = min(self.burst, left + (now - since) * self.rate)
        allowed = left >= 1
        self._buckets[sender] = (left - allowed, now)
        if len(self._buckets) > self.most:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self.rate

    def __len__(self) -> int:
        return len(self._buckets)


def sender_of(address: str) -> str:
    """What of an address stands for one sender: all of IPv4, the network of IPv6.

    Whoever has one address of IPv6 has the 2^64 of its network.
    """
    if ":" not in address:
        return address
    try:
        whole = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(whole) >> 64 << 64, 64)))
