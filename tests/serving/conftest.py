"""A tiny bundle, and servers of it in processes of their own."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

STARTS_WITHIN = 60.0


class Server:
    """`tfrec serve` in a process of its own, on a port that is free.

    Args:
      bundle: The folder.
      state: As ``--state`` takes it.
      log: Where standard output and error go.
      more: Further arguments.
    """

    def __init__(self, bundle: Path, state: str, log: Path, more: Sequence[str] = ()) -> None:
        self.bundle, self.state, self.log, self.more = bundle, state, log, list(more)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, on the same port if it ran before, and waits until it is ready."""
        self.log.write_bytes(b"")
        command = [sys.executable, "-m", "tfrec", "serve", str(self.bundle)]
        command += ["--port", str(self.port), "--state", self.state, *self.more]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            lines = self.log.read_text().splitlines()
            for line in [line for line in lines if line.startswith("serving ")]:
                self.port = int(line.split("://")[1].split("/")[0].rpartition(":")[2])
                if self._ready():
                    return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not ready in {STARTS_WITHIN} s: {self.log.read_text()}")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends it, and waits for the end; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self.process = None
        return code


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """A bundle of two versions that nobody changes; made once, whoever of the workers is first."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "served-bundle"
    with (shared / "served-bundle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _make(tmp_path_factory, folder)
    return folder


def _make(tmp_path_factory, folder: Path) -> None:
    import checkerboard as board

    from tfrec.stages import export

    run = board.trained(tmp_path_factory)
    partial = folder.with_suffix(".partial")
    export.run(run, partial, saved_models=False)
    export.run(run, partial, saved_models=False, int8=False)
    partial.rename(folder)


@pytest.fixture
def own_bundle(bundle, tmp_path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(bundle, tmp_path / "bundle", symlinks=True)
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    """A server that the tests of a module share."""
    folder = tmp_path_factory.mktemp("server")
    running = Server(bundle, str(folder / "state"), folder / "log")
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def server_url(server) -> str:
    return server.url


@pytest.fixture
def own_server(own_bundle, tmp_path):
    """A server that a test may stop, kill and start again."""
    running = Server(own_bundle, str(tmp_path / "state"), tmp_path / "log")
    running.start()
    yield running
    running.stop(signal.SIGKILL)
