"""AdamW with warm-up, clipping, and parameters that weight decay leaves alone."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from attn_jax.types import Array
from train.cli import UsageError
from train.config import Config


def schedule(config: Config, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `learning_rate`, then what `config.schedule` names.

    `cosine` falls to 0 at `steps`; `rsqrt` falls with `1 / sqrt(step)` (Vaswani et al. 2017); `constant` stays.
    """
    peak, warmup = config.learning_rate, max(config.warmup_steps, 1)

    def cosine(step: Array) -> Array:
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        return 0.5 * (1 + jnp.cos(jnp.pi * progress))

    def rsqrt(step: Array) -> Array:
        return jnp.sqrt(warmup / jnp.maximum(step, warmup))

    decays = {"cosine": cosine, "rsqrt": rsqrt, "constant": jnp.ones_like}
    if config.schedule not in decays:
        raise UsageError(f"optimizer.schedule `{config.schedule}` is not one of {', '.join(decays)}")
    decay = decays[config.schedule]
    # Step 0 is the first: it gets the first rung of the ladder, not a rate of 0.
    return lambda step: peak * jnp.minimum(1.0, (step + 1) / warmup) * decay(jnp.asarray(step + 1, jnp.float32))


def create(config: Config, learning_rate: optax.Schedule, decayed: Any) -> optax.GradientTransformation:
    """AdamW; `decayed` says for each parameter whether weight decay applies to it."""
    adamw = optax.adamw(
        learning_rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def decayed(params: nnx.State, no_decay: tuple[str, ...]) -> Any:
    """A boolean for each parameter: whether weight decay applies to it.

    It never does to a parameter made with `nnx.Param(value, weight_decay=False)`, nor to those of a kind in
    `no_decay`: `vectors` (biases, norms, and all else of at most one axis) and `embeddings` (`nnx.Embed`).
    """
    if unknown := set(no_decay) - {"vectors", "embeddings"}:
        raise UsageError(f"optimizer.no_decay: `{unknown.pop()}` is not one of vectors, embeddings")

    def applies(path: tuple, param: nnx.Variable) -> bool:
        kinds = set()
        if len(param.shape) <= 1 or path[-1] == "bias":
            kinds.add("vectors")
        if path[-1] == "embedding":
            kinds.add("embeddings")
        return param.get_metadata().get("weight_decay", True) and not kinds & set(no_decay)

    return nnx.from_flat_state([(path, applies(path, param)) for path, param in nnx.to_flat_state(params)])
