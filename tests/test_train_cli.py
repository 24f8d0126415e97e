"""What a user sees of `python -m train`: one line and an exit code for each mistake, and nothing lost."""

import json
import shlex
import signal
import subprocess
import sys

import pytest

from train import cli
from train.__main__ import default_workdir, headline, main
from train.config import load
from train.workdir import open_workdir

TOY = ["--config", "tests/toy.py", "--config.mesh.data=1", "--config.steps=2"]


def outcome(capsys, *argv):
    """Exit code, standard output and standard error of `python -m train` with `argv`."""
    with pytest.raises(SystemExit) as exit:
        cli.run(main, [str(argument) for argument in argv])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def complaint(capsys, *argv, code=2):
    """The one line of a command that is refused."""
    found, _, error = outcome(capsys, *argv)
    assert found == code, error
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    return error


def test_help_is_help(capsys):
    code, out, _ = outcome(capsys, "--help")
    assert code == 0
    assert "python -m train --config configs/lra_listops.py:performer,smoke" in out


def test_a_reader_who_has_enough_ends_a_command_quietly():
    """As in `python -m train --config FILE.py --show | head`."""
    command = [sys.executable, "-m", "train", "--config", "tests/toy.py", "--show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("config", ["configs/lra_listops.py:mamba,paper", "configs/video_slots.py:dual_kv"])
def test_shown_settings_can_be_given_back(capsys, config):
    code, out, _ = outcome(capsys, "--config", config, "--config.seed=3", "--show")
    headline, *settings = out.splitlines()
    assert code == 0 and "seed 3" in headline
    fixed = ("name=", "file=", "preset=", "comparable=", "comparability=", "mechanism.name=")
    given = [f"--config.{word}" for line in settings for word in shlex.split(line) if not word.startswith(fixed)]
    assert load(config, given).to_dict() == load(config, ["--config.seed=3"]).to_dict()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "--config"),
        (["--config", "nope.py"], "no config file `nope.py`"),
        (["--config", "tests/toy.py:nope"], "`nope` is neither a preset"),
        ([*TOY, "--config.nope=1"], "has no `nope`"),
        ([*TOY, "--config.seed=x"], "invalid literal"),
        ([*TOY, "--config.mechanism.name=nope"], "no mechanism `nope`"),
        ([*TOY, "nope"], "unexpected argument `nope`"),
        ([*TOY, "--config.optimizer.schedule=nope"], "optimizer.schedule `nope` is not one of"),
        ([*TOY, "--config.task.name=nope"], "task.name `nope` is not one of"),
        ([*TOY, "--config.mesh.data=3"], "batch_size 8 cannot be split over the 3 devices"),
        ([*TOY, "--config.model.dim=-1"], "-1"),
    ],
)
def test_a_request_that_cannot_be_honoured(capsys, tmp_path, argv, expected):
    assert expected in complaint(capsys, *argv, "--workdir", tmp_path / "run")


def test_a_work_directory_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = complaint(capsys, *TOY, "--workdir", tmp_path / "file" / "run")
    assert "cannot write to the work directory" in error


def test_a_work_directory_in_use_is_left_alone(capsys, tmp_path):
    config = load("tests/toy.py", [])
    with open_workdir(tmp_path, config):
        before = (tmp_path / "config.json").read_text()
        assert "another process is training" in complaint(capsys, *TOY, "--workdir", tmp_path)
        assert (tmp_path / "config.json").read_text() == before
    with open_workdir(tmp_path, config):
        pass  # the lock is gone with its holder


def test_a_work_directory_of_other_settings_is_left_alone(capsys, tmp_path):
    with open_workdir(tmp_path, load("tests/toy.py", [])):
        before = (tmp_path / "config.json").read_text()
    (tmp_path / "metrics.jsonl").touch()
    error = complaint(capsys, *TOY, "--workdir", tmp_path, "--config.model.dim=8", "--config.seed=2")
    assert "other settings" in error and "model.dim" in error and "seed" in error
    assert "delete" in error
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_that_never_started_binds_nobody(tmp_path):
    for options in ([], ["--config.model.dim=8"]):
        with open_workdir(tmp_path, load("tests/toy.py", options)):
            pass
    assert json.loads((tmp_path / "config.json").read_text())["model"]["dim"] == 8


def test_a_damaged_config_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "metrics.jsonl").touch()
    assert "cannot read" in complaint(capsys, *TOY, "--workdir", tmp_path)


def test_a_truncated_tsv_is_named_with_its_line(capsys, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val", "test"):
        (data / f"basic_{split}.tsv").write_text("Source\tTarget\n( ( [MAX 1 ) ] )\t1\n( ( [MAX 1 ) ")
    argv = ["--config", "configs/lra_listops.py:smoke", f"--config.task.data_dir={data}"]
    error = complaint(capsys, *argv, "--workdir", tmp_path / "run")
    assert "basic_train.tsv:3" in error


def test_a_diverged_run_fails_with_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_EVENT", "inf:1")
    error = complaint(capsys, *TOY, "--workdir", tmp_path, code=1)
    assert "step 1: the loss is inf" in error


def test_a_finished_run_is_shown_again_not_trained_again(capsys, tmp_path):
    argv = [*TOY, "--workdir", tmp_path]
    code, first, _ = outcome(capsys, *argv)
    assert code == 0
    lines = first.splitlines()
    assert "NOT comparable with published numbers" in lines[0] and "preset default" in lines[0]
    assert any(line.startswith("majority ") for line in lines), "the baseline is printed beside the model"
    written = (tmp_path / "result.json").stat().st_mtime_ns
    code, second, _ = outcome(capsys, *argv)
    assert code == 0 and "this run is finished" in second
    assert lines[-1] in second
    assert (tmp_path / "result.json").stat().st_mtime_ns == written


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(broken, [])


def test_names_of_runs():
    config = load("tests/toy.py:local,smoke", ["--config.seed=7"])
    assert str(default_workdir(config)) == "runs/toy-local-smoke-s7"
    assert headline(config).startswith("toy, preset smoke, mechanism local, seed 7: NOT comparable")
    config.comparable = True
    assert ": comparable with published numbers" in headline(config)


def test_listops_trains_from_the_command_line_without_tensorflow(tmp_path):
    sizes = {"num_train": 64, "num_val": 16, "num_test": 16, "max_length": 40}
    argv = ["--config", "configs/lra_listops.py:smoke", "--workdir", str(tmp_path / "run"), "--config.steps=2"]
    argv += [f"--config.task.generator.{key}={value}" for key, value in sizes.items()]
    argv += [f"--config.model.{setting}" for setting in ("dim=8", "num_heads=1", "num_layers=1", "mlp_dim=8")]
    argv += ["--config.task.buckets=(39,)", "--config.num_cpu_devices=1"]
    program = f"import sys; from train.__main__ import main; main({argv!r}); print('tensorflow' in sys.modules)"
    environment = {"ATTN_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", "PATH": ""}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["baselines"]) == {"majority", "root operator"}
