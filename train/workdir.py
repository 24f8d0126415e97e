"""The work directory of a run: all that evaluation and reports read, and what a repeated command resumes from.

config.json         the settings of the run
metrics.jsonl       a record per line: {"step", "split", metrics...}
events.out.*        the same for TensorBoard
checkpoints/        `last` to resume from, `best` to evaluate
result.json         at the end: test metrics of the best checkpoint, baselines, costs, versions
test_examples.json  by metric, the value of each test example, in the order of the task's batches
"""

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from train import processes
from train.cli import UsageError, make_folder
from train.config import Config, differing_keys, to_dict

_VISIBLE = 10  # seconds after which what one host wrote to a shared file system is seen by all


@contextmanager
def open_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Makes `workdir` this run's own and records `config` in it, for as long as the body runs.

    Raises:
      UsageError: it cannot be written, another run uses it, it holds a run with other settings, or not all
        processes of this run see it.
    """
    with ExitStack() as stack:
        token = uuid.uuid4().hex
        with processes.together():
            if processes.first():
                stack.enter_context(_own(workdir, config, token))
        token = processes.gather(token)[0]
        with processes.together():
            if not processes.first():
                _check_shared(workdir, token)
        yield


@contextmanager
def _own(workdir: Path, config: Config, token: str) -> Iterator[None]:
    make_folder(workdir, "the work directory")
    try:
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot write to the work directory {workdir}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process ends
        except OSError as error:
            raise UsageError(
                f"another process is training in {workdir}; wait for it, or give another --workdir"
            ) from error
        _check_config(workdir, config)
        write_json(workdir / "config.json", to_dict(config))
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
        yield


def _check_shared(workdir: Path, token: str) -> None:
    # A checkpoint of which each host keeps its part for itself could not be restored.
    end = time.monotonic() + _VISIBLE
    while not (workdir / ".lock").is_file() or (workdir / ".lock").read_text() != token:
        if time.monotonic() > end:
            raise UsageError(
                f"{workdir} is not the work directory of process 0;"
                " all processes need one --workdir on a file system that they share"
            )
        time.sleep(0.2)


def _check_config(workdir: Path, config: Config) -> None:
    # A run that ended before its first step, for want of data say, binds nobody.
    if not any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return
    before, now = to_dict(read_config(workdir)), to_dict(config)
    if keys := differing_keys(before, now):
        raise UsageError(
            f"{workdir} holds a run with other settings ({', '.join(keys)});"
            f" give another --workdir, or delete {workdir} to start afresh"
        )


def read_config(workdir: Path) -> Config:
    """The settings of the run in `workdir`.

    Raises:
      UsageError: there is no such run.
    """
    return ConfigDict(read_json(workdir / "config.json", "start one with python -m train"))


def read_json(path: Path, hint: str) -> Any:
    """The content of a JSON file of the work directory.

    Raises:
      UsageError: it is missing or malformed; the message ends with `hint`.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"no {path.name} in {path.parent}: no run there; {hint}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that `path` holds either the old or the whole new content, also after a crash."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces the content of `metrics.jsonl`, at once."""
    _replace(path, "".join(json.dumps(record) + "\n" for record in records))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; none if there is no such file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # what follows the last line break is a record cut off by a crash
    return [json.loads(line) for line in lines]


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
