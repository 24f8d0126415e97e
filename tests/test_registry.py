"""Registering, building, and taking out what modules recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attn_jax
from attn_jax import registry
from attn_jax.aux import AuxLoss, AuxMetric, record
from attn_jax.mechanisms.base import Attention
from attn_jax.models import TransformerClassifier


@pytest.fixture
def mean_pool(monkeypatch):
    """A mechanism of a user's own, in a registry that forgets it afterwards."""
    registered = dict(registry._registered)
    monkeypatch.setattr(registry, "_registered", registered)

    @attn_jax.register("mean_pool", causal=False, time="L", memory="L")
    class MeanPool(Attention):
        mechanism = "mean_pool"

        def __init__(self, dim, num_heads, *, gain: float = 1.0, rngs, **common):
            super().__init__(dim, num_heads, rngs=rngs, **common)
            self.gain = gain

        def attend(self, x, mask, context, context_mask):
            real = jnp.ones(x.shape[:2], bool) if mask is None else mask
            mean = x.sum(1, keepdims=True) / jnp.maximum(real.sum(1), 1)[:, None, None]
            record(self, AuxLoss, "size", jnp.square(mean).mean())
            record(self, AuxMetric, "mean", mean.mean())
            return jnp.broadcast_to(mean * self.gain, x.shape)

    return registered["mean_pool"]


def build_own(**options):
    return attn_jax.build("mean_pool", dim=8, num_heads=2, rngs=nnx.Rngs(0), **options)


def test_a_mechanism_of_ones_own_is_built_like_the_others(mean_pool):
    assert mean_pool.options() == {"gain": 1.0}
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    y = build_own(gain=2.0)(x, mask=np.array([[1, 1, 0], [1, 0, 0]], bool))
    np.testing.assert_allclose(y[0, 0], x[0, :2].sum(0))
    assert not y[0, 2].any()
    with pytest.raises(ValueError, match="causal=True is not supported"):
        build_own(causal=True)
    with pytest.raises(ValueError, match="its options: gain"):
        build_own(gian=2.0)


def test_it_works_in_a_model(mean_pool):
    model = TransformerClassifier(
        vocab_size=5, num_classes=3, dim=8, num_heads=2, num_layers=2, mechanism="mean_pool", rngs=nnx.Rngs(0)
    )
    model(jnp.zeros((2, 4), int))
    losses, metrics = attn_jax.pop_aux(model)
    assert set(losses) == {f"transformer/blocks/{n}/attention/size" for n in (0, 1)}
    assert set(metrics) == {f"transformer/blocks/{n}/attention/mean" for n in (0, 1)}
    assert attn_jax.pop_aux(model) == ({}, {})


def test_a_name_is_taken_once_but_by_the_same_definition_executed_again(mean_pool):
    again = type("MeanPool", (mean_pool.module,), {"__qualname__": mean_pool.module.__qualname__})
    again.__module__ = mean_pool.module.__module__
    assert attn_jax.register("mean_pool", causal=False, time="L", memory="L")(again) is again
    assert registry._registered["mean_pool"].module is again
    other = type("Other", (mean_pool.module,), {})
    with pytest.raises(ValueError, match="`name` 'mean_pool' is taken by"):
        attn_jax.register("mean_pool", causal=False, time="L", memory="L")(other)


def test_the_public_registry_is_read_only():
    with pytest.raises(TypeError):
        attn_jax.MECHANISMS["standard"] = None  # type: ignore[index]


def test_aux_survives_a_transformation_that_is_given_the_module(mean_pool):
    graph, state = nnx.split(build_own())
    x = np.ones((1, 3, 8), np.float32)

    @jax.jit
    def call(state, x):
        module = nnx.merge(graph, state)
        module(x)
        return attn_jax.pop_aux(module)

    losses, metrics = call(state, x)
    np.testing.assert_allclose(losses["size"], 1.0)
    np.testing.assert_allclose(metrics["mean"], 1.0)


def test_aux_is_left_out_where_the_module_is_closed_over(mean_pool):
    module = build_own()
    jax.jit(lambda x: module(x))(np.ones((1, 3, 8), np.float32))
    assert attn_jax.pop_aux(module) == ({}, {})
