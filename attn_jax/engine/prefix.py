"""Linear attention by prefix sums: a state `(F, V)` per head carried along the keys.

For a positive feature map `phi`, written as `phi(x) = exp(log_scale(x)) features(x)`,

    o_i = phi(q_i) . S_i / phi(q_i) . z_i        S_i = sum_j phi(k_j) v_j^T        z_i = sum_j phi(k_j)

with `j` over all keys, or over `j <= i` in the causal case (Katharopoulos et al. 2020; Choromanski et al. 2021).

The sums are kept relative to the largest log-scale *read so far*, and every query of a causal chunk is evaluated
relative to the largest one at or before it. The scale cancels in the quotient, so these maxima change nothing
but the rounding: no future key, masked key, chunk length or other sequence enters a result through them. The
query's own log-scale cancels as well and is not used.

Tokens are read in tiles of `chunk`; a causal tile is quadratic inside and reads the state for what came before.
Features exist for one tile at a time: the backward pass computes them again. Time `O(L F V)` (causal
`O(L (F V + chunk (F + V)))`), memory `O(L V + chunk F + F V)`; the causal backward pass also keeps the state at
the start of every tile, `O(L / chunk F V)`.

With `w_ij` the unnormalised weight of key `j`, `n_i = phi(q_i) . z_i` and `g` the cotangent of `o`,

    dw_ij = g_i . v_j / n_i - g_i . o_i / n_i        dphi(q_i) = sum_j dw_ij phi(k_j)
    dv_j  = sum_i w_ij g_i / n_i                     dphi(k_j) = sum_i dw_ij phi(q_i)

and `dphi` goes through the feature map tile by tile.

Features come features first, `(F, tile)`: then every large product of both passes is a plain or right-transposed
matrix product, which a CPU computes at up to twice the speed of a left-transposed one.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from attn_jax.engine import dispatch
from attn_jax.types import (
    NEG_INF,
    Array,
    Dtype,
    check_flag,
    check_floating,
    check_integer,
    check_mask,
    check_shape,
)

type FeatureMap = Callable[[Array, Any], tuple[Array, Array]]
"""`feature(x, parameters)`: `x` `(tile, E)` to a log-scale `(tile,)` and features `(F, tile)` >= 0, in the dtype
of `x`, each token on its own. `parameters` is a pytree of arrays, those of one head."""


class LinearState(NamedTuple):
    """What linear attention knows of the keys it has read; the sums are `exp(log_scale)` times what is stored.

    A cotangent of `log_scale` is ignored, because it is free: gradients are exact for whatever uses the state
    only through `exp(log_scale) key_value` and `exp(log_scale) key_sum`, attention above all.

    Attributes:
      key_value: `(B, H, F, V)`.
      key_sum: `(B, H, F)`.
      log_scale: `(B, H)`; `NEG_INF` where nothing was read.
    """

    key_value: Array
    key_sum: Array
    log_scale: Array

    @classmethod
    def empty(cls, batch: int, heads: int, features: int, width: int, dtype: Dtype = jnp.float32) -> "LinearState":
        return cls(
            jnp.zeros((batch, heads, features, width), dtype),
            jnp.zeros((batch, heads, features), dtype),
            jnp.full((batch, heads), NEG_INF, dtype),
        )


def linear_attention(
    feature: FeatureMap,
    parameters: Any,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    chunk: int = 128,
    initial_state: LinearState | None = None,
    operation: str = "linear_attention",
) -> tuple[Array, LinearState]:
    """Attention with weights proportional to `phi(q_i) . phi(k_j)`, linear in the length.

    Args:
      feature: the feature map of queries and keys.
      parameters: its parameters, a pytree of arrays `(H, ...)`.
      q: `(B, L, H, E)`.
      k: `(B, M, H, E)`; `M = L` if causal.
      v: `(B, M, H, V)`.
      mask: bool `(B, M)`, True = the key may be used.
      causal: query `i` reads keys `0..i` only.
      chunk: at most so many tokens make a tile; no effect on the result.
      initial_state: keys read before, None for none; every query reads them.
      operation: name used in errors.

    Returns:
      `o` `(B, L, H, V)` in the common dtype of `q` and `v`, exactly 0 where no key is admissible, and the state
      after the last key. Features and sums are computed in float32 (float64 where an argument has it).

    Raises:
      ValueError: arguments that do not fit together.
    """
    check_shape(operation, "q", q, "(B, L, H, E)", (None,) * 4)
    batch, length, heads, width = q.shape
    keys = length if causal else None
    check_shape(operation, "k", k, "(B, L, H, E)" if causal else "(B, M, H, E)", (batch, keys, heads, width))
    check_shape(operation, "v", v, "(B, M, H, V)", (*k.shape[:3], None))
    check_mask(operation, "mask", mask, "(B, M)", k.shape[:2])
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_floating(operation, name, array)
    check_flag(operation, "causal", causal)
    check_integer(operation, "chunk", chunk)

    q, k, v, parameters = jax.tree.map(jnp.asarray, (q, k, v, parameters))  # NumPy's float64 narrows here
    dtype = jnp.result_type(jnp.float32, q, k, v, *jax.tree.leaves(parameters))
    token = jax.ShapeDtypeStruct((1, width), dtype)
    head = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], dtype), parameters)
    features = jax.eval_shape(feature, token, head)[1].shape[0]
    state = LinearState.empty(batch, heads, features, v.shape[3], dtype)
    if initial_state is not None:
        for name, given, wanted in zip(LinearState._fields, initial_state, state):
            check_shape(operation, f"initial_state.{name}", given, "that of the heads", wanted.shape)
        state = initial_state

    state = LinearState(*(x.astype(dtype) for x in state))
    parameters = jax.tree.map(lambda p: p.astype(dtype), parameters)
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    compute = functools.partial(_attend, _Plan(feature, causal, chunk))
    rows, columns = dispatch.mesh_axes("batch", batch), dispatch.mesh_axes("heads", heads)
    if rows or columns:
        token, per_head = P(rows, None, columns), P(rows, columns)
        states: Any = jax.tree.map(lambda _: per_head, state)
        in_specs = (P(columns), token, token, token, P(rows), states)
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=(token, states), check_vma=False)
    o, state = compute(parameters, q, k, v, mask, state)
    return o.astype(jnp.result_type(q, v)), state


def linear_attention_weights(
    feature: FeatureMap,
    parameters: Any,
    q: Array,
    k: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
) -> Array:
    """The normalised weights `(B, H, L, M)` of `linear_attention`, dense, in float32: for analysis."""

    def row(parameters: Any, q: Array, k: Array, mask: Array) -> Array:
        (_, fq), (log_scale, fk) = feature(q, parameters), feature(k, parameters)
        admissible = mask & (jnp.tri(q.shape[0], k.shape[0], dtype=bool) if causal else True)
        scale = jnp.where(admissible, log_scale, -jnp.inf)
        scale = jnp.exp(scale - jnp.maximum(scale.max(-1, keepdims=True), NEG_INF))
        weights = scale * (fq.T @ fk)
        return _divide(weights, weights.sum(-1, keepdims=True))

    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    k = jnp.where(mask[:, :, None, None], k, 0)
    over_heads = jax.vmap(row, (0, 1, 1, None))
    dtype = jnp.result_type(jnp.float32, q, k)
    return jax.vmap(over_heads, (None, 0, 0, 0))(parameters, q.astype(dtype), k.astype(dtype), mask)


class _Plan(NamedTuple):
    """What is static."""

    feature: FeatureMap
    causal: bool
    chunk: int

    def tile(self, length: int) -> int:
        """Tokens per tile: tiles of even size, so that little is padded."""
        return max(1, math.ceil(length / max(1, math.ceil(length / self.chunk))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: _Plan, parameters: Any, q: Array, k: Array, v: Array, mask: Array, state: LinearState
) -> tuple[Array, LinearState]:
    rows = _rows(plan, parameters, q, k, v, mask, state)
    out, _, _, state = dispatch.over_rows(functools.partial(_forward_row, plan, False), *rows)
    return _from_rows(out, q), _state_from_rows(state, q)


# Jitted, so that layers share one trace.
@functools.partial(jax.jit, static_argnums=0)
def _forward(
    plan: _Plan, parameters: Any, q: Array, k: Array, v: Array, mask: Array, state: LinearState
) -> tuple[tuple[Array, LinearState], Any]:
    rows = _rows(plan, parameters, q, k, v, mask, state)
    out, normaliser, before, final = dispatch.over_rows(functools.partial(_forward_row, plan, True), *rows)
    residuals = (parameters, q, k, v, mask, state, out, normaliser, before, final)
    return (_from_rows(out, q), _state_from_rows(final, q)), residuals


@functools.partial(jax.jit, static_argnums=0)
def _backward(plan: _Plan, residuals: Any, cotangents: tuple[Array, LinearState]) -> tuple[Any, ...]:
    parameters, q, k, v, mask, state, *kept = residuals
    g, g_state = cotangents
    batch, heads = q.shape[0], q.shape[2]
    rows = (
        *_rows(plan, parameters, q, k, v, mask, state),
        *kept,
        _tiles(plan, g),
        jax.tree.map(_merge_rows, g_state),
    )
    d_parameters, dq, dk, dv, d_state = dispatch.over_rows(functools.partial(_backward_row, plan), *rows)
    d_parameters = jax.tree.map(lambda p: p.reshape(batch, heads, *p.shape[1:]).sum(0), d_parameters)
    dq, dk, dv = (_from_rows(dx, x).astype(x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return d_parameters, dq, dk, dv, None, _state_from_rows(d_state, q)


_attend.defvjp(_forward, _backward)


# Rows: a row is one head of one sequence, its tokens in tiles (tiles, tile, ...).


def _merge_rows(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _tiles(plan: _Plan, x: Array) -> Array:
    """`(B, L, H, E)` to `(B H, tiles, tile, E)`, padded with zeros."""
    tile = plan.tile(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))
    batch, length, heads, width = x.shape
    return jnp.moveaxis(x, 2, 1).reshape(batch * heads, length // tile, tile, width)


def _rows(
    plan: _Plan, parameters: Any, q: Array, k: Array, v: Array, mask: Array, state: LinearState
) -> tuple[Any, ...]:
    batch, _, heads, _ = q.shape
    valid = _tiles(plan, jnp.broadcast_to(mask[:, :, None, None], (*mask.shape, heads, 1)))[..., 0]
    parameters = jax.tree.map(lambda p: jnp.tile(p, (batch,) + (1,) * (p.ndim - 1)), parameters)
    return parameters, *(_tiles(plan, x) for x in (q, k, v)), valid, jax.tree.map(_merge_rows, state)


def _from_rows(rows: Array, like: Array) -> Array:
    """`(B H, tiles, tile, V)` to `(B, L, H, V)`, with the `B`, `L`, `H` of `like`."""
    batch, length, heads, _ = like.shape
    _, tiles, tile, width = rows.shape
    return jnp.moveaxis(rows.reshape(batch, heads, tiles * tile, width), 1, 2)[:, :length]


def _state_from_rows(state: LinearState, like: Array) -> LinearState:
    return jax.tree.map(lambda x: x.reshape(like.shape[0], like.shape[2], *x.shape[1:]), state)


# Tiles. Arrays of keys, queries and values are (tile, ...), features (F, tile).


def _divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where nothing was read, with finite gradients."""
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def _key_features(
    plan: _Plan, parameters: Any, k: Array, v: Array, valid: Array
) -> tuple[Array, Array, Array, Callable]:
    """Log-scales (-inf: masked), features and values of a tile of keys, and the pullback of the features."""
    dtype = jnp.result_type(jnp.float32, k, v)
    k, v = (jnp.where(valid[:, None], x, 0).astype(dtype) for x in (k, v))
    (log_scale, features), pull = jax.vjp(plan.feature, k, parameters)
    return jnp.where(valid, log_scale, -jnp.inf), features, v, pull


def _absorb(state: LinearState, log_scale: Array, features: Array, v: Array) -> LinearState:
    top = jnp.maximum(state.log_scale, log_scale.max())
    old, new = jnp.exp(state.log_scale - top), jnp.exp(log_scale - top)
    return LinearState(
        old * state.key_value + features @ (new[:, None] * v), old * state.key_sum + features @ new, top
    )


def _read(state: LinearState, features: Array) -> tuple[Array, Array]:
    """Numerators `(V, tile)` and normalisers `(tile,)` of queries with these features."""
    return state.key_value.T @ features, state.key_sum @ features


class _Inside(NamedTuple):
    """The scales within a causal tile: what a query reads in its own tile, and of the state before it.

    Attributes:
      own: `exp(log_scale_j - top_i)` at `(key j, query i)`, 0 unless `j <= i`, with `top_i` the largest log-scale
        up to and including `i`.
      past: `exp(log_scale of the state - top_i)`.
    """

    own: Array
    past: Array

    @classmethod
    def of(cls, state: LinearState, log_scale: Array) -> "_Inside":
        admissible = ~jnp.tri(log_scale.shape[0], k=-1, dtype=bool)
        scale = jnp.where(admissible, log_scale[:, None], -jnp.inf)
        top = jnp.maximum(state.log_scale, scale.max(0))
        return cls(jnp.exp(scale - top), jnp.exp(state.log_scale - top))


def _forward_row(
    plan: _Plan,
    keep: bool,
    parameters: Any,
    q: Array,
    k: Array,
    v: Array,
    valid: Array,
    state: LinearState,
) -> tuple[Array, Array, Any, LinearState]:
    """Out `(tiles, tile, V)`, normalisers, states before the tiles (if causal and to be kept), last state."""

    def read(_: None, q: Array) -> tuple[None, tuple[Array, Array]]:
        features = plan.feature(q.astype(dtype), parameters)[1]
        numerator, normaliser = value_key @ features, final.key_sum @ features
        return None, (_divide(numerator, normaliser).T, normaliser)

    def absorb(state: LinearState, keys: tuple[Array, ...]) -> tuple[LinearState, None]:
        log_scale, features, v, _ = _key_features(plan, parameters, *keys)
        return _absorb(state, log_scale, features, v), None

    def both(state: LinearState, tokens: tuple[Array, ...]) -> tuple[LinearState, tuple]:
        q, *keys = tokens
        _, fq = plan.feature(q.astype(state.key_sum.dtype), parameters)
        log_scale, fk, v, _ = _key_features(plan, parameters, *keys)
        inside = _Inside.of(state, log_scale)
        weights = inside.own * (fk.T @ fq)
        numerator, normaliser = _read(state, fq)
        normaliser = inside.past * normaliser + weights.sum(0)
        out = _divide(inside.past * numerator + v.T @ weights, normaliser).T
        return _absorb(state, log_scale, fk, v), (out, normaliser, state if keep else None)

    dtype = state.key_sum.dtype
    if plan.causal:
        final, (out, normaliser, before) = lax.scan(both, state, (q, k, v, valid))
        return out, normaliser, before, final
    final, _ = lax.scan(absorb, state, (k, v, valid))
    value_key = final.key_value.T  # once: a left-transposed product in the loop is slower
    _, (out, normaliser) = lax.scan(read, None, q)
    return out, normaliser, None, final


def _backward_row(
    plan: _Plan,
    parameters: Any,
    q: Array,
    k: Array,
    v: Array,
    valid: Array,
    start: LinearState,
    out: Array,
    normaliser: Array,
    before: Any,
    final: LinearState,
    g: Array,
    g_state: LinearState,
) -> tuple[Any, Array, Array, Array, LinearState]:
    dtype = final.key_sum.dtype

    def query_side(q: Array, out: Array, normaliser: Array, g: Array) -> tuple[Array, Callable, Array, Array]:
        """Features of a tile of queries, their pullback, the cotangents of numerator and normaliser.

        A NaN in a query must stay in its own row, also in the gradients of the keys that it reads.
        """
        finite = jnp.isfinite(normaliser)
        q, g, out = (jnp.where(finite[:, None], x, 0).astype(dtype) for x in (q, g, out))
        (log_scale, features), pull = jax.vjp(plan.feature, q, parameters)
        d_numerator = _divide(g, jnp.where(finite, normaliser, 0)[:, None])
        # The query's own scale cancels in the quotient: its cotangent is 0.
        pull = functools.partial(_pull, pull, jnp.zeros_like(log_scale))
        return features, pull, d_numerator, -jnp.sum(d_numerator * out, axis=1)

    def query_tile(carry: tuple, tokens: tuple[Array, ...]) -> tuple[tuple, Array]:
        d_key_value, d_key_sum, d_parameters = carry
        fq, pull, d_num, d_norm = query_side(*tokens)
        dq, more = pull(final.key_value @ d_num.T + final.key_sum[:, None] * d_norm)
        return (d_key_value + fq @ d_num, d_key_sum + fq @ d_norm, _add(d_parameters, more)), dq

    def key_tile(d_parameters: Any, keys: tuple[Array, ...]) -> tuple[Any, tuple[Array, Array]]:
        log_scale, fk, v, pull = _key_features(plan, parameters, *keys)
        scale = jnp.exp(log_scale - final.log_scale)
        dfk = scale * (d_key_value @ v.T + d_key_sum[:, None])
        dv = (scale * (d_value_key @ fk)).T
        dk, more = _pull(pull, jnp.sum(fk * dfk, axis=0), dfk)
        return _add(d_parameters, more), (dk, dv)

    def both(carry: tuple, tokens: tuple) -> tuple[tuple, tuple]:
        d_key_value, d_key_sum, d_parameters = carry
        state, keys, queries = tokens
        fq, pull_q, d_num, d_norm = query_side(*queries)
        log_scale, fk, v, pull_k = _key_features(plan, parameters, *keys)
        inside = _Inside.of(state, log_scale)
        top = jnp.maximum(state.log_scale, log_scale.max())
        old, new = jnp.exp(state.log_scale - top), jnp.exp(log_scale - top)
        weights = inside.own * (fk.T @ fq)
        d_dots = inside.own * (v @ d_num.T + d_norm)
        dfq = fk @ d_dots + inside.past * (state.key_value @ d_num.T + state.key_sum[:, None] * d_norm)
        dfk = fq @ d_dots.T + new * (d_key_value @ v.T + d_key_sum[:, None])
        dv = weights @ d_num + (new * (d_key_value.T @ fk)).T
        dq, more_q = pull_q(dfq)
        dk, more_k = _pull(pull_k, jnp.sum(fk * dfk, axis=0), dfk)
        carry = (
            old * d_key_value + fq @ (inside.past[:, None] * d_num),
            old * d_key_sum + fq @ (inside.past * d_norm),
            _add(d_parameters, _add(more_q, more_k)),
        )
        return carry, (dq, dk, dv)

    carry = (g_state.key_value, g_state.key_sum, jax.tree.map(jnp.zeros_like, parameters))
    keys, queries = (k, v, valid), (q, out, normaliser, g)
    if plan.causal:
        carry, (dq, dk, dv) = lax.scan(both, carry, (before, keys, queries), reverse=True)
        d_key_value, d_key_sum, d_parameters = carry
    else:
        (d_key_value, d_key_sum, d_parameters), dq = lax.scan(query_tile, carry, queries)
        d_value_key = d_key_value.T
        d_parameters, (dk, dv) = lax.scan(key_tile, d_parameters, keys)
        old = jnp.exp(start.log_scale - final.log_scale)
        d_key_value, d_key_sum = old * d_key_value, old * d_key_sum
    d_log_scale = jnp.sum(start.key_value * d_key_value) + jnp.sum(start.key_sum * d_key_sum)
    return d_parameters, dq, dk, dv, LinearState(d_key_value, d_key_sum, d_log_scale)


def _pull(pull: Callable, d_log_scale: Array, d_features: Array) -> tuple[Array, Any]:
    return pull((d_log_scale, d_features))


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
