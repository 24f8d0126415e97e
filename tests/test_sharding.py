"""Eight devices give what one gives, on every mesh, by the collectives that the mesh calls for."""

import functools
import os

import jax
import numpy as np
import pytest

from configs import lra_listops
from eval.aot import collectives
from tests import toy
from train import optimizer, sharding, state, tasks
from train.cli import UsageError
from train.data import batches
from train.loop import make_train_step

MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "data x fsdp": (2, 4, 1),
    "data x tensor": (4, 1, 2),
    "data x fsdp x tensor": (2, 2, 2),
}
# Sums in another order: float32 rounding of values of order 1, grown over the steps. Observed at most 5e-7.
TOLERANCE = 5e-6
STEPS = 3


def config_of(module, mesh, **changes):
    config = module.get_config("smoke")
    config.update(changes)
    config.mesh.update(dict(zip(sharding.AXES, mesh)))
    return config


def train_a_little(config, task, steps=STEPS):
    """Losses of the first steps, the initial and final state, and the compiled step's text."""
    with sharding.activate(config) as mesh:
        model = state.define(task, mesh)
        rate = optimizer.schedule(config.optimizer, config.steps)
        adamw = optimizer.create(config.optimizer, rate, optimizer.decayed(model.variables, ()))
        abstract = state.abstract_train_state(model, adamw, mesh)
        current = first = state.initial_train_state(task, adamw, config.seed, abstract)
        first = jax.tree.map(np.asarray, first.model.params)
        step = make_train_step(task, model, adamw, rate, 1.0, state.shardings_of(abstract))
        iterator = task.train_iterator(config.seed)
        placed = [sharding.put_batch(next(iterator), mesh) for _ in range(steps)]
        compiled, losses = step.lower(current, placed[0]).compile(), []
        for batch in placed:
            current, metrics = compiled(current, batch)
            losses.append(float(metrics["loss"]))
        assert all(
            leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
            for leaf, want in zip(jax.tree.leaves(current), jax.tree.leaves(abstract))
        ), "a step leaves everything where it was"
    return losses, first, current, collectives(compiled.as_text())


def toy_task(config):
    task = toy.Toy(config)
    task.prepare()
    return task


@functools.cache
def on(mesh):
    config = config_of(toy, mesh)
    return train_a_little(config, toy_task(config))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_mesh_gives_the_single_device_loss(mesh):
    losses, first, final, used = on(mesh)
    expected_losses, expected_first, expected, _ = on((1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, first, expected_first)  # the seed alone decides
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
    for ours, one in zip(jax.tree.leaves(final.model.params), jax.tree.leaves(expected.model.params)):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(one), atol=TOLERANCE * 10)

    _, fsdp, tensor = mesh
    # Gradients are summed over the batch, partial products over `tensor`; parameters are gathered from `fsdp`.
    expected = {"all-reduce"} | ({"all-gather"} if fsdp > 1 else set())
    # XLA may also gather activations over `tensor`, scatter sums, and move what changes its layout between axes.
    allowed = {"all-gather", "reduce-scatter"} if fsdp * tensor > 1 else set()
    allowed |= {"collective-permute"} if min(fsdp, tensor) > 1 else set()
    allowed |= {"all-to-all"} if fsdp > 1 else set()  # parts of vectors
    assert expected <= set(used) <= expected | allowed


def test_parameters_and_optimizer_lie_where_the_rules_say():
    _, _, final, _ = on((2, 2, 2))
    up = final.model.params["up"]["kernel"]
    assert tuple(up.sharding.spec) == ("fsdp", "tensor")
    assert up.addressable_shards[0].data.shape == (16 // 2, 32 // 2)
    moments = [leaf for leaf in jax.tree.leaves(final.opt_state) if leaf.shape == up.shape]
    assert len(moments) >= 2
    assert sum(leaf.sharding == up.sharding for leaf in moments) >= 2


def test_attention_over_the_mesh_gives_the_single_device_loss():
    task = {"generator": {"num_train": 64, "num_val": 8, "num_test": 8, "max_length": 40}, "buckets": (39,)}
    changes = {"batch_size": 8, "task": task, "model": {"num_layers": 1}, "optimizer": {"clip_norm": 0}}

    def losses(mesh):
        config = config_of(lra_listops, mesh, **changes)
        return train_a_little(config, tasks.prepare(config), steps=2)[0]

    np.testing.assert_allclose(losses((2, 2, 2)), losses((1, 1, 1)), rtol=TOLERANCE)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"mesh": {"data": 3}}, r"batch_size 8 cannot be split over the 3 devices"),
        ({"mesh": {"data": 16}}, r"needs 16 devices, there are 8"),
        ({"mesh": {"fsdp": -1}}, r"one of them may be -1"),
        ({"mesh": {"tensor": 0}}, r"sizes are positive"),
        ({"eval_batch_size": 12}, r"eval_batch_size 12 cannot be split over the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, complaint):
    config = toy.get_config()
    config.update(changes)
    with pytest.raises(UsageError, match=complaint):
        sharding.make_mesh(config)


def test_a_parameter_that_cannot_be_split_is_named():
    config = config_of(toy, (1, 1, 8), model={"hidden": 12})
    with sharding.activate(config) as mesh, pytest.raises(UsageError, match=r"down.kernel of shape \(12, 16\)"):
        state.define(toy_task(config), mesh)


def test_cores_become_devices_as_far_as_the_batch_divides(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.append((name, value)))
    monkeypatch.setattr(sharding, "_told_otherwise", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    config = toy.get_config()
    for batch, requested, count in ((8, 0, 4), (9, 0, 1), (24, 0, 4), (8, 3, 3)):
        config.update(batch_size=batch, num_cpu_devices=requested)
        sharding.use_cpu_devices(config)
        assert asked.pop() == ("jax_num_cpu_devices", count)


def test_a_process_that_has_its_devices_trains_on_them_and_gets_no_others(monkeypatch):
    before = jax.devices()
    monkeypatch.setattr(sharding, "_told_otherwise", lambda: False)
    config = toy.get_config()
    sharding.use_cpu_devices(config)
    assert jax.devices() == before
    config.num_cpu_devices = len(before) + 1
    with pytest.raises(UsageError, match="num_cpu_devices comes too late in this process"):
        sharding.use_cpu_devices(config)


def test_batches_are_split_over_rows():
    config = config_of(toy, (2, 2, 1))
    task = toy_task(config)
    with sharding.activate(config) as mesh:
        batch = next(batches.train_iterator(task.data["train"], batch_size=8, buckets=(16,), seed=0))
        placed = sharding.put_batch(batch, mesh)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 16)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
