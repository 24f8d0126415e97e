# %% [markdown]
# # Write your own mechanism
#
# A mechanism is one class. This notebook writes one in thirty lines, lets the project's conformance suite look
# for mistakes in it, and trains it on ListOps beside the trivial baselines.
#
# In a checkout of the repository the next cell installs nothing. Elsewhere, on Colab say, it clones the
# repository and installs it for the device that it finds; if an import fails afterwards, restart the runtime and
# begin again.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # what `git clone` takes; needed outside a checkout only
EXTRAS = ["test"]  # of pyproject.toml
SMOKE = os.environ.get("ATTN_JAX_SMOKE") == "1"  # everything small, to see that it runs: so it is tested

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "attn_jax" / "registry.py").is_file()), None)
if root is None:
    root = Path.cwd() / "attn-jax"
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
        EXTRAS += ["cuda12"]
    elif {"COLAB_TPU_ADDR", "TPU_NAME", "TPU_ACCELERATOR_TYPE"} & {*os.environ} or Path("/dev/accel0").exists():
        EXTRAS += ["tpu"]
    if not root.exists():
        if not REPOSITORY:
            raise RuntimeError("set REPOSITORY in this cell to the address of attn-jax, as `git clone` takes it")
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(root)], check=True)
    package = f"{root}[{','.join(EXTRAS)}]" if EXTRAS else str(root)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--editable", package], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %%
import tempfile

LAWS = "cosine and attention_weights" if SMOKE else "cosine"  # of the conformance suite
SIZES = ["--config.steps=2", "--config.model.num_layers=1"] if SMOKE else []  # beside the preset `smoke`
FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The mechanism
#
# Standard attention weighs a key by the dot product with the query, which grows with the length of both. This one
# takes the cosine of their angle instead, times a scale that each head learns:
#
# $$y_i = \sum_j \mathrm{softmax}_j\bigl(s_h \cos(q_i, k_j)\bigr)\, v_j$$
#
# `ProjectedAttention` makes `q` and `k`, of shape `(batch, tokens, heads, width)`, and `v` alike, and zeroes what
# is masked; with more freedom, `Attention` leaves all of it to you (the README has an example). `register` takes
# what the mechanism can do. What is said there must be so: the suite holds the class to it.

# %%
import jax
import jax.numpy as jnp
from flax import nnx

import attn_jax
from attn_jax.mechanisms.base import ProjectedAttention


@attn_jax.register("cosine", causal=True, cross=True, decode=True, weights=True, time="L²", memory="L²")
class Cosine(ProjectedAttention):
    """Softmax of `scale · cos(query, key)`; each head learns its scale."""

    mechanism = "cosine"
    cross = True

    def __init__(self, dim, num_heads, *, rngs, **common):
        super().__init__(dim, num_heads, rngs=rngs, **common)
        self.log_scale = nnx.Param(jnp.full(num_heads, 2.0, self.param_dtype))

    def mix_weights(self, q, k, mask):
        q, k = (
            x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6) for x in map(jnp.float32, (q, k))
        )
        scores = jnp.exp(self.log_scale[...])[:, None, None] * jnp.einsum("blhe,bmhe->bhlm", q, k)
        queries, keys = scores.shape[2:]
        seen = jnp.tri(queries, keys, keys - queries if self.causal else keys, dtype=bool)
        if mask is not None:
            seen &= mask[:, None, None]
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30)), 0)

    def mix(self, q, k, v, mask):
        return jnp.einsum("bhlm,bmhe->blhe", self.mix_weights(q, k, mask).astype(v.dtype), v)

    def recall(self, q, cache, filled):  # one step of decoding: the newest query and all keys so far
        return self.mix(q, cache.keys, cache.values, filled)


# %% [markdown]
# It is a mechanism like the others now. (The cell may be run again: the same class replaces its earlier
# definition.)

# %%
attention = attn_jax.build("cosine", dim=32, num_heads=4, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (2, 6, 32))
mask = jnp.arange(6) < jnp.array([[6], [4]])  # True = a real token: the second sequence has four
print(attention(x, mask=mask).shape)
print(attention.attention_weights(x, mask=mask)[1, 0].round(2))  # of the second sequence, first head

# %% [markdown]
# ## Does it keep the laws?
#
# [tests/test_conformance.py](../tests/test_conformance.py) states what every mechanism must do: what a masked
# token holds, NaN included, changes nothing; causality is exact; decoding equals the parallel form; every
# parameter gets a gradient; and so on. The option `--mechanism` runs a file first, so the cell above goes into
# one.

# %%
import inspect
import linecache

FILE = FOLDER / "cosine.py"
FILE.write_text("".join(linecache.getlines(inspect.getfile(Cosine.mix))))
tests = ["tests/test_conformance.py", "--mechanism", str(FILE), "-k", LAWS, "-n", "0", "--quiet", "--tb=short"]
done = subprocess.run([sys.executable, "-m", "pytest", *tests], capture_output=True, text=True)
print(done.stdout[-4000:], done.stderr[-1000:])
assert done.returncode == 0, "a law is broken"

# %% [markdown]
# To see what it catches, change the class and run again from there. Without `1e-6`, a masked query, which is
# zero, has no angle, and its gradient is NaN; without `cross = True`, the class does not take the `context` that
# it promises.
#
# ## Train it
#
# The same as `python -m train --config configs/lra_listops.py:cosine,smoke`: two layers on lists of up to 126
# tokens, to be computed to one of ten digits. At so few steps this shows that the mechanism runs and learns,
# nothing about which one is better; [listops.py](listops.ipynb) compares trained models.

# %%
from train.__main__ import main as train

workdir = Path(tempfile.mkdtemp(dir=FOLDER))  # a new one every time, since a finished run is not repeated
train(["--config", "configs/lra_listops.py:cosine,smoke", "--workdir", str(workdir), *SIZES])

# %% [markdown]
# The lines below the model's are baselines that read almost nothing of a list. From a shell, the mechanism needs
# a file that is a config, too: add `from configs.lra_listops import get_config` to `cosine.py` and run `python -m
# train --config cosine.py:cosine`.
#
# If it should stay: [CONTRIBUTING.md](../CONTRIBUTING.md) says what a mechanism of this repository comes with.
