"""Cross-memory attention: a sequence reads a memory and fuses what it reads with itself.

    a_i = sum_m softmax_m(q_i . k_m / sqrt(E)) v_m      over the tokens of the memory, then the output projection
    y_i = r_i a_i + (1 - r_i) x_i

`r` is `fusion_ratio`, 1 for what is read alone and 0 for `x` unchanged; with a learned gate it is
`fusion_ratio * sigmoid(W x_i + b)`, one value per token and channel. The memory is `context`; without one it is
`num_slots` learned slots, and where there are none `x` itself, which is standard attention. A memory is a set: its
order does not matter, nor does repeating all of it. From an empty or wholly masked memory `a = 0` is read.
Time `O(L M D)`, memory `O((L + M) D)`.

Source: the "HierarchicalVLM" research code; slots: Sukhbaatar et al. 2019, "Augmenting Self-attention with
Persistent Memory".

Deviations: the research code's module adds `x` to its output and the block around it adds it once more; here `x`
is added by the block, and by the module only on request (`residual=True`). Without a memory its block fails.
"""

import jax.numpy as jnp
from flax import nnx

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.streaming import Stream, dense_weights
from attn_jax.mechanisms.base import KeyValueCache, ProjectedAttention, logical_axes
from attn_jax.mechanisms.standard import standard_attention
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, check_flag, check_integer, check_number


def fuse(local: Array, memory: Array, ratio: Array | float) -> Array:
    """`ratio memory + (1 - ratio) local`: what a token is, fused with what it has read.

    Args:
      local: `(B, L, D)`, the sequence.
      memory: `(B, L, D)`, what its tokens have read of a memory.
      ratio: from 0 (local alone) to 1 (memory alone), broadcastable to `(B, L, D)`.
    """
    return ratio * memory + (1 - ratio) * local


@register(
    "cross_memory",
    causal=True,
    cross=True,
    decode=True,
    weights=True,
    time="L M",
    memory="L + M",
    implementations=IMPLEMENTATIONS,
)
class CrossMemoryAttention(ProjectedAttention):
    """Multi-head attention to a memory; see the file's documentation.

    With causal=True the learned slots are read as they are, for they hold nothing of the sequence, and without
    slots the attention to `x` is causal.

    Args:
      fusion_ratio: `r`, from 0 to 1.
      gate: multiply `r` by a learned sigmoid gate, which starts at one half.
      residual: add `x` to what is read, the source's default; for use outside of a block that adds it.
      num_slots: learned slots that are the memory where no `context` is given.
      implementation: see `attn_jax.ops.standard_attention`.

    Raises:
      ValueError: a ratio outside of 0..1, a negative number of slots, or a residual of something fused already.
    """

    mechanism = "cross_memory"
    cross = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        fusion_ratio: float = 1.0,
        gate: bool = False,
        residual: bool = False,
        num_slots: int = 0,
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
        name = self.mechanism
        check_number(name, "fusion_ratio", fusion_ratio, "from 0 to 1", lambda ratio: 0 <= ratio <= 1)
        check_flag(name, "gate", gate)
        check_flag(name, "residual", residual)
        check_integer(name, "num_slots", num_slots, 0)
        if residual and (gate or fusion_ratio != 1):
            raise ValueError(
                "cross_memory: `residual` adds x to what is read, it takes fusion_ratio=1 and gate=False,"
                f" got {fusion_ratio} and {gate}"
            )
        self.fusion_ratio = fusion_ratio
        self.residual = residual
        self.gate = (
            nnx.Linear(
                dim,
                dim,
                kernel_init=nnx.initializers.zeros,
                kernel_metadata=logical_axes("embed", None),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            if gate
            else None
        )
        slots = nnx.initializers.normal(0.02)
        self.slots = (
            nnx.Param(slots(rngs.params(), (num_slots, dim), param_dtype), **logical_axes(None, "embed"))
            if num_slots
            else None
        )

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        return self._fuse(x, super().attend(x, mask, self._memory(x, context), context_mask))

    def weights(
        self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None
    ) -> Array | None:
        return super().weights(x, mask, self._memory(x, context), context_mask)

    def _fuse(self, x: Array, read: Array) -> Array:
        x = x.astype(read.dtype)
        if self.residual:
            return x + read
        ratio = self.fusion_ratio if self.gate is None else self.fusion_ratio * nnx.sigmoid(self.gate(x))
        return fuse(x, read, ratio)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return standard_attention(q, k, v, mask=mask, causal=self._in_order, implementation=self.implementation)

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        return dense_weights(q, [Stream(k, k, mask)], causal=self._in_order, scale=self.head_dim**-0.5)

    @property
    def _in_order(self) -> bool:
        # No context comes with causal=True, so what is read is the slots or the sequence itself.
        return self.causal and self.slots is None

    def _memory(self, x: Array, context: Array | None) -> Array | None:
        if context is not None or self.slots is None:
            return context
        return jnp.broadcast_to(self.slots[...].astype(x.dtype), (x.shape[0], *self.slots.shape))

    def step(self, x: Array, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it."""
        if self.slots is None:
            read, cache = super().step(x, cache)
            return self._fuse(x, read), cache
        self.check_step(x, cache)
        # Tokens read the slots and not each other: nothing has to be kept.
        return self(x), cache._replace(length=cache.length + 1)

    def cache_slots(self, max_length: int) -> int:
        return max_length if self.slots is None else 0
