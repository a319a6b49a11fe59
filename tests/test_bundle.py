"""Bundles: versions appear whole; arrays come back as they were, or as near as int8 comes."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tfrec import bundle
from tfrec.artifact import write_json, writing
from tfrec.bundle import Bundle, holds_codes, load_codes, load_rows, save_codes, save_rows
from tfrec.errors import ArtifactError, SetupError
from tfrec.index import Ragged
from tfrec.recommender import LinearItems


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vectors.npy"


@pytest.fixture
def vectors():
    rng = np.random.default_rng(3)
    made = (rng.normal(size=(40, 16)) * np.geomspace(1e-3, 10, 40)[:, None]).astype(np.float32)
    made[0] = 0
    return made


@pytest.fixture
def linear():
    """Weights of which most are small and a few large, as those of EASE."""
    rng = np.random.default_rng(5)
    weights = (rng.normal(size=(120, 120)) ** 3 * 0.01).astype(np.float32)
    weights[0] = weights[:, 0] = 0
    return LinearItems(weights)


class TestRows:
    def test_floats_come_back_bit_by_bit(self, path, vectors):
        save_rows(path, vectors)
        np.testing.assert_array_equal(load_rows(path), vectors)
        assert not holds_codes(path)

    def test_int8_comes_within_half_a_step_of_each_row(self, path, vectors):
        save_rows(path, vectors, int8=True)
        found = load_rows(path)
        assert found.dtype == np.float32
        step = np.abs(vectors).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - vectors) <= 0.501 * step).all()
        assert not found[0].any()
        assert np.abs(found - vectors).max() > 0
        assert not path.exists()

    @pytest.mark.parametrize("int8", [False, True])
    def test_equal_rows_are_kept_once(self, path, vectors, int8):
        repeated = vectors[np.arange(400) % 40]
        save_rows(path, repeated, int8)
        assert sum(f.stat().st_size for f in path.parent.iterdir()) < 400 * 16 * (1 if int8 else 4)
        np.testing.assert_allclose(load_rows(path), repeated, atol=0.1)
        np.testing.assert_array_equal(load_rows(path)[:40], load_rows(path)[360:])

    @pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 3)])
    def test_arrays_of_almost_nothing(self, path, shape):
        save_rows(path, np.ones(shape, np.float32), int8=True)
        np.testing.assert_allclose(load_rows(path), np.ones(shape), rtol=1e-6)

    def test_the_same_vectors_give_the_same_bytes(self, tmp_path, vectors):
        for name in ("a", "b"):
            save_rows(tmp_path / f"{name}.npy", vectors, int8=True)
        a, b = ((tmp_path / f"{name}.int8.npy.zst").read_bytes() for name in ("a", "b"))
        assert a == b


class TestDamage:
    @pytest.mark.parametrize("keep", [0, 7, 60, -3])
    def test_codes_cut_short(self, path, vectors, keep):
        save_rows(path, vectors, int8=True)
        file = path.with_suffix(".int8.npy.zst")
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ArtifactError, match=r"vectors\.int8\.npy\.zst cannot be read"):
            load_rows(path)

    def test_no_zstd(self, path, vectors):
        save_rows(path, vectors, int8=True)
        path.with_suffix(".int8.npy.zst").write_bytes(b"nothing of the kind")
        with pytest.raises(ArtifactError, match=r"vectors\.int8\.npy\.zst cannot be read"):
            load_rows(path)

    def test_codes_of_another_type(self, path):
        save_codes(path, np.ones((3, 2), np.int16), np.ones(3, np.float32))
        with pytest.raises(ArtifactError, match=r"it holds int16 \(3, 2\)"):
            load_codes(path)

    @pytest.mark.parametrize(
        ("scales", "message"),
        [
            (np.ones(4, np.float32), "3 rows and 4 scales"),
            (np.ones((3, 1), np.float32), "holds no scales"),
            (np.ones(3), "holds no scales"),
            (np.array([1, np.nan, 1], np.float32), "holds no scales"),
        ],
    )
    def test_scales_that_do_not_fit(self, path, scales, message):
        save_codes(path, np.ones((3, 2), np.int8), scales)
        with pytest.raises(ArtifactError, match=message):
            load_rows(path)

    def test_a_missing_file(self, path, vectors):
        with pytest.raises(ArtifactError, match=r"vectors\.npy cannot be read: .*No such file"):
            load_rows(path)
        save_rows(path, vectors, int8=True)
        path.with_suffix(".scales.npy").unlink()
        with pytest.raises(ArtifactError, match=r"vectors\.scales\.npy cannot be read"):
            load_rows(path)

    def test_rows_that_are_not_there(self, path, vectors):
        save_rows(path, vectors[np.arange(400) % 40], int8=True)
        np.save(path.with_suffix(".rows.npy"), np.array([0, 40], np.int32))
        with pytest.raises(ArtifactError, match=r"vectors\.npy cannot be read"):
            load_rows(path)


class TestLinear:
    def test_codes_keep_the_scores(self, linear):
        coded = linear.coded()
        assert coded.weights.dtype == np.int8
        assert coded.coded() is coded
        histories = Ragged.of([np.array([3, 50, 3, 119]), np.arange(1, 120), np.array([], int)])
        mine, its = linear.scores(histories), coded.scores(histories)
        assert its.dtype == np.float32
        assert not its[2].any()
        # The errors of single weights are independent: their sum grows with the root of the count.
        step = coded.scales[None] * np.sqrt([[3], [119], [1]])
        assert (np.abs(mine - its) <= 2 * step).all()
        assert np.corrcoef(mine[1], its[1])[0, 1] > 0.999

    def test_large_weights_are_not_cut_off(self, linear):
        linear.weights[3, 5] = 1
        coded = linear.coded()
        error = np.abs(coded.weights * coded.scales - linear.weights)
        assert (error <= 0.501 * coded.scales).all()
        assert np.abs(coded.weights).max() == 127

    def test_scores_of_some_items_are_the_same_bits_as_those_of_all(self, linear):
        coded = linear.coded()
        histories = Ragged.of([np.arange(1, 100), np.array([7, 8])])
        rows = np.array([[3, 1, 0, 120], [2, 2, 119, 121]], np.int32)  # from 120 on: added later
        whole = np.pad(coded.scores(histories), ((0, 0), (0, 2)))
        found = coded.scores_of(histories, rows)
        np.testing.assert_array_equal(found, np.take_along_axis(whole, rows, axis=1))

    def test_weights_of_zeros(self):
        coded = LinearItems(np.zeros((4, 4), np.float32)).coded()
        assert not coded.scores(Ragged.of([np.array([1, 2])])).any()


def add(folder, version, models=("rank", "retrieve"), needs=()):
    """A finished version with SavedModels that hold next to nothing; it is not published."""
    told = {f"tf-serving/{name}": {"needs": list(needs)} for name in models}
    place = folder / "versions" / str(version)
    with writing(place, kind="bundle", config={"version": version}) as draft:
        for name in models:
            (draft.path / "tf-serving" / name).mkdir(parents=True)
            (draft.path / "tf-serving" / name / "saved_model.pb").write_text(f"{name} {version}")
        write_json(draft.path / "content.json", {"models": told, "arrays_int8": True})
        draft.metrics["seconds"] = 1.5


def published(folder, version, keep=3, **models):
    add(folder, version, **models)
    bundle.publish(folder, version, keep)


def served(folder):
    """What TensorFlow Serving finds: each file's text, and of each version the model's."""
    place = folder / "tf-serving"
    files = {path.name: path.read_text() for path in place.glob("*.config")}
    found = {path: path / "saved_model.pb" for path in place.glob("*/*")}
    links = {str(path.relative_to(place)): file.read_text() for path, file in found.items()}
    return files | links


class TestPublish:
    def test_the_newest_version_and_its_models(self, tmp_path):
        published(tmp_path, 1)
        published(tmp_path, 2, keep=1)
        assert Bundle.load(tmp_path).version == 2
        assert served(tmp_path).keys() == {
            "models.config",
            "batching.config",
            "rank/2",
            "retrieve/2",
        }
        assert served(tmp_path)["rank/2"] == "rank 2"
        assert bundle.versions(tmp_path) == [2]

    @pytest.mark.parametrize("keep", [1, 3])
    @pytest.mark.parametrize("failing", ["write_json", "write_text"])
    @pytest.mark.parametrize("models", [("rank", "retrieve"), ("rank", "new"), ()])
    def test_a_full_disk_leaves_what_is_served(self, tmp_path, monkeypatch, keep, failing, models):
        published(tmp_path, 1)
        before, manifest = served(tmp_path), (tmp_path / "manifest.json").read_bytes()
        add(tmp_path, 2, models=models, needs=("scann",))

        def full(*given, **named):
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr(bundle, failing, full)
            if failing == "write_text":  # the first thing that is written
                patch.setattr(bundle, "write_json", full)
            with pytest.raises(SetupError, match="no space left"):
                bundle.publish(tmp_path, 2, keep)
        assert served(tmp_path) == before
        assert (tmp_path / "manifest.json").read_bytes() == manifest
        assert Bundle.load(tmp_path).version == 1
        bundle.publish(tmp_path, 2, keep)
        assert Bundle.load(tmp_path).version == 2
        expected = {f"{name}/2" for name in models}
        expected |= {"rank/1", "retrieve/1"} if keep == 3 else set()
        assert {name for name in served(tmp_path) if "/" in name} == expected

    def test_nothing_is_taken_away_before_the_manifest_names_the_new_version(
        self, tmp_path, monkeypatch
    ):
        """As a kill at that moment would leave it."""
        published(tmp_path, 1)
        before = served(tmp_path)
        add(tmp_path, 2, models=("rank", "new"))
        seen = {}

        def look(path, value):
            seen.update(served(tmp_path))
            write_json(path, value)

        monkeypatch.setattr(bundle, "write_json", look)
        bundle.publish(tmp_path, 2, 1)
        assert {name: seen[name] for name in before if "/" in name} == {
            name: text for name, text in before.items() if "/" in name
        }
        assert {"rank/2", "new/2"} < seen.keys()
        assert all(f'"{name}"' in seen["models.config"] for name in ("rank", "retrieve", "new"))
        assert "retrieve" not in served(tmp_path)["models.config"]
        assert served(tmp_path).keys() == {"models.config", "batching.config", "rank/2", "new/2"}

    @pytest.mark.parametrize(
        ("where", "version"),
        [("_list_models", 1), ("write_json", 1), ("_unlink", 2), ("os.rename", 2)],
    )
    def test_a_kill_leaves_a_whole_version_and_the_next_time_mends_the_rest(
        self, tmp_path, where, version
    ):
        published(tmp_path, 1)
        add(tmp_path, 2, models=("rank", "new"))
        code = (
            "import os, signal, sys; from pathlib import Path; from tfrec import bundle; "
            f"bundle.{where} = lambda *given: os.kill(os.getpid(), signal.SIGKILL); "
            "bundle.publish(Path(sys.argv[1]), 2, 1)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
        assert done.returncode == -signal.SIGKILL
        found = Bundle.load(tmp_path)
        assert found.version == version
        kept = {"rank/1", "retrieve/1"} if version == 1 else {"rank/2", "new/2"}
        assert kept < served(tmp_path).keys()  # every model that a server finds is whole
        bundle.publish(tmp_path, 2, 1)
        assert served(tmp_path).keys() == {"models.config", "batching.config", "rank/2", "new/2"}
        assert bundle.versions(tmp_path) == [2]
        bundle.check(tmp_path)

    def test_operations_that_a_server_may_lack(self, tmp_path):
        published(tmp_path, 1, models=("retrieve_scann",), needs=("scann",))
        published(tmp_path, 2, models=("encode_text_strings",), needs=("tensorflow-text",))
        found = served(tmp_path)
        assert '"retrieve_scann"' not in found["models.config"]
        assert '"encode_text_strings"' in found["models.config"]
        for name in ("retrieve_scann", "encode_text_strings"):
            assert f'"{name}"' in found["models-scann.config"]
        published(tmp_path, 3, keep=1)
        assert "models-scann.config" not in served(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two versions of a bundle; changed by no test for longer than it takes."""
    folder = tmp_path_factory.mktemp("checked")
    published(folder, 1)
    published(folder, 2, models=("rank", "retrieve_scann"), needs=("scann",))
    return folder


class TestCheck:
    """Nothing can change beside the versions, nor in what describes them."""

    @pytest.fixture
    def copy(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy", symlinks=True)
        return tmp_path / "copy"

    @pytest.mark.parametrize("bit", [0x01, 0x80])
    @pytest.mark.parametrize(
        "name",
        [
            "manifest.json",
            "versions/1/manifest.json",
            "versions/2/manifest.json",
            "tf-serving/models.config",
            "tf-serving/models-scann.config",
            "tf-serving/batching.config",
        ],
    )
    def test_every_byte_counts(self, folder, name, bit):
        path = folder / name
        content = path.read_bytes()
        bundle.check(folder)
        try:
            for place in range(len(content)):
                changed = bytearray(content)
                changed[place] ^= bit
                path.write_bytes(changed)
                with pytest.raises(ArtifactError):
                    bundle.check(folder)
        finally:
            path.write_bytes(content)

    def test_numbers_of_any_version_that_were_changed_are_named(self, copy):
        path = copy / "versions" / "1" / "manifest.json"
        path.write_text(path.read_text().replace("1.5", "2.5"))
        assert Bundle.load(copy, 1).artifact.metrics == {"seconds": 2.5}
        with pytest.raises(ArtifactError, match=r"versions/1/manifest.json does not match its dig"):
            bundle.check(copy)

    def test_what_is_missing_or_leads_elsewhere(self, copy):
        config = copy / "tf-serving" / "batching.config"
        kept = config.read_text()
        config.unlink()
        with pytest.raises(ArtifactError, match=r"batching\.config is missing; export again"):
            bundle.check(copy)
        config.write_text(kept)
        link = copy / "tf-serving" / "rank" / "1"
        link.unlink()
        with pytest.raises(ArtifactError, match=r"rank/1/saved_model\.pb is missing"):
            bundle.check(copy)
        link.symlink_to("2")
        with pytest.raises(ArtifactError, match=r"rank/1 leads to 2, not \.\./\.\./versions/1/"):
            bundle.check(copy)

    def test_a_version_that_nobody_named(self, copy):
        (copy / "tf-serving" / "rank" / "3").mkdir()
        with pytest.raises(ArtifactError, match=r"finds .*rank/3, which is of no version in"):
            bundle.check(copy)

    def test_a_copy_that_followed_the_links(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "copy")
        bundle.check(tmp_path / "copy")
        path = tmp_path / "copy" / "tf-serving" / "rank" / "2" / "saved_model.pb"
        path.write_text("rank 3")
        with pytest.raises(ArtifactError, match=r"rank/2/saved_model\.pb does not match"):
            bundle.check(tmp_path / "copy")

    def test_a_version_that_was_not_published_yet_is_no_damage(self, copy):
        add(copy, 3)
        bundle.check(copy)

    def test_a_manifest_without_digests_of_the_versions(self, copy):
        """As an earlier tfrec wrote it."""
        told = json.loads((copy / "manifest.json").read_text())
        del told["manifests"]
        write_json(copy / "manifest.json", told)
        bundle.check(copy)

    @pytest.mark.parametrize("broken", [{"versions": 3}, {"manifests": 3}, {"versions": ["2"]}])
    def test_another_shape(self, copy, broken):
        told = json.loads((copy / "manifest.json").read_text())
        write_json(copy / "manifest.json", {**told, **broken})
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            bundle.check(copy)
