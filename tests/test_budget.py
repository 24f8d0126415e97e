"""Models of equal size, whatever their mechanism."""

import logging

import pytest

from tests.runs import outcome
from train import config as configs
from train.__main__ import main
from train.tasks import TASKS
from train.tasks.budget import TOLERANCE, num_parameters, within_budget

BUDGET = 250_000


@pytest.mark.parametrize("name", ["standard", "mamba", "multi_timescale"])
def test_mechanisms_share_a_budget(name, caplog):
    caplog.set_level(logging.INFO, "train")
    task = TASKS["listops"](configs.load(f"configs/lra_listops.py:{name}", []))
    config = within_budget(task, BUDGET)
    count = num_parameters(task, config)
    # A hidden unit more or less is far below the tolerance, so the rounding may take all of neither.
    assert abs(count - BUDGET) < 0.1 * TOLERANCE * BUDGET
    assert f"model.mlp_dim {config.model.mlp_dim}: {count:,} parameters" in caplog.text
    assert task.config.model.mlp_dim == 128, "the config that was given is not changed"
    assert configs.differing_keys(config.to_dict(), task.config.to_dict()) == ["model.mlp_dim"]


@pytest.mark.parametrize(
    "config, budget, complaint",
    [
        (
            "configs/lra_listops.py:smoke",
            10_000,
            "with `standard` and model.mlp_dim 1 there are 34,967 parameters",
        ),
        ("configs/video_slots.py:smoke", 100_000, "which the model of task `video` does not have"),
    ],
)
def test_a_budget_that_cannot_be_met_is_said(config, budget, complaint, tmp_path):
    arguments = ("--config", config, f"--config.parameter_budget={budget}", "--workdir", tmp_path / "run")
    code, _, error = outcome(main, *arguments)
    assert code == 2 and complaint in error
