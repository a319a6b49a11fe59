"""`tfrec doctor`: what it finds, and that it survives a machine without TensorFlow."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from tfrec import doctor
from tfrec.artifact import writing
from tfrec.data.catalog import Catalog, Users
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import Interactions
from tfrec.errors import SetupError
from tfrec.models import weights

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tiny_is_english(tmp_path, monkeypatch):
    made = write_tiny_bert(tmp_path / "tiny")
    monkeypatch.setattr(weights, "find", lambda name: made)


def dataset_of(*texts: str) -> Dataset:
    ids = ("", *(str(number) for number in range(len(texts))))
    catalog = Catalog(ids=ids, titles=ids, texts=("", *texts))
    interactions = Interactions(
        user=np.zeros(1, np.int32),
        item=np.ones(1, np.int32),
        timestamp=np.zeros(1, np.int64),
        event=np.zeros(1, np.int8),
        rating=np.ones(1, np.float32),
        weight=np.ones(1, np.float32),
        split=np.zeros(1, np.int8),
        num_users=1,
    )
    return Dataset(interactions, catalog, Users(ids=("u",), titles=("u",), texts=("",)))


def findings(part) -> list[tuple[str, str]]:
    return list(part)


def test_this_machine_is_found_fit():
    found = findings(doctor.diagnose())
    assert {status for status, _ in found} <= {"ok", "warn"}
    lines = "\n".join(line for _, line in found)
    assert all("\n" not in line for _, line in found)
    for expected in (
        "Python 3.",
        "numpy ",
        "memory: ",
        "disk: ",
        "TensorFlow runs",
        "accelerators",
    ):
        assert expected in lines
    assert "HF_HUB_OFFLINE is set" in lines
    assert "all-MiniLM-L6-v2: not here yet" in lines


def test_the_versions_that_it_wants_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[=<>;]+", line) for line in project["dependencies"]]
    assert set(doctor.BASE) == {name.strip() for name, *_ in wanted} - {"scann"}
    train = [line for line in project["optional-dependencies"]["train"] if "==" in line]
    pins = dict(line.partition(";")[0].strip().removesuffix("*").split("==") for line in train)
    assert pins == {name: start for name, start in doctor.TRAIN.items() if start}


def test_without_tensorflow_it_says_so_and_goes_on():
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('tensorflow', 'keras', 'tf_keras'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from tfrec import doctor\n"
        "plain = doctor._version\n"
        "doctor._version = lambda name: '' if name in doctor.TRAIN else plain(name)\n"
        "for status, line in doctor.diagnose(): print(status, line)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert 'warn no training here, only serving: pip install "tfrec[train]"' in answer.stdout
    assert "TensorFlow runs" not in answer.stdout
    assert "fail" not in answer.stdout


def test_a_version_that_does_not_fit_the_others_is_a_failure(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "2.21.0" if name == "tf-keras" else real(name)
    )
    lines = [line for status, line in doctor._packages() if status == "fail"]
    assert len(lines) == 1
    assert lines[0].startswith("tf-keras is 2.21.0 and must be 2.20.*")


def test_a_broken_tensorflow_is_a_failure_with_its_reason(monkeypatch):
    import tfrec.models.keras_bridge as bridge

    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(bridge, "tf", Broken())
    assert findings(doctor._tensorflow()) == [
        ("fail", "TensorFlow does not run: RuntimeError: no such instruction")
    ]


def test_changed_weights_in_the_cache_are_a_failure(tmp_path):
    write_tiny_bert(tmp_path / "cache" / "weights" / "all-MiniLM-L6-v2")
    failures = [line for status, line in doctor._text_models() if status == "fail"]
    assert len(failures) == 1
    assert "all-MiniLM-L6-v2" in failures[0]


def test_the_cache_is_measured(tmp_path):
    (tmp_path / "cache" / "texts").mkdir(parents=True)
    (tmp_path / "cache" / "texts" / "a.npy").write_bytes(bytes(3_000_000))
    assert findings(doctor._caches()) == [("ok", f"cache: {tmp_path / 'cache'} (texts 3 MB)")]


@pytest.mark.usefixtures("tiny_is_english")
def test_texts_in_the_vocabulary_are_fine():
    status, line = doctor.judge_texts(["the war story", "love of space"])
    assert status == "ok"
    # 11 + 11 letters in 6 words that the vocabulary holds
    assert "0.0% of the characters" in line
    assert "3.7 characters a token" in line


@pytest.mark.usefixtures("tiny_is_english")
@pytest.mark.parametrize(
    ("texts", "share"),
    [
        (["千と千尋の神隠し", "film"], "66.7%"),  # 8 of 12 characters
        (["zyx wvu"], "0.0%"),  # known letters, unknown words
    ],
)
def test_the_multilingual_model_is_suggested_where_the_english_one_cannot_read(texts, share):
    status, line = doctor.judge_texts(texts)
    assert status == "warn"
    assert f"texts: {share} of the characters" in line
    assert line.endswith('set adapt.text = "multilingual-e5-small"')


@pytest.mark.usefixtures("tiny_is_english")
def test_a_dataset_or_its_folder_is_looked_at(tmp_path):
    dataset_of("千と千尋").save(tmp_path / "run" / "prepare")
    for folder in (tmp_path / "run", tmp_path / "run" / "prepare"):
        (whole, texts) = findings(doctor._artifacts(folder))
        assert whole[0] == "ok"
        assert whole[1].startswith(f"artifact {tmp_path / 'run' / 'prepare'}: dataset, ")
        assert whole[1].endswith("every digest matches")
        assert texts[0] == "warn"
    assert doctor._texts(dataset_of("the film"))[0] == "ok"
    finding = doctor._texts(dataset_of(""))
    assert finding == ("warn", 'no item of the catalog has a text: set adapt.text = "none"')


def test_each_artifact_of_a_run_has_a_line_and_a_changed_byte_is_a_failure(tmp_path):
    for name in ("retrieval", "ranking"):
        with writing(tmp_path / "adapt" / name, kind=name, config={}) as draft:
            (draft.path / "weights").write_bytes(bytes(2_500_000))
    (tmp_path / "adapt" / "retrieval" / "weights").write_bytes(bytes(2_499_999) + b"1")
    ranking, retrieval = findings(doctor._artifacts(tmp_path))
    fine = f"artifact {tmp_path / 'adapt' / 'ranking'}: ranking, 2.5 MB"
    assert ranking == ("ok", f"{fine}, every digest matches")
    assert retrieval[0] == "fail"
    assert "retrieval/weights does not match its digest" in retrieval[1]


def test_a_damaged_manifest_is_a_failure_and_the_others_are_looked_at(tmp_path):
    for name in ("a", "b"):
        with writing(tmp_path / name, kind="ranking", config={}):
            pass
    (tmp_path / "a" / "manifest.json").write_text("[]")
    (damaged, whole) = findings(doctor._artifacts(tmp_path))
    assert (damaged[0], whole[0]) == ("fail", "ok")
    assert "a/manifest.json is damaged" in damaged[1]


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_folder_without_an_artifact_is_one_line(name, tmp_path):
    assert findings(doctor._artifacts(tmp_path / name)) == [
        ("fail", f"{tmp_path / name} holds no finished artifact")
    ]


def test_texts_that_cannot_be_judged_are_one_line(monkeypatch, tmp_path):
    def missing(name):
        raise SetupError("no weights here")

    monkeypatch.setattr(weights, "find", missing)
    dataset_of("the film").save(tmp_path)
    assert findings(doctor._artifacts(tmp_path))[1:] == [("fail", "no weights here")]


def test_the_folder_reaches_the_checks(tmp_path, monkeypatch):
    for part in ("_python", "_packages", "_machine", "_caches", "_text_models", "_tensorflow"):
        monkeypatch.setattr(doctor, part, list)
    assert findings(doctor.diagnose()) == []
    assert [status for status, _ in findings(doctor.diagnose(tmp_path))] == ["fail"]
