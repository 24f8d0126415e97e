"""Grids of runs: what is finished is kept, what fails is said, and what the differences mean."""

import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

import attn_jax
from eval.experiments import grid, lra, retrieval, slurm, statistics, step_time, video
from eval.experiments.__main__ import main
from eval.experiments.grid import Cell
from tests import toy
from train import cli
from train import config as configs
from train.tasks import TASKS
from train.tasks.budget import TOLERANCE, num_parameters, within_budget
from train.tasks.rerank import Rerank
from train.tasks.video import SlotVideo
from train.workdir import read_metrics, write_json

# Cosine schedules of other lengths would be other programs.
TOY = Cell("toy", "tests/toy.py", ("mesh.data=1", "steps=1", "optimizer.schedule=constant"))


# Statistics.


def test_equal_runs_differ_by_nothing_and_scaled_ones_by_their_factor():
    runs = np.random.default_rng(0).random((3, 40))
    for factor in (1.0, 0.8):
        value, draws = statistics.relative_differences(runs, factor * runs)
        # To rounding: the pairs are resampled together, so the noise they share cancels.
        np.testing.assert_allclose([value, draws.min(), draws.max()], factor - 1, atol=1e-12)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 1000)
    random, hits = np.random.default_rng(0), 0
    for _ in range(100):
        seeds = random.normal(0, 0.1, (2, 12, 1))  # what the seeds of two settings do, apart from their clips
        clips = 1 + 0.2 * random.random((1, 1, 30))
        first, second = clips + seeds + random.normal(0, 0.05, (2, 12, 30))
        found = statistics.interval(*statistics.relative_differences(first, second))
        hits += found.low <= 0 <= found.high
    # 95 expected less the bootstrap's own shortfall with 12 seeds; below 84 has a chance under 1e-3 at 93 %.
    assert 84 <= hits < 100


def test_runs_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\), \(3, 5\)"):
        statistics.relative_differences(np.ones((2, 5)), np.ones((3, 5)))


@pytest.mark.parametrize("claimed", [-0.2, 0.8])
@pytest.mark.parametrize(
    "bounds, expected",
    [((0.6, 3.0), "reproduced"), ((-1.0, 0.4), "contradicted"), ((0.2, 2.0), "not decidable")],
)
def test_half_of_a_claim_decides(claimed, bounds, expected):
    low, high = sorted(claimed * bound for bound in bounds)
    assert statistics.verdict(statistics.Interval((low + high) / 2, low, high), claimed) == expected


# The grid.


@pytest.fixture
def out(tmp_path, tmp_path_factory, monkeypatch):
    """Folder of a grid whose runs compile fast, and share what they have compiled with those of other tests."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    compiled = tmp_path_factory.getbasetemp() / "compiled"
    compiled.mkdir(exist_ok=True)
    (tmp_path / "compiled").symlink_to(compiled)
    return tmp_path


def test_what_is_finished_is_kept_and_what_fails_is_said_by_job_arrays_and_processes(out):
    cells = [TOY, Cell("wrong", TOY.config, ("nope=1",))]
    calls = []

    def run(engine):
        (failed,) = grid.run_all(cells, engine, lambda: calls.append(1))
        assert failed.startswith("wrong: error: ") and "exit code 2" in failed
        assert grid.unfinished(out, cells) == cells[1:]

    run(slurm.SlurmEngine(out, cells, 2, {"cluster": "local", "timeout_min": 5}))
    assert len(calls) == 2
    result = out / "toy" / "result.json"
    written = result.stat().st_mtime_ns
    assert grid.result(out, TOY) == json.loads(result.read_text())
    run(grid.LocalEngine(out, 2))
    assert len(calls) == 4 and "this run is finished" in (out / "toy.log").read_text()
    assert result.stat().st_mtime_ns == written
    with pytest.raises(cli.UsageError, match="nope"):
        slurm.SlurmEngine(out, [], 2, {"cluster": "nope"})


def test_a_stopped_grid_stops_its_runs_which_save(out):
    endless = Cell("endless", TOY.config, (*TOY.overrides, "steps=1000000", "eval_every=1000000", "log_every=1"))

    def stop_once_it_trains():
        path = out / "endless" / "metrics.jsonl"
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_once_it_trains, daemon=True)
    thread.start()
    with pytest.raises(cli.Interrupted, match="the same command goes on"):
        grid.run_all([endless], grid.LocalEngine(out, 1), lambda: None)
    thread.join()
    assert "saved step" in (out / "endless.log").read_text()
    assert read_metrics(out / "endless" / "metrics.jsonl")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_steps_are_timed_in_turn():
    config = toy.get_config()
    config.mesh.data = 1
    step, order = step_time.training_step(config), []

    def make(name):
        return lambda: (order.append(name), step())

    seconds = step_time.step_times({"a": "A", "b": "B"}, 3, make)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert order == ["A", "B"] * (len(order) // 2)
    assert step_time.ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b").tolist() == [2, 3]


# The grid of dual-KV attention.


def test_every_cell_is_a_config_and_the_same_parameters_are_as_many():
    cells = video.cells([0, 1])
    assert len({cell.name for cell in cells}) == len(cells) == 2 * (5 * 5 - 1)  # no grouped streams of one head
    parameters = {}
    for form in video.forms_of("G2"):
        task = SlotVideo(video.cell("G2", form, 0).load())
        model = nnx.eval_shape(lambda task=task: task.model(nnx.Rngs(0)))
        parameters[form] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert parameters["feature"] == parameters["standard"]
    biases = 2 * 2 * 4  # of two streams, in encoder and decoder, for 4 heads
    assert parameters["grouped"] == parameters["lowrank"] == parameters["standard"] + biases
    assert parameters["full"] > 1.1 * parameters["standard"]


@pytest.fixture
def fabricated(tmp_path):
    """Two seeds of G1: lowrank has the claimed error, feature that of standard, full has one seed only."""
    clips = 0.02 + 0.01 * np.random.default_rng(0).random(50)
    factors = {"standard": 1.0, "lowrank": 1 - 0.276, "feature": 1.0, "full": 1.0}
    for form, factor in factors.items():
        for seed in (0,) if form == "full" else (0, 1):
            folder = tmp_path / video.cell("G1", form, seed).name
            folder.mkdir()
            mse = factor * clips * (1 + 0.1 * seed)
            test = {"mse": mse.mean(), "fg_ari": 0.25}
            result = {"test": test, "baselines": {"mean frame": 0.04}, "parameters": 1234, "seconds_per_step": 0.1}
            result |= {"steps": 10, "compile_seconds": 1.0, "versions": {"jax": "0"}}
            write_json(folder / "result.json", result)
            write_json(folder / "test_examples.json", {"mse": mse.tolist()})
    seconds = {"standard": [1.0] * 5, "lowrank": [1.1] * 5, "feature": [1.8] * 5}
    machine = {"device": "a machine", "cores": 2, "load": 0.1}
    write_json(tmp_path / "step_times.json", {"groups": {"G1": seconds}, "environment": machine})
    return tmp_path


def test_the_report_sets_what_was_measured_beside_the_claims(fabricated):
    report = video.report(fabricated, [0, 1])
    assert "**21 of 24 cells are not finished.**" in report
    rows = {
        (cells[0], cells[1]): cells
        for line in report.splitlines()
        if line.startswith("| G") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 8
    }
    assert set(rows) == {("G1 (1, 1)", form) for form in ("standard", "lowrank", "feature")}
    lowrank = rows["G1 (1, 1)", "lowrank"]
    assert lowrank[3:5] == ["-27.6% [-27.6%, -27.6%]", "-27.6%"] and lowrank[7] == "1.10x [1.10, 1.10]"
    assert "reproduced: -27.6%" in report and "contradicted: +0.0%" in report  # lowrank and feature
    assert "contradicted: 1.10x" in report and "reproduced: 1.80x" in report
    assert "mean frame 0.0400" in report and "a machine" in report


# The grid of multi-attention-weight attention.


def test_every_cell_of_retrieval_is_a_config_of_the_same_size():
    made = retrieval.cells([0, 1])
    assert len({cell.name for cell in made}) == len(made) == 2 * len(retrieval.FORMS)
    for form in retrieval.FORMS:
        config = retrieval.cell(form, 0).load()
        task = Rerank(config)
        task.vocab_size = config.task.vocab_size
        count = num_parameters(task, within_budget(task, config.parameter_budget))
        assert abs(count - retrieval.PARAMETERS) < TOLERANCE * retrieval.PARAMETERS, form
    assert retrieval.cell("maw grpo", 0).load().task.router.method == "grpo"
    assert retrieval.cell("standard", 0, "parameter_budget=0").load().parameter_budget == 0


@pytest.fixture
def reranked(tmp_path):
    """Two seeds: the supervised router has the claimed gains, the other none; performer has one seed only."""
    hits = (np.random.default_rng(0).random(60) < 0.3).astype(float)
    gains = {"standard": 1.0, "maw supervised": 1.31, "maw grpo": 1.0, "performer": 1.0}
    for form, gain in gains.items():
        for seed in (0,) if form == "performer" else (0, 1):
            folder = tmp_path / retrieval.cell(form, seed).name
            folder.mkdir()
            examples = {"hit@1": gain * hits, "mrr@10": hits / 2, "ndcg@10": hits / 2}
            test = {name: float(values.mean()) for name, values in examples.items()}
            test |= {f"bm25/{name}": 0.123 for name in examples}
            if form.startswith("maw"):
                for layer in (0, 1):
                    test |= {f"layer {layer}/depth {d}": [0.25, 0.75][(d + seed) % 2] for d in range(2)}
                    test[f"encoder/transformer/blocks/{layer}/attention/router_entropy"] = 1.5 + layer
            baselines = {"bm25": 0.123, "perfect order of its candidates": 0.7, "random order of them": 0.2}
            result = {"test": test, "baselines": baselines, "parameters": 4321, "seconds_per_step": 0.1}
            result |= {"steps": 10, "compile_seconds": 1.0, "versions": {"jax": "0"}}
            write_json(folder / "result.json", result)
            write_json(folder / "test_examples.json", {name: v.tolist() for name, v in examples.items()})
    groups = {
        "training": {"standard": [1.0] * 5, "maw grpo": [4.0] * 5},
        "same width": {"standard": [1.0] * 5},
        "scoring": {"standard": [0.5] * 5},
    }
    machine = {"device": "a machine", "cores": 2, "load": 0.1}
    write_json(tmp_path / "step_times.json", {"groups": groups, "environment": machine})
    return tmp_path


def test_the_report_of_retrieval_sets_what_was_measured_beside_the_claims(reranked):
    report, settings = retrieval.report(reranked, [0, 1]), len(retrieval.FORMS)
    assert f"**{settings - 3} of {settings} settings are not finished.**" in report
    assert "reproduced: +31.0% [+31.0%, +31.0%]" in report and "contradicted: +0.0%" in report
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    _, cost, *routes = [row for row in rows if row[0] == "maw grpo"]
    assert cost[1:3] == ["4,321", "4.00x [4.00, 4.00]"]
    # Depths are ranked within a run: 1 in one and 0 in the other are both its first.
    assert routes == [["maw grpo", "1", "1.50", "0.75 0.25"], ["maw grpo", "2", "2.50", "0.75 0.25"]]
    _, cost = [row for row in rows if row[0] == "standard"]
    assert [float(value) for value in cost[-2:]] == [16, 320]  # 8 queries of 20 candidates in half a second
    assert "0.123" in report and "0.700" in report and "a machine" in report
    assert f"**{settings} of {settings} settings are not finished.**" in retrieval.report(reranked, [5])


# The grid of Long Range Arena.


def test_the_four_of_the_source_have_every_seed_and_models_of_one_size():
    cells = lra.cells([0, 1, 2])
    others = len(attn_jax.MECHANISMS) - len(lra.SOURCE)
    assert len({cell.name for cell in cells}) == len(cells) == len(lra.TASKS) * (3 * len(lra.SOURCE) + others)
    for name in ("standard", "multi_timescale", "mamba"):
        for task in lra.TASKS:
            config = lra.cell(task, name, 0).load()
            made = TASKS[task](config)
            count = num_parameters(made, within_budget(made, config.parameter_budget))
            assert abs(count - lra.PARAMETERS) <= TOLERANCE * lra.PARAMETERS
            assert config.steps % config.eval_every == 0 and config.steps <= 20 * config.eval_every


def test_the_report_of_long_range_arena_holds_what_is_finished(tmp_path):
    assert "**44 of 44 runs are not finished.**" in lra.report(tmp_path, [0, 1, 2])
    for name, accuracy in (("standard", 0.4), ("gravitational", 0.6)):
        made = lra.cell("listops", name, 0)
        folder = tmp_path / made.name
        folder.mkdir()
        config = made.load()
        write_json(folder / "config.json", configs.to_dict(config))
        result = {
            "name": "lra_listops",
            "preset": "default",
            "mechanism": name,
            "seed": 0,
            "config_hash": configs.config_hash(config),
            "comparable": False,
            "comparability": "a test",
            "primary": "accuracy",
            "better": "higher",
            "test": {"accuracy": accuracy, "blocks/0/attention/share": 0.25},
            "validation": 0.5,
            "baselines": {"majority": 0.2},
            "best_step": 94,
            "steps": 188,
            "steps_per_epoch": 94,
            "epochs": 2.0,
            "steps_to_90_percent_of_best": 94,
            "epochs_to_90_percent_of_best": 1.0,
            "compile_seconds": 1.0,
            "seconds_per_step": 0.5,
            "seconds_per_epoch": 47.0,
            "peak_memory_bytes": 2**30,
            "parameters": 600_000,
            "devices": "1 x cpu",
            "versions": {"jax": "0"},
        }
        write_json(folder / "result.json", result)
        write_json(folder / "test_examples.json", {"accuracy": [float(n < 100 * accuracy) for n in range(100)]})
        (folder / "metrics.jsonl").write_text("")
    report = lra.report(tmp_path, [0, 1, 2])
    assert "**42 of 44 runs are not finished.**" in report and "+50.0%" in report
    assert "| listops | gravitational | blocks/0/attention/share | 0.250 |" in report


def test_wrong_requests_are_said(tmp_path, capsys):
    for argv, expected in (
        (["nope"], "invalid choice: 'nope'"),
        (["video", "--seeds", "a"], "non-negative integers"),
        (["video", "--processes", "0"], "--processes must be positive"),
    ):
        with pytest.raises(cli.UsageError, match=expected):
            main(argv)
    main(["video", "--report", "--out", str(tmp_path / "new")])
    assert "24 of 24 cells are not finished" in (tmp_path / "new" / "report.md").read_text()
    assert "## The source's claims" in capsys.readouterr().out
