"""Our operations inside modules of Flax NNX, Flax Linen and Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from attn_jax import ops
from attn_jax.interop import attention_fn

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5

BATCH, LENGTH, DIM, HEADS = 2, 7, 16, 2

x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, DIM)).astype(np.float32)
mask = np.arange(LENGTH) < np.array([[7], [4]])
ours = attention_fn(ops.standard_attention)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32, atol=FLOAT32)


def nnx_module(**options):
    return nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nnx_gives_what_its_own_attention_gives(is_causal):
    masks = mask[:, None, None]
    call = nnx.jit(lambda module: module(x, mask=masks, is_causal=is_causal))
    expected = call(nnx_module())
    close(call(nnx_module(attention_fn=ours)), expected)
    window = attention_fn(ops.local_attention, window=1)
    assert np.abs(call(nnx_module(attention_fn=window)) - expected).max() > 1e-3


def test_linen_gives_what_its_own_attention_gives():
    def outputs(**options):
        module = linen.MultiHeadDotProductAttention(HEADS, **options)
        parameters = module.init(jax.random.key(0), x)
        return jax.jit(lambda p: module.apply(p, x, mask=mask[:, None, None]))(parameters)

    close(outputs(attention_fn=ours), outputs())


def test_what_cannot_be_honoured_raises():
    full = np.ones((BATCH, 1, LENGTH, LENGTH), bool)
    with pytest.raises(ValueError, match=r"standard_attention: `mask` must be one of keys, \(B, 1, 1, M\)"):
        nnx_module(attention_fn=ours)(x, mask=full)
    with pytest.raises(NotImplementedError, match="dropout"):
        nnx_module(attention_fn=ours, dropout_rate=0.1, deterministic=False)(x)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_module(attention_fn=ours)(x, sow_weights=True)


class Mixer(eqx.Module):
    """An Equinox module, which works on one example, around a function of batches."""

    query: eqx.nn.Linear
    key: eqx.nn.Linear

    def __init__(self, key):
        self.query, self.key = (eqx.nn.Linear(DIM, DIM, key=k) for k in jax.random.split(key))

    def __call__(self, x):
        q, k = (jax.vmap(f)(x).reshape(1, -1, HEADS, DIM // HEADS) for f in (self.query, self.key))
        return ops.standard_attention(q, k, k).reshape(x.shape)


def test_equinox():
    module = Mixer(jax.random.key(0))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(module):
        return jnp.sum(jax.vmap(module)(x) ** 2)

    value, gradients = loss(module)
    assert jnp.isfinite(value)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
