# %% [markdown]
# # A tour of the mechanisms
#
# attn-jax has one implementation of each attention mechanism, and all of them are called alike. This notebook
# lists them, builds one, masks tokens, draws what each lets a token read, and measures time and memory against
# length. It needs no accelerator and uses one where there is one.
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
EXTRAS: list[str] = []  # of pyproject.toml
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

# %% [markdown]
# ## What there is
#
# `attn_jax.MECHANISMS` is the registry: each name with what the mechanism can do. `time` and `memory` are how
# they grow with the length `L`. A `causal` mechanism can be built so that a token reads no later one, one with
# `cross` can read a second sequence, one with `decode` goes on token by token from a cache, and one with
# `weights` can say how much each token reads of each other one. [docs/attention.md](../docs/attention.md) has the
# equations and sources.

# %%
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from IPython.display import Image, Markdown, display

import attn_jax
from eval.measure import table

rows = []
for name, mechanism in attn_jax.MECHANISMS.items():
    row = {"mechanism": f"`{name}`", "time": mechanism.time, "memory": mechanism.memory}
    row |= {flag: "yes" if getattr(mechanism, flag) else "" for flag in ("causal", "cross", "decode", "weights")}
    summary = inspect.getdoc(inspect.getmodule(mechanism.module)).splitlines()[0]
    rows.append(row | {"what it is": summary})
display(Markdown(table(rows)))

# %% [markdown]
# ## Build one and call it
#
# A mechanism is an ordinary `nnx.Module`. Its own options have defaults; `build` refuses those that it does not
# know.

# %%
attn_jax.MECHANISMS["local"].options()

# %%
attention = attn_jax.build("local", window=8, dim=64, num_heads=4, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (2, 20, 64))
call = nnx.jit(lambda module, x, mask=None: module(x, mask=mask))
y = call(attention, x)
print(
    f"{x.shape} -> {y.shape}, {sum(p.size for p in jax.tree.leaves(nnx.state(attention, nnx.Param))):,} parameters"
)

# %%
try:
    attn_jax.build("local", windw=8, dim=64, num_heads=4, rngs=nnx.Rngs(0))
except ValueError as error:
    print(error)

# %% [markdown]
# ## Masks
#
# `mask` is boolean and True means a real token. A masked token has no influence, whatever it holds, and comes out
# as exactly 0: here the second sequence has 12 real tokens and NaN after them. Its outputs are those of the 12
# alone.

# %%
mask = jnp.arange(20) < jnp.array([[20], [12]])
y = call(attention, jnp.where(mask[..., None], x, jnp.nan), mask)
alone = call(attention, x[1:, :12])
print("largest difference from the 12 tokens alone:", jnp.abs(y[1, :12] - alone[0]).max())
print("largest output at a masked token:", jnp.abs(y[1, 12:]).max())

# %% [markdown]
# `causal=True` gives a mechanism in which a token depends on no later one. So what comes later may change at
# will:

# %%
causal = attn_jax.build("performer", dim=64, num_heads=4, causal=True, rngs=nnx.Rngs(0))
changed = x.at[:, 15:].set(100.0)
print("largest change of the first 15 outputs:", jnp.abs(call(causal, changed) - call(causal, x))[:, :15].max())

# %% [markdown]
# ## What a token reads
#
# All mechanisms on one example, as initialised: the words of a ListOps list, each a random vector plus the
# sinusoidal code of its position, so that equal words look alike. Nothing is trained: the maps show what a
# mechanism *can* read, not what it would learn to. Windows, strides and blocks are set to fit the example.
#
# First the weights that `attention_weights` gives, of the first head: a row is a token and sums to 1 over what it
# reads. White is 0 and the darkest shade the largest weight of the panel, which stands beside its name.
# `cross_memory` is given no second sequence and is then standard attention. `mamba` has no weights: what it reads
# passes through a state whose channels forget at rates of their own, so no single number says how much a token
# counts.

# %%
import matplotlib.pyplot as plt

from attn_jax.positions import sinusoidal_positions

WORDS = "[MAX 2 9 [MIN 4 7 ] 0 [SM 5 5 8 ] 3 [MED 1 6 2 ] 9 [MAX 0 [MIN 8 3 ] 7 ] 4 [SM 1 2 ] 6 ]".split()
words = WORDS[:8] if SMOKE else WORDS
OPTIONS = {
    "local": {"window": 4},
    "local_global": {"window": 4, "num_globals": 2},
    "hyper": {"block_size": 8, "num_samples": 8, "min_length": 8},
    "strided": {"stride": 8},
    "vq": {"num_codes": 16},
}
DIM = 32

vocabulary = sorted(set(WORDS))
vectors = jax.random.normal(jax.random.key(1), (len(vocabulary), DIM))
example = vectors[np.array([vocabulary.index(word) for word in words])] + sinusoidal_positions(len(words), DIM)


def build(name: str):
    """The mechanism `name` for the example, in evaluation mode."""
    module = attn_jax.build(name, dim=DIM, num_heads=2, rngs=nnx.Rngs(0), **OPTIONS.get(name, {}))
    module.eval()
    return module


def draw(maps: dict[str, np.ndarray | None]) -> None:
    """A panel for each mechanism: rows are tokens, columns what they read."""
    _, panels = plt.subplots(3, 5, figsize=(13, 8.4), layout="constrained")
    for axes in panels.flat[len(maps) :]:
        axes.set_axis_off()
    for axes, (name, values) in zip(panels.flat, maps.items()):
        axes.set(xticks=[], yticks=[])
        if values is None:
            axes.set_title(name, fontsize=9)
            axes.text(0.5, 0.5, "has no weights", ha="center", va="center", transform=axes.transAxes)
            continue
        axes.imshow(values, cmap="Blues", vmin=0)
        axes.set_title(f"{name}, up to {values.max():.2g}", fontsize=9)
    plt.show()


def weights(name: str) -> np.ndarray | None:
    """`(L, L)`: how much each token reads of each other one, in the first head; None where that has no meaning."""
    module = build(name)
    found = jax.jit(module.attention_weights)(example[None])
    return None if found is None else np.asarray(found[0, 0])


DRAWN = ["standard", "mamba"] if SMOKE else list(attn_jax.MECHANISMS)
draw({name: weights(name) for name in DRAWN})

# %% [markdown]
# Then what every mechanism has: the derivative. A shade is the norm of $\partial y_i / \partial x_j$, how much
# output $y_i$ changes with input $x_j$, all heads together. Beside the weights it holds what $x_j$ does to its
# own query, hence the diagonals. What is rounded, drawn or routed counts as fixed: of `vq` this is the
# straight-through derivative.

# %%


def influence(name: str) -> np.ndarray:
    """`(L, L)`: the Frobenius norm of the derivative of each output by each input."""
    module = build(name)
    jacobian = jax.jit(jax.jacrev(lambda x: module(x[None])[0]))(example)
    return np.asarray(jnp.sqrt(jnp.square(jacobian).sum((1, 3))))


draw({name: influence(name) for name in DRAWN})

# %% [markdown]
# ## Time and memory against length
#
# `python -m eval.benchmark` measures; called from here it does the same. Before a mechanism is timed it is
# checked against its dense version in float64. Both axes of the plots are logarithmic, so `length^p` is a line of
# slope `p`: the key has the fitted `p` of each curve beside the growth that the registry claims. Lengths are
# short here, so that fixed costs still flatten the curves; `LENGTHS = "1024,4096,16384"` takes longer and shows
# more.

# %%
from eval.benchmark import main as benchmark

MEASURED = "local" if SMOKE else "standard,local,performer,mamba"
LENGTHS = "16,32" if SMOKE else "512,1024,2048,4096"
OUT = Path("runs/notebooks/benchmark")
size = ["--dim", "16" if SMOKE else "128", "--heads", "2", "--repeats", "1" if SMOKE else "5", "--budget", "10"]
benchmark(["--mechanisms", MEASURED, "--lengths", LENGTHS, *size, "--out", str(OUT)])

# %%
display(Image(OUT / "growth.png"))

# %% [markdown]
# Next: [train and compare three of them](listops.ipynb), or [write your own](own_mechanism.ipynb).
