"""Multi-timescale attention: the discount, its limits, its cut-off, and the decoders."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.mechanisms.multi_timescale import _discounted
from attn_jax.mechanisms.timescales import _CUT, discount_inverse
from attn_jax.ops import multi_timescale_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1.
FLOAT32 = 1e-5
# The same through three products of width 48.
MODULE = 5e-5
# float64, the same operations in another order.
FLOAT64 = 1e-11

BATCH, LENGTH, TIMESCALES, HEADS, WIDTH = 2, 11, 3, 2, 4
DIM = HEADS * WIDTH
GAMMA = np.array([0.6, 0.9, 0.99])

SCALE = 0.7


def attention(q, k, v, log_gamma, mask=None, causal=False, implementation="xla"):
    """In float32, and compiled once for most of the tests."""
    options = {"mask": np.ones(q.shape[:2], bool) if mask is None else mask, "causal": causal}
    return compiled(*single(q, k, v, log_gamma), **options, scale=SCALE, implementation=implementation)


compiled = jax.jit(multi_timescale_attention, static_argnames=("causal", "scale", "implementation"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def single(*arrays):
    return [np.float32(x) for x in arrays]


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, batch=BATCH, length=LENGTH, timescales=TIMESCALES, heads=HEADS):
    """`q, k, v`, float64."""
    return list(normal(seed, 3, batch, length, timescales, heads, WIDTH))


def definition(q, k, v, log_gamma, *, mask=None, causal=False, scale=None):
    """One timescale after the other, its discount as a matrix of biases."""
    i = np.arange(q.shape[1])
    distance = np.abs(i[:, None] - i)
    outputs = []
    for t, slope in enumerate(log_gamma):
        bias = np.broadcast_to(slope, q.shape[3])[:, None, None] * distance
        stream = oracles.Stream(k[:, :, t], v[:, :, t], mask, bias=bias)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        outputs.append(oracles.softmax_attention(q[:, :, t], [stream], causal=causal, scale=scale)[0])
    return np.stack(outputs, axis=2)


# The operation.


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("causal,per_head", [(False, True), (True, False)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_is_its_definition(implementation, causal, per_head, seed):
    arrays = operands(seed)
    log_gamma = -np.exp(normal(seed + 1, *(TIMESCALES, HEADS)[: 1 + per_head]))
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.6
    mask[0, :2] = False  # two queries have nothing to read, if causal
    actual = attention(*arrays, log_gamma, mask, causal, implementation)
    close(actual, definition(*arrays, log_gamma, mask=mask, causal=causal, scale=SCALE))
    assert not causal or not np.asarray(actual)[0, :2].any()


@pytest.mark.parametrize("causal,shape", [(False, (TIMESCALES,)), (True, (TIMESCALES, HEADS))])
def test_gradients_of_every_argument(causal, shape):
    """One random direction each, in float64."""
    arguments = [*operands(0), -np.exp(normal(1, *shape))]
    g, mask = normal(2, *arguments[0].shape), normal(3, BATCH, LENGTH) < 0.5

    def loss(f, *arguments):
        return (f(*arguments, mask=mask, causal=causal) * g).sum()

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(functools.partial(loss, multi_timescale_attention), range(4)))
        gradients = jax.device_get(gradient(*arguments))
    for n, (argument, actual) in enumerate(zip(arguments, gradients)):
        along = normal(4 + n, *argument.shape)
        expected = oracles.derivative(
            lambda x, n=n: loss(definition, *arguments[:n], x, *arguments[n + 1 :]), argument, along
        )
        assert abs(expected) > 1e-3
        close((actual * along).sum(), expected, FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_without_forgetting_it_is_standard_attention(causal):
    """gamma = 1, per timescale."""
    arrays = operands(0)
    actual = attention(*arrays, np.zeros((TIMESCALES, HEADS)[: 2 - causal]), causal=causal)
    for t in range(TIMESCALES):
        q, k, v = (x[:, :, t] for x in arrays)
        expected, _, _ = oracles.softmax_attention(q, [oracles.Stream(k, v)], causal=causal, scale=SCALE)
        close(actual[:, :, t], expected)


@functools.partial(jax.jit, static_argnames="causal")
def attend_and_pull(q, k, v, log_gamma, mask, causal):
    """The output and the gradients of its sum."""
    attend = functools.partial(multi_timescale_attention, mask=mask, causal=causal)
    o, pull = jax.vjp(attend, q, k, v, log_gamma)
    return o, pull(jnp.ones_like(o))


@pytest.mark.parametrize("slope", [-200.0, -1e30, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_with_instant_forgetting_only_the_nearest_token_is_read(slope, causal):
    """gamma to 0: the token itself, or where it is masked the nearest that is not. Gradients are finite."""
    q, k, v = single(*operands(0))
    log_gamma = np.full(TIMESCALES, slope, np.float32)
    close(attend_and_pull(q, k, v, log_gamma, np.ones((BATCH, LENGTH), bool), causal)[0], v)
    mask = np.arange(LENGTH) % 5 == 0  # 0, 5, 10
    nearest = np.array([0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10] if causal else [0, 0, 0, 5, 5, 5, 5, 5, 10, 10, 10])

    o, gradients = attend_and_pull(q, k, v, log_gamma, np.broadcast_to(mask, (BATCH, LENGTH)), causal)
    close(o, v[:, nearest])
    assert all(np.isfinite(x).all() for x in gradients)


def test_shifting_a_sequence_shifts_its_output():
    """Only differences of positions count: with masked tokens in front everything stays the same."""
    arrays, shift = operands(0), 6
    moved = [np.roll(x, shift, axis=1) for x in arrays]
    mask = np.broadcast_to(np.arange(LENGTH) >= shift, (BATCH, LENGTH))
    for causal in (False, True):
        log_gamma = np.log(GAMMA) if causal else np.outer(np.log(GAMMA), [1, 2])
        actual = attention(*moved, log_gamma, mask, causal)[:, shift:]
        close(actual, attention(*arrays, log_gamma, mask[:, ::-1], causal)[:, : LENGTH - shift])


def test_growth_with_the_distance_is_not_cut_off():
    """gamma > 1 makes no sense for memory but is well defined."""
    arrays, log_gamma = operands(0, 1, 700, 1, 1), np.array([0.05])
    expected = definition(*arrays, log_gamma, scale=SCALE)
    close(attention(*arrays, log_gamma), expected, 10 * FLOAT32)  # logits of 35


# The cut-off. Lengths are those of several tiles of the engine.

LONG = 700


@functools.partial(jax.jit, static_argnames=("causal", "self_masked"))
def reach(q, k, log_gamma, mask=None, causal=False, self_masked=False):
    """`(B, T, H)`."""
    reaches = _discounted("test", q, k, k, log_gamma, "additive")._reach(mask, causal, self_masked)
    return reaches.reshape(q.shape[0], q.shape[3], q.shape[2]).swapaxes(1, 2)


def test_the_reach_is_its_formula():
    """R = ceil(ln(2 / (delta (1 - gamma))) / -ln gamma) where all logits are alike: 44, 226, 2590 tokens."""
    q = np.zeros((1, 4096, 3, 1, 1), np.float32)
    expected = np.ceil(np.log(2 / (_CUT * (1 - GAMMA))) / -np.log(GAMMA))
    np.testing.assert_array_equal(reach(q, q, np.float32(np.log(GAMMA)))[0, :, 0], expected)
    np.testing.assert_array_equal(
        reach(q[:, :100], q[:, :100], np.float32(np.log(GAMMA)))[0, :, 0], [44, 100, 100]
    )


@pytest.mark.parametrize("holes", [0.0, 0.5, 0.995])
@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), size=st.sampled_from([0.1, 1, 4]))
def test_what_is_cut_off_weighs_less_than_rounding(causal, holes, seed, size):
    """The truncation bound: beyond the reach no query has more than delta of its weight, own key masked or not."""
    length, log_gamma = 400, np.log([0.3, 0.6])
    q, k, _ = size * np.stack(operands(seed, 1, length, 2, 1))
    mask = np.random.default_rng(seed).random((1, length)) >= holes
    eye = np.broadcast_to(np.eye(length)[None, :, None, None], (1, length, 2, 1, length))
    weights = definition(q, k, eye, log_gamma, mask=mask, causal=causal)[0, :, :, 0]  # (L, T, L)
    found = np.asarray(reach(*single(q, k, log_gamma), mask, causal))[0, :, 0, None]
    far = np.abs(np.arange(length)[:, None] - np.arange(length))[:, None] > found
    assert np.where(far, weights, 0).sum(-1).max() <= _CUT * (1 + 1e-3)  # the reach is computed in float32
    assert holes == 0.995 or size == 4 or far.any()


@pytest.mark.parametrize("masked", [False, True])
def test_the_bound_is_nearly_reached(masked):
    """Where only the keys at its end have larger logits, by all that is possible, eight less are wrong.

    If its own key is masked, a query has the nearest for comparison, a step away; its own logit is nothing.
    """
    length, gamma, s = 400, 0.6, 12.0
    q, k, i = np.zeros((1, length, 1, 1, 1)), np.full((1, length, 1, 1, 1), -1.0), length // 2
    found = masked + math.ceil((math.log(2 / (_CUT * (1 - gamma))) + 2 * s) / -math.log(gamma))
    distance = np.abs(np.arange(length) - i)
    q[:, i], k[:, distance > found - 8] = s, 1
    mask = np.ones((1, length), bool)
    if masked:
        mask[:, i], k[:, i] = False, 1
    assert reach(*single(q, k, np.log([gamma])), mask)[0, 0, 0] == found
    eye = np.broadcast_to(np.eye(length)[None, :, None, None], (1, length, 1, 1, length))
    weights = definition(q, k, eye, np.log([gamma]), mask=mask)[0, i, 0, 0]
    assert weights[distance > found].sum() <= _CUT < weights[distance > found - 8].sum()


def holes(length):
    """Masks: all, a padded one, one with a long gap, one with a single key."""
    i = np.arange(length)
    return np.stack([i >= 0, i < length // 2, (i < 100) | (i > length - 150), i == 3])


@pytest.mark.parametrize("causal", [False, True])
def test_the_cut_off_changes_nothing(causal):
    """Values and gradients are those of the dense form, for every mask and also at masked positions."""
    mask = holes(LONG)
    q, k, v = operands(0, len(mask), LONG, 2, 1)
    arguments, g = (q, k, v, np.log([0.6, 0.9])), normal(1, *q.shape)
    assert reach(*arguments[:2], arguments[3])[:, 0].max() < 100

    def run(implementation):
        def loss(*arguments):
            o = multi_timescale_attention(*arguments, mask=mask, causal=causal, implementation=implementation)
            return (o * g).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, range(4), has_aux=True))(*arguments)
        return o, *gradients

    with jax.enable_x64(True):
        for actual, expected in zip(run("xla"), run("dense")):
            scale = np.abs(expected).max()
            close(actual / scale, expected / scale, 20 * _CUT)  # of sums over hundreds of keys


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_cut_off_is_not_computed(causal):
    """A NaN among the values goes as far as the tiles that hold it."""
    q, k, v = single(*operands(0, 1, LONG, 1, 1))
    for bad, clean in ((LONG - 50, slice(0, 200)), (50, slice(LONG - 200, LONG))):
        broken = v.copy()
        broken[:, bad] = np.nan
        finite = np.isfinite(attention(q, k, broken, np.array([-0.5]), causal=causal)).all((0, 2, 3, 4))
        assert finite[clean].all() and not finite[bad]


def test_padding_does_not_lengthen_the_reach_of_a_module():
    """Masked queries would have to look far for a key; where they read nothing, the real ones decide."""
    q, k, _ = single(*operands(0, 2, LONG, 1, 1))
    mask, log_gamma = holes(LONG)[1:3], np.float32(np.log([0.6]))
    alone = reach(q[:1, : LONG // 2], k[:1, : LONG // 2], log_gamma)
    assert reach(q, k, log_gamma, mask)[0] > LONG // 2
    np.testing.assert_array_equal(reach(q, k, log_gamma, mask, self_masked=True)[:1], alone)


@pytest.mark.parametrize("factor", [50, 1e30])
def test_a_huge_future_moves_no_earlier_output(factor):
    """It lengthens the reach, whose end is below rounding."""
    q, k, v = single(*operands(0, 1, LONG, 1, 1))
    now = np.arange(LONG)[:, None, None, None] < 300
    later = [np.where(now, x, x * np.float32(factor)) for x in (q, k, v)]
    log_gamma = np.float32(np.log([0.6]))
    actual = attention(*later, log_gamma, causal=True)[:, :300]
    close(actual, attention(q, k, v, log_gamma, causal=True)[:, :300], 1e-6)


# The module.


def build(**options):
    return attn_jax.build("multi_timescale", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


call = nnx.jit(lambda module, x, mask: (module(x, mask=mask), attn_jax.pop_aux(module)))


def tokens(seed=0, length=LENGTH):
    """And a mask that leaves the first query of the first sequence nothing to read, if causal."""
    x = np.float32(normal(seed, BATCH, length, DIM))
    return x, np.arange(BATCH * length).reshape(BATCH, length) % 4 > 0


def by_timescale(projected):
    """`(B, L, H T E)`, as the projections order it, to `(B, L, T, H, E)`."""
    return projected.reshape(*projected.shape[:2], HEADS, -1, WIDTH).swapaxes(2, 3)


def decode(p, o):
    """The decoders, from the parameters, of `(B, L, T, H, E)`."""
    if "decoder/inverse" in p:
        lags = np.einsum("ct,blthe->blche", p["decoder/inverse"], o)
        mixed = np.einsum("che,blche->blhe", p["decoder/mixture"], lags)
        return mixed.reshape(*o.shape[:2], -1) @ p["decoder/out/kernel"]
    h = o.swapaxes(2, 3).reshape(*o.shape[:2], -1) @ p["decoder/hidden/kernel"] + p["decoder/hidden/bias"]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    h = np.maximum(h * p["decoder/norm/scale"] + p["decoder/norm/bias"], 0)
    return h @ p["decoder/out/kernel"] + p["decoder/out/bias"]


def values_of(module):
    """Parameters by name, float64."""
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): np.float64(v[...]) for path, v in params}


@pytest.mark.parametrize(
    "options,causal",
    [({}, False), ({"num_timescales": 5}, True), ({"decoder": "laplace", "num_lags": 7}, True)],
)
def test_the_module_is_its_definition(options, causal):
    module, (x, mask) = build(**options, causal=causal), tokens()
    p = values_of(module)
    clean = np.where(mask[..., None], np.float64(x), 0)
    q, k, v = (by_timescale(clean @ p[f"{name}/kernel"]) for name in ("query", "key", "value"))
    o = definition(q, k, v, -np.exp(-p["log_tau"]), mask=mask, causal=causal)
    y, (losses, metrics) = call(module, x, mask)
    close(y, np.where(mask[..., None], decode(p, o), 0), MODULE)
    assert not losses
    gammas = np.exp(-np.exp(-p["log_tau"]))
    assert list(metrics) == [f"gamma_{t}" for t in range(len(gammas))]
    close(list(metrics.values()), gammas)


@pytest.mark.parametrize("causal", [False, True])
def test_the_multiplicative_decay_is_its_definition(causal):
    """The source's `softmax(gamma^|i-j| q . k / sqrt(E))`, as weights of every timescale and their mean."""
    module, (x, mask) = build(decay="multiplicative", causal=causal), tokens()
    p = values_of(module)
    clean = np.where(mask[..., None], np.float64(x), 0)
    q, k = (by_timescale(clean @ p[f"{name}/kernel"]) for name in ("query", "key"))
    i = np.arange(LENGTH)
    decay = np.exp(-np.exp(-p["log_tau"]))[:, None, None, None] ** np.abs(i[:, None] - i)
    z = np.einsum("blthe,bmthe->bthlm", q, k) / np.sqrt(WIDTH) * decay
    allowed = mask[:, None, None, None] & (i <= (i[:, None] if causal else LENGTH))
    z = np.where(allowed, np.exp(z), 0)
    expected = z / np.maximum(z.sum(-1, keepdims=True), 1e-300)
    expected = np.where(mask[:, None, None, :, None], expected, 0)
    for name, wanted in (("timescale_weights", expected), ("attention_weights", expected.mean(1))):
        close(jax.jit(lambda x, name=name: getattr(module, name)(x, mask=mask))(x), wanted, MODULE)
    values = by_timescale(clean @ p["value/kernel"])
    o = np.einsum("bthlm,bmthe->blthe", expected, values)
    close(call(module, x, mask)[0], np.where(mask[..., None], decode(p, o), 0), MODULE)


def test_the_multiplicative_decay_does_not_forget():
    """Weight farther than 64 tokens, gamma = .6 and 1024 tokens: as much as without any attention, 88 %."""
    length = 1024
    q, k, v = single(*operands(0, 1, length, 1, 1))
    far = np.abs(np.arange(length)[:, None] - np.arange(length)) > 64

    def weight_beyond(decay):
        problem = _discounted("test", q, k, v, np.log([0.6]), decay)
        weights = np.asarray(jax.jit(lambda: problem.weights(None, False))())[0, 0]
        return np.where(far, weights, 0).sum(-1).mean()

    assert abs(weight_beyond("multiplicative") - far.mean()) < 0.01
    assert far.mean() > 0.87
    assert weight_beyond("additive") < 1e-12


def test_gamma_stays_between_zero_and_one():
    """Whatever the optimiser does to its parameter; and outputs are finite."""
    module, (x, mask) = build(), tokens()
    for log_tau in ([-np.inf, -1e30, -5.0], [5.0, 1e30, np.inf]):
        module.log_tau[...] = np.float32(log_tau)
        gamma = np.exp(np.asarray(module.log_gamma))
        assert ((gamma > 0) & (gamma < 1)).all()
        y, (_, metrics) = call(module, x, mask)
        assert np.isfinite(y).all()
        assert all(0 < g < 1 for g in metrics.values())


@pytest.mark.parametrize("options,log_tau,causal", [({}, -4.0, False), ({"decay": "multiplicative"}, 1.0, True)])
def test_long_sequences_have_finite_gradients(options, log_tau, causal):
    """Where discounts span more than float32: in a gap of masked tokens, and in what fills up the last tile."""
    module, length = build(**options, causal=causal), 768 if not causal else 300
    module.log_tau[...] = np.full(TIMESCALES, log_tau, np.float32)
    mask = np.broadcast_to((np.arange(length) < 128) | (np.arange(length) >= 630), (BATCH, length))
    graph, params = nnx.split(module)

    @jax.jit
    @jax.grad
    def gradient(params, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(x, mask=mask)))

    gradients = gradient(params, tokens(length=length)[0])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "options,tau",
    [
        ({}, [1.96, 9.49, 99.5]),
        ({"num_timescales": 4}, [2, 15.87, 125.99, 1000]),
        ({"num_timescales": 3, "max_timescale": 8}, [2, 4, 8]),
        ({"num_timescales": 1}, [2]),
    ],
)
def test_time_constants_at_the_start(options, tau):
    log_tau = jax.jit(lambda: build(**options).log_tau[...])()
    np.testing.assert_allclose(np.exp(log_tau), tau, rtol=2e-3)


@pytest.mark.parametrize("timescales,lags,alpha", [(3, 64, 0.1), (8, 5, 1e-3), (2, 2, 1.0)])
def test_the_laplace_decoder_starts_at_the_tikhonov_inverse(timescales, lags, alpha):
    """`A+ = (A'A + alpha^2)^-1 A'`, and `lags` applies it to the timescales."""
    o = np.float32(normal(0, BATCH, LENGTH, timescales, HEADS, WIDTH))

    @jax.jit
    def run(o):
        module = build(num_timescales=timescales, decoder="laplace", num_lags=lags, alpha=alpha)
        return module.log_tau[...], module.decoder.inverse[...], module.decoder.lags(o)

    log_tau, inverse, signal = run(o)
    a = np.exp(-1 / np.exp(np.float64(log_tau)))[:, None] ** np.arange(lags)
    expected = np.linalg.inv(a.T @ a + alpha**2 * np.eye(lags)) @ a.T
    close(inverse, expected, 1e-4)  # condition numbers up to 1e3
    close(signal, np.einsum("ct,blthe->blche", expected, o), 1e-3)


def test_the_inverse_recovers_as_many_lags_as_there_are_timescales():
    """Exactly, of a signal of three lags; of 64 lags three modes are seen, with the documented singular values."""
    tau = -1 / np.log(GAMMA)
    signal = normal(0, 3)
    close(discount_inverse(tau, 3, 1e-9) @ (GAMMA[:, None] ** np.arange(3) @ signal), signal)
    seen = discount_inverse(tau, 64, 1e-9) @ GAMMA[:, None] ** np.arange(64)
    close(np.trace(seen), 3)
    close(np.linalg.svd(GAMMA[:, None] ** np.arange(64))[1], [6.3, 1.9, 0.66], 0.02)


@pytest.mark.parametrize(
    "options,parameters",
    [
        ({}, 3 * 3 * DIM**2 + 3 + (6 * DIM**2 + 2 * DIM) + 4 * DIM + (2 * DIM**2 + DIM)),
        ({"num_timescales": 5, "decoder": "laplace"}, 15 * DIM**2 + 5 + 64 * (5 + DIM) + DIM**2),
    ],
)
def test_parameters(options, parameters):
    params = nnx.state(nnx.eval_shape(lambda: build(**options)), nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize("options", [{"decay": "multiplicative"}, {"decoder": "laplace", "num_lags": 7}])
def test_variants_decode(options):
    """Token by token, as in parallel."""
    module, (x, _) = build(**options, causal=True), tokens()
    cache, step = module.init_cache(BATCH, LENGTH), jax.jit(module.step)
    for t in range(LENGTH):
        y, cache = step(x[:, t : t + 1], cache)
    close(y[:, 0], call(module, x, np.ones((BATCH, LENGTH), bool))[0][:, -1], MODULE)


# What does not fit.


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("q", np.ones((BATCH, LENGTH, HEADS, WIDTH)), r"`q` must have shape \(B, L, T, H, E\)"),
        ("k", np.ones((BATCH, LENGTH + 1, TIMESCALES, HEADS, WIDTH)), r"`k` must have shape \(B, L, T, H, E\)"),
        ("v", np.ones((BATCH, LENGTH, TIMESCALES, 1, WIDTH)), r"`v` must have shape \(B, L, T, H, V\)"),
        ("log_gamma", np.ones(2), r"`log_gamma` must have shape \(T,\) or \(T, H\)"),
        ("log_gamma", np.ones((TIMESCALES, HEADS + 1)), r"`log_gamma` must have shape .* = \(3, 2\)"),
        ("log_gamma", np.ones(TIMESCALES, int), r"`log_gamma` must be a floating-point array"),
        ("mask", np.ones((BATCH, LENGTH)), r"`mask` must be boolean"),
        ("mask", np.ones((BATCH, LENGTH + 1), bool), r"`mask` must have shape"),
        ("implementation", "fast", "implementation"),
    ],
)
def test_arguments_that_do_not_fit_raise(name, value, words):
    q, k, v = operands(0)
    arguments = {"q": q, "k": k, "v": v, "log_gamma": np.log(GAMMA)} | {name: value}
    with pytest.raises(ValueError, match=f"^multi_timescale_attention: .*{words}"):
        jax.eval_shape(lambda: multi_timescale_attention(**arguments))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"decay": "none"}, "`decay` must be one of additive, multiplicative, got 'none'"),
        ({"decoder": "fft"}, "`decoder` must be one of mlp, laplace, got 'fft'"),
        ({"num_timescales": 0}, "`num_timescales` must be a positive integer, got 0"),
        ({"num_lags": 7}, "`num_lags` and `alpha` are for decoder='laplace'"),
        ({"decoder": "laplace", "num_lags": 1.5}, "`num_lags` must be a positive integer, got 1.5"),
        ({"max_timescale": 1}, "`max_timescale` must be a number of at least 2, got 1"),
        ({"max_timescale": math.inf}, "`max_timescale` must be a number of at least 2"),
        ({"decoder": "laplace", "alpha": 0.0}, "`alpha` must be a positive number, got 0.0"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^multi_timescale: {message}"):
        build(**options)
