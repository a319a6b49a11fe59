"""Arrays of a bundle: back as they were, or as near as int8 comes, and damage is one line."""

import numpy as np
import pytest

from tfrec.bundle import holds_codes, load_codes, load_rows, save_codes, save_rows
from tfrec.errors import ArtifactError
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
