"""Sliding-window attention: a band of the standard one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.ops import local_attention, standard_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5

LENGTH = 17
WINDOWS = [0, 3, (0, 4), (5, 1), LENGTH]


def operands(seed, length=LENGTH):
    normal = np.random.default_rng(seed).normal
    return [normal(size=(2, length, 2, 4)).astype(np.float32) for _ in range(3)]


@functools.cache
def compiled(window, causal, implementation="xla"):
    return jax.jit(functools.partial(local_attention, window=window, causal=causal, implementation=implementation))


def sides(window, causal):
    left, right = (window, window) if isinstance(window, int) else window
    return left, 0 if causal else right


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("window,causal", [(3, False), (3, True), ((5, 1), False), ((1, 5), True)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_equals_the_banded_definition(implementation, window, causal, seed):
    q, k, v = operands(seed)
    mask = np.random.default_rng(seed).random((2, LENGTH)) < 0.6
    left, right = sides(window, causal)
    stream = oracles.Stream(k, v, mask)
    expected, _, _ = oracles.softmax_attention(q, [stream], left=left, right=right, scale=0.5)
    actual = compiled(window, causal, implementation)(q, k, v, mask=mask)
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [LENGTH - 1, 2**31 - 1])
def test_a_window_over_everything_is_standard_attention(window, causal):
    q, k, v = operands(0)
    expected = jax.jit(functools.partial(standard_attention, causal=causal))(q, k, v)
    np.testing.assert_allclose(compiled(window, causal)(q, k, v), expected, rtol=FLOAT32, atol=FLOAT32)


def test_a_window_of_zero_gives_each_token_its_own_value():
    q, k, v = operands(0)
    np.testing.assert_allclose(compiled(0, False)(q, k, v), v, rtol=FLOAT32)


@pytest.mark.parametrize("window,causal", [(3, False), (3, True), ((5, 1), False)])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), position=st.integers(0, LENGTH - 1))
def test_a_token_reaches_exactly_its_window(window, causal, seed, position):
    """To the bit: outputs change for the queries that see the changed key, and for no others."""
    q, k, v = operands(seed)
    before = np.asarray(compiled(window, causal)(q, k, v))  # computed before its arguments change
    k[:, position], v[:, position] = 3, 100
    changed = (compiled(window, causal)(q, k, v) != before).any((0, 2, 3))
    left, right = sides(window, causal)
    distance = np.arange(LENGTH) - position
    np.testing.assert_array_equal(changed, (distance <= left) & (-distance <= right))


def test_shifting_the_sequence_shifts_the_output():
    """No position is special but the ends: inside, a shifted sequence has shifted outputs."""
    q, k, v = operands(0)
    shifted = compiled(3, False)(q[:, 2:], k[:, 2:], v[:, 2:])
    whole = compiled(3, False)(q, k, v)
    np.testing.assert_allclose(shifted[:, 3:], whole[:, 5:], rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("window", [-1, 1.5, None, (1, 2, 3), "wide"])
def test_a_window_that_is_none_raises(window):
    with pytest.raises(ValueError, match=r"^local_attention: `window` must be an integer >= 0 or a pair"):
        local_attention(*operands(0), window=window)
    with pytest.raises(ValueError, match=r"^local: `window` must be an integer >= 0 or a pair"):
        attn_jax.build("local", dim=8, num_heads=2, window=window, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("window", [2, (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_module_has_the_window(window, causal):
    """Its weights are positive exactly inside the band, and the cache is no longer than it has to be."""
    module = attn_jax.build("local", dim=8, num_heads=2, causal=causal, window=window, rngs=nnx.Rngs(0))
    weights = module.attention_weights(jnp.float32(np.random.default_rng(0).normal(size=(2, 9, 8))))
    left, right = sides(window, causal)
    distance = np.arange(9)[:, None] - np.arange(9)
    band = np.broadcast_to((distance <= left) & (-distance <= right), weights.shape)
    np.testing.assert_array_equal(weights > 0, band)
    if causal:
        assert module.init_cache(1, 100).keys.shape[1] == left + 1
        assert module.init_cache(1, 2).keys.shape[1] == 2
