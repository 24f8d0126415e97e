"""What the tests of the kernels share.

They run interpreted, with race detection, or (ATTN_JAX_KERNELS=gpu) on a GPU.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import callback as callbacks
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

from attn_jax.engine import dispatch
from attn_jax.types import NEG_INF
from pallas_kernels.hardware import INTERPRETER, Hardware, detect
from tests.oracles import logsumexp

ON_GPU = os.environ.get("ATTN_JAX_KERNELS") == "gpu"
IMPLEMENTATION = "mosaic" if ON_GPU else "mosaic_interpret"


def call_back(*arrays: Any, callback: Callable[..., Any], **_: Any) -> Any:
    """A callback of the interpreter. JAX's own puts every argument on a device first, which takes four fifths of
    the time in which kernels run; the interpreter takes integers and copies what it keeps."""
    return jax.tree.map(np.asarray, callback(*(x.item() if x.ndim == 0 else x for x in arrays)))


callbacks.io_callback_impl = call_back

only_interpreted = pytest.mark.skipif(ON_GPU, reason="a GPU reports no races")


def reports_race(run: Callable[[], Any], capsys) -> bool:
    """Whether the interpreter finds a race in `run`: JAX 0.12 raises it, 0.11 prints it."""
    try:
        jax.block_until_ready(run())
        said = ""
    except Exception as error:
        said = str(error)
    finally:
        reset_gpu_interpret_mode_state()  # which remembers a kernel that failed
    return "RACE DETECTED" in said + capsys.readouterr().out


def hardware_of(instruction: str) -> Hardware:
    """Where the kernels run, by this matrix instruction; skips the test on a GPU that lacks it."""
    found = detect() if ON_GPU else INTERPRETER
    if ON_GPU and instruction == "wgmma" != found.instruction:
        pytest.skip("this GPU has no wgmma")
    return dataclasses.replace(found, instruction=instruction)


def multiply_by(instruction: str, monkeypatch) -> None:
    """Makes `IMPLEMENTATION` use this matrix instruction; skips the test on a GPU that lacks it."""
    hardware = hardware_of(instruction)
    if ON_GPU:
        monkeypatch.setattr(dispatch, "detect", lambda: hardware)
    else:
        monkeypatch.setattr(dispatch, "INTERPRETER", hardware)


def dense_attention(
    arrays: dict[str, Any],
    readable: Sequence[Any],
    cotangents: tuple[Any, Any],
    scale: float = 1.0,
    score: Callable[..., Any] = lambda dot, *_: dot,
    distances: Sequence[Any] | None = None,
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """`(out, lse, stream_lse)` and the gradients of `arrays`, in NumPy and float64, all scores at once.

    Args:
      arrays: `q`, `query_features`, and `streams` with their `keys`, `values` and `features`, as in `attend`.
      readable: for each stream, bool that broadcasts to `(B, H, L, M)`.
      cotangents: of `out` and of `lse`, the latter where anything is read.
      distances: for each stream, those for the score.
    """
    q, query = arrays["q"], [f.swapaxes(1, 2)[..., None] for f in arrays["query_features"]]
    g, h = (x.swapaxes(1, 2) for x in cotangents)
    streams = []
    for n, s in enumerate(arrays["streams"]):
        keys, values = (np.repeat(s[x], q.shape[2] // s[x].shape[2], axis=2) for x in ("keys", "values"))
        key = [f.swapaxes(1, 2)[:, :, None] for f in s.get("features", ())]
        dot = scale * np.einsum("blhe,bmhe->bhlm", q, keys)
        distance = None if distances is None else distances[n]
        with jax.enable_x64(True):
            z, pull = jax.vjp(lambda dot, *features, d=distance: score(dot, d, *features), dot, query, key)
        streams.append((np.where(readable[n], z, -np.inf), pull, keys, values))

    lse = logsumexp(np.concatenate([z for z, *_ in streams], axis=-1))
    weights = [np.exp(z - lse[..., None]) for z, *_ in streams]
    out = sum(np.einsum("bhlm,bmhv->bhlv", p, values) for p, (*_, values) in zip(weights, streams))
    each = np.stack([logsumexp(z) for z, *_ in streams])
    results = out.swapaxes(1, 2), lse.swapaxes(1, 2), each.swapaxes(2, 3)

    delta = (g * out).sum(-1) - np.where(lse > NEG_INF, h, 0)
    dq, d_query, d_streams = 0, [0] * len(query), []
    for p, s, (_, pull, keys, values) in zip(weights, arrays["streams"], streams):
        dz = p * (np.einsum("bhlv,bmhv->bhlm", g, values) - delta[..., None])
        with jax.enable_x64(True):
            dot, of_query, of_key = jax.tree.map(np.asarray, pull(dz))
        dq = dq + scale * np.einsum("bhlm,bmhe->blhe", dot, keys)
        d_query = [total + d[..., 0].swapaxes(1, 2) for total, d in zip(d_query, of_query)]
        dk, dv = scale * np.einsum("bhlm,blhe->bmhe", dot, q), np.einsum("bhlm,bhlv->bmhv", p, g)
        tokens = *s["keys"].shape[:3], q.shape[2] // s["keys"].shape[2]
        dk, dv = (d.reshape(*tokens, d.shape[3]).sum(3) for d in (dk, dv))
        of_key = tuple(d[:, :, 0].swapaxes(1, 2) for d in of_key)
        d_streams.append({"keys": dk, "values": dv, **({"features": of_key} if "features" in s else {})})
    gradients = {"q": dq, "query_features": tuple(d_query), "streams": d_streams}
    return results, gradients
