"""What the modules of all mechanisms share: argument checks, masking, projections, and the key-value cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.engine import dispatch
from attn_jax.engine.streaming import Stream, attend
from attn_jax.positions import rotary
from attn_jax.types import Array, Dtype, check_mask, check_shape


class KeyValueCache(NamedTuple):
    """What a causal mechanism keeps while decoding.

    Attributes:
      keys, values: `(B, slots, H, E)`; token `t` lies in slot `t % slots`.
      length: int32, tokens seen so far.
      features: float32 `(B, slots, ...)` each, what else the mechanism needs of a key, such as its log mass.
    """

    keys: Array
    values: Array
    length: Array
    features: tuple[Array, ...] = ()

    @classmethod
    def empty(
        cls,
        batch: int,
        slots: int,
        heads: int,
        width: int,
        dtype: Dtype,
        features: tuple[tuple[int, ...], ...] = (),
    ) -> "KeyValueCache":
        """`features`: the shapes of one token's."""
        zeros = jnp.zeros((batch, slots, heads, width), dtype)
        return cls(zeros, zeros, jnp.int32(0), tuple(jnp.zeros((batch, slots, *shape)) for shape in features))

    def append(self, k: Array, v: Array, *features: Array) -> tuple["KeyValueCache", Array]:
        """Add one token's `(B, 1, ...)`; returns the cache and the bool `(B, slots)` mask of filled slots."""
        slots = self.keys.shape[1]
        slot = self.length % slots

        def put(kept: Array, new: Array) -> Array:
            return kept.at[:, slot].set(new[:, 0].astype(kept.dtype))

        keys, values, *others = jax.tree.map(put, (self.keys, self.values, *self.features), (k, v, *features))
        filled = jnp.broadcast_to(jnp.arange(slots) <= self.length, keys.shape[:2])
        return KeyValueCache(keys, values, self.length + 1, tuple(others)), filled


class Attention(nnx.Module):
    """Base of the mechanisms: checks, masks, then calls `attend`, which the mechanism writes.

    Masked tokens are zeroed on the way in, so that whatever they hold (NaN included) reaches no parameter's
    gradient, and on the way out, so that nothing flows back from them.
    """

    mechanism = "attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.causal = causal
        self.dtype = dtype
        self.param_dtype = param_dtype

    cross = False  # whether `context` is taken

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array:
        """Map `x` `(B, L, D)` to `(B, L, D)`.

        Args:
          x: `(B, L, D)`, floating point.
          mask: bool `(B, L)`, True = a real token; outputs at masked tokens are 0.
          context: `(B, M, D)`, attended to instead of `x`, where the mechanism supports it.
          context_mask: bool `(B, M)`.

        Raises:
          ValueError: wrong shapes or types, or a `context` that the mechanism does not take.
        """
        x, context, context_mask = self.prepare(x, mask, context, context_mask)
        return zero_masked(self.attend(x, mask, context, context_mask), mask)

    def attention_weights(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array | None:
        """Dense weights `(B, H, L, M)` for analysis and plots, or None where they have no meaning."""
        x, context, context_mask = self.prepare(x, mask, context, context_mask)
        weights = self.weights(x, mask, context, context_mask)
        return weights if weights is None or mask is None else jnp.where(mask[:, None, :, None], weights, 0)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        raise NotImplementedError

    def weights(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> Array | None:
        return None

    def prepare(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        """Check the arguments of a call and zero what is masked."""
        name = self.mechanism
        check_tokens(name, "x", x, "(B, L, D)", (None, None, self.dim))
        check_mask(name, "mask", mask, "(B, L)", x.shape[:2])
        if context is None:
            if context_mask is not None:
                raise ValueError(f"{name}: `context_mask` was given without `context`")
            return zero_masked(x, mask), None, None
        if not self.cross:
            raise ValueError(f"{name}: `context` is not supported, this mechanism attends within one sequence")
        if self.causal:
            raise ValueError(
                f"{name}: `context` is not supported with causal=True, it has no common order with `x`"
            )
        check_tokens(name, "context", context, "(B, M, D)", (x.shape[0], None, self.dim))
        check_mask(name, "context_mask", context_mask, "(B, M)", context.shape[:2])
        return zero_masked(x, mask), zero_masked(context, context_mask), context_mask

    def linear(
        self, in_dim: int, out_dim: int, axes: tuple[str | None, str | None], rngs: nnx.Rngs, **options: Any
    ) -> nnx.Linear:
        """A projection without bias, Xavier-uniform, its kernel tagged with logical axis names for sharding."""
        return nnx.Linear(
            in_dim,
            out_dim,
            use_bias=False,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata=logical_axes(*axes),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=rngs,
            **options,
        )

    def split_heads(self, x: Array) -> Array:
        """`(B, L, D)` to `(B, L, H, E)`."""
        return x.reshape(*x.shape[:2], x.shape[-1] // self.head_dim, self.head_dim)

    def checked(self, implementation: str | None) -> str | None:
        """`implementation`, after an error if there is none of that name."""
        return dispatch.check_name(self.mechanism, implementation)

    def require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{self.mechanism}: `{what}` needs causal=True")


class ProjectedAttention(Attention):
    """A mechanism on projected queries, keys and values of the same heads; it writes `mix` and `mix_weights`.

    Args:
      implementation: see the mechanism's operation.
      rope_base: turns queries and keys by their positions, see `attn_jax.positions.rotary`; None does not.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        implementation: str | None = None,
        rope_base: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.implementation = self.checked(implementation)
        if rope_base is not None and (rope_base <= 0 or self.head_dim % 2):
            raise ValueError(
                f"{self.mechanism}: `rope_base` must be positive and needs an even head width,"
                f" got {rope_base!r} and width {self.head_dim}"
            )
        self.rope_base = rope_base
        self.query = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.key = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.value = self.linear(dim, dim, ("embed", "heads"), rngs)
        self.out = self.linear(dim, dim, ("heads", "embed"), rngs)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        """`q` `(B, L, H, E)`, `k` and `v` `(B, M, H, E)`, key mask `(B, M)` to `(B, L, H, E)`."""
        raise NotImplementedError

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array | None:
        """The weights `(B, H, L, M)` that `mix` gives, dense."""
        return None

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        source, key_mask = (x, mask) if context is None else (context, context_mask)
        o = self.mix(*self.project(x, source), key_mask)
        return self.out(o.reshape(x.shape))

    def weights(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> Array | None:
        source, key_mask = (x, mask) if context is None else (context, context_mask)
        q, k, _ = self.project(x, source)
        return self.mix_weights(q, k, key_mask)

    def project(self, x: Array, source: Array, position: Array | int = 0) -> tuple[Array, Array, Array]:
        """Queries of `x`, keys and values of `source`; `position` is that of the first token."""
        q, k, v = self.split_heads(self.query(x)), self.split_heads(self.key(source)), self.value(source)
        if self.rope_base is not None:
            if source is not x:
                raise ValueError(f"{self.mechanism}: `context` has no positions that `rope_base` could turn by")
            positions = position + jnp.arange(x.shape[1])
            q, k = (rotary(array, positions, base=self.rope_base) for array in (q, k))
        return q, k, self.split_heads(v)

    def cache_slots(self, max_length: int) -> int:
        """How many past tokens `step` can need."""
        return max_length

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> KeyValueCache:
        """An empty cache for `step`, for sequences of up to `max_length` tokens."""
        self.require_causal("init_cache")
        return KeyValueCache.empty(batch, self.cache_slots(max_length), self.num_heads, self.head_dim, dtype)

    def step(self, x: Array, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        self.require_causal("step")
        check_tokens(self.mechanism, "x", x, "(B, 1, D)", (cache.keys.shape[0], 1, self.dim))
        q, k, v = self.project(x, x, cache.length)
        cache, filled = cache.append(k, v)
        o = self.recall(q, cache, filled)
        return self.out(o.astype(x.dtype).reshape(x.shape)), cache

    def recall(self, q: Array, cache: KeyValueCache, filled: Array) -> Array:
        """What the newest token's `q` `(B, 1, H, E)` reads from the `filled` `(B, slots)` slots of the cache."""
        stream = Stream(cache.keys, cache.values, filled)
        return attend(q, [stream], scale=self.head_dim**-0.5, implementation="dense").out


def check_tokens(where: str, name: str, x: Any, expected: str, sizes: tuple[int | None, ...]) -> None:
    check_shape(where, name, x, expected, sizes)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{where}: `{name}` must be a floating-point array, got dtype {x.dtype}")


def zero_masked(x: Array, mask: Array | None) -> Array:
    """`x` `(B, L, D)` with 0 where `mask` `(B, L)` is False."""
    return x if mask is None else jnp.where(mask[:, :, None], x, 0)


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a parameter: the logical name of each dimension, mapped to mesh axes by the trainer's rules.

    `eager_sharding=False` because a module must also be constructible where no mesh is set.
    """
    return {"out_sharding": names, "eager_sharding": False}
