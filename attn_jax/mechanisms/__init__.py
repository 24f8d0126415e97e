"""One file per mechanism; importing this package registers them all."""

from attn_jax.mechanisms import cross_memory as cross_memory
from attn_jax.mechanisms import dual_kv as dual_kv
from attn_jax.mechanisms import gravitational as gravitational
from attn_jax.mechanisms import gravitational_multi_timescale as gravitational_multi_timescale
from attn_jax.mechanisms import hyper as hyper
from attn_jax.mechanisms import local as local
from attn_jax.mechanisms import local_global as local_global
from attn_jax.mechanisms import mamba as mamba
from attn_jax.mechanisms import maw as maw
from attn_jax.mechanisms import multi_timescale as multi_timescale
from attn_jax.mechanisms import performer as performer
from attn_jax.mechanisms import standard as standard
from attn_jax.mechanisms import strided as strided
from attn_jax.mechanisms import vq as vq
