"""Standard attention: its definition, JAX's own, and the laws of a weighted mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.ops import standard_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# The same through four projections of width 8.
MODULE = 5e-5

BATCH, LENGTH, KEYS, HEADS, WIDTH = 2, 5, 11, 4, 8


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, length=LENGTH, keys=KEYS, key_heads=HEADS, value_width=WIDTH):
    normal = np.random.default_rng(seed).normal
    shapes = (length, HEADS, WIDTH), (keys, key_heads, WIDTH), (keys, key_heads, value_width)
    return [normal(size=(BATCH, *shape)).astype(np.float32) for shape in shapes]


attention = jax.jit(standard_attention, static_argnames=("causal", "scale", "implementation"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"key_heads": 2},
        {"key_heads": 1, "is_causal": True},
        {"bias": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_equals_jax(options):
    options = dict(options)
    q, k, v = operands(0, key_heads=options.pop("key_heads", HEADS))
    if "bias" in options:
        options["bias"] = np.random.default_rng(1).normal(size=(1, HEADS, LENGTH, KEYS)).astype(np.float32)
    expected = jax.nn.dot_product_attention(q, k, v, **options)
    if "is_causal" in options:
        options["causal"] = options.pop("is_causal")
    close(attention(q, k, v, **options), expected)


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(standard_attention, implementation=implementation))


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), real=st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_the_definition(implementation, seed, real):
    """Other lengths and widths of keys and values, under masks; a row without keys is 0."""
    q, k, v = operands(seed, value_width=3)
    mask = np.random.default_rng(seed).random((BATCH, KEYS)) < real
    expected, _, _ = oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], scale=WIDTH**-0.5)
    actual = compiled(implementation)(q, k, v, mask=mask)
    close(actual, expected)
    if not mask[0].any():
        np.testing.assert_array_equal(actual[0], 0)


SHAPES = [(), (KEYS,), (BATCH, 1, 1, KEYS), (LENGTH, 1), (HEADS, LENGTH, KEYS), (BATCH, 1, LENGTH, KEYS)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_broadcasts(shape):
    """Every shape that broadcasts to `(B, H, L, M)` means its broadcast, in values and in the bias's gradient."""
    q, k, v = operands(0)
    draw = np.random.default_rng(1)
    bias, g, along = (
        draw.normal(size=shape),
        draw.normal(size=(BATCH, LENGTH, HEADS, WIDTH)),
        draw.normal(size=shape),
    )

    def definition(bias):
        full = np.broadcast_to(bias, (BATCH, HEADS, LENGTH, KEYS))
        return oracles.softmax_attention(q, [oracles.Stream(k, v, bias=full)], scale=WIDTH**-0.5)[0]

    def loss(bias):
        out = standard_attention(q, k, v, bias=bias)
        return jnp.sum(g * out), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.float32(bias))
    close(out, definition(bias))
    expected = oracles.derivative(lambda b: (g * definition(b)).sum(), bias, along)
    # A sum of some hundred float32 terms around 1.
    np.testing.assert_allclose((gradient * along).sum(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_keys_does_not_matter(seed):
    q, k, v = operands(seed)
    order = np.random.default_rng(seed).permutation(KEYS)
    close(attention(q, k[:, order], v[:, order]), attention(q, k, v))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), shift=st.floats(-100, 100, width=32))
def test_outputs_are_means_of_values(seed, shift):
    """Convex combinations: within the range of the values, and values shifted by a constant shift the outputs."""
    q, k, v = operands(seed)
    out = attention(q, k, v)
    assert (out <= v.max(1, keepdims=True) + FLOAT32).all()
    assert (out >= v.min(1, keepdims=True) - FLOAT32).all()
    np.testing.assert_allclose(attention(q, k, v + shift), out + shift, atol=FLOAT32 * (1 + abs(shift)))


def test_scale_is_a_factor_of_the_logits():
    q, k, v = operands(0)
    close(attention(q, k, v, scale=0.0), np.broadcast_to(v.mean(1, keepdims=True), q.shape))
    close(attention(q, k, v, scale=0.6), attention(q * 0.6, k, v, scale=1.0))
    close(attention(q, k, v), attention(q, k, v, scale=WIDTH**-0.5))


@pytest.mark.parametrize(
    "bias,message",
    [
        (np.zeros((3, KEYS), np.float32), r"`bias` must be broadcastable to \(B, H, L, M\) = \(2, 4, 5, 11\)"),
        (np.zeros((1, 1, 1, 1, 1), np.float32), "broadcastable"),
        (np.ones((LENGTH, KEYS), bool), "`bias` must be floating point .* got dtype bool"),
    ],
)
def test_a_bias_that_does_not_fit_raises(bias, message):
    with pytest.raises(ValueError, match=f"^standard_attention: .*{message}"):
        standard_attention(*operands(0), bias=bias)


@pytest.mark.parametrize("causal,cross", [(False, False), (True, False), (False, True)])
def test_the_module_is_projections_around_the_operation(causal, cross):
    dim, normal = 8, np.random.default_rng(0).normal
    module = attn_jax.build("standard", dim=dim, num_heads=2, causal=causal, rngs=nnx.Rngs(0))
    x, memory = normal(size=(BATCH, 7, dim)), normal(size=(BATCH, 4, dim))
    mask, memory_mask = np.arange(14).reshape(BATCH, 7) % 5 > 0, np.arange(8).reshape(BATCH, 4) % 3 > 0
    context = {"context": jnp.float32(memory), "context_mask": memory_mask} if cross else {}

    def heads(x, projection):
        return (x @ np.float64(projection.kernel[...])).reshape(*x.shape[:2], 2, dim // 2)

    source, source_mask = (memory, memory_mask) if cross else (x, mask)
    stream = oracles.Stream(heads(source, module.key), heads(source, module.value), source_mask)
    mixed, _, _ = oracles.softmax_attention(
        heads(x, module.query), [stream], causal=causal, scale=(dim // 2) ** -0.5
    )
    expected = np.where(mask[..., None], mixed.reshape(x.shape) @ np.float64(module.out.kernel[...]), 0)
    close(nnx.jit(module)(jnp.float32(x), mask=mask, **context), expected, MODULE)

    weights = module.attention_weights(jnp.float32(x), mask=mask, **context)
    values = np.einsum("bhlm,bmhv->blhv", weights, stream.values).reshape(x.shape)
    close(values @ np.float64(module.out.kernel[...]), expected, MODULE)


def test_parameters():
    """`4 D^2`, without biases."""
    module = attn_jax.build("standard", dim=12, num_heads=3, rngs=nnx.Rngs(0))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param))) == 4 * 12**2
