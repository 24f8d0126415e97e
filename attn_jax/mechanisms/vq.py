"""Vector-quantised attention: queries and keys are codewords, which makes softmax attention linear in the length.

    q^_i = C_q[z_i],  z_i = argmin_a |q_i - C_q[a]|          k^_j = C_k[y_j],  y_j = argmin_c |k_j - C_k[c]|
    o_i  = sum_j softmax_j(q^_i . k^_j) v_j
         = sum_c softmax_c(C_q[z_i] . C_k[c] + log N_c) U_c

with `N_c` the number of keys of code `c` and `U_c` the mean of their values: a softmax over `S` keys, the
codewords. Without an order all queries of one code share one output. In the causal case the sequence is read in
blocks: a query reads the codewords with the counts of the blocks before its own, and the keys of its own block up
to itself. Nothing is approximated beyond the quantisation itself, whose logits are off by at most
`|q - q^| |k| + |q^| |k - k^|`.

Source: Lingle 2024, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", which quantises the keys;
the codebook of queries is from the "VQ attention" research code. Time `O(L S E + S^2 E)`, causal
`O(L (S + block) E)`; memory `O(L D + S^2)`, causal `O(L D + S D)`.

Gradients are straight-through: `q` and `k` receive those of `q^` and `k^`, and codebooks none. These are the exact
gradients of dense attention on `q^` and `k^`, and linear in the length as well. With `g` the cotangent of `o` and
`lse_i` the log-normaliser, sums over tokens collapse into sums over codes:

    dq^_i = sum_c p_ic (g_i . U_c - g_i . o_i) C_k[c]          p_ic = N_c exp(q^_i . C_k[c] - lse_i)
    dk^_j = sum_a w_aj (X_a . v_j - Y_a) C_q[a]                w_aj = exp(C_q[a] . k^_j)
    dv_j  = sum_a w_aj X_a                                     X_a = sum_{i: z_i = a} exp(-lse_i) g_i
                                                               Y_a = sum_{i: z_i = a} exp(-lse_i) g_i . o_i

where, in the causal case, `N` and `U` are sums over a prefix of blocks and `X` and `Y` over a suffix of them.

Codebooks follow the data by exponential moving averages (van den Oord et al. 2017, appendix A.1), in training mode
and outside of the gradient. They start on the sphere on which all queries and keys lie, the first batch moves
every code onto one of its tokens, and codes that lose their tokens are moved again. A call reads the codebooks as
they were before it, so that causality holds in training as well.

Deviations: the research code never initialises its codebooks, reverses the decay of its averages, lets a causal
query see the whole of its block and adds the normalisers of blocks without their weights; its query and key
projections get no gradient from the loss. Transformer-VQ's averages start near zero, far below the scale of the
keys, and its codes shrink where they are not used. Its uncompressed previous block and its relative position bias
are left out; its gate is an option.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax import lax
from jax.sharding import PartitionSpec as P

from attn_jax.aux import AuxLoss, AuxMetric, record
from attn_jax.engine import dispatch
from attn_jax.engine.dispatch import IMPLEMENTATIONS
from attn_jax.engine.plan import LOWEST_MAX, add_key_feature
from attn_jax.engine.streaming import Stream, attend, dense_weights
from attn_jax.mechanisms.base import ProjectedAttention
from attn_jax.registry import register
from attn_jax.types import (
    NEG_INF,
    Array,
    Dtype,
    check_flag,
    check_floating,
    check_integer,
    check_mask,
    check_number,
    check_shape,
)
from pallas_kernels.hardware import Hardware


def vq_attention(
    q: Array,
    k: Array,
    v: Array,
    codebook_q: Array,
    codebook_k: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    block_length: int = 128,
    implementation: str | None = None,
) -> Array:
    """Softmax attention of the codewords nearest to the queries on those nearest to the keys, without a scale.

    Codes are assigned in float32, and ties go to the lowest index. The gradients of `q` and `k` are
    straight-through: those of the codewords that stand in their place. Codebooks have gradient 0.

    Args:
      q: `(B, L, H, E)`.
      k: `(B, M, H, E)`; `M = L` if causal.
      v: `(B, M, H, V)`.
      codebook_q, codebook_k: `(H, S_q, E)` and `(H, S_k, E)`.
      mask: bool `(B, M)`, True = the key may be used; keys that may not are in no count.
      causal: query `i` sees keys `0..i`.
      block_length: tokens that are computed at once; no effect on the result.
      implementation: see `attn_jax.types.Implementation`; None to choose. "dense" is attention over all keys.

    Returns:
      `(B, L, H, V)` in the common dtype of `q` and `v`. Everything is computed in float32 (float64 where an
      argument has it).

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: an implementation that does not exist for this operation.
    """
    options: dict[str, Any] = {"mask": mask, "causal": causal, "block_length": block_length}
    options["implementation"] = implementation
    return _quantised_attention(q, k, v, codebook_q, codebook_k, **options)[0]


def _quantised_attention(
    q: Array,
    k: Array,
    v: Array,
    codebook_q: Array,
    codebook_k: Array,
    *,
    mask: Array | None,
    causal: bool,
    block_length: int,
    implementation: str | None,
) -> tuple[Array, Array, Array]:
    """The output of `vq_attention`, and the codes of queries `(B, L, H)` and keys `(B, M, H)`."""
    name = "vq_attention"
    check_shape(name, "q", q, "(B, L, H, E)", (None,) * 4)
    batch, length, heads, width = q.shape
    keys = length if causal else None
    check_shape(name, "k", k, "(B, L, H, E)" if causal else "(B, M, H, E)", (batch, keys, heads, width))
    check_shape(name, "v", v, "(B, M, H, V)", (*k.shape[:3], None))
    check_shape(name, "codebook_q", codebook_q, "(H, S, E)", (heads, None, width))
    check_shape(name, "codebook_k", codebook_k, "(H, S, E)", (heads, None, width))
    check_mask(name, "mask", mask, "(B, M)", k.shape[:2])
    given = {"q": q, "k": k, "v": v, "codebook_q": codebook_q, "codebook_k": codebook_k}
    for argument, array in given.items():
        check_floating(name, argument, array)
        if argument.startswith("codebook") and not array.shape[1]:
            raise ValueError(f"{name}: `{argument}` must have at least one code, got shape {array.shape}")
    check_flag(name, "causal", causal)
    check_integer(name, "block_length", block_length)

    given = [jnp.asarray(x) for x in given.values()]  # NumPy's float64 becomes JAX's default here
    values = given[2]
    out_dtype, dtype = jnp.result_type(given[0], values), jnp.result_type(jnp.float32, *given)
    q, k, v, codebook_q, codebook_k = (x.astype(dtype) for x in given)
    choice = dispatch.choose(name, implementation, functools.partial(_unsupported, q, values))
    operands = values.dtype if choice.hardware else dtype
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, v))
    # Codes are finite whatever was quantised: what is not must be seen all the same, in the rows that it concerns.
    q_ok, k_ok = (jnp.isfinite(x).all(-1, keepdims=True) for x in (q, k))
    q, k, v = jnp.where(q_ok, q, 0), jnp.where(k_ok, k, 0), jnp.where(k_ok, v, jnp.nan)

    compute = (
        functools.partial(_dense, causal)
        if choice.dense
        else functools.partial(_linear, _Plan(causal, block_length, choice, operands))
    )
    rows, columns = dispatch.mesh_axes("batch", batch), dispatch.mesh_axes("heads", heads)
    if rows or columns:
        token, codebook = P(rows, None, columns), P(columns)
        in_specs = (token, token, token, codebook, codebook, P(rows))
        compute = jax.shard_map(compute, in_specs=in_specs, out_specs=(token,) * 3, check_vma=False)
    out, codes_q, codes_k = compute(q, k, v, lax.stop_gradient(codebook_q), lax.stop_gradient(codebook_k), mask)
    return jnp.where(q_ok, out, jnp.nan).astype(out_dtype), codes_q, codes_k


# Codes: of tokens (B, L, H); codebooks are (H, S, E), and what a sequence keeps per code is (B, S, H, ...).

# Tokens compared with the codebook at once.
_TILE = 256


def _nearest(x: Array, codebook: Array) -> Array:
    """The codes `(B, L, H)` of the codewords nearest to `x` `(B, L, H, E)`, ties to the lowest index."""
    batch, length, heads, _ = x.shape
    number = jnp.arange(codebook.shape[1])[:, None]

    def row(x: Array, codebook: Array) -> Array:
        half = 0.5 * jnp.sum(jnp.square(codebook), axis=1, keepdims=True)

        def tile(x: Array) -> Array:
            # The nearest maximises c.x - |c|^2 / 2. A maximum and a minimum are faster than an argmax.
            closeness = jnp.matmul(codebook, x.T, precision=lax.Precision.HIGHEST) - half
            return jnp.where(closeness == closeness.max(axis=0), number, len(number) - 1).min(axis=0)

        return lax.map(tile, x).reshape(-1)

    tiles, codebooks = _row_tiles(lax.stop_gradient(x), _TILE), jnp.tile(codebook, (batch, 1, 1))
    codes = dispatch.over_rows(row, tiles, codebooks)[:, :length]
    return codes.reshape(batch, heads, length).swapaxes(1, 2)


def _codewords(codebook: Array, codes: Array) -> Array:
    """`(B, L, H, E)`."""
    return codebook[jnp.arange(codebook.shape[0]), codes]


def _quantise(x: Array, codebook: Array) -> Array:
    return _codewords(codebook, _nearest(x, codebook))


def _of_sequence(codes: Array) -> tuple[Array, Array, Array]:
    """The index of each token's code in arrays `(B, S, H, ...)`."""
    batch, _, heads = codes.shape
    return jnp.arange(batch)[:, None, None], codes, jnp.arange(heads)


class CodeTotals(NamedTuple):
    """What a query needs to know of the keys that it reads as codewords; while decoding, of all that came before.

    Attributes:
      counts: how many have each code, `(B, S, H)`, or `(S,)` for a row.
      sums: of their values, `(B, S, H, V)` or `(S, V)`.
    """

    counts: Array
    sums: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], width: int, dtype: Dtype) -> "CodeTotals":
        return cls(jnp.zeros(shape, dtype), jnp.zeros((*shape, width), dtype))

    def add(self, at: Any, valid: Array, v: Array) -> "CodeTotals":
        """With keys of the codes `at`; where `valid` is False, `v` must be 0."""
        return CodeTotals(self.counts.at[at].add(valid.astype(self.counts.dtype)), self.sums.at[at].add(v))

    def log_counts(self) -> Array:
        return jnp.where(self.counts > 0, jnp.log(jnp.maximum(self.counts, 1)), NEG_INF)

    def means(self) -> Array:
        return self.sums / jnp.maximum(self.counts, 1)[..., None]

    def stream(self, codebook: Array) -> Stream:
        """The codewords as keys."""
        keys = jnp.broadcast_to(codebook.swapaxes(0, 1), (*self.counts.shape, codebook.shape[2]))
        return Stream(keys, self.means(), features=(self.log_counts(),), ordered=False)


# The readable version: attention over all keys, differentiated by autodiff.


def _dense(
    causal: bool, q: Array, k: Array, v: Array, codebook_q: Array, codebook_k: Array, mask: Array
) -> tuple[Array, Array, Array]:
    codes_q, codes_k = _nearest(q, codebook_q), _nearest(k, codebook_k)
    q, k = _straight_through(q, codebook_q, codes_q), _straight_through(k, codebook_k, codes_k)
    options: dict[str, Any] = {"implementation": "dense", "operation": "vq_attention"}
    return attend(q, [Stream(k, v, mask)], causal=causal, **options).out, codes_q, codes_k


def _straight_through(x: Array, codebook: Array, codes: Array) -> Array:
    """Exactly the codewords, with the identity as derivative in `x`."""
    return lax.stop_gradient(_codewords(codebook, codes)) + (x - lax.stop_gradient(x))


# Linear in the length.


def _kernels() -> Any:
    """The fused kernels, imported when they are needed."""
    from pallas_kernels import vq

    return vq


def _unsupported(q: Array, v: Array, hardware: Hardware) -> str | None:
    return _kernels().unsupported(hardware, q, v)


class _Plan(NamedTuple):
    """What is static.

    Attributes:
      block_length: of portable XLA; the fused kernels take as many tokens at once as there are codes.
      choice: what runs.
      operands: the type of the values that are kept for the backward pass, and of what the fused kernels multiply.
    """

    causal: bool
    block_length: int
    choice: dispatch.Choice
    operands: Dtype


class Quantised(NamedTuple):
    """What is constant under differentiation.

    Attributes:
      codes_q, codes_k: `(B, L, H)` and `(B, M, H)`.
      codebook_q, codebook_k: `(H, S_q, E)` and `(H, S_k, E)`.
      mask: which keys are real, `(B, M)`.
    """

    codes_q: Array
    codes_k: Array
    codebook_q: Array
    codebook_k: Array
    mask: Array


def _linear(
    plan: _Plan, q: Array, k: Array, v: Array, codebook_q: Array, codebook_k: Array, mask: Array
) -> tuple[Array, Array, Array]:
    def nearest(x: Array, codebook: Array) -> Array:
        return plan.choice.run(lambda *arguments: _kernels().nearest(*arguments), _nearest, x, codebook)

    quantised = Quantised(nearest(q, codebook_q), nearest(k, codebook_k), codebook_q, codebook_k, mask)
    return _read(plan, q, k, v, quantised), quantised.codes_q, quantised.codes_k


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(plan: _Plan, q: Array, k: Array, v: Array, quantised: Quantised) -> Array:
    """The output; `q` and `k` enter through their codes alone and are here to be differentiated."""
    return _forward(plan, q, k, v, quantised)[0]


def _forward(plan: _Plan, q: Array, k: Array, v: Array, quantised: Quantised) -> tuple[Array, Any]:
    del q, k
    dtype = v.dtype

    def fused(hardware: Hardware, v: Array, quantised: Quantised) -> tuple[Array, Array]:
        return _kernels().forward(hardware, plan.causal, v, quantised)

    def portable(v: Array, quantised: Quantised) -> tuple[Array, Array]:
        v = v.astype(dtype)
        totals = CodeTotals.empty((v.shape[0], quantised.codebook_k.shape[1], v.shape[2]), v.shape[3], dtype)
        read = functools.partial(_forward_causal, plan) if plan.causal else _forward_full
        out, lse = read(totals, v, quantised)
        return out.astype(plan.operands), lse

    v = v.astype(plan.operands)
    out, lse = plan.choice.run(fused, portable, v, quantised)
    return out.astype(dtype), (v, quantised, out, lse)


def _forward_full(totals: CodeTotals, v: Array, quantised: Quantised) -> tuple[Array, Array]:
    """Every query code reads every key code; a token looks up what its code has read."""
    codes_q, codes_k, codebook_q, codebook_k, mask = quantised
    totals = totals.add(_of_sequence(codes_k), mask[:, :, None], v)
    queries = codebook_q.swapaxes(0, 1)
    read = _attend(jnp.broadcast_to(queries, (v.shape[0], *queries.shape)), [totals.stream(codebook_k)])
    at = _of_sequence(codes_q)
    return read.out[at], read.lse[at]


def _forward_causal(plan: _Plan, totals: CodeTotals, v: Array, quantised: Quantised) -> tuple[Array, Array]:
    """Block after block, with the totals of those before."""
    codes_q, codes_k, codebook_q, codebook_k, mask = quantised

    def read(totals: CodeTotals, block: list[Array]) -> tuple[CodeTotals, tuple[Array, Array]]:
        codes_q, codes_k, v, mask = block
        once = jnp.zeros(codes_k.shape, v.dtype)  # the logarithm of how often a key of the block counts
        own = Stream(_codewords(codebook_k, codes_k), v, mask, features=(once,))
        read = _attend(_codewords(codebook_q, codes_q), [totals.stream(codebook_k), own], causal=True)
        return totals.add(_of_sequence(codes_k), mask[:, :, None], v), (read.out, read.lse)

    blocks = [jnp.moveaxis(_tiles(x, plan.block_length), 1, 0) for x in (codes_q, codes_k, v, mask)]
    _, read_by = lax.scan(read, totals, blocks)
    batch, length = mask.shape
    out, lse = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length] for x in read_by)
    return out, lse


def _attend(q: Array, streams: list[Stream], causal: bool = False) -> Any:
    options: dict[str, Any] = {"implementation": "xla", "operation": "vq_attention"}
    return attend(q, streams, score=add_key_feature, causal=causal, **options)


def _backward(plan: _Plan, residuals: Any, g: Array) -> tuple[Array, Array, Array, None]:
    v, quantised, out, lse = residuals
    # A query that read nothing gets weights exp(z - lse) = 0.
    lse = jnp.where(lse > LOWEST_MAX, lse, -NEG_INF)
    delta = jnp.sum(g * out, axis=-1)

    def fused(hardware: Hardware, *arrays: Any) -> tuple[Array, Array, Array]:
        dq, dk, dv = _kernels().backward(hardware, plan.causal, *arrays)
        return dq.astype(g.dtype), dk.astype(g.dtype), dv.astype(g.dtype)

    portable = functools.partial(_backward_portable, plan)
    return *plan.choice.run(fused, portable, v, quantised, lse, delta, g), None


def _backward_portable(
    plan: _Plan, v: Array, quantised: Quantised, lse: Array, delta: Array, g: Array
) -> tuple[Array, Array, Array]:
    codes_q, codes_k, codebook_q, codebook_k, mask = quantised
    batch, _, heads, _ = v.shape

    def tiles(x: Array, fill: float = 0) -> Array:
        return _row_tiles(x, plan.block_length, fill)

    # Neither queries nor keys of the padding touch anything.
    queries = _Queries(tiles(codes_q), tiles(lse, -NEG_INF), tiles(delta), tiles(g))
    valid = jnp.broadcast_to(mask[:, :, None], codes_k.shape)
    keys = _Keys(tiles(codes_k), tiles(valid), tiles(v.astype(g.dtype)))
    codebooks = (jnp.tile(c, (batch, 1, 1)) for c in (codebook_q, codebook_k))
    gradients = dispatch.over_rows(functools.partial(_backward_row, plan.causal), queries, keys, *codebooks)
    dq, dk, dv = (
        x.reshape(batch, heads, -1, x.shape[-1]).swapaxes(1, 2)[:, : like.shape[1]]
        for x, like in zip(gradients, (codes_q, codes_k, codes_k))
    )
    return dq, dk, dv


_read.defvjp(_forward, _backward)


# Tiles: blocks of tokens. A row is one head of one sequence.


def _tiles(x: Array, size: int, fill: float = 0) -> Array:
    """`(B, L, ...)` to `(B, tiles, tile, ...)`, padded with `fill`; tiles of at most `size`, all equal."""
    length = x.shape[1]
    number = max(1, -(-length // size))
    tile = max(1, -(-length // number))
    x = jnp.pad(x, ((0, 0), (0, number * tile - length)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return x.reshape(x.shape[0], number, tile, *x.shape[2:])


def _row_tiles(x: Array, size: int, fill: float = 0) -> Array:
    """`(B, L, H, ...)` to `(B H, tiles, tile, ...)`."""
    x = x.swapaxes(1, 2)
    return _tiles(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), size, fill)


class _Queries(NamedTuple):
    """Queries of a row `(tiles, tile, ...)`."""

    codes: Array
    lse: Array
    delta: Array  # g . o
    g: Array


class _Keys(NamedTuple):
    """Keys of a row `(tiles, tile, ...)`."""

    codes: Array
    valid: Array
    v: Array


class _Readers(NamedTuple):
    """What a key needs to know of the queries that read it, by their codes.

    Attributes:
      top: the largest `-lse` of a code's queries, `(S,)`: the sums are `exp(top)` times what is stored.
      g: `X` of the file's documentation, `(S, V)`.
      delta: `Y`, `(S,)`.
    """

    top: Array
    g: Array
    delta: Array

    def add(self, q: _Queries) -> "_Readers":
        top = self.top.at[q.codes].max(-q.lse)
        old, new = jnp.exp(self.top - top), jnp.exp(-q.lse - top[q.codes])
        g = (old[:, None] * self.g).at[q.codes].add(new[:, None] * q.g)
        return _Readers(top, g, (old * self.delta).at[q.codes].add(new * q.delta))


def _backward_row(
    causal: bool, queries: _Queries, keys: _Keys, codebook_q: Array, codebook_k: Array
) -> tuple[Array, Array, Array]:
    """Gradients of `q`, `k` and `v`, `(tiles, tile, ...)`."""
    by_query = codebook_q @ codebook_k.T  # the logits of all pairs of codes: rows are looked up, not multiplied
    by_key = by_query.T
    width, dtype = keys.v.shape[-1], keys.v.dtype
    totals = CodeTotals.empty((len(codebook_k),), width, dtype)
    readers = _Readers(
        jnp.full(len(codebook_q), LOWEST_MAX, dtype),
        jnp.zeros((len(codebook_q), width), dtype),
        jnp.zeros(len(codebook_q), dtype),
    )

    def from_codewords(totals: CodeTotals, q: _Queries) -> Array:
        """`dq` through the keys in `totals`."""
        p = jnp.exp(by_query[q.codes] + totals.log_counts() - q.lse[:, None])
        return (p * (q.g @ totals.means().T - q.delta[:, None])) @ codebook_k

    def from_readers(readers: _Readers, k: _Keys) -> tuple[Array, Array]:
        """`dk` and `dv` through the queries in `readers`."""
        p = jnp.exp(jnp.where(k.valid[:, None], by_key[k.codes] + readers.top, NEG_INF))
        return (p * (k.v @ readers.g.T - readers.delta)) @ codebook_q, p @ readers.g

    def inside(q: _Queries, k: _Keys) -> tuple[Array, Array, Array]:
        """`dq`, `dk` and `dv` through the pairs of one block."""
        qs, ks = codebook_q[q.codes], codebook_k[k.codes]
        seen = jnp.tri(len(q.codes), dtype=bool) & k.valid
        p = jnp.exp(jnp.where(seen, qs @ ks.T, NEG_INF) - q.lse[:, None])
        dz = p * (q.g @ k.v.T - q.delta[:, None])
        return dz @ ks, dz.T @ qs, p.T @ q.g

    if not causal:
        whole_q, whole_k = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (queries, keys))
        totals, readers = totals.add(*whole_k), readers.add(whole_q)
        dq = lax.map(functools.partial(from_codewords, totals), queries)
        return dq, *lax.map(functools.partial(from_readers, readers), keys)

    def forwards(totals: CodeTotals, tokens: tuple[_Queries, _Keys]) -> tuple[CodeTotals, Array]:
        q, k = tokens
        return totals.add(*k), from_codewords(totals, q)

    def backwards(readers: _Readers, tokens: tuple[_Queries, _Keys]) -> tuple[_Readers, tuple[Array, ...]]:
        q, k = tokens
        dq, *own = inside(q, k)
        return readers.add(q), (dq, *map(jnp.add, own, from_readers(readers, k)))

    _, dq = lax.scan(forwards, totals, (queries, keys))
    _, (own, dk, dv) = lax.scan(backwards, readers, (queries, keys), reverse=True)
    return dq + own, dk, dv


# The module.


class CodebookState(nnx.Variable):
    """Codewords and counts: averages of the data, saved with the model, never trained by gradients."""


class Codebook(nnx.Module):
    """A codebook per head that follows its tokens.

    With `n_c` the tokens of code `c` in a batch and `s_c` their sum, in training mode

        N_c <- decay N_c + (1 - decay) n_c        C_c <- (decay N_c C_c + (1 - decay) s_c) / N_c

    The first batch, and whatever falls below `revive` times the mean count later, moves a code onto a token of the
    batch and gives it the mean count. That token is drawn from the code's own part of the batch, cut into as many
    equal parts of real tokens as there are codes, so that the draw does not depend on padding.

    Statistics are sums over the batch as the program sees it: under `jit` with a batch split over devices, over
    all of them, and every device holds the same codebook.

    Args:
      heads, codes, width: `H`, `S` and `E`.
      decay: of the averages.
      revive: fraction of the mean count below which a code is dead; 0 for never.
      rngs: the stream `params` draws the first codewords and, forked, the tokens that codes are moved onto.
    """

    def __init__(self, heads: int, codes: int, width: int, *, decay: float, revive: float, rngs: nnx.Rngs):
        start = jax.random.normal(rngs.params(), (heads, codes, width), jnp.float32)
        self.codewords = CodebookState(_normalise(start))
        self.counts = CodebookState(jnp.zeros((heads, codes), jnp.float32))  # all 0: no batch was seen
        self.rngs = rngs.params.fork()
        self.decay, self.revive = decay, revive
        self.use_running_average = False  # as in `nnx.BatchNorm`, set by `train` and `eval`

    def observe(self, x: Array, codes: Array, mask: Array) -> "Usage":
        """How tokens `x` `(B, L, H, E)` of `codes` `(B, L, H)` use the codebook; in training it then follows them.

        A module that a JAX transformation closes over follows nothing: it is not one that is being trained.
        """
        codewords, heads = self.codewords[...], codes.shape[2]
        real, number = mask[:, :, None, None], jnp.maximum(mask.sum(), 1)
        error = jnp.where(real, x - _codewords(codewords, codes), 0)
        x = lax.stop_gradient(jnp.where(real, x, 0))
        totals = CodeTotals.empty((codewords.shape[1], heads), x.shape[-1], x.dtype)
        totals = totals.add((codes, jnp.arange(heads)), mask[:, :, None], x)
        if not self.use_running_average and x.size:
            try:
                self._follow(self.rngs(), totals, x, mask)
            except TraceContextError:
                pass
        share = totals.counts / number
        entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1)), axis=0)
        distance = jnp.sum(jnp.square(error)) / (number * heads)
        return Usage(distance, jnp.exp(entropy).mean(), jnp.mean(totals.counts == 0))

    def _follow(self, key: Array, totals: CodeTotals, x: Array, mask: Array) -> None:
        old, codewords = self.counts[...], self.codewords[...]
        number, sums = totals.counts.T, totals.sums.swapaxes(0, 1)
        first = ~old.any(axis=1, keepdims=True)
        rate = jnp.where(first, 1, 1 - self.decay)
        counts = old + rate * (number - old)
        shift = rate[..., None] * (sums - number[..., None] * codewords)
        moved = codewords + shift / jnp.maximum(counts, jnp.finfo(jnp.float32).tiny)[..., None]

        mean = counts.mean(axis=1, keepdims=True)
        dead = first | (counts < self.revive * mean)
        counts = jnp.where(dead, mean, counts)
        moved = jnp.where(dead[..., None], _draw(key, x, mask, codewords.shape[1]), moved)
        seen = mask.any()
        self.counts[...] = jnp.where(seen, counts, old)
        self.codewords[...] = jnp.where(seen, moved, codewords)


class Usage(NamedTuple):
    """How a call used a codebook, over its real tokens, mean over heads.

    Attributes:
      distance: mean `|x - x^|^2`, differentiable in `x`.
      perplexity: `exp` of the entropy of the codes' frequencies; `S` where all are used alike.
      dead_fraction: of codes without a token.
    """

    distance: Array
    perplexity: Array
    dead_fraction: Array


def _draw(key: Array, x: Array, mask: Array, number: int) -> Array:
    """`(H, number, E)` of the real tokens `x` `(B, L, H, E)`, one from each of `number` equal parts of them."""
    heads = x.shape[2]
    place = (jnp.arange(number) + jax.random.uniform(key, (heads, number))) / number
    count = jnp.cumsum(mask.reshape(-1))
    rank = jnp.minimum(jnp.floor(place * count[-1]), count[-1] - 1)
    token = jnp.searchsorted(count, rank, side="right")
    return x.reshape(-1, *x.shape[2:])[token, jnp.arange(heads)[:, None]]


def _normalise(x: Array) -> Array:
    """RMS normalisation, in float32, to vectors whose products are those of unit variance divided by `sqrt(E)`."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * x.shape[-1] ** -0.25


@register(
    "vq",
    causal=True,
    cross=True,
    decode=True,
    weights=True,
    time="L S",
    memory="L",
    implementations=IMPLEMENTATIONS,
)
class VQAttention(ProjectedAttention):
    """Multi-head vector-quantised attention; see the file's documentation.

    Queries and keys are normalised to `|q|^2 = |k|^2 = sqrt(E)` before they are quantised. In training mode (as a
    new module is) a call moves the codebooks after it has used them; in evaluation mode it changes nothing. A call
    records the loss `commitment`, which is `commitment (mean |q - q^|^2 + mean |k - k^|^2)`, and the metrics
    `query_perplexity`, `key_perplexity`, `query_dead_fraction` and `key_dead_fraction`; see `Usage`.

    Args:
      num_codes: `S`, of either codebook.
      block_length: see `vq_attention`; no effect on the result.
      commitment: weight of the loss; 0 for none.
      decay, revive: see `Codebook`.
      gate: SiLU on the values, and the output times `silu(x W_g)` before the last projection, as in
        Transformer-VQ; `5 D^2` parameters instead of `4 D^2`.
      implementation: see `vq_attention`.

    Raises:
      ValueError: options outside of their ranges.
    """

    mechanism = "vq"
    cross = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        num_codes: int = 256,
        block_length: int = 128,
        commitment: float = 1e-4,
        decay: float = 0.99,
        revive: float = 0.05,
        gate: bool = False,
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
        for name, value in (("num_codes", num_codes), ("block_length", block_length)):
            check_integer("vq", name, value)
        for name, value in (("decay", decay), ("revive", revive)):
            check_number("vq", name, value, "at least 0 and less than 1", lambda rate: 0 <= rate < 1)
        check_number("vq", "commitment", commitment, "a number >= 0", lambda weight: weight >= 0)
        check_flag("vq", "gate", gate)
        if dtype is not None:
            # A code is a decision, and half precision would take some of them differently.
            self.query.dtype = self.key.dtype = jnp.promote_types(dtype, jnp.float32)
        self.num_codes, self.block_length, self.commitment = num_codes, block_length, commitment
        self.queries, self.keys = (
            Codebook(num_heads, num_codes, self.head_dim, decay=decay, revive=revive, rngs=rngs) for _ in range(2)
        )
        self.gate = self.linear(dim, dim, ("embed", "heads"), rngs) if gate else None

    def project(self, x: Array, source: Array) -> tuple[Array, Array, Array]:
        q, k, v = super().project(x, source)
        return q, k, v if self.gate is None else nnx.silu(v)

    def attend(self, x: Array, mask: Array | None, context: Array | None, context_mask: Array | None) -> Array:
        source, key_mask = (x, mask) if context is None else (context, context_mask)
        q, k, v = self.project(x, source)
        q, k = _normalise(q), _normalise(k)
        o, codes_q, codes_k = self._read(q, k, v, key_mask)
        # From here on the codebooks change. What was read above is of the tokens before this call alone.
        distance = 0.0
        for name, codebook, y, codes, real in (
            ("query", self.queries, q, codes_q, mask),
            ("key", self.keys, k, codes_k, key_mask),
        ):
            usage = codebook.observe(y, codes, jnp.ones(codes.shape[:2], bool) if real is None else real)
            record(self, AuxMetric, f"{name}_perplexity", usage.perplexity)
            record(self, AuxMetric, f"{name}_dead_fraction", usage.dead_fraction)
            distance += usage.distance
        if self.commitment:
            record(self, AuxLoss, "commitment", self.commitment * distance)
        return self._finish(o, x)

    def mix(self, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return self._read(_normalise(q), _normalise(k), v, mask)[0]

    def mix_weights(self, q: Array, k: Array, mask: Array | None) -> Array:
        q, k = (_quantise(_normalise(x), c.codewords[...]) for x, c in ((q, self.queries), (k, self.keys)))
        return dense_weights(q, [Stream(k, k, mask)], causal=self.causal)

    def _read(self, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        return _quantised_attention(
            q,
            k,
            v,
            self.queries.codewords[...],
            self.keys.codewords[...],
            mask=mask,
            causal=self.causal,
            block_length=self.block_length,
            implementation=self.implementation,
        )

    def _finish(self, o: Array, x: Array) -> Array:
        o = o.reshape(x.shape)
        return self.out(o if self.gate is None else o * nnx.silu(self.gate(x)))

    def init_cache(self, batch: int, max_length: int, dtype: Dtype = jnp.float32) -> CodeTotals:
        """An empty cache for `step`; float32, and its size does not depend on `max_length`."""
        self.check_init_cache(batch, max_length, dtype)
        return CodeTotals.empty((batch, self.num_codes, self.num_heads), self.head_dim, jnp.float32)

    def step(self, x: Array, cache: CodeTotals) -> tuple[Array, CodeTotals]:
        """Decode one token, `x` `(B, 1, D)` to `(B, 1, D)`, and the cache that holds it, in time `O(S D)`."""
        self.check_step(x, cache)
        q, k, v = self.project(x, x)
        queries, keys = self.queries.codewords[...], self.keys.codewords[...]
        codes = _nearest(_normalise(k), keys)
        cache = cache.add(_of_sequence(codes), jnp.ones(codes.shape, bool), v.astype(cache.sums.dtype))
        o = _attend(_quantise(_normalise(q), queries), [cache.stream(keys)]).out
        return self._finish(o.astype(x.dtype), x), cache
