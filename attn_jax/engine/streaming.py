"""Streaming softmax attention: a query reads one or more key streams under one softmax.

For query `i`, stream `s` and key `j`

    z_isj = score(q_i . k_sj, i - j, query features of i, key features of sj) + bias_isj
    lse_i = log sum_sj exp z_isj            over the admissible keys of all streams
    o_i   = sum_sj exp(z_isj - lse_i) v_sj

Keys are read in tiles with a running maximum, normaliser and accumulator per stream, which are then merged
(Milakov & Gimelshein 2018; Rabe & Staats 2021; Dao et al. 2022), so no array of size `L x M` exists. The
backward pass recomputes the tiles from `lse`: with `g` the cotangent of `o` and `h` that of `lse`

    p_isj  = exp(z_isj - lse_i)
    dz_isj = p_isj (g_i . v_sj - g_i . o_i + h_i)

and `dz` goes through the derivative of the elementwise score inside the tile. Time `O(L M E)` less the skipped
tiles, memory `O((L + M) E)`, forward and backward.

A mechanism adds a score, a stream or a feature, and nothing else. Scalars that it learns (masses, decay rates,
biases) enter as per-query or per-key features broadcast by the caller, so that the chain rule outside of the
engine gives their gradients.
"""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attn_jax.engine import dispatch, tiled
from attn_jax.engine.plan import (
    LOWEST_MAX,
    Features,
    Plan,
    Score,
    Stream,
    accumulation,
    merge,
    repeat_heads,
    sum_groups,
    tiles,
)
from attn_jax.types import NEG_INF, Array, Window, check_flag, check_floating, check_mask, check_shape, is_integer
from pallas_kernels.hardware import Hardware

# No sequence is wider, and position + window must not overflow int32.
_WIDEST = 2**30


class Attended(NamedTuple):
    """What the engine returns.

    Attributes:
      out: `(B, L, H, V)` in the dtype of the queries; exactly 0 where no key is admissible.
      lse: `(B, L, H)` float32, differentiable; `NEG_INF` where no key is admissible.
      stream_lse: `(streams, B, L, H)` float32, each stream's own part of `lse`; not differentiable.
    """

    out: Array
    lse: Array
    stream_lse: Array


def attend(
    q: Array,
    streams: Sequence[Stream],
    *,
    query_features: Features = (),
    score: Score | None = None,
    causal: bool = False,
    window: Window | None = None,
    query_offset: Array | int = 0,
    reach: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    operation: str = "attend",
    suffixes: Sequence[str] | None = None,
    forward_tile: tuple[int, int] | None = None,
    backward_tile: tuple[int, int] | None = None,
) -> Attended:
    """Softmax attention of `q` over all `streams` at once.

    Differentiable once, in reverse mode, in every float array; `implementation="dense"` also forward and twice.

    Args:
      q: `(B, L, H, E)`.
      streams: one or more `Stream`s; together they share the softmax.
      query_features: float arrays `(B, L, H)` for the score.
      score: elementwise score, None for the plain dot product.
      causal: key `j` is admissible for query `i` only if `j <= i`, in every ordered stream.
      window: key `j` is admissible only if `i - left <= j <= i + right`, in every ordered stream.
      query_offset: position of the first query relative to the first key, an integer, may be traced.
      reach: int32 `(B, H)`, may be traced: a promise that keys of ordered streams farther than this from a query
        have weights below rounding, so that the "xla" path may leave out tiles of them.
      scale: multiplies `q` (None: 1).
      implementation: see `attn_jax.types.Implementation`; None to choose.
      operation: name used in errors and in the log.
      suffixes: of the names of each stream's arguments in errors, see `check_operands`.
      forward_tile, backward_tile: (queries, keys) per tile of the "xla" path, None to choose; no effect on the
        result.

    Raises:
      ValueError: shapes, masks or windows that do not fit; unknown implementation.
      NotImplementedError: a fused kernel is asked for.
    """
    dispatch.check_name(operation, implementation)
    check_flag(operation, "causal", causal)
    left, right = (None, None) if window is None else check_window(operation, window)
    if causal:
        right = 0 if right is None else min(right, 0)
    forward, backward = tiles(left, right)
    cut = forward_tile or forward, backward_tile or backward
    check_operands(operation, q, streams, query_features, suffixes)
    plans = tuple(Plan(score, *((left, right) if s.ordered else (None, None)), s.ordered, *cut) for s in streams)
    streams = [s._replace(ordered=None) for s in streams]  # static, and not an array of the pytree
    if reach is not None:
        check_shape(operation, "reach", reach, "(B, H)", (q.shape[0], q.shape[2]))
        reach = jnp.clip(lax.stop_gradient(reach), 0, _WIDEST).astype(jnp.int32)
    # NumPy's float64 becomes JAX's default here.
    q, streams, query_features = jax.tree.map(jnp.asarray, (q, streams, tuple(query_features)))
    dtype = jnp.result_type(q, *(s.values for s in streams))
    operand = jnp.result_type(dtype, *(s.keys for s in streams))
    # A NaN in one query must stay in its own row, also in the gradients of the keys that the row reads.
    finite = jnp.isfinite(q).all(-1)
    for feature in query_features:
        finite &= ~jnp.isnan(feature)
    query_features = tuple(jnp.where(finite, f, 1) for f in query_features)
    q = q.astype(operand)
    if not isinstance(scale, float | int | None):  # traced, it may be learned
        q, scale = _scaled(q, scale), None
    scale = 1.0 if scale is None else float(scale)
    heads = q.shape[2]
    arrays = [_clean(s, operand) for s in streams]
    choice = dispatch.choose(
        operation, implementation, functools.partial(_unsupported, q, len(query_features), arrays)
    )
    compute = (
        functools.partial(_attend_dense, plans, scale)
        if choice.dense
        else functools.partial(_attend, plans, choice, scale)
    )
    batch_axes, head_axes = dispatch.mesh_axes("batch", q.shape[0]), dispatch.mesh_axes("heads", heads)
    if batch_axes or head_axes:
        if any(dispatch.mesh_axes("heads", s.keys.shape[2]) != head_axes for s in arrays):
            arrays = [
                s._replace(keys=repeat_heads(s.keys, heads), values=repeat_heads(s.values, heads)) for s in arrays
            ]
        token, scalar = P(batch_axes, None, head_axes), P()
        in_specs: Any = (
            scalar,
            P(batch_axes, head_axes),
            token,
            token,
            token,
            [_specs(s, batch_axes, head_axes) for s in arrays],
        )
        out_specs = (token, token, P(None, batch_axes, None, head_axes))
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    offset = jnp.asarray(query_offset, jnp.int32)
    out, lse, stream_lse = compute(offset, reach, q, finite, query_features, arrays)
    return Attended(out.astype(dtype), jnp.where(finite, lse, jnp.nan), lax.stop_gradient(stream_lse))


def dense_weights(q: Array, streams: Sequence[Stream], **options: Any) -> Array:
    """The weights `(B, H, L, M)` that `attend` gives to tokens, summed over streams of equal length `M`.

    The values of the streams are not used; `options` are those of `attend`. Memory `O(L M + M^2)`.
    """

    def reveal(s: Stream) -> Stream:
        shape = (*s.keys.shape[:3], s.keys.shape[1])
        return s._replace(values=jnp.broadcast_to(jnp.eye(shape[1], dtype=q.dtype)[:, None, :], shape))

    out = attend(q, [reveal(s) for s in streams], **options, implementation="dense").out
    return out.transpose(0, 2, 1, 3)


def check_window(where: str, window: Window) -> tuple[int, int]:
    """The window as a pair `(left, right)`; a `ValueError` unless both are integers >= 0."""
    pair = window if isinstance(window, Sequence) else (window, window)
    if len(pair) != 2 or any(not is_integer(w) or w < 0 for w in pair):
        raise ValueError(f"{where}: `window` must be an integer >= 0 or a pair of them, got {window!r}")
    return min(int(pair[0]), _WIDEST), min(int(pair[1]), _WIDEST)


def logit_scale(where: str, width: int, scale: float | None) -> float:
    """`scale`, or `1 / sqrt(E)` of the head width `E` where it is None; a `ValueError` unless it is a scalar."""
    if scale is None:
        return max(width, 1) ** -0.5
    shape = () if isinstance(scale, Real) else getattr(scale, "shape", None)
    if shape != ():
        got = f"{scale!r}" if shape is None else f"shape {shape}"
        raise ValueError(f"{where}: `scale` must be a number or None for 1 / sqrt(E), got {got}")
    return scale


def check_operands(
    operation: str,
    q: Array,
    streams: Sequence[Stream],
    query_features: Features = (),
    suffixes: Sequence[str] | None = None,
) -> None:
    """Raise a `ValueError` where the arguments of `attend` do not fit together.

    `suffixes` tell the streams' arguments apart by name; None: "1", "2", ... where there are several.
    """
    if suffixes is None:
        suffixes = [""] if len(streams) == 1 else [str(n + 1) for n in range(len(streams))]
    check_shape(operation, "q", q, "(B, L, H, E)", (None,) * 4)
    batch, length, heads, width = q.shape
    floating = [("q", q)]
    for suffix, s in zip(suffixes, streams):
        check_shape(operation, f"k{suffix}", s.keys, "(B, M, H, E)", (batch, None, None, width))
        keys, key_heads = s.keys.shape[1:3]
        if key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"{operation}: `k{suffix}` has {key_heads} heads, which do not divide the {heads} of `q`"
            )
        check_shape(operation, f"v{suffix}", s.values, "(B, M, H, V)", (batch, keys, key_heads, None))
        check_mask(operation, f"mask{suffix}", s.mask, "(B, M)", (batch, keys))
        for feature in s.features:
            check_shape(operation, "key feature", feature, "(B, M, H)", (batch, keys, heads))
        for end in s.span or ():
            check_shape(operation, f"span{suffix}", end, "(B, L, H)", (batch, length, heads))
        named = (("k", s.keys), ("v", s.values), ("bias", s.bias))
        floating += [(name + suffix, array) for name, array in named if array is not None]
    for feature in query_features:
        check_shape(operation, "query feature", feature, "(B, L, H)", (batch, length, heads))
    for name, array in floating:
        check_floating(operation, name, array)


def _clean(stream: Stream, dtype: Any) -> Stream:
    """Masked keys become zeros, whatever they held."""
    keys, values, mask, features, bias, *_ = stream
    keys, values = keys.astype(dtype), values.astype(dtype)
    if bias is not None and jnp.result_type(bias, accumulation(dtype)) != accumulation(dtype):
        bias = bias.astype(accumulation(dtype))  # a float64 bias on float32 operands
    if mask is not None:
        keys, values = (jnp.where(mask[:, :, None, None], x, 0) for x in (keys, values))
        features = tuple(jnp.where(mask[:, :, None], f, 0) for f in features)
    return stream._replace(keys=keys, values=values, mask=mask, features=features, bias=bias)


def _scaled(q: Array, scale: Array | float) -> Array:
    return (q * jnp.asarray(scale, accumulation(q.dtype))).astype(q.dtype)


def _clean_queries(q: Array, finite: Array, scale: float) -> Array:
    """Queries that are not finite become zeros, and all are multiplied by `scale`."""
    return _scaled(jnp.where(finite[..., None], q, 0), scale)


def _specs(stream: Stream, batch: Any, heads: Any) -> Any:
    """How a stream is split over the mesh, as a stream of partition specs."""
    token, bias = P(batch, None, heads), None
    if stream.bias is not None:
        bias = P(*(axes if size > 1 else None for axes, size in zip((batch, heads), stream.bias.shape)))
    mask = None if stream.mask is None else P(batch)
    return stream._replace(
        keys=token,
        values=token,
        mask=mask,
        features=(token,) * len(stream.features),
        bias=bias,
        span=None if stream.span is None else (token, token),
    )


# The readable version: all scores at once, differentiated by autodiff.


def _attend_dense(
    plans: tuple[Plan, ...],
    scale: float,
    offset: Array,
    reach: Array | None,
    q: Array,
    finite: Array,
    query_features: Features,
    streams: list[Stream],
) -> Any:
    del reach  # dense means dense
    q = _clean_queries(q, finite, scale)
    by_head = functools.partial(jnp.transpose, axes=(0, 2, 1))
    acc = accumulation(q.dtype)
    i = offset + jnp.arange(q.shape[1])[:, None]
    parts = []
    for plan, s in zip(plans, streams):
        j = jnp.arange(s.keys.shape[1])
        keys, values = (repeat_heads(x, q.shape[2]) for x in (s.keys, s.values))
        dot = jnp.einsum("blhe,bmhe->bhlm", q, keys, preferred_element_type=acc)
        z = plan.logits(
            dot,
            i,
            j,
            tuple(by_head(f)[..., None].astype(acc) for f in query_features),
            tuple(by_head(f)[:, :, None, :].astype(acc) for f in s.features),
        )
        z = z if s.bias is None else z + s.bias
        valid = None if s.mask is None else s.mask[:, None, None, :]
        z = plan.mask(z, i, j, valid, s.span and tuple(by_head(end)[..., None] for end in s.span))
        m = jnp.maximum(lax.stop_gradient(z.max(-1, keepdims=True, initial=LOWEST_MAX)), LOWEST_MAX)
        p = jnp.exp(z - m)
        mixed = jnp.einsum("bhlm,bmhv->bhlv", p.astype(values.dtype), values, preferred_element_type=acc)
        parts.append((m, p.sum(-1, keepdims=True), mixed))
    out, lse, each = merge(parts)
    stream_lse = jnp.stack([by_head(x[..., 0]) for x in each])
    out = jnp.where(finite[..., None], out.transpose(0, 2, 1, 3), jnp.nan)
    return out, by_head(lse[..., 0]), stream_lse


# The fast versions: tiles, in portable XLA or in a fused kernel.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(plans: tuple[Plan, ...], choice: dispatch.Choice, scale: float, *arrays: Any) -> Any:
    """`arrays` are those of `_attend_dense`."""
    return _forward(plans, choice, scale, *arrays)[0]


def _forward(plans: tuple[Plan, ...], choice: dispatch.Choice, scale: float, *arrays: Any) -> Any:
    def fused(hardware: Hardware, *arrays: Any) -> Any:
        from pallas_kernels import attention  # takes most of a second, for JAX's kernel language

        return attention.forward(plans, hardware, scale, *arrays)

    def portable(offset: Array, reach: Array | None, q: Array, finite: Array, *others: Any) -> Any:
        out, *rest = tiled.forward(plans, offset, reach, _clean_queries(q, finite, scale), *others)
        return jnp.where(finite[..., None], out, jnp.nan).astype(q.dtype), *rest

    out, lse, stream_lse = choice.run(fused, portable, *arrays)
    return (out, lse, stream_lse), (arrays, out, lse)


def _backward(
    plans: tuple[Plan, ...], choice: dispatch.Choice, scale: float, residuals: Any, cotangents: Any
) -> Any:
    arrays, out, lse = residuals
    _, _, q, finite, query_features, streams = arrays
    g, g_lse, _ = cotangents
    # Where nothing was read, exp(z - lse) must vanish and not be exp(NEG_INF - NEG_INF) = 1.
    lse = jnp.where(finite, jnp.where(lse > LOWEST_MAX, lse, -NEG_INF / 4), -NEG_INF)
    delta = jnp.where(finite, jnp.sum(g * out, axis=-1, dtype=lse.dtype) - g_lse, 0)

    def like_primals(gradients: Any) -> Any:
        dq, d_query, d_streams = gradients
        d_streams = [
            d._replace(keys=sum_groups(d.keys, s.keys.shape[2]), values=sum_groups(d.values, s.keys.shape[2]))
            for d, s in zip(d_streams, streams)
        ]
        primals = q, query_features, [s._replace(mask=None, span=None) for s in streams]
        return jax.tree.map(lambda d, primal: d.astype(primal.dtype), (dq, d_query, d_streams), primals)

    def fused(hardware: Hardware, *arrays: Any) -> Any:
        from pallas_kernels import attention

        return like_primals(attention.backward(plans, hardware, scale, *arrays))

    def portable(
        offset: Array,
        reach: Array | None,
        q: Array,
        finite: Array,
        query_features: Features,
        streams: list[Stream],
        lse: Array,
        delta: Array,
        g: Array,
    ) -> Any:
        q, g = _clean_queries(q, finite, scale), jnp.where(finite[..., None], g, 0)
        dq, *rest = tiled.backward(plans, offset, reach, q, query_features, streams, lse, delta, g)
        return like_primals((jnp.where(finite[..., None], dq * scale, 0), *rest))

    dq, d_query, d_streams = choice.run(fused, portable, *arrays, lse, delta, g)
    return None, None, dq, None, d_query, d_streams


_attend.defvjp(_forward, _backward)


def _unsupported(q: Array, query_features: int, streams: list[Stream], hardware: Hardware) -> str | None:
    """Why the fused kernel cannot run, None if it can."""
    from pallas_kernels import attention

    return attention.unsupported(hardware, q, query_features, streams)
