"""Models that take any mechanism."""

from attn_jax.models.reranker import Reranker
from attn_jax.models.slots import SlotBasedVideoModel, SlotDecoder, SlotEncoder
from attn_jax.models.transformer import Transformer, TransformerBlock, TransformerClassifier, TransformerMatcher

__all__ = [
    "Reranker",
    "SlotBasedVideoModel",
    "SlotDecoder",
    "SlotEncoder",
    "Transformer",
    "TransformerBlock",
    "TransformerClassifier",
    "TransformerMatcher",
]
