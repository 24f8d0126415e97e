"""Multi-attention-weight attention: slices, selection and the gradient of the route; what teaches the router."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_jax
from attn_jax.mechanisms import maw_router
from attn_jax.mechanisms.maw import Projections
from attn_jax.mechanisms.maw_router import Estimator, landmarks, policy_loss, sample_depths, straight_through
from tests import oracles

# float32 sums of some dozen terms in another order, through projections of width 16, values around 1.
FLOAT32 = 5e-5
# float32 losses of a few terms around 1.
LOSS = 1e-5

BATCH, LENGTH, HEADS, WIDTH, DEPTH = 3, 11, 2, 8, 4
DIM = HEADS * WIDTH

every_projection = pytest.mark.parametrize("projections", get_args(Projections))


def close(actual, expected, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(seed=0):
    return normal(seed, BATCH, LENGTH, DIM)


def masks(seed=0):
    mask = np.random.default_rng(seed).random((BATCH, LENGTH)) < 0.7
    mask[:, 0] = True
    return mask


def build(**options):
    # "dense" compiles fast; that the tiled path agrees with it is a law of the conformance suite.
    options = {"depth": DEPTH, "implementation": "dense"} | options
    return attn_jax.build("maw", dim=DIM, num_heads=HEADS, rngs=nnx.Rngs(0), **options)


def standard(module, query, key, x, mask):
    """Standard attention with those kernels and the values and outputs of `module`."""
    other = attn_jax.build("standard", dim=DIM, num_heads=HEADS, implementation="dense", rngs=nnx.Rngs(1))
    other.query.kernel[...], other.key.kernel[...] = query, key
    other.value.kernel[...], other.out.kernel[...] = module.value.kernel[...], module.out.kernel[...]
    return attend(other, x, mask)


def fetched(f):
    """`f` in one program, with NumPy arrays as results."""
    compiled = nnx.jit(f)
    return lambda *arguments: jax.device_get(compiled(*arguments))


attend = fetched(lambda module, x, mask: module(x, mask=mask))


@fetched
def call(module, x, mask=None, depth=None):
    y = module(x, mask=mask, depth=depth)
    attn_jax.pop_aux(module)
    return y


@fetched
def analyse(module, x, mask):
    """Output, logits, weights, and those of all depths."""
    y, logits = module(x, mask=mask), module.route(x, mask=mask).logits
    attn_jax.pop_aux(module)
    return y, logits, module.attention_weights(x, mask=mask), module.depth_weights(x, mask=mask)


route = fetched(lambda module, x, mask=None: module.route(x, mask=mask))


# The definition, in NumPy and float64.


def kernels(projection):
    """`(depth, D, D)`."""
    kernel = np.float64(projection.kernel[...])
    if projection.down is not None:
        kernel = kernel + np.float64(projection.down[...]) @ np.float64(projection.up[...])
    return np.broadcast_to(kernel, (projection.depth, DIM, DIM))


def split_heads(x):
    return x.reshape(*x.shape[:-1], HEADS, WIDTH)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def five_dimensional(module, x, mask):
    """`A` `(B, H, depth, L, L)`."""
    q, k = (
        split_heads(np.einsum("bli,dij->bdlj", np.where(mask[..., None], x, 0), kernels(p)))
        for p in (module.query, module.key)
    )
    z = np.einsum("bdlhe,bdmhe->bhdlm", q, k) / np.sqrt(WIDTH)
    weights = softmax(np.where(mask[:, None, None, None, :], z, -np.inf))
    return np.where(mask[:, None, None, :, None], weights, 0)


def outputs(module, x, weights):
    """Of weights `(B, H, L, L)`."""
    v = split_heads(x @ np.float64(module.value.kernel[...]))
    return np.einsum("bhlm,bmhe->blhe", weights, v).reshape(x.shape) @ np.float64(module.out.kernel[...])


def pooled(x):
    """8 means of the rows of `x`, by adaptive average pooling."""
    n = len(x)
    return np.stack([x[i * n // 8 : -(-(i + 1) * n // 8)].mean(0) if n else 0 * x.sum(0) for i in range(8)])


def router_logits(module, x):
    """`(depth,)` of one example without padding."""

    def linear(layer, x):
        return x @ np.float64(layer.kernel[...]) + (0 if layer.bias is None else np.float64(layer.bias[...]))

    q, k = (split_heads(pooled(x) @ kernels(p)) for p in (module.query, module.key))
    slices = 8 * softmax(np.einsum("dihe,djhe->dhij", q, k) / np.sqrt(WIDTH)) - 1
    slices = slices.reshape(module.depth, -1)
    router = module.router
    hidden = np.maximum(linear(router.state_in, slices.mean(0)), 0)
    hidden = np.maximum(linear(router.state_hidden, hidden), 0)
    own = linear(router.depth_out, np.maximum(linear(router.depth_in, slices), 0))[:, 0]
    return np.clip(linear(router.state_out, hidden) + own, -10, 10)


@every_projection
@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_equals_the_gather_from_the_five_dimensional_tensor(projections, seed):
    """Slices, logits, selected weights and output are the definition's; rows sum to 1 over real keys."""
    module, x, mask = build(projections=projections), tokens(seed), masks(seed)
    y, logits, selected, every = analyse(module, x, mask)
    weights = five_dimensional(module, x, mask)
    close(every, weights)
    close(every.sum(-1), np.broadcast_to(mask[:, None, None], every.shape[:-1]))
    assert (np.asarray(every)[~np.broadcast_to(mask[:, None, None, None], every.shape)] == 0).all()

    expected = np.stack([router_logits(module, row[real]) for row, real in zip(x, mask)])
    close(logits, expected)
    chosen = weights[np.arange(BATCH), :, expected.argmax(1)]
    close(selected, chosen)
    close(y, outputs(module, x, chosen))


def test_a_given_depth_replaces_the_route():
    module, x, mask = build(), tokens(), masks()
    weights = five_dimensional(module, x, mask)
    selected = fetched(lambda module, depth: module.attention_weights(x, mask=mask, depth=depth))
    for depth in itertools.islice(itertools.permutations(range(DEPTH), BATCH), 0, None, 5):
        chosen = weights[np.arange(BATCH), :, depth]
        close(call(module, x, mask, np.array(depth)), outputs(module, x, chosen))
        close(selected(module, np.array(depth)), chosen)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16))
def test_tied_depths_are_standard_attention_whatever_the_route(seed):
    module, x, mask = build(projections="tied"), tokens(seed), masks(seed)
    expected = standard(module, module.query.kernel[...], module.key.kernel[...], x, mask)
    module.router.state_out.bias[...] = normal(seed, DEPTH)
    close(call(module, x, mask), expected)
    close(call(module, x, mask, np.random.default_rng(seed).integers(0, DEPTH, BATCH)), expected)


@pytest.mark.parametrize("projections,selection", [("lowrank", "hard"), ("lowrank", "soft"), ("full", "hard")])
def test_one_depth_is_standard_attention(projections, selection):
    module, x, mask = build(depth=1, projections=projections, selection=selection), tokens(), masks()
    query, key = (kernels(p)[0].astype(np.float32) for p in (module.query, module.key))
    close(call(module, x, mask), standard(module, query, key, x, mask))


# Soft selection.


def test_soft_selection_is_the_mean_of_the_slices():
    """Values and, through the tiled calls, gradients."""
    module, x, mask = build(selection="soft", temperature=0.1, implementation="xla"), tokens(), masks()
    g = normal(1, BATCH, LENGTH, DIM)

    @functools.partial(nnx.jit, static_argnums=0)
    def gradient(f, module, x):
        return nnx.grad(f, argnums=(0, 1), has_aux=True)(module, x)

    def tiled(module, x):
        y, logits = module(x, mask=mask), module.route(x, mask=mask).logits
        return jnp.sum(g * y), (y, logits, module.attention_weights(x, mask=mask))

    actual, (y, logits, weights) = gradient(tiled, module, x)
    mean = np.einsum("bd,bhdlm->bhlm", softmax(np.float64(logits) / 0.1), five_dimensional(module, x, mask))
    close(weights, mean)
    close(y, outputs(module, x, mean))

    def by_slices(module, x):
        p = nnx.softmax(module.route(x, mask=mask).logits / 0.1)
        weights = jnp.einsum("bd,bhdlm->bhlm", p, module.depth_weights(x, mask=mask))
        o = jnp.einsum("bhlm,bmhe->blhe", weights, split_heads(module.value(jnp.where(mask[..., None], x, 0))))
        return jnp.sum(g * module.out(o.reshape(x.shape))), ()

    jax.tree.map(close, actual, gradient(by_slices, module, x)[0])


def test_soft_with_one_hot_weights_is_hard():
    hard, soft = (build(selection=selection, temperature=0.05) for selection in ("hard", "soft"))
    for chosen in range(DEPTH):
        for module in (hard, soft):  # logits of +-10, 400 temperatures apart
            module.router.state_out.bias[...] = np.where(np.arange(DEPTH) == chosen, 1e3, -1e3)
        x, mask = tokens(), masks()
        close(call(soft, x, mask), call(hard, x, mask))
        close(call(hard, x, mask), call(hard, x, mask, np.full(BATCH, chosen)))


# The straight-through route.


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_straight_through_is_exactly_one_hot_with_the_gradient_of_softmax(key):
    logits, g, temperature = normal(0, 50, DEPTH), normal(1, 50, DEPTH), 0.7

    @jax.jit
    def run(logits, g):
        hard, pull = jax.vjp(lambda z: straight_through(z, key, temperature), logits)
        return hard, *pull(g)

    hard, gradient = run(logits, g)
    noisy = logits if key is None else logits + np.asarray(jax.random.gumbel(key, logits.shape))
    np.testing.assert_array_equal(hard, np.eye(DEPTH)[noisy.argmax(1)])
    p = softmax(np.float64(noisy) / temperature)
    close(gradient, p * (g - (p * g).sum(1, keepdims=True)) / temperature)


def test_in_training_the_route_is_a_sample_of_the_policy():
    """Frequencies within five standard errors; another call draws others; evaluation draws nothing."""
    module, samples = build(), 20_000
    logits = normal(0, 1, DEPTH)
    many, choose = np.broadcast_to(logits, (samples, DEPTH)), fetched(lambda router, z: router.choose(z))
    expected = softmax(np.float64(logits[0]))
    module.train()
    first, second = choose(module.router, many), choose(module.router, many)
    assert (first != second).any()
    assert (np.abs(first.mean(0) - expected) < 5 * np.sqrt(expected * (1 - expected) / samples)).all()
    module.eval()
    np.testing.assert_array_equal(choose(module.router, many), np.eye(DEPTH)[[logits[0].argmax()] * samples])


@pytest.mark.parametrize("projections", ["lowrank", "full"])
def test_the_router_gets_the_gradient_of_the_mixture_of_projections(projections):
    """dL/dz = (diag(p) - p p^T) dL/dw / T, with dL/dw by complex steps through sum_d w_d Q^d and K^d."""
    temperature = 0.5
    module, mask = build(projections=projections, temperature=temperature), masks()
    x, g = tokens(), normal(1, BATCH, LENGTH, DIM)

    @fetched
    def run(module):
        grads = nnx.grad(lambda module: jnp.sum(g * module(x, mask=mask)))(module)
        # The other gradients need not be compiled.
        return module.route(x, mask=mask).logits, grads["router"]["state_out"]["bias"][...]

    logits, gradient = run(module)
    keys, queries = (np.einsum("bli,dij->bdlj", np.float64(x), kernels(p)) for p in (module.key, module.query))
    v = split_heads(x @ np.float64(module.value.kernel[...]))
    p = softmax(np.float64(logits) / temperature)

    def loss(w):
        q, k = (split_heads(np.einsum("bd,bdlj->blj", w, y)) for y in (queries, keys))
        o, _, _ = oracles.softmax_attention(q, [oracles.Stream(k, v, mask)], scale=WIDTH**-0.5)
        y = np.where(mask[..., None], o.reshape(x.shape) @ np.float64(module.out.kernel[...]), 0)
        return (g * y).sum((1, 2))

    one_hot = np.eye(DEPTH)[p.argmax(1)]
    d_w = np.stack([oracles.derivative(loss, one_hot, np.eye(DEPTH)[[d] * BATCH]) for d in range(DEPTH)], axis=1)
    d_z = p * (d_w - (p * d_w).sum(1, keepdims=True)) / temperature
    assert np.abs(d_z).max() > 0.1
    # The last bias adds to the logits of every example.
    close(gradient, d_z.sum(0))


def test_a_tied_router_gets_no_gradient():
    module, x = build(projections="tied"), tokens()

    @fetched
    def gradient(module):
        return nnx.grad(lambda module: jnp.sum(jnp.sin(module(x))))(module)["router"]

    assert all((g == 0).all() for g in jax.tree.leaves(gradient(module)))


def test_the_router_ignores_masked_tokens_wherever_they_are():
    """Padding, gaps and what they hold: logits are those of the real tokens alone."""
    module, x, mask = build(), tokens(), masks(5)
    assert not mask[:, :-1].all()
    dirty = np.where(mask[..., None], x, np.nan)
    logits = route(module, dirty, mask).logits
    padded, number = np.zeros((BATCH, LENGTH + 9, DIM), np.float32), mask.sum(1)
    for b in range(BATCH):
        padded[b, : number[b]] = x[b, mask[b]]
        close(logits[b], router_logits(module, x[b, mask[b]]))
    close(logits, route(module, padded, np.arange(LENGTH + 9) < number[:, None]).logits)
    close(logits[0], route(module, x[:1, mask[0]]).logits[0])


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 9, 16, 29])
def test_landmarks_are_adaptive_means_of_real_tokens(length):
    x = normal(0, 1, 40, DIM)
    mask = np.zeros((1, 40), bool)
    mask[0, np.random.default_rng(0).choice(40, length, replace=False)] = True
    close(jax.jit(landmarks)(x, mask)[0], pooled(x[mask]), LOSS)


# What is recorded.


def test_metrics_and_the_routing_loss():
    module, mask, weight = build(entropy_weight=0.01), masks(), 0.01
    x = tokens()
    mask[1] = False  # no token, no vote

    def run(module, x, mask):
        module(x, mask=mask)
        return attn_jax.pop_aux(module), module.route(x, mask=mask).logits

    (losses, metrics), logits = fetched(run)(module, x, mask)
    logits = np.float64(logits)[[0, 2]]
    p, use = softmax(logits), np.bincount(logits.argmax(1), minlength=DEPTH) / 2
    entropy = -(p * np.log(p)).sum(1).mean()
    assert metrics.keys() == {"chosen_depth", "router_entropy", "depth_perplexity"}
    close(metrics["chosen_depth"], logits.argmax(1).mean())
    close(metrics["router_entropy"], entropy)
    close(metrics["depth_perplexity"], np.exp(-(use * np.log(np.where(use > 0, use, 1))).sum()))
    assert losses.keys() == {"routing"}
    close(losses["routing"], -weight * entropy)

    @fetched
    def gradients(module):
        def recorded(module, which):
            module(x)
            return sum(attn_jax.pop_aux(module)[which].values())

        return [nnx.grad(functools.partial(recorded, which=which))(module)["router"] for which in (0, 1)]

    trains, reports = gradients(module)
    assert all((g != 0).any() for g in jax.tree.leaves(trains))
    assert all((g == 0).all() for g in jax.tree.leaves(reports))
    assert not jax.eval_shape(lambda: run(build(), x, mask)[0][0])


# Objectives. Expectations over samples are exact: all groups are enumerated and weighted by their probability.


def expected_gradient(loss, logits, group):
    """Of `loss(logits, depths (1, G))` over groups sampled from `softmax(logits)`, `logits` `(1, depth)`."""
    groups = np.array(list(itertools.product(range(logits.shape[1]), repeat=group)))
    probabilities = softmax(np.float64(logits[0]))[groups].prod(1)
    gradients = jax.jit(jax.vmap(lambda depths: jax.grad(loss)(logits, depths[None])))(groups)
    return np.einsum("g,gbd->bd", probabilities, gradients)


def exact_gradient(logits, rewards):
    """Of minus the expected reward."""
    p = softmax(np.float64(logits))
    return -p * (rewards - (p * rewards).sum(1, keepdims=True))


@pytest.mark.parametrize("group", [2, 3])
def test_a_group_mean_as_baseline_shrinks_the_policy_gradient_by_one_sample(group):
    logits, rewards = normal(0, 1, DEPTH), normal(1, 1, DEPTH)

    def loss(z, depths):
        of_group = jnp.take_along_axis(rewards, depths, axis=1)
        return policy_loss(z, logits, logits, depths, of_group, estimator="grpo", advantage="mean", kl_weight=0)

    expected = exact_gradient(logits, rewards)
    close(expected_gradient(loss, logits, group) * group / (group - 1), expected, LOSS)


def test_a_critic_does_not_bias_the_policy_gradient():
    logits, rewards, value = normal(0, 1, DEPTH), normal(1, 1, DEPTH), np.float32([0.7])

    def loss(z, depths):
        own = jnp.take_along_axis(rewards, depths, axis=1)
        weights = {"entropy_weight": 0, "kl_weight": 0}
        return policy_loss(z, logits, logits, depths, own, values=value, estimator="actor_critic", **weights)

    close(expected_gradient(loss, logits, 1), exact_gradient(logits, rewards), LOSS)


@pytest.mark.parametrize("detach_values,optimum", [(True, 0.3), (False, -0.7)])
def test_a_critic_that_the_policy_loss_trains_is_wrong_by_one(detach_values, optimum):
    """The critic's gradient on policy vanishes at the reward, or, in the source's form, one below it."""
    logits, depths, rewards = normal(0, 1, DEPTH), np.array([[2]]), np.float32([[0.3]])

    def loss(values):
        options = {"estimator": "actor_critic", "detach_values": detach_values}
        return policy_loss(logits, logits, logits, depths, rewards, values=values, **options)

    close(jax.jit(jax.grad(loss))(np.float32([optimum])), 0, LOSS)


def test_exact_loss_is_the_expected_reward():
    logits, reference, rewards = normal(0, 5, DEPTH), normal(1, 5, DEPTH), normal(2, 5, DEPTH)
    depths = sample_depths(jax.random.key(0), logits, estimator="exact")
    loss = jax.jit(functools.partial(policy_loss, estimator="exact"))
    gradient = jax.jit(jax.grad(functools.partial(policy_loss, estimator="exact")))
    p, r = softmax(np.float64(logits)), softmax(np.float64(reference))
    expected = -(p * rewards).sum(1).mean()
    close(loss(logits, logits, reference, depths, rewards), expected, LOSS)
    close(gradient(logits, logits, reference, depths, rewards), exact_gradient(logits, rewards) / 5, LOSS)
    actual = loss(logits, logits, reference, depths, rewards, kl_weight=0.2, entropy_weight=0.3)
    penalty = 0.2 * (p * np.log(p / r)).sum(1).mean() + 0.3 * (p * np.log(p)).sum(1).mean()
    close(actual, expected + penalty, LOSS)


def test_grpo_is_its_formula():
    """Off policy, so that ratios are clipped on either side."""
    logits, old, reference = normal(0, 6, DEPTH), normal(1, 6, DEPTH), normal(2, 6, DEPTH)
    depths, rewards = np.random.default_rng(3).integers(0, DEPTH, (6, 5)), normal(4, 6, 5)
    pi, pi_old, pi_reference = (
        np.take_along_axis(softmax(np.float64(z)), depths, 1) for z in (logits, old, reference)
    )
    gain = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    ratio, x = pi / pi_old, pi_reference / pi
    assert (ratio < 0.7).any() and (ratio > 1.3).any()
    surrogate = np.minimum(ratio * gain, np.clip(ratio, 0.7, 1.3) * gain)
    expected = (-surrogate + 0.2 * (x - np.log(x) - 1)).mean()
    options = {"estimator": "grpo", "clip": 0.3, "kl_weight": 0.2}
    loss = jax.jit(functools.partial(policy_loss, **options))
    close(loss(logits, old, reference, depths, rewards), expected, LOSS)


def test_actor_critic_is_its_formula():
    logits, old, reference, values = normal(0, 6, DEPTH), normal(1, 6, DEPTH), normal(2, 6, DEPTH), normal(3, 6)
    depths, rewards = np.random.default_rng(4).integers(0, DEPTH, (6, 1)), normal(5, 6, 1)
    p, p_old, p_reference = (softmax(np.float64(z)) for z in (logits, old, reference))
    ratio = np.take_along_axis(p / p_old, depths, 1)[:, 0]
    error = rewards[:, 0] - values
    kl, entropy = (p * np.log(p / p_reference)).sum(1), -(p * np.log(p)).sum(1)
    expected = (-ratio * error + 0.5 * error**2 - 0.01 * entropy + 0.1 * kl).mean()
    loss = jax.jit(functools.partial(policy_loss, estimator="actor_critic", values=values))
    close(loss(logits, old, reference, depths, rewards), expected, LOSS)


def test_nothing_is_learned_from_equal_rewards():
    """To the bit: a spread of rounding errors must not become advantages by division by their own size."""
    logits, depths = normal(0, 4, DEPTH), np.random.default_rng(1).integers(0, DEPTH, (4, 7))
    rewards = np.broadcast_to(np.float32([[0.1], [0.3], [1e3], [-7.7]]), depths.shape)
    gradient = fetched(jax.grad(functools.partial(policy_loss, estimator="grpo")))
    assert (gradient(logits, logits, logits, depths, rewards) == 0).all()


def test_samples_follow_the_policy():
    logits, draws = normal(0, 1, DEPTH), 20_000
    sample = fetched(functools.partial(sample_depths, estimator="actor_critic"))
    depths = sample(jax.random.key(0), np.broadcast_to(logits, (draws, DEPTH)))
    assert depths.shape == (draws, 1)
    expected = softmax(np.float64(logits[0]))
    frequencies = np.bincount(depths[:, 0], minlength=DEPTH) / draws
    assert (np.abs(frequencies - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)).all()
    group = functools.partial(sample_depths, estimator="grpo", group=6)
    assert jax.eval_shape(group, jax.random.key(0), logits).shape == (1, 6)


def test_supervised_loss_is_its_formula():
    logits, scores = normal(0, 4, DEPTH), normal(1, 4, 6)
    draw = np.random.default_rng(2)
    relevant, mask, targets = draw.random((4, 6)) < 0.5, draw.random((4, 6)) < 0.8, draw.integers(0, DEPTH, 4)
    relevant[3] = True  # no pair
    pairs = [
        max(0, 0.5 - scores[b, i] + scores[b, j])
        for b, i, j in itertools.product(range(4), range(6), range(6))
        if relevant[b, i] and not relevant[b, j] and mask[b, i] and mask[b, j]
    ]
    log_p = np.log(softmax(np.float64(logits)))
    expected = 0.7 * np.mean(pairs) - 0.3 * log_p[np.arange(4), targets].mean()
    dirty = np.where(mask, scores, np.nan)
    loss = jax.jit(functools.partial(maw_router.supervised_loss, mask=mask))
    close(loss(logits, targets, dirty, relevant), expected, LOSS)
    soft = fetched(maw_router.loss_targets)(normal(3, 4, DEPTH), 0.5)
    close(soft, softmax(-normal(3, 4, DEPTH) / 0.5), LOSS)
    close(loss(logits, soft, dirty, relevant, rank_weight=0), -(soft * log_p).sum(1).mean(), LOSS)
    assert loss(logits, targets, dirty, np.zeros_like(relevant), rank_weight=1) == 0
    assert np.isfinite(jax.jit(jax.grad(loss, argnums=2))(logits, targets, dirty, relevant)).all()


def test_the_relevant_count_rule():
    judgements = np.array([[1, 2, 1, 1], [0, 1, 3, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(maw_router.relevant_count_targets(judgements, DEPTH), [0, 0, 1, 2, 3])
    mask = np.arange(4) < 2
    masked = maw_router.relevant_count_targets(judgements, DEPTH, mask=np.broadcast_to(mask, (5, 4)))
    np.testing.assert_array_equal(masked, [1, 2, 2, 3, 3])
    with pytest.raises(ValueError, match="`depth` of at least 4, got 3"):
        maw_router.relevant_count_targets(judgements, 3)


# The planted task: the target is what depth 2 of the module gives, so depth 2 has the highest reward.

BEST, EXAMPLES = 2, 32


def planted():
    """A module, inputs, the target and the reward `(B, depth)` of each depth."""
    module, x = build(router_dropout=0.0), normal(7, EXAMPLES, LENGTH, DIM)
    target = call(module, x, None, np.full(EXAMPLES, BEST))
    return module, x, target, rewards_of(module, x, target)


def rewards_of(module, x, target):
    outputs = [call(module, x, None, np.full(EXAMPLES, d)) for d in range(DEPTH)]
    return np.stack([-np.square(y - target).mean((1, 2)) for y in outputs], axis=1)


def teach(module, objective, steps=150):
    """Adam on the router alone, of `objective(module, value, key)`; `value` is the prediction of a critic."""
    module.train()
    is_router = nnx.All(nnx.Param, nnx.PathContains("router"))
    graph, *state = nnx.split(module, is_router, ...)
    router, rest = map(nnx.as_pure, state)
    adam = optax.adam(0.01)

    def loss(learned, key):
        fresh = nnx.merge(graph, learned[0], rest)
        nnx.reseed(fresh, dropout=key)
        return objective(fresh, learned[1], key)

    @jax.jit
    def run(learned):
        def step(carry, key):
            learned, state = carry
            updates, state = adam.update(jax.grad(loss)(learned, key), state)
            return (optax.apply_updates(learned, updates), state), None

        return jax.lax.scan(step, (learned, adam.init(learned)), jax.random.split(jax.random.key(0), steps))[0][0]

    nnx.update(module, run((router, jnp.float32(0)))[0])
    module.eval()


def from_rewards(estimator, x, rewards, reference):
    def objective(module, value, key):
        logits = module.route(x).logits
        old = jax.lax.stop_gradient(logits)
        depths = sample_depths(key, old, estimator=estimator)
        values = jnp.broadcast_to(value, logits.shape[:1]) if estimator == "actor_critic" else None
        own = jnp.take_along_axis(rewards, depths, axis=1)
        return policy_loss(logits, old, reference, depths, own, estimator=estimator, values=values)

    return objective


@pytest.mark.parametrize("estimator", [*get_args(Estimator), "supervised", "straight-through"])
def test_every_way_of_teaching_finds_the_best_depth(estimator):
    module, x, target, rewards = planted()
    before = route(module, x).logits
    assert (rewards.argmax(1) == BEST).all()
    assert (before.argmax(1) == BEST).mean() < 0.5

    def supervised(module, value, key):
        targets = maw_router.loss_targets(-rewards, 0.1)
        scores = jnp.zeros((EXAMPLES, 1))
        return maw_router.supervised_loss(module.route(x).logits, targets, scores, scores > 0)

    def straight_through(module, value, key):
        return jnp.mean(jnp.square(module(x) - target))

    own = {"supervised": supervised, "straight-through": straight_through}
    teach(module, own.get(estimator) or from_rewards(estimator, x, rewards, before))
    assert (route(module, x).logits.argmax(1) == BEST).all()
    close(call(module, x), target)


def test_tied_depths_cannot_be_taught():
    """Every depth has the same reward, and the policy a gradient of exactly 0."""
    _, x, target, _ = planted()
    module = build(projections="tied")
    rewards, logits = rewards_of(module, x, target), route(module, x).logits
    assert (rewards == rewards[:, :1]).all() and (rewards < 0).all()
    for estimator in ("grpo", "exact"):
        depths = sample_depths(jax.random.key(0), logits, estimator=estimator)
        gradient = fetched(jax.grad(functools.partial(policy_loss, estimator=estimator)))
        own = np.take_along_axis(rewards, np.asarray(depths), axis=1)
        assert (gradient(logits, logits, logits, depths, own) == 0).all()


def test_a_route_can_depend_on_the_example():
    """Depth 1 for flat attention, depth 2 for peaked attention: what the landmarks see."""
    module, x = build(router_dropout=0.0), normal(7, EXAMPLES, LENGTH, DIM)
    best = np.arange(EXAMPLES) % 2 + 1
    x *= np.where(best == 1, 0.1, 2)[:, None, None]
    rewards = np.eye(DEPTH, dtype=np.float32)[best]
    teach(module, from_rewards("exact", x, rewards, route(module, x).logits))
    np.testing.assert_array_equal(route(module, x).logits.argmax(1), best)


# Errors.


@pytest.mark.parametrize(
    "options,message",
    [
        ({"projections": "scalar"}, "`projections` must be one of lowrank, full, tied, got 'scalar'"),
        ({"selection": "top2"}, "`selection` must be one of hard, soft, got 'top2'"),
        ({"depth": 0}, "`depth` must be a positive integer, got 0"),
        ({"rank": 1.5}, "`rank` must be a positive integer, got 1.5"),
        ({"temperature": 0.0}, "`temperature` must be a positive number, got 0.0"),
        ({"causal": True}, "causal=True is not supported"),
    ],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(ValueError, match=f"^maw: {message}"):
        build(**options)


@pytest.mark.parametrize(
    "depth,message",
    [
        (np.array([0, 1]), r"`depth` must have shape \(B,\) = \(3,\)"),
        (np.zeros(3), "`depth` must be integers, got dtype float64"),
        (np.array([0, DEPTH, 0]), r"`depth` must lie in 0..3, got \[0 4 0\]"),
    ],
)
def test_depths_that_do_not_fit_raise(depth, message):
    with pytest.raises(ValueError, match=f"^maw: {message}"):
        build()(tokens(), depth=depth)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"estimator": "ppo"}, "`estimator` must be one of grpo, actor_critic, exact, got 'ppo'"),
        ({"estimator": "actor_critic"}, "`values` go with estimator='actor_critic'"),
        ({"values": np.zeros(2)}, "`values` go with estimator='actor_critic'"),
        ({"old_logits": np.zeros((2, 3))}, r"`old_logits` must have shape \(B, depth\) = \(2, 4\)"),
        ({"rewards": np.zeros((2, 3))}, r"`rewards` must have shape \(B, G\) = \(2, 5\)"),
        ({"estimator": "exact"}, r"`rewards` must have shape \(B, depth\) = \(2, 4\)"),
        ({"advantage": "rank"}, "`advantage` must be 'std' or 'mean', got 'rank'"),
        ({"depths": np.zeros((2, 1), int), "rewards": np.zeros((2, 1))}, "a group needs at least 2 samples"),
    ],
)
def test_arguments_of_the_objectives_that_do_not_fit_raise(change, message):
    arguments = {name: np.zeros((2, DEPTH)) for name in ("logits", "old_logits", "reference_logits")}
    arguments |= {"depths": np.zeros((2, 5), int), "rewards": np.zeros((2, 5)), "estimator": "grpo"}
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments | change)
