"""Path-X of Long Range Arena: Pathfinder at 128 x 128 pixels, 16,384 tokens one after the other.

    python -m train --config configs/lra_pathx.py:mamba                 # on a CPU a demonstration
    python -m train --config configs/lra_pathx.py:local,smoke           # a few steps, to see that it runs
    python -m train --config configs/lra_pathx.py:paper                 # the published setting, on accelerators
    python -m train --config configs/lra_pathx.py

All models of the benchmark's paper stay at chance here. The images are generated, or read from the published
folder pathfinder128 with `--config.task.data_dir=DIR`. The smoke preset has 64 x 64 pixels.
"""

from train.config import experiment

DEFAULT = {
    "comparability": "a small model; generated images unless data_dir is given",
    "task": {
        "name": "pathfinder",
        "data_dir": "",
        "generator": {"size": 128, "num_train": 2_000, "num_val": 64, "num_test": 128, "distractors": 3},
        "buckets": (16_384,),
    },
    "model": {"dim": 64, "num_heads": 2, "num_layers": 2, "mlp_dim": 128, "pool": "mean", "dropout": 0.0},
    "batch_size": 4,
    "eval_batch_size": 4,
    "steps": 60,
    "eval_every": 30,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "a few steps on smaller images: shows that everything runs, nothing else",
    "task": {"generator": {"size": 64, "num_train": 40, "num_val": 4, "num_test": 4}, "buckets": (4_096,)},
    "model": {"dim": 16, "num_layers": 1, "mlp_dim": 32},
    "batch_size": 2,
    "eval_batch_size": 2,
    "steps": 4,
    "eval_every": 4,
}

# The released configuration: width 32 (queries and keys 16, which our modules do not have apart from the width),
# MLP 32, 2 heads, 1 layer, batch 64, 200 epochs of 2,500 steps; learned positions there, sinusoidal ones here.
PAPER = {
    "comparability": "released but for positions and the width of queries; generated without data_dir",
    "data_location": {"key": "task.data_dir"},
    "task": {"generator": {"num_train": 160_000, "num_val": 20_000, "num_test": 20_000}},
    "model": {"dim": 32, "num_heads": 2, "num_layers": 1, "mlp_dim": 32, "pool": "mean", "dropout": 0.1},
    "batch_size": 64,
    "eval_batch_size": 64,
    "steps": 500_000,
    "eval_every": 2_500,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2_500, "weight_decay": 0.0},
}


def get_config(variant: str = ""):
    return experiment("lra_pathx", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
