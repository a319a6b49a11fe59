"""Fixtures that every test may use. The environment is set before anything imports TensorFlow."""

import os
import random
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
    TF_USE_LEGACY_KERAS="1",
    KERAS_BACKEND="tensorflow",
    CUDA_VISIBLE_DEVICES="",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

import numpy as np
import pytest
from hypothesis import settings

# A test run started in the background ignores Ctrl-C, and so would the processes that test it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is slow, and that is no finding.
settings.register_profile("tfrec", deadline=None)
settings.load_profile("tfrec")

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(1)
    np.random.seed(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of raw public data sets (ml-100k, ml-1m, ...), where the machine has one."""
    named = os.environ.get("TFREC_SHARED_DATA")
    folder = Path(named) if named else CHECKOUT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no raw data sets at {folder}; TFREC_SHARED_DATA can name their folder")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Gives a real file system of so many kB, empty."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(kilobytes: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tfrec-test", str(disk)]
        try:
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except OSError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return disk

    yield mounted
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def full_device(tmp_path: Path) -> Path:
    """A file on which every write fails as on a full disk."""
    device = Path("/dev/full")
    if not device.exists():
        device = tmp_path / "full"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        except OSError:
            pytest.skip("the system has no /dev/full, and only root can make one")
    return device
