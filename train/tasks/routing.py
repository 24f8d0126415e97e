"""Objectives that teach the routers of `maw` in a reranker, each from what its choice does to the ranking.

A cross-encoder scores pairs one by one, so what a depth is worth for a pair can be told exactly: all other scores
of its query stay, its own is replaced by the one of that depth, and the list is judged again. With the listwise
loss `l` (or nDCG@10) of a query's scores `s`

    r_d = l(s) - l(s with s_i of depth d)            of pair i, for each depth d that is tried

one layer at a time, a random one in each step (`attn_jax.mechanisms.maw_exploration`). The other parameters learn
from the listwise loss as ever, with the depths that the routers draw.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.mechanisms import maw_exploration as exploration
from attn_jax.mechanisms import maw_router
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
      critic: from the router's state to a value, for "actor_critic".
    """
    which, sample = jax.random.split(key)
    count = len(exploration.layers(model))

    def of_layer(layer: int) -> tuple[Array, Array]:
        route, scores = exploration.policy(model, call, layer)
        logits, scores = route.logits, jax.lax.stop_gradient(scores)
        old, depth = jax.lax.stop_gradient(logits), logits.shape[1]
        estimator: Any = method if method in get_args(maw_router.Estimator) else "exact"
        depths = maw_router.sample_depths(sample, old, estimator=estimator, group=group)
        tried = exploration.explore(model, call, layer, depths)
        rewards = counterfactual(judge, scores, tried, grades, mask).reshape(len(depths), -1)
        real = mask.reshape(-1, 1)
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
