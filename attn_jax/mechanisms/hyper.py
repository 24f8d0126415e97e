"""HyperAttention: exact attention to the keys that hash alike, sampled attention to the rest.

Each head has `R` random directions `w_r`. The bits `w_r . x > 0`, read as a Gray code, give the bucket of `x`:
neighbouring buckets differ in one bit, so vectors at a small angle get near buckets. Keys are sorted by bucket and
cut into blocks of `block_size`; a query reads the block into which its own bucket falls. With `S` a uniform sample
of `m` of the `n` keys, without replacement,

    z_ij = q_i . k_j / sqrt(E)
    o_i  = sum_j p_ij v_j,    p_ij ~ exp(z_ij)          for j in the block of i
                              p_ij ~ exp(z_ij) n / m    for j in S outside of the block of i

whose normaliser is an unbiased estimate of that of softmax attention, exact if `m = n` or if one block holds all.
At most `min_length` keys are attended to exactly.

Causal: a segment of `min_length` tokens is exact. Of every two neighbouring aligned segments of `min_length 2^l`
tokens, the second reads the first as above, for `l = 0, 1, ...`; so every pair of a query and a past key is met
once. Results of disjoint sets of keys merge by their logsumexp.

Source: Han et al. 2023, "HyperAttention: Long-context Attention in Near-Linear Time", algorithms 1, 3 and 4. Time
`O(L (block_size + num_samples) D)`, causal times `log(L / min_length)` and `O(L min_length D)` for the segments;
memory `O(L D)`, causal times the same logarithm.

Deviations from the published code: its buckets are numbered by the Gray code of the bits and not by its inverse,
so that neighbours differ in up to four bits; it samples with replacement, never exact; it attends to the zeros
that fill up the last block. It aligns the sorted queries with the sorted keys by rank, so that a query's block
depends on the other queries: causal outputs then depend on the future. Here a query's block depends on its own
bucket and the keys alone; `strict=False` is the published way. Halves are aligned to absolute positions and
samples are drawn by position, so that padding changes nothing. (The paper samples by the norms of the values, its
code uniformly.)
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attn_jax.engine.plan import accumulation
from attn_jax.engine.streaming import Features, Stream, attend, logit_scale
from attn_jax.mechanisms.base import KeyValueCache, ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import NEG_INF, Array, Dtype, check_flag, check_integer, check_mask, check_shape

# (queries, keys): small tiles of queries meet few blocks that are not theirs.
_FORWARD_TILE = (128, 256)
_BACKWARD_TILE = (128, 256)


def hyper_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key: Array,
    block_size: int,
    num_samples: int,
    min_length: int,
    num_hashes: int = 7,
    mask: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    strict: bool = True,
) -> Array:
    """Softmax attention to the keys of the query's hash block and an unbiased estimate of the rest.

    The choice of blocks and samples is a constant for gradients, which are exact given the choice. Masked keys are
    not there: blocks, samples and lengths are those of the others.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, K, E)`; `K` divides `H`, each key head serves `H / K` query heads. `M = L` if causal.
      v: `(B, M, K, V)`.
      key: a key of `jax.random`, the same for all rows of the batch; it draws the hash directions of each head and
        the priority with which each position is sampled.
      block_size: keys per block.
      num_samples: keys sampled for all queries of a head (causal: of each past segment).
      min_length: up to so many keys are attended to exactly (causal: so many tokens make an exact segment, or
        `block_size` if that is more).
      num_hashes: bits of the hash.
      mask: bool `(B, M)`, True = the key may be used. Where causal, queries at masked positions have no meaning.
      causal: query `i` sees keys `0..i`.
      scale: multiplies the dot products; None for `1 / sqrt(E)`.
      strict: queries choose their block by their own hash. False: by their rank among the queries, as published,
        which needs `L = M`; outputs then depend on the other queries, and where causal they LEAK THE FUTURE: use
        it for encoders and comparisons only.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`.

    Raises:
      ValueError: arguments that do not fit together.
    """
    where = "hyper_attention"
    check_shape(where, "q", q, "(B, L, H, E)", (None,) * 4)
    batch, length, heads, width = q.shape
    check_shape(where, "k", k, "(B, M, K, E)", (batch, None, None, width))
    keys, key_heads = k.shape[1:3]
    check_shape(where, "v", v, "(B, M, K, V)", (batch, keys, key_heads, None))
    check_mask(where, "mask", mask, "(B, M)", (batch, keys))
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{where}: `k` has {key_heads} heads, which do not divide the {heads} of `q`")
    if length != keys and (causal or not strict):
        raise ValueError(
            f"{where}: {'causal=True' if causal else 'strict=False'} needs as many keys as queries, "
            f"got `k` of {keys} and `q` of {length}"
        )
    options = {"block_size": block_size, "num_samples": num_samples, "min_length": min_length}
    _check_options(where, num_hashes=num_hashes, **options)
    _check_key(where, key)
    check_flag(where, "causal", causal)
    check_flag(where, "strict", strict)
    longest = 2 ** (_MOST_HASHES - num_hashes)
    if max(length, keys) > longest:
        raise ValueError(
            f"{where}: num_hashes={num_hashes} supports sequences of up to {longest}, got {max(length, keys)}"
        )
    factor = logit_scale(where, width, scale)
    if keys <= min_length or (causal and keys <= block_size):
        return attend(q, [Stream(k, v, mask)], causal=causal, scale=factor, operation=where).out
    k, v = (jnp.repeat(x, heads // key_heads, axis=2) for x in (k, v))
    if mask is not None:
        k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, v))
    sketch = _draw(key, heads, width, num_hashes=num_hashes, strict=strict, **options)
    if causal:
        return _causal(sketch, q, k, v, mask, factor)
    position = jnp.arange(keys)[None] if mask is None else jnp.cumsum(mask, axis=1) - 1
    query_mask = None if strict else mask
    index = jnp.arange(length)
    return _estimate(sketch, q, k, v, position, index, mask, query_mask, exact=min_length, scale=factor)[0]


# Bucket and index of a key are one positive int32.
_MOST_HASHES = 30


def _check_options(where: str, **options: int) -> None:
    for name, value in options.items():
        check_integer(where, name, value, 0 if name == "min_length" else 1)
    if options["num_hashes"] > _MOST_HASHES:
        raise ValueError(f"{where}: `num_hashes` must be at most {_MOST_HASHES}, got {options['num_hashes']}")


def _check_key(where: str, key: Any) -> None:
    dtype = key.dtype if isinstance(key, jax.Array | np.ndarray) else np.dtype(object)
    if dtype != jnp.uint32 and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"{where}: `key` must be a key of jax.random, got a value of type {type(key).__name__}")


@dataclasses.dataclass(frozen=True)
class Sketch:
    """What decides which keys a query reads: random draws and options."""

    directions: Array
    priority_key: Array
    block_size: int
    num_samples: int
    min_length: int
    strict: bool

    @property
    def segment(self) -> int:
        """The length of the exact segments where causal: of past segments that are one block, both are exact."""
        return max(self.min_length, self.block_size)

    def buckets(self, x: Array) -> Array:
        """The buckets `(B, H, L)` of vectors `(B, L, H, E)`: their sign bits, decoded from the Gray code."""
        dtype = accumulation(x.dtype)
        x = lax.stop_gradient(x).astype(dtype)
        bits = jnp.einsum("blhe,her->rbhl", x, self.directions.astype(dtype)) > 0
        bucket = parity = jnp.zeros(bits.shape[1:], jnp.int32)
        for bit in bits:
            parity ^= bit
            bucket = 2 * bucket + parity
        return bucket

    def priorities(self, position: Array) -> Array:
        """Uniform numbers `(B, H, M)` in `[0, 1)` of positions `(B, M)`, each a function of its position alone."""

        def draw(position: Array) -> Array:
            return jax.random.uniform(jax.random.fold_in(self.priority_key, position), self.directions.shape[:1])

        return jnp.swapaxes(jax.vmap(jax.vmap(draw))(position), 1, 2)


def _draw(key: Array, heads: int, width: int, *, num_hashes: int, **options: Any) -> Sketch:
    hash_key, priority_key = jax.random.split(key)
    return Sketch(jax.random.normal(hash_key, (heads, width, num_hashes)), priority_key, **options)


class _Sorted(NamedTuple):
    """Vectors in the order of their buckets: `(B, H, L)`, int32.

    Attributes:
      code: bucket and index as one number, ascending.
      order: which vector has each rank.
      rank: which rank each vector has.
    """

    code: Array
    order: Array
    rank: Array


def _sort(sketch: Sketch, x: Array, index: Array, bits: int, mask: Array | None) -> _Sorted:
    """Sort `x` `(B, L, H, E)` by bucket, then `index` `(L,)`, consecutive numbers of `bits` bits; masked last."""
    bucket = sketch.buckets(x)
    if mask is not None:
        bucket = jnp.where(mask[:, None], bucket, 1 << sketch.directions.shape[-1])
    # One packed integer sorts several times faster than `argsort`.
    code = jnp.sort(bucket << bits | index, axis=-1)
    order = (code & ((1 << bits) - 1)) - index[:1]
    return _Sorted(code, order, _inverse(order))


def _inverse(order: Array) -> Array:
    """The inverse of permutations along the last axis."""
    ranks = jnp.broadcast_to(jnp.arange(order.shape[-1], dtype=order.dtype), order.shape)
    return jnp.put_along_axis(jnp.zeros_like(order), order, ranks, axis=-1, inplace=False)


def _take(x: Array, index: Array) -> Array:
    """Of `x` `(B, L, H, ...)`, each head's tokens `index` `(B, H, N)`: `(B, N, H, ...)`."""
    index = jnp.swapaxes(index, 1, 2)
    return jnp.take_along_axis(x, jnp.expand_dims(index, tuple(range(3, x.ndim))), axis=1)


def _estimate(
    sketch: Sketch,
    q: Array,
    k: Array,
    v: Array,
    position: Array,
    index: Array,
    mask: Array | None = None,
    query_mask: Array | None = None,
    *,
    exact: int = 0,
    scale: float,
) -> tuple[Array, Array]:
    """`(out, lse)` of queries `(B, L, H, E)` over a set of keys `(B, M, H, E)`.

    Args:
      position: where the keys stand in the sequence, which draws the samples: `(P, M)`, for the `B` rows in turn.
      index: `(L,)` consecutive; in the order of keys, query `index[i]` falls before key `index[i]` of its bucket.
      mask: `(B, M)`, as if masked keys were not there; they are 0.
      query_mask: `(B, L)`, queries that have a rank.
      exact: sets of up to so many keys are one block.
    """
    batch, length, heads = q.shape[:3]
    keys, dtype = k.shape[1], accumulation(q.dtype)
    number = jnp.full((batch, 1, 1), keys) if mask is None else mask.sum(1, dtype=jnp.int32)[:, None, None]
    bits = max(length, keys).bit_length()
    queries = _sort(sketch, q, index, bits, query_mask)
    sorted_keys = _sort(sketch, k, jnp.arange(keys), bits, mask)

    if sketch.strict:
        rank = jax.vmap(jax.vmap(jnp.searchsorted))(sorted_keys.code, queries.code)
        rank = jnp.minimum(rank, number - 1)
    else:
        rank = jnp.broadcast_to(jnp.arange(length), queries.code.shape)
    first = jnp.where(number <= exact, 0, rank // sketch.block_size * sketch.block_size)
    end = jnp.minimum(first + jnp.where(number <= exact, exact, sketch.block_size), number)
    first, end = jnp.swapaxes(first, 1, 2), jnp.swapaxes(end, 1, 2)
    zeros = jnp.zeros((batch, keys, heads), dtype)
    block = Stream(_take(k, sorted_keys.order), _take(v, sorted_keys.order), None, (zeros - 1, zeros))
    block = block._replace(span=(first, end))

    priority = sketch.priorities(position)
    if mask is not None:
        priority = jnp.where(mask[:, None], priority, -1)
    chosen = lax.top_k(priority, min(sketch.num_samples, keys))[1]
    chosen = jnp.tile(chosen, (batch // chosen.shape[0], 1, 1))
    drawn = jnp.minimum(chosen.shape[-1], number)  # as many as there are
    weight = jnp.broadcast_to(jnp.log(number.astype(dtype) / jnp.maximum(drawn, 1)), chosen.shape)
    sample_rank = jnp.take_along_axis(sorted_keys.rank, chosen, axis=-1)
    real = None if mask is None else jnp.arange(chosen.shape[-1]) < drawn[:, 0]
    features = tuple(jnp.swapaxes(f.astype(dtype), 1, 2) for f in (sample_rank, weight))
    samples = Stream(_take(k, chosen), _take(v, chosen), real, features, ordered=False)

    out, lse, _ = attend(
        _take(q, queries.order),
        [block, samples],
        query_features=(first.astype(dtype), end.astype(dtype)),
        score=_outside_of_block,
        scale=scale,
        operation="hyper_attention",
        forward_tile=_FORWARD_TILE,
        backward_tile=_BACKWARD_TILE,
    )
    return _take(out, queries.rank), _take(lse, queries.rank)


def _outside_of_block(dot: Array, distance: Array, query: Features, key: Features) -> Array:
    """Weigh the samples, but for those in the query's block, which it reads there. (Keys there have rank -1.)"""
    (first, end), (rank, weight) = query, key
    return jnp.where((first <= rank) & (rank < end), NEG_INF, dot + weight)


def _causal(sketch: Sketch, q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    if mask is None:
        return _causal_segments(sketch, q, k, v, jnp.int32(q.shape[1]), scale)
    # With the real tokens in front, in their order, all keys before a real query are real.
    before, number = jnp.cumsum(mask, axis=1), mask.sum(1, keepdims=True, dtype=jnp.int32)
    slot = jnp.where(mask, before - 1, number + jnp.arange(mask.shape[1]) - before)
    move = jax.vmap(lambda x, order: x[order])
    q, k, v = (move(x, _inverse(slot)) for x in (jnp.where(mask[:, :, None, None], q, 0), k, v))
    return jnp.where(mask[:, :, None, None], move(_causal_segments(sketch, q, k, v, number, scale), slot), 0)


def _causal_segments(sketch: Sketch, q: Array, k: Array, v: Array, number: Array, scale: float) -> Array:
    """Attention of tokens, the first `number` `(B, 1)` or `()` of which are real, to those before them.

    A query reads its own segment exactly and estimates earlier ones, one for each bit that is set in the number of
    its segment.
    """
    batch, length = q.shape[:2]

    def cut(x: Array, size: int) -> Array:
        """`(B, L, ...)` to `(B, N, size, ...)`."""
        x = _pad_tokens(x, 0, -length % size)
        return x.reshape(batch, -1, size, *x.shape[2:])

    def fold(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def restore(x: Array, fill: float) -> Array:
        """The inverse of both."""
        x = x.reshape(batch, -1, *x.shape[2:])
        return _pad_tokens(x, 0, max(0, length - x.shape[1]), fill)[:, :length]

    q0, k0, v0 = (fold(cut(x, sketch.segment)) for x in (q, k, v))
    out, lse, _ = attend(q0, [Stream(k0, v0)], causal=True, scale=scale, operation="hyper_attention")
    parts = [(restore(out, 0), restore(lse, NEG_INF))]
    half = sketch.segment
    while half < length:
        pairs = -(-(length - half) // (2 * half))
        later = min(half, length - half)
        start = 2 * half * jnp.arange(pairs)[:, None]
        earlier_k, earlier_v = (fold(cut(x, 2 * half)[:, :pairs, :half]) for x in (k, v))
        later_q = fold(cut(q, 2 * half)[:, :pairs, half : half + later])
        index = jnp.arange(later)
        # Only ranks need to know which queries are real.
        real = None
        if not sketch.strict:
            real = jnp.broadcast_to(start + half + index < number[..., None], (batch, pairs, later))
            real = real.reshape(batch * pairs, later)
        part = _estimate(
            sketch, later_q, earlier_k, earlier_v, start + jnp.arange(half), index, query_mask=real, scale=scale
        )
        out, lse = (_pad_tokens(x, half, half - later, fill) for x, fill in zip(part, (0, NEG_INF)))
        parts.append((restore(out, 0), restore(lse, NEG_INF)))
        half *= 2
    return _merge(parts)


def _pad_tokens(x: Array, before: int, after: int, fill: float = 0) -> Array:
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)), constant_values=fill)


def _merge(parts: list[tuple[Array, Array]]) -> Array:
    """Attention to the union of disjoint sets of keys, from `(out, lse)` of each."""
    outs, lses = zip(*parts)
    shares = jax.nn.softmax(jnp.stack(lses), axis=0)
    return functools.reduce(jnp.add, (s[..., None] * out for s, out in zip(shares, outs))).astype(outs[0].dtype)


class SketchKey(nnx.Variable):
    """Raw data of the random key that a module draws its hashes and samples from; not trained."""


@register("hyper", causal=True, decode=True, weights=True, time="L block, causal L block log L", memory="L")
class HyperAttention(ProjectedAttention):
    """Multi-head HyperAttention; see the file's documentation.

    Hashes and samples are drawn from the stream `params` once, so that calls repeat.

    Args:
      block_size, num_samples, num_hashes, strict: see `hyper_attention`.
      min_length: see `hyper_attention`. An estimate by the default block and samples takes the time of about 1,100
        exact keys; at twice as many it begins to be worth its error.
    """

    mechanism = "hyper"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        block_size: int = 256,
        num_samples: int = 256,
        min_length: int = 2048,
        num_hashes: int = 7,
        strict: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.options = {
            "block_size": block_size,
            "num_samples": num_samples,
            "min_length": min_length,
            "num_hashes": num_hashes,
        }
        _check_options("hyper", **self.options)
        check_flag("hyper", "strict", strict)
        self.strict = strict
        self.sketch_key = SketchKey(jax.random.key_data(rngs.params()))

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return hyper_attention(
            q, k, v, key=self._key(), mask=mask, causal=self.causal, strict=self.strict, **self.options
        )

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        # Weights are what the identity as values gives.
        length = k.shape[1]
        values = jnp.broadcast_to(jnp.eye(length, dtype=q.dtype)[:, None], (*k.shape[:3], length))
        return self.mix(q, k, values, mask).transpose(0, 2, 1, 3)

    def _key(self) -> Array:
        return jax.random.wrap_key_data(self.sketch_key[...])

    def _require_strict(self, what: str) -> None:
        self.require_causal(what)
        if not self.strict:
            raise ValueError("hyper: decoding needs strict=True, otherwise tokens depend on later ones")

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> KeyValueCache:
        """An empty cache for `step`, for sequences of up to `max_length` tokens.

        Raises:
          ValueError: causal=False or strict=False.
        """
        self._require_strict("init_cache")
        return super().init_cache(batch, max_length, dtype)

    def cache_slots(self, max_length: int) -> int:
        # Whole segments, so that slices of them stay inside.
        segment = max(self.options["min_length"], self.options["block_size"])
        return max_length if max_length <= segment else -(-max_length // segment) * segment

    def step(self, x: Array, cache: KeyValueCache) -> tuple[Array, KeyValueCache]:
        """Decode one token: `x` `(B, 1, D)` to `(B, 1, D)` and the cache that holds it; time `O(L)`.

        Raises:
          ValueError: causal=False or strict=False.
        """
        self._require_strict("step")
        self.check_step(x, cache)
        q, k, v = self.project(x, x)
        t, slots = cache.length, cache.keys.shape[1]
        cache, filled = cache.append(k, v)
        sketch = _draw(self._key(), self.num_heads, self.head_dim, strict=True, **self.options)
        scale = self.head_dim**-0.5

        def read(start: Array, size: int) -> tuple[Array, Array, Array]:
            take = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
            return take(cache.keys), take(cache.values), take(filled)

        half = min(sketch.segment, slots)
        start = t // half * half
        stream = Stream(*read(start, half))
        parts = [attend(q, [stream], scale=scale, implementation="dense")[:2]]
        while half < slots:
            # In an odd one of the segments of this length a query reads the one before it.
            start = (t // half - 1) * half
            position, index = (start + jnp.arange(half))[None], (t % half)[None]
            keys, values, _ = read(start, half)
            out, lse = _estimate(sketch, q, keys, values, position, index, scale=scale)
            parts.append((out, jnp.where(t // half % 2 == 1, lse, NEG_INF)))
            half *= 2
        o = _merge(parts)
        return self.out(o.astype(x.dtype).reshape(x.shape)), cache
