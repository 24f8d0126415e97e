"""What a kernel is compiled for, and the one door through which kernels are started.

Everything here is decided before lowering: an instruction that a GPU lacks can abort the whole process in the
compiler, where no exception handler helps.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

Instruction = Literal["mma", "wgmma"]

# Shared memory that a block may have, in bytes, by compute capability (CUDA programming guide, "Technical
# specifications per compute capability", less the 1 KiB that the system takes).
SHARED_MEMORY = {
    "8.0": 166_912,
    "8.6": 101_376,
    "8.7": 166_912,
    "8.9": 101_376,
    "9.0": 232_448,
    "10.0": 232_448,
    "10.3": 232_448,
    "12.0": 101_376,
    "12.1": 101_376,
}

# Barriers and alignment, beside the scratch memory that a kernel asks for.
_RESERVED = 1024


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a kernel needs to know of the machine.

    Attributes:
      instruction: the matrix instruction: "mma" on registers (sm_80 and later), or "wgmma" of four warps on
        operands in shared memory (sm_90).
      tma: whether tiles are copied by the tensor memory accelerator (sm_90 and later) or else by `cp.async`.
      shared_memory: bytes that a block may use.
      interpret: whether the kernel runs in the interpreter, with race detection, on any machine.
    """

    instruction: Instruction = "mma"
    tma: bool = True
    shared_memory: int = SHARED_MEMORY["9.0"] - _RESERVED
    interpret: bool = False

    @classmethod
    def of_capability(cls, capability: str) -> "Hardware":
        """That of an NVIDIA GPU with this compute capability, such as "9.0".

        Raises:
          NotImplementedError: there are no kernels for it.
        """
        if capability not in SHARED_MEMORY:
            known = ", ".join(SHARED_MEMORY)
            raise NotImplementedError(f"compute capability {capability} has no fused kernels, only {known} have")
        return cls(
            "wgmma" if capability == "9.0" else "mma",
            int(capability.split(".")[0]) >= 9,
            SHARED_MEMORY[capability] - _RESERVED,
        )


INTERPRETER = Hardware(interpret=True)
"""The interpreter, as a GPU that multiplies by "mma"."""


def device() -> Any:
    """The device that a computation is compiled for, unless it is told otherwise."""
    chosen = jax.config.jax_default_device
    return chosen if hasattr(chosen, "platform") else jax.devices(chosen)[0]


def detect() -> Hardware:
    """That of the default device.

    Raises:
      NotImplementedError: it is no NVIDIA GPU, or one without kernels; the message says what it is.
    """
    found = device()
    capability = getattr(found, "compute_capability", None)
    if found.platform not in ("gpu", "cuda") or capability is None:
        raise NotImplementedError(f"the default device is {found.platform.upper()}, no NVIDIA GPU")
    return Hardware.of_capability(str(capability))


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
      grid: size by the name of the axis.
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
        results = jax.tree.unflatten(out_tree, kernel(*leaves))
    return results if isinstance(out, tuple) else results[0]


def interpreting() -> Any:
    """Kernels traced inside run in the interpreter, which reports data races as errors."""
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
