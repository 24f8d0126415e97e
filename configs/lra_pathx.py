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
    "comparability": "generated images of the same task, and a small model",
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

# As Pathfinder's released configuration, on longer sequences.
PAPER = {
    "comparability": "the released setting but for narrower queries; generated images unless data_dir is given",
    "task": {"generator": {"num_train": 160_000, "num_val": 20_000, "num_test": 20_000}},
    "model": {"dim": 32, "num_heads": 4, "num_layers": 4, "mlp_dim": 32, "pool": "mean", "dropout": 0.1},
    "batch_size": 512,
    "eval_batch_size": 512,
    "steps": 62_500,
    "eval_every": 313,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 313, "weight_decay": 0.0},
}


def get_config(variant: str = ""):
    return experiment("lra_pathx", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
