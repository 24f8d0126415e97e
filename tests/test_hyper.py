"""HyperAttention: its definition, where it is exact, how it estimates, and that it keeps the future out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.engine.streaming import Stream, attend
from attn_jax.mechanisms import hyper
from attn_jax.ops import hyper_attention
from tests import oracles

# Sums of some dozen terms, values around 1.
FLOAT64, FLOAT32 = 1e-11, 1e-5

BATCH, LENGTH, HEADS, WIDTH = 2, 17, 2, 4
KEY = jax.random.key(3)
OPTIONS = {"block_size": 4, "num_samples": 5, "min_length": 6}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def operands(seed, length=LENGTH):
    return list(normal(seed, 3, BATCH, length, HEADS, WIDTH))


# The definition, for one sequence without padding. Random directions and priorities are those of the code.

GRAY = {i ^ (i >> 1): i for i in range(128)}


def buckets(directions, x):
    """`(L, E)` to L numbers: the place of the sign bits in the Gray sequence."""
    bits = x.real @ directions > 0
    return [GRAY[int("".join(str(int(bit)) for bit in row), 2)] for row in bits]


def times_read(query_buckets, key_buckets, priority, strict, exact=0):
    """How often each query counts each key: 1 in its block, n / m if sampled, else 0."""
    n, block, samples = len(key_buckets), OPTIONS["block_size"], min(OPTIONS["num_samples"], len(key_buckets))
    keys = sorted(zip(key_buckets, range(n)))
    queries = sorted(zip(query_buckets, range(len(query_buckets))))
    sampled = np.isin(np.arange(n), np.argsort(-priority, kind="stable")[:samples])
    result = []
    for query in zip(query_buckets, range(len(query_buckets))):
        rank = sum(key < query for key in keys) if strict else queries.index(query)
        own = [keys.index(key) // block == min(rank, n - 1) // block for key in zip(key_buckets, range(n))]
        result.append(np.where(own if n > exact else True, 1, sampled * n / samples))
    return np.array(result)


def definition(sketch, q, k, v, causal=False, strict=True):
    """`(L, H, E)` of one sequence `q` `(L, H, E)`, `k` and `v` `(M, H, E)`."""
    length, (directions, priority) = len(q), sketch
    priority = priority[:, : len(k)]
    out = []
    for h in range(q.shape[1]):
        bq, bk = (buckets(directions[h], x[:, h]) for x in (q, k))
        if causal:
            size = OPTIONS["min_length"]
            segment = np.arange(length) // size
            times = 1.0 * np.tri(length) * (segment[:, None] == segment)
            while size < length:
                for start in range(0, length - size, 2 * size):
                    past, present = slice(start, start + size), slice(start + size, start + 2 * size)
                    times[present, past] = times_read(bq[present], bk[past], priority[h, past], strict)
                size *= 2
        else:
            times = times_read(bq, bk, priority[h], strict, OPTIONS["min_length"])
        p = times * np.exp(q[:, h] @ k[:, h].T / np.sqrt(WIDTH))
        out.append(p / p.sum(1, keepdims=True) @ v[:, h])
    return np.stack(out, axis=1)


def exactly(q, k, v, mask=None, causal=False):
    return oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], causal=causal, scale=q.shape[-1] ** -0.5)[0]


def sketch_of(key=KEY, heads=HEADS):
    return hyper._draw(key, heads, WIDTH, num_hashes=7, strict=True, **OPTIONS)


@functools.cache
def draws(heads=HEADS):
    """Directions, and priorities of positions, as they are with float64 enabled."""

    @jax.jit
    def draw():
        sketch = sketch_of(heads=heads)
        return sketch.directions, sketch.priorities(jnp.arange(LENGTH)[None])[0]

    with jax.enable_x64(True):
        return jax.device_get(draw())


@functools.cache
def compiled(causal, strict):
    @jax.jit
    def run(q, k, v, mask, g):
        def call(*x):
            return hyper_attention(*x, key=KEY, mask=mask, causal=causal, strict=strict, **OPTIONS)

        out, vjp = jax.vjp(call, q, k, v)
        return out, vjp(g)

    return run


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**16), real=st.integers(1, LENGTH))
def test_it_is_its_definition_on_the_real_tokens(causal, strict, seed, real):
    """Values and gradients of masked batches are those of the real tokens alone, wherever the padding is."""
    arrays = operands(seed)
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.8
    mask[1] = np.arange(LENGTH) < real
    g = np.where(mask[..., None, None], normal(seed + 1, *arrays[0].shape), 0)
    with jax.enable_x64(True):
        out, gradients = jax.device_get(compiled(causal, strict)(*arrays, mask, g))
        for b, m in enumerate(mask):
            alone = [x[b, m] for x in arrays]
            np.testing.assert_allclose(out[b, m], definition(draws(), *alone, causal, strict), atol=FLOAT64)
            for n, (x, gradient) in enumerate(zip(alone, gradients)):
                along = normal(seed + 2, *x.shape)

                def loss(x, b=b, m=m, n=n, alone=alone):
                    return (g[b, m] * definition(draws(), *alone[:n], x, *alone[n + 1 :], causal, strict)).sum()

                actual = (gradient[b, m] * along).sum()
                np.testing.assert_allclose(actual, oracles.derivative(loss, x, along), atol=10 * FLOAT64)
                assert not gradient[b, ~m].any()


def test_fewer_queries_than_keys_and_grouped_heads():
    q, k, v = normal(0, BATCH, 9, 4, WIDTH), *normal(1, 2, BATCH, LENGTH, HEADS, WIDTH)
    with jax.enable_x64(True):
        out = jax.jit(functools.partial(hyper_attention, key=KEY, **OPTIONS))(q, k, v)
    k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
    np.testing.assert_allclose(out, [definition(draws(4), *x) for x in zip(q, k, v)], atol=FLOAT64)


# Where it is exact.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": LENGTH, "num_samples": 1, "min_length": 6},
        {"block_size": 4, "num_samples": LENGTH, "min_length": 12},
    ],
    ids=["one block", "all sampled"],
)
def test_it_is_standard_attention(causal, options):
    """With a block for all or a sample of all; causal ones are longer, so that there is a past segment to read."""
    q, k, v = operands(0, LENGTH + 6 * causal)
    call = jax.jit(functools.partial(hyper_attention, key=KEY, causal=causal, **options))
    np.testing.assert_allclose(call(q, k, v), exactly(q, k, v, causal=causal), atol=FLOAT32)


def test_one_key_more_than_min_length_is_not():
    q, k, v = operands(0)
    length = OPTIONS["min_length"]
    for n in (length, length + 1):
        with jax.enable_x64(True):
            mask = np.broadcast_to(np.arange(LENGTH) < n, q.shape[:2])
            out = jax.device_get(compiled(False, True)(q, k, v, mask, q)[0])[:, :n]
            exact = exactly(*(x[:, :n] for x in (q, k, v)))
            assert (np.abs(out - exact).max() < FLOAT64) == (n == length)


def test_disjoint_keys_merge():
    q, k, v = (np.float32(x) for x in operands(1))

    @jax.jit
    def merged():
        parts = [attend(q, [Stream(k[:, cut], v[:, cut])])[:2] for cut in (slice(0, 11), slice(11, None))]
        nothing = jnp.zeros_like(parts[0][0]), jnp.full_like(parts[0][1], attn_jax.types.NEG_INF)
        return hyper._merge([*parts, nothing])

    expected = oracles.softmax_attention(q, [oracles.Stream(k, v)])[0]
    np.testing.assert_allclose(merged(), expected, atol=FLOAT32)


# How it estimates.


def test_the_normaliser_is_unbiased():
    """Mean of the sum of exponentials over hashes and samples, for every query, within five standard errors."""
    q, k, v = operands(2)
    draws = 2000

    @jax.jit
    @jax.vmap
    def total(key):
        sketch = sketch_of(key)
        positions = jnp.arange(LENGTH)
        return jnp.exp(
            hyper._estimate(sketch, *map(jnp.float32, (q, k, v)), positions[None], positions, scale=0.5)[1]
        )

    totals = np.float64(total(jax.random.split(KEY, draws)))
    exact = np.exp(0.5 * np.einsum("blhe,bmhe->blhm", q, k)).sum(-1)
    standard_error = totals.std(0) / np.sqrt(draws)
    assert (standard_error > 0).all() and (np.abs(totals.mean(0) - exact) < 5 * standard_error).all()


def test_the_error_falls_like_one_over_the_root_of_the_samples():
    length = 512
    q, k, v = 0.5 * normal(4, 3, 1, length, 1, 8).astype(np.float32)
    exact, keys = exactly(q, k, v), jax.random.split(KEY, 24)

    def error(samples):
        def one(key):
            return hyper_attention(q, k, v, key=key, block_size=4, num_samples=samples, min_length=4)

        return np.sqrt(np.mean(np.square(jax.jit(jax.vmap(one))(keys) - exact)))

    few, many = 8, 64
    # Without replacement the variance of a mean is (1 - m / n) / m.
    expected = np.sqrt((1 / many - 1 / length) / (1 / few - 1 / length))
    np.testing.assert_allclose(error(many) / error(few), expected, rtol=0.15)  # a ratio of means of quotients


@pytest.mark.parametrize("strict", [True, False])
def test_planted_neighbours_share_a_block(strict):
    """Of pairs at an angle of a quarter of a radian, most; of others, as many as chance has it."""
    length, width, block = 512, 32, 16
    k, noise = normal(5, 2, length, width)
    partner = np.random.default_rng(6).permutation(length)
    q = 3 * (k[partner] + 0.25 * noise)
    identity = np.eye(length, dtype=np.float32)[None, :, None]
    options = {"key": KEY, "block_size": block, "num_samples": 1, "min_length": 1, "strict": strict}
    call = jax.jit(functools.partial(hyper_attention, **options))
    read = np.asarray(call(*(np.float32(x[None, :, None]) for x in (q, k)), identity))[0, :, 0] > 0
    chance = block / length
    assert read[np.arange(length), partner].mean() > 10 * chance
    assert read[np.arange(length), np.roll(partner, 1)].mean() < 2 * chance


def test_neighbouring_buckets_differ_in_one_bit():
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 7, indexing="ij")).reshape(7, -1).T
    sketch = hyper.Sketch(jnp.eye(7)[None], KEY, 1, 1, 1, True)
    bucket = np.asarray(jax.jit(sketch.buckets)(signs[None, :, None]))[0, 0]
    np.testing.assert_array_equal(np.sort(bucket), np.arange(128))
    steps = np.diff(signs[np.argsort(bucket)], axis=0) != 0
    np.testing.assert_array_equal(steps.sum(1), 1)


def test_a_priority_belongs_to_its_position():
    long, short = jax.jit(lambda: [sketch_of().priorities(jnp.arange(n)[None]) for n in (LENGTH, 7)])()
    np.testing.assert_array_equal(long[:, :, :7], short)
    assert len(np.unique(long)) == LENGTH * HEADS


# The future.


@pytest.mark.parametrize("strict", [True, False])
def test_the_future_reaches_nothing_if_strict_and_something_if_not(strict):
    """To the bit, for each of the three inputs; the published way leaks through the ranks of later queries."""
    arrays, mask = operands(7), np.ones((BATCH, LENGTH), bool)

    def call(*x):
        with jax.enable_x64(True):
            return np.asarray(compiled(True, strict)(*x, mask, arrays[0])[0])

    now = 11
    before = call(*arrays)
    leaks = []
    for n in range(3):
        changed = [x.copy() for x in arrays]
        changed[n][:, now:] *= -3
        leaks.append(np.abs(call(*changed) - before)[:, :now].max())
    assert leaks[1:] == [0, 0]
    assert leaks[0] == 0 if strict else leaks[0] > 0.01


# The module.


def build(seed=0, **options):
    common = {"dim": HEADS * WIDTH, "num_heads": HEADS, "rngs": nnx.Rngs(seed)}
    return attn_jax.build("hyper", **common, **{**OPTIONS, **options})


call = nnx.jit(lambda module, x: module(x))
DECODED = {"causal": True, "num_hashes": 1}  # one hash, so that the order within buckets decides


def test_calls_repeat_and_the_key_is_no_parameter():
    x = np.float32(normal(8, 1, LENGTH, HEADS * WIDTH))
    module, other = build(**DECODED), build(**DECODED)
    other.sketch_key[...] = build(1).sketch_key[...]
    np.testing.assert_array_equal(call(module, x), call(module, x))
    assert np.abs(call(module, x) - call(other, x)).max() > 1e-3
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param))) == 4 * (HEADS * WIDTH) ** 2


def test_decoding_through_all_levels():
    """Token by token gives the causal output where past segments of two lengths are estimated."""
    module = build(**DECODED)
    x = np.float32(normal(9, 1, LENGTH, HEADS * WIDTH))
    cache, step = module.init_cache(1, LENGTH), nnx.jit(lambda module, x, cache: module.step(x, cache))
    outputs = []
    for t in range(LENGTH):
        y, cache = step(module, x[:, t : t + 1], cache)
        outputs.append(y)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), call(module, x), atol=FLOAT32)


def test_memory_is_far_below_a_square():
    length = 8192
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    options = {"key": KEY, "causal": True, "block_size": 256, "num_samples": 256, "min_length": length // 2}
    loss = lambda q, k, v: hyper_attention(q, k, v, **options).sum()  # noqa: E731
    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 4 * length**2


# Errors.


@pytest.mark.parametrize(
    "message,changes",
    [
        (r"`q` must have shape", {"q": np.ones((1, 5, 4))}),
        (r"`k` must have shape", {"k": np.ones((1, 5, 2, 3))}),
        (r"`v` must have shape", {"v": np.ones((1, 4, 2, 4))}),
        (r"`mask` must be boolean", {"mask": np.ones((1, 5))}),
        (r"`k` has 2 heads, which do not divide the 3 of `q`", {"q": np.ones((1, 5, 3, 4))}),
        (r"causal=True needs as many keys as queries", {"q": np.ones((1, 4, 2, 4)), "causal": True}),
        (r"strict=False needs as many keys as queries", {"q": np.ones((1, 4, 2, 4)), "strict": False}),
        (r"`block_size` must be a positive integer, got 0", {"block_size": 0}),
        (r"`num_samples` must be a positive integer, got 1.5", {"num_samples": 1.5}),
        (r"`min_length` must be an integer >= 0, got -1", {"min_length": -1}),
        (r"`num_hashes` must be a positive integer, got 0", {"num_hashes": 0}),
        (r"num_hashes=29 supports sequences of up to 2, got 5", {"num_hashes": 29}),
    ],
)
def test_errors_name_the_argument(message, changes):
    x = np.ones((1, 5, 2, 4))
    with pytest.raises(ValueError, match=f"^hyper_attention: {message}"):
        hyper_attention(**{"q": x, "k": x, "v": x, "key": KEY, **OPTIONS, **changes})


def test_module_errors():
    with pytest.raises(ValueError, match=r"^hyper: `block_size` must be a positive integer, got 0"):
        build(block_size=0)
    module = build(causal=True, strict=False)
    for call in (lambda: module.init_cache(1, 8), lambda: module.step(jnp.ones((1, 1, 8)), None)):
        with pytest.raises(ValueError, match=r"^hyper: decoding needs strict=True"):
            call()
