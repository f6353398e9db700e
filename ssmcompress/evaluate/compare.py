"""Whether two models differ on the same items: paired intervals, paired tests, and Holm's correction over measures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.05  # of the whole family of measures
RESAMPLES = 9_999
FEW = 100  # up to so many items ten times as many resamples, which their wider intervals need
LEAST = 6  # items: the signs of fewer agree by chance more often than once in twenty times, 2 / 2**5
CHUNK = 2**21  # resampled entries in memory at a time

Kind = Literal["accuracy", "cost", "log_likelihood"]
Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Samples:
    """What a model scored on each item of a measure, whose figure is Σ values / Σ weights.

    Values are shares of right answers (accuracy: higher is better), what a task counts as bad (cost: lower is better),
    or negative log-likelihoods in nats or, for bits per byte, in bits (log_likelihood: lower is better).
    """

    measure: str
    kind: Kind
    items: tuple[str, ...]
    values: np.ndarray
    weights: np.ndarray
    chance: float | None = None
    perplexity: bool | None = None

    @property
    def exponential(self) -> bool:
        """Whether the figure is shown as exp(Σ values / Σ weights): a perplexity, by its name where nothing tells."""
        named = self.measure.partition(",")[0].endswith("perplexity")
        return self.kind == "log_likelihood" and (named if self.perplexity is None else self.perplexity)

    @property
    def figure(self) -> float:
        """The measure's number as tables show it."""
        mean = float(self.values.sum() / self.weights.sum())
        return float(np.exp(min(mean, 700.0))) if self.exponential else mean

    @property
    def measurable(self) -> bool:
        """Whether damage could be seen: an accuracy lies four standard errors above chance; the others always can.

        Without a known chance anything above zero counts. The error is at least the one that `measure.recall` assumes.
        """
        if self.kind != "accuracy":
            return True
        if self.chance is None:
            return self.figure > 0
        size = len(self.values)
        error = self.values.std(ddof=1) / np.sqrt(size) if size > 1 else np.inf
        return bool(self.figure >= self.chance + 4 * max(error, 0.0625 / np.sqrt(size)))


@dataclass(frozen=True)
class Difference:
    """B against A on the items of one measure.

    `change` is B's figure minus A's for an accuracy or a cost, and B's figure over A's, minus one, for a likelihood
    measure (for a perplexity that is exp of the difference of the mean nats, minus one). `interval` holds it with 95 %
    confidence by itself; `adjusted` with the confidence that its step of Holm's procedure asks for (None where the
    items are too few to tell an interval).
    `p` is the test's, `p_holm` the one to be held against 5 %.
    """

    measure: str
    kind: Kind
    items: int
    a: float
    b: float
    change: float
    interval: Interval | None
    adjusted: Interval | None
    test: Literal["mcnemar", "bootstrap"]
    p: float | None
    p_holm: float | None
    measurable: bool

    @property
    def loss(self) -> float:
        """How much worse B is: points of an accuracy or cost, or the relative rise of a likelihood measure."""
        return -self.change if self.kind == "accuracy" else self.change

    @property
    def worst(self) -> float:
        """The greatest loss that the adjusted interval holds; infinite where there is no interval."""
        if self.adjusted is None:
            return float("inf") if self.change or self.items > 1 else 0.0
        return -self.adjusted[0] if self.kind == "accuracy" else self.adjusted[1]

    @property
    def significant(self) -> bool:
        """Whether p_holm is at most 5 % and the adjusted interval excludes zero.

        Where the test is the bootstrap the two say the same; McNemar's exact p may be the stricter of them.
        """
        if self.p_holm is None or self.adjusted is None:
            return False
        low, high = self.adjusted
        return self.p_holm <= LEVEL and (low > 0 or high < 0)


def differences(
    a: Sequence[Samples], b: Sequence[Samples], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Difference]:
    """Compares B with A measure by measure, both on the same items in the same order, and corrects over all of them.

    Measures on which A is at chance are not tested, and do not count in the correction. What says one thing in several
    units (word and byte perplexity, bits per byte) is one test, and counts once.
    """
    found, draws = [], []
    for one, other in zip(a, b, strict=True):
        change, drawn = _changes(one, other, seed, resamples)
        binary = bool(np.isin([one.values, other.values], [0.0, 1.0]).all()) and one.kind != "log_likelihood"
        p = mcnemar(one.values, other.values) if binary else less_sure(bootstrap_p(drawn), len(one.values))
        draws.append(drawn)
        found.append(
            Difference(
                measure=one.measure,
                kind=one.kind,
                items=len(one.values),
                a=one.figure,
                b=other.figure,
                change=change,
                interval=interval(drawn, widened(LEVEL, len(one.values))),
                adjusted=None,
                test="mcnemar" if binary else "bootstrap",
                p=p if one.measurable else None,
                p_holm=None,
                measurable=one.measurable,
            )
        )
    pairs = list(zip(a, b, strict=True))
    first = [next(i for i, other in enumerate(pairs) if _one_test(pair, other)) for pair in pairs]
    tested = [i for i, each in enumerate(found) if each.p is not None and first[i] == i]
    corrected = dict(zip(tested, zip(*holm(np.array([found[i].p for i in tested], float)), strict=True), strict=True))
    for i, each in enumerate(found):
        if first[i] in corrected:
            p, level = corrected[first[i]]
            found[i] = replace(each, p_holm=float(p), adjusted=interval(draws[i], widened(level, each.items)))
    return found


Pair = tuple[Samples, Samples]


def _one_test(one: Pair, other: Pair) -> bool:
    """Whether two measures are the same log-likelihoods of the same items, but for a factor."""
    if one is other:
        return True
    alike = one[0].kind == other[0].kind == "log_likelihood" and one[0].items == other[0].items
    return alike and all(
        np.allclose(x.values * np.abs(y.values).sum(), y.values * np.abs(x.values).sum(), rtol=1e-9, atol=0)
        for x, y in zip(one, other, strict=True)
    )


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of McNemar's test (1947) for two rows [n] of 0 and 1: are the flips as often up as down?"""
    up, down = int((b > a).sum()), int((b < a).sum())
    return float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p of no change from resampled changes [R]: the level at which `interval` begins to exclude zero.

    (Efron and Tibshirani 1993, §15.4, with one added to the count, so that it is never zero.)
    """
    if not len(draws):
        return 1.0
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(draws) + 1)))


def interval(draws: np.ndarray, level: float) -> Interval | None:
    """The percentile interval of resampled changes [R] that misses with probability `level`.

    None where there are too few draws to tell one; what never changes has (0, 0) at any level. The ends are order
    statistics, not interpolated: so it excludes zero exactly where `bootstrap_p` ≤ level. That is why it is no BCa
    interval.
    """
    rank = int(level / 2 * (len(draws) + 1) + 1e-9)
    if len(draws) and not draws.any():
        return 0.0, 0.0
    if rank < 1:
        return None
    ordered = np.sort(draws)
    return float(ordered[rank - 1]), float(ordered[-rank])


def widened(level: float, items: int) -> float:
    """The level at which a percentile interval of so few items misses with probability `level`.

    Resamples of n items spread by √((n - 1) / n) too little, and their tails are the normal's, not those of Student's t
    (Hesterberg 2015, the expanded percentile interval).
    """
    if items < LEAST:
        return 0.0
    return float(2 * stats.norm.cdf(math.sqrt(items / (items - 1)) * stats.t.ppf(level / 2, items - 1)))


def less_sure(p: float, items: int) -> float:
    """The p of so few items whose `bootstrap_p` is p: the level that `widened` takes to p."""
    if items < LEAST:
        return 1.0
    return float(2 * stats.t.cdf(math.sqrt((items - 1) / items) * stats.norm.ppf(p / 2), items - 1))


def holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Holm's (1979) adjusted p of p [m], and the level at which each was tested.

    From the first that is not rejected on, the procedure stops: all others are held against that one's level.
    """
    order = np.argsort(p, kind="stable")
    left = len(p) - np.arange(len(p))
    adjusted, levels = np.empty(len(p)), np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1.0)
    rejected = int((adjusted <= LEVEL).sum())
    levels[order] = LEVEL / np.maximum(left, len(p) - rejected)
    return adjusted, levels


def _changes(a: Samples, b: Samples, seed: int, resamples: int) -> tuple[float, np.ndarray]:
    """The change as measured, and as resampled [R]: both sums of the ratio over the same drawn items."""
    gain = b.values - a.values
    base = a.weights if a.kind != "log_likelihood" or a.exponential else a.values

    def change(gain: np.ndarray, base: np.ndarray, axis: int = -1) -> np.ndarray:
        ratio = gain.sum(axis) / base.sum(axis)
        return np.expm1(np.minimum(ratio, 700.0)) if a.exponential else ratio

    if len(gain) < 2:
        return float(change(gain, base)), np.empty(0)
    drawn = stats.bootstrap(
        (gain, base),
        change,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples if len(gain) > FEW else 10 * (resamples + 1) - 1,
        batch=max(1, CHUNK // len(gain)),
        rng=np.random.Generator(np.random.PCG64(seed)),
    )
    return float(change(gain, base)), drawn.bootstrap_distribution
