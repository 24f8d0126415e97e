"""Streaming softmax attention in tiles, portable XLA, with a hand-written backward pass.

Everything below these two functions works on one *row*, a head of an example: queries `(L, E)`, keys `(M, E)`.

    forward     for each tile of queries            backward    for each tile of keys
                  for each tile of keys it sees                   for each tile of queries that see it
                    carry (maximum, normaliser, sum)                carry (dk, dv), add to dq

Skipped tiles cost nothing: the inner loops have bounds, no masks. Where there is a band, inner tiles start
anywhere (at the edge of the band), so a window needs few of them. A tile that would reach beyond the end starts
earlier, and what the one before it has read is masked. There is one `Plan` for each stream; they differ in their
bands. Autodiff through the loops would keep every tile; the backward pass keeps `(out, lse)` and computes the
tiles again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attn_jax.engine import dispatch
from attn_jax.engine.exponential import exp
from attn_jax.engine.plan import LOWEST_MAX, Features, Plan, Stream, accumulation, merge, repeat_heads
from attn_jax.types import NEG_INF, Array


# Jitted, so that layers, values and gradients share one trace.
@functools.partial(jax.jit, static_argnums=0)
def forward(
    plans: tuple[Plan, ...],
    offset: Array,
    reach: Array | None,
    q: Array,
    query_features: Features,
    streams: list[Stream],
) -> tuple[Array, Array, Array]:
    """`(out, lse, stream_lse)` as in `Attended`, for arrays `(B, L, H, ...)` whose masked keys are zero."""
    heads = q.shape[2]
    row = functools.partial(_forward_row, plans, offset, [s.bias for s in streams])
    out, lse, stream_lse = dispatch.over_rows(row, *_rows(reach, q, query_features, streams))
    out, lse = _from_rows(out, heads), _from_rows(lse, heads)
    return out, lse, jnp.stack([_from_rows(x, heads) for x in stream_lse])


@functools.partial(jax.jit, static_argnums=0)
def backward(
    plans: tuple[Plan, ...],
    offset: Array,
    reach: Array | None,
    q: Array,
    query_features: Features,
    streams: list[Stream],
    lse: Array,
    delta: Array,
    g: Array,
) -> tuple[Array, Features, list[Stream]]:
    """Gradients of queries, query features and streams, their keys and values of as many heads as the queries.

    Args:
      lse: of the forward pass, `(B, L, H)`; so large where nothing was read that `exp(-lse)` is 0.
      delta: `(B, L, H)`, the cotangent of `out` times `out`, less that of `lse`.
      g: the cotangent of `out`, in the type of `q`.
    """
    rows = (*_rows(reach, q, query_features, streams), _to_rows(lse), _to_rows(delta), _to_rows(g))
    biases = [s.bias for s in streams]
    gradients = dispatch.over_rows(functools.partial(_backward_row, plans, offset, biases), *rows)
    dq, d_query, d_streams = jax.tree.map(lambda row: _from_rows(row, q.shape[2]), gradients)
    d_streams = [
        d if s.bias is None else d._replace(bias=_bias_cotangent(plans[n], offset, n, s.bias, rows))
        for n, (d, s) in enumerate(zip(d_streams, streams))
    ]
    return dq, d_query, d_streams


# Rows.


def _to_rows(x: Array) -> Array:
    """`(B, L, H, ...)` to `(B H, L, ...)`."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _from_rows(x: Array, heads: int) -> Array:
    """`(B H, L, ...)` to `(B, L, H, ...)`."""
    return jnp.moveaxis(x.reshape(x.shape[0] // heads, heads, *x.shape[1:]), 1, 2)


Span = tuple[Array, Array] | None

# Behind every key.
_NOWHERE = 2**30


def _banded(plan: Plan, stream: Stream) -> bool:
    """Whether tiles of the stream start anywhere."""
    return plan.banded or stream.span is not None


class _Row(NamedTuple):
    """Which row this is, and how far it reads."""

    batch: Array
    head: Array
    reach: Array | None


def _stream(keys: Array, values: Array, mask: Array | None, features: Features, span: Span = None) -> Stream:
    """A stream of arrays only: biases are read in place, what is static is in the `Plan`."""
    return Stream(keys, values, mask, features, None, None, span)  # pyright: ignore[reportArgumentType]


def _rows(
    reach: Array | None, q: Array, query_features: Features, streams: list[Stream]
) -> tuple[_Row, Array, Features, list[Stream]]:
    batch, heads = q.shape[0], q.shape[2]
    number = jnp.arange(batch * heads)
    row_streams = [
        _stream(
            _to_rows(repeat_heads(s.keys, heads)),
            _to_rows(repeat_heads(s.values, heads)),
            None if s.mask is None else jnp.repeat(s.mask, heads, axis=0),
            tuple(map(_to_rows, s.features)),
            jax.tree.map(lambda x: _to_rows(x).astype(int), s.span),  # as other positions
        )
        for s in streams
    ]
    row = _Row(number // heads, number % heads, None if reach is None else reach.reshape(-1))
    return row, _to_rows(q), tuple(map(_to_rows, query_features)), row_streams


# Tiles.


class _Queries(NamedTuple):
    """A tile of queries; `position` and features broadcast against a tile of logits."""

    start: Array
    position: Array
    q: Array
    features: Features


def _inner_size(size: int, length: int, anywhere: bool) -> int:
    """Of the tiles of an inner loop: where they may start anywhere, their number does not follow from `length`."""
    return min(size, length) if anywhere else _tile_size(size, length)


def _tile_size(size: int, length: int) -> int:
    """At most `size`, and such that equal tiles cover `length` with little padding."""
    tiles = max(1, -(-length // size))
    even = max(1, -(-length // tiles))
    return even if tiles == 1 else min(size, -(-even // 8) * 8)


def _padded(length: int, tile: int) -> int:
    """Length of the array that an outer loop reads, in whole tiles."""
    return max(1, -(-length // tile)) * tile


def _tiles(low: Array | int, high: Array | int, size: int) -> Array | int:
    """How many tiles of `size` cover `low..high`; not positive where it is empty."""
    return -((low - high) // size)


def _pad(x: Array, length: int, value: float = 0) -> Array:
    return jnp.pad(x, ((0, length - x.shape[0]),) + ((0, 0),) * (x.ndim - 1), constant_values=value)


def _pad_keys(s: Stream, length: int) -> Stream:
    keys = s.keys.shape[0]
    mask = s.mask
    if length != keys:
        mask = _pad(jnp.ones(keys, bool) if mask is None else mask, length)
    features = tuple(_pad(f, length) for f in s.features)
    return _stream(_pad(s.keys, length), _pad(s.values, length), mask, features, s.span)


def _pad_span(span: Span, length: int) -> Span:
    """Queries of the padding read nothing, and do not widen the span of their tile."""
    return span and (_pad(span[0], length, _NOWHERE), _pad(span[1], length))


def _slice_span(span: Span, start: Array, size: int) -> Span:
    return span and (_slice(span[0], start, size), _slice(span[1], start, size))


def _pad_bias(bias: Array | None, queries: int, keys: int) -> Array | None:
    if bias is None:
        return None
    return jnp.pad(bias, ((0, 0), (0, 0), (0, queries - bias.shape[2]), (0, keys - bias.shape[3])))


def _bias_start(bias: Array, row: _Row, i0: Array | int, j0: Array | int) -> tuple[Any, ...]:
    return row.batch if bias.shape[0] > 1 else 0, row.head if bias.shape[1] > 1 else 0, i0, j0


def _bias_tile(bias: Array, row: _Row, i0: Array | int, j0: Array | int, shape: tuple[int, ...]) -> Array:
    return lax.dynamic_slice(bias, _bias_start(bias, row, i0, j0), (1, 1, *shape))[0, 0]


def _slice(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _within(start: Array, size: int, length: int, anywhere: bool) -> tuple[Array, Array | None]:
    """Where a tile of an inner loop starts so that it ends within `length`, and which tokens are its own."""
    if not anywhere and length % size == 0:
        return start, None
    moved = jnp.minimum(start, length - size)
    return moved, moved + jnp.arange(size) >= start


def _both(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a & b


def _add(total: Array, tile: Array, start: Array) -> Array:
    """Adds a tile that starts at `start` of the last axis."""
    old = lax.dynamic_slice_in_dim(total, start, tile.shape[-1], -1)
    return lax.dynamic_update_slice_in_dim(total, old + tile, start, -1)


def _dot(a: Array, b: Array, acc: Any) -> Array:
    return jnp.dot(a, b, preferred_element_type=acc)


def _forward_row(
    plans: tuple[Plan, ...],
    offset: Array,
    biases: list,
    row: _Row,
    q: Array,
    query_features: Features,
    streams: list[Stream],
) -> tuple[Array, Array, list[Array]]:
    length = q.shape[0]
    acc = accumulation(q.dtype)
    size = _tile_size(plans[0].forward_tile[0], length)
    padded = _padded(length, size)
    q = _pad(q, padded)
    query_features = tuple(_pad(f, padded, 1).astype(acc) for f in query_features)

    inner = [_inner(plan, s, bias, padded) for plan, s, bias in zip(plans, streams, biases)]

    def attend_one(i0: Array) -> tuple[Array, Array, list[Array]]:
        position = offset + i0 + jnp.arange(size)[:, None]
        features = tuple(_slice(f, i0, size)[:, None] for f in query_features)
        queries = _Queries(i0, position, _slice(q, i0, size), features)
        parts = [_read(row, queries, stream) for stream in inner]
        out, lse, stream_lse = merge(parts)
        return out, lse[:, 0], [x[:, 0] for x in stream_lse]

    tiles = lax.map(attend_one, jnp.arange(0, padded, size))
    return jax.tree.map(lambda x: x.reshape(padded, *x.shape[2:])[:length], tiles)


class _Inner(NamedTuple):
    """A row's stream, read in tiles of `tile`."""

    plan: Plan
    tile: int
    stream: Stream
    bias: Array | None


def _inner(plan: Plan, stream: Stream, bias: Array | None, queries: int) -> _Inner:
    stream = _pad_keys(stream, max(1, stream.keys.shape[0]))
    stream = stream._replace(span=_pad_span(stream.span, queries))
    length = stream.keys.shape[0]
    tile = _inner_size(plan.forward_tile[1], length, _banded(plan, stream))
    return _Inner(plan, tile, stream, _pad_bias(bias, queries, length))


def _read(row: _Row, queries: _Queries, inner: _Inner) -> tuple[Array, Array, Array]:
    """What a tile of queries reads from a stream: (maximum, normaliser, sum), `(tile, 1)` and `(tile, V)`."""
    acc = accumulation(queries.q.dtype)
    plan, size, stream, bias = inner
    number, (length, width) = queries.q.shape[0], stream.values.shape
    low, high = plan.keys_of(queries.position[0, 0], queries.position[-1, 0], length, row.reach, size)
    span = _slice_span(stream.span, queries.start, number)
    if span is not None:
        low, high = jnp.maximum(low, span[0].min()), jnp.minimum(high, span[1].max())
        span = span[0][:, None], span[1][:, None]

    def step(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, l, o = carry
        j0, own = _within(low + t * size, size, length, _banded(plan, stream))
        j = j0 + jnp.arange(size)
        features = tuple(_slice(f, j0, size).astype(acc) for f in stream.features)
        dot = _dot(queries.q, _slice(stream.keys, j0, size).T, acc)
        z = plan.logits(dot, queries.position, j, queries.features, features)
        if bias is not None:
            z += _bias_tile(bias, row, queries.start, j0, z.shape)
        valid = None if stream.mask is None else _slice(stream.mask, j0, size)
        z = plan.mask(z, queries.position, j, _both(own, valid), span)
        top = jnp.maximum(m, z.max(axis=1, keepdims=True))
        p = exp(z - top)
        shrink = jnp.exp(m - top)
        o = o * shrink + _dot(p.astype(stream.values.dtype), _slice(stream.values, j0, size), acc)
        return top, l * shrink + p.sum(axis=1, keepdims=True), o

    nothing = jnp.full((number, 1), LOWEST_MAX, acc), jnp.zeros((number, 1), acc), jnp.zeros((number, width), acc)
    return lax.fori_loop(0, _tiles(low, high, size), step, nothing)


class _RowGradients(NamedTuple):
    """What the backward pass of a row adds to, tile by tile; `q` is (width, queries)."""

    q: Array
    features: Features


def _backward_row(
    plans: tuple[Plan, ...],
    offset: Array,
    biases: list,
    row: _Row,
    q: Array,
    query_features: Features,
    streams: list[Stream],
    lse: Array,
    delta: Array,
    g: Array,
) -> tuple[Array, Features, list[Stream]]:
    length = max(1, q.shape[0])
    acc = accumulation(q.dtype)
    queries = _Queries(
        jnp.int32(0),
        offset + jnp.arange(length),
        _pad(q, length),
        tuple(_pad(f, length, 1).astype(acc) for f in query_features),
    )
    lse = _pad(lse, length, -NEG_INF)  # queries of the padding read nothing
    outer = _Outer(queries, lse, _pad(delta, length), _pad(g, length))
    d_row = _RowGradients(
        jnp.zeros(queries.q.shape[::-1], acc), tuple(jnp.zeros(length, acc) for _ in query_features)
    )
    d_streams = []
    for plan, stream, bias in zip(plans, streams, biases):
        d_row, d_stream = _differentiate_stream(plan, offset, row, outer, stream, bias, d_row)
        d_streams.append(d_stream)
    return d_row.q.T[: q.shape[0]], tuple(d[: q.shape[0]] for d in d_row.features), d_streams


class _Outer(NamedTuple):
    """A row's queries with what its outputs left behind."""

    queries: _Queries
    lse: Array
    delta: Array
    g: Array


def _differentiate_stream(
    plan: Plan, offset: Array, row: _Row, outer: _Outer, stream: Stream, bias: Array | None, d_row: _RowGradients
) -> tuple[_RowGradients, Stream]:
    """Tiles of logits are (keys, queries) here, which spares the transposed products."""
    keys, length = stream.keys.shape[0], outer.lse.shape[0]
    acc = accumulation(stream.keys.dtype)
    anywhere = _banded(plan, stream)
    tile = _inner_size(plan.backward_tile[0], length, anywhere)
    size = _tile_size(plan.backward_tile[1], keys)
    stream = _pad_keys(stream, _padded(keys, size))
    row_span = _pad_span(stream.span, length)
    bias = _pad_bias(bias, length, stream.keys.shape[0])

    def key_tile(d_row: _RowGradients, j0: Array) -> tuple[_RowGradients, Stream]:
        k, v = _slice(stream.keys, j0, size), _slice(stream.values, j0, size)
        valid = None if stream.mask is None else _slice(stream.mask, j0, size)[:, None]
        key_features = tuple(_slice(f, j0, size)[:, None].astype(acc) for f in stream.features)
        j = j0 + jnp.arange(size)[:, None]
        low, high = plan.queries_of(j0 - offset, j0 + size - 1 - offset, length, row.reach, tile)
        if row_span is not None:
            reads = (row_span[0] < j0 + size) & (j0 < row_span[1])
            i = jnp.arange(reads.shape[0])
            low = jnp.maximum(low, jnp.where(reads, i, _NOWHERE).min())
            high = jnp.minimum(high, jnp.where(reads, i + 1, 0).max())

        def query_tile(t: Array, carry: tuple[Stream, _RowGradients]) -> tuple[Stream, _RowGradients]:
            d_keys, d_row = carry
            i0, own = _within(low + t * tile, tile, length, anywhere)
            take = functools.partial(_slice, start=i0, size=tile)
            i, q, g = take(outer.queries.position), take(outer.queries.q), take(outer.g)
            query_features = tuple(map(take, outer.queries.features))

            def score(dot: Array, query_features: Features, key_features: Features) -> Array:
                return plan.logits(dot, i, j, query_features, key_features)

            z, score_vjp = jax.vjp(score, _dot(k, q.T, acc), query_features, key_features)
            if bias is not None:
                z += _bias_tile(bias, row, i0, j0, (tile, size)).T
            span = _slice_span(row_span, i0, tile)
            p = exp(plan.mask(z, i, j, _both(own, valid), span) - take(outer.lse))
            d_dot, d_query, d_key = score_vjp(p * (_dot(v, g.T, acc) - take(outer.delta)))
            d_dot = d_dot.astype(q.dtype)
            d_keys = _stream(
                d_keys.keys + _dot(d_dot, q, acc),
                d_keys.values + _dot(p.astype(g.dtype), g, acc),
                None,
                tuple(total + d[:, 0] for total, d in zip(d_keys.features, d_key)),
            )
            d_row = _RowGradients(
                _add(d_row.q, _dot(k.T, d_dot, acc), i0),
                tuple(_add(total, d, i0) for total, d in zip(d_row.features, d_query)),
            )
            return d_keys, d_row

        zeros = _stream(
            jnp.zeros(k.shape, acc),
            jnp.zeros(v.shape, acc),
            None,
            tuple(jnp.zeros(size, acc) for _ in key_features),
        )
        d_keys, d_row = lax.fori_loop(0, _tiles(low, high, tile), query_tile, (zeros, d_row))
        return d_row, d_keys

    d_row, d_stream = lax.scan(key_tile, d_row, jnp.arange(0, stream.keys.shape[0], size))
    return d_row, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:keys], d_stream)


def _bias_cotangent(plan: Plan, offset: Array, n: int, bias: Array, rows: Any) -> Array:
    """The gradient of stream `n`'s bias: as large as the bias, summed over examples and heads that share it."""
    number = rows[0].batch.shape[0]
    row_length, keys = rows[1].shape[1], rows[3][n].keys.shape[1]

    def one_row(total: Array, row: Any) -> tuple[Array, None]:
        index, q, query_features, streams, lse, delta, g = row
        s = streams[n]
        acc = accumulation(q.dtype)
        i, j = offset + jnp.arange(row_length)[:, None], jnp.arange(keys)
        start, shape = _bias_start(bias, index, 0, 0), (row_length, keys)
        z = plan.logits(_dot(q, s.keys.T, acc), i, j, tuple(f[:, None] for f in query_features), s.features)
        span = s.span and (s.span[0][:, None], s.span[1][:, None])
        p = exp(plan.mask(z + _bias_tile(bias, index, 0, 0, shape), i, j, s.mask, span) - lse[:, None])
        dz = p * (_dot(g, s.values.T, acc) - delta[:, None])
        dz += _bias_tile(total, index, 0, 0, shape)
        return lax.dynamic_update_slice(total, dz[None, None], start), None

    zeros = jnp.zeros(bias.shape, accumulation(bias.dtype))
    return (lax.scan(one_row, zeros, rows)[0] if number else zeros).astype(bias.dtype)
