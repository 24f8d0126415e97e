"""The package as a user gets it: what the wheel holds, that it works alone, and what importing it costs."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"attn_jax", "pallas_kernels"}

# Of one core, for what importing attn_jax does beyond JAX and Flax; 0.03 s measured, 0.15 s where its files are
# compiled first. One import of a library for data sets would exceed it.
IMPORT_SECONDS = 0.5


def python(program, *, executable=sys.executable, **environment):
    """The JSON that `program` prints in a process of its own, which finds nothing in the current folder."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [executable, "-P", "-c", program],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run([*command, "--no-deps", "--no-index"], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the backend that is installed: an isolated build would have to fetch it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_the_two_packages_their_types_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert code == sources | {f"{package}/py.typed" for package in PACKAGES}
    metadata = {name.partition(".dist-info/")[2] for name in names - code}
    assert metadata == {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}


USE = """
import importlib.util, json, sys
import equinox as eqx
import jax, jax.numpy as jnp
from flax import linen, nnx
import attn_jax, pallas_kernels
from attn_jax import ops
from attn_jax.interop import attention_fn

local = attention_fn(ops.local_attention, window=1)

class Model(nnx.Module):
    def __init__(self, rngs):
        self.mix = attn_jax.build("dual_kv", dim=16, num_heads=2, rngs=rngs)
        self.out = nnx.Linear(16, 16, rngs=rngs)
    def __call__(self, x):
        return self.out(self.mix(x))

class Mixer(eqx.Module):
    query: eqx.nn.Linear
    def __call__(self, x):
        q = jax.vmap(self.query)(x).reshape(1, -1, 2, 8)
        return ops.standard_attention(q, q, q).reshape(x.shape)

@jax.jit
def outputs(x):
    of_nnx = nnx.MultiHeadAttention(2, 16, attention_fn=local, decode=False, rngs=nnx.Rngs(0))
    of_linen = linen.MultiHeadDotProductAttention(2, attention_fn=local)
    return {
        "build": Model(nnx.Rngs(0))(x),
        "nnx": of_nnx(x),
        "linen": of_linen.init_with_output(jax.random.key(0), x)[0],
        "equinox": jax.vmap(Mixer(eqx.nn.Linear(16, 16, key=jax.random.key(0))))(x),
    }

x = jnp.sin(jnp.arange(2 * 5 * 16.0)).reshape(2, 5, 16)
outputs = {name: [y.shape == x.shape, bool(jnp.isfinite(y).all())] for name, y in outputs(x).items()}
elsewhere = [name for name in ("train", "eval", "configs", "tests") if importlib.util.find_spec(name)]
files = [attn_jax.__file__, pallas_kernels.__file__]
print(json.dumps({"files": files, "elsewhere": elsewhere, "outputs": outputs}))
"""


def test_it_works_alone_in_models_of_three_libraries(wheel, tmp_path):
    """In a fresh environment, which has the wheel and, so that nothing is fetched, the libraries of this one."""
    venv.create(tmp_path, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path), "platbase": str(tmp_path)}))
    executable = str(tmp_path / "bin" / "python")
    pip("--python", executable, "install", wheel)
    # A folder named in such a file is searched after the environment's own, and such files in it are not read: the
    # installation that the tests run from is not found.
    libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "libraries.pth").write_text("\n".join(libraries))
    said = python(USE, executable=executable, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert said["elsewhere"] == []
    assert {Path(file).parent.parent for file in said["files"]} == {own}
    assert said["outputs"] == {name: [True, True] for name in ("build", "nnx", "linen", "equinox")}


IMPORT = """
import json, sys, time
{before}
start, loaded = time.process_time(), set(sys.modules)
import {package}
seconds, added = time.process_time() - start, set(sys.modules) - loaded
added = sorted({{name.partition(".")[0] for name in added}} - sys.stdlib_module_names)
print(json.dumps({{"seconds": seconds, "whole": time.process_time(), "added": added}}))
"""


def test_importing_it_costs_little_beyond_jax_and_flax():
    program = IMPORT.format(before="import jax, flax.nnx", package="attn_jax")
    said = python(program, PYTHONPATH=str(ROOT))
    print(f"attn_jax: {said['seconds']:.3f} s of {said['whole']:.2f} s from the start of the process")
    assert said["seconds"] < IMPORT_SECONDS
    # None of what trains, evaluates, reads data or draws: flax and jax are here for parts of them.
    assert set(said["added"]) <= PACKAGES | {"flax", "jax", "jaxlib"}


def test_the_kernels_are_imported_alone():
    said = python(IMPORT.format(before="", package="pallas_kernels"), PYTHONPATH=str(ROOT))
    assert said["added"] == ["pallas_kernels"]
