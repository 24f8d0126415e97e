"""Fused kernels for NVIDIA GPUs, written in Pallas (Mosaic GPU) and used by `attn_jax` where the GPU runs them.

- `attention`: streaming softmax attention, forward and backward, for every mechanism with a softmax.
- `vq`: the assignment of codes and what tokens leave per code.
- `scan`: the selective scan.
- `instructions`, `launch`, `layout`, `hardware`: what they share; `instructions` is all that knows of instruction
  sets, `hardware` decides before anything is compiled.

Nothing is imported here: JAX takes most of a second to import its kernel language.
"""
