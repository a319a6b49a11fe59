"""Terminal: keeps what native libraries write past Python away from people."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, what is written to standard error by whomever is thrown away.

    TensorFlow's converter and LiteRT log their steps there, whatever levels they are told. Errors
    still come as exceptions.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as told:
        kept = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
