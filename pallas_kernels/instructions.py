"""Products of tiles: all that differs between instruction sets, and between a GPU and the interpreter.

                 a @ b.T                          acc + p @ b
    mma          a, b to registers                p to registers by way of shared memory (the layout of a result
                                                  is not that of an operand), b to registers
    wgmma        a, b read in shared memory       p in registers, b read in shared memory
    interpreter  jnp.dot, or wgmma on shared      jnp.dot, or wgmma with p in shared memory: the interpreter knows
                 memory                           neither mma nor operands of wgmma in registers

Operands are of one floating type and sums float32.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.hardware import Hardware

# References to memory and values in kernels have no public type.
Ref = Any
Value = Any


class Tiles:
    """The operations of one kernel on tiles of `dtype`."""

    def __init__(self, hardware: Hardware, dtype: Any):
        self.hardware = hardware
        self.dtype = jnp.dtype(dtype)

    def staging(self, *shapes: tuple[int, int]) -> list[Any]:
        """Scratch memory through which computed operands pass; none where they stay in registers."""
        if self.hardware.instruction == "wgmma" and not self.hardware.interpret:
            return []
        return [plgpu.SMEM(shape, self.dtype) for shape in shapes]

    def resident(self, *shapes: tuple[int, int]) -> list[Any]:
        """Scratch memory for tiles that `fetch` brings, and what it waits on."""
        return [*(plgpu.SMEM(shape, self.dtype) for shape in shapes), plgpu.Barrier(num_arrivals=len(shapes))]

    def fetch(self, sources: list[Ref], targets: list[Ref], barrier: Ref) -> None:
        """Copy tiles from global to shared memory and wait for them."""
        if self.hardware.tma:
            for source, target in zip(sources, targets):
                plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)
            return
        for source, target in zip(sources, targets):
            target[...] = plgpu.load(source, layout=plgpu.Layout.MMA_LHS(self.dtype), optimized=False)

    def nt(self, a: Ref, b: Ref) -> Value:
        """`a @ b.T` of tiles in shared memory."""
        return self.nt_sum([(a, b)])

    def nt_sum(self, pairs: list[tuple[Ref, Ref]]) -> Value:
        """The sum of `a @ b.T` over pairs of tiles in shared memory, added up in their order."""
        a, b = pairs[0]
        shape = a.shape[0], b.shape[0]
        if self.hardware.instruction == "wgmma":
            return _wgmma(shape, [(a, b.transpose((1, 0))) for a, b in pairs])
        total = jnp.zeros(shape, jnp.float32)
        for a, b in pairs:
            total = self._mma(total, a[...], b.transpose((1, 0))[...])
        return total

    def nn(self, acc: Value, p: Value, b: Ref, staging: Ref | None = None) -> Value:
        """`acc + p @ b` of a computed tile and one in shared memory."""
        p = p.astype(self.dtype)
        if self.hardware.instruction == "wgmma" and not self.hardware.interpret:
            return pl.run_state(lambda total: plgpu.wgmma(total, p, b))(plgpu.ACC.init(acc))
        assert staging is not None
        staging[...] = p
        if self.hardware.instruction == "wgmma":
            plgpu.commit_smem()
            return acc + _wgmma(acc.shape, [(staging, b)])
        return self._mma(acc, staging[...], b[...])

    def release(self, read: bool) -> None:
        """Before the next copy overwrites tiles; `read`: whether some were also read outside of products."""
        if self.hardware.tma and (read or self.hardware.instruction == "mma"):
            plgpu.commit_smem()

    def _mma(self, acc: Value, a: Value, b: Value) -> Value:
        if self.hardware.interpret:
            return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(acc, a, b)


def _wgmma(shape: tuple[int, ...], pairs: list[tuple[Ref, Ref]]) -> Value:
    def multiply(total: Ref) -> Value:
        for a, b in pairs:
            plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def store(target: Ref, value: Value) -> None:
    """Write a computed tile to global memory."""
    if hasattr(plgpu, "store"):  # JAX 0.12 and later
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value
