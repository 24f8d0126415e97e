"""Retrieval reranking: the order of the documents that BM25 finds for a query.

    python -m train --config configs/retrieval_rerank.py                # standard attention, on a CPU
    python -m train --config configs/retrieval_rerank.py:maw --config.task.router.method=grpo
    python -m train --config configs/retrieval_rerank.py:mamba,smoke    # a minute, to see that it runs

After 250 of the 1,000 steps of the default run, standard attention (seed 0, 4 minutes of one core) has nDCG@10
0.359 on the validation, and BM25, whose order it changes, 0.433: it learns, and does not beat what it reranks.

A cross-encoder reads `[CLS] query [SEP] document [SEP]` and gives a score; it learns from a relevant document
among others, of which BM25 ranks some high, and reorders BM25's best. Data, `--config.task.source=`:

    docstrings    summary line -> function, over the standard library of the running Python (the default)
    news          title -> article, of the extra `realdata`
    DIR           a folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/{train,dev,test}.tsv, such as fiqa;
                  --config.task.train_dir=DIR trains on another one where qrels/train.tsv is missing, as in scidocs
"""

from train.config import experiment

DEFAULT = {
    "comparability": "docstrings instead of BEIR, and a small model that starts from nothing",
    "task": {
        "name": "rerank",
        "source": "docstrings",
        "train_dir": "",
        "pretrained": "",  # work directory of a run, also of another mechanism: its best model is the start
        "frozen": False,  # of it only mechanism and score head learn on
        "vocab_size": 4_096,
        "max_query_length": 24,
        "max_length": 128,
        "buckets": (64, 128),
        "num_candidates": 100,  # of BM25, to be reordered
        "train_candidates": 8,  # one of them relevant
        "hard_candidates": 3,  # of BM25, at most; the rest are any
        # How the routers of `maw` are taught: "straight_through" (by the loss itself), or from the "likelihood" or
        # "ndcg" that a depth brings: "supervised", "rule", "grpo", "actor_critic", "exact" (tasks/routing.py).
        "router": {
            "method": "straight_through",
            "reward": "likelihood",
            "group": 8,
            "temperature": 0.1,
            "entropy_weight": 0.0,  # minus the attention's entropy, and its focus on relevant pairs, in the reward
            "alignment_weight": 0.0,
            "weight": 1.0,
        },
        "num_val": 100,  # queries; 0: all
        "num_test": 0,
    },
    "model": {"dim": 64, "num_heads": 4, "num_layers": 2, "mlp_dim": 128, "dropout": 0.1},
    "batch_size": 16,
    "eval_batch_size": 2,
    "steps": 1_000,
    "eval_every": 250,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "weight_decay": 0.01},
}

SMOKE = {
    "comparability": "a few steps: shows that everything runs, nothing else",
    "task": {
        "vocab_size": 512,
        "max_length": 48,
        "buckets": (48,),
        "num_candidates": 10,
        "train_candidates": 4,
        "num_val": 20,
        "num_test": 20,
    },
    "model": {"dim": 32, "num_layers": 1},
    "batch_size": 8,
    "steps": 20,
    "eval_every": 10,
}

# The usual setting of cross-encoders on MS MARCO (Nogueira and Cho 2019): BERT's base size, here from nothing.
PAPER = {
    "comparability": "trained from nothing, where published cross-encoders start from a pretrained model",
    "task": {
        "source": "msmarco",
        "vocab_size": 32_768,
        "max_query_length": 64,
        "max_length": 512,
        "buckets": (128, 256, 512),
    },
    "model": {"dim": 768, "num_heads": 12, "num_layers": 12, "mlp_dim": 3_072, "dropout": 0.1},
    "batch_size": 32,
    "steps": 100_000,
    "eval_every": 5_000,
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 10_000},
}


def get_config(variant: str = ""):
    return experiment("retrieval_rerank", variant, default=DEFAULT, smoke=SMOKE, paper=PAPER)
