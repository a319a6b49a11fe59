"""The indexes: exact answers by definition, ScaNN close to them, both the same to their users."""

import errno
import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.index import (
    EXACT_LIMIT,
    ExactIndex,
    Ragged,
    ScannIndex,
    ShardedIndex,
    TopK,
    disk,
    load_index,
    make_index,
    shards,
    top_k,
)
from tfrec.index import scann as scann_module
from tfrec.index.among import Among

try:
    import scann  # noqa: F401
except ImportError:
    KINDS = ["exact"]
else:
    KINDS = ["exact", "scann"]


KINDS_OF_FILES = {".npy", ".json", ".pb", ".pbtxt"}


def _vectors(n, width=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def _ids(n):
    return np.arange(1, n + 1, dtype=np.int32)


def _clustered(n, seed=0):
    """Vectors in clusters, and 200 queries near some of them."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(100).normal(size=(40, 16))
    vectors = centres[rng.integers(40, size=n)] + 0.3 * rng.normal(size=(n, 16))
    queries = vectors[:200] + 0.1 * rng.normal(size=(200, 16))
    return vectors.astype(np.float32), queries.astype(np.float32)


def _recall(found, exact):
    pairs = [
        (set(f) - {0}, set(e) - {0}) for f, e in zip(found.tolist(), exact.tolist(), strict=True)
    ]
    return np.mean([len(f & e) / max(len(e), 1) for f, e in pairs])


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
    monkeypatch.setattr("tfrec.index.exact._QUERIES", 5)
    monkeypatch.setattr("tfrec.index.exact._ROWS", 7)
    index = ExactIndex.build(_vectors(100), _ids(100), threads=2)
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
def test_items_can_be_added_updated_and_removed(kind):
    vectors = _vectors(60)
    index = make_index(vectors[:50], _ids(50), kind)
    far = 10 * np.abs(vectors).max()
    query = np.eye(8, dtype=np.float32)[:1]
    index.add(query * far, np.array([77], np.int32))
    assert index.search(query, 1).ids.tolist() == [[77]]
    index.update(query * far * 2, np.array([5], np.int32))
    assert index.search(query, 2).ids.tolist() == [[5, 77]]
    index.upsert(np.tile(query, (2, 1)) * far * [[4], [3]], np.array([50_000, 77], np.int32))
    assert index.search(query, 3).ids.tolist() == [[50_000, 77, 5]]
    index.remove(np.array([5, 77, 50_000], np.int32))
    left = sorted(set(range(1, 51)) - {5})
    assert index.ids.tolist() == left
    assert sorted(index.search(query, 49).ids[0]) == left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "ids", "says"),
    [
        ("add", [60, 7, 3], r"item 7 \(and 1 more\) is in the index already"),
        ("update", [7, 61, 62], r"item 61 \(and 1 more\) is not in the index"),
        ("remove", [7, 99], "item 99 is not in the index; nothing was removed"),
        ("remove", [7.5], "whole numbers"),
        ("add", [0, 60], "start at 1"),
        ("upsert", [60, 60], "twice"),
    ],
)
def test_a_change_that_does_not_fit_says_so_and_changes_nothing(kind, change, ids, says):
    index = make_index(_vectors(50), _ids(50), kind)
    before = index.search(_vectors(4, seed=1), 50)
    given = [] if change == "remove" else [_vectors(len(ids), seed=2)]
    with pytest.raises(InputError, match=says):
        getattr(index, change)(*given, np.array(ids))
    after = index.search(_vectors(4, seed=1), 50)
    assert (before.ids == after.ids).all()
    assert index.ids.tolist() == list(range(1, 51))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_changes_leave_what_an_index_of_the_result_would_hold(kind, seed):
    rng = np.random.default_rng(seed)
    # Whole numbers: sums are exact in any order, so that equal scores are equal.
    draw = lambda n: rng.integers(-9, 10, (n, 4)).astype(np.float32)  # noqa: E731
    held = dict(zip(range(1, 31), draw(30), strict=True))
    index = make_index(np.stack(list(held.values())), np.array(list(held), np.int32), kind)
    if kind == "scann":
        index.rebuild_after = 1e9
    for _ in range(8):
        ids = rng.choice(80, rng.integers(1, 12), replace=False).astype(np.int32) + 1
        vectors = draw(len(ids))
        if rng.random() < 0.5:
            index.upsert(vectors, ids)
            held |= dict(zip(ids.tolist(), vectors, strict=True))
        else:
            gone = [i for i in ids.tolist() if i in held]
            index.remove(np.array(gone, np.int32))
            held = {i: v for i, v in held.items() if i not in gone}
    keys = np.array(sorted(held), np.int32)
    assert index.ids.tolist() == keys.tolist()
    queries = draw(3)
    found = index.search(queries, len(held) + 2)
    expected = _by_definition(queries, np.stack([held[i] for i in keys]), keys, 99, [[]] * 3)
    assert [[i for i in row if i] for row in found.ids.tolist()] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_ids_may_come_in_any_order_from_either_side(kind):
    index = make_index(_vectors(20), 20_000_000 - _ids(20), kind)
    index.add(_vectors(5, seed=1), np.array([20_000_900, 19_000_000, 7, 2, 3], np.int32))
    index.remove(np.array([7, 19_999_999], np.int32))
    expected = [2, 3, 19_000_000, *range(19_999_980, 19_999_999), 20_000_900]
    assert index.ids.tolist() == expected
    assert sorted(index.search(_vectors(1), 23).ids[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_emptied_index_finds_nothing_and_can_be_filled_again(kind):
    index = make_index(_vectors(20), _ids(20), kind)
    index.remove(_ids(20))
    assert index.search(_vectors(2), 3).ids.tolist() == [[0] * 3] * 2
    index.add(_vectors(1), np.array([9], np.int32))
    assert index.search(_vectors(1), 3).ids.tolist() == [[9, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.1, 0.01, 0.002])
def test_a_filter_leaves_k_results_whenever_there_are_k(kind, share):
    n, k = 4000, 10
    vectors, queries = _vectors(n), _vectors(30, seed=1)
    # Tuned for queries like those asked, which are nearer to no vector than to others.
    index = make_index(vectors, _ids(n), kind, queries=_vectors(400, seed=5))
    allow = np.flatnonzero(np.random.default_rng(2).random(n + 1) < share)
    allow = allow[allow > 0]
    exclude = Ragged.of(index.search(queries, 5, allow=allow).ids)
    found = index.search(queries, k, exclude, np.append(allow, n + 100)).ids
    left = [set(allow.tolist()) - set(exclude.slice(i, i + 1).ids.tolist()) for i in range(30)]
    for row, may in zip(found.tolist(), left, strict=True):
        got = [i for i in row if i]
        assert len(set(got)) == len(got) == min(k, len(may))
        assert set(got) <= may
    exact = ExactIndex.build(vectors[allow - 1], allow).search(queries, k, exclude).ids
    assert _recall(found, exact) >= (1 if kind == "exact" else 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_that_matches_nothing_says_so(kind):
    index = make_index(_vectors(20), _ids(20), kind)
    for allow in ([], [21, 30]):
        with pytest.raises(InputError, match=f"none of the {len(allow)} ids"):
            index.search(_vectors(1), 3, allow=np.array(allow, np.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_holds_nothing_is_not_taken_for_none(kind):
    index = make_index(_vectors(20), _ids(20), kind)
    index.remove(_ids(20))
    assert index


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_alone_is_a_batch_of_one(kind):
    index = make_index(_vectors(200), _ids(200), kind)
    query = _vectors(1, seed=1)
    assert (index.search(query[0], 5).ids == index.search(query, 5).ids).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_cosine_does_not_depend_on_lengths(kind, precision):
    rng = np.random.default_rng(3)
    vectors, queries = _vectors(300), _vectors(10, seed=1)
    lengths = rng.uniform(0.01, 100, (301, 1)).astype(np.float32)
    index = make_index(
        vectors[:250] * lengths[:250], _ids(250), kind, metric="cosine", precision=precision
    )
    index.add(vectors[250:] * lengths[250:300], np.arange(251, 301, dtype=np.int32))
    found = index.search(queries * lengths[300], 300)
    cosines = queries @ vectors.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    expected = np.take_along_axis(cosines, found.ids - 1, axis=1)
    assert found.scores == pytest.approx(expected, abs=1e-5 if precision == "float32" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_scores_of_fewer_bits_are_within_the_bound_that_is_documented(kind, precision):
    vectors, queries = _vectors(400, 24), _vectors(20, 24, seed=1)
    vectors *= np.geomspace(0.01, 100, 400, dtype=np.float32)[:, None]
    found = make_index(vectors, _ids(400), kind, precision=precision).search(queries, 400)
    rows = found.ids - 1
    products = np.take_along_axis(queries @ vectors.T, rows, axis=1)
    if precision == "bfloat16":
        bound = (np.abs(queries) @ np.abs(vectors).T)[np.arange(20)[:, None], rows] / 256
    else:
        bound = np.abs(queries).sum(1)[:, None] * np.abs(vectors).max(1)[rows] / 254
    assert (np.abs(found.scores - products) <= bound * 1.001 + 1e-6).all()
    assert np.abs(found.scores - products).max() > 0


def test_a_metric_or_precision_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="metric is one of dot, cosine, not 'l2'"):
        ExactIndex.build(_vectors(9), _ids(9), metric="l2")
    with pytest.raises(InputError, match="precision is one of float32, bfloat16, int8, not 'int4'"):
        ExactIndex.build(_vectors(9), _ids(9), precision="int4")


def test_a_kind_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(InputError, match="kind is one of auto, exact, scann, not 'flat'"):
        make_index(_vectors(20), _ids(20), "flat")
    with pytest.raises(InputError, match="kind is one of exact, scann, not 'auto'"):
        ShardedIndex.build([_vectors(20)], tmp_path, kind="auto")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_saved_index_answers_the_same_and_holds_no_pickle(kind, mapped, precision, tmp_path):
    index = make_index(_vectors(300), _ids(300), kind, metric="cosine", precision=precision)
    index.add(_vectors(3, seed=5), np.array([900, 500, 700], np.int32))
    index.remove(np.array([4, 500], np.int32))
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", mapped=mapped)
    queries = _vectors(9, seed=1)
    before, after = index.search(queries, 20), loaded.search(queries, 20)
    assert type(loaded) is type(index)
    assert (loaded.metric, loaded.precision) == ("cosine", precision)
    # ScaNN lays changed points out anew, which moves the last bits of its sums.
    assert before.scores == pytest.approx(after.scores, rel=1e-6, abs=1e-6)
    assert (before.ids == after.ids).mean() > 0.99
    assert {path.suffix for path in (tmp_path / "index").rglob("*.*")} <= KINDS_OF_FILES
    assert np.isin(900, loaded.ids)
    # What is read can be changed, and saved over what it was read from.
    loaded.add(_vectors(1, seed=8), np.array([4], np.int32))
    loaded.save(tmp_path / "index")
    again = load_index(tmp_path / "index")
    assert again.ids.tolist() == loaded.ids.tolist()
    assert again.search(_vectors(1, seed=8), 1).ids.tolist() == [[4]]
    assert len(list((tmp_path / "index").glob("data-*"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_saving_that_fails_leaves_what_was_there(kind, tmp_path, monkeypatch):
    index = make_index(_vectors(50), _ids(50), kind)
    index.save(tmp_path)
    index.add(_vectors(1), np.array([51], np.int32))

    def full(path, value):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("tfrec.index.disk.write_json", full)
    with pytest.raises(SetupError, match="no space left"):
        index.save(tmp_path)
    assert load_index(tmp_path).ids.tolist() == list(range(1, 51))
    assert len(list(tmp_path.glob("data-*"))) == 1


@pytest.mark.skipif("scann" not in KINDS, reason="ScaNN has no wheel here")
class TestScann:
    def test_finds_what_it_was_tuned_to_find(self):
        vectors, queries = _clustered(6000)
        others = vectors[200:1000] + 0.1 * _vectors(800, 16, seed=4)
        exact = ExactIndex.build(vectors, _ids(6000)).search(queries, 100).ids
        index = ScannIndex.build(vectors, _ids(6000), recall=0.9, queries=others)
        found = {0.9: index.search(queries, 100).ids}
        # Three standard errors of either side, some .01.
        assert _recall(found[0.9], exact) >= 0.87
        assert _recall(found[0.9], exact) >= index.tuned.plans[100].recall - 0.04
        index.tune(0.99, others)
        found[0.99] = index.search(queries, 100).ids
        assert _recall(found[0.99], exact) >= 0.98
        assert index.tuned.target == 0.99
        assert all(plan.recall >= 0.98 for plan in index.tuned.plans.values())

    def test_searches_less_for_a_lower_recall(self):
        vectors, queries = _clustered(6000)
        index = ScannIndex.build(vectors, _ids(6000), recall=0.5)
        low = index.tuned.plans[100]
        high = index.tune(0.995, queries).plans[100]
        assert low.leaves * low.candidates < high.leaves * high.candidates

    def test_keeps_what_it_was_tuned_to(self, tmp_path):
        vectors, queries = _clustered(3000)
        index = ScannIndex.build(vectors, _ids(3000), recall=0.8, queries=queries)
        index.save(tmp_path)
        loaded = ScannIndex.load(tmp_path)
        assert loaded.tuned.plans == index.tuned.plans
        assert loaded.tuned.target == 0.8
        assert loaded.layout == index.layout
        assert (loaded.tuned.queries == index.tuned.queries).all()

    def test_tunes_with_the_queries_it_has_where_none_are_given(self):
        vectors, queries = _clustered(3000)
        index = ScannIndex.build(vectors, _ids(3000), recall=0.8, queries=queries)
        assert index.tune(0.9).target == 0.9
        assert np.isin(index.tuned.queries, queries).all()
        others = _clustered(3000, seed=3)[1]
        assert np.isin(index.tune(0.9, others).queries, others).all()
        assert ScannIndex.build(vectors, _ids(3000)).tune(0.8).queries is None

    def test_what_tune_was_asked_during_a_training_outlives_it(self, monkeypatch):
        vectors, queries = _clustered(3000)
        index = ScannIndex.build(vectors, _ids(3000), recall=0.5)
        plain, told = scann_module.train, []

        def train(*asked):
            found = plain(*asked)
            told.append(index.tune(0.99, queries))
            return found

        monkeypatch.setattr(scann_module, "train", train)
        before = index._searcher
        index.rebuild()
        index.join()
        assert index._searcher is not before
        assert index.tuned is not told[0]  # it was chosen for the searcher of before
        assert index.tuned.target == 0.99
        assert np.isin(index.tuned.queries, queries).all()
        assert all(plan.recall >= 0.98 for plan in index.tuned.plans.values())

    @pytest.mark.parametrize("recall", [0, 1, 1.5, -1])
    def test_refuses_a_recall_that_is_none(self, recall):
        with pytest.raises(InputError, match=f"recall is above 0 and below 1, and got {recall}"):
            ScannIndex.build(_vectors(50), _ids(50), recall=recall)

    def test_refuses_too_few_vectors(self):
        with pytest.raises(InputError, match="exact"):
            ScannIndex.build(_vectors(3), _ids(3))

    def test_rebuilds_itself_while_it_is_searched_and_changed(self):
        vectors, queries = _clustered(3000)
        index = ScannIndex.build(vectors, _ids(3000))
        stop, searches, broken = threading.Event(), [], []

        def search():
            while not stop.is_set():
                found = index.search(queries[:20], 10)
                searches.append(index.rebuilding)
                if not (found.ids > 0).all():
                    broken.append(found.ids)

        readers = [threading.Thread(target=search) for _ in range(2)]
        for reader in readers:
            reader.start()
        before = index._searcher
        more = _clustered(1500, seed=9)[0]
        for start in range(0, 1500, 50):
            ids = np.arange(3001 + start, 3051 + start, dtype=np.int32)
            index.add(more[start : start + 50], ids)
            index.remove(ids[:10])
            assert index.search(more[start + 10], 1).ids.shape == (1, 1)
        index.join()
        stop.set()
        for reader in readers:
            reader.join()
        assert index._searcher is not before
        assert any(searches), "no search ran beside the training"
        assert not broken
        expected = [*range(1, 3001), *(i for i in range(3001, 4501) if (i - 3001) % 50 >= 10)]
        assert index.ids.tolist() == expected
        held = np.concatenate([vectors, more])[np.array(expected) - 1]
        exact = ExactIndex.build(held, np.array(expected, np.int32)).search(queries, 10)
        found = index.search(queries, 10)
        assert _recall(found.ids, exact.ids) >= 0.9
        products = (queries @ np.concatenate([vectors, more]).T)[
            np.arange(len(queries))[:, None], found.ids - 1
        ]
        assert found.scores == pytest.approx(products, abs=1e-4)

    def test_a_training_that_fails_leaves_the_index_as_it_was(self, monkeypatch):
        index = ScannIndex.build(_vectors(50), _ids(50))

        def fail(*_):
            raise MemoryError("no memory for another searcher")

        monkeypatch.setattr("tfrec.index.scann.train", fail)
        index.add(_vectors(20, seed=1), np.arange(51, 71, dtype=np.int32))
        with pytest.raises(MemoryError, match="another searcher"):
            index.join()
        assert len(index.ids) == 70
        assert index.search(_vectors(20, seed=1)[3], 1).ids.shape == (1, 1)

    def test_a_training_that_fails_is_logged_and_tried_again(self, monkeypatch, caplog):
        index = ScannIndex.build(_vectors(50), _ids(50))
        before, ids = index._searcher, iter(range(51, 200))

        def add(count):
            some = np.array([next(ids) for _ in range(count)], np.int32)
            index.add(_vectors(count, seed=int(some[0])), some)
            index._thread.join()

        def fail(*_):
            raise MemoryError("no memory for another searcher")

        with monkeypatch.context() as patch:
            patch.setattr("tfrec.index.scann.train", fail)
            add(11)  # more than a fifth of 50
            add(10)
            (said,) = caplog.messages
            assert "no memory for another searcher" in said
            assert "after more than 10 more changes" in said
            add(1)
            assert len(caplog.messages) == 2
        add(10)
        assert index._searcher is before
        add(1)
        assert index._searcher is not before
        index.join()
        assert len(caplog.messages) == 2
        assert len(index.ids) == 83

    def test_a_process_ends_while_a_training_runs(self):
        start = (
            "import atexit, threading, time, numpy as np\n"
            "atexit.register(lambda: print(index.rebuilding))\n"  # after those registered later
            "from tfrec.index import ScannIndex, scann, tuner\n"
            "v = np.random.default_rng(0).normal(size=(500, 8)).astype('float32')\n"
            "index = ScannIndex.build(v, np.arange(1, 501, dtype='int32'))\n"
        )
        waits = "scann._PATIENCE, scann.train = 0.1, lambda *_: threading.Event().wait()\n"
        # A thread that comes back from ScaNN while the interpreter ends can abort the process.
        tunes = (
            "trial = tuner.Trial(index._searcher, v, np.zeros((500, 10), 'int64'))\n"
            "scann.train = lambda *_: [trial.run(20, 50) for _ in iter(int, 1)]\n"
        )
        for train, left in ((waits, True), (tunes, False)):
            code = f"{start}{train}index.rebuild()\ntime.sleep(0.1)\nprint(index.rebuilding)"
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
            )
            assert done.stdout == f"True\n{left}\n"
            assert done.returncode == 0

    def test_a_folder_with_a_pickle_is_refused(self, tmp_path):
        make_index(_vectors(20), _ids(20), "scann").save(tmp_path)
        (tmp_path / "scann_docids.pkl").write_bytes(b"anything")
        with pytest.raises(ArtifactError, match="pickle"):
            load_index(tmp_path)

    def test_brings_no_tensorflow_into_the_process(self):
        code = (
            "import sys, numpy as np; from tfrec.index import make_index\n"
            "v = np.random.default_rng(0).normal(size=(50, 4)).astype('float32')\n"
            "index = make_index(v, np.arange(1, 51, dtype='int32'), 'scann')\n"
            "print(index.search(v[0], 1).ids, {'tensorflow', 'scipy'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.endswith("set()\n")


def test_auto_is_exact_for_small_catalogs():
    assert EXACT_LIMIT == 100_000
    assert isinstance(make_index(_vectors(30), _ids(30)), ExactIndex)


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_index_is_an_artifact_error(kind, tmp_path):
    with pytest.raises(ArtifactError, match=r"index\.json is missing or damaged"):
        load_index(tmp_path)
    make_index(_vectors(30), _ids(30), kind).save(tmp_path)
    (data,) = tmp_path.glob("data-*")
    for path in data.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=f"{path.name} is damaged"):
            load_index(tmp_path)
        path.write_bytes(whole[:-1])
        with pytest.raises(ArtifactError, match=f"{path.name} is missing or cut short"):
            load_index(tmp_path)
        path.write_bytes(whole)
    assert len(load_index(tmp_path).ids) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_of_index_json_is_an_artifact_error(kind, tmp_path):
    make_index(_vectors(30), _ids(30), kind).save(tmp_path)
    path = tmp_path / "index.json"
    whole = path.read_bytes()
    for at, byte in enumerate(whole[:-1]):
        path.write_bytes(whole[:at] + bytes([byte ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"index\.json"):
            load_index(tmp_path, mapped=True)
    path.write_bytes(whole)
    assert len(load_index(tmp_path).ids) == 30


def test_an_index_of_the_format_before_is_read(tmp_path):
    ExactIndex.build(_vectors(30), _ids(30)).save(tmp_path)
    path = tmp_path / "index.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "format": 1}))
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        load_index(tmp_path)
    del about["digest"]
    path.write_text(json.dumps({**about, "format": 1}))
    assert len(load_index(tmp_path).ids) == 30
    path.write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "missing or damaged"),
        ('{"kind": "exact"}', "missing or damaged"),
        ('{"format": 99, "data": "data-1", "files": {}}', "format 99, and this tfrec reads 1"),
        ('{"format": 1, "data": "../else", "files": {}}', "missing or damaged"),
        ('{"format": 1, "data": "d", "files": {}, "kind": "ivf"}', "kind 'ivf'"),
    ],
)
def test_a_foreign_index_is_an_artifact_error(content, says, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ArtifactError, match=says):
        load_index(tmp_path)


def test_an_index_of_another_kind_is_an_artifact_error(tmp_path):
    ExactIndex.build(_vectors(9), _ids(9)).save(tmp_path)
    with pytest.raises(ArtifactError, match="kind 'exact', not 'scann'"):
        ScannIndex.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
class TestShards:
    @pytest.mark.parametrize("resident", [None, 1, 2])
    def test_find_what_one_index_finds(self, kind, resident, tmp_path):
        vectors, queries = _vectors(1000), _vectors(20, seed=1)
        np.save(tmp_path / "vectors.npy", vectors)
        index = ShardedIndex.build(
            tmp_path / "vectors.npy", tmp_path / "index", kind=kind, shard_rows=300,
            resident=resident, queries=_vectors(400, seed=5),
        )  # fmt: skip
        exclude = Ragged.of(_vectors(20, 5, seed=2).argsort() + 1)
        allow = np.arange(1, 700)
        exact = ExactIndex.build(vectors, _ids(1000))
        for told in ({}, {"exclude": exclude}, {"allow": allow}, {"allow": allow[:5]}):
            found, expected = index.search(queries, 12, **told), exact.search(queries, 12, **told)
            assert _recall(found.ids, expected.ids) >= (1 if kind == "exact" else 0.9)
            assert ((found.ids > 0) == (expected.ids > 0)).all()
        with pytest.raises(InputError, match="none of the 2 ids"):
            index.search(queries, 3, allow=np.array([1001, 2000]))

    def test_are_cut_from_blocks_of_any_length(self, kind, tmp_path):
        vectors, ids = _vectors(100), 1000 - _ids(100)
        blocks = (vectors[a:b] for a, b in [(0, 7), (7, 7), (7, 93), (93, 100)])
        index = ShardedIndex.build(blocks, tmp_path, ids, kind=kind, shard_rows=40)
        exact = ExactIndex.build(vectors, ids).search(vectors[:9], 100)
        assert (index.search(vectors[:9], 100).ids == exact.ids).mean() > 0.99
        assert len(list(tmp_path.glob("data-*/shard-*"))) == 3

    def test_change_and_are_saved_as_one(self, kind, tmp_path):
        index = ShardedIndex.build([_vectors(100)], tmp_path / "a", kind=kind, shard_rows=40)
        query = 100 * np.eye(8, dtype=np.float32)
        index.add(query[:2], np.array([500, 300], np.int32))
        index.upsert(query[1:4], np.array([300, 5, 600], np.int32))
        index.update(query[4:6], np.array([20, 90], np.int32))
        index.remove(np.array([1, 99], np.int32))
        for change, ids in (("add", [700, 20]), ("update", [20, 700]), ("remove", [20, 1])):
            given = [] if change == "remove" else [query[:2]]
            with pytest.raises(InputError, match=r"item (20|700|1) is"):
                getattr(index, change)(*given, np.array(ids, np.int32))
        index.save(tmp_path / "b")
        loaded = load_index(tmp_path / "b")
        held = [*sorted(set(range(1, 101)) - {1, 99}), 300, 500, 600]
        assert loaded.ids.tolist() == index.ids.tolist() == held
        assert loaded.search(query[:6], 1).ids.ravel().tolist() == [500, 300, 5, 600, 20, 90]

    def test_that_are_damaged_are_an_artifact_error(self, kind, tmp_path):
        ShardedIndex.build([_vectors(60)], tmp_path, kind=kind, shard_rows=25)
        for path in [p for p in tmp_path.glob("data-*/shard-00001/**/*") if p.is_file()]:
            whole = path.read_bytes()
            path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
            with pytest.raises(ArtifactError, match=f"{path.name} is damaged"):
                load_index(tmp_path).search(_vectors(1), 3)
            path.write_bytes(whole)
        one, other = sorted(tmp_path.glob("data-*/shard-*"))[:2]
        other.rename(tmp_path / "kept")
        shutil.copytree(one, other)
        with pytest.raises(ArtifactError, match="damaged"):  # a whole shard, in another's place
            load_index(tmp_path)

    def test_are_compared_with_their_digests_once(self, kind, tmp_path, monkeypatch):
        ShardedIndex.build([_vectors(60)], tmp_path, kind=kind, shard_rows=25)
        index, read = ShardedIndex.load(tmp_path, resident=1), []
        plain = disk.file_digest
        monkeypatch.setattr(disk, "file_digest", lambda path: read.append(path) or plain(path))
        index.search(_vectors(1), 3)
        files = tmp_path.glob("data-*/shard-*/data-*/*")
        assert sorted(read) == sorted(files)
        index.search(_vectors(1), 3)
        assert len(read) == len(set(read))

    def test_that_stop_midway_leave_what_was_there(self, kind, tmp_path):
        ShardedIndex.build([_vectors(50)], tmp_path, kind=kind, shard_rows=20)

        def blocks():
            yield _vectors(25)
            raise OSError("the network is gone")

        with pytest.raises(OSError, match="network"):
            ShardedIndex.build(blocks(), tmp_path, kind=kind, shard_rows=20)
        assert len(load_index(tmp_path).ids) == 50
        with pytest.raises(InputError, match="25 vectors, 26 ids"):
            ShardedIndex.build([_vectors(25)], tmp_path, _ids(26), kind="exact")
        with pytest.raises(InputError, match="at least one vector"):
            ShardedIndex.build([], tmp_path, kind=kind)


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


def test_two_savers_leave_one_whole_index(tmp_path):
    """Each waits for the other: whichever is last, all of it is there."""
    rng = np.random.default_rng(1)
    made = [
        ExactIndex.build(
            rng.normal(size=(n, 8)).astype(np.float32), np.arange(1, n + 1, dtype="i4")
        )
        for n in (40, 60)
    ]
    failures = []

    def save(index):
        try:
            for _ in range(10):
                index.save(tmp_path / "one")
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=save, args=(index,)) for index in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(load_index(tmp_path / "one").ids) in (40, 60)
    assert len(list((tmp_path / "one").glob("data-*"))) == 1


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (_ids(60).astype(np.int64) + 2**32, "1 to 2147483647"),
        (_ids(60) + 0.5, "whole numbers, and got float64"),
        (_ids(60).reshape(1, 60), "a list of whole numbers"),
        (_ids(60) - 1, "start at 1"),
        (np.ones(60, np.int64), "twice"),
        (_ids(61), "60 vectors, 61 ids"),
        (_ids(59), "60 vectors or more, 59 ids"),
    ],
)
def test_ids_that_do_not_fit_are_refused_before_a_shard_is_built(ids, says, tmp_path, monkeypatch):
    monkeypatch.setattr(ExactIndex, "build", None)
    np.save(tmp_path / "vectors.npy", _vectors(60))
    for vectors in ([_vectors(60)], tmp_path / "vectors.npy"):
        with pytest.raises(InputError, match=says):
            ShardedIndex.build(vectors, tmp_path / "big", ids, kind="exact", shard_rows=25)
    assert not (tmp_path / "big").exists()


def test_a_wrong_number_of_ids_is_found_as_soon_as_blocks_tell_it(tmp_path, monkeypatch):
    built, plain = [], ExactIndex.build
    monkeypatch.setattr(ExactIndex, "build", lambda *a, **b: built.append(1) or plain(*a, **b))
    for count, before in ((40, 1), (50, 2), (61, 2)):
        built.clear()
        with pytest.raises(InputError, match=rf"vectors( or more)?, {count} ids"):
            ShardedIndex.build(
                (_vectors(60)[i : i + 7] for i in range(0, 60, 7)), tmp_path, _ids(count),
                kind="exact", shard_rows=25,
            )  # fmt: skip
        assert len(built) == before


@pytest.mark.parametrize("rows", [10, 25, 100])
@pytest.mark.parametrize("odd", [_vectors(20, 7), _vectors(20, 9), _vectors(20)[0]])
def test_blocks_of_another_width_are_refused(rows, odd, tmp_path):
    with pytest.raises(InputError, match=r"blocks of vectors are \(m, 8\) throughout.* after 20"):
        ShardedIndex.build([_vectors(20), odd], tmp_path, kind="exact", shard_rows=rows)
    np.save(tmp_path / "flat.npy", np.zeros(20, np.float32))
    with pytest.raises(InputError, match=r"flat\.npy is \(20,\), and vectors are \(n, dim\)"):
        ShardedIndex.build(tmp_path / "flat.npy", tmp_path / "big", kind="exact")


def test_a_search_beside_a_save_over_itself_finds_its_shards(tmp_path, monkeypatch):
    vectors = _vectors(60)
    ShardedIndex.build([vectors], tmp_path, kind="exact", shard_rows=25)
    index = ShardedIndex.load(tmp_path, resident=1)
    expected = index.search(vectors[:3], 5).ids
    under_way = index._shards()
    next(under_way)
    plain, found = shutil.rmtree, []

    def rmtree(path, **told):
        plain(path, **told)
        found.append(index.search(vectors[:3], 5).ids)

    monkeypatch.setattr(disk.shutil, "rmtree", rmtree)
    index.save(tmp_path)
    assert [row.tolist() for row in found] == [expected.tolist()]
    assert [len(shard.ids) for shard in under_way] == [25, 10]


def test_a_sharded_index_saved_over_itself_goes_on(tmp_path):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    index = ShardedIndex.build([vectors], tmp_path / "big", kind="exact", shard_rows=25, resident=1)
    before = index.search(vectors[:3], 5)
    index.save(tmp_path / "big")
    np.testing.assert_array_equal(index.search(vectors[:3], 5).ids, before.ids)


def test_a_change_stays_while_another_thread_searches(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    ShardedIndex.build([vectors], tmp_path / "big", kind="exact", shard_rows=25)
    index, opened = ShardedIndex.load(tmp_path / "big"), threading.Event()
    plain = shards.open_shard

    def slow(folder):
        found = plain(folder)
        opened.set()
        time.sleep(0.05)
        return found

    monkeypatch.setattr(shards, "open_shard", slow)
    searching = threading.Thread(target=index.search, args=(vectors[:1], 3))
    searching.start()
    opened.wait(10)
    index.add(vectors[:1] * 9, np.array([1000], np.int32))
    searching.join()
    assert 1000 in index.ids


class TestAmong:
    """Some items of an index answer as an index of these items alone."""

    @given(st.integers(0, 2**32 - 1))
    def test_it_finds_what_an_index_of_those_items_finds(self, seed):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(1, 40)), int(rng.integers(1, 50))
        vectors = rng.integers(-2, 3, (n, 3)).astype(np.float32)
        queries = rng.integers(-2, 3, (4, 3)).astype(np.float32)
        held = (rng.permutation(100)[:n] + 1).astype(np.int32)
        some = (rng.permutation(120)[: int(rng.integers(0, 60))] + 1).astype(np.int32)
        exclude = [rng.integers(0, 120, rng.integers(0, 30)).astype(np.int32) for _ in queries]
        found = Among(ExactIndex.build(vectors, held), some).search(queries, k, Ragged.of(exclude))
        both = np.isin(held, some)
        expected = _by_definition(queries, vectors[both], held[both], k, exclude)
        assert [[int(i) for i in row if i] for row in found.ids] == expected
        assert found.ids.shape == found.scores.shape == (4, k)
        assert ((found.ids == 0) == np.isneginf(found.scores)).all()

    def test_its_ids_are_those_that_the_index_holds_in_order(self):
        index = ExactIndex.build(_vectors(5), np.int32([9, 2, 7, 4, 30]))
        assert Among(index, np.int32([7, 1, 31, 30, 2])).ids.tolist() == [2, 7, 30]
        assert Among(index, np.int32([])).ids.tolist() == []

    def test_it_can_be_narrowed_further(self):
        index = ExactIndex.build(_vectors(20), _ids(20))
        some = Among(index, np.arange(1, 11, dtype=np.int32))
        found = some.search(_vectors(1, seed=1), 20, allow=np.int32([3, 5, 15]))
        assert sorted(found.ids[0].tolist())[-2:] == [3, 5]
        assert np.count_nonzero(found.ids) == 2
        assert not some.search(_vectors(1, seed=1), 3, allow=np.int32([15])).ids.any()

    def test_nothing_among_nothing(self):
        index = ExactIndex.build(_vectors(20), _ids(20))
        found = Among(index, np.int32([21])).search(_vectors(3, seed=1), 4)
        assert found.ids.shape == (3, 4)
        assert not found.ids.any()
        assert np.isneginf(found.scores).all()
        assert Among(index, np.int32([])).search(_vectors(1)[0], 4).ids.shape == (1, 4)

    def test_it_cannot_be_changed_or_saved(self, tmp_path):
        some = Among(ExactIndex.build(_vectors(3), _ids(3)), np.int32([1]))
        for change in (some.add, some.update, some.upsert):
            with pytest.raises(InputError, match="cannot be changed"):
                change(_vectors(1), np.int32([1]))
        with pytest.raises(InputError, match="cannot be changed"):
            some.remove(np.int32([1]))
        with pytest.raises(InputError, match="cannot be saved"):
            some.save(tmp_path / "index")
