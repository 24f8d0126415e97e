"""One process, eight CPU devices, no network, and half the compile time."""

import atexit
import gc
import os
import shutil
import tempfile

if os.environ.get("ATTN_JAX_KERNELS") != "gpu":  # see tests/kernels.py
    os.environ["JAX_PLATFORMS"] = "cpu"
# Programs as small as these compile faster in one piece than in the parts that XLA shares out among threads.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"
# What takes long to compile is kept for other tests: here, in other workers, and in processes that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="attn_jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import hypothesis
import jax
import pytest

import tests.kernels  # noqa: F401  # for its callbacks; and JAX traces everything anew once Pallas is imported
from train.config import run_file

# JAX makes so many objects that its graphs are walked through for garbage a tenth of the time.
gc.set_threshold(20_000)
jax.config.update("jax_num_cpu_devices", 8)
# Compilation dominates these tests. Results differ from optimised ones by rounding only (4e-7 measured), and
# what must be exact to the bit runs in subprocesses, which do not see this.
jax.config.update("jax_disable_most_optimizations", True)

hypothesis.settings.register_profile("attn_jax", deadline=None, derandomize=True, max_examples=20)
hypothesis.settings.load_profile("attn_jax")


def pytest_addoption(parser):
    parser.addoption(
        "--mechanism", metavar="FILE.py", help="a file to run first, which registers mechanisms to test"
    )


def pytest_configure(config):
    if file := config.getoption("--mechanism"):
        if not Path(file).is_file():
            raise pytest.UsageError(f"--mechanism: no file {file}")
        run_file(file)


def pytest_collection_modifyitems(items):
    """The conformance suite runs mechanism by mechanism, so that few workers compile the same one."""

    def mechanism(item):
        return item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""

    places = [i for i, item in enumerate(items) if item.path.name == "test_conformance.py"]
    for place, item in zip(places, sorted((items[i] for i in places), key=mechanism)):
        items[place] = item
