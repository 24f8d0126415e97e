"""Local (sliding-window) attention.

Query `i` sees keys `j` with `|i - j| <= window` (causal: `0 <= i - j <= window`), or `i - left <= j <= i + right`
for a pair:

    o_i = sum_{j = i - left}^{i + right} softmax_j(q_i . k_j / sqrt(E)) v_j

Source: Parmar et al. 2018, "Image Transformer"; Beltagy et al. 2020, "Longformer". Time `O(L window D)`, memory
`O(L D)`: tiles outside of the window are never computed.

Deviations: Long Range Arena's local attention cuts the sequence into blocks of 50 that do not see each other;
this window slides, so neighbours always see each other.
"""

import jax.numpy as jnp
from flax import nnx

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.streaming import Stream, attend, check_operands, check_window, dense_weights, logit_scale
from attn_jax.mechanisms.base import ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, Window


def local_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    window: Window,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention within a sliding window.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, K, E)`; `K` divides `H`, each key head serves `H / K` query heads.
      v: `(B, M, K, V)`.
      window: tokens seen on each side, besides the query's own, or a pair `(left, right)`.
      mask: bool `(B, M)`, True = the key may be used.
      causal: nothing on the right is seen.
      scale: multiplies the logits; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    operation = "local_attention"
    check_operands(operation, q, [Stream(k, v, mask)])
    return attend(
        q,
        [Stream(k, v, mask)],
        causal=causal,
        window=check_window(operation, window),
        scale=logit_scale(operation, q.shape[-1], scale),
        implementation=implementation,
        operation=operation,
    ).out


@register(
    "local",
    causal=True,
    decode=True,
    weights=True,
    time="L window",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class LocalAttention(ProjectedAttention):
    """Multi-head sliding-window attention; see the file's documentation.

    Args:
      window: see `local_attention`.
      implementation: see `local_attention`.
      rope_base: see `attn_jax.positions.rotary`; None: no rotary positions.
    """

    mechanism = "local"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        window: Window = 128,
        implementation: str | None = None,
        rope_base: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rope_base=rope_base,
            rngs=rngs,
        )
        self.window = check_window("local", window)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return local_attention(
            q, k, v, window=self.window, mask=mask, causal=self.causal, implementation=self.implementation
        )

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        return dense_weights(
            q, [Stream(k, k, mask)], causal=self.causal, window=self.window, scale=self.head_dim**-0.5
        )

    def cache_slots(self, max_length: int) -> int:
        # The cache is a ring: with left + 1 slots it holds exactly the keys in the window.
        return min(max_length, self.window[0] + 1)
