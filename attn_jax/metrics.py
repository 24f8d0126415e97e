"""Metrics as pure functions of arrays; one number for each example, so that runs can be compared pair by pair."""

import jax
import jax.numpy as jnp

from attn_jax.types import Array


def mean_squared_error(predictions: Array, targets: Array) -> Array:
    """Float32 `(B,)` of two arrays `(B, ...)`."""
    error = predictions.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.mean(error**2, axis=tuple(range(1, error.ndim)))


def psnr(mean_squared_error: Array, peak: float = 1.0) -> Array:
    """Peak signal-to-noise ratio in decibel, `10 log10(peak^2 / mse)`, of values from 0 to `peak`.

    An error below `1e-10 peak^2` counts as that: no ratio is above 100.
    """
    return -10 * jnp.log10(jnp.maximum(mean_squared_error / peak**2, 1e-10))


def adjusted_rand_index(
    true: Array, predicted: Array, *, num_true: int, num_predicted: int, mask: Array | None = None
) -> Array:
    """How alike two partitions of the same points are: 1 where equal, 0 on average for random labels.

        ARI = (sum_ij C(n_ij, 2) - e) / ((sum_i C(a_i, 2) + sum_j C(b_j, 2)) / 2 - e)
        e = sum_i C(a_i, 2) sum_j C(b_j, 2) / C(n, 2)

    with the contingency table `n_ij`, its sums `a_i`, `b_j` and `C(x, 2) = x (x - 1) / 2` (Hubert and Arabie
    1985, equation 5). Labels may be permuted. 1 where both partitions are one cluster, or all single points.

    Args:
      true, predicted: int `(B, N)`, labels from 0 to `num_true - 1` and `num_predicted - 1`.
      mask: bool `(B, N)`, the points that count; foreground ARI leaves out the true background.

    Returns:
      Float32 `(B,)`; NaN for an example without a point.
    """
    real = jnp.ones(true.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    rows = jax.nn.one_hot(true, num_true) * real[..., None]
    table = jnp.einsum("bni,bnj->bij", rows, jax.nn.one_hot(predicted, num_predicted))
    # As fractions of all pairs: counts of pairs leave float32's exact integers at 5,800 points.
    count = real.sum(-1)
    pairs = jnp.maximum(count * (count - 1), 1)

    def chance(counts: Array, axes: tuple[int, ...]) -> Array:
        return jnp.sum(counts * (counts - 1), axes) / pairs

    both, first, second = chance(table, (1, 2)), chance(table.sum(2), (1,)), chance(table.sum(1), (1,))
    expected, most = first * second, (first + second) / 2
    trivial = jnp.isclose(most, expected, rtol=1e-6, atol=0)
    index = jnp.where(trivial, 1.0, (both - expected) / jnp.where(trivial, 1.0, most - expected))
    return jnp.where(count > 0, index, jnp.nan)


def ranking(scores: Array, grades: Array, ideal: Array, mask: Array, cutoff: int = 10) -> dict[str, Array]:
    """Quality of rankings as trec_eval computes it, `(B,)` each, of queries that have a relevant document.

        nDCG = sum_r grade_r / log2(r + 1) / (the same of the ideal ranking),   r = 1 .. cutoff
        MRR  = 1 / rank of the first relevant candidate, 0 if it is beyond the cut-off;   hit = it is the first

    Args:
      scores: `(B, C)`, by which the candidates are ranked; equal ones stay in the order given (trec_eval's is by
        document id, descending).
      grades: `(B, C)`, at least 0.
      ideal: `(B, I)`, the highest grades of the query in descending order, found or not, `I` at least `cutoff`
        or all there are.
      mask: bool `(B, C)`, True = a candidate.

    Returns:
      `ndcg@<cutoff>`, `mrr@<cutoff>` and `hit@1`; 0 for a query without candidates.
    """
    # Stable, and by the scores as they are: masked ones are moved to the end, whatever they hold.
    order = jnp.lexsort((-jnp.where(mask, scores, 0), ~mask), axis=-1)
    found = jnp.take_along_axis(jnp.where(mask, grades, 0), order, axis=1)[:, :cutoff].astype(jnp.float32)
    best = ideal[:, :cutoff].astype(jnp.float32)

    def gain(grades: Array) -> Array:
        return jnp.sum(grades / jnp.log2(jnp.arange(grades.shape[1]) + 2), axis=1)

    relevant = found > 0
    first = jnp.argmax(relevant, axis=1)
    reciprocal = jnp.where(relevant.any(axis=1), 1 / (first + 1), 0)
    ideal_gain = gain(best)
    ndcg = jnp.where(ideal_gain > 0, gain(found) / jnp.where(ideal_gain > 0, ideal_gain, 1), 0)
    return {
        f"ndcg@{cutoff}": ndcg,
        f"mrr@{cutoff}": reciprocal,
        "hit@1": relevant[:, :1].any(axis=1).astype(jnp.float32),
    }
