"""What the benchmarks share: times, differences, tables, files, and what all of it ran on."""

import argparse
import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

PASSES = ("forward", "forward+backward")


def lengths(text: str) -> list[int]:
    """The value of a command-line option such as `1024,4096`, in ascending order."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 1024,4096, got {text!r}")
    return sorted({int(part) for part in text.split(",")})


class Time(NamedTuple):
    """Seconds of a call: on the wall, and of all of the process's threads together on their cores."""

    wall: float
    cpu: float


def alternate(calls: Sequence[Callable[[], Any]], repeats: int, budget: float) -> list[list[Time]]:
    """Times warm calls A B A B ...: `repeats` rounds, fewer once `budget` seconds are spent, at least one."""
    samples: list[list[Time]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    for n in range(repeats):
        if n and time.perf_counter() > end:
            break
        for call, mine in zip(calls, samples):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            mine.append(Time(time.perf_counter() - wall, time.process_time() - cpu))
    return samples


def median(samples: Iterable[Time]) -> Time:
    return Time(*map(statistics.median, zip(*samples)))


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x)))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def difference(ours: Any, reference: Any, size: Callable[[np.ndarray], float] = largest) -> float:
    """How far two trees of arrays differ: the worst array's `size` of the difference relative to its own.

    An array whose size is below a thousandth of the largest of the tree is compared with that: what is zero but
    for rounding has no relative error. NaN where anything is NaN.
    """
    pairs = [np.asarray(x, np.float64) for tree in (ours, reference) for x in jax.tree.leaves(tree)]
    ours, reference = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    sizes = [size(b) for b in reference]
    floor = max(max(sizes) / 1000, np.finfo(np.float64).tiny)
    return float(np.max([size(a - b) / max(s, floor) for a, b, s in zip(ours, reference, sizes)]))


def finite(value: float) -> float | None:
    """For JSON, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def exponent(points: Mapping[int, float]) -> float | None:
    """The `p` of the least-squares fit `value = c length^p`; None for fewer than two positive values."""
    points = {length: value for length, value in points.items() if value > 0}
    if len(points) < 2:
        return None
    return float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])


def temporary_bytes(compiled: Any) -> int:
    """The peak of what a compiled function allocates besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """The machine and the versions that a measurement is about, as JSON."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute, before anything was measured
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def conditions(result: Mapping[str, Any]) -> str:
    """What a result that holds `environment` and the command's flags was measured on, in two lines."""
    flags = result["flags"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['device']}, {result['cores']} cores, load {result['load']} before; {versions}.\n"
        f"Batch 1, width {flags['dim']}, {flags['heads']} heads, {flags['dtype']}, causal={flags['causal']};"
        f" medians of {flags['repeats']} warm calls, of fewer where they take more than {flags['budget']:g} s."
    )


def number(value: float | None) -> str:
    """Three digits, as in 0.0123, 1.23, 123 and 12,300."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table that is also aligned for the eye."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in lines)


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that `path` never holds half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
