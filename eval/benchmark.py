"""Time, memory and accuracy of attention mechanisms against length, or beside other libraries' (--peers).

  python -m eval.benchmark --mechanisms standard,local --lengths 1024,4096,16384
  python -m eval.benchmark --peers --mechanisms standard,mamba --lengths 2048

Modules are measured as `attn_jax.build` makes them, projections included, on one example and on the device that
JAX finds. Before a mechanism is timed, its values and gradients are compared with its dense version in float64;
where they disagree it is refused and the exit code is 1. With --peers it is operations that are measured, ours and
the peer's alternately on the same arrays, on the CPU.
"""

import argparse
import json
import math
import operator
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import attn_jax
from attn_jax.mechanisms.base import ProjectedAttention
from attn_jax.types import Array
from eval import growth_report, peers
from eval.measure import (
    PASSES,
    alternate,
    cores,
    difference,
    environment,
    exponent,
    finite,
    lengths,
    median,
    number,
    replace,
    root_mean_square,
    temporary_bytes,
)
from train import cli

# Spans several tiles and blocks, and is a multiple of none.
CHECK_LENGTH = 700

# Accelerators multiply float32 with 10 bits of mantissa (TF32); what a wrong mask or bound changes is larger.
TOLERANCE = {"float32": 5e-3, "bfloat16": 1e-1}

# Lengths that are run once on the way to a longer one, to tell whether that is affordable.
LADDER = tuple(1024 * 4**k for k in range(5))

# These stand in for standard attention. Measured with queries and keys of these standard deviations (logits have
# their squares), values of 1, at a sample of queries, which keeps the exact side linear in the length.
# (`vq` does too, as far as its codebooks fit the data: untrained ones say nothing.)
APPROXIMATIONS = ("performer", "hyper")
SCALES = (0.25, 0.5, 1.0)
SAMPLED_QUERIES = 64


def main(argv: list[str]) -> None:
    """Measures what the command line `argv` (without the program) asks for."""
    args = _parse(argv)
    cli.make_folder(args.out, "--out")
    (_compare_with_peers if args.peers else _benchmark)(args)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m eval.benchmark", description=__doc__)
    add = parser.add_argument
    add("--mechanisms", type=_mechanisms, metavar="A,B", help="default: all that are registered")
    add("--lengths", type=lengths, metavar="N,M", help="default: 1024,4096,16384; with --peers 2048")
    add("--peers", action="store_true", help="compare with other libraries, of the extra `peers`, on the CPU")
    add("--causal", action="store_true", help="outputs depend on the past only")
    add("--dim", type=int, default=512, help="model width (default: %(default)s)")
    add("--heads", type=int, default=8, help="default: %(default)s")
    add("--dtype", choices=TOLERANCE, default="float32", help="compute type of modules (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed calls, of which the median counts (default: %(default)s)")
    add("--budget", type=float, default=20, help="seconds per measurement; skips what takes longer (default: 20)")
    add("--out", type=Path, metavar="DIR", default=Path("runs/benchmark"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.budget <= 0:
        parser.error("--repeats and --budget must be positive")
    if args.peers and args.dtype != "float32":
        parser.error("--peers compares in float32")
    args.lengths = args.lengths or ([2048] if args.peers else [1024, 4096, 16384])
    if args.mechanisms is None:
        able = {name: m.causal if args.causal else m.bidirectional for name, m in attn_jax.MECHANISMS.items()}
        args.mechanisms = [name for name, ok in able.items() if ok]
        if unable := [name for name, ok in able.items() if not ok]:
            _say(f"left out, they have no causal={args.causal} form: {', '.join(unable)}")
    if args.peers and (alone := [name for name in args.mechanisms if name not in peers.MECHANISMS]):
        _say(f"no peer is known for {', '.join(alone)}, only for {', '.join(peers.MECHANISMS)}")
    with cli.user_errors(ValueError):  # unsuitable widths, before anything is measured
        for name in args.mechanisms:
            nnx.eval_shape(lambda name=name: build_module(name, args))
    return args


def _mechanisms(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in attn_jax.MECHANISMS]:
        known = ", ".join(attn_jax.MECHANISMS)
        raise argparse.ArgumentTypeError(f"unknown mechanism {', '.join(map(repr, unknown))}; registered: {known}")
    return names


def _benchmark(args: argparse.Namespace) -> None:
    result = _header(args) | {"checks": {}, "growth": [], "approximation": []}
    for name in args.mechanisms:
        status, error = _judge(check(name, args), args)
        result["checks"][name] = {"status": status, "difference": error}
        _say(f"{name}: {status}" + ("" if error is None else f", differs from its dense version by {error:.0e}"))
        if status != "refused":
            result["growth"] += _measure(name, args)
        if name in APPROXIMATIONS:
            affordable = growth_report.curve(result, name, PASSES[0], "wall")
            result["approximation"] += _approximation_errors(name, args, affordable)
        _write_json(args.out / "benchmark.json", result)  # an interrupted run keeps what it has measured
    text = growth_report.markdown(result)
    replace(args.out / "benchmark.md", text.encode())
    for suffix in ("svg", "png"):
        replace(args.out / f"growth.{suffix}", growth_report.plot(result, suffix))
    print(text, f"written to {args.out}: benchmark.json, benchmark.md, growth.svg, growth.png", sep="\n")
    if refused := [name for name, checked in result["checks"].items() if checked["status"] == "refused"]:
        raise cli.RunError(f"refused, they differ from their dense versions: {', '.join(refused)}")


def _judge(error: float | None, args: argparse.Namespace) -> tuple[str, float | None]:
    if error is None:
        return "not checked, no dense version", None
    return "checked" if error <= TOLERANCE[args.dtype] else "refused", finite(error)


def _compare_with_peers(args: argparse.Namespace) -> None:
    # Before the first device is used: ours is also measured on as many devices as torch gets threads.
    threads = math.gcd(cores(), args.heads)
    jax.config.update("jax_num_cpu_devices", threads)
    if jax.default_backend() != "cpu":
        raise cli.UsageError("--peers compares on the CPU: set JAX_PLATFORMS=cpu")
    result = _header(args) | {"threads": threads, "peers": []}
    for record in peers.compare(args, threads):
        result["peers"].append(record)
        _say(" | ".join(filter(None, peers.row(record).values())))
        _write_json(args.out / "peers.json", result)
    text = peers.markdown(result)
    replace(args.out / "peers.md", text.encode())
    print(text, f"written to {args.out}: peers.json, peers.md", sep="\n")
    if refused := [r for r in result["peers"] if r["status"].startswith("refused")]:
        raise cli.RunError(f"{len(refused)} comparisons refused, the results differ")


def _header(args: argparse.Namespace) -> dict[str, Any]:
    return environment() | {"flags": vars(args) | {"out": str(args.out)}}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write_json(path: Path, result: dict[str, Any]) -> None:
    replace(path, (json.dumps(result, indent=2) + "\n").encode())


# Modules.


def build_module(name: str, args: argparse.Namespace, **options: Any) -> Any:
    """The mechanism as `args` (dim, heads, causal, dtype) ask for it, in evaluation mode."""
    common = {"dim": args.dim, "num_heads": args.heads, "causal": args.causal, "dtype": args.dtype}
    module = attn_jax.build(name, rngs=nnx.Rngs(0), **common | options)
    module.eval()
    return module


def _tokens(length: int, args: argparse.Namespace) -> tuple[Array, Array]:
    """Inputs, and a cotangent of the outputs, `(1, L, D)`."""
    x, g = jax.random.normal(jax.random.key(1), (2, 1, length, args.dim)).astype(args.dtype)
    return x, g


def _apply_weights(module: Any, x: Array) -> Array:
    """What a `ProjectedAttention` computes, from its dense weights."""
    q, k, v = module.project(x, x)
    return module.out(jnp.einsum("bhlm,bmhe->blhe", module.mix_weights(q, k, None), v).reshape(x.shape))


def passes(graph: Any, call: Callable[..., Any] = operator.call) -> dict[str, Callable[..., Any]]:
    """What is measured, as functions of parameters, other variables, inputs and a cotangent of the outputs."""

    def forward(params: Any, rest: Any, x: Array, g: Array) -> Array:
        return call(nnx.merge(graph, params, rest), x)

    def with_backward(params: Any, rest: Any, x: Array, g: Array) -> Any:
        y, vjp = jax.vjp(lambda params, x: forward(params, rest, x, g), params, x)
        return y, vjp(g)

    return dict(zip(PASSES, (forward, with_backward)))


def check(name: str, args: argparse.Namespace) -> float | None:
    """How far values and gradients are from the dense version in float64; None if the mechanism has none."""
    mechanism, timed = attn_jax.MECHANISMS[name], build_module(name, args)
    call: Callable[..., Any]
    if "dense" in mechanism.implementations:
        dense, call = build_module(name, args, dtype=None, implementation="dense"), operator.call
    elif mechanism.weights and isinstance(timed, ProjectedAttention):
        dense, call = build_module(name, args, dtype=None), _apply_weights
    else:
        return None
    graph, *state = nnx.split(timed, nnx.Param, ...)
    tokens = _tokens(CHECK_LENGTH, args)
    ours = jax.jit(passes(graph)[PASSES[-1]])(*state, *tokens)
    with jax.enable_x64(True):
        exact = jax.jit(passes(nnx.graphdef(dense), call)[PASSES[-1]])
        # Not the largest one: a ReLU that rounding switches moves gradients of single tokens by whole units.
        return difference(ours, exact(*jax.tree.map(_to_float64, (*state, *tokens))), root_mean_square)


def _to_float64(x: Array) -> Array:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


# Measurements.


def _measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of a mechanism: a record per pass and length."""
    graph, *state = nnx.split(build_module(name, args), nnx.Param, ...)
    records = []
    for pass_name, function in passes(graph).items():
        seconds: dict[int, float] = {}
        for length in sorted({*args.lengths, *(rung for rung in LADDER if rung < args.lengths[-1])}):
            asked_for = length in args.lengths
            expected = predict(seconds, length)
            if expected > args.budget:
                measured: dict[str, Any] = {"status": f"skipped: predicted {number(expected)} s"}
            else:
                arrays = (*state, *_tokens(length, args))
                measured = _run(function, arrays, args.repeats if asked_for else 1, args.budget)
                seconds |= {length: measured["wall"]} if "wall" in measured else {}
            if asked_for:
                records.append({"mechanism": name, "length": length, "pass": pass_name} | measured)
                _say(f"  {length:>7} {pass_name:16}  {growth_report.cell(measured)}")
    return records


def predict(seconds: dict[int, float], length: int) -> float:
    """Seconds of a call from those of shorter lengths: grows as the last two do, after one quadratically."""
    if not seconds:
        return 0.0
    last = dict(sorted(seconds.items())[-2:])
    growth = exponent(last)
    return last[max(last)] * (length / max(last)) ** (2 if growth is None else max(growth, 1))


def _run(function: Callable[..., Any], arrays: tuple[Any, ...], repeats: int, budget: float) -> dict[str, Any]:
    compiled = jax.jit(function).lower(*arrays).compile()
    needed = temporary_bytes(compiled) + sum(x.nbytes for x in jax.tree.leaves(arrays))
    available = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0) or _physical_memory()
    if needed > available:
        return {"status": f"skipped: needs {needed / 2**30:.0f} GiB"}

    def call() -> None:
        jax.block_until_ready(compiled(*arrays))

    call()
    (samples,) = alternate([call], repeats, budget)
    measured = median(samples)._asdict() | {"repeats": len(samples), "temp_bytes": temporary_bytes(compiled)}
    return {"status": "ok"} | measured


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _approximation_errors(name: str, args: argparse.Namespace, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Relative RMS error against exact standard attention, by length and scale of queries and keys."""
    module = build_module(name, args, dtype=None)

    def relative_error(q: Array, k: Array, v: Array, scale: float) -> Array:
        rows = jnp.linspace(0, q.shape[1] - 1, SAMPLED_QUERIES).astype(int)
        seen = jnp.arange(q.shape[1]) <= rows[:, None] if args.causal else None
        exact = jax.nn.dot_product_attention(scale * q[:, rows], scale * k, v, mask=seen)
        error = module.mix(scale * q, scale * k, v, None)[:, rows] - exact
        return jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact**2))

    records, measure = [], jax.jit(relative_error)
    for length in lengths:
        qkv = jax.random.normal(jax.random.key(2), (3, 1, length, args.heads, args.dim // args.heads))
        for scale in SCALES:
            error = finite(float(measure(*qkv, scale)))
            records.append({"mechanism": name, "length": length, "scale": scale, "relative_rms_error": error})
    return records


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
