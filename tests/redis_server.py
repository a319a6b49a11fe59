"""A real redis-server for a test, on a free port, which can be killed and started again."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis


class RedisServer:
    """A redis-server whose files are in a folder."""

    def __init__(self, folder: Path, fsync: str = "always") -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server on this machine: apt-get install redis-server")
        self.folder, self.fsync = folder, fsync
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        told = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "save": "",
            "appendonly": "no" if self.fsync == "none" else "yes",
            "appendfsync": "everysec" if self.fsync == "none" else self.fsync,
        }
        words = [str(word) for name, value in told.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        with redis.Redis(port=self.port) as asked:
            while time.monotonic() < deadline:
                try:
                    asked.ping()
                except redis.RedisError:
                    time.sleep(0.02)
                else:
                    return
        raise TimeoutError(f"redis-server on port {self.port} does not answer")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
