"""A cross-encoder: one score for a query and a document that it reads together (Nogueira and Cho 2019)."""

from typing import Any

from flax import nnx

from attn_jax.models.transformer import TransformerClassifier
from attn_jax.types import Array, check_mask


class Reranker(nnx.Module):
    """Pairs of query and document as token sequences to scores: a `TransformerClassifier` of one output.

    The score is read at the first token, which the caller makes a `[CLS]`.

    Args:
      vocab_size, dim, num_heads, num_layers, rngs: of the `TransformerClassifier`.
      critic_dim: width of what a critic reads to predict a reward, None for no critic.
      **transformer: its further arguments, such as `mechanism` and `options`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        critic_dim: int | None = None,
        rngs: nnx.Rngs,
        **transformer: Any,
    ):
        self.encoder = TransformerClassifier(
            vocab_size=vocab_size,
            num_classes=1,
            dim=dim,
            num_heads=num_heads,
            num_layers=num_layers,
            pool="first",
            rngs=rngs,
            **transformer,
        )
        self.critic = None if critic_dim is None else nnx.Linear(critic_dim, 1, rngs=rngs)

    def __call__(self, tokens: Array, *, mask: Array | None = None, types: Array | None = None) -> Array:
        """Scores `(B, C)`, float32, of `tokens` int `(B, C, L)` with mask bool and `types` int of that shape."""
        if tokens.ndim != 3:
            raise ValueError(f"Reranker: `tokens` must be (B, C, L), got shape {tokens.shape}")
        check_mask("Reranker", "mask", mask, "(B, C, L)", tokens.shape)
        batch, candidates, length = tokens.shape

        def flat(x: Array | None) -> Array | None:
            return None if x is None else x.reshape(batch * candidates, length)

        scores = self.encoder(tokens.reshape(-1, length), mask=flat(mask), types=flat(types))
        return scores.reshape(batch, candidates)
