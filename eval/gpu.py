"""The fused kernels on a real GPU: their tests, then their times beside those of JAX's own attention.

  python -m eval.gpu
  python -m eval.gpu --lengths 4096,16384 --skip-tests

Runs `tests/test_kernel_*.py` with the kernels compiled for the GPU at hand instead of interpreted. Then times the
operations in bfloat16, forward and with the backward pass, each beside its portable path and, where there is one,
`jax.nn.dot_product_attention` by XLA and by cuDNN, and tokamax if that is installed. Writes
`gpu_<date>_<device>.json` and `.md`, with the versions that they are about.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_jax import ops
from eval.measure import PASSES, alternate, environment, lengths, median, number, replace, table, temporary_bytes
from train import cli

TESTS = Path(__file__).parent.parent / "tests"
WINDOW, STATES, CODES, TIMESCALES = 128, 16, 512, 3
# Calls that follow one another without a pause: a GPU's queue hides what starting one of them costs.
CALLS = 10


def main(argv: list[str]) -> None:
    """Tests and measures as the command line `argv` (without the program) says."""
    args = _parse(argv)
    if jax.default_backend() != "gpu":
        raise cli.RunError(
            f"no NVIDIA GPU: JAX found {jax.devices()[0].platform.upper()}. Run this on a machine with one, "
            "after pip install -e '.[cuda12,test]' (or cuda13) and without JAX_PLATFORMS=cpu"
        )
    tests = None if args.skip_tests else run_tests()
    result = environment() | {
        "date": datetime.date.today().isoformat(),
        "flags": vars(args) | {"out": str(args.out)},
    }
    result |= {"plugin": _plugin(), "tests": tests, "times": []}
    device = re.sub(r"\W+", "-", result["device"]).strip("-").lower()
    stem = args.out / f"gpu_{result['date']}_{device}"
    with cli.user_errors(OSError):
        cli.make_folder(args.out, "--out")
        for record in measure(args):
            result["times"].append(record)
            print(" | ".join(row(record).values()), file=sys.stderr, flush=True)
            replace(stem.with_suffix(".json"), (json.dumps(result, indent=2) + "\n").encode())
    text = markdown(result)
    replace(stem.with_suffix(".md"), text.encode())
    print(text, f"written to {stem}.json and .md", sep="\n")
    if tests is not None and tests["failed"]:
        raise cli.RunError(f"{tests['failed']} tests of the kernels failed on this GPU")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m eval.gpu", description=__doc__)
    add = parser.add_argument
    add("--lengths", type=lengths, metavar="N,M", default=[1024, 4096, 16384], help="default: 1024,4096,16384")
    add("--batch", type=int, default=4, help="default: %(default)s")
    add("--heads", type=int, default=16, help="default: %(default)s")
    add("--width", type=int, default=64, help="of a head (default: %(default)s)")
    add("--repeats", type=int, default=10, help=f"times {CALLS} calls; the median counts (default: %(default)s)")
    add("--skip-tests", action="store_true", help="only the times")
    add("--out", type=Path, metavar="DIR", default=Path("docs"), help="default: %(default)s")
    return parser.parse_args(argv)


def _plugin() -> dict[str, str]:
    names = ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tokamax")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def run_tests() -> dict[str, Any]:
    """Outcome of the tests of the kernels, compiled for the default GPU, in a process of their own."""
    files = sorted(map(str, TESTS.glob("test_kernel_*.py")))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", *files]
    environ = os.environ | {"ATTN_JAX_KERNELS": "gpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    finished = subprocess.run(command, env=environ, cwd=TESTS.parent, text=True, capture_output=True)
    print(finished.stdout, finished.stderr, sep="\n", file=sys.stderr)
    return outcome(finished.stdout, finished.returncode)


def outcome(output: str, code: int) -> dict[str, Any]:
    """Numbers from the last line of pytest's `output`; a run that did not get that far counts as one failure."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return {
        "passed": counts.get("passed", 0),
        "failed": failed or int(code != 0),
        "skipped": counts.get("skipped", 0),
        "failures": re.findall(r"^FAILED (\S+)", output, re.MULTILINE),
    }


# What is timed.


class Case(NamedTuple):
    """An operation on bfloat16 arrays.

    Attributes:
      name: of the operation, with what distinguishes this use of it.
      arrays: float arrays, all differentiated.
      ours: a function of `implementation` and the arrays.
      others: by what they are called, functions of the arrays.
      flops: of the matrix products of a forward pass; 0 where there are none.
    """

    name: str
    arrays: tuple[jax.Array, ...]
    ours: Callable[..., jax.Array]
    others: dict[str, Callable[..., jax.Array]]
    flops: float


def cases(length: int, args: argparse.Namespace) -> Iterator[Case]:
    """What is measured at `length`."""
    shape = args.batch, length, args.heads, args.width
    q, k, v, k2, v2 = (x for x in jax.random.normal(jax.random.key(0), (5, *shape), jnp.bfloat16))
    pairs = args.batch * args.heads * length**2
    products = 4.0 * pairs * args.width
    for causal in (False, True):
        form = " causal" if causal else ""
        half = 0.5 if causal else 1

        def standard(implementation: Any, q: Any, k: Any, v: Any, causal: bool = causal) -> Any:
            return ops.standard_attention(q, k, v, causal=causal, implementation=implementation)

        def dual(implementation: Any, *arrays: Any, causal: bool = causal) -> Any:
            return ops.dual_kv_attention(*arrays, causal=causal, implementation=implementation)

        yield Case(f"standard{form}", (q, k, v), standard, _others(causal=causal), half * products)
        yield Case(f"dual_kv{form}", (q, k, v, k2, v2), dual, {}, 2 * half * products)

    def local(implementation: Any, q: Any, k: Any, v: Any) -> Any:
        return ops.local_attention(q, k, v, window=WINDOW, implementation=implementation)

    seen = min(1.0, (2 * WINDOW + 1) / length)
    yield Case(f"local {WINDOW}", (q, k, v), local, _others(local_window_size=WINDOW), seen * products)

    log_mass = jnp.zeros(shape[:3], jnp.float32)

    def gravity(implementation: Any, q: Any, k: Any, v: Any, log_mass: Any) -> Any:
        return ops.gravitational_attention(
            q, k, v, log_mass, power=2.0, softening=0.5, implementation=implementation
        )

    yield Case("gravitational", (q, k, v, log_mass), gravity, {}, products)

    x = jax.random.normal(jax.random.key(1), (args.batch, length, args.heads * args.width), jnp.bfloat16)
    delta = jnp.full(x.shape, 0.1, jnp.float32)
    a = -jnp.broadcast_to(jnp.arange(1.0, STATES + 1), (x.shape[2], STATES))
    b, c = jax.random.normal(jax.random.key(2), (2, args.batch, length, STATES))

    def scan(implementation: Any, u: Any, delta: Any, a: Any, b: Any, c: Any) -> Any:
        return ops.selective_scan(u, delta, a, b, c, jnp.ones(x.shape[2]), implementation=implementation)[0]

    yield Case("selective scan", (x, delta, a, b, c), scan, {}, 0.0)


def _others(**options: Any) -> dict[str, Callable[..., Any]]:
    """JAX's own attention by XLA and by cuDNN, and tokamax's, with the options of the former."""

    def jax_nn(q: Any, k: Any, v: Any, implementation: Any) -> Any:
        named = {"is_causal" if name == "causal" else name: value for name, value in options.items()}
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **named)

    others: dict[str, Callable[..., Any]] = {
        f"jax.nn {name}": functools.partial(jax_nn, implementation=name) for name in ("xla", "cudnn")
    }
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        named = {"is_causal" if name == "causal" else name: value for name, value in options.items()}
        others["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, **named)
    return others


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record per case, length and pass, the contenders timed alternately."""
    for length in args.lengths:
        for case in cases(length, args):
            contenders = {
                "kernel": functools.partial(case.ours, "mosaic"),
                "portable": functools.partial(case.ours, "xla"),
                **case.others,
            }
            for name in PASSES:
                yield {"case": case.name, "length": length, "pass": name} | _compare(case, contenders, name, args)


def _compare(case: Case, contenders: dict[str, Any], name: str, args: argparse.Namespace) -> dict[str, Any]:
    calls, status = {}, {}
    for contender, function in contenders.items():
        try:
            call, memory = _prepare(function, case.arrays, backward=name == PASSES[1])
        except Exception as error:  # out of memory, or a case that another library does not take
            status[contender] = {"status": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
        else:
            calls[contender] = call
            status[contender] = {"status": "ok", "temp_bytes": memory}
    for contender, samples in zip(calls, alternate(list(calls.values()), args.repeats, float("inf"))):
        status[contender]["seconds"] = median(samples).wall / CALLS
    return {"flops": case.flops * (3.5 if name == PASSES[1] else 1), "contenders": status}


def _prepare(
    function: Callable[..., Any], arrays: tuple[Any, ...], backward: bool
) -> tuple[Callable[[], None], int]:
    """A warm call, and the memory that it needs besides arguments and results."""

    def loss(*arrays: Any) -> Any:
        return function(*arrays).astype(jnp.float32).sum()

    timed = jax.grad(loss, tuple(range(len(arrays)))) if backward else function
    compiled = jax.jit(timed).lower(*arrays).compile()

    def call() -> None:
        jax.block_until_ready([compiled(*arrays) for _ in range(CALLS)][-1])

    call()
    return call, temporary_bytes(compiled)


def row(record: dict[str, Any]) -> dict[str, str]:
    """A record as a row of the table: milliseconds, and the kernel's rate."""
    cells = {"operation": record["case"], "length": f"{record['length']:,}", "pass": record["pass"]}
    for name, found in record["contenders"].items():
        cells[f"{name}, ms"] = number(1e3 * found["seconds"]) if "seconds" in found else found["status"]
    kernel = record["contenders"]["kernel"]
    if record["flops"] and "seconds" in kernel:
        cells["kernel, TFLOP/s"] = number(record["flops"] / kernel["seconds"] / 1e12)
    return cells


def markdown(result: dict[str, Any]) -> str:
    """The report of a run."""
    flags, tests = result["flags"], result["tests"]
    versions = ", ".join(f"{name} {version}" for name, version in (result["versions"] | result["plugin"]).items())
    tested = (
        "The tests of the kernels were not run."
        if tests is None
        else f"Tests of the kernels on this device: {tests['passed']} passed, {tests['failed']} failed, "
        f"{tests['skipped']} skipped."
    )
    if tests and tests["failures"]:
        tested += " Failed: " + ", ".join(tests["failures"]) + "."
    return (
        f"# The kernels on {result['device']}, {result['date']}\n\n{versions}.\n\n{tested}\n\n"
        f"bfloat16, batch {flags['batch']}, {flags['heads']} heads of {flags['width']}; medians of "
        f"{flags['repeats']} samples of {CALLS} calls, the contenders alternating. TFLOP/s counts the products "
        "that the operation needs, 2.5 times those of the forward pass in the backward one.\n\n"
        f"{table([row(record) for record in result['times']])}\n"
    )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
