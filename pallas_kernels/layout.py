"""Arrays as kernels take them: whole tiles, heads side by side, and numbers per token as rows."""

from collections.abc import Sequence

import jax.numpy as jnp

from attn_jax.types import Array

WIDTHS = (32, 64, 128)
"""The head widths that copies and products take."""


def round_up(size: int, multiple: int) -> int:
    """The next positive multiple."""
    return max(1, -(-size // multiple)) * multiple


def head_width(width: int) -> int:
    """The next of `WIDTHS`."""
    return next(w for w in WIDTHS if w >= width)


def side_by_side(x: Array, length: int) -> Array:
    """`(B, L, H, E)` to `(B, length, H width)`, padded with zeros."""
    batch, tokens, heads, e = x.shape
    width = head_width(e)
    x = jnp.pad(x, ((0, 0), (0, length - tokens), (0, 0), (0, width - e)))
    return x.reshape(batch, length, heads * width)


def unpad(x: Array, length: int, heads: int, width: int) -> Array:
    """The inverse of `side_by_side`, `(B, padded, H padded)` to `(B, L, H, width)`."""
    return x.reshape(*x.shape[:2], heads, -1)[:, :length, :, :width]


def stack_rows(vectors: Sequence[tuple[Array, float]], length: int) -> Array:
    """Vectors `(B, L, H or 1)`, each with what fills it up to `length`, as float32 `(B, H or 1, rows, length)`."""
    heads = max(x.shape[2] for x, _ in vectors)
    padded = []
    for x, fill in vectors:
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, length - x.shape[1]), (0, 0)), constant_values=fill)
        padded.append(jnp.broadcast_to(x, (*x.shape[:2], heads)).swapaxes(1, 2))
    return jnp.stack(padded, axis=2)
