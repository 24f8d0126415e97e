"""Auxiliary losses and diagnostics: recorded by a module during its call, taken out by `pop_aux`."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.errors import TraceContextError

from attn_jax.types import Array


class AuxLoss(nnx.Variable):
    """A scalar that training adds to its loss."""


class AuxMetric(nnx.Variable):
    """A float array that is reported and never differentiated."""


def record(module: nnx.Module, kind: type[nnx.Variable], name: str, value: Array) -> None:
    """Keep `value` on `module` until `pop_aux`; the last call's value wins.

    A module that a JAX transformation closes over cannot be changed from inside, so there nothing is kept:
    pass the module (or its split state) through the transformation to see its diagnostics.
    """
    try:
        setattr(module, f"aux_{name}", kind(value))
    except TraceContextError:
        pass


def pop_aux(model: nnx.Module) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    """Remove and return what the modules of `model` recorded in their last call.

    Returns:
      `losses, metrics`: mappings from a path such as `"blocks/0/attention/stream_share"` (the bare name for the
      model itself) to the value.
    """
    found: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for mapping, kind in zip(found, (AuxLoss, AuxMetric)):
        for path, variable in nnx.to_flat_state(nnx.pop(model, kind)):
            mapping[_name(path)] = variable[...]
    return found


def _name(path: tuple[Any, ...]) -> str:
    *modules, last = map(str, path)
    return "/".join([*modules, last.removeprefix("aux_")])
