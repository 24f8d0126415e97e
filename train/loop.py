"""The training loop. It knows neither the task nor the mechanism."""

import math
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import attn_jax
from attn_jax.types import Array
from train import optimizer, pretrained, processes, sharding, state, tasks
from train.checkpoints import Checkpoints, restore_best
from train.cli import Interrupted, RunError, user_errors
from train.config import Config, config_hash
from train.evaluation import Measured, evaluate, make_eval_step
from train.reporting import Reporter, Silent
from train.state import ModelDef, ModelState, TrainState, num_parameters, shardings_of
from train.tasks import Batch, Task
from train.workdir import write_json

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


@dataclass
class Progress:
    """What the host remembers about a run, beside the arrays of `TrainState`; saved with them.

    Attributes:
      step: training steps taken.
      history: `(step, value of the primary metric)` of every validation.
      window: metrics of the steps since the last record in `metrics.jsonl`.
      seconds, timed_steps: time spent in training steps and their number, those that compiled left out.
      compile_seconds: time spent in the steps that compiled.
    """

    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    window: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    timed_steps: int = 0
    compile_seconds: float = 0.0

    def best(self, task: Task) -> int:
        """Index in `history` of the best validation."""
        sign = 1 if task.better == "higher" else -1
        return max(range(len(self.history)), key=lambda i: sign * self.history[i][1])


def make_train_step(
    task: Task,
    model: ModelDef,
    gradient_transformation: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    aux_weight: float,
    shardings: TrainState,
) -> TrainStep:
    """A compiled function from a state (whose memory it reuses) and a batch to the next state and metrics."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        def objective(params: Any) -> tuple[Array, tuple[Any, dict[str, Array]]]:
            module = nnx.merge(model.train, params, state.model.rest)
            loss, metrics = task.loss(module, batch)
            losses, diagnostics = attn_jax.pop_aux(module)
            total = loss + aux_weight * sum(losses.values())
            metrics = {"loss": loss, **metrics, **losses, **{k: jnp.mean(v) for k, v in diagnostics.items()}}
            return total, (nnx.as_pure(nnx.state(module, nnx.Not(nnx.Param))), metrics)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, (rest, metrics)), grads = gradient(state.model.params)
        updates, opt_state = gradient_transformation.update(grads, state.opt_state, state.model.params)
        params = optax.apply_updates(state.model.params, updates)
        step = state.model.step
        metrics |= {"gradient_norm": optax.tree.norm(grads), "learning_rate": learning_rate(step)}
        finite = jnp.isfinite(total) & jnp.isfinite(metrics["gradient_norm"])
        return TrainState(ModelState(step + 1, params, rest), opt_state), metrics | {"finite": finite}

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


class Program(NamedTuple):
    """What a config trains, compiled when it is first called.

    Attributes:
      model: its definition.
      optimizer: how gradients change it.
      abstract: shapes, types and shardings of the state.
      train_step: from a state, whose memory it reuses, and a batch to the next state and metrics.
    """

    model: ModelDef
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: TrainStep

    @classmethod
    def of(cls, config: Config, task: Task, mesh: Mesh) -> "Program":
        model = state.define(task, mesh)
        rate = optimizer.schedule(config.optimizer, config.steps)
        adamw = optimizer.create(
            config.optimizer, rate, optimizer.decayed(model.variables, config.optimizer.no_decay)
        )
        abstract = state.abstract_train_state(model, adamw, mesh)
        step = make_train_step(task, model, adamw, rate, config.aux_weight, shardings_of(abstract))
        return cls(model, adamw, abstract, step)


class Trainer:
    """One run: built, restored if its work directory holds a checkpoint, trained, measured."""

    def __init__(self, config: Config, workdir: Path, task: Task, mesh: Mesh):
        self.config, self.workdir, self.task, self.mesh = config, workdir, task, mesh
        self.model, adamw, abstract, self.train_step = Program.of(config, task, mesh)
        self.eval_step = make_eval_step(task, self.model)
        with user_errors(ValueError):  # batches that do not fit the data
            self.batches = task.train_iterator(config.seed)
        self._compiled: set[Any] = set()

        self.checkpoints = Checkpoints(workdir)
        restored = self.checkpoints.restore_last(abstract)
        if restored is None:
            self.progress = Progress()
            self.state = state.initial_train_state(task, adamw, config.seed, abstract)
            if task.pretrained is not None:
                self.state = pretrained.start(self.state, task.pretrained)
        else:
            self.state, progress, position = restored
            self.progress = Progress(**progress)
            self.batches.set_state(position)
        validated = dict(self.progress.history)
        report = Reporter if processes.first() else Silent
        self.reporter = report(workdir, self.progress.step, config.steps, validated)

    def run(self, stop: "StopRequest") -> dict[str, Any]:
        """Trains to the end, with a validation and a checkpoint every `eval_every` steps; returns the result.

        Raises:
          RunError: the loss or its gradient is not finite.
          Interrupted: `stop` was requested; everything is saved.
        """
        progress, config = self.progress, self.config
        if progress.step:
            self.reporter.say(f"resuming after step {progress.step}")
        self._repair_best()
        try:
            while True:
                stop.check()
                if self._validation_is_due():
                    self._validate(stop)
                if progress.step >= config.steps or self._out_of_patience():
                    return self._finish(stop)
                self._step()
        except _Stopped:
            self._save()
            message = f"saved step {progress.step} in {self.workdir}; the same command goes on from there"
            raise Interrupted(message, stop.signum) from None

    def close(self) -> None:
        """Waits for checkpoints that are being written, and closes all files."""
        self.checkpoints.close()
        self.reporter.close()

    def _step(self) -> None:
        progress = self.progress
        start = time.perf_counter()
        batch = sharding.put_batch(next(self.batches), self.mesh)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            with user_errors(ValueError, NotImplementedError):  # a mechanism that does not support its settings
                self.train_step.trace(self.state, batch)
        self.state, metrics = self.train_step(self.state, batch)
        metrics = jax.device_get(metrics)  # waits: never more than one program with collectives in flight
        elapsed = time.perf_counter() - start
        progress.step += 1
        if not metrics.pop("finite"):
            raise RunError(
                f"step {progress.step}: the loss is {metrics['loss']:.4g} and the norm of its gradient"
                f" {metrics['gradient_norm']:.4g}; the last good checkpoint is kept in {self.workdir}"
            )
        if shapes in self._compiled:
            progress.seconds += elapsed
            progress.timed_steps += 1
        else:
            self._compiled.add(shapes)
            progress.compile_seconds += elapsed
        progress.window.append({name: float(value) for name, value in metrics.items()})
        self.reporter.step()
        if progress.step % self.config.log_every == 0:
            means = {name: sum(step[name] for step in progress.window) / len(progress.window) for name in metrics}
            self.reporter.write(progress.step, "train", means)
            progress.window.clear()

    def _validation_is_due(self) -> bool:
        step, history = self.progress.step, self.progress.history
        done = history and history[-1][0] == step
        return step > 0 and not done and (step % self.config.eval_every == 0 or step >= self.config.steps)

    def _validate(self, stop: "StopRequest") -> None:
        value = self._evaluate(self.state.model, "val", stop).means[self.task.primary]
        if not math.isfinite(value):
            raise RunError(f"step {self.progress.step}: validation {self.task.primary} is {value}")
        self.progress.history.append((self.progress.step, value))
        if self.progress.best(self.task) == len(self.progress.history) - 1:
            self.checkpoints.save_best(self.state)
        self._save()

    def _evaluate(self, model: ModelState, split: str, stop: "StopRequest") -> Measured:
        def watched() -> Iterator[Batch]:
            for batch in self.task.eval_batches(split):
                stop.check()
                yield batch

        measured = evaluate(self.eval_step, model, watched(), self.mesh)
        self.reporter.write(int(model.step), split, measured.means)
        return measured

    def _save(self) -> None:
        self.checkpoints.save_last(self.state, asdict(self.progress), self.batches.get_state())

    def _repair_best(self) -> None:
        # Killed between the two saves of a validation: the state to resume from is also the best model.
        progress = self.progress
        if progress.history and progress.history[progress.best(self.task)][0] == progress.step:
            self.checkpoints.save_best(self.state)

    def _out_of_patience(self) -> bool:
        history, patience = self.progress.history, self.config.patience
        return patience > 0 and bool(history) and len(history) - 1 - self.progress.best(self.task) >= patience

    def _finish(self, stop: "StopRequest") -> dict[str, Any]:
        self.checkpoints.wait()
        best = restore_best(self.workdir, self.model.abstract)
        test = self._evaluate(best, "test", stop)
        result = self._result(int(best.step), test.means)
        if processes.first():
            write_json(self.workdir / "test_examples.json", test.examples)
            write_json(self.workdir / "result.json", result)
        return result

    def _result(self, best_step: int, test: dict[str, float]) -> dict[str, Any]:
        config, progress, task = self.config, self.progress, self.task
        epoch = task.steps_per_epoch
        to_ninety = steps_to_fraction(progress.history, task.better, 0.9)
        seconds_per_step = progress.seconds / max(progress.timed_steps, 1)
        return {
            "name": config.name,
            "preset": config.preset,
            "mechanism": config.mechanism.name,
            "seed": config.seed,
            "config_hash": config_hash(config),
            "comparable": config.comparable,
            "comparability": config.comparability,
            "primary": task.primary,
            "better": task.better,
            "test": test,
            "validation": dict(progress.history)[best_step],
            "baselines": task.baselines("test"),
            "best_step": best_step,
            "steps": progress.step,
            "steps_per_epoch": epoch,
            "epochs": progress.step / epoch,
            "steps_to_90_percent_of_best": to_ninety,
            "epochs_to_90_percent_of_best": to_ninety / epoch,
            "seconds_per_step": seconds_per_step,
            "seconds_per_epoch": seconds_per_step * epoch,
            "compile_seconds": progress.compile_seconds,
            "peak_memory_bytes": peak_memory(),
            "parameters": num_parameters(self.model),
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "mesh": dict(self.mesh.shape),
            "versions": {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__},
            "platform": platform.platform(),
        }


def train(config: Config, workdir: Path) -> dict[str, Any]:
    """Trains `config` in `workdir`, which this run must own, from its last checkpoint if there is one.

    Returns:
      What `result.json` then holds.

    Raises:
      UsageError: the settings are not supported, or the data cannot be had.
      RunError: training failed.
      Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    with processes.together():
        task = tasks.prepare(config)
    with sharding.activate(config) as mesh, StopRequest.on_signals() as stop:
        trainer = Trainer(config, workdir, task, mesh)
        try:
            return trainer.run(stop)
        finally:
            trainer.close()


class _Stopped(Exception):
    """Unwinds to where the run is saved."""


class StopRequest:
    """Whether a signal asked the run to stop: it does at the next `check`, not in the middle of a step.

    A signal to one process stops all, at the same `check`.
    """

    signum = 0

    @classmethod
    @contextmanager
    def on_signals(cls) -> "Iterator[StopRequest]":
        """Catches SIGTERM and SIGINT while the body runs; a second one has its usual effect."""
        stop = cls()
        usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def request(signum: int, frame: Any) -> None:
            stop.signum = signum
            restore()

        def restore() -> None:
            for number, handler in usual.items():
                signal.signal(number, handler)

        for number in usual:
            signal.signal(number, request)
        try:
            yield stop
        finally:
            restore()

    def check(self) -> None:
        """Raises if a stop was requested."""
        self.signum = processes.largest(self.signum)
        if self.signum:
            raise _Stopped


def steps_to_fraction(history: list[tuple[int, float]], better: str, fraction: float) -> int:
    """The step of the first validation that reached `fraction` of the best (its inverse, if lower is better)."""
    values = [value if better == "higher" else 1 / value if value else math.inf for _, value in history]
    return next(step for (step, _), value in zip(history, values) if value >= fraction * max(values))


def peak_memory() -> int:
    """Bytes at the peak so far: of the fullest accelerator, or of this process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if peaks := [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]:
        return max(peaks)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
