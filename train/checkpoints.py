"""Checkpoints by orbax: the last two states to resume from, and the best two models to evaluate.

Each is a folder of separate items, so that evaluation reads the model alone, on any number of devices. The second
of each kind is there for the case that the first cannot be read.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN
from orbax.checkpoint.options import MultiprocessingOptions

from train import processes
from train.cli import UsageError
from train.state import ModelState, TrainState

logger = logging.getLogger(__name__)

_KEPT = 2


class Checkpoints:
    """The checkpoints of a run, written in the background; `close` waits for them."""

    def __init__(self, workdir: Path):
        self._folder = (workdir / "checkpoints").absolute()
        self._last = _manager(self._folder / "last")
        self._best = _manager(self._folder / "best")

    def save_last(self, state: TrainState, progress: dict[str, Any], position: dict[str, Any]) -> None:
        """Saves all that the next step depends on; `progress` and `position` (of the data) are JSON."""
        items = _model_items(state.model)
        items["optimizer"] = ocp.args.StandardSave(_one_copy(state.opt_state))
        items["progress"] = ocp.args.JsonSave(progress)
        items["data"] = ocp.args.JsonSave(position)
        _save(self._last, int(state.model.step), items)

    def save_best(self, state: TrainState) -> None:
        """Saves the model."""
        _save(self._best, int(state.model.step), _model_items(state.model))

    def restore_last(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]] | None:
        """The newest state that can be read, its progress and data position; None in a new work directory.

        A newer one that cannot be read is moved aside, with a warning.
        """

        def read(step: int) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
            items = _model_targets(abstract.model)
            items["optimizer"] = ocp.args.StandardRestore(abstract.opt_state)
            items["progress"] = items["data"] = ocp.args.JsonRestore()
            found: Any = self._last.restore(step, args=ocp.args.Composite(**items))
            return TrainState(_model(found), found.optimizer), found.progress, found.data

        found, unreadable = _newest(self._last, read)
        if found is not None:
            self._set_aside(unreadable)
        elif unreadable:
            raise UsageError(f"no checkpoint in {self._folder} can be read; delete it to start afresh")
        return found

    def has_best(self, step: int) -> bool:
        """Whether the best model of `step` is saved."""
        return step in self._best.all_steps()

    def wait(self) -> None:
        """Waits until everything is written."""
        self._last.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        self._last.close()
        self._best.close()

    def _set_aside(self, steps: list[int]) -> None:
        # Out of the way, because the resumed run will save these steps again.
        if steps and processes.first():
            for step in steps:
                (self._folder / "last" / str(step)).rename(self._folder / f"unreadable-{step}")
        processes.gather(None)  # all wait for the first
        self._last.reload()


def restore_best(workdir: Path, abstract: ModelState) -> ModelState:
    """The best model of a run that can be read.

    Raises:
      UsageError: there is none.
    """
    return _read_best(workdir, _model_targets(abstract), _model)


def best_arrays(workdir: Path) -> dict[str, Any]:
    """The arrays of the best model of a run that can be read, by name in nested dictionaries, on the host.

    Raises:
      UsageError: there is none.
    """
    targets: dict[str, Any] = {name: ocp.args.StandardRestore() for name in ("params", "rest")}
    return _read_best(workdir, targets, lambda found: _merged(found.params, found.rest["variables"]))


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    made = dict(first)
    for key, value in second.items():
        made[key] = _merged(made[key], value) if key in made else value
    return made


def _read_best[T](workdir: Path, targets: dict[str, Any], convert: Callable[[Any], T]) -> T:
    folder = (workdir / "checkpoints" / "best").absolute()
    if not folder.is_dir():
        raise UsageError(f"no checkpoint in {workdir}: its run has not been validated yet")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        items = ocp.args.Composite(**targets)
        found, _ = _newest(manager, lambda step: convert(manager.restore(step, args=items)))
    if found is None:
        raise UsageError(f"no checkpoint in {folder} can be read")
    return found


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        preservation_policy=LatestN(_KEPT),
        save_root_metadata=False,
        cleanup_tmp_directories=True,
        # Processes wait for each other by the name of what they wait for; two managers may write at once.
        multiprocessing_options=MultiprocessingOptions(barrier_sync_key_prefix=folder.name),
    )
    return ocp.CheckpointManager(folder, options=options)


def _model_items(model: ModelState) -> dict[str, Any]:
    # The step goes with the other variables because orbax refuses an empty item, and a model may have none.
    rest = {"step": model.step, "variables": model.rest}
    items = {"params": model.params, "rest": rest}
    return {name: ocp.args.StandardSave(_one_copy(item)) for name, item in items.items()}


def _one_copy(tree: Any) -> Any:
    # Of an array that every device holds orbax would save a slice from each, and compile each slice: for seconds.
    # Arrays of one process among several it refuses.
    def one(leaf: jax.Array) -> jax.Array:
        return leaf.addressable_data(0) if leaf.is_fully_replicated and leaf.is_fully_addressable else leaf

    return jax.tree.map(one, tree)


def _model_targets(model: ModelState) -> dict[str, Any]:
    rest = {"step": model.step, "variables": model.rest}
    return {"params": ocp.args.StandardRestore(model.params), "rest": ocp.args.StandardRestore(rest)}


def _model(found: Any) -> ModelState:
    return ModelState(found.rest["step"], found.params, found.rest["variables"])


def _save(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> None:
    # After a resume from an older step this one may exist already, with the same content.
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.Composite(**items), force=True)


def _newest[T](manager: ocp.CheckpointManager, read: Callable[[int], T]) -> tuple[T | None, list[int]]:
    """What `read` gives for the newest step that it can read, and the steps that it cannot."""
    unreadable = []
    for step in sorted(manager.all_steps(), reverse=True):
        found, reason = None, ""
        try:
            found = jax.block_until_ready(read(step))
        except Exception as error:  # whatever a damaged file makes orbax, tensorstore or json raise
            reason = str(error).split("\n")[0][:200] or type(error).__name__
        # What one process cannot read, none may go on from.
        reason = next(filter(None, processes.gather(reason)), "")
        if not reason:
            return found, unreadable
        logger.warning("cannot read %s/%d, trying the one before: %s", manager.directory, step, reason)
        unreadable.append(step)
    return None, unreadable
