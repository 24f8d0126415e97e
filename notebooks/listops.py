# %% [markdown]
# # Train and compare three mechanisms on ListOps
#
# Three models that differ in their attention alone learn to evaluate nested lists; then one report says which
# learnt what, how sure that is, and what it cost. Everything here is also a command of two lines in a shell.
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
# ## The task
#
# A list is an operator on digits and other lists, and its value is a digit: ten classes. `[SM` is the sum modulo
# 10, `[MED` the median. Long Range Arena uses lists of 500 to 2,000 tokens; these have 10 to 64, from the same
# grammar, so that a CPU is enough.

# %%
from train.data import listops

lists = listops.generate(listops.ListOps(num_train=4, num_val=1, num_test=1, min_length=10, max_length=24))[
    "train"
]
for record in map(lists.__getitem__, range(len(lists))):
    words = listops.to_text(record["tokens"]).split()
    print(*(word for word in words if word not in "()"), "=", record["label"])

# %% [markdown]
# ## Train
#
# A config holds everything but the mechanism, which is the word behind its name. `SETTINGS` shorten the lists and
# make all models equally large, within 2 %, by the width of their MLPs: otherwise `mamba` would have more
# parameters than the others. `--show` in place of `--workdir` prints all settings of a run. A run that was
# interrupted goes on when the cell is run again, and one that is finished is only shown.

# %%
MECHANISMS = ("standard", "performer", "mamba")[: 2 if SMOKE else 3]
SETTINGS = {
    "task.generator.num_train": 200 if SMOKE else 20_000,
    "task.generator.num_val": 50 if SMOKE else 500,
    "task.generator.num_test": 50 if SMOKE else 1_000,
    "task.generator.min_length": 10,
    "task.generator.max_length": 64,
    "task.buckets": (64,),
    "model.num_layers": 1 if SMOKE else 2,
    "parameter_budget": 120_000,
    "batch_size": 32,
    "steps": 4 if SMOKE else 1_000,
    "eval_every": 2 if SMOKE else 100,
    "log_every": 1 if SMOKE else 50,
}
RUNS = Path("runs") / ("notebook-smoke" if SMOKE else "notebook")


def python(module: str, *arguments: object) -> None:
    """`python -m module` with its arguments, in a process of its own; shows what it prints."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="")
    if process.returncode:
        raise RuntimeError(f"python -m {module} ended with exit code {process.returncode}")


for mechanism in MECHANISMS:
    overrides = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    config = f"configs/lra_listops.py:{mechanism}"
    python("train", "--config", config, *overrides, "--workdir", RUNS / mechanism)

# %% [markdown]
# ## Compare
#
# The report sets the three beside each other and beside two baselines that read no list: the most frequent value,
# and the most frequent value of lists with the same outermost operator. A model that is not above the second has
# learnt to look at the first token. Intervals are over the lists of the test; with one seed they say nothing
# about another training. Three seeds are three times the same cell with `seed` set; runs that differ in their
# seed alone are put together.

# %%
python("eval.compare", *(RUNS / mechanism for mechanism in MECHANISMS), "--out", RUNS / "report")

# %% [markdown]
# The same with learning curves, costs and attention maps, in one file that can be kept or sent:

# %%
import html

from IPython.display import HTML, display

page = html.escape((RUNS / "report" / "report.html").read_text())
display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="900"></iframe></div>'))

# %% [markdown]
# Next: other mechanisms (`attn_jax.MECHANISMS` has their names), other tasks (`configs/`), or a mechanism of your
# own: [own_mechanism.ipynb](own_mechanism.ipynb).
