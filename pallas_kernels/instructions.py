"""Products of tiles: all that differs between instruction sets, and between a GPU and the interpreter.

                 a @ b.T                          acc + p @ b
    mma          a, b to registers                p to registers by way of shared memory (the layout of a result
                                                  is not that of an operand), b to registers
    wgmma        a, b read in shared memory       p in registers, b read in shared memory
    interpreter  jnp.dot, or wgmma on shared      jnp.dot, or wgmma with p in shared memory: the interpreter knows
                 memory                           neither mma nor operands of wgmma in registers

Operands are of one floating type and sums float32.
"""

from collections.abc import Callable, Sequence
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
            return pl.run_state(lambda total: plgpu.wgmma(total, p, b))(plgpu.WGMMAAccumulatorRef.init(acc))
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


def _wgmma(shape: tuple[int, int], pairs: list[tuple[Ref, Ref]]) -> Value:
    def multiply(total: Ref) -> Value:
        for a, b in pairs:
            plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def store(target: Ref, value: Value) -> None:
    """Write a computed tile to global memory."""
    if hasattr(plgpu, "store"):  # JAX 0.12 and later
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value


def walk(
    tiles: Tiles,
    size: int,
    steps: Any,
    order: Callable[[Value], Value],
    arrays: Sequence[tuple[Ref, Any, int]],
    rows: Ref | None,
    step: Callable[[Value, list[Ref], list[Value], Any], Any],
    carry: Any,
    stages: int = 2,
) -> Any:
    """`carry = step(start, tiles, rows, carry)` for the tiles that are numbered `order(0), order(1)`, ...

    Args:
      size: tokens in a tile, of which `start` is the first.
      steps: how many, may be traced.
      arrays: `(ref, head, width)` of what is walked over, each `(L, heads width)`.
      rows: numbers per token, `(rows, L)`, or None.
      stages: steps in flight.
    """
    number = 0 if rows is None else rows.shape[0]
    copied = rows is not None and tiles.hardware.tma
    sources = [ref for ref, _, _ in arrays]
    specs = [plgpu.BlockSpec((size, width), lambda t, head=head: (order(t), head)) for _, head, width in arrays]
    if copied:
        sources.append(rows)
        specs.append(plgpu.BlockSpec((number, size), lambda t: (0, order(t))))

    def one(index: tuple[Value], *slots: Any) -> Any:
        *refs, carry = slots
        start = order(index[0]) * size
        if copied:
            slot = refs.pop()
            vectors = [slot[n] for n in range(number)]
        elif rows is not None:  # `cp.async` does not copy as few as these
            vectors = [plgpu.load(rows.at[n, pl.ds(start, size)], optimized=False) for n in range(number)]
        else:
            vectors = []
        carry = step(start, refs, vectors, carry)
        tiles.release(copied)
        return carry

    pipeline = plgpu.emit_pipeline(
        one, grid=(steps,), in_specs=specs, init_carry=carry, max_concurrent_steps=stages
    )
    return pipeline(*sources)
