"""Position encodings: sinusoidal in one and two dimensions, and rotary."""

import jax.numpy as jnp

from attn_jax.types import Array, Dtype, check_floating, check_shape


def sinusoidal_positions(length: int, dim: int, dtype: Dtype = jnp.float32) -> Array:
    """Sinusoidal position embeddings `(L, D)` (Vaswani et al. 2017, section 3.5): sines first, then cosines."""
    half = (dim + 1) // 2
    rate = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angle = jnp.arange(length)[:, None] * rate
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :dim].astype(dtype)


def sinusoidal_positions_2d(height: int, width: int, dim: int, dtype: Dtype = jnp.float32) -> Array:
    """Embeddings `(height, width, D)` of a grid: half of the features tell the row, the others the column.

    Raises:
      ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"sinusoidal_positions_2d: `dim` must be even, got {dim}")
    shape = (height, width, dim // 2)
    rows = jnp.broadcast_to(sinusoidal_positions(height, dim // 2, dtype)[:, None], shape)
    columns = jnp.broadcast_to(sinusoidal_positions(width, dim // 2, dtype), shape)
    return jnp.concatenate([rows, columns], axis=-1)


def rotary(x: Array, positions: Array, *, base: float = 10_000.0) -> Array:
    """Rotary position embedding (Su et al. 2021): products of rotated queries and keys see only distances.

    Args:
      x: `(B, L, H, E)`, queries or keys; feature `n` and feature `n + E / 2` are turned together by the angle
        `position base^(-2 n / E)`.
      positions: `(L,)` or `(B, L)`, of any numeric type.
      base: of the wavelengths, which grow from `2 pi` to `2 pi base`.

    Returns:
      Like `x`; angles are computed in float32.

    Raises:
      ValueError: shapes that do not fit, an odd `E`.
    """
    check_shape("rotary", "x", x, "(B, L, H, E)", (None,) * 4)
    check_floating("rotary", "x", x)
    shared = len(getattr(positions, "shape", ())) < 2
    check_shape("rotary", "positions", positions, "(L,) or (B, L)", x.shape[1:2] if shared else x.shape[:2])
    if x.shape[-1] % 2:
        raise ValueError(f"rotary: `x` must have an even head width, got shape {x.shape}")
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
