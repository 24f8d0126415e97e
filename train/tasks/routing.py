"""Objectives that teach the routers of `maw` in a reranker, each from what its choice does to the ranking.

A cross-encoder scores pairs one by one, so what a depth is worth for a pair can be told exactly: all other scores
of its query stay, its own is replaced by the one of that depth, and the list is judged again. With the listwise
loss `l` (or nDCG@10) of a query's scores `s`

    r_d = l(s) - l(s with s_i of depth d)            of pair i, for each depth d that is tried

one layer at a time, a random one in each step (`attn_jax.mechanisms.maw_exploration`). The other parameters learn
from the listwise loss as ever, with the depths that the routers draw. Two more terms, off by default, look at the
attention itself, at `e_d`, the entropy of the rows of depth `d` relative to its largest (0 one key, 1 all alike):

    - entropy_weight e_d                      focus, whatever the pair
    + alignment_weight (1 - e_d)              focus on relevant pairs alone

The source's reward is not offered. Its first version, `.3 entropy + .3 / (1 + std) + .4 relevance max`, pays for
flat attention twice and, in relevant pairs, for its opposite; its last pays minus the entropy. Neither has a term
that depends on the ranking. What is meaningful of them are the two terms above.

The reference of the policy losses is the uniform policy. A language model's reference is what it was before the
reinforcement, and keeps its abilities; a router has none before, and starts almost uniform. `KL(pi | uniform)` is
`log depth` less the entropy, so the objective `E r - beta KL` is the same in every step, and its optimum,
`softmax(r / beta)`, keeps trying depths as the model changes. The source renews its reference every five epochs:
what is then kept near is an earlier mistake or an earlier success alike, after `k` renewals the optimum is
`softmax(k r / beta)`, which collapses, and there is a second router to save. Runs here mostly last a few epochs,
in which it would never be renewed: a frozen copy of the almost uniform first router.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.aux import record
from attn_jax.engine.streaming import Stream, attend
from attn_jax.mechanisms import maw_exploration as exploration
from attn_jax.mechanisms import maw_router
from attn_jax.mechanisms.maw import MultiAttentionWeight, Revealed
from attn_jax.types import Array

Method = Literal["straight_through", "supervised", "rule", "grpo", "actor_critic", "exact"]
Reward = Literal["likelihood", "ndcg"]

Judge = Callable[[Array, Array, Array], Array]
"""From scores `(N, C)`, grades `(N, C)` and mask `(N, C)` to the quality of each list `(N,)`."""


def check(mechanism: str, method: str, reward: str) -> None:
    """Raises a ValueError where the settings do not fit."""
    for name, value, known in (("method", method, Method), ("reward", reward, Reward)):
        if value not in get_args(known):
            raise ValueError(f"task.router.{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if method != "straight_through" and mechanism != "maw":
        raise ValueError(f"task.router.method `{method}` teaches the routers of `maw`, and {mechanism} has none")


def counterfactual(judge: Judge, scores: Array, tried: Array, grades: Array, mask: Array) -> Array:
    """By how much each tried score of each pair alone would change the quality of its list.

    Args:
      judge: of lists.
      scores: `(B, C)`.
      tried: `(G, B, C)`, other scores of the same pairs.
      grades, mask: `(B, C)`.

    Returns:
      `(B, C, G)`.
    """
    batch, width = scores.shape
    number = tried.shape[0]
    own = jnp.eye(width, dtype=bool)[None, :, None]  # (1, C, 1, C): which score of the list is the pair's
    shape = (batch, width, number, width)
    changed = jnp.where(own, tried.transpose(1, 2, 0)[..., None], scores[:, None, None])

    def lists(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None, None], shape).reshape(-1, width)

    judged = judge(changed.reshape(-1, width), lists(grades), lists(mask)).reshape(shape[:3])
    return judged - judge(scores, grades, mask)[:, None, None]


class _Watched(nnx.Module):
    """A layer that keeps what it reads."""

    def __init__(self, layer: MultiAttentionWeight):
        self.layer = layer

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        record(self, Revealed, "x", x)
        record(self, Revealed, "mask", jnp.ones(x.shape[:2], bool) if mask is None else mask)
        return self.layer(x, mask=mask)

    def seen(self) -> tuple[Array, Array]:
        x, mask = (vars(self)[f"aux_{name}"][...] for name in ("x", "mask"))
        return x, mask


@contextmanager
def watched(model: nnx.Module) -> Iterator[Callable[[], list[tuple[Array, Array]]]]:
    """While the body runs, the `maw` layers of `model` keep what they read.

    Yields:
      A function that gives, by layer, what it read in the last call: `(B, L, D)` and its mask `(B, L)`.
    """
    layers = exploration.layers(model)
    places = {
        id(child): (parent, name) for _, parent in nnx.iter_modules(model) for name, child in vars(parent).items()
    }
    watchers = [_Watched(layer) for layer in layers]
    for layer, watcher in zip(layers, watchers):
        setattr(*places[id(layer)], watcher)
    try:
        yield lambda: [watcher.seen() for watcher in watchers]
    finally:
        for layer in layers:
            setattr(*places[id(layer)], layer)


def row_entropies(layer: MultiAttentionWeight, x: Array, mask: Array) -> Array:
    """The entropy of the attention of each depth, relative to the largest there can be: `(B, depth)`, in 0..1.

    The mean over heads and real tokens; 0 where there is one key alone. It needs no attention matrix: with
    `p = exp(z - lse)` the entropy of a row is `lse - sum_j p_j z_j`, and `sum_j p_j k_j` is an attention whose
    values are the keys.

    Args:
      layer: whose projections are used.
      x, mask: `(B, L, D)` and bool `(B, L)`, what it reads.
    """
    count = jnp.maximum(mask.sum(axis=1), 1)

    def of(depth: Array) -> Array:
        route = jax.nn.one_hot(depth, layer.depth)[None]
        q, k = (layer.split_heads(project(x, route)).astype(jnp.float32) for project in (layer.query, layer.key))
        scale = layer.head_dim**-0.5
        found = attend(q, [Stream(k, k, mask)], scale=scale, implementation=layer.implementation)
        entropy = found.lse - scale * jnp.sum(q * found.out, axis=-1)
        rows = jnp.sum(jnp.where(mask, entropy.mean(axis=2), 0), axis=1) / count
        return rows / jnp.log(jnp.maximum(count, 2))

    found = jnp.stack(jax.lax.map(of, jnp.arange(layer.depth)), axis=1)
    return jax.lax.stop_gradient(jnp.clip(found, 0, 1))


def decisions(layer: MultiAttentionWeight, x: Array, mask: Array) -> Array:
    """The most probable depth of each example, one-hot `(B, depth)`.

    Args:
      layer: in evaluation mode.
      x, mask: `(B, L, D)` and bool `(B, L)`, what it reads.
    """
    return jax.nn.one_hot(layer.route(x, mask=mask).logits.argmax(axis=1), layer.depth)


def router_loss(
    model: nnx.Module,
    call: Callable[[Any], Array],
    grades: Array,
    mask: Array,
    judge: Judge,
    *,
    key: Array,
    method: Method,
    group: int = 8,
    temperature: float = 0.1,
    entropy_weight: float = 0.0,
    alignment_weight: float = 0.0,
    critic: Callable[[Array], Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of one layer's router, drawn by `key`, and its mean reward.

    Args:
      model: with `maw` layers.
      call: from the model to scores `(B, C)`; the examples of the layers are the pairs.
      grades, mask: `(B, C)`.
      judge: of lists, what the rewards are differences of.
      key: of the layer and of the depths that are tried.
      method: any but "straight_through", which needs no loss of its own. "supervised": cross-entropy to
        `softmax(r_d / temperature)`; "rule": to the source's count of relevant documents, with its ranking term;
        "grpo", "actor_critic", "exact": `maw_router.policy_loss`, with the uniform policy as the reference.
      group: depths tried by "grpo".
      temperature: of the targets of "supervised".
      entropy_weight, alignment_weight: of what a depth's attention adds to its reward, see the module's
        documentation.
      critic: from the router's state to a value, for "actor_critic".
    """
    which, sample = jax.random.split(key)
    count = len(exploration.layers(model))

    def of_layer(layer: int) -> tuple[Array, Array]:
        def judged(model: nnx.Module) -> tuple[Array, Array | float]:
            if not (entropy_weight or alignment_weight):
                return call(model), 0.0
            with watched(model) as seen:
                scores = call(model)
            flat = row_entropies(exploration.layers(model)[layer], *seen()[layer])
            relevant = (mask & (grades > 0)).reshape(-1, 1)
            return scores, alignment_weight * relevant * (1 - flat) - entropy_weight * flat

        route, (scores, focus) = exploration.policy(model, judged, layer)
        logits, scores = route.logits, jax.lax.stop_gradient(scores)
        old, depth = jax.lax.stop_gradient(logits), logits.shape[1]
        estimator: Any = method if method in get_args(maw_router.Estimator) else "exact"
        depths = maw_router.sample_depths(sample, old, estimator=estimator, group=group)
        tried = exploration.explore(model, call, layer, depths)
        rewards = counterfactual(judge, scores, tried, grades, mask).reshape(len(depths), -1)
        real = mask.reshape(-1, 1)
        if not isinstance(focus, float):
            rewards += jnp.take_along_axis(focus, depths, axis=1)
        rewards = jnp.where(real, rewards, 0)
        if method == "supervised":
            targets = maw_router.loss_targets(-rewards, temperature)
            loss = -jnp.mean(jnp.sum(jnp.where(real, targets * nnx.log_softmax(logits), 0), axis=1))
        elif method == "rule":
            targets = maw_router.relevant_count_targets(grades, depth, mask=mask)
            per_pair = jnp.repeat(targets, scores.shape[1])
            loss = maw_router.supervised_loss(logits, per_pair, scores, grades > 0, mask=mask)
        else:
            values = None if critic is None else critic(jax.lax.stop_gradient(route.state))
            loss = maw_router.policy_loss(
                logits, old, jnp.zeros_like(old), depths, rewards, estimator=estimator, values=values
            )
        return loss, rewards.sum() / jnp.maximum(real.sum() * rewards.shape[1], 1)

    branches = [lambda layer=layer: of_layer(layer) for layer in range(count)]
    loss, reward = jax.lax.switch(jax.random.randint(which, (), 0, count), branches)
    return loss, {"router_loss": loss, "router_reward": reward}
