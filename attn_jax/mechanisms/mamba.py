"""Mamba: a selective state-space model in the place of attention.

    (x, z) = W_in u                                    inner width E = expand * D
    x      = SiLU(causal depthwise convolution of x)
    (r, B, C) = W_x x,   Delta = softplus(W_Delta r + bias)
    h_t    = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t,   y_t = C_t . h_t + d x_t,   A = -exp(A_log) < 0
    out    = W_out (y * SiLU(z))

Source: Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", algorithm 2, figure 3,
with its initialisation. Time `O(L D N)`, memory `O(L D)`; about `6 D^2` parameters.

The source that this library reimplements lost the sign of `A` (its state grows fivefold a step and overflows
float32 after 55), had `B`, `C` and `Delta` independent of the input (nothing is selected) and neither convolution
nor `d`. Here a masked token enters the convolution as zero and has `Delta = 0`, which keeps the state as it is.

Without an order to respect (`causal=False`) a second scan with its own parameters reads the sequence from its end
and the outputs are added (as in Zhu et al. 2024, "Vision Mamba").
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.scan import selective_scan
from attn_jax.mechanisms.base import Attention, logical_axes, zero_masked
from attn_jax.registry import register
from attn_jax.types import Array, Dtype, check_flag, check_integer


def causal_convolution(x: Array, kernel: Array, bias: Array, before: Array) -> Array:
    """Depthwise: `y_t = bias + sum_k kernel_k x_{t - K + 1 + k}`.

    Args:
      x: `(B, L, E)`.
      kernel: `(K, E)`.
      bias: `(E,)`.
      before: `(B, K - 1, E)`, the inputs just before `x`; zeros at the start of a sequence.

    Returns:
      `(B, L, E)`.
    """
    length = x.shape[1]
    padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    taps = (padded[:, k : k + length] * kernel[k].astype(x.dtype) for k in range(kernel.shape[0]))
    return sum(taps, start=bias.astype(x.dtype))


class MambaCache(NamedTuple):
    """What a causal Mamba keeps while decoding.

    Attributes:
      inputs: `(B, conv_width - 1, E)`, the last inputs of the convolution.
      state: `(B, E, N)`, float32.
    """

    inputs: Array
    state: Array


class SelectiveSSM(nnx.Module):
    """One direction of a Mamba layer: convolution, selection and scan on the inner width `E`.

    Args:
      width: inner width `E`.
      state_size: `N`.
      rank: of the projection to `Delta`.
      conv_width: taps `K` of the convolution.
      chunk, implementation: of `selective_scan`.
    """

    def __init__(
        self,
        width: int,
        *,
        state_size: int,
        rank: int,
        conv_width: int,
        chunk: int,
        implementation: str | None,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.state_size, self.rank, self.chunk, self.implementation = state_size, rank, chunk, implementation
        types = {"dtype": dtype, "param_dtype": param_dtype}
        key = rngs.params()

        def uniform(fan_in: int, *shape: int) -> Array:
            bound = fan_in**-0.5
            return jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)

        self.conv_kernel = nnx.Param(uniform(conv_width, conv_width, width), **logical_axes(None, "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(width, param_dtype), **logical_axes("mlp"))
        self.select = nnx.Linear(
            width,
            rank + 2 * state_size,
            use_bias=False,
            kernel_init=nnx.initializers.xavier_uniform(),
            kernel_metadata=logical_axes("mlp", None),
            **types,
            rngs=rngs,
        )
        self.delta_kernel = nnx.Param(uniform(rank, rank, width), **logical_axes(None, "mlp"))
        # Delta starts log-uniform in [0.001, 0.1]; the bias is its inverse softplus.
        delta = jnp.exp(jax.random.uniform(key, (width,), minval=math.log(1e-3), maxval=math.log(0.1)))
        delta = jnp.maximum(delta, 1e-4)
        inverse = delta + jnp.log(-jnp.expm1(-delta))
        self.delta_bias = nnx.Param(inverse.astype(param_dtype), weight_decay=False, **logical_axes("mlp"))
        rates = jnp.log(jnp.arange(1, state_size + 1, dtype=param_dtype))
        rates = jnp.tile(rates, (width, 1))
        self.a_log = nnx.Param(rates, weight_decay=False, **logical_axes("mlp", None))
        self.skip = nnx.Param(jnp.ones(width, param_dtype), weight_decay=False, **logical_axes("mlp"))

    def __call__(self, x: Array, mask: Array | None, cache: MambaCache) -> tuple[Array, MambaCache]:
        """`x` `(B, L, E)` with zeros at masked tokens to `y` `(B, L, E)` and what the next token needs."""
        inputs = jnp.concatenate([cache.inputs, x.astype(cache.inputs.dtype)], axis=1)[:, x.shape[1] :]
        x = nnx.silu(causal_convolution(x, self.conv_kernel[...], self.conv_bias[...], cache.inputs))
        low, b, c = jnp.split(self.select(x), [self.rank, self.rank + self.state_size], axis=-1)
        delta = jnp.dot(low, self.delta_kernel[...].astype(low.dtype), preferred_element_type=jnp.float32)
        delta = nnx.softplus(delta + self.delta_bias[...])
        y, state = selective_scan(
            x,
            delta,
            -jnp.exp(self.a_log[...].astype(jnp.float32)),
            b,
            c,
            self.skip[...],
            mask=mask,
            initial_state=cache.state,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        return y, MambaCache(inputs, state)

    def empty_cache(self, batch: int, dtype: Dtype) -> MambaCache:
        taps, width = self.conv_kernel.shape
        return MambaCache(jnp.zeros((batch, taps - 1, width), dtype), jnp.zeros((batch, width, self.state_size)))


@register(
    "mamba",
    causal=True,
    decode=True,
    time="L",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class Mamba(Attention):
    """A Mamba layer; see the file's documentation. `num_heads` has no meaning here and is only checked.

    Args:
      expand: inner width over `dim`.
      state_size: `N`, states of each inner channel.
      conv_width: taps of the convolution.
      bidirectional: add a scan from the end; None: where not causal.
      chunk: of `selective_scan`; no effect on the result.
      implementation: of `selective_scan`.

    Raises:
      ValueError: `bidirectional=True` with `causal=True`, or a size that is not positive.
    """

    mechanism = "mamba"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        expand: int = 2,
        state_size: int = 16,
        conv_width: int = 4,
        bidirectional: bool | None = None,
        chunk: int = 128,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        sizes = {"expand": expand, "state_size": state_size, "conv_width": conv_width, "chunk": chunk}
        for name, value in sizes.items():
            check_integer("mamba", name, value)
        if bidirectional is not None:
            check_flag("mamba", "bidirectional", bidirectional)
        if causal and bidirectional:
            raise ValueError(
                "mamba: `bidirectional=True` reads the sequence from its end, which causal=True forbids"
            )
        inner = expand * dim
        self.implementation = self.checked(implementation)
        self.into = self.linear(dim, 2 * inner, ("embed", "mlp"), rngs)
        directions = 1 if causal or bidirectional is False else 2
        self.directions = nnx.List(
            SelectiveSSM(
                inner,
                state_size=state_size,
                rank=math.ceil(dim / 16),
                conv_width=conv_width,
                chunk=chunk,
                implementation=implementation,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for _ in range(directions)
        )
        self.out = self.linear(inner, dim, ("mlp", "embed"), rngs)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        inner, gate = jnp.split(self.into(x), 2, axis=-1)
        inner = zero_masked(inner, mask)
        empty = self.directions[0].empty_cache(x.shape[0], inner.dtype)
        y, _ = self.directions[0](inner, mask, empty)
        if len(self.directions) == 2:
            # Padding at the end comes first this way: it leaves the empty state empty.
            flipped = None if mask is None else mask[:, ::-1]
            y += self.directions[1](inner[:, ::-1], flipped, empty)[0][:, ::-1]
        return self.out(y * nnx.silu(gate))

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> MambaCache:
        """An empty cache for `step`; its size does not depend on `max_length`."""
        self.check_init_cache(batch, max_length, dtype)
        return self.directions[0].empty_cache(batch, dtype)

    def step(self, x: Array, cache: MambaCache) -> tuple[Array, MambaCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the next cache."""
        self.check_step(x, cache)
        inner, gate = jnp.split(self.into(x), 2, axis=-1)
        y, cache = self.directions[0](inner, None, cache)
        return self.out(y * nnx.silu(gate)), cache
