"""Compile every mechanism and a training step for GPUs and TPUs that are not there, and say what came of it.

  pip install -e '.[targets]'
  python -m eval.targets                                              # everything, into docs/targets.md and .json
  python -m eval.targets --targets h100,v5e --mechanisms standard     # some; other records in the file stay
  python -m eval.targets --quick                                      # two by two, small, into runs/targets.md
  python -m eval.targets --check                                      # are the kernels still as recorded?

Nothing runs: the vendors' own compilers translate the programs ahead of time. So this shows that a program
compiles, by which kernels, with how many registers, how much of it spilt, how much shared and temporary memory,
and which collectives; it shows neither that its results are right (the tests do) nor how fast it is.

Each target and mechanism is a process of its own (see `eval.aot`), `--jobs` of them at once. After each the
results are written; a command that was interrupted goes on where it was. What is recorded with other versions of
the compilers, other code or other lengths is compiled again.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import attn_jax
from eval import aot, target_report, vendors
from eval.measure import cores, replace
from eval.target_report import Entries, Entry, merged_kernels
from train import cli

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "targets.md"
LENGTHS = (1024, 16384, 262144)

# What the entries of each kind compile, as patterns of files.
_MECHANISMS = ("attn_jax/engine/*.py", "attn_jax/mechanisms/*.py", "attn_jax/positions.py", "pallas_kernels/*.py")
_STEP = ("attn_jax/models/transformer.py", "train/loop.py", "train/optimizer.py", "train/sharding.py",
         "train/state.py", "train/tasks/lra.py", "configs/lra_listops.py")  # fmt: skip
CODE = {"module": _MECHANISMS, "wide": _MECHANISMS, "dense": _MECHANISMS, "train": _MECHANISMS + _STEP}

# One of each engine: softmax attention and a recurrence.
STEPS = ("standard", "mamba")
DENSE = ("standard", "dual_kv")
# On GPUs also with wider heads, at the shortest length: no score, two streams, and scores with features.
WIDE = ("standard", "dual_kv", "gravitational", "multi_timescale")

QUICK: Mapping[str, Any] = {
    "targets": ["h100", "v5e"],
    "mechanisms": ["standard", "performer"],
    "lengths": [1024, 4096],
    "steps": [],
    "output": Path("runs/targets.md"),
}


def main(argv: list[str]) -> None:
    """Compiles what the command line `argv` (without the program) asks for."""
    args = _parse(argv)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        _check(args) if args.check else _record(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _record(args: argparse.Namespace) -> None:
    entries = _read(args.output.with_suffix(".json"))
    code = {kind: fingerprint(kind) for kind in CODE}  # before anybody changes it
    jobs = list(_jobs(args))
    todo = [job for job in jobs if not is_current(entries.get(job.key), job, code[job.kind])]
    _say(f"{len(jobs) - len(todo)} of {len(jobs)} are recorded in {args.output.with_suffix('.json')}")
    cli.make_folder(args.output.parent, "the folder of --output")
    for job, record in _compile_all(todo, args):
        entries[job.key] = _entry(job, record, code[job.kind])
        _write(args.output, entries, code)
    _write(args.output, entries, code)
    print(f"written to {args.output} and {args.output.with_suffix('.json')}")
    failed = [job.key for job in jobs if not target_report.succeeded(entries[job.key])]
    if failed:
        raise cli.RunError(f"{len(failed)} of {len(jobs)} did not compile: {', '.join(failed)}")


def _stop(signum: int, frame: Any) -> NoReturn:
    """Ends the command as the interrupt key does, which ends its processes."""
    raise cli.Interrupted("what is compiled is recorded; the same command goes on from there", signum)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m eval.targets", description=__doc__)
    add = parser.add_argument
    add(
        "--targets",
        type=_names(vendors.TARGETS),
        metavar="A,B",
        help=f"of {','.join(vendors.TARGETS)}; default: all",
    )
    add("--mechanisms", type=_names(attn_jax.MECHANISMS), metavar="A,B", help="default: all that are registered")
    add("--lengths", type=_lengths, metavar="N,M", help=f"tokens; default: {','.join(map(str, LENGTHS))}")
    add(
        "--steps", type=_names(attn_jax.MECHANISMS), metavar="A,B", help=f"in training; default: {','.join(STEPS)}"
    )
    add("--quick", action="store_true", help="a small selection; the options above change it")
    add("--check", action="store_true", help="compile the recorded kernels again; exit code 1 where one got worse")
    add("--jobs", type=int, default=cores(), help="processes at once (default: one per core, %(default)s)")
    add("--timeout", type=float, default=3600, metavar="S", help="seconds for a process (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="Markdown, JSON beside it; default: docs/targets.md")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.timeout <= 0:
        parser.error("--jobs and --timeout must be positive")
    named = args.mechanisms
    mechanisms = [name for name, m in attn_jax.MECHANISMS.items() if m.bidirectional]
    steps = [name for name in STEPS if named is None or name in named]
    defaults = {"mechanisms": mechanisms, "lengths": list(LENGTHS), "steps": steps, "output": DOCUMENT}
    for option, value in (defaults | dict(QUICK) if args.quick else defaults).items():
        if option != "targets" and getattr(args, option) is None:
            setattr(args, option, value)
    args.targets = _possible(args.targets or (QUICK["targets"] if args.quick else None))
    return args


def _names(known: Mapping[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            listing = ", ".join(known)
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(map(repr, unknown))}; there are {listing}")
        return names

    return parse


def _lengths(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected positive integers such as 1024,4096, got {text!r}")
    return sorted({int(part) for part in text.split(",")})


def _possible(asked_for: list[str] | None) -> list[str]:
    """The targets that can be compiled for; those that were asked for by name must be among them."""
    obstacles = {family: vendors.obstacle(family) for family in ("CUDA", "TPU")}
    names = asked_for or list(vendors.TARGETS)
    left = [name for name in names if obstacles[vendors.TARGETS[name].family] is None]
    reasons = dict.fromkeys(filter(None, (obstacles[vendors.TARGETS[name].family] for name in names)))
    if reasons and (asked_for or not left):
        raise cli.UsageError("; ".join(reasons))
    for reason in reasons:
        _say(f"left out: {reason}")
    return left


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _jobs(args: argparse.Namespace) -> Iterator[aot.Job]:
    # The longest first, so that no core waits for them at the end.
    for target in sorted(args.targets, key=lambda name: vendors.TARGETS[name].family, reverse=True):
        yield from (aot.Job(target, name, "train") for name in args.steps)
    for target in args.targets:
        for name in args.mechanisms:
            yield aot.Job(target, name, "module", tuple(args.lengths))
        yield from (
            aot.Job(target, name, "dense", tuple(args.lengths)) for name in DENSE if name in args.mechanisms
        )
        if vendors.TARGETS[target].family == "CUDA" and not args.quick:
            wide = [name for name in WIDE if name in args.mechanisms]
            yield from (aot.Job(target, name, "wide", tuple(args.lengths[:1])) for name in wide)


# Processes.


def _compile_all(jobs: Sequence[aot.Job], args: argparse.Namespace) -> Iterator[tuple[aot.Job, dict[str, Any]]]:
    """The records of `jobs` as they are finished."""
    processes = _Processes(args.timeout)
    with ThreadPoolExecutor(args.jobs) as executor:
        try:  # from the first process on
            running = {executor.submit(processes.run, job): job for job in jobs}
            for number, future in enumerate(as_completed(running), 1):
                record = future.result()
                _say(f"[{number}/{len(jobs)}] {running[future].key}: done")
                yield running[future], record
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            processes.close()


class _Processes:
    """Those that are running, which end with this one."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.running: set[subprocess.Popen[str]] = set()
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for process in list(self.running):
            process.kill()

    def run(self, job: aot.Job) -> dict[str, Any]:
        """What the process that compiles `job` found out, or how it ended if it did not say."""
        if self.closed:
            return {"status": "stopped"}
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            with subprocess.Popen(
                [sys.executable, "-m", "eval.aot", job.to_json()],
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process:
                self.running.add(process)
                if self.closed:  # meanwhile
                    process.kill()
                timer = threading.Timer(self.timeout, process.kill)
                timer.start()
                record = _listen(job, process)
                process.wait()
                late = not timer.is_alive()
                timer.cancel()
                self.running.discard(process)
            if record is not None:
                return record
            if late:
                return {"status": f"stopped after {self.timeout:.0f} s"}
            errors.seek(0)
            lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
            last = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")
            return {"status": f"the process ended with {process.returncode}: {last[:200]}"}


def _listen(job: aot.Job, process: subprocess.Popen[str]) -> dict[str, Any] | None:
    record = None
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue  # the compiler's own
        message = json.loads(line)
        record = message.get("record", record)
        if "progress" in message:
            _say(f"  {job.key}: {message['progress']}")
    return record


def environment() -> dict[str, str]:
    """Of the processes that compile."""
    return {**os.environ, **vendors.ENVIRONMENT}


# Records.


def is_current(entry: Entry | None, job: aot.Job, code: str) -> bool:
    """Whether a recorded entry is what `job` would find out again about `code`."""
    if entry is None or not target_report.finished(entry):
        return False
    same = {name: entry.get(name) for name in ("lengths", "versions", "code")}
    return same == {
        "lengths": list(job.lengths),
        "versions": vendors.versions(vendors.TARGETS[job.target].family),
        "code": code,
    }


def _entry(job: aot.Job, record: dict[str, Any], code: str) -> Entry:
    return {
        **dataclasses.asdict(job),
        "lengths": list(job.lengths),
        "date": datetime.date.today().isoformat(),
        "versions": vendors.versions(vendors.TARGETS[job.target].family),
        "code": code,
        **record,
    }


def fingerprint(kind: str) -> str:
    """Twelve hexadecimal digits of the code that an entry of `kind` compiles."""
    files = [file for pattern in CODE[kind] for file in sorted(ROOT.glob(pattern))]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> Entries:
    if not path.exists():
        return {}
    with cli.user_errors(OSError, ValueError):
        return json.loads(path.read_text())


def _write(output: Path, entries: Entries, code: Mapping[str, str]) -> None:
    order = {key: entries[key] for key in sorted(entries)}
    replace(output.with_suffix(".json"), (json.dumps(order, indent=1) + "\n").encode())
    replace(output, target_report.markdown(order, code).encode())


# The gate.


class Complaint(NamedTuple):
    """A kernel that is worse than recorded."""

    key: str
    what: str


def _check(args: argparse.Namespace) -> None:
    entries = _read(args.output.with_suffix(".json"))
    jobs = recorded_jobs(entries, args.targets, args.mechanisms)
    if not jobs:
        jax = vendors.versions("CUDA")["jax"]
        path = args.output.with_suffix(".json")
        raise cli.RunError(f"{path} holds no kernels compiled by JAX {jax}: run python -m eval.targets first")
    complaints, compared = [], 0
    for job, record in _compile_all(jobs, args):
        known, found = merged_kernels(entries[job.key]), merged_kernels(record)
        complaints += [Complaint(job.key, what) for what in worse(known, found, vendors.TARGETS[job.target])]
        compared += len(known)
    for complaint in complaints:
        _say(f"{complaint.key}: {complaint.what}")
    if complaints:
        raise cli.RunError(f"{len(complaints)} complaints about {compared} kernels")
    print(f"{compared} kernels of {len(jobs)} mechanisms and targets are as recorded, or better")


def recorded_jobs(entries: Entries, targets: Sequence[str], mechanisms: Sequence[str]) -> list[aot.Job]:
    """Compilations, at the shortest length, of what is recorded with kernels by the installed JAX."""
    return [
        aot.Job(entry["target"], entry["mechanism"], "module", tuple(entry["lengths"][:1]))
        for entry in entries.values()
        if entry["kind"] == "module"
        and entry["target"] in targets
        and entry["mechanism"] in mechanisms
        and entry["versions"]["jax"] == vendors.versions("CUDA")["jax"]
        and merged_kernels(entry)
    ]


def worse(recorded: Mapping[str, Any], found: Mapping[str, Any], target: vendors.Target) -> list[str]:
    """Complaints about kernels `found`, by name, beside those `recorded`; none if all are there and no larger."""
    complaints = [f"{name} is missing" for name in recorded if name not in found]
    complaints += [f"{name} is not recorded" for name in found if name not in recorded]
    if not recorded:
        complaints.append("no kernel is recorded")
    for name in recorded.keys() & found.keys():
        for quantity in ("registers", "spill_bytes", "serialised", "shared_memory"):
            before, now = recorded[name].get(quantity), found[name].get(quantity)
            if before is None or now is None:
                if isinstance(target, vendors.Gpu):
                    complaints.append(f"{name}: {quantity} is unknown")
            elif now > before:
                complaints.append(f"{name}: {quantity} {now}, recorded {before}")
        used = found[name].get("shared_memory", 0)
        if isinstance(target, vendors.Gpu) and used > target.shared_memory:
            complaints.append(
                f"{name}: shared_memory {used} is more than {target.name} has, {target.shared_memory}"
            )
    return complaints


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
