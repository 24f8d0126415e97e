"""Killed at any moment, a run goes on to the bit; checked on real processes that compile as users' do."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import toy
from tests.runs import assert_bit_equal, final_state
from train.workdir import read_metrics


def train(workdir, event=""):
    """`python -m train` on the toy; returns the finished process."""
    command = [sys.executable, "-m", "train", "--config", "tests/toy.py", "--workdir", str(workdir)]
    environment = os.environ | {"TOY_EVENT": event or ":0"}
    return subprocess.run(
        [*command, "--config.num_cpu_devices=2"], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_killed_and_stopped_ends_bit_equal_to_an_uninterrupted_one(uninterrupted, tmp_path):
    moment = int(np.random.default_rng().integers(9, 20))  # any will do
    assert train(tmp_path, f"kill:{moment}").returncode == -signal.SIGKILL
    stopped = train(tmp_path, "term:3")  # within the steps of one record of `metrics.jsonl`
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in stopped.stderr
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout

    config = toy.get_config()
    config.mesh.data = 1
    task, ours, progress, position = final_state(config, tmp_path)
    _, theirs, expected_progress, expected_position = final_state(config, uninterrupted)
    assert_bit_equal(ours, theirs, f"killed at {moment}")
    assert bool(np.any(ours.model.rest["mean"])), "the state that is no parameter takes part"
    assert int(ours.model.rest["dropout"]["rngs"]["count"]) > 1, "and so does the randomness"

    assert (progress["history"], position) == (expected_progress["history"], expected_position)
    batches = []
    for where in (position, expected_position):
        iterator = task.train_iterator(0)
        iterator.set_state(where)
        batches.append(next(iterator))
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert read_metrics(tmp_path / "metrics.jsonl") == read_metrics(uninterrupted / "metrics.jsonl")
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path, uninterrupted)]
    assert results[0]["test"] == results[1]["test"]
