"""A grid of training runs: each cell a process of its own, resumable, several at once, here or elsewhere."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from eval.measure import cores
from train import cli
from train import config as configs
from train.workdir import read_json

ROOT = Path(__file__).parent.parent.parent

# What a run of the grids takes at its peak, with room.
MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      name: of its work directory, unique in the grid.
      config: `configs/<file>.py:<variant>`.
      overrides: settings, `key=value` without the leading `--config.`.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Of `python -m train`, without the work directory."""
        return ["--config", self.config, *(f"--config.{override}" for override in self.overrides)]

    def load(self) -> configs.Config:
        """The config that `python -m train` makes of them."""
        return configs.load(self.config, [f"--config.{override}" for override in self.overrides])


@dataclass(frozen=True)
class Experiment:
    """A documented grid.

    Attributes:
      cells: the runs, for a list of seeds.
      measure: measures below a folder what needs a quiet machine, after all runs.
      report: what is there below a folder, of these seeds, as Markdown.
    """

    cells: Callable[[Sequence[int]], list[Cell]]
    measure: Callable[[Path], None]
    report: Callable[[Path, Sequence[int]], str]


def default_processes() -> int:
    """One for each core, as far as the memory goes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores(), memory // MEMORY))


def result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """What a finished cell found, None while it is not finished."""
    path = out / cell.name / "result.json"
    return read_json(path, "delete the folder to run it again") if path.exists() else None


def unfinished(out: Path, cells: Sequence[Cell]) -> list[Cell]:
    """Those of `cells` that have no result below `out` yet."""
    return [cell for cell in cells if result(out, cell) is None]


def conditions(results: Sequence[Mapping[str, Any]]) -> str:
    """Baselines, cost and versions of finished runs of one task, in a line."""
    first = results[0]
    baselines = ", ".join(f"{name} {value:.4f}" for name, value in first["baselines"].items())
    hours = sum(r["seconds_per_step"] * r["steps"] + r["compile_seconds"] for r in results) / 3600
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"Baselines: {baselines}. All steps together: {hours:.1f} core hours. {versions}."


class Engine(Protocol):
    """Where the runs of a grid take place.

    Attributes:
      at_once: how many calls of `run` it wants at the same time.
    """

    at_once: int

    def run(self, cell: Cell) -> str | None:
        """Runs `cell` to its end, or goes on with it; None, or what went wrong."""
        ...

    def stop(self) -> None:
        """Ends what is running, which saves first."""
        ...


def run_all(cells: Sequence[Cell], engine: Engine, finished: Callable[[], Any]) -> list[str]:
    """Runs `cells` on `engine`, and calls `finished` after each.

    SIGTERM and SIGINT stop the running ones, each after saving.

    Returns:
      The cells that failed, each with the last line it said.

    Raises:
      Interrupted: by a signal.
    """
    failed = []
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    with ThreadPoolExecutor(engine.at_once) as executor, tqdm(total=len(cells), unit="run", disable=None) as bar:
        try:  # from the first run on
            running = {executor.submit(engine.run, cell): cell for cell in cells}
            for future in as_completed(running):
                cell, problem = running[future], future.result()
                if problem is not None:
                    failed.append(f"{cell.name}: {problem}")
                bar.update()
                bar.write(f"{cell.name}: {problem or 'done'}", file=sys.stderr)
                finished()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            engine.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
    return failed


def _stop(signum: int, frame: Any) -> NoReturn:
    raise cli.Interrupted("what is finished is kept; the same command goes on from there", signum)


class LocalEngine:
    """Runs on this machine, `processes` at once, each on a core that no other of them uses."""

    def __init__(self, out: Path, processes: int):
        self.out, self.at_once = out, processes
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.free: queue.Queue[int | None] = queue.Queue()
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
        for index in range(processes):
            # Without a core each, the system may place them as it likes.
            self.free.put(usable[index] if processes <= len(usable) else None)

    def stop(self) -> None:
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        for process in list(self.running):
            process.wait()

    def run(self, cell: Cell) -> str | None:
        if self.stopped:
            return "stopped"
        core = self.free.get()
        try:
            process = start(cell, self.out)
            self.running.add(process)
            if core is not None:
                os.sched_setaffinity(process.pid, {core})  # before it starts threads, which inherit this
            if self.stopped:  # meanwhile
                process.terminate()
            problem = wait(cell, self.out, process)
            self.running.discard(process)
        finally:
            self.free.put(core)
        return problem


def start(cell: Cell, out: Path) -> subprocess.Popen[bytes]:
    """`python -m train` of `cell` in a work directory below `out`, what it says in a file beside it."""
    with _log(cell, out).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "train", *cell.arguments(), "--workdir", out / cell.name],
            cwd=ROOT,
            # Runs that differ in their seed are one program, which is compiled once.
            env=os.environ
            | {
                "JAX_COMPILATION_CACHE_DIR": str((out / "compiled").absolute()),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the interrupt key reaches this process, which passes it on
        )


def wait(cell: Cell, out: Path, process: subprocess.Popen[bytes]) -> str | None:
    """Waits for a process of `start`; None, or what went wrong."""
    code, log = process.wait(), _log(cell, out)
    return None if code == 0 else f"{_last_line(log)} (exit code {code}, see {log})"


def _log(cell: Cell, out: Path) -> Path:
    return out / f"{cell.name}.log"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"
