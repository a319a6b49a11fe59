"""Artifacts: whole or absent, never half; every byte accounted for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfrec
from tfrec.artifact import (
    FORMAT,
    MANIFEST,
    Artifact,
    below,
    content_digest,
    current,
    file_digest,
    recipe_digest,
    write_json,
    writing,
)
from tfrec.errors import ArtifactError, SetupError

MANIFEST_KEYS = (
    *("kind", "config", "parents", "metrics", "files"),
    *("digest", "created", "tfrec_version"),
)
CONFIG = {"data": {"source": "files", "k_core": 0}, "seed": 1}


def make(path: Path, content: bytes = b"payload", config=CONFIG, parents=None) -> Artifact:
    with writing(path, kind="dataset", config=config, parents=parents) as draft:
        (draft.path / "deep" / "er").mkdir(parents=True)
        (draft.path / "deep" / "er" / "größe.bin").write_bytes(content)
        (draft.path / "empty.txt").touch()
        draft.metrics["rows"] = len(content)
    return Artifact.load(path, "dataset")


def change_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | changes))


def everything(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file below, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestRoundTrip:
    def test_what_was_written_is_read_back(self, tmp_path):
        parent = make(tmp_path / "parent")
        found = make(tmp_path / "a", b"12345", parents={"dataset": parent})
        assert found.kind == "dataset"
        assert found.config == CONFIG
        assert found.parents == {"dataset": parent.digest}
        assert found.metrics == {"rows": 5}
        assert found.tfrec_version == tfrec.__version__
        assert found.file("deep/er/größe.bin").read_bytes() == b"12345"
        assert {name: entry["bytes"] for name, entry in found.files.items()} == {
            "deep/er/größe.bin": 5,
            "empty.txt": 0,
        }

    def test_nothing_else_is_left_beside_it(self, tmp_path):
        make(tmp_path / "a")
        make(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_digests_are_those_of_sha256(self, tmp_path):
        # FIPS 180-2, appendix B.1
        make(tmp_path / "a", b"abc")
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert file_digest(tmp_path / "a" / "deep" / "er" / "größe.bin") == expected

    def test_equal_content_has_an_equal_digest_anywhere_and_at_any_time(self, tmp_path):
        first, second = make(tmp_path / "a"), make(tmp_path / "elsewhere" / "b")
        change_manifest(second.path, created="1999-12-31T00:00:00+00:00")
        assert Artifact.load(second.path).digest == first.digest

    def test_a_changed_payload_config_or_parent_changes_the_digest(self, tmp_path):
        plain = make(tmp_path / "a")
        others = [
            make(tmp_path / "b", b"another"),
            make(tmp_path / "c", config={**CONFIG, "seed": 2}),
            make(tmp_path / "d", parents={"dataset": plain}),
        ]
        assert len({plain.digest, *(other.digest for other in others)}) == 4

    tree = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    )

    @given(config=st.dictionaries(st.text(), tree))
    @settings(max_examples=25, deadline=None)
    def test_digests_survive_json(self, config):
        again = json.loads(json.dumps(config))
        assert content_digest("k", config, {}, {}) == content_digest("k", again, {}, {})
        assert recipe_digest("k", config) == recipe_digest("k", again)


class TestReading:
    @pytest.mark.parametrize(
        ("damage", "answer"),
        [
            (lambda path: path.write_bytes(b"paylOad"), "does not match its digest"),
            (lambda path: path.write_bytes(b"payloa"), "6 bytes, not 7"),
            (lambda path: path.unlink(), "missing"),
        ],
        ids=["changed byte", "cut off", "missing file"],
    )
    def test_a_damaged_file_is_named(self, damage, answer, tmp_path):
        found = make(tmp_path / "a")
        damage(found.file("deep/er/größe.bin"))
        with pytest.raises(ArtifactError, match=rf"größe\.bin.*{answer}"):
            Artifact.load(tmp_path / "a")

    @pytest.mark.parametrize(
        "changes",
        [{"config": {**CONFIG, "seed": 2}}, {"parents": {"dataset": "0"}}, {"files": {}}],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_changed_manifest_is_noticed(self, changes, tmp_path):
        make(tmp_path / "a")
        change_manifest(tmp_path / "a", **changes)
        with pytest.raises(ArtifactError, match="changed after it was written"):
            Artifact.peek(tmp_path / "a")

    def test_a_newer_format_is_refused_with_both_versions(self, tmp_path):
        make(tmp_path / "a")
        change_manifest(tmp_path / "a", format=FORMAT + 1, kind=None)
        with pytest.raises(ArtifactError, match=rf"format {FORMAT + 1}.*reads format {FORMAT}"):
            Artifact.load(tmp_path / "a")

    def test_a_folder_without_a_manifest_is_unfinished(self, tmp_path):
        with pytest.raises(ArtifactError, match="unfinished"):
            Artifact.load(tmp_path)

    def test_an_absent_folder_says_so(self, tmp_path):
        with pytest.raises(ArtifactError, match="no artifact at"):
            Artifact.load(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "text",
        ["", "{", "\ufeff{}", "3", "[]", "null", "[" * 100_000, "{}", '{"format": 1}'],
        ids=lambda text: text[:20],
    )
    def test_a_manifest_that_is_none_is_damaged(self, text, tmp_path):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ArtifactError, match="damaged"):
            Artifact.load(tmp_path)

    @pytest.mark.parametrize("key", list(MANIFEST_KEYS))
    @pytest.mark.parametrize("value", [None, True, 1.5, [], ["sha256"]])
    def test_a_manifest_with_a_key_of_another_type_is_damaged(self, key, value, tmp_path):
        make(tmp_path / "a")
        change_manifest(tmp_path / "a", **{key: value})
        with pytest.raises(ArtifactError, match=rf"damaged: {key} is"):
            Artifact.peek(tmp_path / "a")

    @pytest.mark.parametrize("key", ["format", *MANIFEST_KEYS])
    def test_a_manifest_without_one_of_its_keys_is_damaged(self, key, tmp_path):
        manifest = make(tmp_path / "a").path / MANIFEST
        kept = {k: v for k, v in json.loads(manifest.read_text()).items() if k != key}
        manifest.write_text(json.dumps(kept))
        with pytest.raises(ArtifactError, match=rf"damaged: {key} is missing"):
            Artifact.peek(tmp_path / "a")

    @pytest.mark.parametrize(
        "entry",
        [None, "abc", {}, {"bytes": 1}, {"sha256": "0"}, {"sha256": 0, "bytes": 1}, ["0", 1]],
    )
    def test_a_file_without_its_digest_and_size_is_damage(self, entry, tmp_path):
        make(tmp_path / "a")
        change_manifest(tmp_path / "a", files={"empty.txt": entry})
        with pytest.raises(ArtifactError, match="damaged: files is"):
            Artifact.load(tmp_path / "a")

    def test_another_kind_is_refused(self, tmp_path):
        make(tmp_path / "a")
        with pytest.raises(ArtifactError, match="is a dataset artifact, not a ranking"):
            Artifact.load(tmp_path / "a", "ranking")

    def test_a_file_that_it_does_not_have_is_named(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"no file 'weights\.bin'"):
            make(tmp_path / "a").file("weights.bin")


class TestCurrent:
    def test_the_same_recipe_needs_no_work(self, tmp_path):
        found = make(tmp_path / "a")
        assert current(tmp_path / "a", kind="dataset", config=dict(CONFIG)) == found

    @pytest.mark.parametrize(
        "recipe",
        [
            {"config": {**CONFIG, "seed": 2}},
            {"config": {"seed": 1}},
            {"kind": "ranking"},
        ],
        ids=["another value", "a key less", "another kind"],
    )
    def test_another_recipe_does(self, recipe, tmp_path):
        make(tmp_path / "a")
        assert current(tmp_path / "a", **({"kind": "dataset", "config": CONFIG} | recipe)) is None

    def test_another_parent_does(self, tmp_path):
        old, new = make(tmp_path / "old"), make(tmp_path / "new", b"more")
        make(tmp_path / "a", parents={"dataset": old})
        recipe = {"kind": "dataset", "config": CONFIG}
        assert current(tmp_path / "a", **recipe, parents={"dataset": old}) is not None
        assert current(tmp_path / "a", **recipe, parents={"dataset": new}) is None

    def test_a_damaged_or_absent_artifact_does(self, tmp_path):
        make(tmp_path / "a").file("empty.txt").write_text("not empty")
        assert current(tmp_path / "a", kind="dataset", config=CONFIG) is None
        assert current(tmp_path / "b", kind="dataset", config=CONFIG) is None


class TestInterruptedWriting:
    def write_then(self, path: Path, last: str) -> subprocess.CompletedProcess[str]:
        """Another process begins to write at ``path`` and then does ``last``."""
        code = (
            "import os, signal, sys; from tfrec.artifact import writing\n"
            f"with writing({str(path)!r}, kind='dataset', config={{}}) as draft:\n"
            "    (draft.path / 'half').write_bytes(b'half')\n"
            f"    {last}"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    def test_kill_9_leaves_the_old_artifact_and_the_next_attempt_works(self, tmp_path):
        old = make(tmp_path / "a", b"old")
        done = self.write_then(tmp_path / "a", "os.kill(os.getpid(), signal.SIGKILL)")
        assert done.returncode == -signal.SIGKILL
        assert Artifact.load(tmp_path / "a") == old
        assert make(tmp_path / "a", b"new").metrics == {"rows": 3}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_kill_9_of_the_first_attempt_leaves_no_artifact(self, tmp_path):
        self.write_then(tmp_path / "a", "os.kill(os.getpid(), signal.SIGKILL)")
        with pytest.raises(ArtifactError, match="no artifact"):
            Artifact.load(tmp_path / "a")

    def test_a_second_process_is_refused_and_the_first_one_loses_nothing(self, tmp_path):
        with writing(tmp_path / "a", kind="dataset", config=CONFIG) as draft:
            (draft.path / "half").write_bytes(b"half")
            second = self.write_then(tmp_path / "a", "pass")
        assert "another tfrec process is making" in second.stderr
        assert Artifact.load(tmp_path / "a").file("half").read_bytes() == b"half"
        assert self.write_then(tmp_path / "a", "pass").returncode == 0

    @pytest.mark.parametrize("last", ["os.kill(os.getpid(), signal.SIGINT)", "raise ValueError"])
    def test_ctrl_c_and_errors_leave_the_old_artifact_and_nothing_else(self, last, tmp_path):
        old = everything(make(tmp_path / "a").path)
        assert self.write_then(tmp_path / "a", last).returncode != 0
        assert everything(tmp_path) == {f"a/{name}": content for name, content in old.items()}


class TestKilledBetweenTheRenames:
    """The old artifact was moved aside and the new one was not yet moved to its place."""

    @pytest.fixture
    def old(self, tmp_path) -> Artifact:
        old = make(tmp_path / "a", b"old")
        os.rename(tmp_path / "a", tmp_path / ".a.old")
        (tmp_path / ".a.partial").mkdir()
        return old

    @pytest.mark.parametrize(
        "look",
        [
            Artifact.peek,
            Artifact.load,
            lambda path: current(path, kind="dataset", config=CONFIG),
            lambda path: Artifact.load(*below(path)),
            lambda path: Artifact.load(*below(path.parent)),
        ],
        ids=["peek", "load", "current", "below", "below its parent"],
    )
    def test_whoever_looks_finds_the_old_one(self, look, old, tmp_path):
        assert look(tmp_path / "a") == old
        assert not (tmp_path / ".a.old").exists()

    def test_looking_at_a_neighbour_is_enough(self, old, tmp_path):
        make(tmp_path / "b")
        os.rename(tmp_path / "a", tmp_path / ".a.old")
        Artifact.peek(tmp_path / "b")
        assert Artifact.load(tmp_path / "a") == old

    def test_the_next_attempt_replaces_it(self, old, tmp_path):
        assert make(tmp_path / "a", b"newer").metrics == {"rows": 5}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_another_attempt_that_fails_does_not_lose_it(self, old, tmp_path):
        def fail() -> None:
            with writing(tmp_path / "a", kind="dataset", config={}):
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            fail()
        assert Artifact.load(tmp_path / "a") == old

    @pytest.mark.parametrize("nth", [1, 2])
    def test_a_kill_at_either_rename_loses_nothing(self, nth, tmp_path):
        old = make(tmp_path / "a", b"old")
        code = (
            "import os, signal; from tfrec import artifact\n"
            "rename, calls = os.rename, []\n"
            "def deadly(*names):\n"
            "    calls.append(names)\n"
            f"    os.kill(os.getpid(), signal.SIGKILL) if len(calls) == {nth} else rename(*names)\n"
            "os.rename = deadly\n"
            f"with artifact.writing({str(tmp_path / 'a')!r}, kind='dataset', config={{}}): pass\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (tmp_path / "a").exists() == (nth == 1)
        assert Artifact.load(tmp_path / "a") == old

    def test_a_reader_in_between_costs_the_writer_nothing(self, tmp_path, monkeypatch):
        make(tmp_path / "a", b"old")
        rename = os.rename

        def read_before(source, target):
            if Path(source).name == ".a.partial":
                monkeypatch.undo()
                assert Artifact.peek(tmp_path / "a").metrics == {"rows": 3}
            rename(source, target)

        monkeypatch.setattr(os, "rename", read_before)
        assert make(tmp_path / "a", b"newer").metrics == {"rows": 5}
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_leftovers_beside_a_whole_artifact_are_not_taken_for_one(self, tmp_path):
        new = make(tmp_path / "a", b"new")
        make(tmp_path / "elsewhere" / "b", b"older")
        os.rename(tmp_path / "elsewhere" / "b", tmp_path / ".a.old")
        assert Artifact.load(tmp_path / "a") == new
        (tmp_path / ".z.old").mkdir()
        with pytest.raises(ArtifactError, match="no artifact at"):
            Artifact.load(tmp_path / "z")

    def test_a_folder_of_another_program_keeps_its_name(self, tmp_path):
        make(tmp_path / "a")
        other = tmp_path / ".browser.old"
        other.mkdir()
        (other / "manifest.json").write_text('{"manifest_version": 3}')
        Artifact.load(tmp_path / "a")
        assert other.is_dir()
        assert not (tmp_path / "browser").exists()


class TestBelow:
    def test_every_finished_artifact_of_a_run_is_found_and_no_draft(self, tmp_path):
        made = [tmp_path / name for name in ("adapt/ranking", "adapt/retrieval", "prepare")]
        for path in made:
            make(path)
        (tmp_path / "evaluate").mkdir()
        make(tmp_path / ".draft.partial")
        assert below(tmp_path) == made
        assert below(made[0]) == made[:1]
        assert below(tmp_path / "nowhere") == []


class TestFullDisk:
    def test_leaves_the_old_artifact_and_nothing_else(self, small_disk):
        disk = small_disk(64)
        old = everything(make(disk / "a", bytes(4096)).path)
        with pytest.raises(SetupError, match="no space left"):
            make(disk / "a", bytes(100_000))
        assert everything(disk) == {f"a/{name}": content for name, content in old.items()}

    def test_no_room_for_the_manifest_is_the_same(self, small_disk):
        disk = small_disk(64)

        def fill_the_disk() -> None:
            with writing(disk / "a", kind="dataset", config={}) as draft:
                free = os.statvfs(disk)
                (draft.path / "rest").write_bytes(bytes(free.f_bavail * free.f_bsize))

        with pytest.raises(SetupError, match="no space left"):
            fill_the_disk()
        assert everything(disk) == {}

    def test_is_the_same_on_any_disk(self, tmp_path, full_device):
        def write_too_much() -> None:
            with writing(tmp_path / "a", kind="dataset", config={}) as draft:
                (draft.path / "big").symlink_to(full_device)
                (draft.path / "big").write_bytes(b"too much")

        with pytest.raises(SetupError, match="no space left"):
            write_too_much()
        assert not (tmp_path / "a").exists()


class TestJson:
    def test_a_failed_write_keeps_the_old_file(self, tmp_path):
        write_json(tmp_path / "x.json", {"a": 1})
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "x.json", {"a": float("nan")})
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}

    def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(self, tmp_path, monkeypatch):
        write_json(tmp_path / "x.json", {"a": 1})
        before = everything(tmp_path)

        def full(*given):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SetupError, match=r"no space left on the disk while writing .*x\.json"):
            write_json(tmp_path / "x.json", {"a": 2})
        assert everything(tmp_path) == before
