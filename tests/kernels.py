"""Where the tests of the kernels run: interpreted, with race detection, or (ATTN_JAX_KERNELS=gpu) on a GPU."""

import dataclasses
import os

import pytest

from attn_jax.engine import dispatch
from pallas_kernels.hardware import INTERPRETER, detect

ON_GPU = os.environ.get("ATTN_JAX_KERNELS") == "gpu"
IMPLEMENTATION = "mosaic" if ON_GPU else "mosaic_interpret"

only_interpreted = pytest.mark.skipif(ON_GPU, reason="a GPU reports no races")


def multiply_by(instruction: str, monkeypatch) -> None:
    """Makes `IMPLEMENTATION` use this matrix instruction; skips the test on a GPU that lacks it."""
    if not ON_GPU:
        monkeypatch.setattr(dispatch, "INTERPRETER", dataclasses.replace(INTERPRETER, instruction=instruction))
        return
    found = detect()
    if instruction == "wgmma" != found.instruction:
        pytest.skip("this GPU has no wgmma")
    monkeypatch.setattr(dispatch, "detect", lambda: dataclasses.replace(found, instruction=instruction))
