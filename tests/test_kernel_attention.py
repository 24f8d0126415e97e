"""The fused attention kernels against dense attention in float64; see tests/kernels.py for where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine import dispatch
from attn_jax.engine.gravity import SCALE, gravity_features, plummer
from attn_jax.engine.plan import Plan, Stream
from attn_jax.engine.streaming import attend
from pallas_kernels import attention, instructions
from pallas_kernels.hardware import INTERPRETER, Hardware
from tests.kernels import IMPLEMENTATION, ON_GPU, dense_attention, multiply_by, only_interpreted, reports_race

# Relative to the largest entry of each array. float32: sums of some hundred terms in another order. bfloat16 has 8
# bits and float16 11: operands of the second product and gradients of logits are rounded to them once.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}


def normal(rng, *shape, scale=1.0):
    return rng.normal(size=shape) * scale


def inputs(seed, length=70, lengths=(100,), batch=1, heads=1, key_heads=None, width=32, value_width=None):
    """Queries and the keys and values of streams, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    key_heads = key_heads or heads
    q = normal(rng, batch, length, heads, width, scale=width**-0.5)
    streams = [
        {
            "keys": normal(rng, batch, m, key_heads, width),
            "values": normal(rng, batch, m, key_heads, value_width or width),
        }
        for m in lengths
    ]
    return rng, {"q": q, "query_features": (), "streams": streams}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def fused(target, ordered, options, arrays, others, cotangents):
    """Output, lse, each stream's lse, and the gradients of `arrays`; of lse, only that of some keys is passed on.

    Compiled once for each `target`, which only tells programs apart: tests whose arrays differ in nothing but what
    they hold share one.
    """

    def run(arrays):
        streams = [Stream(**s, **o, ordered=x) for s, o, x in zip(arrays["streams"], others["streams"], ordered)]
        features, offset, reach = arrays["query_features"], others["query_offset"], others["reach"]
        given = {"query_features": features, "query_offset": offset, "reach": reach, **dict(options)}
        out, lse, stream_lse = attend(arrays["q"], streams, implementation=IMPLEMENTATION, **given)
        return (out, lse), stream_lse

    (out, lse), pull, stream_lse = jax.vjp(run, arrays, has_aux=True)
    g, h = cotangents
    return (out, lse, stream_lse), pull((g, jnp.where(lse > -1e29, h, 0)))[0]


def run(arrays, cotangents, others=None, ordered=None, query_offset=0, reach=None, **options):
    """By the kernels, as they are set now."""
    hardware = dispatch.detect() if ON_GPU else dispatch.INTERPRETER
    streams = others or [{} for _ in arrays["streams"]]
    others = {"streams": streams, "query_offset": jnp.int32(query_offset), "reach": reach}
    target = hardware, attention.tiling_for(hardware)
    ordered = tuple(ordered or [True] * len(streams))
    return fused(target, ordered, tuple(sorted(options.items())), arrays, others, cotangents)


def expect(arrays, cotangents, others=None, ordered=None, query_offset=0, reach=None, **options):
    """By dense attention in float64. `reach` changes nothing, it is a promise."""
    causal, (left, right) = options.pop("causal", False), options.pop("window", (np.inf, np.inf))
    if "score" in options:
        options["score"] = jax.jit(options["score"])  # or it would be compiled operation by operation
    readable, distances = [], []
    for n, s in enumerate(arrays["streams"]):
        given = {"mask": None, "span": None, **(others[n] if others else {})}
        distance = query_offset + np.arange(arrays["q"].shape[1])[:, None] - np.arange(s["keys"].shape[1])
        if ordered and not ordered[n]:
            distance, may = 0 * distance, np.ones_like(distance, bool)
        else:
            may = (distance <= left) & (-distance <= (0 if causal else right))
        if given["mask"] is not None:
            may = may & given["mask"][:, None, None, :]
        if given["span"] is not None:
            first, end = (np.swapaxes(x, 1, 2)[..., None] for x in given["span"])
            j = np.arange(s["keys"].shape[1])
            may = may & (first <= j) & (j < end)
        readable.append(may)
        distances.append(np.float64(distance))
    return dense_attention(arrays, readable, cotangents, distances=distances, **options)


def seen(arrays, dtype):
    """`arrays` as the kernels get to see them, and in float64 what these are; features are at least float32."""

    def cast(path, x):
        x = np.array(x, jnp.dtype(dtype))
        is_feature = any("features" in str(k) for k in path)
        return x.astype(jnp.promote_types(dtype, jnp.float32)) if is_feature else x

    arrays = jax.tree_util.tree_map_with_path(cast, arrays)
    return arrays, jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)


def cotangent(arrays):
    """Of the output."""
    shape = *arrays["q"].shape[:3], arrays["streams"][0]["values"].shape[3]
    return np.random.default_rng(99).normal(size=shape)


def assert_close(actual, expected, dtype):
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        want, got = (np.asarray(x, np.float64) for x in (want, got))
        assert want.shape == got.shape and np.isfinite(got).all()
        nothing = want < -1e29  # the logsumexp of no keys
        np.testing.assert_array_equal(got < -1e29, nothing)
        error = np.abs(np.where(nothing, 0, got - want)).max(initial=0)
        scale = np.abs(np.where(nothing, 0, want)).max(initial=1e-3)
        assert error <= TOLERANCE[dtype] * scale, f"{jax.tree_util.keystr(path)}: {error / scale:.1e}"


def check(arrays, others=None, dtype="float32", **options):
    """The kernels agree with dense attention in float64 on the same numbers."""
    dtype = "bfloat16" if ON_GPU and dtype == "float32" else dtype  # the interpreter alone multiplies float32
    (arrays, g), (wide, wide_g) = seen((arrays, cotangent(arrays)), dtype)
    h = np.float32(np.random.default_rng(98).normal(size=g.shape[:3]))
    actual = run(arrays, (g, h), others, **options)
    assert_close(actual, expect(wide, (wide_g, np.float64(h)), others, **options), dtype)


@pytest.fixture(params=["mma", "wgmma"])
def instruction(request, monkeypatch):
    multiply_by(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("instruction,dtype", [("mma", "float32"), ("wgmma", "float16")], indirect=["instruction"])
def test_grouped_heads_and_other_value_widths(instruction, dtype):
    check(inputs(6, batch=2, heads=4, key_heads=2, width=20, value_width=40)[1], dtype=dtype)


HALF = {"causal": True, "scale": 0.3}  # shared with what follows, and so are the sizes


def half_inputs(seed):
    return inputs(seed, width=64)[1]


@pytest.mark.parametrize(
    "instruction,dtype",
    [("mma", "bfloat16"), ("wgmma", "bfloat16"), ("mma", "float16")],
    indirect=["instruction"],
)
def test_half_precision(instruction, dtype):
    check(half_inputs(1), dtype=dtype, **HALF)


@pytest.mark.parametrize(
    "instruction,options",
    [("mma", {"causal": True}), ("wgmma", {"ordered": [True, True, False], "window": (5, 3)})],
    ids=["causal", "unordered"],
    indirect=["instruction"],
)
def test_several_streams_share_one_softmax(instruction, options):
    """Ragged, one of them empty, one masked; one that knows no positions, where a window reaches to both sides."""
    rng, arrays = inputs(2, lengths=(100, 0, 33))
    check(arrays, [{"mask": rng.random((1, 100)) < 0.7}, {}, {}], query_offset=40, **options)


# The next three share a program.

NO_SPAN = np.zeros((2, 70, 1), np.int32), np.full((2, 70, 1), 150, np.int32)


def test_examples_and_rows_without_keys(instruction):
    _, arrays = inputs(3, batch=2, lengths=(150,))
    mask = np.stack([np.zeros(150, bool), np.arange(150) > 30])
    check(arrays, [{"mask": mask, "span": NO_SPAN}], causal=True)


def test_an_offset():
    """Queries behind the first keys."""
    _, arrays = inputs(5, batch=2, lengths=(150,))
    check(arrays, [{"mask": np.ones((2, 150), bool), "span": NO_SPAN}], causal=True, query_offset=77)


def test_spans():
    """Of queries behind all keys."""
    rng, arrays = inputs(8, batch=2, lengths=(150,))
    first = np.sort(rng.integers(0, 150, size=(2, 70, 1), dtype=np.int32), axis=1)
    others = {"mask": np.ones((2, 150), bool), "span": (first, first + 20)}
    check(arrays, [others], causal=True, query_offset=150)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # the interpreter's, of infinity
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_query_stays_in_its_row(instruction, bad):
    """Its output is NaN, and the gradients of all keys are as if nobody had asked for it."""
    arrays = half_inputs(14)
    (arrays, g), (wide, wide_g) = seen((arrays, cotangent(arrays)), "bfloat16")
    nothing = np.zeros(g.shape[:3], np.float32)
    row = 0, 66, 0  # which reads keys of all tiles
    arrays["q"][*row, 3], g[row] = bad, np.nan  # NaN is also what comes back
    wide["q"][row], wide_g[row] = 0, 0

    (out, *_), gradients = run(arrays, (g, nothing), **HALF)
    (expected, *_), expected_gradients = expect(wide, (wide_g, nothing), **HALF)
    out, expected[row] = np.array(out), 0
    assert np.isnan(out[row]).all()
    out[row] = 0
    assert_close((out, gradients), (expected, expected_gradients), "bfloat16")


def test_a_bad_key_is_seen(instruction):
    """Every query that reads it is NaN, and has a gradient that is."""
    arrays, _ = seen(half_inputs(15), "bfloat16")
    arrays["streams"][0]["keys"][0, 6] = np.nan
    g, h = np.ones((1, 70, 1, 64), jnp.bfloat16), np.zeros((1, 70, 1), np.float32)
    (out, *_), gradients = jax.tree.map(np.asarray, run(arrays, (g, h), **HALF))
    np.testing.assert_array_equal(np.isnan(out).any((0, 2, 3)), np.arange(70) >= 6)
    assert np.isnan(gradients["q"][:, 6:]).all() and np.isnan(gradients["streams"][0]["keys"][:, 6]).all()


def test_a_window_of_one_key():
    check(inputs(4, length=150, lengths=(150,))[1], window=(0, 0))


def test_features_are_differentiated_inside_the_tile(instruction):
    """Gravity: three features of queries, one of which has no derivative, and two of keys, one masked."""
    rng, arrays = inputs(9, lengths=(70,))
    q, k = arrays["q"], arrays["streams"][0]["keys"]
    features = jax.jit(gravity_features, static_argnums=0)
    query, key = features("test", q, k, normal(rng, 1, 70, 1), 2.0, 0.5)
    arrays["query_features"], arrays["streams"][0]["features"] = query, key
    check(arrays, [{"mask": rng.random((1, 70)) < 0.8}], score=plummer, scale=SCALE, causal=True)


def discounted(dot, distance, query, key):
    return dot + key[0] + jnp.abs(distance) * query[0]


def test_distances_and_reach():
    rng, arrays = inputs(10, length=300, lengths=(300,))
    arrays["query_features"] = (np.full((1, 300, 1), -2.0),)
    arrays["streams"][0]["features"] = (normal(rng, 1, 300, 1),)
    check(arrays, score=discounted, reach=jnp.full((1, 1), 40))


@pytest.mark.parametrize(
    "tiling,length,options",
    [
        (attention.Tiling((64, 32), (64, 128), (64, 64), 1), 70, {"causal": True}),
        (attention.Tiling((128, 32), (64, 32), (128, 32), 3), 150, {"window": (90, 0)}),
    ],
)
def test_tiles_and_stages_change_nothing(tiling, length, options, monkeypatch):
    """In walks of fewer steps than are in flight and of more. Owned are whole multiples of 64 tokens: a GPU's
    warps do not divide fewer."""
    monkeypatch.setattr(attention, "tiling_for", lambda hardware: tiling)
    check(inputs(11, length=length, lengths=(150,))[1], **options)


@pytest.mark.parametrize("scale", [1e-30, 1e10])
def test_a_scale_brings_no_masked_key_in(scale):
    """Neither one that makes all logits equal, nor one at which the mask would be infinite."""
    _, arrays = inputs(16)
    dtype = "bfloat16" if ON_GPU else "float32"
    q, k, v = (np.asarray(x, jnp.dtype(dtype)) for x in (arrays["q"], *arrays["streams"][0].values()))
    mask = np.arange(100)[None] >= 70  # not one in the first tile
    run = functools.partial(attend, scale=scale, implementation=IMPLEMENTATION)
    out = jax.jit(lambda q, *stream: run(q, [Stream(*stream)]).out)(q, k, v, mask)
    z = scale * np.einsum("le,me->lm", *(np.float64(x)[0, 70 * n :, 0] for n, x in enumerate((q, k))))
    p = np.exp(z - z.max(1, keepdims=True))
    expected = p / p.sum(1, keepdims=True) @ np.float64(v)[0, 70:, 0]
    np.testing.assert_allclose(np.float64(out)[0, :, 0], expected, atol=TOLERANCE[dtype] * abs(expected).max())


@pytest.mark.parametrize("window", [(0, 0), (5, 3), (90, 0), (300, 400)])
@pytest.mark.parametrize("offset", [0, 1, 63, 200])
def test_the_claimed_cost_of_a_window_covers_what_is_walked_over(window, offset):
    tokens, tile = 1024, (64, 32)
    plan, keys = Plan(None, *window), jax.ShapeDtypeStruct((1, tokens, 1, 32), jnp.float32)
    first, end = jnp.moveaxis(
        attention._key_tiles(plan, Stream(keys, keys), tokens, tile, jnp.int32(offset), None), -1, 0
    )
    walked, claimed = int((end - first).max()) * tile[1], attention._reached(plan, tokens, tile)
    assert walked <= claimed <= walked + tile[1]


def test_it_maps():
    """`vmap` over examples gives what they give one by one."""
    examples = [seen(half_inputs(n), "bfloat16")[0] for n in (12, 13)]
    cotangents = np.zeros((1, 70, 1, 64), jnp.bfloat16), np.zeros((1, 70, 1), np.float32)
    each = [run(arrays, cotangents, **HALF)[0][0] for arrays in examples]

    def out(arrays):
        (stream,) = arrays["streams"]
        return attend(arrays["q"], [Stream(**stream)], implementation=IMPLEMENTATION, **HALF).out

    mapped = jax.jit(jax.vmap(out))(jax.tree.map(lambda *x: np.stack(x), *examples))
    np.testing.assert_array_equal(mapped, np.stack(each))


@only_interpreted
@pytest.mark.parametrize("removed", ["barrier_wait", "commit_smem"])
def test_a_missing_synchronisation_is_reported(removed, monkeypatch, capsys):
    """What makes the absence of reports above mean something."""
    from jax._src.pallas.mosaic_gpu import primitives

    nothing = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(primitives, removed, nothing)
    monkeypatch.setattr(instructions.plgpu, removed, nothing)
    _, arrays = inputs(13, length=64, lengths=(256,))
    q, k, v = (np.float32(x) for x in (arrays["q"], *arrays["streams"][0].values()))
    attended = jax.jit(lambda q, k, v: attend(q, [Stream(k, v)], implementation="mosaic_interpret"))
    assert reports_race(lambda: attended(q, k, v), capsys)


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"width": 200}, "200"),
        ({"bias": True}, "bias"),
        ({"shared_memory": 20_000}, "20,000"),
        ({"batch": 65_536}, "65,535"),
    ],
)
def test_what_does_not_fit_is_declined_with_its_reason(change, reason):
    hardware = Hardware(shared_memory=change.get("shared_memory", INTERPRETER.shared_memory))
    shape = change.get("batch", 1), 8, 2, change.get("width", 64)
    x = jax.ShapeDtypeStruct(shape, change.get("dtype", jnp.bfloat16))
    stream = Stream(x, x, bias=jnp.zeros((1, 1, 8, 8)) if "bias" in change else None)
    decline = functools.partial(attention.unsupported, hardware)
    assert reason in decline(x, 0, [stream])
    fits = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    assert attention.unsupported(INTERPRETER, fits, 0, [Stream(fits, fits)]) is None
