"""Attention mechanisms in JAX: one right, fast and comparable implementation of each.

`build` makes a mechanism as a Flax NNX module, `ops` holds the pure functions, `MECHANISMS` says what there is.
"""

from attn_jax import mechanisms as mechanisms  # importing them registers them
from attn_jax import ops
from attn_jax.aux import pop_aux
from attn_jax.registry import MECHANISMS, Mechanism, build, register

__all__ = ["MECHANISMS", "Mechanism", "build", "ops", "pop_aux", "register"]
