"""Bad input through the command line: one line, the right code, nothing half-written.

What data files can hold is in tests/data; what arguments can be is in test_cli.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkerboard as board
import pytest

from tfrec import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder that holds a run and its files; changed by no test."""
    return board.trained(tmp_path_factory).parent


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run that may be spoilt."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def told(capsys) -> str:
    """What was said on stderr: one line, no traceback."""
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("tfrec: error: ")
    return line


def stage(verb: str, folder: Path, out: Path, *settings: str) -> list[str]:
    given = board.arguments(folder, *settings)
    sets = [part for setting in given for part in ("--set", setting)]
    task = ["--task", "retrieval"] if verb == "adapt" else []
    return [verb, "files", *task, *sets, "--out", str(out)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit_manifest(artifact: Path, **changes: object) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("verb", ["adapt", "evaluate"])
def test_a_stage_before_the_ones_it_needs(verb, finished, tmp_path, capsys):
    assert cli.main(stage(verb, finished / "files", tmp_path / "run")) == 2
    assert "prepare" in told(capsys)
    assert not (tmp_path / "run").exists()


def test_recommendations_of_a_run_without_models(run, capsys):
    shutil.rmtree(run / "adapt")
    assert cli.main(["recommend", str(run), "--user", "u1"]) == 2
    assert "adapt/retrieval" in told(capsys)


def test_recommendations_of_an_unfinished_model(run, capsys):
    (run / "adapt" / "retrieval" / "manifest.json").unlink()
    assert cli.main(["recommend", str(run), "--user", "u1"]) == 2
    assert "unfinished" in told(capsys)


@pytest.mark.parametrize("file", ["final/vectors.npy", "final/weights.safetensors"])
def test_a_changed_byte(file, run, tmp_path, capsys):
    path = run / "adapt" / "retrieval" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    recs = tmp_path / "recs.csv"
    assert cli.main(["recommend", str(run), "--user", "u1", "--out", str(recs)]) == 2
    line = told(capsys)
    assert file in line
    assert "changed" in line
    assert not recs.exists()


def test_a_model_of_another_version(run, capsys):
    edit_manifest(run / "adapt" / "retrieval", format=99)
    assert cli.main(["recommend", str(run), "--user", "u1"]) == 2
    assert "format 99" in told(capsys)


def test_a_manifest_that_was_edited(run, capsys):
    edit_manifest(run / "adapt" / "retrieval", config={})
    assert cli.main(["inspect", str(run)]) == 2
    assert "changed after it was written" in told(capsys)


def test_a_retrieval_that_is_not_the_rankers(run, capsys):
    manifest = json.loads((run / "adapt" / "ranking" / "manifest.json").read_text())
    from tfrec.artifact import content_digest

    parents = {**manifest["parents"], "retrieval": "0" * 64}
    digest = content_digest("ranking", manifest["config"], parents, manifest["files"])
    edit_manifest(run / "adapt" / "ranking", parents=parents, digest=digest)
    assert cli.main(["recommend", str(run), "--user", "u1"]) == 2
    assert "adapt --task ranking" in told(capsys)


@pytest.mark.parametrize(
    ("setting", "answers"),
    [
        ("adapt.retreival.epochs=1", ["'adapt.retreival'", "did you mean 'retrieval'"]),
        ("adapt.retrieval.epoch=1", ["did you mean 'epochs'"]),
        ("adapt.retrieval.dropout=1.5", ["adapt.retrieval.dropout", "1.5", "less than 1"]),
        ("adapt.retrieval.loss=hinge", ["'hinge'", "full_softmax"]),
        ("adapt.retrieval.heads=3", ["heads", "3", "8"]),
        ("adapt.text=no-such-bert", ["no-such-bert"]),
        ("adapt.text_length=9999", ["text_length", "9999"]),
        ("adapt.learning_rate=nan", ["learning_rate", "nan"]),
    ],
)
def test_a_setting_that_cannot_be(setting, answers, run, finished, capsys):
    before = tree(run)
    assert cli.main(stage("adapt", finished / "files", run, setting)) == 2
    line = told(capsys)
    for answer in answers:
        assert answer in line
    assert tree(run) == before


def test_a_full_disk_while_training(small_disk, finished, capfd):
    disk = small_disk(256)
    shutil.copytree(finished / "run" / "prepare", disk / "prepare")
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    with open(disk / "ballast", "r+b") as ballast:
        ballast.truncate((disk / "ballast").stat().st_size - 24_576)
    assert cli.main(stage("adapt", finished / "files", disk)) == 3
    said = capfd.readouterr().err
    assert "no space left" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (disk / "adapt" / "retrieval").exists()
    assert list(disk.glob("adapt/*.partial")) == []


def test_a_bug_of_ours_would_be_seen_as_such():
    """The checks above are worth something: a command that fails otherwise does not end with 2."""
    code = "import sys; from tfrec import cli; cli.parser = None; sys.exit(cli.main([]))"
    environment = {**os.environ, "TFREC_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 1
