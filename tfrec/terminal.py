"""Terminal: keeps what native libraries write past Python away from people."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_inside = 0
_kept = -1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, what is written to standard error by whomever is thrown away.

    TensorFlow's converter and LiteRT log their steps there, whatever levels they are told. Errors
    still come as exceptions. Threads may be in such a block at the same time.
    """
    entered = _enter()
    try:
        yield
    finally:
        if entered:
            _leave()


def _enter() -> bool:
    global _inside, _kept
    with _lock:
        if not _inside:
            try:
                if sys.stderr is not None:
                    sys.stderr.flush()
                _kept = os.dup(2)
            except (OSError, ValueError):
                return False  # there is no standard error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        _inside += 1
    return True


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(_kept, 2)
            os.close(_kept)
