"""The processes that train one model together, each with devices of its own; a process alone needs none of this.

All run the same program on one mesh and make the same batches, so what is computed does not depend on how many
they are. Process 0 alone reports and writes the work directory; checkpoints are written by all. What one of them
finds out by itself (a file, a signal) is exchanged before it decides what happens next: one that went another way
would leave the others waiting.
"""

import itertools
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.cli import UsageError
from train.config import Config, flatten, to_dict

logger = logging.getLogger(__name__)

AUTO = "auto"
_PER_PROCESS = ("file", "num_cpu_devices", "distributed")  # settings that may differ between processes
_LEAVING = 30  # seconds that a process which ends, well or not, waits for the others to end too
_PATIENCE = 24 * 3600  # seconds for one that has much to prepare; one that dies is noticed otherwise
_barrier = itertools.count()


def join(config: Config) -> None:
    """Makes this process one of those that `config.distributed` says; must run before JAX looks for devices.

    Raises:
      UsageError: the settings are incomplete, no cluster is found, process 0 is not reached, or the processes were
        started with different settings.
    """
    settings = config.distributed
    arguments = _arguments(settings)
    if arguments is None:
        return
    if not jax.distributed.is_initialized():
        # Its handler of SIGTERM would swallow the signal until training starts; from then on see `StopRequest`.
        jax.config.update("jax_enable_preemption_service", False)
        arguments |= {"initialization_timeout": settings.timeout, "shutdown_timeout_seconds": _LEAVING}
        try:
            jax.distributed.initialize(**arguments)
        except ValueError as error:
            raise UsageError(
                f"--config.distributed.coordinator={AUTO}: JAX finds no cluster here such as Slurm or a TPU pod"
                f" ({error}); give HOST:PORT of process 0, num_processes and process_id"
            ) from error
    if not first():
        for name in ("train", "attn_jax"):
            logging.getLogger(name).setLevel(logging.WARNING)
    _check_same(config)


def _arguments(settings: Config) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, once process 0 listens; None for a process alone."""
    address, count, index = settings.coordinator, settings.num_processes, settings.process_id
    if not address:
        if count or index:
            raise UsageError("--config.distributed.coordinator is missing: HOST:PORT of process 0, or auto")
        return None
    if address == AUTO:
        if count or index:
            raise UsageError("--config.distributed.coordinator=auto takes neither num_processes nor process_id")
        return {}
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--config.distributed.coordinator must be HOST:PORT of process 0 or auto, got {address}")
    if not 0 <= index < count:
        raise UsageError(f"--config.distributed.process_id must be in [0, num_processes), got {index} of {count}")
    logger.info("process %d of %d, at most %d s for all to join at %s", index, count, settings.timeout, address)
    if index:
        _await_listener(host.strip("[]"), int(port), settings.timeout)
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _await_listener(host: str, port: int, timeout: float) -> None:
    # JAX ends the process with a stack trace where nobody listens.
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), 1)).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise UsageError(
                    f"no process 0 at {host}:{port} within {timeout} s ({error}); start it with the same"
                    " --config.distributed.coordinator, or set another --config.distributed.timeout"
                ) from error
        time.sleep(0.2)


def _check_same(config: Config) -> None:
    shared = {key: value for key, value in to_dict(config).items() if key not in _PER_PROCESS}
    all_settings = [flatten(settings) for settings in gather(shared)]
    for index, settings in enumerate(all_settings):
        keys = {**all_settings[0], **settings}
        if differing := [key for key in keys if settings.get(key, ...) != all_settings[0].get(key, ...)]:
            raise UsageError(
                f"process {index} was started with other settings than process 0 ({', '.join(differing)});"
                " give all the same command"
            )


def first() -> bool:
    """Whether this is process 0, which alone writes and reports."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of the values that the processes give; each calls it at the same point of the program."""
    if not jax.distributed.is_initialized():
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def gather(value: Any) -> list[Any]:
    """The JSON values that the processes give, in their order; waits for the slowest."""
    if not jax.distributed.is_initialized():
        return [value]
    from orbax.checkpoint import multihost  # which alone has a barrier that waits longer than collectives do

    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes(f"attn_jax {next(_barrier)}", timeout=_PATIENCE, processes=everyone)
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


@contextmanager
def together() -> Iterator[None]:
    """Where its body raises a `UsageError` at one process, all raise it; the body must not use collectives."""
    error = None
    try:
        yield
    except UsageError as raised:
        error = raised
    messages = gather(None if error is None else str(error))
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message is not None:
            raise UsageError(f"process {index}: {message}")
