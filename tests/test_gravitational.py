"""Gravitational attention: the laws of its kernel, its three fields, and its linear-time form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.engine.gravity import log_softplus, plummer
from attn_jax.mechanisms.gravitational import _feature_parameters, _random_features
from attn_jax.ops import gravitational_attention
from tests import oracles

# float32 sums of some dozen terms in another order, values around 1; r^2 loses up to three bits (norms around 1).
FLOAT32 = 1e-5
# The same through projections of width 12, and squares of what they give.
MODULE = 1e-4
# float64, the same operations in another order, conditions up to 100.
FLOAT64 = 1e-11

BATCH, LENGTH, KEYS, HEADS, WIDTH = 2, 5, 11, 2, 6
DIM = HEADS * WIDTH

attention = jax.jit(gravitational_attention, static_argnames=("causal", "implementation"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def operands(seed, length=LENGTH, keys=KEYS):
    """`q, k, v, log_mass` and the keywords `power`, `softening`, in float64."""
    q, k, v = (normal(seed + n, BATCH, m, HEADS, WIDTH) for n, m in ((0, length), (1, keys), (2, keys)))
    law = {"power": np.array([2.0, 3.5]), "softening": np.array([1.0, 0.3])}
    return (q, k, v, normal(seed + 3, BATCH, keys, HEADS)), law


def single(tree):
    """In float32."""
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float32), tree)


def log_attraction(q, k, log_mass, power, softening):
    """`(B, H, L, M)`, from differences."""
    r_sq = ((q[:, :, None] - k[:, None]) ** 2).sum(-1) / q.shape[-1]
    return (log_mass[:, None] - power / 2 * np.log(r_sq + softening**2)).transpose(0, 3, 1, 2)


def definition(q, k, v, log_mass, *, power, softening, vacuum=None, strength=None, mask=None, causal=False):
    """The output and the share of the vacuum; `strength`, `log(G m')`, makes it the potential field."""
    logits = log_attraction(q, k, log_mass, power, softening)
    if strength is not None:
        logits = np.exp(strength.transpose(0, 2, 1)[..., None] + logits)
    streams = [oracles.Stream(k, v, mask, bias=logits)]
    if vacuum is not None:  # one more key, of value 0, that every query may read
        bias = vacuum.transpose(0, 2, 1)[..., None]
        streams.append(oracles.Stream(k[:, :1], 0 * v[:, :1], bias=bias, ordered=False))
    out, lse, stream_lse = oracles.softmax_attention(q, streams, scale=0.0, causal=causal)
    return out, None if vacuum is None else np.exp(stream_lse[1] - lse)


# The operation.


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("causal,sink", [(False, True), (True, False)])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_is_its_definition(implementation, causal, sink, seed):
    arrays, law = operands(seed)
    mask = np.random.default_rng(seed).random((BATCH, KEYS)) < 0.6
    mask[0, 0] = False  # the first query then has nothing to read, if causal
    options = law | {"mask": mask} | ({"vacuum": normal(seed, BATCH, LENGTH, HEADS)} if sink else {})
    expected, _ = definition(*arrays, **options, causal=causal)
    actual = attention(*single(arrays), **single(options), causal=causal, implementation=implementation)
    close(actual, expected)
    assert not causal or not np.asarray(actual)[0, 0].any()


@functools.partial(jax.jit, static_argnames="causal")
def pulled(arguments, mask, g, causal):
    """The output, and what `g` is pulled back to: cotangents of all arguments, `q` to `vacuum`."""

    def attend(q, k, v, log_mass, power, softening, vacuum):
        options = {"power": power, "softening": softening, "vacuum": vacuum, "mask": mask, "causal": causal}
        return gravitational_attention(q, k, v, log_mass, **options)

    o, pull = jax.vjp(attend, *arguments)
    return o, pull(g)


EVERY = np.ones((BATCH, KEYS), bool)
NO_SINK = np.full((BATCH, LENGTH, HEADS), -1e30)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_every_argument(causal):
    """`q, k, v, log_mass, power, softening, vacuum`, one random direction each, in float64."""
    arrays, law = operands(0)
    vacuum, g, mask = (
        normal(4, BATCH, LENGTH, HEADS),
        normal(5, BATCH, LENGTH, HEADS, WIDTH),
        normal(6, BATCH, KEYS) < 1,
    )
    arguments = (*arrays, law["power"], law["softening"], vacuum)

    def loss(q, k, v, log_mass, power, softening, vacuum):
        options = {"power": power, "softening": softening, "vacuum": vacuum, "mask": mask, "causal": causal}
        return (definition(q, k, v, log_mass, **options)[0] * g).sum()

    with jax.enable_x64(True):
        _, gradients = jax.device_get(pulled(arguments, mask, g, causal))
    for n, (argument, gradient) in enumerate(zip(arguments, gradients)):
        along = normal(7 + n, *argument.shape)
        expected = oracles.derivative(lambda x, n=n: loss(*arguments[:n], x, *arguments[n + 1 :]), argument, along)
        assert abs(expected) > 1e-3
        close((gradient * along).sum(), expected, FLOAT64)


def test_scalars_serve_all_heads():
    arrays = single(operands(0)[0])
    expected = attention(*arrays, power=np.full(HEADS, 3.0), softening=np.full(HEADS, 0.5))
    np.testing.assert_array_equal(attention(*arrays, power=3.0, softening=0.5), expected)


# Symmetries of the normalised field. They hold to rounding: in float64 to 1e-15 of the logits.


def field64(arrays, law):
    g = np.zeros((BATCH, LENGTH, HEADS, WIDTH))
    with jax.enable_x64(True):
        return np.asarray(pulled((*arrays, *law.values(), NO_SINK), EVERY, g, False)[0])


def symmetry(change):
    """`change(q, k, v, log_mass, power=, softening=)` leaves the float64 result alone."""
    arrays, law = operands(1)
    close(field64(*change(*arrays, **law)), field64(arrays, law), FLOAT64)


def moved(q, k, v, log_mass, **law):
    rotation = np.linalg.qr(normal(2, WIDTH, WIDTH))[0]
    shift = 3 * normal(3, WIDTH)
    return (q @ rotation + shift, k @ rotation + shift, v, log_mass), law


def test_rotating_and_shifting_queries_and_keys_together_changes_nothing():
    symmetry(moved)


def test_scaling_all_masses_changes_nothing():
    symmetry(lambda q, k, v, log_mass, **law: ((q, k, v, log_mass + np.log(7)), law))


def test_scaling_lengths_and_softening_together_changes_nothing():
    symmetry(
        lambda q, k, v, log_mass, power, softening: (
            (5 * q, 5 * k, v, log_mass),
            {"power": power, "softening": 5 * softening},
        )
    )


def test_splitting_a_mass_over_duplicates_changes_nothing():
    (q, k, v, log_mass), law = operands(1)
    k[:, -2:], v[:, -2:] = k[:, :1], v[:, :1]
    whole, split = log_mass.copy(), log_mass.copy()
    whole[:, -2:] = -1000.0  # no mass in float64
    split[:, [0, -2, -1]] = log_mass[:, :1] + np.log([0.2, 0.3, 0.5])[:, None]
    close(field64((q, k, v, split), law), field64((q, k, v, whole), law), FLOAT64)


def test_far_inside_the_softening_weights_are_the_masses():
    """eps to infinity: `weights = m / sum m`, to `p / 2 (r / eps)^2`."""
    (q, k, v, log_mass), law = operands(0)
    mass = np.exp(log_mass)
    expected = np.einsum("bmh,bmhe->bhe", mass / mass.sum(1, keepdims=True), v)[:, None]
    law["softening"] = np.full(HEADS, 1e4)
    actual = attention(*single((q, k, v, log_mass)), **single(law))
    close(actual, np.broadcast_to(expected, actual.shape))


@pytest.mark.parametrize("offset", [1.0, 10.0, 100.0])
def test_a_common_offset_costs_float32_what_is_documented(offset):
    """A logit is right to `p / 2 delta / eps^2`, `delta` roundings of `(|q|^2 + |k|^2) / E`, and no better."""
    (q, k, v, log_mass), law = operands(0)
    (q, k), law = (x + offset for x in (q, k)), law | {"softening": np.array([1.0, 1.0])}
    q, k = single((q, k))  # the question is what is computed from them
    expected, _ = definition(*(np.float64(x) for x in (q, k)), v, log_mass, **law)
    norms = 2 * ((np.abs(q) ** 2).mean(-1).max() + (np.abs(k) ** 2).mean(-1).max())
    logit = law["power"].max() / 2 * norms * 2.0**-24
    error = np.abs(attention(q, k, *single((v, log_mass)), **single(law)) - expected).max()
    # An output moves by at most twice the largest value times the error of the logits.
    assert error < 2 * np.abs(v).max() * logit + FLOAT32
    assert offset < 100 or error > 10 * FLOAT32


@jax.jit
def attend_and_pull(q, k, v, log_mass, softening):
    o, pull = jax.vjp(
        lambda *a: gravitational_attention(*a[:4], power=2.0, softening=a[4]), q, k, v, log_mass, softening
    )
    return o, pull(jnp.ones_like(o))


@pytest.mark.parametrize("softening", [0.0, 1e-12, 1e-2])
def test_coincident_points_are_finite(softening):
    """Also where the forward and the backward pass round their distances to different sides of 0."""
    (_, k, v, log_mass), _ = operands(0)
    for read in (slice(0, LENGTH), [0] * LENGTH):
        o, gradients = attend_and_pull(*single((k[:, read], k, v, log_mass, np.array(softening))))
        assert all(np.isfinite(x).all() for x in (o, *gradients))
        if softening < 1e-2:  # all that a query reads is the point where it is
            close(o, single(v[:, read]), 1e-3)


def test_gradients_of_nearly_coincident_points_are_right():
    """`r^2` is below its float32 rounding, whose sign is random: cutting it at 0 must not cut its derivative."""
    (_, k, v, log_mass), _ = operands(0)
    q = k[:, :LENGTH] + 3e-4 * normal(9, BATCH, LENGTH, HEADS, WIDTH)
    q, k = (np.float64(x) for x in single((q, k)))
    law = {"power": np.full(HEADS, 2.0), "softening": np.full(HEADS, 1e-2)}
    arguments, g = (q, k, v, log_mass, *law.values(), NO_SINK), normal(8, *q.shape)
    # The rounding of r^2 against eps^2, 6e-3 at norms around 2, moves weights and derivatives alike; the sum over
    # keys of `1 / eps^2` times the keys cancels to six digits.
    tolerance = 0.02
    with jax.enable_x64(True):
        exact = np.asarray(pulled(arguments, EVERY, g, False)[1][0])
    along = normal(10, *q.shape)
    close(
        (exact * along).sum(),
        oracles.derivative(lambda q: (definition(q, k, v, log_mass, **law)[0] * g).sum(), q, along),
        1e-8,  # 1 / eps^2 of FLOAT64
    )
    rough = pulled(single(arguments), EVERY, single(g), False)[1][0]
    assert np.abs(rough - exact).max() < tolerance * np.abs(exact).max()


def test_half_precision_rounds_inputs_and_weights_only():
    """Norms and distances of bfloat16 arrays are float32, also for a width that is no power of two."""
    (q, k, v, log_mass), law = operands(0)
    half = [
        jnp.bfloat16(x) for x in (q + 8, k + 8, v, log_mass)
    ]  # norms of which bfloat16 would be coarser than eps
    expected, _ = definition(*(np.float64(x) for x in half), **law)
    # 8 bits for each weight and for the output.
    close(np.float64(attention(*half, **single(law))), expected, 2**-7)


def test_the_score_is_finite_for_what_masked_keys_and_bad_queries_have():
    """The engine gives them features 0 and 1."""
    one, zero = np.float32(1), np.float32(0)
    assert jnp.isfinite(plummer(zero, zero, (one,) * 3, (zero,) * 2))


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("log_mass", np.zeros((BATCH, KEYS)), r"`log_mass` must have shape \(B, M, H\) = \(2, 11, 2\)"),
        ("power", np.ones(3), r"`power` must have shape \(\) or \(H,\) = \(2,\)"),
        ("softening", np.ones((1, 2)), r"`softening` must have shape \(\) or \(H,\)"),
        ("vacuum", np.ones((BATCH, KEYS, HEADS)), r"`vacuum` must have shape \(B, L, H\) = \(2, 5, 2\)"),
        ("mask", np.ones((BATCH, LENGTH), bool), r"`mask` must have shape \(B, M\) = \(2, 11\)"),
        ("k", np.ones((BATCH, KEYS, 1, WIDTH)), r"`k` must have shape \(B, M, H, E\)"),
        ("implementation", "fast", "implementation"),
    ],
)
def test_arguments_that_do_not_fit_raise(name, value, words):
    (q, k, v, log_mass), law = operands(0)
    arguments = {"q": q, "k": k, "v": v, "log_mass": log_mass} | law | {name: value}
    with pytest.raises(ValueError, match=f"^gravitational_attention: .*{words}"):
        jax.eval_shape(lambda: gravitational_attention(**arguments))


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_masked_keys_do_not_exist(seed, bad):
    """Whatever they hold, to the bit."""
    (q, *keys), law = single(operands(seed))
    mask = np.random.default_rng(seed).random((BATCH, KEYS)) < 0.6
    g = single(normal(seed, *q.shape))

    def broken(x):
        x = x.copy()
        x[~mask] = bad
        return x

    others = (*law.values(), single(NO_SINK))
    clean, dirty = (pulled((q, *x, *others), mask, g, False) for x in (keys, map(broken, keys)))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not any(np.asarray(d)[~mask].any() for d in dirty[1][1:4])


def test_a_bad_query_stays_alone():
    """A NaN in one query or its sink reaches no other output and no gradient of a key, nor what produced it."""
    arrays, law = single(operands(0))
    vacuum = single(normal(4, BATCH, LENGTH, HEADS))
    others = np.arange(LENGTH) != 1
    g = np.broadcast_to(np.float32(others)[:, None, None], arrays[0].shape)
    value, expected = pulled((*arrays, *law.values(), vacuum), EVERY, g, False)
    for bad_q, bad_vacuum in ((True, False), (False, True)):
        q, sink = arrays[0].copy(), vacuum.copy()
        q[:, 1] = np.nan if bad_q else 0
        sink[:, 1] = np.nan if bad_vacuum else 0
        found, gradients = pulled((q, *arrays[1:], *law.values(), sink), EVERY, g, False)
        close(found[:, others], value[:, others])
        jax.tree.map(close, gradients[1:4], expected[1:4])
        assert np.isfinite(gradients[0]).all()


# The module.


def fresh(**options):
    return attn_jax.build("gravitational", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def build(**options):
    module = fresh(**options)
    params = nnx.state(module, nnx.Param)
    # Away from the start, where all masses are 1.
    leaves, tree = jax.tree.flatten(params)
    leaves = [np.asarray(p) + 0.3 * single(normal(n, *p.shape)) for n, p in enumerate(leaves)]
    nnx.update(module, jax.tree.unflatten(tree, leaves))
    return module


VARIANTS = [
    {"field": "vacuum"},
    {"field": "potential"},
    {"field": "normalised"},
    {"field": "vacuum", "form": "features", "num_features": 12, "softening": 2.0},
    {"field": "normalised", "form": "features", "num_features": 12, "softening": 2.0},
]


def values_of(module):
    """Parameters by name, and draws, in float64."""
    return {"/".join(map(str, path)): np.float64(v[...]) for path, v in nnx.to_flat_state(nnx.state(module))}


def softplus(x):
    return np.log1p(np.exp(x))


def module_operands(p, x):
    def heads(name):
        return (x @ p[f"{name}/kernel"]).reshape(*x.shape[:2], HEADS, WIDTH)

    def log_mass(name):
        return np.log(softplus(x @ p[f"{name}/kernel"] + p[f"{name}/bias"]))

    law = {"power": softplus(p["raw_power"]), "softening": softplus(p["raw_softening"])}
    strength = p["log_g"] + log_mass("query_mass") if "log_g" in p else None
    return (heads("query"), heads("key"), heads("value"), log_mass("key_mass")), law, strength


def module_definition(module, p, x, mask):
    arrays, law, strength = module_operands(p, x)
    field = {"vacuum": {"vacuum": None if strength is None else -strength}, "potential": {"strength": strength}}
    options = law | field.get(module.field, {}) | {"mask": mask, "causal": module.causal}
    if module.form == "features":
        o, share = features_definition(p, *arrays, **options)
    else:
        o, share = definition(*arrays, **options)
    return np.where(mask[..., None], o.reshape(x.shape) @ p["out/kernel"], 0), share


def features_definition(p, q, k, v, log_mass, *, power, softening, vacuum=None, mask=None, causal=False):
    """The quadratic evaluation of the same features, which are real numbers here and not logarithms."""

    def phi(x):
        y = x / np.sqrt(WIDTH)
        t = np.exp(p["log_rate"]) / softening[:, None] ** 2
        a = scipy.special.loggamma
        weight = np.exp(
            (power / 2 - p["shape"])[:, None] * p["log_rate"] + (a(p["shape"] + 0j) - a(power / 2 + 0j))[:, None]
        )
        weight = weight * softening[:, None] ** -power[:, None] / p["log_rate"].shape[1]
        z = np.sqrt(2 * t) * np.einsum("blhe,fe->blhf", y, p["directions"]) - 2 * t * (y**2).sum(-1)[..., None]
        features = np.sqrt(weight) * np.exp(z)
        return features + 1e-6 * features.mean(-1, keepdims=True)

    weights = np.einsum("blhf,bmhf->bhlm", phi(q), phi(k)) * np.exp(log_mass).transpose(0, 2, 1)[:, :, None]
    weights = weights * (1 if mask is None else mask[:, None, None]) * (np.tri(q.shape[1]) if causal else 1)
    sink = 0 if vacuum is None else np.exp(vacuum).transpose(0, 2, 1)
    total = weights.sum(-1) + sink
    out = np.einsum("bhlm,bmhe->blhe", weights / np.where(total != 0, total, 1)[..., None], v)
    return out, (sink / np.where(total != 0, total, 1)).swapaxes(1, 2)


def tokens(seed=0, length=9):
    """With a mask that leaves the first query of the second sequence nothing to read, if causal."""
    x = single(normal(seed, BATCH, length, DIM))
    return x, np.arange(BATCH * length).reshape(BATCH, length) % 4 > 0


def call(module, x, mask, g):
    """The output, losses and metrics, and what `g` is pulled back to: cotangents of the parameters and of `x`."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return called(graph, params, rest, x, mask, g)


@functools.partial(jax.jit, static_argnums=0)
def called(graph, params, rest, x, mask, g):
    def loss(params, x):
        module = nnx.merge(graph, params, rest)
        y = module(x, mask=mask)
        return jnp.sum(y * g), (y, attn_jax.pop_aux(module))

    (_, (y, aux)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, aux, gradients


@nnx.jit
def read(module, x, mask):
    """The weights, and the share of the vacuum where there is one."""
    sink = module.sink_share(x, mask=mask) if module.field == "vacuum" else None
    return module.attention_weights(x, mask=mask), sink


@pytest.mark.parametrize("number,causal", [(0, False), (1, True), (2, False), (3, False), (4, True)])
def test_the_module_is_its_definition(number, causal):
    """Values, weights, the share of the vacuum, and the derivative by every parameter along a random direction.

    Masked tokens hold NaN here and do not exist there.
    """
    module, (x, mask) = build(**VARIANTS[number], causal=causal), tokens()
    g = single(normal(3, *x.shape))
    dirty = np.where(mask[..., None], x, np.nan).astype(np.float32)
    y, (losses, metrics), (gradients, dx) = call(module, dirty, mask, g)
    weights, sink = read(module, dirty, mask)
    assert np.isfinite(dx).all() and not np.asarray(dx)[~mask].any()

    p, clean = values_of(module), np.where(mask[..., None], np.float64(x), 0)
    expected, share = module_definition(module, p, clean, mask)
    close(y, expected, MODULE)
    assert not losses
    if module.field == "vacuum":
        assert metrics.keys() == {"vacuum_share"}
        close(metrics["vacuum_share"], share[mask].mean(), MODULE)
        close(sink, np.where(mask[:, None], share.transpose(0, 2, 1), 0), MODULE)
    else:
        assert not metrics

    assert not weights[~np.broadcast_to(mask[:, None, None], weights.shape)].any()
    (_, _, v, _), _, _ = module_operands(p, clean)
    o = np.einsum("bhlm,bmhe->blhe", np.float64(weights), v).reshape(x.shape)
    close(o @ p["out/kernel"], expected, MODULE)

    for n, (path, gradient) in enumerate(nnx.to_flat_state(gradients)):
        name = "/".join(map(str, path))
        along = normal(n, *gradient.shape)
        derivative = oracles.derivative(
            lambda array, name=name: (module_definition(module, p | {name: array}, clean, mask)[0] * g).sum(),
            p[name],
            along,
        )
        assert abs(derivative) > 1e-4, f"{name} has no influence"
        close((gradient[...] * along).sum(), derivative, 10 * MODULE)  # sums over all tokens


@pytest.mark.parametrize("number", [1, 3, 4])
def test_every_variant_decodes_and_does_not_see_the_future(number):
    """Besides the default one, of which the conformance suite takes care, and its like without a sink."""
    module, (x, mask) = build(**VARIANTS[number], causal=True), tokens()
    g = np.zeros_like(x)
    g[:, 4] = 1
    y, _, (_, dx) = jax.device_get(call(module, x, np.ones_like(mask), g))
    assert not dx[:, 5:].any() and (np.abs(dx[:, :5]).max(-1) > 0).all()
    cache, step = module.init_cache(BATCH, x.shape[1]), jax.jit(module.step)
    for t in range(x.shape[1]):
        y_t, cache = step(x[:, t : t + 1], cache)
        close(y_t[:, 0], y[:, t], MODULE)


@pytest.mark.parametrize("causal", [False, True])
def test_the_normalised_field_is_the_source_without_what_cancels(causal):
    """`G m'_i m_j / (|q_i - k_j|^2 + 1e-8)` over its sum, whatever `G` and `m'` are."""
    softening = (1e-8 / WIDTH) ** 0.5
    module = fresh(causal=causal, field="normalised", softening=softening, implementation="dense")
    module.key_mass.kernel[...] = single(0.3 * normal(1, DIM, HEADS))
    (x, mask), p = tokens(), values_of(module)
    (q, k, v, log_mass), _, _ = module_operands(p, np.float64(x))
    own_mass, g = np.exp(normal(2, BATCH, x.shape[1], HEADS)), np.exp(normal(3, HEADS))
    distance_sq = ((q[:, :, None] - k[:, None]) ** 2).sum(-1)
    attraction = g * own_mass[:, :, None] * np.exp(log_mass)[:, None] / (distance_sq + 1e-8)
    attraction *= mask[:, None, :, None] * (np.tri(x.shape[1])[..., None] if causal else 1)
    weights = attraction / (attraction.sum(2, keepdims=True) + 1e-8)
    o = np.einsum("blmh,bmhe->blhe", weights, v).reshape(x.shape)
    close(jax.jit(lambda x: module(x, mask=mask))(x), np.where(mask[..., None], o @ p["out/kernel"], 0), MODULE)


def test_how_it_starts():
    """Masses and G of 1, the inverse square law at a softening of 1, or what the options say."""
    module = fresh()
    p, (x, _) = values_of(module), tokens()
    (_, _, _, log_mass), law, strength = module_operands(p, x)
    for actual, expected in ((log_mass, 0), (strength, 0), (law["power"], 2), (law["softening"], 1)):
        close(actual, np.full(actual.shape, expected))
    other = fresh(power=5.5, softening=0.01)
    for name, expected in (("raw_power", 5.5), ("raw_softening", 0.01)):
        np.testing.assert_allclose(softplus(values_of(other)[name]), expected, rtol=FLOAT32)


@pytest.mark.parametrize("z", [-200.0, -30.0, -5.0, 0.0, 50.0])
def test_masses_that_underflow_have_a_logarithm_and_a_gradient(z):
    value, gradient = jax.value_and_grad(log_softplus)(jnp.float32(z))
    close(value, np.log(softplus(z)))
    close(gradient, 1 / (1 + np.exp(-z)) / softplus(z))


@pytest.mark.parametrize(
    "options,parameters",
    [
        ({}, 4 * DIM**2 + 2 * (DIM + 1) * HEADS + 3 * HEADS),
        ({"field": "potential"}, 4 * DIM**2 + 2 * (DIM + 1) * HEADS + 3 * HEADS),
        ({"field": "normalised"}, 4 * DIM**2 + (DIM + 1) * HEADS + 2 * HEADS),
        ({"field": "normalised", "form": "features"}, 4 * DIM**2 + (DIM + 1) * HEADS + 2 * HEADS),
    ],
)
def test_parameters(options, parameters):
    """Power, softening and masses; G and the query's mass only where they do not cancel; draws are none."""
    params = nnx.state(nnx.eval_shape(lambda: fresh(**options)), nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(params)) == parameters


# The linear-time form. Above it equals, with its gradients, the quadratic evaluation of the same features.


def estimates(features, power, softening, shape, q, k):
    """`phi(q) phi(k)` of every feature, whose mean is to be the kernel."""
    directions = normal(0, features, WIDTH)
    log_rate = np.log(np.random.default_rng(1).gamma(shape, size=(1, features)))
    with jax.enable_x64(True):
        law = (np.array([x]) for x in (shape, power, softening))
        parameters = [p[0] for p in _feature_parameters(directions, log_rate, *law)]
        tokens = np.stack([np.append(x, [0.0, -1e30]) for x in (q, k)])
        log_scale, phi = jax.device_get(jax.jit(_random_features)(tokens, tuple(parameters)))
    phi = phi[:-1] * np.exp(log_scale)
    return features * phi[:, 0] * phi[:, 1]


@pytest.mark.parametrize("power,shape", [(2.0, 1.0), (3.0, 1.0), (1.8, 1.0)])
def test_the_kernel_is_unbiased_and_its_variance_is_the_formula(power, shape):
    """Also where the draws are from another power: with `a = p/2`, `b` the shape of the draws and `c = 8 q.k / (E
    eps^2)`, the second moment is `eps^-2p Gamma(b) Gamma(2a - b) / Gamma(a)^2 (1 - c)^(b - 2a)`.
    """
    features, softening = 400_000, 2.0
    q, k = 0.25 * normal(2, 2, WIDTH)
    exact = (((q - k) ** 2).sum() / WIDTH + softening**2) ** (-power / 2)
    a, c = power / 2, 8 * (q @ k) / WIDTH / softening**2
    # The fourth moment, which the estimate of the variance needs, exists too.
    assert 8 * ((q + k) ** 2 + 2 * q * k).sum() / WIDTH < softening**2 and 4 * a > 3 * shape
    gammaln = scipy.special.gammaln
    moment = np.exp(gammaln(shape) + gammaln(2 * a - shape) - 2 * gammaln(a)) * (1 - c) ** (shape - 2 * a)
    variance = softening ** (-2 * power) * moment - exact**2
    found = estimates(features, power, softening, shape, q, k)
    # Five standard errors; and the floor, 1e-6 of the mean feature in each of two factors.
    assert abs(found.mean() - exact) < 5 * np.sqrt(variance / features) + 3e-6 * exact
    np.testing.assert_allclose(found.var(), variance, rtol=0.05)  # heavy tails: about 1 % expected at this size


def test_redraw_draws_for_the_power_as_it_is():
    module = build(form="features", num_features=12)
    before = values_of(module)
    module.redraw(nnx.Rngs(1))
    after = values_of(module)
    assert all(np.abs(after[name] - before[name]).max() > 0.01 for name in ("directions", "log_rate", "shape"))
    close(after["shape"], softplus(after["raw_power"]) / 2)


def test_large_inputs_are_read_and_have_finite_gradients():
    """Where the features of queries and keys do not overlap in float32, and no sink is there to be read."""
    module, (x, mask) = build(field="normalised", form="features", num_features=12, causal=True), tokens()
    module.log_rate[...] = np.zeros_like(module.log_rate[...])  # else the lowest rate is the overlap
    every = np.ones_like(mask)
    weights, _ = read(module, 300 * x, every)
    close(weights.sum(-1), np.ones(weights.shape[:3]))
    _, _, (_, gradient) = call(module, 300 * x, every, x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"field": "electric"}, "`field` must be one of vacuum, potential, normalised, got 'electric'"),
        ({"form": "fast"}, "`form` must be one of exact, features, got 'fast'"),
        ({"power": "cubic"}, "`power` must be a positive number, got 'cubic'"),
        ({"softening": 0.0}, "`softening` must be a positive number, got 0.0"),
        ({"form": "features", "field": "potential"}, "form='features' takes field='vacuum' or 'normalised'"),
        ({"form": "features", "implementation": "xla"}, "`implementation` is for form='exact'"),
        ({"num_features": 8}, "`num_features` is for form='features'"),
        ({"form": "features", "num_features": 0}, "`num_features` must be a positive integer, got 0"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^gravitational: {message}"):
        fresh(**options)


def test_what_another_field_or_form_has_raises():
    with pytest.raises(ValueError, match="field='normalised' has no sink"):
        build(field="normalised").sink_share(tokens()[0])
    with pytest.raises(ValueError, match="form='exact' has no random features"):
        build().redraw(nnx.Rngs(0))
