"""Fused GPU kernels in Pallas; none yet: `attn_jax` runs its tiled XLA path everywhere."""
