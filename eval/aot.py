"""One mechanism, or one training step, compiled for one target in a process of its own.

  python -m eval.aot '{"target": "h100", "mechanism": "standard", "lengths": [1024], ...}'

A process of its own, because the compiler for GPUs keeps what it has compiled by the hash of a kernel, whatever
the architecture, and because an instruction that an architecture lacks can abort it. `eval.targets` starts these
processes; what they find out comes as lines of JSON on the standard output, `{"progress": TEXT}` for each program
that was compiled and `{"record": ...}` at the end.

The evidence is what the compilers say: XLA of the optimised program (which kernels and collectives are in it, what
it allocates), ptxas of each kernel (registers, spills), Mosaic (shared memory), and nvdisasm (instructions).
"""

import json
import math
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# The layout of a mechanism that is compiled: one sequence, 8 heads of 64, bfloat16.
SETTINGS = Namespace(dim=512, heads=8, causal=False, dtype="bfloat16")
WIDE_HEADS = 4  # as many of twice the width, the largest that kernels take

# The training step: ListOps at the published width and length, but of two layers.
MESH = {"data": 4, "fsdp": 1, "tensor": 2}
LAYERS = 2

MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
COPY = ("LDGSTS", "UTMALDG", "UTMASTG")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Job:
    """What one process compiles.

    Attributes:
      target: a key of `eval.vendors.TARGETS`.
      mechanism: a key of `attn_jax.MECHANISMS`.
      kind: the module alone, with the default implementation ("wide": and wider heads) or the dense one, or a
        training step around it.
      lengths: numbers of tokens; a training step has its own.
    """

    target: str
    mechanism: str
    kind: str = "module"
    lengths: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return " ".join((self.target, self.mechanism, self.kind))

    def to_json(self) -> str:
        """The command-line argument of the process that does it."""
        return json.dumps(asdict(self))


def main(argv: list[str]) -> None:
    """Compiles what the JSON `argv[0]` says, see `Job`."""
    fields = json.loads(argv[0])
    job = Job(**fields | {"lengths": tuple(fields["lengths"])})
    record = _compile_step(job) if job.kind == "train" else _compile_module(job)
    _send(record=record)


def _send(**message: Any) -> None:
    print(json.dumps(message), flush=True)


# Modules.


def _compile_module(job: Job) -> dict[str, Any]:
    import jax
    from flax import nnx

    import attn_jax
    from eval.benchmark import build_module, passes
    from eval.vendors import TARGETS

    device = TARGETS[job.target].topology().devices[0]
    options: dict[str, Any] = {"implementation": "dense"} if job.kind == "dense" else {}
    options |= {"num_heads": WIDE_HEADS} if job.kind == "wide" else {}
    module = nnx.eval_shape(lambda: build_module(job.mechanism, SETTINGS, **options))
    graph, *state = nnx.split(module, nnx.Param, ...)
    here = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.as_pure(tuple(state))
    )
    functions = passes(graph)
    if job.kind == "dense":  # only its memory is asked for
        functions = dict(list(functions.items())[-1:])
    compiled: list[dict[str, Any]] = []
    for name, function in functions.items():
        # One length tells whether a forward pass compiles; what both passes need is told for each.
        for length in job.lengths if name == list(functions)[-1] else job.lengths[:1]:
            tokens = jax.ShapeDtypeStruct((1, length, SETTINGS.dim), SETTINGS.dtype, sharding=here)
            with dumped() as folder, jax.default_device(device):
                found = _compile(jax.jit(function), (*arguments, tokens, tokens), folder)
            compiled.append({"pass": name, "length": length} | found)
            _send(progress=f"{length:,} {name}: {_summary(found)}")
    return {"memory": attn_jax.MECHANISMS[job.mechanism].memory, "programs": compiled}


def _compile(function: Any, arguments: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    start = _processor_seconds()
    try:
        compiled = function.lower(*arguments).compile()
    except Exception as error:  # whatever a compiler says is a result
        return {"status": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "status": "ok",
        "processor_seconds": round(_processor_seconds() - start, 1),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": kernels(compiled.as_text(), folder),
    }


def _processor_seconds() -> float:
    """Spent by this process and those it started, whatever else the machine does."""
    return sum(os.times()[:4])


def _summary(found: Mapping[str, Any]) -> str:
    if found["status"] != "ok":
        return found["status"]
    path = ", ".join(found["kernels"]) or "XLA"
    return f"{path}, {found['temp_bytes'] / 2**20:,.2f} MiB, {found['processor_seconds']:.0f} s of a core"


@contextmanager
def dumped() -> Iterator[Path]:
    """Mosaic leaves what it and ptxas say of kernels compiled inside in a folder; 20 MB for each of them."""
    import jax.experimental.mosaic.gpu  # noqa: F401  (it sets the variable that is replaced here)

    from eval.vendors import disassembler_root

    if root := disassembler_root():
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(root)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]


# What the compilers say of kernels.


def kernels(program: str, folder: Path) -> dict[str, dict[str, Any]]:
    """By name, the fused kernels of an optimised program, with what Mosaic's dumps in `folder` say of them.

    Each has its number of `calls` (in a loop: of the loop's body), the `flops`, `exponentials` and `bytes` that
    `launch` was told for all of them together, and the largest of its variants' `registers`, `spill_bytes`,
    `shared_memory` and `instructions`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, cost in _kernel_calls(program):
        kernel = found.setdefault(name, {"calls": 0, "flops": 0, "exponentials": 0, "bytes": 0})
        for key, value in ({"calls": 1} | cost).items():
            kernel[key] += value
    for path in sorted(folder.iterdir()):
        name = re.sub(r"_\d+\..*", "", path.name)
        if name not in found:
            continue  # of a kernel that the program does not call after all
        match path.name.partition(".")[2]:
            case "ptxas":
                resources: Mapping[str, Any] = ptxas_resources(path.read_text())
            case "resources.txt":
                resources = {"shared_memory": shared_memory(path.read_text())}
            case "sass_ctrl":
                resources = {"instructions": instructions(path.read_text())}
            case _:
                continue
        found[name] = largest(found[name], resources)
    return found


_CALL = re.compile(r'custom_call_target="(?:mosaic_gpu|tpu_custom_call)[^"]*".*?op_name="([^"]*)"(.*)')
_COST = re.compile(r'cost_estimate_json = "((?:[^"\\]|\\.)*)"')


def _kernel_calls(program: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Name and claimed cost of each call of a kernel; 0 where JAX does not pass it on (before 0.12)."""
    for operation, rest in _CALL.findall(program):
        # .../attention_forward/mpmd_map: the kernel's name is the scope of the primitive that calls it.
        scopes = operation.split("/")
        cost = {"flops": 0, "exponentials": 0, "bytes": 0}
        if claimed := _COST.search(rest):
            given = json.loads(claimed[1].replace("\\22", '"'))
            names = ("flops", "transcendentals", "bytes_accessed")
            cost = dict(zip(cost, (given[name] for name in names)))
        yield scopes[-2] if len(scopes) > 1 else scopes[-1], cost


_USED = re.compile(
    r"Function properties for (\S+).*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def ptxas_resources(log: str) -> dict[str, int]:
    """Registers, and bytes spilt and read back, of the kernels in a log of `ptxas -v`: the largest.

    Raises:
      ValueError: the log names no kernel.
    """
    used = _USED.findall(log)
    if not used:
        raise ValueError(f"not a log of ptxas -v: {log[:200]!r}")
    return {
        "registers": max(int(registers) for *_, registers in used),
        "spill_bytes": max(int(stores) + int(loads) for _, stores, loads, _ in used),
        # C7512 says that matrix instructions wait for each other because there are too few registers.
        "serialised": int("C7512" in log),
    }


def shared_memory(resources: str) -> int:
    """Bytes, of what Mosaic prints of a kernel's resources."""
    found = re.search(r"smem_scratch_bytes=(\d+)", resources)
    if not found:
        raise ValueError(f"no resources of a Mosaic kernel: {resources[:200]!r}")
    return int(found[1])


def instructions(sass: str) -> dict[str, int]:
    """How often the instructions that multiply matrices and that copy tiles stand in a kernel's machine code."""
    counted = Counter(re.findall(r"\*/ +(?:@!?U?P\w+ +)?([A-Z0-9]+)", sass))
    return {name: counted[name] for name in (*MATRIX, *COPY) if counted[name]}


def largest(ours: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Of nested numbers in both, the larger one; of those in one of them, that one."""

    def larger(a: Any, b: Any) -> Any:
        return largest(a, b) if isinstance(b, Mapping) else max(a, b)

    return {**ours, **{key: larger(ours[key], value) if key in ours else value for key, value in other.items()}}


# Training steps.


def _compile_step(job: Job) -> dict[str, Any]:
    import jax

    from eval.vendors import DEVICES, TARGETS
    from train import sharding

    jax.config.update("jax_num_cpu_devices", DEVICES)  # whose mesh the state is described on, before it moves
    config = _step_config(job.mechanism)
    devices = TARGETS[job.target].topology().devices
    with sharding.activate(config) as host:
        mesh = jax.sharding.Mesh(devices_like(host, devices), host.axis_names, axis_types=host.axis_types)
        step, arguments, length = _abstract_step(config, host, mesh)
        with dumped() as folder, jax.default_device(devices[0]), jax.set_mesh(mesh):
            start = _processor_seconds()
            try:
                compiled = step.lower(*arguments).compile()
            except Exception as error:  # whatever a compiler says is a result
                return {"status": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            text = compiled.as_text()
            found = {
                "status": "ok",
                "processor_seconds": round(_processor_seconds() - start, 1),
                "length": length,
                "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "kernels": kernels(text, folder),
                "collectives": collectives(text),
                "gathered": gathered(text, shapes_of_variables(arguments[0]), tuple(MESH.values())),
            }
    _send(progress=f"train step: {_summary(found)}")
    return found


def devices_like(host: Any, devices: Iterable[Any]) -> Any:
    """`devices` as an array of the shape of the mesh `host`."""
    import numpy as np

    return np.array(list(devices)[: host.size]).reshape(tuple(host.shape.values()))


def _step_config(mechanism: str) -> Any:
    from train.config import load

    config = load(f"{Path(__file__).parent.parent / 'configs' / 'lra_listops.py'}:paper,{mechanism}", [])
    # A few short lists, padded to the published length: only shapes matter.
    generator = {"num_train": config.batch_size, "num_val": 8, "num_test": 8, "min_length": 10, "max_length": 127}
    config.update(dtype=SETTINGS.dtype, mesh=MESH, model={"num_layers": LAYERS}, task={"generator": generator})
    return config


def _abstract_step(config: Any, host: Any, mesh: Any) -> tuple[Any, tuple[Any, Any], int]:
    """The compiled-to-be step on `mesh`, its arguments as shapes there, and the length of a sequence."""
    import jax

    from train import optimizer, sharding, state, tasks
    from train.loop import make_train_step

    def move(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    task = tasks.prepare(config)
    model = state.define(task, host)
    rate = optimizer.schedule(config.optimizer, config.steps)
    decayed = optimizer.decayed(model.variables, config.optimizer.no_decay)
    adamw = optimizer.create(config.optimizer, rate, decayed)
    described = state.abstract_train_state(model, adamw, host)
    abstract = jax.tree.map(lambda leaf: move(leaf, leaf.sharding.spec), described)
    step = make_train_step(task, model, adamw, rate, config.aux_weight, state.shardings_of(abstract))
    batch = next(task.train_iterator(config.seed))
    placed = jax.tree.map(lambda leaf: move(leaf, sharding.BATCH), dict(batch))
    return step, (abstract, placed), batch["tokens"].shape[1]


_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


def collectives(program: str) -> dict[str, int]:
    """How often each kind of collective stands in an optimised program; one that moves several arrays is one."""
    counted = Counter(name for _, name, _ in _COLLECTIVE.findall(program))
    return {name: counted[name] for name in COLLECTIVES if counted[name]}


def gathered(program: str, variables: set[tuple[int, ...]], parts: Iterable[int]) -> dict[str, dict[str, int]]:
    """The arrays that are gathered from several devices, counted by type and shape.

    Those whose shape, before or after, is one of `variables` (whole, or a device's part) belong to the state of
    training: `{"state": {...}, "activations": {...}}`. `parts`: the sizes of the mesh.
    """
    divisors = {math.prod(axes) for axes in _subsets(tuple(parts))}
    found: dict[str, Counter[str]] = {"state": Counter(), "activations": Counter()}
    for types, name, started in _COLLECTIVE.findall(program):
        if name != "all-gather":
            continue
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
        for kind, text in arrays[len(arrays) // 2 :] if started else arrays:  # started: operands, then results
            shape = tuple(int(size) for size in text.split(",") if size)
            before = (
                (*shape[:axis], size // n, *shape[axis + 1 :])
                for axis, size in enumerate(shape)
                for n in divisors
                if size % n == 0
            )
            known = any(_plain(candidate) in variables for candidate in (shape, *before))
            found["state" if known else "activations"][f"{kind}[{text}]"] += 1
    return {name: dict(counted) for name, counted in found.items()}


def shapes_of_variables(state: Any) -> set[tuple[int, ...]]:
    """Shapes of the arrays in a training state and of what one device holds of them, for `gathered`."""
    import jax

    leaves = jax.tree.leaves(state)
    return {_plain(shape) for x in leaves for shape in (x.shape, x.sharding.shard_shape(x.shape))}


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one element, which compilers add and remove, and in an order of no meaning."""
    return tuple(sorted(size for size in shape if size > 1))


def _subsets(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for rest in _subsets(sizes[1:]):
        yield rest
        yield (sizes[0], *rest)


if __name__ == "__main__":
    main(sys.argv[1:])
