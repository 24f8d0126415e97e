"""Position encodings are their formulas, and rotary ones depend on distances alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.positions import rotary, sinusoidal_positions, sinusoidal_positions_2d

# float32 angles up to some dozen radians.
FLOAT32 = 2e-5

normal = np.random.default_rng(0).normal


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("dim", [1, 2, 7, 8])
def test_sinusoidal_positions_are_the_formula(dim):
    """sin and cos of position / 10000^(n / (half - 1)), n = 0 .. half - 1."""
    half = -(-dim // 2)
    for position, row in enumerate(np.asarray(sinusoidal_positions(11, dim))):
        angles = [position / 10000 ** (n / max(half - 1, 1)) for n in range(half)]
        expected = [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
        close(row, expected[:dim])


def test_a_grid_tells_row_and_column():
    grid = sinusoidal_positions_2d(3, 5, 8)
    for row in range(3):
        for column in range(5):
            close(grid[row, column], [*sinusoidal_positions(3, 4)[row], *sinusoidal_positions(5, 4)[column]])
    with pytest.raises(ValueError, match="`dim` must be even"):
        sinusoidal_positions_2d(3, 5, 7)


def test_rotary_is_multiplication_by_a_phase():
    x, positions = normal(size=(2, 7, 3, 8)).astype(np.float32), np.array([0, 1, 5, 2, 9, 4, 30])
    phase = np.exp(1j * positions[:, None, None] * 100.0 ** (-np.arange(4) / 4))
    expected = (x[..., :4] + 1j * x[..., 4:]) * phase
    close(rotary(x, jnp.asarray(positions), base=100.0), np.concatenate([expected.real, expected.imag], -1))
    with pytest.raises(ValueError, match="even head width"):
        rotary(x[..., :5], jnp.asarray(positions))


def test_rotary_products_depend_on_distances_alone():
    q, k = normal(size=(2, 1, 7, 1, 8)).astype(np.float32)
    positions = jnp.arange(7)

    def products(shift):
        return jnp.einsum("blhe,bmhe->blm", rotary(q, positions + shift), rotary(k, positions + shift))

    close(products(13), products(0))
    assert np.abs(products(0) - jnp.einsum("blhe,bmhe->blm", q, k)).max() > 0.1


ROTARY = [name for name, mechanism in attn_jax.MECHANISMS.items() if "rope_base" in mechanism.options()]


@pytest.mark.parametrize("name", ROTARY)
def test_a_mechanism_with_rotary_positions(name):
    """Order matters, decoding continues at the right position, and a context, which has none, is refused."""
    build = functools.partial(attn_jax.build, name, dim=16, num_heads=2, rngs=nnx.Rngs(0))
    module = build(causal=True, rope_base=10.0)
    x = normal(size=(1, 6, 16)).astype(np.float32)
    y = jax.jit(module)(x)
    assert np.abs(y - jax.jit(build(causal=True))(x)).max() > 1e-3
    cache = module.init_cache(1, 6, jnp.float32)
    step = jax.jit(module.step)
    for t in range(6):
        y_t, cache = step(x[:, t : t + 1], cache)
        close(y_t, y[:, t : t + 1])
    if attn_jax.MECHANISMS[name].cross:
        with pytest.raises(ValueError, match=f"{name}: `context` has no positions that"):
            build(rope_base=10.0)(x, context=x.copy())
    with pytest.raises(ValueError, match=f"{name}: `rope_base`"):
        build(rope_base=-1.0)
