"""The transformer that every mechanism is compared in: block, stack and sequence classifier."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from attn_jax.mechanisms.base import check_tokens, logical_axes, zero_masked
from attn_jax.positions import sinusoidal_positions
from attn_jax.registry import build
from attn_jax.types import Array, Dtype, check_choice, check_integer, check_mask, check_number, check_shape

Pool = Literal["cls", "first", "mean"]
Features = Literal["concatenated", "product"]
Norm = Literal["pre", "post"]
Activation = Literal["gelu", "swiglu"]


class TransformerBlock(nnx.Module):
    """A mechanism and an MLP, each with one residual connection.

    Args:
      dim: model width `D`.
      num_heads: heads `H` of the mechanism.
      mechanism: its name in `attn_jax.MECHANISMS`.
      options: its options.
      mlp_dim: hidden width of the MLP, None for `4 D`.
      activation: of the MLP, "gelu" or "swiglu" (`silu(x W) * (x V)`, one matrix more; Shazeer 2020).
      norm: "pre" normalises the input of each part, "post" the sum of input and output.
      dropout: rate on the output of each part and on the MLP's hidden layer, in training mode.
      drop_path: rate at which an example skips a part, in training mode (stochastic depth, Huang et al. 2016).
      causal, dtype, param_dtype, rngs: as in `attn_jax.build`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mechanism: str = "standard",
        options: Mapping[str, Any] | None = None,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        norm: Norm = "pre",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, value, known in (("norm", norm, Norm), ("activation", activation, Activation)):
            check_choice("TransformerBlock", name, value, known)
        for name, value in (("dropout", dropout), ("drop_path", drop_path)):
            check_number("TransformerBlock", name, value, "at least 0 and less than 1", lambda rate: 0 <= rate < 1)
        if mlp_dim is not None:
            check_integer("TransformerBlock", "mlp_dim", mlp_dim)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        hidden = 4 * dim if mlp_dim is None else mlp_dim
        self.norm = norm
        self.attention = build(
            mechanism, dim=dim, num_heads=num_heads, causal=causal, rngs=rngs, **types, **(options or {})
        )
        self.attention_norm = nnx.LayerNorm(dim, **types, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(dim, **types, rngs=rngs)
        xavier = nnx.initializers.xavier_uniform()
        into, outof = logical_axes("embed", "mlp"), logical_axes("mlp", "embed")
        self.mlp_in = nnx.Linear(dim, hidden, kernel_init=xavier, kernel_metadata=into, **types, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden, dim, kernel_init=xavier, kernel_metadata=outof, **types, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        # These two only where asked for: each draws from `rngs`, and would change what all others draw.
        gated = activation == "swiglu"
        self.mlp_gate = (
            nnx.Linear(dim, hidden, kernel_init=xavier, kernel_metadata=into, **types, rngs=rngs)
            if gated
            else None
        )
        self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2), rngs=rngs) if drop_path else None

    def __call__(
        self,
        x: Array,
        *,
        mask: Array | None = None,
        context: Array | None = None,
        context_mask: Array | None = None,
    ) -> Array:
        """Map `x` `(B, L, D)` to `(B, L, D)`; the arguments are those of the mechanism."""
        cross = {"context": context, "context_mask": context_mask}
        cross = {name: array for name, array in cross.items() if array is not None}

        def attend(x: Array) -> Array:
            return self.attention(x, mask=mask, **cross)

        def mlp(x: Array) -> Array:
            hidden = self.mlp_in(x)
            hidden = nnx.gelu(hidden) if self.mlp_gate is None else nnx.silu(self.mlp_gate(x)) * hidden
            return self.mlp_out(self.dropout(hidden))

        def dropped(x: Array) -> Array:
            x = self.dropout(x)
            return x if self.drop_path is None else self.drop_path(x)

        for part, norm in ((attend, self.attention_norm), (mlp, self.mlp_norm)):
            x = x + dropped(part(norm(x))) if self.norm == "pre" else norm(x + dropped(part(x)))
        return x


class Transformer(nnx.Module):
    """A stack of blocks; with `norm="pre"` the output is normalised once more.

    Args:
      num_layers: how many blocks.
      remat: recompute each block in the backward pass, so that only its input is kept.
      **block: the arguments of `TransformerBlock`.
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_layers: int, remat: bool = False, rngs: nnx.Rngs, **block: Any
    ):
        check_integer("Transformer", "num_layers", num_layers, 0)
        self.blocks = nnx.List(TransformerBlock(dim, num_heads, rngs=rngs, **block) for _ in range(num_layers))
        self.remat = remat
        types = {name: block[name] for name in ("dtype", "param_dtype") if name in block}
        self.norm = nnx.LayerNorm(dim, **types, rngs=rngs) if block.get("norm", "pre") == "pre" else None

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Map `x` `(B, L, D)` with mask `(B, L)` to `(B, L, D)`; masked tokens come out as 0."""
        check_mask("Transformer", "mask", mask, "(B, L)", x.shape[:2])
        # What a masked token holds must not reach the norms' gradients either.
        x = zero_masked(x, mask)
        call = nnx.remat(_call_block) if self.remat else _call_block
        for block in self.blocks:
            x = call(block, x, mask)
        return zero_masked(x if self.norm is None else self.norm(x), mask)


def _call_block(block: TransformerBlock, x: Array, mask: Array | None) -> Array:
    return block(x, mask=mask)


class TransformerClassifier(nnx.Module):
    """Token ids to class logits: embedding, sinusoidal positions, `Transformer`, pooling, two-layer head.

    The layout of Long Range Arena's classifiers (Tay et al. 2021): embeddings from N(0, 1), a learned `CLS` token
    starting at 0, head Linear-ReLU-Linear; here masks reach every layer and the pooling.

    Args:
      vocab_size: ids are `0..vocab_size - 1`.
      num_classes: width of the output.
      dim, num_heads, num_layers: of the `Transformer`.
      pool: "cls" (the output of a learned token put in front), "first" (that of the first real token) or "mean"
        (over real tokens).
      num_types: kinds of tokens, each with an embedding of its own that is added; 0 for none.
      head_dim: hidden width of the head, None for the MLP's.
      head_inputs: how many vectors `(B, D)` side by side the head reads.
      dropout: also on the embeddings.
      **transformer: further arguments of `Transformer` and `TransformerBlock`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        pool: Pool = "cls",
        num_types: int = 0,
        head_dim: int | None = None,
        head_inputs: int = 1,
        mlp_dim: int | None = None,
        dropout: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **transformer: Any,
    ):
        check_choice("TransformerClassifier", "pool", pool, Pool)
        check_integer("TransformerClassifier", "vocab_size", vocab_size)
        check_integer("TransformerClassifier", "num_classes", num_classes)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.pool = pool
        self.embed = nnx.Embed(
            vocab_size,
            dim,
            embedding_init=nnx.initializers.normal(1.0),
            embedding_metadata=logical_axes("vocab", "embed"),
            **types,
            rngs=rngs,
        )
        self.cls = nnx.Param(jnp.zeros(dim, param_dtype)) if pool == "cls" else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.transformer = Transformer(
            dim,
            num_heads,
            num_layers=num_layers,
            mlp_dim=mlp_dim,
            dropout=dropout,
            **types,
            rngs=rngs,
            **transformer,
        )
        width = mlp_dim if head_dim is None else head_dim
        self.head_in = nnx.Linear(
            head_inputs * dim, width, kernel_metadata=logical_axes("embed", "mlp"), **types, rngs=rngs
        )
        self.head_out = nnx.Linear(
            width, num_classes, kernel_metadata=logical_axes("mlp", None), **types, rngs=rngs
        )
        normal = {"embedding_init": nnx.initializers.normal(1.0), **types}
        self.type_embed = nnx.Embed(num_types, dim, **normal, rngs=rngs) if num_types else None

    def __call__(self, tokens: Array, *, mask: Array | None = None, types: Array | None = None) -> Array:
        """Logits `(B, num_classes)`, float32, of `tokens` int `(B, L)` with mask bool and `types` int `(B, L)`."""
        return self.head(self.pooled(tokens, mask=mask, types=types))

    def pooled(self, tokens: Array, *, mask: Array | None = None, types: Array | None = None) -> Array:
        """What the encoder makes of each sequence, `(B, D)`; arguments as in a call."""
        check_shape("TransformerClassifier", "tokens", tokens, "(B, L)", (None, None))
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"TransformerClassifier: `tokens` must be integers, got dtype {tokens.dtype}")
        check_mask("TransformerClassifier", "mask", mask, "(B, L)", tokens.shape)
        if (types is None) != (self.type_embed is None):
            raise ValueError("TransformerClassifier: `types` go with `num_types`, and neither without the other")
        x = self.embed(tokens)
        if types is not None and self.type_embed is not None:
            x = x + self.type_embed(types)
        if self.cls is not None:
            front = jnp.broadcast_to(self.cls[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([front, x], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        x = self.dropout(x + sinusoidal_positions(x.shape[1], x.shape[2], x.dtype))
        x = self.transformer(x, mask=mask)
        return masked_mean(x, mask) if self.pool == "mean" else first_real(x, mask)

    def head(self, pooled: Array) -> Array:
        """Logits `(B, num_classes)`, float32, of `(B, head_inputs * D)`."""
        return self.head_out(nnx.relu(self.head_in(pooled))).astype(jnp.float32)


class TransformerMatcher(TransformerClassifier):
    """Two documents to class logits: both through one encoder, then the head on what it makes of them.

    Args:
      features: what the head reads of the two vectors: "concatenated" `[x1, x2]`, as Long Range Arena's code, or
        "product" `[x1, x2, x1 x2, x1 - x2]`, as its paper (Tay et al. 2021, section 3.3).
      **classifier: the arguments of `TransformerClassifier`.
    """

    def __init__(self, *, features: Features = "concatenated", **classifier: Any):
        check_choice("TransformerMatcher", "features", features, Features)
        super().__init__(head_inputs=2 if features == "concatenated" else 4, **classifier)
        self.features = features

    def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
        """Logits `(B, num_classes)`, float32, of `tokens` int `(B, 2, L)` with mask bool `(B, 2, L)`."""
        check_shape("TransformerMatcher", "tokens", tokens, "(B, 2, L)", (None, 2, None))
        check_mask("TransformerMatcher", "mask", mask, "(B, 2, L)", tokens.shape)
        batch, _, length = tokens.shape
        flat = None if mask is None else mask.reshape(2 * batch, length)
        both = self.pooled(tokens.reshape(2 * batch, length), mask=flat).reshape(batch, 2, -1)
        first, second = both[:, 0], both[:, 1]
        parts = [first, second]
        if self.features == "product":
            parts += [first * second, first - second]
        return self.head(jnp.concatenate(parts, axis=1))


def first_real(x: Array, mask: Array | None) -> Array:
    """The first real token `(B, D)` of `x` `(B, L, D)`; a masked one where there is none."""
    return x[:, 0] if mask is None else jnp.take_along_axis(x, mask.argmax(1)[:, None, None], axis=1)[:, 0]


def masked_mean(x: Array, mask: Array | None) -> Array:
    """Mean of `x` `(B, L, D)` over real tokens, in float32; 0 where there is none."""
    check_tokens("masked_mean", "x", x, "(B, L, D)", (None, None, None))
    real = jnp.ones(x.shape[:2], bool) if mask is None else mask
    total = jnp.sum(jnp.where(real[:, :, None], x, 0), axis=1, dtype=jnp.float32)
    return (total / jnp.maximum(real.sum(1), 1)[:, None]).astype(x.dtype)
