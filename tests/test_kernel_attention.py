"""The fused attention kernels against dense attention in float64; see tests/kernels.py for where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.engine.gravity import SCALE, gravity_features, plummer
from attn_jax.engine.plan import Plan, Stream
from attn_jax.engine.streaming import attend
from pallas_kernels import attention, instructions
from pallas_kernels.hardware import INTERPRETER, Hardware
from tests.kernels import IMPLEMENTATION, ON_GPU, multiply_by, only_interpreted, reports_race

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


def differentiated(arrays, statics, options, dtype, implementation):
    """Output, lse, each stream's lse, and the gradients of every array; cotangents of the first two are random."""
    half = jnp.dtype(dtype)

    def cast(path, x):
        is_feature = any("features" in str(k) for k in path)
        return jnp.asarray(x, jnp.promote_types(half, jnp.float32) if is_feature else half)

    arrays = jax.tree_util.tree_map_with_path(cast, arrays)

    def run(arrays):
        streams = [Stream(**s, **static) for s, static in zip(arrays["streams"], statics)]
        features = arrays["query_features"]
        return attend(arrays["q"], streams, query_features=features, implementation=implementation, **options)

    def loss(arrays):
        attended = out, lse, _ = run(arrays)
        rng = np.random.default_rng(99)
        g, h = rng.normal(size=out.shape), rng.normal(size=lse.shape)
        return jnp.sum(out * g.astype(out.dtype)) + jnp.sum(jnp.where(lse > -1e29, lse, 0) * h), attended

    (_, attended), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return attended, gradients


dense = {}
"""What dense attention gives, which several instructions and tilings are compared with."""


def check(arrays, statics=None, dtype="float32", **options):
    """The kernel agrees with dense attention in float64 on the same numbers."""
    dtype = "bfloat16" if ON_GPU and dtype == "float32" else dtype  # the interpreter alone multiplies float32
    statics = statics or [{} for _ in arrays["streams"]]
    arrays = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), np.float64), arrays)  # what both get to see
    leaves = [np.asarray(x) for x in jax.tree.leaves((arrays, statics))]
    problem = repr(options), *((x.shape, x.tobytes()) for x in leaves)
    if problem not in dense:
        with jax.enable_x64(True):
            dense[problem] = differentiated(arrays, statics, options, "float64", "dense")
    expected = dense[problem]
    actual = differentiated(arrays, statics, options, dtype, IMPLEMENTATION)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(leaves, jax.tree.leaves(actual), strict=True):
        want, got = (np.asarray(x, np.float64) for x in (want, got))
        assert want.shape == got.shape and np.isfinite(got).all()
        nothing = want < -1e29  # the logsumexp of no keys
        np.testing.assert_array_equal(got < -1e29, nothing)
        error = np.abs(np.where(nothing, 0, got - want)).max(initial=0)
        scale = np.abs(np.where(nothing, 0, want)).max(initial=1e-3)
        assert error <= TOLERANCE[dtype] * scale, f"{jax.tree_util.keystr(path)}: {error / scale:.1e}"


@pytest.fixture(params=["mma", "wgmma"])
def instruction(request, monkeypatch):
    multiply_by(request.param, monkeypatch)
    return request.param


def test_plain(instruction):
    check(inputs(0, batch=2, heads=2)[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(instruction, dtype):
    check(inputs(1, width=64)[1], dtype=dtype, causal=True)


def test_several_streams_share_one_softmax(instruction):
    """Ragged, one of them empty, one masked."""
    rng, arrays = inputs(2, lengths=(100, 0, 33))
    check(arrays, [{"mask": rng.random((1, 100)) < 0.7}, {}, {}], causal=True, query_offset=40)


def test_examples_and_rows_without_keys(instruction):
    _, arrays = inputs(3, batch=2, lengths=(70,))
    mask = np.stack([np.zeros(70, bool), np.arange(70) > 30])
    check(arrays, [{"mask": mask}], causal=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def out_and_gradients(implementation, instruction, q, k, v):
    """Compiled once for each `instruction`, which only tells them apart."""

    def run(q, k, v):
        return attend(q, [Stream(k, v)], scale=0.3, implementation=implementation).out

    out, vjp = jax.vjp(run, q, k, v)
    return out, vjp(out)  # NaN is also what comes back


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # the interpreter's, of infinity
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_query_stays_in_its_row(instruction, bad):
    """Its output is NaN, and the gradients of all keys are as if nobody had asked for it."""
    _, arrays = inputs(14)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (arrays["q"], *arrays["streams"][0].values()))
    q = q.at[0, 5, 0, 3].set(bad)

    actual = out_and_gradients(IMPLEMENTATION, instruction, q, k, v)
    expected = out_and_gradients("xla", None, q, k, v)
    assert np.isnan(actual[0][0, 5, 0]).all() and np.isfinite(actual[0]).sum() == actual[0].size - 32
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (got, want)), atol=TOLERANCE["bfloat16"] * 3, rtol=0.05
        )


def test_a_bad_key_is_seen(instruction):
    """Every query that reads it is NaN, and has a gradient that is."""
    _, arrays = inputs(15, length=40, lengths=(40,))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (arrays["q"], *arrays["streams"][0].values()))
    k = k.at[0, 6].set(jnp.nan)

    @jax.jit
    def run(q, k, v):
        attended = functools.partial(attend, causal=True, implementation=IMPLEMENTATION)
        out, vjp = jax.vjp(lambda q, k, v: attended(q, [Stream(k, v)]).out, q, k, v)
        return out, vjp(jnp.ones_like(out))

    out, (dq, dk, _) = run(q, k, v)
    np.testing.assert_array_equal(np.isnan(out).any((0, 2, 3)), np.arange(40) >= 6)
    assert np.isnan(dq[:, 6:]).all() and np.isnan(dk[:, 6]).all()


@pytest.mark.parametrize("window", [(0, 0), (5, 3), (90, 0)])
def test_windows(window):
    check(inputs(4, length=150, lengths=(150,))[1], window=window)


def test_a_traced_offset():
    _, arrays = inputs(5, lengths=(150,))
    check(arrays, causal=True, query_offset=jnp.int32(77))


def test_grouped_heads_and_other_value_widths():
    check(inputs(6, heads=4, key_heads=2, width=20, value_width=40)[1])


def test_unordered_streams_know_no_positions():
    check(inputs(7, lengths=(70, 40))[1], [{}, {"ordered": False}], window=10)


def test_spans():
    rng, arrays = inputs(8, length=130, lengths=(150,))
    first = np.sort(rng.integers(0, 150, size=(1, 130, 1)), axis=1)
    check(arrays, [{"span": (first, first + 20)}])


def test_features_are_differentiated_inside_the_tile(instruction):
    """Gravity: three features of queries, one of which has no derivative, and two of keys, one masked."""
    rng, arrays = inputs(9, lengths=(70,))
    q, k = arrays["q"], arrays["streams"][0]["keys"]
    query, key = gravity_features("test", q, k, normal(rng, 1, 70, 1), 2.0, 0.5)
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
    "tiling",
    [
        attention.Tiling((64, 32), (64, 128), (64, 64), 1),
        attention.Tiling((128, 32), (64, 32), (128, 32), 3),
    ],
)
def test_tiles_and_stages_change_nothing(tiling, monkeypatch):
    """Owned are whole multiples of 64 tokens: a GPU's warps do not divide fewer."""
    monkeypatch.setattr(attention, "tiling_for", lambda hardware: tiling)
    check(inputs(11, lengths=(150, 40))[1], causal=True)


@pytest.mark.parametrize("scale", [1e-30, 1e10])
def test_a_scale_brings_no_masked_key_in(scale):
    """Neither one that makes all logits equal, nor one at which the mask would be infinite."""
    _, arrays = inputs(16)
    dtype = "bfloat16" if ON_GPU else "float32"
    q, k, v = (jnp.asarray(x, dtype) for x in (arrays["q"], *arrays["streams"][0].values()))
    mask = np.arange(100)[None] >= 70  # not one in the first tile
    out = attend(q, [Stream(k, v, mask)], scale=scale, implementation=IMPLEMENTATION).out
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
    """`vmap` over examples gives what the batch gives."""
    _, arrays = inputs(12, batch=2)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (arrays["q"], *arrays["streams"][0].values()))

    def run(q, k, v):
        return attend(q, [Stream(k, v)], causal=True, implementation=IMPLEMENTATION).out

    mapped = jax.jit(jax.vmap(lambda *x: run(*(a[None] for a in x))[0]))(q, k, v)
    np.testing.assert_array_equal(mapped, jax.jit(run)(q, k, v))


@only_interpreted
@pytest.mark.parametrize("removed", ["barrier_wait", "commit_smem"])
def test_a_missing_synchronisation_is_reported(removed, monkeypatch, capsys):
    """What makes the absence of reports above mean something."""
    from jax._src.pallas.mosaic_gpu import primitives

    nothing = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setattr(primitives, removed, nothing)
    monkeypatch.setattr(instructions.plgpu, removed, nothing)
    _, arrays = inputs(13, length=64, lengths=(256,))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (arrays["q"], *arrays["streams"][0].values()))
    assert reports_race(lambda: attend(q, [Stream(k, v)], implementation="mosaic_interpret"), capsys)


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
