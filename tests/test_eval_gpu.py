"""The command for whoever has a GPU, as far as it goes without one."""

import argparse

import jax
import pytest

from eval import gpu
from eval.measure import PASSES
from train import cli

SMALL = argparse.Namespace(lengths=[32], batch=1, heads=2, width=8, repeats=1)


def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(cli.RunError, match=r"no NVIDIA GPU: JAX found CPU.*pip install"):
        gpu.main([])


def test_the_readme_says_whether_gpu_times_are_measured():
    measured = list((gpu.TESTS.parent / "docs").glob("gpu_*.md"))
    readme = " ".join((gpu.TESTS.parent / "README.md").read_text().split())
    assert ("No GPU time has been measured yet" in readme) == (not measured)


def test_pytest_output_is_counted():
    output = "FAILED tests/test_kernel_scan.py::test_a - boom\n1 failed, 20 passed, 2 skipped in 3.4s\n"
    assert gpu.outcome(output, 1) == {
        "passed": 20,
        "failed": 1,
        "skipped": 2,
        "failures": ["tests/test_kernel_scan.py::test_a"],
    }
    assert gpu.outcome("out of memory", 1)["failed"] == 1


def test_cases_run_and_what_a_library_cannot_do_is_said(monkeypatch):
    """On a CPU in the place of the GPU, where neither the kernel nor cuDNN runs."""
    monkeypatch.setattr(gpu, "CALLS", 1)
    every = {case.name: case for case in gpu.cases(32, SMALL)}
    monkeypatch.setattr(gpu, "cases", lambda length, args: [every["standard causal"], every["selective scan"]])
    records = list(gpu.measure(SMALL))
    assert len(records) == len(PASSES) * 2
    for record in records:
        found = record["contenders"]
        assert found["kernel"]["status"].startswith("NotImplementedError")
        assert found["portable"]["seconds"] > 0
        assert "jax.nn cudnn" not in found or found["jax.nn cudnn"]["status"] != "ok"
    measured = {"device": "A GPU", "date": "2030-01-01", "versions": {"jax": jax.__version__}, "plugin": {}}
    tests = {"passed": 1, "failed": 1, "skipped": 0, "failures": ["tests/test_kernel_x.py::test_y"]}
    text = gpu.markdown(measured | {"tests": tests, "times": records, "flags": vars(SMALL)})
    assert "test_kernel_x.py::test_y" in text and all(f"| {r['case']} " in text for r in records)
