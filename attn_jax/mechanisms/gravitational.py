"""Gravitational attention: tokens attract each other by their masses and their distance.

    g_ij = m_j / (r_ij^2 + eps^2)^(p/2)             r_ij^2 = |q_i - k_j|^2 / E

with a mass per token and head, `p` the power of the law (2: the inverse square) and `eps` the softening (Plummer
1911), both learned per head. What a query reads is one of three fields:

    "vacuum"      o_i = sum_j g_ij v_j / (Lambda_i + sum_j g_ij)            Lambda_i = 1 / (G m'_i)
    "potential"   o_i = sum_j softmax_j(G m'_i g_ij) v_j
    "normalised"  o_i = sum_j g_ij v_j / sum_j g_ij

`G` (per head) and `m'` (the query's own mass) say how strong the attraction is. All three are softmax attention:
the first and the last with the logits `log g_ij`, where the vacuum is one more key, of logit `log Lambda_i` and
value 0. Source: the "gravitational multi-timescale attention" research code, whose score is `G m'_i m_j / r^2`.
Time `O(L^2 D)`, memory `O(L D)`: `r^2` comes from dot products and norms, tile by tile (see
`attn_jax.engine.gravity` for its rounding), where the source keeps `(B, H, L, L, E)` differences.

`form="features"` takes time `O(L F D)`: the kernel is a mixture of Gaussians (a Gamma mixture, as in the rational
quadratic kernel), and each of these has positive random features (Choromanski et al. 2021), so that

    (r^2 + eps^2)^(-p/2) = eps^-p E_t exp(-t r^2)           t ~ Gamma(p/2, rate eps^2)
                         = eps^-p E_{t,w} phi(q) phi(k)     w ~ N(0, I)
    phi(x) = exp(sqrt(2 t) w . y - 2 t |y|^2)               y = x / sqrt(E)

without bias. Draws are fixed. `t = s / eps^2` with `s ~ Gamma(a)` makes the features differentiable in `eps`;
where `p/2` has left the `a` of the draws, importance weights `s^(p/2 - a) Gamma(a) / Gamma(p/2)` keep them
unbiased and make them differentiable in `p`; `redraw` renews the draws. At `a = p/2` the second moment of one
feature's product is `eps^-2p (1 - 8 q . k / (E eps^2))^(-p/2)`, infinite where `8 q . k / E >= eps^2`: close
points far from the origin are what the form resolves worst, and a larger softening is what helps. As the exact
weights are nearly uniform at first, hundreds of features are needed to tell them from uniform ones.

Deviations from the source: it divides each row of `G m'_i m_j / r^2` by its sum, where `G` and `m'` cancel, so
that they are trained for nothing; here they exist only in the two fields in which they have an effect ("vacuum" is
the default; of `Lambda`, `G` and `m'` only the quotient matters, so there is no other `Lambda`). "normalised" is
the source's formula without them; the 1e-8 that it adds to `|q - k|^2` is `E eps^2`. By default `eps` is 1: the
law has no pole, and a logit's derivative in `r` is at most `p / (2 eps)`. Attention starts nearly uniform: over
512 normal tokens of width 64 the entropy is 0.999 of the largest possible at `p = 2` and 0.987 at `p = sqrt(E)`,
against 0.92 for scaled dot products, which is why `p` is learned.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.special import gammaln

from attn_jax.aux import AuxMetric, record
from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.gravity import SCALE, gravity_features, inverse_softplus, log_softplus, plummer
from attn_jax.engine.plan import Features
from attn_jax.engine.prefix import LinearState, linear_attention
from attn_jax.engine.streaming import Stream, attend
from attn_jax.mechanisms.base import KeyValueCache, ProjectedAttention, logical_axes, zero_masked
from attn_jax.registry import register
from attn_jax.types import NEG_INF, Array, Dtype, check_choice, check_integer, check_positive, check_shape

Field = Literal["vacuum", "potential", "normalised"]
Form = Literal["exact", "features"]


def gravitational_attention(
    q: Array,
    k: Array,
    v: Array,
    log_mass: Array,
    *,
    power: Array | float,
    softening: Array | float,
    vacuum: Array | None = None,
    mask: Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> Array:
    """Softmax attention with logits `log m_j - p/2 log(|q_i - k_j|^2 / E + eps^2)`.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, H, E)`.
      v: `(B, M, H, V)`.
      log_mass: `log m`, `(B, M, H)`.
      power: `p`, `(H,)` or a scalar.
      softening: `eps`, `(H,)` or a scalar. At 0 coincident points have a huge, finite attraction.
      vacuum: logits of a sink, `(B, L, H)`: one more key, of value 0; None for none.
      mask: bool `(B, M)`, True = the key may be used.
      causal: query `i` sees keys `0..i`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`; distances and masses are computed in float32.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    query, key = gravity_features(_OPERATION, q, k, log_mass, power, softening, mask)
    return _attend(q, k, v, query, key, plummer, vacuum, mask, causal, implementation)[0]


_OPERATION = "gravitational_attention"


def _attend(
    q: Array,
    k: Array,
    v: Array,
    query: Features,
    key: Features,
    score: Callable,
    vacuum: Array | None,
    mask: Array | None,
    causal: bool,
    implementation: str | None,
) -> tuple[Array, Array | None]:
    """The output and, where there is a vacuum, its share of every query `(B, L, H)`."""
    if vacuum is not None:
        check_shape(_OPERATION, "vacuum", vacuum, "(B, L, H)", q.shape[:3])
        # The engine keeps a NaN of a query out of the gradients of the keys; that of its sink then as well.
        q = jnp.where(jnp.isnan(vacuum)[..., None], jnp.nan, q)
    out, lse, _ = attend(
        q,
        [Stream(k, v, mask, key)],
        query_features=query,
        score=score,
        causal=causal,
        scale=SCALE,
        implementation=implementation,
        operation=_OPERATION,
    )
    if vacuum is None:
        return out, None
    # Merging with a key of value 0.
    kept = jax.nn.sigmoid(lse - vacuum)
    return (out * kept[..., None]).astype(out.dtype), jax.nn.sigmoid(vacuum - lse)


def _potential(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    """`G m'_i g_ij`; the fourth query feature is `log(G m'_i)`."""
    return jnp.exp(query[3] + plummer(dot, distance, query, key))


# The linear-time form. Tokens have two more columns: what is added to their log-features, and the log of one more
# feature, which only queries have: that of the sink.


def _feature_parameters(
    directions: Array, log_rate: Array, shape: Array, power: Array, softening: Array
) -> tuple[Array, Array, Array]:
    """Parameters of `_random_features` per head; products of features have the mean `(r^2 + eps^2)^(-p/2)`.

    Args:
      directions: `w`, `(F, E)`.
      log_rate: `log s`, `(H, F)`.
      shape: `a`, `(H,)`, of the Gamma distribution that `s` is from.
      power, softening: `p` and `eps`, `(H,)`.
    """
    features, width = directions.shape
    t_by_width = jnp.exp(log_rate) / (jnp.square(softening)[:, None] * width)
    half_power = 0.5 * power
    importance = (half_power - shape)[:, None] * log_rate + (gammaln(shape) - gammaln(half_power))[:, None]
    log_weight = importance - power[:, None] * jnp.log(softening)[:, None] - jnp.log(features)
    return jnp.sqrt(2 * t_by_width)[..., None] * directions, 2 * t_by_width, 0.5 * log_weight


# Added to every feature of a token in units of their mean, so that no normaliser underflows.
_FLOOR = 1e-6


def _random_features(x: Array, parameters: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """A `FeatureMap` on tokens with their two columns."""
    frequency, decay, log_weight = parameters
    x, log_factor, log_sink = x[:, :-2], x[:, -2], x[:, -1]
    # To the last bit of float32 also where products are rounded by default: it is exponentiated.
    z = jnp.matmul(frequency, x.T, precision=lax.Precision.HIGHEST)
    z += log_weight[:, None] - decay[:, None] * jnp.sum(jnp.square(x), axis=1) + log_factor
    # The scale is a constant that cancels: the features carry the whole gradient.
    top = lax.stop_gradient(jnp.maximum(z.max(axis=0), log_sink))
    features = jnp.exp(z - top)
    return top, jnp.concatenate([features + _FLOOR * features.mean(axis=0), jnp.exp(log_sink - top)[None]])


def _empty_state(batch: int, heads: int, features: int, width: int, vacuum: bool) -> LinearState:
    """Nothing read yet, but for the sink: a key of value 0 with one feature. Its ones column gives the share."""
    state = LinearState.empty(batch, heads, features + 1, width + vacuum)
    if not vacuum:
        return state
    return LinearState(state.key_value, state.key_sum.at[..., -1].set(1), jnp.zeros_like(state.log_scale))


def _attend_features(
    parameters: tuple[Array, Array, Array],
    q: Array,
    k: Array,
    v: Array,
    log_mass: Array,
    vacuum: Array | None,
    mask: Array | None,
    causal: bool,
    state: LinearState | None = None,
) -> tuple[Array, Array | None, LinearState]:
    """As `_attend`, by features, and the state after the last key."""
    if state is None:
        state = _empty_state(q.shape[0], q.shape[2], parameters[1].shape[1], v.shape[3], vacuum is not None)

    def tokens(x: Array, log_factor: Array | float, log_sink: Array | float) -> Array:
        columns = [jnp.broadcast_to(c, x.shape[:3])[..., None] for c in (log_factor, log_sink)]
        dtype = jnp.result_type(x, jnp.float32)
        return jnp.concatenate([c.astype(dtype) for c in (x, *columns)], axis=-1)

    q, k = tokens(q, 0.0, NEG_INF if vacuum is None else vacuum), tokens(k, log_mass, NEG_INF)
    values = v if vacuum is None else jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    o, state = linear_attention(
        _random_features, parameters, q, k, values, mask=mask, causal=causal, initial_state=state
    )
    share = None if vacuum is None else 1 - o[..., -1]
    return o[..., : v.shape[3]].astype(v.dtype), share, state


class Draws(nnx.Variable):
    """Random features: drawn once, saved with the model, never trained."""


@register(
    "gravitational",
    causal=True,
    cross=True,
    decode=True,
    weights=True,
    time="L^2",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class GravitationalAttention(ProjectedAttention):
    """Multi-head gravitational attention; see the file's documentation.

    Masses are `softplus(W x + b)`, 1 at the start. With a vacuum the rows of `attention_weights` sum to 1 less
    `sink_share`, and the mean of the latter over real queries is recorded as the metric `vacuum_share`.

    Args:
      field: "vacuum", "potential" or "normalised".
      form: "exact", or "features" (linear in the length, not for "potential").
      power: initial `p`.
      softening: initial `eps`.
      num_features: `F` of form="features", None for 256.
      implementation: see `gravitational_attention`; of form="exact".

    Raises:
      ValueError: unknown, not positive or incompatible options.
    """

    mechanism = "gravitational"
    cross = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        field: Field = "vacuum",
        form: Form = "exact",
        power: float = 2.0,
        softening: float = 1.0,
        num_features: int | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )
        for name, value, known in (("field", field, Field), ("form", form, Form)):
            check_choice("gravitational", name, value, known)
        for name, value in (("power", power), ("softening", softening)):
            check_positive("gravitational", name, value)
        if form == "features" and field == "potential":
            raise ValueError(
                "gravitational: form='features' takes field='vacuum' or 'normalised', which are linear in the "
                "attraction, got field='potential'"
            )
        if form == "features" and implementation is not None:
            raise ValueError("gravitational: `implementation` is for form='exact', form='features' has only one")
        if form == "exact" and num_features is not None:
            raise ValueError("gravitational: `num_features` is for form='features', form='exact' has none")
        if num_features is not None:
            check_integer("gravitational", "num_features", num_features)
        self.field: Field = field
        self.form: Form = form

        def scalar(value: float) -> nnx.Param:
            per_head = jnp.full(num_heads, value, param_dtype)
            return nnx.Param(per_head, weight_decay=False, **logical_axes("heads"))

        self.raw_power, self.raw_softening = (
            scalar(inverse_softplus(power)),
            scalar(inverse_softplus(softening)),
        )
        self.key_mass = self._mass(rngs)
        attracts = field != "normalised"
        self.query_mass = self._mass(rngs) if attracts else None
        self.log_g = scalar(0.0) if attracts else None
        if form == "features":
            self.num_features = 256 if num_features is None else num_features
            self.directions, self.log_rate, self.shape = map(Draws, self._draw(rngs))

    def _mass(self, rngs: nnx.Rngs) -> nnx.Linear:
        """A head for `softplus^-1(m)`: 1 for all tokens at the start. Computed in float32 with such parameters."""
        return nnx.Linear(
            self.dim,
            self.num_heads,
            kernel_init=nnx.initializers.zeros_init(),
            bias_init=nnx.initializers.constant(inverse_softplus(1.0)),
            kernel_metadata=logical_axes("embed", "heads"),
            bias_metadata={"weight_decay": False, **logical_axes("heads")},
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _draw(self, rngs: nnx.Rngs) -> tuple[Array, Array, Array]:
        shape = 0.5 * self._law()[0]
        rates = (self.num_heads, self.num_features)
        directions = jax.random.normal(rngs.params(), (self.num_features, self.head_dim))
        return directions, jax.random.loggamma(rngs.params(), shape[:, None], rates), shape

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Replace the random features by new ones, from the stream `params` of `rngs`, for the power as it is."""
        if self.form != "features":
            raise ValueError("gravitational: form='exact' has no random features to redraw")
        for kept, new in zip((self.directions, self.log_rate, self.shape), self._draw(rngs)):
            kept[...] = new

    def _law(self) -> tuple[Array, Array]:
        """`p` and `eps`, `(H,)`."""
        power, softening = (
            nnx.softplus(raw[...].astype(jnp.float32)) for raw in (self.raw_power, self.raw_softening)
        )
        return power, softening

    def _operands(self, x: Array, source: Array) -> tuple[Array, Array, Array, Array, Array | None]:
        """`q, k, v`, the log masses of the keys `(B, M, H)`, and `log(G m')` `(B, L, H)` or None."""
        strength = None
        if self.query_mass is not None and self.log_g is not None:
            strength = self.log_g[...] + log_softplus(self.query_mass(x))
        return *self.project(x, source), log_softplus(self.key_mass(source)), strength

    def _features(self) -> tuple[Array, Array, Array]:
        return _feature_parameters(self.directions[...], self.log_rate[...], self.shape[...], *self._law())

    def _mix(
        self,
        q: Array,
        k: Array,
        v: Array,
        log_mass: Array,
        strength: Array | None,
        mask: Array | None,
        causal: bool,
        implementation: str | None,
    ) -> tuple[Array, Array | None]:
        """The output `(B, L, H, V)` and the share of the vacuum `(B, L, H)` or None."""
        if self.form == "features":
            return _attend_features(self._features(), q, k, v, log_mass, self._vacuum(strength), mask, causal)[:2]
        query, key = gravity_features(_OPERATION, q, k, log_mass, *self._law(), mask)
        score = plummer
        if strength is not None and self.field == "potential":
            query, score = (*query, strength), _potential
        return _attend(q, k, v, query, key, score, self._vacuum(strength), mask, causal, implementation)

    def _vacuum(self, strength: Array | None) -> Array | None:
        return -strength if strength is not None and self.field == "vacuum" else None

    def _read(
        self,
        x: Array,
        mask: Array | None,
        context: Array | None,
        context_mask: Array | None,
        reveal: bool = False,
    ) -> tuple[Array, Array | None]:
        """As `_mix`; `reveal` makes the values unit vectors, and so the output the weights."""
        source, key_mask = (x, mask) if context is None else (context, context_mask)
        q, k, v, log_mass, strength = self._operands(x, source)
        if reveal:
            v = jnp.broadcast_to(jnp.eye(k.shape[1])[:, None], (*k.shape[:3], k.shape[1]))
        return self._mix(q, k, v, log_mass, strength, key_mask, self.causal, self.implementation)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        o, share = self._read(x, mask, context, context_mask)
        if share is not None:
            self._record(lax.stop_gradient(share), mask)
        return self.out(o.reshape(x.shape))

    def _record(self, share: Array, mask: Array | None) -> None:
        real = jnp.broadcast_to(True if mask is None else mask[:, :, None], share.shape)
        mean = jnp.sum(jnp.where(real, share, 0)) / jnp.maximum(real.sum(), 1)
        record(self, AuxMetric, "vacuum_share", mean)

    def weights(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        return self._read(x, mask, context, context_mask, reveal=True)[0].transpose(0, 2, 1, 3)

    def sink_share(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array:
        """What the vacuum takes of every query, `(B, H, L)`, float32; 0 for masked ones."""
        if self.field != "vacuum":
            raise ValueError(f"gravitational: field={self.field!r} has no sink, only field='vacuum' has one")
        x, context, context_mask = self.prepare(x, mask, context, context_mask)
        share = self._read(x, mask, context, context_mask)[1]
        assert share is not None
        return zero_masked(share, mask).transpose(0, 2, 1)

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> KeyValueCache | LinearState:
        """An empty cache for `step`; that of form="features" is float32, its size independent of `max_length`."""
        self.check_init_cache(batch, max_length, dtype)
        heads, width = self.num_heads, self.head_dim
        if self.form == "features":
            return _empty_state(batch, heads, self.num_features, width, self.field == "vacuum")
        return KeyValueCache.empty(batch, max_length, heads, width, dtype, features=((heads,),))

    def step(self, x: Array, cache: Any) -> tuple[Array, Any]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        self.check_step(x, cache)
        q, k, v, log_mass, strength = self._operands(x, x)
        if isinstance(cache, LinearState):
            vacuum = self._vacuum(strength)
            o, _, cache = _attend_features(self._features(), q, k, v, log_mass, vacuum, None, True, cache)
        else:
            cache, filled = cache.append(k, v, log_mass)
            (log_masses,) = cache.features
            o, _ = self._mix(q, cache.keys, cache.values, log_masses, strength, filled, False, "dense")
        return self.out(o.astype(x.dtype).reshape(x.shape)), cache
