"""Metrics against their definitions, in NumPy and float64."""

import itertools
import math

import numpy as np
import pytest

from attn_jax import metrics

# Sums of up to a thousand float32 terms, divided by a difference of such sums that is not small.
ROUNDING = 1e-5


def rand_index_by_pairs(true, predicted):
    """The adjusted Rand index from all pairs of points, each together or apart in either partition."""
    together = [[a[i] == a[j] for i, j in itertools.combinations(range(len(a)), 2)] for a in (true, predicted)]
    first, second = np.array(together, dtype=bool)
    expected = first.mean() * second.mean()
    most = (first.mean() + second.mean()) / 2
    return 1.0 if most == expected else ((first & second).mean() - expected) / (most - expected)


def index(true, predicted, **options):
    return np.asarray(metrics.adjusted_rand_index(true, predicted, num_true=5, num_predicted=6, **options))


@pytest.fixture(scope="module")
def labels():
    draw = np.random.default_rng(0)
    true = draw.integers(0, 5, (4, 40))
    noisy = np.where(draw.random(true.shape) < 0.3, draw.integers(0, 6, true.shape), true)
    return true, noisy


def test_ari_is_that_of_all_pairs(labels):
    expected = [rand_index_by_pairs(t, p) for t, p in zip(*labels)]
    np.testing.assert_allclose(index(*labels), expected, rtol=ROUNDING)


def test_foreground_ari_is_that_of_the_points_that_count(labels):
    true, noisy = labels
    mask = true > 0
    expected = [rand_index_by_pairs(t[m], p[m]) for t, p, m in zip(true, noisy, mask)]
    np.testing.assert_allclose(index(true, noisy, mask=mask), expected, rtol=ROUNDING)


def test_ari_does_not_depend_on_names(labels):
    true, noisy = labels
    renamed = np.random.default_rng(1).permutation(6)[noisy]
    np.testing.assert_allclose(index(true, renamed), index(true, noisy), rtol=ROUNDING)
    np.testing.assert_allclose(index(true, np.random.default_rng(2).permutation(6)[true]), 1, rtol=ROUNDING)


def test_ari_of_trivial_partitions():
    one, apart = np.zeros((1, 4), int), np.arange(4)[None]
    assert index(one, one + 2) == 1 and index(apart, apart) == 1
    assert index(one, apart) == 0  # no better than chance
    assert np.isnan(index(one, one, mask=one > 0))
    assert index(one, one, mask=one == 0)[0] == 1


def test_ari_of_random_labels_is_zero_on_average():
    draw = np.random.default_rng(3)
    found = index(draw.integers(0, 5, (200, 100)), draw.integers(0, 6, (200, 100)))
    # 0.009: the standard deviation of one, from these draws; the mean's is 14 times smaller.
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(len(found))


def test_ari_of_many_points_is_exact():
    """Pairs of 64 x 64 pixels over eight frames are beyond what float32 counts exactly."""
    true = np.repeat([0, 1, 2, 3], 8192)[None]
    merged = np.minimum(true, 2)
    n = 8192.0
    pairs = lambda counts: sum(c * (c - 1) / 2 for c in counts)  # noqa: E731
    first, second, total = pairs([n] * 4), pairs([n, n, 2 * n]), pairs([4 * n])
    expected = first * second / total
    np.testing.assert_allclose(
        index(true, merged), (first - expected) / ((first + second) / 2 - expected), rtol=ROUNDING
    )


def test_psnr():
    mse = metrics.mean_squared_error(
        np.full((2, 3, 3), 0.5), np.array([0.4, 0.5])[:, None, None] * np.ones((2, 3, 3))
    )
    np.testing.assert_allclose(mse, [0.01, 0], atol=1e-8)
    np.testing.assert_allclose(metrics.psnr(mse), [20, 100], rtol=ROUNDING)
    np.testing.assert_allclose(metrics.psnr(np.float32(0.01 * 255**2), peak=255), 20, rtol=ROUNDING)
