"""Where the tests of the kernels run: interpreted, with race detection, or (ATTN_JAX_KERNELS=gpu) on a GPU."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

from attn_jax.engine import dispatch
from pallas_kernels.hardware import INTERPRETER, Hardware, detect

ON_GPU = os.environ.get("ATTN_JAX_KERNELS") == "gpu"
IMPLEMENTATION = "mosaic" if ON_GPU else "mosaic_interpret"

only_interpreted = pytest.mark.skipif(ON_GPU, reason="a GPU reports no races")


def reports_race(run: Callable[[], Any], capsys) -> bool:
    """Whether the interpreter finds a race in `run`: JAX 0.12 raises it, 0.11 prints it."""
    try:
        jax.block_until_ready(run())
        said = ""
    except Exception as error:
        said = str(error)
    finally:
        reset_gpu_interpret_mode_state()  # which remembers a kernel that failed
    return "RACE DETECTED" in said + capsys.readouterr().out


def hardware_of(instruction: str) -> Hardware:
    """Where the kernels run, by this matrix instruction; skips the test on a GPU that lacks it."""
    found = detect() if ON_GPU else INTERPRETER
    if ON_GPU and instruction == "wgmma" != found.instruction:
        pytest.skip("this GPU has no wgmma")
    return dataclasses.replace(found, instruction=instruction)


def multiply_by(instruction: str, monkeypatch) -> None:
    """Makes `IMPLEMENTATION` use this matrix instruction; skips the test on a GPU that lacks it."""
    hardware = hardware_of(instruction)
    if ON_GPU:
        monkeypatch.setattr(dispatch, "detect", lambda: hardware)
    else:
        monkeypatch.setattr(dispatch, "INTERPRETER", hardware)
