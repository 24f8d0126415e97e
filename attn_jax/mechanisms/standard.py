"""Standard multi-head attention.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j

Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1. Time `O(L^2 D)`, memory `O(L D)` (the tiled
form of Rabe & Staats 2021, never the `L x L` matrix). Parameters `4 D^2`.

Deviations: a query without an admissible key gives exactly 0, where common implementations return the mean of
all values.
"""

import jax.numpy as jnp

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.plan import add_key_feature
from attn_jax.engine.streaming import Features, Stream, attend, check_operands, dense_weights, logit_scale
from attn_jax.mechanisms.base import ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import Array


def standard_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    bias: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, K, E)`; `K` divides `H`, each key head serves `H / K` query heads.
      v: `(B, M, K, V)`.
      mask: bool `(B, M)`, True = the key may be used.
      causal: query `i` sees keys `0..i`.
      bias: broadcastable to `(B, H, L, M)`, added to the logits.
      scale: multiplies the logits; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    operation = "standard_attention"
    check_operands(operation, q, [Stream(k, v, mask)])
    features, bias = _split_bias(q, k, bias)
    return attend(
        q,
        [Stream(k, v, mask, features, bias)],
        score=add_key_feature if features else None,
        causal=causal,
        scale=logit_scale(operation, q.shape[-1], scale),
        implementation=implementation,
        operation=operation,
    ).out


def _split_bias(q: Array, k: Array, bias: Array | None) -> tuple[Features, Array | None]:
    """A bias that is the same for all queries is a key feature, which keeps the memory linear."""
    if bias is None:
        return (), None
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    given = getattr(bias, "shape", None)
    shape = None if given is None else (1,) * (4 - len(given)) + given
    if shape is None or len(shape) > 4 or any(n not in (1, m) for n, m in zip(shape, full)):
        got = f"a value of type {type(bias).__name__}" if given is None else f"shape {given}"
        raise ValueError(f"standard_attention: `bias` must be broadcastable to (B, H, L, M) = {full}, got {got}")
    bias = jnp.asarray(bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"standard_attention: `bias` must be floating point (key masks go to `mask`), got dtype {bias.dtype}"
        )
    bias = bias.reshape(shape)
    batch, heads, length, keys = full
    if shape[2] == 1:
        return (jnp.broadcast_to(bias[:, :, 0], (batch, heads, keys)).transpose(0, 2, 1),), None
    return (), jnp.broadcast_to(bias, (*shape[:2], length, keys))


@register(
    "standard",
    causal=True,
    cross=True,
    decode=True,
    weights=True,
    time="L^2",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class StandardAttention(ProjectedAttention):
    """Multi-head softmax attention; see the file's documentation.

    Args:
      implementation: see `standard_attention`.
      rope_base: see `attn_jax.positions.rotary`; None: no rotary positions.
    """

    mechanism = "standard"
    cross = True

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return standard_attention(q, k, v, mask=mask, causal=self.causal, implementation=self.implementation)

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        return dense_weights(q, [Stream(k, k, mask)], causal=self.causal, scale=self.head_dim**-0.5)
