"""Gravitational attention with several timescales: tokens have a mass for each and forget at its rate.

    z^t_ij = log m^t_j - p/2 log(r_ij^2 + eps^2) + |i - j| log gamma_t        r_ij^2 = |q_i - k_j|^2 / E
    o^t_i  = sum_j softmax_j(z^t_ij) v_j
    y_i    = decoder(o^1_i, ..., o^T_i)

Queries, keys and values are shared by the timescales; the mass `m = softplus(x W + b)`, the decay `gamma_t`, the
power `p` and the softening `eps` (one of each per head) are learned. Source: the "gravitational multi-timescale
attention" research code. Time `O(L R D)` for a timescale whose weights vanish at the distance `R` (see
`attn_jax.mechanisms.timescales`, which also has the decoders) and `O(L^2 D)` for others, memory `O(T L D)`.
Parameters `3 D^2 + T D H` and the decoder's: `(2 T + 2) D^2` for "mlp", `D^2` for "laplace".

Deviations from the source: it normalises `G m^t_i m^t_j gamma^|i-j| / (r_ij^2 + 1e-8)` over the keys, where the
constant `G` and the mass of the query cancel; here they do not exist. The singularity at `r = 0`, whose gradient
grows without bound, is softened by `eps` (Plummer 1911), 1 at first; `p` is 2 at first.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.gravity import SCALE, gravity_features, inverse_softplus, log_softplus, plummer
from attn_jax.engine.plan import Features, Stream
from attn_jax.mechanisms.base import logical_axes
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
from attn_jax.types import Array, Dtype, check_mask, check_positive, check_shape


def gravitational_multi_timescale_attention(
    q: Array,
    k: Array,
    v: Array,
    log_mass: Array,
    log_gamma: Array,
    *,
    power: Array | float,
    softening: Array | float,
    mask: Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Array:
    """Attention by mass, softened distance and distance in time, for each timescale.

    Args:
      q, k, v: `(B, L, T, H, E)`, or `(B, L, H, E)` for one that the timescales share; `v` may be of another width.
      log_mass: `(B, L, T, H)`.
      log_gamma: `(T,)` or `(T, H)`, not positive for a discount; `-inf` leaves a token itself.
      power, softening: `p` and `eps`, `(H,)` or scalars.
      mask: bool `(B, L)`, True = the key may be used.
      causal: query `i` sees keys `0..i`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, T, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    operation = "gravitational_multi_timescale_attention"
    check_shape(operation, "log_mass", log_mass, "(B, L, T, H)", (None,) * 4)
    check_mask(operation, "mask", mask, "(B, L)", log_mass.shape[:2])
    problem = _discounted(operation, q, k, v, log_mass, log_gamma, power, softening, mask)
    return unfold(problem.attend(mask, causal=causal, implementation=implementation), log_mass.shape[2])


def _discounted(
    operation: str,
    q: Array,
    k: Array,
    v: Array,
    log_mass: Array,
    log_gamma: Array,
    power: Array | float,
    softening: Array | float,
    mask: Array | None = None,
) -> Discounted:
    batch, length, timescales, heads = log_mass.shape

    def folded(name: str, x: Array, width: int | None) -> Array:
        if jnp.ndim(x) == 4:
            check_shape(operation, name, x, "(B, L, H, E)", (batch, length, heads, width))
            x = jnp.repeat(x[:, :, None], timescales, axis=2)
        check_shape(operation, name, x, "(B, L, T, H, E)", (batch, length, timescales, heads, width))
        return fold(x)

    def per_head(name: str, x: Array | float) -> Array | float:
        if jnp.ndim(x) == 0:
            return x
        check_shape(operation, name, x, "() or (H,)", (heads,))
        return jnp.repeat(jnp.asarray(x), timescales)

    q = folded("q", q, None)
    k, v = folded("k", k, q.shape[-1]), folded("v", v, None)
    power, softening = per_head("power", power), per_head("softening", softening)
    query, key = gravity_features(operation, q, k, fold(log_mass), power, softening, mask)
    discount = log_discount(operation, log_gamma, batch, length, timescales, heads)

    def bounds(real: Array) -> Bounds:
        real = real[..., None]
        queries, keys, query_side, key_side = lax.stop_gradient((q, k, query, key))
        (q_sq, nearest_sq, half_power), (k_sq, mass) = query_side, key_side
        k_largest = jnp.sqrt(jnp.where(real, k_sq, 0).max(1, keepdims=True, initial=0))
        near, far = (-half_power * jnp.log(x) for x in (nearest_sq, jnp.square(jnp.sqrt(q_sq) + k_largest)))
        heaviest = jnp.where(real, mass, -jnp.inf).max(1, keepdims=True, initial=-jnp.inf)
        lightest = jnp.where(real, mass, jnp.inf).min(1, keepdims=True, initial=jnp.inf)
        dot = SCALE * jnp.sum(queries.astype(q_sq.dtype) * keys, -1)
        own = plummer(dot, jnp.zeros(()), query_side, key_side)
        return Bounds(own, lightest + jnp.minimum(near, far), heaviest + jnp.maximum(near, far))

    return Discounted(operation, q, Stream(k, v, None, key), discount, _score, query, SCALE, bounds)


def _score(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    return plummer(dot, distance, query, key) + jnp.abs(distance) * query[3]


@register(
    "gravitational_multi_timescale",
    causal=True,
    decode=True,
    weights=True,
    time="T L reach",
    memory="T L",
    implementations=IMPLEMENTATIONS,
)
class GravitationalMultiTimescaleAttention(TimescaleAttention):
    """Multi-head gravitational multi-timescale attention; see the file's documentation.

    Masses are about 1 at the start (exactly 1 would leave their bias, a common factor then, without a gradient).

    Args:
      power: initial `p`.
      softening: initial `eps`.
      num_timescales, max_timescale, decoder, num_lags, alpha, implementation: see `TimescaleAttention`.

    Raises:
      ValueError: a `power` or `softening` that is not a positive number; what `TimescaleAttention` raises.
    """

    mechanism = "gravitational_multi_timescale"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        power: float = 2.0,
        softening: float = 1.0,
        num_timescales: int = 3,
        max_timescale: float | None = None,
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
        for name, value in (("power", power), ("softening", softening)):
            check_positive(self.mechanism, name, value)
        self.query = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.key = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.value = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.mass = nnx.Linear(
            dim,
            num_heads * num_timescales,
            kernel_init=nnx.initializers.normal(0.02),
            bias_init=nnx.initializers.constant(inverse_softplus(1.0)),
            kernel_metadata=logical_axes("embed", "heads"),
            bias_metadata={"weight_decay": False, **logical_axes("heads")},
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.raw_power, self.raw_softening = (
            nnx.Param(
                jnp.full(num_heads, inverse_softplus(value), param_dtype),
                weight_decay=False,
                **logical_axes("heads"),
            )
            for value in (power, softening)
        )

    def discounted(self, x: Array) -> Discounted:
        q, k, v = (self.split_heads(projection(x)) for projection in (self.query, self.key, self.value))
        log_mass = unfold(log_softplus(self.mass(x)), self.num_timescales)
        power, softening = (
            nnx.softplus(raw[...].astype(jnp.float32)) for raw in (self.raw_power, self.raw_softening)
        )
        return _discounted(self.mechanism, q, k, v, log_mass, self.log_gamma, power, softening)
