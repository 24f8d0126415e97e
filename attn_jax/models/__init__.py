"""Models that take any mechanism."""

from attn_jax.models.transformer import Transformer, TransformerBlock, TransformerClassifier

__all__ = ["Transformer", "TransformerBlock", "TransformerClassifier"]
