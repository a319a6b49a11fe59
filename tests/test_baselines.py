"""Baselines recover a known right answer, equal their definitions, and see no test event."""

import numpy as np
import pytest
import scipy.sparse as sp

from tfrec import baselines
from tfrec.baselines import Als, Ease, ItemKnn, Popular, choose, matrix_of, recommend
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.index import Ragged

PERSONAL = [ItemKnn(5), Ease(1.0), Als(factors=8, alpha=5.0), Als(factors=8, alpha=5.0, bm25=True)]


def _matrix(dense):
    return sp.csr_array(np.asarray(dense, np.float32))


def _interactions(rows):
    """Rows of (user, item, weight, split)."""
    user, item, weight, split = (np.array(c) for c in zip(*rows, strict=True))
    n = len(rows)
    return Interactions(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        event=np.zeros(n, np.int8),
        rating=np.full(n, np.nan, np.float32),
        weight=weight.astype(np.float32),
        split=split.astype(np.int8),
        num_users=int(user.max()) + 1,
    )


def _checkerboard(users=30, items=20):
    """Even users like even items and odd users odd ones, all but one item each."""
    dense = np.zeros((users, items + 1), np.float32)
    missing = np.zeros(users, np.int64)
    for u in range(users):
        mine = np.arange(1, items + 1)[np.arange(items) % 2 == u % 2]
        missing[u] = mine[u // 2 % len(mine)]
        dense[u, mine] = 1
        dense[u, missing[u]] = 0
    return _matrix(dense), missing


@pytest.mark.parametrize("model", PERSONAL, ids=lambda m: type(m).__name__)
def test_the_checkerboard_is_recovered(model):
    matrix, missing = _checkerboard()
    found = recommend(model.fit(matrix), matrix, np.arange(30), 1)
    assert found.ids[:, 0].tolist() == missing.tolist()


@pytest.mark.parametrize("model", [Popular(), *PERSONAL], ids=lambda m: type(m).__name__)
def test_a_batch_scores_as_single_users_do(model):
    matrix, _ = _checkerboard()
    model.fit(matrix)
    together = model.scores(matrix[:5])
    assert together.shape == (5, 21)
    assert together.dtype == np.float32
    for u in range(5):
        assert model.scores(matrix[u : u + 1])[0] == pytest.approx(together[u], abs=1e-4)


@pytest.mark.parametrize("model", [Popular(), *PERSONAL], ids=lambda m: type(m).__name__)
def test_a_user_without_history_gets_finite_scores(model):
    matrix, _ = _checkerboard()
    found = recommend(model.fit(matrix), _matrix(np.zeros((1, 21))), np.array([0]), 3)
    assert (found.ids > 0).all()
    assert np.isfinite(found.scores).all()


def test_popular_counts_users():
    model = Popular().fit(_matrix([[0, 1, 1, 0], [0, 0, 1, 0]]))
    assert model.scores(_matrix(np.zeros((2, 4)))).tolist() == [[0, 1, 2, 0]] * 2


def test_item_knn_is_the_cosine_of_the_items_users():
    dense = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]], np.float32)
    weights = ItemKnn(10).fit(_matrix(dense)).weights.toarray()
    expected = np.zeros((4, 4))
    expected[1, 2] = expected[2, 1] = 2 / np.sqrt(3 * 2)
    expected[1, 3] = expected[3, 1] = 1 / np.sqrt(3 * 1)
    assert weights == pytest.approx(expected, abs=1e-6)


def test_item_knn_keeps_the_nearest_neighbours_of_the_item_scored():
    dense = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]], np.float32)
    weights = ItemKnn(1).fit(_matrix(dense)).weights.toarray()
    assert (weights > 0).astype(int).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]


def test_item_knn_in_blocks_is_the_same(monkeypatch):
    matrix = _matrix(np.random.default_rng(0).random((40, 31)) < 0.3)
    whole = ItemKnn(4).fit(matrix).weights.toarray()
    monkeypatch.setattr(baselines, "_CELLS", 100)
    assert (ItemKnn(4).fit(matrix).weights.toarray() == whole).all()


def test_ease_solves_its_regression_with_a_zero_diagonal():
    # The defining property: for each item j, the gradient of |x_j - X w|^2 + r |w|^2 is zero in
    # every weight but the one of j itself, which is fixed at 0.
    rng = np.random.default_rng(0)
    dense = (rng.random((60, 13)) < 0.3).astype(np.float64)
    dense[:, 0] = 0
    model = Ease(7.0).fit(_matrix(dense))
    w = model.weights.astype(np.float64)
    gradient = dense.T @ (dense @ w - dense) + 7.0 * w
    np.fill_diagonal(gradient, 0)
    assert np.abs(gradient).max() < 1e-4
    assert not np.diag(w).any()
    assert not w[0].any()
    assert not w[:, 0].any()
    assert model.weights.dtype == np.float32


def test_the_blocked_inverse_is_the_inverse():
    a = np.random.default_rng(0).normal(size=(600, 700))
    square = a @ a.T + np.eye(600)
    assert baselines._inverse(square.copy()) @ square == pytest.approx(np.eye(600), abs=1e-8)


def test_the_strongest_weights_are_kept_for_each_item_scored():
    model = Ease()
    model.weights = np.array([[0, 0, 0, 0], [0, 0, -5, 1], [0, 2, 0, 3], [0, 4, 1, 0]], np.float32)
    assert model.strongest(1).toarray().tolist() == [
        [0, 0, 0, 0],
        [0, 0, -5, 0],
        [0, 0, 0, 3],
        [0, 4, 0, 0],
    ]
    assert (model.strongest(9).toarray() == model.weights).all()


def test_als_equals_itself_with_the_same_seed():
    matrix, _ = _checkerboard()
    one, two = (Als(factors=8, seed=3).fit(matrix).scores(matrix) for _ in range(2))
    assert (one == two).all()
    assert (Als(factors=8, seed=4).fit(matrix).scores(matrix) != one).any()


def test_als_weighs_by_bm25_as_implicit_does():
    nearest = pytest.importorskip("implicit.nearest_neighbours")
    matrix = _matrix(np.random.default_rng(0).random((40, 31)) < 0.3)
    model = Als(factors=4, bm25=True, iterations=1).fit(matrix)
    theirs = nearest.bm25_weight(sp.csr_matrix(matrix), K1=100, B=0.8)
    assert model._confidence(matrix).toarray() == pytest.approx(theirs.toarray(), rel=1e-4)


def test_the_matrix_has_ones_and_leaves_out_the_unknown_and_the_weightless():
    events = _interactions(
        [(0, 2, 1, TRAIN), (0, 2, 3, TRAIN), (0, 0, 1, TRAIN), (2, 1, 0, TRAIN), (2, 3, 1, TRAIN)]
    )
    assert matrix_of(events, 3).toarray().tolist() == [[0, 0, 1, 0], [0] * 4, [0, 0, 0, 1]]


def test_the_history_is_left_out_unless_asked_for():
    matrix = _matrix([[0, 1, 1, 0], [0, 0, 1, 0]])
    model = Popular().fit(matrix)
    assert recommend(model, matrix, np.array([1, 0]), 2).ids.tolist() == [[1, 3], [3, 0]]
    kept = recommend(model, matrix, np.array([0]), 2, exclude_history=False)
    assert kept.ids.tolist() == [[2, 1]]


def test_users_in_blocks_get_the_same(monkeypatch):
    matrix, _ = _checkerboard()
    model = Ease(1.0).fit(matrix)
    whole = recommend(model, matrix, np.arange(30), 5)
    monkeypatch.setattr(baselines, "_CELLS", 50)
    assert (recommend(model, matrix, np.arange(30), 5).ids == whole.ids).all()


@pytest.mark.parametrize("name", list(baselines.GRIDS))
def test_choosing_tries_the_grid_and_refits_on_all_before_the_test_events(name, monkeypatch):
    small = [{**s, "factors": 4} for s in baselines.GRIDS["als"][:2]]
    monkeypatch.setitem(baselines.GRIDS, "als", small)
    select, missing = _checkerboard()
    filled = select.toarray()
    filled[np.arange(30), missing] = 1
    refit = _matrix(filled)
    choice = choose(name, select, Ragged.of([[m] for m in missing]), refit)
    assert len(choice.tried) == (0 if name == "popular" else len(baselines.GRIDS[name]))
    if choice.tried:
        best = max(choice.tried, key=lambda point: point["ndcg@10"])
        assert choice.settings == {key: best[key] for key in choice.settings}
    again = baselines._fitter(name, refit, 1)(choice.settings)
    assert (choice.model.scores(refit) == again.scores(refit)).all()


def test_without_validation_events_the_first_settings_serve():
    select, _ = _checkerboard()
    choice = choose("ease", select, Ragged.of([[]] * 30), select)
    assert choice.settings == baselines.GRIDS["ease"][0]
    assert choice.tried == []


def test_ease_is_not_fitted_to_a_large_catalog_and_says_why():
    assert "20,001" in baselines.why_not("ease", 20_001)
    assert baselines.why_not("ease", 20_000) == ""
    assert baselines.why_not("als", 10**7) == ""


def _movielens(folder):
    """MovieLens-100K, leave-one-out by a stable sort."""
    raw = np.loadtxt(folder / "ml-100k" / "u.data", dtype=np.int64)
    raw = raw[np.argsort(raw[:, 3], kind="stable")]
    raw = raw[np.argsort(raw[:, 0], kind="stable")]
    user, item, time = raw[:, 0] - 1, raw[:, 1], raw[:, 3]
    left = np.bincount(user)[user] - 1 - (np.arange(len(user)) - np.searchsorted(user, user))
    split = np.select([left == 0, left == 1], [TEST, VALID], TRAIN)
    n = len(user)
    return Interactions(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        timestamp=time,
        event=np.zeros(n, np.int8),
        rating=raw[:, 2].astype(np.float32),
        weight=np.ones(n, np.float32),
        split=split.astype(np.int8),
        num_users=943,
    )


@pytest.mark.parametrize(
    ("model", "ndcg", "hr"),
    [(Popular(), 0.0449, 0.0859), (Ease(100.0), 0.072, 0.149)],
    ids=["popular", "ease"],
)
def test_figures_on_movielens_are_those_of_independent_scripts(shared_data, model, ndcg, hr):
    from tfrec import metrics

    events = _movielens(shared_data)
    before, test = matrix_of(events.part(TRAIN, VALID), 1682), events.part(TEST)
    found = recommend(model.fit(before), before, np.arange(943), 10)
    got = metrics.ranking(found.ids, test.item, test.offsets, [10])
    assert got["ndcg@10"].mean() == pytest.approx(ndcg, abs=0.002)
    assert got["hr@10"].mean() == pytest.approx(hr, abs=0.002)


def test_new_items_get_the_weights_of_what_they_read_like():
    rng = np.random.default_rng(0)
    groups = np.arange(1, 41) % 2
    text = np.zeros((41, 6), np.float32)
    text[1:] = 0.05 * rng.normal(size=(40, 6)) + np.eye(6)[groups]
    weights = np.zeros((41, 41), np.float32)
    weights[1:, 1:] = groups[:, None] == groups[None]
    counts = np.arange(41)
    counts[[7, 20]] = 0
    known = counts > 0
    weights[:, ~known] = 0
    silent = text.copy()
    silent[20] = 0
    nothing, wordless = np.zeros((41, 0), np.float32), baselines.tf_idf([""] * 41)
    found = baselines.carry_over(weights, silent, nothing, wordless, counts)
    np.testing.assert_array_equal(found[:, known], weights[:, known])
    assert not found[:, [0, 20]].any()
    met = np.flatnonzero(known)
    same = groups[met - 1] == groups[7 - 1]
    assert found[met[same], 7].min() > 0.5 > 0.3 > found[met[~same], 7].max()
    attributes = baselines.carry_over(weights, nothing, text, wordless, counts)
    assert attributes[met[same], 7].min() > attributes[met[~same], 7].max()


@pytest.mark.parametrize("telling", [False, True])
def test_words_count_for_new_items_where_they_tell(telling):
    """Text vectors are noise for half of the groups' difference; names tell it, or mislead."""
    rng = np.random.default_rng(1)
    groups = np.arange(1, 61) % 2
    text = np.zeros((61, 6), np.float32)
    text[1:] = rng.normal(size=(60, 6)) * (1.0 if telling else 0.05)
    if not telling:
        text[1:] += np.eye(6)[groups]
    named = groups if telling else rng.integers(0, 2, 60)
    texts = ["", *(("alpha beta", "gamma delta")[group] for group in named)]
    weights = np.zeros((61, 61), np.float32)
    weights[1:, 1:] = groups[:, None] == groups[None]
    counts = np.arange(61)
    counts[[7, 20]] = 0
    known = counts > 0
    weights[:, ~known] = 0
    words, nothing = baselines.tf_idf(texts), np.zeros((61, 0), np.float32)
    met = np.flatnonzero(known)
    found = baselines.carry_over(weights, text, nothing, words, counts)
    for new in (7, 20):
        same = groups[met - 1] == groups[new - 1]
        assert found[met[same], new].mean() > found[met[~same], new].mean() + 0.4


def test_tf_idf_has_unit_rows_and_leaves_out_words_of_one_text():
    found = baselines.tf_idf(["", "The war, the WAR", "war of worlds", "of love", "love"])
    assert found.shape == (5, 3)  # love, of, war; `the` and `worlds` are in one text alone
    norms = np.sqrt(found.power(2).sum(axis=1))
    np.testing.assert_allclose(norms, [0, 1, 1, 1, 1], atol=1e-6)
    assert (found @ found.T)[1, 2] > (found @ found.T)[1, 3] == 0


def test_without_new_items_or_anything_said_of_them_the_weights_stay():
    weights = np.ones((5, 5), np.float32)
    text = np.eye(5, dtype=np.float32)
    counts, wordless = np.arange(5), baselines.tf_idf([""] * 5)
    assert baselines.carry_over(weights, text, text, wordless, counts) is weights
    counts[3] = 0
    empty = np.zeros((5, 0), np.float32)
    assert baselines.carry_over(weights, empty, empty, wordless, counts) is weights
