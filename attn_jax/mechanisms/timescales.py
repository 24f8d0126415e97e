"""What the mechanisms with several timescales share: the discount and its cut-off, the decoders, the module.

A timescale `t` discounts a key by `gamma_t` per token of distance, which adds `|i - j| log gamma_t` to its logit.
Heads and timescales together are the heads of the engine, and of each the tiles that cannot matter are skipped:
where the undiscounted logits of a query exceed that of its nearest key, `d` tokens away, by `span` at most, all
keys farther than

    R = d + (ln(2 / (delta (1 - gamma))) + span) / -ln gamma

together weigh at most `delta`, which is far below the rounding of float32. A short timescale costs `O(L R)`.

The decoders map the outputs of the timescales to the width of the model. "mlp" is that of the "gravitational
multi-timescale attention" research code: Linear to `2 D`, LayerNorm, ReLU, Linear to `D`. "laplace" inverts the
discount: a discounted sum is `A` times the signal at each lag, `A[t, lag] = gamma_t^lag`, and the Tikhonov inverse

    A+ = V diag(s / (alpha^2 + s^2)) U^T,    A = U diag(s) V^T

gives back the signal at each lag (Masset et al. 2025, "Multi-timescale reinforcement learning in the brain").
`A+` of the first timescales is where the decoder starts; then each channel mixes its lags and the channels are
mixed. No more lags than timescales can be told apart: three have singular values 6.3, 1.9 and 0.7 for 64 lags.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attn_jax.aux import AuxMetric, record
from attn_jax.engine.plan import Features, Score, Stream
from attn_jax.engine.streaming import attend, dense_weights
from attn_jax.mechanisms.base import Attention, KeyValueCache, logical_axes
from attn_jax.types import (
    NEG_INF,
    Array,
    Dtype,
    check_choice,
    check_floating,
    check_integer,
    check_number,
    check_positive,
    check_shape,
)

Decoder = Literal["mlp", "laplace"]

# What all keys beyond the cut-off may weigh together: a sixtieth of the rounding of float32.
_CUT = 1e-9
# Smaller than those of the engine: tiles end closer to the cut-off. (queries, keys)
_FORWARD_TILE = (256, 128)
_BACKWARD_TILE = (128, 256)
# Stands for log 0: the weight at distance 1 is 0, and distance 0 does not make it NaN.
_FORGOTTEN = -1e4
# Time constants that a module can reach, as logarithms: gamma from 2e-24 to 1 - 3e-7, within (0, 1) in float32.
_LOG_TAU = (-4.0, 15.0)


def fold(x: Array) -> Array:
    """`(B, L, T, H, ...)` to `(B, L, H T, ...)`, heads first so that a mesh splits them as it splits heads."""
    batch, length, timescales, heads, *rest = x.shape
    return jnp.swapaxes(x, 2, 3).reshape(batch, length, heads * timescales, *rest)


def unfold(x: Array, timescales: int) -> Array:
    """The inverse of `fold`."""
    batch, length, rows, *rest = x.shape
    return jnp.swapaxes(x.reshape(batch, length, rows // timescales, timescales, *rest), 2, 3)


def log_discount(where: str, log_gamma: Array, batch: int, length: int, timescales: int, heads: int) -> Array:
    """`log_gamma` `(T,)` or `(T, H)` as a query feature `(B, L, H T)`."""
    per_head = len(getattr(log_gamma, "shape", ())) == 2
    check_shape(where, "log_gamma", log_gamma, "(T,) or (T, H)", (timescales, heads)[: 1 + per_head])
    check_floating(where, "log_gamma", log_gamma)
    log_gamma = jnp.asarray(log_gamma).reshape(timescales, -1)
    log_gamma = jnp.maximum(log_gamma, _FORGOTTEN)
    return fold(jnp.broadcast_to(log_gamma, (batch, length, timescales, heads)))


class Bounds(NamedTuple):
    """Of the undiscounted logits of each query, `(B, L, H T)` or broadcastable to it.

    Attributes:
      own: the logit of the query's own token.
      lowest, highest: no key's logit lies outside.
    """

    own: Array
    lowest: Array
    highest: Array


@dataclasses.dataclass(frozen=True)
class Discounted:
    """Attention with a discount, folded: what the two mechanisms put together, and everything done with it.

    Attributes:
      operation: name used in errors.
      q: `(B, L, H T, E)`.
      keys: without a mask.
      log_gamma: the query feature of `log_discount`; the last one that the score gets.
      score, query_features, scale: as of `attend`.
      bounds: of a mask `(B, L)`, None where the weights do not vanish with the distance.
    """

    operation: str
    q: Array
    keys: Stream
    log_gamma: Array
    score: Score
    query_features: Features = ()
    scale: float | None = None
    bounds: Callable[[Array], Bounds] | None = None

    def attend(
        self, mask: Array | None, *, causal: bool, implementation: str | None, self_masked: bool = False
    ) -> Array:
        """`(B, L, H T, E)`; `self_masked`: masked tokens read nothing either, which leaves shorter reaches."""
        problem, reach = self, None
        if self.bounds is not None and implementation != "dense" and self.q.shape[1]:
            if self_masked and mask is not None:
                # Times any distance but 0, the discount is below that of a masked key; and at 0 the key is masked.
                problem = dataclasses.replace(self, log_gamma=jnp.where(mask[..., None], self.log_gamma, NEG_INF))
            reach = self._reach(mask, causal, self_masked)
        return attend(
            self.q,
            [self.keys._replace(mask=mask)],
            causal=causal,
            reach=reach,
            implementation=implementation,
            forward_tile=_FORWARD_TILE,
            backward_tile=_BACKWARD_TILE,
            **problem.options,
        ).out

    def weights(self, mask: Array | None, causal: bool) -> Array:
        """`(B, H T, L, L)`, dense."""
        return dense_weights(self.q, [self.keys._replace(mask=mask)], causal=causal, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "query_features": (*self.query_features, self.log_gamma),
            "score": self.score,
            "scale": self.scale,
            "operation": self.operation,
        }

    def _reach(self, mask: Array | None, causal: bool, self_masked: bool) -> Array:
        """`R` of the file's documentation, int32 `(B, H T)`."""
        assert self.bounds is not None
        length = self.q.shape[1]
        real = jnp.ones(self.q.shape[:2], bool) if mask is None else mask
        own, lowest, highest = self.bounds(real)
        span = highest - jnp.where(real[..., None], own, lowest)
        # The output of a query that is NaN or infinite does not depend on what it reads.
        counted = jnp.isfinite(self.q).all(-1)
        counted = counted & real[..., None] if self_masked else counted
        span = jnp.where(counted, span, 0).max(1, initial=0)
        nearest = 0 if mask is None or self_masked else _to_nearest(mask, causal)[:, None]
        decay = -self.log_gamma[:, 0].astype(jnp.float32)
        reach = nearest + (math.log(2 / _CUT) - jnp.log(-jnp.expm1(-decay)) + span) / decay
        # False where it is NaN, which it is for gamma >= 1 and for queries too large for their bounds.
        return jnp.where((decay > 0) & (reach < length), jnp.ceil(reach), length).astype(jnp.int32)


def _to_nearest(mask: Array, causal: bool) -> Array:
    """`(B,)`: the largest distance from a token to the nearest that it may read, over those that may read any."""
    length = mask.shape[1]
    i = jnp.arange(length)
    distance = i - lax.cummax(jnp.where(mask, i, -length), axis=1)
    if not causal:
        after = lax.cummin(jnp.where(mask, i, 2 * length), axis=1, reverse=True)
        distance = jnp.minimum(distance, after - i)
    return jnp.where(distance < length, distance, 0).max(1, initial=0)


# The decoders.


def discount_inverse(tau: Array | np.ndarray, num_lags: int, alpha: float) -> np.ndarray:
    """`A+` `(lags, T)`, the Tikhonov inverse of `A[t, lag] = exp(-lag / tau_t)`."""
    discount = np.exp(-np.arange(num_lags) / np.asarray(tau, np.float64)[:, None])
    u, s, vt = np.linalg.svd(discount, full_matrices=False)
    return vt.T @ ((s / (alpha**2 + s**2))[:, None] * u.T)


class MLPDecoder(nnx.Module):
    """Linear to `2 D`, LayerNorm, ReLU, Linear to `D`, of all timescales side by side."""

    def __init__(self, dim: int, timescales: int, *, dtype: Dtype | None, param_dtype: Dtype, rngs: nnx.Rngs):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        xavier = nnx.initializers.xavier_uniform()
        into, outof = logical_axes("embed", "mlp"), logical_axes("mlp", "embed")
        self.hidden = nnx.Linear(timescales * dim, 2 * dim, kernel_init=xavier, kernel_metadata=into, **types)
        self.norm = nnx.LayerNorm(2 * dim, **types)
        self.out = nnx.Linear(2 * dim, dim, kernel_init=xavier, kernel_metadata=outof, **types)

    def __call__(self, o: Array) -> Array:
        """`(B, L, H T, E)`, as `fold` orders it, to `(B, L, D)`."""
        side_by_side = o.reshape(*o.shape[:2], o.shape[2] * o.shape[3])
        return self.out(nnx.relu(self.norm(self.hidden(side_by_side))))


class LaplaceDecoder(nnx.Module):
    """The signal at each lag by the inverse of the discount, mixed over lags in each channel, then over channels.

    Both mixtures are linear and never form the lags, which `lags` returns for analysis.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        inverse: np.ndarray,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        num_lags = inverse.shape[0]
        self.inverse = nnx.Param(jnp.asarray(inverse, param_dtype), weight_decay=False)
        # Timescales of variance 1 give mixtures of variance 1.
        mixture = nnx.initializers.normal(1 / np.linalg.norm(inverse))
        mixture = mixture(rngs.params(), (num_lags, num_heads, head_dim), param_dtype)
        self.mixture = nnx.Param(mixture, **logical_axes(None, "heads", None))
        self.out = nnx.Linear(
            num_heads * head_dim,
            num_heads * head_dim,
            use_bias=False,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata=logical_axes("heads", "embed"),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, o: Array) -> Array:
        """`(B, L, H T, E)`, as `fold` orders it, to `(B, L, D)`."""
        taps = jnp.einsum("ct,che->the", self.inverse[...], self.mixture[...])
        mixed = jnp.einsum("the,blthe->blhe", taps.astype(o.dtype), unfold(o, taps.shape[0]))
        return self.out(mixed.reshape(*o.shape[:2], self.out.in_features))

    def lags(self, o: Array) -> Array:
        """`(B, L, T, H, E)` to the signal at each lag `(B, L, lags, H, E)`."""
        return jnp.einsum("ct,blthe->blche", self.inverse[...].astype(o.dtype), o)


class TimescaleAttention(Attention):
    """Base of the mechanisms with several timescales, which write `discounted`.

    Records the metrics `gamma_0`, `gamma_1`, ...

    Args:
      num_timescales: `T`.
      max_timescale: the largest time constant `tau` at first, in tokens, the others being spaced evenly in
        logarithm from 2; None: 1.96, 9.49 and 99.5 (`gamma` .6, .9 and .99) for three, 1000 for other numbers.
      decoder: "mlp" or "laplace".
      num_lags: lags of decoder="laplace", None for 64.
      alpha: regularisation of its inverse, None for 0.1.
      implementation: see the mechanism's operation.

    Raises:
      ValueError: an unknown `decoder`; options of "laplace" with "mlp"; numbers that are not positive, a
        `max_timescale` below 2.
    """

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
        decoder: Decoder = "mlp",
        num_lags: int | None = None,
        alpha: float | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        name = self.mechanism
        check_choice(name, "decoder", decoder, Decoder)
        if decoder == "mlp" and (num_lags is not None or alpha is not None):
            raise ValueError(f"{name}: `num_lags` and `alpha` are for decoder='laplace', decoder='mlp' has none")
        num_lags, alpha = 64 if num_lags is None else num_lags, 0.1 if alpha is None else alpha
        for option, value in (("num_timescales", num_timescales), ("num_lags", num_lags)):
            check_integer(name, option, value)
        if max_timescale is not None:
            at_least_2 = "a number of at least 2"
            check_number(name, "max_timescale", max_timescale, at_least_2, lambda tau: 2 <= tau < math.inf)
        check_positive(name, "alpha", alpha)
        self.implementation = self.checked(implementation)
        self.num_timescales = num_timescales
        if num_timescales == 3 and max_timescale is None:
            tau = -1 / np.log([0.6, 0.9, 0.99])
        else:
            tau = np.geomspace(2, 1000 if max_timescale is None else max_timescale, num_timescales)
        self.log_tau = nnx.Param(jnp.asarray(np.log(tau), param_dtype), weight_decay=False)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        if decoder == "mlp":
            self.decoder = MLPDecoder(dim, num_timescales, **types)
        else:
            inverse = discount_inverse(tau, num_lags, alpha)
            self.decoder = LaplaceDecoder(num_heads, self.head_dim, inverse, **types)

    @property
    def log_gamma(self) -> Array:
        """`-1 / tau` `(T,)`, float32; `gamma` is within (0, 1) whatever the parameters are."""
        return -jnp.exp(-jnp.clip(self.log_tau[...].astype(jnp.float32), *_LOG_TAU))

    def discounted(self, x: Array) -> Discounted:
        """The attention that is done on `x` `(B, L, D)`."""
        raise NotImplementedError

    def timescale_weights(self, x: Array, *, mask: Array | None = None) -> Array:
        """Dense weights of each timescale `(B, T, H, L, L)`; `attention_weights` is their mean."""
        x, _, _ = self.prepare(x, mask, None, None)
        weights = self.discounted(x).weights(mask, self.causal)
        batch, _, length, _ = weights.shape
        weights = weights.reshape(batch, self.num_heads, self.num_timescales, length, length).swapaxes(1, 2)
        return weights if mask is None else jnp.where(mask[:, None, None, :, None], weights, 0)

    def weights(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        return self.timescale_weights(x, mask=mask).mean(1)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        for t, gamma in enumerate(jnp.exp(self.log_gamma)):
            record(self, AuxMetric, f"gamma_{t}", lax.stop_gradient(gamma))
        o = self.discounted(x).attend(
            mask, causal=self.causal, implementation=self.implementation, self_masked=True
        )
        return self.decoder(o)

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> KeyValueCache:
        """An empty cache for `step`, for sequences of up to `max_length` tokens."""
        self.check_init_cache(batch, max_length, dtype)
        token = self.discounted(jnp.zeros((1, 1, self.dim), self.param_dtype)).keys
        features = tuple(f.shape[2:] for f in token.features)
        return KeyValueCache.empty(batch, max_length, *token.keys.shape[2:], dtype=dtype, features=features)

    def step(self, x: Array, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        self.check_step(x, cache)
        problem = self.discounted(x)
        cache, filled = cache.append(problem.keys.keys, problem.keys.values, *problem.keys.features)
        keys = Stream(cache.keys, cache.values, filled, cache.features)
        position = cache.length - 1
        o = attend(problem.q, [keys], query_offset=position, implementation="dense", **problem.options).out
        return self.decoder(o.astype(x.dtype)), cache
