"""Local-global attention: a sliding window, and a few global keys that every query reads.

    z_ij = q_i . k_j / sqrt(E)     over the keys j in the window of i and the keys of the g globals, together
    o_i  = sum_j softmax_j(z_ij) v_j

The module's globals are `g` learned latent tokens `z`. They first read the whole sequence with the projections of
the tokens, `h = z + Attention(z -> x)`, and keys and values are those of `h`: so information crosses any distance
within one layer. Latents that have read the sequence would show the future, so with causal=True they are read as
they are, learned keys and values, and nothing comes from beyond the window. Time `O(L (window + g) D)`, memory
`O(L D)`: tiles outside of the window are never computed.

Source: the "HierarchicalVLM" research code; Beltagy et al. 2020, "Longformer"; Ainslie et al. 2020, "ETC"; the
latents that read and are read: Lee et al. 2019, "Set Transformer", section 3.1.

Deviations: the research code computes all `L x L` scores and masks them; its globals are meant to be selected by a
learned parameter, which gets no gradient and always selects the first `g` tokens; it averages the results of two
softmaxes, one over the window and one over the globals, so that a token in both counts twice. That version is
`combine="average", globals="first"`, here with causality and masks, and with all of the weight on one of the two
where the other has no key. Its window of width `w` is `window = w // 2` here. With `combine="joint"` a first token
inside of the window counts once.
"""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.aux import AuxMetric, record
from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.streaming import Stream, attend, check_operands, check_window, logit_scale
from attn_jax.mechanisms.base import KeyValueCache, ProjectedAttention, logical_axes
from attn_jax.registry import register
from attn_jax.types import NEG_INF, Array, Dtype, Window, check_choice, check_integer, check_shape

Combine = Literal["joint", "average"]
Globals = Literal["latent", "first"]


def local_global_attention(
    q: Array,
    k: Array,
    v: Array,
    k_global: Array,
    v_global: Array,
    *,
    window: Window,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention over a sliding window and global keys at once.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, K, E)`; `K` divides `H`, each key head serves `H / K` query heads.
      v: `(B, M, K, V)`.
      k_global: `(B, g, K, E)`, or `(1, g, K, E)` for all examples, with any number `g` of globals. They have no
        position: every query reads all of them, also with causal=True.
      v_global: `(B, g, K, V)` or `(1, g, K, V)`.
      window: tokens seen on each side, besides the query's own, or a pair `(left, right)`.
      mask: bool `(B, M)`, True = the key may be used.
      causal: of `k`, nothing on the right is seen.
      scale: multiplies the logits; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and the values.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    name = "local_global_attention"
    check_operands(name, q, [Stream(k, v, mask)])
    shared = {}
    for argument, array, width in (("k_global", k_global, q.shape[-1]), ("v_global", v_global, None)):
        check_shape(name, argument, array, "(B or 1, g, K, E)", (None, None, None, width))
        batch = q.shape[0] if array.shape[0] == 1 else array.shape[0]
        shared[argument] = jnp.broadcast_to(array, (batch, *array.shape[1:]))
    return attend(
        q,
        [Stream(k, v, mask), Stream(shared["k_global"], shared["v_global"], ordered=False)],
        causal=causal,
        window=check_window(name, window),
        scale=logit_scale(name, q.shape[-1], scale),
        implementation=implementation,
        operation=name,
        suffixes=("", "_global"),
    ).out


@register(
    "local_global",
    causal=True,
    decode=True,
    weights=True,
    time="L (window + g)",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class LocalGlobalAttention(ProjectedAttention):
    """Multi-head sliding-window attention with global keys; see the file's documentation.

    `attention_weights` is what a query reads of a token: directly, and through the latents as much as they read of
    it, with the latents' own content left out (rows are normalised, which matters where causal latents are read).
    Records the metric `global_share`, the mean weight of the globals over real queries.

    Args:
      window: see `local_global_attention`.
      num_globals: `g`; 0 is local attention.
      combine: "joint" (one softmax) or "average" (the mean of one over the window and one over the globals).
      globals: "latent" (learned tokens) or "first" (the first `g` positions of the sequence, of which a causal
        query reads those up to its own).
      implementation: see `local_global_attention`.
    """

    mechanism = "local_global"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        window: Window = 128,
        num_globals: int = 4,
        combine: Combine = "joint",
        globals: Globals = "latent",
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )
        for name, value, known in (("combine", combine, Combine), ("globals", globals, Globals)):
            check_choice("local_global", name, value, known)
        check_integer("local_global", "num_globals", num_globals, 0)
        self.window = check_window("local_global", window)
        self.num_globals = num_globals
        self.combine = combine
        self.first = globals == "first"
        learned = num_globals if globals == "latent" else 0
        latents = nnx.initializers.normal(0.02)
        self.latents = (
            nnx.Param(latents(rngs.params(), (learned, dim), param_dtype), **logical_axes(None, "embed"))
            if learned
            else None
        )

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        q, k, v = self.project(x, x)
        streams = self._streams(jnp.arange(x.shape[1]), k, v, mask, *self._globals(k, v, mask))
        o, share = self._mix(
            q, streams, causal=self.causal, window=self.window, implementation=self.implementation
        )
        self._record(share, mask)
        return self.out(o.reshape(x.shape))

    def weights(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        q, k, v = self.project(x, x)
        length = x.shape[1]
        k_global, _ = self._globals(k, v, mask)
        # With unit vectors for values, what is read of them are the weights.
        each = jnp.broadcast_to(jnp.eye(length)[:, None], (*k.shape[:3], length))
        if self.latents is None:
            v_global = each[:, : self.num_globals]
        elif self.causal:
            v_global = jnp.zeros((*k_global.shape[:3], length))
        else:
            v_global = self._survey(k, each, mask, "dense")
        streams = self._streams(jnp.arange(length), k, each, mask, k_global, v_global)
        o, _ = self._mix(q, streams, causal=self.causal, window=self.window, implementation="dense")
        total = o.sum(-1, keepdims=True)
        return (o / jnp.where(total > 0, total, 1)).transpose(0, 2, 1, 3)

    def _globals(self, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        """Keys and values `(B, g, H, E)` of the globals of a sequence with keys and values `k` and `v`."""
        if self.latents is None:
            return k[:, : self.num_globals], v[:, : self.num_globals]
        latents = jnp.broadcast_to(self.latents[...], (k.shape[0], *self.latents.shape))
        if not self.causal:
            latents = latents + self.out(self._survey(k, v, mask, self.implementation).reshape(latents.shape))
        return self.split_heads(self.key(latents)), self.split_heads(self.value(latents))

    def _survey(self, k: Array, v: Array, mask: Array | None, implementation: str | None) -> Array:
        """What the latents read `(B, g, H, V)` of the whole sequence."""
        assert self.latents is not None
        q = self.split_heads(self.query(self.latents[...][None]))
        q = jnp.broadcast_to(q, (k.shape[0], *q.shape[1:]))
        return attend(q, [Stream(k, v, mask)], scale=self.head_dim**-0.5, implementation=implementation).out

    def _streams(
        self, i: Array, k: Array, v: Array, mask: Array | None, k_global: Array, v_global: Array
    ) -> list[Stream]:
        """What queries at positions `i` `(L,)` read: the sequence, to see their window of it, and the globals."""
        number = k_global.shape[1]
        if not number:
            return [Stream(k, v, mask)]
        if self.latents is not None:
            return [Stream(k, v, mask), Stream(k_global, v_global, ordered=False)]
        j = jnp.arange(k.shape[1])
        real = jnp.ones(k.shape[:2], bool) if mask is None else mask
        past = jnp.where(j[:number] <= i[:, None], 0, NEG_INF)[None, None] if self.causal else None
        window = real & (j >= number) if self.combine == "joint" else real
        return [Stream(k, v, window), Stream(k_global, v_global, real[:, :number], bias=past, ordered=False)]

    def _mix(self, q: Array, streams: list[Stream], **options: Any) -> tuple[Array, Array | None]:
        """What the queries read, and the share `(B, L, H)` of the globals in it."""
        options |= {"scale": self.head_dim**-0.5, "operation": "local_global_attention"}
        if len(streams) == 1:
            return attend(q, streams, **options).out, None
        if self.combine == "joint":
            out, lse, stream_lse = attend(q, streams, **options)
            return out, jnp.where(lse != NEG_INF, jnp.exp(stream_lse[1] - lse), 0)
        window, beyond = (attend(q, [stream], **options) for stream in streams)
        # Half of each, all of one where the other has nothing.
        share = jnp.where(beyond.lse == NEG_INF, 0, jnp.where(window.lse == NEG_INF, 1, 0.5))
        out = (1 - share[..., None]) * window.out + share[..., None] * beyond.out
        return out.astype(window.out.dtype), share

    def _record(self, share: Array | None, mask: Array | None) -> None:
        if share is not None:
            real = jnp.ones(share.shape[:2], bool) if mask is None else mask
            total = jnp.sum(jnp.where(real[:, :, None], lax.stop_gradient(share), 0))
            record(self, AuxMetric, "global_share", total / jnp.maximum(real.sum() * self.num_heads, 1))

    def cache_slots(self, max_length: int) -> int:
        # As in local attention, a ring that holds the window; first tokens must stay for ever.
        return max_length if self.first else min(max_length, self.window[0] + 1)

    def recall(self, q: Array, cache: KeyValueCache, filled: Array) -> Array:
        position = cache.length - 1
        k, v = cache.keys, cache.values
        streams = self._streams(position[None], k, v, filled, *self._globals(k, v, filled))
        band = {"causal": True, "window": self.window, "query_offset": position} if self.first else {}
        return self._mix(q, streams, **band, implementation="dense")[0]
