"""The exponential in float32, on a CPU nearly twice as fast as XLA's own there."""

import jax
import jax.numpy as jnp
from jax import lax

from attn_jax.types import Array

_LOG2_E = 1.4426950408889634
# log 2 in two parts, the first of so few bits that its products with exponents are exact.
_LOG2_HIGH, _LOG2_LOW = 0.693145751953125, 1.428606765330187e-6
# Minimax for (exp(r) - 1) / r on |r| <= log(2) / 2; relative error of exp 9e-8.
_COEFFICIENTS = (0.999999707014424, 0.49999149192979, 0.166676365810983, 0.0418979753532286, 0.0082903061940302)
# Beyond these the result is 0 and infinity.
_RANGE = -88.02, 88.8
# As a float32 this plus an integer n has n + 127, the bits of the exponent of 2^n, in its lowest byte.
_SHIFT = 1.5 * 2**23 + 127


@jax.custom_jvp
def exp(x: Array) -> Array:
    """`exp(x)`, in float32 with a relative error below 3e-7, infinity from 88.38 on; NaN stays NaN."""
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    return lax.platform_dependent(x, cpu=_polynomial, default=jnp.exp)


@exp.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = exp(*primals)
    return y, y * tangents[0]


def _polynomial(x: Array) -> Array:
    """`2^n exp(r)` for `x = n log 2 + r`."""
    x = jnp.clip(x, *_RANGE)
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = x - n * _LOG2_HIGH - n * _LOG2_LOW
    y = jnp.full_like(r, _COEFFICIENTS[-1])
    for c in (*_COEFFICIENTS[-2::-1], 1.0):
        y = y * r + c
    exponent = lax.bitcast_convert_type(shifted, jnp.int32) << 23
    return y * lax.bitcast_convert_type(exponent, jnp.float32)
