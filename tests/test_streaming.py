"""The streaming softmax engine against its definition, in float64, and the laws that mechanisms rely on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attn_jax.engine.streaming import Attended, Stream, attend
from tests import oracles

BATCH, HEADS, WIDTH, VALUE_WIDTH = 2, 4, 5, 3

# float64 sums of a few dozen terms and exponentials of logits up to some tens.
FLOAT64 = 1e-11

both = pytest.mark.parametrize("implementation", ["dense", "xla"])


def curved(dot, distance, query, key):
    """A score that is linear in nothing, with two features on each side; also valid NumPy."""
    return dot * query[0] / (1 + query[1] ** 2) + distance * query[1] * key[0] / 7 - dot**2 * key[1] / 9


class Case(NamedTuple):
    """What is static; masks, offsets and all numbers vary freely."""

    length: int
    keys: tuple[int, ...]
    key_heads: int = HEADS
    masked: bool = True
    biases: tuple[tuple[int, int] | None, ...] = ()
    score: Any = None
    scale: float | None = None
    causal: bool = False
    window: Any = None
    ordered: tuple[bool, ...] = (True, True, True)
    spanned: bool = False  # whether the first stream has spans, of all its keys unless a test says otherwise
    tiles: tuple[tuple[int, int], tuple[int, int]] = ((4, 3), (3, 5))


CASES = {
    "one token": Case(1, (1,), scale=0.7),
    "no keys": Case(3, (0,), masked=False),
    "one tile": Case(5, (7,), masked=False, tiles=((256, 512), (256, 256))),
    "causal, ragged tiles, grouped heads": Case(13, (11,), key_heads=2, causal=True, scale=2.0),
    "causal window, one key head": Case(17, (13,), key_heads=1, causal=True, window=3, tiles=((5, 2), (2, 4))),
    "window to the left": Case(13, (17,), masked=False, window=(4, 0), tiles=((2, 8), (8, 2))),
    "three streams, biases": Case(7, (11, 0, 3), biases=((BATCH, HEADS), (1, 1), (BATCH, 1)), spanned=True),
    "two streams, curved score, causal": Case(11, (7, 13), score=curved, causal=True, scale=0.6),
    "a causal window and latents": Case(17, (17, 5), score=curved, causal=True, window=4, ordered=(True, False)),
    "everything in a window": Case(13, (17,), 2, score=curved, window=(2, 5), biases=((1, HEADS),)),
}
each_case = pytest.mark.parametrize("name", CASES)


def numbers(case: Case, seed: int) -> Any:
    """`(q, query features, (keys, values, features, bias) of each stream)`, float64."""
    normal = np.random.default_rng(seed).normal
    features = 2 if case.score else 0
    q = normal(size=(BATCH, case.length, HEADS, WIDTH))
    query_features = [normal(size=(BATCH, case.length, HEADS)) for _ in range(features)]
    streams = []
    for n, keys in enumerate(case.keys):
        shape = (BATCH, keys, case.key_heads)
        bias = case.biases[n] if case.biases else None
        streams.append(
            (
                normal(size=(*shape, WIDTH)),
                normal(size=(*shape, VALUE_WIDTH)),
                [normal(size=(BATCH, keys, HEADS)) for _ in range(features)],
                None if bias is None else normal(size=(*bias, case.length, keys)),
            )
        )
    return q, query_features, streams


def definition(case: Case, offset: int, masks: Any, arrays: Any) -> Any:
    q, query_features, streams = arrays
    left, right = (case.window,) * 2 if isinstance(case.window, int) else case.window or (np.inf, np.inf)
    return oracles.softmax_attention(
        q,
        [
            oracles.Stream(k, v, m, f, 0 if b is None else b, ordered)
            for (k, v, f, b), m, ordered in zip(streams, masks, case.ordered)
        ],
        query_features=query_features,
        score=case.score,
        causal=case.causal,
        left=left,
        right=right,
        offset=offset,
        scale=1.0 if case.scale is None else case.scale,
    )


@functools.cache
def compiled(case: Case, implementation: str) -> Any:
    """`(offset, masks, arrays, cotangents, span of the first stream) -> (Attended, gradients)`."""

    def run(offset, masks, arrays, cotangents, span):
        spans = span, *[None] * (len(masks) - 1)

        def call(arrays):
            q, query_features, streams = arrays
            return attend(
                q,
                [
                    Stream(k, v, m, tuple(f), b, *rest)
                    for (k, v, f, b), m, *rest in zip(streams, masks, case.ordered, spans)
                ],
                query_features=tuple(query_features),
                score=case.score,
                causal=case.causal,
                window=case.window,
                query_offset=offset,
                scale=case.scale,
                implementation=implementation,
                forward_tile=case.tiles[0],
                backward_tile=case.tiles[1],
            )

        result, vjp = jax.vjp(call, arrays)
        return result, vjp(cotangents)[0]

    return jax.jit(run)


def check(case: Case, implementation: str, draw: Any, offset: int, masks: Any, arrays: Any) -> None:
    """Values, and gradients along random directions, are those of the definition."""
    cotangents = cotangents_of(case, draw)
    result, gradients = run(case, implementation, offset, masks, arrays, cotangents)
    assert_close(tuple(result), definition(case, offset, masks, arrays), FLOAT64)
    check_gradients(case, draw, offset, masks, arrays, cotangents, gradients)


def check_gradients(
    case: Case, draw: Any, offset: int, masks: Any, arrays: Any, cotangents: Any, gradients: Any
) -> None:
    leaves, tree = jax.tree.flatten(arrays)
    for n, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients), strict=True)):

        def loss(x, n=n):
            out, lse, _ = definition(case, offset, masks, tree.unflatten([*leaves[:n], x, *leaves[n + 1 :]]))
            return (cotangents.out * out).sum() + (cotangents.lse * lse).sum()  # stream_lse has no derivative

        along = draw.normal(size=leaf.shape)
        wanted = oracles.derivative(loss, leaf, along)
        np.testing.assert_allclose((gradient * along).sum(), wanted, rtol=FLOAT64, atol=FLOAT64)


def cotangents_of(case: Case, draw: Any) -> Attended:
    row = (BATCH, case.length, HEADS)
    shapes = (*row, VALUE_WIDTH), row, (len(case.keys), *row)
    return Attended(*(draw.normal(size=shape) for shape in shapes))


def run(case: Case, implementation: str, *args: Any, span: Any = None) -> Any:
    if case.spanned and span is None:
        first = np.zeros((BATCH, case.length, HEADS), np.int32)
        span = first, first + np.int32(case.keys[0])
    with jax.enable_x64(True):
        return jax.device_get(compiled(case, implementation)(*args, span))


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit for bit, whole trees."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


@both
@each_case
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), offset=st.integers(-9, 30), real=st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_values_and_gradients_are_those_of_the_definition(name, implementation, seed, offset, real):
    case, draw = CASES[name], np.random.default_rng(seed)
    masks = [draw.random((BATCH, keys)) < real if case.masked else None for keys in case.keys]
    check(case, implementation, draw, offset, masks, numbers(case, seed))


@both
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.3, 0.9, 1.0]))
def test_a_bias_of_minus_infinity_is_a_mask(implementation, seed, share):
    case, draw = CASES["three streams, biases"], np.random.default_rng(seed)
    q, features, streams = numbers(case, seed)
    for *_, bias in streams:
        if bias is not None:
            bias[draw.random(bias.shape) < share] = -np.inf
    masks = [draw.random((BATCH, keys)) < 0.8 for keys in case.keys]
    check(case, implementation, draw, 0, masks, (q, features, streams))


@both
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_a_span_is_a_mask(implementation, seed):
    """Whatever the spans: empty, in any order, beyond the keys; next to streams without."""
    case, draw = CASES["three streams, biases"], np.random.default_rng(seed)
    keys = case.keys[0]
    first, end = draw.integers(-3, keys + 3, size=(2, BATCH, case.length, HEADS)).astype(np.int32)
    outside = (np.arange(keys) < first[..., None]) | (np.arange(keys) >= end[..., None])
    arrays, cotangents = numbers(case, seed), cotangents_of(case, draw)
    masks = [draw.random((BATCH, n)) < 0.8 for n in case.keys]
    result, gradients = run(case, implementation, 0, masks, arrays, cotangents, span=(first, end))

    q, features, [(k, v, _, bias), *others] = arrays
    masked = q, features, [(k, v, [], np.where(outside.transpose(0, 2, 1, 3), -np.inf, bias)), *others]
    assert_close(tuple(result), definition(case, 0, masks, masked), FLOAT64)
    check_gradients(case, draw, 0, masks, masked, cotangents, gradients)


@both
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_masked_keys_do_not_exist(implementation, seed, bad):
    """Whatever they hold, values and gradients are those of zeros there, to the bit, and 0 for themselves."""
    case, draw = CASES["everything in a window"], np.random.default_rng(seed)
    mask = draw.random((BATCH, case.keys[0])) < 0.6
    cotangents = cotangents_of(case, draw)

    def masked_are(value):
        q, features, [(k, v, key_features, bias)] = numbers(case, seed)
        for x in (k, v, *key_features):
            x[~mask] = value
        bias[..., ~mask.any(0)] = value
        return run(case, implementation, 2, [mask], (q, features, [(k, v, key_features, bias)]), cotangents)

    result, gradients = masked_are(bad)
    assert_equal((result, gradients), masked_are(0.0))
    _, _, [(*per_key, _)] = gradients
    assert all((x[~mask] == 0).all() for x in jax.tree.leaves(per_key))


@both
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), bad=st.sampled_from([("q", np.nan), ("q", np.inf), ("feature", np.nan)]))
def test_a_bad_query_stays_in_its_row(implementation, seed, bad):
    """Everything else, gradients included, is as if nobody had asked for the row."""
    case, draw = CASES["everything in a window"], np.random.default_rng(seed)
    row = draw.integers(BATCH), draw.integers(case.length), draw.integers(HEADS)
    others = np.ones((BATCH, case.length, HEADS), bool)
    others[row] = False
    cotangents = cotangents_of(case, draw)
    not_asked = cotangents._replace(out=cotangents.out * others[..., None], lse=cotangents.lse * others)

    arrays, masks = numbers(case, seed), [np.ones((BATCH, case.keys[0]), bool)]
    good, wanted = run(case, implementation, 2, masks, arrays, not_asked)
    where, value = bad
    arrays[0][(*row, 1)], arrays[1][1][row] = (value, 1.0) if where == "q" else (1.0, value)
    result, gradients = run(case, implementation, 2, masks, arrays, cotangents)

    assert np.isnan(result.out[row]).all()
    assert np.isnan(result.lse[row])
    np.testing.assert_array_equal(result.out[others], good.out[others])
    np.testing.assert_array_equal(result.lse[others], good.lse[others])
    np.testing.assert_array_equal(result.stream_lse[:, others], good.stream_lse[:, others])
    assert_equal(gradients, wanted)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_key_is_seen(implementation, bad):
    """NaN where real tokens are must not be hidden: every row that sees the key is NaN, no other is."""
    case = CASES["window to the left"]
    arrays = numbers(case, 0)
    key, (left, right) = 6, case.window
    arrays[2][0][0][:, key] = bad
    result, _ = run(case, implementation, 0, [None], arrays, cotangents_of(case, np.random.default_rng(0)))
    sees = (np.arange(case.length) >= key - right) & (np.arange(case.length) <= key + left)
    np.testing.assert_array_equal(np.isnan(result.out).all((0, 2, 3)), sees)
    np.testing.assert_array_equal(np.isnan(result.out).any((0, 2, 3)), sees)


@both
def test_logits_of_any_size(implementation):
    """Logits of +-1e6 overflow nothing: the softmax is the value of the largest."""
    case = CASES["one tile"]
    q, features, [(k, v, _, _)] = numbers(case, 0)
    q = q * 1e6
    cotangents = cotangents_of(case, np.random.default_rng(0))
    result, gradients = run(case, implementation, 0, [None], (q, features, [(k, v, [], None)]), cotangents)
    z = np.einsum("blhe,bmhe->blhm", q, k)
    best = np.take_along_axis(v.transpose(0, 2, 1, 3)[:, None], z.argmax(-1)[..., None, None], axis=3)[..., 0, :]
    np.testing.assert_allclose(result.out, best, rtol=FLOAT64)
    np.testing.assert_allclose(result.lse, z.max(-1), rtol=FLOAT64)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_split_keys_merge_by_their_lse():
    """Two calls on parts of the keys, merged outside, are one call, in values and gradients."""
    case, draw = CASES["one tile"]._replace(causal=True), np.random.default_rng(0)
    cut, offset, cotangents = 3, 4, cotangents_of(case, draw)
    arrays = numbers(case, 0)

    def merged(arrays):
        q, _, [(k, v, _, _)] = arrays
        first = attend(q, [Stream(k[:, :cut], v[:, :cut])], causal=True, query_offset=offset)
        second = attend(q, [Stream(k[:, cut:], v[:, cut:])], causal=True, query_offset=offset - cut)
        lse = jnp.logaddexp(first.lse, second.lse)
        return sum(jnp.exp(part.lse - lse)[..., None] * part.out for part in (first, second)), lse

    @jax.jit
    def value_and_vjp(arrays):
        value, vjp = jax.vjp(merged, arrays)
        return value, vjp((cotangents.out, cotangents.lse))[0]

    with jax.enable_x64(True):
        value, gradients = jax.device_get(value_and_vjp(arrays))
    assert_close(value, definition(case, offset, [None], arrays)[:2], FLOAT64)
    check_gradients(case, draw, offset, [None], arrays, cotangents, gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_a_reach_beyond_rounding_changes_nothing(causal):
    """Tiles left out because their weights vanish: values and gradients stay, for a reach of every head's own.

    They are compared with those of a reach that leaves nothing out.
    """
    draw = np.random.default_rng(0)
    length, rate = 41, np.array([40.0, 9.0, 3.0, 0.0])  # in nats for each position
    q, k = (draw.normal(size=(BATCH, length, HEADS, WIDTH)) for _ in range(2))
    v = draw.normal(size=(BATCH, length, HEADS, VALUE_WIDTH))
    cotangents = draw.normal(size=v.shape), draw.normal(size=v.shape[:3])
    spread = 2 * np.abs(np.einsum("blhe,bmhe->blhm", q, k)).max()
    # exp(-80) is far below the rounding of float64.
    reach = np.broadcast_to(np.ceil((80 + spread) / np.maximum(rate, 0.1)).astype(np.int32), (BATCH, HEADS))

    def run(reach, q, k, v, rate):
        features = jnp.broadcast_to(rate, q.shape[:3])
        options = {"score": decaying, "query_features": (features,), "causal": causal, "reach": reach}
        tiles = {"forward_tile": (5, 4), "backward_tile": (3, 7)}
        return attend(q, [Stream(k, v)], **options, **tiles)[:2]

    @jax.jit
    def value_and_vjp(reach):
        value, vjp = jax.vjp(functools.partial(run, reach), q, k, v, rate)
        return value, vjp(cotangents)

    with jax.enable_x64(True):
        assert_close(value_and_vjp(reach), value_and_vjp(np.full_like(reach, length)), FLOAT64)


def decaying(dot, distance, query, key):
    return dot - jnp.abs(distance) * query[0]


# Cost.


@pytest.mark.parametrize(
    "causal,window,reach",
    [(False, None, None), (True, None, None), (False, (5, 2), None), (True, 0, None), (False, None, 6)],
)
def test_no_tile_is_computed_in_vain(causal, window, reach):
    """Each tile of queries reads just enough tiles of keys, and the other way round in the backward pass."""
    length, forward, backward = 37, (8, 4), (4, 6)
    count = 0

    def counting(dot, distance, query, key):
        def add():
            nonlocal count
            count += 1

        jax.debug.callback(add)
        return dot

    def run(x):
        return attend(
            x,
            [Stream(x, x)],
            score=counting,
            causal=causal,
            window=window,
            reach=None if reach is None else jnp.full((1, 1), reach),
            implementation="xla",
            forward_tile=forward,
            backward_tile=backward,
        ).out.sum()

    distance = np.arange(length)[:, None] - np.arange(length)
    left, right = {None: (length, length), 0: (0, 0)}.get(window, window)
    seen = (distance <= left) & (-distance <= (0 if causal else right))
    if reach is not None:
        seen = np.abs(distance) <= reach

    def tiles(positions, size):
        # Within a reach tiles stay where they are; in a band they start at its edge.
        return (
            len(np.unique(np.flatnonzero(positions) // size)) if reach is not None else -(-positions.sum() // size)
        )

    rows, columns = np.arange(0, length, forward[0]), np.arange(0, length, backward[1])
    least = [
        sum(tiles(seen[i : i + forward[0]].any(0), forward[1]) for i in rows),
        sum(tiles(seen[:, j : j + backward[1]].any(1), backward[0]) for j in columns),
    ]

    jax.block_until_ready(jax.jit(jax.grad(run))(jnp.ones((1, length, 1, 2))))
    jax.effects_barrier()
    assert count == sum(least)


def test_no_tile_outside_of_the_spans_is_computed():
    """Queries 0..31 in groups that read one aligned block of keys each, of which two groups share a tile."""
    forward, backward, block = (8, 4), (4, 4), 4
    blocks = np.repeat([0, 1, 1, 3, 4, 6, 6, 6], 4)
    count = 0

    def counting(dot, distance, query, key):
        def add():
            nonlocal count
            count += 1

        jax.debug.callback(add)
        return dot

    def run(x):
        first = jnp.int32(block * blocks)[None, :, None]
        stream = Stream(x, x, span=(first, first + block))
        return attend(x, [stream], score=counting, forward_tile=forward, backward_tile=backward).out.sum()

    jax.block_until_ready(jax.jit(jax.grad(run))(jnp.ones((1, 32, 1, 2))))
    jax.effects_barrier()
    # Blocks from the first to the last of a tile of queries; tiles of queries that read a block.
    assert count == (2 + 3 + 3 + 1) + (1 + 2 + 1 + 1 + 3)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
def test_memory_is_linear_in_the_length(options):
    """Temporary memory of the backward pass: at most doubles with the length, and is far below one L x L array."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        loss = lambda q, k, v: attend(q, [Stream(k, v)], implementation="xla", **options).out.sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    length = 8192
    used = temporary(length)
    assert used <= 2 * temporary(length // 2)
    assert used < 0.02 * 4 * length**2


# Transformations, types and meshes.

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5


def value_and_gradients(q, k, v, mask, offset):
    def loss(q, k, v):
        result = attend(q, [Stream(k, v, mask)], causal=True, query_offset=offset)
        return jnp.sum(jnp.sin(result.out)) + jnp.sum(jnp.where(mask.any(), result.lse, 0))

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


@functools.cache
def one_by_one():
    """Arguments of three examples, and values and gradients of each alone."""
    normal = np.random.default_rng(0).normal
    q, k, v = (normal(size=(3, 1, n, 2, 3)).astype(np.float32) for n in (5, 7, 7))
    args = q, k, v, normal(size=(3, 1, 7)) > -1, np.arange(3)
    one = jax.jit(value_and_gradients)
    return args, jax.tree.map(lambda *x: np.stack(x), *(one(*(x[n] for x in args)) for n in range(3)))


@pytest.mark.parametrize(
    "transformed",
    [
        jax.vmap(jax.checkpoint(value_and_gradients)),
        lambda *args: jax.lax.scan(lambda _, x: (None, jax.checkpoint(value_and_gradients)(*x)), None, args)[1],
    ],
    ids=["vmap", "scan"],
)
def test_transformed_gradients_are_the_same(transformed):
    """Offsets differ between the examples, so under vmap the bounds of the loops over tiles do.

    Both of a checkpoint, which leaves their programs as they would be without.
    """
    args, expected = one_by_one()
    assert_close(jax.jit(transformed)(*args), expected, FLOAT32)


@functools.partial(jax.jit, static_argnames="implementation")
def with_gradients(q, k, v, mask, cotangent, implementation):
    """The output, the gradients and lse."""

    def call(q, k, v):
        result = attend(q, [Stream(k, v, mask)], scale=0.25, implementation=implementation)
        return result.out, result.lse

    out, vjp, lse = jax.vjp(call, q, k, v, has_aux=True)
    return out, *vjp(cotangent), lse


@pytest.mark.parametrize(
    "implementation,dtype", [("dense", jnp.bfloat16), ("xla", jnp.bfloat16), ("xla", jnp.float16)]
)
def test_half_precision_only_rounds_at_the_edges(implementation, dtype):
    """Sums, exponentials and lse are float32: lse is that of float32 operands, the rest rounds when it leaves."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, n, 2, 16)), dtype) for n in (33, 65, 65))
    mask = draw.random((1, 65)) > 0.1
    cotangent = jnp.asarray(draw.normal(size=q.shape), dtype)

    *half, lse = with_gradients(q, k, v, mask, cotangent, implementation)
    # In float32 one implementation serves for all, and "dense" compiles faster.
    *full, expected_lse = with_gradients(*map(jnp.float32, (q, k, v)), mask, jnp.float32(cotangent), "dense")
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected_lse, rtol=FLOAT32)
    for actual, wanted in zip(half, full):
        assert actual.dtype == dtype
        # Half a unit in the last place where it leaves, and as much for what went in (out or cotangents).
        np.testing.assert_allclose(
            np.float32(actual), wanted, rtol=0, atol=jnp.finfo(dtype).eps * np.abs(wanted).max()
        )


def test_operands_of_different_types():
    """The result is in the common type of queries and values, and every gradient in that of its array."""

    def run(q, k, v, bias):
        return attend(q, [Stream(k, v, bias=bias)], implementation="xla").out.sum()

    with jax.enable_x64(True):
        q, k, v = jnp.ones((1, 2, 2, 3), "f4"), jnp.ones((1, 5, 2, 3), jnp.bfloat16), jnp.ones((1, 5, 2, 3), "f2")
        arrays = q, k, v, jnp.zeros((1, 2, 2, 5), "f8")
        value, gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3)))(*arrays)
    assert value.dtype == np.float32
    assert [x.dtype for x in gradients] == [x.dtype for x in arrays]


def test_a_mesh_changes_nothing_and_gathers_nothing():
    """Split over examples and heads, values and gradients are those of one device, without an all-gather."""
    case = Case(7, (11,), biases=((1, HEADS),), causal=True, score=curved)
    (q, query_features, [(k, v, features, bias)]), mask = numbers(case, 0), np.arange(22).reshape(2, 11) % 3 > 0
    arrays, bias = jax.tree.map(np.float32, ((q, query_features, k, v, features), bias))

    def run(arrays, bias, mask, implementation="xla"):
        def loss(arrays, bias):
            q, query_features, k, v, features = arrays
            stream = Stream(k, v, mask, tuple(features), bias)
            options = {"score": curved, "causal": True, "implementation": implementation}
            result = attend(q, [stream], query_features=tuple(query_features), **options)
            return jnp.sin(result.out).sum() + jnp.cos(result.lse).sum()

        return jax.value_and_grad(loss, (0, 1))(arrays, bias)

    expected = jax.jit(functools.partial(run, implementation="dense"))(arrays, bias, mask)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    token, replicated = NamedSharding(mesh, P("data", None, "tensor")), NamedSharding(mesh, P(None, "tensor"))
    shardings = (token, replicated, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("batch", "data"), ("heads", "tensor")]):
        args = jax.device_put((arrays, bias, mask), shardings)
        compiled = jax.jit(run).lower(*args).compile()
        actual = compiled(*args)
    assert_close(actual, expected, FLOAT32)
    assert "all-gather" not in compiled.as_text()


# Errors.


@pytest.mark.parametrize(
    "message,changes",
    [
        (r"`q` must have shape \(B, L, H, E\)", {"q": np.ones((5, 4, 3))}),
        (r"`k` must have shape .* got shape \(2, 7, 4, 2\)", {"keys": np.ones((2, 7, 4, 2))}),
        ("`k` has 3 heads, which do not divide the 4", {"keys": np.ones((2, 7, 3, 3))}),
        ("`v` must have shape", {"values": np.ones((2, 6, 4, 3))}),
        ("`v` must be a floating-point array, got dtype int64", {"values": np.ones((2, 7, 4, 3), int)}),
        (r"`mask` must have shape \(B, M\)", {"mask": np.ones((2, 6), bool)}),
        ("`mask` must be boolean", {"mask": np.ones((2, 7))}),
        ("`bias` must be a floating-point array", {"bias": np.ones((1, 1, 5, 7), int)}),
        (r"`key feature` must have shape \(B, M, H\)", {"features": (np.ones((2, 7)),)}),
        (r"`span` must have shape \(B, L, H\)", {"span": (np.ones((2, 5, 4), int), np.ones((2, 7, 4), int))}),
        (r"`query feature` must have shape \(B, L, H\)", {"query_features": (np.ones((2, 7, 4)),)}),
        ("`window` must be an integer >= 0", {"window": -1}),
        ("`window` must be an integer >= 0", {"window": 1.5}),
        ("`window` must be an integer >= 0", {"window": (1, 2, 3)}),
        ("`implementation` must be None, .* got 'fast'", {"implementation": "fast"}),
    ],
)
def test_errors_name_the_argument(message, changes):
    fields = {f: x for f, x in changes.items() if f in Stream._fields}
    arguments = {"q": np.ones((2, 5, 4, 3))} | {name: x for name, x in changes.items() if name not in fields}
    stream = Stream(np.ones((2, 7, 4, 3)), np.ones((2, 7, 4, 3)))._replace(**fields)
    with pytest.raises(ValueError, match=f"^thing: {message}"):
        attend(streams=[stream], operation="thing", **arguments)


def test_errors_name_the_stream():
    good, bad = np.ones((2, 7, 4, 3)), np.ones((2, 6, 4, 3))
    with pytest.raises(ValueError, match="`v2` must have shape"):
        attend(good, [Stream(good, good), Stream(good, bad)])
