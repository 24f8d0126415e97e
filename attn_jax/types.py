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

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

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
        wanted = ", ".join("any" if n is None else str(n) for n in sizes) + ("," if len(sizes) == 1 else "")
        known = f" = ({wanted})" if any(n is not None for n in sizes) else ""
        got = f"a value of type {type(array).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{where}: `{name}` must have shape {expected}{known}, got {got}")


def check_floating(where: str, name: str, array: Array) -> None:
    """Raise a `ValueError` unless `array` is of a floating-point type."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{where}: `{name}` must be a floating-point array, got dtype {array.dtype}")


def check_mask(where: str, name: str, mask: Any, expected: str, sizes: Sequence[int | None]) -> None:
    """Raise a `ValueError` unless `mask` is None or a boolean array of shape `sizes`."""
    if mask is None:
        return
    check_shape(where, name, mask, expected, sizes)
    if mask.dtype != bool:
        raise ValueError(f"{where}: `{name}` must be boolean (True = a real token), got dtype {mask.dtype}")


def is_integer(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy, which a boolean is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(where: str, name: str, value: Any, least: int = 1) -> None:
    """Raise a `ValueError` unless `value` is an integer and at least `least`."""
    if not is_integer(value) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{where}: `{name}` must be {wanted}, got {value!r}")


def check_number(where: str, name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """Raise a `ValueError` unless `value` is a real number that `fits`, which `expected` says in words."""
    if not isinstance(value, Real) or isinstance(value, bool) or not fits(value):
        raise ValueError(f"{where}: `{name}` must be {expected}, got {value!r}")


def check_positive(where: str, name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a finite number above 0."""
    check_number(where, name, value, "a positive number", lambda number: 0 < number < math.inf)


def check_flag(where: str, name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a boolean: any other value would count as True, such as "no"."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{where}: `{name}` must be True or False, got {value!r}")


def check_choice(where: str, name: str, value: Any, choices: Any) -> None:
    """Raise a `ValueError` unless `value` is one of the `Literal` type `choices`."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{where}: `{name}` must be one of {', '.join(known)}, got {value!r}")


def check_dtype(where: str, name: str, dtype: Any) -> None:
    """Raise a `ValueError` unless `dtype` is a floating-point type."""
    try:
        known = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{where}: `{name}` must be a floating-point type such as 'bfloat16', got {dtype!r}")
