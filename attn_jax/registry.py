"""The mechanisms by name: what each can do, and how to build one."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_jax.mechanisms.base import Attention, ProjectedAttention
from attn_jax.types import Dtype, check_dtype, check_flag, check_integer

# Arguments that every mechanism takes; what else its constructor takes by keyword are its options.
_COMMON = ("self", "dim", "num_heads", "causal", "dtype", "param_dtype", "rngs")

# What the base classes leave to a mechanism: methods that refuse or return None, and those that ask another one.
_UNWRITTEN = (
    Attention.attend,
    Attention.weights,
    Attention.init_cache,
    Attention.step,
    ProjectedAttention.mix,
    ProjectedAttention.mix_weights,
)
_ASKS = {
    Attention.__call__: "attend",
    Attention.attention_weights: "weights",
    ProjectedAttention.attend: "mix",
    ProjectedAttention.weights: "mix_weights",
}


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
      ValueError: the name is taken or not an identifier, the class lacks what the arguments promise. A file or a
        notebook's cell may be executed again: a class replaces its own earlier definition.
    """

    def add(module: M) -> M:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"register: `name` must be an identifier such as 'my_attention', got {name!r}")
        where = f"register: {name!r}"
        if not isinstance(implementations, tuple):
            raise ValueError(f"register: `implementations` must be a tuple of names, got {implementations!r}")
        flags = dict(causal=causal, bidirectional=bidirectional, mask=mask, cross=cross, decode=decode)
        for flag, value in (flags | {"weights": weights}).items():
            check_flag("register", flag, value)
        if not (causal or bidirectional) or decode > causal:
            raise ValueError(
                f"register: {name!r} must be causal or bidirectional, and causal to decode, got {flags}"
            )
        _check_class(where, module, mask=mask, cross=cross, decode=decode, weights=weights)
        if name in _registered and _origin(_registered[name].module) != _origin(module):
            raise ValueError(f"register: `name` {name!r} is taken by {_registered[name].module}")
        mechanism = Mechanism(
            name, module, causal, bidirectional, mask, cross, decode, weights, time, memory, implementations
        )
        if implementations and "implementation" not in mechanism.options():
            raise ValueError(f"{where} must take the option `implementation`, got {implementations=} without it")
        _registered[name] = mechanism
        return module

    return add


def _origin(module: Any) -> tuple[str, str]:
    return module.__module__, module.__qualname__


def _check_class(where: str, module: Any, *, mask: bool, cross: bool, decode: bool, weights: bool) -> None:
    """Raise a `ValueError` unless `module` is a class that can be constructed and called as promised."""
    if not isinstance(module, type) or not issubclass(module, nnx.Module):
        raise ValueError(f"{where} must be a subclass of nnx.Module, got {module!r}")
    constructor, call = inspect.signature(module.__init__), inspect.signature(module.__call__)
    arguments = {"mask": mask, "context": cross, "context_mask": cross}
    try:
        bound = constructor.bind_partial(*_COMMON[:3], **dict.fromkeys(_COMMON[3:]))
        call.bind_partial(**{argument: None for argument, is_taken in arguments.items() if is_taken})
    except TypeError as error:
        wanted = "(dim, num_heads, *, causal, dtype, param_dtype, rngs, **options) and (x, *, mask, ...)"
        raise ValueError(f"{where} must be constructed and called as {wanted}; its own: {error}") from None
    for p in constructor.parameters.values():
        if p.name not in bound.arguments and p.kind is p.POSITIONAL_OR_KEYWORD:
            raise ValueError(
                f"{where} must take options by keyword only, got `{p.name}` before the `*` of __init__"
            )
    if cross and issubclass(module, Attention) and module.__call__ is Attention.__call__ and not module.cross:
        raise ValueError(f"{where} must set `cross = True` in its class to take `context`, got `cross = False`")
    methods = {"__call__": True, "init_cache": decode, "step": decode, "attention_weights": weights}
    for method in (method for method, is_needed in methods.items() if is_needed):
        if missing := _unwritten(module, method):
            raise ValueError(f"{where} must have the methods of what it supports, got no `{missing}` of its own")


def _unwritten(module: type, method: str) -> str | None:
    """The name of what `module` must write to have `method`; None where it has it."""
    found = getattr(module, method, None)
    if found in _ASKS:
        return _unwritten(module, _ASKS[found])
    return method if found is None or found in _UNWRITTEN else None


def _unknown_name(name: Any) -> ValueError:
    near = difflib.get_close_matches(name.lower(), _registered, n=1) if isinstance(name, str) else []
    hint = f", did you mean {near[0]!r}?" if near else ";"
    return ValueError(f"unknown mechanism {name!r}{hint} registered: {', '.join(sorted(_registered))}")


def _check_rngs(name: str, rngs: Any) -> None:
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"{name}: `rngs` must be nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
    if not hasattr(rngs, "params"):
        streams = ", ".join(rngs) or "none"
        raise ValueError(f"{name}: `rngs` must have a stream `params`, as nnx.Rngs(0) has, got streams {streams}")


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
      ValueError: unknown name or option, a width that the heads do not divide, an unsupported `causal`, types that
        are not floating point, `rngs` that are no `nnx.Rngs`.
    """
    if not isinstance(name, str) or name not in _registered:
        raise _unknown_name(name)
    mechanism = _registered[name]
    known = mechanism.options()
    unknown = [option for option in options if option not in known]
    if unknown:
        listing = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{name}: unknown option {', '.join(map(repr, unknown))}; its options: {listing}")
    check_integer(name, "dim", dim)
    check_integer(name, "num_heads", num_heads)
    check_flag(name, "causal", causal)
    if dtype is not None:
        check_dtype(name, "dtype", dtype)
    check_dtype(name, "param_dtype", param_dtype)
    _check_rngs(name, rngs)
    if dim % num_heads:
        raise ValueError(f"{name}: `dim` must be a multiple of `num_heads`, got {dim} and {num_heads}")
    if not (mechanism.causal if causal else mechanism.bidirectional):
        raise ValueError(f"{name}: causal={causal} is not supported, only causal={not causal}")
    constructor: Callable[..., nnx.Module] = mechanism.module
    return constructor(dim, num_heads, causal=causal, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)
