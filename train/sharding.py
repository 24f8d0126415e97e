"""The mesh of devices `data` x `fsdp` x `tensor`, and where arrays live on it.

Parameters carry logical axis names (`nnx.with_partitioning(init, ("embed", "mlp"))`), the config's
`sharding_rules` map them to mesh axes, and every batch is split over `data` and `fsdp`. All else is replicated.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from train.cli import UsageError
from train.config import Config

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def use_cpu_devices(config: Config, num_processes: int = 1) -> None:
    """Makes the CPU cores available as devices; must run before JAX looks for devices.

    XLA runs the small loops of attention on one core per device. Each core therefore becomes a device and gets
    its share of the batch, which must divide, also by the `num_processes` that do the same.
    """
    if config.num_cpu_devices == 0 and _told_otherwise():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = math.gcd(config.batch_size, config.eval_batch_size) // num_processes
    count = config.num_cpu_devices or max(n for n in range(1, max(min(cores, shares), 1) + 1) if shares % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # JAX has found its devices, as in a notebook that has computed something
        if config.num_cpu_devices:
            raise UsageError(f"--config.num_cpu_devices comes too late in this process: {error}") from error


def _told_otherwise() -> bool:
    flags = os.environ.get("XLA_FLAGS", "")
    return jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in flags


def make_mesh(config: Config) -> Mesh:
    """The mesh of `config.mesh`, over the first devices where it needs fewer than there are.

    Raises:
      UsageError: the axes do not fit the devices, or the batch cannot be split over them.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UsageError("JAX runs in several processes here; say so by --config.distributed.coordinator=auto")
    devices = jax.devices()
    sizes = [config.mesh[axis] for axis in AXES]
    described = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UsageError(f"mesh {described}: sizes are positive, and one of them may be -1 for the rest")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
    needed = math.prod(sizes)
    if needed > len(devices):
        raise UsageError(f"mesh {described} needs {needed} devices, there are {len(devices)}")
    if jax.process_count() > 1 and needed < len(devices):
        raise UsageError(
            f"mesh {described} leaves devices idle: {jax.process_count()} processes have {len(devices)}"
        )
    for key in ("batch_size", "eval_batch_size"):
        if config[key] % (sizes[0] * sizes[1]):
            raise UsageError(
                f"{key} {config[key]} cannot be split over the {sizes[0] * sizes[1]} devices of data x fsdp;"
                f" set another --config.{key} or --config.mesh.data"
            )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed])


@contextmanager
def activate(config: Config) -> Iterator[Mesh]:
    """Runs its body on the mesh and under the logical axis rules of `config`."""
    mesh = make_mesh(config)
    rules = tuple((name, tuple(axis) if isinstance(axis, list) else axis) for name, axis in config.sharding_rules)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        yield mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(state: nnx.State, mesh: Mesh) -> Any:
    """`ShapeDtypeStruct`s of the variables in `state`, sharded as their logical axes say.

    Raises:
      UsageError: an axis cannot be split evenly over its part of the mesh.
    """

    def place(path: tuple, variable: nnx.Variable, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        try:
            sharding.shard_shape(value.shape)
        except ValueError as error:
            name = ".".join(map(str, path))
            split = f"{tuple(sharding.spec)} over {dict(mesh.shape)}"
            raise UsageError(f"{name} of shape {value.shape} cannot be split as {split}") from error
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    shardings = dict(nnx.to_flat_state(nnx.as_pure(nnx.get_named_sharding(state, mesh))))
    placed = [(path, place(path, variable, shardings[path])) for path, variable in nnx.to_flat_state(state)]
    return nnx.from_flat_state(placed)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """NumPy arrays whose first axis is the batch, onto the devices; every process has them all."""
    return put(batch, NamedSharding(mesh, BATCH))


def put(arrays: Any, where: Sharding) -> Any:
    """NumPy arrays that every process has in full, onto the devices; each process takes its part of them."""
    return jax.make_array_from_process_local_data(where, arrays, jax.tree.map(np.shape, arrays))


def fetch(arrays: Any, mesh: Mesh) -> Any:
    """Arrays on the devices as NumPy arrays, in full at every process."""
    return jax.device_get(jax.device_put(arrays, replicated(mesh)) if mesh.is_multi_process else arrays)
