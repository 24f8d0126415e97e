"""What the modules of all mechanisms share: argument checks, masking, projections, and the key-value cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from attn_jax.engine import dispatch
from attn_jax.engine.streaming import Stream, attend
from attn_jax.positions import rotary
from attn_jax.types import (
    Array,
    Dtype,
    check_dtype,
    check_floating,
    check_integer,
    check_mask,
    check_positive,
    check_shape,
)


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

    # Decoding: mechanisms that can write these three.

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> Any:
        """An empty cache for `step`, for sequences of up to `max_length` tokens."""
        raise NotImplementedError(f"{self.mechanism}: `init_cache` is not supported, it cannot decode")

    def step(self, x: Array, cache: Any) -> tuple[Array, Any]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        raise NotImplementedError(f"{self.mechanism}: `step` is not supported, it cannot decode")

    def cache_slots(self, max_length: int) -> int:
        """How many past tokens `step` can need."""
        return max_length

    def check_init_cache(self, batch: int, max_length: int, dtype: Dtype) -> None:
        """Raise a `ValueError` unless these are arguments of `init_cache` for a causal module."""
        self.require_causal("init_cache")
        check_integer(self.mechanism, "batch", batch, 0)
        check_integer(self.mechanism, "max_length", max_length)
        check_dtype(self.mechanism, "dtype", dtype)

    def check_step(self, x: Array, cache: Any) -> None:
        """Raise a `ValueError` unless `x` is one token for each sequence of `cache`, which is of `init_cache`.

        A cache that is full is found out where its length is known, which it is not under `jit`.
        """
        self.require_causal("step")
        name = self.mechanism
        shape = getattr(next(iter(jax.tree.leaves(cache)), None), "shape", ())
        batch, slots = shape[:2] if len(shape) > 1 else (1, 1)
        fresh = jax.eval_shape(lambda: self.init_cache(batch, max(slots, 1)))
        if jax.tree.structure(cache) != jax.tree.structure(fresh):
            wanted, got = type(fresh).__name__, type(cache).__name__
            raise ValueError(f"{name}: `cache` must be the {wanted} of this module's `init_cache`, got a {got}")
        leaves = zip(jax.tree_util.tree_leaves_with_path(cache), jax.tree.leaves(fresh))
        for (path, given), wanted in leaves:
            part = f"cache{jax.tree_util.keystr(path)}"
            check_shape(name, part, given, "that of this module's `init_cache`", wanted.shape)
        check_tokens(name, "x", x, "(B, 1, D)", (batch, 1, self.dim))
        is_ring = self.cache_slots(slots + 1) <= slots
        for part in jax.tree.leaves(cache, is_leaf=lambda node: isinstance(node, KeyValueCache)):
            known = isinstance(part, KeyValueCache) and not isinstance(part.length, Tracer)
            if known and not is_ring and part.length >= slots:
                raise ValueError(
                    f"{name}: `cache` is full: it holds {part.length} tokens, `init_cache` made it for {slots}"
                )

    def require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{self.mechanism}: `{what}` needs causal=True, got causal=False")


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
        if rope_base is not None:
            check_positive(self.mechanism, "rope_base", rope_base)
            if self.head_dim % 2:
                raise ValueError(
                    f"{self.mechanism}: `rope_base` needs an even head width, got dim={dim}, num_heads={num_heads}"
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
            positions = position + jnp.arange(x.shape[1])
            q, k = (rotary(array, positions, base=self.rope_base) for array in (q, k))
        return q, k, self.split_heads(v)

    def prepare(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        if context is not None and self.rope_base is not None:
            raise ValueError(f"{self.mechanism}: `context` has no positions that `rope_base` could turn by")
        return super().prepare(x, mask, context, context_mask)

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> KeyValueCache:
        """An empty cache for `step`, for sequences of up to `max_length` tokens."""
        self.check_init_cache(batch, max_length, dtype)
        return KeyValueCache.empty(batch, self.cache_slots(max_length), self.num_heads, self.head_dim, dtype)

    def step(self, x: Array, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        self.check_step(x, cache)
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
    check_floating(where, name, x)


def zero_masked(x: Array, mask: Array | None) -> Array:
    """`x` `(B, L, D)` with 0 where `mask` `(B, L)` is False."""
    return x if mask is None else jnp.where(mask[:, :, None], x, 0)


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a parameter: the logical name of each dimension, mapped to mesh axes by the trainer's rules.

    `eager_sharding=False` because a module must also be constructible where no mesh is set.
    """
    return {"out_sharding": names, "eager_sharding": False}
