"""The operations: pure functions, differentiable in every array argument, without parameters or Flax."""

from attn_jax.engine.scan import selective_scan
from attn_jax.mechanisms.dual_kv import dual_kv_attention
from attn_jax.mechanisms.gravitational import gravitational_attention
from attn_jax.mechanisms.gravitational_multi_timescale import gravitational_multi_timescale_attention
from attn_jax.mechanisms.hyper import hyper_attention
from attn_jax.mechanisms.local import local_attention
from attn_jax.mechanisms.local_global import local_global_attention
from attn_jax.mechanisms.multi_timescale import multi_timescale_attention
from attn_jax.mechanisms.performer import favor_attention
from attn_jax.mechanisms.standard import standard_attention
from attn_jax.mechanisms.strided import strided_attention
from attn_jax.mechanisms.vq import vq_attention

__all__ = [
    "dual_kv_attention",
    "favor_attention",
    "gravitational_attention",
    "gravitational_multi_timescale_attention",
    "hyper_attention",
    "local_attention",
    "local_global_attention",
    "multi_timescale_attention",
    "selective_scan",
    "standard_attention",
    "strided_attention",
    "vq_attention",
]
