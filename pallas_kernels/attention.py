"""Streaming softmax attention as three fused kernels: the arguments and results of `attn_jax.engine.tiled`.

    z_ij = score(q_i . k_j, i - j, features of i, features of j)      keys j of all streams under one softmax
    lse_i = log sum_j exp z_ij                                        o_i = sum_j exp(z_ij - lse_i) v_j

Each block of a kernel owns one tile of one head and walks over the tiles of the other side, one stream after the
other, so that streams are never concatenated. What it walks over comes through a pipeline into shared memory;
what it owns and what it sums stays on the chip:

    forward, dq                keys  j                       dkv              queries  i
                        +-----+-----+-----+                            +-----+-----+-----+
      queries   owned   | --> walks --->  |           keys     owned   | --> walks --->  |
        i        tile   +-----+-----+-----+             j       tile   +-----+-----+-----+
                   sums o (or dq), features             (one stream)     sums dk, dv, features

Which tiles a block walks over, from `first` to `end`, XLA computes beforehand from the band, the reach and the
spans: what cannot matter is never read. The backward kernels compute the tiles again from `lse` (Dao et al. 2022,
"FlashAttention", algorithm 4): with `g` the cotangent of `o`, `h` that of `lse` and `delta_i = g_i . o_i - h_i`

    p_ij = exp(z_ij - lse_i)       dz_ij = p_ij (g_i . v_j - delta_i)       ds_ij = dz_ij dscore/ddot
    dv_j = sum_i p_ij g_i          dk_j = sum_i ds_ij q_i                   dq_i = sum_j ds_ij k_j

and the derivative of the elementwise score is taken by JAX inside the tile.

Heads lie side by side in memory, `(B, L, H E)`, and a block slices its own. What is one number per token and head
(features, spans, `lse`, `delta`, masks) travels as rows of one float32 array `(B, H, rows, L)` for each side.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Var

from attn_jax.engine.plan import LOWEST_MAX, Features, Plan, Stream
from attn_jax.types import NEG_INF, Array
from pallas_kernels.hardware import Hardware
from pallas_kernels.instructions import Ref, Tiles, Value, store, walk
from pallas_kernels.launch import Cost, launch
from pallas_kernels.layout import WIDTHS, head_width, round_up, side_by_side, stack_rows, unpad

_LOG2_E = math.log2(math.e)
_NOT_FINITE = -NEG_INF / 2  # the backward pass gets a larger `lse` for queries that are not finite
_FOLDED = 1e-8, 1e8  # a scale in between makes of what is masked, `NEG_INF`, neither a logit nor an infinity
_MOST_ROWS = 65_535  # blocks along the second and third axis of a grid
_NOWHERE = 2**24  # behind every key; positions are exact in float32 below it


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tokens per tile, (owned, walked over), for each kernel, and how many steps of a walk are in flight."""

    forward: tuple[int, int] = (64, 64)
    dq: tuple[int, int] = (64, 64)
    dkv: tuple[int, int] = (64, 64)
    stages: int = 2

    @property
    def queries(self) -> int:
        """What the padded number of queries must be a multiple of."""
        return math.lcm(self.forward[0], self.dq[0], self.dkv[1])

    @property
    def keys(self) -> int:
        return math.lcm(self.forward[1], self.dq[1], self.dkv[0])


# What travels to the kernels.


class _Keys(NamedTuple):
    """A stream, padded: `k` `(B, M, K E)`, `v` `(B, M, K V)`, and rows of its features and its mask."""

    k: Array
    v: Array
    rows: Array | None


class _Queries(NamedTuple):
    """Queries, padded.

    Attributes:
      q: `(B, L, H E)`.
      rows: of features and of the spans of the streams, `(B, H, rows, L)`; then, in the forward pass, whether the
        query is finite, in the backward pass `lse` and `delta`.
      g: the cotangent of the output, `(B, L, H V)`, in the backward pass.
      dirty: int32 `(B, H, tiles)`, in the backward pass: whether a query of the tile is not finite.
    """

    q: Array
    rows: Array | None
    g: Array | None = None
    dirty: Array | None = None


class _Layout(NamedTuple):
    """What is static about a call: plans, sizes, and which row of an array is what."""

    plans: tuple[Plan, ...]
    tiles: Tiles
    tiling: Tiling
    scale: float
    heads: int
    key_heads: tuple[int, ...]
    width: int
    value_width: int
    query_features: int
    query_learned: tuple[int, ...]  # the features that have a derivative
    key_features: tuple[int, ...]
    key_learned: tuple[tuple[int, ...], ...]
    masked: tuple[bool, ...]
    spanned: tuple[bool, ...]

    def span_rows(self, stream: int) -> tuple[int, int] | None:
        """The rows of the queries that hold a stream's span."""
        if not self.spanned[stream]:
            return None
        first = self.query_features + 2 * sum(self.spanned[:stream])
        return first, first + 1

    @property
    def unit(self) -> float:
        """What logits are counted in: without a score the scale enters the exponential for nothing."""
        smallest, largest = _FOLDED
        return self.scale if smallest < self.scale < largest and all(p.score is None for p in self.plans) else 1.0

    @property
    def query_rows(self) -> int:
        """How many rows of features and spans the queries have; what follows differs between the kernels."""
        return self.query_features + 2 * sum(self.spanned)


def _layout(
    plans: tuple[Plan, ...],
    hardware: Hardware,
    scale: float,
    q: Array,
    query_features: Features,
    streams: list[Stream],
) -> _Layout:
    width, value_width = head_width(q.shape[3]), head_width(streams[0].values.shape[3])
    tiling = tiling_for(hardware)
    learned = [_learned(plan, len(query_features), len(s.features)) for plan, s in zip(plans, streams)]
    return _Layout(
        plans,
        Tiles(hardware, q.dtype),
        tiling,
        scale,
        q.shape[2],
        tuple(s.keys.shape[2] for s in streams),
        width,
        value_width,
        len(query_features),
        tuple(sorted({n for query, _ in learned for n in query})),
        tuple(len(s.features) for s in streams),
        tuple(key for _, key in learned),
        tuple(s.mask is not None or s.keys.shape[1] % tiling.keys != 0 for s in streams),
        tuple(s.span is not None for s in streams),
    )


def _learned(plan: Plan, query: int, key: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of the features of queries and of keys have a derivative that is not 0 everywhere."""

    def pull(dz: Array, position: Array, features: tuple[Features, Features]) -> tuple[Features, Features]:
        z, pullback = jax.vjp(lambda f: plan.logits(jnp.ones(()), position, position, *f), features)
        return pullback(dz.astype(z.dtype))[0]

    features = (jnp.ones(()),) * query, (jnp.ones(()),) * key
    jaxpr = jax.make_jaxpr(pull)(jnp.ones(()), jnp.int32(0), features).jaxpr
    reached = {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    depends = [isinstance(v, Var) and v in reached for v in jaxpr.outvars]
    return tuple(n for n in range(query) if depends[n]), tuple(n for n in range(key) if depends[query + n])


def tiling_for(hardware: Hardware) -> Tiling:
    """The largest tiles at which nothing spills with heads of 64.

    "mma" holds both operands of a product in registers, "wgmma" one at most.
    """
    return Tiling() if hardware.instruction == "wgmma" else Tiling(dq=(64, 32), dkv=(64, 32))


class _Kernel(NamedTuple):
    """What a block has at once.

    Attributes:
      tile: tokens owned and walked over.
      owned: the widths of what it fetches and keeps.
      staged: computed tiles that pass through shared memory.
      products: the widths of all products that a logit takes part in, together.
    """

    tile: tuple[int, int]
    owned: tuple[int, ...]
    staged: int
    products: int


def _kernels(tiling: Tiling, width: int, value_width: int) -> dict[str, _Kernel]:
    both = width + value_width
    return {
        "attention_forward": _Kernel(tiling.forward, (width,), 1, both),
        "attention_dq": _Kernel(tiling.dq, (width, value_width), 1, width + both),
        "attention_dkv": _Kernel(tiling.dkv, (width, value_width), 2, 2 * both),
    }


def _shared_memory(tiling: Tiling, itemsize: int, width: int, value_width: int, rows: int) -> int:
    """Bytes that the largest of the kernels needs: tiles owned, staged, and in flight with `rows` of vectors."""

    def needed(kernel: _Kernel) -> int:
        own, other = kernel.tile
        walked = tiling.stages * other * ((width + value_width) * itemsize + 4 * rows)
        return walked + itemsize * own * (sum(kernel.owned) + kernel.staged * other)

    return max(map(needed, _kernels(tiling, width, value_width).values()))


def _stacked(vectors: Sequence[tuple[Array, float]], length: int) -> Array | None:
    return stack_rows(vectors, length) if vectors else None


def _pad_keys(layout: _Layout, streams: list[Stream]) -> list[_Keys]:
    padded = []
    for s, masked in zip(streams, layout.masked):
        batch, keys = s.values.shape[:2]  # all examples may share the keys
        length = round_up(keys, layout.tiling.keys)
        vectors = [(f, 0.0) for f in s.features]
        if masked:
            mask = jnp.ones((batch, keys), bool) if s.mask is None else s.mask
            vectors.append((mask[:, :, None], 0.0))
        k, v = side_by_side(s.keys, length), side_by_side(s.values, length)
        padded.append(_Keys(k, v, _stacked(vectors, length)))
    return padded


def _pad_queries(
    layout: _Layout, q: Array, features: Features, streams: list[Stream], after: Sequence[tuple[Array, float]]
) -> _Queries:
    length = round_up(q.shape[1], layout.tiling.queries)
    vectors = [(f, 1.0) for f in features]
    for s in streams:
        vectors += [] if s.span is None else [(s.span[0], _NOWHERE), (s.span[1], 0.0)]
    return _Queries(side_by_side(q, length), _stacked([*vectors, *after], length))


# Which tiles a block walks over.


def _key_tiles(
    plan: Plan, stream: Stream, queries: int, tile: tuple[int, int], offset: Array, reach: Array | None
) -> Array:
    """For each tile of queries the tiles of keys that it reads, int32 `(B or 1, H or 1, query tiles, 2)`."""
    size, key_size = tile
    i = offset + jnp.arange(0, queries, size)
    reach = None if reach is None else reach[:, :, None]
    low, high = plan.keys_of(i, i + size - 1, stream.keys.shape[1], reach, key_size)
    if stream.span is not None:
        first, end = _span_of_tiles(stream.span, queries, size)
        low, high = jnp.maximum(low, first), jnp.minimum(high, end)
    return _bounds(low, high, key_size, len(i))


def _query_tiles(
    plan: Plan,
    span: tuple[Array, Array] | None,
    keys: int,
    queries: int,
    tile: tuple[int, int],
    offset: Array,
    reach: Array | None,
) -> Array:
    """For each tile of keys the tiles of queries that read it, int32 `(B or 1, H or 1, key tiles, 2)`."""
    size, query_size = tile
    j = jnp.arange(0, keys, size)
    reach = None if reach is None else reach[:, :, None]
    low, high = plan.queries_of(j - offset, j + size - 1 - offset, queries, reach, query_size)
    if span is not None:
        first, end = (x[:, :, None] for x in _span_of_tiles(span, queries, query_size))
        reads = (first < j[:, None] + size) & (j[:, None] < end)
        i = jnp.arange(0, queries, query_size)
        low = jnp.maximum(low, jnp.where(reads, i, queries).min(-1))
        high = jnp.minimum(high, jnp.where(reads, i + query_size, 0).max(-1))
    return _bounds(low, high, query_size, len(j))


def _span_of_tiles(span: tuple[Array, Array], queries: int, size: int) -> tuple[Array, Array]:
    """What the tiles of queries read together, `(B, H, tiles)`."""
    first, end = (
        jnp.pad(x, ((0, 0), (0, queries - x.shape[1]), (0, 0)), constant_values=fill)
        .swapaxes(1, 2)
        .reshape(x.shape[0], x.shape[2], -1, size)
        for x, fill in zip(span, (_NOWHERE, 0))
    )
    return first.min(-1), end.max(-1)


def _bounds(low: Array | int, high: Array | int, size: int, tiles: int) -> Array:
    """Tiles of `size` that hold `low..high`, as `(first, end)` with `first <= end`."""
    first = jnp.asarray(low, jnp.int32) // size
    end = jnp.maximum(first, -(-jnp.asarray(high, jnp.int32) // size))
    bounds = jnp.stack(jnp.broadcast_arrays(first, end), axis=-1)
    bounds = bounds.reshape((1,) * (4 - bounds.ndim) + bounds.shape)
    return jnp.broadcast_to(bounds, (*bounds.shape[:2], tiles, 2))


# Inside a kernel.


class _Block(NamedTuple):
    """Where a block stands: the example, the head, and the first token of the tile that it owns."""

    batch: Array
    head: Array
    tile: Array

    @classmethod
    def here(cls) -> "_Block":
        return cls(lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile"))

    def example(self, ref: Ref) -> Any:
        """Of an array that all examples may share."""
        return self.batch if ref.shape[0] > 1 else 0

    def shared(self, ref: Ref) -> tuple[Any, Any]:
        """Example and head of an array that all examples and heads may share."""
        return self.example(ref), self.head if ref.shape[1] > 1 else 0

    def tokens(self, ref: Ref, head: Any, width: int, size: int) -> Ref:
        """The owned tile, of `size` tokens, of an array `(B or 1, L, H width)`."""
        return ref.at[self.example(ref), pl.ds(self.tile * size, size), pl.ds(head * width, width)]

    def rows(self, ref: Ref | None, size: int, number: int) -> list[Value]:
        """The first `number` rows of the owned tile."""
        return [self.row(ref, n, self.tile * size, size) for n in range(number)]

    def row(self, ref: Ref, number: int, start: Any, size: int) -> Value:
        return plgpu.load(ref.at[(*self.shared(ref), number, pl.ds(start, size))], optimized=False)

    def query_arrays(self, layout: _Layout, queries: _Queries) -> list[tuple[Ref, Any, int]]:
        """Queries and cotangents of the block's head, as `(ref, head, width)`."""
        return [(queries.q, self.head, layout.width), (queries.g, self.head, layout.value_width)]

    def key_arrays(self, layout: _Layout, stream: int, keys: _Keys) -> list[tuple[Ref, Any, int]]:
        """Keys and values of the head that serves the block's."""
        head = self.head // (layout.heads // layout.key_heads[stream])
        return [(keys.k, head, layout.width), (keys.v, head, layout.value_width)]

    def bounds(self, ref: Ref) -> tuple[Value, Value]:
        at = *self.shared(ref), self.tile
        return ref[(*at, 0)], ref[(*at, 1)]


Values = tuple[Value, ...]


class _Pair(NamedTuple):
    """A tile of queries and a tile of keys: how vectors and positions of either spread over the tile of logits."""

    shape: tuple[int, int]
    query_axis: int

    def query(self, vector: Value) -> Value:
        return lax.broadcast_in_dim(vector, self.shape, [self.query_axis])

    def key(self, vector: Value) -> Value:
        return lax.broadcast_in_dim(vector, self.shape, [1 - self.query_axis])

    def positions(self, i: Value, j: Value) -> tuple[Value, Value]:
        """Of queries and keys, where those of the first are `i` and `j`."""
        iota = functools.partial(lax.broadcasted_iota, jnp.int32, self.shape)
        return iota(self.query_axis) + i, iota(1 - self.query_axis) + j

    def scored(
        self, layout: _Layout, stream: int, i: Value, j: Value, queries: list[Value], keys: list[Value]
    ) -> tuple[Callable[..., Value], tuple[Values, Values], Callable[[Value], Value]]:
        """The score, a function of products and features; the features of either side; and the mask of logits.

        `queries` and `keys` are the rows of either side, `i` and `j` the positions of the first.
        """
        plan = layout.plans[stream]
        i, j = self.positions(i, j)

        def score(dot: Value, query: Values, key: Values) -> Value:
            return plan.logits(dot, i, j, query, key)

        features = (
            tuple(map(self.query, queries[: layout.query_features])),
            tuple(map(self.key, keys[: layout.key_features[stream]])),
        )
        valid = self.key(keys[-1]) > 0 if layout.masked[stream] else None
        at = layout.span_rows(stream)
        span = at and tuple(self.query(queries[n]).astype(jnp.int32) for n in at)
        return score, features, lambda z: plan.mask(z, i, j, valid, span)


def _substitute(features: Values, numbers: tuple[int, ...], values: Sequence[Value]) -> Values:
    """`features` with `values` in the places of those `numbers`."""
    changed = list(features)
    for number, value in zip(numbers, values):
        changed[number] = value
    return tuple(changed)


def _add_rows(totals: list[Value], tiles: Sequence[Value]) -> list[Value]:
    """Sums of the rows of tiles, added to what came before."""
    return [total + tile.sum(axis=1) for total, tile in zip(totals, tiles)]


def _walk(
    layout: _Layout,
    block: _Block,
    bounds: Ref,
    size: int,
    arrays: Sequence[tuple[Ref, Any, int]],
    rows: Ref | None,
    step: Callable[[Value, list[Ref], list[Value], Any], Any],
    carry: Any,
) -> Any:
    """`walk` over the tiles within a block's bounds, of arrays `(B or 1, L, heads width)`."""
    first, end = block.bounds(bounds)
    arrays = [(ref.at[block.example(ref)], head, width) for ref, head, width in arrays]
    rows = None if rows is None else rows.at[block.shared(rows)]
    order = lambda t: first + t  # noqa: E731
    return walk(layout.tiles, size, end - first, order, arrays, rows, step, carry, layout.tiling.stages)


def _reached(plan: Plan, tokens: int, tile: tuple[int, int]) -> int:
    """To how many of the `tokens` walked over a window brings a tile, at most; all of them without a window."""
    if plan.left is None or plan.right is None:
        return tokens
    seen = tile[0] + plan.left + plan.right  # wherever they begin among the tiles
    return min(tokens, round_up(seen - 1, tile[1]) + tile[1])


def _launch(
    layout: _Layout, name: str, body: Callable[..., None], operands: Any, out: Any, walked: list[tuple[Plan, int]]
) -> Any:
    """`launch` a kernel whose blocks own the tiles of `out[0]` and walk over `walked`, each a plan and tokens."""
    kernel = _kernels(layout.tiling, layout.width, layout.value_width)[name]
    batch, length, _ = out[0].shape
    size = kernel.tile[0]
    logits = batch * layout.heads * length * sum(_reached(plan, tokens, kernel.tile) for plan, tokens in walked)
    traffic = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves((operands, out)))
    owned = [(size, width) for width in kernel.owned]
    return launch(
        body,
        *operands,
        name=name,
        out=out,
        grid={"batch": batch, "head": layout.heads, "tile": length // size},
        scratch=[*layout.tiles.resident(*owned), *layout.tiles.staging(*[kernel.tile] * kernel.staged)],
        hardware=layout.tiles.hardware,
        cost=Cost(2 * logits * kernel.products, logits, traffic),
    )


# The kernels.


def _forward(layout: _Layout, offset: Array, bounds: list[Array], queries: _Queries, keys: list[_Keys]) -> Any:
    """`o` `(B, L, H V)`, `lse` `(B, H, L)` and each stream's own `(B, H, streams, L)`, if there are several."""
    size, key_size = layout.tiling.forward
    batch, length, _ = queries.q.shape
    heads, width, value_width = layout.heads, layout.width, layout.value_width
    tiles = layout.tiles
    pair = _Pair((size, key_size), 0)
    several = len(keys) > 1
    some_not_finite = queries.rows is not None and queries.rows.shape[2] > layout.query_rows
    log2 = layout.unit * _LOG2_E

    def body(offset: Ref, bounds: list[Ref], queries: _Queries, keys: list[_Keys], *refs: Ref) -> None:
        (o_ref, lse_ref, stream_lse_ref), (q, barrier, *staging) = refs[:3], refs[3:]
        block = _Block.here()
        i = offset[0] + block.tile * size
        tiles.fetch([block.tokens(queries.q, block.head, width, size)], [q], barrier)
        rows = block.rows(queries.rows, size, layout.query_rows)
        top = jnp.full((size,), LOWEST_MAX, jnp.float32)
        zero = jnp.zeros((size,), jnp.float32)
        o, total = jnp.zeros((size, value_width), jnp.float32), zero
        for n, stream in enumerate(keys):

            def step(j: Value, refs: list[Ref], vectors: list[Value], carry: Any, n: int = n) -> Any:
                k, v = refs
                o, top, own = carry
                score, features, mask = pair.scored(layout, n, i, j, rows, vectors)
                z = mask(score(_scaled(layout, tiles.nt(q, k)), *features))
                new = jnp.maximum(top, z.max(axis=1))
                p = jnp.exp2(z * log2 - pair.query(new * log2))
                shrink = jnp.exp2((top - new) * log2)
                own = own * shrink + p.sum(axis=1)
                shrink = lax.broadcast_in_dim(shrink, o.shape, [0])
                return tiles.nn(o * shrink, p, v, *staging), new, own

            arrays, carry, before = block.key_arrays(layout, n, stream), (o, top, zero), top
            o, top, own = _walk(layout, block, bounds[n], key_size, arrays, stream.rows, step, carry)
            total = total * jnp.exp2((before - top) * log2) + own
            if several:
                at = block.batch, block.head, n, pl.ds(block.tile * size, size)
                store(stream_lse_ref.at[at], _logsumexp(top * layout.unit, own))
        divisor = jnp.where(total != 0, total, 1)
        o = o / lax.broadcast_in_dim(divisor, o.shape, [0])
        if some_not_finite:
            finite = block.row(queries.rows, layout.query_rows, block.tile * size, size)
            o = jnp.where(lax.broadcast_in_dim(finite, o.shape, [0]) > 0, o, jnp.nan)
        store(block.tokens(o_ref, block.head, value_width, size), o.astype(tiles.dtype))
        store(
            lse_ref.at[block.batch, block.head, pl.ds(block.tile * size, size)],
            _logsumexp(top * layout.unit, total),
        )

    out = (
        jax.ShapeDtypeStruct((batch, length, heads * value_width), tiles.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, len(keys), length), jnp.float32) if several else None,
    )
    walked = [(plan, s.k.shape[1]) for plan, s in zip(layout.plans, keys)]
    return _launch(layout, "attention_forward", body, (offset, bounds, queries, keys), out, walked)


def _scaled(layout: _Layout, dot: Value) -> Value:
    """Products as the score gets them."""
    return dot if layout.scale == layout.unit else dot * layout.scale


def _weights(layout: _Layout, z: Value, lse: Value) -> Value:
    """`exp(z - lse)` of tiles in the backward pass."""
    return jnp.exp2(z * (layout.unit * _LOG2_E) - lse * _LOG2_E)


def _logsumexp(top: Value, total: Value) -> Value:
    return jnp.where(total != 0, top + jnp.log(jnp.where(total != 0, total, 1)), NEG_INF)


def _dq(layout: _Layout, offset: Array, bounds: list[Array], queries: _Queries, keys: list[_Keys]) -> Any:
    """`dq` `(B, L, H E)` and the gradients of learned query features `(B, H, features, L)`, if there are any."""
    size, key_size = layout.tiling.dq
    batch, length, _ = queries.q.shape
    heads, width = layout.heads, layout.width
    tiles = layout.tiles
    pair = _Pair((size, key_size), 0)

    def body(offset: Ref, bounds: list[Ref], queries: _Queries, keys: list[_Keys], *refs: Ref) -> None:
        (dq_ref, features_ref), (q, g, barrier, *staging) = refs[:2], refs[2:]
        block = _Block.here()
        i = offset[0] + block.tile * size
        tiles.fetch([block.tokens(*a, size) for a in block.query_arrays(layout, queries)], [q, g], barrier)
        rows = block.rows(queries.rows, size, layout.query_rows + 2)
        *_, lse, delta = rows
        zero = jnp.zeros((size,), jnp.float32)
        carry = jnp.zeros((size, width), jnp.float32), [zero] * len(layout.query_learned)
        for n, stream in enumerate(keys):

            def step(j: Value, refs: list[Ref], vectors: list[Value], carry: Any, n: int = n) -> Any:
                k, v = refs
                dq, d_features = carry
                score, (query, key), mask = pair.scored(layout, n, i, j, rows, vectors)

                def of_query(dot: Value, learned: list[Value]) -> Value:
                    return score(dot, _substitute(query, layout.query_learned, learned), key)

                dot = _scaled(layout, tiles.nt(q, k))
                z, pullback = jax.vjp(of_query, dot, [query[f] for f in layout.query_learned])
                p = _weights(layout, mask(z), pair.query(lse))
                ds, d_query = pullback(p * (tiles.nt(g, v) - pair.query(delta)))
                return tiles.nn(dq, ds, k, *staging), _add_rows(d_features, d_query)

            arrays = block.key_arrays(layout, n, stream)
            carry = _walk(layout, block, bounds[n], key_size, arrays, stream.rows, step, carry)
        dq, d_features = carry
        dq = jnp.where(lax.broadcast_in_dim(lse, dq.shape, [0]) < _NOT_FINITE, dq * layout.scale, 0)
        store(block.tokens(dq_ref, block.head, width, size), dq.astype(tiles.dtype))
        for n, d in enumerate(d_features):
            store(features_ref.at[block.batch, block.head, n, pl.ds(block.tile * size, size)], d)

    features = (batch, heads, len(layout.query_learned), length)
    out = (
        jax.ShapeDtypeStruct((batch, length, heads * width), tiles.dtype),
        jax.ShapeDtypeStruct(features, jnp.float32) if layout.query_learned else None,
    )
    walked = [(plan, s.k.shape[1]) for plan, s in zip(layout.plans, keys)]
    return _launch(layout, "attention_dq", body, (offset, bounds, queries, keys), out, walked)


def _dkv(layout: _Layout, stream: int, offset: Array, bounds: Array, queries: _Queries, keys: _Keys) -> Any:
    """For each query head `dk` `(B, M, H E)`, `dv` `(B, M, H V)` and the gradients of the learned key features
    `(B, H, features, M)`, if there are any. Tiles of logits are (keys, queries) here."""
    size, query_size = layout.tiling.dkv
    batch, length, _ = keys.v.shape
    heads, width, value_width = layout.heads, layout.width, layout.value_width
    learned = layout.key_learned[stream]
    tiles = layout.tiles
    pair = _Pair((size, query_size), 1)

    def body(offset: Ref, bounds: Ref, queries: _Queries, keys: _Keys, *refs: Ref) -> None:
        (dk_ref, dv_ref, features_ref), (k, v, barrier, *staging) = refs[:3], refs[3:]
        block = _Block.here()
        j = block.tile * size
        tiles.fetch([block.tokens(*a, size) for a in block.key_arrays(layout, stream, keys)], [k, v], barrier)
        vectors = block.rows(keys.rows, size, layout.key_features[stream] + layout.masked[stream])
        zero = jnp.zeros((size,), jnp.float32)

        def step(start: Value, refs: list[Ref], rows: list[Value], carry: Any) -> Any:
            q, g = refs
            dk, dv, d_features = carry
            *_, lse, delta = rows

            def clean() -> None:
                fine = block.row(queries.rows, layout.query_rows, start, query_size) < _NOT_FINITE
                for ref in refs:
                    ref[...] = jnp.where(lax.broadcast_in_dim(fine, ref.shape, [0]), ref[...], 0)
                plgpu.commit_smem()

            if queries.dirty is not None:
                pl.when(queries.dirty[block.batch, block.head, lax.div(start, query_size)] > 0)(clean)

            score, (query, key), mask = pair.scored(layout, stream, offset[0] + start, j, rows, vectors)

            def of_key(dot: Value, values: list[Value]) -> Value:
                return score(dot, query, _substitute(key, learned, values))

            dot = _scaled(layout, tiles.nt(k, q))
            z, pullback = jax.vjp(of_key, dot, [key[f] for f in learned])
            p = _weights(layout, mask(z), pair.query(lse))
            dv = tiles.nn(dv, p, g, *staging[:1])
            ds, d_key = pullback(p * (tiles.nt(v, g) - pair.query(delta)))
            return tiles.nn(dk, ds, q, *staging[1:]), dv, _add_rows(d_features, d_key)

        carry = (
            jnp.zeros((size, width), jnp.float32),
            jnp.zeros((size, value_width), jnp.float32),
            [zero] * len(learned),
        )
        arrays = block.query_arrays(layout, queries)
        dk, dv, d_features = _walk(layout, block, bounds, query_size, arrays, queries.rows, step, carry)
        store(block.tokens(dk_ref, block.head, width, size), (dk * layout.scale).astype(tiles.dtype))
        store(block.tokens(dv_ref, block.head, value_width, size), dv.astype(tiles.dtype))
        for n, d in enumerate(d_features):
            store(features_ref.at[block.batch, block.head, n, pl.ds(block.tile * size, size)], d)

    out = (
        jax.ShapeDtypeStruct((batch, length, heads * width), tiles.dtype),
        jax.ShapeDtypeStruct((batch, length, heads * value_width), tiles.dtype),
        jax.ShapeDtypeStruct((batch, heads, len(learned), length), jnp.float32) if learned else None,
    )
    walked = [(layout.plans[stream], queries.q.shape[1])]
    return _launch(layout, "attention_dkv", body, (offset, bounds, queries, keys), out, walked)


# What the engine calls: `unsupported`, and the counterparts of `attn_jax.engine.tiled`'s two functions.


def unsupported(hardware: Hardware, q: Array, query_features: int, streams: list[Stream]) -> str | None:
    """Why these kernels cannot run on `hardware`, None if they can."""
    types = ("bfloat16", "float16", "float32") if hardware.interpret else ("bfloat16", "float16")
    if q.dtype.name not in types:
        return f"operands are {q.dtype.name}, it multiplies {', '.join(types)}"
    if any(s.bias is not None for s in streams):
        return "a bias for each pair of query and key is not fused"
    width, value_width = q.shape[3], max(s.values.shape[3] for s in streams)
    if max(width, value_width) > WIDTHS[-1]:
        return f"heads are {width} and {value_width} wide, its tiles are up to {WIDTHS[-1]}"
    spans = 2 * sum(s.span is not None for s in streams)
    rows = max(query_features + spans + 2, *(len(s.features) + 1 for s in streams))
    needed = _shared_memory(
        tiling_for(hardware), q.dtype.itemsize, head_width(width), head_width(value_width), rows
    )
    if needed > hardware.shared_memory and not hardware.interpret:
        return f"it needs {needed:,} bytes of shared memory, a block has {hardware.shared_memory:,}"
    if max(q.shape[1], *(s.keys.shape[1] for s in streams)) > _NOWHERE:
        return f"a sequence is longer than {_NOWHERE:,}"
    if max(q.shape[0], q.shape[2]) > _MOST_ROWS:
        return f"there are more than {_MOST_ROWS:,} examples or heads"
    if q.shape[0] * q.shape[2] == 0:
        return "there is nothing to compute"
    return None


def forward(
    plans: tuple[Plan, ...],
    hardware: Hardware,
    scale: float,
    offset: Array,
    reach: Array | None,
    q: Array,
    finite: Array | None,
    query_features: Features,
    streams: list[Stream],
) -> tuple[Array, Array, Array]:
    """`(out, lse, stream_lse)`, where `out` is NaN for queries that are not `finite`.

    `finite` is bool `(B, L, H)`, None if all are. Products are multiplied by `scale` in the kernel, which spares a
    copy of the queries.
    """
    layout = _layout(plans, hardware, scale, q, query_features, streams)
    queries = _pad_queries(layout, q, query_features, streams, [] if finite is None else [(finite, 1.0)])
    keys = _pad_keys(layout, streams)
    length, tile = queries.q.shape[1], layout.tiling.forward
    bounds = [_key_tiles(plan, s, length, tile, offset, reach) for plan, s in zip(plans, streams)]
    o, lse, stream_lse = _forward(layout, offset[None], bounds, queries, keys)
    out = unpad(o, q.shape[1], layout.heads, streams[0].values.shape[3])
    stream_lse = lse[:, :, None] if stream_lse is None else stream_lse
    return (
        out,
        lse[:, :, : q.shape[1]].swapaxes(1, 2),
        stream_lse[..., : q.shape[1]].transpose(2, 0, 3, 1),
    )


def _unpad_rows(x: Array | None, learned: tuple[int, ...], features: Features) -> Features:
    """The gradients of all features: rows of `(B, H, learned, padded)`, and 0 for those without a derivative."""
    values = () if x is None else x.transpose(2, 0, 3, 1)
    zeros = tuple(jnp.zeros(f.shape, jnp.float32) for f in features)
    return _substitute(zeros, learned, [v[:, : f.shape[1]] for v, f in zip(values, features)])


def backward(
    plans: tuple[Plan, ...],
    hardware: Hardware,
    scale: float,
    offset: Array,
    reach: Array | None,
    q: Array,
    finite: Array | None,
    query_features: Features,
    streams: list[Stream],
    lse: Array,
    delta: Array,
    g: Array,
) -> tuple[Array, Features, list[Stream]]:
    """Gradients of queries, of query features and of streams, whose keys and values have one head per query head.

    `lse` and `delta` are `(B, L, H)`. For a query that is not `finite`, `lse` must be `-NEG_INF`, and its gradient
    is 0; for one that read nothing or NaN, less than half of that and so large that `exp(-lse)` is 0.
    """
    layout = _layout(plans, hardware, scale, q, query_features, streams)
    queries = _pad_queries(layout, q, query_features, streams, [(lse, -NEG_INF), (delta, 0.0)])
    keys = _pad_keys(layout, streams)
    length, tile = queries.q.shape[1], layout.tiling.dkv[1]
    dirty = None
    if finite is not None and hardware.instruction == "mma":  # whose layouts cannot clean a tile in shared memory
        q, g = (jnp.where(finite[..., None], x, 0) for x in (q, g))
        queries = queries._replace(q=side_by_side(q, length))
    elif finite is not None:
        dirty = jnp.pad(~finite, ((0, 0), (0, length - q.shape[1]), (0, 0)))
        dirty = dirty.reshape(q.shape[0], -1, tile, q.shape[2]).any(2).swapaxes(1, 2).astype(jnp.int32)
    queries = queries._replace(g=side_by_side(g, length), dirty=dirty)
    key_tiles = [_key_tiles(plan, s, length, layout.tiling.dq, offset, reach) for plan, s in zip(plans, streams)]
    dq, d_query = _dq(layout, offset[None], key_tiles, queries, keys)
    d_query = _unpad_rows(d_query, layout.query_learned, query_features)
    d_streams = []
    for n, (plan, s) in enumerate(zip(plans, streams)):
        query_tiles = _query_tiles(plan, s.span, keys[n].k.shape[1], length, layout.tiling.dkv, offset, reach)
        dk, dv, d_key = _dkv(layout, n, offset[None], query_tiles, queries, keys[n])
        tokens = s.keys.shape[1]
        d_streams.append(
            s._replace(
                keys=unpad(dk, tokens, layout.heads, s.keys.shape[3]),
                values=unpad(dv, tokens, layout.heads, s.values.shape[3]),
                mask=None,
                features=_unpad_rows(d_key, layout.key_learned[n], s.features),
                bias=None,
                span=None,
            )
        )
    dq = unpad(dq, q.shape[1], layout.heads, q.shape[3])
    return dq, d_query, d_streams
