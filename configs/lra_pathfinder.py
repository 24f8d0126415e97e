"""Pathfinder of Long Range Arena: are two dots the ends of one dashed path? 32 x 32 pixels one after the other.

    python -m train --config configs/lra_pathfinder.py                  # standard attention, on a CPU
    python -m train --config configs/lra_pathfinder.py:mamba
    python -m train --config configs/lra_pathfinder.py:strided,smoke    # a few steps, to see that it runs
    python -m train --config configs/lra_pathfinder.py:paper            # the published setting, on accelerators

The images are generated, or read from the published folder pathfinder32 with `--config.task.data_dir=DIR`.
"""

from train.config import experiment

DEFAULT = {
    "comparability": "a small model; generated images unless data_dir is given",
    "task": {
        "name": "pathfinder",
        "data_dir": "",
        "generator": {"size": 32, "num_train": 10_000, "num_val": 500, "num_test": 1_000, "distractors": 3},
        "buckets": (1_024,),
    },
    "model": {"dim": 64, "num_heads": 2, "num_layers": 2, "mlp_dim": 128, "pool": "mean", "dropout": 0.0},
    "batch_size": 16,
    "eval_batch_size": 16,
    "steps": 600,
    "eval_every": 200,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "a few steps of a tiny model: shows that everything runs, nothing else",
    "task": {"generator": {"num_train": 100, "num_val": 16, "num_test": 16}},
    "model": {"dim": 16, "num_layers": 1, "mlp_dim": 32},
    "batch_size": 4,
    "steps": 10,
    "eval_every": 10,
}

# The released configuration of the transformer: width 128 (queries and keys 64, which our modules do not have
# apart from the width), MLP 128, 4 heads, 1 layer, dropout 0.2, mean pooling; learning rate 1e-3 with a cosine,
# batch 512, 200 epochs of 312 steps, no clipping. Others of the release are narrower (32) and deeper (performer).
PAPER = {
    "comparability": "released but for the width of queries; generated images unless data_dir is given",
    "data_location": {"key": "task.data_dir"},
    "task": {"generator": {"num_train": 160_000, "num_val": 20_000, "num_test": 20_000}},
    "model": {"dim": 128, "num_heads": 4, "num_layers": 1, "mlp_dim": 128, "pool": "mean", "dropout": 0.2},
    "batch_size": 512,
    "eval_batch_size": 512,
    "steps": 62_400,
    "eval_every": 312,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 312, "weight_decay": 0.0, "clip_norm": 0.0},
}


def get_config(variant: str = ""):
    return experiment("lra_pathfinder", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
