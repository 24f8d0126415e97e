"""Dual key-value attention: one softmax over two streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.ops import dual_kv_attention, standard_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# The same through projections of width 16.
MODULE = 5e-5

BATCH, LENGTH, M1, M2, HEADS, WIDTH = 2, 5, 7, 11, 4, 4
DIM = HEADS * WIDTH

attention = jax.jit(dual_kv_attention, static_argnames=("causal", "scale", "implementation"))


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, key_heads=HEADS):
    """`q, k1, v1, k2, v2`."""
    normal = np.random.default_rng(seed).normal
    shapes = [(LENGTH, HEADS), (M1, key_heads), (M1, key_heads), (M2, key_heads), (M2, key_heads)]
    return [normal(size=(BATCH, *shape, WIDTH)).astype(np.float32) for shape in shapes]


def masks(seed):
    draw = np.random.default_rng(seed)
    return {"mask1": draw.random((BATCH, M1)) < 0.6, "mask2": draw.random((BATCH, M2)) < 0.6}


def beta(seed):
    return np.random.default_rng(seed).normal(size=(2, HEADS)).astype(np.float32)


def definition(q, k1, v1, k2, v2, mask1=None, mask2=None, stream_bias=None, **options):
    betas = np.zeros((2, HEADS)) if stream_bias is None else stream_bias
    streams = [
        oracles.Stream(k, v, mask, bias=b[:, None, None])
        for k, v, mask, b in zip((k1, k2), (v1, v2), (mask1, mask2), betas)
    ]
    return oracles.softmax_attention(q, streams, scale=WIDTH**-0.5, **options)


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("causal,key_heads", [(False, HEADS), (True, 2)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_equals_the_definition(implementation, causal, key_heads, seed):
    options = {**masks(seed), "stream_bias": beta(seed), "causal": causal}
    arrays = operands(seed, key_heads)
    expected, _, _ = definition(*arrays, **options)
    close(attention(*arrays, **options, implementation=implementation), expected)


def attend(q, stream1, stream2, bias, causal=False):
    """Of streams `(k, v, mask)` of up to 7 keys, with the programs of the test above, which have more room."""

    def padded(x):
        return np.concatenate([x, np.zeros_like(x, shape=(BATCH, M2 - M1, *x.shape[2:]))], axis=1)

    (k1, v1, mask1), (k2, v2, mask2) = stream1, map(padded, stream2)
    options = {"mask1": mask1, "mask2": mask2, "stream_bias": bias, "causal": causal, "implementation": "xla"}
    return attention(q, k1, v1, k2, v2, **options)


def test_stream_bias_has_the_gradient_of_the_definition():
    arrays, bias, masked = operands(0), beta(0), masks(0)
    g, along = np.random.default_rng(1).normal(size=arrays[0].shape), beta(2)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(g * dual_kv_attention(*arrays, **masked, stream_bias=b))))(bias)
    expected = oracles.derivative(
        lambda b: (g * definition(*arrays, **masked, stream_bias=b)[0]).sum(), np.float64(bias), along
    )
    np.testing.assert_allclose((gradient * along).sum(), expected, rtol=1e-4)  # some hundred float32 terms


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_is_standard_attention_over_the_concatenation(seed):
    """Along the sequence; the stream bias is a key bias there."""
    (q, k1, v1, k2, v2), mask, bias = operands(seed), masks(seed), beta(seed)
    expected = jax.jit(standard_attention)(
        q,
        np.concatenate([k1, k2], 1),
        np.concatenate([v1, v2], 1),
        mask=np.concatenate([mask["mask1"], mask["mask2"]], 1),
        bias=np.repeat(bias.T[:, None], [M1, M2], axis=2),
    )
    close(attention(q, k1, v1, k2, v2, **mask, stream_bias=bias, causal=False, implementation="xla"), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_streams_are_one(causal):
    """A stream against its copy is standard attention, whatever it weighs."""
    q, k, v, _, _ = operands(0, 2 if causal else HEADS)
    expected = jax.jit(functools.partial(standard_attention, causal=causal))(q, k, v)
    close(attention(q, k, v, k, v, causal=causal, implementation="dense"), expected)
    stream = k, v, np.ones((BATCH, M1), bool)
    close(attend(q, stream, stream, beta(0), causal), expected)


def test_swapping_the_streams_changes_nothing():
    (q, *streams), mask, bias = operands(0), masks(0), beta(0)
    k1, v1, k2, v2 = (x[:, :M1] for x in streams)
    one, other = (k1, v1, mask["mask1"]), (k2, v2, mask["mask2"][:, :M1])
    close(attend(q, other, one, bias[::-1]), attend(q, one, other, bias))


@jax.jit
def sum_of_sines(*arrays):
    """With all gradients and the output."""

    def loss(*arrays):
        out = dual_kv_attention(*arrays[:5], stream_bias=arrays[5])
        return jnp.sin(out).sum(), out

    return jax.value_and_grad(loss, range(6), has_aux=True)(*arrays)


@pytest.mark.parametrize("silence", [-200.0, -1e30, -np.inf])
def test_a_stream_can_be_silenced(silence):
    """beta_2 to minus infinity leaves stream 1 alone; gradients are finite, those of the silenced stream 0."""
    q, k1, v1, k2, v2 = operands(0)
    bias = np.float32(np.stack([np.zeros(HEADS), np.full(HEADS, silence)]))
    (_, out), gradients = sum_of_sines(q, k1, v1, k2, v2, bias)
    close(out, definition(q, k1, v1, k2[:, :0], v2[:, :0])[0])
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert all((g == 0).all() for g in gradients[3:5])


def test_a_stream_bias_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"^dual_kv_attention: `stream_bias` must have shape \(2, H\) = \(2, 4\)"):
        dual_kv_attention(*operands(0), stream_bias=jnp.zeros((HEADS, 2)))


# The module.


def build(**options):
    return attn_jax.build("dual_kv", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def tokens(seed=0, length=LENGTH):
    return np.random.default_rng(seed).normal(size=(BATCH, length, DIM)).astype(np.float32)


call = nnx.jit(lambda module, x, mask=None: (module(x, mask=mask), attn_jax.pop_aux(module)))


def streams_of(module, x):
    """`q, k1, v1, k2, v2` of a module with full streams, float64."""

    def heads(projection):
        return (x @ np.float64(projection.kernel[...])).reshape(*x.shape[:2], HEADS, WIDTH)

    return [heads(getattr(module, name)) for name in ("query", "key1", "value1", "key2", "value2")]


def test_feature_merge_is_standard_attention_with_permuted_columns():
    """Nothing competes: per head, the columns of both key projections side by side are one key projection."""
    module = build(merge="feature")
    standard = attn_jax.build("standard", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(1))

    def side_by_side(*kernels):
        halves = [kernel[...].reshape(DIM, HEADS, WIDTH // 2) for kernel in kernels]
        return jnp.concatenate(halves, axis=-1).reshape(DIM, DIM)

    standard.query.kernel[...] = module.query.kernel[...]
    standard.key.kernel[...] = side_by_side(module.key1.kernel, module.key2.kernel)
    standard.value.kernel[...] = side_by_side(module.value1.kernel, module.value2.kernel)
    standard.out.kernel[...] = module.out.kernel[...]
    x = tokens()
    out, (losses, metrics) = call(module, x)
    close(out, call(standard, x)[0], MODULE)
    assert not losses and not metrics
    with pytest.raises(ValueError, match=r"^dual_kv: merge='feature' has a single stream"):
        module.stream_shares(x)


@pytest.mark.parametrize(
    "options,parameters",
    [
        ({}, 6 * DIM**2 + 2 * HEADS),
        ({"stream_bias": False}, 6 * DIM**2),
        ({"param_mode": "grouped"}, 4 * DIM**2 + 2 * HEADS),
        ({"param_mode": "lowrank"}, 4 * DIM**2 + 2 * HEADS),
        ({"param_mode": "lowrank", "stream_bias": False}, 4 * DIM**2),
        ({"merge": "feature"}, 4 * DIM**2),
    ],
)
def test_parameters(options, parameters):
    """`grouped` and `lowrank` cost exactly what standard attention costs, besides the stream bias."""
    params = nnx.state(nnx.eval_shape(lambda: build(**options)), nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("causal", [False, True])
def test_the_module_reports_how_its_streams_compete(causal):
    """Shares are those of the definition, the output is the mixture that they say, metrics their means."""
    module, x = build(causal=causal), tokens()
    module.stream_bias[...] = beta(3)
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 > 0
    q, k1, v1, k2, v2 = streams_of(module, np.where(mask[..., None], x, 0))
    _, lse, stream_lse = definition(q, k1, v1, k2, v2, mask, mask, stream_bias=beta(3), causal=causal)
    seen = (lse > oracles.NOTHING)[..., None]
    shares = np.where(seen, np.exp(np.moveaxis(stream_lse - lse, 0, -1)), 0)

    actual = module.stream_shares(x, mask=mask)
    close(actual, shares, MODULE)
    close(actual.sum(-1), seen[..., 0])

    out, (losses, metrics) = call(module, x, mask)
    streams = [oracles.Stream(k1, v1, mask), oracles.Stream(k2, v2, mask)]
    alone = [oracles.softmax_attention(q, [stream], causal=causal, scale=WIDTH**-0.5)[0] for stream in streams]
    mixed = (shares[..., :1] * alone[0] + shares[..., 1:] * alone[1]).reshape(x.shape)
    close(out, np.where(mask[..., None], mixed @ np.float64(module.out.kernel[...]), 0), MODULE)

    assert not losses
    assert metrics.keys() == {"second_stream_share", "stream_entropy"}
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)
    close(metrics["second_stream_share"], shares[mask][..., 1].mean(), MODULE)
    close(metrics["stream_entropy"], entropy[mask].mean(), MODULE)
    assert attn_jax.pop_aux(module) == ({}, {})


def test_metrics_are_means_over_real_queries():
    """Half for equal streams; padding does not count; metrics do not train."""
    module, x = build(), tokens()
    module.key2.kernel[...] = module.key1.kernel[...]
    mask = np.arange(2 * LENGTH) < LENGTH
    padded = np.concatenate([x, 100 * x], axis=1)
    _, (_, metrics) = call(module, padded, np.broadcast_to(mask, padded.shape[:2]))
    close(metrics["second_stream_share"], 0.5)
    close(metrics["stream_entropy"], np.log(2))

    @nnx.jit
    def gradient(module):
        def metric(module):
            module(x)
            return sum(attn_jax.pop_aux(module)[1].values())

        return nnx.grad(metric)(module)

    assert all((g == 0).all() for g in jax.tree.leaves(gradient(module)))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"merge": "depth"}, "`merge` must be one of sequence, feature, got 'depth'"),
        ({"param_mode": "tiny"}, "`param_mode` must be one of full, grouped, lowrank, got 'tiny'"),
        ({"merge": "feature", "param_mode": "lowrank"}, "merge='feature' .* param_mode='full'"),
        ({"merge": "feature", "stream_bias": True}, "merge='feature' .* no stream bias"),
        ({"merge": "feature", "dim": 12}, "merge='feature' .* even head width"),
        (
            {"param_mode": "grouped", "num_heads": 1},
            "'grouped' needs an even number of heads, got 1",
        ),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^dual_kv: .*{message}"):
        attn_jax.build("dual_kv", **{"dim": DIM, "num_heads": HEADS, "rngs": nnx.Rngs(0)} | options)
