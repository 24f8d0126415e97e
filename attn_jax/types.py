"""The alphabet of dimensions and the array names used everywhere.

| letter | meaning                                                     |
|--------|-------------------------------------------------------------|
| `B`    | batch                                                       |
| `L`    | length (queries); `M` length of a second sequence (keys)    |
| `D`    | model width; `H` heads; `E = D / H` head width              |
| `T`    | timescales; `S` codes; `F` random features; `N` state size  |

Arrays are `(B, L, H, E)` inside operations and `(B, L, D)` outside. A mask is boolean and True means
"a real token, may be used".
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax

Array = jax.Array
Dtype = Any
"""Anything that `jnp.dtype` accepts."""

Window = int | tuple[int, int]
"""Tokens seen on each side, or `(left, right)`, as in `jax.nn.dot_product_attention`."""

Implementation = Literal["dense", "xla", "mosaic", "mosaic_interpret"]
"""How an operation is computed; the results are the same to rounding.

- "dense": all scores at once, differentiated by autodiff: the readable version.
- "xla": in tiles, memory linear in the length, on any machine.
- "mosaic": a fused kernel for NVIDIA GPUs, written in Pallas; operands must be bfloat16 or float16.
- "mosaic_interpret": that kernel, interpreted with race detection on any machine: slow, for tests.

A choice that cannot be honoured raises `NotImplementedError` and says why. None chooses "mosaic" on a GPU that
runs it and "xla" elsewhere, and says so once in the log of "attn_jax".
"""

# Masked scores and the logsumexp of nothing. Finite, so that differences of two of them are 0 and not NaN.
NEG_INF = -1e30


def check_shape(where: str, name: str, array: Any, expected: str, sizes: Sequence[int | None]) -> None:
    """Raise a `ValueError` naming `where` and `name` unless `array` has the shape `sizes` (None: any size)."""
    shape = getattr(array, "shape", None)
    if shape is None or len(shape) != len(sizes) or any(n not in (None, s) for n, s in zip(sizes, shape)):
        wanted = "(" + ", ".join("any" if n is None else str(n) for n in sizes) + ")"
        got = f"a {type(array).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{where}: `{name}` must have shape {expected} = {wanted}, got {got}")


def check_mask(where: str, name: str, mask: Any, expected: str, sizes: Sequence[int | None]) -> None:
    """Raise a `ValueError` unless `mask` is None or a boolean array of shape `sizes`."""
    if mask is None:
        return
    check_shape(where, name, mask, expected, sizes)
    if mask.dtype != bool:
        raise ValueError(f"{where}: `{name}` must be boolean (True = a real token), got dtype {mask.dtype}")
