"""Which implementation runs, and over which axes of a mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attn_jax.engine import dispatch


def test_an_explicit_choice_is_honoured():
    assert dispatch.resolve("thing", "dense") == "dense"
    assert dispatch.resolve("thing", "xla") == "xla"


def test_unknown_implementations_raise():
    with pytest.raises(ValueError, match=r"^thing: unknown implementation 'cuda'"):
        dispatch.resolve("thing", "cuda")


@pytest.mark.parametrize("implementation", ["mosaic", "mosaic_interpret"])
def test_a_kernel_that_does_not_exist_raises(implementation):
    with pytest.raises(NotImplementedError, match=f"^thing: implementation='{implementation}' has no fused GPU"):
        dispatch.resolve("thing", implementation)


def test_the_automatic_choice_is_logged_once_per_operation(caplog):
    caplog.set_level(logging.INFO, logger="attn_jax")
    for operation in ("first of this test", "second of this test", "first of this test"):
        assert dispatch.resolve(operation, None) == "xla"
    messages = [r.getMessage() for r in caplog.records if "of this test" in r.getMessage()]
    assert [m.partition(":")[0] for m in messages] == ["first of this test", "second of this test"]
    assert all("'xla'" in m for m in messages)


def test_over_rows_is_a_map_over_the_leading_axis():
    x, y = jnp.arange(12.0).reshape(3, 4), {"a": jnp.arange(3)}
    out = jax.jit(lambda x, y: dispatch.over_rows(lambda x, y: (x.sum(), x * y["a"]), x, y))(x, y)
    np.testing.assert_array_equal(out[0], x.sum(1))
    np.testing.assert_array_equal(out[1], x * y["a"][:, None])


def test_on_a_cpu_half_precision_rows_are_computed_in_float32():
    """1024 + 1 needs eleven bits: bfloat16 has eight."""
    x = jnp.array([[1024.0, 1.0]], jnp.bfloat16)
    total = jax.jit(lambda x: dispatch.over_rows(lambda row: (row[0] + row[1]).astype(jnp.float32), x))(x)
    assert total == 1025


RULES = [("batch", ("data", "fsdp")), ("heads", "tensor"), ("embed", "single"), ("mlp", None), ("vocab", "absent")]


def mesh(kind=AxisType.Auto):
    axes = {"data": 2, "fsdp": 2, "tensor": 2, "single": 1}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


@pytest.mark.parametrize(
    "logical,size,axes",
    [
        ("batch", 8, ("data", "fsdp")),
        ("batch", 6, None),  # not divisible by 4
        ("heads", 2, ("tensor",)),
        ("heads", 3, None),
        ("embed", 4, None),  # nothing to split over
        ("mlp", 4, None),
        ("vocab", 4, None),  # an axis that the mesh does not have
        ("length", 4, None),  # no rule
    ],
)
def test_mesh_axes_follow_the_rules(logical, size, axes):
    assert dispatch.mesh_axes(logical, size) is None  # neither mesh nor rules
    with nnx.logical_axis_rules(RULES):
        assert dispatch.mesh_axes(logical, size) is None  # no mesh
    with jax.set_mesh(mesh()):
        assert dispatch.mesh_axes(logical, size) is None  # no rules
        with nnx.logical_axis_rules(RULES):
            assert dispatch.mesh_axes(logical, size) == axes


def test_mesh_axes_leave_explicit_and_manual_axes_alone():
    """Where the user shards by hand there is nothing left to split."""
    seen = {}

    def inside(x):
        seen.update({name: dispatch.mesh_axes(name, 8) for name in ("batch", "heads")})
        return x

    with nnx.logical_axis_rules(RULES):
        with jax.set_mesh(mesh(AxisType.Explicit)):
            assert dispatch.mesh_axes("heads", 8) is None
        with jax.set_mesh(mesh()):
            spec = P("tensor")
            jax.jit(jax.shard_map(inside, in_specs=spec, out_specs=spec, axis_names={"tensor"})).lower(jnp.ones(2))
    assert seen == {"batch": ("data", "fsdp"), "heads": None}
