"""Vector-quantised attention as fused kernels: the assignment of codes, what tokens leave per code, and the reads.

**Assignment** (`nearest`). The code of a token maximises `x . c - |c|^2 / 2`. A block owns a tile of tokens and
walks over the codebook with the best product and its number in registers, so the `(L, S)` products exist nowhere.
Matrix instructions take 16-bit operands, and codes are decided in float32: both sides are cut into three bfloat16
parts of 8 bits each, `x = lo + mid + hi` exactly, and six of the nine products are kept (Henry, Tang & Heinecke
2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations"), the smallest
first:

    x . c = (lo . hi + mid . mid + hi . lo) + (mid . hi + hi . mid) + hi . hi     dropped: at most 2^-23 |x| . |c|

**Pooling** (`pool`). What the tokens of code `a` leave to those that read them as one token, `w_j` being the
logarithm of a weight:

    weight_a = log sum_{j: y_j = a} exp(w_j)         mean_a = sum_{j: y_j = a} exp(w_j - weight_a) v_j

is a softmax over tokens with logits `w_j` or, where the code is another, minus infinity. So it is computed as
attention is (Milakov & Gimelshein 2018): a block owns a tile of codes and walks over the tokens, with the running
maximum and sums in registers and the product "one-hot codes times values" on tensor cores. Before the first token
of each block of the sequence it writes down what it has: a prefix of blocks, or walking backwards a suffix.

    nearest                     codes                  pool                      tokens
                       +------+------+------+                        +------+------+------+------+
      tokens  owned    |  --> walks --->    |          codes  owned  |  --> walks --> or <--     |
               tile    +------+------+------+                  tile  +------+------+------+------+
              best product and its number                            ^ mean, weight   ^ and here, for each block

**Reads.** With a snapshot for each block, blocks do not wait for one another: they are folded into the batch, and
one call of the kernels of `pallas_kernels.attention` reads them all. A query reads two streams, the codewords with
`weight = log N` as feature and `mean = U` as values (of the keys before its block), and its own block. Without an
order there is one block, whose queries are codes as well. Backwards, in the notation of
`attn_jax.mechanisms.vq`, the keys of a block are read by two sorts of queries: by those of their own block, and by
the later ones as codewords. A code of queries with `exp(weight) = sum exp(-lse_i)`, `X / exp(weight)` the mean of
their cotangents and `Y / exp(weight)` that of `g . o`, is to a key just what a query is with

    lse = -weight          cotangent = X / exp(weight)          g . o = Y / exp(weight)

so `dk` and `dv` are sums of two calls of the same backward kernels, and `dq` comes from the first of them.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from attn_jax.engine.plan import LOWEST_MAX, Plan, Stream, add_key_feature
from attn_jax.mechanisms.vq import Quantised
from attn_jax.types import NEG_INF, Array
from pallas_kernels import attention
from pallas_kernels.hardware import Hardware
from pallas_kernels.instructions import Ref, Tiles, Value, store, walk
from pallas_kernels.launch import Cost, launch
from pallas_kernels.layout import WIDTHS, head_width, round_up, side_by_side, stack_rows, unpad

_LOG2_E = math.log2(math.e)
_TILE = 64  # tokens, or codes
_REST = 3072  # bytes of shared memory, at most, for rows in flight and alignment


# Inside a kernel.


def _spread(row: Value, axis: int, tile: Value) -> Value:
    """One number per row (axis 0) or column (axis 1) of a tile, in its shape."""
    return lax.broadcast_in_dim(row, tile.shape, [axis])


# Assignment.


def _parts(x: Value) -> list[Value]:
    """The bfloat16 parts `hi, mid, lo` of a finite float32 array, which is their sum.

    On bits: a conversion there and back is something that compilers are free to leave out.
    """
    parts = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        part = lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def nearest(hardware: Hardware, x: Array, codebook: Array) -> Array:
    """The codes, int32 `(B, L, H)`, of the codewords nearest to `x`; ties go to the lowest index.

    Args:
      x: `(B, L, H, E)` float32, finite, with `E <= 128`.
      codebook: `(H, S, E)` float32.
    """
    batch, tokens, heads, width = (*x.shape[:3], head_width(x.shape[3]))
    length, codes = round_up(tokens, _TILE), codebook.shape[1]
    size = 32 if width == WIDTHS[-1] else _TILE  # codewords in a tile, whose three parts pass through registers
    stages = 2 if 6 * width * (_TILE + 2 * size) + _REST <= hardware.shared_memory else 1
    half = 0.5 * jnp.sum(jnp.square(codebook), axis=2)
    padding = ((0, 0), (0, round_up(codes, _TILE) - codes))
    # A codeword of the padding is farther than any that is finite.
    rows = jnp.pad(half, padding, constant_values=float(jnp.finfo(jnp.float32).max))[:, None]
    codewords = [side_by_side(p.swapaxes(0, 1)[None], round_up(codes, _TILE))[0] for p in _parts(codebook)]
    tiles = Tiles(hardware, jnp.bfloat16)

    def body(x: Ref, codewords: list[Ref], rows: Ref, codes_ref: Ref, *parts: Ref) -> None:
        batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        own = x.at[batch, pl.ds(tile * _TILE, _TILE), pl.ds(head * width, width)]
        for target, part in zip(parts, _parts(plgpu.load(own, optimized=False))):
            target[...] = part
        if hardware.tma:
            plgpu.commit_smem()
        hi, mid, lo = parts

        def step(start: Value, refs: list[Ref], vectors: list[Value], carry: Any) -> Any:
            c_hi, c_mid, c_lo = refs
            best, number = carry
            small = [(lo, c_hi), (mid, c_mid), (hi, c_lo)]
            product = tiles.nt_sum([*small, (mid, c_hi), (hi, c_mid), (hi, c_hi)])
            closeness = product - _spread(vectors[0], 1, product)
            top = closeness.max(axis=1)
            numbers = lax.broadcasted_iota(jnp.int32, closeness.shape, 1) + start
            first = jnp.where(closeness == _spread(top, 0, closeness), numbers, jnp.int32(2**30)).min(axis=1)
            return jnp.maximum(best, top), jnp.where(top > best, first, number)

        lowest = jnp.full((_TILE,), -float(jnp.finfo(jnp.float32).max), jnp.float32)
        arrays = [(ref, head, width) for ref in codewords]
        start = lowest, jnp.zeros((_TILE,), jnp.int32)
        _, number = walk(
            tiles, size, round_up(codes, _TILE) // size, lambda t: t, arrays, rows.at[head], step, start, stages
        )
        store(codes_ref.at[batch, head, pl.ds(tile * _TILE, _TILE)], number)

    out = jax.ShapeDtypeStruct((batch, heads, length), jnp.int32)
    products = batch * heads * length * round_up(codes, _TILE)
    found = launch(
        body,
        side_by_side(lax.stop_gradient(x), length),
        codewords,
        rows,
        name="vq_nearest",
        out=out,
        grid={"batch": batch, "head": heads, "tile": length // _TILE},
        scratch=[plgpu.SMEM((_TILE, width), jnp.bfloat16) for _ in range(3)],
        hardware=hardware,
        cost=Cost(12 * products * width, 0, 4 * batch * heads * length * (width + 1)),
    )
    return found[:, :, :tokens].swapaxes(1, 2)


# Pooling.

Order = Literal["all", "before", "after"]


class Pooled(NamedTuple):
    """What tokens leave per code, for each of `N` blocks, which are folded into the batch.

    Attributes:
      mean: of their values, weighted, `(B N, S, H, V)` in the dtype of the values; 0 for a code without tokens.
      weight: logarithm of the sum of their weights, `(B N, S, H)` float32; `NEG_INF` for a code without tokens.
      scalar: weighted mean of their scalars, `(B N, S, H)` float32, or None.
    """

    mean: Array
    weight: Array
    scalar: Array | None


def pool(
    hardware: Hardware,
    codes: Array,
    number: int,
    weight: Array,
    v: Array,
    scalar: Array | None = None,
    *,
    order: Order = "all",
    block: int | None = None,
) -> Pooled:
    """Weighted means of values and the sums of weights, per code, of all tokens or of those of other blocks.

    Args:
      codes: int32 `(B, L, H)`, less than `number`.
      weight: logarithms `(B, L, H)`; `NEG_INF` for a token that does not count.
      v: `(B, L, H, V)`; 0 where a token does not count.
      scalar: `(B, L, H)`, averaged like the values.
      order: "all" tokens, as one block; or those "before" or "after" each block of the sequence.
      block: tokens in a block, a multiple of the tile of 64; for "all", None.
    """
    batch, tokens, heads, value_width = v.shape
    width = head_width(value_width)
    length = round_up(tokens, block or _TILE)
    block = block or length
    blocks = length // block
    padded = round_up(number, _TILE)
    vectors = [(codes, 0), (weight, NEG_INF), *([] if scalar is None else [(scalar, 0)])]
    tiles = Tiles(hardware, v.dtype)
    last = length // _TILE - 1

    def body(v: Ref, rows: Ref, mean_ref: Ref, weight_ref: Ref, scalar_ref: Ref, *staging: Ref) -> None:
        batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
        owned = lax.broadcasted_iota(jnp.int32, (_TILE, _TILE), 0) + tile * _TILE

        def write(block: Value, carry: Any) -> None:
            sums, top, total, scalars = carry
            some = total != 0
            divisor = jnp.where(some, total, 1)
            here = pl.ds(tile * _TILE, _TILE)
            at = mean_ref.at[batch, block, here, pl.ds(head * width, width)]
            store(at, (sums / _spread(divisor, 0, sums)).astype(tiles.dtype))
            at = batch, block, head, here
            store(weight_ref.at[at], jnp.where(some, top + jnp.log(divisor), NEG_INF))
            if scalar_ref is not None:
                store(scalar_ref.at[at], scalars / divisor)

        def step(start: Value, refs: list[Ref], vectors: list[Value], carry: Any) -> Any:
            if order != "all":
                first = start % block == (0 if order == "before" else block - _TILE)
                pl.when(first)(lambda: write(start // block, carry))
            sums, top, total, scalars = carry
            codes, weight, *scalar = vectors
            hit = _spread(codes, 1, owned).astype(jnp.int32) == owned
            w = jnp.where(hit, _spread(weight, 1, owned), NEG_INF)
            new = jnp.maximum(top, w.max(axis=1))
            p = jnp.exp2((w - _spread(new, 0, w)) * _LOG2_E)
            shrink = jnp.exp2((top - new) * _LOG2_E)
            total = total * shrink + p.sum(axis=1)
            if scalar:
                scalars = scalars * shrink + (p * _spread(scalar[0], 1, p)).sum(axis=1)
            return tiles.nn(sums * _spread(shrink, 0, sums), p, refs[0], *staging), new, total, scalars

        zero = jnp.zeros((_TILE,), jnp.float32)
        start = jnp.zeros((_TILE, width), jnp.float32), jnp.full((_TILE,), LOWEST_MAX, jnp.float32), zero, zero
        direction = (lambda t: last - t) if order == "after" else (lambda t: t)
        end = walk(
            tiles, _TILE, last + 1, direction, [(v.at[batch], head, width)], rows.at[batch, head], step, start
        )
        if order == "all":
            write(0, end)

    row = jax.ShapeDtypeStruct((batch, blocks, heads, padded), jnp.float32)
    out = (
        jax.ShapeDtypeStruct((batch, blocks, padded, heads * width), tiles.dtype),
        row,
        None if scalar is None else row,
    )
    scores = batch * heads * length * padded
    written = batch * blocks * padded * heads * (width * tiles.dtype.itemsize + 8)
    mean, *per_code = launch(
        body,
        side_by_side(v, length),
        stack_rows(vectors, length),
        name="vq_pool",
        out=out,
        grid={"batch": batch, "head": heads, "tile": padded // _TILE},
        scratch=tiles.staging((_TILE, _TILE)),
        hardware=hardware,
        cost=Cost(2 * scores * width, scores, v.size * tiles.dtype.itemsize + written),
    )
    mean = unpad(mean.reshape(batch * blocks, padded, -1), number, heads, value_width)
    weights, scalars = jax.tree.map(
        lambda x: x.reshape(batch * blocks, heads, padded)[..., :number].swapaxes(1, 2), per_code
    )
    return Pooled(mean, weights, scalars)


# The reads.


_CODEWORDS = Plan(add_key_feature, None, None, ordered=False)
_OWN_BLOCK = Plan(None, None, 0)
_ALL = Plan(None, None, None)


class _Blocks(NamedTuple):
    """How a sequence is cut: `block` is None where it is not."""

    block: int | None

    @classmethod
    def of(cls, causal: bool, quantised: Quantised) -> "_Blocks":
        """With as many tokens in a block as there are codes, snapshots are as large as what they are taken of."""
        codes = max(quantised.codebook_q.shape[1], quantised.codebook_k.shape[1])
        return cls(min(round_up(codes, _TILE), round_up(quantised.codes_q.shape[1], _TILE)) if causal else None)

    def fold(self, x: Array, fill: float = 0) -> Array:
        """`(B, L, ...)` to `(B blocks, block, ...)`."""
        if self.block is None:
            return x
        padding = ((0, 0), (0, -x.shape[1] % self.block)) + ((0, 0),) * (x.ndim - 2)
        return jnp.pad(x, padding, constant_values=fill).reshape(-1, self.block, *x.shape[2:])

    def unfold(self, x: Array, batch: int, length: int) -> Array:
        return x.reshape(batch, -1, *x.shape[2:])[:, :length]


def _repeated(codebook: Array, times: int, dtype: Any) -> Array:
    """The codewords as tokens `(times, S, H, E)`."""
    codewords = codebook.swapaxes(0, 1).astype(dtype)
    return jnp.broadcast_to(codewords, (times, *codewords.shape))


def _codewords(codebook: Array, codes: Array, dtype: Any) -> Array:
    return codebook.astype(dtype)[jnp.arange(codebook.shape[0]), codes]


def _own(blocks: _Blocks, v: Array, quantised: Quantised) -> Stream:
    """The keys of each block."""
    keys = _codewords(quantised.codebook_k, quantised.codes_k, v.dtype)
    return Stream(blocks.fold(keys), blocks.fold(v), blocks.fold(quantised.mask))


def _before(hardware: Hardware, blocks: _Blocks, v: Array, quantised: Quantised) -> Stream:
    """What each block reads as codewords: all keys, or those of the blocks before."""
    weight = jnp.broadcast_to(jnp.where(quantised.mask, 0.0, NEG_INF)[:, :, None], v.shape[:3])
    order = "all" if blocks.block is None else "before"
    number = quantised.codebook_k.shape[1]
    pooled = pool(hardware, quantised.codes_k, number, weight, v, order=order, block=blocks.block)
    keys = _repeated(quantised.codebook_k, 1, v.dtype)
    return Stream(keys, pooled.mean, features=(pooled.weight,))


def forward(hardware: Hardware, causal: bool, v: Array, quantised: Quantised) -> tuple[Array, Array]:
    """The output `(B, L, H, V)` in the dtype of `v`, in which products are taken, and `lse` `(B, L, H)`."""
    batch, length, _ = quantised.codes_q.shape
    blocks, offset = _Blocks.of(causal, quantised), jnp.int32(0)
    codewords = _before(hardware, blocks, v, quantised)
    if not causal:
        q = _repeated(quantised.codebook_q, batch, v.dtype)
        out, lse, _ = attention.forward((_CODEWORDS,), hardware, 1.0, offset, None, q, None, (), [codewords])
        at = jnp.arange(batch)[:, None, None], quantised.codes_q, jnp.arange(v.shape[2])
        return out[at], lse[at]
    q = blocks.fold(_codewords(quantised.codebook_q, quantised.codes_q, v.dtype))
    streams = [codewords, _own(blocks, v, quantised)]
    out, lse, _ = attention.forward((_CODEWORDS, _OWN_BLOCK), hardware, 1.0, offset, None, q, None, (), streams)
    return blocks.unfold(out, batch, length), blocks.unfold(lse, batch, length)


def backward(
    hardware: Hardware, causal: bool, v: Array, quantised: Quantised, lse: Array, delta: Array, g: Array
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, in the dtype of `v`.

    Args:
      lse: `(B, L, H)`, `-NEG_INF` where nothing was read.
      delta: `g . o`, `(B, L, H)`.
      g: the cotangent of the output `(B, L, H, V)`.
    """
    batch, length, _ = quantised.codes_q.shape
    blocks, offset, g = _Blocks.of(causal, quantised), jnp.int32(0), g.astype(v.dtype)
    own = _own(blocks, v, quantised)
    plans, streams = [_CODEWORDS], [_before(hardware, blocks, v, quantised)]
    if causal:
        plans, streams = [*plans, _OWN_BLOCK], [*streams, own]
    q = blocks.fold(_codewords(quantised.codebook_q, quantised.codes_q, v.dtype))
    cotangents = blocks.fold(lse, -NEG_INF), blocks.fold(delta), blocks.fold(g)
    dq, _, d_streams = attention.backward(
        tuple(plans), hardware, 1.0, offset, None, q, None, (), streams, *cotangents
    )

    number, order = quantised.codebook_q.shape[1], "after" if causal else "all"
    after = pool(hardware, quantised.codes_q, number, -lse, g, delta, order=order, block=blocks.block)
    assert after.scalar is not None
    readers = _repeated(quantised.codebook_q, len(after.mean), v.dtype)
    cotangents = -after.weight, after.scalar, after.mean
    _, _, (d_own,) = attention.backward(
        (_ALL,), hardware, 1.0, offset, None, readers, None, (), [own], *cotangents
    )
    dk, dv = d_own.keys, d_own.values
    if causal:
        dk, dv = dk + d_streams[1].keys, dv + d_streams[1].values
    tokens = v.shape[1]
    return (
        blocks.unfold(dq, batch, length),
        blocks.unfold(dk, batch, tokens),
        blocks.unfold(dv, batch, tokens),
    )


def unsupported(hardware: Hardware, q: Array, v: Array) -> str | None:
    """Why these kernels cannot run on `hardware`, None if they can.

    Args:
      q: what is quantised, in the type in which codes are decided.
      v: the values, in the type in which they would be multiplied.
    """
    types = ("bfloat16", "float16", "float32") if hardware.interpret else ("bfloat16", "float16")
    if v.dtype.name not in types:
        return f"values are {v.dtype.name}, it multiplies {', '.join(types)}"
    if q.dtype != jnp.float32:
        return f"codes are decided in {q.dtype.name}, it decides in float32"
    for name, x in (("keys", q), ("values", v)):
        if x.shape[3] > WIDTHS[-1]:
            return f"{name} have heads of width {x.shape[3]}, it has tiles of up to {WIDTHS[-1]}"
    if 0 in (q.size, v.size):
        return "there is nothing to compute"
    return None
