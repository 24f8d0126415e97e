"""The exponential of the portable paths."""

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.engine.exponential import exp

# Two units in the last place, and the polynomial.
TOLERANCE = 3e-7


def test_close_to_float64_wherever_the_result_is_normal():
    x = np.concatenate([np.linspace(-87.3, 88.37, 400_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(np.asarray(jax.jit(exp)(x), np.float64) - exact) / exact) < TOLERANCE


def test_limits():
    x = jnp.array([0.0, -0.0, -jnp.inf, -1e30, -89, 89, 1e30, jnp.inf])
    np.testing.assert_array_equal(exp(x), [1, 1, 0, 0, 0, jnp.inf, jnp.inf, jnp.inf])
    assert jnp.isnan(exp(jnp.array([jnp.nan, 0.0])))[0]


def test_is_its_own_derivative():
    x = jnp.linspace(-5, 5, 7)
    for derivative in (jax.vmap(jax.grad(exp)), jax.vmap(jax.grad(jax.grad(exp)))):
        np.testing.assert_array_equal(derivative(x), exp(x))


def test_other_types_take_the_ordinary_one():
    for dtype in (jnp.float64, jnp.bfloat16):
        with jax.enable_x64(True):
            x = jnp.linspace(-5, 5, 7, dtype=dtype)
            np.testing.assert_array_equal(exp(x), jnp.exp(x))
