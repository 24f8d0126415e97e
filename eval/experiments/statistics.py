"""How sure a difference between runs is, and what it says about a claim."""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000
_SEED = 0  # equal runs give equal intervals
_MAX_WEIGHTS = 2**24  # of examples in memory at once


class Interval(NamedTuple):
    """An estimate and the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """As a relative difference: `-7.0% [-13.9%, +0.8%]`."""
        return f"{self.value:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"

    def times(self) -> str:
        """As a ratio: `1.17x [1.11, 1.21]`."""
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN for the deviation of one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def relative_differences(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """`mean(second) / mean(first) - 1` and its bootstrap distribution.

    Args:
      first, second: `(seeds, examples)`, the metric of the same test examples in the runs of two settings, seed
        by seed. Seeds and examples are resampled, the same in both settings (a paired, two-level bootstrap).

    Returns:
      The relative difference, and `(DRAWS,)` of its resampled values. With few seeds the latter are too narrow:
      three seeds can be drawn in ten ways only.

    Raises:
      ValueError: the two are not of the same shape.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"expected two arrays (seeds, examples) of one shape, got {first.shape}, {second.shape}")
    means = resampled_means(first, second)
    return float(second.mean() / first.mean() - 1), means[1] / means[0] - 1


def resampled_means(*runs: np.ndarray) -> list[np.ndarray]:
    """The bootstrap distribution of the mean of each of `runs`, all of one shape `(seeds, examples)`.

    Seeds and examples are resampled, the same in all of them.

    Returns:
      For each of `runs` `(DRAWS,)` values.
    """
    random = np.random.default_rng(_SEED)
    seeds, examples = runs[0].shape
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    # Examples with the same values everywhere, as most have where the metric is 0 or 1, are drawn together.
    _, first, counts = np.unique(np.concatenate(runs), axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)
    columns, chances = first[order], counts[order] / examples
    means = np.empty((len(runs), DRAWS))
    block = max(1, _MAX_WEIGHTS // len(columns))
    for start in range(0, DRAWS, block):
        seed_weights = by_seed[start : start + block]
        weights = random.multinomial(examples, chances, len(seed_weights)) / examples
        for mean, values in zip(means[:, start : start + block], runs):
            mean[:] = np.einsum("ds,se,de->d", seed_weights, values[:, columns], weights, optimize=True)
    return list(means)


def interval(value: float, draws: np.ndarray) -> Interval:
    """The percentile interval of a bootstrap distribution."""
    return Interval(value, *map(float, np.percentile(draws, (2.5, 97.5))))


def median_interval(values: np.ndarray) -> Interval:
    """The median of `(N,)` values and the bootstrap interval of it."""
    random = np.random.default_rng(_SEED)
    draws = np.median(random.choice(values, (DRAWS, len(values))), axis=1)
    return interval(float(np.median(values)), draws)


RULE = """\
A claim counts as reproduced where the whole 95 % interval lies on the claim's side of half the claimed effect, as
contradicted where it lies on the other side, and as not decidable at this size otherwise; the rule was fixed
before the first run."""


def verdict(measured: Interval, claimed: float) -> str:
    """Whether an effect is there as claimed, by a rule that was fixed before anything was measured.

    "reproduced": the whole interval lies on the claim's side of half the claimed effect; "contradicted": on the
    other side; else "not decidable at this size".
    """
    low, high = sorted((measured.low / claimed, measured.high / claimed))
    return "reproduced" if low > 0.5 else "contradicted" if high < 0.5 else "not decidable"
