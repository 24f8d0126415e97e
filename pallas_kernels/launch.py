"""The one door through which kernels are started, on a GPU or in the interpreter."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from pallas_kernels.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel does, for XLA's scheduler and for the analytic floor."""

    flops: int
    exponentials: int
    bytes: int


def launch(
    body: Callable[..., None],
    *operands: Any,
    name: str,
    out: Any,
    grid: dict[str, int],
    scratch: Sequence[Any],
    hardware: Hardware,
    cost: Cost,
) -> Any:
    """Run `body(*operands, *out, *scratch)` once for each point of `grid`, with references in the place of arrays.

    Args:
      operands: pytrees of arrays.
      out: a `jax.ShapeDtypeStruct`, or a tuple of pytrees of them.
      grid: size by the name of the axis; blocks run in this order, that of the last axis side by side.
    """
    leaves, tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(out if isinstance(out, tuple) else (out,))

    def flat_body(*refs: Any) -> None:
        end = len(leaves) + len(out_leaves)
        inputs, outputs = refs[: len(leaves)], refs[len(leaves) : end]
        body(*jax.tree.unflatten(tree, inputs), *jax.tree.unflatten(out_tree, outputs), *refs[end:])

    estimate: dict[str, Any] = {}
    if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:  # JAX 0.12 and later
        estimate["cost_estimate"] = pl.CostEstimate(
            flops=cost.flops, transcendentals=cost.exponentials, bytes_accessed=cost.bytes
        )
    kernel = plgpu.kernel(
        flat_body,
        out_type=out_leaves,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name=name,
        **estimate,
    )
    with interpreting() if hardware.interpret else contextlib.nullcontext():
        results = jax.tree.unflatten(out_tree, _on_every_device(kernel, leaves)(*leaves))
    return results if isinstance(out, tuple) else results[0]


def _on_every_device(kernel: Callable[..., Any], operands: Sequence[jax.Array]) -> Callable[..., Any]:
    """`kernel`, as the partitioner runs it outside of `shard_map`: whole, on every device of the operands' mesh.

    Said explicitly, because shapes in a kernel must not mention a mesh: pipelines of `cp.async` would fail on it.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    mesh = next((m for m in meshes if not m.empty and not m.are_all_axes_manual), None)
    if mesh is None:
        return kernel
    return jax.shard_map(kernel, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def interpreting() -> Any:
    """Kernels traced inside run in the interpreter, which raises data races as errors (JAX 0.11 prints them)."""
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
