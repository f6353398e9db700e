"""The interval of an accuracy, by the textbook."""

import pytest
from scipy import stats

from ssmcompress.measure.interval import accuracy_interval


def test_an_accuracy_without_an_error_still_has_an_interval():
    low, high = accuracy_interval(1.0, 0.0, 512)
    assert high == pytest.approx(1.0) and 0.98 < low < 0.9999
    binary = (0.3 * 0.7 / 99) ** 0.5
    assert accuracy_interval(0.3, binary, 100) == tuple(stats.binomtest(30, 100).proportion_ci(method="wilson"))
    assert accuracy_interval(0.5, 0.01, 128) == pytest.approx((0.5 - 0.0196, 0.5 + 0.0196), abs=1e-4)
    assert accuracy_interval(0.99, 0.02, 128)[1] == 1.0
