"""Schedules, weight decay and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.toy import ToyModel, get_config
from train import optimizer, sharding
from train.cli import UsageError

ROUNDING = 1e-6  # relative, of a few float32 operations


def oracle(schedule, step, peak=0.3, warmup=10, steps=50):
    """The rate of the `step`-th step, counted from 1."""
    if step <= warmup:
        return peak * step / warmup
    return {
        "constant": peak,
        "rsqrt": peak * np.sqrt(warmup / step),
        "cosine": peak * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))),
    }[schedule]


@pytest.mark.parametrize("schedule", ["constant", "rsqrt", "cosine"])
def test_schedule(schedule):
    config = get_config().optimizer
    config.update(schedule=schedule, learning_rate=0.3, warmup_steps=10)
    rate = optimizer.schedule(config, steps=50)
    expected = [oracle(schedule, step) for step in range(1, 51)]
    np.testing.assert_allclose([rate(step - 1) for step in range(1, 51)], expected, rtol=ROUNDING, atol=ROUNDING)


def test_published_rsqrt_schedule_is_expressible():
    # LRA: 0.05 min(1, s / 1000) / sqrt(max(s, 1000)); ours is given by its peak.
    config = get_config().optimizer
    config.update(schedule="rsqrt", learning_rate=0.05 / 1000**0.5, warmup_steps=1000)
    rate = optimizer.schedule(config, steps=5000)
    for step in (1, 500, 1000, 4000):
        published = 0.05 * min(1, step / 1000) / max(step, 1000) ** 0.5
        np.testing.assert_allclose(rate(step - 1), published, rtol=ROUNDING)


def test_unknown_names_are_listed():
    config = get_config().optimizer
    config.schedule = "nope"
    with pytest.raises(UsageError, match="`nope` is not one of cosine, rsqrt, constant"):
        optimizer.schedule(config, steps=1)
    with pytest.raises(UsageError, match="`nope` is not one of vectors, embeddings"):
        optimizer.decayed(nnx.State({}), ("nope",))


@pytest.mark.parametrize("no_decay", [(), ("vectors",), ("embeddings",), ("vectors", "embeddings")])
def test_weight_decay_shrinks_what_it_should_and_nothing_else(no_decay):
    with sharding.activate(get_config()):
        params = nnx.state(nnx.eval_shape(lambda: ToyModel(get_config().model, nnx.Rngs(0))), nnx.Param)
    config = get_config().optimizer
    adamw = optimizer.create(config, lambda step: 0.5, optimizer.decayed(params, no_decay))

    @jax.jit
    def update():
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.as_pure(params))
        return adamw.update(jax.tree.map(jnp.zeros_like, ones), adamw.init(ones), ones)[0]

    updates = update()
    shrunk = {".".join(path): bool(np.all(update < 0)) for path, update in nnx.to_flat_state(updates)}
    unchanged = {"gain"}  # says so itself
    if "vectors" in no_decay:
        unchanged |= {"up.bias", "down.bias", "head.bias"}
    if "embeddings" in no_decay:
        unchanged |= {"embed.embedding"}
    assert {name for name, decayed in shrunk.items() if not decayed} == unchanged
    (kernel,) = [update for path, update in nnx.to_flat_state(updates) if path == ("head", "kernel")]
    np.testing.assert_allclose(kernel, -0.5 * config.weight_decay, rtol=ROUNDING)


def test_gradient_is_clipped_as_a_whole():
    config = get_config().optimizer
    config.update(clip_norm=2.0, weight_decay=0.0, eps=1e3)  # so large that Adam's step is the gradient's size
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    clipped = optimizer.create(config, lambda step: 1.0, jax.tree.map(lambda _: True, params))
    config.clip_norm = 0.0
    plain = optimizer.create(config, lambda step: 1.0, jax.tree.map(lambda _: True, params))
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # of norm 5
    small, _ = clipped.update(grads, clipped.init(params), params)
    large, _ = plain.update(grads, plain.init(params), params)
    for name, value in grads.items():
        np.testing.assert_allclose(large[name], -value / (value + 1e3), rtol=ROUNDING)
        np.testing.assert_allclose(small[name], -0.4 * value / (0.4 * value + 1e3), rtol=ROUNDING)
