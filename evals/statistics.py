"""Paired statistics on arrays. Every test is scipy's or statsmodels'; intervals are at 1 - 2 alpha,
so that an interval within the margins is a two one-sided test (TOST) at alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

FEW_FLIPS = 20  # below, a t interval of differences that are nearly all zero is too narrow
RESAMPLES = 4000


@dataclass(frozen=True)
class Flips:
    """Documents whose answer changed between right and wrong."""

    n: int
    off: int  # right answers
    on: int
    lost: int
    won: int

    @classmethod
    def of(cls, off: np.ndarray, on: np.ndarray) -> Flips:
        """From booleans [n]."""
        off, on = off.astype(bool), on.astype(bool)
        return cls(len(off), int(off.sum()), int(on.sum()), int((off & ~on).sum()),
                   int((~off & on).sum()))  # fmt: skip

    @property
    def p_worse(self) -> float:
        """Exact one-sided McNemar test of "more lost than won"."""
        if not self.lost + self.won:
            return 1.0
        return float(
            stats.binomtest(self.lost, self.lost + self.won, 0.5, alternative="greater").pvalue
        )


@dataclass(frozen=True)
class Bound:
    """An estimate, its interval, and whether the interval lies within +- margin."""

    value: float
    low: float
    high: float
    within: bool


def accuracy_bound(off: np.ndarray, on: np.ndarray, margin: float, alpha: float) -> Bound:
    """The accuracy's change. TOST on the pairs; with few flips, where its variance means nothing,
    exact (Clopper-Pearson) bounds of the rates of losses and of gains."""
    flips = Flips.of(off, on)
    difference = on.astype(float) - off.astype(float)
    if flips.lost + flips.won < FEW_FLIPS:
        high, loss = (
            float(proportion_confint(count, flips.n, alpha=2 * alpha, method="beta")[1])
            for count in (flips.won, flips.lost)
        )
        return Bound(difference.mean(), -loss, high, bool(loss < margin and high < margin))
    low, high = DescrStatsW(difference).tconfint_mean(alpha=2 * alpha)
    p = ttost_paired(on.astype(float), off.astype(float), -margin, margin)[0]
    return Bound(float(difference.mean()), float(low), float(high), bool(p < alpha))


def mean_bound(difference: np.ndarray, margin: float, alpha: float) -> Bound:
    """The mean of paired differences [n], by TOST."""
    mean = float(difference.mean())
    if len(difference) < 2:
        return Bound(mean, -math.inf, math.inf, False)
    if np.ptp(difference) == 0:  # the tests are undefined without variance
        return Bound(mean, mean, mean, abs(mean) < margin)
    low, high = DescrStatsW(difference).tconfint_mean(alpha=2 * alpha)
    p = ttost_paired(difference, np.zeros_like(difference), -margin, margin)[0]
    return Bound(mean, float(low), float(high), bool(p < alpha))


def p_below(difference: np.ndarray, limit: float) -> float:
    """One-sided t test of "the mean is below ``limit``"."""
    if len(difference) < 2 or np.ptp(difference) == 0:
        return 0.0 if len(difference) > 1 and difference[0] < limit else 1.0
    return float(stats.ttest_1samp(difference, limit, alternative="less").pvalue)


def bootstrap_mean(x: np.ndarray, alpha: float) -> tuple[float, float]:
    """Interval of a mean at 1 - 2 alpha (BCa bootstrap, seeded)."""
    if len(x) < 2 or np.ptp(x) == 0:
        return float(x.mean()), float(x.mean())
    found = stats.bootstrap(
        (x,), np.mean, confidence_level=1 - 2 * alpha, n_resamples=RESAMPLES, method="BCa",
        rng=np.random.default_rng(0), batch=500,
    ).confidence_interval  # fmt: skip
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return float(x.min()), float(x.max())
    return float(found.low), float(found.high)


def holm(p_values: list[float], alpha: float) -> tuple[list[bool], list[float]]:
    """Which hypotheses are rejected, and the adjusted p-values."""
    if not p_values:
        return [], []
    rejected, adjusted, _, _ = multipletests(p_values, alpha=alpha, method="holm")
    return [bool(r) for r in rejected], [float(p) for p in adjusted]


def documents_needed(flip_rate: float, margin: float, alpha: float, power: float = 0.9) -> int:
    """Documents for TOST of the accuracy within +- margin, if it does not change.

    Normal approximation for differences of variance ``flip_rate``; with few flips, what the exact
    bound of ``accuracy_bound`` needs when none occurs.
    """
    none = math.ceil(math.log(alpha) / math.log1p(-margin))
    z = stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + power) / 2)
    return max(none, math.ceil(flip_rate * (z / margin) ** 2))
