"""The training loop in one process: what a run leaves behind, early stopping, damage, divergence."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from tests import toy
from tests.runs import one_program
from train import evaluation, loop, sharding, state, tasks
from train.checkpoints import Checkpoints
from train.cli import Interrupted, RunError
from train.config import config_hash
from train.workdir import open_workdir, read_json, read_metrics

# Two compilations of one computation in one process; on a CPU they agree to the bit, which is not promised.
ROUNDING = 1e-6


def config_of(**changes):
    config = toy.get_config()
    config.mesh.data = 1
    config.optimizer.schedule = "constant"  # one program, however many the steps
    config.update(changes)
    return config


def run(config, workdir):
    with open_workdir(workdir, config):
        return loop.train(config, workdir)


@pytest.fixture(scope="module", autouse=True)
def finished(tmp_path_factory):
    """The first run, whose program all others take over."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        one_program(patch)
        yield workdir, run(config_of(), workdir)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be damaged, and what it reached."""
    workdir = tmp_path / "copied"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    return workdir, finished[1]


def test_a_run_leaves_what_reports_need(finished):
    workdir, result = finished
    config = config_of()
    assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert list(workdir.glob("events.out.tfevents.*"))
    assert result["config_hash"] == config_hash(config)
    assert (result["preset"], result["mechanism"], result["seed"]) == ("default", "standard", 0)
    assert result["steps"] == 24 and result["epochs"] == 24 / 13  # 100 examples in batches of 8
    assert result["baselines"].keys() == {"majority"}
    assert result["parameters"] == sum(
        n * m for n, m in [(12, 16), (16, 32), (1, 32), (32, 16), (1, 16), (16, 4), (1, 4), (16, 1)]
    )
    assert result["versions"]["jax"] == jax.__version__
    assert 0 < result["seconds_per_step"] < result["compile_seconds"]
    assert result["seconds_per_epoch"] == pytest.approx(13 * result["seconds_per_step"])
    assert result["peak_memory_bytes"] > 2**20


def test_metrics_hold_each_step_once_and_the_best_is_the_best(finished):
    workdir, result = finished
    records = read_metrics(workdir / "metrics.jsonl")
    assert [r["step"] for r in records if r["split"] == "train"] == [5, 10, 15, 20]
    validations = {r["step"]: r["accuracy"] for r in records if r["split"] == "val"}
    assert list(validations) == [8, 16, 24]
    best = max(validations, key=lambda step: validations[step])
    assert (result["best_step"], result["validation"]) == (best, validations[best])
    (test,) = [r for r in records if r["split"] == "test"]
    assert {"step": best, "split": "test", **result["test"]} == test
    assert all(set(r) >= {"loss", "accuracy", "gradient_norm", "learning_rate"} for r in records[:1])


def test_training_learns(finished):
    losses = [r["loss"] for r in read_metrics(finished[0] / "metrics.jsonl") if r["split"] == "train"]
    assert losses[-1] < losses[0] - 0.2


def test_evaluation_counts_every_example_once_on_any_number_of_devices(finished):
    workdir, result = finished
    config = config_of(eval_batch_size=8)
    config.mesh.data = 4
    with evaluation.restored(config, workdir) as run:
        measured, examples = evaluation.measure(run, "test")
    assert measured["step"] == result["best_step"]
    for name, value in result["test"].items():
        np.testing.assert_allclose(measured["metrics"][name], value, rtol=ROUNDING)
    assert read_json(workdir / "test_examples.json", "")["accuracy"] == examples["accuracy"]
    assert len(examples["loss"]) == config.task.sizes.test  # dummies are no examples
    np.testing.assert_allclose(np.mean(examples["loss"]), measured["metrics"]["loss"], rtol=ROUNDING)
    task = tasks.prepare(config_of(eval_batch_size=1))
    with sharding.activate(task.config) as mesh:
        model = state.define(task, mesh)
        best = evaluation.checkpoints.restore_best(workdir, model.abstract)
        one_by_one = evaluation.evaluate(
            evaluation.make_eval_step(task, model), best, task.eval_batches("test"), mesh
        )
    assert one_by_one.examples["accuracy"] == examples["accuracy"]
    np.testing.assert_allclose(one_by_one.examples["loss"], examples["loss"], rtol=ROUNDING)
    assert one_by_one.means["accuracy"] == result["test"]["accuracy"]
    np.testing.assert_allclose(one_by_one.means["loss"], result["test"]["loss"], rtol=ROUNDING)


@pytest.mark.parametrize("item", ["params", "rest", "optimizer", "progress", "data"])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(copied, caplog, item):
    workdir, _ = copied
    for path in (workdir / "checkpoints/last/24" / item).rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
    task = tasks.prepare(config_of())
    with sharding.activate(task.config) as mesh:
        model = state.define(task, mesh)
        adamw = loop.optimizer.create(task.config.optimizer, lambda step: 0.0, True)
        abstract = state.abstract_train_state(model, adamw, mesh)
        checkpoints = Checkpoints(workdir)
        restored = checkpoints.restore_last(abstract)
        checkpoints.close()
    assert restored is not None
    assert restored[1]["step"] == int(restored[0].model.step) == 16
    (warning,) = [r for r in caplog.records if r.name == "train.checkpoints"]
    assert "last/24" in warning.getMessage()
    assert (workdir / "checkpoints/unreadable-24").is_dir(), "nothing is deleted"


def test_a_run_resumed_from_the_checkpoint_before_ends_the_same(copied):
    workdir, result = copied
    before = read_metrics(workdir / "metrics.jsonl")
    shutil.rmtree(workdir / "checkpoints/last/24/params")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 24, "spl')  # what a crash leaves
    again = run(config_of(), workdir)
    np.testing.assert_allclose(again["test"]["loss"], result["test"]["loss"], rtol=ROUNDING)
    assert (again["best_step"], again["steps"]) == (result["best_step"], result["steps"])
    records = read_metrics(workdir / "metrics.jsonl")
    assert len(records) == len({(r["step"], r["split"]) for r in records}) == 4 + 3 + 1
    for ours, theirs in zip(records, before):
        assert ours.pop("split") == theirs.pop("split")
        np.testing.assert_allclose([ours[name] for name in theirs], list(theirs.values()), rtol=ROUNDING)


def measured(accuracy):
    return evaluation.Measured({"loss": 1.0, "accuracy": accuracy}, {})


def test_training_stops_when_validation_no_longer_improves(tmp_path, monkeypatch):
    values = iter([0.5, 0.6, 0.6, 0.55, 0.4])  # four validations, of which the second is the best, and the test
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: measured(next(values)))
    result = run(config_of(patience=2, steps=100, eval_every=2), tmp_path / "run")
    assert (result["steps"], result["best_step"], result["steps_to_90_percent_of_best"]) == (8, 4, 4)
    assert (result["validation"], result["test"]["accuracy"]) == (0.6, 0.4)


def test_a_best_model_that_was_not_saved_is_taken_from_the_last_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: measured(0.5))
    config = config_of(steps=2)
    assert run(config, tmp_path / "run")["best_step"] == 2
    shutil.rmtree(tmp_path / "run/checkpoints/best")  # as if killed between the two saves of a validation
    assert run(config, tmp_path / "run")["best_step"] == 2


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_EVENT", "inf:11")
    with pytest.raises(RunError, match=r"step 11: the loss is inf"):
        run(config_of(), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints/last").iterdir()) == ["8"]
    assert not (tmp_path / "run/result.json").exists()
    steps = [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert max(steps) < 11


def test_a_signal_during_validation_saves_and_validates_after_resuming(tmp_path, monkeypatch):
    usual = signal.getsignal(signal.SIGTERM)
    task = tasks.TASKS["toy"]
    original = task.eval_batches

    def interrupted(self, split):
        signal.raise_signal(signal.SIGTERM)
        return original(self, split)

    monkeypatch.setattr(task, "eval_batches", interrupted)
    config = config_of(steps=8)
    with pytest.raises(Interrupted, match=r"saved step 8 .* the same command goes on") as stopped:
        run(config, tmp_path / "run")
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == usual
    monkeypatch.setattr(task, "eval_batches", original)
    result = run(config, tmp_path / "run")
    assert (result["steps"], result["best_step"]) == (8, 8)
    records = [(r["step"], r["split"]) for r in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert records == [(5, "train"), (8, "val"), (8, "test")]


@pytest.mark.parametrize(
    "better, values, expected",
    [("higher", [0.1, 0.6, 0.62, 0.65, 0.5], 20), ("lower", [9.0, 2.1, 2.2, 2.0], 20), ("higher", [0.0, 0.0], 10)],
)
def test_steps_to_ninety_percent_of_the_best(better, values, expected):
    history = [(10 * (i + 1), value) for i, value in enumerate(values)]
    assert loop.steps_to_fraction(history, better, 0.9) == expected
