"""Metrics against hand-computed values, scikit-learn, and an independent evaluator."""

import importlib.util
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrec import metrics
from tfrec.errors import InputError

LOG2_3 = math.log2(3)


def _lists(*rows):
    return np.array(rows, np.int32)


def _targets(*rows):
    offsets = np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64)
    return np.array([t for r in rows for t in r], np.int32), offsets


def _ranking(lists, targets, ks):
    return metrics.ranking(lists, *targets, ks)


def test_one_target_at_the_second_place():
    m = _ranking(_lists([7, 3, 5]), _targets([3]), [1, 3])
    assert {name: value[0] for name, value in m.items()} == pytest.approx(
        {
            **{f"{name}@1": 0.0 for name in metrics.RANKING},
            "hr@3": 1.0,
            "recall@3": 1.0,
            "precision@3": 1 / 3,
            "f1@3": 2 * (1 / 3) / (4 / 3),
            "ndcg@3": 1 / LOG2_3,
            "mrr@3": 0.5,
            "map@3": 0.5,
        }
    )


def test_several_targets_of_which_two_are_hit():
    m = _ranking(_lists([9, 1, 8, 2]), _targets([1, 2, 4]), [4])
    ideal = 1 + 1 / LOG2_3 + 1 / 2
    assert m["recall@4"][0] == pytest.approx(2 / 3)
    assert m["precision@4"][0] == pytest.approx(2 / 4)
    assert m["f1@4"][0] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert m["ndcg@4"][0] == pytest.approx((1 / LOG2_3 + 1 / math.log2(5)) / ideal)
    assert m["mrr@4"][0] == pytest.approx(1 / 2)
    assert m["map@4"][0] == pytest.approx((1 / 2 + 2 / 4) / 3)


def test_more_targets_than_places_have_the_ideal_of_a_full_list():
    m = _ranking(_lists([1, 2]), _targets([1, 2, 3, 4]), [2])
    assert m["ndcg@2"][0] == pytest.approx(1)
    assert m["map@2"][0] == pytest.approx(1)
    assert m["recall@2"][0] == pytest.approx(0.5)


def test_a_target_given_twice_counts_once():
    twice = _ranking(_lists([4, 1]), _targets([1, 1]), [2])
    once = _ranking(_lists([4, 1]), _targets([1]), [2])
    assert {n: v[0] for n, v in twice.items()} == {n: v[0] for n, v in once.items()}


def test_the_unknown_item_is_never_a_hit_even_in_short_lists():
    m = _ranking(_lists([5, 0]), _targets([0]), [2])
    assert m["hr@2"][0] == 0


def test_a_k_above_the_length_of_the_lists_measures_what_is_there():
    m = _ranking(_lists([5, 6]), _targets([6]), [10])
    assert m["ndcg@10"][0] == pytest.approx(1 / LOG2_3)
    assert m["precision@10"][0] == pytest.approx(1 / 10)


def test_no_users_give_empty_arrays():
    m = metrics.ranking(np.zeros((0, 3), np.int32), np.zeros(0, np.int32), np.zeros(1, int), [1])
    assert all(len(value) == 0 for value in m.values())


def test_a_user_without_a_target_is_refused():
    with pytest.raises(InputError, match="user 1 of the lists has no target"):
        _ranking(_lists([1], [2]), _targets([1], []), [1])


def test_offsets_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="offsets"):
        metrics.positions(_lists([1], [2]), np.array([1], np.int32), np.array([0, 1]))


def test_k_below_one_is_refused():
    with pytest.raises(InputError, match="k is at least 1"):
        _ranking(_lists([1]), _targets([1]), [0])


@given(st.integers(0, 2**32 - 1))
def test_ranking_metrics_stay_between_zero_and_one_and_grow_with_k(seed):
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.permutation(30)[:12] for _ in range(8)]).astype(np.int32)
    targets = _targets(*(rng.permutation(30)[: rng.integers(1, 6)] for _ in range(8)))
    m = _ranking(lists, targets, [3, 12])
    assert all((value >= 0).all() and (value <= 1).all() for value in m.values())
    for name in ("hr", "recall", "mrr"):
        assert (m[f"{name}@12"] >= m[f"{name}@3"]).all()


def _tool(name):
    beside = Path(__file__).parents[2] / "shared" / "tools"
    path = Path(os.environ.get("TFREC_SHARED_TOOLS", beside)) / f"{name}.py"
    if not path.is_file():
        pytest.skip(f"the independent evaluator is not at {path} (set TFREC_SHARED_TOOLS)")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("most_targets", [1, 5])
def test_agrees_with_an_independent_evaluator_to_1e_9(most_targets):
    evaluate = _tool("evaluate").evaluate
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(4)
    users, items, k = 300, 80, 10
    order = np.stack([rng.permutation(items) + 1 for _ in range(users)]).astype(np.int32)
    history, rest = order[:, :20], order[:, 20:]
    lists = rest[:, 10:30]
    targets = _targets(*(rng.permutation(r)[: rng.integers(1, most_targets + 1)] for r in rest))

    def frame(rows, ids):
        return pd.DataFrame({"user_id": rows, "item_id": ids})

    theirs = evaluate(
        frame(np.repeat(np.arange(users), 20), history.ravel()),
        frame(np.repeat(np.arange(users), np.diff(targets[1])), targets[0]),
        frame(np.repeat(np.arange(users), 20), lists.ravel()).assign(
            rank=np.tile(np.arange(1, 21), users)
        ),
        k,
    )
    ours = {name: value.mean() for name, value in _ranking(lists, targets, [k]).items()}
    assert theirs["errors"] == []
    for name in ("HR", "Recall", "NDCG", "MRR"):
        assert ours[f"{name.lower()}@{k}"] == pytest.approx(theirs[f"{name}@{k}"], abs=1e-9)
    catalog = len(np.union1d(history, targets[0]))
    assert metrics.coverage(lists[:, :k], catalog) == pytest.approx(
        theirs[f"coverage@{k}"], abs=1e-9
    )


def test_coverage_counts_distinct_items_and_not_the_filling():
    assert metrics.coverage(_lists([1, 2], [2, 0]), 4) == 0.5


def test_novelty_is_the_mean_self_information_in_bits():
    popularity = np.array([0, 8, 2, 0])
    got = metrics.novelty(_lists([1, 2], [3, 0], [0, 0]), popularity, 8)
    assert got.tolist() == [1.0, 3.0, 0.0]


def test_mean_popularity_and_share_of_the_long_tail():
    popularity = np.array([0, 50, 9, 9, 1, 1])
    tail = metrics.long_tail(popularity)
    assert tail.tolist() == [False, False, True, True, True, True]
    lists = _lists([1, 2], [4, 0])
    assert metrics.popularity_of(lists, popularity).tolist() == [29.5, 1.0]
    assert metrics.tail_share(lists, tail).tolist() == [0.5, 1.0]


def test_diversity_is_one_minus_the_mean_pairwise_cosine():
    vectors = np.array([[9, 9], [1, 0], [0, 2], [3, 3]], np.float32)
    got = metrics.diversity(_lists([1, 2, 3], [1, 2, 0], [1, 0, 0]), vectors)
    cosines = (0 + math.sqrt(0.5) + math.sqrt(0.5)) / 3
    assert got == pytest.approx([1 - cosines, 1.0, 0.0], abs=1e-6)


def test_gini_of_equal_one_sided_and_mixed_exposure():
    assert metrics.gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert metrics.gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert metrics.gini(np.array([1, 3])) == pytest.approx(0.25)
    assert metrics.gini(np.zeros(3, int)) == 0


def test_exposure_counts_items_and_ignores_the_filling():
    assert metrics.exposure(_lists([1, 3], [3, 0]), 4).tolist() == [0, 1, 0, 2, 0]


def test_auc_counts_ties_half():
    assert metrics.auc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1])) == 3.5 / 4
    assert math.isnan(metrics.auc(np.array([0.5]), np.array([1])))


def test_auc_and_log_loss_agree_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    p, y = rng.random(500).round(2) * 0.98 + 0.01, rng.random(500) < 0.3
    assert metrics.auc(p, y) == pytest.approx(sk.roc_auc_score(y, p), abs=1e-12)
    assert metrics.log_loss(p, y) == pytest.approx(sk.log_loss(y, p), abs=1e-12)


def test_log_loss_of_a_certain_mistake_is_finite():
    assert metrics.log_loss(np.array([0.0]), np.array([1])) == pytest.approx(-math.log(1e-7))


def test_calibration_by_hand():
    table = metrics.reliability(np.array([0.1, 0.1, 0.9, 1.0]), np.array([0, 1, 1, 1]), bins=2)
    assert table == [
        {"low": 0.0, "high": 0.5, "count": 2, "predicted": pytest.approx(0.1), "observed": 0.5},
        {"low": 0.5, "high": 1.0, "count": 2, "predicted": pytest.approx(0.95), "observed": 1.0},
    ]
    assert metrics.calibration_error(table) == pytest.approx((2 * 0.4 + 2 * 0.05) / 4)


def test_rating_errors_by_hand():
    assert metrics.rmse(np.array([1.0, 5.0]), np.array([4.0, 5.0])) == pytest.approx(math.sqrt(4.5))
    assert metrics.mae(np.array([1.0, 5.0]), np.array([4.0, 5.0])) == 1.5
    assert math.isnan(metrics.rmse(np.array([]), np.array([])))


def test_bootstrap_is_seeded_and_its_spread_is_the_standard_error():
    values = np.random.default_rng(1).normal(size=(400, 1))
    means = metrics.bootstrap_means(values, 2000, seed=3)
    assert (means == metrics.bootstrap_means(values, 2000, seed=3)).all()
    assert means.std() == pytest.approx(values.std() / 20, rel=0.06)
    low, high = metrics.interval(means[:, 0])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_bootstrap_of_two_columns_is_paired():
    a = np.random.default_rng(1).normal(size=300)
    means = metrics.bootstrap_means(np.stack([a, a + 0.1], axis=1), 100, seed=0)
    assert means[:, 1] - means[:, 0] == pytest.approx(np.full(100, 0.1))


def test_history_segments_name_their_bounds_and_leave_out_the_empty():
    got = metrics.history_segments(np.array([0, 5, 6, 30, 30]), (1, 6, 11, 30))
    assert [(name, users.tolist()) for name, users in got] == [
        ("0", [0]),
        ("1-5", [1]),
        ("6-10", [2]),
        ("30+", [3, 4]),
    ]


def test_deciles_split_the_items_by_popularity():
    popularity = np.array([0, *range(20, 0, -1)])
    decile = metrics.popularity_decile(popularity)
    assert decile[0] == 0
    assert decile[1:3].tolist() == [10, 10]
    assert decile[-2:].tolist() == [1, 1]
    assert np.bincount(decile).tolist() == [1] + [2] * 10


def test_metrics_of_single_targets():
    got = metrics.target_metrics(np.array([1, 0, 2, 11]), 10)
    assert got["hr@10"].tolist() == [1, 0, 1, 0]
    assert got["ndcg@10"] == pytest.approx([1, 0, 1 / LOG2_3, 0])
