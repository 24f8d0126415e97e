"""The vocabulary of streaming softmax attention, shared by its implementations."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from attn_jax.types import NEG_INF, Array

Features = tuple[Array, ...]

Score = Callable[[Array, Array, Features, Features], Array]
"""`score(dot, distance, query_features, key_features) -> logits`, elementwise.

`dot` is a tile of `q . k`, `distance` of `i - j` (float); features broadcast against the tile from either side.
It must be finite for key features 0, which is what masked keys get, and query features 1, which is what queries of
padding and those with a NaN get. Pass a module-level function: its identity is part of the compilation key.
"""

# The running maximum starts above NEG_INF: a masked score is then exp(-9e29) = 0 even before a real one came.
LOWEST_MAX = -1e29

# Tiles (queries, keys) that ran fastest on CPUs with AVX-512; anything within a factor of two is close. Smaller
# ones waste less at the edge of a band.
FORWARD_TILE = (512, 256)
BACKWARD_TILE = (256, 256)
_BAND_TILE = (256, 256)


# In a narrower window, tiles of this many queries (backward: keys) with all that they see leave less in vain.
_NARROW = 256
_NARROW_TILE = 64


class Stream(NamedTuple):
    """Keys that a query may read.

    Attributes:
      keys: `(B, M, K, E)`, where the `K` key heads divide the query heads and each serves `H / K` of them.
      values: `(B, M, K, V)`.
      mask: bool `(B, M)`, True = may be used, or None.
      features: float arrays `(B, M, H)` for the score.
      bias: None or float `(B or 1, H or 1, L, M)`, added to the logits.
      ordered: whether key `j` stands at position `j` of the sequence that the queries are from. Where it does not
        (latent tokens, samples, a memory), causality and windows do not concern it and its distance is 0.
      span: None or int32 `(first, end)`, each `(B, L, H)`: query `i` reads keys `first_i <= j < end_i` only. Fast
        where neighbouring queries have neighbouring spans, since whole tiles are left out.
    """

    keys: Array
    values: Array
    mask: Array | None = None
    features: Features = ()
    bias: Array | None = None
    ordered: bool = True
    span: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about attention to one stream: the score, the band of admissible distances, the tiles.

    `left` and `right` bound how far a key may lie behind and ahead of the query, None for any distance.
    Positions `i` of queries and `j` of keys come as broadcastable integer arrays.
    """

    score: Score | None
    left: int | None
    right: int | None
    ordered: bool = True
    forward_tile: tuple[int, int] = FORWARD_TILE
    backward_tile: tuple[int, int] = BACKWARD_TILE

    @property
    def banded(self) -> bool:
        return self.left is not None or self.right is not None

    def logits(self, dot: Array, i: Array, j: Array, query: Features, key: Features) -> Array:
        if self.score is None:
            return dot
        distance = (i - j).astype(dot.dtype) if self.ordered else jnp.zeros((), dot.dtype)
        return self.score(dot, distance, query, key)

    def mask(
        self, logits: Array, i: Array, j: Array, valid: Array | None, span: tuple[Array, ...] | None
    ) -> Array:
        allowed = [] if valid is None else [valid]
        if span is not None:
            allowed += [span[0] <= j, j < span[1]]
        if self.left is not None:
            allowed.append(i - j <= self.left)
        if self.right is not None:
            allowed.append(j - i <= self.right)
        return jnp.where(functools.reduce(jnp.logical_and, allowed), logits, NEG_INF) if allowed else logits

    def keys_of(
        self, first: Array, last: Array, length: int, reach: Array | None, tile: int
    ) -> tuple[Array | int, Array | int]:
        """The range of the `length` keys that queries at positions `first..last` read, in tiles of `tile`."""
        return self._range(first, last, length, self.left, self.right, reach, tile)

    def queries_of(
        self, first: Array, last: Array, length: int, reach: Array | None, tile: int
    ) -> tuple[Array | int, Array | int]:
        """The range of the `length` queries that read keys at positions `first..last`, in tiles of `tile`."""
        return self._range(first, last, length, self.right, self.left, reach, tile)

    def _range(
        self,
        first: Array,
        last: Array,
        length: int,
        left: int | None,
        right: int | None,
        reach: Array | None,
        tile: int,
    ) -> tuple[Array | int, Array | int]:
        low = 0 if left is None else jnp.clip(first - left, 0, length)
        high = length if right is None else jnp.clip(last + right + 1, 0, length)
        if reach is not None and self.ordered:
            # Whole tiles, so that where the reach ends does not move the ones that are computed.
            low = jnp.maximum(low, (first - reach) // tile * tile)
            high = jnp.minimum(high, last + reach + 1)
        return low, high


def tiles(left: int | None, right: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The forward and backward tile for a band."""
    if left is None and right is None:
        return FORWARD_TILE, BACKWARD_TILE
    if left is None or right is None or left + right > _NARROW:
        return _BAND_TILE, BACKWARD_TILE
    seen = _NARROW_TILE + left + right
    return (_NARROW_TILE, seen), (seen, _NARROW_TILE)


def add_key_feature(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    """The score of keys with a bias of their own, their first feature."""
    return dot + key[0]


def repeat_heads(x: Array, heads: int) -> Array:
    """Key heads `(B, M, K, ...)` for `heads` query heads, each as often as it serves one."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def sum_groups(x: Array, heads: int) -> Array:
    """The sum over query heads that share a key head, `(B, M, H, ...)` to `(B, M, heads, ...)`, as accumulated."""
    if x.shape[2] == heads:
        return x
    return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:]).sum(3, dtype=accumulation(x.dtype))


def accumulation(dtype: Any) -> Any:
    """The type of sums, products and exponentials of operands of type `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def merge(parts: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, list[Array]]:
    """Merge disjoint key sets' (maximum, normaliser, accumulator) into out, lse and each set's own lse."""
    top = functools.reduce(jnp.maximum, [m for m, _, _ in parts])
    total = functools.reduce(jnp.add, [l * jnp.exp(m - top) for m, l, _ in parts])
    mixed = functools.reduce(jnp.add, [o * jnp.exp(m - top) for m, _, o in parts])
    # `!= 0` and not `> 0`: a NaN among the logits must be seen.
    out = jnp.where(total != 0, mixed / jnp.where(total != 0, total, 1), 0)
    return out, _logsumexp(top, total), [_logsumexp(m, l) for m, l, _ in parts]


def _logsumexp(m: Array, l: Array) -> Array:
    return jnp.where(l != 0, m + jnp.log(jnp.where(l != 0, l, 1)), NEG_INF)
