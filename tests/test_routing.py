"""Routers that learn from what their choice does to a ranking."""

import functools
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax.mechanisms import maw_exploration as exploration
from attn_jax.mechanisms.maw import AssignedDepth, MultiAttentionWeight
from attn_jax.models import Reranker
from train.tasks import rerank, routing

QUERIES, CANDIDATES, LENGTH, DEPTH = 2, 3, 5, 4
TAUGHT = [method for method in get_args(routing.Method) if method != "straight_through"]


def likelihood(scores, grades, mask):
    return -rerank.listwise_loss(scores, grades > 0, mask)


def batch():
    random = np.random.default_rng(0)
    tokens = random.integers(3, 20, (QUERIES, CANDIDATES, LENGTH))
    grades = np.eye(1, CANDIDATES, dtype=np.int32).repeat(QUERIES, 0)
    mask = np.arange(CANDIDATES) < np.array([[3], [2]])
    return tokens, grades, mask


def reranker(num_layers=1, critic=False, **options):
    return Reranker(
        vocab_size=20, dim=8, num_heads=2, num_layers=num_layers, mechanism="maw",
        options={"depth": DEPTH, "straight_through": False, "router_dropout": 0.0, "alpha": 3.0} | options,
        critic_dim=128 if critic else None, rngs=nnx.Rngs(0),
    )  # fmt: skip


def call(tokens):
    return lambda model: model(tokens)


@nnx.jit(static_argnums=2)
def explored(model, depths, layer):
    """The route and the scores of the policy, and the scores of `depths`."""
    tokens, _, _ = batch()
    return *exploration.policy(model, call(tokens), layer), exploration.explore(model, call(tokens), layer, depths)


def test_the_loss_is_that_of_the_relevant_candidates_together():
    scores, relevant = np.array([[1.0, 2.0, 0.5, 9.0]]), np.array([[True, False, True, True]])
    mask = np.array([[True, True, True, False]])
    p = np.exp(scores[0, :3]) / np.exp(scores[0, :3]).sum()
    found = jax.jit(rerank.listwise_loss)(scores, relevant, mask)
    np.testing.assert_allclose(found, [-np.log(p[0] + p[2])], rtol=1e-6)


counterfactual = jax.jit(functools.partial(routing.counterfactual, likelihood))


def test_a_counterfactual_changes_one_score_of_one_list():
    random = np.random.default_rng(0)
    scores, tried = random.normal(size=(QUERIES, CANDIDATES)), random.normal(size=(DEPTH, QUERIES, CANDIDATES))
    _, grades, mask = batch()
    found = np.asarray(counterfactual(scores, tried, grades, mask))
    judge = jax.jit(likelihood)
    before = np.asarray(judge(scores, grades, mask))
    for b, c, g in np.ndindex(QUERIES, CANDIDATES, DEPTH):
        changed = scores.copy()
        changed[b, c] = tried[g, b, c]
        after = np.asarray(judge(changed, grades, mask))
        np.testing.assert_allclose(found[b, c, g], (after - before)[b], atol=1e-5)  # float32 logarithms around 1
    assert not found[~mask].any()  # a candidate that is none changes nothing


@functools.cache
def taught(method):
    """The gradients by path, and the mean reward."""
    model = reranker(critic=method == "actor_critic")
    tokens, grades, mask = batch()

    @nnx.jit
    def gradient(model):
        def loss(model):
            critic = None if model.critic is None else lambda state: model.critic(state)[:, 0]
            made, metrics = routing.router_loss(
                model,
                call(tokens),
                grades,
                mask,
                likelihood,
                key=jax.random.key(1),
                method=method,
                group=4,
                critic=critic,
            )
            return made, metrics["router_reward"]

        return nnx.grad(loss, has_aux=True)(model)

    found, mean = gradient(model)
    return dict(nnx.to_flat_state(found)), float(mean)


@pytest.mark.parametrize("method", TAUGHT)
def test_a_router_loss_teaches_the_router_alone(method):
    found = {path: np.abs(np.asarray(value[...])).max() for path, value in taught(method)[0].items()}
    assert all(np.isfinite(size) for size in found.values())
    for path, size in found.items():
        of_router = "router" in path or "critic" in path
        # The source's ranking term reaches the scores, from which it is detached here: see `router_loss`.
        assert of_router or size == 0, path
    assert max(size for path, size in found.items() if "state_out" in path) > 0


def test_equal_depths_have_no_reward_and_no_gradient():
    _, grades, mask = batch()
    depths = np.broadcast_to(np.arange(DEPTH), (QUERIES * CANDIDATES, DEPTH))
    _, scores, tried = explored(reranker(projections="tied"), depths, 0)
    np.testing.assert_array_equal(tried[1:], tried[:-1])
    rewards = counterfactual(scores, tried, grades, mask)
    np.testing.assert_allclose(rewards, 0, atol=1e-6)  # two programs round differently


def test_exploring_a_layer_leaves_the_model_and_the_other_layers_alone():
    model = reranker(num_layers=2)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    every = np.broadcast_to(np.arange(2), (QUERIES * CANDIDATES, 2))
    greedy = np.argmax(explored(model, every, 1)[0].logits, axis=1)
    route = np.stack([greedy, (greedy + 1) % DEPTH], axis=1)
    _, scores, (same, other) = jax.device_get(explored(model, route, 1))
    np.testing.assert_allclose(same, scores, atol=1e-5)  # the depth that is taken anyway; another program
    assert np.abs(other - scores).min() > 1e-4
    assert [layer.assigned for layer in exploration.layers(model)] == [None, None]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


entropies = nnx.jit(routing.row_entropies)


def test_the_entropy_of_a_row_is_that_of_its_weights():
    """Against the dense five-dimensional tensor, with padding."""
    layer = reranker().encoder.transformer.blocks[0].attention
    lengths = np.array([[LENGTH], [3], [1], [4], [2], [LENGTH]])
    x = np.random.default_rng(0).normal(size=(QUERIES * CANDIDATES, LENGTH, 8)).astype(np.float32)
    mask = np.arange(LENGTH) < lengths
    weights = nnx.jit(lambda layer, x: layer.depth_weights(x, mask=mask))(layer, x)  # (B, H, depth, L, L)
    weights = np.asarray(weights, np.float64)
    entropy = -np.sum(weights * np.log(np.maximum(weights, 1e-300)), axis=-1)
    rows = (entropy.mean(axis=1) * mask[:, None]).sum(-1) / mask.sum(1, keepdims=True)
    expected = rows / np.log(np.maximum(mask.sum(1, keepdims=True), 2))
    # float32: a difference of two numbers around 3
    np.testing.assert_allclose(entropies(layer, x, mask), expected, atol=1e-5)
    layer.query.kernel[...], layer.query.down[...] = 0 * layer.query.kernel[...], 0 * layer.query.down[...]
    flat = np.repeat(lengths > 1, DEPTH, axis=1)
    np.testing.assert_allclose(entropies(layer, x, mask), flat, atol=1e-5)


def reward(**weights):
    tokens, grades, mask = batch()
    made = functools.partial(routing.router_loss, key=jax.random.key(1), method="exact", **weights)
    judged = nnx.jit(lambda model: made(model, call(tokens), grades, mask, likelihood)[1]["router_reward"])
    return float(judged(reranker()))


@nnx.jit
def read(model):
    """The scores, and what each layer reads."""
    with routing.watched(model) as seen:
        scores = call(batch()[0])(model)
    attn_jax.pop_aux(model)
    return scores, seen()


def test_entropy_and_alignment_are_added_to_the_reward():
    _, grades, mask = batch()
    model = reranker()
    _, (seen,) = read(model)
    assert isinstance(model.encoder.transformer.blocks[0].attention, MultiAttentionWeight), "it is put back"
    flat = np.asarray(entropies(model.encoder.transformer.blocks[0].attention, *seen)).mean(1)
    flat, real = flat[mask.ravel()], (grades > 0).ravel()[mask.ravel()]
    _, base = taught("exact")
    # Every depth is tried once by "exact", so the means over depths are what is added; float32 sums.
    assert reward(entropy_weight=0.5) - base == pytest.approx(-0.5 * flat.mean(), abs=1e-5)
    assert reward(alignment_weight=0.5) - base == pytest.approx(0.5 * (real * (1 - flat)).mean(), abs=1e-5)


def test_the_depths_that_are_counted_are_those_that_are_taken():
    model = reranker(num_layers=2)
    decide = nnx.jit(lambda layer, seen: routing.decisions(layer, *seen).argmax(1))
    take = nnx.jit(lambda model: call(batch()[0])(model))
    scores, seen = read(model)
    first, last = exploration.layers(model)
    depths = [decide(layer, own) for layer, own in zip((first, last), seen, strict=True)]
    first.assigned, last.assigned = map(AssignedDepth, depths)
    np.testing.assert_allclose(take(model), scores, atol=1e-6)  # the same program but for the router
    last.assigned = AssignedDepth((depths[1] + 1) % DEPTH)
    assert np.abs(take(model) - scores).max() > 1e-4


def test_settings_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match=r"task.router.method must be one of .*grpo.*, got 'ppo'"):
        routing.check("maw", "ppo", "ndcg")
    with pytest.raises(ValueError, match="`grpo` teaches the routers of `maw`, and standard has none"):
        routing.check("standard", "grpo", "ndcg")
    with pytest.raises(ValueError, match="straight_through=False leaves nothing"):
        reranker(selection="soft")
