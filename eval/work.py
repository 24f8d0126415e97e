"""The least that a mechanism has to do: matrix products, exponentials and traffic with memory, from its equation.

    time >= max(flops / peak, exponentials / rate, bytes / bandwidth)

This bounds any implementation of the same equation from below; it is no prediction. Counted is what lies between
the projections, without a causal order and with each mechanism's default options, for one sequence of `L` tokens,
`H` heads of width `E`, `D = H E`, in 16-bit numbers:

    attention    a score is a product of width E, a weight one more: 4 E flops and one exponential per pair of a
                 query and a key that the mechanism relates; backward the scores again (nobody keeps them) and four
                 more products: 10 E and one exponential
    features     of queries and keys, their sums and what is read from these: products, 2 flops per multiplication;
                 backward twice as many
    recurrences  no products of matrices; only traffic and exponentials count
    traffic      each operand is read once and each result written once; backward operands, result and its
                 cotangent are read and cotangents written; float32 log-normalisers in either direction
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import attn_jax
from eval.measure import PASSES

_HALF, _SINGLE = 2, 4  # bytes


@dataclass(frozen=True)
class Work:
    """What is done, in numbers of flops of matrix products, of exponentials, and of bytes."""

    flops: float
    exponentials: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.exponentials + other.exponentials, self.bytes + other.bytes)


class Sizes(NamedTuple):
    """`L`, `H` and `E`."""

    length: int
    heads: int
    width: int

    @property
    def dim(self) -> int:
        return self.heads * self.width


class Passes(NamedTuple):
    """Work of the forward pass and of both passes together."""

    forward: Work
    both: Work


def of(mechanism: str, length: int, heads: int, width: int) -> dict[str, Work] | None:
    """The work of a mechanism by the names of `PASSES`, None for one of which nothing is known here."""
    if mechanism not in _FORMULAS:
        return None
    options = attn_jax.MECHANISMS[mechanism].options()
    return dict(zip(PASSES, _FORMULAS[mechanism](Sizes(length, heads, width), options)))


def _attention(sizes: Sizes, pairs: float, operands: int = 3, results: int = 1) -> Passes:
    """Softmax over `pairs` scores per head; operands and results in arrays of `(L, H, E)`."""
    scores = sizes.heads * pairs
    array = _HALF * sizes.length * sizes.dim
    # As many log-normalisers as there are results.
    normalisers = _SINGLE * sizes.length * sizes.heads * results
    forward = Work(4 * sizes.width * scores, scores, (operands + results) * array + normalisers)
    read_and_written = 2 * operands + 2 * results
    backward = Work(10 * sizes.width * scores, scores, read_and_written * array + normalisers)
    return Passes(forward, forward + backward)


def _window(length: int, window: int) -> float:
    """Pairs at a distance of `window` at most."""
    reach = min(window, length - 1)
    return length * (2 * reach + 1) - reach * (reach + 1)


def _standard(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    return _attention(sizes, sizes.length**2)


def _dual_kv(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    return _attention(sizes, 2 * sizes.length**2, operands=5)


def _local(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    return _attention(sizes, _window(sizes.length, options["window"]))


def _strided(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    stride = options["stride"]
    # Comb and window share the query's own key.
    pairs = sizes.length**2 / stride + _window(sizes.length, stride - 1) - sizes.length
    return _attention(sizes, pairs)


def _local_global(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    # The latents read every token, and every token reads the latents.
    return _attention(sizes, _window(sizes.length, options["window"]) + 2 * options["num_globals"] * sizes.length)


def _hyper(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    exact = sizes.length <= options["min_length"]
    keys = sizes.length if exact else options["block_size"] + options["num_samples"]
    return _attention(sizes, sizes.length * keys)


def _multi_timescale(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    # Of timescales that forget nothing: what one forgets depends on its data.
    scales = options["num_timescales"]
    return _attention(sizes, scales * sizes.length**2, operands=3 * scales, results=scales)


def _gravitational_multi_timescale(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    scales = options["num_timescales"]
    return _attention(sizes, scales * sizes.length**2, operands=3, results=scales)


def _vq(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    codes = options["num_codes"]
    attended = _attention(sizes, codes**2)
    # The nearest codewords of queries and keys, which no gradient passes through.
    assigned = Work(4 * sizes.length * codes * sizes.dim, 0, 0)
    return Passes(attended.forward + assigned, attended.both + assigned)


def _performer(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    products = 8 * sizes.length * options["num_features"] * sizes.dim
    exponentials = 2 * sizes.length * options["num_features"] * sizes.heads
    array = _HALF * sizes.length * sizes.dim
    return Passes(
        Work(products, exponentials, 4 * array), Work(3 * products, 2 * exponentials, 4 * array + 8 * array)
    )


def _mamba(sizes: Sizes, options: Mapping[str, Any]) -> Passes:
    directions, inner, states = 2, options["expand"] * sizes.dim, options["state_size"]
    exponentials = directions * sizes.length * inner * states
    # x and Delta, B and C, and the result.
    array = directions * _HALF * sizes.length * (3 * inner + 2 * states)
    return Passes(Work(0, exponentials, array), Work(0, 2 * exponentials, 3 * array))


_FORMULAS: Mapping[str, Callable[[Sizes, Mapping[str, Any]], Passes]] = {
    "standard": _standard,
    "cross_memory": _standard,
    "maw": _standard,  # of the depths one is picked
    "gravitational": _standard,  # distances are dot products and norms
    "dual_kv": _dual_kv,
    "local": _local,
    "strided": _strided,
    "local_global": _local_global,
    "hyper": _hyper,
    "multi_timescale": _multi_timescale,
    "gravitational_multi_timescale": _gravitational_multi_timescale,
    "vq": _vq,
    "performer": _performer,
    "mamba": _mamba,
}
