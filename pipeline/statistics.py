"""Intervals: exact ones for shares, bootstrap ones for means and ratios of means."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binomtest

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Takes mean measurements [..., M] to values [...]."""
RESAMPLES = 4000
SEED = 20260101
"""Fixed, so that a report is reproducible from the same measurements."""


class Interval(NamedTuple):
    """A point estimate with its two-sided confidence limits."""

    value: float
    lower: float
    upper: float

    def rounded(self, digits: int = 6) -> dict[str, float]:
        """For a report."""
        return {name: round(float(value), digits) for name, value in self._asdict().items()}


def share_upper(k: int, n: int, confidence: float) -> float:
    """One-sided Clopper-Pearson upper limit of a share seen as k of n; 1 when nothing was seen."""
    return 1.0 if k >= n else float(beta.ppf(confidence, k + 1, n - k))


def share_lower(k: int, n: int, confidence: float) -> float:
    """One-sided Clopper-Pearson lower limit of a share seen as k of n; 0 when nothing was seen."""
    return 0.0 if k == 0 else float(beta.ppf(1 - confidence, k, n - k + 1))


def mcnemar(lost: int, won: int) -> float:
    """Chance of `lost` or more of the questions on which two models differ, were each as likely won; one-sided, exact.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    return float(binomtest(lost, lost + won, alternative="greater").pvalue) if lost + won else 1.0


def column(index: int, over: int | None = None) -> Statistic:
    """The statistic that is one measurement's mean, or its ratio to another's."""

    def statistic(mean: NDArray[np.float64]) -> NDArray[np.float64]:
        value: NDArray[np.float64] = mean[..., index] if over is None else mean[..., index] / mean[..., over]
        return value

    return statistic


def bootstrap(
    statistic: Statistic,
    blocks: Sequence[Sequence[float]],
    confidence: float,
) -> Interval:
    """Percentile bootstrap over independent blocks (Efron 1979).

    `blocks` [B, M]: M measurements for each of B blocks. A statistic sees means, so a ratio is a ratio of means.
    """
    data = np.asarray(blocks, dtype=np.float64)
    picks = np.random.default_rng(SEED).integers(0, len(data), size=(RESAMPLES, len(data)))
    resampled = statistic(data[picks].mean(axis=1))
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(statistic(data.mean(axis=0))), float(lower), float(upper))


def bootstrap_quantile(share: float, blocks: Sequence[Sequence[float]], confidence: float) -> Interval:
    """The same for a quantile over all measurements of all blocks, as in a sample of whole blocks."""
    data = [np.asarray(block, dtype=np.float64) for block in blocks]
    picks = np.random.default_rng(SEED).integers(0, len(data), size=(RESAMPLES // 10, len(data)))
    resampled = [np.quantile(np.concatenate([data[block] for block in pick]), share) for pick in picks]
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(np.quantile(np.concatenate(data), share)), float(lower), float(upper))
