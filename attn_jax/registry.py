"""The mechanisms by name: what each can do, and how to build one."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_jax.types import Dtype

# Arguments that every mechanism takes; what else its constructor takes by keyword are its options.
_COMMON = ("self", "dim", "num_heads", "causal", "dtype", "param_dtype", "rngs")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A registered mechanism and its capabilities.

    Attributes:
      name: the key in `MECHANISMS`.
      module: a subclass of `nnx.Module`; see `register` for its constructor.
      causal: it can be built with `causal=True`.
      bidirectional: it can be built with `causal=False`.
      mask: its call takes `mask`.
      cross: its call takes `context` and `context_mask`.
      decode: when causal it has `init_cache` and `step`.
      weights: `attention_weights` returns an array (where False it returns None).
      time, memory: growth with the length `L`, for people, such as "L^2" or "L window".
      implementations: the values that its `implementation` option accepts besides None; empty if it has none.
    """

    name: str
    module: Callable[..., Any]
    causal: bool
    bidirectional: bool
    mask: bool
    cross: bool
    decode: bool
    weights: bool
    time: str
    memory: str
    implementations: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """The mechanism's own options and their defaults (`inspect.Parameter.empty` where one is required)."""
        parameters = inspect.signature(self.module.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in _COMMON and p.kind is p.KEYWORD_ONLY}


_registered: dict[str, Mechanism] = {}

MECHANISMS: Mapping[str, Mechanism] = MappingProxyType(_registered)
"""Every mechanism by name, read-only; `register` adds to it."""


def register[M: Callable[..., Any]](
    name: str,
    *,
    causal: bool,
    bidirectional: bool = True,
    mask: bool = True,
    cross: bool = False,
    decode: bool = False,
    weights: bool = False,
    time: str,
    memory: str,
    implementations: tuple[str, ...] = (),
) -> Callable[[M], M]:
    """Class decorator that adds an `nnx.Module` to `MECHANISMS`; the arguments are those of `Mechanism`.

    The class is constructed as `cls(dim, num_heads, *, causal, dtype, param_dtype, rngs, **options)` and called
    as `module(x, mask=mask)`. Deriving it from `attn_jax.mechanisms.base.Attention` gives the checks, the
    masking and `attention_weights` for free.

    Raises:
      ValueError: the name is taken.
    """

    def add(module: M) -> M:
        if name in _registered:
            raise ValueError(f"a mechanism named {name!r} is registered already ({_registered[name].module})")
        _registered[name] = Mechanism(
            name, module, causal, bidirectional, mask, cross, decode, weights, time, memory, implementations
        )
        return module

    return add


def build(
    name: str,
    *,
    dim: int,
    num_heads: int,
    causal: bool = False,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> Any:
    """Build a mechanism: a module that maps `(B, L, D)` to `(B, L, D)`.

    Args:
      name: a key of `MECHANISMS`.
      dim: model width `D`.
      num_heads: heads `H`; must divide `dim`.
      causal: output `i` depends on inputs `0..i` only.
      dtype: compute type, None for that of the inputs and parameters together.
      param_dtype: type of the parameters.
      rngs: randomness of the initial parameters and of stochastic parts.
      **options: the mechanism's own, see `MECHANISMS[name].options()`.

    Raises:
      ValueError: unknown name or option, a width that the heads do not divide, an unsupported `causal`.
    """
    if name not in _registered:
        raise ValueError(f"unknown mechanism {name!r}; registered: {', '.join(sorted(_registered))}")
    mechanism = _registered[name]
    known = mechanism.options()
    unknown = [option for option in options if option not in known]
    if unknown:
        listing = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{name}: unknown option {', '.join(map(repr, unknown))}; its options: {listing}")
    for argument, value in (("dim", dim), ("num_heads", num_heads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: `{argument}` must be a positive integer, got {value!r}")
    if dim % num_heads:
        raise ValueError(f"{name}: `dim` must be a multiple of `num_heads`, got {dim} and {num_heads}")
    if not (mechanism.causal if causal else mechanism.bidirectional):
        raise ValueError(f"{name}: causal={causal} is not supported, only causal={not causal}")
    constructor: Callable[..., nnx.Module] = mechanism.module
    return constructor(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)
