"""Dual key-value attention: two key-value streams compete under one softmax.

    z_isj = q_i . k_sj / sqrt(E) + beta_s          for streams s = 1, 2
    o_i   = sum_sj softmax_sj(z_isj) v_sj
          = pi_1 A_1 + pi_2 A_2,   (pi_1, pi_2) = softmax(lse_1, lse_2)

with `A_s` the attention of stream `s` alone. `pi` says how the streams compete and is reported. Source: the
"triple-wise attention" research code (Wang), which asks whether a second stream approximates higher-order
interaction. Time `O(2 L^2 D)`, memory `O(L D)`; the streams are never concatenated.

Deviations from the source, which merges its streams along the *feature* axis: keys `[k_1; k_2]` of width
`E/2 + E/2` are exactly standard attention with the columns of the key projection permuted, so nothing competes
and no length is doubled. That version is `merge="feature"`; the default merges along the sequence, as the
source's text says. Full second streams cost `6 D^2` parameters against `4 D^2`; `param_mode="grouped"` (each
stream has half the key heads, shared by pairs of query heads) and `"lowrank"` (projections of rank `D / 4`)
cost `4 D^2` exactly, so that a comparison with standard attention is fair.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.aux import AuxMetric, record
from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.plan import add_key_feature
from attn_jax.engine.streaming import Attended, Stream, attend, check_operands, dense_weights, logit_scale
from attn_jax.mechanisms.base import Attention, KeyValueCache, logical_axes
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, check_choice, check_flag, check_shape

Merge = Literal["sequence", "feature"]
ParamMode = Literal["full", "grouped", "lowrank"]


def dual_kv_attention(
    q: Array,
    k1: Array,
    v1: Array,
    k2: Array,
    v2: Array,
    *,
    mask1: Array | None = None,
    mask2: Array | None = None,
    stream_bias: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention over two streams of keys and values at once.

    Args:
      q: `(B, L, H, E)`.
      k1, k2: `(B, M1, K, E)` and `(B, M2, K, E)`; `K` divides `H`, each key head serves `H / K` query heads.
      v1, v2: `(B, M1, K, V)` and `(B, M2, K, V)`.
      mask1, mask2: bool `(B, M1)` and `(B, M2)`, True = the key may be used.
      stream_bias: `(2, H)`, added to the logits of each stream.
      causal: query `i` sees keys `0..i` of both streams.
      scale: multiplies the dot products; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and the values.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    check_operands("dual_kv_attention", q, [Stream(k1, v1, mask1), Stream(k2, v2, mask2)])
    streams = _streams(q.shape[2], (k1, v1, mask1), (k2, v2, mask2), stream_bias)
    return _attend(q, streams, causal=causal, scale=scale, implementation=implementation).out


def _streams(heads: int, first: tuple, second: tuple, stream_bias: Array | None) -> list[Stream]:
    streams = [Stream(*first), Stream(*second)]
    if stream_bias is None:
        return streams
    check_shape("dual_kv_attention", "stream_bias", stream_bias, "(2, H)", (2, heads))
    return [
        s._replace(features=(jnp.broadcast_to(beta, (*s.keys.shape[:2], heads)),))
        for s, beta in zip(streams, stream_bias)
    ]


def _attend(
    q: Array,
    streams: list[Stream],
    *,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Attended:
    return attend(
        q,
        streams,
        score=add_key_feature if streams[0].features else None,
        causal=causal,
        scale=logit_scale("dual_kv_attention", q.shape[-1], scale),
        implementation=implementation,
        operation="dual_kv_attention",
    )


class DualCache(NamedTuple):
    """The two streams of a causal dual-KV module while decoding."""

    first: KeyValueCache
    second: KeyValueCache


@register(
    "dual_kv",
    causal=True,
    cross=True,
    decode=True,
    weights=True,
    time="2 L^2",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class DualKVAttention(Attention):
    """Multi-head dual-KV attention; see the file's documentation.

    Records the metrics `second_stream_share`, the mean of `pi_2`, and `stream_entropy`, the mean entropy of `pi`
    in nats (0: each query reads one stream, log 2: both alike), over real queries.

    Args:
      merge: "sequence" (two streams) or "feature" (the source's literal version: one stream, no competition).
      param_mode: "full" (`6 D^2` parameters), "grouped" or "lowrank" (`4 D^2`); "feature" has only "full".
      stream_bias: learn `beta` `(2, H)`, starting at 0; None: where there are streams.
      implementation: see `dual_kv_attention`.

    Raises:
      ValueError: unknown `merge` or `param_mode`, "grouped" with an odd number of heads, "feature" with an odd
        head width, another `param_mode` or a stream bias.
    """

    mechanism = "dual_kv"
    cross = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        merge: Merge = "sequence",
        param_mode: ParamMode = "full",
        stream_bias: bool | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        for name, value, known in (("merge", merge, Merge), ("param_mode", param_mode, ParamMode)):
            check_choice("dual_kv", name, value, known)
        if stream_bias is not None:
            check_flag("dual_kv", "stream_bias", stream_bias)
        if merge == "feature" and (param_mode != "full" or stream_bias or self.head_dim % 2):
            raise ValueError(
                "dual_kv: merge='feature' has one stream of two halves: it takes param_mode='full', no stream "
                f"bias and an even head width, got {param_mode!r}, {stream_bias} and {self.head_dim}"
            )
        if param_mode == "grouped" and num_heads % 2:
            raise ValueError(
                f"dual_kv: param_mode='grouped' needs an even number of heads, got {num_heads}; use 'lowrank'"
            )
        self.merge = merge
        self.implementation = self.checked(implementation)
        self.query = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.key1, self.value1, self.key2, self.value2 = (self._projection(param_mode, rngs) for _ in range(4))
        self.out = self.linear(dim, dim, ("heads", "embed"), rngs)
        biased = merge == "sequence" and stream_bias is not False
        zeros = jnp.zeros((2, num_heads), param_dtype)
        self.stream_bias = nnx.Param(zeros, weight_decay=False, **logical_axes(None, "heads")) if biased else None

    def _projection(self, param_mode: ParamMode, rngs: nnx.Rngs) -> nnx.Module:
        dim = self.dim
        if param_mode == "lowrank":
            rank = max(1, dim // 4)
            return nnx.Sequential(
                self.linear(dim, rank, ("embed", None), rngs), self.linear(rank, dim, (None, "heads"), rngs)
            )
        halved = param_mode == "grouped" or self.merge == "feature"
        return self.linear(dim, dim // 2 if halved else dim, ("embed", "heads"), rngs)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        q, streams = self._project(x, mask, context, context_mask)
        result = _attend(q, streams, causal=self.causal, implementation=self.implementation)
        if len(streams) == 2:
            self._record(_shares(result), mask)
        return self.out(result.out.reshape(x.shape))

    def weights(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        """The weight that a query gives to a token, over both streams."""
        q, streams = self._project(x, mask, context, context_mask)
        score = add_key_feature if streams[0].features else None
        return dense_weights(q, streams, score=score, causal=self.causal, scale=self.head_dim**-0.5)

    def stream_shares(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array:
        """The competition of the streams: `pi` `(B, L, H, 2)`, float32, 0 where a query reads nothing."""
        if self.merge == "feature":
            raise ValueError("dual_kv: merge='feature' has a single stream, nothing competes")
        x, context, context_mask = self.prepare(x, mask, context, context_mask)
        return _shares(_attend(*self._project(x, mask, context, context_mask), causal=self.causal))

    def _project(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> tuple[Array, list[Stream]]:
        source, key_mask = (x, mask) if context is None else (context, context_mask)
        q = self.split_heads(self.query(x))
        halves = [self.key1(source), self.value1(source), self.key2(source), self.value2(source)]
        if self.merge == "feature":
            k1, v1, k2, v2 = (h.reshape(*h.shape[:2], self.num_heads, -1) for h in halves)
            return q, [Stream(jnp.concatenate([k1, k2], -1), jnp.concatenate([v1, v2], -1), key_mask)]
        k1, v1, k2, v2 = map(self.split_heads, halves)
        bias = None if self.stream_bias is None else self.stream_bias[...]
        return q, _streams(self.num_heads, (k1, v1, key_mask), (k2, v2, key_mask), bias)

    def _record(self, shares: Array, mask: Array | None) -> None:
        shares = lax.stop_gradient(shares)
        real = jnp.ones(shares.shape[:2], bool) if mask is None else mask
        real = jnp.broadcast_to(real[:, :, None], shares.shape[:3])
        entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, jnp.finfo(shares.dtype).tiny)), axis=-1)
        count = jnp.maximum(real.sum(), 1)
        for name, value in (("second_stream_share", shares[..., 1]), ("stream_entropy", entropy)):
            record(self, AuxMetric, name, jnp.sum(jnp.where(real, value, 0)) / count)

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> DualCache:
        """An empty cache for `step`, for sequences of up to `max_length` tokens."""
        self.check_init_cache(batch, max_length, dtype)
        _, streams = self._project(jnp.zeros((1, 1, self.dim), self.param_dtype), None, None, None)
        heads = streams[0].keys.shape[2]
        caches = [KeyValueCache.empty(batch, max_length, heads, self.head_dim, dtype) for _ in streams]
        return DualCache(caches[0], caches[-1])

    def step(self, x: Array, cache: DualCache) -> tuple[Array, DualCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        self.check_step(x, cache)
        q, streams = self._project(x, None, None, None)
        appended = [c.append(s.keys, s.values) for c, s in zip(cache, streams)]
        bias = None if self.stream_bias is None else self.stream_bias[...]
        first, *second = [(c.keys, c.values, filled) for c, filled in appended]
        streams = _streams(self.num_heads, first, second[0], bias) if second else [Stream(*first)]
        o = _attend(q, streams, implementation="dense").out
        return self.out(o.astype(x.dtype).reshape(x.shape)), DualCache(appended[0][0], appended[-1][0])


def _shares(result: Attended) -> Array:
    """`pi` `(B, L, H, 2)`."""
    return jnp.moveaxis(jnp.where(result.lse > -1e29, jnp.exp(result.stream_lse - result.lse), 0), 0, -1)
