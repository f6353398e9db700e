"""The statistics against hand values, scipy, and what must hold of them: zero for equals, few false alarms."""

from math import comb, exp, expm1

import numpy as np
import pytest
from scipy import stats

from ssmcompress.evaluate.compare import (
    LEVEL,
    Samples,
    bootstrap_p,
    differences,
    holm,
    interval,
    less_sure,
    mcnemar,
    widened,
)

ITEMS = 120


def samples(measure, values, weights=None, chance=0.25):
    kind = "log_likelihood" if measure.endswith(("perplexity", "bits_per_byte")) else "accuracy"
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    return Samples(measure, kind, tuple(map(str, range(len(values)))), values, weights, chance)


def evaluation(rng, noise, loss=0.0):
    """Two models' scores on four measures: alike item by item but for noise, the second worse by `loss`."""
    skill = rng.normal(0.4, 1, ITEMS)
    size = rng.integers(200, 2000, ITEMS).astype(float)
    nats = size * rng.lognormal(-0.4, 0.3, ITEMS)
    sides = []
    for harm in (0.0, loss):
        seen = skill - 2 * harm + noise * rng.normal(size=ITEMS)
        read = nats * (1 + harm + 0.03 * rng.normal(size=ITEMS))
        sides.append(
            [
                samples("a/acc", seen > 0),
                samples("recall/copy-20", np.round(20 / (1 + np.exp(-seen))) / 20, chance=0.01),
                samples("w/word_perplexity", read, size),
                samples("text/bits_per_byte", read * 1.44, size * 5),
            ]
        )
    return sides


def test_identical_models_differ_by_exactly_nothing():
    a, _ = evaluation(np.random.default_rng(0), 0.5)
    for found in differences(a, a):
        assert found.measurable
        assert (found.change, found.interval, found.adjusted) == (0.0, (0.0, 0.0), (0.0, 0.0))
        assert (found.p, found.p_holm, found.significant, found.worst) == (1.0, 1.0, False, 0.0)


def test_of_200_null_pairs_at_most_one_in_twenty_alarms():
    rng = np.random.default_rng(1)
    fired = tested = 0
    for seed in range(200):
        found = differences(*evaluation(rng, 0.5), seed=seed, resamples=999)
        tested += sum(each.measurable for each in found)
        fired += any(each.significant and each.loss > 0 for each in found)
    assert tested == 800 and fired <= 10


def test_a_real_loss_is_seen():
    rng = np.random.default_rng(2)
    for seed in range(20):
        found = differences(*evaluation(rng, 0.5, loss=0.15), seed=seed, resamples=999)
        assert all(each.significant and each.loss > 0 for each in found[1:]), found
    assert found[0].loss > 0


@pytest.mark.parametrize(("up", "down"), [(0, 0), (0, 5), (3, 9), (10, 10), (40, 15)])
def test_mcnemar_is_the_exact_binomial_tail(up, down):
    a = np.array([0.0] * up + [1.0] * down + [1.0] * 30 + [0.0] * 7)
    b = np.array([1.0] * up + [0.0] * down + [1.0] * 30 + [0.0] * 7)
    flips = up + down
    tail = sum(comb(flips, k) for k in range(min(up, down) + 1)) / 2**flips
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert differences([samples("t/acc", a)], [samples("t/acc", b)], resamples=99)[0].p == mcnemar(a, b)


def test_shares_are_no_matter_for_mcnemar():
    rng = np.random.default_rng(3)
    a = rng.integers(0, 21, 50) / 20
    assert differences([samples("t/acc", a)], [samples("t/acc", a)], resamples=99)[0].test == "bootstrap"
    assert differences([samples("t/acc", a > 0.5)], [samples("t/acc", a > 0.5)], resamples=99)[0].test == "mcnemar"


def test_holm_by_hand():
    adjusted, levels = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # 0.005 ≤ 0.05 / 4 and 0.01 ≤ 0.05 / 3, but 0.03 > 0.05 / 2: there the procedure stops
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    adjusted, levels = holm(np.array([0.2, 0.9]))
    assert adjusted == pytest.approx([0.4, 0.9]) and levels == pytest.approx([0.025, 0.025])
    assert [len(each) for each in holm(np.array([]))] == [0, 0]


def test_intervals_exclude_zero_exactly_where_p_is_small():
    rng = np.random.default_rng(4)
    seen = set()
    for shift in np.linspace(1.5, 3.2, 60):
        draws = rng.normal(shift, 1, 1999)
        for level in (0.05, 0.0125, 0.05 / 3):
            low, high = interval(draws, level)
            assert (low > 0 or high < 0) == (bootstrap_p(draws) <= level)
            seen.add(low > 0)
    assert seen == {True, False}


def test_the_interval_is_that_of_scipy_and_covers():
    rng = np.random.default_rng(5)
    size, a = rng.integers(50, 500, 200).astype(float), rng.lognormal(0, 0.4, 200) * 100
    b = a * rng.normal(1.02, 0.1, 200)
    [found] = differences([samples("t/perplexity", a, size)], [samples("t/perplexity", b, size)])
    mean = float((b - a).sum() / size.sum())
    assert found.change == pytest.approx(expm1(mean))
    assert found.b == pytest.approx(exp(b.sum() / size.sum())) and found.b / found.a - 1 == pytest.approx(found.change)
    told = stats.bootstrap(
        (a, b, size),
        lambda a, b, size, axis=-1: np.expm1((b.sum(axis) - a.sum(axis)) / size.sum(axis)),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert found.interval == pytest.approx(tuple(told), rel=0.05)


def test_bits_per_byte_change_by_their_own_share():
    a, size = np.array([100.0, 300.0, 220.0] * 4), np.array([90.0, 310.0, 200.0] * 4)
    [found] = differences(
        [samples("text/bits_per_byte", a, size)], [samples("text/bits_per_byte", 1.05 * a, size)], resamples=199
    )
    assert found.change == pytest.approx(0.05)
    assert found.interval == pytest.approx((0.05, 0.05))
    assert found.a == pytest.approx(620 / 600)


def test_a_level_at_chance_is_not_tested_and_costs_the_others_nothing():
    rng = np.random.default_rng(7)
    guess, other = (rng.random((2, 400)) < 0.25).astype(float)
    good, less = (rng.random(400) < 0.8).astype(float), (rng.random(400) < 0.7).astype(float)
    found = differences(
        [samples("g/acc", guess), samples("t/acc", good)], [samples("g/acc", other), samples("t/acc", less)]
    )
    assert (found[0].measurable, found[0].p, found[0].p_holm, found[0].adjusted) == (False, None, None, None)
    assert not found[0].significant
    assert found[1].p_holm == found[1].p and found[1].adjusted == found[1].interval


def test_one_text_in_several_units_counts_once():
    rng = np.random.default_rng(5)
    (acc, _, words, other), (acc2, _, words2, other2) = evaluation(rng, 0.5, loss=0.1)
    sizes = rng.integers(1, 9, ITEMS)

    def units(side):
        """Word perplexity, byte perplexity and bits per byte of one text, as lm-eval has them."""
        bytes_, bits = side.weights * sizes, side.values / np.log(2)
        return [side, samples("w/byte_perplexity", side.values, bytes_), samples("w/bits_per_byte", bits, bytes_)]

    once = differences([acc, words, other], [acc2, words2, other2], resamples=999)
    several = differences([acc, *units(words), other], [acc2, *units(words2), other2], resamples=999)
    assert [several[i] for i in (0, 1, 4)] == once
    assert len({(each.p, each.p_holm) for each in several[1:4]}) == 1
    assert all(each.adjusted[0] <= each.change <= each.adjusted[1] for each in several[1:4])


def test_accuracies_of_one_task_count_each_even_where_they_agree():
    values = np.tile([1.0, 0.0, 1.0], 20)
    less = np.concatenate([np.zeros(9), values[9:]])
    pair = [[samples(name, each, chance=None) for name in ("a/acc", "a/acc_norm")] for each in (values, less)]
    assert [each.p_holm for each in differences(*pair)] == [2 * each.p for each in differences(*pair)]


@pytest.mark.parametrize(
    ("right", "chance", "measurable"),
    [(100, 0.25, True), (45, 0.25, True), (44, 0.25, False), (25, 0.25, False), (0, None, False), (1, None, True)],
)
def test_measurable_is_four_standard_errors_above_chance(right, chance, measurable):
    values = np.arange(100) < right
    assert samples("t/acc", values, chance=chance).measurable is measurable


@pytest.mark.parametrize("items", [2, 3, 5, 6, 8, 12])
def test_few_items_do_not_alarm(items):
    rng = np.random.default_rng(items)
    fired = 0
    for seed in range(200):
        size = rng.gamma(5, 50, items)
        nats = size * rng.lognormal(-0.4, 0.3, items)
        pair = [[samples("text/bits_per_byte", nats + rng.normal(0, 2, items), size)] for _ in "ab"]
        [found] = differences(*pair, seed=seed, resamples=199)
        fired += found.significant and found.loss > 0
        assert (found.adjusted is None) == (items < 6)
        assert items >= 6 or (found.p, found.worst) == (1.0, float("inf"))
    assert fired <= 10


def test_a_dozen_items_are_enough_for_a_great_loss_among_many_measures():
    nats = np.arange(100.0, 112.0)
    lost = nats * np.random.default_rng(0).normal(1.2, 0.01, 12)
    pair = [[samples(f"{name}/perplexity", side) for name in "abcdefghijkl"] for side in (nats, lost)]
    assert all(each.significant for each in differences(*pair))


def test_an_interval_of_few_items_is_wider_and_says_what_p_says():
    for items in (6, 12, 62, 5000):
        level = widened(0.05, items)
        assert level < 0.05 and less_sure(level, items) == pytest.approx(0.05)
    assert widened(0.05, 5000) == pytest.approx(0.05, abs=1e-3)
    width = stats.norm.ppf(1 - widened(0.05, 12) / 2)
    assert width == pytest.approx(stats.t.ppf(0.975, 11) * (12 / 11) ** 0.5)


def test_losses_that_cancel_on_two_items_are_not_excluded():
    [found] = differences([samples("t/acc", [1, 0], chance=None)], [samples("t/acc", [0, 1], chance=None)])
    assert (found.change, found.adjusted, found.worst) == (0.0, None, float("inf"))
    [same] = differences([samples("t/acc", [1, 0], chance=None)], [samples("t/acc", [1, 0], chance=None)])
    assert (same.adjusted, same.worst) == ((0.0, 0.0), 0.0)


def test_one_item_has_no_interval():
    [found] = differences([samples("text/bits_per_byte", [80.0])], [samples("text/bits_per_byte", [90.0])])
    assert (found.interval, found.adjusted, found.p, found.worst) == (None, None, 1.0, float("inf"))
    assert not found.significant
    [same] = differences([samples("text/bits_per_byte", [80.0])], [samples("text/bits_per_byte", [80.0])])
    assert (same.change, same.worst) == (0.0, 0.0)


def test_a_decision_never_contradicts_what_is_shown():
    rng = np.random.default_rng(8)
    decided = set()
    for loss in np.linspace(0, 0.08, 25):
        for each in differences(*evaluation(rng, 0.5, loss), resamples=999):
            low, high = each.adjusted
            assert each.significant == (each.p_holm <= LEVEL and (low > 0 or high < 0))
            if each.test == "bootstrap":
                assert (each.p_holm <= LEVEL) == (low > 0 or high < 0)
            if each.significant:
                assert each.interval[0] > 0 or each.interval[1] < 0
            decided.add(each.significant)
    assert decided == {True, False}


def test_mcnemar_may_be_the_stricter_of_the_two():
    a = np.ones(400)
    a[300:] = 0
    b = a.copy()
    b[:6] = 0  # six lost and none won: p = 2 / 2**6
    lone = differences([samples("t/acc", a)], [samples("t/acc", b)])[0]
    assert lone.p == lone.p_holm == 0.03125 and lone.significant
    beside = differences([samples("t/acc", a), samples("u/acc", a)], [samples("t/acc", b), samples("u/acc", a)])[0]
    assert beside.p_holm == 0.0625 and beside.adjusted[1] < 0 and not beside.significant


def test_the_seed_decides_every_digit():
    pair = evaluation(np.random.default_rng(9), 0.5, 0.05)
    assert differences(*pair, seed=4, resamples=199) == differences(*pair, seed=4, resamples=199)
    assert differences(*pair, seed=4, resamples=199) != differences(*pair, seed=5, resamples=199)
