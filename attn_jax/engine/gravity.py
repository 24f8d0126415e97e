"""The gravitational score of the streaming engine: a mass at a softened distance.

    z_ij = log m_j - p/2 log(r_ij^2 + eps^2)        r_ij^2 = |q_i - k_j|^2 / E

(Plummer 1911 softens the attraction like this.) `r^2` comes from the product of a tile and the squared norms of
either side, as `|q|^2 + |k|^2 - 2 q . k`, so that no difference vector exists. A sum of its terms rounds by some
units in the last place of `|q|^2 + |k|^2`: in float32, with norms `|x|^2 / E` around 1, `r^2` is right to 3e-7 and
a logit to `p / 2 * 3e-7 / eps^2`. A common offset of queries and keys costs precision by its square, although it
changes nothing in exact arithmetic, and on hardware that multiplies float32 in fewer bits so does that.

Use it as `attend(q, [Stream(k, v, mask, key)], query_features=query, score=plummer, scale=SCALE)`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from attn_jax.engine.plan import Features, accumulation
from attn_jax.types import Array, check_mask, check_shape

SCALE = -2.0
"""The `scale` of `attend` under this score: the products arrive as `-2 q . k`, exactly, in every floating type."""

# A softening of 0 is the bare power law. Where points coincide, `E r^2` is only rounding, and another one in the
# backward pass: it counts as no less than this many machine epsilons of `|q|^2`, and at the origin as `_CLOSEST`.
_ROUNDING = 4
_CLOSEST = 1e-30


def plummer(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    """The score; features are those of `gravity_features`, others may follow them.

    In units of `E r^2`, so that the width enters by the features and not here.
    """
    (q_sq, softening_sq, half_power), (k_sq, log_mass) = query[:3], key[:2]
    return log_mass - half_power * jnp.log(_at_least(q_sq + k_sq + dot, softening_sq))


@jax.custom_jvp
def _at_least(x: Array, floor: Array) -> Array:
    """The larger one, which is `x` but for rounding: its derivative is therefore 1 even where `floor` is taken.

    The derivative of the maximum would cut the gradient of about half of the points that nearly coincide.
    """
    return jnp.maximum(x, floor)


@_at_least.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return _at_least(*primals), tangents[0]


def gravity_features(
    operation: str,
    q: Array,
    k: Array,
    log_mass: Array,
    power: Array | float,
    softening: Array | float,
    mask: Array | None = None,
) -> tuple[Features, Features]:
    """Query features `(B, L, H)` and key features `(B, M, H)` of `plummer`, at least float32.

    Args:
      operation: name used in errors.
      q: `(B, L, H, E)`.
      k: `(B, M, H, E)`.
      log_mass: `(B, M, H)`.
      power, softening: `p` and `eps`, `(H,)` or scalars.
      mask: bool `(B, M)`, True = the key may be used.

    Raises:
      ValueError: shapes or a mask that do not fit.
    """
    check_shape(operation, "q", q, "(B, L, H, E)", (None,) * 4)
    batch, length, heads, width = q.shape
    check_shape(operation, "k", k, "(B, M, H, E)", (batch, None, heads, width))
    check_shape(operation, "log_mass", log_mass, "(B, M, H)", k.shape[:3])
    for name, scalars in (("power", power), ("softening", softening)):
        if jnp.ndim(scalars):
            check_shape(operation, name, scalars, "() or (H,)", (heads,))
    check_mask(operation, "mask", mask, "(B, M)", k.shape[:2])
    dtype = accumulation(jnp.result_type(q, k, log_mass))
    half_power, softening_sq = 0.5 * jnp.asarray(power, dtype), width * jnp.square(jnp.asarray(softening, dtype))
    # What is masked, and a NaN in a query, must not come back through the derivative of a square: 0 x NaN is NaN.
    q = jnp.where(jnp.isfinite(q), q, 0)
    if mask is not None:
        k = jnp.where(mask[:, :, None, None], k, 0)
    q_sq, k_sq = (jnp.sum(jnp.square(x.astype(dtype)), axis=-1) for x in (q, k))
    per_query = functools.partial(jnp.broadcast_to, shape=(batch, length, heads))
    rounding = _ROUNDING * jnp.finfo(dtype).eps * q_sq + _CLOSEST
    floor = jax.lax.stop_gradient(jnp.maximum(softening_sq, rounding))
    query = q_sq + softening_sq, floor, per_query(half_power)
    # The logit is in units of r^2 itself: log(E r^2) - log E.
    return query, (k_sq, log_mass.astype(dtype) + half_power * jnp.log(jnp.asarray(width, dtype)))


def log_softplus(x: Array) -> Array:
    """`log softplus(x)`, a log mass, in float32; it is `x` to rounding where the mass underflows."""
    x = x.astype(jnp.float32)
    small = x < -20
    return jnp.where(small, x, jnp.log(jax.nn.softplus(jnp.where(small, 0, x))))


def inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))
