"""One file per mechanism; importing this package registers them all."""

from attn_jax.mechanisms import dual_kv as dual_kv
from attn_jax.mechanisms import local as local
from attn_jax.mechanisms import mamba as mamba
from attn_jax.mechanisms import performer as performer
from attn_jax.mechanisms import standard as standard
