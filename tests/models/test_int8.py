"""Rounding to int8: on the grid, and better than each number by itself."""

import numpy as np
import pytest

from tfrec.models.int8 import Inputs, balanced, coded, rounded


def plainly(kernel):
    step = np.abs(kernel).max(axis=0) / 127
    return np.round(kernel / step) * step


@pytest.fixture
def given():
    """A kernel (300, 20), more than a block of channels, and inputs that go together."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(900, 40)) @ rng.normal(size=(40, 300)) + rng.normal(size=(900, 300))
    return rng.normal(size=(300, 20)).astype(np.float32), values.astype(np.float32)


def seen(values):
    inputs = Inputs(values.shape[1])
    for part in np.array_split(values, 7):
        inputs.add(part)
    return inputs


def test_inputs_are_summed_up(given):
    _, values = given
    inputs = seen(values)
    np.testing.assert_allclose(inputs.gram, values.T @ values, rtol=1e-4, atol=0.2)
    np.testing.assert_array_equal(inputs.largest, np.abs(values).max(axis=0))


def test_the_product_changes_less_than_by_plain_rounding(given):
    kernel, values = given
    errors = [
        np.square(values @ (found - kernel)).mean()
        for found in (rounded(kernel, seen(values).gram), plainly(kernel))
    ]
    assert errors[0] < 0.3 * errors[1]


def test_rounding_again_finds_the_same(given):
    kernel, values = given
    found = rounded(kernel, seen(values).gram)
    np.testing.assert_allclose(plainly(found), found, rtol=1e-5)
    np.testing.assert_allclose(np.abs(found).max(axis=0), np.abs(kernel).max(axis=0), rtol=1e-6)


def test_inputs_that_were_never_seen_are_rounded_plainly(given):
    kernel, _ = given
    found = rounded(kernel, np.zeros((300, 300)))
    np.testing.assert_allclose(found, plainly(kernel), rtol=1e-5, atol=1e-6)


def test_a_column_of_zeros_stays(given):
    kernel, values = given
    kernel[:, 3] = 0
    assert (rounded(kernel, seen(values).gram)[:, 3] == 0).all()


def test_channels_become_alike():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 500)).astype(np.float32)
    largest = np.array([1, 1, 1, 50, 1, 1, 1, 0], np.float32)
    smooth = balanced(kernel, largest)
    divided = largest / smooth
    assert 4 < largest[3] / divided[3] < 50
    assert divided.max() / divided[:7].min() < 10
    assert np.prod(smooth) == pytest.approx(1, rel=1e-5)
    assert smooth[7] == 1


def test_rows_of_a_table_have_steps_of_their_own():
    table = np.random.default_rng(0).normal(size=(50, 16)) * np.geomspace(1e-2, 1, 50)[:, None]
    codes, scales, unit = coded(table.astype(np.float32))
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    assert (np.abs(codes * (scales * unit) - table) <= 0.52 * step).all()
    assert (codes.dtype, scales.dtype, scales.shape) == (np.int8, np.int16, (50, 1))


def test_a_table_of_zeros():
    codes, scales, unit = coded(np.zeros((3, 4), np.float32))
    assert not (codes * (scales * unit)).any()


def test_what_was_pruned_stays_zero(given):
    kernel, values = given
    kernel[np.abs(kernel) < np.median(np.abs(kernel), axis=0)] = 0
    found = rounded(kernel, seen(values).gram)
    assert (found[kernel == 0] == 0).all()
    errors = [np.square(values @ (k - kernel)).mean() for k in (found, plainly(kernel))]
    assert errors[0] < 0.6 * errors[1]
