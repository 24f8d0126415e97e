"""Local-global attention: a window and a few keys for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.ops import local_attention, local_global_attention, standard_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# The same through projections of width 8, and for gradients.
MODULE = 1e-4

BATCH, LENGTH, GLOBALS, HEADS, WIDTH = 2, 13, 3, 2, 4
DIM = HEADS * WIDTH

either_way = pytest.mark.parametrize("causal", [False, True])


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, number=GLOBALS):
    """`q, k, v, k_global, v_global`."""
    normal = np.random.default_rng(seed).normal
    lengths = (LENGTH, LENGTH, LENGTH, number, number)
    return [normal(size=(BATCH, n, HEADS, WIDTH)).astype(np.float32) for n in lengths]


def definition(q, k, v, k_global, v_global, *, window, mask=None, causal=False):
    left, right = (window, window) if isinstance(window, int) else window
    i, j = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
    band = np.where((i - j <= left) & (j - i <= (0 if causal else right)), 0, -np.inf)
    streams = [
        oracles.Stream(k, v, mask, bias=band),
        oracles.Stream(k_global, v_global, ordered=False),
    ]
    return oracles.softmax_attention(q, streams, scale=WIDTH**-0.5)[0]


@functools.cache
def compiled(window, causal, implementation="xla"):
    options = {"window": window, "causal": causal, "implementation": implementation}
    return jax.jit(functools.partial(local_global_attention, **options))


@pytest.mark.parametrize("implementation", ["xla", "dense"])
@pytest.mark.parametrize("window,causal", [(2, False), (3, True), ((4, 1), False)])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**16))
def test_equals_the_banded_definition(implementation, window, causal, seed):
    """Every query, the first causal one too, reads all globals and its window, under one softmax."""
    arrays, mask = operands(seed), np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.6
    expected = definition(*arrays, window=window, mask=mask, causal=causal)
    close(compiled(window, causal, implementation)(*arrays, mask=mask), expected)


@either_way
def test_gradients_are_those_of_the_definition(causal):
    arrays, mask = operands(0), np.random.default_rng(0).random((BATCH, LENGTH)) < 0.6
    g, *along = (np.random.default_rng(1).normal(size=a.shape) for a in (arrays[0], *arrays))
    run = compiled(2, causal)
    gradients = jax.jit(jax.grad(lambda arrays: jnp.sum(g * run(*arrays, mask=mask))))(arrays)
    for n, u in enumerate(along):

        def moved(x, n=n):
            changed = [*map(np.float64, arrays[:n]), x, *map(np.float64, arrays[n + 1 :])]
            return (g * definition(*changed, window=2, mask=mask, causal=causal)).sum()

        expected = oracles.derivative(moved, np.float64(arrays[n]), u)
        np.testing.assert_allclose((gradients[n] * u).sum(), expected, rtol=MODULE, atol=MODULE)


@either_way
def test_no_globals_and_a_wide_window_are_standard_attention(causal):
    q, k, v, *none = operands(0, 0)
    expected = jax.jit(functools.partial(standard_attention, causal=causal))(q, k, v)
    close(compiled(2 * LENGTH, causal)(q, k, v, *none), expected)


@either_way
def test_no_globals_are_local_attention(causal):
    q, k, v, *none = operands(0, 0)
    expected = jax.jit(functools.partial(local_attention, window=2, causal=causal))(q, k, v)
    close(compiled(2, causal)(q, k, v, *none), expected)


def test_the_order_of_globals_does_not_matter_and_examples_may_share_them():
    (*arrays, k_global, v_global), mask = operands(0), np.ones((BATCH, LENGTH), bool)
    run = functools.partial(compiled(3, True), *arrays, mask=mask)
    expected = run(k_global[:1].repeat(BATCH, 0), v_global[:1].repeat(BATCH, 0))
    close(run(k_global[:1, ::-1], v_global[:1, ::-1]), expected)


def test_work_and_memory_grow_with_the_window():
    """The tiled path's temporary memory, forward and backward, stays linear in the length."""

    def used(length):
        shapes = [(1, n, 1, 8) for n in (length, length, length, 4, 4)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = jax.grad(lambda *arrays: local_global_attention(*arrays, window=8).sum(), range(5))
        return jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert used(8192) < 1.2 * 2 * used(4096)


def test_what_does_not_fit_raises():
    q, k, v, k_global, v_global = operands(0)
    for arrays, words in (
        ((k_global[..., :3], v_global), r"`k_global` must have shape \(B or 1, g, K, E\)"),
        ((k_global, v_global[0]), "`v_global` must have shape"),
        ((np.concatenate([k_global] * 2), np.concatenate([v_global] * 2)), "must have shape"),
    ):
        with pytest.raises(ValueError, match=f"^local_global_attention: .*{words}"):
            local_global_attention(q, k, v, *arrays, window=2)
    with pytest.raises(ValueError, match=r"^local_global_attention: `window`"):
        local_global_attention(q, k, v, k_global, v_global, window=-1)


# The module.


def build(**options):
    options = {"window": 2, "num_globals": GLOBALS, "implementation": "dense"} | options
    return attn_jax.build("local_global", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def tokens(length=LENGTH):
    return np.random.default_rng(1).normal(size=(BATCH, length, DIM)).astype(np.float32)


@nnx.jit
def call(module, x, mask=None):
    y = module(x, mask=mask)
    return y, module.attention_weights(x, mask=mask), attn_jax.pop_aux(module)[1]


def projections(module, x):
    """`q, k, v` and the function from `(B, L, H, E)` to the output, float64."""

    def kernel(name):
        return np.float64(getattr(module, name).kernel[...])

    heads = [(x @ kernel(name)).reshape(*x.shape[:2], HEADS, WIDTH) for name in ("query", "key", "value")]
    return *heads, lambda o: o.reshape(*o.shape[:2], DIM) @ kernel("out")


@either_way
def test_the_latents_read_everything_and_are_read(causal):
    """Causal ones are read as they are."""
    module, x = build(causal=causal), tokens()
    mask = np.arange(LENGTH) < np.array([[LENGTH], [8]])
    q, k, v, out = projections(module, np.where(mask[..., None], x, 0))
    latents = np.broadcast_to(np.float64(module.latents[...]), (BATCH, GLOBALS, DIM))
    survey, _, _, _ = projections(module, latents)
    if not causal:
        read, _, _ = oracles.softmax_attention(survey, [oracles.Stream(k, v, mask)], scale=WIDTH**-0.5)
        latents = latents + out(read)
    _, k_global, v_global, _ = projections(module, latents)
    expected = out(definition(q, k, v, k_global, v_global, window=2, mask=mask, causal=causal))
    close(call(module, x, mask)[0], np.where(mask[..., None], expected, 0), MODULE)


def reach(module):
    """Which token moves which output, found with the program that other tests need as well."""
    step = np.eye(LENGTH, dtype=np.float32)[:, None, :, None]
    before, *after = (np.asarray(call(module, tokens() + s)[0]) for s in (0 * step[0], *step))
    return np.stack([(y != before).any((0, 2)) for y in after], axis=1)


def test_information_crosses_any_distance_through_the_latents():
    """In one layer; causal ones have not read the sequence, and there are as many as configured."""
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    window = np.abs(distance) <= 2
    assert reach(build()).all()
    np.testing.assert_array_equal(reach(build(num_globals=0)), window)
    np.testing.assert_array_equal(reach(build(causal=True)), window & (distance >= 0))
    first = build(globals="first")
    np.testing.assert_array_equal(reach(first), window | (np.arange(LENGTH) < GLOBALS))


def literal(q, k, v, mask, causal, combine):
    """The first tokens as globals: one softmax over the union, or the mean of two that have a key."""
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    window = (np.abs(i - j) <= 2) & (not causal or j <= i)
    first = np.broadcast_to((j < GLOBALS), window.shape) & (not causal or j <= i)

    def over(admissible):
        bias = np.where(admissible, 0, -np.inf)
        out, lse, _ = oracles.softmax_attention(q, [oracles.Stream(k, v, mask, bias=bias)], scale=WIDTH**-0.5)
        return out, (lse > oracles.NOTHING)[..., None]

    if combine == "joint":
        return over(window | first)[0]
    parts = [over(window), over(first)]
    return sum(out for out, _ in parts) / np.maximum(sum(found * 1 for _, found in parts), 1)


@either_way
@pytest.mark.parametrize("combine", ["joint", "average"])
def test_first_tokens_as_globals(causal, combine):
    """With "average" the source's literal version, but for masks; jointly each token counts once."""
    module, x = build(causal=causal, combine=combine, globals="first"), tokens()
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, [0, 5, 6]] = mask[1, :GLOBALS] = mask[1, 6:11] = False
    q, k, v, out = projections(module, np.where(mask[..., None], x, 0))
    expected = out(literal(q, k, v, mask, causal, combine))
    close(call(module, x, mask)[0], np.where(mask[..., None], expected, 0), MODULE)


def test_an_average_of_latents_and_window_is_half_of_each():
    averaged, alone, x = build(combine="average", causal=True), build(num_globals=0, causal=True), tokens()
    y, _, metrics = call(averaged, x)
    q, _, _, out = projections(averaged, np.float64(x))
    _, k_global, v_global, _ = projections(averaged, np.float64(averaged.latents[...])[None].repeat(BATCH, 0))
    beyond, _, _ = oracles.softmax_attention(q, [oracles.Stream(k_global, v_global, ordered=False)], scale=0.5)
    close(y, (call(alone, x)[0] + out(beyond)) / 2, MODULE)
    close(metrics["global_share"], 0.5)


OPTIONS = [
    {},
    {"combine": "average"},
    {"globals": "first"},
    {"globals": "first", "combine": "average"},
    {"num_globals": 0},
    {"num_globals": 2 * LENGTH, "globals": "first"},
]


@either_way
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_sum_to_one_over_what_is_read(options, causal):
    """Exactly what reaches an output has a weight; without latents the output is their mean of the values."""
    module, x = build(**options, causal=causal), tokens()
    y, weights, _ = call(module, x)
    close(weights.sum(-1), 1)
    np.testing.assert_array_equal(np.asarray(weights)[0].max(0) > 0, reach(module))
    if module.latents is None:
        _, _, v, out = projections(module, x)
        close(y, out(np.einsum("bhlm,bmhe->blhe", weights, v)), MODULE)


def test_the_share_of_the_globals_is_reported():
    """1 for keys that win every competition; padding does not count."""
    module, x = build(), tokens()
    mask = np.arange(LENGTH) < np.array([[5], [8]])
    _, _, metrics = call(module, x, mask)
    assert metrics.keys() == {"global_share"} and 0 < metrics["global_share"] < 1
    each = [call(module, x[b : b + 1, :n])[2]["global_share"] * n for b, n in enumerate((5, 8))]
    close(metrics["global_share"], sum(each) / 13)
    assert not call(build(num_globals=0), x)[2]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_decodes(options):
    module, x = build(**options, causal=True), tokens()
    expected = call(module, x)[0]
    cache, step = module.init_cache(BATCH, LENGTH), jax.jit(module.step)
    assert cache.keys.shape[1] == (LENGTH if options.get("globals") == "first" else 3)
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
        close(y, expected[:, t : t + 1], MODULE)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"combine": "sum"}, "`combine` must be one of joint, average, got 'sum'"),
        ({"globals": "last"}, "`globals` must be one of latent, first, got 'last'"),
        ({"num_globals": -1}, "`num_globals` must be an integer >= 0, got -1"),
        ({"window": -1}, "`window` must be an integer >= 0"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^local_global: {message}"):
        build(**options)
