"""`python -m eval` on a run of the trainer."""

import json

import pytest

from eval.__main__ import main
from tests import toy
from train import cli, loop
from train.workdir import open_workdir, read_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = toy.get_config("smoke")
    config.mesh.data = 1
    config.file = toy.__file__
    with open_workdir(workdir, config):
        return workdir, loop.train(config, workdir)


def outcome(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        cli.run(main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_metrics_stand_beside_the_baselines(run, capsys):
    workdir, result = run
    for split, expected in (("val", result["validation"]), ("test", result["test"]["accuracy"])):
        with open_workdir(workdir, read_config(workdir)):  # as while the run is still training
            code, out, _ = outcome(capsys, "--workdir", workdir, "--split", split)
        assert code == 0
        written = json.loads((workdir / f"eval_{split}.json").read_text())
        assert written["step"] == result["best_step"]
        assert written["metrics"]["accuracy"] == expected
        lines = {line.split()[0]: line for line in out.splitlines()}
        assert f"{expected:.4f}" in lines["standard"]
        assert f"{written['baselines']['majority']:.4f}" in lines["majority"]
        assert f"{result['parameters']:,} parameters" in out


def test_what_cannot_be_evaluated_is_one_line(tmp_path, capsys):
    unvalidated = tmp_path / "unvalidated"
    with open_workdir(unvalidated, toy.get_config()):
        pass
    for argv, expected in (
        ([], "--workdir"),
        (["--workdir", tmp_path / "nope"], "no config.json"),
        (["--workdir", unvalidated], "no checkpoint"),
        (["--workdir", unvalidated, "--split", "nope"], "invalid choice"),
    ):
        code, _, error = outcome(capsys, *argv)
        assert code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error


def test_help_is_help(capsys):
    code, out, _ = outcome(capsys, "--help")
    assert code == 0 and "python -m eval --workdir" in out
