"""Parameters that stay as they are: no gradient is computed, no optimizer state kept, no weight decayed."""

from flax import nnx


class Frozen(nnx.Variable):
    """What was a parameter and does not learn."""


def freeze(model: nnx.Module, trained: tuple[str, ...]) -> None:
    """Makes parameters of `model` `Frozen`, except those whose path holds a name in `trained`."""
    for path, module in list(nnx.iter_modules(model)):
        if set(trained).isdisjoint(path):
            for name, value in list(vars(module).items()):
                if isinstance(value, nnx.Param):
                    setattr(module, name, Frozen(value[...], **value.get_metadata()))
