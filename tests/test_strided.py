"""Strided attention: combs of keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.ops import strided_attention

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# Gradients add more of them.
GRADIENT = 1e-4

PATTERNS = ["local+strided", "dilated", "phase", "fixed"]
BATCH, LENGTH, HEADS, WIDTH = 2, 13, 4, 4
DIM = HEADS * WIDTH

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
either_way = pytest.mark.parametrize("causal", [False, True])


def operands(seed, length=LENGTH, key_heads=HEADS):
    normal = np.random.default_rng(seed).normal
    return [normal(size=(BATCH, length, n, WIDTH)).astype(np.float32) for n in (HEADS, key_heads, key_heads)]


def seen(pattern, stride, causal=False, length=LENGTH):
    """Which key each query of each head reads, `(H, L, M)`, by the words of the documentation."""
    h, i, j = np.ogrid[:HEADS, :length, :length]
    apart = i - j
    pattern = {
        "local+strided": (apart % stride == 0) | (np.abs(apart) < stride),
        "dilated": apart % stride == 0,
        "phase": (j - h) % stride == 0,
        "fixed": j % stride == 0,
    }[pattern] & (h >= 0)
    return np.broadcast_to(pattern & (j <= i) if causal else pattern, (HEADS, length, length))


def definition(q, k, v, admissible):
    """Softmax attention under a dense mask that broadcasts to `(B, H, L, M)`; 0 where it is empty."""
    q, k, v = (np.float64(x) if x.dtype == np.float32 else x for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // x.shape[2], axis=2) for x in (k, v))
    p = np.where(admissible, np.exp(np.einsum("blhe,bmhe->bhlm", q, k) * WIDTH**-0.5), 0)
    total = p.sum(-1, keepdims=True)
    return np.einsum("bhlm,bmhv->blhv", p / np.where(total == 0, 1, total), v)


@functools.cache
def compiled(pattern, stride, causal, implementation="xla"):
    options = {"pattern": pattern, "stride": stride, "causal": causal, "implementation": implementation}

    @jax.jit
    def run(q, k, v, mask, g):
        out, pullback = jax.vjp(lambda q, k, v: strided_attention(q, k, v, mask=mask, **options), q, k, v)
        return out, pullback(g)

    return run


@pytest.mark.parametrize("implementation,stride,key_heads", [("xla", 3, HEADS), ("dense", 2, 2)])
@every_pattern
@either_way
@settings(max_examples=3)
@given(seed=st.integers(0, 2**16))
def test_equals_the_dense_definition(pattern, causal, implementation, stride, key_heads, seed):
    """Values and gradients, with masks; rows without an admissible key are exactly 0 with gradient 0."""
    draw = np.random.default_rng(seed)
    q, k, v = operands(seed, key_heads=key_heads)
    mask = draw.random((BATCH, LENGTH)) < 0.5
    g, *along = (draw.normal(size=x.shape).astype(np.float32) for x in (q, q, k, v))
    admissible = seen(pattern, stride, causal) & mask[:, None, None]
    bad = [np.where(mask[..., None, None], x, np.nan) for x in (k, v)]

    out, gradients = compiled(pattern, stride, causal, implementation)(q, *bad, mask, g)
    np.testing.assert_allclose(out, definition(q, k, v, admissible), rtol=FLOAT32, atol=FLOAT32)
    empty = ~admissible.any(-1).transpose(0, 2, 1)
    assert not np.asarray(out)[empty].any() and not np.asarray(gradients[0])[empty].any()

    step = 1e-30  # the complex step: exact for an analytic function
    moved = [x + 1j * step * np.float64(u) for x, u in zip((q, k, v), along)]
    expected = (g * definition(*moved, admissible)).sum().imag / step
    actual = sum(np.vdot(d, u) for d, u in zip(gradients, along))
    np.testing.assert_allclose(actual, expected, rtol=GRADIENT, atol=GRADIENT * 10)
    assert not np.asarray(gradients[1])[~mask].any() and not np.asarray(gradients[2])[~mask].any()


@every_pattern
@either_way
def test_a_stride_beyond_the_sequence(pattern, causal):
    stride, (q, k, v) = 50, operands(50, key_heads=2)
    options = {"stride": stride, "pattern": pattern, "causal": causal, "implementation": "dense"}
    actual = jax.jit(functools.partial(strided_attention, **options))(q, k, v)
    expected = definition(q, k, v, seen(pattern, stride, causal))
    np.testing.assert_allclose(actual, expected, rtol=FLOAT32, atol=FLOAT32)


@every_pattern
@either_way
def test_a_stride_of_one_is_standard_attention(pattern, causal):
    q, k, v = operands(0)
    mask = np.random.default_rng(0).random((BATCH, LENGTH)) < 0.6
    options = {"pattern": pattern, "stride": 1, "causal": causal, "implementation": "xla"}
    actual = jax.jit(functools.partial(strided_attention, **options))(q, k, v, mask=mask)
    admissible = mask[:, None, None] & np.tri(LENGTH, k=0 if causal else LENGTH, dtype=bool)
    np.testing.assert_allclose(actual, definition(q, k, v, admissible), rtol=FLOAT32, atol=FLOAT32)


def reach(pattern, causal, layers, stride=3):
    """Which input tokens move which outputs of a stack of modules with residual connections."""
    module = build(pattern=pattern, stride=stride, causal=causal, implementation="dense")

    def stack(x):
        for _ in range(layers):
            x = x + np.asarray(weigh(module, x)[1])
        return x

    before, step = stack(tokens()), np.eye(LENGTH, dtype=np.float32)[..., None]
    return np.stack([(stack(tokens() + s) != before).any((0, 2)) for s in step], axis=1)


@either_way
def test_every_token_reaches_every_other_in_two_layers(causal):
    all_pairs = np.tri(LENGTH, dtype=bool) if causal else np.ones((LENGTH, LENGTH), bool)
    one, two = (reach("local+strided", causal, layers) for layers in (1, 2))
    np.testing.assert_array_equal(two, all_pairs)
    assert (one < two).any()


def test_between_the_teeth_of_a_fixed_comb_nothing_is_ever_read():
    """In the source's pattern other tokens reach only themselves, at any depth."""
    off_comb = np.arange(LENGTH) % 3 > 0
    np.testing.assert_array_equal(reach("fixed", False, 4)[:, off_comb], np.eye(LENGTH, dtype=bool)[:, off_comb])
    assert reach("phase", False, 1).all()  # with as many heads as teeth


def cost(pattern, stride, length=256):
    """Arithmetic of the readable implementation, which computes every score that it is given to compute."""
    array = jax.ShapeDtypeStruct((1, length, HEADS, 64), jnp.float32)
    options = {"pattern": pattern, "stride": stride, "implementation": "dense"}
    lowered = jax.jit(functools.partial(strided_attention, **options)).lower(array, array, array)
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize("pattern", ["dilated", "phase", "fixed"])
def test_the_work_falls_with_the_stride(pattern):
    assert cost(pattern, 8) < 1.2 * cost(pattern, 1) / 8


def test_no_dense_matrix():
    """The backward pass of the default keeps less than one score matrix of the comb."""
    length, stride = 4096, 16
    array = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, k, v: strided_attention(q, k, v, stride=stride).sum(), (0, 1, 2)))
    used = gradient.lower(array, array, array).compile().memory_analysis().temp_size_in_bytes
    assert used < length**2 // stride * 4


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stride": 0}, "`stride` must be a positive integer, got 0"),
        ({"stride": 1.5}, "`stride` must be a positive integer, got 1.5"),
        ({"pattern": "random"}, r"`pattern` must be one of local\+strided, dilated, phase, fixed, got 'random'"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^strided_attention: {message}"):
        strided_attention(*operands(0), **{"stride": 2} | options)
    with pytest.raises(ValueError, match=f"^strided: {message}"):
        build(**options)


def test_operands_that_do_not_fit_raise():
    q, k, v = operands(0)
    for arrays, words in (
        ((q[0], k, v), "`q`"),
        ((q, k[:, :, :3], v), "`k` has 3 heads"),
        ((q, k, v[:, 1:]), "`v`"),
    ):
        with pytest.raises(ValueError, match=f"^strided_attention: {words}"):
            strided_attention(*arrays, stride=2)


# The module.


def build(**options):
    return attn_jax.build("strided", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def tokens(length=LENGTH):
    return np.random.default_rng(1).normal(size=(BATCH, length, DIM)).astype(np.float32)


weigh = nnx.jit(lambda module, x: (module.attention_weights(x), module(x)))


@every_pattern
@either_way
def test_weights_are_those_of_the_pattern(pattern, causal):
    """Positive exactly on it, rows of sum 1 where there is a key, and the output is their mean of the values."""
    module, x = build(pattern=pattern, stride=3, causal=causal, implementation="dense"), tokens()
    weights, y = jax.device_get(weigh(module, x))
    admissible = np.broadcast_to(seen(pattern, 3, causal), weights.shape)
    np.testing.assert_array_equal(weights > 0, admissible)
    np.testing.assert_allclose(weights.sum(-1), admissible.any(-1), rtol=FLOAT32)
    v = (x @ np.asarray(module.value.kernel[...])).reshape(BATCH, LENGTH, HEADS, WIDTH)
    mean = np.einsum("bhlm,bmhe->blhe", weights, v).reshape(x.shape)
    np.testing.assert_allclose(y, mean @ np.asarray(module.out.kernel[...]), rtol=GRADIENT, atol=GRADIENT)


@every_pattern
def test_every_pattern_decodes(pattern):
    module, x = build(pattern=pattern, stride=3, causal=True, implementation="dense", rope_base=100.0), tokens()
    expected, cache, step = jax.jit(module)(x), module.init_cache(BATCH, LENGTH), jax.jit(module.step)
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
        np.testing.assert_allclose(y, expected[:, t : t + 1], rtol=GRADIENT, atol=GRADIENT)
