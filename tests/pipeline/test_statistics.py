"""Limits against published numbers and against scipy; the bootstrap against a distribution that is known."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.statistics import bootstrap, bootstrap_quantile, mcnemar, share_lower, share_upper


def mean(measurements: NDArray[np.float64]) -> NDArray[np.float64]:
    return measurements[..., 0]


def ratio(measurements: NDArray[np.float64]) -> NDArray[np.float64]:
    quotient: NDArray[np.float64] = measurements[..., 0] / measurements[..., 1]
    return quotient


@pytest.mark.parametrize(("k", "n", "share"), [(0, 59, 0.05), (1, 93, 0.05), (3, 153, 0.05), (0, 299, 0.01)])
def test_upper_limit_at_published_sample_sizes(k: int, n: int, share: float) -> None:
    """The least n that shows, with 95 % confidence, a share below 5 % or 1 % (Wilks 1941 and its tables)."""
    assert share_upper(k, n, 0.95) < share < share_upper(k, n - 1, 0.95)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (5, 10), (9, 10), (10, 10), (14, 139), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_limits_are_scipys_exact_ones(k: int, n: int, confidence: float) -> None:
    upper = binomtest(k, n, alternative="less").proportion_ci(confidence, method="exact").high
    lower = binomtest(k, n, alternative="greater").proportion_ci(confidence, method="exact").low
    assert share_upper(k, n, confidence) == pytest.approx(upper, abs=1e-12)
    assert share_lower(k, n, confidence) == pytest.approx(lower, abs=1e-12)


def test_nothing_seen_says_nothing() -> None:
    assert share_upper(0, 0, 0.95) == 1.0
    assert share_lower(0, 0, 0.95) == 0.0


def test_bootstrap_covers_a_known_mean_about_as_often_as_it_says() -> None:
    random, truth, trials = np.random.default_rng(1), 3.0, 100
    intervals = [bootstrap(mean, random.exponential(truth, (40, 1)).tolist(), 0.9) for _ in range(trials)]
    covered = sum(interval.lower <= truth <= interval.upper for interval in intervals)
    assert 0.78 * trials <= covered <= 0.98 * trials
    above, below = (
        sum(interval.lower > truth for interval in intervals),
        sum(interval.upper < truth for interval in intervals),
    )
    assert above < 0.15 * trials and below < 0.25 * trials


def test_bootstrap_width_is_the_normal_one_for_many_blocks() -> None:
    blocks = np.random.default_rng(2).normal(0.0, 1.0, (400, 1))
    interval = bootstrap(mean, blocks.tolist(), 0.95)
    half = 1.96 * blocks.std() / 20
    assert interval.upper - interval.value == pytest.approx(half, rel=0.1)
    assert interval.value - interval.lower == pytest.approx(half, rel=0.1)
    assert interval.value == pytest.approx(float(blocks.mean()))


def test_bootstrap_repeats_itself() -> None:
    blocks = np.random.default_rng(3).normal(size=(12, 2)).tolist()
    assert bootstrap(mean, blocks, 0.95) == bootstrap(mean, blocks, 0.95)


def test_ratio_is_of_means_not_mean_of_ratios() -> None:
    interval = bootstrap(ratio, [[1.0, 1.0], [9.0, 3.0]], 0.95)
    assert interval.value == 2.5  # 5 / 2, where the ratios 1 and 3 have the mean 2
    assert (interval.lower, interval.upper) == (1.0, 3.0)


def test_bootstrap_keeps_a_block_together() -> None:
    """Both measurements of a block are drawn at once, so a constant ratio has no spread."""
    interval = bootstrap(ratio, [[2.0 * size, size] for size in (1.0, 5.0, 9.0, 40.0)], 0.99)
    assert interval.lower == pytest.approx(2.0) and interval.upper == pytest.approx(2.0)


def test_bootstrap_of_a_measurement_that_is_no_number_has_no_limits() -> None:
    interval = bootstrap(mean, [[1.0], [float("nan")], [2.0]], 0.95)
    assert np.isnan([interval.value, interval.lower, interval.upper]).all()


def test_rounding_for_a_report() -> None:
    interval = bootstrap(mean, [[1 / 3], [1 / 3]], 0.95)
    assert interval.rounded(3) == {"value": 0.333, "lower": 0.333, "upper": 0.333}


def test_quantile_is_of_all_measurements_and_its_limits_of_whole_blocks() -> None:
    """Two kinds of block, few of the large: without any of them in a sample, the quantile is the others'."""
    small, large = [0.0] * 90 + [1.0] * 10, [0.0] * 90 + [5.0] * 10
    even = bootstrap_quantile(0.95, [small] * 40, 0.95)
    assert even == (1.0, 1.0, 1.0)
    mixed = bootstrap_quantile(0.95, [small] * 20 + [large] * 20, 0.95)
    assert (mixed.lower, mixed.upper) == (1.0, 5.0)


@pytest.mark.parametrize(("lost", "won", "expected"), [(0, 0, 1.0), (0, 5, 1.0), (5, 0, 1 / 32), (3, 1, 5 / 16)])
def test_mcnemar_counts_the_coins_that_fall_so(lost: int, won: int, expected: float) -> None:
    """Of 2^n ways in which n fair coins fall, those with at least `lost` heads."""
    assert mcnemar(lost, won) == pytest.approx(expected)
