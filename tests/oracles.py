"""What the mechanisms compute, in NumPy, dense, as short as the formula.

Every function takes float64 (or complex) arrays. Complex ones give derivatives without autodiff: for an analytic
`f`, `imag(f(x + 1e-30j u)) / 1e-30` is the derivative along `u` to the last bit (`derivative`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1e30
"""The logsumexp of no key."""


class Stream(NamedTuple):
    """As `attn_jax.engine.streaming.Stream`."""

    keys: Any
    values: Any
    mask: Any = None
    features: Sequence[Any] = ()
    bias: Any = 0.0
    ordered: bool = True


def softmax_attention(
    q: Any,
    streams: Sequence[Stream],
    *,
    query_features: Sequence[Any] = (),
    score: Callable[..., Any] | None = None,
    causal: bool = False,
    left: float = np.inf,
    right: float = np.inf,
    offset: int = 0,
    scale: float = 1.0,
) -> tuple[Any, Any, Any]:
    """`(out, lse, stream_lse)` of `q` `(B, L, H, E)` over all streams, as `attend` defines them."""
    i = offset + np.arange(q.shape[1])[:, None]
    logits, values = [], []
    for s in streams:
        repeats = q.shape[2] // s.keys.shape[2]
        keys, v = np.repeat(s.keys, repeats, axis=2), np.repeat(s.values, repeats, axis=2)
        j = np.arange(keys.shape[1])
        z = scale * np.einsum("blhe,bmhe->bhlm", q, keys)
        if score is not None:
            query = [f.transpose(0, 2, 1)[..., None] for f in query_features]
            z = score(z, (i - j) * s.ordered, query, [f.transpose(0, 2, 1)[:, :, None] for f in s.features])
        allowed = ((i - j <= left) & (j - i <= (0 if causal else right))) | (not s.ordered)
        if s.mask is not None:
            allowed = allowed & s.mask[:, None, None, :]
        logits.append(np.where(allowed, z + s.bias, -np.inf))
        values.append(v)
    lse = logsumexp(np.concatenate(logits, axis=-1))
    weights = [np.exp(z - lse[..., None]) for z in logits]
    out = sum(np.einsum("bhlm,bmhv->blhv", p, v) for p, v in zip(weights, values))
    return out, lse.transpose(0, 2, 1), np.stack([logsumexp(z).transpose(0, 2, 1) for z in logits])


def logsumexp(z: Any) -> Any:
    """Over the last axis; `NOTHING` where there is nothing."""
    top = np.maximum(z.real.max(-1, initial=NOTHING), NOTHING)
    total = np.exp(z - top[..., None]).sum(-1)
    return np.where(total != 0, top + np.log(np.where(total != 0, total, 1)), NOTHING)


def derivative(f: Callable[..., Any], x: Any, along: Any) -> Any:
    """The derivative of an analytic `f` at `x` along `along`, arrays of the same shape."""
    step = 1e-30
    return f(x + 1j * step * along).imag / step
