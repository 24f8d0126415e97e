"""Strided attention: each query reads a sparse comb of keys.

With stride `k`, head `h` of query `i` reads the keys `j` (causal: `j <= i`) for which, by `pattern`,

    "local+strided"   i - j is a multiple of k, or |i - j| < k     the default
    "dilated"         i - j is a multiple of k
    "phase"           j - h is a multiple of k                     head h has its own comb
    "fixed"           j     is a multiple of k                     one comb for all

    o_i = sum_j softmax_j(q_i . k_j / sqrt(E)) v_j

"dilated" is standard attention within each residue class of the positions: `k` sequences of length `L / k`, folded
into the batch. "local+strided" joins it with a window; the two share only the query's own key, which the window
leaves out, so the two results merge by their logsumexp. Any token reaches any other within two layers: a step of
less than `k` in one, a multiple of `k` in the other. Time `O(L^2 D / k)` and `O(L k D)` for the window, least for
`k` near `sqrt(L)`; memory `O(L D)`. No score outside of the pattern is computed but at the edges of tiles.

Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (local and strided heads); the
"HierarchicalVLM" research code.

Deviations: the research code has only "fixed", in which the tokens between the comb's teeth never reach any other
token however many layers there are, and its masks do not broadcast against its scores. Causal, the first `h mod k`
queries of "phase" have no key yet and read exactly 0.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.streaming import (
    Attended,
    Features,
    Stream,
    attend,
    check_operands,
    dense_weights,
    logit_scale,
)
from attn_jax.mechanisms.base import KeyValueCache, ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import NEG_INF, Array, Dtype, check_choice, check_integer

Pattern = Literal["local+strided", "dilated", "phase", "fixed"]


def strided_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    stride: int,
    pattern: Pattern = "local+strided",
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Softmax attention over a strided set of keys.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, K, E)`; `K` divides `H`, each key head serves `H / K` query heads.
      v: `(B, M, K, V)`.
      stride: distance of the keys of a comb, an integer >= 1; 1 is standard attention.
      pattern: "local+strided", "dilated", "phase" or "fixed", see the file's documentation.
      mask: bool `(B, M)`, True = the key may be used.
      causal: query `i` sees keys `0..i`.
      scale: multiplies the logits; None for `1 / sqrt(E)`.
      implementation: see `attn_jax.types.Implementation`; None to choose.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together, or an unknown pattern or implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    _check_options("strided_attention", stride, pattern)
    check_operands("strided_attention", q, [Stream(k, v, mask)])
    q, k, v = map(jnp.asarray, (q, k, v))
    length, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    # Beyond every position and head a stride changes nothing more, and there is one row per residue.
    stride = max(1, min(stride, max(length, keys, heads)))
    read = functools.partial(
        attend,
        causal=causal,
        scale=logit_scale("strided_attention", q.shape[-1], scale),
        implementation=implementation,
        operation="strided_attention",
    )
    read_comb = functools.partial(read, **_tiles(length // stride, causal))
    if pattern in ("fixed", "phase"):
        offsets = jnp.arange(heads) % stride if pattern == "phase" else jnp.zeros(heads, int)
        return _comb(read_comb, q, k, v, mask, stride, offsets, causal)
    comb = _dilated(read_comb, q, k, v, mask, stride)
    if pattern == "dilated":
        return comb.out
    return _join(comb, read(q, [Stream(k, v, mask)], window=stride - 1, score=_without_self))


def _tiles(length: int, causal: bool) -> dict[str, tuple[int, int]]:
    """Causal folded sequences are short, and a tile on their diagonal is half in vain."""
    side = max(64, min(256, length // 8))
    return {"forward_tile": (side, side), "backward_tile": (side, side)} if causal else {}


def _check_options(where: str, stride: Any, pattern: Any) -> None:
    check_integer(where, "stride", stride)
    check_choice(where, "pattern", pattern, Pattern)


def _in_blocks(x: Array, stride: int) -> Array:
    """`(B, L, ...)` to `(B, ceil(L / stride), stride, ...)`, padded with zeros."""
    batch, length, *rest = x.shape
    blocks = -(-length // stride)
    x = jnp.pad(x, ((0, 0), (0, blocks * stride - length)) + ((0, 0),) * len(rest))
    return x.reshape(batch, blocks, stride, *rest)


def _fold(x: Array, stride: int) -> Array:
    """`(B, L, ...)` to `(B stride, ceil(L / stride), ...)`, a row for each residue of the position."""
    x = _in_blocks(x, stride).swapaxes(1, 2)
    return x.reshape(x.shape[0] * stride, *x.shape[2:])


def _unfold(x: Array, stride: int, length: int) -> Array:
    x = x.reshape(x.shape[0] // stride, stride, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(x.shape[0], x.shape[1] * stride, *x.shape[3:])[:, :length]


def _dilated(read: Any, q: Array, k: Array, v: Array, mask: Array | None, stride: int) -> Attended:
    if mask is None and k.shape[1] % stride:
        mask = jnp.ones(k.shape[:2], bool)
    stream = Stream(_fold(k, stride), _fold(v, stride), None if mask is None else _fold(mask, stride))
    out, lse, stream_lse = read(_fold(q, stride), [stream])
    unfold = functools.partial(_unfold, stride=stride, length=q.shape[1])
    return Attended(unfold(out), unfold(lse), jax.vmap(unfold)(stream_lse))


def _without_self(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    return jnp.where(distance == 0, NEG_INF, dot)


def _join(one: Attended, other: Attended) -> Array:
    """The attention over two disjoint sets of keys from that over each; 0 where both are empty."""
    share = jax.nn.sigmoid(one.lse - other.lse)[..., None]
    return (share * one.out + (1 - share) * other.out).astype(one.out.dtype)


def _comb(
    read: Any,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    stride: int,
    offsets: Array,
    causal: bool,
) -> Array:
    """Head `h` reads the keys `offsets[h] + stride n`, key `n` of its comb."""
    batch, length, heads, _ = q.shape
    real = jnp.ones(k.shape[:2], bool) if mask is None else mask

    def teeth(x: Array) -> Array:
        x = jnp.repeat(jnp.where(real[:, :, None, None], x, 0), heads // x.shape[2], axis=2)
        return _in_blocks(x, stride)[:, :, offsets, jnp.arange(heads)]

    # Each head has its own mask, which therefore comes as a feature.
    usable = _in_blocks(real, stride)[:, :, offsets].astype(jnp.float32)
    keys, values = teeth(k), teeth(v)
    if not causal:
        return read(q, [Stream(keys, values, None, (usable,))], score=_on_the_comb).out
    # Query a stride + r may read the teeth up to n = a, and tooth a itself only if r >= offset.
    keys, values, usable = (jnp.repeat(x, stride, axis=0) for x in (keys, values, usable))
    nearest = (jnp.arange(stride)[:, None] < offsets).astype(jnp.float32)
    q = _fold(q, stride)
    nearest = jnp.broadcast_to(jnp.tile(nearest, (batch, 1))[:, None], q.shape[:3])
    stream = Stream(keys, values, None, (usable,))
    return _unfold(read(q, [stream], query_features=(nearest,), score=_on_the_comb).out, stride, length)


def _on_the_comb(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    admissible = key[0] > 0
    if query:
        admissible &= distance >= query[0]
    return jnp.where(admissible, dot, NEG_INF)


def _admissible(pattern: Pattern, stride: int, heads: int, i: Array, j: Array) -> Array:
    """The pattern as a dense bool `(H, L, M)` for query positions `i` `(L,)` and key positions `j` `(M,)`."""
    i, head = i[:, None], jnp.arange(heads)[:, None, None]
    on_comb = (j - {"fixed": 0, "phase": head}.get(pattern, i)) % stride == 0
    if pattern == "local+strided":
        on_comb |= jnp.abs(i - j) < stride
    return jnp.broadcast_to(on_comb, (heads, i.shape[0], j.shape[0]))


@register(
    "strided",
    causal=True,
    decode=True,
    weights=True,
    time="L^2 / stride + L stride",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class StridedAttention(ProjectedAttention):
    """Multi-head strided attention; see the file's documentation.

    Args:
      stride: see `strided_attention`.
      pattern: see `strided_attention`; "fixed" is the source's literal version.
      implementation: see `strided_attention`.
      rope_base: see `attn_jax.positions.rotary`; None: no rotary positions.
    """

    mechanism = "strided"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        stride: int = 4,
        pattern: Pattern = "local+strided",
        implementation: str | None = None,
        rope_base: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rope_base=rope_base,
            rngs=rngs,
        )
        _check_options("strided", stride, pattern)
        self.stride = stride
        self.pattern: Pattern = pattern

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return strided_attention(
            q,
            k,
            v,
            stride=self.stride,
            pattern=self.pattern,
            mask=mask,
            causal=self.causal,
            implementation=self.implementation,
        )

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        bias = self._bias(jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
        return dense_weights(q, [Stream(k, k, mask, bias=bias)], causal=self.causal, scale=self.head_dim**-0.5)

    def recall(self, q: Array, cache: KeyValueCache, filled: Array) -> Array:
        bias = self._bias(cache.length[None] - 1, jnp.arange(cache.keys.shape[1]))
        stream = Stream(cache.keys, cache.values, filled, bias=bias)
        return attend(q, [stream], scale=self.head_dim**-0.5, implementation="dense").out

    def _bias(self, i: Array, j: Array) -> Array:
        """The pattern as logits `(1, H, L, M)` to add."""
        return jnp.where(_admissible(self.pattern, self.stride, self.num_heads, i, j), 0, NEG_INF)[None]
