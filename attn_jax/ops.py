"""The operations: pure functions, differentiable in every array argument, without parameters or Flax."""

from attn_jax.engine.scan import selective_scan
from attn_jax.mechanisms.dual_kv import dual_kv_attention
from attn_jax.mechanisms.local import local_attention
from attn_jax.mechanisms.performer import favor_attention
from attn_jax.mechanisms.standard import standard_attention

__all__ = ["dual_kv_attention", "favor_attention", "local_attention", "selective_scan", "standard_attention"]
