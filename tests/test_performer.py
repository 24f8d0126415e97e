"""FAVOR+ features, what they approximate and how well; the laws of section "Performer" in the module's file."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.mechanisms.performer import Feature, favor_attention, orthogonal_projection

WIDTH = 8


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def oracle_features(feature, x, w):
    """`phi(x)` (..., F) in NumPy, up to a factor common to all tokens."""
    y = x / x.shape[-1] ** 0.25

    def positive(z):
        phi = np.exp(z - (y**2).sum(-1, keepdims=True) / 2)
        return phi + 1e-6 * phi.mean(-1, keepdims=True)

    return {
        "softmax": lambda: positive(y @ w.T),
        "softmax_hyp": lambda: positive(np.concatenate([y @ w.T, -y @ w.T], -1)),
        "relu": lambda: np.maximum(y @ w.T, 0) / np.sqrt(len(w)) + 1e-3,
        "elu": lambda: np.where(x > 0, x + 1, np.exp(x)),
        "seed_elu": lambda: np.where(x @ w.T > 0, x @ w.T + 1, np.exp(x @ w.T)),
        "seed_relu": lambda: np.maximum(x @ w.T, 0),
    }[feature]()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", get_args(Feature))
def test_every_feature_map_is_its_formula(feature, causal):
    """Linear evaluation equals the quadratic one of the same features, in float64."""
    with jax.enable_x64(True):
        q, k, v = normal(0, 3, 2, 13, 2, WIDTH)
        w, mask = normal(1, 24, WIDTH), np.random.default_rng(2).random((2, 13)) < 0.7
        phi_q, phi_k = (oracle_features(feature, x, w) for x in (q, k))
        weights = np.einsum("blhf,bmhf->bhlm", phi_q, phi_k) * mask[:, None, None, :]
        weights *= np.tri(13) if causal else 1
        total = weights.sum(-1, keepdims=True)
        expected = np.einsum("bhlm,bmhe->blhe", weights / np.where(total > 0, total, 1), v)
        actual = favor_attention(q, k, v, w, feature=feature, mask=mask, causal=causal, chunk=4)
        np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize("feature,causal", [("softmax", False), ("softmax_hyp", True)])
def test_large_inputs_are_read_and_have_finite_gradients(feature, causal):
    """Where the features of queries and keys do not overlap in float32, no row is lost and no gradient is NaN."""
    q, k, v = normal(3, 3, 2, 13, 2, WIDTH).astype(np.float32)
    w = normal(4, 24, WIDTH).astype(np.float32)

    @jax.jit
    def attend_and_pull(q, k, v):
        o, pull = jax.vjp(lambda *x: favor_attention(*x, w, feature=feature, causal=causal, chunk=4), q, k, v)
        return o, pull(jnp.ones_like(o))

    o, gradients = attend_and_pull(50 * q, 50 * k, 1 + v**2)
    assert (o >= 1 - 1e-5).all()  # an average of values that are at least 1, to rounding
    assert all(np.isfinite(x).all() for x in gradients)


def kernel_estimates(w, q, k):
    """`phi(q) . phi(k)` for many projections `w` (samples, F, E)."""
    phi_q, phi_k = (np.exp(w @ y - (y**2).sum() / 2) for y in (q / WIDTH**0.25, k / WIDTH**0.25))
    return (phi_q * phi_k).mean(1)


def orthogonal_samples(samples, features):
    keys = jax.random.split(jax.random.key(0), samples)
    return np.asarray(jax.vmap(lambda key: orthogonal_projection(key, features, WIDTH))(keys), np.float64)


def test_the_softmax_kernel_is_unbiased_and_its_variance_is_the_formula():
    """Mean exp(q.k/sqrt(E)); variance (1/F) exp(|q+k|^2) SM^2 (1 - exp(-|q+k|^2)) for independent rows."""
    samples, features = 40_000, 8
    q, k = 0.5 * normal(0, 2, WIDTH)
    y = (q + k) / WIDTH**0.25
    exact = np.exp(q @ k / np.sqrt(WIDTH))
    variance = np.exp(y @ y) * exact**2 * (1 - np.exp(-y @ y)) / features
    estimates = kernel_estimates(normal(1, samples, features, WIDTH), q, k)
    assert abs(estimates.mean() - exact) < 5 * np.sqrt(variance / samples)  # five standard errors
    np.testing.assert_allclose(estimates.var(), variance, rtol=0.1)  # heavy tails: about 2 % expected at this size
    orthogonal = kernel_estimates(orthogonal_samples(samples // 4, features), q, k)
    assert abs(orthogonal.mean() - exact) < 5 * np.sqrt(4 * variance / samples)
    assert orthogonal.var() < 0.97 * variance


def test_rows_are_orthogonal_within_a_block_and_normal_in_length():
    w = orthogonal_samples(500, 2 * WIDTH)
    unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
    gram = np.einsum("sfe,sge->sfg", unit[:, :WIDTH], unit[:, :WIDTH])
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(WIDTH), gram.shape), atol=1e-5)
    squares = (w**2).sum(-1)  # chi squared with E degrees: mean E, variance 2 E
    assert abs(squares.mean() - WIDTH) < 5 * np.sqrt(2 * WIDTH / squares.size)


def test_more_features_are_more_exact_where_inputs_are_small():
    """Error falls like F^(-1/2) for small norms."""
    q, k, v = 0.4 * normal(0, 3, 1, 64, 1, WIDTH).astype(np.float32)
    exact = attn_jax.ops.standard_attention(q, k, v, implementation="dense")

    def error(features):
        def one(key):
            w = jax.random.normal(key, (features, WIDTH))
            return jnp.mean(jnp.square(favor_attention(q, k, v, w) - exact))

        return jnp.sqrt(jnp.mean(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 32))))

    sizes = (16, 256)
    found = [float(error(features)) for features in sizes]
    slope = np.log(found[1] / found[0]) / np.log(sizes[1] / sizes[0])
    assert -0.6 < slope < -0.4


def test_redraw_replaces_the_projection_and_trains_nothing():
    module = attn_jax.build("performer", dim=16, num_heads=2, num_features=12, rngs=nnx.Rngs(0))
    before = np.asarray(module.projection[...])
    module.redraw(nnx.Rngs(1))
    assert np.abs(np.asarray(module.projection[...]) - before).max() > 0.1
    parameters = nnx.to_flat_state(nnx.state(module, nnx.Param))
    assert sum(p[...].size for _, p in parameters) == 4 * 16**2


def test_wrong_options_raise():
    q = np.zeros((1, 3, 2, WIDTH), np.float32)
    with pytest.raises(ValueError, match="`feature`"):
        favor_attention(q, q, q, np.zeros((4, WIDTH)), feature="nope")  # type: ignore[arg-type]
    for projection in (None, np.zeros((4, WIDTH + 1)), np.zeros((3, 4, WIDTH))):
        with pytest.raises(ValueError, match="`projection`"):
            favor_attention(q, q, q, projection)
    with pytest.raises(ValueError, match="`num_features`"):
        attn_jax.build("performer", dim=16, num_heads=2, num_features=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="elu"):
        attn_jax.build("performer", dim=16, num_heads=2, feature="elu", rngs=nnx.Rngs(0)).redraw(nnx.Rngs(0))
