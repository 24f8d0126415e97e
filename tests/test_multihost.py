"""Two processes give what one gives on as many devices, stop together, and go on alone; on real processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests import toy
from tests.runs import assert_bit_equal, final_state, outcome
from train.__main__ import main
from train.workdir import read_metrics

# Programs compile fast, and each is kept for the runs that resume.
CHEAP = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

LENGTHS = {"eval_every": 2, "log_every": 2, "task.sizes.val": 8, "task.sizes.test": 9}
SHORT = [f"--config.{key}={value}" for key, value in LENGTHS.items()]

# Runs commands of `python -m train` one after another, each with its own event, for their exit codes and errors.
PROCESS = """
import contextlib, io, json, os, shutil, sys
from train import cli, workdir
from train.__main__ import main

workdir._VISIBLE = 0
ended = []
for event, copy, argv in json.loads(sys.argv[1]):
    os.environ["TOY_EVENT"] = event or ":0"
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(main, argv)
    except SystemExit as exit:
        ended.append((exit.code, out.getvalue(), err.getvalue()))
    if copy:
        shutil.copytree(*copy)
print("ENDED", json.dumps(ended))
"""


def start(*commands, devices):
    """A process that runs `commands`: `(arguments, event, folders to copy from and to)`."""
    argv = [
        (event, copy, ["--config", "tests/toy.py", f"--config.num_cpu_devices={devices}", *SHORT, *arguments])
        for arguments, event, copy in commands
    ]
    command = [sys.executable, "-c", PROCESS, json.dumps(argv)]
    environment = os.environ | CHEAP
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Of each command of a process the exit code, what it printed, and its errors."""
    out, err = process.communicate(timeout=200)
    lines = [line for line in out.splitlines() if line.startswith("ENDED")]
    assert lines, err
    return json.loads(lines[0].removeprefix("ENDED"))


def free_address():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name what became of each command at both processes, in the folder they worked in."""
    folder = tmp_path_factory.mktemp("runs")
    address = free_address()

    def commands(index):
        by_hand = [
            f"--config.distributed.coordinator={address}",
            "--config.distributed.num_processes=2",
            f"--config.distributed.process_id={index}",
        ]

        def command(name, *settings, event="", copy=None):
            return [*by_hand, f"--workdir={folder / name}", *settings], event, copy

        sharded, elsewhere = ["--config.mesh.fsdp=2", "--config.steps=4"], f"--workdir={folder / 'elsewhere'}"
        return {
            "auto": (["--config.distributed.coordinator=auto"], "", None),
            "other settings": command("refused", f"--config.seed={index}"),
            "other folders": command("refused", *[elsewhere][:index]),
            "idle devices": command("refused", "--config.mesh.data=1"),
            "batch": command("refused", "--config.batch_size=7"),
            "data": command("data", "--config.steps=2"),
            "stopped": command("fsdp", *sharded, event="term:3" if index else ""),
            "copied": command(
                "refused", "--config.mesh.data=3", copy=[folder / "fsdp", folder / "alone"][: 2 - 2 * index]
            ),
            "resumed": command("fsdp", *sharded),
            "again": command("fsdp", *sharded),
        }

    def encoded(index):
        return [(a, e, c and [str(x) for x in c]) for a, e, c in commands(index).values()]

    both = [start(*encoded(index), devices=1) for index in range(2)]
    try:
        found = {name: pair for name, *pair in zip(commands(0), *map(ended, both))}
    finally:
        for process in both:  # one that waits for the other, if that failed
            process.kill()
            process.communicate()
    alone = [
        [f"--workdir={folder / name}", f"--config.mesh.{axis}=2", f"--config.steps={steps}"]
        for name, axis, steps in (("one data", "data", 2), ("one fsdp", "fsdp", 4), ("alone", "fsdp", 4))
    ]
    codes = [code for code, _, _ in ended(start(*[(argv, "", None) for argv in alone], devices=2))]
    assert codes == [0] * len(alone)
    return folder, found


@pytest.mark.parametrize(
    "ours, theirs",
    [("data", "one data"), ("fsdp", "one fsdp"), ("alone", "one fsdp")],
    ids=["two processes", "stopped and resumed, sharded parameters", "stopped, resumed by one process"],
)
def test_the_number_of_processes_changes_no_bit(runs, ours, theirs):
    folder, _ = runs
    ours, theirs = folder / ours, folder / theirs
    assert read_metrics(ours / "metrics.jsonl") == read_metrics(theirs / "metrics.jsonl")
    assert (ours / "test_examples.json").read_text() == (theirs / "test_examples.json").read_text()
    results = [json.loads((where / "result.json").read_text()) for where in (ours, theirs)]
    for key in ("test", "validation", "best_step", "config_hash", "devices", "mesh", "parameters"):
        assert results[0][key] == results[1][key], key
    config = toy.get_config()
    config.mesh.data = 1
    _, state, progress, position = final_state(config, ours)
    _, expected, expected_progress, expected_position = final_state(config, theirs)
    assert_bit_equal(state, expected)
    assert (progress["history"], position) == (expected_progress["history"], expected_position)


def test_a_signal_to_one_process_stops_both_at_one_step(runs):
    _, found = runs
    for code, _, error in found["stopped"]:
        assert code == 128 + 15
        assert "saved step 3" in error
    assert "resuming after step 3" in found["resumed"][0][1]


def test_only_process_0_prints(runs):
    _, found = runs
    for name in ("data", "stopped", "resumed", "again"):
        (_, first, _), (_, second, _) = found[name]
        assert "work directory" in first and not second
    assert "this run is finished" in found["again"][0][1]
    assert [code for code, _, _ in found["again"]] == [0, 0]


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("auto", "JAX finds no cluster here"),
        ("other settings", "process 1 was started with other settings than process 0 (seed)"),
        ("other folders", "is not the work directory of process 0"),
        ("idle devices", "leaves devices idle: 2 processes have 2"),
        ("batch", "batch_size 7 cannot be split over the 2 devices"),
        ("copied", "needs 3 devices, there are 2"),
    ],
)
def test_what_processes_cannot_do_together_is_refused_by_both(runs, name, complaint):
    _, found = runs
    for code, _, error in found[name]:
        assert code == 2
        assert complaint in error.splitlines()[-1]


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"num_processes": 2}, "coordinator is missing"),
        ({"coordinator": "auto", "num_processes": 2}, "takes neither"),
        ({"coordinator": "here", "num_processes": 2}, "must be HOST:PORT of process 0 or auto, got here"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, "process_id must be in"),
        ({"coordinator": "here:1"}, "process_id must be in"),
        ({"coordinator": None, "num_processes": 2, "process_id": 1, "timeout": 1}, "no process 0 at 127.0.0.1:"),
    ],
)
def test_a_process_that_cannot_join_says_why(tmp_path, settings, complaint):
    settings = {key: free_address() if value is None else value for key, value in settings.items()}
    flags = [f"--config.distributed.{key}={value}" for key, value in settings.items()]
    code, _, error = outcome(main, "--config", "tests/toy.py", "--workdir", tmp_path / "run", *flags)
    assert code == 2
    assert complaint in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()
