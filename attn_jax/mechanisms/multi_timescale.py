"""Multi-timescale attention: every timescale attends with its own projections and forgets at its own rate.

    z^t_ij = q^t_i . k^t_j / sqrt(E) + |i - j| log gamma_t        t = 1..T
    o^t_i  = sum_j softmax_j(z^t_ij) v^t_j
    y_i    = decoder(o^1_i, ..., o^T_i)

with learned `gamma_t = exp(-1 / tau_t)` within (0, 1). Source: the "gravitational multi-timescale attention"
research code, after Masset et al. 2025, "Multi-timescale reinforcement learning in the brain"; a logit linear in
the distance is that of ALiBi (Press et al. 2022). Time `O(L R D)` for a timescale whose weights vanish at the
distance `R` (see `attn_jax.mechanisms.timescales`, which also has the decoders) and `O(L^2 D)` for others, memory
`O(T L D)`. Parameters `3 T D^2` and the decoder's: `(2 T + 2) D^2` for "mlp", `D^2` for "laplace".

Deviations from the source: it multiplies the logit, `z = gamma^|i-j| q . k / sqrt(E)`, which does not suppress
far tokens but un-suppresses them: their logits become 0, and they weigh as much as under uniform attention.
That version is `decay="multiplicative"`; nothing can be cut off in it. The source's initialisation overwrites the
documented `gamma` of .6, .9 and .99 by random numbers of either sign, and its decoder takes three timescales only.
"""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.plan import Features, Stream
from attn_jax.engine.streaming import logit_scale
from attn_jax.mechanisms.timescales import (
    Bounds,
    Decoder,
    Discounted,
    TimescaleAttention,
    fold,
    log_discount,
    unfold,
)
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, check_choice, check_mask, check_shape

Decay = Literal["additive", "multiplicative"]


def multi_timescale_attention(
    q: Array,
    k: Array,
    v: Array,
    log_gamma: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention of each timescale with `|i - j| log_gamma` added to its logits.

    Args:
      q, k: `(B, L, T, H, E)`.
      v: `(B, L, T, H, V)`.
      log_gamma: `(T,)` or `(T, H)`, not positive for a discount; `-inf` leaves a token itself.
      mask: bool `(B, L)`, True = the key may be used.
      causal: query `i` sees keys `0..i`.
      scale: multiplies the dot products; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, T, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    problem = _discounted("multi_timescale_attention", q, k, v, log_gamma, "additive", scale)
    check_mask(problem.operation, "mask", mask, "(B, L)", q.shape[:2])
    return unfold(problem.attend(mask, causal=causal, implementation=implementation), q.shape[2])


def _discounted(
    operation: str, q: Array, k: Array, v: Array, log_gamma: Array, decay: Decay, scale: float | None = None
) -> Discounted:
    check_shape(operation, "q", q, "(B, L, T, H, E)", (None,) * 5)
    check_shape(operation, "k", k, "(B, L, T, H, E)", q.shape)
    check_shape(operation, "v", v, "(B, L, T, H, V)", (*q.shape[:4], None))
    factor = logit_scale(operation, q.shape[-1], scale)
    discount = log_discount(operation, log_gamma, *q.shape[:4])
    q, k, v = map(fold, (q, k, v))

    def bounds(real: Array) -> Bounds:
        queries, keys = (lax.stop_gradient(x).astype(jnp.float32) for x in (q, k))
        keys = jnp.where(real[..., None, None], keys, 0)
        q_norm, k_norm = (jnp.sqrt(jnp.sum(jnp.square(x), -1)) for x in (queries, keys))
        largest = abs(factor) * q_norm * k_norm.max(1, keepdims=True, initial=0)
        return Bounds(factor * jnp.sum(queries * keys, -1), -largest, largest)

    additive = decay == "additive"
    score = _add if additive else _multiply
    return Discounted(operation, q, Stream(k, v), discount, score, (), factor, bounds if additive else None)


def _add(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    return dot + jnp.abs(distance) * query[0]


def _multiply(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    # Where the engine puts 1 for `log gamma`, the exponential would overflow.
    return dot * jnp.exp(jnp.abs(distance) * jnp.minimum(query[0], 0))


@register(
    "multi_timescale",
    causal=True,
    decode=True,
    weights=True,
    time="T L reach",
    memory="T L",
    implementations=IMPLEMENTATIONS,
)
class MultiTimescaleAttention(TimescaleAttention):
    """Multi-head multi-timescale attention; see the file's documentation.

    Args:
      decay: "additive" or "multiplicative" (the source's literal version).
      num_timescales, max_timescale, decoder, num_lags, alpha, implementation: see `TimescaleAttention`.

    Raises:
      ValueError: an unknown `decay`; what `TimescaleAttention` raises.
    """

    mechanism = "multi_timescale"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        num_timescales: int = 3,
        max_timescale: float | None = None,
        decay: Decay = "additive",
        decoder: Decoder = "mlp",
        num_lags: int | None = None,
        alpha: float | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            dtype=dtype,
            param_dtype=param_dtype,
            num_timescales=num_timescales,
            max_timescale=max_timescale,
            decoder=decoder,
            num_lags=num_lags,
            alpha=alpha,
            implementation=implementation,
            rngs=rngs,
        )
        check_choice("multi_timescale", "decay", decay, Decay)
        self.decay: Decay = decay
        wide = num_timescales * dim
        self.query = self.linear(dim, wide, ("embed", "heads"), rngs)
        self.key = self.linear(dim, wide, ("embed", "heads"), rngs)
        self.value = self.linear(dim, wide, ("embed", "heads"), rngs)

    def discounted(self, x: Array) -> Discounted:
        # Heads first in the projections, as folded; a mesh then splits heads and not timescales.
        q, k, v = (unfold(self.split_heads(p(x)), self.num_timescales) for p in (self.query, self.key, self.value))
        return _discounted("multi_timescale", q, k, v, self.log_gamma, self.decay)
