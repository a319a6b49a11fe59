"""Golden: what counts as the same answer."""

import numpy as np
import pytest

from tfrec.errors import ArtifactError
from tfrec.golden import cosines, difference, overlap

ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf, -1.0])
def test_zeros_and_what_is_no_number_are_like_nothing(wrong):
    given = ONES.copy()
    given[1] = wrong
    assert cosines(ONES, given)["cosine_min"] <= 0
    assert cosines(ONES, ONES * 2)["cosine_min"] == pytest.approx(1)


def test_what_has_no_vector_is_not_compared():
    mine = ONES.copy()
    mine[0] = 0
    assert cosines(mine, ONES)["cosine_min"] == pytest.approx(1)
    assert cosines(mine[:1], ONES[:1]) == {"cosine_min": 1.0, "cosine_mean": 1.0}


def test_another_shape_is_an_error():
    with pytest.raises(ArtifactError, match=r"shape \(2, 2\) were given, and \(3, 2\) exported"):
        cosines(ONES, ONES[:2])
    with pytest.raises(ArtifactError, match=r"shape \(3, 1\) were given, and \(3, 2\) stored"):
        difference(ONES, ONES[:, :1])


def test_a_prediction_that_is_no_number_is_infinitely_far():
    mine = np.array([0.0, 1.0], np.float32)
    assert difference(mine, mine)["max_difference"] == 0
    assert difference(mine, mine + 0.5)["max_difference"] == pytest.approx(1)
    assert difference(mine, np.array([0, np.nan], np.float32))["max_difference"] == np.inf


def test_lists():
    assert overlap([["a", "b"], []], [["b", "c"], []]) == pytest.approx(0.75)
    assert overlap([[]], [["a"]]) == 0
