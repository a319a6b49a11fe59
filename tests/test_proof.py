"""The choice among smaller models: what is dominated, within a budget, and nearest to one."""

import numpy as np
import pytest

from tfrec.errors import InputError
from tfrec.report.measures import Row
from tfrec.report.proof import HITS, KNOWN, Budget, Trial, beside, dominated, nearest


def model(key, loss, size, ms):
    return {
        "key": key,
        "loss": loss,
        "sizes": {"bundle": size},
        "times": {"one_ms": ms, "request_ms": 99.0},
    }


MODELS = [
    model("float", 0.0, 100, 10.0),
    model("int8", 0.005, 30, 3.0),
    model("pruned", 0.04, 31, 3.1),
    model("student", 0.03, 10, 1.0),
]


def test_what_is_worse_on_every_axis_is_dominated():
    assert dominated(MODELS) == {"pruned": "student"}
    assert dominated(MODELS[:2]) == {}


def test_equal_on_one_axis_is_not_worse():
    assert dominated([model("a", 0.1, 10, 1), model("b", 0.1, 20, 2)]) == {}


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (Budget(loss=0.01), "int8"),
        (Budget(loss=0.001), "float"),
        (Budget(loss=0.05), "student"),
        (Budget(latency=5.0), "int8"),
        (Budget(size=20), "student"),
        (Budget(loss=0.01, size=50, latency=3.0), "int8"),
        (Budget(), "float"),
    ],
)
def test_the_smallest_within_the_budget_or_without_a_loss_the_best_is_chosen(budget, chosen):
    assert nearest(MODELS, budget) == (chosen, {})


def test_the_nearest_misses_by_the_least():
    # int8 would miss the size by 1.5 and the time by 3 / 2; the student misses the loss by 1.2.
    key, misses = nearest(MODELS, Budget(loss=0.025, size=20, latency=2.0))
    assert key == "student"
    assert misses == {"loss": pytest.approx(1.2)}
    key, misses = nearest(MODELS, Budget(size=5))
    assert key == "student"
    assert misses == {"size": pytest.approx(2.0)}


def test_a_loss_of_nothing_is_not_allowed_by_a_bound_of_zero():
    key, misses = nearest([model("int8", 0.01, 1, 1)], Budget(loss=0.0))
    assert key == "int8"
    assert misses["loss"] > 1


def row(values):
    values = np.array(values, float)
    means = {name: np.full(20, values.mean()) for name in (KNOWN, HITS)}
    told = {name: {"mean": float(values.mean())} for name in (KNOWN, HITS)}
    return Row({"name": "", "metrics": told}, means)


def trial(text, values=(1.0, 0.0)):
    return Trial({}, {KNOWN: row(values)}, text)


def test_neighbours_and_cosines_are_of_directions():
    random = np.random.default_rng(0)
    text = random.normal(size=(40, 8)).astype(np.float32)
    one = trial(text)
    same = beside(trial(3 * text), one)
    assert same["cosine"] == pytest.approx(1)
    assert same["cosine_min"] == pytest.approx(1)
    assert same["neighbours"] == 1
    other = beside(trial(random.normal(size=(40, 8)).astype(np.float32)), one)
    assert other["cosine"] < 0.5
    assert other["neighbours"] == pytest.approx(10 / 39, abs=0.15)


def test_the_loss_is_a_share_of_what_the_reference_has():
    text = np.zeros((0, 8), np.float32)
    found = beside(trial(text, (0.9, 0.0)), trial(text, (1.0, 0.0)))
    assert found["loss"] == pytest.approx(0.1)
    assert found["kept"][KNOWN]["low"] == found["kept"][HITS]["low"] == pytest.approx(0.9)
    assert "cosine" not in found


def test_a_reference_that_finds_nothing_is_no_reference():
    text = np.zeros((0, 8), np.float32)
    with pytest.raises(InputError, match="nothing to judge by"):
        beside(trial(text, (1.0, 0.0)), trial(text, (0.0, 0.0)))
