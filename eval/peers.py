"""Ours and its best peers side by side: the same arrays, correctness first, then timed alternately.

*One core*: processor time of all threads, one thread for torch and one device for ours; other work on the machine
disturbs it least. *All cores*: wall time, torch on as many threads as ours has devices to shard its heads (or
channels) over. A ratio is the median of those of neighbouring calls, ours / peer.

*Products alone* are the matrix products of our forward pass in its tiles, without all that makes them attention,
on one core: ours cannot be faster as long as XLA multiplies as it does.
"""

# The peers are an extra, which those who check types need not have installed.
# pyright: reportMissingImports=false

import functools
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attn_jax import ops
from attn_jax.engine import plan
from eval.measure import PASSES, alternate, conditions, difference, finite, number, table, temporary_bytes

WINDOW, FEATURES, CHUNK, STATES = 128, 256, 128, 16

WHOLE_TILES = 512

# float32, sums of thousands of terms in other orders.
TOLERANCE = 1e-4

SPLIT = P(None, None, "tensor")  # by heads or channels

Calls = dict[str, Callable[[], Any]]


class Case(NamedTuple):
    """An operation on `arrays`, ours and the peer's.

    Attributes:
      arrays: float32; heads `(B, L, H, E)` in the third dimension, which torch peers get as `(B, H, L, E)`.
      ours, theirs: functions of the arrays with one result.
      framework: what the peer's arrays are.
      specs: how each array is split over the devices; None: all by heads.
      products: a function of the arrays that computes the matrix products of `ours` alone, where it is not causal
        and `WHOLE_TILES` divides the length.
      note: what to know when reading the ratio.
    """

    arrays: list[np.ndarray]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    framework: Literal["torch", "jax"] = "torch"
    specs: list[P] | None = None
    products: Callable[..., Any] | None = None
    note: str = ""


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape, np.float32) for shape in shapes]


def _heads(length: int, args: Namespace, number: int = 3) -> list[np.ndarray]:
    return _normal(0, *[(1, length, args.heads, args.dim // args.heads)] * number)


def _over_heads(row: Callable[..., Any], *arrays: Any) -> Any:
    return lax.map(lambda row_arrays: row(*row_arrays), tuple(x[0].swapaxes(0, 1) for x in arrays))


def _attention_products(q: Any, k: Any, v: Any, *, left: int | None = None, right: int | None = None) -> Any:
    """`q k^T` and its product with `v`, in the tiles of a `Plan` with these bounds; of one step in a window."""
    (queries, keys), _ = plan.tiles(left, right)

    def row(q: Any, k: Any, v: Any) -> Any:
        def tile(i: Any) -> Any:
            def add(j: Any, total: Any) -> Any:
                take = functools.partial(lax.dynamic_slice_in_dim, start_index=j, slice_size=keys)
                return total + lax.dynamic_slice_in_dim(q, i, queries) @ take(k).T @ take(v)

            nothing = jnp.zeros((queries, v.shape[1]), v.dtype)
            if left is not None:
                return add(i - left, nothing)
            return lax.fori_loop(0, -(-len(k) // keys), lambda t, total: add(t * keys, total), nothing)

        return lax.map(tile, jnp.arange(0, len(q), queries))

    return _over_heads(row, q, k, v)


def _favor_products(projection: Any, q: Any, k: Any, v: Any) -> Any:
    """The features' projections, the state of all keys, and its products with the queries' features."""

    def row(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.reshape(-1, min(CHUNK, len(x)), x.shape[1]) for x in (q, k, v))
        nothing = jnp.zeros((len(projection), v.shape[-1]), v.dtype)
        state, _ = lax.scan(lambda state, kv: (state + projection @ kv[0].T @ kv[1], None), nothing, (k, v))
        return lax.map(lambda q: state.T @ (projection @ q.T), q)

    return _over_heads(row, q, k, v)


def _standard(length: int, args: Namespace, theirs: Callable[..., Any], framework: Any) -> Case:
    def ours(q: Any, k: Any, v: Any) -> Any:
        return ops.standard_attention(q, k, v, causal=args.causal)

    return Case(_heads(length, args), ours, theirs, framework, products=_attention_products)


def standard_torch(length: int, args: Namespace) -> Case:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return _standard(length, args, lambda q, k, v: sdpa(q, k, v, is_causal=args.causal), "torch")


def standard_jax(length: int, args: Namespace) -> Case:
    return _standard(
        length, args, lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=args.causal), "jax"
    )


def standard_nnx(length: int, args: Namespace) -> Case:
    mask = jnp.tril(jnp.ones((length, length), bool)) if args.causal else None
    return _standard(length, args, lambda q, k, v: nnx.dot_product_attention(q, k, v, mask=mask), "jax")


def dual_kv_torch(length: int, args: Namespace) -> Case:
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(1, 2) if args.causal else None

    def ours(q: Any, k1: Any, v1: Any, k2: Any, v2: Any) -> Any:
        return ops.dual_kv_attention(q, k1, v1, k2, v2, causal=args.causal)

    def theirs(q: Any, k1: Any, v1: Any, k2: Any, v2: Any) -> Any:
        return sdpa(q, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2), attn_mask=mask)

    def products(q: Any, k1: Any, v1: Any, k2: Any, v2: Any) -> Any:
        return _attention_products(q, k1, v1) + _attention_products(q, k2, v2)

    return Case(_heads(length, args, 5), ours, theirs, products=products)


def local_torch(length: int, args: Namespace) -> Case:
    from local_attention import LocalAttention

    # Blocks of WINDOW queries read the blocks around them, and `exact_windowsize` masks them to our window.
    theirs = LocalAttention(
        WINDOW, causal=args.causal, look_forward=0 if args.causal else 1, exact_windowsize=True, autopad=True
    )

    def ours(q: Any, k: Any, v: Any) -> Any:
        return ops.local_attention(q, k, v, window=WINDOW, causal=args.causal)

    padded = "" if length % WINDOW == 0 else "; it attends to its own zero padding: use a multiple of the window"
    return Case(
        _heads(length, args),
        ours,
        theirs,
        products=functools.partial(_attention_products, left=WINDOW, right=WINDOW),
        note=f"window {WINDOW}, the peer computes blocks{padded}",
    )


def performer_torch(length: int, args: Namespace) -> Case:
    import torch
    from performer_pytorch import performer_pytorch as peer

    (projection,) = _normal(1, (FEATURES, args.dim // args.heads))
    features = functools.partial(peer.softmax_kernel, projection_matrix=torch.from_numpy(projection), eps=0.0)
    causal_mix = functools.partial(peer.causal_linear_attention_noncuda, eps=0.0)
    mix = causal_mix if args.causal else peer.linear_attention

    def ours(q: Any, k: Any, v: Any) -> Any:
        return ops.favor_attention(q, k, v, jnp.asarray(projection), causal=args.causal, chunk=CHUNK)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return mix(features(q, is_query=True), features(k, is_query=False), v)

    leak = "; the causal peer leaks the future through the stabiliser of its keys" if args.causal else ""
    return Case(
        _heads(length, args),
        ours,
        theirs,
        products=functools.partial(_favor_products, projection),
        note=f"{FEATURES} features, without the constants the peer adds{leak}",
    )


def mamba_torch(length: int, args: Namespace) -> Case:
    from mambapy.mamba import MambaBlock

    channels = 2 * args.dim
    u, b, c, delta, d = _normal(
        0, (1, length, channels), *[(1, length, STATES)] * 2, (1, length, channels), (channels,)
    )
    a = -np.broadcast_to(np.arange(1, STATES + 1, dtype=np.float32), (channels, STATES)).copy()
    arrays = [u, np.log1p(np.exp(delta - 4)), a, b, c, d]  # steps of about 0.02, as the models start with

    def theirs(*arrays: Any) -> Any:
        return MambaBlock.selective_scan(None, *arrays)  # pyright: ignore[reportArgumentType] uses no `self`

    split, shared = P(None, None, "tensor"), P()
    specs = [split, split, P("tensor"), shared, shared, P("tensor")]
    return Case(arrays, lambda *arrays: ops.selective_scan(*arrays)[0], theirs, specs=specs)


PEERS: list[tuple[str, str, Callable[[int, Namespace], Case]]] = [
    ("standard", "torch SDPA", standard_torch),
    ("standard", "jax.nn", standard_jax),
    ("standard", "flax.nnx", standard_nnx),
    ("dual_kv", "torch SDPA, concatenated", dual_kv_torch),
    ("local", "local-attention", local_torch),
    ("performer", "performer-pytorch", performer_torch),
    ("mamba", "mambapy", mamba_torch),
]
"""Mechanism, peer, and how to set the two up for a length."""

MECHANISMS = list(dict.fromkeys(mechanism for mechanism, _, _ in PEERS))


def compare(args: Namespace, threads: int) -> Iterator[dict[str, Any]]:
    """Measures every peer of `args.mechanisms` at every length; one record per pass, as JSON."""
    for mechanism, peer, setup in PEERS:
        for length in args.lengths if mechanism in args.mechanisms else ():
            record = {"mechanism": mechanism, "peer": peer, "length": length}
            try:
                with warnings.catch_warnings(action="ignore"):  # the peers', about their own dependencies
                    case = setup(length, args)
            except ImportError as error:
                yield record | {"status": f"skipped: {error}; pip install -e '.[peers]'"}
                continue
            if args.causal or length % WHOLE_TILES:
                case = case._replace(products=None)
            for name, result in _compare(case, args, threads).items():
                yield record | {"pass": name, "note": case.note} | result


def _compare(case: Case, args: Namespace, threads: int) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in PASSES}
    # One core first: once torch has more threads, they spin between its calls.
    for setting, number_of, clock in (("one_core", 1, "cpu"), ("all_cores", threads, "wall")):
        ours, memory = _jax_calls(case.ours, case, number_of)
        theirs, peer_memory = (
            _torch_calls(case, number_of) if case.framework == "torch" else _jax_calls(case.theirs, case, 1)
        )
        for name, result in results.items():
            error = difference(ours[name](), theirs[name]())
            result["difference"] = finite(error)
            if not error <= TOLERANCE:
                result["status"] = f"refused: results differ by {error:.1e}"
                continue
            result.setdefault("temp_bytes", memory[name])
            result.setdefault("peer_temp_bytes", peer_memory.get(name))
            calls = [ours[name], theirs[name]]
            if products := name == PASSES[0] and number_of == 1 and case.products:
                compiled = jax.jit(products).lower(*case.arrays).compile()
                calls.append(functools.partial(_block, compiled, list(map(jnp.asarray, case.arrays))))
            samples = [[getattr(call, clock) for call in s] for s in alternate(calls, args.repeats, args.budget)]
            seconds = [float(np.median(s)) for s in samples]
            ratios = [float(np.median(np.divide(s, samples[1]))) for s in samples]
            result[setting] = {
                "seconds": seconds[0],
                "peer_seconds": seconds[1],
                "ratio": ratios[0],
                "rounds": len(samples[0]),
            }
            if products:
                result["products"] = {"seconds": seconds[2], "ratio": ratios[2]}
        if threads == 1:
            break
    return results


def _jax_calls(function: Callable[..., Any], case: Case, devices: int) -> tuple[Calls, dict[str, int]]:
    """The two passes, compiled, and their temporary memory; over several devices ours shards itself by heads."""
    mesh = jax.make_mesh((devices,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:devices])

    def both(g: Any, *arrays: Any) -> Any:
        out, vjp = jax.vjp(function, *arrays)
        return out, vjp(g)

    with jax.set_mesh(mesh), nnx.logical_axis_rules((("heads", "tensor"), ("mlp", "tensor"))):
        specs = case.specs or [SPLIT] * len(case.arrays)
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(case.arrays, specs)]
        out = jax.eval_shape(function, *arrays)
        g = jax.device_put(_cotangent(out.shape), NamedSharding(mesh, SPLIT))
        passes = {PASSES[0]: (function, arrays), PASSES[1]: (both, [g, *arrays])}
        compiled = {name: (jax.jit(f).lower(*xs).compile(), xs) for name, (f, xs) in passes.items()}
    calls: Calls = {name: functools.partial(_block, run, xs) for name, (run, xs) in compiled.items()}
    return calls, {name: temporary_bytes(run) for name, (run, _) in compiled.items()}


def _block(run: Callable[..., Any], arrays: list[Any]) -> Any:
    return jax.block_until_ready(run(*arrays))


def _torch_calls(case: Case, threads: int) -> tuple[Calls, dict[str, int]]:
    import torch

    def swap(x: Any) -> Any:  # heads before length, and back
        return x.transpose(1, 2) if x.ndim == 4 else x

    torch.set_num_threads(threads)
    tensors = [swap(torch.from_numpy(x)).contiguous().requires_grad_() for x in case.arrays]
    with torch.no_grad():
        g = swap(torch.from_numpy(_cotangent(swap(case.theirs(*tensors)).shape))).contiguous()

    def forward() -> Any:
        with torch.no_grad():
            return swap(case.theirs(*tensors))

    def both() -> Any:
        out = case.theirs(*tensors)
        return swap(out.detach()), tuple(map(swap, torch.autograd.grad(out, tensors, g)))

    return {PASSES[0]: forward, PASSES[1]: both}, {}


def _cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return _normal(2, tuple(shape))[0]


def row(record: dict[str, Any]) -> dict[str, str]:
    """A record as a row of a table."""
    r = record
    cells = {"mechanism": r["mechanism"], "peer": r["peer"], "length": str(r["length"]), "pass": r.get("pass", "")}
    cells["difference"] = "" if r.get("difference") is None else f"{r['difference']:.0e}"
    for setting in ("one_core", "all_cores"):
        title, times = setting.replace("_", " "), r.get(setting)
        cells[f"{title}, ms"] = (
            f"{number(1e3 * times['seconds'])} / {number(1e3 * times['peer_seconds'])}" if times else ""
        )
        cells[f"{title}, ratio"] = number(times["ratio"]) if times else ""
    products = r.get("products")
    cells["products alone, ms"] = number(1e3 * products["seconds"]) if products else ""
    cells["products alone, ratio"] = number(products["ratio"]) if products else ""
    cells["memory ratio"] = number(r["temp_bytes"] / r["peer_temp_bytes"]) if r.get("peer_temp_bytes") else ""
    return cells | {"status": "; ".join(filter(None, (r["status"], r.get("note"))))}


def markdown(result: dict[str, Any]) -> str:
    """The comparison as a table."""
    return (
        f"# Ours beside its peers\n\n{conditions(result)}\n{__doc__}\n{table([row(r) for r in result['peers']])}\n"
    )
