"""Image classification of Long Range Arena: grey pixels one after the other.

    python -m train --config configs/lra_image.py                       # standard attention, on a CPU
    python -m train --config configs/lra_image.py:mamba
    python -m train --config configs/lra_image.py:local,smoke           # a few steps, to see that it runs
    python -m train --config configs/lra_image.py:paper                 # the published setting, on accelerators

Data, `--config.task.source=`:

    digits    5,000 digits of MNIST, of the extra `realdata` (pip install -e '.[realdata]'): the default, and an
              easier stand-in for CIFAR-10
    cifar10   CIFAR-10, where tensorflow-datasets has prepared it; needs no TensorFlow
    DIR       CIFAR-10, in its published folder cifar-10-batches-py

LRA's code takes black pixels for padding; here they are pixels. `--config.task.mask_black=True` does as LRA did.
"""

from train.config import experiment

DEFAULT = {
    "comparability": "digits in place of CIFAR-10, and a small model",
    "task": {"name": "image", "source": "digits", "mask_black": False, "buckets": (784, 1_024)},
    "model": {"dim": 64, "num_heads": 2, "num_layers": 2, "mlp_dim": 128, "pool": "mean", "dropout": 0.0},
    "batch_size": 16,
    "steps": 600,
    "eval_every": 200,
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "a few steps of a tiny model: shows that everything runs, nothing else",
    "model": {"dim": 16, "num_layers": 1, "mlp_dim": 32},
    "batch_size": 4,
    "steps": 10,
    "eval_every": 10,
}

# The released configuration: width 128 (queries and keys 64, which our modules do not have apart from the width),
# 8 heads, 1 layer, learning rate 5e-4 with a cosine over 200 epochs, batch 256, dropout 0.3 (0.2 in attention,
# which our modules do not have). The paper says 3 layers and a learning rate of 0.01.
PAPER = {
    "comparability": "the released setting but for the narrower queries and the dropout of attention weights",
    "data_location": {"key": "task.source", "other_data": ("digits",)},
    "task": {"source": "cifar10", "buckets": (1_024,)},
    "model": {"dim": 128, "num_heads": 8, "num_layers": 1, "mlp_dim": 128, "pool": "cls", "dropout": 0.3},
    "batch_size": 256,
    "eval_batch_size": 256,
    "steps": 35_200,
    "eval_every": 176,
    "optimizer": {"learning_rate": 5e-4, "warmup_steps": 176, "weight_decay": 0.0},
}


def get_config(variant: str = ""):
    return experiment("lra_image", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
