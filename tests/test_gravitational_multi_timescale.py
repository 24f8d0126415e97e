"""Gravitational attention with several timescales: its definition, its limits, its cut-off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.mechanisms.gravitational_multi_timescale import _discounted
from attn_jax.mechanisms.timescales import _CUT, fold
from attn_jax.ops import gravitational_attention, gravitational_multi_timescale_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1; r^2 loses up to three bits (norms around 1).
FLOAT32 = 1e-5
# The same through products of width 24 and a LayerNorm.
MODULE = 1e-4
# float64, the same operations in another order, conditions up to 100.
FLOAT64 = 1e-11

BATCH, LENGTH, TIMESCALES, HEADS, WIDTH = 2, 11, 3, 2, 4
DIM = HEADS * WIDTH
LAW = {"power": np.array([2.0, 3.5]), "softening": np.array([1.0, 0.3])}

compiled = jax.jit(gravitational_multi_timescale_attention, static_argnames=("causal", "implementation"))


def attention(*arrays, mask=None, causal=False, implementation="xla"):
    """In float32. Compiled for shared operands, and if causal for those of each timescale."""
    mask = np.ones((BATCH, LENGTH), bool) if mask is None else mask
    options = {"mask": mask, "causal": causal, "implementation": implementation}
    return compiled(*single(*arrays), **dict(zip(LAW, single(*LAW.values()))), **options)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def single(*arrays):
    return [np.float32(x) for x in arrays]


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, shared=True, batch=BATCH, length=LENGTH, timescales=TIMESCALES, heads=HEADS):
    """`q, k, v, log_mass, log_gamma`, float64."""
    middle = () if shared else (timescales,)
    q, k, v = normal(seed, 3, batch, length, *middle, heads, WIDTH)
    return q, k, v, normal(seed + 1, batch, length, timescales, heads), -np.exp(normal(seed + 2, timescales))


def of_timescale(t, *arrays):
    """Whether they are shared or not."""
    return [x if x.ndim == 4 else x[:, :, t] for x in arrays]


def definition(q, k, v, log_mass, log_gamma, *, power, softening, mask=None, causal=False):
    """One timescale after the other; squared distances from differences."""
    i = np.arange(q.shape[1])
    distance = np.abs(i[:, None] - i)
    outputs = []
    for t, slope in enumerate(log_gamma):
        qt, kt, vt = of_timescale(t, q, k, v)
        r_sq = ((qt[:, :, None] - kt[:, None]) ** 2).sum(-1) / q.shape[-1]
        field = (log_mass[:, None, :, t] - power / 2 * np.log(r_sq + softening**2)).transpose(0, 3, 1, 2)
        bias = field + np.broadcast_to(slope, q.shape[-2])[:, None, None] * distance
        stream = oracles.Stream(kt, vt, mask, bias=bias)
        outputs.append(oracles.softmax_attention(qt, [stream], causal=causal, scale=0.0)[0])
    return np.stack(outputs, axis=2)


# The operation.


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("causal,shared", [(False, True), (True, False)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_is_its_definition(implementation, causal, shared, seed):
    arrays = operands(seed, shared)
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.6
    mask[0, :2] = False  # two queries have nothing to read, if causal
    actual = attention(*arrays, mask=mask, causal=causal, implementation=implementation)
    close(actual, definition(*arrays, **LAW, mask=mask, causal=causal))
    assert not causal or not np.asarray(actual)[0, :2].any()


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def pulled(arguments, mask, g, causal, implementation):
    """The output, and what `g` is pulled back to: cotangents of all arguments, `q` to `softening`."""

    def attend(*arguments):
        *arrays, power, softening = arguments
        options = {"mask": mask, "causal": causal, "implementation": implementation}
        return gravitational_multi_timescale_attention(*arrays, power=power, softening=softening, **options)

    o, pull = jax.vjp(attend, *arguments)
    return o, *pull(g)


@pytest.mark.parametrize("causal,shared", [(False, False), (True, True)])
def test_gradients_of_every_argument(causal, shared):
    """`q, k, v, log_mass, log_gamma, power, softening`, one random direction each, in float64."""
    arguments = [*operands(0, shared), LAW["power"], LAW["softening"]]
    if shared:
        arguments[4] = -np.exp(normal(9, TIMESCALES, HEADS))
    g, mask = normal(4, BATCH, LENGTH, TIMESCALES, HEADS, WIDTH), normal(5, BATCH, LENGTH) < 0.5

    def loss(*arguments):
        *arrays, power, softening = arguments
        return (definition(*arrays, power=power, softening=softening, mask=mask, causal=causal) * g).sum()

    with jax.enable_x64(True):
        _, *gradients = jax.device_get(pulled(arguments, mask, g, causal, "xla"))
    for n, (argument, actual) in enumerate(zip(arguments, gradients)):
        along = normal(6 + n, *argument.shape)
        expected = oracles.derivative(lambda x, n=n: loss(*arguments[:n], x, *arguments[n + 1 :]), argument, along)
        assert abs(expected) > 1e-3
        close((actual * along).sum(), expected, FLOAT64)


@pytest.mark.parametrize("causal", [False, True])
def test_without_forgetting_it_is_gravitational_attention(causal):
    """gamma = 1, per timescale with its masses."""
    *arrays, log_mass, _ = operands(0, shared=not causal)
    actual = attention(*arrays, log_mass, np.zeros(TIMESCALES), causal=causal)
    gravity = jax.jit(functools.partial(gravitational_attention, **LAW, causal=causal, implementation="dense"))
    for t in range(TIMESCALES):
        close(actual[:, :, t], gravity(*single(*of_timescale(t, *arrays), log_mass[:, :, t])))


@pytest.mark.parametrize("causal", [False, True])
def test_at_one_distance_and_mass_it_is_a_geometric_window(causal):
    """q = 0, k constant, m = 1: `o_i = sum_j gamma^|i-j| v_j / sum_j gamma^|i-j|`."""
    _, _, v, log_mass, _ = operands(0, shared=not causal)
    gamma = np.array([0.6, 0.9, 0.99])
    k = np.broadcast_to(normal(1, HEADS, WIDTH), v.shape)
    window = gamma[:, None, None] ** np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
    window = np.tril(window) if causal else window
    window /= window.sum(-1, keepdims=True)
    expected = [np.einsum("lm,bmhe->blhe", w, *of_timescale(t, v)) for t, w in enumerate(window)]
    actual = attention(0 * k, k, v, 0 * log_mass, np.log(gamma), causal=causal)
    close(actual, np.stack(expected, axis=2))


def test_splitting_a_mass_changes_nothing():
    """Superposition: two tokens at one place and of one value act as one that has both masses.

    They cannot share a position as well. For the queries before both, the later one is a step farther, and its
    mass makes up for it.
    """
    q, k, v, log_mass, log_gamma = operands(0)
    k, v = k.copy(), v.copy()
    k[:, 4], v[:, 4] = k[:, 3], v[:, 3]
    whole, split = log_mass.copy(), log_mass.copy()
    whole[:, 4] = -200.0
    split[:, 3] = np.log(0.3) + log_mass[:, 3]
    split[:, 4] = np.log(0.7) + log_mass[:, 3] - log_gamma[:, None]
    expected = attention(q, k, v, whole, log_gamma)[:, :4]
    close(attention(q, k, v, split, log_gamma)[:, :4], expected)


def test_shared_operands_are_repeated_ones():
    *arrays, log_mass, log_gamma = operands(0)
    every = (np.repeat(x[:, :, None], TIMESCALES, axis=2) for x in arrays)
    expected = attention(*every, log_mass, log_gamma, implementation="dense")
    actual = attention(*arrays, log_mass, log_gamma, implementation="dense")
    np.testing.assert_array_equal(actual, expected)


def test_shifting_a_sequence_shifts_its_output():
    """Only differences of positions count: with masked tokens in front everything stays the same."""
    *arrays, log_gamma = operands(0)
    shift = 6
    mask = np.broadcast_to(np.arange(LENGTH) >= shift, (BATCH, LENGTH))
    moved = attention(*(np.roll(x, shift, axis=1) for x in arrays), log_gamma, mask=mask)
    close(moved[:, shift:], attention(*arrays, log_gamma, mask=mask[:, ::-1])[:, : LENGTH - shift])


# The cut-off. Lengths are those of several tiles of the engine.

LONG = 700
# `log_gamma`, `power` and `softening` of its two timescales.
LONG_LAW = (np.log([0.6, 0.8]), np.float64(2), np.float64(1))


@jax.jit
def bounds(*arrays, mask, **law):
    return _discounted("test", *arrays, **law, mask=mask).bounds(mask)


@pytest.mark.parametrize("power", [2.0, -3.0])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_logits_are_within_the_bounds_that_the_reach_is_from(power, seed):
    q, k, v, log_mass, log_gamma = operands(seed, shared=False)
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.6
    law = {"power": power, "softening": 0.7}
    own, lowest, highest = bounds(*single(q, k, v, log_mass, log_gamma), **law, mask=mask)
    r_sq = ((q[:, :, None] - k[:, None]) ** 2).mean(-1)  # (B, L, M, T, H)
    logits = log_mass[:, None] - power / 2 * np.log(r_sq + law["softening"] ** 2)
    logits = logits.swapaxes(3, 4).reshape(BATCH, LENGTH, LENGTH, HEADS * TIMESCALES)
    close(np.where(mask[..., None], own - np.diagonal(logits, 0, 1, 2).swapaxes(1, 2), 0), 0)
    logits = np.where(mask[:, None, :, None], logits, np.nan)
    assert np.nanmin(logits - np.asarray(lowest)[:, :, None]) > -FLOAT32
    assert np.nanmax(logits - np.asarray(highest)[:, :, None]) < FLOAT32


@functools.partial(jax.jit, static_argnames=("causal", "self_masked"))
def reach(q, k, log_mass, log_gamma, mask=None, causal=False, self_masked=False, **law):
    """`(B, T, H)`."""
    problem = _discounted("test", q, k, k, log_mass, log_gamma, law["power"], law["softening"], mask)
    found = problem._reach(mask, causal, self_masked)
    return found.reshape(q.shape[0], q.shape[2], -1).swapaxes(1, 2)


@pytest.mark.parametrize("masked", [0.0, 0.5, 0.995])
@pytest.mark.parametrize(
    "causal,law", [(False, {}), (True, {}), (False, {"power": -3.0}), (True, {"softening": 0.0})]
)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_what_is_cut_off_weighs_less_than_rounding(causal, law, masked, seed):
    """The truncation bound: beyond the reach no query has more than delta of its weight, own key masked or not."""
    length, law = 400, {"power": 2.0, "softening": 0.7} | law
    q, k, _, log_mass, _ = operands(seed, True, 1, length, 2, 1)
    log_gamma = np.log([0.3, 0.6])
    mask = np.random.default_rng(seed).random((1, length)) >= masked
    eye = np.broadcast_to(np.eye(length)[None, :, None], (1, length, 1, length))
    weights = definition(q, k, eye, log_mass, log_gamma, mask=mask, causal=causal, **law)[0, :, :, 0]
    found = np.asarray(reach(*single(q, k, log_mass, log_gamma), mask, causal, **law))[0, :, 0, None]
    far = np.abs(np.arange(length)[:, None] - np.arange(length))[:, None] > found
    assert np.where(far, weights, 0).sum(-1).max() <= _CUT * (1 + 1e-3)  # the reach is computed in float32
    assert masked == 0.995 or far.any()


@pytest.mark.parametrize("causal", [False, True])
def test_the_cut_off_changes_nothing(causal):
    """Values and gradients are those of the dense form, for every mask and also at masked positions."""
    i = np.arange(LONG)
    mask = np.stack([i >= 0, i < LONG // 2, (i < 100) | (i > LONG - 150)])
    *arrays, _ = operands(0, True, len(mask), LONG, 2, 1)
    arguments = (*arrays, *LONG_LAW)
    assert reach(*arguments[:2], *arguments[3:5], power=2.0, softening=1.0).max() < 150
    g = normal(3, len(mask), LONG, 2, 1, WIDTH)
    with jax.enable_x64(True):
        found, wanted = jax.device_get([pulled(arguments, mask, g, causal, name) for name in ("xla", "dense")])
    for actual, expected in zip(found, wanted):
        scale = np.abs(expected).max()
        close(actual / scale, expected / scale, 20 * _CUT)  # of sums over hundreds of keys


def test_a_huge_future_moves_no_earlier_output():
    """It lengthens the reach, whose end is below rounding."""
    *arrays, _ = operands(0, True, 3, LONG, 2, 1)  # as many as in the program of the test above
    later = [x.copy() for x in arrays]
    for x in later:
        x[:, 300:] *= 1e4
    mask, g = np.ones((3, LONG), bool), np.zeros((3, LONG, 2, 1, WIDTH))
    with jax.enable_x64(True):
        moved, still = jax.device_get([pulled((*x, *LONG_LAW), mask, g, True, "xla")[0] for x in (later, arrays)])
    close(moved[:, :300], still[:, :300], 1e-7)  # the rounding of float32


# The module.


def fresh(**options):
    return attn_jax.build("gravitational_multi_timescale", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def build(**options):
    """Away from the start, where all masses are about 1; JAX would draw matrices for longer than NumPy."""

    @nnx.jit
    def start():
        module = fresh(**options)
        leaves, tree = jax.tree.flatten(nnx.state(module, nnx.Param))
        noise = [0.3 * np.float32(normal(n, *p.shape)) for n, p in enumerate(leaves)]
        leaves = [jnp.asarray(x) if x.ndim == 2 else p + x for p, x in zip(leaves, noise)]
        nnx.update(module, jax.tree.unflatten(tree, leaves))
        return module

    return start()


@nnx.jit
def run(module, x, mask, o):
    """The output, the weights of every timescale and their mean, and what the decoder makes of `o`."""
    weights = module.timescale_weights(x, mask=mask), module.attention_weights(x, mask=mask)
    return module(x, mask=mask), *weights, module.decoder(fold(o))


@pytest.mark.parametrize(
    "options,causal", [({}, False), ({"num_timescales": 5, "decoder": "laplace", "num_lags": 7}, True)]
)
def test_the_module_is_its_definition(options, causal):
    """Output, and the weights of every timescale and their mean."""
    module, x = build(**options, causal=causal), np.float32(normal(0, BATCH, LENGTH, DIM))
    mask = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 4 > 0
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    p = {"/".join(map(str, path)): np.float64(v[...]) for path, v in params}
    clean = np.where(mask[..., None], np.float64(x), 0)
    q, k, v = ((clean @ p[f"{n}/kernel"]).reshape(BATCH, LENGTH, HEADS, WIDTH) for n in ("query", "key", "value"))
    mass = np.log1p(np.exp(clean @ p["mass/kernel"] + p["mass/bias"]))
    log_mass = np.log(mass).reshape(BATCH, LENGTH, HEADS, -1).swapaxes(2, 3)
    law = {name: np.log1p(np.exp(p[f"raw_{name}"])) for name in ("power", "softening")}
    rest = (log_mass, -np.exp(-p["log_tau"]))
    o = definition(q, k, v, *rest, **law, mask=mask, causal=causal)
    y, of_each, mean, expected = run(module, x, mask, np.float32(o))
    close(y, np.where(mask[..., None], expected, 0), MODULE)
    eye = np.broadcast_to(np.eye(LENGTH)[:, None], (BATCH, LENGTH, HEADS, LENGTH))
    weights = definition(q, k, eye, *rest, **law, mask=mask, causal=causal).transpose(0, 2, 3, 1, 4)
    weights = np.where(mask[:, None, None, :, None], weights, 0)
    close(of_each, weights, MODULE)
    close(mean, weights.mean(1), MODULE)


def test_the_start():
    """Masses around 1, and the power and softening asked for."""

    @jax.jit
    def start():
        module = fresh(power=3.0, softening=0.5)
        raw = module.mass(np.zeros((1, 3, DIM), np.float32)), module.raw_power[...], module.raw_softening[...]
        return [nnx.softplus(x) for x in raw]

    for actual, expected in zip(start(), (1.0, 3.0, 0.5), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(
    "decoder,parameters", [("mlp", 8 * DIM**2 + 7 * DIM), ("laplace", DIM**2 + 64 * (3 + DIM))]
)
def test_parameters(decoder, parameters):
    params = nnx.state(nnx.eval_shape(lambda: fresh(decoder=decoder)), nnx.Param)
    shared = 3 * DIM**2 + (DIM + 1) * TIMESCALES * HEADS + 2 * HEADS + TIMESCALES
    assert sum(p.size for p in jax.tree.leaves(params)) == shared + parameters


# What does not fit.


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("q", np.ones((BATCH, LENGTH, WIDTH)), r"`q` must have shape"),
        ("q", np.ones((BATCH, LENGTH, TIMESCALES + 1, HEADS, WIDTH)), r"`q` must have shape \(B, L, T, H, E\)"),
        ("k", np.ones((BATCH, LENGTH + 1, HEADS, WIDTH)), r"`k` must have shape \(B, L, H, E\)"),
        ("v", np.ones((BATCH, LENGTH, 1, WIDTH)), r"`v` must have shape \(B, L, H, E\)"),
        ("log_mass", np.ones((BATCH, LENGTH, HEADS)), r"`log_mass` must have shape \(B, L, T, H\)"),
        ("log_gamma", np.ones(2), r"`log_gamma` must have shape \(T,\) or \(T, H\)"),
        ("power", np.ones(3), r"`power` must have shape \(\) or \(H,\) = \(2,\)"),
        ("softening", np.ones((1, 2)), r"`softening` must have shape \(\) or \(H,\)"),
        ("mask", np.ones((BATCH, LENGTH)), r"`mask` must be boolean"),
        ("mask", np.ones((BATCH, LENGTH + 1), bool), r"`mask` must have shape"),
        ("implementation", "fast", "implementation"),
    ],
)
def test_arguments_that_do_not_fit_raise(name, value, words):
    names = ("q", "k", "v", "log_mass", "log_gamma")
    arguments = dict(zip(names, operands(0))) | LAW | {name: value}
    with pytest.raises(ValueError, match=f"^gravitational_multi_timescale_attention: .*{words}"):
        jax.eval_shape(lambda: gravitational_multi_timescale_attention(**arguments))


@pytest.mark.parametrize("options", [{"power": 0.0}, {"power": "cube"}, {"softening": -1.0}])
def test_options_that_do_not_fit_raise(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^gravitational_multi_timescale: `{name}` must be a positive number"):
        nnx.eval_shape(lambda: fresh(**options))
