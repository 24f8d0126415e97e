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
from pallas_kernels.hardware import INTERPRETER, Hardware

H100 = Hardware("wgmma")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "detect", lambda: H100)


def test_an_explicit_choice_is_honoured(gpu):
    assert dispatch.choose("thing", "dense") == dispatch.Choice(dense=True)
    assert dispatch.choose("thing", "xla") == dispatch.Choice()
    assert dispatch.choose("thing", "mosaic", lambda hardware: None).hardware == H100
    assert dispatch.choose("thing", "mosaic_interpret", lambda hardware: None).hardware == INTERPRETER


def test_unknown_implementations_raise():
    with pytest.raises(ValueError, match=r"^thing: `implementation` must be None, 'dense', .*, got 'cuda'"):
        dispatch.choose("thing", "cuda")


@pytest.mark.parametrize(
    "implementation,unsupported,reason",
    [
        ("mosaic", None, "none is written"),
        ("mosaic_interpret", None, "none is written"),
        ("mosaic_interpret", lambda hardware: "too wide", "too wide"),
        ("mosaic", lambda hardware: None, "the default device is a CPU"),
    ],
)
def test_a_kernel_that_cannot_run_raises_and_says_why(implementation, unsupported, reason):
    with pytest.raises(NotImplementedError, match=f"^thing: implementation='{implementation}'.*{reason}"):
        dispatch.choose("thing", implementation, unsupported)


def test_a_gpu_without_kernels_is_named():
    with pytest.raises(NotImplementedError, match=r"capability 7\.5"):
        Hardware.of_capability("7.5")


def messages(caplog, operation):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(operation)]


def test_the_automatic_choice_never_raises_and_is_logged_once_with_its_reason(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="attn_jax")
    for _ in range(2):
        assert dispatch.choose("on a CPU", None, lambda hardware: None) == dispatch.Choice()
    monkeypatch.setattr(dispatch, "detect", lambda: H100)
    for _ in range(2):
        assert dispatch.choose("too wide", None, lambda hardware: "200 is too wide") == dispatch.Choice()
        assert dispatch.choose("on a GPU", None, lambda hardware: None).hardware == H100
    for operation, words in [("on a CPU", "CPU"), ("too wide", "200 is too wide"), ("on a GPU", "'mosaic'")]:
        (message,) = messages(caplog, operation)
        assert words in message


def test_a_program_for_another_machine_takes_the_portable_path():
    """The kernel was chosen for the default device, but this is compiled for a CPU."""

    def run(x):
        return dispatch.Choice(hardware=H100).run(lambda hardware, x: x * 2, lambda x: x + 1, x)

    assert jax.jit(run)(jnp.float32(5)) == 6
    assert dispatch.Choice(hardware=INTERPRETER).run(lambda hardware, x: x * 2, lambda x: x + 1, 5) == 10


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
