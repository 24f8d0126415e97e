"""Our operations inside the attention modules of others."""

from collections.abc import Callable
from typing import Any

from attn_jax.types import Array


def attention_fn(operation: Callable[..., Array], **options: Any) -> Callable[..., Array]:
    """`operation` as the `attention_fn` of `nnx.MultiHeadAttention` or `linen.MultiHeadDotProductAttention`.

        nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn(ops.local_attention, window=64), rngs=rngs)

    Args:
      operation: a function of `q, k, v` `(B, L, H, E)` and the keywords `mask` and `causal`, as in `attn_jax.ops`.
      **options: its further arguments.

    Returns:
      A function with the signature that Flax calls. The mask of the module's call must be one of keys,
      `(B, 1, 1, M)`, True = may be used; `nnx.MultiHeadAttention(..., is_causal=True)` makes it causal (with Linen
      pass `causal=True` in `options`).

    Raises:
      ValueError (when called): a mask of another shape, which cannot be honoured without a dense matrix.
      NotImplementedError (when called): dropout of attention weights, which are never all in memory.
    """
    name = getattr(operation, "__name__", "operation")

    # Flax passes what it knows by name; NNX all of it, Linen what the signature has.
    def call(
        query: Array,
        key: Array,
        value: Array,
        *,
        bias: Array | None = None,
        mask: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        is_causal: bool = False,
        module: Any = None,
        dtype: Any = None,
        precision: Any = None,
        dropout_rng: Array | None = None,
        broadcast_dropout: bool = True,
    ) -> Array:
        if bias is not None or module is not None or precision is not None:
            raise NotImplementedError(f"{name}: `bias`, `precision` and `sow_weights` of Flax are not supported")
        if dropout_rate and not deterministic:
            raise NotImplementedError(f"{name}: dropout of attention weights is not supported, use dropout_rate=0")
        if mask is not None:
            if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
                raise ValueError(f"{name}: `mask` must be one of keys, (B, 1, 1, M), got shape {mask.shape}")
            mask = mask[:, 0, 0]
        causal = {"causal": True} if is_causal else {}
        out = operation(query, key, value, mask=mask, **{**options, **causal})
        return out if dtype is None else out.astype(dtype)

    return call
