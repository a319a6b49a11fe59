"""What of a catalog was served: coverage, popularity, diversity and sources, counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrec.recommender import unit
from tfrec.serving.served import Served, diversity


@pytest.fixture
def served():
    """Twenty items; item 1 is the most popular, item 20 the least."""
    return Served([0, *range(20, 0, -1)])


def test_nothing_served_is_nothing_covered(served):
    assert served.summary() == {
        "lists": 0,
        "distinct_items": 0,
        "catalog": 20,
        "coverage": 0.0,
        "popularity_deciles": [0.0] * 10,
        "diversity": None,
        "sources": {},
    }


def test_coverage_counts_each_item_once(served):
    served.record([1, 2, 3], ["behaviour"] * 3)
    served.record([3, 4], ["behaviour"] * 2)
    found = served.summary()
    assert (found["lists"], found["distinct_items"], found["coverage"]) == (2, 4, 0.2)


def test_deciles_are_shares_of_places_the_most_popular_first(served):
    served.record([1, 2, 20], ["behaviour"] * 3)
    served.record([1], ["popular"])
    assert served.summary()["popularity_deciles"] == [0.75, *[0] * 8, 0.25]


def test_sources_are_counted_by_place(served):
    served.record([1, 2, 3], ["behaviour", "text", "behaviour"])
    assert served.summary()["sources"] == {"behaviour": 2, "text": 1}


def test_diversity_is_the_mean_over_the_lists_where_it_is_known(served):
    for value in (0.2, None, 0.6):
        served.record([1], ["text"], value)
    assert served.summary()["diversity"] == pytest.approx(0.4)


def test_an_item_added_since_belongs_to_the_least_popular(served):
    served.resized(22)
    served.record([1, 21, 22], ["new"] * 3)
    found = served.summary()
    assert (found["distinct_items"], found["catalog"]) == (3, 22)
    assert found["popularity_deciles"] == pytest.approx([1 / 3, *[0] * 8, 2 / 3], abs=1e-6)


def test_many_lists_are_counted_as_one_by_one(served):
    rng = np.random.default_rng(1)
    met, tenths = set(), np.zeros(10)
    for number in range(200):
        rows = rng.choice(np.arange(1, 31), 5, replace=False)  # the last ten were added since
        met.update(rows.tolist())
        tenths += np.bincount(np.minimum((rows - 1) // 2, 9), minlength=10)
        served.record(rows, ["text"] * 5, number % 2 or None)
        if number % 50 == 0:
            found = served.summary()
            assert (found["lists"], found["distinct_items"]) == (number + 1, len(met))
    found = served.summary()
    assert found["popularity_deciles"] == pytest.approx(tenths / 1000, abs=1e-6)
    assert (found["sources"], found["diversity"]) == ({"text": 1000}, 1.0)


def test_an_empty_list_is_a_list(served):
    served.record([], [])
    assert served.summary()["lists"] == 1


def test_a_catalog_without_items_can_be_served_from():
    found = Served([0])
    found.record([1], ["new"])
    assert (found.summary()["catalog"], found.summary()["coverage"]) == (0, 1.0)


def spread(vectors):
    return diversity(unit(np.asarray(vectors, np.float32)))


class TestDiversity:
    def test_of_opposite_alike_and_unrelated_items(self):
        assert spread([[1, 0], [-3, 0]]) == pytest.approx(2)
        assert spread([[1, 1], [2, 2], [5, 5]]) == pytest.approx(0, abs=1e-6)
        assert spread([[1, 0], [0, 7]]) == pytest.approx(1)

    @pytest.mark.parametrize("vectors", [np.zeros((0, 2)), [[1.0, 2.0]]])
    def test_needs_a_pair(self, vectors):
        assert spread(vectors) is None

    def test_of_an_item_without_direction_is_whole(self):
        assert spread([[0, 0], [1, 0]]) == pytest.approx(1)

    @given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 1000))
    def test_is_the_mean_over_all_pairs(self, k, width, seed):
        vectors = np.random.default_rng(seed).normal(size=(k, width))
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        pairs = [1 - units[i] @ units[j] for i in range(k) for j in range(i)]
        assert spread(vectors) == pytest.approx(np.mean(pairs), abs=1e-4)
