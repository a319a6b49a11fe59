"""One real run by the command line: files in; report, artifacts and recommendations out."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import checkerboard as board
import pytest
from tiny_bert import write_tiny_bert

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def tfrec(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "TFREC_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "tfrec.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env=environment,
    )


def run_line(folder: Path) -> list[str]:
    settings = board.arguments(
        folder, f"adapt.text={folder / 'bert'}", 'adapt.tracking=["tensorboard"]'
    )
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["run", "files", *sets, "--out", "run"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = board.write(tmp_path_factory.mktemp("end_to_end"))
    write_tiny_bert(folder / "bert")
    return folder, tfrec(*run_line(folder), cwd=folder)


def artifacts(folder: Path) -> dict[str, float]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("manifest.json")
    }


def test_it_ends_well_with_the_table_and_the_folder(first):
    _, done = first
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "run"
    for name in ("most popular", "EASE", "two-tower", "two-tower + ranker"):
        assert any(line.strip().startswith(name) for line in lines), name


def test_it_leaves_every_artifact_and_the_report(first):
    folder, _ = first
    stages = ("prepare", "adapt/retrieval", "adapt/ranking", "evaluate")
    assert set(artifacts(folder / "run")) == {f"{stage}/manifest.json" for stage in stages}
    page = (folder / "run" / "report.html").read_text("utf-8")
    assert "<html" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)
    assert not list((folder / "run").rglob("*.partial"))
    assert not list((folder / "run").rglob(".*.work"))


def test_the_same_command_again_makes_nothing_anew(first):
    folder, _ = first
    before = artifacts(folder)
    again = tfrec(*run_line(folder), cwd=folder)
    assert again.returncode == 0, again.stderr
    assert artifacts(folder) == before
    assert "two-tower + ranker" in again.stdout


def test_inspect_finds_every_byte_as_it_was(first):
    folder, _ = first
    done = tfrec("inspect", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    for kind in ("dataset", "retrieval", "ranking", "report"):
        assert f": {kind}" in done.stdout


def test_it_recommends_to_a_file_of_users(first):
    folder, _ = first
    users = [f"u{u}" for u in range(board.USERS)] + ["stranger"]
    (folder / "users.csv").write_text("user_id\n" + "\n".join(users) + "\n")
    done = tfrec(
        *("recommend", "run", "--users", "users.csv", "--k", "5", "--out", "recs.csv"), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "recs.csv\n"
    with (folder / "recs.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["user_id", "item_id", "rank", "score"]
    assert [row[0] for row in rows] == [user for user in users for _ in range(5)]
    seen = set(zip(*(board.events()[name] for name in ("user_id", "item_id")), strict=True))
    assert not seen & {(row[0], row[1]) for row in rows}
