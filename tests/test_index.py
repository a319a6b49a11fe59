"""The indexes: exact answers by definition, ScaNN close to them, both the same to their users."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrec.errors import ArtifactError, InputError
from tfrec.index import (
    EXACT_LIMIT,
    ExactIndex,
    Ragged,
    ScannIndex,
    TopK,
    load_index,
    make_index,
    top_k,
)

try:
    import scann  # noqa: F401
except ImportError:
    KINDS = ["exact"]
else:
    KINDS = ["exact", "scann"]


def _vectors(n, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def _ids(n):
    return np.arange(1, n + 1, dtype=np.int32)


def _by_definition(queries, vectors, ids, k, exclude):
    """Sorts everything, in float32 as the index does, and drops what is excluded."""
    out = []
    for query, banned in zip(queries, exclude, strict=True):
        scores = vectors @ query
        order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))
        out.append([int(ids[i]) for i in order if ids[i] not in banned][:k])
    return out


@given(st.integers(0, 2**32 - 1))
def test_exact_search_is_a_sort_of_everything_without_the_excluded(seed):
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 40)), int(rng.integers(1, 50))
    # Small whole numbers: many ties, and sums that are exact in any order.
    vectors = rng.integers(-2, 3, (n, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (6, 3)).astype(np.float32)
    ids = (rng.permutation(100)[:n] + 1).astype(np.int32)
    exclude = [rng.integers(0, 120, rng.integers(0, 30)).astype(np.int32) for _ in queries]
    found = ExactIndex.build(vectors, ids).search(queries, k, Ragged.of(exclude))
    expected = _by_definition(queries, vectors, ids, k, exclude)
    assert [[int(i) for i in row if i] for row in found.ids] == expected
    assert ((found.ids == 0) == np.isneginf(found.scores)).all()
    assert found.ids.shape == (6, k)


def test_many_blocks_give_what_one_query_at_a_time_gives(monkeypatch):
    monkeypatch.setattr("tfrec.index._BLOCK_CELLS", 500)
    index = ExactIndex.build(_vectors(100), _ids(100))
    queries = _vectors(33, seed=1)
    exclude = Ragged.of([_ids(100)[: i * 3] for i in range(33)])
    together = index.search(queries, 10, exclude)
    for i in range(33):
        alone = index.search(queries[i : i + 1], 10, exclude.slice(i, i + 1))
        assert (alone.ids[0] == together.ids[i]).all()
        assert alone.scores[0] == pytest.approx(together.scores[i], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_is_best_first_and_has_the_inner_products(kind):
    vectors, queries = _vectors(500), _vectors(20, seed=1)
    found = make_index(vectors, _ids(500), kind).search(queries, 10)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    products = (queries @ vectors.T)[np.arange(20)[:, None], found.ids - 1]
    assert found.scores == pytest.approx(products, abs=1e-4)
    assert found.scores.dtype == np.float32
    assert found.ids.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_excluded_is_never_found_and_k_places_are_filled(kind):
    queries = _vectors(5, seed=1)
    index = make_index(_vectors(200), _ids(200), kind)
    best = index.search(queries, 150).ids
    found = index.search(queries, 40, Ragged.of(best))
    for row, banned in zip(found.ids, best, strict=True):
        assert not set(row) & set(banned)
        assert (row > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_k_above_the_number_of_items_is_filled_with_zero_and_minus_infinity(kind):
    found = make_index(_vectors(20), _ids(20), kind).search(_vectors(2, seed=1), 25)
    assert sorted(found.ids[0]) == [0] * 5 + list(range(1, 21))
    assert np.isneginf(found.scores[:, 20:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_give_no_rows(kind):
    index = make_index(_vectors(20), _ids(20), kind)
    found = index.search(np.zeros((0, 8), np.float32), 3, Ragged.of([]))
    assert found.ids.shape == found.scores.shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_items_can_be_added_replaced_and_removed(kind):
    vectors = _vectors(60)
    index = make_index(vectors[:50], _ids(50), kind)
    far = 10 * np.abs(vectors).max()
    query = np.eye(8, dtype=np.float32)[:1]
    index.add(query * far, np.array([77], np.int32))
    assert index.search(query, 1).ids.tolist() == [[77]]
    index.add(query * far * 2, np.array([5], np.int32))
    assert index.search(query, 2).ids.tolist() == [[5, 77]]
    index.remove(np.array([5, 77, 999], np.int32))
    left = sorted(set(range(1, 51)) - {5})
    assert sorted(index.ids) == left
    assert sorted(index.search(query, 49).ids[0]) == left


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_index_answers_the_same_and_holds_no_pickle(kind, tmp_path):
    index = make_index(_vectors(300), _ids(300), kind)
    index.add(_vectors(3, seed=5), np.array([900, 500, 700], np.int32))
    index.remove(np.array([4, 500], np.int32))
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    queries = _vectors(9, seed=1)
    before, after = index.search(queries, 20), loaded.search(queries, 20)
    assert type(loaded) is type(index)
    assert (before.ids == after.ids).all()
    # ScaNN lays changed points out anew, which moves the last bits of its sums.
    assert before.scores == pytest.approx(after.scores, rel=1e-6, abs=1e-6)
    assert not list((tmp_path / "index").rglob("*.pkl"))
    assert np.isin(900, loaded.ids)


@pytest.mark.skipif("scann" not in KINDS, reason="ScaNN has no wheel here")
def test_scann_finds_nearly_all_that_the_exact_index_finds():
    centres = _vectors(40, 16)
    rng = np.random.default_rng(1)
    vectors = centres[rng.integers(40, size=4000)] + 0.3 * _vectors(4000, 16, seed=2)
    queries = vectors[:100] + 0.1 * _vectors(100, 16, seed=3)
    exact = make_index(vectors, _ids(4000), "exact").search(queries, 10).ids
    near = make_index(vectors, _ids(4000), "scann").search(queries, 10).ids
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, near, strict=True)])
    assert recall >= 0.9


@pytest.mark.skipif("scann" not in KINDS, reason="ScaNN has no wheel here")
def test_a_folder_with_a_pickle_is_refused(tmp_path):
    make_index(_vectors(20), _ids(20), "scann").save(tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(b"anything")
    with pytest.raises(ArtifactError, match="pickle"):
        load_index(tmp_path)


def test_auto_is_exact_for_small_catalogs():
    assert EXACT_LIMIT == 100_000
    assert isinstance(make_index(_vectors(30), _ids(30)), ExactIndex)


def test_scann_refuses_too_few_vectors():
    with pytest.raises(InputError, match="exact"):
        ScannIndex.build(_vectors(3), _ids(3))


@pytest.mark.parametrize(
    ("vectors", "ids", "says"),
    [
        (_vectors(2), [1], "one vector for each id"),
        (np.full((1, 8), np.nan, np.float32), [7], "item 7"),
        (_vectors(1), [0], "start at 1"),
        (_vectors(2), [3, 3], "twice"),
    ],
)
def test_vectors_and_ids_that_do_not_fit_are_refused(vectors, ids, says):
    with pytest.raises(InputError, match=says):
        ExactIndex.build(vectors, np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("queries", "k", "exclude", "says"),
    [
        (_vectors(1, 5), 3, None, r"\(batch, 8\)"),
        (_vectors(1), 0, None, "k is at least 1"),
        (_vectors(2), 3, Ragged.of([[1]]), "1 lists to exclude for 2 queries"),
        (np.full((1, 8), np.inf, np.float32), 3, None, "not finite"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, k, exclude, says):
    with pytest.raises(InputError, match=says):
        ExactIndex.build(_vectors(9), _ids(9)).search(queries, k, exclude)


def test_vectors_of_another_width_cannot_be_added():
    with pytest.raises(InputError, match="8 numbers, not 5"):
        ExactIndex.build(_vectors(9), _ids(9)).add(_vectors(1, 5), np.array([10], np.int32))


def test_a_damaged_folder_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"index\.json"):
        load_index(tmp_path)
    ExactIndex.build(_vectors(9), _ids(9)).save(tmp_path)
    (tmp_path / "ids.npy").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_index(tmp_path)


def test_scores_that_are_not_numbers_are_refused():
    scores = np.array([[1, np.nan, 3, 2]], np.float32)
    for k in (2, 4):
        with pytest.raises(InputError, match="NaN"):
            top_k(scores.copy(), _ids(4), k)


def test_top_k_of_scores_gives_ties_to_the_lower_column():
    got = top_k(np.zeros((1, 5), np.float32), _ids(5), 3, Ragged.of([[2]]))
    assert isinstance(got, TopK)
    assert got.ids.tolist() == [[1, 3, 4]]


def test_ragged_lists_can_be_sliced_and_taken():
    lists = Ragged.of([[1, 2], [], [3]])
    assert lists.lengths.tolist() == [2, 0, 1]
    assert len(lists) == 3
    assert lists.slice(1, 3).ids.tolist() == [3]
    taken = lists.take(np.array([2, 0, 2]))
    assert taken.offsets.tolist() == [0, 1, 3, 4]
    assert taken.ids.tolist() == [3, 1, 2, 3]


def test_importing_the_index_imports_neither_tensorflow_nor_scipy():
    heavy = "{'tensorflow', 'scipy', 'scann', 'matplotlib'}"
    code = f"import sys, tfrec.index, tfrec.metrics; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
