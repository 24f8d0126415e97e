"""Performer: attention by features of a kernel, linear in the length.

    o_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)

The default features are FAVOR+'s positive random ones: with `y = x / E^(1/4)` and rows `w` of `W` that are
orthogonal within blocks of `E` and distributed as N(0, I) each,

    phi(x) = exp(W y - |y|^2 / 2) / sqrt(F)            E[phi(q) . phi(k)] = exp(q . k / sqrt(E))

so that the whole is an unbiased numerator and denominator of softmax attention. Source: Choromanski et al. 2021,
"Rethinking Attention with Performers", equations 5 to 8 and section 2.4. Time `O(L F D)`, memory `O(L D + F E)`
per head: features exist for one chunk at a time.

Deviations: published implementations stabilise the exponential by one maximum over all keys, padding and future
included, and add 1e-6 after that, which leaks the future and changes with the padding. Here every token has its
own scale, which cancels exactly (see `attn_jax.engine.prefix`), and what is added is 1e-6 of its own mean feature.
Masked keys are left out of both sums. The variance grows as `exp(|q + k|^2 / sqrt(E))`: inputs must be small for
the approximation to be good, and more features help little where they are not. The research code that this
library reimplements calls `elu(x W) + 1` and `relu(x W)` FAVOR+; these approximate no softmax and are kept as
`"seed_elu"` and `"seed_relu"`.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.engine.exponential import exp
from attn_jax.engine.prefix import FeatureMap, LinearState, linear_attention, linear_attention_weights
from attn_jax.mechanisms.base import ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, check_choice, check_integer, check_shape

Feature = Literal["softmax", "softmax_hyp", "relu", "elu", "seed_elu", "seed_relu"]


def favor_attention(
    q: Array,
    k: Array,
    v: Array,
    projection: Array | None,
    *,
    feature: Feature = "softmax",
    mask: Array | None = None,
    causal: bool = False,
    chunk: int = 128,
) -> Array:
    """Attention with weights proportional to `phi(q_i) . phi(k_j)`.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, H, E)`; `M = L` if causal.
      v: `(B, M, H, V)`.
      projection: `W`, `(F, E)` or `(H, F, E)`; not used by "elu".
      feature: the map `phi`, with `y = x / E^(1/4)`:
        "softmax": `exp(W y - |y|^2 / 2)` and 1e-6 of their mean, positive features of the softmax kernel;
        "softmax_hyp": the same for `W` and `-W`, half the variance terms, `2 F` features;
        "relu": `relu(W y) / sqrt(F) + 1e-3`;
        "elu": `elu(x) + 1` (Katharopoulos et al. 2020), without `W`;
        "seed_elu", "seed_relu": `elu(W x) + 1` and `relu(W x)`.
      mask: bool `(B, M)`, True = the key may be used.
      causal: query `i` reads keys `0..i` only.
      chunk: tokens per tile; no effect on the result.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`; 0 where no key is admissible.

    Raises:
      ValueError: arguments that do not fit together, or an unknown `feature`.
    """
    phi, parameters = _feature_map(feature, projection, q)
    options: dict[str, Any] = {"mask": mask, "causal": causal, "chunk": chunk, "operation": "favor_attention"}
    return linear_attention(phi, parameters, q, k, v, **options)[0]


def orthogonal_projection(key: Array, num_features: int, width: int, dtype: Dtype = jnp.float32) -> Array:
    """`W` `(F, E)`: rows N(0, I) each, exactly orthogonal to the others of their block of `E`.

    Each block is the Q of a Gaussian matrix, made uniformly distributed by the signs of R's diagonal, with rows
    as long as those of another Gaussian matrix.
    """
    blocks = -(-num_features // width)
    direction, length = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(direction, (blocks, width, width)))
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    norms = jnp.linalg.norm(jax.random.normal(length, (num_features, width)), axis=1, keepdims=True)
    return (q.swapaxes(1, 2).reshape(blocks * width, width)[:num_features] * norms).astype(dtype)


def _feature_map(feature: str, projection: Array | None, q: Array) -> tuple[FeatureMap, Any]:
    check_choice("favor_attention", "feature", feature, Feature)
    check_shape("favor_attention", "q", q, "(B, L, H, E)", (None,) * 4)
    if feature == "elu":
        return _elu, ()
    heads, width = q.shape[2:]
    shared = len(getattr(projection, "shape", ())) < 3
    sizes = (None, width) if shared else (heads, None, width)
    check_shape("favor_attention", "projection", projection, "(F, E) or (H, F, E)", sizes)
    matrix = jnp.asarray(projection)
    if not matrix.size:
        raise ValueError(f"favor_attention: `projection` must have at least one feature, got shape {matrix.shape}")
    return _MAPS[feature], jnp.broadcast_to(matrix, (heads, *matrix.shape[-2:]))


# Added to every softmax feature of a token, in units of the mean of them.
_FLOOR = 1e-6

# Feature maps of a tile: x (tile, E) and W (F, E) to log-scales (tile,) and features (F, tile).


def _exponential(z: Array) -> tuple[Array, Array]:
    # The scale is a constant that cancels: the features carry the whole gradient.
    top = lax.stop_gradient(z.max(axis=0))
    features = exp(z - top)
    # Where a query and all keys are large and far apart, their features underflow in each other's place: without
    # a floor the normaliser would be 0 or nearly so, and the gradients not finite.
    return top, features + _FLOOR * features.mean(axis=0)


def _quarter(x: Array) -> Array:
    return x * x.shape[-1] ** -0.25


# To the last bit of float32 also where products are rounded by default: the result is exponentiated.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def _dots(w: Array, y: Array) -> Array:
    """`W y` for a tile of `y`, `(F, tile)`."""
    return _matmul(w, y.T)


def _dots_backward(operands: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    w, y = operands
    # The barrier keeps XLA from computing `dz^T W` instead, at half the speed on a CPU.
    return _matmul(dz, y), lax.optimization_barrier(_matmul(w.T, dz)).T


_dots.defvjp(lambda w, y: (_dots(w, y), (w, y)), _dots_backward)


def _softmax(x: Array, w: Array) -> tuple[Array, Array]:
    y = _quarter(x)
    return _exponential(_dots(w, y) - 0.5 * jnp.sum(jnp.square(y), axis=1))


def _softmax_hyp(x: Array, w: Array) -> tuple[Array, Array]:
    y = _quarter(x)
    z = _dots(w, y)
    return _exponential(jnp.concatenate([z, -z]) - 0.5 * jnp.sum(jnp.square(y), axis=1))


def _unscaled(features: Array) -> tuple[Array, Array]:
    return jnp.zeros(features.shape[1], features.dtype), features


def _relu(x: Array, w: Array) -> tuple[Array, Array]:
    return _unscaled(nnx.relu(w @ _quarter(x).T) * w.shape[0] ** -0.5 + 1e-3)


def _elu(x: Array, _: Any) -> tuple[Array, Array]:
    return _unscaled(nnx.elu(x.T) + 1)


def _seed_elu(x: Array, w: Array) -> tuple[Array, Array]:
    return _unscaled(nnx.elu(w @ x.T) + 1)


def _seed_relu(x: Array, w: Array) -> tuple[Array, Array]:
    return _unscaled(nnx.relu(w @ x.T))


_MAPS: dict[str, FeatureMap] = {
    "softmax": _softmax,
    "softmax_hyp": _softmax_hyp,
    "relu": _relu,
    "seed_elu": _seed_elu,
    "seed_relu": _seed_relu,
}


class Projection(nnx.Variable):
    """Random features: drawn once, saved with the model, never trained."""


@register("performer", causal=True, cross=True, decode=True, weights=True, time="L", memory="L")
class Performer(ProjectedAttention):
    """Multi-head attention by random features; see the file's documentation.

    The projection is shared by the heads and drawn from the stream `params`; `redraw` draws another.

    Args:
      feature: see `favor_attention`.
      num_features: `F`; not used by "elu".
      chunk: of `favor_attention`; no effect on the result.
    """

    mechanism = "performer"
    cross = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        feature: Feature = "softmax",
        num_features: int = 256,
        chunk: int = 128,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        check_choice("performer", "feature", feature, Feature)
        check_integer("performer", "num_features", num_features)
        check_integer("performer", "chunk", chunk)
        self.feature: Feature = feature
        self.num_features, self.chunk = num_features, chunk
        self.projection = None if feature == "elu" else Projection(self._draw(rngs))

    def _draw(self, rngs: nnx.Rngs) -> Array:
        return orthogonal_projection(rngs.params(), self.num_features, self.head_dim)

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Replace the projection by a new one from the stream `params` of `rngs`."""
        if self.projection is None:
            raise ValueError("performer: feature='elu' has no projection to redraw")
        self.projection[...] = self._draw(rngs)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        options: dict[str, Any] = {"mask": mask, "causal": self.causal, "chunk": self.chunk}
        return favor_attention(q, k, v, self._matrix(), feature=self.feature, **options)

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        phi, parameters = _feature_map(self.feature, self._matrix(), q)
        return linear_attention_weights(phi, parameters, q, k, mask=mask, causal=self.causal)

    def _matrix(self) -> Array | None:
        return None if self.projection is None else self.projection[...]

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> LinearState:
        """An empty cache for `step`; float32, and its size does not depend on `max_length`."""
        self.check_init_cache(batch, max_length, dtype)
        features = {"elu": self.head_dim, "softmax_hyp": 2 * self.num_features}.get(
            self.feature, self.num_features
        )
        return LinearState.empty(batch, self.num_heads, features, self.head_dim)

    def step(self, x: Array, cache: LinearState) -> tuple[Array, LinearState]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the state that has read it."""
        self.check_step(x, cache)
        q, k, v = self.project(x, x)
        phi, parameters = _feature_map(self.feature, self._matrix(), q)
        o, cache = linear_attention(phi, parameters, q, k, v, causal=True, initial_state=cache)
        return self.out(o.reshape(x.shape)), cache
